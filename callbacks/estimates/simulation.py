"""Simulate two optimizer steps of a run on tensors without values, and record what they hold.

The run is a real `trainer.fit` in one process: the data, the callbacks, the transforms, the
optimizers and the training loop are those of the run. Only the strategy differs, `SimulatedDevice`:
it replaces parameters by fake tensors before the optimizers are built. A tensor that is computed
from a fake tensor is fake, so that no operation of the network runs. The batch is real.

A third step follows with activation checkpointing; or without, if the run has it.
"""

import contextlib
import io
import logging
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, cast

import lightning as L
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from ravine.errors import UsageError
from ravine.lightning_compat import replace_method
from ravine.strategies.activation_checkpointing import (
    apply_activation_checkpointing,
    remove_activation_checkpointing,
    uses_activation_checkpointing,
)
from ravine.strategies.fsdp.optimizer_probe import needs_closure
from ravine.strategies.one_rank import OneRankStrategy

from ..monitoring.memory import measure_memory
from ..monitoring.progress import count_units
from ..optimizers.parameter_rules import classify_params
from .fake_parameters import replace_by_fakes
from .tensor_tracker import Mark, Moment, Operation, TensorTracker

NUM_STEPS = 2  # the optimizer state exists from the first step on, and the second is recorded
MAX_MICRO_BATCHES = 2  # of a step: the first creates the gradients, and all others are equal


@dataclass(frozen=True)
class ParameterInfo:
    """A parameter: name, shape, bytes, kind, and the bytes and shapes of its optimizer state."""

    name: str
    shape: tuple[int, ...]
    itemsize: int
    is_trainable: bool
    kind: str
    state: tuple[tuple[tuple[int, ...], int], ...] = ()  # (shape, bytes) of each state tensor

    @property
    def numel(self) -> int:
        """Return the number of elements."""
        return torch.Size(self.shape).numel()

    @property
    def num_bytes(self) -> int:
        """Return the bytes of the whole parameter."""
        return self.numel * self.itemsize

    @property
    def state_bytes(self) -> int:
        """Return the bytes of its optimizer state."""
        return sum(num_bytes for _, num_bytes in self.state)


@dataclass
class Simulation:
    """Memory and operations of one process in an optimizer step of a run.

    Attributes:
        parameters: all parameters of the module, in order.
        state_bytes: bytes of the state of all optimizers.
        buffer_bytes: bytes of the module's buffers.
        moments: the local maxima of live bytes in the recorded step, by class.
        operations: what the recorded micro-batches and the optimizer step compute.
        marks: the passes through blocks.
        num_micro_batches: recorded micro-batches.
        accumulate: micro-batches of an optimizer step of the run.
        samples: samples of a micro-batch on a rank.
        length: tokens of a sequence; None if the batch has no tensor (b t).
        units: units (such as tokens) of a micro-batch on a rank.
        unit: the name of a unit.
        flops_per_unit: FLOPs of a unit by the module's own formula; None without one.
        total_steps: optimizer steps of the run; None if it has no end.
        is_stepped: whether a forward and backward pass was simulated.
        has_values: whether the steps were real.
        is_recomputed: whether the run has activation checkpointing.
        alternative: the same without it, or with it; None if the module has no blocks.
        num_equal_blocks: blocks to which two and three of them were extrapolated; 0: all simulated.
    """

    parameters: list[ParameterInfo] = field(default_factory=list)
    state_bytes: int = 0
    buffer_bytes: int = 0
    moments: list[Moment] = field(default_factory=list)
    operations: list[Operation] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)
    num_micro_batches: int = 1
    accumulate: int = 1
    samples: int = 0
    length: int | None = None
    units: int = 0
    unit: str = "samples"
    flops_per_unit: int | None = None
    total_steps: int | None = None
    is_stepped: bool = False
    has_values: bool = False
    is_recomputed: bool = False
    alternative: "Simulation | None" = None
    num_equal_blocks: int = 0

    @property
    def peak(self) -> Moment:
        """Return the moment with the most bytes."""
        return max(self.moments, key=lambda moment: moment.total)

    @property
    def flops(self) -> int:
        """Return the FLOPs of the forward and backward pass of a micro-batch."""
        passes = (o for o in self.operations if o.phase in ("forward", "backward"))
        return sum(o.flops * o.count for o in passes) // self.num_micro_batches

    @property
    def optimizer_flops(self) -> int:
        """Return the FLOPs of an optimizer step, such as the matrix products of Muon."""
        return sum(o.flops * o.count for o in self.operations if o.phase == "step")


