from .answers import AnswerDataModule
from .order import EvalLoader, Order, Share, TrainLoader, generator
from .spam import SpamDataModule
from .text import TextDataModule
from .tokenizers import BPETokenizer, ByteTokenizer, CharTokenizer

__all__ = [
    "AnswerDataModule",
    "BPETokenizer",
    "ByteTokenizer",
    "CharTokenizer",
    "EvalLoader",
    "Order",
    "Share",
    "SpamDataModule",
    "TextDataModule",
    "TrainLoader",
    "generator",
]
