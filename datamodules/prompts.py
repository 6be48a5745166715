"""Prompts for a policy: snippets of a corpus, or the rows of JSON files with their columns.

A prompt is text, since only the model knows its tokens. With it goes the sample's place in the
order of the data: all that is drawn for a prompt depends on the seed and this place alone, so that
any number of ranks draws the same batch, and a run that was cut goes on as if it had not been.
"""

import hashlib
from pathlib import Path
from typing import Any, NamedTuple, cast

import lightning as L
import torch
from torch import Tensor

from ravine.errors import UsageError

from .corpus import files_of, read
from .downloads import TextName, announce, choose, fetch, text_source
from .json_rows import check_text, checksum, is_json, rows
from .loaders import EvalLoader, Order, Share, TrainLoader, check_positive, global_seed
from .text import documentation


class Prompts(NamedTuple):
    """A batch."""

    texts: list[str]
    places: list[tuple[int, int]]  # (epoch, sample) of each; of an evaluation (-1, sample)
    columns: dict[str, list[Any]]  # what else the file says of each


class PlacedOrder:
    """An Order that also says where in the data each item stands: int64 (epoch, sample, item)."""

    def __init__(self, order: Order) -> None:
        """Wrap it."""
        self.order = order

    def __call__(self, epoch: int, first: int, last: int) -> Tensor:
        """Samples first..last-1, int64 of shape (last - first, 3)."""
        items = self.order(epoch, first, last).cpu()
        places = torch.arange(first, last)
        return torch.stack((torch.full_like(places, epoch), places, items), 1)


