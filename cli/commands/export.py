"""`export`: save the weights of a trained model for other programs, with LoRA adapters merged.

lightning export --ckpt_path last --format gpt2 --folder my_gpt2
lightning export --ckpt_path last --merge --folder plain
lightning export --ckpt_path runs/big/version_0/checkpoints/step=001000.ckpt --consolidate big.ckpt
"""

from inspect import Parameter
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from ravine.callbacks import Quantization
from ravine.callbacks.lora import lora_layers, merge_lora
from ravine.callbacks.quantization import quantize_module
from ravine.errors import UsageError
from ravine.files import atomic_write
from ravine.lightning_modules import TaskModule
from ravine.strategies.checkpoint.atomic_io import AtomicCheckpointIO, CheckpointError

from ..config.saved_config import remove_transforms
from ..error_report import program_name
from ..loading import checkpoint_from_argv, load_from_argv
from . import method_flags, output_path

QUANTIZATION_SCHEMES = ("int8", "nf4")
MERGE_FLAGS = {  # flags of --merge and --quantize, which need no method of the task
    "folder": method_flags.MethodFlag(str, Parameter.empty),
    "quantize": method_flags.MethodFlag(str, None, QUANTIZATION_SCHEMES),
}
RUN_KEYS = (  # checkpoint entries of the run and of the transforms, not of the model
    *("optimizer_states", "lr_schedulers", "callbacks", "loops", "exact_resume", "ema"),
    *("optimizer_plan", "schedule_length", "transforms", "lora", "state_dict"),
)


def run_argv(argv: list[str]) -> int:
    """Load the checkpoint and save it merged or by the task's `export`; print the written files.

    Args:
        argv: "export" and its flags. `--merge` and `--quantize=SCHEME` save the weights with the
            adapters merged; other flags are arguments of the method `export` of the task.

    Returns:
        The exit status.
    """
    # joins the files of a sharded checkpoint into one, without building the model
    if any(word.startswith("--consolidate") for word in argv):
        # `checkpoint_from_argv`: the checkpoint's path, and the other flags as (name, value)
        return consolidate(*checkpoint_from_argv(argv, "export"))
    should_merge = "--merge" in argv
    argv = [word for word in argv if word != "--merge"]
    is_merged = should_merge or any(word.startswith("--quantize") for word in argv)
    # any_task: the weights of a task without a method `export` can be merged too
    module, path, typed_flags = load_from_argv(argv, "export", any_task=is_merged)
    # the task's method; None if `save_merged` writes the files
    method: Any = None if is_merged else module.export  # type: ignore[assignment]
    flags = MERGE_FLAGS if is_merged else method_flags.method_flags(method)
    # flags: by name, the type and the default. The typed texts are converted to these types.
    arguments = method_flags.convert_flags(typed_flags, flags, "export")
    for name, flag in flags.items():
        if flag.default is Parameter.empty and name not in arguments:
            example = method_flags.EXAMPLE_VALUES.get(name, "exported")
            raise UsageError(f"export needs a {name}", flag=f"--{name}={example}")
    if "folder" in arguments:
        # raises an error if the folder could not be created or written to
        output_path.check_writable(arguments["folder"], "folder", is_file=False)
    try:
        paths = _save_export(module, path, arguments, should_merge, method)
    except SafetensorError as error:  # not an OSError, and its message does not name the file
        problem = f"{arguments['folder']} cannot be written: {error}"
        raise CheckpointError(
            problem, hint="free disk space, then run the same command again", exit_status=1
        ) from error
    print(f"written: {paths}")
    return 0


def _save_export(
    module: TaskModule, path: Path, arguments: dict[str, Any], merge: bool, method: Any
) -> str:
    if method is None:
        folder, quantization_scheme = Path(arguments["folder"]), arguments.get("quantize")
        return save_merged(module, path, folder, merge, quantization_scheme)
    merge_adapters(module)
    return method(**arguments)


