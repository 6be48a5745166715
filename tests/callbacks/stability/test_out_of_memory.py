"""An out-of-memory error is explained: phase, bytes by class, and what helps."""

import json
import os
import signal
from pathlib import Path

import lightning as L
import pytest
import torch

from ravine.callbacks import LoRA, OutOfMemoryReport
from ravine.callbacks.estimates.micro_batch import estimate_micro_batch
from ravine.callbacks.monitoring import heartbeat as heartbeat_file
from ravine.callbacks.monitoring.heartbeat import Heartbeat, read_heartbeats
from ravine.callbacks.monitoring.memory_limit import find_memory_limit
from ravine.callbacks.stability.out_of_memory import (
    MemorySummary,
    count_state_copies,
    explain_killed_runs,
    list_changes,
)
from ravine.cli.trainer import Trainer
from ravine.datamodules import TextDataModule
from ravine.errors import UsageError
from ravine.lightning_modules import LanguageModel

TEXT = "CUDA out of memory. Tried to allocate 2.00 GiB."


class Failing(LanguageModel):
    """A model that has too little memory in one phase."""

    where = ""

    def fail(self, where):
        if self.where == where:
            raise torch.OutOfMemoryError(TEXT)

    def training_step(self, batch, batch_idx):
        if batch_idx == 1:
            self.fail("forward pass")
        output = super().training_step(batch, batch_idx)
        if batch_idx == 1:
            loss = output if isinstance(output, torch.Tensor) else output["loss"]
            loss.register_hook(lambda _: self.fail("backward pass"))
            if self.where == "generation":
                self.generate()
        return output

    def generate(self, *args, **kwargs):
        self.fail("generation")

    def validation_step(self, batch, batch_idx):
        if self.global_step:
            self.fail("validation")
        return super().validation_step(batch, batch_idx)

    def on_before_optimizer_step(self, optimizer):
        if self.global_step:
            self.fail("optimizer step")


def model() -> Failing:
    return Failing(num_layers=2, d_model=32, num_heads=2)


def fit(module: L.LightningModule, folder: Path, **options) -> None:
    data = TextDataModule(source="embedded", context_length=16, batch_size=8)
    Trainer(
        accelerator="cpu",
        precision="32-true",
        max_steps=3,
        val_check_interval=2,
        limit_val_batches=1,
        logger=False,
        enable_progress_bar=False,
        default_root_dir=folder,
        **options,
    ).fit(module, datamodule=data)


@pytest.mark.parametrize(
    "where", ["forward pass", "backward pass", "optimizer step", "validation", "generation"]
)
def test_the_report_names_the_phase_and_the_changes_that_help(where, tmp_path, capsys):
    module = model()
    module.where = where
    with pytest.raises(torch.OutOfMemoryError) as raised:
        fit(module, tmp_path)
    report = raised.value.memory_report
    assert report.title.startswith(f"out of memory in the {where}, step ")
    assert TEXT in report.title
    counted = sum(p.numel() * p.itemsize for p in module.parameters())
    assert report.measured["parameters"] == counted
    assert report.measured["optimizer state"] > 0
    printed = capsys.readouterr().err
    changes = report.top_changes()
    assert 1 <= len(changes) <= 3
    assert [c.saved_bytes for c in changes] == sorted(
        (c.saved_bytes for c in changes), reverse=True
    )
    assert "saves about" in printed
    is_training = where not in ("validation", "generation")
    assert any("accumulate_grad_batches=2" in c.hint for c in report.changes) == is_training
    assert any("batch_size=4" in c.hint for c in report.changes) != is_training
    if is_training:
        assert report.estimated["gradients"] == counted
        assert 0 < report.estimated["the micro-batch"] < 2**30


def test_other_errors_are_not_explained(tmp_path, capsys):
    class Broken(LanguageModel):
        def training_step(self, batch, batch_idx):
            raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no") as raised:
        fit(Broken(num_layers=1, d_model=8, num_heads=2), tmp_path)
    assert not hasattr(raised.value, "memory_report")
    assert "saves about" not in capsys.readouterr().err


