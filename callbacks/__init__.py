"""How it is optimised and watched: callbacks that work on any LightningModule.

Each file of `optimizers/` adds the names of its `__all__` here: a new optimizer needs no list.
"""

from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from ravine.callbacks import optimizers
from ravine.callbacks.checkpoint import Checkpoint
from ravine.callbacks.checks import RunChecks
from ravine.callbacks.collapse import CollapseAlarm
from ravine.callbacks.compile import Compile
from ravine.callbacks.curves import Curves
from ravine.callbacks.ema import EMA
from ravine.callbacks.figures import Figures
from ravine.callbacks.frechet_distance import FrechetDistance
from ravine.callbacks.gradient_clipping import GradientClipping
from ravine.callbacks.lora import LoRA, lora_disabled
from ravine.callbacks.loss_plot import LossPlot
from ravine.callbacks.memory_table import MemoryTable
from ravine.callbacks.nan_guard import NaNGuard
from ravine.callbacks.optimizers.plan import OptimizerPlan
from ravine.callbacks.optimizers.rules import Rule
from ravine.callbacks.optimizers.schedules import Schedule
from ravine.callbacks.optimizers.watching import UpdateSizes
from ravine.callbacks.predictions import PredictionTable
from ravine.callbacks.pretrained import Pretrained
from ravine.callbacks.progress import ProgressBar
from ravine.callbacks.quantization import Quantization
from ravine.callbacks.recompute import Recompute
from ravine.callbacks.resume import ExactResume
from ravine.callbacks.rollout_table import RolloutTable
from ravine.callbacks.samples import Samples
from ravine.callbacks.summary import Summary
from ravine.callbacks.throughput import Throughput
from ravine.strategies.signals import GracefulStop
from ravine.strategies.watchdog import RankWatchdog
from ravine.strategies.weighting import GlobalMean

__all__ = [
    "EMA",
    "Checkpoint",
    "CollapseAlarm",
    "Compile",
    "Curves",
    "ExactResume",
    "Figures",
    "FrechetDistance",
    "GlobalMean",
    "GracefulStop",
    "GradientClipping",
    "LoRA",
    "LossPlot",
    "MemoryTable",
    "NaNGuard",
    "OptimizerPlan",
    "PredictionTable",
    "Pretrained",
    "ProgressBar",
    "Quantization",
    "RankWatchdog",
    "Recompute",
    "RolloutTable",
    "Rule",
    "RunChecks",
    "Samples",
    "Schedule",
    "Summary",
    "Throughput",
    "UpdateSizes",
    "lora_disabled",
]

for _found in iter_modules(optimizers.__path__):
    _module = import_module(f"{optimizers.__name__}.{_found.name}")
    for _name in getattr(_module, "__all__", ()):
        globals()[_name] = getattr(_module, _name)
        __all__ += [_name]


def __getattr__(name: str) -> Any:
    """Refuse a name; for a type checker, the names of `optimizers/` are of type Any."""
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {__all__}")
