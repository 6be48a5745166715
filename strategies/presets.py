"""Strategy presets: names for `--trainer.strategy` that configure MeshStrategy.

To add a preset, add a row to the table below and a row to WORLDS in
tests/strategies/test_mesh_strategy.py. Then run `python tests/test_lists.py`, which writes its
overlay and its row of docs/parallelism.md. Finally run
`WRITE_README=1 pytest tests/docs/test_support_tables.py -k readme`, which writes its column of
README's table.
"""

from lightning.pytorch.strategies import StrategyRegistry

from .mesh_strategy import MeshStrategy

STRATEGY_PRESETS = {
    "zero1": ("ZeRO-1: optimizer state shared out", {"zero_stage": 1}),
    "zero2": ("ZeRO-2: gradients and optimizer state sharded, parameters kept", {"zero_stage": 2}),
    "zero3": ("ZeRO-3: parameters, gradients and optimizer state sharded", {}),
    "hsdp": ("ZeRO-3 within each half of the ranks, two copies", {"dp_replicate": 2}),
    "tp": (
        "matrices split over all ranks by the net's tensor_parallel_plan",
        {"dp_shard": 1, "tp": -1},
    ),
    "sp": (
        "tp, and the activations between split matrices cut along time",
        {"dp_shard": 1, "tp": -1, "sequence_parallel": True},
    ),
    "cp": ("each sequence cut along time over all ranks", {"dp_shard": 1, "cp": -1}),
    "pp": ("blocks divided among all ranks, micro-batches in turn", {"dp_shard": 1, "pp": -1}),
    "ep": ("ZeRO-3, and the experts of a mixture divided among all ranks", {"ep": -1}),
    "2d": ("ZeRO-3 over pairs of ranks that split matrices", {"tp": 2}),
    "3d": ("2d, in two halves of the net that follow each other", {"tp": 2, "pp": 2}),
}

for _name, (_description, _degrees) in STRATEGY_PRESETS.items():
    StrategyRegistry.register(_name, MeshStrategy, _description, override=True, **_degrees)
