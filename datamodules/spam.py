"""Messages that are spam or not: one a line, ``label<TAB>text``, copies never on both sides.

A fifth of each class is held out to test; messages that are equal when stripped and case-folded are
one group, and a group stays together, or a model would be tested on what it was shown.
"""

from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import lightning as L
import torch
from torch import Tensor

from .corpus import files_of, read
from .order import EvalLoader, Order, Share, TrainLoader, check_positive, generator
from .sources import SOURCES, announce, choose, fetch, sha256

EMBEDDED = Path(__file__).with_name("spam_messages.tsv")
LABELS = ("ham", "spam")  # their positions are the classes 0 and 1


class Message(NamedTuple):
    """A message, its class, and, in the embedded set, the side it is on."""

    text: str
    label: int
    side: str = ""


def parse(lines: list[str], name: str, sides: bool = False) -> list[Message]:
    """Read ``label<TAB>text`` (after ``side<TAB>`` with `sides`), skipping empty lines."""
    messages = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        side, rest = line.split("\t", 1) if sides else ("", line)
        label, tab, text = rest.partition("\t")
        if not tab or label not in LABELS:
            raise ValueError(
                f"{name}, line {number}: {line[:40]!r} is not label<TAB>text with the label ham "
                "or spam; write each line so, or type --data.source=embedded"
            )
        messages.append(Message(text, LABELS.index(label), side))
    counts = Counter(m.label for m in messages)
    if len(counts) < 2:
        has = " and ".join(f"{counts[k]} {label}" for k, label in enumerate(LABELS))
        raise ValueError(f"{name} has {has} messages; both kinds are needed, one message a line")
    return messages


def hold_out(
    messages: list[Message], candidates: list[int], fraction: float, g: torch.Generator
) -> set[int]:
    """Draw the given fraction of each class; equal messages are drawn together or not at all."""
    groups: dict[str, list[int]] = defaultdict(list)
    for i in candidates:
        groups[messages[i].text.strip().casefold()].append(i)
    keys, drawn = list(groups), set[int]()
    room = {
        label: round(fraction * sum(messages[i].label == label for i in candidates))
        for label in range(len(LABELS))
    }
    for k in torch.randperm(len(keys), generator=g).tolist():
        group = groups[keys[k]]
        sizes = Counter(messages[i].label for i in group)
        if all(size <= room[label] for label, size in sizes.items()):
            drawn.update(group)
            for label, size in sizes.items():
                room[label] -= size
    return drawn


