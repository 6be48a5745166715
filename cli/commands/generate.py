"""`generate`: let a trained model write or draw; what it takes is said by its own method.

lightning generate --ckpt_path last --prompt "ROMEO:" --temperature 0.8
lightning generate --ckpt_path last --labels 0-9 --guidance 0.5 --steps 20
lightning generate --ckpt_path last --labels cat,dog
"""

import codecs
import sys
from itertools import chain, count
from pathlib import Path
from typing import Any

import torch

from ravine.errors import UsageError
from ravine.lightning_modules import TaskModule
from ravine.lightning_modules.diffusion_core.image_grid import format_of

from ..error_report import unknown_name
from ..loading import prepare
from . import method_flags as signature
from . import output_path as places

DEVICE = {"device": str}  # flags that no task has to know
TEXTS = DEVICE | {"prompt_file": str}
PICTURES = DEVICE | {"file": str, "folder": str}


def run(argv: list[str]) -> int:
    """Load the checkpoint, call `generate` with what was typed, show what comes."""
    module, _, given = prepare(argv, "generate")
    known = signature.flags(module.generate)  # type: ignore[arg-type]
    writes = "prompt" in known
    ours = TEXTS if writes else PICTURES
    known |= {name: signature.Flag(kind, None) for name, kind in ours.items()}
    arguments = signature.read(given, known, "generate")
    module.to(chosen(arguments.pop("device", None)))
    if not writes:
        file, folder = arguments.pop("file", None), arguments.pop("folder", None)
        draw(module, arguments, file, folder)
        return 0
    file = arguments.pop("prompt_file", None)
    if file is not None:
        arguments["prompt"] = prompts(Path(file), arguments.get("prompt"))
    show(module, arguments)
    return 0


def chosen(name: str | None) -> torch.device:
    """The device of that name, by default the fastest that is here."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    there = ["cpu", *(f"cuda:{n}" for n in range(torch.cuda.device_count()))]
    there += ["cuda"] if torch.cuda.is_available() else []
    there += ["mps"] if torch.backends.mps.is_available() else []
    if name not in there:
        raise unknown_name(
            f"no device {name!r} is here", name, there, lambda n: f"--device={n}", "cpu"
        )
    return torch.device(name)


def draw(
    module: TaskModule, arguments: dict[str, Any], file: str | None, folder: str | None
) -> None:
    """Write pictures as one grid, and each into a file of its own if there is a folder for them."""
    file = free("samples", ".png") if file is None else file
    format_of(file)
    places.check(file, "file", file=True)
    if folder is not None:
        if Path(folder).is_dir() and any(Path(folder).iterdir()):
            wrong = f"the folder {folder} is not empty"
            raise UsageError(wrong, ["a new one"], flag=f"--folder={folder}_2")
        places.check(folder, "folder", file=False)
    method: Any = module.generate
    pictures = method(**arguments)
    pictures.save(file)
    words = [file]
    if folder is not None:
        pictures.save_each(folder)
        words.append(f"{len(pictures.images)} files in {folder}")
    print(f"written: {', '.join(words)}")
    if not all(name.isdecimal() for name in pictures.rows):
        print(f"rows: {', '.join(pictures.rows)}")


def free(name: str, end: str) -> str:
    """A name that no file has yet: samples.png, samples_1.png, ..."""
    more = (f"{name}_{number}{end}" for number in count(1))
    return next(file for file in chain([name + end], more) if not Path(file).exists())


def prompts(file: Path, typed: Any) -> list[str]:
    """The lines of a file, one prompt each, after those typed; empty lines are left out."""
    try:
        lines = file.read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n")
    except FileNotFoundError:
        raise UsageError(f"no file {file}", flag="--prompt_file=FILE, one prompt a line") from None
    except IsADirectoryError:
        raise UsageError(
            f"{file} is a folder", flag="--prompt_file=FILE, one prompt a line"
        ) from None
    texts = [_decoded(line.removesuffix(b"\r"), file, n) for n, line in enumerate(lines, 1)]
    found = [signature.unescape(line) for line in texts if line]
    if not found:
        raise UsageError(f"{file} holds no prompt", flag="--prompt_file=FILE, one prompt a line")
    before = [typed] if isinstance(typed, str) else list(typed or [])
    return before + found


def _decoded(line: bytes, file: Path, number: int) -> str:
    """The text of a line. Only a line feed ends a line, not the other line breaks of Unicode."""
    if b"\0" in line:
        wrong = f"{file}, line {number}: no text: byte 0x00 at position {line.index(0)}"
        raise UsageError(wrong, flag=f"iconv -f utf-16 -t utf-8 '{file}' > prompts.txt")
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        encoding = "utf-16" if line[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "latin1"
        wrong = f"{file}, line {number}: not UTF-8: byte 0x{line[error.start]:02x} at position "
        fix = f"iconv -f {encoding} -t utf-8 '{file}' > prompts.txt"
        raise UsageError(f"{wrong}{error.start}", flag=fix) from None


def show(module: TaskModule, arguments: dict[str, Any]) -> None:
    """Print a single text as it is written, several one after the other."""
    method: Any = module.generate
    prompt = arguments.get("prompt", signature.flags(method)["prompt"].default)
    prompt = getattr(module, "default_prompt", None) if prompt is None else prompt
    if isinstance(prompt, str) and arguments.get("num_samples", 1) == 1:
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
