"""Runs that are cut and resumed, over each pair of callbacks, task, loader, precision and strategy.

    python benchmarks/resume_cover.py [--seed 0] [--only 12] [--left] [--planted]

A case is one value of each axis. The cases are a pairwise cover: of any two axes each pair of
values stands in a case, but for the pairs of `EXCLUDED`. A case trains a whole run that writes a
file after each optimizer step. It resumes from a random file, and resumes again from a random file
of that run. It compares every tensor and number of the three last files bit for bit. A case that is
refused must be refused by a ValueError before its first step.

A row a case goes to rows/resume_cover.jsonl. `--planted` makes one callback after the other forget
its state and says whether the comparison sees it, as tests/benchmarks/test_resume_cover.py does.
"""

import argparse
import itertools
import json
import os
import random
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import numpy
import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, RandomSampler

sys.path.append(str(Path(__file__).parents[1] / "tests"))  # for `foreign` and `ranks`

from external_modules.net_in_configure_model import NetInConfigureModel
from external_modules.net_in_init import NetInInit
from external_modules.two_optimizers import TwoOptimizers

from ravine.callbacks import (
    EMA,
    ActivationCheckpointing,
    AdaGrad,
    Checkpoint,
    GradientClipping,
    Lion,
    LoRA,
    LRSchedule,
    MetricAlert,
    MetricPlot,
    Muon,
    NaNGuard,
    OptimizerPlan,
    Quantization,
    SignSGD,
    Throughput,
    UpdateMonitor,
)
from ravine.cli.trainer import Trainer
from ravine.datamodules import (
    ImageDataModule,
    InstructionDataModule,
    PromptDataModule,
    SpamDataModule,
    TextDataModule,
)
from ravine.lightning_modules import (
    CharacterFraction,
    Diffusion,
    ImageClassifier,
    LanguageModel,
    Reinforce,
    SpamClassifier,
)

STEPS, BATCHES = 6, 7  # optimizer steps of a run; micro-batches of an epoch, where it is limited
SHAPE = {
    "num_layers": 1,
    "d_model": 16,
    "num_heads": 2,
    "zero_init_residual": False,
    "dropout": 0.1,
}
BATCH = 12  # of one optimizer step: 1, 2 or 3 micro-batches on 1 or 2 ranks

adamw = partial(torch.optim.AdamW, lr=0.01)
CALLBACKS: dict[str, Callable[[], list[L.Callback]]] = {
    "none": list,
    "plan, clipping": lambda: [
        OptimizerPlan(adamw, schedule=LRSchedule("cosine", warmup=2)),
        GradientClipping(0.5, patience=2),
    ],
    "Muon, EMA": lambda: [Muon(schedule=LRSchedule("linear")), EMA(0.9)],
    "Lion, NaNGuard, Curves": lambda: [Lion(0.003), NaNGuard(), MetricPlot()],  # the same
    "AdaGrad, UpdateMonitor, Throughput": lambda: [AdaGrad(0.05), UpdateMonitor(), Throughput()],
    "SignSGD, Recompute, MetricAlert": lambda: [
        SignSGD(0.001),
        ActivationCheckpointing(),
        MetricAlert(min_fraction_of_first={"LOSS": 1.0}),  # in `fit`: the name that the task logs
    ],
    "LoRA, EMA": lambda: [LoRA(rank=1, dropout=0.1), EMA(0.9), OptimizerPlan(adamw)],
    "Quantization, LoRA": lambda: [
        Quantization("int8"),
        LoRA(rank=1),
        OptimizerPlan(partial(torch.optim.SGD, lr=0.01, momentum=0.9)),
    ],
}
TASKS = (
    "language",
    "answers",
    "spam",
    "diffusion",
    "classifier",
    "reinforce",
    "NetInInit",
    "NetInConfigureModel",
    "TwoOptimizers",
)
LOADERS = (
    "own",
    "random",
    "two workers, numpy",
    "batch_sampler, torch",
    "persistent workers",
    "iterable",
    "overfit_batches",
)
AXES: dict[str, tuple[Any, ...]] = {
    "callbacks": tuple(CALLBACKS),
    "task": TASKS,
    "loader": LOADERS,
    "precision": ("32-true", "bf16-mixed", "64-true"),
    "accumulate": (1, 2, 3),
    "strategy": ("one process", "ddp", "zero1", "zero2", "zero3"),
}
BY_HAND = "TwoOptimizers"  # steps its own optimizers
EXCLUDED: set[tuple[Any, Any]] = {  # no run, and the refusal has a test elsewhere
    *((BY_HAND, name) for name in CALLBACKS if name != "none"),
    *((BY_HAND, number) for number in (2, 3)),
    (BY_HAND, "zero2"),
    (BY_HAND, "zero1"),
}
Case = dict[str, Any]


