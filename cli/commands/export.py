"""`export`: write a trained model's weights for other programs, adapters merged into them.

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

from ..loading import locate, prepare
from . import merge as merged
from . import method_flags as signature
from . import output_path as places

SCHEMES = ("int8", "nf4")
PLAIN = {  # flags of what needs no method of the task
    "folder": signature.Flag(str, Parameter.empty),
    "quantize": signature.Flag(str, None, SCHEMES),
}


def run(argv: list[str]) -> int:
    """Load the checkpoint, write it plain or by the task's `export`, say what was written."""
    if any(word.startswith("--consolidate") for word in argv):
        return consolidate(*locate(argv, "export"))
    merge = "--merge" in argv
    argv = [word for word in argv if word != "--merge"]
    plain = merge or any(word.startswith("--quantize") for word in argv)
    module, path, given = prepare(argv, "export", any_task=plain)
    method: Any = None if plain else module.export  # type: ignore[assignment]
    known = PLAIN if plain else signature.flags(method)
    arguments = signature.read(given, known, "export")
    for name, flag in known.items():
        if flag.default is Parameter.empty and name not in arguments:
            raise UsageError(f"export needs a {name}", flag=f"--{name}=NAME")
    if "folder" in arguments:
        places.check(arguments["folder"], "folder", file=False)
    try:
        written = _written(module, path, arguments, merge, method)
    except SafetensorError as error:  # neither an OSError nor a name for what is wrong
        wrong = f"{arguments['folder']} cannot be written: {error}"
        raise CheckpointError(f"{wrong}; make room, then type the same again", 1) from error
    print(f"written: {written}")
    return 0


def _written(
    module: TaskModule, path: Path, arguments: dict[str, Any], merge: bool, method: Any
) -> str:
    if method is None:
        folder, scheme = Path(arguments["folder"]), arguments.get("quantize")
        return merged.write(module, path, folder, merge, scheme)
    merged.flatten(module)
    return method(**arguments)


def consolidate(path: Path, given: list[tuple[str, str]]) -> int:
    """Write a checkpoint in parts, or any other, as one new file."""
    (_, target), *others = given
    if others or not target:
        flag = f"--{others[0][0]}" if others else "a file's name"
        wrong = f"export --consolidate {'takes no ' if others else 'needs '}{flag}"
        raise UsageError(wrong, flag=f"export --ckpt_path={path} --consolidate=FILE.ckpt")
    if Path(target).exists():
        raise UsageError(f"{target} is there already", flag="--consolidate=ANOTHER_NAME.ckpt")
    places.check(target, "consolidate", file=True)
    files = AtomicCheckpointIO()
    files.save_checkpoint(files.load_checkpoint(path), target)
    print(f"written: {target}")
    return 0
