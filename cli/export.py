"""`export`: write a trained model's weights for other programs.

lightning export --ckpt_path last --format gpt2 --folder my_gpt2
"""

from inspect import Parameter
from typing import Any

from . import signature
from .errors import Mistake
from .trained import prepare


def run(argv: list[str]) -> int:
    """Load the checkpoint, call `export` with what was typed, say what was written."""
    module, given = prepare(argv, "export")
    method: Any = module.export  # type: ignore[assignment]
    known = signature.flags(method)
    arguments = signature.read(given, known, "export")
    for name, flag in known.items():
        if flag.default is Parameter.empty and name not in arguments:
            raise Mistake(f"export needs a {name}", [], f"--{name}=NAME")
    print(f"written: {method(**arguments)}")
    return 0