def test_the_estimate_falls_with_half_the_samples_and_with_recomputation():
    module = model()
    data = TextDataModule(source="embedded", context_length=64, batch_size=8)
    trainer = L.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, fast_dev_run=True
    )
    sizes = {}

    class Estimate(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            before = [p.detach().clone() for p in module.parameters()]
            for name, options in {
                "whole": {},
                "half": {"fraction": 0.5},
                "recomputed": {"recomputes": True},
                "bf16": {"precision": "bf16-mixed"},
            }.items():
                arguments = {"precision": "32-true"} | options
                sizes[name] = estimate_micro_batch(module, trainer, batch, **arguments).num_bytes
            assert all(
                a.equal(b) for a, b in zip(before, module.parameters(), strict=True)
            )  # the run is as it was

    trainer.callbacks.append(Estimate())
    trainer.fit(module, datamodule=data)
    assert 0.45 < sizes["half"] / sizes["whole"] < 0.6
    assert sizes["recomputed"] < 0.7 * sizes["whole"]
    assert sizes["bf16"] < 0.95 * sizes["whole"]


def test_only_changes_that_are_possible_are_listed():
    nothing = MemorySummary(is_half=True)
    assert list_changes(nothing, 100, "forward pass") == []
    summary = MemorySummary(
        parameters=400,
        trainable=400,
        states=800,
        accumulate=2,
        samples=8,
        divides_batch=True,
        ranks=4,
        is_replicated=True,
        blocks=10,
        num_matrices=4,
        context_length=64,
    )
    saved = {c.hint: c.saved_bytes for c in list_changes(summary, 1000, "forward pass")}
    assert saved == {
        "accumulate_grad_batches=4": 500,
        "callbacks=[ActivationCheckpointing()]": 900,
        "strategy='zero3'": 1200,
        "callbacks=[LoRA()]": 1140,
        "precision='bf16-mixed'": 500,
        "context_length=32": 500,
    }
    used = MemorySummary(**{**vars(summary), "is_recomputed": True, "has_lora": True, "ranks": 1})
    hints = {c.hint for c in list_changes(used, 1000, "forward pass")}
    assert not hints & {"callbacks=[ActivationCheckpointing()]", "callbacks=[LoRA()]"}
    assert "strategy='zero3'" not in hints


@pytest.mark.parametrize(
    ("optimizer", "copies"),
    [
        (torch.optim.SGD, 0),
        (torch.optim.AdamW, 2),
        (torch.optim.Adagrad, 1),
        (torch.optim.LBFGS, 0),
    ],
)
def test_expected_states_are_counted_with_a_small_parameter(optimizer, copies):
    weights = [torch.nn.Parameter(torch.zeros(3, 4))]
    group = optimizer(weights, lr=0.1).param_groups[0]
    assert count_state_copies(optimizer, group) == copies


def killed_run(folder: Path, limit_gib: str, peak_bytes: int) -> None:
    """Leave the heartbeat of a process that was killed in the backward pass of step 8."""
    os.environ["RAVINE_MEMORY_LIMIT"] = limit_gib
    heartbeat_file.peak_process_bytes = lambda: peak_bytes
    heartbeat = Heartbeat(str(folder / "heartbeats"))
    heartbeat.open(type("Rank", (), {"global_rank": 0})())
    summary = MemorySummary(
        trainable=2**28, states=2**29, samples=4, divides_batch=True, base=2**27
    )
    heartbeat.write_summary(json.dumps(vars(summary)))
    heartbeat.step = 7
    heartbeat.mark(heartbeat_file.BACKWARD)
    os.kill(os.getpid(), signal.SIGKILL)


def fork_killed_run(folder: Path, limit_gib: str, peak_bytes: int) -> None:
    if (pid := os.fork()) == 0:
        killed_run(folder, limit_gib, peak_bytes)
    os.waitpid(pid, 0)


def test_a_process_killed_near_its_limit_is_explained_once(tmp_path):
    run = tmp_path / "version_0"
    fork_killed_run(run, "2", int(1.9 * 2**30))
    assert read_heartbeats(run / "heartbeats")[0].phase == "backward pass"
    (report,) = explain_killed_runs([run])
    assert "rank 0 was killed in the backward pass of step 8" in report.title
    assert "limit 2 GiB (RAVINE_MEMORY_LIMIT)" in report.title
    expected = int(1.9 * 2**30) - 2**27 - 2**28 - 2**29
    assert report.measured["the micro-batch"] == expected
    change = next(c for c in report.changes if c.hint == "accumulate_grad_batches=2")
    assert change.saved_bytes == expected // 2
    assert explain_killed_runs([run]) == []
    assert not (run / "heartbeats").exists()


def test_a_process_killed_far_below_its_limit_is_not_explained(tmp_path):
    fork_killed_run(tmp_path / "version_0", "8", 2**30)
    assert explain_killed_runs([tmp_path / "version_0"]) == []


def test_a_run_that_is_still_alive_keeps_its_file(tmp_path):
    heartbeat = Heartbeat(str(tmp_path / "heartbeats"))
    heartbeat.open(type("Rank", (), {"global_rank": 0})())
    assert explain_killed_runs([tmp_path]) == []
    assert read_heartbeats(tmp_path / "heartbeats")
    heartbeat.close()


@pytest.mark.parametrize("text", ["0", "-1", "many", "inf"])
def test_a_wrong_limit_is_refused(text, monkeypatch):
    monkeypatch.setenv("RAVINE_MEMORY_LIMIT", text)
    with pytest.raises(UsageError, match=f"RAVINE_MEMORY_LIMIT={text} is not a positive number"):
        find_memory_limit()


def test_adapters_are_not_suggested_twice(tmp_path):
    module = model()
    module.where = "forward pass"
    with pytest.raises(torch.OutOfMemoryError) as raised:
        fit(module, tmp_path, callbacks=[LoRA(), OutOfMemoryReport()])
    assert not any("LoRA" in change.hint for change in raised.value.memory_report.changes)
