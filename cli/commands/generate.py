"""`generate`: sample texts or images from a trained model; its flags are its `generate` arguments.

lightning generate --ckpt_path last --prompt "ROMEO:" --temperature 0.8
lightning generate --ckpt_path last --labels 0-9 --guidance_scale 0.5 --num_steps 20
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
from ravine.lightning_modules.diffusion_core.image_grid import get_pillow_format

from ..error_report import unknown_name_error
from ..loading import load_from_argv
from . import method_flags, output_path

DEVICE_FLAGS = {"device": str}  # flags that are not passed to the task
TEXT_FLAGS = DEVICE_FLAGS | {"prompt_file": str}
IMAGE_FLAGS = DEVICE_FLAGS | {"file": str, "folder": str}
PROMPT_FILE, PROMPT_FLAG = "a text file with one prompt per line", "--prompt_file=FILE"


def run_argv(argv: list[str]) -> int:
    """Load the checkpoint, call `generate` with the given flags, and print or save the samples.

    Args:
        argv: "generate", `--ckpt_path`, and flags for the arguments of the task's method
            `generate`.

    Returns:
        The exit status.
    """
    # the flags are (name, text) pairs, without --ckpt_path
    module, _, typed_flags = load_from_argv(argv, "generate")
    flags = method_flags.method_flags(module.generate)  # type: ignore[arg-type]
    is_text = "prompt" in flags  # the method of a model of texts has this argument
    extra_flags = TEXT_FLAGS if is_text else IMAGE_FLAGS
    # flags of the command itself, such as --device and --file; they are removed from `arguments`
    # below
    flags |= {
        name: method_flags.MethodFlag(flag_type, None) for name, flag_type in extra_flags.items()
    }
    arguments = method_flags.convert_flags(typed_flags, flags, "generate")
    module.to(select_device(arguments.pop("device", None)))
    if not is_text:
        file, folder = arguments.pop("file", None), arguments.pop("folder", None)
        save_images(module, arguments, file, folder)
        return 0
    file = arguments.pop("prompt_file", None)
    if file is not None:
        # the typed prompts, and the lines of the file
        arguments["prompt"] = load_prompts(Path(file), arguments.get("prompt"))
    print_texts(module, arguments)
    return 0


def select_device(name: str | None) -> torch.device:
    """Return the named device; by default cuda if it is available, else the CPU."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    available = ["cpu", *(f"cuda:{n}" for n in range(torch.cuda.device_count()))]
    available += ["cuda"] if torch.cuda.is_available() else []
    available += ["mps"] if torch.backends.mps.is_available() else []
    if name not in available:
        # suggests the nearest available device as --device=NAME, or cpu if none is near
        raise unknown_name_error(
            f"this machine has no device {name!r}",
            name,
            available,
            lambda n: f"--device={n}",
            "cpu",
        )
    return torch.device(name)


def save_images(
    module: TaskModule, arguments: dict[str, Any], file: str | None, folder: str | None
) -> None:
    """Generate images and save them as one grid, and with `folder` also each image as a file.

    Args:
        module: a model whose method `generate` returns an image grid.
        arguments: the arguments of that method.
        file: path of the grid; by default a new samples.png, samples_1.png, ...
        folder: a new or empty folder for the single images, or None.
    """
    # The paths are checked before the samples are generated, which may take minutes.
    file = unused_path("samples", ".png") if file is None else file
    get_pillow_format(file)  # raises an error for an unknown suffix
    # raises an error if the file could not be created
    output_path.check_writable(file, "file", is_file=True)
    if folder is not None:
        if Path(folder).is_dir() and any(Path(folder).iterdir()):
            problem = f"the folder {folder} is not empty"
            raise UsageError(problem, "a new or empty folder", flag=f"--folder={folder}_2")
        output_path.check_writable(folder, "folder", is_file=False)
    method: Any = module.generate
    # an ImageGrid, with the images and the names of its rows
    images = method(**arguments)
    images.save(file)
    saved_names = [file]
    if folder is not None:
        images.save_each(folder)
        saved_names.append(f"{len(images.images)} files in {folder}")
    print(f"written: {', '.join(saved_names)}")
    # rows of labels such as 0 ... 9 need no explanation
    if not all(name.isdecimal() for name in images.row_names):
        print(f"rows: {', '.join(images.row_names)}")


def unused_path(name: str, suffix: str) -> str:
    """Return the first unused file name: samples.png, samples_1.png, ..."""
    candidates = (f"{name}_{number}{suffix}" for number in count(1))
    return next(file for file in chain([name + suffix], candidates) if not Path(file).exists())


def load_prompts(file: Path, typed_prompts: Any) -> list[str]:
    """Return the typed prompts and the lines of a file, one prompt each, without empty lines."""
    try:
        lines = file.read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n")
    except FileNotFoundError:
        raise UsageError(f"the file {file} does not exist", PROMPT_FILE, flag=PROMPT_FLAG) from None
    except IsADirectoryError:
        raise UsageError(f"{file} is a folder", PROMPT_FILE, flag=PROMPT_FLAG) from None
    texts = [_decode_line(line.removesuffix(b"\r"), file, n) for n, line in enumerate(lines, 1)]
    file_prompts = [method_flags.unescape_text(line) for line in texts if line]
    if not file_prompts:
        raise UsageError(f"{file} contains no prompt", PROMPT_FILE, flag=PROMPT_FLAG)
    first_prompts = [typed_prompts] if isinstance(typed_prompts, str) else list(typed_prompts or [])
    return first_prompts + file_prompts


def _decode_line(line: bytes, file: Path, number: int) -> str:
    """Decode a line. Only a line feed ends a line, not Unicode's other line breaks."""
    if b"\0" in line:
        problem = f"{file}, line {number}, is not text: byte 0x00 at position {line.index(0)}"
        raise UsageError(problem, flag=f"iconv -f utf-16 -t utf-8 '{file}' > prompts.txt")
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        encoding = "utf-16" if line[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "latin1"
        problem = (
            f"{file}, line {number}, is not UTF-8: byte 0x{line[error.start]:02x} at position "
        )
        fix = f"iconv -f {encoding} -t utf-8 '{file}' > prompts.txt"
        raise UsageError(f"{problem}{error.start}", flag=fix) from None


def print_texts(module: TaskModule, arguments: dict[str, Any]) -> None:
    """Generate texts; print a single text while it is generated, and several texts at the end.

    Args:
        module: a model whose method `generate` returns texts.
        arguments: the arguments of that method.
    """
    method: Any = module.generate
    # the given prompt, else the method's default, else that of the model
    prompt = arguments.get("prompt", method_flags.method_flags(method)["prompt"].default)
    prompt = getattr(module, "default_prompt", None) if prompt is None else prompt
    if isinstance(prompt, str) and arguments.get("num_samples", 1) == 1:
        pending_prompt = [prompt]  # printed with the first piece, when it is known to be valid

        def print_piece(text: str) -> None:
            sys.stdout.write((pending_prompt.pop() if pending_prompt else "") + text)
            sys.stdout.flush()

        # calls `print_piece` with each new piece of the text
        method(**arguments, on_text=print_piece)
        print_piece("\n")
        return
    texts = method(**arguments)
    for number, text in enumerate(texts, 1):
        sys.stdout.write(f"--- {number} of {len(texts)} ---\n{text}\n")
