from .callback import LoRA
from .inject import inject_lora, lora_disabled, lora_layers, merge_lora

__all__ = ["LoRA", "inject_lora", "lora_disabled", "lora_layers", "merge_lora"]