class PromptDataModule(L.LightningDataModule):
    """Batches of prompts.

    data = PromptDataModule("plays.txt", length=256, batch_size=64)
    data = PromptDataModule("questions.jsonl", corpus="plays.txt")  # {"prompt": ..., "answer": ...}

    Args:
        path: a text; or objects with a "prompt" in a .jsonl, .ndjson or .json file or a folder of
            them; without it `source` decides.
        source: a text by its name, embedded or auto, as in `TextDataModule`.
        root: the folder of data sets; by default the variable DATA_ROOT.
        corpus: a text for rewards that compare with one; by default the text of the snippets.
        length: characters of a snippet.
        batch_size: prompts of one optimizer step, over all ranks and accumulated batches.
        val_fraction: the last part of the text, or of the file, from which no prompt is trained on.
        val_prompts: prompts of a validation, always the same, spread over that part; of more ranks
            the greatest number below that they share evenly.
        seed: of the order; by default that of seed_everything.
    """

    def __init__(
        self,
        path: str | Path | None = None,
        source: TextName = "auto",
        root: str | None = None,
        corpus: str | Path | None = None,
        length: int = 256,
        batch_size: int = 64,
        val_fraction: float = 0.1,
        val_prompts: int = 64,
        seed: int | None = None,
    ) -> None:
        """Check the sizes; files are looked at in `setup`."""
        super().__init__()
        for name, value in (("length", length), ("batch_size", batch_size)):
            check_positive(name, value)
        check_positive("val_prompts", val_prompts)
        if not 0 < val_fraction < 1:
            raise UsageError(
                f"val_fraction is {val_fraction}; allowed is a number between 0 and 1: "
                "type --data.val_fraction=0.1"
            )
        self.path, self.root, self.corpus = path, root, corpus
        self.source: TextName = source
        text_source(source)  # UsageError for an unknown name
        self.length, self.batch_size = length, batch_size
        self.val_fraction, self.val_prompts, self.seed = val_fraction, val_prompts, seed
        self.resolved: dict[str, Any] = {}
        self.text: str | None = None  # what rewards compare with
        self.rows: list[dict[str, Any]] = []  # of JSON files
        self._snippets = ""
        self._tried = ""

    def prepare_data(self) -> None:
        """Download what is missing; Lightning calls this on one process only."""
        if self.path is None:
            self._tried = fetch(self.source, text_source(self.source), self.root)

    def setup(self, stage: str) -> None:
        """Read the file and say which one."""
        if self._snippets or self.rows:
            return
        if self.path is not None:
            file, why = Path(self.path).expanduser(), ""
        else:
            file, why = choose(self.source, text_source(self.source), self.root, self._tried)
        name = str(file or "the EMBEDDED text (help topics of CPython)")
        if file is not None and is_json(file):
            self.rows = rows_of(file)
            size = f"{len(self.rows):,} prompts"
        else:
            self.text = "".join(read(files_of(file)) if file else documentation())
            self._snippets, size = self.text, f"snippets of {self.length} characters"
        if self.corpus is not None:
            self.text = "".join(read(files_of(Path(self.corpus).expanduser(), "--data.corpus")))
        self._check_size(name)
        self.resolved = {"file": str(file or ""), "sha256": self._checksum(file)}
        if self.path is None:
            self.resolved["source"] = text_source(self.source).name if file else "embedded"
        announce(f"data: {name}, {size}{why and '; ' + why}", loud=bool(why))

    def _checksum(self, file: Path | None) -> str:
        """SHA-256 of the rows and of the text that rewards compare with: a resumed run compares."""
        rows = checksum(files_of(file)) if self.rows and file is not None else ""
        return hashlib.sha256(f"{rows}{self.text or ''}".encode()).hexdigest()

    @property
    def prompts(self) -> list[str]:
        """Those of a file; of a text there are too many."""
        return [row["prompt"] for row in self.rows]

    @property
    def characters(self) -> str:
        """The different characters of all prompts, sorted."""
        return "".join(sorted(set(self._snippets).union(*self.prompts)))

    def train_dataloader(self) -> TrainLoader:
        """Prompts drawn with replacement from a text, without from a file."""
        first, trainer = self._parts()[0], cast(Any, self.trainer)
        return TrainLoader(
            PlacedOrder(Order(global_seed(self.seed), first, replace=not self.rows)),  # type: ignore
            lambda items: self._batch(items[:, 2], [(e, s) for e, s in items[:, :2].tolist()]),
            samples=first if self.rows else max(self.batch_size, first // self.length),
            batch_size=self.batch_size,
            share=Share.of(trainer),
            repeat=bool(trainer and trainer.overfit_batches),
        )

    def val_dataloader(self) -> EvalLoader:
        """The same prompts each time, all of them in one batch, which they are compared within."""
        _, first, last = self._parts()
        share = Share.of(self.trainer)
        count = min(self.val_prompts, last - first) if self.rows else self.val_prompts
        even = count - count % share.size  # all ranks compare texts of one batch of one size
        if not even:
            held = f"only {count} are held out" if self.rows else f"val_prompts is {count}"
            fix = "val_fraction=0.5" if count < self.val_prompts else f"val_prompts={share.size}"
            raise UsageError(
                f"{held}, for {share.size} ranks; allowed: {share.size} or more, a prompt for each "
                f"rank; type --data.{fix}, or --trainer.devices={count}"
            )
        places = torch.linspace(first, last - 1, even).long()

        def take(numbers: Tensor) -> Prompts:
            return self._batch(places[numbers], [(-1, n) for n in numbers.tolist()])

        return EvalLoader(take, even, even, share)

    def test_dataloader(self) -> EvalLoader:
        """As in validation."""
        return self.val_dataloader()

    def _parts(self) -> tuple[int, int, int]:
        """Items to train on, the first held out, and all: rows, or where a snippet may begin."""
        items = len(self.rows) or len(self._snippets)
        train = int(items * (1 - self.val_fraction))
        if self.rows:
            train = min(train, items - 1)
            return train, train, items
        return train - self.length, train, items - self.length + 1  # none crosses the border

    def _batch(self, items: Tensor, places: list[tuple[int, int]]) -> Prompts:
        numbers = items.tolist()
        if not self.rows:
            texts = [self._snippets[n : n + self.length] for n in numbers]
            return Prompts(texts, places, {})
        rows = [self.rows[n] for n in numbers]
        columns = {key: [row[key] for row in rows] for key in rows[0] if key != "prompt"}
        return Prompts([row["prompt"] for row in rows], places, columns)

    def _check_size(self, name: str) -> None:
        train, first, whole = self._parts()
        if train < 1 or whole - first < 1:
            unit = "prompts" if self.rows else "characters"
            count = len(self.rows) or len(self._snippets)
            raise UsageError(
                f"{name} has {count:,} {unit}, too few to train on some and validate on others"
                + ("; give more" if self.rows else f" of {self.length}; type --data.length=32")
            )


def rows_of(path: Path) -> list[dict[str, Any]]:
    """The objects of JSON files; each has a prompt, and all have the same columns."""
    found: list[dict[str, Any]] = []
    for place, row in rows(path, '{"prompt": "Q: ", "answer": "A"}'):
        prompt = row.get("prompt")
        if not isinstance(prompt, str) or not prompt:
            raise UsageError(
                f'{place}: no "prompt"; each line is an object like '
                '{"prompt": "Q: ", "answer": "A"}, whose prompt is not empty'
            )
        if found and row.keys() != found[0].keys():
            wrong = ", ".join(sorted(row.keys() ^ found[0].keys()))
            raise UsageError(
                f"{place}: its columns are not those of the first line ({wrong}); "
                "give every line the same"
            )
        for name, value in row.items():
            if isinstance(value, str):
                check_text(value, place, name)
        found.append(row)
    if len(found) < 2:
        raise UsageError(f"{path} has {len(found)} prompts; give 2 or more, one to validate on")
    return found
