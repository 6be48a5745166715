from .images import ImageDataModule
from .instruction import AnswerDataModule
from .loaders import DataParallelInfo, EvalLoader, Order, TrainLoader, generator
from .prompts import PromptDataModule, Prompts
from .spam import SpamDataModule
from .text import TextDataModule
from .tokenizers import (
    BPETokenizer,
    ByteTokenizer,
    CharTokenizer,
    FileTokenizer,
    NumberTokenizer,
)

__all__ = [
    "AnswerDataModule",
    "BPETokenizer",
    "ByteTokenizer",
    "CharTokenizer",
    "DataParallelInfo",
    "EvalLoader",
    "FileTokenizer",
    "ImageDataModule",
    "NumberTokenizer",
    "Order",
    "PromptDataModule",
    "Prompts",
    "SpamDataModule",
    "TextDataModule",
    "TrainLoader",
    "generator",
]
