"""`lightning new`: each file that it writes runs by the commands that it prints."""

import importlib
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ravine.cli.commands import new_file
from ravine.cli.main import main
from ravine.errors import UsageError

Capture = pytest.CaptureFixture[str]
# in eight characters of an untrained net a line may have no end
pytestmark = pytest.mark.filterwarnings("ignore:all (8|16) advantages are 0")
SHORT = {
    "task": ["--trainer.max_epochs=2", "--data.num_points=100"],
    "optimizer": ["--trainer.max_steps=2", "--model.num_layers=1", "--data.source=embedded"],
    "callback": ["--trainer.max_epochs=1", "--data.source=embedded"],
    "reward": [
        "--model.base_checkpoint=base.ckpt",
        "--model.max_new_tokens=8",
        "--data.prompt_length=8",
        "--data.num_val_prompts=8",
        "--data.batch_size=8",
        "--data.source=embedded",
        "--trainer.max_steps=2",
        "--trainer.val_check_interval=2",
    ],
}


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder, from which classes are imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning"])
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    return tmp_path


def written_commands(capsys: Capture, *words: str) -> list[list[str]]:
    """Write a file, and return the commands that are printed, without the program."""
    assert main(["new", *words]) == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    return [shlex.split(line)[1:] for line in lines]


def run(command: list[str], kind: str = "") -> None:
    flags = SHORT.get(kind, [])
    cpu = ["--trainer.accelerator=cpu", "--trainer.precision=32-true"]
    assert main([*command, *flags, *cpu]) == 0


def test_a_new_task_trains_and_is_tested_by_the_printed_commands(capsys: Capture) -> None:
    fit, test = written_commands(capsys, "task", "Planets")
    assert fit[:3] == ["fit", "--model=planets.Planets", "--data=planets.PlanetsData"]
    run(fit, "task")
    assert "val/accuracy" in capsys.readouterr().out
    run(test)
    assert "test/accuracy" in capsys.readouterr().out


def test_a_new_task_learns() -> None:
    main(["new", "task", "learner.Circles"])
    module = importlib.import_module("learner")
    from ravine import Trainer

    torch.manual_seed(0)
    trainer = Trainer(max_epochs=20, logger=False, accelerator="cpu", enable_checkpointing=False)
    trainer.fit(model := module.Circles(), datamodule=module.CirclesData())
    trainer.test(model, datamodule=module.CirclesData())
    assert trainer.callback_metrics["test/accuracy"] > 0.9  # 0.62 are outside


def test_a_new_optimizer_trains_by_the_printed_command(capsys: Capture) -> None:
    (fit,) = written_commands(capsys, "optimizer", "SignDescent")
    run(fit, "optimizer")
    assert "SignDescent" in capsys.readouterr().out


def test_a_new_optimizer_follows_its_formula() -> None:
    main(["new", "optimizer", "formula.Signs"])
    weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = importlib.import_module("formula").Signs([weight], lr=0.1, weight_decay=0.5)
    for gradient in ([1.0, 1.0], [-30.0, 1.0]):  # the averages become (-2.9, 0.19)
        weight.grad = torch.tensor(gradient)
        optimizer.step()
    decayed = 0.95 * (0.95 * torch.tensor([1.0, -2.0]) - 0.1) - torch.tensor([-0.1, 0.1])
    torch.testing.assert_close(weight.data, decayed)


def test_a_new_callback_logs_by_the_printed_command(capsys: Capture) -> None:
    (fit,) = written_commands(capsys, "callback", "WeightNorm")
    run([*fit, "--trainer.log_every_n_steps=1", "--trainer.callbacks.every_n_steps=1"], "callback")
    (metrics,) = Path().rglob("metrics.csv")
    assert "train/weight_rms" in metrics.read_text().splitlines()[0]


