"""`export`: save the weights of a trained model for other programs, with LoRA adapters merged.

lightning export --ckpt_path last --format gpt2 --folder my_gpt2
lightning export --ckpt_path last --merge --folder plain
lightning export --ckpt_path runs/big/version_0/checkpoints/step=001000.ckpt --consolidate big.ckpt
"""

from inspect import Parameter
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ravine.errors import UsageError
from ravine.lightning_modules import TaskModule
from ravine.strategies.checkpoint.atomic_io import AtomicCheckpointIO, CheckpointError

from ..loading import checkpoint_from_argv, load_from_argv
from . import method_flags, output_path
from .merge import merge_adapters, save_merged

QUANTIZATION_SCHEMES = ("int8", "nf4")
MERGE_FLAGS = {  # flags of --merge and --quantize, which need no method of the task
    "folder": method_flags.MethodFlag(str, Parameter.empty),
    "quantize": method_flags.MethodFlag(str, None, QUANTIZATION_SCHEMES),
}


def run_argv(argv: list[str]) -> int:
    """Load the checkpoint and save it merged or by the task's `export`; print the written files."""
    if any(word.startswith("--consolidate") for word in argv):
        return consolidate(*checkpoint_from_argv(argv, "export"))
    should_merge = "--merge" in argv
    argv = [word for word in argv if word != "--merge"]
    is_merged = should_merge or any(word.startswith("--quantize") for word in argv)
    module, path, typed_flags = load_from_argv(argv, "export", any_task=is_merged)
    method: Any = None if is_merged else module.export  # type: ignore[assignment]
    flags = MERGE_FLAGS if is_merged else method_flags.method_flags(method)
    arguments = method_flags.convert_flags(typed_flags, flags, "export")
    for name, flag in flags.items():
        if flag.default is Parameter.empty and name not in arguments:
            raise UsageError(f"export needs a {name}", flag=f"--{name}=NAME")
    if "folder" in arguments:
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


def consolidate(path: Path, typed_flags: list[tuple[str, str]]) -> int:
    """Save a sharded checkpoint, or any other, as one new file."""
    (_, target), *other_flags = typed_flags
    if other_flags or not target:
        flag = f"--{other_flags[0][0]}" if other_flags else "a file's name"
        problem = f"export --consolidate {'takes no ' if other_flags else 'needs '}{flag}"
        raise UsageError(problem, flag=f"export --ckpt_path={path} --consolidate=FILE.ckpt")
    if Path(target).exists():
        raise UsageError(f"{target} is there already", flag="--consolidate=ANOTHER_NAME.ckpt")
    output_path.check_writable(target, "consolidate", is_file=True)
    files = AtomicCheckpointIO()
    files.save_checkpoint(files.load_checkpoint(path), target)
    print(f"written: {target}")
    return 0
