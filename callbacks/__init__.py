"""Callbacks for any LightningModule: optimizers, LoRA, quantization, checkpoints, monitoring.

The names in `__all__` of each file of `optimizers/` are added here, so a new optimizer needs no
entry in a list.
"""

from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from . import optimizers
from .checkpointing.checkpoint import Checkpoint
from .checkpointing.ema import EMA
from .checkpointing.exact_resume import ExactResume
from .checkpointing.graceful_stop import GracefulStop
from .checks.run_checks import RunChecks
from .frechet.callback import FrechetDistance
from .generation.figures import SaveFigures
from .generation.predictions import PredictionTable
from .generation.rollout_table import RolloutTable
from .generation.samples import GenerateSamples
from .lora import LoRA, lora_disabled
from .monitoring.convergence_plot import ConvergencePlot, Panel
from .monitoring.curvature_monitor import CurvatureMonitor
from .monitoring.memory import MemoryMonitor
from .monitoring.plots import LossPlot, MetricPlot
from .monitoring.progress import ProgressBar
from .monitoring.scale_monitor import ScaleMonitor
from .monitoring.steps_to_target import StepsToTarget
from .monitoring.summary import Summary
from .monitoring.throughput import Throughput
from .monitoring.training_monitor import TrainingMonitor
from .monitoring.trajectory_plot import TrajectoryPlot
from .optimizers.lr_schedules import LRSchedule
from .optimizers.momentum_schedule import MomentumSchedule
from .optimizers.parameter_rules import ParamRule
from .optimizers.plan import OptimizerPlan
from .optimizers.update_monitor import UpdateMonitor
from .quantization import Quantization
from .stability.gradient_clipping import GradientClipping
from .stability.metric_alert import MetricAlert
from .stability.nan_guard import NaNGuard
from .stability.out_of_memory import OutOfMemoryReport
from .stability.rank_watchdog import RankWatchdog
from .stability.token_weighted_loss import TokenWeightedLoss
from .transforms.activation_checkpointing import ActivationCheckpointing
from .transforms.compile import Compile
from .transforms.pretrained import Pretrained

__all__ = [
    "EMA",
    "ActivationCheckpointing",
    "Checkpoint",
    "Compile",
    "ConvergencePlot",
    "CurvatureMonitor",
    "ExactResume",
    "FrechetDistance",
    "GenerateSamples",
    "GracefulStop",
    "GradientClipping",
    "LRSchedule",
    "LoRA",
    "LossPlot",
    "MemoryMonitor",
    "MetricAlert",
    "MetricPlot",
    "MomentumSchedule",
    "NaNGuard",
    "OptimizerPlan",
    "OutOfMemoryReport",
    "Panel",
    "ParamRule",
    "PredictionTable",
    "Pretrained",
    "ProgressBar",
    "Quantization",
    "RankWatchdog",
    "RolloutTable",
    "RunChecks",
    "SaveFigures",
    "ScaleMonitor",
    "StepsToTarget",
    "Summary",
    "Throughput",
    "TokenWeightedLoss",
    "TrainingMonitor",
    "TrajectoryPlot",
    "UpdateMonitor",
    "lora_disabled",
]

for _module_info in iter_modules(optimizers.__path__):
    _module = import_module(f"{optimizers.__name__}.{_module_info.name}")
    for _name in getattr(_module, "__all__", ()):
        globals()[_name] = getattr(_module, _name)
        __all__ += [_name]


def __getattr__(name: str) -> Any:
    """Raise AttributeError; a type checker sees the names of `optimizers/` as Any."""
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {__all__}")
