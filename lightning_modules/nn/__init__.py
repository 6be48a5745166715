"""Neural networks and their layers."""

from .attention import CausalAttention
from .transformer import Transformer

__all__ = ["CausalAttention", "Transformer"]
