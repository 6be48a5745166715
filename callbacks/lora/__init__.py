from .callback import LoRA
from .inject import adapt_module, adapters, lora_disabled, merge

__all__ = ["LoRA", "adapt_module", "adapters", "lora_disabled", "merge"]
