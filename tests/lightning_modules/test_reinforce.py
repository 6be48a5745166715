"""Reinforce: rollouts depend only on the seed, steps are policy gradients, runs resume exactly."""

import json
import math
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from ranks import furthest, whole

from ravine.callbacks import ExactResume, GradientClipping, LoRA
from ravine.callbacks.lora import inject_lora, lora_layers
from ravine.cli import loading
from ravine.datamodules import PromptDataModule, TextDataModule
from ravine.datamodules.text import python_docs_text
from ravine.errors import UsageError
from ravine.lightning_modules import (
    BatchDistance,
    CharacterFraction,
    LanguageModel,
    LineLength,
    ReferenceLogprob,
    Reinforce,
    RewardFunction,
    SpamClassifier,
    SpeakerDiversity,
    Threshold,
    VocabularyFraction,
    WordUniqueness,
)
from ravine.lightning_modules.generation.sampling import DecodingConfig
from ravine.lightning_modules.nn import Transformer
from ravine.lightning_modules.rl import base_model
from ravine.lightning_modules.rl.advantages import AdvantageEstimator
from ravine.lightning_modules.rl.kl import KL
from ravine.lightning_modules.rl.rewards.base import check_rewards
from ravine.lightning_modules.rl.rollout import (
    compute_ref_logprobs,
    compute_rollout_logprobs,
    disable_adapters,
    policy_loss,
)
from ravine.strategies.materialize import iter_value_blocks

pytestmark = [
    pytest.mark.filterwarnings("ignore:It is recommended to use .self.log"),
]
TEXT = "".join(python_docs_text())[:20_000]
QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "log_every_n_steps": 1,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A language model of a few thousand parameters, hardly trained, and its text."""
    folder = tmp_path_factory.mktemp("base")
    (folder / "text.txt").write_text(TEXT)
    torch.manual_seed(0)
    model = LanguageModel(
        num_layers=1, d_model=16, num_heads=2, zero_init_residual=False, dropout=0.5
    )
    model.lr = 0.02
    trainer = L.Trainer(max_steps=30, limit_val_batches=0, **QUIET)
    trainer.fit(model, TextDataModule(folder / "text.txt", context_length=48, batch_size=8))
    trainer.save_checkpoint(folder / "base.ckpt", weights_only=False)
    return str(folder / "base.ckpt")


def six() -> list:
    """The lecture's sixth reward."""
    return [
        CharacterFraction("eE", -3.0, "e"),
        ReferenceLogprob(0.2),
        WordUniqueness(),
        LineLength(weight=0.3),
        SpeakerDiversity(weight=0.5),
        BatchDistance(n=1, weight=1.5),  # in so few words the lecture's four are never met again
    ]


def policy(base: str, *rewards, **how: Any) -> Reinforce:
    how = {"max_new_tokens": 16, "sampling": DecodingConfig(0.8)} | how
    return Reinforce(base, list(rewards) or six(), **how)


def data(base: str, **how: Any) -> PromptDataModule:
    how = {"prompt_length": 8, "batch_size": 8, "num_val_prompts": 8} | how
    return PromptDataModule(base.replace("base.ckpt", "text.txt"), **how)


NONE = AdvantageEstimator("none")


def is_timing(name: str) -> bool:
    return name.startswith("time/") or name.endswith("tokens_per_second")


class Watch(L.Callback):
    """Keeps rollouts, gradients and metrics."""

    def __init__(self) -> None:
        self.rollouts: list[Any] = []
        self.gradients: list[dict[str, torch.Tensor]] = []
        self.metrics: list[dict[str, float]] = []

    def on_train_batch_start(self, trainer, pl_module, batch, index) -> None:
        self.rollouts.append(batch)

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        found = {}
        for name, p in pl_module.named_parameters():
            if p.grad is None:  # frozen under adapters
                continue
            grad = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
            found[name] = grad.clone()
        self.gradients.append(found)

    def on_train_batch_end(self, trainer, *args) -> None:
        metrics = trainer.callback_metrics
        self.metrics.append({k: float(v) for k, v in metrics.items() if not is_timing(k)})


def fit(model: Reinforce, prompts: PromptDataModule, steps: int = 2, **how: Any) -> Watch:
    L.seed_everything(0, verbose=False)
    watch = Watch()
    ckpt, callbacks = how.pop("ckpt_path", None), how.pop("callbacks", [])
    trainer = L.Trainer(max_steps=steps, callbacks=[watch, *callbacks],
                        limit_val_batches=0, **QUIET, **how)  # fmt: skip
    trainer.fit(model, prompts, ckpt_path=ckpt, weights_only=True)
    return watch


def on_ranks(base: str, strategy: str, devices: int, how: dict[str, Any]) -> tuple:
    model = policy(base, kl=KL(0.1), **how)
    watch = fit(model, data(base), strategy=strategy, devices=devices)
    metrics = {k: v for k, v in watch.metrics[-1].items() if k not in ("train/policy_loss",)}
    tokens = [rollout.tokens for rollout in watch.rollouts]
    return watch.gradients[0], whole(model), tokens, metrics, model.last_samples()


def without_a_copy(base: str, strategy: str, devices: int) -> dict[str, torch.Tensor]:
    model = policy(base, CharacterFraction("eE"), reference="lora")
    fit(model, data(base), steps=1, strategy=strategy, devices=devices, callbacks=[LoRA(rank=2)])
    return whole(model)


def test_two_ranks_train_adapters_of_a_sharded_base(ranks, base) -> None:
    one = without_a_copy(base, "auto", 1)
    for weights in ranks(without_a_copy, 2, base, "zero3", 2):
        assert furthest(weights, one) < 2e-6


