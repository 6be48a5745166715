"""Lists in docs, README and --help equal the registries; names and links in them exist.

`python tests/test_lists.py` writes the lists of docs/, and the overlays of strategies without one.
"""

import ast
import importlib
import inspect
import re
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import lightning as L
import pytest
import yaml
from ranks import fewest_ranks
from torch.optim import Optimizer

import ravine.callbacks
from ravine.callbacks import OptimizerPlan, Quantization
from ravine.callbacks.estimates.devices import DEVICES
from ravine.callbacks.optimizers import lr_schedules, muon
from ravine.callbacks.quantization.layers import DEQUANTIZERS
from ravine.cli import help_text
from ravine.cli.commands import export
from ravine.cli.main import main
from ravine.datamodules import downloads
from ravine.lightning_modules import Diffusion, LanguageModel, RewardFunction, protocols
from ravine.lightning_modules.diffusion_core import samplers
from ravine.lightning_modules.nn import Transformer, attention
from ravine.lightning_modules.rl.advantages import AdvantageEstimator
from ravine.lightning_modules.rl.rewards import builtin
from ravine.strategies import STRATEGY_PRESETS, MeshStrategy, pipeline_parallel
from ravine.strategies.device_mesh import resolve_degrees

ROOT = Path(__file__).resolve().parent.parent
OVERLAYS = ROOT / "configs" / "strategy"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
Row = tuple[str, ...]


def first_sentence(text: str | None) -> str:
    """The first paragraph of a docstring, in one line."""
    return " ".join(inspect.cleandoc(text or "").split("\n\n")[0].split())


def callbacks(plans: bool) -> dict[str, type]:
    """The callbacks of `ravine.callbacks` by name: the optimizers, or all others."""
    named = {name: getattr(ravine.callbacks, name) for name in ravine.callbacks.__all__}
    kinds = {n: k for n, k in named.items() if isinstance(k, type) and issubclass(k, L.Callback)}
    chosen = {n: k for n, k in kinds.items() if issubclass(k, OptimizerPlan) == plans}
    return {n: k for n, k in sorted(chosen.items()) if k is not OptimizerPlan or not plans}


def optimizers() -> list[Row]:
    """An optimizer's callback, the classes beside it in its file, and the title of the file."""
    rows = []
    for name, kind in callbacks(plans=True).items():
        module = importlib.import_module(kind.__module__)
        own = [getattr(module, n) for n in module.__all__]
        made = [f"`{k.__name__}`" for k in own if issubclass(k, Optimizer)]
        rows.append((f"`{name}`", ", ".join(made), first_sentence(module.__doc__)))
    return rows


def described(table: dict[Any, Any]) -> list[Row]:
    """Names of functions or classes with the first paragraph of their docstrings."""
    return [(f"`{name}`", first_sentence(each.__doc__)) for name, each in table.items()]


def presets() -> list[Row]:
    """Strategies by name: description, and the equivalent MeshStrategy call."""
    rows = []
    for name, (text, arguments) in STRATEGY_PRESETS.items():
        written = ", ".join(f"{key}={value}" for key, value in arguments.items())
        rows.append((f"`{name}`", text, f"`MeshStrategy({written})`"))
    return rows


def texts() -> list[Row]:
    """Texts by name."""
    return [(f"`{name}`", source.title) for name, source in downloads.TEXTS.items()]


def variants() -> list[Row]:
    """Attention variants by name, and the projections that each learns."""
    rows = attention.LEARNED_PROJECTIONS.items()
    return [(f"`{name}`", ", ".join(learned) or "none") for name, learned in rows]


def rewards() -> list[Row]:
    """The terms of a reward."""
    named = {name: getattr(builtin, name) for name in builtin.__all__}
    return described({**named, "RewardFunction": RewardFunction})


def hooks() -> list[Row]:
    """The optional hooks of a module or a net: their members, and what they are for."""
    rows = []
    for kind in vars(protocols).values():
        if inspect.isclass(kind) and kind.__module__ == protocols.__name__:
            members = [name for name in (*kind.__annotations__, *vars(kind)) if name[0] != "_"]
            written = ", ".join(f"`{name}{arguments(vars(kind).get(name))}`" for name in members)
            rows.append((written, first_sentence(kind.__doc__)))
    return rows


