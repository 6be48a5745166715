"""Prompts and answers from JSON files, for fine-tuning: only what is answered is learned.

    {"prompt": "Capital of France? ", "answer": "Paris"}            one such line an example

    tokens    C a p i t a l ... ?   P a r i s end
    targets   . . . . . . . . . .   P a r i s end        . is IGNORED

Axes: b batch, t time.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import numpy as np
import torch
from torch import Tensor

from ravine.errors import UsageError

from .base import Prepared, handed_over, has_ranks
from .corpus import files_of
from .downloads import announce, cache_folder, whole
from .json_rows import check_text, checksum, rows
from .loaders import EvalLoader, Order, Share, TrainLoader, check_positive, generator, global_seed
from .tokenizers import Specials, Tokenizer, make_tokenizer

IGNORED = -100  # the target where there is nothing to learn, as in F.cross_entropy
STEP = 64  # batches are as long as their longest example, rounded up: shapes seldom change


class Example(NamedTuple):
    """The two texts of a row."""

    prompt: str
    answer: str


def examples(path: Path, prompt: str, answer: str) -> Iterator[Example]:
    """The rows of a JSON file or folder; empty lines are left out."""
    shown = f'{{"{prompt}": "...", "{answer}": "..."}}'
    for place, row in rows(path, shown):
        yield Example(*_texts(row, (prompt, answer), place))


def _texts(row: dict[str, Any], fields: tuple[str, str], place: str) -> Iterator[str]:
    for flag, field in zip(("prompt", "answer"), fields, strict=True):
        if not isinstance(row.get(field), str) or not row[field]:
            what = "an empty" if row.get(field) == "" else "no text in" if field in row else "no"
            others = [name for name in row if name not in fields]
            raise UsageError(
                f"{place}: {what} field {field!r}; it has {', '.join(row) or 'nothing'}; "
                f"type --data.{flag}={others[0] if others else 'NAME'} if it is called otherwise"
            )
        yield check_text(row[field], place, field)


class Encoded(NamedTuple):
    """The tokens of all examples, in memory or in a file."""

    sha256: str  # of the files
    letters: str  # the different characters, sorted
    name: str  # of the tokenizer
    count: int  # of examples
    lengths: np.ndarray  # tokens of each, int32 (count,)
    given: np.ndarray  # how many of them are the prompt, int32 (count,)
    tokens: np.ndarray  # int32, one example after the other
    file: str = ""  # of the tokens, if one process has written them for all

    def has_file(self) -> bool:
        """Whether the file, if there is one, is on this machine."""
        return not self.file or Path(self.file).is_file()

    def read(self) -> "Encoded":
        """The same in memory."""
        if not self.file:
            return self
        return self._replace(tokens=np.fromfile(self.file, np.int32), file="")


class AnswerDataModule(L.LightningDataModule):
    """Prompts with answers as batches (inputs, targets), both int64 (b t).

    data = AnswerDataModule("questions.jsonl", tokenizer="gpt2", context=256)

    An answer ends with the tokenizer's end token, where it has one, so that a model learns to stop.

    Args:
        path: a file of JSON objects, one a line (.jsonl, .ndjson) or in a list (.json), or a folder
            of such files.
        prompt: the field that is given.
        answer: the field that is learned.
        tokenizer: what a token is: characters, bytes, gpt2 or a file, as in TextDataModule; that
            of the model that is tuned.
        context: t at most; of a longer example the end is cut off, and their number is told.
        batch_size: examples of one optimizer step, over all ranks and accumulated batches.
        val_fraction: share of the examples, drawn by the seed, kept for validation and test.
        seed: of the split and the order; by default that of seed_everything.
        specials: how the tokenizer's special tokens are read in a text: plain, as other words;
            allowed, as one token each; or refuse.
    """

    def __init__(
        self,
        path: str | Path,
        prompt: str = "prompt",
        answer: str = "answer",
        tokenizer: str = "gpt2",
        context: int = 256,
        batch_size: int = 32,
        val_fraction: float = 0.1,
        seed: int | None = None,
        specials: Specials = "plain",
    ) -> None:
        """Check the sizes; the file is looked at in `setup`."""
        super().__init__()
        check_positive("context", context)
        check_positive("batch_size", batch_size)
        if not 0 < val_fraction < 1:
            raise UsageError(
                f"val_fraction is {val_fraction}; allowed is a number between 0 and 1: "
                "type --data.val_fraction=0.1"
            )
        self.path, self.fields, self.kind = Path(path).expanduser(), (prompt, answer), tokenizer
        self.context, self.batch_size = context, batch_size
        self.val_fraction, self.seed = val_fraction, seed
        self.specials: Specials = specials
        self.resolved: dict[str, Any] = {}
        self.rows: list[tuple[Tensor, int]] = []  # tokens, and how many of them are given
        self.tokenizer: Tokenizer | None = None
        self._prepared: Prepared | None = None  # between prepare_data and setup

    def prepare_data(self) -> None:
        """Tokenize for all ranks of the machine; Lightning calls this on local rank 0 only.

        One process alone tokenizes in `setup`.
        """
        if not self.rows and has_ranks(self.trainer):
            self._prepared = Prepared.by(self._prepare)

    def _prepare(self) -> Encoded:
        """Tokenize, and write the tokens to a file if the cache folder can be written."""
        found = self._encode()
        key = json.dumps([found.sha256, self.fields, found.name, self.specials, self.context])
        name = f"answers-{hashlib.sha256(key.encode()).hexdigest()[:32]}.int32"
        path = cache_folder() / "tokens" / name
        empty = found._replace(tokens=np.zeros(0, np.int32))
        try:
            with whole(path) as part, part.open("wb") as file:
                file.write(found.tokens.data)
        except OSError:  # each process makes its own
            return empty._replace(count=0)
        return empty._replace(file=str(path))

    def _encode(self) -> Encoded:
        """The tokens of all examples, one after the other."""
        found = list(examples(self.path, *self.fields))
        if len(found) < 2:
            raise UsageError(
                f"{self.path} holds {len(found)} examples; allowed: 2 or more, for training and "
                "for validation; type --data.path=FILE"
            )
        letters = "".join(sorted({c for e in found for c in e.prompt + e.answer}))
        tokenizer = make_tokenizer(self.kind, letters, self.specials)
        rows = [self._row(example, tokenizer) for example in found]
        return Encoded(
            checksum(files_of(self.path)),
            letters,
            tokenizer.name,
            len(found),
            np.array([len(tokens) for tokens, _ in rows], np.int32),
            np.array([given for _, given in rows], np.int32),
            torch.cat([tokens for tokens, _ in rows]).numpy().astype(np.int32),
        )

    def setup(self, stage: str) -> None:
        """Read the file, say what was found, and refuse one that cannot be split."""
        prepared: Encoded | None = None
        if has_ranks(self.trainer):
            prepared = handed_over(self._prepared, self.trainer)
            self._prepared = None
        if self.rows:
            return
        if prepared is None or not prepared.count or not prepared.has_file():
            prepared = self._encode()
        found = prepared.read()
        self.tokenizer = make_tokenizer(self.kind, found.letters, self.specials)
        tokens = torch.from_numpy(found.tokens.astype(np.int64)).split(found.lengths.tolist())
        rows = list(zip(tokens, found.given.tolist(), strict=True))
        self.rows = [(tokens, given) for tokens, given in rows if given < len(tokens)]
        if len(self.rows) < 2:
            raise UsageError(
                f"the prompts in {self.path} fill the context of {self.context} tokens, and no "
                f"answer is left; type --data.context={2 * self.context}"
            )
        cut = sum(len(tokens) > self.context for tokens, _ in rows)
        self.resolved = {"source": "path", "file": str(self.path), "sha256": found.sha256}
        long = f"; {cut} longer than the context are cut, {len(rows) - len(self.rows)} left out"
        announce(f"data: {self.path}, {found.count:,} examples{long if cut else ''}", loud=cut > 0)

    def _row(self, example: Example, tokenizer: Tokenizer) -> tuple[Tensor, int]:
        end = [] if tokenizer.end is None else [tokenizer.end]
        given = tokenizer.encode(example.prompt)
        answer = tokenizer.encode(example.answer)
        tokens = torch.cat((given, answer, torch.tensor(end, dtype=torch.int64)))
        return tokens[: self.context + 1], len(given)

    def _batch(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        rows = [self.rows[int(number)] for number in numbers]
        longest = max(len(tokens) for tokens, _ in rows) - 1
        t = min(self.context, -(-longest // STEP) * STEP)
        inputs = torch.zeros(len(rows), t, dtype=torch.int64)
        targets = torch.full((len(rows), t), IGNORED)
        for row, (tokens, given) in enumerate(rows):
            inputs[row, : len(tokens) - 1] = tokens[:-1]
            targets[row, given - 1 : len(tokens) - 1] = tokens[given:]
        return inputs, targets

    def _split(self) -> tuple[Tensor, Tensor]:
        count = len(self.rows)
        shuffled = torch.randperm(count, generator=generator(global_seed(self.seed), "split"))
        size = min(max(1, round(count * self.val_fraction)), count - 1)
        return shuffled[size:], shuffled[:size]

    def train_dataloader(self) -> TrainLoader:
        """All examples but those for validation, in a new order each epoch."""
        mine, _ = self._split()
        trainer: Any = self.trainer
        return TrainLoader(
            Order(global_seed(self.seed), len(mine)),
            lambda places: self._batch(mine[places]),
            samples=len(mine),
            batch_size=self.batch_size,
            share=Share.of(trainer),
            repeat=bool(trainer and trainer.overfit_batches),
        )

    def val_dataloader(self) -> EvalLoader:
        """The examples kept back."""
        _, mine = self._split()
        share = Share.of(self.trainer)
        return EvalLoader(lambda n: self._batch(mine[n]), len(mine), self.batch_size, share)

    def test_dataloader(self) -> EvalLoader:
        """The same: there is no third part."""
        return self.val_dataloader()