class SimulationEnd(Exception):
    """Ends the fit after the recorded step."""


class SimulatedDevice(OneRankStrategy):
    """One process whose parameters are fake tensors, and whose tensors are tracked.

    Args:
        dp_size: data-parallel ranks of the run; the datamodule divides its batch by them.
        has_values: keep real parameters, and run real steps.
        steps: whether forward and backward passes run at all.
        prepare: called with the module before its parameters are replaced.
        inspect: called with the module after the transforms, before its parameters are replaced;
            it may remove blocks, and set hooks that use the tracker.
        compares: whether a further step is simulated with activation checkpointing, or without.
    """

    def __init__(
        self,
        dp_size: int = 1,
        has_values: bool = False,
        steps: bool = True,
        prepare: Callable[[nn.Module], None] | None = None,
        inspect: "Callable[[nn.Module, TensorTracker], None] | None" = None,
        compares: bool = False,
    ) -> None:
        """Create the modes; they are entered in `setup_environment`."""
        super().__init__(dp_size)
        self.has_values, self.steps, self.prepare = has_values, steps, prepare
        self.inspect, self.compares = inspect, compares and steps
        # real tensors, such as batches, become fake when they are combined with fake ones
        self.fake_mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.tracker = TensorTracker()
        self.simulation = Simulation()
        self._stack = contextlib.ExitStack()
        self._num_steps, self._last_step = 0, NUM_STEPS
        self._num_recorded = 0  # micro-batches of the recorded step
        self._alternative: Simulation | None = None  # its recorded step only

    def setup_environment(self) -> None:
        """Let the module defer its initial values, as for a sharding strategy."""
        super().setup_environment()
        assert self.lightning_module is not None
        self.tracker.phase = "data"  # the datamodule is set up next
        self._stack.enter_context(self.tracker)
        if not self.has_values:
            self.lightning_module.__dict__["strategy_draws_values"] = True

    def setup(self, trainer: L.Trainer) -> None:
        """Replace parameters by fakes, and build the optimizers."""
        module = self.lightning_module
        assert module is not None
        if self.prepare is not None:
            self.prepare(module)
        if not self.has_values:
            # before parameters are fake, because a fake cannot change its dtype in place
            self.precision_plugin.convert_module(module)
        self._describe_module(module)
        if self.inspect is not None:
            self.inspect(module, self.tracker)
        if not self.has_values:
            replace_by_fakes(module, self.fake_mode)
            replace_method(self.precision_plugin, "convert_module", lambda module: module)
        super().setup(trainer)
        self.tracker.label(module.parameters(), "parameters")
        self.tracker.label(module.buffers(), "buffers")
        for parameter in module.parameters():
            if parameter.requires_grad and parameter.is_leaf:
                parameter.register_post_accumulate_grad_hook(self._label_gradient)
        if not self.steps:
            self._step_without_batch(trainer)

    def _describe_module(self, module: nn.Module) -> None:
        """Store what does not depend on the simulated steps."""
        result = self.simulation
        result.is_recomputed = uses_activation_checkpointing(module)
        result.parameters = describe_parameters(module, [])
        result.buffer_bytes = sum(b.numel() * b.itemsize for b in module.buffers())
        result.unit = getattr(module, "unit", "samples")
        flops: Any = getattr(module, "flops_per_unit", None)
        result.flops_per_unit = cast(Any, flops)() if callable(flops) else None

    def model_to_device(self) -> None:
        """Do nothing: everything is on the CPU, and fakes cannot be moved in place."""

    def teardown(self) -> None:
        """Do nothing: Lightning would move the module to the CPU."""

    def _step_without_batch(self, trainer: L.Trainer) -> None:
        """Create gradients and the optimizer state without a forward pass, and end the fit."""
        module = self.lightning_module
        assert module is not None
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = torch.zeros_like(parameter)
                    self._label_gradient(parameter)
            if not needs_closure(optimizer):  # it has no state without a forward pass
                optimizer.step()
        self.label_states()
        self.tracker.start_recording()
        self.finish(trainer)

    def _label_gradient(self, parameter: Tensor) -> None:
        self.tracker.label([parameter.grad], "gradients")

    def training_step(self, batch: Any, *args: Any) -> Any:
        """Run the module's `training_step`; record the last simulated optimizer step."""
        if self._num_steps == self._last_step - 1:
            if not self.tracker.is_recording:
                self.tracker.start_recording()
                self._num_recorded = 0
            self._describe_batch(batch)
        self.tracker.label(tree_leaves(batch), "batch", adds=False)
        self._begin("forward")
        return super().training_step(batch, *args)

    def _describe_batch(self, batch: Any) -> None:
        assert self.lightning_module is not None
        result = self.simulation
        self._num_recorded += 1
        leaves = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.ndim]
        result.samples = len(leaves[0]) if leaves else 0
        result.length = next((leaf.shape[1] for leaf in leaves if leaf.ndim == 2), None)
        result.units = count_units(self.lightning_module, batch)

    def pre_backward(self, closure_loss: Tensor) -> None:
        """Note that the backward pass begins."""
        self._begin("backward")
        super().pre_backward(closure_loss)

    def post_backward(self, closure_loss: Tensor) -> None:
        """Note that the optimizer step follows, or with manual optimization another forward."""
        super().post_backward(closure_loss)
        self._begin("step" if self._is_automatic else "forward")

    def optimizer_step(self, *args: Any, **kwargs: Any) -> Any:
        """Step, and label the states that the step has created."""
        if not self._is_automatic:  # else a closure runs the passes before the step
            self._begin("step")
        result = super().optimizer_step(*args, **kwargs)
        self.label_states()
        self._num_steps += 1
        return result

    def _begin(self, phase: str) -> None:
        self.tracker.phase = phase
        self.tracker.mark(f"{phase} phase", 0)

    @property
    def _is_automatic(self) -> bool:
        assert self.lightning_module is not None
        return self.lightning_module.automatic_optimization

    def label_states(self) -> None:
        """Label the tensors in the states of all optimizers."""
        states = (leaf for o in self.optimizers for s in o.state.values() for leaf in _leaves(s))
        self.tracker.label(states, "optimizer state")

    def after_micro_batch(self, trainer: L.Trainer) -> None:
        """End the fit after the last step; called after all hooks of a micro-batch."""
        self.tracker.phase = "data"
        if self._num_steps < self._last_step:
            return
        if self._last_step > NUM_STEPS:
            self._alternative = Simulation()
            self._store_step(self._alternative)
        elif self.compares and self._change_checkpointing():
            self._store_step(self.simulation)
            return
        self.finish(trainer)

    def _change_checkpointing(self) -> bool:
        """Apply activation checkpointing, or remove it; return whether the module supports it."""
        module = self.lightning_module
        assert module is not None
        if self.simulation.is_recomputed:
            remove_activation_checkpointing(module)
        else:
            try:
                apply_activation_checkpointing(module, "full")
            except UsageError:  # it has no blocks
                return False
        # the first pass with checkpointing copies the buffers of the blocks
        has_buffers = any(True for _ in module.buffers())
        self._last_step += 1 + has_buffers
        return True

    def _store_step(self, result: Simulation) -> None:
        """Store the recorded step in `result`, and stop the recording."""
        tracker = self.tracker
        result.moments, result.operations = tracker.moments, tracker.operations
        # the last step of an epoch can have fewer micro-batches
        result.marks, result.num_micro_batches = tracker.marks, max(1, self._num_recorded)
        tracker.is_recording = False

    def finish(self, trainer: L.Trainer) -> None:
        """Store the results and end the fit."""
        module = self.lightning_module
        assert module is not None
        self._stack.close()
        result = self.simulation
        if not result.moments:
            self._store_step(result)
        result.is_stepped, result.has_values = self.steps, self.has_values
        result.parameters = describe_parameters(module, self.optimizers)
        result.state_bytes = measure_memory(module, self.optimizers)["optimizer state"].num_bytes
        if self._alternative is not None:
            step = self._alternative
            result.alternative = replace(
                result,
                moments=step.moments,
                operations=step.operations,
                marks=step.marks,
                num_micro_batches=step.num_micro_batches,
                is_recomputed=not result.is_recomputed,
            )
        trainer.callbacks = []  # type: ignore[attr-defined]  no hook of an error runs
        raise SimulationEnd

    def close(self) -> None:
        """Stop to track, also after an error."""
        self._stack.close()


