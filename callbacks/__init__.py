"""How it is optimised and watched: callbacks that work on any LightningModule."""

from ravine.callbacks.ema import EMA
from ravine.callbacks.gradient_clipping import GradientClipping
from ravine.callbacks.loss_plot import LossPlot
from ravine.callbacks.optimizers.muon import Muon, MuonOptimizer
from ravine.callbacks.optimizers.plan import OptimizerPlan
from ravine.callbacks.optimizers.rules import Rule
from ravine.callbacks.optimizers.schedules import Schedule
from ravine.callbacks.predictions import PredictionTable
from ravine.callbacks.progress import ProgressBar
from ravine.callbacks.samples import Samples

__all__ = [
    "EMA",
    "GradientClipping",
    "LossPlot",
    "Muon",
    "MuonOptimizer",
    "OptimizerPlan",
    "PredictionTable",
    "ProgressBar",
    "Rule",
    "Samples",
    "Schedule",
]
