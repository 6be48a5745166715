"""How it is optimised and watched: callbacks that work on any LightningModule."""

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
from ravine.callbacks.optimizers.adagrad import AdaGrad, AdaGradOptimizer
from ravine.callbacks.optimizers.lion import Lion, LionOptimizer
from ravine.callbacks.optimizers.muon import Muon, MuonOptimizer
from ravine.callbacks.optimizers.newton import Newton, NewtonOptimizer
from ravine.callbacks.optimizers.plan import OptimizerPlan
from ravine.callbacks.optimizers.rules import Rule
from ravine.callbacks.optimizers.schedules import Schedule
from ravine.callbacks.optimizers.sign import SignSGD, SignSGDOptimizer
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

__all__ = [
    "EMA",
    "AdaGrad",
    "AdaGradOptimizer",
    "Checkpoint",
    "CollapseAlarm",
    "Compile",
    "Curves",
    "ExactResume",
    "Figures",
    "FrechetDistance",
    "GradientClipping",
    "Lion",
    "LionOptimizer",
    "LoRA",
    "LossPlot",
    "MemoryTable",
    "Muon",
    "MuonOptimizer",
    "NaNGuard",
    "Newton",
    "NewtonOptimizer",
    "OptimizerPlan",
    "PredictionTable",
    "Pretrained",
    "ProgressBar",
    "Quantization",
    "Recompute",
    "RolloutTable",
    "Rule",
    "RunChecks",
    "Samples",
    "Schedule",
    "SignSGD",
    "SignSGDOptimizer",
    "Summary",
    "Throughput",
    "UpdateSizes",
    "lora_disabled",
]
