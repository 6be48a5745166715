"""Runs are listed, filtered and found by name from their folders, whatever a file in them says."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from ravine.cli.main import main
from ravine.cli.run_folders import index, record
from ravine.errors import UsageError

CSV = "epoch,step,train/loss,val/loss\n0,4,2.0,\n0,4,,1.5\n0,9,1.8,\n0,9,,1.7\n"


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["ravine"])


def make_run(name: str, started: float = 1e9, best: float | None = None, **values: Any) -> Path:
    """A run's folder with a record."""
    folder = Path("runs", *name.split("/"))
    (folder / "checkpoints").mkdir(parents=True)
    known = record.new_record("fit", name, "LanguageModel")
    known |= {"status": "done", "started": started, "duration_s": 60.0, "steps": 10} | values
    if best is not None:
        known["best"] = {"metric": "val/loss", "mode": "min", "value": best, "step": 10}
    record.write_record(folder, known)
    return folder


def make_old_run(name: str) -> Path:
    """A run's folder as earlier versions have left it: without a record."""
    folder = Path("runs", *name.split("/"))
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints" / "step=000010.ckpt").write_bytes(b"x" * 1000)
    (folder / "config.yaml").write_text(
        "seed_everything: 0\nmodel:\n  class_path: ravine.lightning_modules.SpamClassifier\n"
    )
    (folder / "metrics.csv").write_text(CSV)
    return folder


