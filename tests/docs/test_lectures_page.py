"""The page on lectures names every config, an existing picture and an existing test for each."""

import re
from pathlib import Path

import pytest
import yaml
from doc_pages import DOCS, commands

from ravine.cli.main import main

PAGE = (DOCS / "lectures.md").read_text()
ROOT = DOCS.parent
CONFIGS = {path.stem: path for path in sorted((ROOT / "configs" / "lectures").glob("*.yaml"))}


def test_the_page_names_every_config():
    assert set(re.findall(r"`lectures/(\w+)`", PAGE)) == set(CONFIGS)


def test_every_test_that_the_page_names_exists():
    sources = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    named = set(re.findall(r"`(test_\w+)`", PAGE))
    assert len(named) >= 30
    assert {name for name in named if f"def {name}(" not in sources} == set()


def test_the_table_of_claims_is_complete():
    """The claims 1 to 60 and 75 to 83 in order, each with a test; the one above finds the tests."""
    rows = re.findall(r"^\| (\d+) \| \S+ \| [^|]+ \| (.*) \|$", PAGE, re.MULTILINE)
    assert [int(number) for number, _ in rows] == [*range(1, 61), *range(75, 84)]
    assert all(re.fullmatch(r"`test_\w+`(, `test_\w+`)*", tests) for _, tests in rows)


def test_every_figure_is_that_of_a_config():
    figures = {path.stem for path in (DOCS / "figures" / "lectures").glob("*.png")}
    plots = "_(convergence|trajectory|steps_to_target|curves)$"
    assert {re.sub(plots, "", figure) for figure in figures} <= set(CONFIGS)
    shown = set(re.findall(r"\]\(figures/lectures/(\w+)\.png\)", PAGE))
    assert len(shown) >= 15
    assert shown <= figures


# steps that contain the period of a step schedule
LONGER = {"8_5_1_methods": 110}
# MNIST may not be on this machine, and the digits of scikit-learn are fewer
DIGITS = ["--data.source=digits", "--data.num_train_images=1000", "--data.batch_size=1000"]


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "8_2_1_schedules"])
def test_a_config_draws_its_picture(name: str, tmp_path: Path, monkeypatch) -> None:
    """After its first steps; docs/draw_lectures.py runs the configs to their ends."""
    monkeypatch.chdir(tmp_path)
    data = yaml.safe_load(CONFIGS[name].read_text()).get("data", {}).get("init_args", {})
    steps = LONGER.get(name, 2 * data.get("steps_per_batch", 2))
    words = [f"--trainer.max_steps={steps}", "--trainer.logger=csv"]
    words += DIGITS if data.get("source") == "mnist" else []
    assert main(["fit", "--config", f"lectures/{name}", *words]) == 0
    pictures = {path.stem for path in Path("runs", "lectures", name, "version_0").glob("*.png")}
    assert pictures & {"convergence", "trajectory", "steps_to_target", "curves", "curvature"}


def test_the_config_of_long_schedules_trains(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["--trainer.fast_dev_run=1", "--model.steps_per_batch=2"]
    assert main(["fit", "--config", "lectures/8_2_1_schedules", *words]) == 0


def test_the_command_of_the_page_draws_a_trajectory(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (command,) = commands(PAGE)
    assert main([word.replace("max_steps=500", "max_steps=5") for word in command]) == 0
    assert Path("runs/objective/version_0/trajectory.png").exists()
