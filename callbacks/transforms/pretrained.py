"""Pretrained weights: load them into the net before any other transform."""

from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from ravine.errors import MissingFileError, UsageError, format_arguments, format_flags
from ravine.strategies.checkpoint import sharded_index, state_dict
from ravine.strategies.checkpoint.atomic_io import (
    CHECKPOINT_SUFFIX,
    AtomicCheckpointIO,
    collective_loading,
)
from ravine.strategies.checkpoint.saving import first_non_finite
from ravine.strategies.checkpoint.validation import dtype_kind_mismatches
from ravine.strategies.materialize import deferred_values, iter_value_blocks

from .base import Transform, materialize_module


class Pretrained(Transform):
    """Load pretrained weights from a checkpoint, or by the module's `load_pretrained(path)`.

        lightning fit --config gpt2/finetune --trainer.callbacks.path=gpt2

    Any module can load a checkpoint (.ckpt). A checkpoint to resume or evaluate is loaded later and
    overrides these weights.

    If a strategy shards a network of Ravine, the file is memory-mapped, and each rank copies its
    shard after sharding. A custom `load_pretrained` gets a materialized network.

    Args:
        path: a checkpoint, or a file or folder that the module can read.
    """

    phase = "load"
    accepts_meta_params = True

    def __init__(self, path: str) -> None:
        """Store the path."""
        self.path = path
        self.load_error: FileNotFoundError | None = None

    def config_key(self) -> str:
        """Return the path."""
        return self.path

    def to_config(self) -> dict[str, str]:
        """Return the path, for a checkpoint that holds only changes of these weights."""
        return {"path": self.path}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Register the phase; raise UsageError if the module cannot read weights."""
        if not self._is_checkpoint and not callable(getattr(pl_module, "load_pretrained", None)):
            raise UsageError(
                f"Pretrained: {self.path} is not a checkpoint (.ckpt), and "
                f"{type(pl_module).__name__} has no method load_pretrained",
                ["a .ckpt file", "a module with a method load_pretrained(path)"],
                hint="pass a .ckpt file as path",
                flag="--trainer.callbacks.path=FILE.ckpt",
            )
        super().setup(trainer, pl_module, stage)

    def transform(self, module: L.LightningModule) -> None:
        """Load the weights of `path` into the module; the base class calls it before training.

        A missing file is stored in `load_error`, which `on_fit_start` raises unless a checkpoint is
        resumed.
        """
        self.load_error = None
        try:
            if self._is_checkpoint and not Path(self.path).is_file():
                raise MissingFileError(
                    f"Pretrained: the checkpoint {self.path} does not exist",
                    hint="pass an existing file as path",
                    flag="--trainer.callbacks.path=FILE",
                )
            # parameters on the meta device may get the values of the file after sharding
            if not _can_defer_loading(module, self._is_checkpoint):
                materialize_module(module)
            if self._is_checkpoint:
                load_weights(module, self.path)
            else:
                module.load_pretrained(self.path)  # pyright: ignore[reportCallIssue]
            self._check_finite(module)
        except FileNotFoundError as error:
            self.load_error = error  # deferred: a resumed run does not need the file

    def _check_finite(self, module: L.LightningModule) -> None:
        """Raise UsageError for NaN or infinity in the loaded weights.

        Parameters on the meta device have deferred values, which are read in blocks, so that one
        block at a time is in memory.
        """
        with_values = ((name, p) for name, p in module.named_parameters() if not p.is_meta)
        non_finite_name = first_non_finite(with_values)
        for name, parameter in module.named_parameters():
            if non_finite_name is None and deferred_values(parameter) is not None:
                blocks = iter_value_blocks(parameter)
                # name of the parameter for each block that is not finite, else None
                results = (first_non_finite([(name, block)]) for block in blocks)
                non_finite_name = next(filter(None, results), None)
        if non_finite_name:
            raise UsageError(
                f"Pretrained: {non_finite_name} is not finite in {self.path}",
                ["weights without NaN and infinity"],
                hint="pass another path",
                flag="--trainer.callbacks.path=FILE",
            )

    @property
    def _is_checkpoint(self) -> bool:
        return self.path.endswith(CHECKPOINT_SUFFIX)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Raise the deferred error if the file is missing and the run is not resumed."""
        super().on_fit_start(trainer, pl_module)
        if self.load_error is not None and trainer.ckpt_path is None:
            raise self.load_error

    on_validation_start = on_test_start = on_predict_start = on_fit_start