@pytest.mark.parametrize("reference", ["none", "lora", "frozen_copy"])
def test_a_base_is_read_by_rows_unless_a_copy_of_it_is_kept(base, reference) -> None:
    model = policy(base, CharacterFraction("eE"), reference=reference)
    model._trainer = SimpleNamespace(callbacks=[], datamodule=None)  # type: ignore[assignment]
    model.__dict__["strategy_draws_values"] = True  # as MeshStrategy does
    model.setup("fit")
    model.configure_model()
    weights = torch.load(base, weights_only=True)["state_dict"]
    for name, parameter in model.named_parameters(remove_duplicate=False):
        assert parameter.is_meta == (reference != "frozen_copy")
        assert torch.cat(list(iter_value_blocks(parameter))).equal(weights[name])


# with the reward that looks at the batch: RLOO over it; groups, divided by all tokens
SETTINGS = {
    "the batch": {"estimator": AdvantageEstimator("rloo")},
    "groups": {
        "estimator": AdvantageEstimator("grpo", "group", loss_normalization="tokens"),
        "group_size": 2,
    },
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("strategy", ["ddp", "zero3"])
def test_two_ranks_sample_the_batch_and_take_the_step_of_one_process(
    ranks, base, strategy, setting
) -> None:
    one = on_ranks(base, "auto", 1, SETTINGS[setting])
    both = ranks(on_ranks, 2, base, strategy, 2, SETTINGS[setting])
    for step, tokens in enumerate(one[2]):
        assert torch.cat([found[2][step] for found in both]).equal(tokens)
    assert not both[0][2][0].equal(both[1][2][0])
    for row, exact in zip([row for found in both for row in found[4]], one[4], strict=True):
        assert row == pytest.approx(exact, abs=1e-6)
    assert max(g.abs().max() for g in one[0].values()) > 1e-3
    for gradient, weights, _, metrics, _ in both:
        assert furthest(gradient, one[0]) < 1e-6
        assert furthest(weights, one[1]) < 2e-6
        for name in metrics.keys() - {"train/logprob_gap"}:  # a rank's own
            assert metrics[name] == pytest.approx(one[3][name], abs=1e-6), name


def test_four_ranks_sample_the_batch_of_one_process(ranks, base) -> None:
    one = on_ranks(base, "auto", 1, {})
    found = ranks(on_ranks, 4, base, "ddp", 4, {})
    assert torch.cat([each[2][0] for each in found]).equal(one[2][0])


def test_an_interrupted_reinforce_run_resumes_bit_for_bit(base, tmp_path) -> None:
    how: dict[str, Any] = {"kl": KL(0.1), "group_size": 2}
    straight = policy(base, **how)
    through = fit(straight, data(base), 6)
    first = policy(base, **how)
    L.seed_everything(0, verbose=False)
    trainer = L.Trainer(max_steps=3, limit_val_batches=0, callbacks=[ExactResume()], **QUIET)
    trainer.fit(first, data(base))
    trainer.save_checkpoint(tmp_path / "cut.ckpt", weights_only=False)
    second = policy(base, **how)
    rest = fit(second, data(base), 6, ckpt_path=tmp_path / "cut.ckpt", callbacks=[ExactResume()])
    assert furthest(whole(second), whole(straight)) == 0
    assert rest.metrics == through.metrics[3:]


def test_the_step_is_the_mean_of_weight_times_gradient(base) -> None:
    """Both by hand, from the texts alone."""
    model = policy(base, CharacterFraction("e", -1.0), estimator=AdvantageEstimator("mean"))
    model.lr = 0.0
    watch = fit(model, data(base), 1)
    samples, net = model.last_samples(), model.net
    rewards = torch.tensor([-row["text"].count("e") / len(row["text"]) for row in samples])
    torch.testing.assert_close(watch.rollouts[0].advantages, rewards - rewards.mean())
    assert model.tokenizer is not None
    assert net is not None
    model.zero_grad()
    for row, advantage in zip(samples, rewards - rewards.mean(), strict=True):
        prompt, text = (model.tokenizer.encode(row[part]) for part in ("prompt", "text"))
        logits = net.eval()(torch.cat((prompt, text))[None])[0, len(prompt) - 1 : -1]
        logprob = (logits / 0.8).log_softmax(-1).gather(1, text[:, None]).sum()
        (-advantage * logprob / len(samples)).backward()
    by_hand = {name: p.grad for name, p in model.named_parameters()}
    assert furthest(watch.gradients[0], by_hand) < 1e-6
    assert max(float(g.abs().max()) for g in watch.gradients[0].values()) > 1e-3


def test_sampled_tokens_have_the_same_logprobs_in_the_update(base) -> None:
    """One transform: with temperature, top-k and top-p at once the log-probabilities agree."""
    model = policy(base, sampling=DecodingConfig(0.7, top_k=20, top_p=0.9))
    rollout = fit(model, data(base), 1).rollouts[0]
    fresh = policy(base, sampling=model.sampling)
    fit(fresh, data(base), 0)
    fresh.eval()
    torch.testing.assert_close(
        compute_rollout_logprobs(fresh, rollout, model.sampling).detach(), rollout.sampler_logprobs,
        rtol=0, atol=1e-5,
    )  # fmt: skip


def test_a_shared_prompt_is_processed_once_and_gives_the_same_step(base) -> None:
    """Policy and reference read branches; the gradient is that of whole texts."""
    read = []
    how: dict[str, Any] = {"group_size": 4, "kl": KL(0.1, "k3", "loss")}
    model = policy(base, **how)
    model.lr = 0.01
    watch = fit(model, data(base), 2)
    rollout = watch.rollouts[1]
    model.zero_grad()
    model.eval()
    for each in (rollout, rollout._replace(shared_prefix=None)):
        hook = model.net.embed.register_forward_hook(
            lambda _, given, __: read.append(given[0].numel())
        )  # type: ignore
        logprob = compute_rollout_logprobs(model, each, model.sampling)
        hook.remove()
        policy_loss(each, logprob, model.estimator, model.kl, 16).backward()
        read.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        model.zero_grad()
    assert read[0] == 8 * 7 + 32 * 16  # eight prompts but for their last token, which branches have
    assert read[2] == 32 * (8 + 15)
    assert max(float((a - b).abs().max()) for a, b in zip(read[1], read[3], strict=True)) < 1e-6
    assert max(float(gradient.abs().max()) for gradient in read[1]) > 1e-3
    texts = rollout.input_ids, rollout.logit_positions, rollout.tokens, rollout.mask, model.sampling
    whole, _ = compute_ref_logprobs(model._reference_nets[0], *texts)
    torch.testing.assert_close(rollout.ref_logprobs, whole, rtol=0, atol=1e-6)


def test_reference_logprobs_are_computed_at_the_sampling_temperature_and_at_one(base) -> None:
    """What the policy may not draw, by top-k, the reference may say; both by hand."""
    cool = DecodingConfig(0.7, top_k=5)
    model = policy(base, ReferenceLogprob(), kl=KL(0.1), sampling=cool, group_size=2)
    model.lr = 0.05
    rollout = fit(model, data(base), 3).rollouts[2]
    net = model._reference_nets[0]
    logits = net(rollout.input_ids)[
        torch.arange(len(rollout.input_ids))[:, None], rollout.logit_positions
    ].detach()
    at_temperature, plain = (
        (logits / t).log_softmax(-1).gather(-1, rollout.tokens[..., None])[..., 0]
        for t in (0.7, 1.0)
    )
    torch.testing.assert_close(rollout.ref_logprobs, at_temperature, rtol=0, atol=1e-5)
    said = torch.tensor([row["reference_logprob"] for row in model.last_samples()])
    torch.testing.assert_close(said, plain.mean(1), rtol=0, atol=1e-5)


def test_a_prompt_gets_another_text_in_another_epoch(base, tmp_path) -> None:
    lines = [json.dumps({"prompt": f"a {i}"}) for i in range(5)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    model, written = policy(base, reward_of(0.0, 1.0), reference="none"), dict[str, set[str]]()

    class Keep(L.Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            for row in model.last_samples():
                written.setdefault(row["prompt"], set()).add(row["text"])

    model.lr = 0.0
    fit(model, PromptDataModule(tmp_path / "prompts.jsonl", batch_size=4), 3, callbacks=[Keep()])
    assert {prompt: len(texts) for prompt, texts in written.items()} == dict.fromkeys(written, 3)
    assert len(written) == 4


def test_dropout_is_off_during_sampling_and_update(base) -> None:
    """The base has a dropout of one half: with it, the two passes would differ."""
    watch = fit(policy(base), data(base), 2)
    assert all(row["train/logprob_gap"] < 1e-5 for row in watch.metrics)


def test_texts_are_sampled_in_the_precision_of_the_step(base, monkeypatch) -> None:
    """The hook that writes is outside of the trainer's precision context, and enters it."""
    seen = []

    def note(module: Any, *args: Any) -> None:
        seen.append((torch.is_autocast_enabled("cpu"), torch.is_grad_enabled()))

    model = policy(base)
    monkeypatch.setattr(Transformer, "__call__", lambda net, *a: (note(net), net.forward(*a))[1])
    watch = fit(model, data(base), 1, precision="bf16-mixed")
    assert set(seen) == {(True, False), (True, True)}
    assert watch.metrics[0]["train/logprob_gap"] < 0.05


def test_rewards_rise(base) -> None:
    model = policy(base, CharacterFraction("e ", 1.0, "share"), max_new_tokens=16)
    model.lr = 0.01
    watch = fit(model, data(base, batch_size=16), 12)
    reward_means = [row["train/share"] for row in watch.metrics]
    assert reward_means[-1] > 0.8
    assert reward_means[-1] > reward_means[0] + 0.35


def test_clipping_and_accumulation_work_as_in_supervised_training(base) -> None:
    common = CharacterFraction("etaoin", -1.0)  # two texts of a micro-batch may lack one letter
    none = policy(base, common, estimator=AdvantageEstimator("none"))
    whole_batch = fit(none, data(base), 1)
    parts = fit(
        policy(base, common, estimator=AdvantageEstimator("none")),
        data(base),
        1,
        accumulate_grad_batches=4,
        callbacks=[GradientClipping(1.0)],
    )
    assert torch.cat([r.tokens for r in parts.rollouts]).equal(whole_batch.rollouts[0].tokens)
    assert furthest(parts.gradients[0], whole_batch.gradients[0]) < 1e-6


def test_the_reference_is_in_no_optimizer_and_in_the_checkpoint_only_by_its_checksum(
    base, tmp_path
) -> None:
    model = policy(base, kl=KL(0.1))
    L.seed_everything(0, verbose=False)
    trainer = L.Trainer(max_steps=2, limit_val_batches=0, **QUIET)
    trainer.fit(model, data(base))
    frozen = model._reference_nets[0]
    started = torch.load(base, weights_only=True)["state_dict"]
    for name, parameter in frozen.named_parameters():
        assert parameter.equal(started[f"net.{name}"])
        assert not any(parameter is p for p in model.parameters())
    trainer.save_checkpoint(tmp_path / "policy.ckpt", weights_only=False)
    saved = torch.load(tmp_path / "policy.ckpt", weights_only=True)
    assert set(saved["state_dict"]) == set(started)
    assert len(saved["policy"]["base_fingerprint"]) == 64


def test_a_policy_is_loaded_without_its_base(base, tmp_path) -> None:
    model = policy(base)
    L.seed_everything(0, verbose=False)
    trainer = L.Trainer(max_steps=1, limit_val_batches=0, **QUIET)
    trainer.fit(model, data(base))
    trainer.save_checkpoint(tmp_path / "policy.ckpt", weights_only=False)
    checkpoint = torch.load(tmp_path / "policy.ckpt", weights_only=True)
    checkpoint["hyper_parameters"]["base_checkpoint"] = "gone"
    torch.save(checkpoint, tmp_path / "policy.ckpt")
    loaded = Reinforce.load_from_checkpoint(tmp_path / "policy.ckpt")
    assert loaded.generate("the", max_new_tokens=8) == model.generate("the", max_new_tokens=8)
    again = policy(str(tmp_path / "policy.ckpt"))  # and it is a base itself
    fit(again, data(base), 1)


def test_a_policy_of_adapters_alone_is_loaded_with_its_base_or_refused(
    base, tmp_path, monkeypatch
) -> None:
    own = shutil.copy(base, tmp_path / "own.ckpt")
    model = policy(str(own), kl=KL(0.1), reference="lora")
    model.lr = 0.05
    L.seed_everything(0, verbose=False)
    lora = LoRA(rank=2, save="adapter")
    trainer = L.Trainer(max_steps=2, limit_val_batches=0, callbacks=[lora], **QUIET)
    trainer.fit(model, data(base))
    trainer.save_checkpoint(path := tmp_path / "policy.ckpt", weights_only=False)
    assert path.stat().st_size < own.stat().st_size
    how = {"max_new_tokens": 32, "seed": 1}
    loaded = loading.load_model(path)
    assert loaded.generate("the", **how) == model.generate("the", **how)
    started = LanguageModel.load_from_checkpoint(base)
    assert loaded.generate("the", **how) != started.generate("the", **how)
    other = torch.load(base, weights_only=True)
    other["state_dict"]["net.head.weight"] += 1
    torch.save(other, own)
    with pytest.raises(ValueError, match="is not the base model of this policy"):
        loading.load_model(path)
    own.unlink()
    with pytest.raises(
        FileNotFoundError,
        match=r"the base model of these adapters, .*own\.ckpt, does not exist in .*copy",
    ):
        loading.load_model(path)


def test_another_base_under_the_same_name_is_refused(base, tmp_path) -> None:
    L.seed_everything(0, verbose=False)
    trainer = L.Trainer(max_steps=1, limit_val_batches=0, **QUIET)
    trainer.fit(policy(base), data(base))
    trainer.save_checkpoint(tmp_path / "policy.ckpt", weights_only=False)
    other = torch.load(base, weights_only=True)
    other["state_dict"]["net.head.weight"] += 1
    torch.save(other, tmp_path / "other.ckpt")
    with pytest.raises(
        ValueError, match=r"not the base model of this policy.*use base_checkpoint=FILE"
    ):
        fit(policy(str(tmp_path / "other.ckpt")), data(base), ckpt_path=tmp_path / "policy.ckpt")


def test_validation_samples_the_same_texts_each_time(base) -> None:
    model = policy(base)
    trainer = L.Trainer(**QUIET)
    L.seed_everything(0, verbose=False)
    found = [trainer.validate(model, data(base), verbose=False)[0] for _ in range(2)]
    same = [{k: v for k, v in each.items() if not is_timing(k)} for each in found]
    assert same[0] == same[1]
    assert {
        "val/reward",
        "val/e",
        "val/frac_in_vocab",
        "val/jaccard_distance_nearest",
        "val/kl",
    } <= set(same[0])


def test_a_stop_string_ends_a_text_and_is_part_of_the_loss(base) -> None:
    common = CharacterFraction("etaoin", -1.0, "common")  # texts that end early may lack one letter
    model = policy(base, common, stop=" ", max_new_tokens=32)
    rollout = fit(model, data(base), 1).rollouts[0]
    assert model.tokenizer is not None
    space = int(model.tokenizer.encode(" "))
    lengths = rollout.mask.sum(1)
    assert (lengths < 32).any()
    for tokens, length in zip(rollout.tokens, lengths, strict=True):
        assert length == 32 or tokens[length - 1] == space
    assert not any(" " in row["text"] for row in model.last_samples())


def test_no_term_has_a_reserved_name(base) -> None:
    model = policy(base)
    watch, terms = fit(model, data(base), 2), {term.name for term in model.rewards}
    logged = {name.removeprefix("train/") for name in watch.metrics[-1]}
    for name in (logged | model.last_samples()[0].keys() | {"tokens_per_second"}) - terms:
        with pytest.raises(ValueError, match=f"the reward '{name}' is already the name"):
            check_rewards([CharacterFraction("e", name=name)], has_corpus=True, has_reference=True)
    assert {"e_std", "kl", "logprob_gap", "prompt"} <= logged | model.last_samples()[0].keys()


# Rewards of the user's, and bad input


def reward_of(*answers: Any):
    def reward_fn(texts: list[str], prompts: list[str]) -> list[Any]:
        return list(answers) * (len(texts) // len(answers))

    return RewardFunction(reward_fn)


def test_a_user_reward_gets_the_arguments_of_its_signature(base, tmp_path) -> None:
    lines = [json.dumps({"prompt": f"a {i}", "wanted": f"x{i % 3}"}) for i in range(20)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    seen: dict[str, Any] = {}

    def wants_all(texts, prompts, tokens, mask, logprobs, wanted):
        seen.update(locals())
        return [None if w == "x0" else t.count("e") for t, w in zip(texts, wanted, strict=True)]

    model = policy(base, RewardFunction(wants_all), group_size=2)
    prompts = PromptDataModule(tmp_path / "prompts.jsonl", batch_size=4)
    rollout = fit(model, prompts, 1).rollouts[0]
    assert len(seen["texts"]) == 8
    assert seen["prompts"][::2] == seen["prompts"][1::2]
    for prompt, wanted in zip(seen["prompts"], seen["wanted"], strict=True):
        assert json.dumps({"prompt": prompt, "wanted": wanted}) in lines
    assert seen["logprobs"].shape == seen["tokens"].shape == seen["mask"].shape == (8, 16)
    unscored = torch.tensor([w == "x0" for w in seen["wanted"]])
    assert not rollout.advantages[unscored].any()


def once(texts: list[str]) -> list[float]:
    if "e" in "".join(texts):
        raise KeyError("no e, please")
    return [1.0] * len(texts)


MISTAKES: dict[str, tuple[Any, str]] = {
    "it raises": (
        lambda b: policy(b, RewardFunction(once)),
        r"once failed on sample \d+ \('.*'\): KeyError: 'no e, please' \(test_.*\.py:\d+\); cor",
    ),
    "NaN": (
        lambda b: policy(b, reward_of(0.5, math.nan)),
        r"the reward reward_fn is nan for sample 1 \('.*'\); allowed: .*; return a number, or None",
    ),
    "infinite": (
        lambda b: policy(b, reward_of(math.inf)),
        r"the reward reward_fn is inf for sample 0 \('.*'\); allowed: .*; return a number, or None",
    ),
    "too few": (
        lambda b: policy(b, RewardFunction(lambda texts: [1.0, 2.0], name="two")),
        r"the reward two returned 2 numbers for 8 samples; .*; return one number for each",
    ),
    "all None": (
        lambda b: policy(b, reward_of(None)),
        r"the reward reward_fn is None for all 8 samples.*; return numbers for some",
    ),
    "no such column": (
        lambda b: policy(b, RewardFunction(lambda texts, answer: [], name="f")),
        r"the reward f has the argument 'answer', .*; allowed: texts, prompts, .*; rename",
    ),
    "no rewards": (
        lambda b: Reinforce(b),
        r"rewards is empty; .*; type --model\.rewards\+=.*--config reinforce/avoid_e_v1",
    ),
    "one name for two": (
        lambda b: policy(b, CharacterFraction("e"), CharacterFraction("a")),
        r"the reward 'character_fraction' is already the name of another metric",
    ),
    "a reference that is not there": (
        lambda b: policy(b, ReferenceLogprob(), reference="none"),
        r"reference_logprob needs .* a reference.*--model\.reference=frozen_copy",
    ),
    "KL without a reference": (
        lambda b: policy(b, kl=KL(0.1), reference="none"),
        r"kl\.beta=0\.1 needs a reference.*--model\.reference=frozen_copy",
    ),
    "no adapters": (
        lambda b: policy(b, reference="lora"),
        r"needs a net with adapters.*; add LoRA\(\).*--trainer\.callbacks\+=LoRA",
    ),
    "a prompt too long": (
        lambda b: policy(b, max_new_tokens=42),
        r"sample 0 has 8 tokens, .* with 42 new tokens .* 48 .*--model\.max_new_tokens=41, or "
        r"--data\.prompt_length=7$",
    ),
    "a group of one": (
        lambda b: policy(b, estimator=AdvantageEstimator("rloo", "group")),
        r"'rloo' compares the samples of a group, .* only one.*--model\.group_size=4",
    ),
    "a batch of one": (
        lambda b: policy(b, sampling=DecodingConfig(0.8)),
        r"'mean' compares the samples of a batch, .* only one.*--data\.batch_size=64$",
    ),
    "a group of none": (
        lambda b: policy(b, group_size=0),
        r"group_size=0 is too small; allowed: 1 or more; .*; type --model\.group_size=1$",
    ),
    "temperature 0": (
        lambda b: policy(b, sampling=DecodingConfig(0.0)),
        r"temperature=0 does not sample.*--model\.sampling\.temperature=0\.8",
    ),
    "a stop of nothing": (
        lambda b: policy(b, stop=""),
        r"stop='' would end every text .*; allowed: .* one character .*; type --model\.stop=",
    ),
    "a term with a metric's name": (
        lambda b: policy(b, CharacterFraction("e", name="kl")),
        r"the reward 'kl' is already .*; pass a different name.*--model\.rewards\.name=NAME",
    ),
    "no base": (
        lambda b: policy(b + "x"),
        r"base_checkpoint=.* is neither a file nor a folder .*--model\.base_checkpoint=FILE",
    ),
    "rejection of the lukewarm": (
        lambda b: policy(b, CharacterFraction("e"), estimator=AdvantageEstimator("rejection")),
        r"'rejection' needs rewards of 0 or 1.*use a single Threshold",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named(mistake: str, base: str) -> None:
    make, message = MISTAKES[mistake]
    with pytest.raises(UsageError) as error:
        fit(make(base), data(base, batch_size=1 if mistake == "a batch of one" else 8), 1)
    flag = f"; type {error.value.flag}" if error.value.flag else ""
    assert re.search(message, f"{error.value}{flag}")
    assert "\n" not in str(error.value)


def test_equal_rewards_give_a_warning_and_no_step(base) -> None:
    model = policy(base, Threshold(CharacterFraction("e"), max_value=1.0), reference="none")
    model.lr = 0.0
    with pytest.warns(
        UserWarning, match=r"all 8 advantages are 0, .*equal \(1\); no term contributes"
    ):
        watch = fit(model, data(base), 1)
    assert not any(g.any() for g in watch.gradients[0].values())
    assert watch.metrics[0]["train/frac_zero_advantage"] == 1


@pytest.mark.parametrize("kind", ["grpo", "rloo"])
def test_with_equal_rewards_only_the_kl_term_acts_and_rounding_is_not_amplified(kind, base) -> None:
    """The policy is its reference still: what is left of the divergence is rounding."""
    model = policy(base, reward_of(1.0), kl=KL(0.1), estimator=AdvantageEstimator(kind))
    with pytest.warns(UserWarning, match="only the KL term contributes to this step"):
        watch = fit(model, data(base), 1)
    assert watch.rollouts[0].advantages.abs().max() < 1e-6
    assert watch.metrics[0]["train/frac_zero_advantage"] == 1


def test_a_base_that_is_no_plain_language_model_is_refused(base, tmp_path) -> None:
    checkpoint = torch.load(base, weights_only=True)
    checkpoint["language"]["tokenizer"] = None
    torch.save(checkpoint, tmp_path / "bare.ckpt")
    with pytest.raises(ValueError, match="has no tokenizer"):
        fit(policy(str(tmp_path / "bare.ckpt")), data(base))
    (tmp_path / "torn.ckpt").write_bytes(b"PK no more")
    with pytest.raises(ValueError, match=r"cannot be loaded: .*it is not a checkpoint"):
        fit(policy(str(tmp_path / "torn.ckpt")), data(base))
    checkpoint = torch.load(base, weights_only=True)
    checkpoint["state_dict"]["net.blocks.0.attention.query.lora_a"] = torch.zeros(1)
    torch.save(checkpoint, tmp_path / "lora.ckpt")
    message = r"contains adapters \(net\.blocks\.0\.attention\.query\.lora_a and 0 more.*; merge"
    with pytest.raises(UsageError, match=message) as error:
        fit(policy(str(tmp_path / "lora.ckpt")), data(base))
    assert "--merge" in error.value.flag
    del checkpoint["language"]
    checkpoint["task"] = SpamClassifier.__name__
    torch.save(checkpoint, tmp_path / "spam.ckpt")
    with pytest.raises(ValueError, match="was written by SpamClassifier, not by a LanguageModel"):
        fit(policy(str(tmp_path / "spam.ckpt")), data(base))


DAMAGE: dict[str, tuple[Any, str]] = {
    "no net": (lambda c: c.pop("state_dict"), "not by a LanguageModel"),
    "an empty box": (lambda c: c["language"].clear(), "not by a LanguageModel"),
    "a setting of its own": (
        lambda c: c["hyper_parameters"].update(experts_of_mine=2),
        "by LanguageModel, but its net is not that of a LanguageModel: experts_of_mine and 0 more",
    ),
    "another width": (
        lambda c: c["hyper_parameters"].update(d_model=32),
        r"blocks\.0\.attention\.key\.weight and \d+ more differ; .*use base_checkpoint=FILE",
    ),
    "a weight too many": (
        lambda c: c["state_dict"].update({"net.mine": torch.zeros(1)}),
        "not that of a LanguageModel: mine and 0 more",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_base_of_another_net_is_refused_before_anything_is_built(
    damage: str, base: str, tmp_path
) -> None:
    change, message = DAMAGE[damage]
    checkpoint = torch.load(base, weights_only=True)
    change(checkpoint)
    torch.save(checkpoint, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match=message) as error:
        base_model.load_base_model(str(tmp_path / "other.ckpt"))
    assert "\n" not in str(error.value)


def test_a_truncated_base_is_refused_as_truncated(base, tmp_path) -> None:
    whole_file = Path(base).read_bytes()
    (tmp_path / "half.ckpt").write_bytes(whole_file[: len(whole_file) // 2])
    with pytest.raises(
        ValueError, match=r"it is cut short or damaged at its end .*; use base_checkpoint=FILE"
    ):
        base_model.load_base_model(str(tmp_path / "half.ckpt"))
    with pytest.raises(
        ValueError, match=r"base_checkpoint is empty; allowed: .*; use base_checkpoint=FILE"
    ):
        base_model.load_base_model("")


def test_of_a_folder_the_newest_checkpoint_is_the_base(tmp_path) -> None:
    for name, age in (("b", 3), ("c", 1), ("a", 2)):
        (tmp_path / f"{name}.ckpt").touch()
        os.utime(tmp_path / f"{name}.ckpt", (10**9 - age, 10**9 - age))
    assert base_model.find_checkpoint(str(tmp_path)) == tmp_path / "c.ckpt"


def test_a_micro_batch_of_one_sample_is_refused_as_a_batch_of_one(base) -> None:
    with pytest.raises(
        ValueError, match="'mean' compares the samples of a batch, which has only one"
    ):
        fit(policy(base), data(base), 1, accumulate_grad_batches=8)


def test_a_sharded_base_is_refused_with_the_command_that_consolidates_it(base, tmp_path) -> None:
    (tmp_path / "run" / "step=2.ckpt").mkdir(parents=True)
    (tmp_path / "run" / "step=2.ckpt" / "__0_0.distcp").touch()
    with pytest.raises(UsageError, match=r"is a sharded checkpoint.*base_checkpoint=") as error:
        fit(policy(str(tmp_path / "run")), data(base))
    assert "--consolidate=base.ckpt" in error.value.flag


def fails_on_the_second_rank(base: str) -> None:
    def reward_fn(texts: list[str]) -> list[float]:
        return [1 / (1 - torch.distributed.get_rank())] * len(texts)

    fit(policy(base, RewardFunction(reward_fn)), data(base), 1, strategy="ddp", devices=2)


def test_a_reward_that_fails_on_one_rank_ends_all(ranks, base) -> None:
    with pytest.raises(AssertionError) as error:
        ranks(fails_on_the_second_rank, 2, base)
    assert "RewardError: the reward reward_fn failed on sample 4 (" in str(error.value)
    assert "RewardError: a reward failed on another rank" in str(error.value)
    assert "hung" not in str(error.value)


def stopped(base: str, stop: str | None, devices: int = 1) -> list[str]:
    how = {"strategy": "zero3", "devices": devices} if devices > 1 else {}
    model = policy(
        base, reward_of(1.0), reference="none", max_new_tokens=40, stop=stop, estimator=NONE
    )
    fit(model, data(base, batch_size=2), 1, **how)
    return [row["text"] for row in model.last_samples()]


def test_a_rank_with_finished_texts_generates_as_long_as_other_ranks(ranks, base) -> None:
    """Where a net is sharded, they gather its weights together."""
    first, second = stopped(base, None)
    stop = next(c for c in first[:30] if c not in second)
    both = ranks(stopped, 2, base, stop, 2)
    assert both == [[first.partition(stop)[0]], [second]]


@pytest.mark.parametrize("axis", ["cp", "pp"])
def test_a_strategy_that_splits_texts_is_refused(ranks, base, axis: str) -> None:
    with pytest.raises(AssertionError) as error:
        ranks(on_ranks, 2, base, axis, 2, {})
    said = f"{axis}=2: Reinforce does not support {axis}; allowed: zero1,"
    assert said in str(error.value)
    assert 'use Trainer(strategy="zero3")' in str(error.value)


def test_adapters_switched_off_are_the_reference(base) -> None:
    """The policy's own frozen weights say what a copy of the base would say."""
    found = []
    for reference in ("frozen_copy", "lora"):
        model = policy(base, kl=KL(0.1), reference=reference)
        model.lr = 0.01
        found.append(fit(model, data(base), 3, callbacks=[LoRA(rank=2)]).metrics)
    assert abs(found[0][0]["train/kl"]) < 1e-6
    assert found[0][2]["train/kl_k3"] > 1e-5
    for copied, switched in zip(*found, strict=True):
        assert switched == pytest.approx(copied, abs=1e-6)


def test_a_trainable_reference_is_refused(base) -> None:
    lora = LoRA(rank=2, train_also=["net.head"])
    with pytest.raises(
        ValueError, match=r"head\.weight is trained, too; .*reference='frozen_copy'"
    ):
        fit(policy(base, kl=KL(0.1), reference="lora"), data(base), 1, callbacks=[lora])
    fit(policy(base, kl=KL(0.1)), data(base), 1, callbacks=[LoRA(rank=2, train_also=["net.head"])])


def test_adapters_are_enabled_again_after_an_error() -> None:
    net = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.Linear(1, 1))
    inject_lora(net, ["0", "1"], rank=1)
    layers = lora_layers(net).values()
    with pytest.raises(KeyError, match=r"\[False, False\]"), disable_adapters(net):
        raise KeyError([layer.lora_enabled for layer in layers])
    assert all(layer.lora_enabled for layer in layers)


def test_rewards_of_prompts_in_a_file_compare_with_the_corpus_beside_it(base, tmp_path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "one"}\n' * 3)
    (tmp_path / "plays.txt").write_text("speak again")
    prompts = PromptDataModule(tmp_path / "p.jsonl", corpus_path=tmp_path / "plays.txt")
    prompts.setup("fit")
    assert (prompts.corpus_text, prompts.prompts) == ("speak again", ["one"] * 3)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ('{"prompt": "a"}\n{"prompt": }\n', "line 2: not valid JSON"),
        ('{"prompt": "a"}\n{"text": "b"}\n', 'line 2: the row has no "prompt"'),
        ('{"prompt": "a"}\n{"prompt": ""}\n', 'line 2: the row has no "prompt"'),
        (
            '{"prompt": "a"}\n{"prompt": "b", "x": 1}\n',
            "line 2: its columns differ from those of the first line in x;",
        ),
        ('{"prompt": "a"}\n', "has 1 prompts; allowed: 2 or more"),
    ],
)
def test_a_line_that_is_not_a_prompt_is_named(lines: str, message: str, tmp_path) -> None:
    (tmp_path / "p.jsonl").write_text(lines)
    with pytest.raises(ValueError, match=message):
        PromptDataModule(tmp_path / "p.jsonl").setup("fit")


def test_other_data_are_refused(base) -> None:
    text = TextDataModule(base.replace("base.ckpt", "text.txt"), context_length=8, batch_size=8)
    with pytest.raises(
        ValueError, match=r"TextDataModule has none; .*; pass datamodule=PromptDataModule"
    ):
        fit(policy(base), text)  # type: ignore[arg-type]
    (prompts := data(base)).setup("fit")
    prompts.corpus_text = None
    with pytest.raises(
        ValueError, match=r"the data contain none; .*; use PromptDataModule\(corpus_path=FILE"
    ):
        fit(policy(base, VocabularyFraction()), prompts)


def test_validation_prompts_are_not_training_prompts(base) -> None:
    prompts = data(base)
    prompts.setup("fit")
    trained = {text for batch in prompts.train_dataloader() for text in batch.texts}
    held_out = {text for batch in prompts.val_dataloader() for text in batch.texts}
    assert len(held_out) == 8
    text, border = prompts.corpus_text or "", int(len(prompts.corpus_text or "") * 0.9)
    assert all(t in text[:border] for t in trained)
    assert all(t in text[border:] for t in held_out)
    loader, length = prompts.val_dataloader(), prompts.prompt_length
    prompts._snippets = "." * border + "".join(map(chr, range(9000, 9000 + len(text) - border)))
    found = [text for batch in loader for text in batch.texts]
    assert found[0][0] == chr(9000)  # the border itself, and not a character before it
    assert not any("." in each for each in found)
    assert ord(found[-1][-1]) - 9000 >= len(text) - border - 1 - length


@pytest.mark.parametrize("rows", [False, True])
def test_ranks_validate_on_batches_of_one_size(rows: bool, base: str, tmp_path) -> None:
    """Seven prompts on two ranks are six: they are compared within one batch."""
    lines = [json.dumps({"prompt": f"a {i}"}) for i in range(70)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    path = tmp_path / "prompts.jsonl" if rows else base.replace("base.ckpt", "text.txt")
    batches = []
    for rank in range(2):
        prompts = PromptDataModule(path, prompt_length=8, num_val_prompts=7)
        prompts.trainer = ranked(rank, 2)
        prompts.setup("fit")
        batches.append([batch.texts for batch in prompts.val_dataloader()])
    assert [[len(texts) for texts in each] for each in batches] == [[3], [3]]
    assert not {*batches[0][0]} & {*batches[1][0]}


def test_fewer_held_out_prompts_than_ranks_are_refused(base: str, tmp_path) -> None:
    prompts = data(base, num_val_prompts=3)
    prompts.trainer = ranked(0, 4)
    prompts.setup("fit")
    with pytest.raises(
        ValueError, match=r"=3, but there are 4 ranks; allowed: 4 .*; use num_val_prompts=4$"
    ):
        prompts.val_dataloader()
    (tmp_path / "few.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    few = PromptDataModule(tmp_path / "few.jsonl")
    few.trainer = ranked(0, 2)
    few.setup("fit")
    with pytest.raises(ValueError, match=r"only 1 prompts are held out.*; use val_fraction=0\.5$"):
        few.val_dataloader()


def ranked(rank: int, size: int) -> Any:
    """What a data module asks of a trainer."""
    strategy = SimpleNamespace(distributed_sampler_kwargs={"rank": rank, "num_replicas": size})
    return SimpleNamespace(strategy=strategy, accumulate_grad_batches=1)


def test_a_policy_of_a_base_in_the_default_shape_is_a_base_itself(tmp_path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    model = LanguageModel()
    trainer = L.Trainer(max_steps=1, limit_val_batches=0, **QUIET)
    trainer.fit(model, TextDataModule(tmp_path / "text.txt", context_length=16, batch_size=1))
    trainer.save_checkpoint(tmp_path / "base.ckpt")
    first = base_model.load_base_model(str(tmp_path / "base.ckpt"))
    tuned = policy(
        str(tmp_path / "base.ckpt"), reward_of(0.0, 1.0), max_new_tokens=2, reference="none"
    )
    trainer = L.Trainer(max_steps=1, limit_val_batches=0, **QUIET)
    trainer.fit(tuned, data(str(tmp_path / "base.ckpt"), batch_size=2))
    trainer.save_checkpoint(tmp_path / "policy.ckpt")
    second = base_model.load_base_model(str(tmp_path / "policy.ckpt"))
    assert first.net_kwargs == second.net_kwargs == {}
    again = policy(
        str(tmp_path / "policy.ckpt"), reward_of(0.0, 1.0), max_new_tokens=2, reference="none"
    )
    fit(again, data(str(tmp_path / "base.ckpt"), batch_size=2), 1)


def test_a_prompt_with_a_character_the_base_does_not_know_is_refused(tmp_path) -> None:
    (tmp_path / "text.txt").write_text("abc def\n" * 200)
    model = LanguageModel(num_layers=1, d_model=16, num_heads=2)
    trainer = L.Trainer(max_steps=1, limit_val_batches=0, **QUIET)
    letters = TextDataModule(
        tmp_path / "text.txt", context_length=16, batch_size=1, tokenizer="characters"
    )
    trainer.fit(model, letters)
    trainer.save_checkpoint(tmp_path / "base.ckpt")
    base = str(tmp_path / "base.ckpt")
    late = "abc def\n" * 400 + "cab \u00f8 z\n"  # held out: without a check, long after the start
    (tmp_path / "other.txt").write_text(late)
    (tmp_path / "other.jsonl").write_text('{"prompt": "abc"}\n{"prompt": "\u00f8z"}\n')
    for name in ("other.txt", "other.jsonl"):
        prompts = PromptDataModule(tmp_path / name, prompt_length=4, batch_size=2)
        message = (
            rf"{name} has prompts with 'z' \(U\+007A\), '\u00f8' .*; remove them from the prompts"
        )
        with pytest.raises(ValueError, match=message):
            fit(policy(base, CharacterFraction("e"), max_new_tokens=4), prompts, 1)


def test_tokens_of_a_micro_batch_are_no_divisor_of_a_step(base) -> None:
    model = policy(base, estimator=AdvantageEstimator("none", loss_normalization="tokens"))
    with pytest.raises(ValueError, match=r"2 micro-batches.*; use loss_normalization='constant'"):
        fit(model, data(base), 1, accumulate_grad_batches=2)


DIVERGENCES = {"k1 in the reward": KL(0.5), "k2 in the loss": KL(0.5, "k2", "loss")}


@pytest.mark.parametrize("kind", ["rloo", "grpo", "rejection"])
@pytest.mark.parametrize("where", DIVERGENCES)
def test_kl_in_the_reward_lowers_the_advantages_and_kl_in_the_loss_does_not(
    where: str, kind: Any, base: str
) -> None:
    """In the reward it is taken from it; an estimator that bends rewards leaves it as it is."""
    kl, estimator = DIVERGENCES[where], AdvantageEstimator(kind)
    model = policy(base, reward_of(1.0, 0.0, None, 0.0), kl=kl, estimator=estimator)
    model.lr = 0.05
    rollout = fit(model, data(base), 3).rollouts[2]  # away from the base
    rewards = torch.tensor([row["reward"] for row in model.last_samples()], dtype=torch.float64)
    assert rollout.ref_logprobs is not None
    away = (rollout.sampler_logprobs - rollout.ref_logprobs).double().where(rollout.mask, 0.0).sum(
        1
    ) / 16
    assert away.std() > 1e-2
    exact, scored = estimator.advantages(rewards), ~rewards.isnan()
    assert exact.any()
    if kl.placement == "reward":
        others = (away[scored].sum() - away[scored]) / (int(scored.sum()) - 1)
        exact[scored] -= 0.5 * (away[scored] - others)
    assert not rollout.advantages[~scored].any()
    torch.testing.assert_close(rollout.advantages.double(), exact, atol=1e-6, rtol=0)
