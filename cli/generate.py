"""`generate`: let a trained model write, draw, play; what it takes is said by its own method.

lightning generate --ckpt_path last --prompt "ROMEO:" --temperature 0.8
"""

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

import ravine.lightning_modules
from ravine.lightning_modules import TaskModule

from . import newest, restore, signature
from .errors import Mistake, unknown

OURS = {"prompt_file": str, "device": str}  # flags that no task has to know

NAME, ROOT = "trainer.name", "trainer.default_root_dir"  # where `last` and `auto` look


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


def prepare(argv: list[str], command: str) -> tuple[TaskModule, list[tuple[str, str]]]:
    """The model of the checkpoint that was named, and the other flags."""
    given = signature.pairs(argv[1:])
    chosen = dict(given).get("ckpt_path")
    if chosen is None:
        wrong = f"{command} needs a trained model"
        raise Mistake(
            wrong, ["last", "auto", "a file"], f"{command} --ckpt_path=last", "checkpoints"
        )
    found = dict(given)
    if chosen in ("auto", "last"):
        root = found.get(ROOT, "runs")
        path = newest.newest(command, chosen, found.get(NAME), root)
    else:
        path = Path(chosen)
    if path is None:
        raise Mistake("there is no checkpoint", [], f"{command} --ckpt_path=FILE")
    task = task_of(path)
    if not callable(getattr(task, command, None)):
        able = [n for n, c in tasks().items() if callable(getattr(c, command, None))]
        wrong = f"a {task.__name__} cannot {command}"
        raise Mistake(
            wrong, able, f"{command} --ckpt_path=FILE, of one that can", "models that can"
        )
    module = task.load(path)
    return module, [(name, v) for name, v in given if name not in ("ckpt_path", NAME, ROOT)]


def tasks() -> dict[str, type[TaskModule]]:
    """The tasks of this project, by name."""
    found = vars(ravine.lightning_modules).values()
    return {c.__name__: c for c in found if isinstance(c, type) and issubclass(c, TaskModule)}


def task_of(path: Path) -> type[TaskModule]:
    """The class whose weights a checkpoint holds: by its saved configuration, or by its name."""
    checkpoint = restore.read(path)
    config = checkpoint.get("ravine", {}).get("config", {}).get("model") or {}
    name = config.get("class_path") or checkpoint.get("task", "")
    module, _, last = name.rpartition(".")
    if module and not module.startswith("ravine."):
        found = getattr(import_module(module), last, None)
        if isinstance(found, type) and issubclass(found, TaskModule):
            return found
    if last not in tasks():
        wrong = f"{path} holds the weights of {name or 'another program'}"
        raise unknown(wrong, last, tasks(), lambda near: f"--ckpt_path=FILE, of a {near}", "FILE")
    return tasks()[last]


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
        sys.stdout.write(prompt)

        def piece(text: str) -> None:
            sys.stdout.write(text)
            sys.stdout.flush()

        method(**arguments, show=piece)
        sys.stdout.write("\n")
        return
    texts = method(**arguments)
    for number, text in enumerate(texts, 1):
        sys.stdout.write(f"--- {number} of {len(texts)} ---\n{text}\n")
