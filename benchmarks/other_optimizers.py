"""Optimizers of other packages: each in plain Lightning and under OptimizerPlan, bit for bit.

    python -m benchmarks.other_optimizers --site FOLDER --install     the packages of the list
    python -m benchmarks.other_optimizers --site FOLDER               all classes, one process each
    python -m benchmarks.other_optimizers --site FOLDER --ranks       40 of them on two ranks (ddp)
    python -m benchmarks.other_optimizers --site FOLDER --ranks --strategy zero3     29, on shards

Each class is tried in a process that is forked from one that has imported everything: 6 steps; the
same, saved at 3 and continued to 6; and the plan's default decay against two groups written by
hand. A class counts as one that trains if plain Lightning takes the 6 steps with it.
"""

import argparse
import contextlib
import gc
import importlib
import inspect
import io
import json
import linecache
import logging
import multiprocessing
import os
import pkgutil
import re
import resource
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache, partial
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from lightning.fabric.plugins import TorchCheckpointIO
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Optimizer
from torch.utils.data import DataLoader, TensorDataset

from benchmarks import record
from ravine.callbacks import ExactResume, OptimizerPlan
from ravine.callbacks.optimizers.composite import CompositeOptimizer
from ravine.cli import error_report
from ravine.strategies import AtomicCheckpointIO

LIST = Path(__file__).with_suffix(".txt")
LARGE = {n: f"{n}.optim" for n in ("timm", "torchao", "bitsandbytes")}  # only this part is read
STEPS, CUT = 6, 3
RANKS, CLASSES_ON_RANKS = 2, 40
ON_SHARDS = (  # of each kind: elementwise, per tensor, coupled, with a state of its own
    "torch.optim.Rprop",
    "torch.optim.RMSprop",
    "torch.optim.ASGD",
    "pytorch_optimizer.Lamb",
    "pytorch_optimizer.SOAP",
    "pytorch_optimizer.Adan",
    "pytorch_optimizer.NovoGrad",
    "pytorch_optimizer.LARS",
    "pytorch_optimizer.SM3",
    "pytorch_optimizer.Shampoo",
    "pytorch_optimizer.AdamP",
    "pytorch_optimizer.ADOPT",
    "pytorch_optimizer.Prodigy",
    "prodigyopt.Prodigy",
    "dadaptation.DAdaptAdam",
    "adv_optm.AdamW_adv",
    "pytorch_optimizer.AdaFactor",
    "pytorch_optimizer.CAME",
    "bitsandbytes.optim.Adam",
    "adabelief_pytorch.AdaBelief",
    "schedulefree.AdamWScheduleFree",
    "pytorch_optimizer.Lion",
    "timm.optim.Lamb",
    "optimi.AdamW",
    "adam_atan2_pytorch.AdamAtan2",
    "pytorch_optimizer.Yogi",
    "galore_torch.GaLoreAdamW",
    "heavyball.SOAP",
    "timm.optim.Muon",
)
NEAR = 2e-3  # of a weight, two ranks against one process: rounding, grown by signs and roots
Factory = Callable[[Any], Optimizer]


