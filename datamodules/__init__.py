from .images import ImageDataModule
from .instruction import InstructionDataModule
from .loaders import DataParallelInfo, EvalLoader, ResumableLoader
from .prompts import PromptBatch, PromptDataModule
from .regression import RegressionDataModule
from .samplers import EpochSampler, seeded_generator
from .spam import SpamDataModule
from .text import TextDataModule
from .tokenizer_json import FileTokenizer
from .tokenizers import BPETokenizer, ByteTokenizer, CharTokenizer, NumberTokenizer

__all__ = [
    "BPETokenizer",
    "ByteTokenizer",
    "CharTokenizer",
    "DataParallelInfo",
    "EpochSampler",
    "EvalLoader",
    "FileTokenizer",
    "ImageDataModule",
    "InstructionDataModule",
    "NumberTokenizer",
    "PromptBatch",
    "PromptDataModule",
    "RegressionDataModule",
    "ResumableLoader",
    "SpamDataModule",
    "TextDataModule",
    "seeded_generator",
]
