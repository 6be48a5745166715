"""Only what was asked for is deleted, inside of runs' folders, and never a newest or best file."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from ravine.cli.main import main
from ravine.cli.run_folders import cleaning, index, record
from ravine.errors import UsageError
from ravine.strategies import AtomicCheckpointIO


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["ravine"])


def make_run(name: str, status: str = "done", **values: Any) -> Path:
    folder = Path("runs", *name.split("/"))
    folder.mkdir(parents=True)
    known = record.new_record("fit", name, "A") | {"status": status, "started": 1e9} | values
    record.write_record(folder, known)
    return folder


def save(folder: Path, step: int, best: str = "") -> Path:
    """A checkpoint whose callback names `best` as the best file."""
    path = folder / "checkpoints" / f"step={step:06d}.ckpt"
    state = {"monitor": "val/loss", "best_model_path": best, "best_k_models": {best: 1.0}}
    content = {"global_step": step, "state_dict": {"w": torch.zeros(4)}}
    AtomicCheckpointIO().save_checkpoint(content | {"callbacks": {"Checkpoint": state}}, path)
    os.utime(path, (1e9 + step, 1e9 + step))
    return path


def left(root: str = "runs") -> set[str]:
    return {p.relative_to(root).as_posix() for p in Path(root).rglob("*") if not p.is_dir()}


def steps(folder: Path) -> list[int]:
    return sorted(int(p.stem[5:]) for p in (folder / "checkpoints").glob("*.ckpt"))


def test_the_newest_and_the_best_checkpoint_stay_and_the_others_go_after_yes(
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = make_run("a/version_0")
    paths = [save(run, step, "runs/a/version_0/checkpoints/step=000002.ckpt") for step in range(5)]
    before = left()
    assert main(["runs", "clean", "checkpoints"]) == 0
    assert left() == before
    said = capsys.readouterr().out
    shown = {path for path in paths if str(path) in said}
    assert shown == {paths[0], paths[1], paths[3]}
    assert "nothing was deleted yet: 3 entries" in said
    assert "runs clean checkpoints --yes" in said
    assert main(["runs", "clean", "checkpoints", "--yes"]) == 0
    assert steps(run) == [2, 4]


def test_a_best_checkpoint_in_the_folder_of_the_parent_stays() -> None:
    parent, child = make_run("a/version_0"), make_run("a/version_1")
    for step in range(4):
        save(parent, step, "runs/a/version_0/checkpoints/step=000003.ckpt")
    save(child, 5, "runs/a/version_0/checkpoints/step=000001.ckpt")
    assert main(["runs", "clean", "checkpoints", "a/0", "--yes"]) == 0
    assert (steps(parent), steps(child)) == ([1, 3], [5])


def test_a_run_whose_newest_checkpoint_is_damaged_keeps_the_newest_whole_one_too() -> None:
    run = make_run("a/version_0")
    for step in range(4):
        save(run, step)
    (run / "checkpoints" / "step=000003.ckpt").write_bytes(b"damaged")
    os.utime(run / "checkpoints" / "step=000003.ckpt", (2e9, 2e9))
    assert main(["runs", "clean", "checkpoints", "--yes"]) == 0
    assert steps(run) == [2, 3]


def test_a_run_without_any_readable_checkpoint_keeps_them_all() -> None:
    run = make_run("a/version_0")
    for step in range(3):
        save(run, step).write_bytes(b"damaged")
    assert main(["runs", "clean", "checkpoints", "--yes"]) == 0
    assert steps(run) == [0, 1, 2]


def test_a_run_that_is_being_written_to_is_left_alone(capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run("a/version_0", status="running")  # by this process
    for step in range(3):
        save(run, step)
    assert main(["runs", "clean", "checkpoints", "--yes"]) == 0
    assert steps(run) == [0, 1, 2]
    assert "a/0 is running: left alone" in capsys.readouterr().out


def test_links_are_neither_followed_nor_deleted(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    other = make_run("../outside/version_9")
    for step in range(3):
        save(other, step)
    run = make_run("a/version_0")
    newest = save(run, 9)
    (run / "checkpoints" / "step=000001.ckpt").symlink_to(
        outside / "version_9/checkpoints/step=000000.ckpt"
    )
    linked = make_run("a/version_1")
    (linked / "checkpoints").symlink_to(outside / "version_9" / "checkpoints")
    (linked / "test_0").symlink_to(outside / "version_9")
    Path("runs/b").symlink_to(outside)
    (run / "events.out.tfevents.1").symlink_to(outside / "version_9/run.json")
    before, outside_before = left(), left("outside")
    for what in cleaning.KINDS:
        assert main(["runs", "clean", what, "--yes"]) == 0
    assert (left(), left("outside")) == (before, outside_before)
    assert newest.exists()


def test_a_folder_that_becomes_a_link_after_it_was_shown_is_not_followed(tmp_path: Path) -> None:
    run = make_run("a/version_0")
    for step in range(2):
        save(run, step)
    (deletion,) = cleaning.find_old_checkpoints(index.list_runs(Path("runs")), [])[:1] or [None]
    assert deletion is not None
    (run / "checkpoints").rename(tmp_path / "elsewhere")
    (run / "checkpoints").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match="cannot be deleted"):
        cleaning.delete(deletion, Path("runs"))
    assert len(list((tmp_path / "elsewhere").iterdir())) == 2


def test_a_failed_run_goes_only_if_no_checkpoint_lies_anywhere_inside() -> None:
    make_run("a/version_0", status="failed")
    save(make_run("a/version_1", status="failed"), 3)
    make_run("a/version_2", status="done")
    forged = make_run("b", status="failed")  # a record above other runs
    save(make_run("b/version_0"), 3)
    assert main(["runs", "clean", "failed", "--yes"]) == 0
    assert not Path("runs/a/version_0").exists()
    assert Path("runs/a/version_1").exists()
    assert Path("runs/a/version_2").exists()
    assert forged.exists()


def test_evaluations_and_event_files_go_and_the_rest_of_the_run_stays() -> None:
    run = make_run("a/version_0")
    save(run, 1)
    (run / "events.out.tfevents.1").write_text("x")
    (run / "metrics.csv").write_text("step\n")
    make_run("a/version_0/test_0", verb="test")
    (run / "samples").mkdir()
    (run / "samples" / "image.png").touch()
    assert main(["runs", "clean", "evaluations", "--yes"]) == 0
    assert not (run / "test_0").exists()
    assert main(["runs", "clean", "events", "--status=done", "--yes"]) == 0
    kept = {"run.json", "metrics.csv", "samples/image.png", "checkpoints/step=000001.ckpt"}
    assert left("runs/a/version_0") == kept


def test_filters_choose_the_runs_to_clean() -> None:
    runs = [make_run(f"a/version_{i}", status) for i, status in enumerate(("done", "killed"))]
    for run in runs:
        for step in range(2):
            save(run, step)
    assert main(["runs", "clean", "checkpoints", "a", "--status=killed", "--yes"]) == 0
    assert [steps(run) for run in runs] == [[0, 1], [1]]
