"""Mistakes that are answered without torch have the answer that the parser would give."""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from parsed_config import parse

from ravine.cli.config import early_checks
from ravine.cli.main import normalize_argv
from ravine.errors import UsageError

QUICK = "fit --config shakespeare/quick"
# mistakes, and the flag to type if it is known early
TABLE = [
    ("fit --cofnig spam", "--config=spam"),
    ("fit --config spam --tariner.max_steps=3", "--trainer.max_steps=3"),
    ("fit --config spam --max_steps=60", "--trainer.max_steps=60"),
    ("fit --config spam --epochs 3", "--trainer.max_epochs=3"),
    ("fit --config spam --seed=3", "--seed_everything=3"),
    ("fit --config spam --gpus=1", "--trainer.devices=1"),
    ("fit --config spam --output_dir=out", "--trainer.default_root_dir=out"),
    ("fit --config spam --batch_size=64", "--data.batch_size=64"),
    ("fit --config spam --lr=3", "--optimizer.lr=3"),
    ("fit --config spam lr=3", "--optimizer.lr=3"),
    ("fit --config spam trainer.max_steps=10", "--trainer.max_steps=10"),
    (f"{QUICK} --lr=1e-3", "--optimizer.lr=1e-3"),
    (f"{QUICK} --warmup_steps=10", "--schedule.warmup=10"),
    (f"{QUICK} --n_layer=2", "--model.num_layers=2"),
    # the value is wrong, or the answer depends on an imported class
    ("fit --config spam --max_steps=many", ""),
    ("fit --config spam --dtype=float32", ""),
    ("fit --config spam --lr=fast", ""),
    ("fit --model=LanguageModel --data=TextDataModule --lr=3", ""),
    (f"{QUICK} --trainer.callbacks+=OptimizerPlan --trainer.callbacks.optimizer=SGD --lr=3", ""),
    ("fit --config spam --ckpt_path=auto --lr=3", ""),
    ("fit --config spam --push_to_hub=3", ""),
]


def early_error(argv: list[str]) -> UsageError | None:
    try:
        early_checks.check_argv(argv)
    except UsageError as error:
        return error
    return None


@pytest.mark.parametrize(("line", "flag"), TABLE, ids=[line for line, _ in TABLE])
def test_an_early_answer_is_that_of_the_parser(
    line: str, flag: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning"])
    argv = normalize_argv(shlex.split(line))
    early = early_error(argv)
    assert ("" if early is None else early.flag) == flag
    if early is not None:
        with pytest.raises(UsageError) as raised:
            parse(*shlex.split(line))
        assert (raised.value.problem, raised.value.flag) == (early.problem, early.flag)
        assert raised.value.allowed[:1] == early.allowed[:1]


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
def test_the_names_are_those_of_the_parser(command: str) -> None:
    config = "spam/quick" if command != "predict" else "classifier/mnist"
    parser = parse(command, f"--config={config}").subcommand_parser(command)
    names = {action.dest.partition(".")[0] for action in parser._actions}
    # read before the parser: see cli/main.py, trust.py and callback_flags.py
    assert {*early_checks.known_names(command)} == names | {"trust", "optimizer", "schedule"}


@pytest.mark.parametrize(
    "line",
    [
        f"{QUICK} --optimizer=SGD --optimizer.lr -1 --schedule.kind=wsd --trust mine",
        "fit --config spam --print_groups --allow_changed_data --print_config --data=ImageData",
        "validate --config spam --verbose=false --ckpt_path last",
        "predict --config spam --return_predictions=true --ckpt_path=last",
        "fit --config spam --trainer.callbacks+=EMA --trainer.callbacks.decay 0.9",
    ],
)
def test_a_right_command_line_has_no_early_error(line: str) -> None:
    assert early_error(normalize_argv(shlex.split(line))) is None


def test_an_early_answer_imports_no_torch(tmp_path: Path) -> None:
    code = "import sys; from ravine.cli.main import main\n"
    code += "main(sys.argv[1:]); print('torch' in sys.modules, 'lightning' in sys.modules)"
    for line in ("fit --cofnig spam", "fit --config spam --lr=3", "fit --config spam EMA"):
        words = [sys.executable, "-c", code, *shlex.split(line)]
        done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, check=True)
        assert done.stdout.split() == ["False", "False"], done.stderr
        assert "  type: " in done.stderr
