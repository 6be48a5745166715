"""The names that a command line accepts, by kind: `lightning list callbacks`, without torch.

Each list is read from the source text of the registry that the program itself uses: `__all__` of a
package, or a table such as SAMPLERS. Classes in the Python files of the current folder are added.
tests/cli/discovery/test_registry.py compares the lists with the imported registries.
"""

import ast
import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

from . import source_index
from .source_index import BASE_NAMES, Definition, Parameter, SourceFile, find_source

MAX_USER_FILES, MAX_USER_FILE_BYTES = 200, 2**20  # of the current folder
LIGHTNING_STRATEGIES = {  # the names of Lightning's registry that a user of Ravine may need
    "auto": "one process on one device, ddp on several",
    "ddp": "a copy of the model per device; gradients are averaged",
    "ddp_notebook": "ddp in a notebook, by forked processes",
    "ddp_find_unused_parameters_true": "ddp for models with parameters without a gradient",
}


Matches = Callable[[str], bool]  # whether a name is wanted


def accept_all(name: str) -> bool:
    """Accept every name."""
    return True


class Entry(NamedTuple):
    """A name of a list.

    Args:
        name: the name as it is typed.
        kind: its list, such as callbacks.
        group: heading within the list; "" for the first group.
        summary: first paragraph of its documentation.
        parameters: its arguments; None if they are not known without an import.
        docstring: its documentation; "" for a name that is no class or function.
        path: dotted path of the class or function; "" for a name without one.
        bases: names of all base classes.
    """

    name: str
    kind: str
    group: str
    summary: str
    parameters: list[Parameter] | None = None
    docstring: str = ""
    path: str = ""
    bases: tuple[str, ...] = ()

    @property
    def is_plan(self) -> bool:
        """Whether it is a callback that trains, and not an optimizer for a plan."""
        return self.kind == "optimizers" and "Callback" in self.bases


class Kind(NamedTuple):
    """A list of `lightning list`: its description, how its names are typed, and its entries."""

    description: str
    usage: str
    find_entries: Callable[[Callable[[str], bool]], Iterator[Entry]]


def make_entry(definition: Definition, kind: str, group: str, name: str = "") -> Entry:
    """Return the entry of a class or function."""
    parameters = source_index.parameters_of(definition)
    bases = tuple(source_index.ancestor_names(definition))
    if parameters and "Optimizer" in bases:
        parameters = [p for p in parameters if p.name != "params"]  # given by the plan
    text = source_index.docstring_of(definition)
    summary = source_index.first_paragraph(source_index.split_docstring(text)[0])
    name = name or definition.name
    path = "" if definition.name.startswith("_") else definition.path
    return Entry(name, kind, group, summary, parameters, text, path, bases)


def exported(package: str, matches: Matches = accept_all) -> list[Definition]:
    """Return the definitions in `__all__` of a package whose names match, sorted by name."""
    source = find_source(package)
    names = {name for name in source.exported_names() if matches(name)} if source else set()
    resolved = [source_index.resolve(source, name) for name in sorted(names) if source]
    return [definition for definition in resolved if definition]


def has_base(definition: Definition, name: str) -> bool:
    """Return whether a class has a base class of this name."""
    return name in source_index.ancestor_names(definition)


def optimizer_definitions(matches: Matches = accept_all) -> list[Definition]:
    """Return the public classes of `callbacks/optimizers/`, whose files name them in `__all__`."""
    folder = source_index.PACKAGE_ROOT / "callbacks" / "optimizers"
    definitions = []
    for path in sorted(folder.glob("[!_]*.py")):
        if "\n__all__ = " in path.read_text(encoding="utf-8"):
            definitions += exported(f"ravine.callbacks.optimizers.{path.stem}", matches)
    return sorted(definitions, key=lambda definition: definition.name)


def find_callbacks(matches: Matches = accept_all) -> Iterator[Entry]:
    """Yield the callbacks of Ravine that train nothing themselves, and Lightning's."""
    for definition in exported("ravine.callbacks", matches):
        if has_base(definition, "Callback") and definition.name != "OptimizerPlan":
            yield make_entry(definition, "callbacks", "")
    source = find_source("ravine.callbacks")
    replaced = source.exported_names() if source else []
    for definition in exported("lightning.pytorch.callbacks", matches):
        is_base = definition.name == "Callback" or definition.name.startswith("Base")
        if definition.name not in replaced and not is_base and has_base(definition, "Callback"):
            group = "of Lightning; docs/lightning_callbacks.md says which of them work"
            yield make_entry(definition, "callbacks", group)


