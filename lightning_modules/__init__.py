"""What is learned: tasks, their nets, losses and sampling."""

from .base import TaskModule
from .shakespeare import LanguageModel

__all__ = ["LanguageModel", "TaskModule"]
