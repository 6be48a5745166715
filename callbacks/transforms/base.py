"""Change the net between its building and its sharding, in one order whatever the callbacks'.

    build  ->  load -> quantize -> adapt -> freeze -> recompute -> compile  ->  shard -> optimizer
               \\_____________ wrapped around configure_model ____________/    (strategy)

Callbacks announce a phase in `setup`; the first of them wraps the module's `configure_model`, so
any LightningModule will do. Under a strategy that shards it, a net of this package has no values
yet (strategies/materialize.py): phases that can do without them get it so, the others get it with
the values, whole on every rank. What was applied stays on the module, with its plain arguments: a
second trainer that asks for the same finds it done, one that asks for something else is refused.
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

from ravine.errors import MissingFileError, RunError, UsageError
from ravine.strategies.materialize import deferred, materialize

from ..hooks import living, owner_of, patch, unpatch

CHANGES = ("quantize", "adapt")  # phases after which the weights have other names
CHANGED_NAMES = {"quantize": ".weight_codes", "adapt": "lora_"}  # in a state_dict after a phase
PHASES = ("load", "quantize", "adapt", "freeze", "recompute", "compile")


class _Pending(NamedTuple):
    apply: Callable[[L.LightningModule], None]
    owner: L.Callback
    identity: Any
    without_values: bool


@dataclass
class _Ledger:
    applied: dict[str, Any] = field(default_factory=dict)
    pending: dict[str, _Pending] = field(default_factory=dict)
    wrapped_by: L.Callback | None = None
    names: set[str] = field(default_factory=set)  # of the whole net: a pipeline has less on a rank
    records: dict[str, Any] = field(default_factory=dict)  # of CHANGES, as a checkpoint holds them

    def add_records(self, checkpoint: dict[str, Any]) -> None:
        """Add records that no callback has written: of a loaded module, or with weights_only."""
        names = checkpoint.get("state_dict", {})
        for phase, record in self.records.items():
            if any(CHANGED_NAMES[phase] in name for name in names):  # else it was merged since
                checkpoint.setdefault("transforms", {}).setdefault(phase, record)
                if phase == "adapt":
                    whole = {"base": {"file": None, "sha256": None}, "frozen": True}
                    checkpoint.setdefault("lora", whole)


def _ledger(module: L.LightningModule) -> _Ledger:
    return module.__dict__.setdefault("_transforms", _Ledger())


def register(
    trainer: L.Trainer,
    module: L.LightningModule,
    phase: str,
    function: Callable[[L.LightningModule], None],
    owner: L.Callback,
    identity: Any = None,
    without_values: bool = False,
) -> None:
    """Announce from `Callback.setup` that `function(module)` changes the net in `phase`.

    `identity` holds the plain arguments by which two equal transforms are known to be equal.
    `without_values` says that the function needs no values of parameters on the meta device.
    """
    name, ledger = type(owner).__name__, _ledger(module)
    if phase not in PHASES:
        raise UsageError(f"{name}: no phase {phase!r}; phases are {', '.join(PHASES)}")
    if phase in ledger.applied:
        if ledger.applied[phase] == identity:
            return
        raise UsageError(
            f"{name}: {phase} was applied to this {type(module).__name__} with"
            f" {ledger.applied[phase]}, now it is asked for with {identity}: make a new module"
        )
    late = [done for done in ledger.applied if PHASES.index(done) > PHASES.index(phase)]
    if late:
        raise UsageError(
            f"{name}: {phase} comes before {late[0]}, which was already applied to this"
            f" {type(module).__name__}: make a new module, or use both in one trainer"
        )
    other = ledger.pending.get(phase)
    if other is not None and other.owner is not owner and living(trainer, other.owner):
        raise UsageError(f"{type(other.owner).__name__} and {name} both {phase}: keep one of them")
    ledger.pending[phase] = _Pending(function, owner, identity, without_values)
    _wrap(trainer, module, owner)


def unregister(module: L.LightningModule, phase: str) -> None:
    """Remove a phase from the record of applied phases, so that it can be applied again."""
    _ledger(module).applied.pop(phase, None)
    _ledger(module).pending.pop(phase, None)


def _wrap(trainer: L.Trainer, module: L.LightningModule, owner: L.Callback) -> None:
    """Let the module's `configure_model` end with the pending transforms, once a trainer."""
    ledger, holder = _ledger(module), owner_of(trainer, module, "configure_model")
    if holder is not None and holder is ledger.wrapped_by:
        return

    def configure_model(self: L.LightningModule) -> None:
        original()
        _apply(trainer, self)

    original = patch(trainer, module, "configure_model", configure_model, owner)
    ledger.wrapped_by = owner


