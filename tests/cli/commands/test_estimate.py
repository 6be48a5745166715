"""`lightning estimate` takes the arguments of `fit`, and prints tables or JSON."""

import json
from pathlib import Path
from typing import Any

import pytest

from ravine.cli.commands.estimate import split_flags
from ravine.cli.main import main

SMALL = ["--model.num_layers=1", "--model.d_model=32", "--model.num_heads=2"]
TEXT = ["--data.source=embedded", "--data.context_length=16", "--data.batch_size=8"]
QUICK = ["estimate", "--config=shakespeare/quick", *SMALL, *TEXT]


@pytest.fixture(autouse=True)
def in_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_json_has_parameters_bytes_layouts_and_assumptions(capsys: Any, tmp_path: Path) -> None:
    assert main([*QUICK, "--gpu=h200", "--devices=2", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["parameters"]["all"] == sum(result["parameters"]["by_kind"].values())
    assert result["bytes"]["parameters"] == 4 * result["parameters"]["all"]
    assert result["flops"]["per_unit"] > 0
    assert [layout["name"] for layout in result["layouts"]][:4] == [
        *("ddp", "zero1", "zero2", "zero3")
    ]
    assert result["recommended"] == "ddp"
    assert result["total_steps"] == 860
    assert result["precision"] == "bf16-mixed"  # `auto` of the config, on the named GPU
    assert result["batch"] == {
        "unit": "tokens", "samples": 4, "units": 64, "accumulate": 1, "ranks": 2
    }  # fmt: skip
    assert any("TFLOP/s" in line for line in result["assumptions"])
    assert not list(tmp_path.iterdir())  # no run folder


def test_the_table_names_the_flags_to_type(capsys: Any) -> None:
    flags = ["--gpu_memory=40", "--gpu_tflops=100", "--trainer.devices=2", "--quick"]
    assert main([*QUICK, *flags, "--trainer.strategy=zero2"]) == 0
    printed = capsys.readouterr().out
    assert "recommended: ddp  --trainer.strategy=ddp --trainer.devices=2" in printed
    assert "2 ranks" in printed
    assert "optimizer state" in printed


def test_mistakes_are_one_line_with_what_to_type(capsys: Any) -> None:
    for flags, problem, typed in (
        (["--gpu=h20"], "gpu='h20'", "--gpu=h200"),
        (["--devices=two"], "--devices=two is not a whole number", "--devices=8"),
        (["--quick", "--measure"], "--quick computes by formula", "--measure"),
        (["--json=yes"], "--json takes no value", "--json"),
        (
            ["--quick", "--devices=3", "--trainer.strategy=2d"],
            "and there are 3",
            "--trainer.devices",
        ),
        (["--trainer.max_stepz=3"], "max_stepz", "--trainer.max_steps"),
    ):
        assert main([*QUICK, *flags]) == 2
        error = capsys.readouterr().err
        assert problem in error
        assert typed in error
        assert "Traceback" not in error


def test_a_missing_model_is_answered_with_a_command_of_estimate(capsys: Any) -> None:
    assert main(["estimate", "--gpu=h200"]) == 2
    error = capsys.readouterr().err
    assert "no model was given" in error
    assert " estimate --config" in error
    assert " fit " not in error


def test_flags_of_estimate_are_taken_out_and_all_others_stay() -> None:
    flags, others = split_flags(["--gpu", "a10", "--devices=4", "--trainer.devices=2", "--json"])
    assert (flags.gpu, flags.devices, flags.json, flags.level) == ("a10", 4, True, "simulate")
    assert others == ["--trainer.devices=2"]
