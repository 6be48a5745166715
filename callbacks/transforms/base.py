"""Model transforms: change the net after it is built and before it is sharded, in a fixed order.

    build  ->  load -> quantize -> adapt -> freeze -> recompute -> compile  ->  shard -> optimizer
               \\_____________ wrapped around configure_model ____________/    (strategy)

The order does not depend on the order of the callbacks. Each callback registers a phase in `setup`.
The first one wraps the module's `configure_model`, so any LightningModule works. Under a sharding
strategy a net of Ravine is on the meta device at this time (strategies/materialize.py). Phases that
need no values get it in this state. For other phases it is materialized, unsharded on every rank.

The module records applied phases with their plain arguments. A second trainer with equal transforms
skips them, and one with other transforms raises UsageError.
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.tensor import DTensor

from ravine.errors import (
    MissingFileError,
    RunError,
    UsageError,
    format_arguments,
    format_flags,
    sort_by_similarity,
)
from ravine.strategies.materialize import collect_deferred_values, materialize_params

from ..hook_overrides import hook_owner, is_attached, override_hook, restore_hook

RENAMING_PHASES = ("quantize", "adapt")  # phases that rename weights
# part of the state_dict names after a phase
CHANGED_NAMES = {"quantize": ".weight_codes", "adapt": "lora_"}
PHASES = ("load", "quantize", "adapt", "freeze", "recompute", "compile")


class _PendingTransform(NamedTuple):
    function: Callable[[L.LightningModule], None]
    owner: L.Callback
    config_key: Any
    accepts_meta_params: bool


@dataclass
class _TransformState:
    applied: dict[str, Any] = field(default_factory=dict)
    pending: dict[str, _PendingTransform] = field(default_factory=dict)
    wrapped_by: L.Callback | None = None
    # names in the state_dict of the full net; a rank of a pipeline has only some of them
    state_names: set[str] = field(default_factory=set)
    # class and arguments of the RENAMING_PHASES, as in a checkpoint
    records: dict[str, Any] = field(default_factory=dict)

    def add_records(self, checkpoint: dict[str, Any]) -> None:
        """Add records that no callback wrote: for a loaded module, or with `weights_only`."""
        names = checkpoint.get("state_dict", {})
        for phase, record in self.records.items():
            if any(CHANGED_NAMES[phase] in name for name in names):  # else it was merged
                checkpoint.setdefault("transforms", {}).setdefault(phase, record)
                if phase == "adapt":
                    lora_info = {"base": {"file": None, "sha256": None}, "frozen": True}
                    checkpoint.setdefault("lora", lora_info)


def _get_state(module: L.LightningModule) -> _TransformState:
    return module.__dict__.setdefault("_transforms", _TransformState())


def register_transform(
    trainer: L.Trainer,
    module: L.LightningModule,
    phase: str,
    function: Callable[[L.LightningModule], None],
    owner: L.Callback,
    config_key: Any = None,
    accepts_meta_params: bool = False,
) -> None:
    """Register from `Callback.setup` that `function(module)` transforms the net in `phase`.

    It is called at the end of the module's `configure_model`. A phase that was applied with an
    equal `config_key` is not applied again.

    Args:
        trainer: the trainer of the callback.
        module: the module whose net is transformed.
        phase: one of PHASES, which determine the order.
        function: changes the module in place.
        owner: the callback.
        config_key: plain arguments that are equal for equal transforms.
        accepts_meta_params: whether the function may get parameters on the meta device.

    Raises:
        UsageError: another transform of this phase, or a later phase, was registered or applied.
    """
    # `state` belongs to the module. `applied` has the config_key of each phase that was applied,
    # and `pending` the transforms that are registered.
    name, state = type(owner).__name__, _get_state(module)
    if phase not in PHASES:
        raise UsageError(
            f"{name}: phase={phase!r} does not exist",
            PHASES,
            hint=f"use phase={sort_by_similarity(phase, PHASES)[0]!r}",
        )
    if phase in state.applied:
        if state.applied[phase] == config_key:
            return
        raise UsageError(
            f"{name}: {phase!r} was applied to this {type(module).__name__} with "
            f"{state.applied[phase]}, and now it is requested with {config_key}",
            hint=f"create a new {type(module).__name__}",
        )
    later_phases = [p for p in state.applied if PHASES.index(p) > PHASES.index(phase)]
    if later_phases:
        raise UsageError(
            f"{name}: {phase!r} must come before {later_phases[0]!r}, which was already applied to "
            f"this {type(module).__name__}",
            hint=f"create a new {type(module).__name__}, or use both callbacks in one Trainer",
        )
    other = state.pending.get(phase)
    if other is not None and other.owner is not owner and is_attached(trainer, other.owner):
        raise UsageError(
            f"{type(other.owner).__name__} and {name} both belong to the phase {phase!r}",
            ["one callback of each phase"],
            hint=f"remove {name}() from Trainer(callbacks=...)",
        )
    state.pending[phase] = _PendingTransform(function, owner, config_key, accepts_meta_params)
    # applies the registered transforms after the module's own `configure_model`
    _wrap_configure_model(trainer, module, owner)


def unregister_transform(module: L.LightningModule, phase: str) -> None:
    """Remove a phase from the record of applied phases, so that it can be applied again."""
    _get_state(module).applied.pop(phase, None)
    _get_state(module).pending.pop(phase, None)


def _wrap_configure_model(trainer: L.Trainer, module: L.LightningModule, owner: L.Callback) -> None:
    """Make `configure_model` apply the pending transforms at its end, once per trainer."""
    state, current_owner = _get_state(module), hook_owner(trainer, module, "configure_model")
    if current_owner is not None and current_owner is state.wrapped_by:
        return

    def configure_model(self: L.LightningModule) -> None:
        original()
        _apply_pending(trainer, self)

    original = override_hook(trainer, module, "configure_model", configure_model, owner)
    state.wrapped_by = owner


def _apply_pending(trainer: L.Trainer, module: L.LightningModule) -> None:
    """Apply the registered transforms in the order of PHASES; called after `configure_model`.

    Raises:
        UsageError: the module has sharded its parameters before a transform, or nothing shards
            them under a sharding strategy.
    """
    state, name = _get_state(module), type(module).__name__
    # by the module's own `configure_model`; a strategy of Ravine shards later
    is_sharded = any(isinstance(parameter, DTensor) for parameter in module.parameters())
    for phase in PHASES:
        pending = state.pending.pop(phase, None)
        if pending is None or not is_attached(trainer, pending.owner):
            continue  # the owner may be a callback of an earlier trainer
        if is_sharded:
            raise UsageError(
                f"{type(pending.owner).__name__}: {name} shards its parameters in configure_model, "
                f"which is too early for the phase {phase!r}",
                hint=f"remove the sharding from {name}, and pass strategy='zero3' to Trainer",
                flag="--trainer.strategy=zero3",
            )
        if not pending.accepts_meta_params:
            materialize_module(module)  # values of parameters that are on the meta device
        pending.function(module)
        state.applied[phase] = pending.config_key
        owner = pending.owner
        arguments = owner.to_config() if isinstance(owner, Transform) else None
        # loading a checkpoint must apply these again, because they rename weights
        if phase in RENAMING_PHASES and arguments is not None:
            state.records[phase] = {"class": type(owner).__name__, "arguments": arguments}
    state.state_names = set(module.state_dict())  # compared when a checkpoint is loaded
    strategy = trainer.strategy
    shards_by_itself = hasattr(strategy, "parallelize_module")  # as in MeshStrategy
    if isinstance(strategy, ModelParallelStrategy) and not shards_by_itself and not is_sharded:
        raise UsageError(
            f"{type(strategy).__name__} does not shard parameters, and neither does {name}, so "
            "each rank would train alone",
            hint="pass strategy='zero3' to Trainer",
            flag="--trainer.strategy=zero3",
        )


def materialize_module(module: torch.nn.Module) -> None:
    """Give all parameters with deferred values their values, unsharded on this rank."""
    materialize_params(module, collect_deferred_values(module), torch.get_default_device())


def check_applied(module: L.LightningModule, phase: str, owner: L.Callback) -> None:
    """Raise RunError if a registered phase is not applied when the run starts."""
    if phase not in _get_state(module).applied:
        name = type(module).__name__
        raise RunError(
            f"{type(owner).__name__}: {phase!r} was not applied, because {name}.configure_model "
            "was replaced after setup",
            hint=f"do not assign {name}.configure_model after setup",
        )


def apply_saved_transforms(module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
    """Apply the transforms of a checkpoint to a built module, before its weights are loaded.

        module.configure_model(); apply_saved_transforms(module, checkpoint)
        module.load_state_dict(checkpoint["state_dict"])

    The base weights of a checkpoint with adapters only are added to its state_dict.

    Args:
        module: a module without transforms.
        checkpoint: contents of the file. Its `transforms` have class and arguments by phase.

    Raises:
        UsageError: phase or class of a transform is unknown.
        MissingFileError: the file of the base weights of adapters does not exist.
    """
    # only imported classes; nothing that a checkpoint names is imported
    known_classes = {cls.__name__: cls for cls in _all_subclasses(Transform)}
    # LoRA saves `frozen`: whether the file also has the frozen base weights. A file without an
    # entry of LoRA has all weights.
    has_adapters_only = not checkpoint.get("lora", {"frozen": True})["frozen"]

    def phase_index(phase: str) -> int:
        return PHASES.index(phase) if phase in PHASES else -1  # first, to be refused

    saved_transforms = checkpoint.get("transforms", {})
    for phase in sorted(saved_transforms, key=phase_index):
        saved = saved_transforms[phase]
        if phase not in PHASES:
            raise UsageError(
                f"the checkpoint has a transform of the phase {phase!r}, which does not exist",
                PHASES,
                hint="read it with the version of Ravine that wrote it",
            )
        if phase == "load" and not has_adapters_only:
            continue  # "load" is the phase of Pretrained; the checkpoint has all weights
        if saved["class"] not in known_classes:
            raise UsageError(
                f"the checkpoint was trained with {saved['class']}, which is not imported",
                known_classes,
                hint=f"import the file that defines {saved['class']} first",
            )
        transform = known_classes[saved["class"]](**saved["arguments"])
        transform.transform(module)  # changes the module in place
        if getattr(transform, "load_error", None) is not None:  # of Pretrained: a missing file
            raise MissingFileError(
                f"the adapters belong to the weights in {saved['arguments']['path']}, and this "
                f"file does not exist in {Path.cwd()}",
                hint="change to the folder in which they were trained, or copy the file",
            )
        transform.check_checkpoint(module, checkpoint)
        _get_state(module).applied[phase] = transform.config_key()
        # these phases change names or shapes of parameters: the next checkpoint records them, too
        if phase in RENAMING_PHASES:
            _get_state(module).records[phase] = saved
    if has_adapters_only:
        current_state = module.state_dict()
        for name in frozen_names(module):
            checkpoint["state_dict"].setdefault(name, current_state[name])


def check_saved_transforms(module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
    """Raise UsageError if the checkpoint belongs to a net with other transforms or other weights.

    Only the phases that rename weights are compared: `quantize` and `adapt`. Weights are loaded
    without `strict` then, so an unknown name in the file would be ignored without this check.
    """
    state = _get_state(module)
    saved = checkpoint.get("transforms", {})  # class and arguments by phase
    for phase in RENAMING_PHASES:
        if phase not in saved:
            continue
        name, saved_arguments = saved[phase]["class"], saved[phase]["arguments"]
        if phase not in state.applied:
            # arguments without those that are empty, for the message
            non_empty = {k: v for k, v in saved_arguments.items() if v not in (None, [], {})}
            flags = format_flags(f"--trainer.callbacks.{name}.", non_empty)
            raise UsageError(
                f"the checkpoint was trained with {name}, which is missing in this run",
                hint=f"add {name}({format_arguments(non_empty)}) to Trainer(callbacks=...)",
                flag=f"--trainer.callbacks+={name} {flags}",
            )
        applied = state.applied[phase]  # the callback's arguments in this run
        current_arguments = applied if isinstance(applied, dict) else {}
        changed = [k for k, value in current_arguments.items() if saved_arguments.get(k) != value]
        if changed:
            saved_changed = {key: saved_arguments.get(key) for key in changed}
            saved_text = format_arguments(saved_changed)
            current_text = format_arguments({key: current_arguments[key] for key in changed})
            raise UsageError(
                f"{name}: the checkpoint was trained with {saved_text}, and this run has "
                f"{current_text}",
                hint=f"use {name}({saved_text})",
                flag=format_flags(f"--trainer.callbacks.{name}.", saved_changed),
            )
    if "adapt" in saved and "quantize" in state.applied and "quantize" not in saved:
        raise UsageError(
            "the adapters of the checkpoint belong to weights that were not quantized",
            hint="remove Quantization() from Trainer(callbacks=...)",
        )
    if not state.state_names or not set(RENAMING_PHASES) & state.applied.keys():
        return
    # a pipeline rank has only some weights; `state_names` has those of the full net
    names = state.state_names | module.state_dict().keys()
    # a weight and its codes count as the same name, because either can be loaded
    known_names = {_float_weight_name(name) for name in names}
    saved_names = {_float_weight_name(name) for name in checkpoint.get("state_dict", {})}
    unknown = sorted(saved_names - known_names)
    if unknown:
        raise UsageError(
            f"the checkpoint has {', '.join(unknown[:3])}, which this {type(module).__name__} "
            "does not have",
            hint="use the sizes with which the checkpoint was trained",
        )


def _float_weight_name(name: str) -> str:
    """Return the name of the weight before quantization: weight_codes and others -> weight."""
    head, dot, leaf = name.rpartition(".")
    return f"{head}{dot}weight" if leaf.startswith("weight_") else name


def _all_subclasses(base: type["Transform"]) -> list[type["Transform"]]:
    direct_subclasses = base.__subclasses__()
    return direct_subclasses + [
        subclass for direct in direct_subclasses for subclass in _all_subclasses(direct)
    ]


def frozen_names(module: torch.nn.Module) -> set[str]:
    """Return the state_dict names of frozen parameters, without buffers, which may change."""
    named = module.named_parameters(remove_duplicate=False)
    return {name for name, parameter in named if not parameter.requires_grad}


def make_param_generator(seed: int, parameter_name: str) -> torch.Generator:
    """Return a random generator for one parameter; it is the same on all ranks.

    For example:

        torch.nn.init.normal_(lora_a, generator=seeded_by_name(seed, "net.blocks.0.mlp.up.lora_a"))
    """
    return torch.Generator().manual_seed(zlib.crc32(f"{seed}/{parameter_name}".encode()))


class Transform(L.Callback):
    """Base class of callbacks that transform the net: set `phase` and implement `transform`.

        class Half(Transform):
            phase = "quantize"
            def transform(self, module): module.half()

    With `accepts_meta_params = True` in the class that defines it, `transform` may get parameters
    on the meta device. `ravine.strategies.materialize.iter_value_blocks(parameter)` computes their
    values.
    """

    phase: str
    accepts_meta_params = False
    acts_on_training = True  # a resumed run needs it

    def transform(self, module: L.LightningModule) -> None:
        """Transform the module in place, after it is built and before it is sharded."""
        raise NotImplementedError

    def config_key(self) -> Any:
        """Return plain arguments that are equal for equal transforms of this phase."""
        return type(self).__name__

    def to_config(self) -> dict[str, Any] | None:
        """Return constructor arguments for the checkpoint, or None if loading needs none."""
        return None

    def check_checkpoint(self, module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Raise UsageError for a checkpoint trained with another transform of this phase."""

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Record the transform in the checkpoint, because loading must apply it again."""
        if (arguments := self.to_config()) is not None:
            saved = {"class": type(self).__name__, "arguments": arguments}
            checkpoint.setdefault("transforms", {})[self.phase] = saved

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Compare the transforms of the checkpoint with those of the module."""
        check_saved_transforms(pl_module, checkpoint)
        self.check_checkpoint(pl_module, checkpoint)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Register the phase."""
        from ..checks.run_checks import add_run_checks  # avoids an import cycle

        add_run_checks(trainer, pl_module, stage)
        # from the class that defines `transform`, because an override may read values
        defining_class = next(cls for cls in type(self).__mro__ if "transform" in vars(cls))
        accepts_meta_params = bool(vars(defining_class).get("accepts_meta_params"))
        register_args = (self.transform, self, self.config_key(), accepts_meta_params)
        register_transform(trainer, pl_module, self.phase, *register_args)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Restore `configure_model`."""
        restore_hook(pl_module, "configure_model", self)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check that the phase was applied; the other stages do the same."""
        check_applied(pl_module, self.phase, self)

    on_validation_start = on_test_start = on_predict_start = on_fit_start
