"""Estimate memory, FLOPs, communication and time of a run before it: `ravine.estimate`.

The engine is in callbacks/estimates/. This file builds the trainer of the simulation from the
arguments of the run.
"""

from typing import Any, Literal, cast

import lightning as L
from lightning.pytorch.callbacks import Callback
from torch import nn

from ravine.callbacks.checkpointing.exact_resume import ExactResume
from ravine.callbacks.checkpointing.graceful_stop import GracefulStop
from ravine.callbacks.checks.run_checks import RunChecks
from ravine.callbacks.estimates.devices import Device, find_device, link_bandwidth
from ravine.callbacks.estimates.estimate import Estimate, make_estimate
from ravine.callbacks.estimates.layouts import Ranks, check_divisible
from ravine.callbacks.estimates.simulation import SimulatedDevice, SimulationLimit, simulate
from ravine.callbacks.monitoring.memory import MemoryMonitor
from ravine.callbacks.monitoring.summary import Summary
from ravine.callbacks.monitoring.throughput import Throughput
from ravine.callbacks.stability.rank_watchdog import RankWatchdog
from ravine.errors import UsageError
from ravine.lightning_modules.nn.attention import auto_attention, sdpa_attention

from .run_folders.recorder import RunRecorder
from .trainer import Trainer, as_list

Level = Literal["quick", "simulate", "measure"]
# callbacks that watch a run or write files, and create no tensors of a step
WATCHING_CALLBACKS = (ExactResume, GracefulStop, RankWatchdog, RunRecorder, RunChecks)
WATCHING_CALLBACKS += (Throughput, MemoryMonitor, Summary)
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
        trainer_arguments: arguments of `ravine.Trainer`: callbacks, precision, strategy, ...

    Raises:
        UsageError: an argument is unknown, or code of a simulated step needs values.
    """
    check_level(level)
    device = find_device(gpu, gpu_memory, gpu_tflops)
    ranks = resolve_ranks(devices, num_nodes, link)
    configured = trainer_arguments.pop("strategy", "auto")
    trainer_arguments["precision"] = target_precision(trainer_arguments.get("precision"), device)
    strategy = make_strategy(ranks, device, level)
    trainer = simulation_trainer(strategy, **trainer_arguments)
    is_datamodule = isinstance(data, L.LightningDataModule)
    loaders = {"datamodule" if is_datamodule else "train_dataloaders": data}
    return estimate_with_trainer(trainer, model, loaders, ranks, device, configured)


def estimate_with_trainer(
    trainer: L.Trainer,
    model: L.LightningModule,
    data: dict[str, Any],
    ranks: Ranks,
    device: Device | None,
    configured: Any,
) -> Estimate:
    """Estimate a run with a trainer of `simulation_trainer`.

    Args:
        trainer: the trainer of the simulation.
        model: the module; it is used up.
        data: `datamodule` or `train_dataloaders`, as for `trainer.fit`.
        ranks: the ranks of the run.
        device: the GPU; None: no times.
        configured: the strategy of the run, a name or an object.
    """
    simulation = simulate(trainer, model, **data)
    name = configured if isinstance(configured, str) else type(configured).__name__
    if name != "auto":
        check_divisible(name, ranks)
    strategy: Any = trainer.strategy
    return make_estimate(
        simulation, model, ranks, device, name, str(trainer.precision), strategy.divides_batch
    )


def make_strategy(ranks: Ranks, device: Device | None, level: Level) -> SimulatedDevice:
    """Return the strategy of a simulation: one rank, with the kernels of the device."""
    prepare = None if device is None or level == "measure" else use_fused_attention
    return SimulatedDevice(ranks.size, level == "measure", level != "quick", prepare)


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
    return Ranks(devices, num_nodes, bandwidth, link_name)


def target_precision(precision: str | int | None, device: Device | None) -> str | int | None:
    """Return the precision of the run; `auto` is bf16-mixed if a GPU is named."""
    return "bf16-mixed" if precision == "auto" and device is not None else precision
