from .checkpoint.atomic_io import AtomicCheckpointIO, CheckpointError
from .data_parallel import DataParallelStrategy
from .mesh_strategy import MeshStrategy
from .presets import STRATEGY_PRESETS
from .rank_agreement import RankMismatchError

__all__ = [
    "STRATEGY_PRESETS",
    "AtomicCheckpointIO",
    "CheckpointError",
    "DataParallelStrategy",
    "MeshStrategy",
    "RankMismatchError",
]
