"""Messages that are spam or not: one a line, ``label<TAB>text``, or a CSV or TSV file by columns.

A fifth of each class is held out to test; messages that are equal when stripped and case-folded are
one group, and a group stays together, or a model would be tested on what it was shown. Each part
has a message of each class where there are enough of them.
"""

import codecs
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import lightning as L
import torch
from torch import Tensor

from ravine.errors import UsageError

from .corpus import files_of
from .downloads import SOURCES, announce, choose, fetch, sha256
from .file_kinds import refuse_binary
from .loaders import EvalLoader, Order, Share, TrainLoader, check_positive, generator
from .tables import Table, has_known_header, read_table

EMBEDDED = Path(__file__).with_name("spam_messages.tsv")
LABELS = ("ham", "spam")  # their positions are the classes 0 and 1
VALUES = {"ham": 0, "0": 0, "false": 0, "no": 0, "spam": 1, "1": 1, "true": 1, "yes": 1}  # of a CSV


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
            raise UsageError(
                f"{name}, line {number}: {line[:40]!r} is not label<TAB>text with the label ham "
                "or spam; write each line so; or, of a CSV or TSV file, type "
                "--data.text_column=NAME --data.label_column=NAME"
            )
        messages.append(Message(text, LABELS.index(label), side))
    return both(messages, name)


def both(messages: list[Message], name: str) -> list[Message]:
    """The messages; refused if they are all of one class."""
    counts = Counter(m.label for m in messages)
    if len(counts) < 2:
        has = " and ".join(f"{counts[k]} {label}" for k, label in enumerate(LABELS))
        raise UsageError(f"{name} has {has} messages; both kinds are needed, one message a line")
    return messages


def labelled(table: Table, name: str, spam_label: str | None) -> list[Message]:
    """The messages of a table, whose labels are ham and spam, 0 and 1, or two values of one's own.

    Args:
        table: its rows.
        name: of the file.
        spam_label: the value that means spam; the other one means ham.
    """
    if spam_label is not None:
        found = sorted({entry.label.strip() for entry in table.entries})
        if len(found) != 2 or spam_label not in found:
            shown = ", ".join(repr(value[:40]) for value in found[:5])
            raise UsageError(
                f"{name}: the labels are {shown}{', ...' if len(found) > 5 else ''}; allowed are "
                f"two values, {spam_label!r} one of them: type --data.spam_label=VALUE"
            )
    messages = []
    for line, text, label in table.entries:
        if spam_label is not None:
            value = int(label.strip() == spam_label)
        elif (value := VALUES.get(label.strip().casefold(), -1)) < 0:
            raise UsageError(
                f"{name}, line {line}: the label is {label[:40]!r}; allowed are ham and spam, or 0 "
                "and 1; of two other values type --data.spam_label=VALUE, the one that means spam"
            )
        messages.append(Message(text, value))
    return both(messages, name)


def hold_out(
    messages: list[Message], candidates: list[int], fraction: float, g: torch.Generator
) -> set[int]:
    """Draw the given fraction of each class, and at least one message of each if one remains.

    Equal messages are drawn together or not at all.
    """
    groups: dict[str, list[int]] = defaultdict(list)
    for i in candidates:
        groups[messages[i].text.strip().casefold()].append(i)
    keys, drawn = list(groups), set[int]()
    sizes = {key: Counter(messages[i].label for i in group) for key, group in groups.items()}
    room = {
        label: round(fraction * sum(messages[i].label == label for i in candidates))
        for label in range(len(LABELS))
    }
    order = [keys[k] for k in torch.randperm(len(keys), generator=g).tolist()]

    def draw(key: str) -> None:
        drawn.update(groups[key])
        for label, size in sizes[key].items():
            room[label] -= size

    for key in order:
        if all(size <= room[label] for label, size in sizes[key].items()):
            draw(key)
    for label in range(len(LABELS)) if fraction else ():
        mine = [key for key in order if sizes[key][label]]
        left = [key for key in mine if not drawn.issuperset(groups[key])]
        alone = [key for key in left if len(sizes[key]) == 1]  # it takes nothing of other classes
        if len(left) == len(mine) > 1 and alone:
            draw(min(alone, key=lambda key: sizes[key][label]))
    return drawn


