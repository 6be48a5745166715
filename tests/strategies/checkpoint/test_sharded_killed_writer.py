"""Thirty jobs are killed during a sharded save; no incomplete folder looks complete."""

import os
import random
import signal
import time

import torch
import torch.distributed as dist

from ravine.strategies import AtomicCheckpointIO
from ravine.strategies.checkpoint import sharded


def save_without_end(folder, rank):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    weight = torch.zeros(40_000)
    for number in range(1, 10_000):
        content = {"state_dict": {f"{rank}": weight + number}, "number": number}
        sharded.save_sharded(content, folder / "runs" / f"step={number % 3}.ckpt")


def in_fork(folder, rank):
    """Start a rank in a process of its own; its id."""
    if child := os.fork():
        return child
    try:
        save_without_end(folder, rank)
    finally:
        os._exit(1)


def test_a_writer_killed_thirty_times_leaves_only_complete_sharded_checkpoints(tmp_path):
    dice, found = random.Random(1), 0
    for turn in range(30):
        folder = tmp_path / str(turn)
        (folder / "runs").mkdir(parents=True)
        jobs = [in_fork(folder, rank) for rank in (0, 1)]
        limit = time.monotonic() + 30
        while not any((folder / "runs").glob("*.ckpt")) and time.monotonic() < limit:
            time.sleep(0.005)
        time.sleep(dice.uniform(0, 0.05))
        for job in dice.sample(jobs, 2):
            os.kill(job, signal.SIGKILL)
            os.waitpid(job, 0)
        for path in (folder / "runs").glob("*.ckpt"):
            if (path / "manifest.json").exists():  # it looks complete
                content, found = AtomicCheckpointIO().load_checkpoint(path), found + 1
                for weight in content["state_dict"].values():
                    assert (weight == content["number"]).all()
    assert found >= 30
