"""Base model of a policy: load and check the checkpoint of a pretrained language model."""

import inspect
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ravine.datamodules.tokenizer_factory import tokenizer_from_state_dict
from ravine.datamodules.tokenizers import Tokenizer
from ravine.errors import MissingFileError, UsageError
from ravine.strategies.checkpoint.atomic_io import (
    AtomicCheckpointIO,
    CheckpointError,
    collective_loading,
)
from ravine.strategies.checkpoint.fingerprint import compute_fingerprint

from ..nn import Transformer


class BaseModel(NamedTuple):
    """Content of a language model's checkpoint: sizes, tokenizer, weights by name, checksum."""

    vocab_size: int
    context_length: int
    net_kwargs: dict[str, Any]
    tokenizer: Tokenizer
    weights: dict[str, Tensor]
    fingerprint: str


def find_checkpoint(base_checkpoint: str) -> Path:
    """Return the path of a checkpoint file, or of the newest checkpoint in a run's folder.

    Raises:
        UsageError: the argument is empty, or the folder has a sharded checkpoint only.
        MissingFileError: there is no such file, or no checkpoint in the folder.
    """
    if not base_checkpoint:
        raise UsageError(
            "Reinforce: base_checkpoint is empty",
            ["a checkpoint file", "the folder of a run"],
            "use base_checkpoint=FILE",
            flag="--model.base_checkpoint=FILE",
        )
    path = Path(base_checkpoint).expanduser()
    if path.is_file():
        return path
    files = [p for p in path.rglob("*.ckpt") if p.is_file()] if path.is_dir() else []
    shard_files = [] if files or not path.is_dir() else sorted(path.rglob("*.distcp"))
    if shard_files:  # torch's distributed checkpoint: a folder of files
        folder = shard_files[0].parent
        raise UsageError(
            f"Reinforce: base_checkpoint={folder} is a sharded checkpoint, but a base model must "
            "be one file",
            ["a checkpoint file"],
            "write it to one file by the command export, then use base_checkpoint='base.ckpt'",
            flag=(
                f"lightning export --ckpt_path={folder} --consolidate=base.ckpt, then "
                "--model.base_checkpoint=base.ckpt"
            ),
        )
    if not files:
        flag, run = "--model.base_checkpoint=FILE", path.as_posix()
        if run.startswith("runs/"):  # the folder of the runs of a config
            flag = f"lightning fit --config {run.removeprefix('runs/')}, or {flag}"
        raise MissingFileError(
            f"Reinforce: base_checkpoint={base_checkpoint} is neither a file nor a folder with "
            "checkpoints",
            ["a checkpoint file", "the folder of a run"],
            "train a LanguageModel, and use base_checkpoint=FILE",
            flag=flag,
        )
    return max(files, key=lambda p: p.stat().st_mtime_ns)  # the newest


def load_base_model(base_checkpoint: str) -> BaseModel:
    """Load the checkpoint of a language model or of a policy.

    Raises:
        UsageError: the checkpoint is damaged, has no tokenizer, or is of another kind.
    """
    path = find_checkpoint(base_checkpoint)
    try:
        # the file is mapped into memory: the weights are copied later. One rank may load alone, as
        # the ranks do not divide the verification of checksums
        with collective_loading(mapped_sections=("state_dict",), should_share_checksums=False):
            checkpoint = AtomicCheckpointIO().load_checkpoint(path)
    except CheckpointError as error:
        raise UsageError(
            f"Reinforce: base_checkpoint={path} cannot be loaded: {error.problem}",
            ["a checkpoint file"],
            "use base_checkpoint=FILE with another file",
            flag="--model.base_checkpoint=FILE",
        ) from error
    content = checkpoint if isinstance(checkpoint, dict) else {}
    _check_content(path, content)  # raises unless both sections exist
    # "language" has the tokenizer and the sizes
    language, state_dict = content["language"], content["state_dict"]
    # a policy has the arguments here, even if they are {}, a language model in its hyperparameters
    saved_kwargs = language.get("net_kwargs", content.get("hyper_parameters", {}))
    net_kwargs = {
        name: value
        for name, value in saved_kwargs.items()
        if not name.startswith("_") and name not in ("vocab_size", "context_length")
    }
    tokenizer = tokenizer_from_state_dict(language["tokenizer"])
    # the net is the attribute `net` of a task, so its parameters have this prefix
    weights = {
        name.removeprefix("net."): tensor
        for name, tensor in state_dict.items()
        if name.startswith("net.")
    }
    sizes = tokenizer.vocab_size, language["context_length"], net_kwargs
    _check_net(path, content.get("task"), weights, *sizes)
    # the fingerprint is a checksum of the weights: a resumed policy must have the same base
    return BaseModel(*sizes, tokenizer, weights, fingerprint_weights(weights))