def devices() -> list[Row]:
    """The devices of `lightning estimate` with their figures."""
    return [
        (
            f"`{name}`",
            device.name,
            f"{device.memory_bytes / 2**30:g} GiB",
            f"{device.flops_per_s / 1e12:g}",
            f"{device.memory_bytes_per_s / 1e12:g}",
        )
        for name, device in DEVICES.items()
    ]


def arguments(method: object) -> str:
    """The arguments of a method as in a call; nothing for an attribute."""
    if not inspect.isfunction(method):
        return ""
    _, *parameters = inspect.signature(method).parameters.values()
    return f"({', '.join(str(p.replace(annotation=p.empty)) for p in parameters)})"


# A list in docs/: the page, the head of the table, and its rows.
LISTS: dict[str, tuple[str, Row, Callable[[], list[Row]]]] = {
    "optimizers": (
        "callbacks.md",
        ("callback", "optimizer, for a rule", "what it does"),
        optimizers,
    ),
    "callbacks": (
        "callbacks.md",
        ("callback", "what it does"),
        lambda: described(callbacks(plans=False)),
    ),
    "schedules": (
        "adding_an_optimizer.md",
        ("schedule", "the rate after the warm-up"),
        lambda: described(lr_schedules.SCHEDULE_SHAPES),
    ),
    "samplers": (
        "diffusion.md",
        ("`--model.sampler`", "a step"),
        lambda: described(samplers.SAMPLERS),
    ),
    "rewards": ("reinforce.md", ("reward", "what it measures"), rewards),
    "attention variants": (
        "language.md",
        ("`--model.attention_variant`", "learned projections"),
        variants,
    ),
    "strategies": (
        "parallelism.md",
        ("`--trainer.strategy`", "what is divided", "the same in Python"),
        presets,
    ),
    "devices": (
        "estimate.md",
        ("`--gpu`", "device", "memory", "16-bit TFLOP/s", "memory TB/s"),
        devices,
    ),
    "hooks": ("adding_a_task.md", ("attribute or method", "what it is for"), hooks),
    "texts": ("data.md", ("`--data.source`", "text"), texts),
}


def table(head: Row, rows: list[Row]) -> str:
    """Markdown."""
    rule = "|---" * len(head) + "|"
    cells = [tuple(cell.replace("|", "\\|") for cell in row) for row in rows]
    lines = [f"| {' | '.join(row)} |" for row in (head, *cells)]
    return "\n".join((lines[0], rule, *lines[1:]))


def block(name: str) -> re.Pattern[str]:
    """A list of a page, with the marks around it."""
    return re.compile(rf"<!-- list: {name} -->\n(.*?)\n?<!-- /list -->", re.DOTALL)


@pytest.mark.parametrize("name", LISTS)
def test_a_list_in_docs_equals_its_registry(name: str) -> None:
    page, head, rows = LISTS[name]
    (found,) = block(name).findall((ROOT / "docs" / page).read_text())
    assert found == table(head, rows()), "write it by: python tests/test_lists.py"


def argument(kind: Any, name: str) -> tuple[Any, ...]:
    """The names that an argument may have, as --help shows them."""
    hint = inspect.signature(kind).parameters[name].annotation
    found = [get_args(part) or (part,) for part in (get_args(hint) or (hint,))]
    flat = [name for part in found for name in part]
    return tuple(name for name in flat if isinstance(name, str))


def formats() -> set[str]:
    """The values of `export --format`, of all tasks."""
    return {f for task in (LanguageModel, Diffusion) for f in argument(task.export, "format")}


# What --help shows, and the registry that the code reads.
CHOICES: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "sampler": (lambda: argument(Diffusion, "sampler"), lambda: samplers.SAMPLERS),
    "schedule": (lambda: get_args(lr_schedules.ScheduleKind), lambda: lr_schedules.SCHEDULE_SHAPES),
    "attention variant": (
        lambda: get_args(attention.AttentionVariant),
        lambda: attention.LEARNED_PROJECTIONS,
    ),
    "attention kernel": (
        lambda: argument(Transformer, "attn_implementation"),
        lambda: attention.ATTENTION_FNS,
    ),
    "text": (lambda: get_args(downloads.TextName), lambda: ["auto", "embedded", *downloads.TEXTS]),
    "scale of Muon": (lambda: get_args(muon.Scale), lambda: muon.SCALES),
    "iteration of Muon": (lambda: get_args(muon.Coefficients), lambda: muon.ITERATIONS),
    "quantization": (lambda: argument(Quantization, "scheme"), lambda: DEQUANTIZERS),
    "exported quantization": (lambda: export.QUANTIZATION_SCHEMES, lambda: DEQUANTIZERS),
    "pipeline schedule": (
        lambda: get_args(pipeline_parallel.PipelineSchedule),
        lambda: pipeline_parallel.SCHEDULE_CLASSES,
    ),
    "export format": (
        lambda: re.findall(r"--format=([a-z]\w+)", help_text.COMMAND_HELP["export"]),
        formats,
    ),
}


