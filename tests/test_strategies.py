"""Every strategy equals one process: the quick transformer, five steps of SGD, by name."""

import lightning as L
import pytest
import torch
from ranks import furthest, whole
from torch.distributed.fsdp import FSDPModule

from ravine.datamodules import TextDataModule
from ravine.datamodules.text import documentation
from ravine.lightning_modules import LanguageModel
from ravine.strategies import MeshStrategy

# a validation loss that was reduced already is logged by each rank
pytestmark = pytest.mark.filterwarnings("ignore:It is recommended to use .self.log")

QUICK = {"layers": 4, "width": 128, "heads": 4}
TINY = {"layers": 2, "width": 16, "heads": 4}
STRATEGIES = {
    "single": lambda: {"devices": 1},
    "ddp": lambda: {"strategy": "ddp", "devices": 2},
    "zero3": lambda: {"strategy": "zero3", "devices": 2},
    "tp": lambda: {"strategy": "tp", "devices": 2},
    "zero3 x tp": lambda: {"strategy": MeshStrategy(tp=2), "devices": 4},
}
WORLDS = [("ddp", 2), ("zero3", 2), ("tp", 2), ("zero3 x tp", 4)]


class Model(LanguageModel):
    """The language model with the optimizer the test asks for."""

    optimizer = "sgd"

    def configure_optimizers(self):
        if self.optimizer == "sgd":
            return torch.optim.SGD(self.parameters(), lr=0.2)
        matrices = [p for n, p in self.named_parameters() if "embed" not in n and p.ndim == 2]
        rest = [p for n, p in self.named_parameters() if "embed" in n or p.ndim != 2]
        groups = [{"params": matrices}, {"params": rest, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=0.003)


class Save(L.Callback):
    def __init__(self, path):
        self.path = path

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 2:
            trainer.save_checkpoint(self.path)


class SumInsteadOfMean(L.Callback):
    """The planted fault."""

    def on_train_start(self, trainer, pl_module):
        for module in pl_module.modules():
            if isinstance(module, FSDPModule):
                module.set_force_sum_reduction_for_comms(True)
                module.set_gradient_divide_factor(1.0)


def train(name, text, shape, *callbacks, optimizer="sgd", resume=None):
    L.seed_everything(0, verbose=False)
    module = Model(zero_init=False, **shape)
    module.optimizer = optimizer
    trainer = L.Trainer(
        max_steps=5,
        accelerator="cpu",
        logger=False,
        callbacks=list(callbacks),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        val_check_interval=5,
        num_sanity_val_steps=0,
        **STRATEGIES[name](),
    )
    trainer.fit(module, TextDataModule(text, context=64, batch_size=8), ckpt_path=resume)
    return whole(module), trainer.callback_metrics["val/loss"]


def cut_and_continue(name, text, folder):
    """Write a file after two steps; then continue the one a single process wrote."""
    train(name, text, TINY, Save(folder / "here.ckpt"), optimizer="adamw")
    return train(name, text, TINY, optimizer="adamw", resume=folder / "single.ckpt")[0]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "topics.txt"
    path.write_text("".join(documentation())[:3000])
    return path


@pytest.fixture(scope="module")
def single(text):
    return train("single", text, QUICK)


def test_five_steps_of_sgd_move_every_parameter(single, text):
    L.seed_everything(0, verbose=False)
    start = Model(len(set(text.read_text())), 64, zero_init=False, **QUICK)
    start.configure_model()
    moved = {n: (p.detach() - single[0][n]).abs().max() for n, p in start.named_parameters()}
    assert min(moved.values()) > 1e-4


@pytest.mark.parametrize(("name", "world"), WORLDS)
def test_five_steps_of_sgd_equal_one_process(ranks, text, single, name, world):
    for weights, loss in ranks(train, world, name, text, QUICK):
        assert furthest(weights, single[0]) < 2e-6
        assert abs(loss - single[1]) < 2e-6


def test_a_sum_in_the_place_of_the_mean_is_caught(ranks, text, single):
    for weights, _ in ranks(train, 2, "zero3", text, QUICK, SumInsteadOfMean()):
        assert furthest(weights, single[0]) > 1e-3


@pytest.mark.parametrize(("name", "world"), WORLDS[1:])
def test_a_file_goes_from_each_layout_to_one_process_and_back(ranks, text, tmp_path, name, world):
    straight, _ = train("single", text, TINY, Save(tmp_path / "single.ckpt"), optimizer="adamw")
    for weights in ranks(cut_and_continue, world, name, text, tmp_path):
        assert furthest(weights, straight) < 2e-6
    resume = tmp_path / "here.ckpt"
    groups = torch.load(resume)["optimizer_states"][0]["param_groups"]
    split = [i for i, n in enumerate(straight) if "embed" not in n and straight[n].ndim == 2]
    assert groups[0]["params"] == split  # places in named_parameters(), on every layout
    weights, _ = train("single", text, TINY, optimizer="adamw", resume=resume)
    assert furthest(weights, straight) < 2e-6