def _check_content(path: Path, content: dict[str, Any]) -> None:
    """Raise UsageError for another kind of checkpoint, without tokenizer, or with adapters."""
    language, state_dict = content.get("language"), content.get("state_dict")
    if not language or not state_dict:
        task = content.get("task")
        raise UsageError(
            f"Reinforce: base_checkpoint={path} was written by {task or 'another program'}, not "
            "by a LanguageModel",
            ["a checkpoint of a LanguageModel"],
            "train a LanguageModel, and use base_checkpoint=FILE",
            flag="lightning fit --config reinforce/base, then --model.base_checkpoint=FILE",
        )
    if language["tokenizer"] is None:
        raise UsageError(
            f"Reinforce: base_checkpoint={path} has no tokenizer, because the model was trained "
            "on token ids, and rewards need text",
            ["a checkpoint of a LanguageModel that was trained on text"],
            "train the base model on a TextDataModule with text",
            flag="--model.base_checkpoint=FILE",
        )
    # names of the parameters of low-rank adapters (LoRA)
    adapter_names = [name for name in state_dict if name.endswith((".lora_a", ".lora_b"))]
    if adapter_names:
        raise UsageError(
            f"Reinforce: base_checkpoint={path} contains adapters ({adapter_names[0]} and "
            f"{len(adapter_names) - 1} more), but a base model must have plain weights",
            ["a checkpoint without adapters"],
            "merge the adapters by the command export, then use base_checkpoint='plain/model.ckpt'",
            flag=(
                f"lightning export --ckpt_path={path} --merge --folder=plain, then "
                "--model.base_checkpoint=plain/model.ckpt"
            ),
        )


def _check_net(
    path: Path,
    task: str | None,
    weights: dict[str, Tensor],
    vocab_size: int,
    context_length: int,
    net_kwargs: dict[str, Any],
) -> None:
    """Raise UsageError if the weights are not those of a `Transformer` of these sizes.

    Args:
        path: path of the checkpoint, for the message.
        task: class that wrote the checkpoint, for the message.
        weights: tensors by the names of the net's parameters.
        vocab_size: number of different tokens.
        context_length: longest sequence, in tokens.
        net_kwargs: the other arguments of `Transformer`.
    """
    # arguments that Transformer does not have
    mismatches = sorted(net_kwargs.keys() - inspect.signature(Transformer).parameters.keys())
    if not mismatches:
        with torch.device("meta"):  # shapes without memory
            expected_state = Transformer(vocab_size, context_length, **net_kwargs).state_dict()
        expected_shapes, actual_shapes = (
            {k: v.shape for k, v in state.items()} for state in (expected_state, weights)
        )
        # names in one of them only, and (twice) names with different shapes
        mismatches = sorted(name for name, _ in expected_shapes.items() ^ actual_shapes.items())
    if mismatches:
        raise UsageError(
            f"Reinforce: base_checkpoint={path} was written by {task}, but its net is not that of "
            f"a LanguageModel: {mismatches[0]} and {len(set(mismatches)) - 1} more differ",
            ["a checkpoint of a LanguageModel"],
            "train a LanguageModel, and use base_checkpoint=FILE",
            flag="lightning fit --config reinforce/base, then --model.base_checkpoint=FILE",
        )


def load_base_for_adapters(base_checkpoint: str, fingerprint: str) -> BaseModel:
    """Load the base model of a checkpoint that contains only adapters."""
    try:
        loaded = load_base_model(base_checkpoint)
    except FileNotFoundError:
        raise MissingFileError(
            f"Reinforce: the base model of these adapters, {base_checkpoint}, does not exist in "
            f"{Path.cwd()}",
            ["the folder in which the adapters were trained"],
            "run the script in that folder, or copy the base model to this path",
        ) from None
    check_fingerprint(base_checkpoint, loaded.fingerprint, fingerprint)
    return loaded


def check_fingerprint(base_checkpoint: str, actual: str, expected: str) -> None:
    """Raise UsageError if the base model's checksum differs from that in a checkpoint."""
    if actual != expected:
        raise UsageError(
            f"Reinforce: base_checkpoint={base_checkpoint} is not the base model of this policy: "
            f"the checksum of its weights is {actual[:12]}, but that of the base model was "
            f"{expected[:12]}",
            ["the base model that the policy was trained from"],
            "use base_checkpoint=FILE with the first base model",
            flag="--model.base_checkpoint=FILE",
        )


def fingerprint_weights(weights: dict[str, Tensor]) -> str:
    """Return the SHA-256 of the names and values of weights, in hex."""
    return compute_fingerprint(item for name in sorted(weights) for item in (name, weights[name]))
