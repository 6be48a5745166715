"""Full-batch gradient descent holds the largest Hessian eigenvalue at 2 / lr."""

from functools import partial
from pathlib import Path

import lightning as L
import pytest
import yaml
from torch.optim import SGD

from ravine.callbacks import CurvatureMonitor, OptimizerPlan
from ravine.datamodules import ImageDataModule
from ravine.lightning_modules import ImageClassifier

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "lectures" / "edge_of_stability.yaml"


def largest_eigenvalues(lr: float, steps: int, every_n_steps: int) -> dict[int, float]:
    """The largest eigenvalue by step, for the model and the data of the config."""
    config = yaml.safe_load(CONFIG.read_text())
    L.seed_everything(0, verbose=False)
    monitor = CurvatureMonitor(every_n_steps)
    trainer = L.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[OptimizerPlan(partial(SGD, lr=lr)), monitor],
    )
    model = ImageClassifier(**config["model"]["init_args"])
    trainer.fit(model, ImageDataModule(**config["data"]["init_args"]))
    return dict(monitor.state_dict()["largest"])


def test_the_largest_eigenvalue_settles_at_two_over_the_step(tmp_path, monkeypatch):
    """With half the step, the eigenvalue after the same training time is above this limit."""
    monkeypatch.chdir(tmp_path)
    limit = 2 / 0.5
    edge = largest_eigenvalues(0.5, 281, 40)
    assert edge[0] < 0.75 * limit
    assert edge[40] > 1.1 * limit
    assert [edge[step] for step in (200, 240, 280)] == [pytest.approx(limit, rel=0.07)] * 3
    free = largest_eigenvalues(0.25, 481, 480)
    assert 1.2 * limit < free[480] < 2 * limit
