"""A signal stops a run at a safe point, on all ranks alike, with its exit status."""

import os
import signal
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ravine.callbacks import EMA, Checkpoint, ExactResume
from ravine.callbacks.checkpointing.graceful_stop import GracefulStop, SignalInterrupt
from ravine.strategies.checkpoint.atomic_io import AtomicCheckpointIO, find_damage

STATUS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGUSR1: 138}


class Net(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.2), nn.Linear(4, 1))
        self.validated: list[int] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.net(batch[0]).square().mean()

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val/loss", self.net(batch[0]).square().mean(), sync_dist=True)

    def on_validation_end(self) -> None:
        self.validated.append(self.trainer.global_step)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), 0.01)


class Send(Callback):
    """Send this process a signal at the n-th call of a hook, one or more times."""

    def __init__(self, hook: str, n: int = 1, signum: int = signal.SIGINT, times: int = 1) -> None:
        self.left = n
        setattr(self, hook, lambda *_, **__: self.send(signum, times))

    def send(self, signum: int, times: int) -> None:
        self.left -= 1
        for _ in range(times if self.left == 0 else 0):
            os.kill(os.getpid(), signum)


def trainer(folder: Path, *callbacks: Callback, **settings: Any) -> L.Trainer:
    settings = {"max_steps": 12, "val_check_interval": 6, "devices": 1} | settings
    L.seed_everything(5, verbose=False)
    return L.Trainer(
        accelerator="cpu",
        accumulate_grad_batches=2,
        callbacks=[ExactResume(), GracefulStop(), *callbacks],
        plugins=[AtomicCheckpointIO()],
        logger=False,
        enable_checkpointing=any(isinstance(c, Checkpoint) for c in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=folder,
        **settings,
    )


def fit(run: L.Trainer, ckpt: str | None = None) -> Net:
    net = Net()
    x = torch.randn(80, 4, generator=torch.Generator().manual_seed(1))
    train = DataLoader(TensorDataset(x), 4, shuffle=True)
    run.fit(net, train, DataLoader(TensorDataset(x[:12]), 4), ckpt_path=ckpt)
    return net


def interrupted(run: L.Trainer) -> SignalInterrupt:
    with pytest.raises(SignalInterrupt) as stopped:
        fit(run)
    return stopped.value


def weights(net: nn.Module) -> list[Tensor]:
    return [p.detach() for p in net.parameters()]


@pytest.fixture(autouse=True)
def the_signals_are_given_back() -> Any:
    before = [signal.getsignal(s) for s in STATUS]
    yield
    assert [signal.getsignal(s) for s in STATUS] == before


@pytest.mark.parametrize("signum", STATUS)
@pytest.mark.parametrize("at", [1, 6, 7])  # in a step, in one with a validation, between two halves
def test_a_stopped_and_resumed_run_equals_an_uninterrupted_run(
    signum: signal.Signals, at: int, tmp_path: Path
) -> None:
    stop = interrupted(trainer(tmp_path, Send("on_train_batch_start", at, signum)))
    step = (at + 1) // 2
    assert stop.code == STATUS[signum]
    assert stop.checkpoint == str(tmp_path / "checkpoints" / f"step={step:06d}.ckpt")
    assert find_damage(stop.checkpoint) is None
    whole = fit(trainer(tmp_path))
    resumed = fit(trainer(tmp_path), stop.checkpoint)
    assert all(map(torch.equal, weights(whole), weights(resumed)))
    assert resumed.validated == [s for s in whole.validated if s >= step]


def test_a_second_signal_stops_at_once(tmp_path: Path) -> None:
    run = trainer(tmp_path, Send("on_train_batch_start", 3, times=2))
    stop = interrupted(run)
    assert (stop.code, stop.checkpoint) == (130, None)
    assert run.global_step == 1
    assert not (tmp_path / "checkpoints").exists()


def test_a_stop_within_a_validation_ends_after_the_batch_and_the_resume_validates_again(
    tmp_path: Path,
) -> None:
    run = trainer(tmp_path, Send("on_validation_batch_start", 5))  # the second of three, step 6
    stop = interrupted(run)
    assert run.global_step == 6
    assert run.fit_loop.epoch_loop.val_loop.batch_progress.current.ready == 2
    whole = fit(trainer(tmp_path))
    resumed = fit(trainer(tmp_path), stop.checkpoint)
    assert resumed.validated == [6, *[s for s in whole.validated if s > 6]]
    assert all(map(torch.equal, weights(whole), weights(resumed)))


def test_weights_swapped_in_for_a_validation_are_not_saved_as_the_training_weights(
    tmp_path: Path,
) -> None:
    average = EMA()
    run = trainer(tmp_path, average, Send("on_validation_batch_start", 5))
    stop = interrupted(run)
    assert run.global_step == 7  # the validation was finished, and one more step taken
    whole = fit(trainer(tmp_path, EMA()))
    resumed = fit(trainer(tmp_path, EMA()), stop.checkpoint)
    assert all(map(torch.equal, weights(whole), weights(resumed)))


def test_outside_of_training_a_signal_stops_at_once_with_a_message(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for hook in ("on_fit_start", "setup"):
        stop = interrupted(trainer(tmp_path, Send(hook, signum=signal.SIGTERM)))
        assert (stop.code, stop.checkpoint) == (143, None)
        assert (
            "stopped by SIGTERM before the first step: nothing was saved" in capfd.readouterr().err
        )
    run = trainer(tmp_path, Send("on_validation_batch_start", 2))
    with pytest.raises(SignalInterrupt) as stopped:
        run.validate(Net(), DataLoader(TensorDataset(torch.ones(9, 4))), verbose=False)
    assert stopped.value.code == 130
    assert "\nstopped by SIGINT\n" in capfd.readouterr().err


def test_a_signal_after_the_last_step_is_not_lost(tmp_path: Path) -> None:
    run = trainer(tmp_path, Send("on_train_epoch_end", 2))
    assert interrupted(run).code == 130
    assert run.global_step == 12


def test_a_checkpoint_of_the_same_step_is_not_saved_again(tmp_path: Path) -> None:
    keep = Checkpoint(str(tmp_path), every_n_train_steps=4)
    stop = interrupted(trainer(tmp_path, keep, Send("on_train_batch_start", 8)))
    assert stop.checkpoint == str(tmp_path / "step=000004.ckpt") == keep.last_model_path
    stop = interrupted(trainer(tmp_path, keep, Send("on_train_batch_start", 9)))
    assert stop.checkpoint == str(tmp_path / "step=000005.ckpt")


def test_a_loader_worker_ignores_the_stop_signal(tmp_path: Path) -> None:
    answers = []

    class StartsProcess(Callback):
        def on_train_start(self, *_: Any) -> None:
            if (child := os.fork()) == 0:
                os.kill(os.getpid(), signal.SIGINT)
                os._exit(7)
            answers.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))

    fit(trainer(tmp_path, StartsProcess(), max_steps=1))
    assert answers == [7]


