"""Checkpoint keeps the newest and the best file of a run, complete, finite and after validation."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ravine.callbacks import Checkpoint, ExactResume
from ravine.callbacks.stability.nan_guard import NonFiniteError
from ravine.strategies.checkpoint.atomic_io import AtomicCheckpointIO, CheckpointError, find_damage


class Net(L.LightningModule):
    """Validation losses come from a list; a weight can be spoiled at a step."""

    def __init__(self, values: list[float] | None = None, spoil: int | None = None) -> None:
        super().__init__()
        self.net = nn.Linear(2, 1)
        self.values, self.spoil = list(values or []), spoil

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.net(batch).square().mean()
        self.log("train/loss", loss)
        return loss

    def on_train_batch_end(self, *_: Any) -> None:
        if self.trainer.global_step == self.spoil:
            self.net.bias.data[0] = float("nan")

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        if self.values:
            self.log("val/loss", self.values[0], sync_dist=True)

    def on_validation_end(self) -> None:
        self.values = self.values[1:]

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.01)


def fit(net: Net, *callbacks: Any, ckpt: str | None = None, **settings: Any) -> L.Trainer:
    """Epochs of ten steps; a validation after every second one."""
    run = L.Trainer(
        accelerator="cpu",
        callbacks=[ExactResume(), *callbacks],
        plugins=[AtomicCheckpointIO()],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **({"max_steps": 10, "val_check_interval": 2, "devices": 1} | settings),
    )
    x = torch.randn(10, 2, generator=torch.Generator().manual_seed(1))
    run.fit(net, DataLoader(x, 1), DataLoader(x[:2], 1), ckpt_path=ckpt)
    return run


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_newest_and_the_best_remain(tmp_path: Path) -> None:
    seen = []

    class Look(Checkpoint):
        def on_validation_end(self, *args: Any) -> None:
            super().on_validation_end(*args)
            seen.append([int(name[5:11]) for name in names(tmp_path)])

    keep = Look(str(tmp_path))
    fit(Net([5, 3, 4, 2, 2.5]), keep)
    assert seen == [[2], [4], [4, 6], [8], [8, 10]]
    assert names(tmp_path) == ["step=000008.ckpt", "step=000010.ckpt"]
    assert keep.best_model_path == str(tmp_path / "step=000008.ckpt")
    assert keep.last_model_path == str(tmp_path / "step=000010.ckpt")
    assert keep.best_model_score == 2
    state = torch.load(keep.best_model_path, weights_only=True)["callbacks"]["Checkpoint[val/loss]"]
    assert state["best_model_path"] == keep.best_model_path  # the file knows that it is the best
    assert all(find_damage(path) is None for path in tmp_path.iterdir())


def test_the_greatest_two_or_all_can_be_kept(tmp_path: Path) -> None:
    two = Checkpoint(str(tmp_path / "two"), mode="max", save_top_k=2)
    fit(Net([5, 3, 4, 2, 2.5]), two)
    assert [name[5:11] for name in names(tmp_path / "two")] == ["000002", "000006", "000010"]
    fit(Net([5, 3]), Checkpoint(str(tmp_path / "all"), save_top_k=-1, every_n_train_steps=3))
    assert [int(name[5:11]) for name in names(tmp_path / "all")] == [2, 3, 4, 6, 8, 9, 10]


def test_a_validation_at_the_saved_step_is_part_of_the_single_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep = Checkpoint(str(tmp_path), every_n_train_steps=2, save_top_k=-1)
    monkeypatch.setattr(AtomicCheckpointIO, "save_checkpoint", failing_after(5))
    fit(Net([5, 3, 4, 2, 2.5]), keep)  # no step is written twice
    monkeypatch.undo()
    for step, score in ((2, 5), (4, 3), (6, 4), (8, 2), (10, 2.5)):
        file = torch.load(tmp_path / f"step={step:06d}.ckpt", weights_only=True)
        assert file["callbacks"][keep.state_key]["current_score"] == score
        resumed = Net([7] * 5)
        fit(
            resumed, Checkpoint(str(tmp_path / "new")), ckpt=str(tmp_path / f"step={step:06d}.ckpt")
        )
        assert len(resumed.values) == step // 2  # what was validated is not validated again


def test_a_validation_within_an_optimizer_step_is_saved_when_the_step_is_done(
    tmp_path: Path,
) -> None:
    keep = Checkpoint(str(tmp_path), save_top_k=-1)
    fit(Net([5, 3, 4]), keep, accumulate_grad_batches=2, val_check_interval=3, max_steps=4)
    assert [int(name[5:11]) for name in names(tmp_path)] == [2, 3, 4]
    assert keep.best_model_path == str(tmp_path / "step=000003.ckpt")
    assert [round(float(s), 1) for s in keep.best_k_models.values()] == [5, 3]


def test_weights_that_are_not_finite_never_replace_a_good_file(tmp_path: Path) -> None:
    keep = Checkpoint(str(tmp_path))
    text = r"no checkpoint is written at step 6, because net\.bias is not finite, .*NaNGuard\(\)"
    ended = r"a weight is not finite at step 6, the end of the run; .*step=000004\.ckpt"
    with (
        pytest.warns(UserWarning, match=text),
        pytest.raises(NonFiniteError, match=ended) as caught,
    ):
        fit(Net([5, 4, 3], spoil=6), keep, max_steps=6)
    assert caught.value.exit_status == 1
    assert names(tmp_path) == ["step=000004.ckpt"]
    assert keep.best_model_path == keep.last_model_path == str(tmp_path / "step=000004.ckpt")
    assert find_damage(keep.best_model_path) is None


def test_a_failed_save_ends_the_run_and_keeps_the_previous_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep = Checkpoint(str(tmp_path))
    monkeypatch.setattr(AtomicCheckpointIO, "save_checkpoint", failing_after(2))
    with pytest.raises(CheckpointError, match="no more room") as caught:
        fit(Net([5, 4, 3, 2, 1]), keep)
    assert caught.value.exit_status == 1
    assert names(tmp_path) == ["step=000004.ckpt"]
    assert find_damage(tmp_path / "step=000004.ckpt") is None


def failing_after(good: int) -> Any:
    plain = AtomicCheckpointIO.save_checkpoint
    count = 0

    def save_checkpoint(self: Any, *args: Any, **kwargs: Any) -> None:
        nonlocal count
        count += 1
        if count > good:
            raise CheckpointError("no more room", exit_status=1)
        plain(self, *args, **kwargs)

    return save_checkpoint


def fail_on_rank_zero(folder: str) -> str:
    AtomicCheckpointIO.save_checkpoint = failing_after(1)  # called on rank 0 alone
    try:
        fit(Net([5, 4, 3]), Checkpoint(folder), devices=2, strategy="ddp", max_steps=6)
    except CheckpointError as error:
        return f"{error.exit_status} {error}"
    return "went on"


def test_a_failed_save_on_one_rank_ends_every_rank(ranks: Any, tmp_path: Path) -> None:
    assert ranks(fail_on_rank_zero, 2, str(tmp_path), timeout=30) == ["1 no more room"] * 2
    assert names(tmp_path) == ["step=000002.ckpt"]


def test_a_run_resumed_in_another_folder_keeps_the_best_score(tmp_path: Path) -> None:
    first, second = tmp_path / "version_0", tmp_path / "version_1"
    fit(Net([5, 1]), Checkpoint(str(first)), max_steps=4)
    keep = Checkpoint(str(second))
    fit(Net([3, 2, 4]), keep, ckpt=str(first / "step=000004.ckpt"))
    assert names(first) == ["step=000004.ckpt"]
    assert names(second) == ["step=000010.ckpt"]
    assert keep.best_model_path == str(first / "step=000004.ckpt")
    assert keep.best_model_score == 1


def test_lightning_finds_the_last_and_the_best(tmp_path: Path) -> None:
    fit(Net([5, 1, 3]), Checkpoint(str(tmp_path)), max_steps=6)
    run = fit(Net([3, 2]), Checkpoint(str(tmp_path)), ckpt="last")
    assert run.global_step == 10
    assert names(tmp_path) == ["step=000004.ckpt", "step=000006.ckpt", "step=000010.ckpt"]
    run.validate(ckpt_path="best", dataloaders=DataLoader(torch.ones(1, 2)), verbose=False)
    assert run.ckpt_path == str(tmp_path / "step=000004.ckpt")


def test_without_a_validation_each_epoch_is_saved_and_the_newest_is_the_best(
    tmp_path: Path,
) -> None:
    keep = Checkpoint(str(tmp_path))
    run = fit(Net(), keep, limit_val_batches=0, max_steps=15)
    assert names(tmp_path) == ["step=000015.ckpt"]
    assert keep.best_model_path == keep.last_model_path
    assert run.current_epoch == 2


def test_the_last_step_is_saved_without_a_validation(tmp_path: Path) -> None:
    fit(Net([5, 1]), Checkpoint(str(tmp_path)), max_steps=5)
    assert names(tmp_path) == ["step=000004.ckpt", "step=000005.ckpt"]


def test_a_metric_that_is_never_logged_is_named(tmp_path: Path) -> None:
    keep = Checkpoint(str(tmp_path), monitor="val/los")
    with pytest.raises(ValueError, match=r"monitors .val/los., .* logged: val/loss, train/loss"):
        fit(Net([5]), keep)
    fit(Net(), Checkpoint(str(tmp_path)), max_steps=2)  # the default one may be missing
    assert names(tmp_path) == ["step=000002.ckpt"]


class ValLoss(Net):
    """A module whose metric has another name than the default of Checkpoint."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", torch.tensor(1.0))
        self.log("val_acc", torch.tensor(1.0))


