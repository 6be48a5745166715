"""Pretrained weights: load them into the net before any other transform."""

import shlex
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from ravine.errors import MissingFileError, UsageError, format_arguments, format_flags
from ravine.lightning_compat import checkpoint_connector
from ravine.strategies.checkpoint import sharded_index, state_dict
from ravine.strategies.checkpoint.atomic_io import (
    CHECKPOINT_SUFFIX,
    AtomicCheckpointIO,
    collective_loading,
    find_damage,
    list_checkpoints,
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
        path: a checkpoint; or a folder of runs, whose newest checkpoint is used; or a file or
            folder that the module can read.
        command: the command that makes the file or folder, for the message if it is missing.
    """

    phase = "load"
    accepts_meta_params = True

    def __init__(self, path: str, command: str = "") -> None:
        """Store the path; a folder is searched when the run starts.

        Args:
            path: a checkpoint, a folder of runs, or what the module's `load_pretrained` reads.
            command: the command that makes it, for the message if it is missing.
        """
        self.path = path
        self.command = command
        self.load_error: FileNotFoundError | None = None
        self._weights_path = ""  # found by `weights_path`

    @property
    def weights_path(self) -> str:
        """The checkpoint, or the path itself if `load_pretrained` reads it; searched once."""
        if not self._weights_path:
            self._weights_path = find_newest_checkpoint(self.path) or self.path
        return self._weights_path

    def config_key(self) -> str:
        """Return the path."""
        return self.weights_path

    def to_config(self) -> dict[str, str]:
        """Return the path, for a checkpoint that holds only changes of these weights."""
        return {"path": self.weights_path}

    def check_files(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Raise MissingFileError if the weights are missing; RunChecks calls it before the data.

        A run that is resumed does not need them, and is not checked.
        """
        folder = Path(self.path).expanduser()
        # a folder of runs, in which no file is complete
        is_empty = self.weights_path == self.path and any(folder.glob("version_*"))
        if not folder.exists() or is_empty:
            raise self._missing_file_error()

    def _missing_file_error(self) -> MissingFileError:
        flag = "--trainer.callbacks.Pretrained.path=FILE"
        # the command belongs to the path of a config, which a flag may have replaced
        made_path = self.path.removeprefix("runs/").rstrip("/")
        if made_path and any(word.endswith(made_path) for word in shlex.split(self.command)):
            flag = f"{self.command}, or {flag}"
        kind = "checkpoint" if self._is_checkpoint else "path"
        problem = f"the {kind} {self.path} does not exist"
        if Path(self.path).expanduser().is_dir():
            problem = f"the runs in {self.path} have no complete checkpoint file"
        return MissingFileError(
            f"Pretrained: {problem}",
            hint="pass an existing file as path",
            flag=flag,
        )

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Register the phase; raise UsageError if the module cannot read weights."""
        can_load = callable(getattr(pl_module, "load_pretrained", None))
        # A run that is resumed does not need the path, which may be a removed folder of runs. The
        # connector of a stock Trainer does not tell which run is resumed
        is_resumed = bool(getattr(checkpoint_connector(trainer), "selected_path", None))
        is_needed = not is_resumed or Path(self.path).expanduser().exists()
        if not self._is_checkpoint and not can_load and is_needed:
            raise UsageError(
                f"Pretrained: {self.path} is not a checkpoint (.ckpt), and "
                f"{type(pl_module).__name__} has no method load_pretrained",
                ["a .ckpt file", "a module with a method load_pretrained(path)"],
                hint="pass a .ckpt file as path",
                flag="--trainer.callbacks.Pretrained.path=FILE.ckpt",
            )
        super().setup(trainer, pl_module, stage)

    def transform(self, module: L.LightningModule) -> None:
        """Load the weights of `path` into the module; the base class calls it before training.

        A missing file is stored in `load_error`, which `on_fit_start` raises unless a checkpoint is
        resumed.
        """
        self.load_error = None
        try:
            path = self.weights_path
            if not Path(path).expanduser().exists() or (
                self._is_checkpoint and not Path(path).is_file()
            ):
                raise self._missing_file_error()
            # parameters on the meta device may get the values of the file after sharding
            if not _can_defer_loading(module, self._is_checkpoint):
                materialize_module(module)
            if self._is_checkpoint:
                load_weights(module, path)
            else:
                module.load_pretrained(path)  # pyright: ignore[reportCallIssue]
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
                f"Pretrained: {non_finite_name} is not finite in {self.weights_path}",
                ["weights without NaN and infinity"],
                hint="pass another path",
                flag="--trainer.callbacks.Pretrained.path=FILE",
            )

    @property
    def _is_checkpoint(self) -> bool:
        return self.weights_path.endswith(CHECKPOINT_SUFFIX)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Raise the deferred error if the file is missing and the run is not resumed."""
        super().on_fit_start(trainer, pl_module)
        if self.load_error is not None and trainer.ckpt_path is None:
            raise self.load_error

    on_validation_start = on_test_start = on_predict_start = on_fit_start


def find_newest_checkpoint(path: str) -> str | None:
    """Return the newest complete checkpoint file below a folder of runs; None for other paths.

    A folder with safetensors is not searched: the module reads it.
    """
    folder = Path(path)
    if path.endswith(CHECKPOINT_SUFFIX) or not folder.is_dir() or any(folder.glob("*.safetensors")):
        return None
    for _, file in sorted(list_checkpoints(folder), reverse=True):
        # a sharded checkpoint is a folder
        if file.is_file() and find_damage(file) is None:
            return str(file)
    return None


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
            flag="--trainer.callbacks.Pretrained.path=FILE",
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
            flag="--trainer.callbacks.Pretrained.path=FILE",
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
        flag=format_flags("--model.", sizes) or "--trainer.callbacks.Pretrained.path=FILE",
    )