def drawn_by(how: str) -> int:
    """A number below a thousand from one of the three default generators."""
    if how == "numpy":
        return int(numpy.random.randint(1000))
    return int(torch.randint(1000, ())) if how == "torch" else random.randrange(1000)


class Drawn(Dataset):
    """Whole batches of a task; each read draws which batch an index gives."""

    def __init__(self, batches: list[Any], how: str) -> None:
        self.batches, self.how = batches, how

    def __len__(self) -> int:
        return BATCHES

    def __getitem__(self, index: int) -> Any:
        return self.batches[(index + drawn_by(self.how)) % len(self.batches)]


class Stream(IterableDataset):
    """The same without an index."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        begin = drawn_by("numpy")
        for number in range(BATCHES):
            yield self.batches[(begin + number + drawn_by("random")) % len(self.batches)]


def only(batch: list[Any]) -> Any:
    """The batch that is the only sample of a batch."""
    return batch[0]


def loader_of(kind: str, batches: list[Any]) -> DataLoader:
    """A plain torch DataLoader."""
    # a rank is a child of a server of forks, and its own children would each import everything
    kept = {
        "num_workers": 2,
        "batch_size": None,
        "shuffle": True,
        "multiprocessing_context": "fork",
    }
    match kind:
        case "random":
            return DataLoader(Drawn(batches, "random"), None, shuffle=True)
        case "two workers, numpy":
            return DataLoader(Drawn(batches, "numpy"), **kept)
        case "persistent workers":
            return DataLoader(Drawn(batches, "torch"), persistent_workers=True, **kept)
        case "iterable":
            return DataLoader(Stream(batches), None)
    data = Drawn(batches, "torch")
    sampler = BatchSampler(RandomSampler(data), 1, drop_last=False)
    return DataLoader(data, batch_sampler=sampler, collate_fn=only)


class Data(L.LightningDataModule):
    """The data of a task through a loader of another kind."""

    def __init__(self, inner: Any, kind: str) -> None:
        super().__init__()
        self.inner, self.kind = inner, kind

    def setup(self, stage: str) -> None:
        if isinstance(self.inner, L.LightningDataModule):
            self.inner.trainer = self.trainer
            self.inner.prepare_data()
            self.inner.setup(stage)

    def train_dataloader(self) -> Any:
        own = self.inner.train_dataloader()
        if self.kind in ("own", "overfit_batches"):
            return own
        return loader_of(self.kind, list(itertools.islice(own, 5)))

    def val_dataloader(self) -> Any:
        return self.inner.val_dataloader()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "inner" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.__dict__["inner"], name)


def built(task: str, folder: Path) -> tuple[L.LightningModule, Any]:
    """A small module of a task and what it learns from."""
    text = partial(TextDataModule, source="embedded", batch_size=BATCH)
    match task:
        case "language":
            return LanguageModel(**SHAPE), text(context_length=16)
        case "answers":
            data = InstructionDataModule(
                folder / "answers.jsonl", tokenizer="bytes", batch_size=BATCH
            )
            return LanguageModel(**SHAPE | {"dropout": 0.0}), data
        case "spam":
            return SpamClassifier(num_buckets=64, hidden_size=4), SpamDataModule(None, "embedded")
        case "diffusion":
            module = Diffusion(
                base_channels=8, time_embed_dim=16, class_conditional=True, num_steps=2
            )
            return module, ImageDataModule("digits", batch_size=BATCH)
        case "classifier":
            return ImageClassifier(num_features=8, max_shift=1), ImageDataModule(
                "digits", batch_size=BATCH
            )
        case "reinforce":
            rewards = [CharacterFraction("e")]
            prompts = PromptDataModule(
                None, "embedded", prompt_length=6, batch_size=BATCH, num_val_prompts=4
            )
            return Reinforce(str(folder / "base.ckpt"), rewards, max_new_tokens=4), prompts
    module = {"NetInInit": NetInInit, "NetInConfigureModel": NetInConfigureModel}.get(task)
    module = (module or TwoOptimizers)(batch_size=4)
    return module, module


def prepare(folder: Path) -> None:
    """The base that Reinforce starts from, and answers of unequal lengths."""
    L.seed_everything(1, verbose=False)
    module, data = built("language", folder)
    module.net_kwargs["dropout"] = 0.0
    trainer = Trainer(
        max_steps=1,
        limit_val_batches=0,
        logger=False,
        precision="32-true",
        default_root_dir=folder / "runs",
        **QUIET,
    )
    trainer.fit(module, data)
    trainer.save_checkpoint(folder / "base.ckpt")
    rows = [f'{{"prompt": "q{i}? ", "answer": "{"a" * (i % 7 + 1)}"}}' for i in range(60)]
    (folder / "answers.jsonl").write_text("\n".join(rows))


QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "enable_checkpointing": False,
    "enable_progress_bar": False,
}


def fit(case: Case, folder: Path, name: str, ckpt: Path | None = None) -> Path:
    """One run, a file after each optimizer step; the last file."""
    L.seed_everything(5, verbose=False)
    module, source = built(case["task"], folder)
    if isinstance(source, SpamDataModule):
        source.batch_size = BATCH
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    limit = {"limit_train_batches": BATCHES, "limit_val_batches": 1}
    if case["loader"] == "overfit_batches":
        limit = {"overfit_batches": 2}
    keep = Checkpoint(str(folder / name), every_n_train_steps=1, save_top_k=-1)
    by_hand = case["task"] == BY_HAND
    steps = 2 * STEPS if by_hand else STEPS
    callbacks = CALLBACKS[case["callbacks"]]()
    loss = {"reinforce": "train/policy_loss"}.get(case["task"], "train/loss")
    loss = "train_loss" if case["task"].startswith("Net") else loss
    for each in callbacks:
        if isinstance(each, MetricAlert):
            each.min_fraction_of_first, each.requested = {loss: 1.0}, {loss}
        if isinstance(each, MetricPlot):
            each.metrics = [loss]
    strategy = {"one process": "auto"}.get(case["strategy"], case["strategy"])
    if by_hand and strategy == "ddp":
        strategy = "ddp_find_unused_parameters_true"  # a step by hand has half of the parameters
    trainer = Trainer(
        max_steps=steps,
        precision=case["precision"],
        devices=ranks,
        strategy=strategy,
        accumulate_grad_batches=case["accumulate"],
        val_check_interval=2 * case["accumulate"],
        check_val_every_n_epoch=None,
        callbacks=[*callbacks, keep],
        logger=False,
        log_every_n_steps=2,  # so that a cut can fall between two log lines
        **limit,
        **QUIET | {"enable_checkpointing": True, "default_root_dir": str(folder / "runs")},
    )
    trainer.fit(module, datamodule=Data(source, case["loader"]), ckpt_path=ckpt)
    return folder / name / f"step={steps:06d}.ckpt"


SECONDS = ("second", "_duration_s", "time/", "_time", "throughput")  # measured: never the same


def content(path: Path) -> dict[str, Any]:
    """The content of a checkpoint without paths and measured seconds, for comparison."""
    if path.is_dir():
        from ravine.strategies.checkpoint.sharded import load_full

        file: dict[str, Any] = load_full(path)
    else:
        file = torch.load(path, weights_only=True)
    file.pop("ravine", None)
    file["callbacks"] = {k: v for k, v in file["callbacks"].items() if "Checkpoint" not in k}
    return file


def differences(one: Any, other: Any, at: str = "") -> list[str]:
    """Where they differ by a bit."""
    if any(word in at for word in SECONDS) or at.endswith("/s"):
        return []
    if isinstance(one, torch.Tensor):
        same = isinstance(other, torch.Tensor) and one.dtype == other.dtype
        same = same and one.shape == other.shape
        return [] if same and torch.equal(one.nan_to_num(7), other.nan_to_num(7)) else [at]
    if isinstance(one, dict):
        if {*map(str, one)} != {*map(str, other)}:
            return [f"{at}: {sorted({*map(str, one)} ^ {*map(str, other)})[:4]}"]
        return [d for key in one for d in differences(one[key], other[key], f"{at}/{key}")]
    if isinstance(one, list | tuple):
        if len(one) != len(other):
            return [f"{at}: {len(one)} and {len(other)} entries"]
        pairs = enumerate(zip(one, other, strict=True))
        return [d for i, (a, b) in pairs for d in differences(a, b, f"{at}/{i}")]
    return [] if one == other or (one != one and other != other) else [f"{at}: {one}, {other}"]


def cut_twice(case: Case, folder: str, key: str = "") -> dict[str, Any]:
    """Compare a run, a run resumed from a random file of it, and one resumed from the second."""
    warnings.filterwarnings("ignore")
    place = Path(folder)
    draw = random.Random(f"{key}{case}")
    by_hand = case["task"] == BY_HAND  # two optimizer steps a batch
    last = 2 * STEPS if by_hand else STEPS
    steps = range(2, last, 2) if by_hand else range(1, last)
    first = draw.choice(list(steps[:-1]))
    second = draw.choice([step for step in steps if step > first])
    name = f"{abs(hash(str(case)))}"
    try:
        whole = fit(case, place, f"{name}-whole")
    except (ValueError, L.pytorch.utilities.exceptions.MisconfigurationException) as error:
        return {"outcome": "refused", "said": str(error).splitlines()[0][:300]}
    cut = fit(case, place, f"{name}-cut", whole.with_name(f"step={first:06d}.ckpt"))
    again = fit(case, place, f"{name}-again", cut.with_name(f"step={second:06d}.ckpt"))
    expected = content(whole)
    found = [f"cut at {first}: {d}" for d in differences(expected, content(cut))]
    found += [f"again at {second}: {d}" for d in differences(expected, content(again))]
    return {"outcome": "different" if found else "bitwise", "cuts": [first, second], "said": found}


def in_ranks(case: Case, folder: str, key: str = "") -> dict[str, Any]:
    """`cut_twice` in as many processes as the strategy needs."""
    if case["strategy"] == "one process":
        return cut_twice(case, folder, key)
    from ranks import run_ranks

    return run_ranks(cut_twice, 2, case, folder, key, timeout=240)[0]


def allowed(case: Case) -> bool:
    """Whether no two of its values exclude each other."""
    values = list(case.values())
    return not any((a, b) in EXCLUDED or (b, a) in EXCLUDED for a in values for b in values)


def pairs(case: Case) -> set[Any]:
    """The pairs of values that a case covers."""
    return set(itertools.combinations(sorted(case.items()), 2))


def cover(seed: int = 0) -> list[Case]:
    """Cases in which each pair of values of two axes stands, found greedily."""
    draw = random.Random(seed)
    missing = {
        pair
        for a, b in itertools.combinations(sorted(AXES), 2)
        for pair in (((a, x), (b, y)) for x in AXES[a] for y in AXES[b])
        if allowed(dict(pair))
    }
    cases: list[Case] = []
    while missing:
        begin = dict(draw.choice(sorted(missing, key=str)))
        tried = []
        while len(tried) < 60:
            case = {axis: begin.get(axis) or draw.choice(AXES[axis]) for axis in AXES}
            if allowed(case):
                tried.append(case)
        best = max(tried, key=lambda case: len(pairs(case) & missing))
        cases.append(best)
        missing -= pairs(best)
    return cases


def forgets(kind: Any, *names: str) -> Callable[[], Any]:
    """A context in which a callback's methods that bring its state back do nothing."""

    @contextmanager
    def planted() -> Iterator[None]:
        before = {name: getattr(kind, name) for name in names}
        for name in names:
            setattr(kind, name, lambda *args, **kwargs: None)
        try:
            yield
        finally:
            for name, method in before.items():
                setattr(kind, name, method)

    return planted