def test_a_default_metric_that_nobody_logs_is_named_once_with_those_that_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(ValLoss(), Checkpoint(str(tmp_path)), max_steps=8)
    said = [line for line in capsys.readouterr().out.splitlines() if "monitor=" in line]
    assert said == [
        "Checkpoint: monitor='val/loss' is not logged by the end of the validation, so the newest "
        "checkpoint is the best (logged: val_loss, train/loss, val_acc); use monitor='val_loss'"
    ]
    fit(ValLoss(), Checkpoint(str(tmp_path), monitor="val_acc", mode="max"), max_steps=4)
    fit(Net([5, 4]), Checkpoint(str(tmp_path)), max_steps=4)
    assert "monitor=" not in capsys.readouterr().out


def test_a_fast_run_for_debugging_writes_nothing(tmp_path: Path) -> None:
    fit(Net([5]), Checkpoint(str(tmp_path)), fast_dev_run=True, max_steps=1)
    assert names(tmp_path) == []


def test_a_checkpoint_that_names_other_files_makes_no_run_delete_them(tmp_path: Path) -> None:
    keep = Checkpoint(str(tmp_path / "own"))
    fit(Net([5, 3]), keep, max_steps=4)
    (path,) = (tmp_path / "own").iterdir()
    checkpoint = torch.load(path, weights_only=True)
    victims = [tmp_path / "victim", tmp_path / "own" / "thesis.ckpt", tmp_path / "own" / "notes"]
    for victim in victims:
        (victim / "deep").mkdir(parents=True)
        named = str(tmp_path / "own" / ".." / "own" / ".." / victim.relative_to(tmp_path))
        for name in (named, str(victim)):
            state = checkpoint["callbacks"]["Checkpoint[val/loss]"]
            worst = torch.tensor(1e9)
            state |= {"best_k_models": {name: worst}, "kth_best_model_path": name}
            state |= {"kth_value": worst, "last_model_path": name, "best_model_path": name}
            torch.save(checkpoint, tmp_path / "evil.ckpt")
            again = Checkpoint(str(tmp_path / "own"))
            fit(Net([2, 1]), again, ckpt=str(tmp_path / "evil.ckpt"), max_steps=8)
    assert all((victim / "deep").is_dir() for victim in victims)