class SpamDataModule(L.LightningDataModule):
    """Messages as batches {"message": list[str], "label": int64 (b), "index": int64 (b)}.

    `index` is the message's place in `messages`; to predict there are no labels, and it is the line
    of the file, from 0.

    data = SpamDataModule(source="embedded", batch_size="all", val_fraction=0.0)
    Trainer(max_steps=200).fit(SpamClassifier(), datamodule=data)

    Args:
        path: a file of your own, ``label<TAB>text`` a line; without it `source` decides.
        source: sms (SMS Spam Collection, 5,574 messages); embedded (forty written for this
            project, with their own test set); auto: the first where it can be had.
        root: the folder of data sets; by default the variable DATA_ROOT.
        predict_path: the file whose lines `predict` labels.
        batch_size: messages of one optimizer step over all ranks, at most all of them; or "all".
        test_fraction: held out of each class to test.
        val_fraction: held out of the rest to validate; 0 for no validation.
        seed: of the split and the order. Not that of seed_everything, so that a later `test` with
            another seed never tests on messages that were trained on.
    """

    def __init__(
        self,
        path: str | Path | None = None,
        source: Literal["auto", "sms", "embedded"] = "auto",
        root: str | None = None,
        predict_path: str | Path | None = None,
        batch_size: int | Literal["all"] = 64,
        test_fraction: float = 0.2,
        val_fraction: float = 0.1,
        seed: int = 0,
    ) -> None:
        """Check the sizes; files are looked at in `setup`."""
        super().__init__()
        if batch_size != "all":
            check_positive("batch_size", batch_size)
        if not 0 < test_fraction < 1 or not 0 <= val_fraction < 1:
            raise ValueError(
                f"test_fraction is {test_fraction} and val_fraction {val_fraction}; allowed are "
                "numbers between 0 and 1: type --data.test_fraction=0.2 --data.val_fraction=0.1"
            )
        self.path, self.source, self.root, self.predict_path = path, source, root, predict_path
        self.batch_size, self.seed = batch_size, seed
        self.test_fraction, self.val_fraction = test_fraction, val_fraction
        self.resolved: dict[str, Any] = {}  # what was taken: source, file, sha256, duplicates
        self.messages: list[Message] = []
        self.parts: dict[str, list[int]] = {}  # train, val, test: places in `messages`
        self.lines: list[tuple[int, str]] = []  # to predict
        self._tried = ""

    @property
    def train_messages(self) -> list[str]:
        """The texts to train on: all that a featurizer may be fitted to."""
        return [self.messages[i].text for i in self.parts.get("train", [])]

    def prepare_data(self) -> None:
        """Download what is missing; Lightning calls this on one process only."""
        if self.path is None:
            self._tried = fetch(self.source, SOURCES["sms"], self.root)

    def setup(self, stage: str) -> None:
        """Read and split the messages, or the lines to predict, which need no training set."""
        if stage == "predict":
            self._read_lines()
        elif not self.messages:
            self._read_messages()
        if stage == "fit" and not self.val_fraction and self.trainer is not None:
            cast(Any, self.trainer).limit_val_batches = 0  # it would warn of an empty loader

    def _read_lines(self) -> None:
        if self.predict_path is None:
            raise ValueError(
                "there is nothing to predict: type --data.predict_path=FILE, a text file with one "
                "message a line"
            )
        lines = _lines(Path(self.predict_path).expanduser(), "--data.predict_path")
        self.lines = [(i, line) for i, line in enumerate(lines) if line.strip()]
        if not self.lines:
            raise ValueError(f"{self.predict_path} is empty: write one message a line")

    def _read_messages(self) -> None:
        if self.path is not None:
            file, why = Path(self.path).expanduser(), ""
        else:
            file, why = choose(self.source, SOURCES["sms"], self.root, self._tried)
        name = str(file or "the EMBEDDED messages (forty, written for this project)")
        lines = _lines(file or EMBEDDED, "--data.path")
        self.messages = messages = parse(lines, name, sides=file is None)
        self._split()
        keys = {m.text.strip().casefold() for m in messages}
        taken = self.source if self.path is not None else "sms" if file else "embedded"
        self.resolved = {
            "source": taken,
            "file": str(file or ""),
            "sha256": sha256(file or EMBEDDED),
            "duplicates": len(messages) - len(keys),
        }
        spam = sum(m.label for m in messages)
        sizes = ", ".join(f"{len(part):,} {side}" for side, part in self.parts.items())
        announce(
            f"data: {name}, {len(messages) - spam:,} ham, {spam:,} spam, "
            f"{self.resolved['duplicates']:,} copies kept on one side; {sizes}"
            f"{why and '; ' + why}",
            loud=bool(why),
        )

    def _split(self) -> None:
        messages, everyone = self.messages, list(range(len(self.messages)))
        test = {i for i in everyone if messages[i].side == "test"}
        if not test:
            g = generator(self.seed, "test")
            test = hold_out(messages, everyone, self.test_fraction, g)
        rest = [i for i in everyone if i not in test]
        val = hold_out(messages, rest, self.val_fraction, generator(self.seed, "val"))
        self.parts = {
            "train": [i for i in rest if i not in val],
            "val": sorted(val),
            "test": sorted(test),
        }
        short = [k for k in self.parts if not self.parts[k] and (k != "val" or self.val_fraction)]
        if short:
            raise ValueError(
                f"{len(messages)} messages leave none for {' and '.join(short)}: give more, or "
                "type --data.test_fraction=0.2 --data.val_fraction=0"
            )

    def _fetch(self, places: list[int]) -> Callable[[Tensor], dict[str, Any]]:
        labels = torch.tensor([m.label for m in self.messages])
        where = torch.tensor(places)

        def take(items: Tensor) -> dict[str, Any]:
            index = where[items]
            message = [self.messages[i].text for i in index.tolist()]
            return {"message": message, "label": labels[index], "index": index}

        return take

    def _size(self, part: int) -> int:
        return part if isinstance(self.batch_size, str) else min(self.batch_size, part)

    def train_dataloader(self) -> TrainLoader:
        """Shuffled each epoch; what is left over from whole batches waits for another epoch."""
        places, trainer = self.parts["train"], cast(Any, self.trainer)
        return TrainLoader(
            Order(self.seed, len(places)),
            self._fetch(places),
            samples=len(places),
            batch_size=self._size(len(places)),
            share=Share.of(trainer),
            repeat=bool(trainer and trainer.overfit_batches),
        )

    def val_dataloader(self) -> EvalLoader:
        """The part held out for validation."""
        return self._eval("val")

    def test_dataloader(self) -> EvalLoader:
        """The part held out to test."""
        return self._eval("test")

    def predict_dataloader(self) -> EvalLoader:
        """The lines of `predict_path`, without labels."""

        def take(items: Tensor) -> dict[str, Any]:
            numbers, texts = zip(*(self.lines[i] for i in items.tolist()), strict=True)
            return {"message": list(texts), "index": torch.tensor(numbers)}

        size = self._size(len(self.lines))
        return EvalLoader(take, len(self.lines), size, Share.of(self.trainer))

    def _eval(self, part: str) -> EvalLoader:
        places = self.parts[part]
        size = self._size(len(places))
        return EvalLoader(self._fetch(places), len(places), size, Share.of(self.trainer))


def _lines(path: Path, flag: str) -> list[str]:
    if path.is_dir():
        raise ValueError(f"{path} is a folder; one file is read: type {flag}=FILE")
    return "".join(read(files_of(path, flag), flag)).replace("\r\n", "\n").split("\n")
