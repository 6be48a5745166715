from .checkpoint_io import AtomicCheckpointIO, CheckpointError
from .mesh import MeshStrategy
from .names import NAMES
from .signals import GracefulStop

__all__ = ["NAMES", "AtomicCheckpointIO", "CheckpointError", "GracefulStop", "MeshStrategy"]
