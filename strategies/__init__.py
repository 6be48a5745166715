from .checkpoint.atomic_io import AtomicCheckpointIO, CheckpointError
from .data_parallel import DataParallelStrategy
from .mesh_strategy import MeshStrategy
from .presets import NAMES
from .rank_agreement import RanksDiffer

__all__ = [
    "NAMES",
    "AtomicCheckpointIO",
    "CheckpointError",
    "DataParallelStrategy",
    "MeshStrategy",
    "RanksDiffer",
]
