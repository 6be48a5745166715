"""Each overlay of configs/strategy is one word more on the command line, refused in plain words.

CI trains on some of them; `pytest -m overlays` on all, each on the fewest ranks that it can have.
"""

import os
import re
from pathlib import Path

import pytest
import torch
import yaml

from ravine.cli.main import main

OVERLAYS = Path(__file__).resolve().parent.parent / "configs" / "strategy"
NAMES = sorted(path.stem for path in OVERLAYS.glob("*.yaml"))
FEWEST = {"hsdp": 4, "2d": 4, "3d": 8}
QUICK = ["zero3", "sp"]  # a name, and a class with its arguments
WORDS = [
    *("fit", "--config", "shakespeare/quick_adamw", "--trainer.max_steps=2"),
    *("--trainer.val_check_interval=2", "--trainer.limit_val_batches=1", "--model.width=32"),
    *("--model.heads=4", "--data.source=embedded", "--trainer.accelerator=cpu"),
    *("--trainer.precision=32-true", "--trainer.callbacks.arguments.max_new_tokens=4"),
]


def train(name, folder):
    os.chdir(folder)
    more = ["--model.experts=8"] if name == "ep" else []
    devices = f"--trainer.devices={os.environ['WORLD_SIZE']}"
    return main([*WORDS, "--config", f"strategy/{name}", devices, *more])


def trained(ranks, name, folder):
    assert set(ranks(train, FEWEST.get(name, 2), name, folder)) == {0}
    (written,) = folder.glob("runs/shakespeare/quick_adamw/version_0/checkpoints/*.ckpt")
    return torch.load(written, weights_only=True)["global_step"] == 2


@pytest.mark.parametrize("name", QUICK)
def test_an_overlay_trains_by_its_name(ranks, name, tmp_path):
    assert trained(ranks, name, tmp_path)


@pytest.mark.overlays
@pytest.mark.parametrize("name", [name for name in NAMES if name not in QUICK])
def test_every_other_overlay_trains_too(ranks, name, tmp_path):
    assert trained(ranks, name, tmp_path)


@pytest.mark.parametrize("name", NAMES)
def test_an_overlay_begins_with_a_command_that_names_it(name):
    text = (OVERLAYS / f"{name}.yaml").read_text()
    assert re.match(rf"# lightning fit --config \S+ .*--config strategy/{name}\b", text)
    assert set(yaml.safe_load(text)) == {"trainer"}


@pytest.mark.parametrize(
    ("name", "devices", "told"),
    [
        ("2d", 3, "MeshStrategy(dp_shard=-1, tp=2) needs a multiple of 2 processes; there are 3"),
        ("3d", 4, "needs a multiple of 8 processes; there are 4"),
        ("hsdp", 3, "needs a multiple of 2 processes; there are 3"),
    ],
)
def test_a_world_that_does_not_fit_is_refused_with_the_number_to_type(
    name, devices, told, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert main([*WORDS, "--config", f"strategy/{name}", f"--trainer.devices={devices}"]) == 2
    said = capsys.readouterr().err
    assert told in said
    assert re.search(r"type:? --trainer.devices=\d+\n", said)
    assert not list(tmp_path.iterdir())
