"""The base model: a trained language model's checkpoint, from which a policy starts."""

import hashlib
import pickle
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ravine.datamodules.tokenizers import Tokenizer, from_state


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
    path = Path(base).expanduser()
    if path.is_file():
        return path
    files = [p for p in path.rglob("*.ckpt") if p.is_file()] if path.is_dir() else []
    parts = [] if files or not path.is_dir() else sorted(path.rglob("*.distcp"))
    if parts:
        raise ValueError(
            f"{parts[0].parent} is a checkpoint in parts, and a base model is one file; type "
            f"lightning export --ckpt_path={parts[0].parent} --consolidate=base.ckpt, "
            "then --model.base=base.ckpt"
        )
    if not files:
        name = path.as_posix().removeprefix("runs/")
        raise FileNotFoundError(
            f"no base model at {base}: no such file, and no folder with checkpoints; train one "
            f"(lightning fit --config {name}, if that is a preset), or type --model.base=FILE"
        )
    return max(files, key=lambda p: p.stat().st_mtime_ns)


def read(base: str) -> BaseModel:
    """Read a language model's checkpoint, or that of a policy; refuse one without a tokenizer."""
    path = find(base)
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch says it in many ways
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        if isinstance(error, pickle.UnpicklingError):  # it would advise to run what is in the file
            said = "it is another kind of file, or has more in it than tensors and plain values"
        raise ValueError(
            f"{path} cannot be read as a checkpoint: {said}; type --model.base=FILE"
        ) from error
    language = checkpoint.get("language") if isinstance(checkpoint, dict) else None
    if language is None:
        task = checkpoint.get("task") if isinstance(checkpoint, dict) else None
        raise ValueError(
            f"{path} is no checkpoint of a language model, but of {task or 'another program'}; "
            "train one: lightning fit --config reinforce/base; then type --model.base=FILE"
        )
    if language["tokenizer"] is None:
        raise ValueError(
            f"{path} has no tokenizer: the model was trained on bare numbers, and no reward can "
            "read what it writes; train it on a TextDataModule, or type --model.base=FILE"
        )
    adapters = [name for name in checkpoint["state_dict"] if name.endswith((".lora_a", ".lora_b"))]
    if adapters:
        raise ValueError(
            f"{path} has adapters ({adapters[0]} and {len(adapters) - 1} more), and a base model "
            f"is plain weights; type lightning export --ckpt_path={path} --merge --folder=plain, "
            "then --model.base=plain/model.ckpt"
        )
    given = checkpoint.get("hyper_parameters", {})
    shape = language.get("shape", given)  # a policy's {} is the default
    shape = {k: v for k, v in shape.items() if k[0] != "_" and k not in ("vocabulary", "context")}
    tokenizer = from_state(language["tokenizer"])
    weights = {
        name.removeprefix("net."): tensor
        for name, tensor in checkpoint["state_dict"].items()
        if name.startswith("net.")
    }
    context = language["context"]
    return BaseModel(tokenizer.vocabulary, context, shape, tokenizer, weights, fingerprint(weights))


def fingerprint(weights: dict[str, Tensor]) -> str:
    """A checksum of names and values, in hex."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode())
        digest.update(weights[name].detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
