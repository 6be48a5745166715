"""The hook of OptimizerStepCallback is called once for each optimizer step of a run."""

from typing import Any

import lightning as L
import pytest
from external_modules.net_in_init import NetInInit
from external_modules.two_optimizers import TwoOptimizers

from ravine.callbacks import EMA, OptimizerPlan, SignSGD
from ravine.callbacks.base import OptimizerStepCallback, find_callbacks

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "limit_val_batches": 0,
    "enable_checkpointing": False,
}


class StepRecorder(OptimizerStepCallback):
    """Records the counted step at each optimizer step and at each micro-batch."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.batches: list[int] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self.batches.append(self.step)

    def on_optimizer_step_end(self, trainer, pl_module, outputs, batch):
        assert self.step == trainer.global_step
        self.steps.append(self.step)


def fit(module: L.LightningModule, resume: str | None = None, **settings: Any) -> StepRecorder:
    recorder = StepRecorder()
    settings = {"callbacks": [recorder], **QUIET, **settings}
    trainer = L.Trainer(**settings)
    trainer.fit(module, ckpt_path=resume)
    if resume is None:
        trainer.save_checkpoint("end.ckpt")
    return recorder


@pytest.fixture(autouse=True)
def change_to_tmp_path(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_the_hook_is_called_at_optimizer_steps_and_not_at_other_micro_batches() -> None:
    recorder = fit(NetInInit(), max_steps=3, accumulate_grad_batches=2)
    assert recorder.steps == [1, 2, 3]
    assert recorder.batches == [0, 1, 1, 2, 2, 3]


def test_a_resumed_run_starts_at_the_step_of_its_checkpoint() -> None:
    fit(NetInInit(), max_epochs=1)
    assert fit(NetInInit(), resume="end.ckpt", max_epochs=2).steps == [5, 6, 7, 8]


def test_two_optimizers_that_step_in_one_batch_are_one_call() -> None:
    recorder = fit(TwoOptimizers(), max_steps=4)
    assert recorder.steps == [2, 4]


def test_callbacks_are_found_by_class_and_subclass_in_their_order() -> None:
    first, second = SignSGD(), EMA()
    trainer = L.Trainer(callbacks=[first, second], **QUIET)
    assert find_callbacks(trainer, OptimizerPlan) == [first]
    assert find_callbacks(trainer, EMA) == [second]
    assert [c for c in find_callbacks(trainer, L.Callback) if c in (first, second)] == [
        first,
        second,
    ]
