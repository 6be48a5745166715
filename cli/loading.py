"""Load a trained model from a checkpoint, without a trainer: `ravine.load_model`."""

import os
import shlex
from collections.abc import Iterable, Mapping
from importlib import import_module
from pathlib import Path
from typing import IO, Any, cast

import torch
from lightning.pytorch.core import saving

import ravine.callbacks  # checkpoints name callbacks that transformed their net
import ravine.lightning_modules
from ravine.callbacks.transforms.base import apply_saved_transforms
from ravine.errors import MissingFileError, UsageError, sort_by_similarity
from ravine.lightning_modules import TaskModule
from ravine.lightning_modules.task_module import imported_subclasses
from ravine.strategies.checkpoint.atomic_io import AtomicCheckpointIO, CheckpointError, find_damage

from . import resume_path
from .checkpoint_metadata import load_metadata, saved_config_of
from .commands import method_flags
from .config.trust import TrustPolicy, split_trust_flags
from .error_report import program_name
from .run_folders import index

NAME_KEY, ROOT_KEY = (
    "trainer.name",
    "trainer.default_root_dir",
)  # keys of the folder that `last` and `auto` search


def load_model(
    path: str | Path | IO[bytes],
    trust: Iterable[str] = (),
    *,
    task: type[TaskModule] | None = None,
    map_location: Any = "cpu",
    hparams_file: str | Path | None = None,
    strict: bool | None = None,
    weights_only: bool | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> TaskModule:
    """Load a model from its checkpoint alone, with its LoRA adapters and quantized weights.

        from ravine import load_model
        model = load_model("runs/shakespeare/lora/version_0/checkpoints/last.ckpt")
        print(model.generate("ARIEL:"))

    `LanguageModel.load_from_checkpoint(path)` does the same for a known class. For a
    LightningModule that is no TaskModule: build it, then call
    `ravine.callbacks.transforms.base.reapply`.

    Args:
        path: the checkpoint: a file, a folder, a URL, or an open file. The class of a checkpoint
            from a URL or an open file must be imported already.
        trust: packages or modules whose classes the checkpoint may name. Importing a module runs
            its code, so other modules are rejected. `load_model(path, trust=["mine"])`.
        task: the class, or a base class; by default the class that the checkpoint names.
        map_location: device of the tensors, as in `torch.load`; None: the device they were saved
            from, or the CPU if this machine lacks it.
        hparams_file: .yaml or .csv file whose hyperparameters replace those of the checkpoint.
        strict: whether weight names must match exactly; by default the model's `strict_loading`.
        weights_only: False allows any pickled object; use it only for checkpoints that you trust.
        overrides: arguments of the class that replace saved ones.
    """
    # raises an error for a device that this machine lacks
    check_location(map_location)
    path = Path(path) if isinstance(path, os.PathLike) else path
    if task is None:
        is_local = isinstance(path, Path) or (isinstance(path, str) and "://" not in path)
        # the base class finds a subclass that is already imported, by the name in the checkpoint
        task = find_task_class(Path(cast(str, path)), trust) if is_local else TaskModule
    # `where_saved` keeps the device of each tensor if this machine has it
    device = where_saved if map_location is None else map_location
    # verifies that the file is complete, then loads it
    checkpoint = AtomicCheckpointIO().load_checkpoint(path, device, weights_only)
    if hparams_file is not None:
        key = task.CHECKPOINT_HYPER_PARAMS_KEY
        checkpoint = checkpoint | {key: hyperparameters_in(Path(hparams_file))}
    load_kwargs: dict[str, Any] = {"strict": strict, "overrides": overrides}
    # builds the model by its saved hyperparameters. `apply_saved_transforms` adds adapters and
    # quantized layers before the weights are loaded.
    model = task.from_checkpoint_dict(
        checkpoint, apply_transforms=apply_saved_transforms, **load_kwargs
    )
    if isinstance(map_location, str | torch.device):  # tensors of a folder are loaded on the CPU
        return model.to(map_location)
    tensors = (t for t in checkpoint["state_dict"].values() if isinstance(t, torch.Tensor))
    return model.to(next((t.device for t in tensors), torch.device("cpu")))


def where_saved(storage: torch.UntypedStorage, location: str) -> torch.UntypedStorage | None:
    """A `map_location`: the device a tensor was saved from if this machine has it, else the CPU."""
    if location in ("cpu", "meta"):
        return storage
    device = torch.device(location)
    backend = getattr(torch, device.type, None)  # torch.cuda, torch.mps, torch.xpu
    count = backend.device_count() if backend is not None else 0
    return None if (device.index or 0) < count else storage.cpu()


def check_location(map_location: Any) -> None:
    """Raise an error for a device that this machine lacks; torch would report a damaged file.

    Args:
        map_location: as in `torch.load`; a function is not checked.
    """
    locations = map_location.values() if isinstance(map_location, dict) else [map_location]
    for location in locations:
        if not isinstance(location, str | torch.device):
            continue
        # the problem of the meta device
        problem = f"load_model: a tensor on map_location={str(location)!r} has no values"
        try:
            is_usable = not torch.empty(0, device=location).is_meta
        except Exception as error:  # torch raises several exception types
            is_usable, message = False, " ".join(str(error).split())[:80]
            problem = (
                f"load_model: this machine has no device for map_location={str(location)!r} "
                f"({message})"
            )
        if not is_usable:
            allowed = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
            raise UsageError(problem, allowed, "use map_location='cpu'")


def hyperparameters_in(file: Path) -> dict[str, Any]:
    """Read hyperparameters from a .yaml or .csv file, as Lightning's loggers write it.

    Raises:
        UsageError: the file has another suffix, or holds no mapping.
        MissingFileError: it does not exist.
    """
    # functions of lightning.pytorch.core.saving
    readers = {
        ".csv": saving.load_hparams_from_tags_csv,
        ".yml": saving.load_hparams_from_yaml,
        ".yaml": saving.load_hparams_from_yaml,
    }
    if file.suffix.lower() not in readers:
        raise UsageError(
            f"load_model: the format of hparams_file={str(file)!r} is not known",
            [*readers],
            "use hparams_file='hparams.yaml'",
        )
    if not file.is_file():
        raise MissingFileError(
            f"load_model: hparams_file={str(file)!r} does not exist",
            hint="remove hparams_file, because the checkpoint has the hyperparameters",
        )
    # a YAML file may hold a list or a single value instead of names and values
    values = readers[file.suffix.lower()](file)
    if not isinstance(values, Mapping):
        raise UsageError(
            f"load_model: hparams_file={str(file)!r} contains a {type(values).__name__}",
            "a mapping of names to values",
            "remove hparams_file, because the checkpoint has the hyperparameters",
        )
    return dict(values)


def load_from_argv(
    argv: list[str], command: str, any_task: bool = False
) -> tuple[TaskModule, Path, list[tuple[str, str]]]:
    """Load the model of the checkpoint in `--ckpt_path`.

    Args:
        argv: the command and its flags.
        command: generate or export, which is also the method that the task must have.
        any_task: whether the task needs no such method.

    Returns:
        The model, the path of the checkpoint, and the other flags as (name, value).
    """
    # trusted: packages of --trust, whose classes the checkpoint may name
    argv, trusted = split_trust_flags(argv)
    path, typed_flags = checkpoint_from_argv(argv, command)
    # the class whose weights the checkpoint holds
    task = find_task_class(path, trusted)
    if not any_task and not callable(getattr(task, command, None)):
        # `list_tasks`: Ravine's tasks by class name
        capable_tasks = [n for n, c in list_tasks().items() if callable(getattr(c, command, None))]
        raise UsageError(
            f"{command} is not possible with the {task.__name__} in {path}",
            capable_tasks,
            flag=f"{program_name()} test --ckpt_path={path}",
            label="possible with",
        )
    return load_model(path, trusted), path, typed_flags


def checkpoint_from_argv(argv: list[str], command: str) -> tuple[Path, list[tuple[str, str]]]:
    """Return the path of the checkpoint in `--ckpt_path`, and the other flags as (name, value).

    `auto`, `last`, `best` and names of runs are resolved to a file. All checksums are verified.

    Args:
        argv: the command and its flags.
        command: generate or export.

    Raises:
        UsageError: `--ckpt_path` is missing, or there is no such checkpoint.
        CheckpointError: the checkpoint is damaged.
    """
    suggested = "folder" if command == "export" else "prompt"
    typed_flags = method_flags.parse_flags(argv[1:], suggested)
    request = dict(typed_flags).get("ckpt_path")
    if request is None:
        problem = f"{command} needs a trained model"
        raise UsageError(
            problem,
            ["last", "auto", "a file"],
            flag=shlex.join([program_name(), command, "--ckpt_path=last", *argv[1:]]),
            label="checkpoints",
        )
    flag_values = dict(typed_flags)
    # ROOT_KEY and NAME_KEY: trainer.default_root_dir and trainer.name
    root = flag_values.get(ROOT_KEY, "runs")
    if request in ("auto", "last", "best"):

        def accepts(class_path: str) -> bool:
            # Only a known task without the method `generate` is passed over.
            known_task = list_tasks().get(class_path.rpartition(".")[2])
            return known_task is None or command != "generate" or hasattr(known_task, command)

        name = flag_values.get(NAME_KEY)
        # the newest complete checkpoint of the run name (of all without one) that `accepts` admits
        path = resume_path.find_latest(command, request, name, root, accepts)
    # a pair (run, whether its best checkpoint is meant) for the name of a run, else None
    elif index.split_run_request(request, Path(root)):
        path = resume_path.find_in_run(request, root)
    else:
        path = Path(request)
    if path is None:
        raise UsageError(
            "no checkpoint exists", flag=f"{program_name()} fit --config shakespeare/quick"
        )
    # None for a complete file with correct checksums
    if reason := find_damage(path):  # a flipped byte would give wrong but plausible samples
        problem = f"the checkpoint {path} cannot be used: {reason}"
        raise CheckpointError(problem, "a complete checkpoint", flag="--ckpt_path=auto")
    return path, [
        (name, v) for name, v in typed_flags if name not in ("ckpt_path", NAME_KEY, ROOT_KEY)
    ]


def list_tasks() -> dict[str, type[TaskModule]]:
    """Return Ravine's task classes by name."""
    module_values = vars(ravine.lightning_modules).values()
    task_classes = [c for c in module_values if isinstance(c, type) and issubclass(c, TaskModule)]
    return {c.__name__: c for c in task_classes if c is not TaskModule}


def find_task_class(path: Path, trust: Iterable[str] = ()) -> type[TaskModule]:
    """Return the class whose weights a checkpoint holds, from its saved config or class name.

    Args:
        path: the checkpoint.
        trust: packages or modules outside of Ravine that may be imported.

    Raises:
        UsageError: the class is not trusted, or is not a task.
    """
    # without the values of the tensors; imports nothing
    checkpoint = load_metadata(path)
    config = saved_config_of(checkpoint, path).get("model") or {}
    # A command saves the dotted path of the class; a script only its name.
    name = config.get("class_path") or checkpoint.get("task", "")
    name = name if isinstance(name, str) else ""
    module, _, class_name = name.rpartition(".")
    if module and not module.startswith("ravine."):
        # raises an error if the class may not be imported, because that runs its code
        TrustPolicy(trust).require_admitted(name, f"model in {path}")
        task_class = getattr(import_module(module), class_name, None)
        if isinstance(task_class, type) and issubclass(task_class, TaskModule):
            return task_class
    # a task of a script, which has imported its class
    imported = [c for c in imported_subclasses(TaskModule) if c.__name__ == class_name]
    # two classes of that name would be ambiguous
    if class_name not in list_tasks() and not module and len(imported) == 1:
        return imported[0]
    if class_name not in list_tasks():
        raise UsageError(
            f"{path} contains the weights of {name or 'another program'}, which is not a task",
            sort_by_similarity(class_name, list_tasks()),
            hint="load the checkpoint of one of these tasks",
            flag="--ckpt_path=ANOTHER",
        )
    return list_tasks()[class_name]
