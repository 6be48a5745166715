from .callback import Quantization, quantize_module

__all__ = ["Quantization", "quantize_module"]
