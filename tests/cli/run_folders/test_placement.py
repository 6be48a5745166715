"""Where commands write: evaluations into the run that they evaluate, a resume into its own run."""

import csv
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ravine.cli.main import main
from ravine.cli.run_folders import index, placement, record
from ravine.errors import UsageError

SPAM = """
model: {class_path: SpamClassifier, init_args: {num_buckets: 64}}
data: {class_path: SpamDataModule, init_args: {source: embedded, batch_size: 10}}
trainer: {accelerator: cpu, max_epochs: 2, enable_model_summary: false, log_every_n_steps: 1}
"""


def enter(folder: Path, patch: pytest.MonkeyPatch) -> None:
    patch.chdir(folder)
    patch.setattr("sys.argv", ["ravine"])
    Path("spam.yaml").write_text(SPAM)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one trained run."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        enter(folder, patch)
        every = ["--trainer.callbacks+=Checkpoint", "--trainer.callbacks.save_top_k=-1"]
        assert main(["fit", "--config=spam", *every]) == 0
    return folder / "runs"


@pytest.fixture
def run(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it in the test's own folder."""
    enter(tmp_path, monkeypatch)
    shutil.copytree(runs, "runs")
    return Path("runs/spam/version_0")


def checkpoints(run: Path) -> list[Path]:
    """Oldest first."""
    return sorted((run / "checkpoints").iterdir())


def known(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run.json").read_text())


def versions() -> set[str]:
    return {p.name for p in Path("runs/spam").iterdir()}


def rows(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / "metrics.csv").read_text().splitlines()))


def test_the_record_says_what_made_a_run_and_how_it_ended(run: Path) -> None:
    found = known(run)
    assert found["command"][:3] == ["ravine", "fit", "--config=spam"]
    assert (found["verb"], found["configs"], found["status"]) == ("fit", ["spam"], "done")
    assert (found["name"], found["task"]) == ("spam", "SpamClassifier")
    assert found["duration_s"] > 0
    assert found["versions"].keys() >= {"python", "torch", "lightning", "ravine"}
    assert found["machine"].keys() >= {"host", "device", "ranks", "precision"}
    assert found["best"]["value"] == min(float(r["val/loss"]) for r in rows(run) if r["val/loss"])
    assert found["steps"] == torch.load(checkpoints(run)[-1], weights_only=True)["global_step"]
    assert "torch==" in (run / "packages.txt").read_text()


