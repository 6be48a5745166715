"""RL prompts datamodule: prompts for a policy, from text snippets or from the rows of JSON files.

Prompts are texts, since only the model has the tokenizer. Each prompt comes with its sample index
in the data order. All random draws for a prompt depend only on the seed and this index. So the
global batch is the same on any number of ranks, and a resumed run draws the same samples.
"""

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ravine.errors import UsageError
from ravine.files import compute_sha256

from .base import BaseDataModule, check_fraction
from .downloads import TextName, download_if_missing, log_once, resolve_file, text_source
from .json_rows import check_text_characters, holds_json_rows, read_json_rows
from .loaders import DataParallelInfo, EvalLoader, ResumableLoader, check_positive
from .samplers import EpochSampler, IndexedSampler, resolve_seed
from .text import python_docs_text
from .text_files import list_files, read_text


class PromptBatch(NamedTuple):
    """A batch of prompts."""

    texts: list[str]
    sample_ids: list[tuple[int, int]]  # (epoch, sample) per prompt; (-1, sample) in evaluation
    columns: dict[str, list[Any]]  # the other fields of the rows


class PromptDataModule(BaseDataModule):
    """Batches of prompts for reinforcement learning.

    Example:

        data = PromptDataModule("plays.txt", prompt_length=256, batch_size=64)
        data = PromptDataModule("questions.jsonl", corpus_path="plays.txt")
    """

    def __init__(
        self,
        path: str | Path | None = None,
        source: TextName = "auto",
        root: str | None = None,
        corpus_path: str | Path | None = None,
        prompt_length: int = 256,
        batch_size: int = 64,
        val_fraction: float = 0.1,
        num_val_prompts: int = 64,
        seed: int | None = None,
    ) -> None:
        """Check the arguments; files are read in `setup`.

        Args:
            path: a text file; or a .jsonl, .ndjson or .json file of objects like {"prompt": "Q: ",
                "answer": "A"}, or a folder of such files; by default `source` is used.
            source: a text by its name, embedded or auto, as in `TextDataModule`.
            root: the folder of datasets; by default the variable DATA_ROOT.
            corpus_path: reference text for rewards; by default the text of the snippets.
            prompt_length: characters per snippet.
            batch_size: prompts of one optimizer step, over all ranks and accumulated batches.
            val_fraction: fraction at the end of the text or file that is held out from training.
            num_val_prompts: prompts per validation, always the same, spaced evenly over the
                held-out part; rounded down to a multiple of the number of ranks.
            seed: seed of the order; by default that of seed_everything.
        """
        super().__init__()
        for name, value in (("prompt_length", prompt_length), ("batch_size", batch_size)):
            check_positive(name, value)
        check_positive("num_val_prompts", num_val_prompts)
        # raises an error for a number that is not between 0 and 1
        check_fraction("val_fraction", val_fraction)
        self.path, self.root, self.corpus_path = path, root, corpus_path
        self.source: TextName = source
        text_source(source)  # UsageError for an unknown name
        self.prompt_length, self.batch_size = prompt_length, batch_size
        self.val_fraction, self.num_val_prompts, self.seed = val_fraction, num_val_prompts, seed
        self.corpus_text: str | None = None  # reference text for rewards
        self.rows: list[dict[str, Any]] = []  # rows of JSON files
        self._snippets = ""  # the text from which snippets are taken as prompts
        self._download_error = ""

    def prepare_data(self) -> None:
        """Download a missing file; Lightning calls this on local rank 0 only."""
        if self.path is None:
            self._download_error = download_if_missing(
                self.source, text_source(self.source), self.root
            )

    def setup(self, stage: str) -> None:
        """Read the prompts and the reference text, and log the file and its size.

        Prompts are the rows of a JSON file, or snippets of a text, which is then the reference text
        for rewards too unless `corpus_path` gives another.
        """
        if self._snippets or self.rows:
            return  # set up by an earlier stage
        # file: the path, or None for the embedded text
        file, reason = resolve_file(
            self.path, self.source, text_source(self.source), self.root, self._download_error
        )
        name = str(file or "the EMBEDDED text (help topics of CPython)")
        # whether the file, or each file of the folder, is JSON by its suffix
        if file is not None and holds_json_rows(file):
            self.rows = read_prompt_rows(file)
            unit = "prompts"
        else:
            # python_docs_text: the embedded text
            self.corpus_text = "".join(read_text(list_files(file)) if file else python_docs_text())
            self._snippets = self.corpus_text
            unit = f"snippets of {self.prompt_length} characters"
        if self.corpus_path is not None:
            self.corpus_text = "".join(
                read_text(list_files(Path(self.corpus_path).expanduser(), "corpus_path"))
            )
        # raises an error if a part of the split would have too few prompts
        self._check_size(name)
        self.provenance = {"file": str(file or ""), "sha256": self._checksum(file)}
        if self.path is None:
            # `text_source`: the public file of this name, with its checksum
            self.provenance["source"] = text_source(self.source).name if file else "embedded"
        num_train, first, num_items = self._get_bounds()
        size = f"{num_items:,} {unit}; {num_train:,} train, {num_items - first:,} val"
        # `reason`: why the embedded text is used; "" for another
        log_once(f"data: {name}, {size}{reason and '; ' + reason}", is_warning=bool(reason))

    def _checksum(self, file: Path | None) -> str:
        """Return the SHA-256 of the rows and the reference text, which a resumed run compares."""
        rows = compute_sha256(*list_files(file)) if self.rows and file is not None else ""
        return hashlib.sha256(f"{rows}{self.corpus_text or ''}".encode()).hexdigest()

    @property
    def prompts(self) -> list[str]:
        """Return the prompts of JSON files; empty for a text, which has too many snippets."""
        return [row["prompt"] for row in self.rows]

    @property
    def characters(self) -> str:
        """Return the distinct characters of all prompts, sorted."""
        return "".join(sorted(set(self._snippets).union(*self.prompts)))

    def train_dataloader(self) -> ResumableLoader:
        """Return the training loader: snippets are drawn with replacement, JSON rows without."""
        num_items = self._get_bounds()[0]
        sampler = EpochSampler(resolve_seed(self.seed), num_items, replacement=not self.rows)
        return self.make_train_loader(
            IndexedSampler(sampler),  # type: ignore
            lambda items: self._make_batch(items[:, 2], [(e, s) for e, s in items[:, :2].tolist()]),
            num_items if self.rows else max(self.batch_size, num_items // self.prompt_length),
        )

    def val_dataloader(self) -> EvalLoader:
        """Return the validation loader: the same prompts each time, all in one batch.

        One batch, because metrics compare the texts of a batch with each other.

        Raises:
            UsageError: there are fewer prompts than ranks.
        """
        _, first, last = self._get_bounds()  # positions of the held-out prompts
        # rank, number of ranks, and micro-batches per optimizer step
        data_parallel = DataParallelInfo.from_trainer(self.trainer)
        # each row once; snippets may overlap, so there are always enough
        count = min(self.num_val_prompts, last - first) if self.rows else self.num_val_prompts
        # a multiple of the ranks, so that their batches are equal
        even_count = count - count % data_parallel.dp_size
        if not even_count:
            problem = (
                f"only {count} prompts are held out" if self.rows else f"num_val_prompts={count}"
            )
            fix = (
                "val_fraction=0.5"
                if count < self.num_val_prompts
                else f"num_val_prompts={data_parallel.dp_size}"
            )
            raise UsageError(
                f"{problem}, but there are {data_parallel.dp_size} ranks",
                [f"{data_parallel.dp_size} or more, one prompt for each rank"],
                f"use {fix}",
                flag=f"--data.{fix}, or --trainer.devices={count}",
            )
        positions = torch.linspace(first, last - 1, even_count).long()

        def make_batch(numbers: Tensor) -> PromptBatch:
            # sample ids (epoch, number); epoch -1 is the validation
            return self._make_batch(positions[numbers], [(-1, n) for n in numbers.tolist()])

        return EvalLoader(make_batch, even_count, even_count, data_parallel)

    def _get_bounds(self) -> tuple[int, int, int]:
        """Return the number of training items, the first held-out item, and the number of items.

        An item is a row, or the start position of a snippet.
        """
        items = len(self.rows) or len(self._snippets)
        train = int(items * (1 - self.val_fraction))
        if self.rows:
            train = min(train, items - 1)
            return train, train, items
        return (
            train - self.prompt_length,
            train,
            items - self.prompt_length + 1,
        )  # no training snippet overlaps the held-out part

    def _make_batch(self, items: Tensor, sample_ids: list[tuple[int, int]]) -> PromptBatch:
        numbers = items.tolist()
        if not self.rows:
            texts = [self._snippets[n : n + self.prompt_length] for n in numbers]
            return PromptBatch(texts, sample_ids, {})
        rows = [self.rows[n] for n in numbers]
        columns = {key: [row[key] for row in rows] for key in rows[0] if key != "prompt"}
        return PromptBatch([row["prompt"] for row in rows], sample_ids, columns)

    def _check_size(self, name: str) -> None:
        train, first, num_items = self._get_bounds()
        if train < 1 or num_items - first < 1:
            unit = "prompts" if self.rows else "characters"
            count = len(self.rows) or len(self._snippets)
            raise UsageError(
                f"{name} has {count:,} {unit}, which are too few to train and validate on"
                + ("" if self.rows else f" prompts of prompt_length={self.prompt_length}"),
                ["one training prompt and one validation prompt, or more"],
                "add prompts to the file"
                if self.rows
                else "use prompt_length=32, or a longer text",
                flag="" if self.rows else "--data.prompt_length=32",
            )


def read_prompt_rows(path: Path) -> list[dict[str, Any]]:
    """Read the objects of JSON files; each needs a prompt, and all must have the same columns.

    Args:
        path: a file (.jsonl, .ndjson, .json), or a folder of such files.

    Raises:
        UsageError: a row is malformed, or there are fewer than two.
    """
    prompts: list[dict[str, Any]] = []
    # location: file and line, for errors. The second argument is an example for errors.
    for location, row in read_json_rows(path, '{"prompt": "Q: ", "answer": "A"}'):
        prompt = row.get("prompt")
        if not isinstance(prompt, str) or not prompt:
            raise UsageError(
                f'{location}: the row has no "prompt"',
                ['an object like {"prompt": "Q: ", "answer": "A"} with a prompt that is not empty'],
                "correct the line",
            )
        if prompts and row.keys() != prompts[0].keys():
            differing_columns = ", ".join(sorted(row.keys() ^ prompts[0].keys()))
            raise UsageError(
                f"{location}: its columns differ from those of the first line in "
                f"{differing_columns}",
                [", ".join(prompts[0])],
                "give every line the same columns",
            )
        for name, value in row.items():
            if isinstance(value, str):
                # raises an error for U+0000 and for a lone surrogate, which is half of a character
                check_text_characters(value, location, name)
        prompts.append(row)
    if len(prompts) < 2:
        raise UsageError(
            f"{path} has {len(prompts)} prompts",
            ["2 or more, for training and validation"],
            "add prompts",
        )
    return prompts
