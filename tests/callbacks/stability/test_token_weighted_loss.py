"""Answers of unequal lengths: each token has the same weight, however the batch is divided.

SGD, five steps, every parameter by name against one process with the whole batch.
"""

import json
import os

import lightning as L
import pytest
import torch
from external_modules.net_in_init import NetInInit
from external_modules.two_optimizers import TwoOptimizers
from ranks import furthest, whole

from ravine.callbacks import Checkpoint, ExactResume, GradientClipping, TokenWeightedLoss
from ravine.callbacks.stability import token_weighted_loss
from ravine.cli.trainer import Trainer
from ravine.datamodules import InstructionDataModule
from ravine.lightning_modules import LanguageModel
from ravine.strategies import MeshStrategy, pipeline_parallel

SHAPE = {"num_layers": 2, "d_model": 32, "num_heads": 4, "zero_init_residual": False}
CASES = {  # strategy, ranks, micro-batches of a step
    "one process": ("auto", 1, 4),
    "ddp": ("ddp", 2, 1),
    "ddp, accumulated": ("ddp", 2, 2),
    "zero1": ("zero1", 2, 2),
    "zero3": ("zero3", 2, 1),
    "zero3, accumulated": ("zero3", 2, 2),
    "hsdp": ("hsdp", 4, 2),
    "2d": ("2d", 4, 2),
    "cp": ("cp", 2, 2),
    "pp": (MeshStrategy(dp_shard=1, pp=2, num_microbatches=2), 2, 2),
    "zero3 x pp": (MeshStrategy(pp=2, num_microbatches=2), 4, 2),
}


class Model(LanguageModel):
    """The language model with plain SGD."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.2)


def fit(module, data, strategy, accumulate, *callbacks):
    trainer = L.Trainer(
        max_steps=5,
        accelerator="cpu",
        devices=int(os.environ.get("WORLD_SIZE", 1)),
        strategy=strategy,
        accumulate_grad_batches=accumulate,
        logger=False,
        callbacks=list(callbacks),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    trainer.fit(module, data)
    return whole(module)


def train(path, case, fault=None):
    strategy, _, accumulate = CASES.get(case, (case, 1, 1))
    callbacks = [GradientClipping(0.5), TokenWeightedLoss()]  # it goes first by itself
    if fault is not None:
        callbacks = fault(callbacks) or callbacks
    L.seed_everything(0, verbose=False)
    data = InstructionDataModule(path, tokenizer="bytes", context_length=96, batch_size=8)
    return fit(Model(**SHAPE), data, strategy, accumulate, *callbacks)


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """One letter, or a line of them, or somewhat more than fits."""
    path = tmp_path_factory.mktemp("answers") / "answers.jsonl"
    rows = [
        {"prompt": f"{n} times {chr(97 + n % 26)}: ", "answer": chr(97 + n % 26) * size}
        for n, size in enumerate([1, 40, 2, 3, 90, 1, 7, 25] * 6)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture(scope="module")
def single(answers):
    return train(answers, "auto")


def off(found, single):
    return max(furthest(weights, {n: single[n] for n in weights}) for weights in found)


def run_parallel(ranks, answers, case, fault=None):
    world = CASES[case][1]
    return ranks(train, world, answers, case, fault) if world > 1 else [train(answers, case, fault)]


@pytest.mark.parametrize("case", CASES)
def test_unequal_answers_train_as_on_one_process(ranks, answers, single, case):
    assert off(run_parallel(ranks, answers, case), single) < 2e-6


def test_the_trainer_of_ravine_weights_by_default(answers, tmp_path):
    def trained(accumulate):
        L.seed_everything(0, verbose=False)
        data = InstructionDataModule(answers, tokenizer="bytes", context_length=96, batch_size=8)
        trainer = Trainer(
            max_steps=5,
            accelerator="cpu",
            accumulate_grad_batches=accumulate,
            logger=False,
            default_root_dir=tmp_path,
            enable_checkpointing=False,
            limit_val_batches=0,
        )
        trainer.fit(module := Model(**SHAPE), data)
        return whole(module)

    assert furthest(trained(4), trained(1)) < 2e-6


def a_mean_of_means(callbacks):
    return callbacks[:1]


def each_rank_its_own_mean(callbacks):
    token_weighted_loss.mean_over_ranks = lambda number, trainer: number


def the_tokens_of_whole_sequences(callbacks):
    MeshStrategy.shard_batch = lambda self, batch: batch


def micro_batches_of_equal_weight(callbacks):
    pipeline_parallel.Pipeline._compute_microbatch_weights = lambda self, microbatches: torch.full(
        (len(microbatches),), 1 / len(microbatches)
    )


def divided_after_the_clipping(callbacks):
    TokenWeightedLoss.on_before_optimizer_step, divide = (
        lambda *args: None,
        TokenWeightedLoss.on_before_optimizer_step,
    )
    clip = GradientClipping._clip
    GradientClipping._clip = lambda self, trainer, optimizer: (
        clip(self, trainer, optimizer),
        divide(callbacks[1], trainer, trainer.lightning_module, optimizer),
    )


@pytest.mark.parametrize(
    ("case", "fault"),
    [
        ("ddp", a_mean_of_means),
        ("zero3, accumulated", a_mean_of_means),
        ("ddp", each_rank_its_own_mean),
        ("cp", the_tokens_of_whole_sequences),
        ("pp", micro_batches_of_equal_weight),
        ("zero3", divided_after_the_clipping),
    ],
)
def test_a_planted_fault_is_caught(ranks, answers, single, case, fault):
    assert off(run_parallel(ranks, answers, case, fault), single) > 1e-4


def resume(path, folder, strategy, accumulate):
    """The largest difference of weights between a run and one resumed within the epoch."""

    def run(name, ckpt=None):
        L.seed_everything(0, verbose=False)
        data = InstructionDataModule(path, tokenizer="bytes", context_length=96, batch_size=8)
        keep = Checkpoint(f"{folder}/{name}", every_n_train_steps=1, save_top_k=-1)
        trainer = L.Trainer(
            max_steps=4,
            accelerator="cpu",
            devices=int(os.environ.get("WORLD_SIZE", 1)),
            strategy=strategy,
            accumulate_grad_batches=accumulate,
            logger=False,
            callbacks=[TokenWeightedLoss(), ExactResume(), keep],
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=0,
        )
        trainer.fit(module := Model(**SHAPE), data, ckpt_path=ckpt)
        return whole(module)

    uncut = run("whole")
    return furthest(run("cut", f"{folder}/whole/step=000001.ckpt"), uncut)


@pytest.mark.parametrize(("strategy", "world", "accumulate"), [("auto", 1, 2), ("ddp", 2, 1)])
def test_a_run_resumed_within_an_epoch_is_still_weighted(
    ranks, answers, tmp_path, strategy, world, accumulate
):
    how = (answers, str(tmp_path), strategy, accumulate)
    assert (ranks(resume, 2, *how) if world > 1 else [resume(*how)]) == [0] * world


class Ragged(NetInInit):
    """A mean over rows; its last micro-batch is smaller."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.2)


