from .order import EvalLoader, Order, Share, TrainLoader, generator
from .text import TextDataModule
from .tokenizers import CharTokenizer

__all__ = [
    "CharTokenizer",
    "EvalLoader",
    "Order",
    "Share",
    "TextDataModule",
    "TrainLoader",
    "generator",
]