def listed(capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    assert main(["runs", *words, "--json"]) == 0
    return [run["name"] for run in json.loads(capsys.readouterr().out)]


def test_a_run_without_a_record_is_listed_from_its_files() -> None:
    make_old_run("spam/version_0")
    (run,) = index.list_runs(Path("runs"))
    assert (run.name, run.status, run.task, run.steps) == (
        "spam/0",
        "unknown",
        "SpamClassifier",
        10,
    )
    assert (run.metric, run.best, run.best_step) == ("val/loss", 1.5, 5)
    assert run.best_file is None  # the only checkpoint is of step 10
    assert run.size == 1000 + sum(
        (run.folder / name).stat().st_size for name in ("config.yaml", "metrics.csv")
    )


def test_the_best_value_is_shown_with_its_step_and_its_file(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = make_run("a/version_0", best=0.3)
    for name in ("step=000010.ckpt", "step=000020.ckpt", "mine.ckpt"):
        (folder / "checkpoints" / name).touch()
    best_file = "runs/a/version_0/checkpoints/step=000010.ckpt"
    assert main(["runs"]) == 0
    assert "val/loss 0.3 at step 10" in capsys.readouterr().out
    assert main(["runs", "show", "a/0"]) == 0
    assert f"best file  {best_file}" in capsys.readouterr().out
    assert main(["runs", "--json"]) == 0
    (run,) = json.loads(capsys.readouterr().out)
    assert (run["best_step"], run["best_file"]) == (10, best_file)
    outside = tmp_path / "outside.ckpt"
    outside.touch()
    for recorded, expected in (
        ("checkpoints/mine.ckpt", "mine.ckpt"),  # another name than that of the step
        ("checkpoints/removed.ckpt", "step=000010.ckpt"),
        (str(outside), "outside.ckpt"),  # Checkpoint(dirpath=...)
        ("\0", "step=000010.ckpt"),
    ):
        best = {"metric": "val/loss", "value": 0.3, "step": 10, "file": recorded}
        record.write_record(folder, (record.read_record(folder) or {}) | {"best": best})
        found = index.summarize(folder, Path("runs")).best_file
        assert found is not None
        assert found.name == expected


def test_a_resumed_run_shows_the_command_that_started_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    first_words = ["lightning", "fit", "--config=spam"]
    earlier = {"command": first_words, "parent": None}
    make_run("a/version_0", command=["lightning", "fit", "--ckpt_path=x"], history=[earlier, {}])
    parent = {"run": "a/version_0", "step": 5}
    make_run("a/version_1", command=["lightning", "fit", "--ckpt_path=y"], parent=parent)
    make_run("b/version_0", command=first_words)
    for name, expected in (("a/0", first_words), ("a/1", first_words), ("b/0", None)):
        run = index.summarize(index.find_run(name, Path("runs")), Path("runs"))
        assert run.first_command == expected, name
    assert main(["runs", "show", "a/1"]) == 0
    assert "first command  lightning fit --config=spam\n" in capsys.readouterr().out


def test_filters_keep_the_runs_that_satisfy_all_of_them(
    capsys: pytest.CaptureFixture[str],
) -> None:
    make_run("a/version_0", 1e9, best=0.3, steps=100)
    make_run("a/version_1", 1e9 + 1, best=0.7, steps=1000, status="failed")
    make_run("b/version_0", 1e9 + 2, task="Diffusion", duration_s=7200.0)
    make_old_run("c/version_0")
    names = {"a/0", "a/1", "b/0", "c/0"}
    assert {*listed(capsys)} == names
    assert listed(capsys, "a") == ["a/1", "a/0"]  # the newest first
    assert listed(capsys, "a", "--sort=best") == ["a/0", "a/1"]
    for words, expected in (
        (["--task=diffusion"], {"b/0"}),
        (["--task=Diffusion,SpamClassifier"], {"b/0", "c/0"}),
        (["--status", "failed"], {"a/1"}),
        (["--best=..0.5"], {"a/0"}),
        (["--steps=100.."], {"a/0", "a/1"}),
        (["--steps=100..100"], {"a/0"}),
        (["--time=1h..3h"], {"b/0"}),
        (["--size=1kB..", "--status=unknown"], {"c/0"}),
        (["--steps=100..", "--best=0.5.."], {"a/1"}),
    ):
        assert {*listed(capsys, *words)} == expected, words
    assert len(listed(capsys, "--limit=2")) == 2


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--stauts=done"], ["runs has no flag --stauts", "type: --status=done"]),
        (["--status=finished"], ["no status is called 'finished'", "type: --status=done"]),
        (["--task=LangaugeModel"], ["no run has the task", "--task=LanguageModel"]),
        (["--best=0.5"], ["--best=0.5 is no range", "from.., ..to", "type: --best=..0.5"]),
        (["--time=5y.."], ["--time=5y.. is no range", "type: --time=10m.."]),
        (["--sort=bets"], ["runs cannot be sorted by 'bets'", "type: --sort=best"]),
        (["--limit=0"], ["--limit=0", "type: --limit=20"]),
        (["shakspeare"], ["no run under runs is called 'shakspeare'", "shakespeare"]),
        (["show", "shakespeare"], ["2 runs begin with 'shakespeare'", "runs show shakespeare/0"]),
        (["show", "spam"], ["no run is called 'spam'"]),
        (["compare", "last"], ["needs two runs", "runs compare shakespeare/1 shakespeare/0"]),
        (["clean"], ["what to free was not given", "checkpoints, evaluations"]),
        (["clean", "chekpoints"], ["nothing to free is called", "runs clean checkpoints"]),
    ],
)
def test_a_mistake_is_answered_with_what_can_be_typed(
    words: list[str], expected: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    make_run("shakespeare/version_0")
    make_run("shakespeare/version_1", started=1e9 + 1)
    assert main(["runs", *words]) == 2
    said = capsys.readouterr().err
    assert all(text in said for text in expected), said


def test_a_run_is_found_by_path_name_beginning_and_last() -> None:
    make_run("task/config/version_3", 1e9)
    make_run("task/config/version_12", 1e9 + 9)
    make_run("task/config/version_1", 1e9 + 5)
    make_run("spam/quick/version_0", 1e9 + 1)
    root = Path("runs")
    (root / "task/config/version_3/checkpoints/step=000001.ckpt").touch()
    for text, expected in (
        ("task/config/3", "task/config/version_3"),
        ("task/config/version_3", "task/config/version_3"),
        ("runs/task/config/version_3", "task/config/version_3"),
        ("runs/task/config/version_3/", "task/config/version_3"),
        ("runs/task/config/version_3/checkpoints/step=000001.ckpt", "task/config/version_3"),
        ("task/config/1", "task/config/version_1"),  # 12 begins so too
        ("task/config/12", "task/config/version_12"),
        ("sp", "spam/quick/version_0"),
        ("last", "task/config/version_12"),
        (os.path.abspath("runs/spam/quick/version_0"), "spam/quick/version_0"),
    ):
        assert index.find_run(text, root).resolve() == (root / expected).resolve(), text
    for text in ("task", "", "task/config/2", "../runs/spam/quick/0", "x\0y"):
        with pytest.raises(UsageError):
            index.find_run(text, root)


def test_a_process_that_was_killed_leaves_a_run_that_is_recognized() -> None:
    code = (
        "import os\nfrom pathlib import Path\nfrom ravine.cli.run_folders import record\n"
        "folder = Path('runs/a/version_0')\nfolder.mkdir(parents=True)\n"
        "record.write_record(folder, record.new_record('fit', 'a', 'A'))\n"
        "print('written', flush=True)\ninput()\nos._exit(9)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"written\n"
        assert [run.status for run in index.list_runs(Path("runs"))] == ["running"]
        process.kill()
    assert [run.status for run in index.list_runs(Path("runs"))] == ["killed"]


def test_another_process_with_the_same_number_is_not_the_run() -> None:
    folder = make_run("a/version_0", status="running")
    assert index.summarize(folder, Path("runs")).status == "running"  # this process wrote it
    known = record.read_record(folder) or {}
    known["process"]["started"] = "1"
    record.write_record(folder, known)
    assert index.summarize(folder, Path("runs")).status == "killed"
    known["process"] |= {"host": "another", "started": None}
    record.write_record(folder, known)
    assert index.summarize(folder, Path("runs")).status == "running"
    old = time.time() - 7200
    os.utime(folder / "run.json", (old, old))
    assert index.summarize(folder, Path("runs")).status == "killed"


MALFORMED = [
    b"",
    b"{",
    b"[1, 2]",
    b"[" * 100_000,
    b'{"verb": 3}',
    b'{"verb": "fit", "steps": "many", "best": [1], "started": {}, "process": 7}',
    b'{"verb": "fit", "steps": true, "started": 1e999, "status": "fine", "machine": 3}',
    b'{"verb": "fit", "status": "running", "process": {"pid": "1"}, "duration_s": -1e400}',
    b'{"verb": "fit", "parent": {"run": "\\u0000", "step": 1}, "metrics": 3, "command": "x"}',
    b"\xff\xfe" * 100,
]


@pytest.mark.parametrize("content", MALFORMED)
def test_a_malformed_record_is_listed_and_shown_without_an_error(
    content: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_old_run("a/version_0")
    (folder / "run.json").write_bytes(content)
    assert main(["runs"]) == 0
    assert main(["runs", "show", "a"]) == 0
    assert "a/0" in capsys.readouterr().out


def test_links_and_devices_are_not_followed(tmp_path: Path) -> None:
    real = make_run("a/version_0")
    outside = tmp_path / "outside"
    real.rename(outside)
    real.symlink_to(outside)
    Path("runs/loop").symlink_to(Path("runs").resolve())
    other = Path("runs/b/version_0")
    other.mkdir(parents=True)
    (other / "run.json").symlink_to(outside / "run.json")
    (other / "metrics.csv").symlink_to("/dev/zero")
    os.mkfifo(other / "config.yaml")
    (run,) = index.list_runs(Path("runs"))
    assert (run.name, run.status, run.size) == ("b/0", "unknown", 0)


def test_a_name_cannot_control_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    make_run("a/version_0", task="\x1b[2Jred\rgreen")
    assert main(["runs"]) == 0
    assert "\x1b" not in capsys.readouterr().out


def test_the_record_of_a_repository_holds_commit_and_uncommitted_changes(tmp_path: Path) -> None:
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    Path("file.py").write_text("first\n")
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "add", "file.py"], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "x"], check=True)
    record.git_state.cache_clear()
    assert (record.git_state(str(tmp_path))[0] or {})["is_dirty"] is False
    Path("file.py").write_text("second\n")
    record.git_state.cache_clear()
    state, difference = record.git_state(str(tmp_path))
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    assert state is not None
    assert (state["commit"], state["is_dirty"]) == (head.stdout.strip(), True)
    assert state["changed_files"] == [" M file.py"]
    assert "-first\n+second" in difference
    record.git_state.cache_clear()


def test_the_list_imports_no_torch() -> None:
    make_old_run("a/version_0")
    code = (
        "import sys\nfrom ravine.cli.main import main\nassert main(['runs']) == 0\n"
        "print([m for m in ('torch', 'lightning', 'yaml', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_folder_in_place_of_a_record_does_not_hide_the_runs() -> None:
    make_run("a/version_0")
    Path("runs/b/version_0/run.json").mkdir(parents=True)
    runs = {run.name: run.status for run in index.list_runs(Path("runs"))}
    assert runs == {"a/0": "done", "b/0": "unknown"}
