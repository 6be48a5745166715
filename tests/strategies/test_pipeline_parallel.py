"""A pipeline is one net: choices that depend on the net are the same on every stage."""

import os
from contextlib import nullcontext
from functools import partial

import lightning as L
import pytest
import torch
from ranks import furthest, whole
from schedulefree import AdamWScheduleFree
from torch.optim import SGD, AdamW

from ravine.callbacks import EMA, GradientClipping, Muon, OptimizerPlan, Summary, UpdateMonitor
from ravine.callbacks.optimizers.parameter_rules import ParamRule, classify_params
from ravine.datamodules import TextDataModule
from ravine.datamodules.text import python_docs_text
from ravine.errors import UsageError
from ravine.lightning_modules import LanguageModel
from ravine.strategies import MeshStrategy, pipeline_parallel

SHAPE = {"num_layers": 4, "d_model": 16, "num_heads": 2, "bias": "all", "norm": "layernorm"}
LAYOUTS = {
    "single": lambda: "auto",
    "pp": lambda: "pp",
    "interleaved": lambda: MeshStrategy(dp_shard=1, pp=2, pipeline_schedule="interleaved"),
    "zero3 x pp": lambda: MeshStrategy(pp=2, num_microbatches=2),
}
PLANS = {
    "Muon and AdamW": lambda: Muon(
        0.02, partial(AdamW, lr=0.003, weight_decay=0.1), iteration_dtype="float32"
    ),
    "rules by kind": lambda: OptimizerPlan(
        partial(SGD, lr=0.1, momentum=0.9, weight_decay=0.1),
        rules=[
            ParamRule("embedding", lr_scale=2.0),
            ParamRule("head", lr_scale=0.5),
            ParamRule("norm"),
            ParamRule(),
        ],
    ),
}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "topics.txt"
    path.write_text("".join(python_docs_text())[:3000])
    return path