def find_optimizers(matches: Matches = accept_all) -> Iterator[Entry]:
    """Yield the callbacks that train, and the optimizer classes of Ravine and torch."""
    for definition in [*exported("ravine.callbacks", matches), *optimizer_definitions(matches)]:
        if definition.name == "OptimizerPlan" or has_base(definition, "OptimizerPlan"):
            yield make_entry(definition, "optimizers", "")
    group = "classes for OptimizerPlan: --trainer.callbacks.optimizer=NAME"
    for definition in optimizer_definitions(matches):
        if has_base(definition, "Optimizer"):
            yield make_entry(definition, "optimizers", group)
    for definition in exported("torch.optim", matches):
        if has_base(definition, "Optimizer"):
            yield make_entry(definition, "optimizers", "of torch, for OptimizerPlan likewise")


def find_strategies(matches: Matches = accept_all) -> Iterator[Entry]:
    """Yield the strategy presets, their classes and names of Lightning."""
    for name, (text, _) in strategy_presets().items():
        yield Entry(name, "strategies", "", text, [])
    for name, text in LIGHTNING_STRATEGIES.items():
        yield Entry(name, "strategies", "of Lightning", text, [])
    for definition in exported("ravine.strategies", matches):
        if has_base(definition, "Strategy"):
            group = "classes: --trainer.strategy=NAME --trainer.strategy.KEY=VALUE"
            yield make_entry(definition, "strategies", group)


@cache
def strategy_presets() -> dict[str, tuple[str, dict[str, object]]]:
    """Return STRATEGY_PRESETS: description and arguments of MeshStrategy by name."""
    node = table_node("ravine.strategies.presets", "STRATEGY_PRESETS")
    return ast.literal_eval(node) if node is not None else {}


def table_node(module: str, name: str) -> ast.expr | None:
    """Return the expression that a module assigns to a name."""
    source = find_source(module)
    node = source.definitions.get(name) if source else None
    value = getattr(node, "value", None)
    return value if isinstance(value, ast.expr) else None


def table_functions(module: str, name: str) -> Iterator[tuple[str, Definition]]:
    """Yield the keys and the functions of a table such as SAMPLERS = {"ddim": ddim}."""
    source, node = find_source(module), table_node(module, name)
    if source is None or not isinstance(node, ast.Dict):
        return
    for key, value in zip(node.keys, node.values, strict=True):
        definition = source_index.resolve(source, ast.unparse(value))
        if isinstance(key, ast.Constant) and definition:
            yield str(key.value), definition


def find_tasks(matches: Matches = accept_all) -> Iterator[Entry]:
    """Yield the tasks: LightningModules for --model."""
    for definition in exported("ravine.lightning_modules", matches):
        if has_base(definition, "LightningModule") and definition.name != "TaskModule":
            yield make_entry(definition, "tasks", "")


def find_data(matches: Matches = accept_all) -> Iterator[Entry]:
    """Yield the datamodules and the data sets that they know by name."""
    for definition in exported("ravine.datamodules", matches):
        if has_base(definition, "LightningDataModule"):
            yield make_entry(definition, "data", "")
    texts = source_index.find_definition("ravine.datamodules.downloads.TextName")
    titles = dict(text_titles())
    for name in _alias_choices(texts):
        builtin = {"auto": "the first text that is available", "embedded": "Python's help topics"}
        group = "texts: --data=TextDataModule --data.source=NAME"
        yield Entry(name, "data", group, titles.get(name) or builtin.get(name, ""), [])
    for name, labels in image_classes().items():
        group = "images: --data=ImageDataModule --data.source=NAME"
        yield Entry(name, "data", group, f"{len(labels)} classes: {', '.join(labels)}", [])


def _alias_choices(definition: Definition | None) -> list[str]:
    value = getattr(definition.node, "value", None) if definition else None
    if definition is None or not isinstance(value, ast.expr):
        return []
    return [
        str(choice)
        for choice in source_index.literal_choices(ast.unparse(value), definition.source)
    ]


def text_titles() -> Iterator[tuple[str, str]]:
    """Yield name and title of each text in REMOTE_FILES."""
    node = table_node("ravine.datamodules.downloads", "REMOTE_FILES")
    for call in node.elts if isinstance(node, ast.Tuple) else ():
        options = {
            keyword.arg: keyword.value.value
            for keyword in getattr(call, "keywords", ())
            if isinstance(keyword.value, ast.Constant)
        }
        if options.get("text"):
            yield str(options["name"]), str(options.get("title", ""))


