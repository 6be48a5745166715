"""Strategy presets: names for `strategy` that configure MeshStrategy.

To add a preset, add a row to the table below and a row to WORLDS in
tests/strategies/test_mesh_strategy.py. Then run `python tests/test_lists.py`, which writes its
overlay and its row of docs/parallelism.md. Finally run
`WRITE_README=1 pytest tests/docs/test_support_tables.py -k readme`, which writes its column of
README's table.
"""

from lightning.pytorch.strategies import StrategyRegistry

from .mesh_strategy import MeshStrategy

STRATEGY_PRESETS = {
    "zero1": (
        "ZeRO-1: optimizer state sharded over ranks",
        {"zero_stage": 1},
    ),
    "zero2": (
        "ZeRO-2: gradients and optimizer state sharded over ranks",
        {"zero_stage": 2},
    ),
    "zero3": ("ZeRO-3: parameters, gradients and optimizer state sharded over ranks", {}),
    "hsdp": (
        "ZeRO-3 within each half of the ranks, replicated over the two halves",
        {"dp_replicate": 2},
    ),
    "tp": (
        "tensor parallelism: matrices split over ranks by the net's tensor_parallel_plan",
        {"dp_shard": 1, "tp": -1},
    ),
    "sp": (
        "tp, and the sequence dimension of the other activations split over ranks",
        {"dp_shard": 1, "tp": -1, "sequence_parallel": True},
    ),
    "cp": (
        "context parallelism: sequence dimension split over ranks, ring attention",
        {"dp_shard": 1, "cp": -1},
    ),
    "pp": (
        "pipeline parallelism: blocks split over ranks, batches split into micro-batches",
        {"dp_shard": 1, "pp": -1},
    ),
    "ep": ("expert parallelism: ZeRO-3, and the experts of a mixture split over ranks", {"ep": -1}),
    "2d": ("ZeRO-3 over pairs of ranks that split matrices (tp)", {"tp": 2}),
    "3d": ("2d, with two pipeline stages", {"tp": 2, "pp": 2}),
}

for _name, (_description, _degrees) in STRATEGY_PRESETS.items():
    StrategyRegistry.register(_name, MeshStrategy, _description, override=True, **_degrees)
