from .agreement import RanksDiffer
from .checkpoint_io import AtomicCheckpointIO, CheckpointError
from .data_parallel import DataParallelStrategy
from .mesh import MeshStrategy
from .names import NAMES
from .signals import GracefulStop
from .watchdog import RankWatchdog
from .weighting import GlobalMean

__all__ = [
    "NAMES",
    "AtomicCheckpointIO",
    "CheckpointError",
    "DataParallelStrategy",
    "GlobalMean",
    "GracefulStop",
    "MeshStrategy",
    "RankWatchdog",
    "RanksDiffer",
]