def image_classes() -> dict[str, tuple[str, ...]]:
    """Return the class names of each named image set."""
    source = find_source("ravine.datamodules.image_datasets")
    node = table_node("ravine.datamodules.image_datasets", "CLASS_NAMES")
    classes = {}
    for key, value in (
        zip(node.keys, node.values, strict=True) if isinstance(node, ast.Dict) else ()
    ):
        if isinstance(key, ast.Constant) and source:
            if isinstance(value, ast.Call) and len(value.args) == 1:  # tuple("0123456789")
                value = value.args[0]
            classes[str(key.value)] = tuple(ast.literal_eval(value))
    return classes


def find_rewards(matches: Matches = accept_all) -> Iterator[Entry]:
    """Yield the reward terms."""
    for definition in exported("ravine.lightning_modules", matches):
        if has_base(definition, "Reward"):
            yield make_entry(definition, "rewards", "")


def find_samplers(matches: Matches = accept_all) -> Iterator[Entry]:
    """Yield the diffusion samplers."""
    for name, definition in table_functions(
        "ravine.lightning_modules.diffusion_core.samplers", "SAMPLERS"
    ):
        entry = make_entry(definition, "samplers", "", name)
        optional = [p for p in entry.parameters or () if p.default is not None]
        yield entry._replace(parameters=optional)


def find_schedules(matches: Matches = accept_all) -> Iterator[Entry]:
    """Yield the learning-rate schedules and the noise schedules of diffusion."""
    for name, definition in table_functions(
        "ravine.callbacks.optimizers.lr_schedules", "SCHEDULE_SHAPES"
    ):
        yield make_entry(definition, "schedules", "", name)._replace(
            parameters=schedule_arguments(definition)
        )
    module = "ravine.lightning_modules.diffusion_core.noise_schedules"
    source = find_source(module)
    text = ast.get_docstring(source.tree) or "" if source else ""
    formulas = dict(line.split(maxsplit=1) for line in text.splitlines() if len(line.split()) > 1)
    for name in _alias_choices(source_index.find_definition(f"{module}.NoiseScheduleName")):
        group = "noise of diffusion models: --model.noise_schedule=NAME"
        yield Entry(name, "schedules", group, formulas.get(name, ""), [])


def schedule_arguments(shape: Definition) -> list[Parameter]:
    """Return the arguments of LRSchedule that a shape reads: `s.cooldown` in its function."""
    schedule = source_index.resolve(shape.source, "LRSchedule")
    parameters = source_index.parameters_of(schedule) or [] if schedule else []
    text, pending = "", [shape]
    while pending:  # a shape may call another
        node = pending.pop().node
        text += ast.unparse(node)
        for call in (inner for inner in ast.walk(node) if isinstance(inner, ast.Call)):
            name = ast.unparse(call.func)
            resolved = shape.source.definitions.get(name)
            if isinstance(resolved, ast.FunctionDef) and f"def {name}" not in text:
                pending.append(Definition(name, resolved, shape.source))
    return [p for p in parameters if p.name == "warmup" or f"s.{p.name}" in text]


KINDS: dict[str, Kind] = {
    "configs": Kind(
        "complete settings of a run, and overlays", "--config NAME", lambda matches: iter(())
    ),
    "callbacks": Kind(
        "what is added to training",
        "--trainer.callbacks+=NAME --trainer.callbacks.KEY=VALUE",
        find_callbacks,
    ),
    "optimizers": Kind(
        "what trains the parameters",
        "--trainer.callbacks+=NAME --trainer.callbacks.KEY=VALUE",
        find_optimizers,
    ),
    "strategies": Kind(
        "how a model is divided among devices", "--trainer.strategy=NAME", find_strategies
    ),
    "tasks": Kind("what is learned", "--model=NAME --model.KEY=VALUE", find_tasks),
    "data": Kind("what it is learned from", "--data=NAME --data.KEY=VALUE", find_data),
    "rewards": Kind(
        "what Reinforce maximizes",
        "--model.rewards+=NAME --model.rewards.KEY=VALUE",
        find_rewards,
    ),
    "samplers": Kind(
        "how a diffusion model draws",
        "--model.sampler=NAME, generate --sampler=NAME",
        find_samplers,
    ),
    "schedules": Kind(
        "how the learning rate changes",
        "--schedule.kind=NAME --schedule.KEY=VALUE",
        find_schedules,
    ),
}
KIND_OF_BASE = {  # base class of a user's own class: kind
    "OptimizerPlan": "optimizers",
    "Callback": "callbacks",
    "Optimizer": "optimizers",
    "Strategy": "strategies",
    "LightningModule": "tasks",
    "LightningDataModule": "data",
    "Reward": "rewards",
}


