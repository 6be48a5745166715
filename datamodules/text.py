"""Language modeling data: fixed-length windows of one token tensor, as views without copies.

Training windows start at random positions, drawn with replacement (nanoGPT), or cover the text once
per epoch. The last tenth of the text is for validation: side-by-side windows predict each token of
it once.

Axes: b batch, t time (the context length).
"""

import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ravine.errors import RunError, UsageError

from .base import BaseDataModule, check_fraction
from .corpus import (
    Corpus,
    TextSummary,
    build_corpus,
    corpus_from_array,
    prepare_token_file,
)
from .downloads import TextName, download_if_missing, log_once, resolve_file, text_source
from .loaders import EvalLoader, ResumableLoader, check_positive
from .nanogpt_bins import TokenType, has_nanogpt_bins, read_nanogpt_bins
from .samplers import EpochSampler, StridedWindowSampler, resolve_seed
from .text_files import list_files, read_text
from .tokenizers import NumberTokenizer, SpecialTokenMode, Tokenizer, tokenizer_provenance

IGNORE_INDEX = -100  # target of positions without loss, as in F.cross_entropy
# arguments of TextDataModule that choose a text or say how it is read
TEXT_OPTIONS = {
    "path",
    "source",
    "root",
    "tokenizer",
    "max_chars_in_memory",
    "special_tokens",
    "vocab_size",
    "dtype",
}


def python_docs_text() -> Iterator[str]:
    """Yield the embedded text: CPython's built-in help topics, 465 KB of technical prose."""
    from pydoc_data.topics import topics

    yield "\n\n".join(topics[name] for name in sorted(topics))


