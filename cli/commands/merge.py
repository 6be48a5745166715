"""Merge LoRA adapters and dequantize: save plain weights in a checkpoint that needs no callback."""

from pathlib import Path

import torch
from torch import Tensor

from ravine.callbacks import Quantization
from ravine.callbacks.lora import lora_layers, merge_lora
from ravine.callbacks.quantization import quantize_module
from ravine.errors import UsageError
from ravine.files import atomic_write
from ravine.lightning_modules import TaskModule
from ravine.strategies.checkpoint.atomic_io import AtomicCheckpointIO

from ..config.saved_config import remove_transforms

RUN_KEYS = (  # checkpoint entries of the run and of the transforms, not of the model
    *("optimizer_states", "lr_schedulers", "callbacks", "loops", "exact_resume", "ema"),
    *("optimizer_plan", "schedule_length", "transforms", "lora", "state_dict"),
)


def merge_adapters(module: TaskModule) -> list[str]:
    """Merge the LoRA adapters and dequantize all layers; return the names of the merged layers."""
    tied_names = _tied_names(module)
    names = merge_lora(module)
    for layer in module.modules():
        if hasattr(layer, "dequantize"):
            layer.dequantize()  # pyright: ignore[reportCallIssue]
    state = module.state_dict()
    for one, other in tied_names:
        if not torch.equal(state[one], state[other]):
            raise UsageError(
                f"{one} and {other} are one weight in this model and differ once merged, so no "
                "plain checkpoint of it can hold them",
                flag="fit with --model.tie_embeddings=false, or adapters on neither of the two",
            )
    return names


def save_merged(
    module: TaskModule,
    path: Path,
    folder: Path,
    requires_adapters: bool,
    quantization_scheme: str | None,
) -> str:
    """Save model.ckpt and model.safetensors in a folder, in float or in the quantization scheme."""
    if requires_adapters and not lora_layers(module):
        raise UsageError(
            f"{path} holds no adapters: there is nothing to merge",
            flag="export --format=..., or --quantize=int8",
        )
    target = folder / "model.ckpt"
    if target.exists() and target.samefile(path):
        raise UsageError(f"{target} is what is to be exported", flag="--folder=ANOTHER")
    merge_adapters(module)
    checkpoint = AtomicCheckpointIO().load_checkpoint(path)
    checkpoint = {key: value for key, value in checkpoint.items() if key not in RUN_KEYS}
    config = checkpoint.get("ravine", {}).get("config")
    if config:
        checkpoint["ravine"]["config"] = remove_transforms(config)
    if quantization_scheme is not None:
        quantization = Quantization(quantization_scheme)  # pyright: ignore[reportArgumentType]
        quantize_module(module, quantization_scheme)
        arguments = quantization.to_config()
        checkpoint["transforms"] = {"quantize": {"class": "Quantization", "arguments": arguments}}
        if config:
            spec = {"class_path": "ravine.callbacks.Quantization", "init_args": arguments}
            checkpoint["ravine"]["config"]["trainer.callbacks"] += [spec]
    tensors: dict[str, Tensor] = {
        name: value.detach().cpu().clone() for name, value in module.state_dict().items()
    }
    from safetensors.torch import save_file

    with atomic_write(folder / "model.safetensors") as file:
        save_file(tensors, file.name, metadata={"format": "pt"})
    AtomicCheckpointIO().save_checkpoint(checkpoint | {"state_dict": tensors}, target)
    return f"{folder}/model.ckpt, model.safetensors"


def _tied_names(module: TaskModule) -> list[tuple[str, str]]:
    first: dict[int, str] = {}
    pairs = []
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if id(parameter) in first:
            pairs.append((first[id(parameter)], name))
        first.setdefault(id(parameter), name)
    return pairs
