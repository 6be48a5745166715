"""A trained model by its checkpoint: for commands that need nothing else, and no trainer."""

from collections.abc import Iterable
from importlib import import_module
from pathlib import Path

import ravine.callbacks  # a checkpoint names callbacks that changed its net
import ravine.lightning_modules
from ravine.callbacks.transforms import reapply
from ravine.errors import UsageError
from ravine.lightning_modules import TaskModule
from ravine.strategies.checkpoint_io import AtomicCheckpointIO, CheckpointError, check

from . import newest, restore, signature
from .errors import unknown_name
from .trust import Trust, packages

NAME, ROOT = "trainer.name", "trainer.default_root_dir"  # where `last` and `auto` look


def load(path: str | Path, trust: Iterable[str] = ()) -> TaskModule:
    """A trained model by its checkpoint alone, with the adapters and quantized weights it has.

    from ravine.cli.trained import load
    print(load("runs/shakespeare/lora/version_0/checkpoints/step=000300.ckpt").generate("ARIEL:"))

    `TaskModule.load` does the same for nets that nothing has changed. Of a LightningModule of your
    own: build it, then `ravine.callbacks.transforms.reapply(module, checkpoint)`.

    Args:
        path: the checkpoint, a file or a folder.
        trust: packages or modules of other people whose classes it may name: importing one runs
            its code, so it is refused without. `load(path, trust=["mine"])`.
    """
    task = task_of(Path(path), trust)
    return task.restored(AtomicCheckpointIO().load_checkpoint(path), reapply)


def prepare(
    argv: list[str], command: str, any_task: bool = False
) -> tuple[TaskModule, Path, list[tuple[str, str]]]:
    """The model of the checkpoint that was named, its path, and the other flags."""
    argv, trusted = packages(argv)
    path, given = locate(argv, command)
    task = task_of(path, trusted)
    if not any_task and not callable(getattr(task, command, None)):
        able = [n for n, c in tasks().items() if callable(getattr(c, command, None))]
        wrong = f"a {task.__name__} cannot {command}"
        raise UsageError(
            wrong,
            able,
            flag=f"{command} --ckpt_path=FILE, of one that can",
            label="models that can",
        )
    return load(path, trusted), path, given


def locate(argv: list[str], command: str) -> tuple[Path, list[tuple[str, str]]]:
    """The checkpoint that was named, which is whole, and the other flags."""
    given = signature.pairs(argv[1:])
    chosen = dict(given).get("ckpt_path")
    if chosen is None:
        wrong = f"{command} needs a trained model"
        raise UsageError(
            wrong,
            ["last", "auto", "a file"],
            flag=f"{command} --ckpt_path=last",
            label="checkpoints",
        )
    found = dict(given)
    if chosen in ("auto", "last"):
        root = found.get(ROOT, "runs")
        path = newest.newest(command, chosen, found.get(NAME), root)
    else:
        path = Path(chosen)
    if path is None:
        raise UsageError("there is no checkpoint", flag=f"{command} --ckpt_path=FILE")
    if reason := check(path):  # a flipped byte would write plausible nonsense
        raise CheckpointError(f"{path} cannot be used: {reason}; take another, or type auto")
    return path, [(name, v) for name, v in given if name not in ("ckpt_path", NAME, ROOT)]


def tasks() -> dict[str, type[TaskModule]]:
    """The tasks of this project, by name."""
    found = vars(ravine.lightning_modules).values()
    return {c.__name__: c for c in found if isinstance(c, type) and issubclass(c, TaskModule)}


def task_of(path: Path, trust: Iterable[str] = ()) -> type[TaskModule]:
    """The class whose weights a checkpoint holds: by its saved configuration, or by its name."""
    checkpoint = restore.read(path)
    config = restore.config_of(checkpoint, path).get("model") or {}
    name = config.get("class_path") or checkpoint.get("task", "")
    name = name if isinstance(name, str) else ""
    module, _, last = name.rpartition(".")
    if module and not module.startswith("ravine."):
        Trust(trust).demand(name, f"model in {path}")
        found = getattr(import_module(module), last, None)
        if isinstance(found, type) and issubclass(found, TaskModule):
            return found
    if last not in tasks():
        wrong = f"{path} holds the weights of {name or 'another program'}"
        raise unknown_name(
            wrong, last, tasks(), lambda near: f"--ckpt_path=FILE, of a {near}", "FILE"
        )
    return tasks()[last]