class TextDataModule(BaseDataModule):
    """Text as batches (inputs, targets), both int64 (b t); targets are shifted by one token.

    Example:

        data = TextDataModule("my.txt", context_length=128, batch_size=64)
        Trainer(max_steps=500).fit(LanguageModel(num_layers=2, d_model=64), datamodule=data)
    """

    def __init__(
        self,
        path: str | Path | None = None,
        source: TextName = "auto",
        root: str | None = None,
        context_length: int = 64,
        batch_size: int = 32,
        val_fraction: float = 0.1,
        seed: int | None = None,
        tokenizer: str = "characters",
        max_chars_in_memory: int = 2**28,
        window_sampling: Literal["random", "sequential"] = "random",
        start_token: int = 0,
        stop_token: int | None = None,
        special_tokens: SpecialTokenMode = "as_text",
        vocab_size: int | None = None,
        dtype: TokenType | None = None,
    ) -> None:
        """Check the arguments; files are read in `setup`.

        Args:
            path: a text file, a folder of text files, or a folder with nanoGPT's train.bin and
                val.bin; by default `source` is used.
            source: a text by its name (docs/data.md lists them); embedded: CPython's help topics;
                auto: the first text of the list if it is available, otherwise the embedded text.
            root: the folder of datasets; by default the variable DATA_ROOT.
            context_length: t.
            batch_size: windows of one optimizer step, over all ranks and accumulated batches.
            val_fraction: fraction at the end of the text, used for validation and for `test`.
            seed: seed of the order of the windows; by default that of seed_everything.
            tokenizer: characters (of the text), bytes, gpt2 (GPT-2's byte pair encoding), or the
                path of a tokenizer.json or of a folder with one or with vocab.json and merges.txt.
            max_chars_in_memory: number of characters; a longer text is memory-mapped and stays off
                the device.
            window_sampling: start of the training windows: random; or sequential: side by side from
                a random offset per epoch, so that an epoch covers every token once.
            start_token: index of the first token to use; the vocabulary is that of the whole text.
            stop_token: index of the first token not to use; by default all tokens are used.
            special_tokens: how the tokenizer's special tokens, like <|endoftext|>, are read in a
                text: as_text, as ordinary text; allow, as one token each; or error, as an error.
            vocab_size: vocabulary size of a folder of tokens whose tokenizer is not known.
            dtype: integer type of a folder of tokens; by default that of its meta.pkl or meta.json,
                or uint16.
        """
        super().__init__()
        check_positive("context_length", context_length)
        check_positive("batch_size", batch_size)
        # raises an error for a number that is not between 0 and 1
        check_fraction("val_fraction", val_fraction)
        self.path, self.root = path, root
        self.source: TextName = source
        text_source(source)  # UsageError for an unknown name
        self.context_length, self.batch_size = context_length, batch_size
        self.val_fraction, self.seed = val_fraction, seed
        self.max_chars_in_memory, self.tokenizer_name = max_chars_in_memory, tokenizer
        self.window_sampling = window_sampling
        self.start_token, self.stop_token = start_token, stop_token
        self.special_tokens: SpecialTokenMode = special_tokens
        self.vocab_size = vocab_size
        self.dtype: TokenType | None = dtype
        self._corpus: Corpus | None = None
        self._download_error = ""

    @classmethod
    def from_tokens(
        cls,
        tokens: np.ndarray | Tensor,
        tokenizer: Tokenizer | int,
        **options: Any,
    ) -> "TextDataModule":
        """Make a datamodule from an array of token ids (n), which may be memory-mapped.

            data = TextDataModule.from_tokens(
                numpy.memmap("my.bin", "uint16"), 10_000, context_length=256
            )

        Args:
            tokens: integer token ids.
            tokenizer: the tokenizer of the tokens, or the vocabulary size.
            options: the arguments of the class that do not choose or read a text, such as
                context_length, val_fraction and start_token.

        Raises:
            UsageError: an option has no effect on tokens, or the tokens are too few.
        """
        if unused := sorted(options.keys() & TEXT_OPTIONS):
            raise UsageError(
                f"from_tokens: {', '.join(unused)} has no effect on tokens",
                sorted(inspect.signature(cls).parameters.keys() - TEXT_OPTIONS),
                f"remove {', '.join(unused)}",
            )
        data = cls(**options)
        # NumberTokenizer knows only ids, and writes a text as "17 4"
        is_size = isinstance(tokenizer, int | np.integer)
        known_tokenizer = NumberTokenizer(int(tokenizer)) if is_size else tokenizer
        # the tokens with their tokenizer and SHA-256, after a check of their range
        corpus = corpus_from_array(tokens, known_tokenizer)
        data._corpus = data._slice_tokens("the array", "tokens", corpus)
        data.provenance = {
            "source": "tokens",
            "file": "",
            "sha256": data._corpus.sha256,
            **tokenizer_provenance(data._corpus.tokenizer),
        }
        # raises an error if training or validation would have too few tokens
        data._check_length("the array", "tokens", data._corpus)
        return data

    @property
    def corpus(self) -> Corpus:
        """Return the tokens and their tokenizer; available after `setup`."""
        if self._corpus is None:
            raise RunError(
                "TextDataModule has no text before setup()", hint="call setup('fit') first"
            )
        return self._corpus

    @property
    def tokenizer(self) -> Any:
        """Return the tokenizer of the text; a model saves it with its weights."""
        return self.corpus.tokenizer

    def prepare_data(self) -> None:
        """Download a missing text, and tokenize it for all ranks of the node.

        Lightning calls this on local rank 0 only. Without a distributed run, `setup` tokenizes.
        """
        if self._corpus is not None:
            return  # of from_tokens, or set up by an earlier stage
        if self.path is None:
            self._download_error = download_if_missing(
                self.source, text_source(self.source), self.root
            )
        self.prepare_for_all_ranks(self._write_token_file)

    def _write_token_file(self) -> TextSummary | None:
        """Write the tokens of the text to a file; return None for a folder of token files."""
        file, name, _ = self._resolve_source()
        if file and has_nanogpt_bins(file):
            return None
        self._check_token_options(name)
        return prepare_token_file(
            self._make_text_reader(file),
            name,
            self.max_chars_in_memory,
            self.tokenizer_name,
            self.special_tokens,
        )

    def _resolve_source(self) -> tuple[Path | None, str, str]:
        """Return the file or folder (None: embedded text), its name, and a fallback reason."""
        file, reason = resolve_file(
            self.path, self.source, text_source(self.source), self.root, self._download_error
        )
        return file, str(file or "the EMBEDDED text (help topics of CPython)"), reason

    def _make_text_reader(self, file: Path | None) -> Callable[[], Iterator[str]]:
        files = list_files(file) if file else []
        return (lambda: read_text(files)) if file else python_docs_text

    def setup(self, stage: str) -> None:
        """Read and tokenize the text and log its source; raise an error if it is too short.

        Lightning calls this on every rank, before each stage.
        """
        summary = self.get_prepared()  # collective: before any return
        if self._corpus is not None:
            return  # set up by an earlier stage
        # `reason`: why the embedded text is used; "" for another
        file, name, reason = self._resolve_source()
        corpus = (
            # None if the folder has no train.bin and val.bin
            read_nanogpt_bins(file, self.tokenizer_name, self.vocab_size, self.dtype)
            if file
            else None
        )
        if corpus is None:  # a text, not a folder of tokens
            # raises an error for vocab_size or dtype, which only a folder of tokens uses
            self._check_token_options(name)
            corpus = build_corpus(
                self._make_text_reader(file),
                name,
                self.max_chars_in_memory,
                self.tokenizer_name,
                self.special_tokens,
                prepared_summary=summary,
            )
        elif self.special_tokens != "as_text":
            raise UsageError(
                f"special_tokens={self.special_tokens!r} has no effect: {name} holds tokens, not "
                "a text",
                ["as_text"],
                "remove special_tokens",
            )
        tokenizer_type = corpus.tokenizer.tokenizer_type
        unit = tokenizer_type if tokenizer_type in ("characters", "bytes") else "tokens"
        # the tokens from start_token to stop_token
        corpus = self._slice_tokens(name, unit, corpus)
        self._check_length(name, unit, corpus)
        self._corpus = corpus
        if self.path is not None:
            resolved_source = self.source
        else:
            # `text_source`: the public file of this name, with its checksum
            resolved_source = text_source(self.source).name if file else "embedded"
        self.provenance = {
            "source": resolved_source,
            "file": str(file or ""),
            "sha256": corpus.sha256,
            **tokenizer_provenance(corpus.tokenizer),
        }
        train, val = self._split_corpus(corpus)
        size = (
            f"{len(train) + len(val):,} {unit}, {corpus.tokenizer.vocab_size:,} different; "
            f"{len(train):,} train, {len(val):,} val"
        )
        note = "; ".join(word for word in (reason, corpus.note) if word)
        log_once(f"data: {name}, {size}{note and '; ' + note}", is_warning=bool(note))

    def _check_token_options(self, name: str) -> None:
        """Raise an error if an option is set that applies only to a folder of token files."""
        for option in ("vocab_size", "dtype"):
            if getattr(self, option) is not None:
                raise UsageError(
                    f"{option}={getattr(self, option)!r} has no effect: {name} is a text, not a "
                    "folder of tokens",
                    ["a folder with train.bin and val.bin"],
                    f"remove {option}",
                )

    def _slice_tokens(self, name: str, unit: str, corpus: Corpus) -> Corpus:
        """Return the corpus with tokens `start_token` to `stop_token` only."""
        count = len(corpus.tokens)
        stop = count if self.stop_token is None else self.stop_token
        if (self.start_token, stop) == (0, count):
            return corpus
        if not 0 <= self.start_token < stop <= count or corpus.val_tokens is not None:
            raise UsageError(
                f"start_token={self.start_token} and stop_token={self.stop_token} are not a part "
                f"of the {count:,} {unit} of {name}",
                [f"0 to {count} of a text without a separate validation file"],
                "use start_token=0",
                flag="--data.start_token=0",
            )
        return corpus._replace(tokens=corpus.tokens[self.start_token : stop])

    def _check_length(self, name: str, unit: str, corpus: Corpus) -> None:
        """Raise an error if the training or validation tokens are too few.

        Args:
            name: name of the text, for errors.
            unit: what is counted: characters, bytes or tokens.
            corpus: the tokens.
        """
        # the validation tokens are the end of the text, or a file of their own
        train, val = self._split_corpus(corpus)
        count = len(train) + len(val)
        if len(val) < 2:
            raise UsageError(
                f"val_fraction={self.val_fraction} of the {count:,} {unit} of {name} is less "
                "than two",
                [f"two or more {unit} for validation"],
                "use val_fraction=0.1, or a longer text",
                flag="--data.val_fraction=0.1, or --data.path=FILE",
            )
        if len(train) <= self.context_length:
            max_fitting = len(train) - 1
            if max_fitting > 0:
                allowed = f"a context_length of at most {max_fitting}"
                hint = f"use context_length={max_fitting}, or a longer text"
                flag = f"--data.context_length={max_fitting}"
            else:
                allowed, hint, flag = "a longer text", "use path='FILE'", "--data.path=FILE"
            raise UsageError(
                f"{name} has {count:,} {unit}, {len(train):,} of them for training, which is "
                f"less than one window of context_length + 1 = {self.context_length + 1}",
                [allowed],
                hint,
                flag=flag,
            )

    def _split_corpus(self, corpus: Corpus) -> tuple[Tensor, Tensor]:
        if corpus.val_tokens is not None:
            return corpus.tokens, corpus.val_tokens
        split = int(len(corpus.tokens) * (1 - self.val_fraction))
        return corpus.tokens[:split], corpus.tokens[split:]

    def train_dataloader(self) -> ResumableLoader:
        """Return the loader of training windows; an epoch has about as many tokens as the split."""
        tokens, _ = self._get_splits()
        t = self.context_length
        windows = tokens.unfold(0, t + 1, 1)  # a view: (n - t, t + 1), one row per start

        def make_batch(starts: Tensor) -> tuple[Tensor, Tensor]:
            window = windows[starts]  # (b, t + 1)
            return window[:, :-1].long(), window[:, 1:].long()  # inputs, targets

        # the given seed, else that of seed_everything
        seed = resolve_seed(self.seed)
        epoch_sampler: EpochSampler
        if self.window_sampling == "sequential":
            # starts that are t apart, from a random offset per epoch
            epoch_sampler = StridedWindowSampler(seed, len(windows), t, tokens.device)
            num_samples = epoch_sampler.num_items
        else:
            # random starts, each drawn independently, so windows may overlap
            epoch_sampler = EpochSampler(seed, len(windows), replacement=True, device=tokens.device)
            num_samples = max(self.batch_size, len(tokens) // t)
        return self.make_train_loader(epoch_sampler, make_batch, num_samples)

    def val_dataloader(self) -> EvalLoader:
        """Return the loader of the validation part; the last window is padded with targets -100."""
        _, tokens = self._get_splits()
        t, last = self.context_length, len(tokens) - 1
        offsets = torch.arange(t + 1, device=tokens.device)

        def make_batch(numbers: Tensor) -> tuple[Tensor, Tensor]:
            positions = numbers.to(tokens.device)[:, None] * t + offsets  # (b, t + 1)
            window = tokens[positions.clamp(max=last)].long()
            return window[:, :-1], window[:, 1:].masked_fill(positions[:, 1:] > last, IGNORE_INDEX)

        return self.make_eval_loader(make_batch, -(-last // t))

    def predict_dataloader(self) -> EvalLoader:
        """Raise an error that points to `generate`, the command for language models."""
        raise UsageError(
            "TextDataModule has no data for predict: a text has no labels",
            ["generate, which continues a text"],
            "use LanguageModel.generate(...)",
            flag="lightning generate --ckpt_path=last",
        )

    def _get_splits(self) -> tuple[Tensor, Tensor]:
        """Return training and validation tokens, on the device unless they are memory-mapped."""
        corpus = self.corpus
        if self.trainer is not None and not corpus.is_memmap:
            device, tokens = self.trainer.strategy.root_device, corpus.tokens
            if device.type != "cpu" and tokens.dtype == torch.uint16:
                tokens = tokens.to(torch.int32)  # no uint16 gather on GPUs
            corpus = corpus._replace(tokens=tokens.to(device))
            self._corpus = corpus  # keep the moved tensors: one transfer
        return self._split_corpus(corpus)
