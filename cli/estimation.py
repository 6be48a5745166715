"""Estimate memory, FLOPs, communication and time of a run before it: `ravine.estimate`.

The engine is in callbacks/estimates/. This file builds the trainer of the simulation from the
arguments of the run.
"""

import copy
from typing import Any, Literal, cast

import lightning as L
from lightning.pytorch.callbacks import Callback
from torch import nn

from ravine.callbacks.checkpointing.exact_resume import ExactResume
from ravine.callbacks.checkpointing.graceful_stop import GracefulStop
from ravine.callbacks.checks.run_checks import RunChecks
from ravine.callbacks.estimates.devices import Device, find_device, link_bandwidth
from ravine.callbacks.estimates.equal_blocks import (
    SIMULATED_BLOCKS,
    EqualBlocks,
    extrapolate,
    find_equal_blocks,
    watch_blocks,
    watch_splits,
)
from ravine.callbacks.estimates.estimate import Estimate, make_estimate
from ravine.callbacks.estimates.fake_parameters import copy_on_meta
from ravine.callbacks.estimates.layouts import Ranks, check_divisible, configured_plan
from ravine.callbacks.estimates.module_traits import ModuleTraits, describe_module
from ravine.callbacks.estimates.simulation import (
    ParameterInfo,
    SimulatedDevice,
    Simulation,
    SimulationLimit,
    describe_parameters,
    simulate,
)
from ravine.callbacks.estimates.step_time import NO_COST, Cost
from ravine.callbacks.estimates.tensor_tracker import TensorTracker
from ravine.callbacks.monitoring.heartbeat import Heartbeat
from ravine.callbacks.monitoring.memory import MemoryMonitor
from ravine.callbacks.monitoring.straggler_monitor import StragglerMonitor
from ravine.callbacks.monitoring.summary import Summary
from ravine.callbacks.monitoring.throughput import Throughput
from ravine.callbacks.stability.out_of_memory import OutOfMemoryReport
from ravine.callbacks.stability.rank_watchdog import RankWatchdog
from ravine.errors import UsageError
from ravine.lightning_modules.nn.attention import auto_attention, sdpa_attention
from ravine.strategies.activation_checkpointing import apply_activation_checkpointing, find_blocks

from .run_folders.recorder import RunRecorder
from .trainer import Trainer, as_list

Level = Literal["quick", "simulate", "measure"]
# callbacks that watch a run or write files, and create no tensors of a step
WATCHING_CALLBACKS = (ExactResume, GracefulStop, RankWatchdog, RunRecorder, RunChecks)
WATCHING_CALLBACKS += (Throughput, MemoryMonitor, Summary, Heartbeat, StragglerMonitor)
WATCHING_CALLBACKS += (OutOfMemoryReport,)
SIMULATION_ARGUMENTS: dict[str, Any] = {  # of the Trainer, in place of those of the run
    "accelerator": "cpu",
    "devices": 1,
    "num_nodes": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "num_sanity_val_steps": 0,
}


