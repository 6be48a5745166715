"""`generate`: let a trained model write, draw, play; what it takes is said by its own method.

lightning generate --ckpt_path last --prompt "ROMEO:" --temperature 0.8
"""

import sys
from pathlib import Path
from typing import Any

import torch

from ravine.lightning_modules import TaskModule

from . import signature
from .errors import Mistake
from .trained import prepare

OURS = {"prompt_file": str, "device": str}  # flags that no task has to know


def run(argv: list[str]) -> int:
    """Load the checkpoint, call `generate` with what was typed, show what comes."""
    module, given = prepare(argv, "generate")
    known = signature.flags(module.generate)  # type: ignore[arg-type]
    known |= {name: signature.Flag(kind, None) for name, kind in OURS.items()}
    arguments = signature.read(given, known, "generate")
    place = arguments.pop("device", None) or ("cuda" if torch.cuda.is_available() else "cpu")
    file = arguments.pop("prompt_file", None)
    if file is not None:
        arguments["prompt"] = prompts(Path(file), arguments.get("prompt"))
    module.to(torch.device(place))
    show(module, arguments)
    return 0


def prompts(file: Path, typed: Any) -> list[str]:
    """The lines of a file, one prompt each, after those typed; empty lines are left out."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise Mistake(f"no file {file}", [], "--prompt_file=FILE, one prompt a line") from None
    except UnicodeDecodeError as error:
        wrong = f"{file} is not UTF-8: byte {error.start}"
        raise Mistake(wrong, [], f"iconv -f latin1 -t utf-8 {file} > prompts.txt") from None
    found = [signature.unescape(line) for line in lines if line]
    if not found:
        raise Mistake(f"{file} holds no prompt", [], "--prompt_file=FILE, one prompt a line")
    before = [typed] if isinstance(typed, str) else list(typed or [])
    return before + found


def show(module: TaskModule, arguments: dict[str, Any]) -> None:
    """Print a single text as it is written, several one after the other."""
    method: Any = module.generate
    prompt = arguments.get("prompt", signature.flags(method)["prompt"].default)
    count = arguments.get("num_samples", 1)
    if isinstance(prompt, str) and count == 1:
        before = [prompt]  # shown when it has been accepted

        def piece(text: str) -> None:
            sys.stdout.write((before.pop() if before else "") + text)
            sys.stdout.flush()

        method(**arguments, show=piece)
        piece("\n")
        return
    texts = method(**arguments)
    for number, text in enumerate(texts, 1):
        sys.stdout.write(f"--- {number} of {len(texts)} ---\n{text}\n")