class Counted(Ragged):
    """The same, and it says so."""

    def num_loss_terms(self, batch):
        return len(batch[0])


def test_modules_that_return_their_terms_are_weighted_and_others_are_not_changed():
    def trained(kind, batch_size, accumulate, *callbacks):
        torch.manual_seed(0)
        return fit(kind(batch_size=batch_size), None, "auto", accumulate, *callbacks)

    whole_batch = trained(Ragged, 32, 1)
    assert furthest(trained(Counted, 12, 3, TokenWeightedLoss()), whole_batch) < 2e-6
    unweighed = trained(Ragged, 12, 3)
    assert furthest(unweighed, whole_batch) > 1e-4
    assert furthest(trained(Ragged, 12, 3, TokenWeightedLoss()), unweighed) == 0
    assert furthest(trained(Counted, 32, 1, TokenWeightedLoss()), whole_batch) == 0


class Nothing(Counted):
    """Not one term counts."""

    def num_loss_terms(self, batch):
        return 0


def test_a_step_without_a_term_moves_nothing():
    torch.manual_seed(0)
    before = whole(Nothing())
    torch.manual_seed(0)
    assert furthest(fit(Nothing(), None, "auto", 2, TokenWeightedLoss()), before) == 0


def test_a_module_with_manual_optimization_cannot_be_weighted():
    module = TwoOptimizers()
    module.num_loss_terms = len
    message = r"has num_loss_terms and steps its own optimizers .*; remove num_loss_terms"
    with pytest.raises(ValueError, match=message):
        fit(module, None, "auto", 1, TokenWeightedLoss())


def count(path, case, fault=None):
    sent, all_reduce = [], torch.distributed.all_reduce

    def counting(tensor, *args, **how):
        sent.append(tensor.numel())
        return all_reduce(tensor, *args, **how)

    torch.distributed.all_reduce = counting
    train(path, case, fault)
    return sum(sent)


def test_one_number_is_sent_per_step(ranks, answers):
    case = "ddp, accumulated"
    without = ranks(count, 2, answers, case, a_mean_of_means)
    for sent, before in zip(ranks(count, 2, answers, case), without, strict=True):
        assert sent - before == 5 + 1  # and one before the first
