"""Private Lightning: each part is documented, and the fast loop equals Lightning's own loop."""

import ast
import logging
import sys
import tomllib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from external_modules.net_in_init import NetInInit
from external_modules.two_optimizers import TwoOptimizers
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import SingleDeviceStrategy
from torchmetrics import MeanMetric

from ravine import lightning_compat
from ravine.callbacks import TrainingMonitor
from ravine.cli.trainer import Trainer
from ravine.errors import UsageError
from ravine.lightning_compat import SEEN_VERSIONS, number_logs_by_step
from ravine.lightning_compat.versions import HINT

PACKAGE = Path(lightning_compat.__file__).parent

STEP = (
    "on_train_batch_start",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
)
OTHERS = ("on_train_epoch_start", "on_validation_start", "on_validation_end", "on_train_epoch_end")


@pytest.fixture(autouse=True)
def with_the_fast_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAVINE_FAST_LOOP", raising=False)
    monkeypatch.setattr(L, "__version__", SEEN_VERSIONS[-1])


class Recorder(Callback):
    """Notes each hook with the name that `self.log` would see, and the metrics of the moment."""

    def __init__(self) -> None:
        self.events: list[Any] = []

    def note(self, hook: str, trainer: L.Trainer, module: L.LightningModule) -> None:
        metrics = {k: float(v) for k, v in trainer.callback_metrics.items()}
        self.events.append((hook, module._current_fx_name, trainer.global_step, metrics))


def _noting(hook: str) -> Callable[..., None]:
    return lambda self, trainer, module, *args: self.note(hook, trainer, module)


for _hook in (*STEP, *OTHERS):
    setattr(Recorder, _hook, _noting(_hook))


class Rows(Logger):
    """Keeps what is logged."""

    name, version = "rows", 0

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[Any] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append((step, dict(metrics)))

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None: ...


class Talkative(NetInInit):
    """Logs in every way there is, and notes the hooks of its own."""

    def __init__(self, schedule: bool = True) -> None:
        super().__init__()
        self.mean = MeanMetric()
        self.schedule = schedule
        self.own: list[str] = []

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        x, y = batch
        loss = F.mse_loss(self.net(x), y)
        self.mean(loss)
        self.log("step", loss)
        self.log("both", loss * 2, on_step=True, on_epoch=True, batch_size=len(x))
        self.log("epoch", loss * 3, on_step=False, on_epoch=True)
        self.log("shown", loss * 4, prog_bar=True)
        self.log("number", 5.0)
        self.log("metric", self.mean)
        self.log_dict({"first": loss.double(), "second": loss + 1}, on_epoch=True)
        return {"loss": loss, "extra": x.sum()}

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.own.append("step")

    def optimizer_step(self, epoch: int, batch_idx: int, *args: Any, **kwargs: Any) -> None:
        self.own.append(f"before {epoch} {batch_idx}")
        super().optimizer_step(epoch, batch_idx, *args, **kwargs)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


class EndsEarly(Talkative):
    """Ends each epoch after two batches."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        return -1 if batch_idx == 2 else None


def fit(kind: type[L.Trainer], module: L.LightningModule, **settings: Any) -> list[Any]:
    """All that can be seen of a short run."""
    recorder, rows = Recorder(), Rows()
    trainer = kind(
        accelerator="cpu",
        callbacks=[recorder],
        logger=rows,
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        log_every_n_steps=2,
        **settings,
    )
    if kind is L.Trainer:
        number_logs_by_step(trainer)  # as in Ravine's
    trainer.callbacks = [c for c in trainer.callbacks if not isinstance(c, TrainingMonitor)]
    trainer.fit(module)
    weights = [p.detach().clone() for p in module.parameters()]
    return [recorder.events, rows.rows, getattr(module, "own", []), weights, trainer.global_step]


def same(one: Any, other: Any) -> bool:
    """Equality, of tensors bit for bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (Talkative, {}),
        (Talkative, {"accumulate_grad_batches": 3, "gradient_clip_val": 0.1}),
        (Talkative, {"val_check_interval": 2, "precision": "bf16-mixed"}),
        (Talkative, {"profiler": "simple"}),
        (EndsEarly, {}),
        (TwoOptimizers, {}),
    ],
)
def test_the_fast_loop_gives_the_hooks_metrics_and_weights_of_the_loop_of_lightning(
    kind: type[L.LightningModule], settings: dict[str, Any]
) -> None:
    runs = []
    for each in (L.Trainer, Trainer):
        torch.manual_seed(0)
        runs.append(fit(each, kind(), max_epochs=3, **settings))
    for stock, fast in zip(*runs, strict=True):
        assert same(stock, fast)


