"""Instruction tuning data (SFT): prompts and answers from JSON files, with loss on answers only.

    {"prompt": "Capital of France? ", "answer": "Paris"}            one line per example

    tokens    C a p i t a l ... ?   P a r i s end
    targets   . . . . . . . . . .   P a r i s end        . is IGNORE_INDEX

Axes: b batch, t time.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ravine.errors import UsageError
from ravine.files import atomic_write, cache_folder, compute_sha256

from .base import BaseDataModule, check_fraction
from .downloads import log_once
from .json_rows import check_text_characters, read_json_rows
from .loaders import EvalLoader, ResumableLoader, check_positive
from .samplers import EpochSampler, resolve_seed, seeded_generator
from .text import IGNORE_INDEX
from .text_files import list_files
from .tokenizer_factory import make_tokenizer
from .tokenizers import SpecialTokenMode, Tokenizer, tokenizer_provenance

PAD_MULTIPLE = 64  # batches are padded to a multiple of this length: few distinct shapes


class Example(NamedTuple):
    """The prompt and the answer of a row."""

    prompt: str
    answer: str


def read_examples(path: Path, prompt_field: str, answer_field: str) -> Iterator[Example]:
    """Yield the examples of a JSON file or folder; empty lines are skipped."""
    template = f'{{"{prompt_field}": "...", "{answer_field}": "..."}}'
    for location, row in read_json_rows(path, template):
        yield Example(*_extract_fields(row, (prompt_field, answer_field), location))


def _extract_fields(row: dict[str, Any], fields: tuple[str, str], location: str) -> Iterator[str]:
    for argument, field in zip(("prompt_field", "answer_field"), fields, strict=True):
        if not isinstance(row.get(field), str) or not row[field]:
            problem = "an empty" if row.get(field) == "" else "no text in" if field in row else "no"
            suggested_field = next((name for name in row if name not in fields), "NAME")
            raise UsageError(
                f"{location}: {problem} field {field!r}; the fields are {', '.join(row) or 'none'}",
                [f"an object with a text that is not empty in {field!r}"],
                f"correct the line, or use {argument}={suggested_field!r}",
                flag=f"--data.{argument}={suggested_field}",
            )
        yield check_text_characters(row[field], location, field)


class TokenizedExamples(NamedTuple):
    """The tokens of all examples, in memory or in a file."""

    sha256: str  # SHA-256 of the files
    characters: str  # the distinct characters, sorted
    tokenizer_key: str  # cache key of the tokenizer
    num_examples: int  # number of examples
    num_truncated: int  # examples that were longer than the context
    lengths: np.ndarray  # tokens per example, int32 (num_examples,)
    prompt_lengths: np.ndarray  # prompt tokens per example, int32 (num_examples,)
    tokens: np.ndarray  # int32, all examples concatenated
    token_file: str = ""  # file of the tokens, if one process has written them for all

    def has_file(self) -> bool:
        """Return whether the tokens are in memory or their file exists on this machine."""
        return not self.token_file or Path(self.token_file).is_file()

    def load_tokens(self) -> "TokenizedExamples":
        """Return the examples with their tokens loaded into memory."""
        if not self.token_file:
            return self
        return self._replace(tokens=np.fromfile(self.token_file, np.int32), token_file="")


class InstructionDataModule(BaseDataModule):
    """Instruction data: prompts with answers as batches (inputs, targets), both int64 (b t).

        data = InstructionDataModule("questions.jsonl", tokenizer="gpt2", context_length=256)

    An answer ends with the tokenizer's end-of-text token, if it has one, so that a model learns to
    stop.
    """

    def __init__(
        self,
        path: str | Path,
        prompt_field: str = "prompt",
        answer_field: str = "answer",
        tokenizer: str = "gpt2",
        context_length: int = 256,
        batch_size: int = 32,
        val_fraction: float = 0.1,
        seed: int | None = None,
        special_tokens: SpecialTokenMode = "as_text",
    ) -> None:
        """Check the arguments; the file is read in `setup`.

        Args:
            path: a file of JSON objects, one per line (.jsonl, .ndjson) or in a list (.json), or a
                folder of such files.
            prompt_field: the field with the prompt, which gets no loss.
            answer_field: the field with the answer, which is learned.
            tokenizer: characters, bytes, gpt2 or a file, as in TextDataModule; use the tokenizer of
                the model that is fine-tuned.
            context_length: maximum t; a longer example is truncated at its end, and the log gives
                the number of truncated examples.
            batch_size: examples of one optimizer step, over all ranks and accumulated batches.
            val_fraction: fraction of the examples, drawn by the seed, held out for validation and
                test.
            seed: seed of the split and the order; by default that of seed_everything.
            special_tokens: how the tokenizer's special tokens are read in a text: as_text, as
                ordinary text; allow, as one token each; or error, as an error.
        """
        super().__init__()
        check_positive("context_length", context_length)
        check_positive("batch_size", batch_size)
        check_fraction("val_fraction", val_fraction)
        self.path, self.tokenizer_name = Path(path).expanduser(), tokenizer
        self.fields = prompt_field, answer_field
        self.context_length, self.batch_size = context_length, batch_size
        self.val_fraction, self.seed = val_fraction, seed
        self.special_tokens: SpecialTokenMode = special_tokens
        self.rows: list[tuple[Tensor, int]] = []  # (tokens, number of prompt tokens) per example
        self.tokenizer: Tokenizer | None = None

    def prepare_data(self) -> None:
        """Tokenize for all ranks of the node; Lightning calls this on local rank 0 only.

        Without a distributed run, `setup` tokenizes.
        """
        if not self.rows:
            self.prepare_for_all_ranks(self._write_token_file)

    def _write_token_file(self) -> TokenizedExamples:
        """Tokenize on local rank 0, and write the tokens to a file of the cache folder.

        Returns:
            The examples without their tokens, which the other ranks read from `token_file`. If the
            cache folder is not writable, `num_examples` is 0, and each rank tokenizes in `setup`.
        """
        tokenized = self._tokenize_examples()
        # everything that the tokens depend on, so that another setting gets another file
        key = json.dumps(
            [
                tokenized.sha256,
                self.fields,
                tokenized.tokenizer_key,
                self.special_tokens,
                self.context_length,
            ]
        )
        name = f"answers-{hashlib.sha256(key.encode()).hexdigest()[:32]}.int32"
        path = cache_folder() / "tokens" / name
        without_tokens = tokenized._replace(tokens=np.zeros(0, np.int32))
        try:
            # the file gets its name when it is complete
            with atomic_write(path) as file:
                file.write(tokenized.tokens.data)
        except OSError:
            return without_tokens._replace(num_examples=0)
        return without_tokens._replace(token_file=str(path))

    def _tokenize_examples(self) -> TokenizedExamples:
        """Read and tokenize all examples; return their concatenated tokens.

        Raises:
            UsageError: the files hold fewer than two examples, or one that is malformed.
        """
        # objects with prompt and answer
        examples = list(read_examples(self.path, *self.fields))
        if len(examples) < 2:
            raise UsageError(
                f"{self.path} holds {len(examples)} examples",
                ["2 or more, for training and validation"],
                "use path='FILE' with more examples",
                flag="--data.path=FILE",
            )
        # the distinct characters, which a tokenizer of characters needs
        characters = "".join(sorted({c for e in examples for c in e.prompt + e.answer}))
        tokenizer = make_tokenizer(self.tokenizer_name, characters, self.special_tokens)
        # (tokens of prompt and answer, number of prompt tokens) per example
        rows = [self._tokenize_example(example, tokenizer) for example in examples]
        max_tokens = self.context_length + 1  # + 1: targets are shifted by one
        truncated_tokens = [tokens[:max_tokens] for tokens, _ in rows]
        return TokenizedExamples(
            sha256=compute_sha256(*list_files(self.path)),
            characters=characters,
            tokenizer_key=tokenizer.cache_key,
            num_examples=len(examples),
            num_truncated=sum(len(tokens) > max_tokens for tokens, _ in rows),
            lengths=np.array([len(tokens) for tokens in truncated_tokens], np.int32),
            prompt_lengths=np.array([prompt_length for _, prompt_length in rows], np.int32),
            tokens=torch.cat(truncated_tokens).numpy().astype(np.int32),
        )

    def setup(self, stage: str) -> None:
        """Read and tokenize the file, and log its size; raise an error if it cannot be split.

        Lightning calls this on every rank, before each stage.
        """
        prepared: TokenizedExamples | None = self.get_prepared()  # collective: before any return
        if self.rows:
            return  # set up by an earlier stage
        # no file was written, or this node does not see it: tokenize here
        if prepared is None or not prepared.num_examples or not prepared.has_file():
            prepared = self._tokenize_examples()
        # reads the token file if there is one
        tokenized = prepared.load_tokens()
        self.tokenizer = make_tokenizer(
            self.tokenizer_name, tokenized.characters, self.special_tokens
        )
        all_tokens = torch.from_numpy(tokenized.tokens.astype(np.int64))
        example_tokens = all_tokens.split(tokenized.lengths.tolist())
        rows = list(zip(example_tokens, tokenized.prompt_lengths.tolist(), strict=True))
        # a long example is truncated at the context length, maybe to its prompt alone
        self.rows = [
            (tokens, prompt_length) for tokens, prompt_length in rows if prompt_length < len(tokens)
        ]
        if len(self.rows) < 2:
            raise UsageError(
                f"the prompts in {self.path} fill context_length={self.context_length} tokens "
                "and leave no room for an answer",
                ["a context that is longer than two or more of the prompts"],
                f"use context_length={2 * self.context_length}",
                flag=f"--data.context_length={2 * self.context_length}",
            )
        num_truncated = tokenized.num_truncated
        self.provenance = {
            "source": "path",
            "file": str(self.path),
            "sha256": tokenized.sha256,
            **tokenizer_provenance(self.tokenizer),
        }
        num_dropped = len(rows) - len(self.rows)
        truncation_note = (
            f"; {num_truncated} longer than the context are cut, {num_dropped} left out"
        )
        num_val = self._num_val_examples()
        log_once(
            f"data: {self.path}, {tokenized.num_examples:,} examples; "
            f"{len(self.rows) - num_val:,} train, {num_val:,} val"
            f"{truncation_note if num_truncated else ''}",
            is_warning=num_truncated > 0,
        )

    def _tokenize_example(self, example: Example, tokenizer: Tokenizer) -> tuple[Tensor, int]:
        eos_tokens = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
        prompt_tokens = tokenizer.encode(example.prompt)
        answer_tokens = tokenizer.encode(example.answer)
        tokens = torch.cat(
            (prompt_tokens, answer_tokens, torch.tensor(eos_tokens, dtype=torch.int64))
        )
        return tokens, len(prompt_tokens)

    def _make_batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        rows = [self.rows[int(number)] for number in indices]
        longest = max(len(tokens) for tokens, _ in rows) - 1
        t = min(self.context_length, -(-longest // PAD_MULTIPLE) * PAD_MULTIPLE)
        inputs = torch.zeros(len(rows), t, dtype=torch.int64)
        targets = torch.full((len(rows), t), IGNORE_INDEX)
        for row, (tokens, num_prompt_tokens) in enumerate(rows):
            inputs[row, : len(tokens) - 1] = tokens[:-1]
            targets[row, num_prompt_tokens - 1 : len(tokens) - 1] = tokens[num_prompt_tokens:]
        return inputs, targets

    def _num_val_examples(self) -> int:
        count = len(self.rows)
        return min(max(1, round(count * self.val_fraction)), count - 1)

    def _split_indices(self) -> tuple[Tensor, Tensor]:
        count = len(self.rows)
        shuffled = torch.randperm(
            count, generator=seeded_generator(resolve_seed(self.seed), "split")
        )
        size = self._num_val_examples()
        return shuffled[size:], shuffled[:size]

    def train_dataloader(self) -> ResumableLoader:
        """Return the loader of all examples not held out, shuffled each epoch."""
        train_indices, _ = self._split_indices()
        return self.make_train_loader(
            EpochSampler(resolve_seed(self.seed), len(train_indices)),
            lambda indices: self._make_batch(train_indices[indices]),
            len(train_indices),
        )

    def val_dataloader(self) -> EvalLoader:
        """Return the loader of the examples held out for validation."""
        _, val_indices = self._split_indices()
        return self.make_eval_loader(
            lambda indices: self._make_batch(val_indices[indices]), len(val_indices)
        )