@contextmanager
def nan_guard_forgets() -> Iterator[None]:
    """NaNGuard loses its count, in a run of NetInInit whose first gradient is not finite."""

    def spoil(module: L.LightningModule) -> None:
        if module.trainer.global_step == 0:
            for parameter in module.parameters():
                parameter.grad = torch.full_like(parameter, float("nan"))

    NetInInit.on_after_backward = spoil
    try:
        with forgets(NaNGuard, "load_state_dict")():
            yield
    finally:
        del NetInInit.on_after_backward


def planted_faults() -> dict[str, tuple[str, Callable[[], Any]]]:
    """By callback: the value of the axis that contains it, and the planted loss of its state."""
    from ravine.callbacks import ExactResume
    from ravine.callbacks.checkpointing.batch_seeds import BatchSeeder
    from ravine.callbacks.optimizers.composite import CompositeOptimizer

    return {
        "EMA": ("Muon, EMA", forgets(EMA, "on_load_checkpoint")),
        "NaNGuard": ("Lion, NaNGuard, Curves", nan_guard_forgets),
        "Curves": ("Lion, NaNGuard, Curves", forgets(MetricPlot, "load_state_dict")),
        "MetricAlert": (
            "SignSGD, Recompute, MetricAlert",
            forgets(MetricAlert, "load_state_dict"),
        ),
        "ExactResume": ("none", forgets(ExactResume, "on_load_checkpoint")),
        "batch seeds": ("none", forgets(BatchSeeder, "set_epoch")),
        "OptimizerPlan": ("plan, clipping", forgets(CompositeOptimizer, "load_state_dict")),
    }