class _NoRunChecks(RunChecks):
    """Stands for RunChecks in a simulation, so that no callback adds it."""

    def setup(self, *args: Any, **kwargs: Any) -> None:
        """Check nothing."""

    on_fit_start = teardown = on_sanity_check_start = setup

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Tell the tracker that callbacks may copy weights; this callback is the first one."""
        cast(SimulatedDevice, trainer.strategy).tracker.phase = "setup"


class SimulationTrainer(Trainer):
    """A trainer that writes nothing: it has no run folder."""

    @property
    def log_dir(self) -> None:
        """Return None, so that no folder is created."""
        return None


def simulation_trainer(strategy: SimulatedDevice, **arguments: Any) -> L.Trainer:
    """Return a trainer whose `fit` simulates two steps of a run with these arguments.

    Args:
        strategy: replaces the strategy of the run.
        arguments: those of the run.
    """
    precision = simulated_precision(arguments.pop("precision", None))
    callbacks = [
        callback
        for callback in as_list(arguments.pop("callbacks", None))
        if not isinstance(callback, WATCHING_CALLBACKS)
    ]
    trainer = SimulationTrainer(
        **arguments | SIMULATION_ARGUMENTS,
        callbacks=[_NoRunChecks(), *callbacks],
        precision=precision,
        strategy=strategy,
    )
    kept: list[Callback] = [
        callback
        for callback in cast(Any, trainer).callbacks
        if isinstance(callback, _NoRunChecks) or not isinstance(callback, WATCHING_CALLBACKS)
    ]
    trainer.callbacks = [*kept, SimulationLimit()]  # type: ignore[attr-defined]
    return trainer


def simulated_precision(precision: str | int | None) -> str | int | None:
    """Return a precision with the same tensors that a CPU supports: bf16-mixed for 16-mixed."""
    replacements = {"16-mixed": "bf16-mixed", "16": "bf16-mixed", "16-true": "bf16-true"}
    return replacements.get(str(precision), precision)


def estimate(
    model: L.LightningModule,
    data: Any = None,
    *,
    gpu: str | None = None,
    gpu_memory: float | None = None,
    gpu_tflops: float | None = None,
    link: str | None = None,
    devices: int = 1,
    num_nodes: int = 1,
    level: Level = "simulate",
    full: bool = False,
    price_per_hour: float | None = None,
    watts: float | None = None,
    **trainer_arguments: Any,
) -> Estimate:
    """Estimate parameters, FLOPs, memory, communication and time of a run, without a GPU.

        print(estimate(LanguageModel(), TextDataModule(), gpu="h200", devices=8))

    Args:
        model: any LightningModule; it is used up, so create another one for the run.
        data: a LightningDataModule or a DataLoader; None if the model has its own loaders.
        gpu: a name of the table of devices, such as "h200".
        gpu_memory: memory of another device, in GiB.
        gpu_tflops: dense 16-bit TFLOP/s of another device.
        link: nvlink or ib400; by default nvlink within a node, ib400 between nodes.
        devices: ranks of a node.
        num_nodes: number of nodes.
        level: quick (by formula), simulate (two steps without values) or measure (real steps).
        full: simulate all blocks; by default many equal ones are extrapolated from two and three.
        price_per_hour: of a device, in any currency.
        watts: of a device.
        trainer_arguments: arguments of `ravine.Trainer`: callbacks, precision, strategy, ...

    Raises:
        UsageError: an argument is unknown, or code of a simulated step needs values.
    """
    check_level(level)
    device = find_device(gpu, gpu_memory, gpu_tflops)
    ranks = resolve_ranks(devices, num_nodes, link)
    cost = Cost(price_per_hour, watts)
    cost.check()
    configured = trainer_arguments.pop("strategy", "auto")
    trainer_arguments["precision"] = target_precision(trainer_arguments.get("precision"), device)
    is_datamodule = isinstance(data, L.LightningDataModule)
    loaders = {"datamodule" if is_datamodule else "train_dataloaders": data}
    run = RunToEstimate(model, loaders, trainer_arguments, ranks, device, configured, level, full)
    return run.estimate(cost)


class RunToEstimate:
    """A run whose steps are simulated, once or several times.

    Args:
        model: the module; the last simulation uses it up.
        data: `datamodule` or `train_dataloaders`, as for `trainer.fit`.
        arguments: of the Trainer, without the strategy.
        ranks: the ranks of the run.
        device: the GPU; None: no times.
        configured: the strategy of the run, a name or an object.
        level: how the numbers are computed: measure, simulate or quick.
        full: whether all blocks are simulated.
    """

    def __init__(
        self,
        model: L.LightningModule,
        data: dict[str, Any],
        arguments: dict[str, Any],
        ranks: Ranks,
        device: Device | None,
        configured: Any,
        level: Level,
        full: bool = False,
    ) -> None:
        """Store the run."""
        self.model, self.data, self.arguments = model, data, arguments
        self.ranks, self.device, self.configured = ranks, device, configured
        self.level: Level = level
        self.full = full
        self.traits = ModuleTraits()
        self.blocks: EqualBlocks | None = None
        # of the whole module, without states
        self.parameters: list[ParameterInfo] = []
        self.precision = "32-true"
        self.divides_batch = False

    def estimate(self, cost: Cost = NO_COST) -> Estimate:
        """Simulate, and compute the layouts.

        Args:
            cost: price and power of a device.

        Raises:
            UsageError: the strategy of the run is not possible.
        """
        name = self.configured if isinstance(self.configured, str) else ""
        check_divisible(name, self.ranks)
        axes = configured_plan(self.configured, self.ranks)
        if axes is not None:
            name = axes.name
        simulation = self.simulate()
        result = make_estimate(
            simulation,
            self.traits,
            self.ranks,
            self.device,
            name or type(self.configured).__name__,
            self.precision,
            self.divides_batch,
            axes,
            cost,
        )
        if name in result.rejected:
            names = [row.name for row in result.rows]
            raise UsageError(
                f"estimate: strategy={name!r} is not possible: {result.reasons[name]}",
                names,
                f"use strategy={names[0]!r}",
                flag=f"--trainer.strategy={names[0]}",
            )
        return result

    def simulate(self) -> Simulation:
        """Return the simulation of all blocks, extrapolated if many are equal."""
        if self.level == "simulate" and not self.full:
            result = self._simulate_few_blocks()
            if result is not None:
                return result
        return self._simulate(self.model, self.arguments, None)

    def _simulate_few_blocks(self) -> Simulation | None:
        """Simulate copies with a few blocks; None if the module has no equal blocks.

        None also for code that needs all of its blocks, or cannot be copied. The simulation of the
        whole module then raises its errors.
        """
        results: list[Simulation] = []
        try:
            for count in SIMULATED_BLOCKS:
                model, arguments = copy_on_meta(self.model), copy.deepcopy(self.arguments)
                results.append(self._simulate(model, arguments, count))
                if self.blocks is None:  # the copy was simulated whole
                    return results[0]
            assert self.blocks is not None
            return extrapolate(results[0], results[1], self.blocks, self.parameters)
        except Exception:
            return None

    def _simulate(self, model: Any, arguments: dict[str, Any], count: int | None) -> Simulation:
        """Simulate two steps of a run.

        Args:
            model: is used up.
            arguments: of the trainer.
            count: blocks that are kept, of many equal ones; None: all.
        """
        strategy = make_strategy(self.ranks, self.device, self.level)
        strategy.prepare = self._prepare
        strategy.inspect = lambda module, tracker: self._inspect(module, tracker, count)
        trainer = simulation_trainer(strategy, **arguments)
        simulation = simulate(trainer, model, **self.data)
        self.precision, self.divides_batch = str(trainer.precision), strategy.divides_batch
        return simulation

    def _prepare(self, module: nn.Module) -> None:
        mode: Any = getattr(self.configured, "activation_checkpointing", "none")
        apply_activation_checkpointing(module, mode)
        if self.device is not None and self.level != "measure":
            use_fused_attention(module)

    def _inspect(self, module: nn.Module, tracker: TensorTracker, count: int | None) -> None:
        """Describe the module, remove blocks, and set hooks on the others."""
        self.traits = describe_module(module)
        self.blocks = find_equal_blocks(module) if count is not None else None
        blocks = find_blocks(module)
        if self.blocks is not None and count is not None:
            self.parameters = describe_parameters(module, [])
            self.blocks.keep(count)
            blocks = self.blocks.blocks()
        if self.level != "quick":
            watch_blocks(blocks, tracker)
            axes = {name: split.axis for name, split in self.traits.splits.items()}
            known = {name for name, _ in module.named_parameters()}
            watch_splits(module, {n: a for n, a in axes.items() if n in known}, tracker)


def make_strategy(ranks: Ranks, device: Device | None, level: Level) -> SimulatedDevice:
    """Return the strategy of a simulation: one rank, with the kernels of the device."""
    # the kernels of the device: see RunToEstimate
    prepare = None if device is None or level == "measure" else use_fused_attention
    return SimulatedDevice(
        ranks.size, level == "measure", level != "quick", prepare, compares=level == "simulate"
    )


def use_fused_attention(module: nn.Module) -> None:
    """Use torch's attention kernel as on a GPU; for bf16 on a CPU `auto` takes the formula."""
    for submodule in module.modules():
        if getattr(submodule, "attention_fn", None) is auto_attention:
            submodule.attention_fn = sdpa_attention  # type: ignore[assignment]


def check_level(level: str) -> None:
    """Raise UsageError for an unknown level."""
    if level not in ("quick", "simulate", "measure"):
        raise UsageError(
            f"estimate: level={level!r} does not exist",
            ["quick", "simulate", "measure"],
            "use level='simulate'",
        )


def resolve_ranks(devices: int, num_nodes: int, link: str | None) -> Ranks:
    """Return the ranks of a run and their link; raise UsageError for numbers below 1."""
    for name, value in (("devices", devices), ("num_nodes", num_nodes)):
        if value < 1:
            raise UsageError(
                f"estimate: {name}={value} is too small",
                ["1 or more"],
                f"use {name}=1",
                flag=f"--{name}=1",
            )
    bandwidth, link_name = link_bandwidth(link, num_nodes)
    local_bandwidth, _ = link_bandwidth(link, 1)
    return Ranks(devices, num_nodes, bandwidth, link_name, local_bandwidth)


def target_precision(precision: str | int | None, device: Device | None) -> str | int | None:
    """Return the precision of the run; `auto` is bf16-mixed if a GPU is named."""
    return "bf16-mixed" if precision == "auto" and device is not None else precision
