"""Whatever ends a job on several ranks, its newest checkpoint is complete and no rank remains.

Each case: the ranks that a signal hits, where they are then, and the exit status of each.
"""

import os
import pickle
import signal
import traceback

import lightning as L
import pytest
from external_modules.net_in_init import NetInInit
from ranks import started

from ravine.callbacks import Checkpoint, ExactResume, GracefulStop
from ravine.callbacks.checkpointing.graceful_stop import SignalInterrupt
from ravine.strategies import AtomicCheckpointIO, MeshStrategy
from ravine.strategies.checkpoint import sharded
from ravine.strategies.checkpoint.atomic_io import latest_valid_checkpoint
from ravine.strategies.mesh_strategy import destroy_process_group_at_exit

KILL, TERM, USR1 = signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1
LIMIT = 30  # seconds that a rank has to end once another has
STRATEGIES = {
    "ddp": lambda: "ddp",
    "zero3": lambda: MeshStrategy(save_distributed_checkpoint=True),
}
STOPPED, FAILED, KILLED = 143, 1, -9
EITHER = (STOPPED, FAILED)  # its own signal comes first, or the loss of another rank
CASES = {  # strategy, ranks that are hit, where, at which time, by what; the status of each rank
    "rank 0": ("zero3", [0], "step", 5, [TERM], [STOPPED] * 3),
    "rank 1": ("zero3", [1], "step", 5, [TERM], [STOPPED] * 3),
    "rank 2": ("zero3", [2], "step", 5, [TERM], [STOPPED] * 3),
    "in a validation": ("zero3", [1], "validation", 1, [TERM], [STOPPED] * 2),
    "in a save": ("zero3", [1], "save", 2, [TERM], [STOPPED] * 2),
    "in a save to one file": ("ddp", [0], "save", 2, [TERM], [STOPPED] * 2),
    "another signal": ("ddp", [1], "step", 5, [USR1], [138] * 2),
    "twice, all": ("zero3", [0, 1], "step", 5, [TERM, TERM], [EITHER] * 2),
    "twice, one": ("zero3", [1], "step", 5, [TERM, TERM], [FAILED, STOPPED]),
    "twice in a save": ("zero3", [0], "save", 2, [TERM, TERM], [STOPPED, FAILED]),
    "killed": ("zero3", [1], "step", 5, [KILL], [FAILED, KILLED, FAILED]),
    "killed, the first": ("ddp", [0], "step", 5, [KILL], [KILLED, FAILED]),
    "killed in a validation": ("ddp", [1], "validation", 1, [KILL], [FAILED, KILLED]),
    "killed in a save": ("zero3", [0], "save", 2, [KILL], [KILLED, FAILED]),
}


class Hit(L.Callback):
    """Send this process signals the n-th time that it is at a place."""

    def __init__(self, place, n, signals):
        self.left, self.signals = n, signals
        if place == "save":
            finish = sharded._save_manifest
            sharded._save_manifest = lambda *args: (self.send(), finish(*args))
            part = sharded.split_tensors
            if os.environ["RANK"] != "0":  # where rank 0 finishes, the others have written
                sharded.split_tensors = lambda *args: (self.send(), part(*args))[1]
            self.on_save_checkpoint = lambda *_: self.send() if os.environ["ONE"] else None
        else:
            hook = {"step": "on_train_batch_start", "validation": "on_validation_batch_start"}
            setattr(self, hook[place], lambda *_, **__: self.send())

    def send(self):
        self.left -= 1
        for signum in self.signals if self.left == 0 else ():
            os.kill(os.getpid(), signum)


def run(folder, name):
    """Exit status, checkpoint and step of a run that a signal may end."""
    strategy, hit, place, n, signals, _ = CASES[name]
    os.environ["ONE"] = "1" if strategy == "ddp" else ""
    is_target = int(os.environ["RANK"]) in hit
    L.seed_everything(0, verbose=False)
    trainer = L.Trainer(
        max_steps=5000,
        accelerator="cpu",
        devices=int(os.environ["WORLD_SIZE"]),
        strategy=STRATEGIES[strategy](),
        callbacks=[
            *([Hit(place, n, signals)] if is_target else []),
            Checkpoint(str(folder), every_n_train_steps=2),
            ExactResume(),
            GracefulStop(),
        ],
        plugins=[AtomicCheckpointIO()],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        val_check_interval=4,
        check_val_every_n_epoch=None,
    )
    try:
        trainer.fit(NetInInit(batch_size=4))
        status, written = 0, None
    except SignalInterrupt as stop:
        status, written = stop.code, stop.checkpoint
    except Exception:
        traceback.print_exc()  # as Python does, and ends with 1
        status, written = 1, None
    destroy_process_group_at_exit()
    return status, written, trainer.global_step


def fates(name, folder):
    """What each rank answers, or the signal it died of; nobody takes longer than the limit."""
    world, found = len(CASES[name][-1]), []
    with started(run, world, folder, name) as (processes, pipes, logs):
        for rank, pipe in enumerate(pipes):
            ended = pipe.poll(LIMIT + 30 * (rank == 0))
            assert ended, f"rank {rank} is still there: {logs[rank].read_text()[-3000:]}"
            try:
                good, answer = pickle.loads(pipe.recv_bytes())
                assert good, answer
            except EOFError:
                processes[rank].join(5)
                answer = (processes[rank].exitcode, None, None)
            found.append(answer)
    return found


@pytest.mark.parametrize("name", CASES)
def test_the_end_of_one_rank_ends_all_and_leaves_a_complete_checkpoint(name, tmp_path):
    found = fates(name, tmp_path)
    statuses, signals = [status for status, _, _ in found], CASES[name][4]
    for status, allowed in zip(statuses, CASES[name][-1], strict=True):
        assert status in (allowed if allowed is EITHER else [allowed]), statuses
    assert set(statuses) != {FAILED}
    newest, damaged_paths = latest_valid_checkpoint(tmp_path)
    assert newest is not None
    assert not damaged_paths
    content = AtomicCheckpointIO().load_checkpoint(newest)
    assert f"step={content['global_step']:06d}.ckpt" == newest.name
    if signals in ([TERM], [USR1]):  # all at one step, and told of one file
        assert found == [(found[0][0], str(newest), content["global_step"])] * len(found)
