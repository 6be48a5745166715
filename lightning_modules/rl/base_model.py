"""The base model: a trained language model's checkpoint, from which a policy starts."""

import hashlib
import inspect
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ravine.datamodules.tokenizers import Tokenizer, from_state
from ravine.errors import MissingFileError, UsageError
from ravine.strategies.checkpoint.atomic_io import (
    AtomicCheckpointIO,
    CheckpointError,
    reading_together,
)

from ..nn import Transformer


class BaseModel(NamedTuple):
    """What a checkpoint says of the model: sizes, tokenizer, weights by name."""

    vocabulary: int
    context: int
    shape: dict[str, Any]
    tokenizer: Tokenizer
    weights: dict[str, Tensor]
    sha256: str


def find(base: str) -> Path:
    """The file itself, or of a run's folder the newest checkpoint."""
    if not base:
        raise UsageError("base is empty; type --model.base=FILE, or the folder of a run")
    path = Path(base).expanduser()
    if path.is_file():
        return path
    files = [p for p in path.rglob("*.ckpt") if p.is_file()] if path.is_dir() else []
    parts = [] if files or not path.is_dir() else sorted(path.rglob("*.distcp"))
    if parts:
        raise UsageError(
            f"{parts[0].parent} is a checkpoint in parts, and a base model is one file; type "
            f"lightning export --ckpt_path={parts[0].parent} --consolidate=base.ckpt, "
            "then --model.base=base.ckpt"
        )
    if not files:
        name = path.as_posix().removeprefix("runs/")
        raise MissingFileError(
            f"no base model at {base}: no such file, and no folder with checkpoints; train one "
            f"(lightning fit --config {name}, if that is a preset), or type --model.base=FILE"
        )
    return max(files, key=lambda p: p.stat().st_mtime_ns)


def read(base: str) -> BaseModel:
    """Read a language model's checkpoint, or that of a policy; refuse one without a tokenizer."""
    path = find(base)
    try:
        with reading_together(mapped=("state_dict",), divided=False):  # weights are copied later
            checkpoint = AtomicCheckpointIO().load_checkpoint(path)
    except CheckpointError as error:
        said = str(error).partition(" cannot be used: ")[2].partition(";")[0] or str(error)
        raise UsageError(
            f"{path} cannot be read as a checkpoint: {said}; type --model.base=FILE"
        ) from error
    given = checkpoint if isinstance(checkpoint, dict) else {}
    language, saved = given.get("language"), given.get("state_dict")
    if not language or not saved:
        task = given.get("task")
        raise UsageError(
            f"{path} is no checkpoint of a language model, but of {task or 'another program'}; "
            "train one: lightning fit --config reinforce/base; then type --model.base=FILE"
        )
    if language["tokenizer"] is None:
        raise UsageError(
            f"{path} has no tokenizer: the model was trained on bare numbers, and no reward can "
            "read what it writes; train it on a TextDataModule, or type --model.base=FILE"
        )
    adapters = [name for name in saved if name.endswith((".lora_a", ".lora_b"))]
    if adapters:
        raise UsageError(
            f"{path} has adapters ({adapters[0]} and {len(adapters) - 1} more), and a base model "
            f"is plain weights; type lightning export --ckpt_path={path} --merge --folder=plain, "
            "then --model.base=plain/model.ckpt"
        )
    shape = language.get("shape", given.get("hyper_parameters", {}))  # a policy's {} is the default
    shape = {k: v for k, v in shape.items() if k[0] != "_" and k not in ("vocabulary", "context")}
    tokenizer = from_state(language["tokenizer"])
    weights = {
        name.removeprefix("net."): tensor
        for name, tensor in saved.items()
        if name.startswith("net.")
    }
    sizes = tokenizer.vocabulary, language["context"], shape
    _check_net(path, given.get("task"), weights, *sizes)
    return BaseModel(*sizes, tokenizer, weights, fingerprint(weights))


def _check_net(
    path: Path,
    task: str | None,
    weights: dict[str, Tensor],
    vocabulary: int,
    context: int,
    shape: dict[str, Any],
) -> None:
    """Refuse weights of another net than ours of these sizes."""
    wrong = sorted(shape.keys() - inspect.signature(Transformer).parameters.keys())
    if not wrong:
        with torch.device("meta"):  # sizes without memory
            ours = Transformer(vocabulary, context, **shape).state_dict()
        here, there = ({k: v.shape for k, v in each.items()} for each in (ours, weights))
        wrong = sorted(name for name, _ in here.items() ^ there.items())
    if wrong:
        raise UsageError(
            f"{path} was written by {task}, whose net is not that of LanguageModel: {wrong[0]} and "
            f"{len(set(wrong)) - 1} more differ; allowed: a LanguageModel's checkpoint; "
            "train one: lightning fit --config reinforce/base; then type --model.base=FILE"
        )


def behind_adapters(base: str, sha256: str) -> BaseModel:
    """The base that a checkpoint of adapters alone belongs to."""
    try:
        found = read(base)
    except FileNotFoundError:
        raise MissingFileError(
            f"the adapters belong to the base model at {base}, and {Path.cwd()} has none there; "
            "go where they were trained, or copy it here"
        ) from None
    check_same(base, found.sha256, sha256)
    return found


def check_same(base: str, here: str, there: str) -> None:
    """Refuse a base with another checksum than that of a checkpoint."""
    if here != there:
        raise UsageError(
            f"the base model at {base} is not the one this policy started from: its weights have "
            f"the checksum {here[:12]}, those were {there[:12]}; give the first one: "
            "--model.base=FILE, or put it back"
        )


def fingerprint(weights: dict[str, Tensor]) -> str:
    """A checksum of names and values, in hex."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode())
        digest.update(weights[name].detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