def test_a_new_reward_trains_by_the_second_printed_command(capsys: Capture) -> None:
    from ravine import Trainer
    from ravine.datamodules import TextDataModule
    from ravine.lightning_modules import LanguageModel

    trainer = Trainer(max_steps=1, logger=False, limit_val_batches=0, accelerator="cpu")
    model = LanguageModel(num_layers=1, d_model=16, num_heads=2, zero_init_residual=False)
    trainer.fit(model, TextDataModule(source="embedded", context_length=16, batch_size=8))
    trainer.save_checkpoint("base.ckpt")
    capsys.readouterr()
    base, fit = written_commands(capsys, "reward", "ShortLines")
    assert base == ["fit", "--config", "reinforce/quick_base"]
    run(fit, "reward")
    assert "short_lines" in capsys.readouterr().out


@pytest.mark.parametrize("kind", new_file.EXAMPLE_NAMES)
def test_a_written_file_has_no_word_of_its_template(kind: str) -> None:
    text = new_file.render_template(kind, "mine", "Mine")
    assert "new_" not in text
    assert "New" not in text
    compile(text, "mine.py", "exec")


def test_written_files_meet_the_rules_of_the_linter(capsys: Capture) -> None:
    for kind in new_file.EXAMPLE_NAMES:
        main(["new", kind, f"my_{kind}.My{kind.capitalize()}"])
    ruff = [sys.executable, "-m", "ruff", "check", "--isolated", "--select=E,F,B", "."]
    done = subprocess.run([*ruff, "--line-length=110"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_a_file_is_never_overwritten(capsys: Capture) -> None:
    Path("mine.py").write_text("precious")
    assert main(["new", "task", "mine.Task"]) == 2
    assert "lightning new task mine_2.Task" in capsys.readouterr().err
    assert Path("mine.py").read_text() == "precious"
    Path("link.py").symlink_to("target.py")  # a broken link is a file, too
    assert main(["new", "task", "link.Task"]) == 2
    assert not Path("target.py").exists()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("SignDescent", ("sign_descent", "SignDescent")),
        ("sign_descent", ("sign_descent", "SignDescent")),
        ("mine.SignDescent", ("mine", "SignDescent")),
        ("MLPMixer", ("mlp_mixer", "MLPMixer")),
        ("mine.lower", ("mine", "lower")),
    ],
)
def test_a_name_gives_a_file_and_a_class(name: str, expected: tuple[str, str]) -> None:
    assert new_file.parse_name(name, "task") == expected


@pytest.mark.parametrize(
    ("name", "flag"),
    [
        ("torch", "lightning new task my_torch.Torch"),
        ("random", "lightning new task my_random.Random"),
        ("a-b", "lightning new task a_b"),
        ("3d", "lightning new task"),
        ("class", "lightning new task"),
        ("../Escape", "lightning new task"),
        ("a.b.C", "lightning new task"),
        ("", "lightning new task"),
    ],
)
def test_a_name_that_python_cannot_import_is_refused(name: str, flag: str) -> None:
    with pytest.raises(UsageError) as refusal:
        new_file.parse_name(name, "task")
    assert refusal.value.flag.startswith(flag)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["tsk", "X"], "  type: lightning new task X"),
        ([], "  type: lightning new task Planets"),
        (["reward"], "  type: lightning new reward ShortLines"),
        (["task", "A", "B"], "  type: lightning new task Planets"),
        (["task", "--force"], "  type: lightning new task Planets"),
    ],
)
def test_wrong_arguments_are_answered_with_a_command(
    words: list[str], line: str, capsys: Capture
) -> None:
    assert main(["new", *words]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == line
    assert [*Path().iterdir()] == []


def test_a_folder_that_cannot_be_written_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def refuse(path: Path, mode: str = "r", **kwargs: Any) -> Any:
        if mode == "x":
            raise PermissionError(13, "Permission denied")
        return open_file(path, mode, **kwargs)

    open_file = Path.open
    monkeypatch.setattr(Path, "open", refuse)
    assert main(["new", "task", "Planets"]) == 2
    assert "planets.py cannot be written: Permission denied" in capsys.readouterr().err
