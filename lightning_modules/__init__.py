"""What is learned: tasks, their nets, losses and sampling."""

from .base import TaskModule
from .shakespeare import LanguageModel
from .spam import SpamClassifier

__all__ = ["LanguageModel", "SpamClassifier", "TaskModule"]