def _leaves(state: Any) -> list[Any]:
    return tree_leaves(dict(state))


def describe_parameters(module: nn.Module, optimizers: list[Any]) -> list[ParameterInfo]:
    """Return name, shape, kind and optimizer state of each parameter of a module."""
    kinds = classify_params(module)
    states: dict[int, list[tuple[tuple[int, ...], int]]] = {}
    for optimizer in optimizers:
        for parameter, state in optimizer.state.items():
            if not isinstance(parameter, Tensor):
                continue
            for leaf in _leaves(state):
                if isinstance(leaf, Tensor):
                    entry = (tuple(leaf.shape), leaf.numel() * leaf.itemsize)
                    states.setdefault(id(parameter), []).append(entry)
    return [
        ParameterInfo(
            name,
            tuple(p.shape),
            p.itemsize,
            p.requires_grad,
            kinds[name],
            tuple(states.get(id(p), ())),
        )
        for name, p in module.named_parameters()
    ]


class SimulationLimit(L.Callback):
    """Ends the simulated fit; the last callback, after all hooks of a micro-batch."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note the length of the run, and limit the micro-batches of a step."""
        strategy = cast(SimulatedDevice, trainer.strategy)
        strategy.tracker.phase = "data"
        result = strategy.simulation
        result.accumulate = trainer.accumulate_grad_batches
        steps = trainer.estimated_stepping_batches
        if trainer.max_steps < 0 and not strategy.divides_batch:  # ranks share the loader's batches
            steps = math.ceil(steps / strategy.dp_size) if steps < math.inf else steps
        result.total_steps = int(steps) if 0 < steps < float("inf") else None
        trainer.accumulate_grad_batches = min(result.accumulate, MAX_MICRO_BATCHES)
        _lengthen(trainer, NUM_STEPS + 2)  # a shorter run would end before all steps
        # only now, because callbacks such as GenerateSamples check in `setup` that validation runs
        trainer.limit_val_batches = 0

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any
    ) -> None:
        """End the fit after the recorded step."""
        cast(SimulatedDevice, trainer.strategy).after_micro_batch(trainer)


def _lengthen(trainer: L.Trainer, num_steps: int) -> None:
    """Let a run have at least this number of optimizer steps, and of epochs."""
    if 0 <= trainer.max_steps < num_steps:
        trainer.fit_loop.epoch_loop.max_steps = num_steps
    if trainer.max_epochs is not None and 0 <= trainer.max_epochs < num_steps:
        trainer.fit_loop.max_epochs = num_steps


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress what a fit prints, logs and warns of."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def simulate(trainer: L.Trainer, module: L.LightningModule, **data: Any) -> Simulation:
    """Run two optimizer steps without values, and return what they hold and compute.

    Args:
        trainer: its strategy is a `SimulatedDevice`, and its last callback a `SimulationLimit`.
        module: any LightningModule; it is used up.
        data: `datamodule` or `train_dataloaders`, as for `trainer.fit`.

    Raises:
        UsageError: code reads values of tensors.
    """
    strategy = cast(SimulatedDevice, trainer.strategy)
    try:
        with quiet(), contextlib.suppress(SimulationEnd):
            trainer.fit(module, **data)
    finally:
        strategy.close()
    return strategy.simulation
