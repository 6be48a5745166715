"""The heartbeat file has the last position of a rank, also of one that was killed."""

import json
import os
import signal
import struct
import time
from pathlib import Path

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from ravine.callbacks.monitoring.heartbeat import (
    FILE_BYTES,
    FOLDER,
    POSITION,
    PROCESS_OFFSET,
    Heartbeat,
    process_state,
    read_heartbeat,
    read_heartbeats,
)
from ravine.cli.trainer import Trainer


class Linear(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(3, 1)
        self.seen = {}

    def note(self, where):
        self.seen[where] = read_heartbeat(next(Path(self.trainer.run_dir, FOLDER).glob("rank_*")))

    def training_step(self, batch, batch_idx):
        if batch_idx == 1:
            self.note("forward")
        loss = self.net(batch).square().mean()
        if batch_idx == 1:
            loss.register_hook(lambda _: self.note("backward"))
        return loss

    def validation_step(self, batch, batch_idx):
        self.note("validation")

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.01)
        optimizer.register_step_pre_hook(lambda *_: None)
        optimizer.register_step_post_hook(lambda *_: self.note("step"))
        return optimizer


def fit(module, folder, **options):
    trainer = Trainer(
        accelerator="cpu",
        max_steps=2,
        enable_progress_bar=False,
        default_root_dir=folder,
        logger=False,
        **options,
    )
    trainer.fit(module, DataLoader(torch.ones(4, 3)), DataLoader(torch.ones(1, 3)))
    return trainer


def test_the_file_has_phase_step_and_memory_and_is_removed_at_the_end(tmp_path):
    module = Linear()
    trainer = fit(module, tmp_path, val_check_interval=2)
    phases = {where: (r.phase, r.batch, r.step) for where, r in module.seen.items()}
    assert phases == {
        "forward": ("forward pass", 2, 1),
        "backward": ("backward pass", 2, 1),
        "step": ("optimizer step", 2, 1),
        "validation": ("validation", 2, 2),
    }
    record = module.seen["forward"]
    assert record.process.pid == os.getpid()
    assert 10**7 < record.peak_bytes < record.process.limit_bytes
    assert process_state(record.process) == "R"
    assert not Path(trainer.run_dir, FOLDER).exists()


def test_the_file_is_removed_after_an_error(tmp_path):
    class Failing(Linear):
        def validation_step(self, batch, batch_idx):
            assert read_heartbeats(Path(self.trainer.run_dir, FOLDER))
            raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        fit(Failing(), tmp_path, val_check_interval=2)
    assert not list(tmp_path.rglob(FOLDER))


def test_a_killed_process_leaves_its_last_phase(tmp_path):
    pid = os.fork()
    if pid == 0:
        heartbeat = Heartbeat(str(tmp_path))
        heartbeat.open(type("Rank", (), {"global_rank": 3})())
        heartbeat.step, heartbeat.batch = 7, 9
        heartbeat.mark(2)
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    record = read_heartbeats(tmp_path)[3]
    assert (record.phase, record.batch, record.step) == ("backward pass", 9, 7)
    assert abs(record.time_s - time.time()) < 3600
    assert process_state(record.process) == "X"


def test_an_incomplete_file_is_left_out(tmp_path):
    (tmp_path / "rank_0").write_bytes(bytes(10))
    (tmp_path / "rank_1").write_bytes(bytes(4096))
    assert read_heartbeats(tmp_path) == {}


def test_a_report_that_is_too_long_is_cut(tmp_path):
    heartbeat = Heartbeat(str(tmp_path))
    heartbeat.open(type("Rank", (), {"global_rank": 0})())
    heartbeat.write_report("a" * 5000)
    assert read_heartbeats(tmp_path)[0].report == "a" * 2044
    heartbeat.write_report("b")
    assert read_heartbeats(tmp_path)[0].report == "b"
    heartbeat.close()
    assert list(tmp_path.parent.glob(tmp_path.name)) == []


def write_file(path, position=(1, 0, 1, 1, 1.0, 5), **values):
    process = {"rank": 0, "pid": 1, "start_ticks": 1, "host": "a", "limit_bytes": 1}
    process |= {"limit_source": "", "oom_kills": 0} | values
    text, data = json.dumps(process).encode(), bytearray(FILE_BYTES)
    POSITION.pack_into(data, 0, *position)
    struct.pack_into("<I", data, PROCESS_OFFSET, len(text))
    data[PROCESS_OFFSET + 4 : PROCESS_OFFSET + 4 + len(text)] = text
    path.write_bytes(data)


def test_damaged_values_are_left_out(tmp_path):
    path = tmp_path / "rank_0"
    write_file(path)
    assert set(read_heartbeats(tmp_path)) == {0}
    for values in ({"rank": [1]}, {"rank": "0/../../a"}, {"rank": 1}, {"oom_kills": "x"}):
        write_file(path, **values)
        assert read_heartbeats(tmp_path) == {}
    for position in ((-1, 0, 1, 1, 1.0, 5), (1, 0, 1, 1, float("nan"), 5)):
        write_file(path, position)
        assert read_heartbeats(tmp_path) == {}


def test_links_and_pipes_are_not_read_and_a_link_is_not_written_through(tmp_path):
    target, folder = tmp_path / "target", tmp_path / "heartbeats"
    folder.mkdir()
    write_file(target)
    before = target.read_bytes()
    (folder / "rank_0").symlink_to(target)
    os.mkfifo(folder / "rank_1")
    assert read_heartbeats(folder) == {}
    heartbeat = Heartbeat(str(folder))
    heartbeat.open(L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False))
    heartbeat.close()
    assert target.read_bytes() == before
