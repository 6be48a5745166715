"""Two nodes on one machine: each runs the script of a cluster node, with its own rank.

A signal to one node stops both; the same command on both goes on, also over the death of a rank,
to what one process has.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from ranks import furthest

from ravine.cli.main import main
from ravine.datamodules.text import python_docs_text
from ravine.strategies import AtomicCheckpointIO
from ravine.strategies.checkpoint.atomic_io import latest_valid_checkpoint

SCRIPT = Path(__file__).resolve().parents[2] / "configs" / "cluster" / "torchrun.sh"
STEPS = 1000
WORDS = [
    *("--model=LanguageModel", "--model.num_layers=1", "--model.d_model=16", "--model.num_heads=2"),
    *("--data=TextDataModule", "--data.path=../text.txt", "--data.context_length=16"),
    *("--data.batch_size=8", "--trainer.strategy=ddp", "--trainer.accelerator=cpu"),
    *(f"--trainer.max_steps={STEPS}", "--trainer.limit_val_batches=0", "--trainer.logger=false"),
    *("--trainer.callbacks+=OptimizerPlan", "--trainer.callbacks.optimizer=SGD"),
    *("--trainer.callbacks.optimizer.lr=0.01", "--trainer.callbacks+=Checkpoint"),
    "--trainer.callbacks.every_n_train_steps=20",
]


@contextmanager
def two_nodes(folder):
    """The scripts of both nodes, running in `folder`; whoever is left at the end is killed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    given = {"HEAD": "localhost", "PORT": str(port), "DEVICES": "1", "PATH": path}
    nodes = []
    for number in range(2):
        with open(folder / f"node{number}.log", "a") as log:
            command = ["bash", str(SCRIPT), *WORDS]
            environment = {k: v for k, v in os.environ.items() if "RANK" not in k} | given
            nodes.append(
                subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)
            )
    try:
        yield nodes
    finally:
        for node in nodes:
            for pid in [*below(node.pid), node.pid] if node.poll() is None else ():
                os.kill(pid, signal.SIGKILL)
            node.wait()


def below(pid):
    """The processes that a process has started, and theirs."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, task.read_text().split()):
            found += [child, *below(child)]
    return found


def rank_of(node):
    """The process that trains, below the script and torchrun."""
    environments = {pid: Path(f"/proc/{pid}/environ").read_bytes() for pid in below(node.pid)}
    return next(pid for pid, names in environments.items() if b"\0RANK=" in names)


def until_a_checkpoint(nodes, folder, known=()):
    """Wait until the run has written a checkpoint that is not among the known ones."""
    deadline = time.monotonic() + 240
    where = "runs/languagemodel/version_0/checkpoints/*.ckpt"
    while not {*folder.glob(where)} - {*known} and time.monotonic() < deadline:
        assert all(node.poll() is None for node in nodes), said(folder)
        time.sleep(0.02)


def said(folder):
    return "\n".join(log.read_text()[-4000:] for log in sorted(folder.glob("node*.log")))


def test_a_signal_to_one_node_stops_both_and_the_same_command_resumes(tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text("".join(python_docs_text())[:3000])
    for name in ("alone", "nodes"):
        (tmp_path / name).mkdir()
    there = tmp_path / "nodes"
    runs = there / "runs" / "languagemodel"
    with two_nodes(there) as nodes:
        until_a_checkpoint(nodes, there)
        nodes[1].terminate()
        statuses = [node.wait(240) for node in nodes]
    assert statuses == [143, 143], said(there)
    newest, damaged_paths = latest_valid_checkpoint(runs / "version_0" / "checkpoints")
    assert not damaged_paths
    stopped_at = AtomicCheckpointIO().load_checkpoint(newest)["global_step"]
    assert 0 < stopped_at < STEPS
    known = list((runs / "version_0" / "checkpoints").glob("*.ckpt"))
    with two_nodes(there) as nodes:
        until_a_checkpoint(nodes, there, known)
        os.kill(rank_of(nodes[0]), signal.SIGKILL)
        assert [node.wait(300) for node in nodes] == [0, 0], said(there)
    whole = "".join(log.read_text() for log in there.glob("node*.log"))
    assert f"stopped by SIGTERM at step {stopped_at}; resume: " in whole
    assert whole.count("failed (exitcode: -9)") == 1
    assert "failed to connect" not in whole  # with the addresses of the ranks that are no more
    monkeypatch.chdir(tmp_path / "alone")
    assert main(["fit", *WORDS]) == 0
    dist.destroy_process_group()  # of this process, where other tests run
    last = f"version_0/checkpoints/step={STEPS:06d}.ckpt"  # each resume went on in the folder
    state_dict = torch.load(runs / last, weights_only=True)["state_dict"]
    alone = Path("runs", "languagemodel", last)
    assert furthest(state_dict, torch.load(alone, weights_only=True)["state_dict"]) < 2e-6
