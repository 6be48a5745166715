"""Base model of a policy: load and check the checkpoint of a pretrained language model."""

import hashlib
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
    """Return the path of a checkpoint file, or of the newest checkpoint in a run's folder."""
    if not base_checkpoint:
        raise UsageError(
            "base_checkpoint is empty; type --model.base_checkpoint=FILE, or the folder of a run"
        )
    path = Path(base_checkpoint).expanduser()
    if path.is_file():
        return path
    files = [p for p in path.rglob("*.ckpt") if p.is_file()] if path.is_dir() else []
    shard_files = [] if files or not path.is_dir() else sorted(path.rglob("*.distcp"))
    if shard_files:
        raise UsageError(
            f"{shard_files[0].parent} is a checkpoint in parts, and a base model is one file; type "
            f"lightning export --ckpt_path={shard_files[0].parent} --consolidate=base.ckpt, "
            "then --model.base_checkpoint=base.ckpt"
        )
    if not files:
        name = path.as_posix().removeprefix("runs/")
        raise MissingFileError(
            f"no base model at {base_checkpoint}: no such file, and no folder with checkpoints; "
            "train one "
            f"(lightning fit --config {name}, if that is a preset), or type "
            "--model.base_checkpoint=FILE"
        )
    return max(files, key=lambda p: p.stat().st_mtime_ns)


def load_base_model(base_checkpoint: str) -> BaseModel:
    """Load the checkpoint of a language model or of a policy.

    Raises:
        UsageError: the checkpoint is damaged, has no tokenizer, or is of another kind.
    """
    path = find_checkpoint(base_checkpoint)
    try:
        with collective_loading(
            mapped_sections=("state_dict",), should_share_checksums=False
        ):  # memory-mapped: the weights are copied later
            checkpoint = AtomicCheckpointIO().load_checkpoint(path)
    except CheckpointError as error:
        reason = str(error).partition(" cannot be used: ")[2].partition(";")[0] or str(error)
        raise UsageError(
            f"{path} cannot be read as a checkpoint: {reason}; type --model.base_checkpoint=FILE"
        ) from error
    content = checkpoint if isinstance(checkpoint, dict) else {}
    language, saved = content.get("language"), content.get("state_dict")
    if not language or not saved:
        task = content.get("task")
        raise UsageError(
            f"{path} is no checkpoint of a language model, but of {task or 'another program'}; "
            "train one: lightning fit --config reinforce/base; then type "
            "--model.base_checkpoint=FILE"
        )
    if language["tokenizer"] is None:
        raise UsageError(
            f"{path} has no tokenizer: the model was trained on bare numbers, and no reward can "
            "read what it writes; train it on a TextDataModule, or type "
            "--model.base_checkpoint=FILE"
        )
    adapter_names = [name for name in saved if name.endswith((".lora_a", ".lora_b"))]
    if adapter_names:
        raise UsageError(
            f"{path} has adapters ({adapter_names[0]} and {len(adapter_names) - 1} more), and a "
            "base model "
            f"is plain weights; type lightning export --ckpt_path={path} --merge --folder=plain, "
            "then --model.base_checkpoint=plain/model.ckpt"
        )
    net_kwargs = language.get(
        "net_kwargs", content.get("hyper_parameters", {})
    )  # the {} of a policy means the defaults
    net_kwargs = {
        k: v
        for k, v in net_kwargs.items()
        if k[0] != "_" and k not in ("vocab_size", "context_length")
    }
    tokenizer = tokenizer_from_state_dict(language["tokenizer"])
    weights = {
        name.removeprefix("net."): tensor
        for name, tensor in saved.items()
        if name.startswith("net.")
    }
    sizes = tokenizer.vocab_size, language["context_length"], net_kwargs
    _check_net(path, content.get("task"), weights, *sizes)
    return BaseModel(*sizes, tokenizer, weights, compute_fingerprint(weights))


def _check_net(
    path: Path,
    task: str | None,
    weights: dict[str, Tensor],
    vocab_size: int,
    context_length: int,
    net_kwargs: dict[str, Any],
) -> None:
    """Raise UsageError if the weights are not those of a `Transformer` of these sizes."""
    mismatches = sorted(net_kwargs.keys() - inspect.signature(Transformer).parameters.keys())
    if not mismatches:
        with torch.device("meta"):  # shapes without memory
            expected_state = Transformer(vocab_size, context_length, **net_kwargs).state_dict()
        expected_shapes, actual_shapes = (
            {k: v.shape for k, v in state.items()} for state in (expected_state, weights)
        )
        mismatches = sorted(name for name, _ in expected_shapes.items() ^ actual_shapes.items())
    if mismatches:
        raise UsageError(
            f"{path} was written by {task}, whose net is not that of LanguageModel: "
            f"{mismatches[0]} and "
            f"{len(set(mismatches)) - 1} more differ; allowed: a LanguageModel's checkpoint; "
            "train one: lightning fit --config reinforce/base; then type "
            "--model.base_checkpoint=FILE"
        )


def load_base_for_adapters(base_checkpoint: str, fingerprint: str) -> BaseModel:
    """Load the base model of a checkpoint that contains only adapters."""
    try:
        loaded = load_base_model(base_checkpoint)
    except FileNotFoundError:
        raise MissingFileError(
            f"the adapters belong to the base model at {base_checkpoint}, and {Path.cwd()} has "
            "none there; "
            "go where they were trained, or copy it here"
        ) from None
    check_fingerprint(base_checkpoint, loaded.fingerprint, fingerprint)
    return loaded


def check_fingerprint(base_checkpoint: str, actual: str, expected: str) -> None:
    """Raise UsageError if the base model's checksum differs from that in a checkpoint."""
    if actual != expected:
        raise UsageError(
            f"the base model at {base_checkpoint} is not the one this policy started from: its "
            "weights have "
            f"the checksum {actual[:12]}, those were {expected[:12]}; give the first one: "
            "--model.base_checkpoint=FILE, or put it back"
        )


def compute_fingerprint(weights: dict[str, Tensor]) -> str:
    """Checksum (SHA-256) of the names and values of weights, in hex."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode())
        digest.update(weights[name].detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
