"""Each overlay of configs/strategy is one word more on the command line, refused in plain words.

CI trains on some of them; `pytest -m overlays` on all, each on the fewest ranks that it can have.
"""

import os
import re
from pathlib import Path

import pytest
import torch
import yaml
from ranks import fewest_ranks

from ravine.cli.main import main
from ravine.strategies import STRATEGY_PRESETS, MeshStrategy
from ravine.strategies.device_mesh import resolve_degrees

OVERLAYS = Path(__file__).resolve().parents[2] / "configs" / "strategy"
NAMES = sorted(path.stem for path in OVERLAYS.glob("*.yaml"))
QUICK = ["zero3", "sp"]  # a name, and a class with its arguments
WORDS = [
    *("fit", "--config", "shakespeare/quick_adamw", "--trainer.max_steps=2"),
    *("--trainer.val_check_interval=2", "--trainer.limit_val_batches=1", "--model.d_model=32"),
    *("--model.num_heads=4", "--data.source=embedded", "--trainer.accelerator=cpu"),
    *("--trainer.callbacks=OptimizerPlan", "--trainer.callbacks.optimizer=AdamW"),  # no warm-up
    *("--trainer.callbacks+=GradientClipping", "--trainer.callbacks.max_norm=1.0"),
    *("--trainer.callbacks+=GenerateSamples", "--trainer.callbacks.arguments.max_new_tokens=4"),
]


def arguments_of(name):
    """The arguments of MeshStrategy that an overlay gives, by itself or by a preset's name."""
    how = yaml.safe_load((OVERLAYS / f"{name}.yaml").read_text())["trainer"]["strategy"]
    return STRATEGY_PRESETS[how][1] if isinstance(how, str) else how["init_args"]


def train(name, folder):
    os.chdir(folder)
    more = ["--model.num_experts=8"] if "ep" in arguments_of(name) else []
    devices = f"--trainer.devices={os.environ['WORLD_SIZE']}"
    assert main([*WORDS, "--config", f"strategy/{name}", devices, *more]) == 0


def trained(ranks, name, folder):
    ranks(train, fewest_ranks(arguments_of(name)), name, folder)
    (written,) = folder.glob("runs/shakespeare/quick_adamw/version_0/checkpoints/*.ckpt")
    return torch.load(written, weights_only=True)["global_step"] == 2


@pytest.mark.parametrize("name", QUICK)
def test_an_overlay_trains_by_its_name(ranks, name, tmp_path):
    assert trained(ranks, name, tmp_path)


@pytest.mark.overlays
@pytest.mark.parametrize("name", [name for name in NAMES if name not in QUICK])
def test_every_other_overlay_trains_too(ranks, name, tmp_path):
    assert trained(ranks, name, tmp_path)


def refused(name, folder):
    os.chdir(folder)
    words = ["--config", f"strategy/{name}", "--trainer.devices=2", "--data.batch_size=40"]
    assert main([*WORDS, *words]) == 2


def test_an_error_found_at_the_first_batch_leaves_no_run_directory(ranks, tmp_path):
    ranks(refused, 2, "pp", tmp_path)  # 16 micro-batches of a batch of 40
    assert not list(tmp_path.rglob("*.yaml"))


def read(path):
    """The command above a file, the trainer's flags in it, and the text of the file."""
    text = path.read_text()
    command = re.search(r"# ([^\n]*--config gpt2/124m.*?[^\\])\n", text, re.DOTALL)[1]
    return command, dict(re.findall(r"--trainer\.(\w+)=(\d+)", command)), text


@pytest.mark.parametrize("name", [*NAMES, "torchrun.sh", "slurm.sh"])
def test_the_command_above_a_file_names_it_and_can_be_typed(name):
    script = name.endswith(".sh")
    path = OVERLAYS.parent / "cluster" / name if script else OVERLAYS / f"{name}.yaml"
    command, flags, text = read(path)
    overlay = "hsdp" if script else name
    start = rf".*cluster/{name}" if script else "lightning fit"
    assert re.match(rf"{start} --config gpt2/124m .*--config strategy/{overlay}\b", command)
    if script:
        flags |= {"devices": 8, "num_nodes": 2}
    else:
        assert set(yaml.safe_load(text)) == {"trainer"}
    base = yaml.safe_load((OVERLAYS.parent / "gpt2" / "124m.yaml").read_text())
    arguments = arguments_of(overlay)
    world = int(flags["devices"]) * int(flags.get("num_nodes", 1))
    mesh = resolve_degrees(MeshStrategy(**arguments).degrees, world)
    trainer_config = base["trainer"]
    steps = int(flags.get("accumulate_grad_batches", trainer_config["accumulate_grad_batches"]))
    share, left = divmod(
        base["data"]["init_args"]["batch_size"], steps * mesh["dp_replicate"] * mesh["dp_shard"]
    )
    assert left == 0
    assert share % arguments.get("num_microbatches", 1) == 0
    assert (
        int(flags.get("val_check_interval", trainer_config["val_check_interval"])) == 2000 * steps
    )


@pytest.mark.parametrize(
    ("words", "devices", "message"),
    [
        (["2d"], 3, "(dp_shard=-1, tp=2) needs a multiple of 2 processes, and there are 3"),
        (["3d"], 4, "needs a multiple of 8 processes, and there are 4"),
        (["hsdp"], 3, "needs a multiple of 2 processes, and there are 3"),
        (
            ["tp", "--trainer.strategy.tp=3"],
            2,
            "(dp_shard=1, tp=3) needs 3 processes, and there are 2",
        ),
        (["zero3", "--trainer.strategy=pp", "--trainer.strategy.pp=3"], 2, "pp=3) needs 3 proc"),
    ],
)
def test_a_world_size_that_does_not_fit_is_refused_with_a_valid_size(
    words, devices, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    overlay, *more = words
    devices = f"--trainer.devices={devices}"
    assert main([*WORDS, "--config", f"strategy/{overlay}", devices, *more]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert re.search(r"type:? --trainer.devices=\d+\n", said)
    assert not list(tmp_path.iterdir())
