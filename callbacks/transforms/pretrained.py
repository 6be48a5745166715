"""Pretrained: start from weights that somebody has trained, before anything changes the net."""

from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from ravine.errors import MissingFileError, UsageError
from ravine.strategies.checkpoint import sharded
from ravine.strategies.checkpoint import state_dict as states
from ravine.strategies.checkpoint.atomic_io import SUFFIX, AtomicCheckpointIO, reading_together
from ravine.strategies.checkpoint.saving import non_finite
from ravine.strategies.checkpoint.validation import kind_mismatches
from ravine.strategies.materialize import blocks, values_of

from .base import Transform, fill_in


class Pretrained(Transform):
    """Lets the module's `load_pretrained(path)` fill its net when a training begins.

    lightning fit --config gpt2/finetune --trainer.callbacks.path=gpt2

    A checkpoint (.ckpt) fills any module. What another checkpoint holds when a run goes on from it,
    or evaluates it, is loaded later and wins.

    Where a strategy shards a network of this package, a file is mapped, and each rank copies its
    own part of it after the sharding. A `load_pretrained` of your own gets a network with values.

    Args:
        path: a checkpoint, or a file or folder that the module can read.
    """

    phase = "load"
    without_values = True

    def __init__(self, path: str) -> None:
        """Store the path."""
        self.path = path
        self.missing: FileNotFoundError | None = None

    def identity(self) -> str:
        """The place."""
        return self.path

    def record(self) -> dict[str, str]:
        """The same, for a checkpoint that holds no more than what was added to these weights."""
        return {"path": self.path}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Announce the phase; refuse a module that cannot read weights."""
        if not self._whole and not callable(getattr(pl_module, "load_pretrained", None)):
            raise UsageError(
                f"{type(pl_module).__name__} has no method load_pretrained(path); give it one, or "
                "a checkpoint (.ckpt), or take Pretrained out of trainer.callbacks"
            )
        super().setup(trainer, pl_module, stage)

    def transform(self, module: L.LightningModule) -> None:
        """Fill the net."""
        self.missing = None
        try:
            if self._whole and not Path(self.path).is_file():
                raise MissingFileError(
                    f"no checkpoint {self.path}; type --trainer.callbacks.path=FILE"
                )
            if not _reads_without_values(module, self._whole):
                fill_in(module)
            if self._whole:
                fill(module, self.path)
            else:
                module.load_pretrained(self.path)  # pyright: ignore[reportCallIssue]
            self._refuse_non_finite(module)
        except FileNotFoundError as error:
            self.missing = error  # a resumed run does not need it, and resuming is known only later

    def _refuse_non_finite(self, module: L.LightningModule) -> None:
        real = ((name, p) for name, p in module.named_parameters() if not p.is_meta)
        name = non_finite(real)
        for later, parameter in module.named_parameters():  # one block in memory at a time
            if name is None and values_of(parameter) is not None:
                found = (non_finite([(later, block)]) for block in blocks(parameter))
                name = next(filter(None, found), None)
        if name:
            raise UsageError(
                f"{self.path} cannot be trained on: {name} is not finite; allowed: weights without"
                " NaN and infinity; type --trainer.callbacks.path=FILE"
            )

    @property
    def _whole(self) -> bool:
        return self.path.endswith(SUFFIX)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuse to begin without the weights."""
        super().on_fit_start(trainer, pl_module)
        if self.missing is not None and trainer.ckpt_path is None:
            raise self.missing

    on_validation_start = on_test_start = on_predict_start = on_fit_start


def _reads_without_values(module: L.LightningModule, checkpoint: bool) -> bool:
    """Whether parameters on the meta device can have the file's weights read later.

    Code of other packages that takes part in the reading would find no numbers.
    """
    if not checkpoint:
        return _is_ours(module.load_pretrained)
    parts = [part._load_from_state_dict for part in module.modules()]
    known = all(_is_ours(each) or each.__module__.startswith("torch.") for each in parts)
    hooks = any(part._load_state_dict_pre_hooks for part in module.modules())
    return known and not hooks and type(module).load_state_dict is nn.Module.load_state_dict


def _is_ours(method: Any) -> bool:
    return method.__module__.partition(".")[0] == __name__.partition(".")[0]


def fill(module: L.LightningModule, path: str) -> None:
    """Give a built module the weights of a checkpoint of its kind, and nothing else of it.

    A parameter on the meta device gets its values from the mapped file when it is sharded.
    """
    with reading_together(mapped=sharded.SPREAD, divided=False):  # weights are copied below
        checkpoint: dict[str, Any] = AtomicCheckpointIO().load_checkpoint(path)
    changed = {"quantize", "adapt"} & checkpoint.get("transforms", {}).keys()
    if changed:
        names = [checkpoint["transforms"][phase]["class"] for phase in sorted(changed)]
        raise UsageError(
            f"{path} was changed by {' and '.join(names)}; allowed: plain weights; type "
            f"lightning export --merge --ckpt_path={path} --folder=FOLDER"
        )
    if wrong := kind_mismatches(module.state_dict(), checkpoint.get("state_dict", {})):
        raise UsageError(
            f"{path} holds no weights of this {type(module).__name__}: {wrong}; allowed: a"
            " checkpoint of this model; type --trainer.callbacks.path=FILE"
        )
    module.on_load_checkpoint(checkpoint)
    refuse_other_sizes(module, checkpoint, path)
    state = dict(checkpoint["state_dict"])
    if not all(isinstance(v, Tensor) and v.layout == torch.strided for v in state.values()):
        fill_in(module)  # load_state_dict copies what it can
    named = module.named_parameters(remove_duplicate=False)
    later = {name: values_of(p) for name, p in named if name in state and values_of(p) is not None}
    for name, values in later.items():  # of shared ones the last counts, as in load_state_dict
        values.read_from(state.pop(name))
    wrong = module.load_state_dict(state, strict=False)
    odd = [f"{name} is only here" for name in wrong.missing_keys if name not in later]
    odd += [f"{name} is only there" for name in wrong.unexpected_keys]
    if odd:
        more = f"; and {len(odd) - 4} more" if len(odd) > 4 else ""
        raise UsageError(
            f"the weights in {path} do not fit this {type(module).__name__}: "
            f"{'; '.join(odd[:4])}{more}; allowed: a checkpoint of this model; "
            "type --trainer.callbacks.path=FILE"
        )


def refuse_other_sizes(module: L.LightningModule, checkpoint: dict[str, Any], path: str) -> None:
    """ValueError if a weight has another size in the checkpoint, with the arguments that differ."""
    ours, theirs = states.sizes(module.state_dict()), states.sizes(checkpoint["state_dict"])
    wrong = states.apart(ours, theirs, strict=False)
    if not wrong:
        return
    saved, here = checkpoint.get("hyper_parameters", {}), dict(module.hparams)
    other = {key: saved[key] for key in saved.keys() & here.keys() if saved[key] != here[key]}
    flags = " ".join(f"--model.{key}={other[key]}" for key in sorted(other) if key[0] != "_")
    raise UsageError(
        f"the weights in {path} have other sizes than this {type(module).__name__}: {wrong}; "
        f"allowed: a model of the checkpoint's sizes; type {flags or 'its own arguments'}, or "
        "another checkpoint: --trainer.callbacks.path=FILE"
    )