def test_the_fast_loop_is_used_where_nothing_needs_the_loop_of_lightning() -> None:
    fast = {}
    for kind, settings in ((Talkative, {}), (EndsEarly, {}), (Talkative, {"profiler": "simple"})):
        seen: list[bool] = []
        trainer = Trainer(max_steps=1, logger=False, accelerator="cpu", **settings)
        trainer.callbacks.append(_Look(seen))
        trainer.fit(kind())
        fast[kind.__name__, *settings] = seen[0]
    assert fast == {("Talkative",): True, ("EndsEarly",): False, ("Talkative", "profiler"): False}


class _Look(Callback):
    def __init__(self, seen: list[bool]) -> None:
        self.seen = seen

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        self.seen.append(trainer.fit_loop.epoch_loop.is_fast)


def fast_on_ranks(strategy: str) -> bool:
    seen: list[bool] = []
    trainer = Trainer(max_steps=1, logger=False, accelerator="cpu", devices=2, strategy=strategy)
    trainer.callbacks.append(_Look(seen))
    trainer.fit(NetInInit())
    return seen[0]


@pytest.mark.parametrize("strategy", ["ddp", "zero1", "zero3"])
def test_the_fast_loop_is_used_under_strategies(ranks: Any, strategy: str) -> None:
    assert ranks(fast_on_ranks, 2, strategy) == [True, True]


def test_the_fast_loop_leaves_no_attribute_on_the_module() -> None:
    module = NetInInit()
    before = set(module.__dict__)
    Trainer(max_steps=2, accelerator="cpu").fit(module)
    assert not {"log", "_after_closure"} & (set(module.__dict__) - before)


class _Calls(Callback):
    """Counts the functions called, Python's and C's, in ten steps far from any log line."""

    def __init__(self) -> None:
        self.count = 0

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step == 12:
            sys.setprofile(self._note)
        elif trainer.global_step == 22:
            sys.setprofile(None)

    def _note(self, frame: Any, event: str, arg: Any) -> None:
        self.count += event in ("call", "c_call")


def test_a_step_calls_a_quarter_of_the_functions_it_calls_with_lightnings_own_loop() -> None:
    counts = []
    for kind in (L.Trainer, Trainer):
        counter = _Calls()
        module = NetInInit(batch_size=1)  # 32 steps an epoch
        defaults = {"default_root_dir": "runs", "enable_model_summary": False, "accelerator": "cpu"}
        kind(callbacks=[counter], max_steps=25, **defaults).fit(module)  # type: ignore
        counts.append(counter.count)
    assert counts[1] < counts[0] / 4  # although ours resumes exactly, stops gracefully and plots


