"""What `lightning list` reads from source text equals the imported registries and signatures."""

import dataclasses
import importlib
import inspect
from pathlib import Path
from typing import Any, get_args

import lightning as L
import lightning.pytorch.callbacks
import pytest
import torch.optim
from lightning.pytorch.strategies import Strategy, StrategyRegistry
from torch.optim import Optimizer

import ravine.callbacks
import ravine.datamodules
import ravine.lightning_modules
import ravine.strategies
from ravine.callbacks import OptimizerPlan
from ravine.callbacks.optimizers import lr_schedules
from ravine.cli.config import typehints
from ravine.cli.discovery import registry, source_index
from ravine.cli.discovery.registry import Entry
from ravine.datamodules import downloads, images
from ravine.lightning_modules import Reward, TaskModule
from ravine.lightning_modules.diffusion_core import noise_schedules, samplers

ENTRIES = [entry for kind in registry.KINDS for entry in registry.installed_entries(kind)]


def is_base(cls: type) -> bool:
    return cls is L.Callback or cls.__name__.startswith("Base")


def exported_classes(module: Any, base: type) -> set[str]:
    """The public subclasses of a class in a package."""
    named = [getattr(module, name) for name in module.__all__]
    return {c.__name__ for c in named if isinstance(c, type) and issubclass(c, base)}


def expected_names() -> dict[str, set[str]]:
    """The names of each list, from the imported registries."""
    callbacks = exported_classes(ravine.callbacks, L.Callback)
    plans = exported_classes(ravine.callbacks, OptimizerPlan)
    stock = {
        name
        for name in exported_classes(lightning.pytorch.callbacks, L.Callback)
        if not is_base(getattr(lightning.pytorch.callbacks, name))
    }
    optimizers = exported_classes(ravine.callbacks, Optimizer)
    torch_optimizers = exported_classes(torch.optim, Optimizer) - {"Optimizer"}
    tasks = exported_classes(ravine.lightning_modules, TaskModule) - {"TaskModule"}
    sources = {*get_args(downloads.TextName), *images.NAMED_DATASETS}
    noises = get_args(noise_schedules.NoiseScheduleName)
    return {
        "configs": set(),
        "callbacks": (callbacks - plans) | stock,
        "optimizers": plans | optimizers | torch_optimizers,
        "strategies": {*ravine.strategies.STRATEGY_PRESETS, *registry.LIGHTNING_STRATEGIES}
        | exported_classes(ravine.strategies, Strategy),
        "tasks": tasks,
        "data": exported_classes(ravine.datamodules, L.LightningDataModule) | sources,
        "rewards": exported_classes(ravine.lightning_modules, Reward) - {"Reward"},
        "samplers": {*samplers.SAMPLERS},
        "schedules": {*lr_schedules.SCHEDULE_SHAPES, *noises},
    }


@pytest.mark.parametrize("kind", registry.KINDS)
def test_a_list_has_the_names_of_the_imported_registry(kind: str) -> None:
    names = {entry.name for entry in ENTRIES if entry.kind == kind}
    assert names == expected_names()[kind]


def test_the_strategies_of_lightning_are_in_its_registry() -> None:
    assert set(registry.LIGHTNING_STRATEGIES) - {"auto"} <= {*StrategyRegistry}
    assert registry.strategy_presets() == ravine.strategies.STRATEGY_PRESETS


def test_every_name_has_a_first_line() -> None:
    undocumented = {e.name for e in ENTRIES if not e.summary}
    assert undocumented <= {"SpikeDetection"}  # Lightning's has no docstring


def imported(entry: Entry) -> Any:
    module, _, name = entry.path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def inspected(cls: Any) -> dict[str, inspect.Parameter]:
    """The arguments of a signature that a config may set, by name."""
    parameters = inspect.signature(cls).parameters
    variadic = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return {n: p for n, p in parameters.items() if p.kind not in variadic and n != "params"}


def read_default(parameter: source_index.Parameter) -> Any:
    """The default as a value; the source text of one that only an import can know."""
    try:
        return source_index.evaluate(parameter.default or "", parameter.source)
    except source_index.UnknownValueError:
        return parameter.default