class Net(L.LightningModule):
    """Two layers, one of more than 4096 weights: 8-bit optimizers keep less in float32."""

    strategy = "ddp"  # on several ranks
    loss_factor = 1.0  # one last bit more, to see how far rounding alone moves an optimizer
    rows = 32  # 8 where ranks are compared with one process: a step has all, in whatever order

    def __init__(self, factory: Factory | None = None, by_hand: bool = False, ranks: int = 1):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 128), nn.Tanh(), nn.Linear(128, 64))
        self.factory, self.by_hand, self.ranks = factory, by_hand, ranks

    def training_step(self, batch: Any, index: int) -> Tensor:
        return self.loss_factor * F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Optimizer:
        assert self.factory is not None
        if not self.by_hand:
            return self.factory(list(self.parameters()))
        matrices = [p for p in self.parameters() if p.ndim >= 2]
        others = [p for p in self.parameters() if p.ndim < 2]
        return self.factory([{"params": matrices}, {"params": others, "weight_decay": 0.0}])

    def on_train_start(self) -> None:
        self._switch("train")

    def on_fit_end(self) -> None:
        self._switch("eval")

    def _switch(self, mode: str) -> None:
        """Call train() or eval(), as schedule-free packages require; a plan does so itself."""
        for optimizer in self.trainer.optimizers:
            if not isinstance(optimizer, CompositeOptimizer):
                with contextlib.suppress(AttributeError):
                    getattr(optimizer, mode)()

    def train_dataloader(self) -> DataLoader:
        x = torch.linspace(-2, 2, 256).reshape(32, 8).mul(3.1).sin()[:: 32 // self.rows]
        return DataLoader(TensorDataset(x, (x.sum(1) > 0).long()), batch_size=8 // self.ranks)


class SaveAt(L.Callback):
    """A checkpoint after CUT steps."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == CUT:
            trainer.save_checkpoint(self.path)


def fit(
    factory: Factory,
    plan: OptimizerPlan | None,
    file: Path,
    resume: bool = False,
    by_hand: bool = False,
    ranks: int = 1,
    save: bool = True,
    stock: bool = False,
) -> tuple[dict[str, Tensor] | None, BaseException | None, int]:
    """Weights after the run, or what ended it; and how many steps there were."""
    L.seed_everything(0, verbose=False)
    module = Net(factory, by_hand, ranks)
    callbacks: list[L.Callback] = [ExactResume(), *([plan] if plan else [])]
    callbacks += [SaveAt(file)] if save and not resume else []
    many: dict[str, Any] = (
        {"strategy": Net.strategy, "devices": ranks} if ranks > 1 else {"devices": 1}
    )
    trainer = None
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            trainer = L.Trainer(
                max_steps=STEPS, accelerator="cpu", logger=False, enable_checkpointing=False,
                enable_progress_bar=False, enable_model_summary=False, callbacks=callbacks,
                plugins=[TorchCheckpointIO() if stock else AtomicCheckpointIO()], **many,
            )  # fmt: skip
            trainer.fit(module, ckpt_path=str(file) if resume else None, weights_only=not stock)
    except BaseException as error:
        return None, error, trainer.global_step if trainer is not None else 0
    weights = {
        k: (v.full_tensor() if isinstance(v, DTensor) else v).detach().clone()
        for k, v in module.state_dict().items()
    }
    return weights, None, STEPS


def far(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The greatest difference of two sets of weights; 0 for the same bits, NaN included."""
    if all(torch.equal(one[k].view(torch.uint8), other[k].view(torch.uint8)) for k in one):
        return 0.0
    return max(float((one[k] - other[k]).abs().max()) for k in one)


def factories(kind: type) -> Iterator[tuple[str, Factory]]:
    """Ways to make an optimizer of the class, of parameters alone."""
    yield "(params)", kind
    yield "(params, lr=0.001)", partial(kind, lr=1e-3)
    yield "(AdamW(params))", lambda params: kind(AdamW(params, lr=1e-3))
    yield "(params, AdamW)", lambda params: kind(params, AdamW, lr=1e-3)
    yield "(params, base_optimizer=AdamW)", partial(kind, base_optimizer=AdamW, lr=1e-3)
    yield "(params, num_iterations=6)", partial(kind, num_iterations=STEPS)


def one_line(error: BaseException) -> bool:
    """Whether the command line would print the text alone."""
    return (
        isinstance(error, Exception)
        and error_report.exit_status(error_report.unwrap_error(error)) is not None
    )


def said(error: BaseException | None) -> str:
    """Type and text, shortened."""
    return "" if error is None else f"{type(error).__name__}: {' '.join(str(error).split())}"[:400]


def trial(kind: type, folder: Path, ranks: int = 1) -> dict[str, Any]:
    """All runs with one class; the row without the circumstances."""
    file = folder / "cut.ckpt"
    run = partial(fit, file=file, ranks=ranks)
    row: dict[str, Any] = {"plain": "", "plan": ""}
    whole, factory = None, kind
    for how, made in factories(kind):
        file.unlink(missing_ok=True)
        whole, error, steps = run(made, None)
        if whole is None and error is not None and steps == CUT and not file.exists():
            row["plain_save"] = said(error)  # it trains, but its state cannot be saved
            file.unlink(missing_ok=True)
            whole, error, steps = run(made, None, stock=True)
            if whole is None:
                whole, error, steps = run(made, None, save=False)
        row["plain"] = row["plain"] or said(error)
        if whole is not None:
            row |= {"made": how, "plain": ""}
            factory = made
            break
    trains = whole is not None
    row["trains"] = trains
    plain_resumes = None
    if whole is not None and file.exists():
        continued, error, _ = run(factory, None, resume=True, stock="plain_save" in row)
        plain_resumes = continued is not None and far(whole, continued) == 0.0
        row["plain_resume"] = said(error) or ("bitwise" if plain_resumes else "not bitwise")
    file.unlink(missing_ok=True)
    planned, error, steps = run(factory, OptimizerPlan(factory, decay="all"))
    if planned is None:
        assert error is not None
        kind_of_end = "refused" if one_line(error) else "traceback"
        late = "late " if kind_of_end == "refused" and steps > 1 else ""
        return row | {"verdict": late + kind_of_end, "plan": said(error)}
    row["plan_off"] = far(whole, planned) if whole is not None else None
    continued, error, _ = run(factory, OptimizerPlan(factory, decay="all"), resume=True)
    if continued is None:
        assert error is not None
        end = "late refused" if one_line(error) else "traceback"
        if one_line(error) and plain_resumes is False and row["plain_resume"] != "not bitwise":
            return row | {"verdict": "as plain: no resume", "plan": said(error)}
        return row | {"verdict": f"{end} on resume", "plan": said(error)}
    row["resume_off"] = far(planned, continued)
    row["decay"] = decay(kind, factory, run)
    # plain Lightning's own resume may be inexact, or not exist
    exact = row["resume_off"] == 0.0 or not (plain_resumes or plain_resumes is None)
    wrong = (row["plan_off"] or 0.0) != 0.0 or not exact or row["decay"] not in ("", "the same")
    row["verdict"] = "silently wrong" if wrong else "as plain" if whole is not None else "works"
    if ranks > 1:
        row["weights"] = {k: v.tolist() for k, v in planned.items()}
    return row


def decay(kind: type, factory: Factory, run: Callable[..., Any]) -> str:
    """The plan's default decay against two groups by hand, where the class has decay."""
    try:
        known = "weight_decay" in inspect.signature(kind).parameters
    except (TypeError, ValueError):
        known = False
    if not known or not (factory is kind or isinstance(factory, partial)):
        return ""
    decaying = partial(factory, weight_decay=0.1)
    actual, error, _ = run(decaying, OptimizerPlan(decaying))
    expected, _, _ = run(decaying, None, by_hand=True)
    if expected is None or actual is None:
        return "" if expected is None else said(error)
    return "the same" if far(actual, expected) == 0.0 else f"off by {far(actual, expected):.2g}"


def classes(names: list[str]) -> dict[str, type]:
    """Every optimizer class of these modules, by its shortest path; a class is tried once."""
    found: dict[int, tuple[str, type]] = {}
    for name in sorted(names):
        for module in walked(name):
            for attribute, value in list(vars(module).items()):
                if not isinstance(value, type) or not issubclass(value, Optimizer):
                    continue
                top = value.__module__.partition(".")[0]
                if top != name or attribute.startswith("_") or value is Optimizer:
                    continue
                path = f"{module.__name__}.{attribute}"
                before = found.get(id(value))
                if before is None or len(path) < len(before[0]):
                    found[id(value)] = (path, value)
    return dict(sorted(found.values()))


def walked(name: str) -> Iterator[Any]:
    """A package and its modules, as far as they can be imported without a GPU."""
    try:
        package = importlib.import_module(name)
    except BaseException as error:
        print(f"{name}: {said(error)}", file=sys.stderr)
        return
    yield package
    paths = getattr(package, "__path__", [])
    if name in ("timm", "torchao", "bitsandbytes"):  # large, and the rest has no optimizers
        inner = {
            "timm": "timm.optim",
            "torchao": "torchao.optim",
            "bitsandbytes": "bitsandbytes.optim",
        }
        with contextlib.suppress(Exception):
            yield importlib.import_module(inner[name])
        return
    for part in pkgutil.walk_packages(paths, name + "."):
        if re.search(r"test|benchmark|triton|__main__|setup|jax|example", part.name):
            continue
        with contextlib.suppress(BaseException):
            yield importlib.import_module(part.name)


def installed(site: Path) -> list[str]:
    """Importable names of the packages of the list that are in a folder."""
    wanted = {line.split("==")[0].lower().replace("_", "-") for line in listed()}
    names: set[str] = set()
    for package in distributions(path=[str(site)]):
        if package.metadata["Name"].lower().replace("_", "-") not in wanted:
            continue
        for file in package.files or []:
            top = file.parts[0]
            if file.suffix == ".py" and top not in ("test", "tests", "setup.py"):
                names.add(top.removesuffix(".py"))
    return sorted(n for n in names if n.isidentifier())


def listed() -> list[str]:
    """The packages and their versions."""
    return [line for line in LIST.read_text().splitlines() if line and line[0] != "#"]


def install(site: Path) -> None:
    """Each package by itself and without what it needs: torch is there, and stays as it is."""
    for line in listed():
        command = [
            "pip",
            "install",
            "-q",
            "--no-deps",
            "--no-build-isolation",
            "--target",
            str(site),
        ]
        if subprocess.run([sys.executable, "-m", *command, line]).returncode:
            print(f"not installed: {line}", file=sys.stderr)


def quiet() -> None:
    """One thread, no compilation, no warnings; and read the sources, to classify errors."""
    for folder in error_report.OURS:
        for file in folder.rglob("*.py"):
            linecache.getlines(str(file))
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch._dynamo.config.disable = True
    for name in ("lightning.pytorch", "lightning.fabric", "lightning"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


def child(kind: type, pipe: Any, limit: int, rank: int, ranks: int, port: int, folder: str) -> None:
    """One trial in a forked process."""
    resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))
    # A fork has the thread pool of its parent. torch replaces it at the first use, which aborts the
    # process where two threads of autograd are the first ("Invalid thread pool", torch 2.14).
    torch.set_num_threads(1)
    sink = os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, 1)
    os.dup2(sink, 2)
    if ranks > 1:
        os.environ |= {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0",
            "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "x",
        }  # fmt: skip
    try:
        row = trial(kind, Path(folder), ranks)
    except BaseException as error:
        row = {"verdict": "the trial failed", "plan": said(error)}
    pipe.send(row)
    pipe.close()
    os._exit(0)


