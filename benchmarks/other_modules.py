"""Modules of others under each callback, on one process: what works, and what is refused.

python benchmarks/other_modules.py           appends a row a combination to rows/other_modules.jsonl
python benchmarks/other_modules.py --count   counts the verdicts of the newest rows
python benchmarks/other_modules.py --strategies   on two ranks: rows/other_modules_layouts.jsonl

23 modules: 15 as tutorials write them (tests/external_modules/common_idioms.py), 8 of packages,
which are installed with `pip install --no-deps` from `PACKAGES` (and toolz, pandas, seaborn, timm).

`works` means that the run ends and the equivalence that applies holds, none of them by a tolerance
above 1e-6: a plan trains as plain Lightning with its optimizer, clipping as Lightning's own,
watching callbacks change no weight, EMA is the average written out, ExactResume continues bitwise,
adapters leave the frozen weights as they were and move. `refused` is one line of an error raised in
this package; `traceback` is any other error, `wrong` a broken equivalence.
"""

import argparse
import contextlib
import io
import json
import logging
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from record import ROWS, append, machine
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import SGD
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset, Subset

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from external_modules.common_idioms import IDIOMS, Idiom, features, images, labelled

from ravine import callbacks as ravine_callbacks
from ravine.callbacks.transforms.layer_selection import find_frozen_copies, is_submodule_of

PACKAGES = {
    "gluonts": "0.17.0", "mlcolvar": "1.3.1", "torch_uncertainty": "0.13.0", "lightly": "1.6.0",
}  # fmt: skip
STEPS, CUT, NEAR = 6, 3, 1e-6
SOURCES = Path(ravine_callbacks.__file__).parents[1]
State = dict[str, Tensor]


class Rows(Dataset):
    """Samples that are dictionaries."""

    def __init__(self, **columns: Tensor) -> None:
        self.columns = columns

    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: column[index] for name, column in self.columns.items()}


def series(module: L.LightningModule) -> Dataset:
    """Random series of the shapes that a gluonts module asks for."""
    g = torch.Generator().manual_seed(0)
    columns = {}
    for name, spec in cast(Any, module).inputs.items():
        if spec.dtype == torch.long:
            columns[name] = torch.zeros(32, *spec.shape[1:], dtype=torch.long)
        else:
            columns[name] = torch.rand(32, *spec.shape[1:], generator=g)
    if "past_observed_values" in columns:
        columns["past_observed_values"].fill_(1.0)
    columns["future_target"] = torch.rand(32, 4, generator=g)
    columns["future_observed_values"] = torch.ones(32, 4)
    return Rows(**columns)


def of_gluonts() -> dict[str, Callable[[], L.LightningModule]]:
    from gluonts.torch.model.deepar.lightning_module import DeepARLightningModule
    from gluonts.torch.model.patch_tst.lightning_module import PatchTSTLightningModule
    from gluonts.torch.model.simple_feedforward.lightning_module import (
        SimpleFeedForwardLightningModule,
    )

    size: dict[str, Any] = {"prediction_length": 4, "context_length": 8}
    patches = {
        "patch_len": 4, "stride": 2, "padding_patch": "end", "d_model": 16, "nhead": 2,
        "dim_feedforward": 32, "num_feat_dynamic_real": 0, "dropout": 0.1, "activation": "relu",
        "norm_first": False, "num_encoder_layers": 2, "scaling": "mean",
    }  # fmt: skip
    deep = {"freq": "D", "hidden_size": 12, "lags_seq": [1, 2]}
    return {
        "gluonts.SimpleFeedForward": lambda: SimpleFeedForwardLightningModule(
            {**size, "hidden_dimensions": [16, 16]}
        ),
        "gluonts.DeepAR": lambda: DeepARLightningModule({**size, **deep}),
        "gluonts.PatchTST": lambda: PatchTSTLightningModule({**size, **patches}),
    }


