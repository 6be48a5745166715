"""Names for `--trainer.strategy`: presets of MeshStrategy beside Lightning's own `ddp`."""

from lightning.pytorch.strategies import StrategyRegistry

from .mesh import MeshStrategy

NAMES = {
    "zero3": ("ZeRO-3: parameters, gradients and optimizer state sharded", {"dp_shard": -1}),
    "tp": ("matrices split over all ranks by the net's tp_plan", {"dp_shard": 1, "tp": -1}),
}

for _name, (_description, _degrees) in NAMES.items():
    StrategyRegistry.register(_name, MeshStrategy, _description, override=True, **_degrees)
