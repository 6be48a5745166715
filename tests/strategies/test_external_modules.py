"""External modules: every strategy trains them as one process does."""

import lightning as L
import pytest
import torch
from external_modules.net_in_configure_model import NetInConfigureModel
from external_modules.net_in_init import NetInInit
from external_modules.two_optimizers import TwoOptimizers
from ranks import furthest, whole
from torch.distributed.tensor import DTensor

from ravine.strategies import MeshStrategy

KINDS = [NetInInit, NetInConfigureModel, TwoOptimizers]
UNUSED = "ddp_find_unused_parameters_true"  # stepping by hand leaves parameters out of a backward


class Save(L.Callback):
    def __init__(self, path):
        self.path = path

    def on_validation_end(self, trainer, pl_module):
        if trainer.global_step == 4:
            trainer.save_checkpoint(self.path)


def plain_sgd(module):
    if isinstance(module, TwoOptimizers):
        players = module.predictor, module.critic
        return [torch.optim.SGD(player.parameters(), lr=0.5) for player in players]
    return torch.optim.SGD(module.parameters(), lr=0.5)


def train(kind, strategy="auto", devices=1, sgd=False, steps=8, save=None, resume=None, samples=32):
    """So many samples are a step's global batch, however many ranks share them."""
    L.seed_everything(0, verbose=False)
    module = kind(batch_size=samples // devices)
    if sgd:
        module.configure_optimizers = lambda: plain_sgd(module)
    trainer = L.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        callbacks=[Save(save)] if save else [],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        limit_val_batches=1,
        strategy=strategy,
        devices=devices,
    )
    trainer.fit(module, ckpt_path=resume)
    shards = [isinstance(p, DTensor) for p in module.parameters()]
    return whole(module), all(shards), trainer.callback_metrics["val_loss"].item()


def save_and_continue(kind, strategy, folder, sgd):
    """Write a file in the middle; then continue the one a single process wrote."""
    train(kind, strategy, 2, sgd, save=folder / "here.ckpt")
    return train(kind, strategy, 2, sgd, resume=folder / "single.ckpt")[0]


@pytest.mark.parametrize("kind", KINDS)
def test_zero3_shards_every_parameter_and_equals_one_process(ranks, kind):
    single, _, loss = train(kind, sgd=True)
    for weights, sharded, its_loss in ranks(train, 2, kind, "zero3", 2, True):
        assert furthest(weights, single) < 2e-6
        assert its_loss == pytest.approx(loss, abs=2e-6)
        assert sharded


@pytest.mark.parametrize(
    ("kind", "name"), [(NetInInit, "ddp"), (NetInConfigureModel, "ddp"), (TwoOptimizers, UNUSED)]
)
def test_ddp_equals_one_process(ranks, kind, name):
    single, _, _ = train(kind, sgd=True)
    first, second = ranks(train, 2, kind, name, 2, True)
    assert furthest(first[0], single) < 2e-6
    assert furthest(first[0], second[0]) == 0


def with_ddp_and_zero2():
    """Weights after four batches of 8 samples, without a validation between them."""
    return [train(TwoOptimizers, name, 2, True, samples=8)[0] for name in (UNUSED, "zero2")]


def test_toggled_optimizers_train_with_zero2_as_with_ddp(ranks):
    for expected, weights in ranks(with_ddp_and_zero2, 2):
        assert furthest(weights, expected) < 2e-6


def test_ddp_refuses_manual_optimization_with_a_hint(ranks):
    with pytest.raises(AssertionError, match=f'UsageError: .*use Trainer.strategy="{UNUSED}".'):
        ranks(train, 2, TwoOptimizers, "ddp", 2)


@pytest.mark.parametrize("sgd", [False, True], ids=["own optimizer", "stateless"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_file_goes_from_zero3_to_one_process_and_back(ranks, tmp_path, kind, sgd):
    straight, _, _ = train(kind, sgd=sgd, save=tmp_path / "single.ckpt")
    for weights in ranks(save_and_continue, 2, kind, "zero3", tmp_path, sgd):
        assert furthest(weights, straight) < 2e-6
    weights, _, _ = train(kind, sgd=sgd, resume=tmp_path / "here.ckpt")
    assert furthest(weights, straight) < 2e-6


def save_and_continue_shards(folder):
    strategy = MeshStrategy(save_distributed_checkpoint=True)
    train(NetInInit, strategy, 2, save=folder)
    strategy = MeshStrategy(save_distributed_checkpoint=True)
    return train(NetInInit, strategy, 2, resume=folder)[0]


def test_a_folder_of_shards_is_continued(ranks, tmp_path):
    straight, _, _ = train(NetInInit)
    for weights in ranks(save_and_continue_shards, 2, tmp_path / "shards.ckpt"):
        assert furthest(weights, straight) < 2e-6


def evaluate(strategy, devices, path):
    trainer = L.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        strategy=strategy,
        devices=devices,
    )
    L.seed_everything(1, verbose=False)  # other weights than the file's
    return trainer.validate(NetInInit(batch_size=16), ckpt_path=path, verbose=False)


# 32 samples divide: no rank sees one twice
@pytest.mark.filterwarnings("ignore:Using `DistributedSampler` with the dataloaders")
def test_a_file_is_evaluated_on_every_strategy(ranks, tmp_path):
    train(NetInInit, save=tmp_path / "file.ckpt")
    (metrics,) = evaluate("auto", 1, tmp_path / "file.ckpt")
    for strategy in ("ddp", "zero3"):
        for found in ranks(evaluate, 2, strategy, 2, tmp_path / "file.ckpt"):
            assert found == [pytest.approx(metrics, abs=2e-6)]