def of_mlcolvar() -> dict[str, Callable[[], L.LightningModule]]:
    from mlcolvar.cvs import AutoEncoderCV, DeepTDA, RegressionCV

    plain: dict[str, Any] = {
        "norm_in": False
    }  # a norm asks the package's own loader for statistics
    return {
        "mlcolvar.Regression": lambda: RegressionCV([8, 16, 16, 1], options=dict(plain)),
        "mlcolvar.AutoEncoder": lambda: AutoEncoderCV([8, 16, 2], options=dict(plain)),
        "mlcolvar.DeepTDA": lambda: DeepTDA(
            2, 1, [-5.0, 5.0], [0.2, 0.2], [8, 16, 1], options=dict(plain)
        ),
    }


def of_torch_uncertainty() -> dict[str, Callable[[], L.LightningModule]]:
    from torch_uncertainty.routines import ClassificationRoutine

    def make() -> L.LightningModule:
        net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
        adam = torch.optim.Adam(net.parameters(), lr=0.01)
        return ClassificationRoutine(net, 2, nn.CrossEntropyLoss(), optim_recipe=adam)

    return {"torch_uncertainty.ClassificationRoutine": make}


def of_lightly() -> dict[str, Callable[[], L.LightningModule]]:
    import copy

    from lightly.loss import NegativeCosineSimilarity
    from lightly.models.modules import BYOLPredictionHead, BYOLProjectionHead
    from lightly.models.utils import deactivate_requires_grad, update_momentum

    class BYOL(Idiom):
        """As in lightly's tutorial."""

        samples = staticmethod(images)

        def __init__(self) -> None:
            super().__init__()
            self.backbone = nn.Sequential(
                nn.Conv2d(1, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten()
            )
            self.projection_head = BYOLProjectionHead(72, 16, 8)
            self.prediction_head = BYOLPredictionHead(8, 16, 8)
            self.backbone_momentum = copy.deepcopy(self.backbone)
            self.projection_head_momentum = copy.deepcopy(self.projection_head)
            deactivate_requires_grad(self.backbone_momentum)
            deactivate_requires_grad(self.projection_head_momentum)
            self.criterion = NegativeCosineSimilarity()

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            update_momentum(self.backbone, self.backbone_momentum, m=0.9)
            update_momentum(self.projection_head, self.projection_head_momentum, m=0.9)
            x = batch[0]
            answer = self.prediction_head(self.projection_head(self.backbone(x)))
            with torch.no_grad():
                target = self.projection_head_momentum(self.backbone_momentum(x.flip(-1)))
            loss = self.criterion(answer, target)
            self.log("train_loss", loss)
            return loss

    return {"lightly.BYOL": BYOL}


def samples(module: L.LightningModule) -> Dataset:
    """What a module trains on."""
    if hasattr(module, "last_samples"):
        return cast(Any, module).samples()
    kind = type(module).__module__.partition(".")[0]
    if kind == "gluonts":
        return series(module)
    if kind == "mlcolvar":
        x, y = features(), (torch.arange(32) % 2).float()  # each batch has both states
        return Rows(
            data=x, labels=y, target=features() if "Auto" in type(module).__name__ else y[:, None]
        )
    return labelled()


def states(module: nn.Module) -> State:
    """Copies of all weights and buffers, but for those of metrics."""
    return {k: v.detach().clone() for k, v in module.state_dict().items()}


class Keep(L.Callback):
    """The weights after each step."""

    def __init__(self) -> None:
        self.path: list[tuple[int, State]] = []
        self.start: State = {}
        self.last = -1

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.start = {n: p.detach().clone() for n, p in pl_module.named_parameters()}

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if trainer.global_step != self.last:
            self.last = trainer.global_step
            now = {n: p.detach().clone() for n, p in pl_module.named_parameters()}
            self.path.append((trainer.global_step, now))


Run = tuple[State, Keep, L.LightningModule]


class Loader(L.LightningDataModule):
    """Batches of eight over all ranks, in their order."""

    def __init__(self, rows: Dataset, ranks: int = 1) -> None:
        super().__init__()
        self.rows, self.ranks = rows, ranks

    def train_dataloader(self) -> DataLoader:
        if self.ranks == 1:
            return DataLoader(self.rows, batch_size=8)
        assert self.trainer is not None
        own, each = self.trainer.global_rank, 8 // self.ranks
        local_rows = [i for i in range(32) if i % 8 // each == own]  # of each batch of eight
        return DataLoader(Subset(self.rows, local_rows), batch_size=each)


def save_at(file: Path, module: L.LightningModule) -> None:
    """Save once at step `CUT`, after all hooks of the batch, the module's own among them."""
    own = module.on_train_batch_end

    def on_train_batch_end(*args: Any) -> None:
        own(*args)
        if module.trainer.global_step >= CUT and not file.exists():
            module.trainer.save_checkpoint(file)

    module.on_train_batch_end = on_train_batch_end  # type: ignore[method-assign]


def fit(
    make: Callable[[], L.LightningModule],
    *callbacks: L.Callback,
    change: Callable[[L.LightningModule], None] | None = None,
    file: Path | None = None,
    resume: Path | None = None,
    **how: Any,
) -> Run:
    """A run of six optimizer steps."""
    L.seed_everything(0, verbose=False)
    module = make()
    if change is not None:
        change(module)
    keep = Keep()
    if file is not None:
        save_at(file, module)
    with tempfile.TemporaryDirectory() as folder:
        trainer = L.Trainer(
            max_steps=STEPS if module.automatic_optimization else 2 * STEPS,  # two optimizers
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
            log_every_n_steps=1,
            use_distributed_sampler=False,
            callbacks=[*callbacks, keep],
            **how,
        )  # fmt: skip
        data = Loader(samples(module), how.get("devices", 1))  # mlcolvar's norms ask the datamodule
        trainer.fit(
            module, datamodule=data, ckpt_path=resume, weights_only=True if resume else None
        )
    return states(module), keep, module


def apart(a: State, b: State) -> float:
    """The largest difference of two states with the same names."""
    if a.keys() != b.keys():
        return float("inf")
    return max(
        ((a[n].double() - b[n].double()).abs().max().item() for n in a if a[n].numel()), default=0.0
    )


def with_optimizer(factory: Any) -> Callable[[L.LightningModule], None]:
    """Plain Lightning with this optimizer and a constant schedule."""

    def change(module: L.LightningModule) -> None:
        def configure_optimizers() -> Any:
            made = factory([p for p in module.parameters() if p.requires_grad])
            return [made], [LambdaLR(made, lambda _: 1.0)]

        module.configure_optimizers = configure_optimizers  # type: ignore[method-assign]

    return change


ADAM = partial(torch.optim.Adam, lr=0.01)
MOMENTUM = partial(SGD, lr=0.05, momentum=0.9)


def plan(make: Any, factory: Any) -> str:
    found = fit(make, ravine_callbacks.OptimizerPlan(factory, decay="all"))[0]
    off = apart(found, fit(make, change=with_optimizer(factory))[0])
    return "" if off == 0 else f"plain Lightning with the same optimizer is {off:.2g} away"


def moves(make: Any, *callbacks: L.Callback) -> str:
    keep = fit(make, *callbacks)[1]
    end = keep.path[-1][1]
    if not all(p.isfinite().all() for p in end.values()):
        return "weights are not finite"
    return "" if apart(keep.start, end) > 0 else "no weight has moved"


def clipping(make: Any) -> str:
    # SGD: Adam divides by the size of a gradient that is rounding alone, as before a BatchNorm
    change = with_optimizer(MOMENTUM)
    found = fit(make, ravine_callbacks.GradientClipping(max_norm=0.1), change=change)[0]
    off = apart(found, fit(make, gradient_clip_val=0.1, change=change)[0])
    return "" if off <= NEAR else f"Lightning's own clipping is {off:.2g} away"


def average(make: Any) -> str:
    found, keep, module = fit(make, ravine_callbacks.EMA(0.9))
    names = {n for n, p in module.named_parameters() if p.requires_grad and p.is_floating_point()}
    expected = dict(keep.start)
    for step, weights in keep.path:
        d = min(0.9, (1 + step) / (10 + step))
        expected = {n: torch.lerp(expected[n], weights[n], 1 - d) for n in names}
    off = apart({n: found[n] for n in names}, expected)
    return "" if off <= NEAR else f"the average by hand is {off:.2g} away"


def changes_nothing(make: Any, callback: L.Callback, near: float = 0.0) -> str:
    off = apart(fit(make, callback)[0], fit(make)[0])
    return "" if off <= near else f"weights are {off:.2g} from those without it"


def frozen(make: Any, *callbacks: L.Callback, adapters: bool = True) -> str:
    keep, module = fit(make, *callbacks)[1:]
    moved = {n for n, p in keep.path[-1][1].items() if not p.equal(keep.start[n])}
    free = {n for n, p in module.named_parameters() if p.requires_grad}
    copies = find_frozen_copies(make())
    changed_names = [n for n in moved - free if not any(is_submodule_of(n, c) for c in copies)]
    if changed_names:
        return f"{changed_names[0]} is frozen and has moved"
    if adapters and not any("lora_b" in n for n in moved):
        return "no adapter has moved"
    return "" if moved else "no weight has moved"


def resumes(make: Any, *callbacks: Callable[[], L.Callback]) -> str:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "cut.ckpt")
        straight = fit(make, *(each() for each in callbacks), file=file)[0]
        resumed = fit(make, *(each() for each in callbacks), resume=file)[0]
    off = apart(straight, resumed)
    return "" if off == 0 else f"the resumed run is {off:.2g} away"


MANY = (
    partial(ravine_callbacks.OptimizerPlan, ADAM),
    ravine_callbacks.GradientClipping,
    partial(ravine_callbacks.EMA, 0.9),
    ravine_callbacks.NaNGuard,
    ravine_callbacks.ExactResume,
    ravine_callbacks.Throughput,
    ravine_callbacks.UpdateMonitor,
)
CASES: dict[str, Callable[[Any], str]] = {
    "OptimizerPlan": lambda m: plan(m, ADAM),
    "OptimizerPlan SGD": lambda m: plan(m, MOMENTUM),
    "Muon": lambda m: moves(m, ravine_callbacks.Muon()),
    "GradientClipping": clipping,
    "EMA": average,
    "NaNGuard": lambda m: changes_nothing(m, ravine_callbacks.NaNGuard()),
    "LoRA": lambda m: frozen(m, ravine_callbacks.LoRA()),
    "Quantization, LoRA": lambda m: frozen(
        m, ravine_callbacks.Quantization(), ravine_callbacks.LoRA()
    ),
    "Quantization": lambda m: frozen(m, ravine_callbacks.Quantization(), adapters=False),
    "Recompute": lambda m: changes_nothing(m, ravine_callbacks.ActivationCheckpointing()),
    "Compile aot_eager": lambda m: changes_nothing(
        m, ravine_callbacks.Compile(backend="aot_eager"), 1e-5
    ),
    "ExactResume": lambda m: resumes(m, ravine_callbacks.ExactResume),
    "Throughput": lambda m: changes_nothing(m, ravine_callbacks.Throughput()),
    "Curves": lambda m: changes_nothing(m, ravine_callbacks.MetricPlot()),
    "UpdateMonitor": lambda m: changes_nothing(m, ravine_callbacks.UpdateMonitor()),
    "many together": lambda m: resumes(m, *MANY),
}


LAYOUTS = ("ddp", "zero2", "zero3")
WITH_CALLBACKS = ("Autoencoder", "TransformerClassifier", "Tied", "Teacher")
TOGETHER: dict[str, Callable[[], list[L.Callback]]] = {
    "": list,
    "OptimizerPlan": lambda: [ravine_callbacks.OptimizerPlan(ADAM, decay="all")],
    "OptimizerPlan SGD": lambda: [ravine_callbacks.OptimizerPlan(MOMENTUM, decay="all")],
    "Muon": lambda: [ravine_callbacks.Muon()],
    "GradientClipping": lambda: [ravine_callbacks.GradientClipping(max_norm=0.1)],
    "EMA": lambda: [ravine_callbacks.EMA(0.9)],
    "NaNGuard": lambda: [ravine_callbacks.NaNGuard()],
    "LoRA": lambda: [ravine_callbacks.LoRA(rank=1)],
    "Quantization": lambda: [ravine_callbacks.Quantization()],
    "Recompute": lambda: [ravine_callbacks.ActivationCheckpointing()],
    "ExactResume": lambda: [ravine_callbacks.ExactResume()],
    "Throughput": lambda: [ravine_callbacks.Throughput()],
    "UpdateMonitor": lambda: [ravine_callbacks.UpdateMonitor()],
    "many together": lambda: [make() for make in MANY],
}


LIGHTNINGS = {  # its own refusals, in one line, on every layout
    "RuntimeError: Skipping the `training_step` by returning None in distributed training is not "
    "supported. It is recommended that you rewrite your training logic to avoid having to skip the "
    "step in the first place. (automatic.py:323)"
}


def near_ddp(callbacks: str) -> float:
    """How near to ddp weights must be.

    A clipped gradient is rounded otherwise where the norm is summed in another order; Adam divides
    such a difference by the size of the gradient, which is tiny for some weights.
    """
    return 5e-4 if callbacks in ("GradientClipping", "many together") else 1e-6


def made_of(name: str) -> Callable[[], L.LightningModule]:
    """The module of a name."""
    return everything()[name]


def everything() -> dict[str, Callable[[], L.LightningModule]]:
    """All modules by name, those of packages where they are installed."""
    modules: dict[str, Callable[[], L.LightningModule]] = {kind.__name__: kind for kind in IDIOMS}
    for package in (of_gluonts, of_mlcolvar, of_torch_uncertainty, of_lightly):
        try:
            modules |= package()
        except ImportError as error:
            print(f"{package.__name__}: {error}; pip install --no-deps {PACKAGES}", file=sys.stderr)
    return modules


def gathered(module: nn.Module) -> State:
    """All parameters, whole."""
    whole = {}
    for name, p in module.named_parameters():
        whole[name] = (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
    return whole


def attempt(name: str, callbacks: str, **how: Any) -> tuple[str, str, State]:
    """Verdict, reason and weights of one run."""
    weights: State = {}

    def run(make: Any) -> str:
        module = fit(make, *TOGETHER[callbacks](), **how)[2]
        weights.update(gathered(module))
        return ""

    with contextlib.redirect_stdout(io.StringIO()):
        verdict, reason = run_case(run, made_of(name))
    return verdict, reason, weights


def on_ranks(name: str, callbacks: list[str]) -> list[tuple[str, str, str, str, State]]:
    """In each of two ranks: the runs of one module on every layout."""
    warnings.simplefilter("ignore")
    by_hand = not made_of(name)().automatic_optimization
    names = {"ddp": "ddp_find_unused_parameters_true"} if by_hand else {}
    return [
        (layout, each, *attempt(name, each, strategy=names.get(layout, layout), devices=2))
        for each in callbacks
        for layout in LAYOUTS
    ]


def layouts(only: str | None) -> None:
    """Each module on every layout, against one process and against ddp."""
    from ranks import run_ranks

    circumstances = machine()
    counts: Counter[str] = Counter()
    for name in everything():
        if only and only not in name:
            continue
        chosen = list(TOGETHER) if name in WITH_CALLBACKS else [""]
        expected = {each: attempt(name, each, devices=1) for each in chosen}
        noise = any(isinstance(m, _BatchNorm) for m in made_of(name)().modules())
        by_ddp: dict[str, State] = {}
        try:
            found = run_ranks(on_ranks, 2, name, chosen, timeout=60 * len(chosen))
        except AssertionError as error:
            print(f"{name}: {str(error)[-2000:]}")
            continue
        for one, two in zip(*found, strict=True):
            layout, each, verdict, reason, weights = one
            single = expected[each]
            if layout == "ddp":
                by_ddp[each] = weights
            off = apart(weights, single[2]) if weights and single[2] else float("nan")
            off_ddp = apart(weights, by_ddp[each]) if weights and by_ddp[each] else float("nan")
            if verdict == "works" and (two[2] != "works" or apart(weights, two[4]) > 0):
                verdict, reason = "wrong", "the ranks differ"
            elif verdict == "works" and not (off <= 1e-5 or off_ddp <= near_ddp(each)):
                verdict, reason = "wrong", f"{off:.2g} from one process, {off_ddp:.2g} from ddp"
            elif verdict == "works" and layout == "ddp" and off > 1e-5:
                reason = f"ddp is {off:.2g} from one process: statistics or random numbers by rank"
            elif verdict == "traceback" and reason in LIGHTNINGS:
                verdict = "refused"
            elif verdict == "traceback" and single[0] != "works":
                verdict = "as one process"
            row = {
                "module": name, "callback": each, "layout": layout, "verdict": verdict,
                "reason": reason, "from_one_process": off, "from_ddp": off_ddp, "batch_norm": noise,
            }  # fmt: skip
            counts[verdict] += 1
            append("other_modules_layouts", row | circumstances)
    print(counts, "of", counts.total())


def run_case(case: Callable[[Any], str], make: Any) -> tuple[str, str]:
    """Verdict and reason of a combination."""
    torch._dynamo.reset()
    try:
        wrong = case(make)
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        text = str(error).strip()
        where = Path(frame.filename)
        own = where.is_relative_to(SOURCES) and "tests" not in where.parts
        own = own and not {"benchmarks", "site-packages"} & set(where.parts)
        if own and "\n" not in text:
            return "refused", text
        return "traceback", f"{type(error).__name__}: {text[:300]} ({where.name}:{frame.lineno})"
    return ("wrong", wrong) if wrong else ("works", "")


def count() -> None:
    """Print how many of each verdict there are, of the newest row of each combination."""
    rows = [json.loads(line) for line in (ROWS / "other_modules.jsonl").read_text().splitlines()]
    newest = {(row["module"], row["callback"]): row for row in rows}
    print(Counter(row["verdict"] for row in newest.values()), "of", len(newest))
    for (module, callback), row in newest.items():
        if row["verdict"] not in ("works",):
            print(f"{row['verdict']:9} {module} x {callback}: {row['reason'][:150]}")


def main() -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", action="store_true", help="count the verdicts of the rows")
    parser.add_argument("--module", help="only modules whose name contains this")
    parser.add_argument("--callback", help="only callbacks whose name contains this")
    parser.add_argument("--strategies", action="store_true", help="ddp, zero2, zero3 on two ranks")
    given = parser.parse_args()
    if given.count:
        return count()
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if given.strategies:
        return layouts(given.module)
    modules = everything()
    circumstances = machine()
    for module, make in modules.items():
        if given.module and given.module not in module:
            continue
        for callback, case in CASES.items():
            if given.callback and given.callback not in callback:
                continue
            with contextlib.redirect_stdout(io.StringIO()):
                verdict, reason = run_case(case, make)
            row = {"module": module, "callback": callback, "verdict": verdict, "reason": reason}
            append("other_modules", row | circumstances)


if __name__ == "__main__":
    main()
