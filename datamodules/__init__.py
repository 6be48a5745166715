from .order import EvalLoader, Order, Share, TrainLoader, generator
from .spam import SpamDataModule
from .text import TextDataModule
from .tokenizers import CharTokenizer

__all__ = [
    "CharTokenizer",
    "EvalLoader",
    "Order",
    "Share",
    "SpamDataModule",
    "TextDataModule",
    "TrainLoader",
    "generator",
]
