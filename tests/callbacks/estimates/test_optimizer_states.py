"""The estimated bytes of the optimizer state are those of a real step, for every optimizer."""

from functools import partial
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ravine import UsageError, estimate
from ravine.callbacks import (
    AdaGrad,
    AdaGradOptimizer,
    Lion,
    LionOptimizer,
    Muon,
    OptimizerPlan,
    SignSGDOptimizer,
)
from ravine.callbacks.monitoring.memory import measure_memory


class Matrices(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3))

    def training_step(self, batch: Any, index: int) -> Any:
        return F.cross_entropy(self.layers(batch[0]), batch[1])


CALLBACKS: dict[str, Any] = {
    "SGD": partial(OptimizerPlan, partial(torch.optim.SGD, lr=0.1)),
    "momentum": partial(OptimizerPlan, partial(torch.optim.SGD, lr=0.1, momentum=0.9)),
    "RMSprop": partial(OptimizerPlan, torch.optim.RMSprop),
    "Adam": partial(OptimizerPlan, torch.optim.Adam),
    "AdamW, fused": partial(OptimizerPlan, partial(torch.optim.AdamW, fused=True)),
    "amsgrad": partial(OptimizerPlan, partial(torch.optim.AdamW, amsgrad=True)),
    "NAdam": partial(OptimizerPlan, torch.optim.NAdam),
    "Adamax": partial(OptimizerPlan, torch.optim.Adamax),
    "Adafactor": partial(OptimizerPlan, torch.optim.Adafactor),
    "SignSGD": partial(OptimizerPlan, partial(SignSGDOptimizer, lr=0.02)),
    "Signum": partial(OptimizerPlan, partial(SignSGDOptimizer, lr=0.02, momentum=0.9)),
    "AdaGradOptimizer": partial(OptimizerPlan, partial(AdaGradOptimizer, lr=0.5)),
    "LionOptimizer": partial(OptimizerPlan, partial(LionOptimizer, lr=0.02)),
    "AdaGrad": AdaGrad,
    "Lion": Lion,
    "Muon": Muon,
}


def rows() -> DataLoader[Any]:
    torch.manual_seed(0)
    return DataLoader(TensorDataset(torch.randn(24, 6), torch.randint(3, (24,))), batch_size=8)


class Measure(L.Callback):
    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        self.usage = measure_memory(module, trainer.optimizers)["optimizer state"]


@pytest.mark.parametrize("name", CALLBACKS)
def test_the_state_of_every_optimizer_has_the_bytes_of_a_real_run(name: str) -> None:
    result = estimate(Matrices(), rows(), callbacks=[CALLBACKS[name]()], max_steps=9)
    measure = Measure()
    trainer = L.Trainer(
        max_steps=2,
        accelerator="cpu",
        logger=False,
        callbacks=[CALLBACKS[name](), measure],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Matrices(), rows())
    assert result.state_bytes == measure.usage.num_bytes


def test_an_optimizer_that_decides_by_values_is_named() -> None:
    plan = OptimizerPlan(partial(torch.optim.LBFGS, max_iter=2))
    with pytest.raises(UsageError, match=r"the optimizer in lbfgs\.py needs values"):
        estimate(Matrices(), rows(), callbacks=[plan], max_steps=9)