@pytest.mark.parametrize("name", CHOICES)
def test_the_choices_of_an_argument_are_the_names_of_its_registry(name: str) -> None:
    shown, registry = (each() for each in CHOICES[name])
    assert sorted(shown) == sorted(registry)


@pytest.mark.parametrize(
    ("words", "names"),
    [
        ("--model.help=Diffusion", lambda: samplers.SAMPLERS),
        ("--model.help=LanguageModel", lambda: attention.LEARNED_PROJECTIONS),
        ("--data.help=TextDataModule", lambda: downloads.TEXTS),
        ("--data.help=PromptDataModule", lambda: downloads.TEXTS),
    ],
)
def test_help_lists_the_names(
    words: str, names: Callable[[], Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", words]) == 0
    shown = capsys.readouterr().out
    assert "{" + ",".join(names()) in re.sub(r"\s", "", shown).replace("{auto,embedded,", "{")


def test_choices_in_tables_of_docs_are_those_of_the_arguments() -> None:
    """A row that begins with `--model.ARGUMENT`, or a table with one name a row."""
    page = (ROOT / "docs" / "diffusion.md").read_text()
    names = "noise_schedule", "prediction_type", "loss_weighting", "time_conditioning"
    for name in names:
        (row,) = re.findall(rf"^\| `--model\.{name}` \| (.*) \|", page, re.MULTILINE)
        row = re.sub(r"\([^)]*\)", "", row).partition(":")[0]
        assert re.findall(r"`(\w+)`", row) == list(argument(Diffusion, name)), name
    page = (ROOT / "docs" / "reinforce.md").read_text()
    (rows,) = re.findall(r"`--model\.estimator\.method`.*\n\|[-|]*\n((?:\|.*\n)*)", page)
    assert re.findall(r"^\| `(\w+)`", rows, re.MULTILINE) == list(
        argument(AdvantageEstimator, "method")
    )


def support_columns(text: str) -> list[list[str]]:
    """The header rows of README's support tables."""
    (block,) = re.findall(r"<!-- support -->\n(.*?)<!-- /support -->", text, re.DOTALL)
    lines = block.splitlines()
    heads = [line for line, rule in pairwise(lines) if rule.startswith("|---")]
    return [[cell.strip() for cell in head.strip("|").split("|")] for head in heads]


def test_each_strategy_has_an_overlay_and_a_column_of_the_support_table() -> None:
    assert sorted(path.stem for path in OVERLAYS.glob("*.yaml")) == sorted(STRATEGY_PRESETS)
    columns = support_columns((ROOT / "README.md").read_text())
    assert columns[1] == ["callback (on the transformer)", "ddp", *STRATEGY_PRESETS]


def overlay(name: str) -> str:
    """The overlay of a strategy, with a command for the fewest devices that it needs."""
    text, arguments = STRATEGY_PRESETS[name]
    devices = fewest_ranks(arguments)
    mesh = resolve_degrees(MeshStrategy(**arguments).degrees, devices)
    trainer_config = yaml.safe_load((ROOT / "configs" / "gpt2" / "124m.yaml").read_text())[
        "trainer"
    ]
    steps = trainer_config["accumulate_grad_batches"] // (mesh["dp_replicate"] * mesh["dp_shard"])
    return (
        f"# lightning fit --config gpt2/124m --config strategy/{name} "
        f"--trainer.devices={devices} \\\n#   --trainer.accumulate_grad_batches={steps} "
        f"--trainer.val_check_interval={2000 * steps}\n"
        f"# Machine: {devices} devices or more. Time: not measured.\n"
        f"# Expect: the losses of one process.\n# Strategy: {text}.\n"
        f"trainer:\n  strategy: {name}\n"
    )


def test_an_overlay_that_is_written_is_a_config_with_a_command_above_it() -> None:
    for name in STRATEGY_PRESETS:
        text = overlay(name)
        assert yaml.safe_load(text) == {"trainer": {"strategy": name}}
        assert text.startswith(f"# lightning fit --config gpt2/124m --config strategy/{name} ")


def test_contributing_names_files_and_tables_that_exist() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    (rows,) = re.findall(r"^\| what \| source \| test \|\n(.*?)\n\n", text, re.DOTALL | re.M)
    cells = [cell for row in rows.splitlines()[1:] for cell in row.strip("|").split("|")[1:]]
    pairs = [re.search(r"(?:`([A-Z_]+)`.* )?(?:in|file in) `([\w/.]+)`", cell) for cell in cells]
    named = [pair.groups() for pair in pairs if pair]
    assert len(named) >= 12
    for table, path in named:
        assert (ROOT / path).exists(), path
        assert table is None or f"\n{table}" in (ROOT / path).read_text(), (table, path)


def code_blocks() -> Iterator[tuple[Path, str]]:
    """The Python code of README and docs/."""
    for page in PAGES:
        for block in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.M):
            yield page, block


def test_every_name_that_a_page_imports_from_ravine_exists() -> None:
    found = 0
    for page, block in code_blocks():
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    if alias.name.partition(".")[0] == "ravine":
                        importlib.import_module(alias.name)
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ravine"):
                module = importlib.import_module(str(node.module))
                for alias in node.names:
                    found += 1
                    assert hasattr(module, alias.name), f"{page.name}: {node.module}.{alias.name}"
    assert found > 20


def subclasses(kind: type) -> Iterator[type]:
    for below in kind.__subclasses__():
        yield below
        yield from subclasses(below)


def test_every_callback_that_readme_names_imports_from_ravine_callbacks() -> None:
    words = set(re.findall(r"\b[A-Z]\w+", (ROOT / "README.md").read_text()))
    known = {k.__name__ for k in subclasses(L.Callback) if k.__module__.startswith("ravine.")}
    assert len(words & known) > 5
    assert {word for word in words & known if not hasattr(ravine.callbacks, word)} == set()


LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]*))?\)")