def _apply(trainer: L.Trainer, module: L.LightningModule) -> None:
    ledger, name = _ledger(module), type(module).__name__
    sharded = any(isinstance(parameter, DTensor) for parameter in module.parameters())
    for phase in PHASES:
        pending = ledger.pending.pop(phase, None)
        if pending is None or not living(trainer, pending.owner):
            continue
        if sharded:
            raise UsageError(
                f"{type(pending.owner).__name__}: {name} shards its parameters in configure_model,"
                f" too early for {phase}: leave it to --trainer.strategy zero3"
            )
        if not pending.without_values:
            fill_in(module)
        pending.apply(module)
        ledger.applied[phase] = pending.identity
        owner = pending.owner
        arguments = owner.record() if isinstance(owner, Transform) else None
        if phase in CHANGES and arguments is not None:
            ledger.records[phase] = {"class": type(owner).__name__, "arguments": arguments}
    ledger.names = set(module.state_dict())
    strategy = trainer.strategy
    shards_by_itself = hasattr(strategy, "parallelize")  # ravine.strategies.MeshStrategy
    if isinstance(strategy, ModelParallelStrategy) and not shards_by_itself and not sharded:
        raise UsageError(
            f"{type(strategy).__name__} shards nothing by itself and neither does {name}: each rank"
            " would train alone; use --trainer.strategy zero3"
        )


def fill_in(module: torch.nn.Module) -> None:
    """Give all parameters whose values are made later these values, whole on this rank."""
    materialize(module, deferred(module), torch.get_default_device())


def check(module: L.LightningModule, phase: str, owner: L.Callback) -> None:
    """Raise if a registered phase was not applied by the time the run begins."""
    if phase not in _ledger(module).applied:
        raise RunError(
            f"{type(owner).__name__}: {phase} was registered and not applied; something replaced"
            f" {type(module).__name__}.configure_model after setup"
        )


