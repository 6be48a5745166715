"""A step against TRL's RLOOTrainer: python benchmarks/against_trl.py [speed | learn SEED]

The same GPT-2-shaped model (4 layers of width 128, characters of tiny Shakespeare), trained a
little by us and exported; G = 4, 4 prompts, 64 + 64 tokens, temperature 0.8, fp32 on a CPU, Adam
1e-3 without decay, clipping 1, no dropout: the same for both (GPT-2's own 0.1 is switched off).
`speed`: runs of each, and of ours once more, in a drawn order, with and without a reference (TRL's
β is per text, ours per token: β · 64), one thread, seconds of the processor for each step after two
to warm up. `learn`: 60 steps of both from one seed, reward the missing letter e. Raw rows in
rows/against_trl.jsonl. Needs the extra `bench`.
"""

import random
import statistics
import sys
import tempfile
import time
import warnings
from functools import partial
from itertools import pairwise
from typing import Any

import lightning as L
import torch
from record import append, circumstances
from versus import Times, compare

from ravine.callbacks import GradientClipping, OptimizerPlan
from ravine.datamodules import PromptDataModule, TextDataModule
from ravine.lightning_modules import CharacterFraction, LanguageModel, Reinforce
from ravine.lightning_modules.generation.sampling import DecodingConfig
from ravine.lightning_modules.pretrained.gpt2 import GPT2_KWARGS
from ravine.lightning_modules.rl.advantages import AdvantageEstimator
from ravine.lightning_modules.rl.kl import KL

G, PROMPTS, PROMPT, NEW = 4, 4, 64, 64
ADAM: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
WARM, STEPS, ROUNDS = 2, 8, 2  # of `speed`
SHAPE: dict[str, Any] = GPT2_KWARGS | {
    "num_layers": 4,
    "d_model": 128,
    "num_heads": 4,
    "zero_init_residual": False,
}
QUIET: dict[str, Any] = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "accelerator": "cpu",
    "limit_val_batches": 0,
}


def base(folder: str) -> str:
    """Train the model a little, and leave a checkpoint and an export in the folder."""
    L.seed_everything(0, verbose=False)
    model = LanguageModel(**SHAPE)
    model.lr = 2e-3
    trainer = L.Trainer(max_steps=250, **QUIET)
    trainer.fit(
        model, TextDataModule(source="shakespeare", context_length=PROMPT + NEW, batch_size=16)
    )
    trainer.save_checkpoint(f"{folder}/base.ckpt")
    model.export(f"{folder}/gpt2")
    assert model.tokenizer is not None
    return model.tokenizer.state_dict()["characters"]


class Steps(L.Callback):
    """Seconds and mean reward of each step."""

    def __init__(self) -> None:
        self.at, self.rewards = [time.process_time()], list[float]()

    def on_train_batch_end(self, trainer, pl_module, *args) -> None:
        self.at.append(time.process_time())
        self.rewards.append(statistics.fmean(row["reward"] for row in pl_module.last_samples()))


def run_ravine(folder: str, beta: float, steps: int, seed: int) -> tuple[list[float], list[float]]:
    L.seed_everything(seed, verbose=False)
    policy = Reinforce(
        f"{folder}/base.ckpt",
        [CharacterFraction("eE", -1.0)],
        max_new_tokens=NEW,
        group_size=G,
        sampling=DecodingConfig(0.8),
        estimator=AdvantageEstimator("rloo", "group"),
        kl=KL(beta * NEW),
        reference="frozen_copy" if beta else "none",
    )
    watch, adam = Steps(), partial(torch.optim.AdamW, **ADAM)
    callbacks: list[Any] = [watch, OptimizerPlan(adam), GradientClipping(1.0)]
    trainer = L.Trainer(max_steps=steps, callbacks=callbacks, log_every_n_steps=1, **QUIET)
    trainer.fit(
        policy, PromptDataModule(source="shakespeare", prompt_length=PROMPT, batch_size=PROMPTS)
    )
    return [b - a for a, b in pairwise(watch.at[1:])], watch.rewards


