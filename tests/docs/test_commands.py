"""Every command on a page of docs/ and in README is accepted by the program.

A command that trains is read with `--print_config`; the tutorials are also run, by test_tutorials.
A command that reads runs is run, in a folder with two runs of each of four configs.
"""

import contextlib
import os
import re
import shlex
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from doc_pages import DOCS, README, files, shell_lines

from ravine.cli.commands import export, generate, method_flags
from ravine.cli.config import presets
from ravine.cli.main import COMMANDS, LOOKUP_COMMANDS, main
from ravine.lightning_modules import Diffusion, LanguageModel

PAGES = [README, *sorted(DOCS.glob("*.md"))]
ROOT = DOCS.parent
PLAN = ["--trainer.callbacks=OptimizerPlan", "--trainer.callbacks.optimizer=SGD"]
TINY = [*PLAN, "--trainer.max_steps=1", "--trainer.limit_val_batches=1", "--trainer.logger=csv"]
LANGUAGE = ["--data.source=embedded", "--data.context_length=8", "--data.batch_size=2"]
LANGUAGE += ["--model.num_layers=1", "--model.d_model=16", "--model.num_heads=2"]
LANGUAGE += ["--trainer.val_check_interval=1"]
# the runs that the commands of the pages name, and the flags that make them short
RUNS = {
    "shakespeare/quick": LANGUAGE,
    "spam/quick": ["--data.source=embedded", "--model.num_buckets=64"],
    "diffusion/digits": ["--model.base_channels=8", "--model.time_embed_dim=16"],
    "classifier/mnist": ["--data.source=digits", "--model.variant=linear"],
}


def spans(page: Path) -> list[str]:
    """The commands inside of a sentence or a table."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    return re.findall(r"`((?:lightning|ravine) [^`]*)`", text)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the runs that the pages name."""
    folder = tmp_path_factory.mktemp("pages")
    start = Path.cwd()
    os.chdir(folder)
    for config, flags in RUNS.items():
        for seed in range(2):
            words = ["fit", "--config", config, *flags, *TINY, f"--seed_everything={seed}"]
            assert main(words) == 0
    Path("my.yaml").write_text((ROOT / "configs" / "shakespeare" / "quick.yaml").read_text())
    yield folder
    os.chdir(start)


def checkpoint(words: list[str]) -> str:
    """The name of the run whose checkpoint a command evaluates or continues."""
    text = " ".join(words)
    config = "spam/quick" if re.search(r"predict_path=\S+\.(csv|txt)", text) else ""
    config = config or ("classifier/mnist" if "predict_path" in text else "shakespeare/quick")
    return f"{config}/1"


def accepted(words: list[str]) -> bool:
    """Whether the program accepts a command; one that trains is only read."""
    verb = words[0]
    if verb == "new":  # into an empty folder: it replaces no file
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
            return main(words) == 0
    if verb in LOOKUP_COMMANDS:
        return main(words) == 0
    if verb in METHOD_FLAGS:
        typed = method_flags.parse_flags(word for word in words[1:] if word != "--merge")
        return {name for name, _ in typed} <= METHOD_FLAGS[verb]
    if verb == "estimate":  # the arguments of `fit`, and flags of its own
        words = ["fit", *without_flags(words[1:], ESTIMATE_FLAGS)]
    words = [word for word in words if not word.startswith("--trust=")]
    for i, word in enumerate(words):
        if word == "--ckpt_path":
            words[i + 1] = checkpoint(words)
        elif word.startswith("--ckpt_path="):
            words[i] = f"--ckpt_path={checkpoint(words)}"
    return main([*words, *({"--print_config"} - {*words})]) == 0


ESTIMATE_FLAGS = {"gpu", "gpu_memory", "gpu_tflops", "devices", "num_nodes", "link"}
ESTIMATE_SWITCHES = {"--quick", "--measure", "--json"}


def without_flags(words: list[str], names: set[str]) -> list[str]:
    """The words without `--name value` and `--name=value`, and without the switches."""
    kept, rest = [], iter(words)
    for word in rest:
        name, equals, _ = word.removeprefix("--").partition("=")
        if word.startswith("--") and name in names:
            _ = None if equals else next(rest)
        elif word not in ESTIMATE_SWITCHES:
            kept.append(word)
    return kept


def known_flags(method: str, *others: str) -> set[str]:
    """The flags of a command that calls a method of the task, of all tasks together."""
    tasks = (Diffusion, LanguageModel)
    flags = (method_flags.method_flags(getattr(task, method)) for task in tasks)
    return {"ckpt_path", "trust", *others}.union(*flags)


METHOD_FLAGS = {
    "generate": known_flags("generate", *generate.TEXT_FLAGS, *generate.IMAGE_FLAGS),
    "export": known_flags("export", *export.MERGE_FLAGS, "consolidate"),
}


def checked(line: str, page: Path) -> bool:
    """Whether a line of a page can be typed as it stands."""
    words = shlex.split(line)
    while "=" in words[0]:  # a variable of the environment
        del words[0]
    program, *rest = words
    if program in ("lightning", "ravine"):
        return accepted(rest)
    script = [i for i, word in enumerate(words) if word.endswith(".sh")]
    if script:  # a script of configs/cluster, which calls `fit`
        name = words[script[0]].rpartition("/")[2]
        assert (ROOT / "configs" / "cluster" / name).is_file()
        return accepted(["fit", *words[script[0] + 1 :]])
    if program == "python" and rest[0] == "-c":
        return compile(rest[1], "-c", "exec") is not None
    if program == "python":
        return rest[0] in files(page.read_text()) or (ROOT / rest[0]).is_file()
    return program in OTHER_PROGRAMS


OTHER_PROGRAMS = {"pip", "eval", "tensorboard", "mlflow", "wandb", "cd", "cp", "ls"}


@pytest.mark.parametrize(
    "page", [page for page in PAGES if shell_lines(page.read_text())], ids=lambda p: p.stem
)
def test_every_command_of_a_page_is_accepted(
    page: Path, runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.path", [str(runs), *sys.path])
    for name, text in files(page.read_text()).items():
        (runs / name).write_text(text)
    refused = []
    for line in shell_lines(page.read_text()):
        if not checked(line, page):
            refused.append((line, capsys.readouterr().err))
    assert refused == []


def test_a_command_inside_of_a_sentence_names_a_verb_configs_and_flags_that_exist() -> None:
    verbs, installed = {*COMMANDS, *LOOKUP_COMMANDS}, {*presets.list_presets()}
    for page in PAGES:
        for span in spans(page):
            words = span.split()
            assert words[1] in verbs or words[1].isupper() or words[1] == "--version", span
            for name in re.findall(r"--config (\S+)", span):
                known = name in installed or name.endswith((".yaml", "NAME"))
                assert known, f"{page.name}: {span}"
            if words[1] in METHOD_FLAGS:
                flags = {flag for flag in re.findall(r"--(\w+)", span)}
                assert flags <= METHOD_FLAGS[words[1]] | {"merge", "help"}, f"{page.name}: {span}"


def test_a_wrong_command_is_found(runs: Path) -> None:
    for line in (
        "lightning fit --config spam/quik",
        "lightning fit --config spam/quick --trainer.max_stps=5",
        "lightning generate --ckpt_path last --guidance 2",
        "python missing.py",
        "lightnin fit",
    ):
        assert not checked(line, README), line