def test_an_error_restores_the_signal_handlers(tmp_path: Path) -> None:
    class Fail(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            raise ValueError("of the user's own")

    with pytest.raises(ValueError, match="own"):
        fit(trainer(tmp_path, Fail()))


def stop_one_of_two(folder: str, hook: str, at: int, targets: str) -> tuple:
    is_target = os.environ["RANK"] in targets
    os.dup2(os.open(Path(folder, "printed"), os.O_CREAT | os.O_APPEND | os.O_WRONLY), 2)
    send = Send(hook, at if is_target else 0, signal.SIGTERM)
    run = trainer(Path(folder), send, devices=2, strategy="ddp", max_steps=2000)
    try:
        net = fit(run)
    except SignalInterrupt as stop:
        net, code, path = run.lightning_module, stop.code, stop.checkpoint
        return code, path, run.global_step, [w.tolist() for w in weights(net)]
    return "not stopped", len(weights(net))


@pytest.mark.parametrize(
    ("hook", "targets"),
    [
        ("on_train_batch_start", "0"),
        ("on_train_batch_start", "1"),
        ("on_train_batch_start", "0 1"),  # as Ctrl-C in the terminal of both
        ("on_validation_batch_start", "0"),
        ("on_validation_batch_start", "1"),
    ],
)
def test_a_signal_to_one_rank_stops_all_ranks_at_the_same_step_with_one_line(
    hook: str, targets: str, ranks: Any, tmp_path: Path
) -> None:
    first, second = ranks(stop_one_of_two, 2, str(tmp_path), hook, 7, targets, timeout=60)
    assert Path(tmp_path, "printed").read_text().count("stopping after this step") == 1
    assert first == second
    code, path, step, _ = first
    assert code == 143
    assert path == str(tmp_path / "checkpoints" / f"step={step:06d}.ckpt")
    assert find_damage(path) is None
    assert torch.load(path, weights_only=True)["global_step"] == step


def count_meetings(folder: str) -> tuple[int, int]:
    run = trainer(Path(folder), devices=2, strategy="ddp", max_steps=100, limit_val_batches=0)
    meetings = 0
    all_reduce = torch.distributed.all_reduce

    def counting(*args: Any, group: Any = None, **kwargs: Any) -> Any:
        nonlocal meetings
        meetings += group is not None
        return all_reduce(*args, group=group, **kwargs)

    torch.distributed.all_reduce = counting
    fit(run)
    return meetings, run.global_step


def test_ranks_do_not_communicate_at_every_step(ranks: Any, tmp_path: Path) -> None:
    (first, steps), (second, _) = ranks(count_meetings, 2, str(tmp_path))
    assert steps == 100
    assert 1 <= first == second < 50