def kind_of(definition: Definition) -> str | None:
    """Return the kind of a class by its base classes; None if a command line cannot use it."""
    ancestors = source_index.ancestor_names(definition)
    return next((kind for base, kind in KIND_OF_BASE.items() if base in ancestors), None)


def user_entries(kind: str | None = None) -> Iterator[Entry]:
    """Yield the classes in the Python files of the current folder that a command line can use."""
    for source in user_sources():
        for name, node in source.definitions.items():
            definition = Definition(name, node, source)
            if isinstance(node, ast.ClassDef) and not name.startswith("_"):
                found_kind = kind_of(definition)
                if found_kind and kind in (None, found_kind):
                    group = f"in {Path.cwd().name}/, your folder"
                    yield make_entry(definition, found_kind, group, f"{source.name}.{name}")


def user_sources() -> list[SourceFile]:
    """Return the Python files of the current folder that can be imported by their name."""
    sources = []
    for path in sorted(Path().glob("[!._]*.py"))[:MAX_USER_FILES]:
        if not path.stem.isidentifier() or not path.is_file():  # a broken link is no file
            continue
        if path.stat().st_size > MAX_USER_FILE_BYTES:
            continue
        source = find_source(path.stem)
        if source and source.path.resolve() == path.resolve():
            sources.append(source)
    return sources


def entries_of(kind: str, matches: Matches = accept_all) -> list[Entry]:
    """Return the entries of a kind whose names match, those of the current folder last."""
    return [*installed_entries(kind, matches), *(e for e in user_entries(kind) if matches(e.name))]


def installed_entries(kind: str, matches: Matches = accept_all) -> list[Entry]:
    """Return the entries of a kind that are installed and whose names match."""
    return [entry for entry in KINDS[kind].find_entries(matches) if matches(entry.name)]


def find_entries(name: str) -> list[Entry]:
    """Return the entries of all kinds with this name, such as the two schedules called cosine."""
    return [entry for kind in KINDS for entry in installed_entries(kind, name.__eq__)]


# Packages with public classes that have a page and are in no list: ravine.Trainer, LRSchedule.
PUBLIC_PACKAGES = (
    "ravine.lightning_modules",
    "ravine.datamodules",
    "ravine.strategies",
    "ravine.callbacks",
    "ravine",
)


def public_definitions(matches: Matches = accept_all) -> dict[str, Definition]:
    """Return the public classes and functions of Ravine whose names match."""
    resolved = {d.name: d for package in PUBLIC_PACKAGES for d in exported(package, matches)}
    return resolved | {d.name: d for d in optimizer_definitions(matches)}


def find_named(name: str) -> list[Entry]:
    """Return the entries with this name, also those of public classes that are in no list."""
    if entries := find_entries(name):
        return entries
    definitions = public_definitions(name.__eq__)
    for package in ("lightning.pytorch.loggers", "lightning.pytorch.profilers"):
        definitions |= {d.name: d for d in exported(package, name.__eq__)}
    return [make_entry(definition, "", "") for definition in definitions.values()]


def all_names() -> list[str]:
    """Return all names that have a page, and those of the current folder.

    Only registries are read, not the files of the classes.
    """
    folder = source_index.PACKAGE_ROOT / "callbacks" / "optimizers"
    packages = [*PUBLIC_PACKAGES, "torch.optim", "lightning.pytorch.callbacks"]
    packages += [f"ravine.callbacks.optimizers.{path.stem}" for path in folder.glob("[!_]*.py")]
    sources = [source for source in map(find_source, packages) if source]
    names = [name for source in sources for name in source.exported_names()]
    classes = [name for name in names if re.fullmatch(r"[A-Z][A-Za-z0-9]*", name)]
    classes = [n for n in classes if n not in BASE_NAMES and not n.startswith("Base")]
    for kind in ("strategies", "samplers", "schedules", "data"):
        classes += [e.name for e in installed_entries(kind, lambda name: not name[0].isupper())]
    return list(dict.fromkeys([*classes, *(entry.name for entry in user_entries())]))
