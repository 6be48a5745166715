"""Trainer: Lightning's Trainer with a run directory, exact resume and atomic checkpoints."""

import os
import re
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.callbacks import ProgressBar as LightningProgressBar
from lightning.pytorch.loggers import (
    Logger,
    MLFlowLogger,
    TensorBoardLogger,
    WandbLogger,
)
from lightning.pytorch.plugins.io import CheckpointIO
from rich.console import Console

from ravine.callbacks.checkpointing.checkpoint import Checkpoint
from ravine.callbacks.checkpointing.exact_resume import ExactResume
from ravine.callbacks.checkpointing.graceful_stop import GracefulStop
from ravine.callbacks.checks.run_checks import RunChecks
from ravine.callbacks.generation.predictions import PredictionTable
from ravine.callbacks.monitoring.heartbeat import Heartbeat
from ravine.callbacks.monitoring.plots import LossPlot
from ravine.callbacks.monitoring.progress import ProgressBar
from ravine.callbacks.monitoring.straggler_monitor import StragglerMonitor
from ravine.callbacks.monitoring.training_monitor import TrainingMonitor
from ravine.callbacks.stability.out_of_memory import (
    REPORT_WIDTH,
    OutOfMemoryReport,
    explain_killed_runs,
)
from ravine.callbacks.stability.rank_watchdog import RankWatchdog
from ravine.callbacks.stability.token_weighted_loss import TokenWeightedLoss
from ravine.callbacks.stock_callbacks.gradient_accumulation import count_optimizer_steps
from ravine.errors import UsageError
from ravine.lightning_compat import (
    checkpoint_connector,
    install_fast_loop,
    number_logs_by_step,
    replace_checkpoint_connector,
    replace_method,
    start_method,
    without_profiling,
)
from ravine.strategies.bfloat16 import has_fast_bfloat16
from ravine.strategies.checkpoint.atomic_io import AtomicCheckpointIO
from ravine.strategies.gradient_readers import (
    can_free_gradients_early,
    free_before_forward,
    free_gradients,
)
from ravine.strategies.mesh_strategy import MeshStrategy
from ravine.strategies.rank_agreement import check_same_config
from ravine.strategies.stock_callbacks import check_stock_callbacks

from .checkpoint_connector import RavineCheckpointConnector
from .lightning_noise import silence_lightning
from .run_dir import CHECKPOINT_FOLDERS_FILE, RunCSVLogger, check_run_name, run_dir_error
from .run_folders.placement import Placement, create_numbered_folder, place_run
from .run_folders.record import FIRST_LOGGED_STEP
from .run_folders.recorder import RunRecorder

# Callbacks that the Trainer adds itself, the last one only if it has several ranks.
DEFAULT_CALLBACKS: tuple[type[Callback], ...] = (
    ExactResume,
    GracefulStop,
    TokenWeightedLoss,
    Checkpoint,
    ProgressBar,
    LossPlot,
    TrainingMonitor,
    PredictionTable,
    RunRecorder,
    Heartbeat,
    OutOfMemoryReport,
    RunChecks,
    RankWatchdog,
)
# Another class that counts as the same kind: with a ModelCheckpoint no Checkpoint is added.
EQUIVALENT_CLASSES = {Checkpoint: ModelCheckpoint, ProgressBar: LightningProgressBar}
DEVICES_PATTERN = re.compile(r"auto|-1|[1-9]\d*|\d+,|\d+(, ?\d+)+")
LoggerName = Literal["csv", "tensorboard", "wandb", "mlflow"]


def check_not_spawned(strategy: Any) -> None:
    """Raise an error if a strategy would pickle the trainer for new processes.

    Raises:
        UsageError: the strategy uses spawn or forkserver; the trainer has locks and methods that
            cannot be pickled.
    """
    if start_method(strategy) in ("spawn", "forkserver"):
        raise UsageError(
            f"{type(strategy).__name__} starts its processes by {start_method(strategy)}, for "
            "which the trainer would be pickled, and it cannot be pickled",
            ["ddp", "ddp_notebook in a notebook"],
            hint="use strategy='ddp'",
            flag="--trainer.strategy=ddp",
        )


