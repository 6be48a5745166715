"""What is learned: tasks, their nets, losses and sampling."""

from .base import TaskModule

__all__ = ["TaskModule"]