class SpamDataModule(L.LightningDataModule):
    """Messages as batches {"message": list[str], "label": int64 (b), "index": int64 (b)}.

    `index` is the message's place in `messages`; to predict there are no labels, and it is the line
    of the file, from 0.

    data = SpamDataModule(source="embedded", batch_size="all", val_fraction=0.0)
    Trainer(max_steps=200).fit(SpamClassifier(), datamodule=data)

    Args:
        path: a file of your own, ``label<TAB>text`` a line, or a CSV or TSV file with a header;
            without it `source` decides.
        source: sms (SMS Spam Collection, 5,574 messages); embedded (forty written for this
            project, with their own test set); auto: the first where it can be had.
        root: the folder of data sets; by default the variable DATA_ROOT.
        predict_path: the file whose lines `predict` labels, or a CSV file with a column of texts.
        batch_size: messages of one optimizer step over all ranks, at most all of them; or "all".
        test_fraction: held out of each class to test.
        val_fraction: held out of the rest to validate; 0 for no validation.
        seed: of the split and the order. Not that of seed_everything, so that a later `test` with
            another seed never tests on messages that were trained on.
        text_column: of a CSV or TSV file, by name or by position from 0; by default the one that is
            called text, v2, message, sms or the like.
        label_column: the same; by default label, v1, category or the like.
        spam_label: the value of that column that means spam; by default spam or 1.
        encoding: of the files: utf-8, latin-1 (as Kaggle's spam.csv), utf-16, or another of Python.
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
        text_column: str | None = None,
        label_column: str | None = None,
        spam_label: str | None = None,
        encoding: str = "utf-8",
    ) -> None:
        """Check the sizes; files are looked at in `setup`."""
        super().__init__()
        if batch_size != "all":
            check_positive("batch_size", batch_size)
        if not 0 < test_fraction < 1 or not 0 <= val_fraction < 1:
            raise UsageError(
                f"test_fraction is {test_fraction} and val_fraction {val_fraction}; allowed are "
                "numbers between 0 and 1: type --data.test_fraction=0.2 --data.val_fraction=0.1"
            )
        try:
            text = codecs.lookup(encoding)._is_text_encoding
        except (LookupError, ValueError):
            text = False
        if not text:
            raise UsageError(
                f"encoding is {encoding!r}; allowed are utf-8, latin-1, utf-16 and others that "
                "Python knows: type --data.encoding=latin-1"
            )
        self.encoding, self.spam_label = encoding, spam_label
        self.text_column = None if text_column is None else str(text_column)
        self.label_column = None if label_column is None else str(label_column)
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
            raise UsageError(
                "there is nothing to predict: type --data.predict_path=FILE, a text file with one "
                "message a line"
            )
        path = Path(self.predict_path).expanduser()
        text = _text(path, "--data.predict_path", self.encoding)
        end = path.suffix.lower()
        if end == ".csv" or (self.text_column is not None and end in (".tsv", ".tab")):
            table = read_table(text, str(path), self.text_column, labelled=False)
            self.lines = [(entry.line - 1, entry.text) for entry in table.entries]
        else:
            lines = enumerate(_lines(text))
            self.lines = [(i, line) for i, line in lines if line.strip()]
        if not self.lines:
            raise UsageError(f"{self.predict_path} is empty: write one message a line")

    def _read_messages(self) -> None:
        if self.path is not None:
            file, why = Path(self.path).expanduser(), ""
        else:
            file, why = choose(self.source, SOURCES["sms"], self.root, self._tried)
        name = str(file or "the EMBEDDED messages (forty, written for this project)")
        own = self.path is not None
        text = _text(file or EMBEDDED, "--data.path", self.encoding if own else "utf-8")
        table = self._table(text, name, Path(name).suffix.lower()) if own else None
        if table is not None:
            messages = labelled(table, name, self.spam_label)
        else:
            messages = parse(_lines(text), name, sides=file is None)
        self.messages = messages
        self._split(name)
        keys = {m.text.strip().casefold() for m in messages}
        taken = self.source if self.path is not None else "sms" if file else "embedded"
        self.resolved = {
            "source": taken,
            "file": str(file or ""),
            "sha256": sha256(file or EMBEDDED),
            "duplicates": len(messages) - len(keys),
        }
        if table is not None:
            name += f", columns {' and '.join(table.columns)}"
            self.resolved["columns"] = list(table.columns)
        spam = sum(m.label for m in messages)
        sizes = ", ".join(f"{len(part):,} {side}" for side, part in self.parts.items())
        announce(
            f"data: {name}, {len(messages) - spam:,} ham, {spam:,} spam, "
            f"{self.resolved['duplicates']:,} copies kept on one side; {sizes}"
            f"{why and '; ' + why}",
            loud=bool(why),
        )
        if table is not None and table.beside:
            announce(
                f"data: {table.beside:,} rows have text in columns without a name, which is not "
                "read",
                loud=True,
            )
        for side, part in self.parts.items():
            there = {messages[i].label for i in part}
            for k, label in enumerate(LABELS) if part else ():
                if k not in there:
                    kinds = len({m.text.strip().casefold() for m in messages if m.label == k})
                    announce(
                        f"data: no {label} in {side}, so scores of {label} are undefined there: "
                        f"there are {kinds} different {label} messages, and copies stay together",
                        loud=True,
                    )

    def _table(self, text: str, name: str, end: str) -> Table | None:
        """The rows of a CSV or TSV file; None of a file of ``label<TAB>text``."""
        asked = (self.text_column, self.label_column, self.spam_label)
        first = next((line for line in text.split("\n") if line.strip()), "")
        if end == ".csv" or any(word is not None for word in asked) or has_known_header(first):
            return read_table(text, name, self.text_column, self.label_column)
        return None

    def _split(self, name: str) -> None:
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
            kinds = len({m.text.strip().casefold() for m in messages})
            rather = f", or type --data.val_fraction=0 to do without {short[0]}"
            raise UsageError(
                f"{name}: {len(messages)} messages, of which {kinds} are different, leave none for "
                f"{' and '.join(short)}: copies stay together; give more different messages"
                f"{rather if short == ['val'] else ''}"
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
        if not places:
            raise UsageError(
                f"there are no messages for {part}: val_fraction is {self.val_fraction}; type "
                "lightning test for the test part, or train with --data.val_fraction=0.1"
            )
        size = self._size(len(places))
        return EvalLoader(self._fetch(places), len(places), size, Share.of(self.trainer))


def _text(path: Path, flag: str, encoding: str) -> str:
    """The text of one file; what is not of that encoding is refused with the byte's place."""
    if path.is_dir():
        raise UsageError(f"{path} is a folder; one file is read: type {flag}=FILE")
    (file,) = files_of(path, flag)
    content = file.read_bytes()
    refuse_binary(path, content, flag)
    codec = codecs.lookup(encoding).name
    wide = codec.startswith(("utf-16", "utf-32"))
    if not wide and (place := content.find(b"\0")) >= 0:
        raise UsageError(
            f"{path} is no text: byte 0x00 at position {place}; if it is UTF-16, type "
            "--data.encoding=utf-16"
        )
    try:
        return content.decode("utf-8-sig" if codec == "utf-8" else codec)
    except UnicodeDecodeError as error:
        name = "UTF-8" if codec == "utf-8" else codec
        byte = error.object[error.start : error.start + 1].hex()
        raise UsageError(
            f"{path} is not {name}: byte 0x{byte} at position {error.start}; if it is Latin-1, "
            "type --data.encoding=latin-1"
        ) from None


def _lines(text: str) -> list[str]:
    return text.replace("\r\n", "\n").split("\n")