class Trainer(L.Trainer):
    """`lightning.Trainer` with other defaults; it accepts the same arguments.

    Each run has its own directory, `runs/<name>/version_<k>` with the next free k, and a record,
    `run.json`, that says what made it. A test, validation or prediction of a run's checkpoint
    writes to `test_<k>` inside of that directory. On the command line a fit from the newest
    checkpoint of a run, with the same arguments, goes on in its directory; any other resumed fit
    is a new run, whose record names the parent (`run_folders/placement.py`).

        Trainer(max_steps=1000, precision="auto").fit(model, datamodule=data)

    Default callbacks, unless one of the same kind is given: ExactResume, GracefulStop,
    TokenWeightedLoss, PredictionTable, RunRecorder, Heartbeat, OutOfMemoryReport and RunChecks,
    and with several ranks RankWatchdog and, with a logger, StragglerMonitor. Default plugin:
    AtomicCheckpointIO. Unless switched off: Checkpoint (enable_checkpointing), ProgressBar
    (enable_progress_bar), TrainingMonitor and LossPlot (logger). The loggers, the progress bar and
    the names of checkpoints count optimizer steps from 1, as `global_step` does after a step.
    """

    def __init__(
        self,
        *,
        name: str | None = None,
        precision: str | int | None = None,
        logger: bool | Logger | LoggerName | list[Logger | LoggerName] = True,
        callbacks: list[Callback] | Callback | None = None,
        plugins: Any = None,
        default_root_dir: str | Path = "runs",
        num_sanity_val_steps: int = 0,
        log_every_n_steps: int = 50,
        enable_checkpointing: bool = True,
        enable_progress_bar: bool = True,
        enable_model_summary: bool = False,
        **kwargs: Any,
    ) -> None:
        """Set up a run; its directory is created when it starts.

        Args:
            name: name of the run; by default that of the first config, or of the model's class
            precision: auto (bf16-mixed if the device has instructions for it) or one of Lightning's
            logger: true for csv and tensorboard, in the run directory; or others, by name or class
            callbacks: callbacks in addition to the default ones
            plugins: plugins in addition to AtomicCheckpointIO
            default_root_dir: parent folder of all run directories
            num_sanity_val_steps: validation batches run before training
            log_every_n_steps: optimizer steps between two log lines
            enable_checkpointing: whether checkpoints are saved
            enable_progress_bar: whether a progress bar is shown
            enable_model_summary: whether Lightning's module summary is printed; the optimizer
                plan's table has more detail
            kwargs: Lightning's other arguments
        """
        # filters some messages of Lightning from now on; the others are not changed
        silence_lightning()
        # raises an error for counts below one, such as accumulate_grad_batches=0
        check_counts(kwargs)
        self._run_name = name
        self.run_dir = None  # created by `log_dir`
        # Steps done by a run that is resumed in its own directory; None for a new directory.
        self._kept_steps: int | None = None
        # On a resume, the arguments that differ from the checkpoint's; None if not known. The
        # command line sets it.
        self.changed_arguments: list[str] | None = None
        # Makes the command that continues a run from a path; None in a script. The command line
        # sets it.
        self.resume_command: Callable[[str], str] | None = None
        is_barebones = bool(kwargs.get("barebones"))
        is_dry_run = is_barebones or bool(kwargs.get("fast_dev_run"))
        self._is_dry_run = is_dry_run  # a dry run has no run directory
        self._requested_loggers = select_loggers(logger, is_barebones)
        logger_objects = [item for item in self._requested_loggers if isinstance(item, Logger)]
        default_callbacks = {  # class: whether it is added
            ExactResume: not is_dry_run,
            GracefulStop: not is_dry_run,
            TokenWeightedLoss: True,  # part of the result: the weight of each token in the loss
            Checkpoint: enable_checkpointing and not is_dry_run,
            ProgressBar: enable_progress_bar and not is_barebones,
            LossPlot: bool(self._requested_loggers) and not is_dry_run,
            TrainingMonitor: bool(self._requested_loggers) and not is_dry_run,
            PredictionTable: not is_barebones,
            RunRecorder: not is_dry_run,
            Heartbeat: not is_dry_run,
            OutOfMemoryReport: not is_barebones,
        }
        super().__init__(
            precision=resolve_precision(precision, kwargs.get("accelerator", "auto")),
            logger=logger_objects or False,  # `log_dir` adds the loggers given by name
            # Default callbacks are added unless one of their kind is given. RunChecks, which tries
            # the first batch before training, is added as the first.
            callbacks=sort_callbacks(add_default_callbacks(as_list(callbacks), default_callbacks)),
            plugins=add_atomic_checkpoint_io(as_list(plugins)),
            default_root_dir=default_root_dir,
            num_sanity_val_steps=num_sanity_val_steps,
            log_every_n_steps=0 if is_barebones else log_every_n_steps,
            enable_checkpointing=enable_checkpointing and not is_barebones,
            enable_progress_bar=enable_progress_bar and not is_barebones,
            enable_model_summary=enable_model_summary,
            **kwargs,  # passed unchanged, so that the parser finds Lightning's arguments
        )
        # raises an error for a strategy that starts processes by spawn or forkserver
        check_not_spawned(self.strategy)
        # The number of ranks is known only after `super().__init__`.
        # RankWatchdog ends the job if ranks would wait for each other for ever
        if self.world_size > 1 and not contains_kind(self.callbacks, RankWatchdog):  # type: ignore
            self.callbacks.insert(0, RankWatchdog())  # type: ignore[attr-defined]
        is_logging = bool(self._requested_loggers) and not is_dry_run
        if self.world_size > 1 and is_logging:
            current: list[Callback] = self.callbacks  # type: ignore[attr-defined]
            self.callbacks = add_default_callbacks(current, {StragglerMonitor: True})  # type: ignore
        # replaces Lightning's training loop by one with less work per step
        self._install_fast_loop()

    def check_same_config_on_ranks(self, flat_config: dict[str, Any]) -> None:
        """Check that all ranks have the same config, as soon as the process group is initialized.

        Args:
            flat_config: the config as a flat mapping of plain values.
        """
        strategy: Any = self.strategy

        def compare_configs() -> None:
            if self.world_size > 1 and dist.is_initialized():
                # gathers a hash of each rank; the error names the first key that differs
                check_same_config(flat_config)

        if isinstance(strategy, MeshStrategy):
            # Its `setup_environment` also builds the mesh, by collectives that ranks with different
            # configs would not match; it calls this attribute before.
            strategy.on_process_group_ready = compare_configs
            return
        setup_environment = strategy.setup_environment

        def setup_and_compare() -> None:
            setup_environment()  # initializes the process group
            compare_configs()

        # sets the attribute of this object; the class stays as it is
        replace_method(strategy, "setup_environment", setup_and_compare)

    def _install_fast_loop(self) -> None:
        """Remove overhead from training steps: lightning_compat/fast_loop.py has the figures."""
        check_stock_callbacks(self)
        replace_checkpoint_connector(self, RavineCheckpointConnector(self))
        # Lightning's loggers write 49 for the values of the 50th step
        number_logs_by_step(self)
        free_before_forward(self)
        install_fast_loop(self, can_free_gradients_early, free_gradients)
        without_profiling(self)
        if isinstance(self.accelerator, CPUAccelerator):
            # Lightning sets it for forks with a GPU; on the CPU it costs Adam 50 us per step
            os.environ.pop("PYTORCH_NVML_BASED_CUDA_CHECK", None)

    @property
    def estimated_stepping_batches(self) -> int | float:
        """Return the optimizer steps of the run, also if accumulation changes with the epoch."""
        return count_optimizer_steps(self)

    @property
    def log_dir(self) -> str | None:
        """Return the run directory, or None without a module and in a dry run.

        The first access in a run is collective: rank 0 creates the directory. Each rank then
        creates the loggers given by name and sets the folder of checkpoints.
        """
        if self.run_dir is None and self.lightning_module is not None and not self._is_dry_run:
            self.run_dir, self._kept_steps = self._create_run_dir_on_rank_zero()
            # a logger given by name needs the folder, so it is built only here
            self.loggers = [
                self._make_logger(requested, self.run_dir) for requested in self._requested_loggers
            ]
            for callback in self.checkpoint_callbacks:
                if isinstance(callback, ModelCheckpoint) and callback.dirpath is None:
                    callback.dirpath = os.path.join(self.run_dir, "checkpoints")
            # notes checkpoint folders outside of the run, so that a resume finds them
            self._record_checkpoint_folders(self.run_dir)
            continued = f", from step {self._kept_steps}" if self._kept_steps is not None else ""
            self.print(f"run: {self.run_dir}{continued}, on {self._describe_machine()}")
        return self.run_dir

    def _record_checkpoint_folders(self, folder: str) -> None:
        """Write the checkpoint folders outside of the run directory `folder` to a file in it.

        `--ckpt_path=last` reads this file. Folders on a remote file system are left out.
        """
        callbacks = [c for c in self.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
        local_folders = {
            os.path.abspath(str(c.dirpath)) for c in callbacks if "://" not in str(c.dirpath)
        }
        inside = os.path.abspath(folder) + os.sep
        outside_folders = sorted(path for path in local_folders if not path.startswith(inside))
        if outside_folders and self.is_global_zero:
            text = "\n".join(outside_folders)
            Path(folder, CHECKPOINT_FOLDERS_FILE).write_text(text, encoding="utf-8")

    def _create_run_dir_on_rank_zero(self) -> tuple[str, int | None]:
        """Create the run directory on rank 0; return its path and kept steps on all ranks.

        The kept steps are those done by a run that is resumed in its own directory, else None.
        All ranks raise an error if rank 0 fails.
        """
        created: tuple[str, int | None] = ("", None)  # "" means that rank 0 failed
        problem = None
        if self.is_global_zero:
            try:
                # the path and the kept steps
                created = self._create_run_dir()
            except (UsageError, OSError) as error:
                problem = error
        created = self.strategy.broadcast(created)
        path, _ = created
        if path:
            return created
        # `problem` is set on rank 0 only; the other ranks raise a general error
        raise problem or run_dir_error(Path(self.default_root_dir), OSError(0, "rank 0 failed"))

    def _create_run_dir(self) -> tuple[str, int | None]:
        """Create the run directory, or choose that of the resumed run; start its record.

        Returns:
            The path, and the steps done by the run that is resumed there, or None if it is new.
        """
        name = self._run_name or type(self.lightning_module).__name__.lower()
        # raises an error for a name that would lead out of the folder of runs
        check_run_name(name)
        root = Path(self.default_root_dir)
        verb = "fit" if self.state.fn is None else str(self.state.fn.value)
        # the checkpoint of `ckpt_path`, or None
        selected_path = checkpoint_connector(self).selected_path
        checkpoint = None if selected_path is None else str(selected_path)
        # `continued` is the folder of a run that goes on; otherwise a numbered folder is created
        placement = place_run(verb, checkpoint, root, name, self.changed_arguments)
        if verb == "fit":
            # prints why earlier runs of this name were killed, if memory was the reason
            self._report_killed_runs(placement.parent)
        folder = placement.continued or create_numbered_folder(
            placement.parent, placement.prefix, run_dir_error
        )
        if placement.reason and verb == "fit":
            self.print(f"{folder.name} is a new version: {placement.reason}")
        self._start_record(folder, verb, name, placement)
        # `origin` holds the path, step and run of the checkpoint that is resumed.
        kept_steps = (placement.origin or {}).get("step") if placement.continued else None
        return str(folder), kept_steps

    def _report_killed_runs(self, parent: Path) -> None:
        """Print why earlier runs of this name were killed, if memory was the reason."""
        callbacks: list[Any] = self.callbacks  # type: ignore[attr-defined]
        uses_flags = any(c.uses_flags for c in callbacks if isinstance(c, OutOfMemoryReport))
        folders = [path for path in parent.glob("*") if path.is_dir()]
        for report in explain_killed_runs(folders):
            Console(file=sys.stderr, width=REPORT_WIDTH).print(report.render(uses_flags))

    def _start_record(self, folder: Path, verb: str, name: str, placement: Placement) -> None:
        recorder = next((c for c in self.callbacks if isinstance(c, RunRecorder)), None)  # type: ignore
        if recorder is not None:
            is_continued = placement.continued is not None
            recorder.start(
                folder, verb, name, self.lightning_module, placement.origin, is_continued
            )

    def _make_logger(self, logger: Logger | LoggerName, folder: str) -> Logger:
        """Build a logger by name for the run directory; a Logger object is returned unchanged.

        In a run that is resumed in its own directory, csv and tensorboard drop what was logged
        after the steps that it keeps.

        Args:
            logger: csv, tensorboard, wandb or mlflow, or a Logger.
            folder: the run directory.
        """
        root, version = os.path.split(folder)
        name = os.path.relpath(folder, self.default_root_dir)
        match logger:
            # a subclass of Lightning's CSVLogger that keeps the rows of the first `kept_steps`
            # steps
            case "csv":
                return RunCSVLogger(root, name="", version=version, kept_steps=self._kept_steps)
            case "tensorboard":
                options = {}
                if self._kept_steps is not None:  # TensorBoard hides rows from this step on
                    options["purge_step"] = self._kept_steps + FIRST_LOGGED_STEP
                return TensorBoardLogger(
                    root, name="", version=version, default_hp_metric=False, **options
                )
            case "wandb":
                return WandbLogger(name=name, save_dir=folder)
            case "mlflow":  # one store for all runs
                store = f"sqlite:///{os.path.join(self.default_root_dir, 'mlflow.db')}"
                uri = os.environ.get("MLFLOW_TRACKING_URI", store)
                return MLFlowLogger(os.path.dirname(name), run_name=name, tracking_uri=uri)
        return logger  # type: ignore

    def _describe_machine(self) -> str:
        device = self.strategy.root_device
        device_name = (
            torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()
        )
        ranks_text = f"{self.world_size} x " if self.world_size > 1 else ""
        count = torch.get_num_threads()
        threads = f", {count} thread{'s' * (count > 1)}" if device.type == "cpu" else ""
        return f"{ranks_text}{device_name}{threads}, precision {self.precision}"


def select_loggers(logger: Any, is_barebones: bool) -> list[Any]:
    """Return the requested loggers, objects or names; raise an error if one is not installed."""
    default_loggers: list[Any] = [] if is_barebones else ["csv", "tensorboard"]
    loggers = default_loggers if logger is True else as_list(logger)
    for requested in loggers:
        check_logger_installed(requested)
    return loggers


def check_counts(options: dict[str, Any]) -> None:
    """Raise an error for counts below one; Lightning accepts them and then divides by them."""
    for key, min_value, allowed in (
        ("accumulate_grad_batches", 1, "1 or more"),
        ("num_nodes", 1, "1 or more"),
        ("val_check_interval", 1e-9, "above 0: a fraction of an epoch, or batches"),
    ):
        if isinstance(value := options.get(key), int | float) and value < min_value:
            problem = f"Trainer: {key}={value} is too small"
            suggested = max(1, -value)  # 4 for -4: the sign is the mistake
            flag = f"--trainer.{key}={suggested}"
            raise UsageError(problem, allowed, hint=f"use {key}={suggested}", flag=flag)
    devices = options.get("devices", "auto")
    if isinstance(devices, int | str) and not DEVICES_PATTERN.fullmatch(str(devices)):
        allowed = ["auto", "-1 (all)", "1 or more", "a list: 0,3"]
        problem = f"Trainer: devices={devices!r} names no devices"
        raise UsageError(problem, allowed, hint="use devices=1", flag="--trainer.devices=1")


def add_atomic_checkpoint_io(plugins: list[Any]) -> list[Any]:
    """Add AtomicCheckpointIO unless the plugins contain a CheckpointIO."""
    return plugins if contains_kind(plugins, CheckpointIO) else [*plugins, AtomicCheckpointIO()]


def add_default_callbacks(callbacks: list[Callback], defaults: dict[type, bool]) -> list[Callback]:
    """Return the callbacks and the enabled default callbacks whose kind is not among them."""
    return callbacks + [
        callback_class()
        for callback_class, is_enabled in defaults.items()
        if is_enabled and not contains_kind(callbacks, callback_class)
    ]


def sort_callbacks(callbacks: list[Callback]) -> list[Callback]:
    """Return the callbacks with RunChecks and TrainingMonitor before all others.

    The checks of RunChecks run before other callbacks fail. The progress bar shows what
    TrainingMonitor has logged at the same step.
    """
    run_checks = next((c for c in callbacks if isinstance(c, RunChecks)), None) or RunChecks()
    monitors = [c for c in callbacks if isinstance(c, TrainingMonitor)]
    others = [c for c in callbacks if not isinstance(c, RunChecks | TrainingMonitor)]
    return [run_checks, *monitors, *others]


def as_list(value: Any) -> list[Any]:
    """Return one value, several or none as a new list."""
    return list(value) if isinstance(value, list | tuple) else [value] if value else []


def contains_kind(members: list[Any], wanted_class: type) -> bool:
    """Return whether an object of the class is present; any progress bar or checkpoint counts."""
    return any(
        isinstance(member, (EQUIVALENT_CLASSES.get(wanted_class, wanted_class)))
        for member in members
    )


def resolve_precision(precision: str | int | None, accelerator: Any) -> Any:
    """Return the precision for Lightning, with `auto` resolved."""
    return default_precision(accelerator) if precision == "auto" else precision


def default_precision(accelerator: Any) -> str:
    """Return bf16-mixed if the device has instructions for it, else 32-true, which is faster."""
    on_cpu = accelerator == "cpu" or isinstance(accelerator, CPUAccelerator)
    if torch.cuda.is_available() and not on_cpu:
        device_type = "cuda"
    elif torch.backends.mps.is_available() and not on_cpu:
        device_type = "mps"
    else:
        device_type = "cpu"
    return "bf16-mixed" if has_fast_bfloat16(device_type) else "32-true"


def check_logger_installed(logger: Logger | LoggerName) -> None:
    """Raise an error if the package of a logger is not installed."""
    if logger in ("wandb", "mlflow") and find_spec(str(logger)) is None:
        raise UsageError(
            f"the logger {logger!r} needs the package {logger}, which is not installed",
            hint=f"pip install {logger}, or use logger=['csv', 'tensorboard']",
            flag=f"pip install {logger}, or --trainer.logger=[csv,tensorboard]",
        )
