"""The files and commands of the pages in docs/ are extracted and run."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from doc_pages import DOCS, README, commands, files

import ravine
from ravine.cli.main import main


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_the_page_on_adding_a_task_works_as_written(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (DOCS / "adding_a_task.md").read_text()
    for name, text in files(page).items():
        (folder / name).write_text(text)
    assert [main(command) for command in commands(page)] == [0, 0, 0]
    accuracy = re.findall(r"val/accuracy\D*(0\.\d+)", capsys.readouterr().out)
    assert float(accuracy[-1]) > 0.85  # chance is 0.10


TINY = [
    "--trainer.max_steps=2",
    "--data.source=embedded",
    "--model.num_layers=1",
    "--model.d_model=16",
]


def test_the_optimizer_of_the_readme_trains_by_the_command_beside_it(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = README.read_text()
    (folder / "mine.py").write_text(files(page)["mine.py"])
    (command,) = [c for c in commands(page) if any("mine.SignDescent" in word for word in c)]
    assert main([*command, *TINY]) == 0
    assert "SignDescent" in capsys.readouterr().out


def test_the_script_of_the_readme_trains_under_the_stock_trainer(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = files(README.read_text())["script.py"].replace("max_steps=200", "max_steps=2")
    exec(compile(script, "script.py", "exec"), {"__name__": "__main__"})
    assert "The" in capsys.readouterr().out


def test_the_script_of_the_readme_with_the_trainer_of_ravine_loads_what_it_trains(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = files(README.read_text())["train.py"].replace("max_steps=200", "max_steps=2")
    exec(compile(script, "train.py", "exec"), {"__name__": "__main__"})
    shown = capsys.readouterr().out
    assert f"ravine {ravine.__version__}" in shown
    assert "\nThe" in shown


def read_by_two_ranks(folder: str) -> tuple[int, ...]:
    os.chdir(folder)
    text = Path("two_ranks.py").read_text()
    exec(compile(text, "two_ranks.py", "exec"), {"__name__": "__main__"})
    weights = torch.load("line.ckpt", weights_only=True)["state_dict"]
    return tuple(weights["layers.0.weight"].shape)


@pytest.mark.filterwarnings("ignore")  # of a stock Trainer: its logger, its data
def test_the_script_of_the_page_on_parallelism_trains_on_two_ranks(
    ranks: Any, folder: Path
) -> None:
    page = (DOCS / "parallelism.md").read_text()
    (folder / "two_ranks.py").write_text(files(page)["two_ranks.py"])
    assert ranks(read_by_two_ranks, 2, str(folder)) == [(64, 8), (64, 8)]
