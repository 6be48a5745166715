"""How it is optimised and watched: callbacks that work on any LightningModule."""

from ravine.callbacks.ema import EMA
from ravine.callbacks.gradient_clipping import GradientClipping
from ravine.callbacks.optimizers.muon import Muon, MuonOptimizer
from ravine.callbacks.optimizers.plan import OptimizerPlan
from ravine.callbacks.optimizers.rules import Rule
from ravine.callbacks.optimizers.schedules import Schedule

__all__ = [
    "EMA",
    "GradientClipping",
    "Muon",
    "MuonOptimizer",
    "OptimizerPlan",
    "Rule",
    "Schedule",
]
