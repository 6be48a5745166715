"""Spam classification data: messages labeled ham or spam, from ``label<TAB>text`` or CSV/TSV files.

The grouped, stratified split holds out a fifth of each class for test. Messages that are equal
after strip and casefold form one group. A group is never split, since a model must not be tested on
training messages. Each split has a message of each class if there are enough of them.
"""

import codecs
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ravine.errors import UsageError
from ravine.files import compute_sha256

from .base import BaseDataModule, check_fraction
from .downloads import TEXT_DATASETS, download_if_missing, log_once, resolve_file
from .loaders import EvalLoader, ResumableLoader, check_positive
from .samplers import EpochSampler, seeded_generator
from .tables import Table, has_known_header, read_table
from .text_files import read_text_file

EMBEDDED_FILE = Path(__file__).with_name("spam_messages.tsv")
LABELS = ("ham", "spam")  # the index is the class: 0 and 1
LABEL_VALUES = {
    "ham": 0,
    "0": 0,
    "false": 0,
    "no": 0,
    "spam": 1,
    "1": 1,
    "true": 1,
    "yes": 1,
}  # label values of CSV files


class Message(NamedTuple):
    """A message, its class, and, in the embedded dataset, its split."""

    text: str
    label: int
    split: str = ""


def parse_messages(lines: list[str], name: str, has_splits: bool = False) -> list[Message]:
    """Parse lines ``label<TAB>text``, with `has_splits` ``split<TAB>label<TAB>text``.

    Args:
        lines: the lines of the file; empty ones are skipped.
        name: the file name for error messages.
        has_splits: whether each line names its split, as in the embedded file.

    Raises:
        UsageError: a line has another form, or a class has no message.
    """
    messages = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        split, _, labelled_text = line.partition("\t") if has_splits else ("", "", line)
        # LABELS: ham and spam; a message stores the position of its label
        label, tab, text = labelled_text.partition("\t")
        if not tab or label not in LABELS:
            raise UsageError(
                f"{name}, line {number}: {line[:40]!r} is not label<TAB>text",
                [f"the label {LABELS[0]} or {LABELS[1]}, a tab, and the text"],
                "correct the line; or use text_column='NAME', label_column='NAME' for a CSV or "
                "TSV file",
                flag="--data.text_column=NAME --data.label_column=NAME",
            )
        messages.append(Message(text, LABELS.index(label), split))
    # the messages; an error if a class has none
    return check_both_classes(messages, name)


def check_both_classes(messages: list[Message], name: str) -> list[Message]:
    """Return the messages; raise an error if they are all of one class."""
    counts = Counter(m.label for m in messages)
    if len(counts) < 2:
        counts_text = " and ".join(f"{counts[k]} {label}" for k, label in enumerate(LABELS))
        raise UsageError(
            f"{name} has {counts_text} messages",
            ["at least one message of each class, one per line"],
            "add messages of the other class",
        )
    return messages


def messages_from_table(table: Table, name: str, spam_label: str | None) -> list[Message]:
    """Convert the rows of a table to messages; labels are ham/spam, 0/1, or two custom values.

    Args:
        table: the rows.
        name: the file name for error messages.
        spam_label: the label value for spam; the other value means ham.
    """
    if spam_label is not None:
        label_values = sorted({entry.label.strip() for entry in table.entries})
        if len(label_values) != 2 or spam_label not in label_values:
            examples = ", ".join(repr(value[:40]) for value in label_values[:5])
            raise UsageError(
                f"{name}: spam_label={spam_label!r} does not fit the labels "
                f"{examples}{', ...' if len(label_values) > 5 else ''}",
                ["two label values, one of them spam_label"],
                "use spam_label='VALUE' with the value that means spam",
                flag="--data.spam_label=VALUE",
            )
    messages = []
    for line, text, label in table.entries:
        if spam_label is not None:
            value = int(label.strip() == spam_label)
        # LABEL_VALUES: 0 or 1 by the usual texts, such as ham and spam
        elif (value := LABEL_VALUES.get(label.strip().casefold(), -1)) < 0:
            raise UsageError(
                f"{name}, line {line}: the label is {label[:40]!r}",
                ["ham and spam", "0 and 1"],
                "use spam_label='VALUE' with the value that means spam",
                flag="--data.spam_label=VALUE",
            )
        messages.append(Message(text, value))
    # the messages; an error if a class has none
    return check_both_classes(messages, name)