def plain_default(value: Any) -> Any:
    """The default of a signature in the form of `read_default`."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if callable(value):
        return value.__name__
    return value


CLASSES = [e for e in ENTRIES if e.path and e.kind not in ("samplers", "schedules")]
# Defaults that are objects of torch or an enum, and are shown as they are written.
OBJECTS = {"torch.device('cpu')", "Interval.step"}


@pytest.mark.parametrize("kind", sorted({entry.kind for entry in CLASSES}))
def test_arguments_read_from_source_equal_the_signature(kind: str) -> None:
    for entry in (e for e in CLASSES if e.kind == kind):
        parameters = {p.name: p for p in entry.parameters or ()}
        for name, expected in inspected(imported(entry)).items():
            p = parameters[name]
            where = f"{entry.path}: {name}"
            assert (p.default is None) == (expected.default is expected.empty), where
            if p.default is not None and p.default not in OBJECTS:
                assert read_default(p) == plain_default(expected.default), where
            if expected.annotation is not expected.empty:
                names = vars(importlib.import_module(p.source.name))  # type: ignore[union-attr]
                hint = expected.annotation
                read = p.annotation if isinstance(hint, str) else eval(p.annotation, dict(names))
                assert read == hint, where


@pytest.mark.parametrize(
    "entry", [e for e in CLASSES if e.kind != "callbacks"], ids=lambda e: e.name
)
def test_forwarded_arguments_are_those_that_the_parser_finds(entry: Entry) -> None:
    cls = imported(entry)
    kinds = {p.kind for p in inspect.signature(cls).parameters.values()}
    names = {p.name for p in entry.parameters or ()}
    if inspect.Parameter.VAR_KEYWORD in kinds:  # net_kwargs of LanguageModel
        actions = typehints.class_parser(cls, 0)._actions
        found = {a.dest for a in actions if "help" not in a.dest}
        assert names == found
    else:
        assert names == set(inspected(cls))


def test_docstrings_read_from_source_equal_those_of_the_classes() -> None:
    for entry in CLASSES:
        text = vars(imported(entry)).get("__doc__")
        if text and not entry.path.startswith("torch.optim._muon"):  # it formats a tuple
            assert entry.docstring == inspect.cleandoc(text), entry.path


def test_every_argument_of_a_docstring_is_an_argument_of_the_class() -> None:
    for entry in (e for e in CLASSES if e.path.startswith("ravine.")):
        described = source_index.argument_descriptions(entry.docstring)
        names = {p.name for p in entry.parameters or ()}
        assert {*described} - names <= {"params", "kwargs", "net_kwargs"}, entry.path


FILE = '''
"""A file of a user."""
import torch
from base import Base as B
import lightning as L

WIDTH = 2**3

class Mine(B):
    """One of mine.

    Args:
        width: how wide it is,
            in units.
    """
    def __init__(self, width: int = WIDTH, *, names: list[str] = [], **rest):
        super().__init__(3, **rest)

class Plain(L.Callback): pass
class Unrelated: pass
class _Hidden(L.Callback): pass
'''
BASE = """
import lightning as L
class Base(L.Callback):
    def __init__(self, first, second: "float | None" = None, width=1): pass
"""


@pytest.fixture
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with two files of a user."""
    (tmp_path / "mine.py").write_text(FILE)
    (tmp_path / "base.py").write_text(BASE)
    (tmp_path / "broken.py").write_text("class Broken(:")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_own_classes_are_listed_by_their_dotted_path(own_folder: Path) -> None:
    entries = {entry.name: entry for entry in registry.user_entries("callbacks")}
    assert sorted(entries) == ["base.Base", "mine.Mine", "mine.Plain"]
    assert [*registry.user_entries("tasks")] == []
    user_entry = entries["mine.Mine"]
    assert user_entry.summary == "One of mine."
    words = [(p.name, p.annotation, p.default) for p in user_entry.parameters or ()]
    assert words == [
        ("width", "int", "WIDTH"),
        ("names", "list[str]", "[]"),
        ("second", "float | None", "None"),
    ]
    width = (user_entry.parameters or [])[0]
    assert width.description == "how wide it is, in units."
    assert source_index.default_value(width) == 8
    assert (entries["mine.Plain"].parameters) == []


def test_a_circle_of_bases_and_imports_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "one.py").write_text("from two import B\nclass A(B): pass\nx = y\ny = x\n")
    (tmp_path / "two.py").write_text("from one import A\nclass B(A): pass\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert [*registry.user_entries()] == []
    assert source_index.find_definition("one.nothing") is None
    assert source_index.find_definition("one.x") is not None


@pytest.mark.parametrize(
    ("annotation", "values"),
    [
        ("Literal['a', 'b'] | None", ["a", "b"]),
        ("Name", ["x", "y"]),
        ("Optional[Name]", []),
        ("int | str", []),
        ("not python (", []),
    ],
)
def test_the_values_of_a_literal_are_found_through_its_name(
    annotation: str, values: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "alias.py").write_text("from typing import Literal\nName = Literal['x', 'y']\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert source_index.literal_choices(annotation, source_index.find_source("alias")) == values
