"""`export`: write a trained model's weights for other programs, adapters merged into them.

lightning export --ckpt_path last --format gpt2 --folder my_gpt2
lightning export --ckpt_path last --merge --folder plain
"""

from inspect import Parameter
from pathlib import Path
from typing import Any

from . import merged, signature
from .errors import Mistake
from .trained import prepare

SCHEMES = ("int8", "nf4")
PLAIN = {  # flags of what needs no method of the task
    "folder": signature.Flag(str, Parameter.empty),
    "quantize": signature.Flag(str, None, SCHEMES),
}


def run(argv: list[str]) -> int:
    """Load the checkpoint, write it plain or by the task's `export`, say what was written."""
    merge = "--merge" in argv
    argv = [word for word in argv if word != "--merge"]
    plain = merge or any(word.startswith("--quantize") for word in argv)
    module, path, given = prepare(argv, "export", any_task=plain)
    method: Any = None if plain else module.export  # type: ignore[assignment]
    known = PLAIN if plain else signature.flags(method)
    arguments = signature.read(given, known, "export")
    for name, flag in known.items():
        if flag.default is Parameter.empty and name not in arguments:
            raise Mistake(f"export needs a {name}", [], f"--{name}=NAME")
    if plain:
        folder, scheme = Path(arguments["folder"]), arguments.get("quantize")
        written = merged.write(module, path, folder, merge, scheme)
    else:
        merged.flatten(module)
        written = method(**arguments)
    print(f"written: {written}")
    return 0