def known() -> list[dict[str, Any]]:
    """The rows that are stored."""
    path = Path(__file__).with_name("rows") / "resume_cover.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def main() -> None:
    from record import append, machine

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int)
    parser.add_argument("--left", action="store_true", help="cases that have no good row yet")
    parser.add_argument("--planted", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder))
        cases = cover(given.seed)[: given.only]
        if given.planted:
            for name, (callbacks, planted) in planted_faults().items():
                case = {axis: values[0] for axis, values in AXES.items()} | {"task": "NetInInit"}
                with planted():
                    said = cut_twice(case | {"callbacks": callbacks, "loader": "random"}, folder)
                print(name, said["outcome"], said["said"][:2], flush=True)
            return
        if given.left:
            good = {
                tuple(str(row[axis]) for axis in AXES)
                for row in known()
                if row["outcome"] in ("bitwise", "refused") and row["seed"] == given.seed
            }
            cases = [case for case in cases if tuple(str(case[axis]) for axis in AXES) not in good]
        for number, case in enumerate(cases, 1):
            start_s = time.process_time()
            try:
                result = in_ranks(case, folder)
            except Exception as error:
                result = {"outcome": "error", "said": f"{type(error).__name__}: {error}"[:600]}
            seconds = round(time.process_time() - start_s, 2)
            row = {**case, **result, "seed": given.seed, "processor_seconds": seconds}
            append("resume_cover", row | machine())
            print(f"{number}/{len(cases)}", *case.values(), result["outcome"], sep=" | ", end=" ")
            print(result["said"] if result["outcome"] != "bitwise" else "", flush=True)


if __name__ == "__main__":
    main()