def characters(known: str) -> Any:
    """Our character tokenizer as TRL wants it."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = {c: i for i, c in enumerate(known)}
    tokenizer = Tokenizer(models.WordLevel(names, unk_token=known[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=known[0],
                                   eos_token=known[3], padding_side="left")  # fmt: skip


def run_trl(
    folder: str, known: str, beta: float, steps: int, seed: int
) -> tuple[list[float], list[float]]:
    from datasets import Dataset
    from transformers import GPT2LMHeadModel, TrainerCallback
    from trl import RLOOConfig, RLOOTrainer

    L.seed_everything(seed, verbose=False)
    data = PromptDataModule(source="shakespeare", prompt_length=PROMPT, batch_size=PROMPTS)
    data.prepare_data()
    data.setup("fit")
    batches = iter(data.train_dataloader())
    texts = [text for _ in range(steps) for text in next(batches).texts]
    model = GPT2LMHeadModel.from_pretrained(f"{folder}/gpt2")
    model.generation_config.eos_token_id = None  # a text ends with its 64th character, as ours
    at, rewards = [], []

    def reward(completions: list[str], **_: Any) -> list[float]:
        found = [-sum(map(text.count, "eE")) / max(len(text), 1) for text in completions]
        rewards.append(statistics.fmean(found))
        return found

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            at.append(time.process_time())

    config = RLOOConfig(
        output_dir=f"{folder}/trl", per_device_train_batch_size=G * PROMPTS, num_generations=G,
        max_completion_length=NEW, temperature=0.8, top_k=0, beta=beta,
        learning_rate=ADAM["lr"], weight_decay=ADAM["weight_decay"], adam_beta1=ADAM["betas"][0],
        adam_beta2=ADAM["betas"][1], adam_epsilon=ADAM["eps"], disable_dropout=True,
        lr_scheduler_type="constant", optim="adamw_torch", max_grad_norm=1.0, max_steps=steps,
        num_iterations=1, use_cpu=True, bf16=False, gradient_checkpointing=False, seed=seed,
        logging_steps=1, report_to=[], save_strategy="no", disable_tqdm=True, shuffle_dataset=False,
    )  # fmt: skip
    trainer = RLOOTrainer(model=model, reward_funcs=reward, args=config,
                          train_dataset=Dataset.from_dict({"prompt": texts}),
                          processing_class=characters(known), callbacks=[Watch()])  # fmt: skip
    trainer.train()
    return [b - a for a, b in pairwise(at)], rewards


def speed(folder: str, known: str, beta: float) -> None:
    runs = {"ours": partial(run_ravine, folder), "trl": partial(run_trl, folder, known)}
    runs["ours again"] = runs["ours"]
    times: Times = {name: [] for name in runs}
    for number in range(ROUNDS):
        for name in random.Random(number).sample(list(runs), len(runs)):
            times[name] += runs[name](beta, WARM + STEPS, 0)[0][WARM - 1 :]
    what = f"an RLOO step, {PROMPTS} x {G} texts of {PROMPT} + {NEW} characters, beta {beta:g}"
    compare("against_trl", what, times, ["trl", "transformers"], seed=0)


def learn(folder: str, known: str, seed: int) -> None:
    for name, run in (("ours", run_ravine), ("trl", run_trl)):
        words = (folder, 0.0) if name == "ours" else (folder, known, 0.0)
        rewards = run(*words, 60, seed)[1]  # type: ignore[operator]
        row = {"what": "learn", "who": name, "seed": seed,
               "first10": round(statistics.fmean(rewards[:10]), 4),
               "last10": round(statistics.fmean(rewards[-10:]), 4)}  # fmt: skip
        append("against_trl", circumstances("reinforce/quick") | row)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    what = sys.argv[1:] or ["speed"]
    with tempfile.TemporaryDirectory() as place:
        alphabet = base(place)
        if what[0] == "speed":
            speed(place, alphabet, 0.0)
            speed(place, alphabet, 0.05)
        else:
            learn(place, alphabet, int(what[1]))