class EndsTheRun(L.Callback):
    """At the third step: by Ctrl-C, or by an error."""

    def __init__(self, by: str = "ctrl_c") -> None:
        self.by = by

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == 2:
            if self.by == "error":
                raise UsageError("the third step fails")
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize(
    ("by", "status", "exit_status"), [("ctrl_c", "interrupted", 130), ("error", "failed", 2)]
)
def test_the_record_says_how_a_run_was_ended(
    by: str, status: str, exit_status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    enter(tmp_path, monkeypatch)
    ends = [f"--trainer.callbacks+={__name__}.EndsTheRun", f"--trainer.callbacks.by={by}"]
    assert main(["fit", "--config=spam", *ends]) == exit_status
    result = known(Path("runs/spam/version_0"))
    assert (result["status"], result["steps"] >= 2) == (status, True)
    assert (by == "ctrl_c") or result["error"] == "UsageError: the third step fails"


def test_evaluations_write_into_the_run_that_they_judge(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    Path("mails.txt").write_text("WIN a free prize now!\nsee you at noon\n")
    for command in ("validate", "test", "test"):
        assert main([command, "--ckpt_path=last"]) == 0
    assert main(["predict", "--ckpt_path=spam/0", "--data.predict_path=mails.txt"]) == 0
    assert versions() == {"version_0"}
    assert {p: p.read_bytes() for p in before} == before
    assert (run / "predict_0" / "predictions.csv").is_file()
    assert {p.name for p in run.iterdir()} >= {"validate_0", "test_0", "test_1", "predict_0"}
    found = known(run / "test_1")
    assert (found["verb"], found["status"]) == ("test", "done")
    assert found["evaluated"]["run"] == "spam/version_0"
    assert "test/accuracy" in found["metrics"]
    capsys.readouterr()
    assert main(["runs", "show", "spam"]) == 0
    assert "test/accuracy" in capsys.readouterr().out
    assert len(index.list_runs(Path("runs"))) == 1


def test_a_read_only_or_foreign_checkpoint_is_judged_into_a_folder_of_its_own(
    run: Path, tmp_path: Path
) -> None:
    newest = checkpoints(run)[-1]
    Path("download").mkdir()
    shutil.copy(newest, "download/model.ckpt")
    assert main(["test", "--ckpt_path=download/model.ckpt"]) == 0
    assert versions() == {"version_0", "test_0"}
    assert [p.name for p in Path("download").iterdir()] == ["model.ckpt"]
    Path("shared/checkpoints").mkdir(parents=True)
    shutil.copy(run / "config.yaml", "shared")
    shutil.copy(newest, "shared/checkpoints")
    os.chmod("shared", 0o555)
    assert main(["test", f"--ckpt_path=shared/checkpoints/{newest.name}"]) == 0
    os.chmod("shared", 0o755)
    assert versions() == {"version_0", "test_0", "test_1"}
    assert {p.name for p in Path("shared").iterdir()} == {"config.yaml", "checkpoints"}


def test_a_resume_from_the_newest_goes_on_in_the_same_folder(run: Path) -> None:
    newest, earlier = checkpoints(run)[-1], rows(run)
    last = int(earlier[-1]["step"])
    with (run / "metrics.csv").open("a") as file:  # as a run killed after its last checkpoint
        names = list(earlier[0])
        file.write(",".join("999" if n == "step" else "7" for n in names) + "\n")
    words = ["--trainer.max_epochs=3", "--trainer.log_every_n_steps=1"]
    assert main(["fit", f"--ckpt_path={newest}", *words]) == 0
    assert versions() == {"version_0"}
    steps = [int(r["step"]) for r in rows(run) if r["train/loss"]]
    assert steps == sorted(set(steps))
    assert rows(run)[: len(earlier)] == earlier
    assert steps[-1] > last
    assert 999 not in steps
    found = known(run)
    assert (found["status"], len(found["history"])) == ("done", 1)
    assert found["history"][0]["steps"] < found["steps"]
    assert newest.exists()
    events = EventAccumulator(str(run)).Reload()  # of both files: one curve
    logged = [event.step for event in events.Scalars("train/loss")]
    assert logged == sorted(set(logged)) == steps


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--data.batch_size=5"], "data.batch_size"),
        (["--trainer.callbacks+=NaNGuard"], "trainer.callbacks"),
        (["--trainer.gradient_clip_val=1"], "trainer.gradient_clip_val"),
    ],
)
def test_a_resume_with_changed_arguments_is_a_new_version_that_names_its_parent(
    run: Path, words: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    newest = checkpoints(run)[-1]
    step = torch.load(newest, weights_only=True)["global_step"]
    assert main(["fit", f"--ckpt_path={newest}", "--trainer.max_epochs=3", *words]) == 0
    assert versions() == {"version_0", "version_1"}
    parent = known(Path("runs/spam/version_1"))["parent"]
    assert (parent["run"], parent["step"]) == ("spam/version_0", step)
    assert reason in capsys.readouterr().out


def test_a_resume_from_an_older_one_is_a_new_version_whose_curves_join(run: Path) -> None:
    older = checkpoints(run)[0]
    step = torch.load(older, weights_only=True)["global_step"]
    assert main(["fit", f"--ckpt_path={older}", "--trainer.log_every_n_steps=1"]) == 0
    child = Path("runs/spam/version_1")
    assert known(child)["parent"] == {
        "run": "spam/version_0",
        "checkpoint": str(older),
        "step": step,
    }
    root = Path("runs")
    joined = index.joined_curves(index.summarize(child, root), root)["train/loss"]
    assert joined == index.read_curves(run)["train/loss"]  # as exact as the resume


def test_a_run_whose_logs_count_from_0_is_gone_on_with_in_a_new_version_whose_curves_join(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    newest, lines = checkpoints(run)[-1], (run / "metrics.csv").read_text()
    before = index.read_curves(run)["train/loss"]
    # the record and the rows of an earlier version of Ravine
    old = known(run)
    assert old.pop("first_logged_step") == 1
    record.write_record(run, old)
    shifted = [row | {"step": str(int(row["step"]) - 1)} for row in rows(run)]
    with (run / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=lines.splitlines()[0].split(","))
        writer.writeheader()
        writer.writerows(shifted)
    assert index.read_curves(run)["train/loss"] == before
    words = ["--trainer.max_epochs=3", "--trainer.log_every_n_steps=1"]
    assert main(["fit", f"--ckpt_path={newest}", *words]) == 0
    assert versions() == {"version_0", "version_1"}
    assert "count steps from 0, as an older version did" in capsys.readouterr().out
    root = Path("runs")
    summary = index.summarize(Path("runs/spam/version_1"), root)
    joined = index.joined_curves(summary, root)["train/loss"]
    # one point for each step of both runs
    assert [step for step, _ in joined] == list(range(1, int(summary.steps or 0) + 1))
    assert joined[: len(before)] == before


def test_a_run_that_is_still_written_to_is_not_gone_on_with(run: Path) -> None:
    record.write_record(
        run, known(run) | {"status": "running", "process": record.current_process()}
    )
    assert main(["fit", f"--ckpt_path={checkpoints(run)[-1]}", "--trainer.max_epochs=3"]) == 0
    assert versions() == {"version_0", "version_1"}


def test_a_checkpoint_that_is_reached_by_a_link_is_not_the_runs_own(run: Path) -> None:
    newest = checkpoints(run)[-1].resolve()
    other = Path("planted/version_0")
    other.mkdir(parents=True)
    (other / "config.yaml").touch()
    (other / "checkpoints").symlink_to(newest.parent)
    assert placement.run_of_checkpoint(other / "checkpoints" / newest.name) is None
    Path("linked").symlink_to(run.resolve())
    assert placement.run_of_checkpoint(Path("linked/checkpoints") / newest.name) is None
    assert placement.run_of_checkpoint(newest) == run.resolve()


@pytest.mark.parametrize("name", ["config.yaml", "hparams.yaml", "metrics.csv", "checkpoints/x"])
def test_a_run_with_a_link_inside_is_not_gone_on_with(run: Path, name: str) -> None:
    outside, newest = Path("outside.txt").resolve(), checkpoints(run)[-1]
    outside.write_text("mine")
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(outside)
    assert main(["fit", f"--ckpt_path={newest}", "--trainer.max_epochs=3"]) == 0
    assert outside.read_text() == "mine"
    assert versions() == {"version_0", "version_1"}


def test_names_of_runs_last_and_best_are_checkpoints(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, newest = checkpoints(run)[0], checkpoints(run)[-1]
    content = torch.load(newest, weights_only=True)
    (key,) = (k for k in content["callbacks"] if k.startswith("Checkpoint"))
    content["callbacks"][key]["best_model_path"] = f"/elsewhere/{first.name}"
    torch.save(content, newest)
    for request, expected in (
        ("last", newest),
        ("best", first),
        ("spam/0", newest),
        ("spam/0/best", first),
        ("spam", newest),
        ("runs/spam/version_0", newest),
    ):
        capsys.readouterr()
        assert main(["validate", f"--ckpt_path={request}"]) == 0
        assert f"--ckpt_path {request}: {expected}" in capsys.readouterr().out
    assert main(["validate", "--ckpt_path=spam/7"]) == 2
    assert "spam/0" in capsys.readouterr().err
    first.unlink()
    assert main(["validate", "--ckpt_path=best"]) == 2
    assert "the best checkpoint by val/loss" in capsys.readouterr().err


def test_last_is_the_newest_of_the_class_that_is_named(run: Path) -> None:
    model = "--model=external_modules.net_in_init.NetInInit"
    assert main(["fit", model, "--trainer.max_steps=1", "--trainer.accelerator=cpu"]) == 0
    assert main(["validate", "--ckpt_path=last", "--model=SpamClassifier"]) == 0
    assert (run / "validate_0").is_dir()
