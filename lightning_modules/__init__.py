"""What is learned: tasks, their nets, losses and sampling."""

from .base import TaskModule
from .diffusion import Diffusion
from .imaging.classifier import ClassifierFeatures, ImageClassifier
from .policy import terms
from .policy.functions import RewardFunction
from .policy.rewards import Reward
from .policy.terms import *  # noqa: F403
from .reinforce import Reinforce
from .shakespeare import LanguageModel
from .spam import SpamClassifier

__all__ = [
    "ClassifierFeatures",
    "Diffusion",
    "ImageClassifier",
    "LanguageModel",
    "Reinforce",
    "Reward",
    "RewardFunction",
    "SpamClassifier",
    "TaskModule",
]
__all__ += terms.__all__