def _can_defer_loading(module: L.LightningModule, is_checkpoint: bool) -> bool:
    """Whether the file's weights can be read after sharding for parameters on the meta device.

    Loading code of other packages would get parameters without values.
    """
    if not is_checkpoint:
        return _is_builtin(module.load_pretrained)
    load_methods = [submodule._load_from_state_dict for submodule in module.modules()]
    is_known = all(
        _is_builtin(method) or method.__module__.startswith("torch.") for method in load_methods
    )
    hooks = any(submodule._load_state_dict_pre_hooks for submodule in module.modules())
    return is_known and not hooks and type(module).load_state_dict is nn.Module.load_state_dict


def _is_builtin(method: Any) -> bool:
    return method.__module__.partition(".")[0] == __name__.partition(".")[0]


def load_weights(module: L.LightningModule, path: str) -> None:
    """Load only the weights of a checkpoint into a built module.

    A parameter on the meta device has deferred values: it gets them from the mapped file after
    sharding.

    Raises:
        UsageError: the file has quantized weights or adapters, or weights of another model.
    """
    # mapped, because load_state_dict copies the weights below
    with collective_loading(
        mapped_sections=sharded_index.SHARDED_KEYS, should_share_checksums=False
    ):
        checkpoint: dict[str, Any] = AtomicCheckpointIO().load_checkpoint(path)
    changed = {"quantize", "adapt"} & checkpoint.get("transforms", {}).keys()
    if changed:
        names = [checkpoint["transforms"][phase]["class"] for phase in sorted(changed)]
        raise UsageError(
            f"Pretrained: the weights in {path} were changed by {' and '.join(names)}",
            ["plain weights"],
            hint="load it with ravine.load_model, call ravine.callbacks.lora.merge_lora, and save "
            "the merged weights",
            flag=f"lightning export --merge --ckpt_path={path} --folder=FOLDER",
        )
    if mismatches := dtype_kind_mismatches(module.state_dict(), checkpoint.get("state_dict", {})):
        raise UsageError(
            f"Pretrained: {path} has no weights of this {type(module).__name__}: {mismatches}",
            ["a checkpoint of this model"],
            hint="pass another path",
            flag="--trainer.callbacks.path=FILE",
        )
    module.on_load_checkpoint(checkpoint)  # the module's hook may rename weights in it
    check_weight_shapes(module, checkpoint, path)
    state = dict(checkpoint["state_dict"])
    if not all(isinstance(v, Tensor) and v.layout == torch.strided for v in state.values()):
        materialize_module(module)  # nothing is deferred: load_state_dict reports such values
    # parameters on the meta device: the object that computes or reads their values later
    deferred = {
        name: deferred_values(p)
        for name, p in module.named_parameters(remove_duplicate=False)
        if name in state and deferred_values(p) is not None
    }
    for name, values in deferred.items():  # the last of tied weights applies, as in torch
        values.set_source(state.pop(name))  # read after sharding
    mismatches = module.load_state_dict(state, strict=False)
    missing_keys = [name for name in mismatches.missing_keys if name not in deferred]
    problems = [f"{name} is only in the model" for name in missing_keys]
    problems += [f"{name} is only in the file" for name in mismatches.unexpected_keys]
    if problems:
        more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise UsageError(
            f"Pretrained: the weights in {path} do not fit this {type(module).__name__}: "
            f"{', '.join(problems[:4])}{more}",
            ["a checkpoint of this model"],
            hint="pass another path",
            flag="--trainer.callbacks.path=FILE",
        )


def check_weight_shapes(module: L.LightningModule, checkpoint: dict[str, Any], path: str) -> None:
    """Raise UsageError if a weight has another shape in the checkpoint than in the module.

    The message names the module's arguments that differ, by the hyperparameters in the file.

    Args:
        module: the built module.
        checkpoint: contents of the file.
        path: path of the file, for the message.
    """
    current_shapes = state_dict.tensor_shapes(module.state_dict())
    saved_shapes = state_dict.tensor_shapes(checkpoint["state_dict"])
    mismatches = state_dict.shape_mismatches(current_shapes, saved_shapes, strict=False)
    if not mismatches:
        return
    saved_hparams, current_hparams = checkpoint.get("hyper_parameters", {}), dict(module.hparams)
    changed = {
        key: saved_hparams[key]
        for key in saved_hparams.keys() & current_hparams.keys()
        if saved_hparams[key] != current_hparams[key]
    }
    # Lightning's own hyperparameters begin with _
    sizes = {key: changed[key] for key in sorted(changed) if not key.startswith("_")}
    name = type(module).__name__
    raise UsageError(
        f"Pretrained: the weights in {path} have other sizes than this {name}: {mismatches}",
        ["a model with the sizes of the checkpoint"],
        hint=f"use {name}({format_arguments(sizes)})" if sizes else "pass another path",
        flag=format_flags("--model.", sizes) or "--trainer.callbacks.path=FILE",
    )
