"""docs/adding_an_optimizer.md works as written, on every task and layout."""

import runpy
from pathlib import Path

import pytest
import torch
from doc_pages import commands, files

from ravine.cli.main import main

PAGE = (Path(__file__).resolve().parents[2] / "docs/adding_an_optimizer.md").read_text()
FLAG = [
    "--trainer.callbacks+=OptimizerPlan",
    "--trainer.callbacks.optimizer=my_optimizer.MyOptimizer",
    "--trainer.callbacks.optimizer.lr=0.003",
]
SMALL = ["--model.num_layers=1", "--model.d_model=16", "--model.num_heads=2", "--data.batch_size=4"]
TASKS = {
    "spam": ["--config=spam/quick", "--data.source=embedded", "--data.batch_size=4"],
    "shakespeare": ["--config=shakespeare/quick", "--data.source=embedded", *SMALL],
    "foreign": ["--model=external_modules.net_in_init.NetInInit", "--trainer.accelerator=cpu"],
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for name, text in files(PAGE).items():
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_the_page_works_as_written(folder, capsys):
    for command in commands(PAGE):
        more = ["--data.source=embedded"] if command[0] == "fit" else []
        assert main([*command, *more]) == 0
    said = capsys.readouterr().out
    assert said.count("MyOptimizer") >= 2
    plan = runpy.run_path("script.py")["trainer"].callbacks[0]
    assert str(plan) == "OptimizerPlan(MyOptimizer, AdamW)"
    weight = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    averaged = runpy.run_path("averaged.py")["Averaged"]([weight])
    for _ in range(3):  # an average of equal gradients is the gradient, whatever the count
        weight.grad = torch.full_like(weight, 2.0)
        averaged.step()
    torch.testing.assert_close(weight.data, torch.full_like(weight, 1 - 3 * 0.1 * 2))


def weights(name, steps, *words, folder="."):
    """Train by words; the checkpoint at the end."""
    quiet = ["--trainer.enable_model_summary=false", "--trainer.enable_progress_bar=false"]
    every = ["--trainer.val_check_interval=1.0", "--trainer.check_val_every_n_epoch=1"]
    named = [f"--trainer.name={folder}", f"--trainer.max_steps={steps}"]
    assert main(["fit", *TASKS[name], *FLAG, *quiet, *every, *named, *words]) == 0
    newest = max(Path("runs", folder).glob("version_*"), key=lambda p: int(p.name[8:]))
    return newest / "checkpoints" / f"step={steps:06d}.ckpt"


def cut_and_continued(name, *words):
    """Six steps, and three with three more; the files of both."""
    whole = weights(name, 6, *words, folder="whole")
    cut = weights(name, 3, *words, folder="cut")
    return str(whole), str(weights(name, 6, f"--ckpt_path={cut}", *words, folder="cut"))


def in_ranks(folder, name):
    import os
    import sys

    os.chdir(folder)
    sys.path.insert(0, str(folder))
    return cut_and_continued(name, "--trainer.strategy=zero3", "--trainer.devices=2")


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("name", TASKS)
def test_the_optimizer_of_the_page_trains_every_task_and_resumes_bitwise(
    ranks, folder, capsys, name, world
):
    if world == 1:
        whole, continued = cut_and_continued(name)
        assert "MyOptimizer" in capsys.readouterr().out
    else:
        whole, continued = ranks(in_ranks, 2, folder, name)[0]
    whole, continued = (torch.load(folder / f, weights_only=True) for f in (whole, continued))
    assert whole["optimizer_plan"][0].startswith("MyOptimizer of ")
    assert whole["global_step"] == continued["global_step"] == 6
    for key, value in whole["state_dict"].items():
        assert torch.equal(value, continued["state_dict"][key]), key
    for key, state in whole["optimizer_states"][0]["state"].items():
        assert torch.equal(
            state["average"], continued["optimizer_states"][0]["state"][key]["average"]
        )
