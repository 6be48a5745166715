"""The tutorials work as written: their files and commands are run, made short."""

import os
import runpy
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from doc_pages import DOCS, files, shell_lines

from ravine.cli.main import main

LANGUAGE = ["--model.num_layers=1", "--model.d_model=16", "--model.num_heads=2"]
STEPS = ["--trainer.max_steps=51", "--trainer.limit_val_batches=1"]  # more than the warmup
TEXT = [*LANGUAGE, *STEPS, "--data.batch_size=4", "--trainer.val_check_interval=51"]
PLAN = ["--trainer.callbacks=OptimizerPlan", "--trainer.callbacks.optimizer=AdamW"]


@pytest.fixture
def run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str, dict[str, list[str]]], list[str]]:
    """Run the lines of a page in order, each with further flags; return those that were run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])

    def run_page(name: str, flags: dict[str, list[str]]) -> list[str]:
        page = DOCS / name
        for file, text in files(page.read_text()).items():
            Path(file).write_text(text)
        done = []
        for line in shell_lines(page.read_text()):
            more = next((flags[start] for start in flags if line.startswith(start)), None)
            if more is None or "--trainer.devices=2" in line:  # test_commands reads it
                continue
            program, *words = shlex.split(line)
            if program == "python":  # by a shell, for `>`
                environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
                command = ["bash", "-c", line.replace("python", shlex.quote(sys.executable), 1)]
                subprocess.run(command, check=True, env=environment, capture_output=True)
            else:
                words = [word.replace("step=000860", "step=000051") for word in words]
                assert main([*words, *more]) == 0, line
            done.append(line)
        return done

    return run_page


def test_your_text_trains_and_writes(run, capsys: pytest.CaptureFixture[str]) -> None:
    text = "lightning fit --config shakespeare/quick --data.path=my_text.txt"
    flags = {f"{text} --data.tokenizer=gpt2": None}  # its merges may not be on this machine
    flags |= {"python": [], text: TEXT, "lightning generate": ["--max_new_tokens=3"]}
    done = run("your_text.md", flags)
    assert len(done) == 7
    assert "my_text.txt" in capsys.readouterr().out
    source = Path("own_text.py").read_text().replace("max_steps=200", "max_steps=2")
    exec(compile(source, "own_text.py", "exec"), {"__name__": "__main__"})
    assert "\nThe " in capsys.readouterr().out


def test_your_images_are_classified_and_generated(run, capsys: pytest.CaptureFixture[str]) -> None:
    done = run(
        "your_images.md",
        {
            "python": [],
            "lightning fit --config classifier/mnist --data.source=shapes": [
                *PLAN,
                "--trainer.max_steps=30",
                "--model.variant=linear",
            ],
            "lightning fit --config diffusion/digits": [
                *STEPS,
                *("--model.base_channels=8", "--model.time_embed_dim=16", "--model.num_steps=2"),
            ],
            "lightning test": [],
            "lightning predict": [],
            "lightning generate": ["--num_steps=2"],
        },
    )
    assert len(done) == 7
    table = next(Path("runs").rglob("predictions.csv")).read_text().splitlines()
    assert len(table) == 201
    assert {line.split(",")[1] for line in table[1:]} <= {"circle", "square", "triangle"}
    assert Path("samples.png").is_file()


def test_your_answers_are_learned(run, capsys: pytest.CaptureFixture[str]) -> None:
    flags = {"python": [], "lightning fit --config gpt2": None, "lightning fit": TEXT}
    assert len(run("your_answers.md", flags | {"lightning generate": []})) == 6
    assert "sums.jsonl, 4,000 examples" in capsys.readouterr().out


def test_your_module_trains_by_flags_and_in_a_script(run) -> None:
    short = ["--trainer.max_epochs=1"]
    flags = {
        "lightning fit --ckpt_path": ["--trainer.max_epochs=2"],
        "lightning fit": short,
        "lightning validate": [],
        "python": [],
    }
    assert len(run("your_module.md", flags)) == 8


def test_the_scripts_of_the_task_pages_run(run, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("spam.md", "image_classifier.md"):
        run(name, {})
        (script,) = files((DOCS / name).read_text())
        runpy.run_path(script)
    assert "tensor" in capsys.readouterr().out