def grouped_stratified_split(
    messages: list[Message], candidates: list[int], fraction: float, g: torch.Generator
) -> set[int]:
    """Draw a fraction of each class, and at least one message per class if another one remains.

    Equal messages form a group, which is drawn as a whole.

    Args:
        messages: all messages.
        candidates: positions in `messages` from which to draw.
        fraction: the fraction of each class to draw; 0 draws none.
        g: the random generator of the draw.

    Returns:
        The positions of the drawn messages.
    """
    groups: dict[str, list[int]] = defaultdict(list)  # positions by text
    for i in candidates:
        groups[messages[i].text.strip().casefold()].append(i)
    keys, selected = list(groups), set[int]()
    # messages of each class in a group; equal texts may have different labels
    sizes = {key: Counter(messages[i].label for i in group) for key, group in groups.items()}
    remaining = {  # messages of each class that are still to draw
        label: round(fraction * sum(messages[i].label == label for i in candidates))
        for label in range(len(LABELS))
    }
    shuffled_keys = [keys[k] for k in torch.randperm(len(keys), generator=g).tolist()]

    def select_group(key: str) -> None:
        selected.update(groups[key])
        for label, size in sizes[key].items():
            remaining[label] -= size

    # First the groups that fit; then one group of each class that was not drawn at all.
    for key in shuffled_keys:
        if all(size <= remaining[label] for label, size in sizes[key].items()):
            select_group(key)
    for label in range(len(LABELS)) if fraction else ():
        class_keys = [key for key in shuffled_keys if sizes[key][label]]
        unselected_keys = [key for key in class_keys if not selected.issuperset(groups[key])]
        # groups of one class do not change the count of the other class
        single_class_keys = [key for key in unselected_keys if len(sizes[key]) == 1]
        # nothing of the class was drawn, and another group of it remains
        if len(unselected_keys) == len(class_keys) > 1 and single_class_keys:
            select_group(min(single_class_keys, key=lambda key: sizes[key][label]))
    return selected


