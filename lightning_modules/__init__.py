"""Task modules (LightningModules), with their networks, losses and sampling."""

from .diffusion import Diffusion
from .image_classifier import ClassifierFeatures, ImageClassifier
from .language_model import LanguageModel
from .objective import Objective
from .regression import Regression
from .reinforce import Reinforce
from .rl.rewards import builtin
from .rl.rewards.base import Reward
from .rl.rewards.builtin import *  # noqa: F403
from .rl.rewards.custom import RewardFunction
from .spam_classifier import SpamClassifier
from .task_module import TaskModule

__all__ = [
    "ClassifierFeatures",
    "Diffusion",
    "ImageClassifier",
    "LanguageModel",
    "Objective",
    "Regression",
    "Reinforce",
    "Reward",
    "RewardFunction",
    "SpamClassifier",
    "TaskModule",
]
__all__ += builtin.__all__
