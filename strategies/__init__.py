from .mesh import MeshStrategy
from .names import NAMES

__all__ = ["NAMES", "MeshStrategy"]