def train(layout, text, plan, tied=False, fault=None):
    if fault is not None:
        fault()
    L.seed_everything(0, verbose=False)
    module = LanguageModel(zero_init_residual=False, tie_embeddings=tied, **SHAPE)
    summary = Summary()
    trainer = L.Trainer(
        max_steps=4,
        accelerator="cpu",
        devices=int(os.environ.get("WORLD_SIZE", 1)),
        strategy=LAYOUTS[layout](),
        logger=False,
        callbacks=[PLANS[plan](), GradientClipping(0.5), UpdateMonitor(), summary],
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    trainer.fit(module, TextDataModule(text, context_length=16, batch_size=8))
    groups = [
        {k: v for k, v in group.items() if isinstance(v, int | float | bool | str)}
        for group in trainer.optimizers[0].param_groups
    ]
    written = module.generate("T", max_new_tokens=24, temperature=0)
    written += summary.summary_lines(trainer, module)["parameters"]
    said = {n: float(v) for n, v in trainer.callback_metrics.items() if n != "train/loss"}
    return whole(module), groups, written, said


def off(found, single):
    return max(
        furthest(stage_names, {n: single[n] for n in stage_names}) for stage_names, *_ in found
    )


@pytest.mark.parametrize(
    ("plan", "tied", "layout", "world"),
    [
        ("Muon and AdamW", False, "pp", 4),
        ("Muon and AdamW", True, "interleaved", 2),
        ("rules by kind", False, "zero3 x pp", 4),
    ],
)
def test_a_plan_is_built_for_the_net_and_not_for_a_stage(ranks, text, plan, tied, layout, world):
    single, groups, written, said = train("single", text, plan, tied)
    found = ranks(train, world, layout, text, plan, tied)
    assert off(found, single) < 2e-6
    assert all(stage_value == groups for _, stage_value, *_ in found)
    assert all(stage_value == written for *_, stage_value, _ in found)
    assert all(stage_value == pytest.approx(said, rel=1e-5) for *_, stage_value in found)


def stages_seen_as_nets():
    pipeline_parallel.Pipeline.full_net = lambda self: nullcontext()


def test_a_plan_for_each_stage_would_be_caught(ranks, text):
    single, *_ = train("single", text, "Muon and AdamW")
    found = ranks(train, 2, "pp", text, "Muon and AdamW", False, stages_seen_as_nets)
    assert off(found, single) > 1e-3


def stand_ins(tied):
    torch.manual_seed(0)
    module = LanguageModel(7, 8, tie_embeddings=tied, **SHAPE)
    module.configure_model()
    before = classify_params(module), [(n, p.shape) for n, p in module.named_parameters()]
    trainer = L.Trainer(accelerator="cpu", devices=2, strategy="pp", logger=False)
    trainer.strategy.connect(module)
    trainer.strategy.setup_environment()
    trainer.strategy.parallelize_module(module)
    stage_names = [n for n, _ in module.named_parameters()]
    with trainer.strategy.pipeline.full_net():
        after = classify_params(module), [(n, p.shape) for n, p in module.named_parameters()]
        bytes_of_stand_ins = sum(
            p.untyped_storage().nbytes() for p in module.parameters() if hasattr(p, "is_remote")
        )
    again = [n for n, _ in module.named_parameters()]
    return (
        before == after,
        stage_names == again,
        len(stage_names) < len(before[1]),
        bytes_of_stand_ins,
    )


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_the_full_net_can_be_inspected_at_four_bytes_per_tensor(ranks, tied):
    for is_equal, restored, fewer, size in ranks(stand_ins, 2, tied):
        assert is_equal
        assert restored
        assert fewer
        assert size < 4 * 60


def saved(layout, text, path, plan):
    """The file of a run with two sets of weights, written while the second one is shown."""
    L.seed_everything(0, verbose=False)
    module = LanguageModel(zero_init_residual=False, **SHAPE)
    trainer = L.Trainer(
        max_steps=4,
        accelerator="cpu",
        devices=int(os.environ.get("WORLD_SIZE", 1)),
        strategy=LAYOUTS[layout](),
        logger=False,
        callbacks=TWO_SETS[plan](),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    trainer.fit(module, TextDataModule(text, context_length=16, batch_size=8))
    trainer.save_checkpoint(path)


TWO_SETS = {
    "ema": lambda: [OptimizerPlan(partial(SGD, lr=0.1)), EMA(0.9)],
    "training_weights": lambda: [OptimizerPlan(partial(AdamWScheduleFree, lr=0.01))],
}


@pytest.mark.parametrize(("layout", "world"), [("pp", 2), ("zero3 x pp", 4)])
@pytest.mark.parametrize("plan", TWO_SETS)
def test_a_file_has_both_sets_of_weights_of_all_stages(ranks, text, tmp_path, layout, world, plan):
    saved("single", text, tmp_path / "single.ckpt", plan)
    ranks(saved, world, layout, text, tmp_path / "stages.ckpt", plan)
    single, stages = (torch.load(tmp_path / f"{each}.ckpt") for each in ("single", "stages"))
    assert furthest(stages["state_dict"], single["state_dict"]) < 2e-6
    beside = [each["ema"]["raw"] if plan == "ema" else each[plan] for each in (stages, single)]
    assert beside[0].keys() == beside[1].keys()
    assert furthest(*beside) < 2e-6
    assert furthest(beside[1], single["state_dict"]) > 1e-3


class OwnOptimizer(LanguageModel):
    """A model whose own optimizer has its parameters in another order than the module."""

    def configure_optimizers(self):
        params = list(self.parameters())
        if self.groups == "by decay":
            decayed = {"params": [p for p in params if p.ndim > 1], "weight_decay": 0.1}
            return AdamW([decayed, {"params": [p for p in params if p.ndim < 2]}], lr=0.01)
        return AdamW(params[::-1], lr=0.01)


class OneBatch(TextDataModule):
    """The same batch in each of three steps, which are an epoch."""

    def train_dataloader(self):
        torch.manual_seed(0)
        batch = next(iter(super().train_dataloader()))
        return torch.utils.data.DataLoader([batch] * 3, batch_size=None)


def fit(strategy, text, groups, steps, ckpt_path=None, save_to=None):
    L.seed_everything(0, verbose=False)
    has_plan = groups in PLANS
    module = (LanguageModel if has_plan else OwnOptimizer)(zero_init_residual=False, **SHAPE)
    module.groups = groups
    trainer = L.Trainer(
        max_steps=steps,
        accelerator="cpu",
        devices=int(os.environ.get("WORLD_SIZE", 1)),
        strategy=strategy,
        logger=False,
        callbacks=[PLANS[groups]()] if has_plan else [],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    trainer.fit(module, OneBatch(text, context_length=16, batch_size=8), ckpt_path=ckpt_path)
    if save_to is not None:
        trainer.save_checkpoint(save_to)
    return whole(module)


@pytest.mark.parametrize(
    ("groups", "first", "second"),
    [
        ("by decay", "auto", "pp"),
        ("Muon and AdamW", "auto", "pp"),
        ("reversed", "pp", "auto"),
        ("reversed", "pp", "pp"),
    ],
)
def test_optimizer_states_find_their_parameters_with_and_without_stages(
    ranks, text, tmp_path, groups, first, second
):
    expected = fit("auto", text, groups, 6)

    def run(strategy, *args):
        call = (strategy, text, groups, *args)
        return [fit(*call)] if strategy == "auto" else ranks(fit, 2, *call)

    run(first, 3, None, tmp_path / "first.ckpt")
    for weights in run(second, 6, tmp_path / "first.ckpt"):
        assert furthest(weights, {name: expected[name] for name in weights}) < 2e-6


class NewName(LanguageModel):
    """It logs a new name from its second step on."""

    def training_step(self, batch, batch_idx):
        if self.global_step:
            self.log("later", 1.0)
        return super().training_step(batch, batch_idx)


def log_a_new_name(text):
    trainer = L.Trainer(
        max_steps=3,
        accelerator="cpu",
        devices=2,
        strategy="pp",
        logger=False,
        callbacks=[OptimizerPlan(partial(SGD, lr=0.1))],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with pytest.raises(UsageError, match="logs other names than in its first step"):
        trainer.fit(NewName(**SHAPE), TextDataModule(text, context_length=16, batch_size=8))
    return trainer.global_step


def test_all_ranks_refuse_a_new_logged_name(ranks, text):
    assert ranks(log_a_new_name, 2, text) == [1, 1]