def forked(kind: type, limit: int, ranks: int = 1) -> dict[str, Any]:
    """A trial's row, or that it took too long."""
    context = multiprocessing.get_context("fork")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        jobs = []
        for rank in range(ranks):
            actual, expected = context.Pipe(duplex=False)
            place = (rank, ranks, port, folder)
            job = context.Process(target=child, args=(kind, expected, limit, *place))
            job.start()
            expected.close()
            jobs.append((job, actual))
        rows, end = [], time.monotonic() + 10 * limit  # others may use the machine
        for job, pipe in jobs:
            row = {"verdict": "too long", "plan": f"more than {limit} s"}
            with contextlib.suppress(EOFError):
                if pipe.poll(max(0.0, end - time.monotonic())):
                    row = pipe.recv()
            rows.append(row)
            job.join(1)
            if job.is_alive():
                job.kill()
                job.join()
    return joined(rows)


def joined(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """One row of all ranks: they have to agree, in the verdict and in every bit of the weights."""
    first = rows[0]
    weights = [row.pop("weights", None) for row in rows]
    if len(rows) > 1:
        worst = next((row for row in rows if row["verdict"] != first["verdict"]), None)
        if worst is not None:
            first = first | {"verdict": f"ranks differ: {first['verdict']}, {worst['verdict']}"}
        elif any(other != weights[0] for other in weights):
            first = first | {"verdict": "silently wrong: the ranks have other weights"}
        first["weights"] = weights[0]
    return first


def main() -> None:
    """Try, print each row as it is known, and count."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--site", type=Path, required=True, help="where the packages are")
    parser.add_argument("--install", action="store_true", help="install them there first")
    parser.add_argument("--only", default="", help="classes whose path matches this pattern")
    parser.add_argument("--ranks", action="store_true", help="40 classes on two ranks")
    parser.add_argument("--strategy", default="ddp", help="with --ranks: ddp, zero1, zero2, zero3")
    parser.add_argument("--limit", type=int, default=90, help="seconds of a processor, a class")
    parser.add_argument("--dry", action="store_true", help="store no rows")
    given = parser.parse_args()
    if given.install:
        install(given.site)
    sys.path.append(str(given.site))
    quiet()
    if (given.site / "heavyball").exists():  # it insists on compilation, which needs minutes
        importlib.import_module("heavyball").utils.compile_mode = None
    if given.ranks and given.strategy != "ddp":
        found = {}
        for path in ON_SHARDS:
            module, _, name = path.rpartition(".")
            found[path] = getattr(importlib.import_module(module), name)
    else:
        found = classes(installed(given.site))
    found = {path: kind for path, kind in found.items() if re.search(given.only, path)}
    print(f"{len(found)} classes", flush=True)
    gc.collect()
    gc.freeze()  # or each fork's collector would touch, and so copy, all that was imported
    if given.ranks:
        Net.rows, Net.strategy = 8, given.strategy
        rows = on_ranks(found, given.limit, given.dry)
    else:
        rows = {}
        for path, kind in found.items():
            rows[path] = forked(kind, given.limit)
            row = rows[path]
            if not given.dry:
                store("other_optimizers", path, row)
            trains = "trains" if row.get("trains") else ""
            print(f"{row['verdict']:16} {trains:6} {path:60} {row['plan'][:150]}", flush=True)
    packages = {line.split("==")[0]: line.split("==")[1] for line in listed()}
    print(json.dumps(packages))
    trains = [row for row in rows.values() if row.get("trains")]
    print(f"tried {len(rows)}; train in plain Lightning {len(trains)}")
    for title, some in (
        ("of those", trains),
        ("the others", [r for r in rows.values() if not r.get("trains")]),
    ):
        counts = Counter(row["verdict"] for row in some)
        print(f"{title}: " + ", ".join(f"{n} {verdict}" for verdict, n in counts.most_common()))


@cache
def machine() -> dict[str, Any]:
    """Code and machine, asked for once."""
    return record.machine()


def store(benchmark: str, path: str, row: dict[str, Any]) -> None:
    """Keep a row as soon as it is known."""
    with contextlib.redirect_stdout(io.StringIO()):
        record.append(benchmark, {"class": path} | row | machine())


def on_ranks(found: dict[str, type], limit: int, dry: bool) -> dict[str, dict[str, Any]]:
    """Classes spread evenly over all that train, on two ranks, against one process."""
    stored = record.ROWS / "other_optimizers.jsonl"
    known = [json.loads(line) for line in stored.read_text().splitlines()]
    paths = [row["class"] for row in known if row.get("trains") and row["class"] in found]
    paths = sorted(set(paths))
    chosen = [paths[i * len(paths) // CLASSES_ON_RANKS] for i in range(CLASSES_ON_RANKS)]
    on_shards = Net.strategy != "ddp"
    chosen = list(found) if on_shards else chosen
    rows = {}
    for path in dict.fromkeys(chosen):
        row = forked(found[path], limit, RANKS)
        weights = row.pop("weights", None)
        single = forked_weights(found[path], limit) if weights else None
        if weights and single:
            away = apart(weights, single)
            row["from_one_process"] = away
            near = away < NEAR
            if not near:  # eigenvectors of a singular matrix, such as those of SOAP, are arbitrary
                Net.loss_factor = 1.0 + 1e-7
                rounded = forked_weights(found[path], limit)
                Net.loss_factor = 1.0
                row["from_one_process_rounded"] = apart(rounded, single) if rounded else None
                near = rounded is not None and away < 2 * apart(rounded, single)
            row["verdict"] += ", as one process" if near else ", not as one process"
        rows[path] = row
        if not dry:
            if on_shards:
                row["strategy"] = Net.strategy
            store("other_optimizers_shards" if on_shards else "other_optimizers_ranks", path, row)
        print(
            f"{row['verdict']:32} {path:60} {row.get('from_one_process', '')} {row['plan'][:100]}",
            flush=True,
        )
    return rows


def apart(one: dict[str, Any], other: dict[str, Any]) -> float:
    """The greatest difference of two sets of weights."""
    return max(float((torch.tensor(one[k]) - torch.tensor(other[k])).abs().max()) for k in other)


def _tensors(weights: dict[str, Any]) -> dict[str, Tensor]:
    return {name: torch.tensor(values) for name, values in weights.items()}


def forked_weights(kind: type, limit: int) -> dict[str, Any] | None:
    """The weights of one process, in a forked one."""
    context = multiprocessing.get_context("fork")
    actual, expected = context.Pipe(duplex=False)

    def work() -> None:
        with tempfile.TemporaryDirectory() as folder:
            for _, made in factories(kind):
                found, _, _ = fit(made, OptimizerPlan(made, decay="all"), Path(folder, "x.ckpt"))
                if found is not None:
                    expected.send({k: v.tolist() for k, v in found.items()})
                    break
            else:
                expected.send(None)
        os._exit(0)

    job = context.Process(target=work)
    job.start()
    try:
        return actual.recv() if actual.poll(10 * limit) else None
    finally:
        job.kill()
        job.join()


if __name__ == "__main__":
    main()
