"""Text for language models: windows of one long tensor of tokens, and nothing copied to get them.

Training windows start anywhere, drawn with replacement (nanoGPT), or pass over the text once an
epoch; the last tenth of the text is for validation, every character of it predicted once, in
windows side by side.

Axes: b batch, t time (the context length).
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, cast

import lightning as L
import numpy as np
import torch
from torch import Tensor

from ravine.errors import RunError, UsageError

from .base import Prepared, handed_over, has_ranks
from .corpus import Corpus, Outline, bins, files_of, load, of_array, prepare, read
from .downloads import TextName, announce, choose, fetch, text_source
from .loaders import EvalLoader, Order, Passes, Share, TrainLoader, check_positive, global_seed
from .token_cache import TokenType, is_bins
from .tokenizers import NumberTokenizer, Specials, Tokenizer

IGNORED = -100  # the target where there is nothing to predict, as in F.cross_entropy


def documentation() -> Iterator[str]:
    """The embedded text: the help topics inside every CPython, 465 KB of technical prose."""
    from pydoc_data.topics import topics

    yield "\n\n".join(topics[name] for name in sorted(topics))


class TextDataModule(L.LightningDataModule):
    """A text as batches (inputs, targets), both int64 (b t), targets one token further on.

    data = TextDataModule("my.txt", context=128, batch_size=64)
    Trainer(max_steps=500).fit(LanguageModel(layers=2, width=64), datamodule=data)

    Args:
        path: a text file, or a folder of them, or of nanoGPT's train.bin and val.bin; without it
            `source` decides.
        source: a text by its name (docs/data.md lists them); embedded: CPython's help topics; auto:
            the first of the list where it can be had, otherwise the embedded text.
        root: the folder of data sets; by default the variable DATA_ROOT.
        context: t.
        batch_size: windows of one optimizer step, over all ranks and accumulated batches.
        val_fraction: the last part of the text, kept for validation (and for `test`).
        seed: of the order of the windows; by default that of seed_everything.
        tokenizer: what a token is: characters (of the text), bytes, gpt2 (a piece of GPT-2's), or
            the path of a tokenizer.json or of a folder with one or with vocab.json and merges.txt.
        memory_limit: characters; a longer text is not held in memory or moved to the device.
        windows: where training windows start: at random; or in passes, side by side from an offset
            that is another each epoch, so that an epoch sees every token once.
        begin: the first token of the text to use; the vocabulary is the whole text's.
        end: the first one not to use; by default there is none.
        specials: how the tokenizer's special tokens, like <|endoftext|>, are read in a text: plain,
            as other words; allowed, as one token each; or refuse.
        vocabulary: of a folder of tokens: how many different ones there are, where their text is
            not known.
        dtype: of a folder of tokens: the type of the numbers; by default what its meta.pkl or
            meta.json says, or uint16.
    """

    def __init__(
        self,
        path: str | Path | None = None,
        source: TextName = "auto",
        root: str | None = None,
        context: int = 64,
        batch_size: int = 32,
        val_fraction: float = 0.1,
        seed: int | None = None,
        tokenizer: str = "characters",
        memory_limit: int = 2**28,
        windows: Literal["random", "passes"] = "random",
        begin: int = 0,
        end: int | None = None,
        specials: Specials = "plain",
        vocabulary: int | None = None,
        dtype: TokenType | None = None,
    ) -> None:
        """Check the sizes; files are looked at in `setup`."""
        super().__init__()
        check_positive("context", context)
        check_positive("batch_size", batch_size)
        if not 0 < val_fraction < 1:
            raise UsageError(
                f"val_fraction is {val_fraction}; allowed is a number between 0 and 1: "
                "type --data.val_fraction=0.1"
            )
        self.path, self.root = path, root
        self.source: TextName = source
        text_source(source)  # UsageError for an unknown name
        self.context, self.batch_size = context, batch_size
        self.val_fraction, self.seed, self.memory_limit = val_fraction, seed, memory_limit
        self.kind, self.windows, self.begin, self.end = tokenizer, windows, begin, end
        self.specials: Specials = specials
        self.vocabulary = vocabulary
        self.dtype: TokenType | None = dtype
        self.resolved: dict[str, Any] = {}  # what was taken: source, file, sha256
        self._corpus: Corpus | None = None
        self._prepared: Prepared | None = None  # between prepare_data and setup
        self._tried = ""

    @classmethod
    def of_tokens(
        cls,
        tokens: np.ndarray | Tensor,
        tokenizer: Tokenizer | int,
        **options: Any,
    ) -> "TextDataModule":
        """The same of an array of tokens (n), a mapped one too.

        data = TextDataModule.of_tokens(numpy.memmap("my.bin", "uint16"), 10_000, context=256)

        Args:
            tokens: whole numbers.
            tokenizer: what made them, or how many different ones there are.
            options: the other arguments.
        """
        data = cls(**options)
        known = NumberTokenizer(tokenizer) if isinstance(tokenizer, int) else tokenizer
        data._corpus = of_array(tokens, known)
        data.resolved = {"source": "tokens", "file": "", "sha256": data._corpus.sha256}
        data._check_length("the array", "tokens", data._corpus)
        return data

    @property
    def corpus(self) -> Corpus:
        """The tokens and their tokenizer, once `setup` has run."""
        if self._corpus is None:
            raise RunError("TextDataModule has no text yet: call setup() first")
        return self._corpus

    @property
    def tokenizer(self) -> Any:
        """What turned the text into tokens; a model keeps it with its weights."""
        return self.corpus.tokenizer

    def prepare_data(self) -> None:
        """Download what is missing, and tokenize for all ranks of the machine.

        Lightning calls this on local rank 0 only. One process alone tokenizes in `setup`.
        """
        if self.path is None:
            self._tried = fetch(self.source, text_source(self.source), self.root)
        if self._corpus is None and has_ranks(self.trainer):
            self._prepared = Prepared.by(self._prepare)

    def _prepare(self) -> Outline | None:
        """Write the tokens of the text to a file; a folder of tokens is one already."""
        file, name, _ = self._source()
        if file and is_bins(file):
            return None
        self._refuse_token_options(name)
        return prepare(self._text(file), name, self.memory_limit, self.kind, self.specials)

    def _source(self) -> tuple[Path | None, str, str]:
        """The file or folder, None for the embedded text; its name; why it was taken."""
        if self.path is not None:
            file, why = Path(self.path).expanduser(), ""
        else:
            file, why = choose(self.source, text_source(self.source), self.root, self._tried)
        return file, str(file or "the EMBEDDED text (help topics of CPython)"), why

    def _text(self, file: Path | None) -> Callable[[], Iterator[str]]:
        files = files_of(file) if file else []
        return (lambda: read(files)) if file else documentation

    def setup(self, stage: str) -> None:
        """Read the text, say which one, and refuse one that is too short."""
        prepared = None
        if has_ranks(self.trainer):
            prepared = handed_over(self._prepared, self.trainer)
            self._prepared = None
        if self._corpus is not None:
            return
        file, name, why = self._source()
        corpus = bins(file, self.kind, self.vocabulary, self.dtype) if file else None
        if corpus is None:
            self._refuse_token_options(name)
            text, limit = self._text(file), self.memory_limit
            corpus = load(text, name, limit, self.kind, self.specials, prepared)
        elif self.specials != "plain":
            raise UsageError(
                f"{name} holds tokens, in which specials={self.specials} changes nothing; allowed: "
                "plain; leave --data.specials away"
            )
        kind = corpus.tokenizer.kind
        unit = kind if kind in ("characters", "bytes") else "tokens"
        corpus = self._part(name, unit, corpus)
        self._check_length(name, unit, corpus)
        self._corpus = corpus
        known = text_source(self.source).name if file else "embedded"
        taken = self.source if self.path is not None else known
        self.resolved = {"source": taken, "file": str(file or ""), "sha256": corpus.sha256}
        size = f"{len(corpus.tokens):,} {unit}, {corpus.tokenizer.vocabulary:,} different"
        note = "; ".join(word for word in (why, corpus.note) if word)
        announce(f"data: {name}, {size}{note and '; ' + note}", loud=bool(note))

    def _refuse_token_options(self, name: str) -> None:
        """Refuse what only a folder of tokens can use."""
        for option in ("vocabulary", "dtype"):
            if getattr(self, option) is not None:
                raise UsageError(
                    f"{option} is {getattr(self, option)}, and {name} is a text, whose tokens are "
                    "made here; allowed: a folder with train.bin and val.bin; leave "
                    f"--data.{option} away"
                )

    def _part(self, name: str, unit: str, corpus: Corpus) -> Corpus:
        """From `begin` to `end`."""
        count = len(corpus.tokens)
        end = count if self.end is None else self.end
        if (self.begin, end) == (0, count):
            return corpus
        if not 0 <= self.begin < end <= count or corpus.rest is not None:
            raise UsageError(
                f"begin {self.begin} and end {self.end} are no part of the {count:,} {unit} of "
                f"{name}; allowed: 0 to {count} of a text in one piece; type --data.begin=0"
            )
        return corpus._replace(tokens=corpus.tokens[self.begin : end])

    def _check_length(self, name: str, unit: str, corpus: Corpus) -> None:
        train, rest = self._split(corpus)
        count = len(train) + len(rest)
        if len(rest) < 2:
            raise UsageError(
                f"val_fraction {self.val_fraction} of the {count:,} {unit} of {name} is less "
                "than two; type --data.val_fraction=0.1, or give a longer text"
            )
        if len(train) <= self.context:
            fits = len(train) - 1
            out = f"type --data.context={fits} or less, or " if fits > 0 else ""
            raise UsageError(
                f"{name} has {count:,} {unit}, {len(train):,} of them for training: less than one "
                f"window of context + 1 = {self.context + 1}; {out}give a longer text"
            )

    def _split(self, corpus: Corpus) -> tuple[Tensor, Tensor]:
        if corpus.rest is not None:
            return corpus.tokens, corpus.rest
        split = int(len(corpus.tokens) * (1 - self.val_fraction))
        return corpus.tokens[:split], corpus.tokens[split:]

    def train_dataloader(self) -> TrainLoader:
        """Windows of the training part; an epoch has as many tokens as that."""
        tokens, _ = self._parts()
        t, trainer = self.context, cast(Any, self.trainer)
        windows = tokens.unfold(0, t + 1, 1)  # a view: (n - t, t + 1)

        def take(starts: Tensor) -> tuple[Tensor, Tensor]:
            window = windows[starts]  # (b, t + 1)
            return window[:, :-1].long(), window[:, 1:].long()

        seed, samples = global_seed(self.seed), max(self.batch_size, len(tokens) // t)
        order = Order(seed, len(windows), replace=True, device=tokens.device)
        if self.windows == "passes":
            order = Passes(seed, len(windows), t, tokens.device)
            samples = order.items
        return TrainLoader(
            order,
            take,
            samples=samples,
            batch_size=self.batch_size,
            share=Share.of(trainer),
            repeat=bool(trainer and trainer.overfit_batches),
        )

    def val_dataloader(self) -> EvalLoader:
        """The whole validation part; the last window is filled up with targets of -100."""
        _, tokens = self._parts()
        t, last = self.context, len(tokens) - 1
        offsets = torch.arange(t + 1, device=tokens.device)

        def take(numbers: Tensor) -> tuple[Tensor, Tensor]:
            places = numbers.to(tokens.device)[:, None] * t + offsets  # (b, t + 1)
            window = tokens[places.clamp(max=last)].long()
            return window[:, :-1], window[:, 1:].masked_fill(places[:, 1:] > last, IGNORED)

        return EvalLoader(take, -(-last // t), self.batch_size, Share.of(self.trainer))

    def test_dataloader(self) -> EvalLoader:
        """The validation part: the text has no third."""
        return self.val_dataloader()

    def predict_dataloader(self) -> EvalLoader:
        """Refuse, and say what a language model does instead."""
        raise UsageError(
            "a text has no answers to predict; a language model continues it: "
            "type lightning generate --ckpt_path=FILE --prompt=TEXT"
        )

    def _parts(self) -> tuple[Tensor, Tensor]:
        """Training and validation tokens, on the device unless the text is a mapped file."""
        corpus = self.corpus
        if self.trainer is not None and not corpus.mapped:
            device, tokens = self.trainer.strategy.root_device, corpus.tokens
            if device.type != "cpu" and tokens.dtype == torch.uint16:
                tokens = tokens.to(torch.int32)  # GPUs do not gather unsigned shorts
            corpus = corpus._replace(tokens=tokens.to(device))
            self._corpus = corpus  # moved once
        return self._split(corpus)