def reapply(module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
    """Change a built module as the module of a checkpoint was, ready for its weights.

    module.configure_model(); reapply(module, checkpoint)
    module.load_state_dict(checkpoint["state_dict"])

    What is no part of the checkpoint, such as the weights that adapters belong to, is added to it.
    """
    known = {kind.__name__: kind for kind in _kinds(Transform)}
    partial = not checkpoint.get("lora", {"frozen": True})["frozen"]  # adapters alone
    for phase, saved in sorted(
        checkpoint.get("transforms", {}).items(),
        key=lambda item: PHASES.index(item[0]) if item[0] in PHASES else -1,
    ):
        if phase not in PHASES:
            raise UsageError(
                f"the checkpoint's net was changed in a phase {phase!r}; known: "
                f"{', '.join(PHASES)}; read it with the version that wrote it"
            )
        if phase == "load" and not partial:
            continue
        if saved["class"] not in known:
            raise UsageError(
                f"the checkpoint was trained with {saved['class']}; known: {', '.join(known)}; "
                "import the file that defines it first"
            )
        transform = known[saved["class"]](**saved["arguments"])
        transform.transform(module)
        if getattr(transform, "missing", None) is not None:
            raise MissingFileError(
                f"the adapters belong to the weights in {saved['arguments']['path']}, and from "
                f"{Path.cwd()} there is no such file; go where they were trained, or copy it here"
            )
        transform.accept(module, checkpoint)
        _ledger(module).applied[phase] = transform.identity()
        if phase in CHANGES:
            _ledger(module).records[phase] = saved
    if partial:
        own = module.state_dict()
        for name in frozen(module):
            checkpoint["state_dict"].setdefault(name, own[name])


def refuse_other_phases(module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
    """Raise where a checkpoint's net is not this one: strict loading is off, torch says nothing."""
    ledger, saved = _ledger(module), checkpoint.get("transforms", {})
    for phase in CHANGES:
        if phase not in saved:
            continue
        name, theirs = saved[phase]["class"], saved[phase]["arguments"]
        if phase not in ledger.applied:
            raise UsageError(
                f"the checkpoint was trained with {name}, which is not here; give it as it was,"
                f" with {theirs}; type --trainer.callbacks+={name}"
            )
        ours = ledger.applied[phase]
        ours = ours if isinstance(ours, dict) else {}
        wrong = [key for key in ours if theirs.get(key) != ours[key]]
        if wrong:
            there = ", ".join(f"{key}={theirs.get(key)}" for key in wrong)
            here = ", ".join(f"{key}={ours[key]}" for key in wrong)
            raise UsageError(f"{name} was trained with {there}, here is {here}; give the former")
    if "adapt" in saved and "quantize" in ledger.applied and "quantize" not in saved:
        raise UsageError(
            "the checkpoint's adapters belong to weights that were not quantized; take"
            " Quantization out of trainer.callbacks"
        )
    if not ledger.names or not set(CHANGES) & ledger.applied.keys():
        return
    known = {_float(name) for name in ledger.names | module.state_dict().keys()}
    odd = sorted({_float(name) for name in checkpoint.get("state_dict", {})} - known)
    if odd:
        raise UsageError(
            f"the checkpoint has {', '.join(odd[:3])}, and this {type(module).__name__} has not;"
            " give it the sizes that it was trained with"
        )


def _float(name: str) -> str:
    head, dot, leaf = name.rpartition(".")
    return f"{head}{dot}weight" if leaf.startswith("weight_") else name


def _kinds(kind: type["Transform"]) -> list[type["Transform"]]:
    below = kind.__subclasses__()
    return below + [each for one in below for each in _kinds(one)]


def frozen(module: torch.nn.Module) -> set[str]:
    """Names in the state_dict of what neither trains nor changes; buffers may change."""
    named = module.named_parameters(remove_duplicate=False)
    return {name for name, parameter in named if not parameter.requires_grad}


def seeded_by_name(seed: int, parameter_name: str) -> torch.Generator:
    """A generator for what a transform initialises: the same on one process and on every rank.

    torch.nn.init.normal_(lora_a, generator=seeded_by_name(seed, "net.blocks.0.mlp.up.lora_a"))
    """
    return torch.Generator().manual_seed(zlib.crc32(f"{seed}/{parameter_name}".encode()))


class Transform(L.Callback):
    """Base of callbacks that change the net: name the phase and write `transform`.

    class Half(Transform):
        phase = "quantize"
        def transform(self, module): module.half()

    With `without_values = True` in the class that has it, `transform` may get parameters on the
    meta device, whose values `ravine.strategies.materialize.blocks(parameter)` makes.
    """

    phase: str
    without_values = False
    acts_on_training = True  # a resume without it is another run

    def transform(self, module: L.LightningModule) -> None:
        """Change the module in place; it is built and on no mesh yet."""
        raise NotImplementedError

    def identity(self) -> Any:
        """Plain arguments that make two transforms of this phase equal."""
        return type(self).__name__

    def record(self) -> dict[str, Any] | None:
        """Plain arguments, where a reader of a checkpoint must make the transform again."""
        return None

    def accept(self, module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint that was trained with another transform of this phase."""

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Say what was done to the net: whoever reads the checkpoint has to do it again."""
        if (arguments := self.record()) is not None:
            done = {"class": type(self).__name__, "arguments": arguments}
            checkpoint.setdefault("transforms", {})[self.phase] = done

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Compare."""
        refuse_other_phases(pl_module, checkpoint)
        self.accept(pl_module, checkpoint)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Announce the phase."""
        from ..checks.run_checks import before_training  # which itself registers a phase

        before_training(trainer, pl_module, stage)
        # of the class whose `transform` runs: one that overrides it may read values
        kind = next(each for each in type(self).__mro__ if "transform" in vars(each))
        without_values = bool(vars(kind).get("without_values"))
        how = (self.transform, self, self.identity(), without_values)
        register(trainer, pl_module, self.phase, *how)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Give `configure_model` back."""
        unpatch(pl_module, "configure_model", self)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check that the phase was applied; likewise before the other stages."""
        check(pl_module, self.phase, self)

    on_validation_start = on_test_start = on_predict_start = on_fit_start
