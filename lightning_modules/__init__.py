"""What is learned: tasks, their nets, losses and sampling."""

from .base import TaskModule
from .diffusion import Diffusion
from .imaging.classifier import ClassifierFeatures, ImageClassifier
from .policy.functions import RewardFunction
from .policy.rewards import Reward
from .policy.terms import (
    BatchDistance,
    Binary,
    CharacterDiversity,
    CharacterFraction,
    LineLength,
    ReferenceLogProbability,
    SpeakerDiversity,
    UniqueWords,
    VocabularyFraction,
    WordUniqueness,
)
from .reinforce import Reinforce
from .shakespeare import LanguageModel
from .spam import SpamClassifier

__all__ = [
    "BatchDistance",
    "Binary",
    "CharacterDiversity",
    "CharacterFraction",
    "ClassifierFeatures",
    "Diffusion",
    "ImageClassifier",
    "LanguageModel",
    "LineLength",
    "ReferenceLogProbability",
    "Reinforce",
    "Reward",
    "RewardFunction",
    "SpamClassifier",
    "SpeakerDiversity",
    "TaskModule",
    "UniqueWords",
    "VocabularyFraction",
    "WordUniqueness",
]
