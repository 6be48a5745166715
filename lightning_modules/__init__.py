"""What is learned: tasks, their nets, losses and sampling."""

from .base import TaskModule
from .diffusion import Diffusion
from .shakespeare import LanguageModel
from .spam import SpamClassifier

__all__ = ["Diffusion", "LanguageModel", "SpamClassifier", "TaskModule"]