def links(page: Path) -> Iterator[tuple[Path, str]]:
    """The relative links of a page outside its code: file, and heading within it."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target, heading in LINK.findall(text):
        yield (page.parent / target).resolve() if target else page, heading


def headings(page: Path) -> set[str]:
    """The anchors of a page, as GitHub makes them."""
    found = re.findall(r"^#+ (.*)", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in found}


def broken(page: Path) -> list[str]:
    wrong = []
    for target, heading in links(page):
        if not target.exists():
            wrong.append(f"{page.name}: no file {target}")
        elif heading and target.suffix == ".md" and heading not in headings(target):
            wrong.append(f"{page.name}: no heading {heading} in {target.name}")
    return wrong


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_relative_link_of_a_page_exists(page: Path) -> None:
    assert broken(page) == []


def unreached(start: Path, pages: list[Path]) -> list[str]:
    """The pages that no chain of links from the first one reaches."""
    seen, left = {start}, [start]
    while left:
        new = {t for t, _ in links(left.pop()) if t.suffix == ".md" and t.is_file()} - seen
        seen |= new
        left += new
    return [page.name for page in pages if page not in seen]


def test_every_page_of_docs_is_linked_from_readme_or_a_page_that_is() -> None:
    assert unreached(ROOT / "README.md", PAGES) == []


def test_a_planted_broken_link_and_an_unlinked_page_are_found(tmp_path: Path) -> None:
    one, two = tmp_path / "one.md", tmp_path / "two.md"
    one.write_text("# A title\n[x](#a-title) [y](gone.md) `[z](no)`\n```\n[k](code.md)\n```\n")
    two.write_text("[one](one.md#a-title) [one](one.md#another)\n")
    assert [line.rpartition(" ")[2].rpartition("/")[2] for line in broken(one)] == ["gone.md", "no"]
    assert len(broken(two)) == 1
    assert unreached(one, [one, two]) == ["two.md"]


def write() -> None:
    """Write the lists of docs/, and overlays that are missing."""
    for name, (page, head, rows) in LISTS.items():
        path = ROOT / "docs" / page
        new = f"<!-- list: {name} -->\n{table(head, rows())}\n<!-- /list -->"
        path.write_text(block(name).sub(lambda _, new=new: new, path.read_text()))
    for name in STRATEGY_PRESETS:
        path = OVERLAYS / f"{name}.yaml"
        if not path.exists():
            path.write_text(overlay(name))


if __name__ == "__main__":
    write()
