"""Language nets and their parts."""

from .attention import CausalAttention
from .transformer import Transformer

__all__ = ["CausalAttention", "Transformer"]