class SpamDataModule(BaseDataModule):
    """Messages as batches {"message": list[str], "label": int64 (b), "index": int64 (b)}.

    `index` is the position of the message in `messages`. Batches for `predict` have no labels, and
    `index` is the line of the file, from 0.

        data = SpamDataModule(source="embedded", batch_size="all", val_fraction=0.0)
        Trainer(max_steps=200).fit(SpamClassifier(), datamodule=data)
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
        """Check the arguments; files are read in `setup`.

        Args:
            path: a file with ``label<TAB>text`` lines, or a CSV or TSV file with a header; by
                default `source` is used.
            source: sms (SMS Spam Collection, 5,574 messages); embedded (forty messages written for
                this project, with a fixed test split); auto: sms if it is available, else embedded.
            root: the folder of datasets; by default the variable DATA_ROOT.
            predict_path: the file whose lines `predict` labels, or a CSV file with a column of
                texts.
            batch_size: messages of one optimizer step over all ranks, at most all of them; or
                "all".
            test_fraction: fraction of each class held out for test.
            val_fraction: fraction of the remaining messages held out for validation; 0 for no
                validation.
            seed: seed of the split and the order. It does not follow seed_everything: a later
                `test` with another seed must not test on training messages.
            text_column: column of the texts in a CSV or TSV file, by name or by position from 0; by
                default the column named text, v2, message, sms or similar.
            label_column: column of the labels; by default the column named label, v1, category or
                similar.
            spam_label: the label value for spam; by default spam or 1.
            encoding: encoding of the files: utf-8, latin-1 (as Kaggle's spam.csv), utf-16, or
                another encoding of Python.
        """
        super().__init__()
        if batch_size != "all":
            check_positive("batch_size", batch_size)
        # raises an error for a number that is not between 0 and 1
        check_fraction("test_fraction", test_fraction)
        check_fraction("val_fraction", val_fraction, can_be_zero=True)
        try:  # Python also has codecs from bytes to bytes, such as base64
            is_text_encoding = codecs.lookup(encoding)._is_text_encoding
        except (LookupError, ValueError):
            is_text_encoding = False
        if not is_text_encoding:
            raise UsageError(
                f"encoding={encoding!r} is not a text encoding",
                ["utf-8", "latin-1", "utf-16", "other encodings of Python"],
                "use encoding='latin-1'",
                flag="--data.encoding=latin-1",
            )
        self.encoding, self.spam_label = encoding, spam_label
        self.text_column = None if text_column is None else str(text_column)
        self.label_column = None if label_column is None else str(label_column)
        self.path, self.source, self.root, self.predict_path = path, source, root, predict_path
        self.batch_size, self.seed = batch_size, seed
        self.test_fraction, self.val_fraction = test_fraction, val_fraction
        self.messages: list[Message] = []
        self.splits: dict[str, list[int]] = {}  # train, val, test: positions in `messages`
        self.predict_lines: list[tuple[int, str]] = []  # (line from 0, text)
        self._download_error = ""

    @property
    def train_messages(self) -> list[str]:
        """Return the training texts, the only texts that a featurizer may be fitted to."""
        return [self.messages[i].text for i in self.splits.get("train", [])]

    def prepare_data(self) -> None:
        """Download a missing file; Lightning calls this on local rank 0 only."""
        if self.path is None:
            self._download_error = download_if_missing(self.source, TEXT_DATASETS["sms"], self.root)

    def setup(self, stage: str) -> None:
        """Read and split the messages; for `predict` read only the lines to predict."""
        if stage == "predict":
            self._load_predict_lines()
        elif not self.messages:
            self._load_messages()
        if stage == "fit" and not self.val_fraction:
            self.skip_validation(val_fraction=0.1)

    def _load_predict_lines(self) -> None:
        """Read the messages to predict: the lines of a text, or the text column of a table.

        Raises:
            UsageError: `predict_path` is not given, or its file has no message.
        """
        if self.predict_path is None:
            raise UsageError(
                "SpamDataModule: predict needs a file, and predict_path is not given",
                ["a text file with one message per line", "a CSV file"],
                "use predict_path='FILE'",
                flag="--data.predict_path=FILE",
            )
        path = Path(self.predict_path).expanduser()
        # the decoded text; an error names the argument predict_path
        text = read_text_file(path, "predict_path", self.encoding)
        suffix = path.suffix.lower()
        if suffix == ".csv" or (self.text_column is not None and suffix in (".tsv", ".tab")):
            # entries with line, text and label, from the column of texts
            table = read_table(text, str(path), self.text_column, has_labels=False)
            self.predict_lines = [(entry.line - 1, entry.text) for entry in table.entries]
        else:
            lines = enumerate(_split_lines(text))
            self.predict_lines = [(i, line) for i, line in lines if line.strip()]
        if not self.predict_lines:
            raise UsageError(
                f"{self.predict_path} has no message",
                ["one message per line"],
                "add messages to the file",
            )

    def _load_messages(self) -> None:
        """Read the labeled messages, assign them to splits, and log the result.

        Sets `messages`, `splits` and `provenance`.
        """
        # file: the path, or None for the embedded data; reason: why those are used, or ""
        file, reason = resolve_file(
            self.path, self.source, TEXT_DATASETS["sms"], self.root, self._download_error
        )
        name = str(file or "the EMBEDDED messages (forty, written for this project)")
        is_custom_file = self.path is not None
        text = read_text_file(
            file or EMBEDDED_FILE, "path", self.encoding if is_custom_file else "utf-8"
        )
        # None for lines `label<TAB>text`
        table = self._parse_table(text, name, Path(name).suffix.lower()) if is_custom_file else None
        if table is not None:
            messages = messages_from_table(table, name, self.spam_label)
        else:
            messages = parse_messages(_split_lines(text), name, has_splits=file is None)
        self.messages = messages
        self._assign_splits(name)
        # equal messages, which stay in one split, count once
        keys = {m.text.strip().casefold() for m in messages}
        named_source = "sms" if file else "embedded"
        self.provenance = {
            "source": self.source if is_custom_file else named_source,
            "file": str(file or ""),
            "sha256": compute_sha256(file or EMBEDDED_FILE),
            "duplicates": len(messages) - len(keys),
        }
        if table is not None:
            name += f", columns {' and '.join(table.columns)}"
            self.provenance["columns"] = list(table.columns)
        spam = sum(m.label for m in messages)
        sizes = ", ".join(f"{len(indices):,} {split}" for split, indices in self.splits.items())
        # prints one line, on rank 0 only
        log_once(
            f"data: {name}, {len(messages) - spam:,} ham, {spam:,} spam, "
            f"{self.provenance['duplicates']:,} copies kept on one side; {sizes}"
            f"{reason and '; ' + reason}",
            is_warning=bool(reason),
        )
        if table is not None and table.num_rows_outside_columns:
            log_once(
                f"data: {table.num_rows_outside_columns:,} rows have text in columns without a "
                "name, which is not read",
                is_warning=True,
            )
        self._warn_of_missing_classes()

    def _warn_of_missing_classes(self) -> None:
        """Log a warning for each class without a message in a split that has messages."""
        for split, indices in self.splits.items():
            present_classes = {self.messages[i].label for i in indices}
            for k, label in enumerate(LABELS) if indices else ():
                if k not in present_classes:
                    texts = {m.text.strip().casefold() for m in self.messages if m.label == k}
                    log_once(
                        f"data: no {label} in {split}, so scores of {label} are undefined there: "
                        f"there are {len(texts)} different {label} messages, and copies stay "
                        "together",
                        is_warning=True,
                    )

    def _parse_table(self, text: str, name: str, suffix: str) -> Table | None:
        """Return the rows of a CSV or TSV file; None for a file of ``label<TAB>text`` lines."""
        requested = (self.text_column, self.label_column, self.spam_label)
        first = next((line for line in text.split("\n") if line.strip()), "")
        if (
            suffix == ".csv"
            or any(word is not None for word in requested)
            or has_known_header(first)
        ):
            return read_table(text, name, self.text_column, self.label_column)
        return None

    def _assign_splits(self, name: str) -> None:
        """Set `splits`: the positions of the training, validation and test messages.

        Args:
            name: the file name for errors.

        Raises:
            UsageError: a split is empty (val only if `val_fraction` is not 0).
        """
        messages, all_indices = self.messages, list(range(len(self.messages)))
        # the embedded file names the messages of its test split
        test = {i for i in all_indices if messages[i].split == "test"}
        if not test:  # the file does not name splits
            g = seeded_generator(self.seed, "test")
            # draws the fraction of each class; equal messages are drawn together
            test = grouped_stratified_split(messages, all_indices, self.test_fraction, g)
        non_test = [i for i in all_indices if i not in test]
        val = grouped_stratified_split(
            messages, non_test, self.val_fraction, seeded_generator(self.seed, "val")
        )
        self.splits = {
            "train": [i for i in non_test if i not in val],
            "val": sorted(val),
            "test": sorted(test),
        }
        empty_splits = [
            k for k in self.splits if not self.splits[k] and (k != "val" or self.val_fraction)
        ]
        if empty_splits:
            num_different = len({m.text.strip().casefold() for m in messages})
            is_only_val = empty_splits == ["val"]
            raise UsageError(
                f"{name}: {len(messages)} messages, {num_different} of them different, leave "
                f"none for {' and '.join(empty_splits)}, because equal messages stay in one split",
                ["one or more different messages of each split"],
                "add different messages" + (", or use val_fraction=0" if is_only_val else ""),
                flag="--data.val_fraction=0" if is_only_val else "",
            )

    def _make_batch_fn(self, indices: list[int]) -> Callable[[Tensor], dict[str, Any]]:
        labels = torch.tensor([m.label for m in self.messages])
        index_tensor = torch.tensor(indices)

        def make_batch(items: Tensor) -> dict[str, Any]:
            index = index_tensor[items]
            message = [self.messages[i].text for i in index.tolist()]
            return {"message": message, "label": labels[index], "index": index}

        return make_batch

    def _clamp_batch_size(self, num_messages: int) -> int:
        return (
            num_messages if isinstance(self.batch_size, str) else min(self.batch_size, num_messages)
        )

    def train_dataloader(self) -> ResumableLoader:
        """Return a loader that shuffles each epoch and skips its incomplete last batch."""
        indices = self.splits["train"]
        return self.make_train_loader(
            EpochSampler(self.seed, len(indices)),
            self._make_batch_fn(indices),
            len(indices),
            self._clamp_batch_size(len(indices)),
        )

    def val_dataloader(self) -> EvalLoader:
        """Return the loader of the messages held out for validation."""
        return self._make_eval_loader("val")

    def test_dataloader(self) -> EvalLoader:
        """Return the loader of the messages held out for test."""
        return self._make_eval_loader("test")

    def predict_dataloader(self) -> EvalLoader:
        """Return the loader of the lines of `predict_path`, without labels."""

        def make_batch(items: Tensor) -> dict[str, Any]:
            numbers, texts = zip(*(self.predict_lines[i] for i in items.tolist()), strict=True)
            return {"message": list(texts), "index": torch.tensor(numbers)}

        size = self._clamp_batch_size(len(self.predict_lines))
        return self.make_eval_loader(make_batch, len(self.predict_lines), size)

    def _make_eval_loader(self, split: str) -> EvalLoader:
        indices = self.splits[split]
        if not indices:
            raise UsageError(
                f"there are no messages for {split}: val_fraction={self.val_fraction}",
                ["val_fraction above 0", "the test split"],
                "use val_fraction=0.1 in training, or trainer.test(...)",
                flag="lightning test, or lightning fit --data.val_fraction=0.1",
            )
        size = self._clamp_batch_size(len(indices))
        return self.make_eval_loader(self._make_batch_fn(indices), len(indices), size)


def _split_lines(text: str) -> list[str]:
    return text.replace("\r\n", "\n").split("\n")
