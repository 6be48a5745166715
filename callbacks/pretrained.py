"""Pretrained: start from weights that somebody has trained, before anything changes the net."""

from pathlib import Path
from typing import Any

import lightning as L

from ravine.strategies import sharded, states
from ravine.strategies.checkpoint_form import kind_mismatches
from ravine.strategies.checkpoint_io import SUFFIX, AtomicCheckpointIO, reading_together
from ravine.strategies.saving import non_finite

from .transforms import Transform


class Pretrained(Transform):
    """Lets the module's `load_pretrained(path)` fill its net when a training begins.

    lightning fit --config gpt2/finetune --trainer.callbacks.path=gpt2

    A checkpoint (.ckpt) fills any module. What another checkpoint holds when a run goes on from it,
    or evaluates it, is loaded later and wins.

    Args:
        path: a checkpoint, or a file or folder that the module can read.
    """

    phase = "load"

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
            raise ValueError(
                f"{type(pl_module).__name__} has no method load_pretrained(path); give it one, or "
                "a checkpoint (.ckpt), or take Pretrained out of trainer.callbacks"
            )
        super().setup(trainer, pl_module, stage)

    def transform(self, module: L.LightningModule) -> None:
        """Fill the net."""
        self.missing = None
        try:
            if self._whole and not Path(self.path).is_file():
                raise FileNotFoundError(
                    f"no checkpoint {self.path}; type --trainer.callbacks.path=FILE"
                )
            if self._whole:
                fill(module, self.path)
            else:
                module.load_pretrained(self.path)  # pyright: ignore[reportCallIssue]
            self._refuse_non_finite(module)
        except FileNotFoundError as error:
            self.missing = error  # a resumed run does not need it, and resuming is known only later

    def _refuse_non_finite(self, module: L.LightningModule) -> None:
        real = ((name, p) for name, p in module.named_parameters() if not p.is_meta)
        if name := non_finite(real):
            raise ValueError(
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


def fill(module: L.LightningModule, path: str) -> None:
    """Give a built module the weights of a checkpoint of its kind, and nothing else of it."""
    with reading_together(mapped=sharded.SPREAD, divided=False):  # weights are copied below
        checkpoint: dict[str, Any] = AtomicCheckpointIO().load_checkpoint(path)
    changed = {"quantize", "adapt"} & checkpoint.get("transforms", {}).keys()
    if changed:
        names = [checkpoint["transforms"][phase]["class"] for phase in sorted(changed)]
        raise ValueError(
            f"{path} was changed by {' and '.join(names)}; allowed: plain weights; type "
            f"lightning export --merge --ckpt_path={path} --folder=FOLDER"
        )
    if wrong := kind_mismatches(module.state_dict(), checkpoint.get("state_dict", {})):
        raise ValueError(
            f"{path} holds no weights of this {type(module).__name__}: {wrong}; allowed: a"
            " checkpoint of this model; type --trainer.callbacks.path=FILE"
        )
    module.on_load_checkpoint(checkpoint)
    refuse_other_sizes(module, checkpoint, path)
    wrong = module.load_state_dict(checkpoint["state_dict"], strict=False)
    odd = [f"{name} is only here" for name in wrong.missing_keys]
    odd += [f"{name} is only there" for name in wrong.unexpected_keys]
    if odd:
        more = f"; and {len(odd) - 4} more" if len(odd) > 4 else ""
        raise ValueError(
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
    raise ValueError(
        f"the weights in {path} have other sizes than this {type(module).__name__}: {wrong}; "
        f"allowed: a model of the checkpoint's sizes; type {flags or 'its own arguments'}, or "
        "another checkpoint: --trainer.callbacks.path=FILE"
    )