class EveryHook(Callback):
    """Notes each call of each hook of callbacks, of the module and of the strategy, in order."""

    def __init__(self, calls: list[tuple[Any, ...]]) -> None:
        for name in hooks_of(Callback):
            setattr(self, name, partial(self.note, calls, name, getattr(self, name)))

    def note(
        self, calls: list[Any], name: str, hook: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        calls.append(("callback", name, *map(size_of, args[2:]), size_of(kwargs)))
        return hook(*args, **kwargs)


def hooks_of(kind: type) -> list[str]:
    return [name for name in dir(kind) if name.startswith(("on_", "setup", "teardown"))]


def size_of(value: Any) -> Any:
    """What can be compared of an argument: numbers, and the sum of a tensor."""
    if isinstance(value, torch.Tensor):
        return float(value.detach().double().sum())
    if isinstance(value, list | tuple):
        return [size_of(each) for each in value]
    if isinstance(value, dict):
        return {key: size_of(each) for key, each in value.items()}
    return value if isinstance(value, int | float | str | None) else type(value).__name__


OF_MODULE = (
    *hooks_of(L.LightningModule),
    *("training_step", "validation_step", "optimizer_step", "optimizer_zero_grad", "backward"),
    *("configure_gradient_clipping", "lr_scheduler_step", "transfer_batch_to_device"),
)
OF_STRATEGY = (
    *hooks_of(SingleDeviceStrategy),
    *("pre_backward", "post_backward", "training_step", "optimizer_step", "batch_to_device"),
)


def noting_subclass(
    kind: type, owner: str, names: tuple[str, ...], calls: list[tuple[Any, ...]]
) -> type:
    """A subclass whose hooks note each call before they do what they did."""

    def noting(name: str) -> Callable[..., Any]:
        def hook(self: Any, *args: Any, **kwargs: Any) -> Any:
            calls.append((owner, name, *map(size_of, args), size_of(kwargs)))
            return getattr(super(made, self), name)(*args, **kwargs)

        return hook

    def training_step(self: Any, batch: Any, batch_idx: int) -> Any:
        calls.append((owner, "training_step", size_of(batch), batch_idx))
        return super(made, self).training_step(batch, batch_idx)

    methods = {name: noting(name) for name in names if callable(getattr(kind, name, None))}
    if owner == "module":  # its signature is read
        methods["training_step"] = training_step
    made = type(kind.__name__, (kind,), methods)
    return made


CASES: dict[str, dict[str, Any]] = {
    "epochs": {"max_epochs": 2},
    "accumulation": {"max_epochs": 2, "accumulate_grad_batches": 3},
    "validation within an epoch": {"max_epochs": 2, "val_check_interval": 2},
    "validation every second epoch": {"max_epochs": 3, "check_val_every_n_epoch": 2},
    "max_steps": {"max_steps": 5, "accumulate_grad_batches": 2},
    "limit_train_batches": {"max_epochs": 2, "limit_train_batches": 3, "val_check_interval": 1.0},
    "no validation": {"max_epochs": 1, "limit_val_batches": 0, "gradient_clip_val": 0.01},
    "a rough dry run": {"fast_dev_run": 3},
}


def observed(kind: type, without: tuple[str, ...], settings: dict[str, Any]) -> list[Any]:
    """All calls of hooks in a run, in order, and the weights at its end."""
    calls: list[tuple[Any, ...]] = []
    torch.manual_seed(0)
    names = tuple(name for name in OF_MODULE if name not in without)
    module = noting_subclass(kind, "module", names, calls)()
    strategy = noting_subclass(SingleDeviceStrategy, "strategy", OF_STRATEGY, calls)
    trainer = Trainer(
        accelerator="cpu",
        strategy=strategy(),
        callbacks=[EveryHook(calls)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        log_every_n_steps=2,
        **settings,
    )
    trainer.callbacks.append(seen := Look())
    trainer.fit(module)
    weights = [p.detach().clone() for p in module.parameters()]
    return [calls, weights, trainer.global_step, seen.fast]


class Look(Callback):
    """Notes whether the epoch under way is a fast one."""

    fast = False

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        self.fast = getattr(trainer.fit_loop.epoch_loop, "is_fast", False)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("kind", "without", "fast"),
    [
        # `on_train_batch_start` of a module may end the epoch, and is left to Lightning's loop
        (NetInInit, ("on_train_batch_start",), True),
        (NetInInit, (), False),
        (TwoOptimizers, ("on_train_batch_start",), False),
    ],
    ids=["automatic", "with on_train_batch_start", "manual optimization"],
)
def test_the_fast_loop_calls_the_hooks_of_lightnings_loop_in_their_order_with_equal_weights(
    kind: type,
    without: tuple[str, ...],
    fast: bool,
    case: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = CASES[case]
    if kind is TwoOptimizers:  # Lightning takes neither with manual optimization
        unsupported_flags = ("accumulate_grad_batches", "gradient_clip_val")
        settings = {key: value for key, value in settings.items() if key not in unsupported_flags}
    *own_run, is_fast = observed(kind, without, settings)
    monkeypatch.setenv("RAVINE_FAST_LOOP", "0")
    *stock, was_fast = observed(kind, without, settings)
    assert (is_fast, was_fast) == (fast, False)
    assert len(own_run[0]) > 20
    for own_hook, other in zip(*(run[0] for run in (own_run, stock)), strict=False):
        assert own_hook == other
    assert same(own_run, stock)


@pytest.mark.parametrize("version", ["2.99.0", "2.6.2.dev0"])
def test_on_an_unseen_version_lightnings_loop_trains_to_the_same_weights_and_one_line_says_so(
    version: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    known = observed(NetInInit, (), {"max_steps": 3})
    monkeypatch.setattr(L, "__version__", version)
    with caplog.at_level(logging.INFO, "lightning.pytorch"):  # whatever level was set before
        unknown = observed(NetInInit, (), {"max_steps": 3})
    assert same(known[1:3], unknown[1:3])
    (line,) = [text for text in caplog.messages if "loop" in text]
    assert version in line
    assert "\n" not in line


def test_a_part_that_lightning_does_not_have_is_named_in_one_line_with_what_to_install() -> None:
    class Newer:
        """A trainer of a version that has renamed its parts."""

        fit_loop = object()

    calls = (lightning_compat.combined_loader, lightning_compat.should_accumulate)
    for call in (*calls, lightning_compat.should_update_logs, lightning_compat.data_fetcher):
        with pytest.raises(UsageError) as found:
            call(Newer())  # type: ignore[arg-type]
        text = str(found.value)
        assert "\n" not in text
        assert "pip install 'lightning>=2.6,<2.7'" in text
        assert SEEN_VERSIONS[0] in text
    with pytest.raises(UsageError, match="_gone"):
        lightning_compat.replace_method(object(), "_gone", print)


def test_the_versions_that_pyproject_names_are_among_those_tried() -> None:
    project = tomllib.loads((PACKAGE.parents[1] / "pyproject.toml").read_text())
    named = [project["tool"]["ravine"][end]["lightning"] for end in ("lowest", "highest")]
    assert set(named) <= set(SEEN_VERSIONS)
    (allowed,) = [d for d in project["project"]["dependencies"] if d.startswith("lightning")]
    assert allowed in HINT


def documented() -> list[tuple[str, str]]:
    """The public functions and classes of the package that use Lightning, and their docstrings."""
    found = []
    for path in sorted(PACKAGE.glob("*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and path.stem != "versions":
                found.append((f"{path.stem}.{node.name}", ast.get_docstring(node) or ""))
    return [(name, text) for name, text in found if not name.split(".")[1].startswith("_")]


@pytest.mark.parametrize(("name", "text"), documented())
def test_each_private_part_has_its_reason_its_source_in_lightning_and_the_versions(
    name: str, text: str
) -> None:
    assert "Reason: " in text
    (path,) = [line.split()[1] for line in text.splitlines() if line.startswith("Upstream: ")]
    assert (Path(L.__path__[0]) / path).is_file()
    assert f"Seen on: {SEEN_VERSIONS[0]} to {SEEN_VERSIONS[-1]}" in text


def test_the_package_imports_only_lightning_torch_and_the_errors() -> None:
    for path in PACKAGE.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                modules = [node.module or ""]
            for module in modules:
                is_ravine = module.startswith("ravine")
                assert module == "ravine.errors" or not is_ravine, f"{path.name}: {module}"