def merge_adapters(module: TaskModule) -> list[str]:
    """Merge the LoRA adapters and dequantize all layers; return the names of the merged layers.

    Raises:
        UsageError: two names of one tied weight have different values after the merge.
    """
    tied_names = _tied_names(module)  # pairs of names; found before the merge changes the layers
    # adds each adapter's product of matrices to the weight of its layer
    names = merge_lora(module)
    for layer in module.modules():
        if hasattr(layer, "dequantize"):
            layer.dequantize()  # pyright: ignore[reportCallIssue]
    state = module.state_dict()
    for one, other in tied_names:
        if not torch.equal(state[one], state[other]):
            raise UsageError(
                f"{one} and {other} share one weight in this model, but differ after the merge, so "
                "a plain checkpoint cannot store them",
                hint="train with --model.tie_embeddings=false, or without adapters on these layers",
            )
    return names


def save_merged(
    module: TaskModule,
    path: Path,
    folder: Path,
    requires_adapters: bool,
    quantization_scheme: str | None,
) -> str:
    """Save model.ckpt and model.safetensors in a folder, in float or in a quantization scheme.

    Args:
        module: the loaded model, which is changed: adapters are merged, layers quantized.
        path: its checkpoint; all but the state of the run is copied to model.ckpt.
        folder: the output folder.
        requires_adapters: whether a model without adapters is an error.
        quantization_scheme: the scheme, such as int8; None for float.

    Returns:
        The written files, for the output.
    """
    if requires_adapters and not lora_layers(module):
        raise UsageError(
            f"{path} has no adapters to merge",
            flag="--quantize=int8",
        )
    target = folder / "model.ckpt"
    if target.exists() and target.samefile(path):
        raise UsageError(
            f"{target} is the checkpoint to export, and would be overwritten",
            flag=f"--folder={folder}_2",
        )
    merge_adapters(module)
    # read again, for its other sections: hyperparameters, tokenizer, config
    checkpoint = AtomicCheckpointIO().load_checkpoint(path)
    # RUN_KEYS: sections of the run (optimizer states, loops, ...), of the transforms, and the old
    # weights
    checkpoint = {key: value for key, value in checkpoint.items() if key not in RUN_KEYS}
    config = checkpoint.get("ravine", {}).get("config")
    if config:  # the saved weights no longer need the callbacks that transform the net
        checkpoint["ravine"]["config"] = remove_transforms(config)
    if quantization_scheme is not None:
        quantization = Quantization(quantization_scheme)  # pyright: ignore[reportArgumentType]
        # replaces the weights of the linear layers by quantized ones
        quantize_module(module, quantization_scheme)
        arguments = quantization.to_config()
        # tells `load_model` to quantize the layers before it loads the weights
        checkpoint["transforms"] = {"quantize": {"class": "Quantization", "arguments": arguments}}
        if config:
            spec = {"class_path": "ravine.callbacks.Quantization", "init_args": arguments}
            checkpoint["ravine"]["config"]["trainer.callbacks"] += [spec]
    tensors: dict[str, Tensor] = {
        name: value.detach().cpu().clone() for name, value in module.state_dict().items()
    }
    from safetensors.torch import save_file

    # writes a temporary file, and gives it the name when it is complete
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


def consolidate(path: Path, typed_flags: list[tuple[str, str]]) -> int:
    """Save a sharded checkpoint, or any other, as one new file."""
    (_, target), *other_flags = typed_flags
    if other_flags or not target:
        flag = f"--{other_flags[0][0]}" if other_flags else "a file name"
        problem = f"export --consolidate {'takes no ' if other_flags else 'needs '}{flag}"
        flag = f"{program_name()} export --ckpt_path={path} --consolidate=model.ckpt"
        raise UsageError(problem, flag=flag)
    if Path(target).exists():
        new_name = Path(target).with_stem(f"{Path(target).stem}_2")
        raise UsageError(f"{target} already exists", flag=f"--consolidate={new_name}")
    output_path.check_writable(target, "consolidate", is_file=True)
    files = AtomicCheckpointIO()
    files.save_checkpoint(files.load_checkpoint(path), target)
    print(f"written: {target}")
    return 0
