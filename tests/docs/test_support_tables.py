"""README's support tables equal the measurement: equal training on every strategy.

`WRITE_README=1 pytest tests/docs/test_support_tables.py -k readme` writes them.

A cell is ticked if, after two steps, the weights on every rank equal those of one process.
Callbacks must log the same numbers, write the same files and print the same words, and each must
have a visible effect. A cell has the number of a reason if a one-line error of Ravine refuses the
combination before the first step. Any other outcome, a hang included, fails a test of this file.

Callbacks that do not change training run together, and so do three that change it independently.
If one of a group is refused, each is tried alone.

Callbacks that need a module with members are not in the tables: tests require that they are refused
on the modules of the tables, and that on Objective they have an effect and train with ddp as on one
process.
"""

import io
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from functools import cache, partial
from pathlib import Path

import lightning as L
import pytest
import torch
import torch._dynamo
from external_modules.net_in_configure_model import NetInConfigureModel
from external_modules.net_in_init import NetInInit
from external_modules.two_optimizers import TwoOptimizers
from matplotlib.figure import Figure
from ranks import fewest_ranks, furthest, run_ranks, whole
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils.data import DataLoader, TensorDataset

import ravine.callbacks
import ravine.strategies
from ravine.callbacks import (
    Compile,
    FrechetDistance,
    GenerateSamples,
    GradientClipping,
    LoRA,
    MetricAlert,
    Muon,
    Newton,
    OptimizerPlan,
    OptimizerSweep,
    Pretrained,
)
from ravine.callbacks.optimizers import muon, update_monitor
from ravine.callbacks.stability import gradient_clipping
from ravine.callbacks.stability.gradient_clipping import global_norm
from ravine.datamodules import ImageDataModule, PromptDataModule, SpamDataModule, TextDataModule
from ravine.datamodules.text import python_docs_text
from ravine.lightning_modules import (
    BatchDistance,
    CharacterFraction,
    Diffusion,
    ImageClassifier,
    LanguageModel,
    Objective,
    Reinforce,
    SpamClassifier,
)
from ravine.strategies import STRATEGY_PRESETS

pytestmark = [
    # logged on each rank after an all-reduce
    pytest.mark.filterwarnings("ignore:It is recommended to use .self.log"),
    # dynamo reads it when it traces the gathered parameters of a sharded block
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    # the critic is used in training only
    pytest.mark.filterwarnings("ignore:LoRA. no adapter of critic is used in validation"),
]

README = Path(__file__).resolve().parents[2] / "README.md"
ALONE = ("one process", "auto", 1)
WORLDS = {"ddp": 2, **{name: fewest_ranks(how) for name, (_, how) in STRATEGY_PRESETS.items()}}
KINDS = {
    name: kind
    for name, kind in (vars(ravine.callbacks) | vars(ravine.strategies)).items()
    if isinstance(kind, type) and issubclass(kind, L.Callback)
}
# they need a module with members, and are refused on the modules of the tables
MEMBER_CALLBACKS = ("ConvergencePlot", "OptimizerSweep", "StepsToTarget", "TrajectoryPlot")
CALLBACKS = sorted(KINDS.keys() - {*MEMBER_CALLBACKS})
PLANS = {name for name in CALLBACKS if issubclass(KINDS[name], OptimizerPlan)}
EVERY_OTHER, OPTIMIZERS = "all callbacks not listed below", "all optimizers of `ravine.callbacks`"
ARGUMENTS = {
    "MetricAlert": lambda: MetricAlert({"train/loss": 99.0}),
    "Compile": lambda: Compile(backend="eager"),
    "FrechetDistance": lambda: FrechetDistance(Pixels(), num_samples=8, batch_size=4),
    "GradientClipping": lambda: GradientClipping(0.1),
    "LoRA": lambda: LoRA(rank=2),
    # bf16 amplifies rounding of gradients; the tests of Muon cover bf16
    "Muon": lambda: Muon(iteration_dtype="float32", aux_optimizer=partial(torch.optim.SGD, lr=0.1)),
    # a difference of gradients loses half of the digits; damping bounds its effect on the step
    "Newton": lambda: Newton(damping=5.0),
    "OptimizerSweep": lambda: OptimizerSweep(torch.optim.SGD, lrs=[0.5, 0.25]),
    "OptimizerPlan": lambda: OptimizerPlan(partial(torch.optim.SGD, lr=0.1, momentum=0.5)),
    "Pretrained": lambda: Pretrained(__file__),  # the modules below do not read it
    "GenerateSamples": lambda: GenerateSamples({"prompt": "T", "max_new_tokens": 4}),
}
WATCHERS = (
    *("Checkpoint", "MetricAlert", "MetricPlot", "ExactResume", "SaveFigures", "FrechetDistance"),
    *(
        "TokenWeightedLoss",
        "GracefulStop",
        "LossPlot",
        "MemoryMonitor",
        "NaNGuard",
        "PredictionTable",
    ),
    *("ProgressBar", "RolloutTable", "GenerateSamples", "Summary", "Throughput", "UpdateMonitor"),
)
AWAITING = {  # callbacks without an effect in two steps: the event that they need
    "ExactResume": "a cut",
    "TokenWeightedLoss": "ranks or micro-batches of unequal weight",
    "GracefulStop": "a signal",
    "NaNGuard": "a value that is not finite",
    "Newton": "a network of its own, so there is no run without it to compare with",
    "OutOfMemoryReport": "an out-of-memory error",
    "PredictionTable": "predictions",
    "RankWatchdog": "a rank that hangs",
    "RunChecks": "a mistake",
}
STIRRERS = ("EMA", "GradientClipping", "Pretrained")
REASONS = (
    "has no tensor-parallel plan",
    "blocks of codes cannot be split",
    "computes the loss several times in a step, which is not possible with a pipeline",
    "steps its own optimizers (manual optimization)",
    "on each rank, which the strategy splits",
)
# they differentiate through whole parameters, and are refused where these are sharded
NEEDS_WHOLE_PARAMETERS = {"CurvatureMonitor"}


class Pixels(torch.nn.Module):
    """Image features: the pixels."""

    def forward(self, images):
        return images.flatten(1).double()


class RandomImages:
    """The optional hooks that callbacks call on a module, and a count of its steps."""

    flops_per_unit = None  # Throughput then does not measure the machine's peak
    num_starts = 0

    def training_step(self, *args):
        self.num_starts += 1
        return super().training_step(*args)

    def last_samples(self):
        return [{"text": "one", "reward": 1.0}]

    def generate_images(self, index, labels=None):
        return (index[:, None] * torch.tensor([7, 13, 29, 31]) % 32).byte().reshape(-1, 1, 2, 2)

    def get_split(self, part):
        return self.generate_images(torch.arange(16)), torch.arange(16) % 2

    def load_pretrained(self, path):
        assert path == __file__
        with torch.no_grad():
            next(iter(self.parameters())).mul_(0.5)

    def make_figures(self, datamodule):
        return {"plot": Figure(figsize=(1, 1))}


class Model(RandomImages, LanguageModel):
    """The transformer; its figures depend on the logits alone."""

    @torch.no_grad()
    def make_figures(self, datamodule):
        self.net(datamodule.corpus.tokens[None, :8].long())
        return super().make_figures(datamodule)


class Few(Model):
    """Only one norm is trained: four numbers, few enough for Newton."""

    def build_net(self):
        net = super().build_net()
        for name, parameter in net.named_parameters():
            parameter.requires_grad_(name == "blocks.0.mlp_norm.weight")
        return net


class Foreign(RandomImages):
    """Metrics have Ravine's names; inputs have full rank, else rounding decides Muon's step."""

    def log(self, name, *args, **how):
        super().log(re.sub("^(train|val)_", r"\1/", name), *args, **how)

    def generate(self, prompt, max_new_tokens):
        return prompt

    def loader(self):
        x, y = super().loader().dataset.tensors
        x = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
        return DataLoader(TensorDataset(x, y), batch_size=self.batch_size)


class InInit(Foreign, NetInInit):
    """19 numbers."""

    def __init__(self, batch_size):
        super().__init__(width=3, batch_size=batch_size)


class InConfigureModel(Foreign, NetInConfigureModel):
    """30 numbers; of two channels a norm would leave a sign, and gradients near zero."""

    def __init__(self, batch_size):
        super().__init__(width=3, depth=1, batch_size=batch_size)


class ByHand(Foreign, TwoOptimizers):
    """AdamW would make a step of full size out of the last bits of a gradient near zero."""

    def __init__(self, batch_size):
        super().__init__(width=4, batch_size=batch_size)
        for player in (self.predictor, self.critic):  # to one number: it takes no rank of two
            player.lm_head = player.pop(2)

    def configure_optimizers(self):
        players = self.predictor, self.critic
        return [torch.optim.SGD(player.parameters(), lr=0.5, momentum=0.9) for player in players]


class Text(TextDataModule):
    """A text, and pictures beside it."""

    get_split, generate_images = RandomImages.get_split, RandomImages.generate_images


class Beside(L.LightningDataModule):
    """The module's own data, and pictures beside them."""

    def __init__(self, module):
        super().__init__()
        self.module, self.get_split = module, module.get_split

    def train_dataloader(self):
        return self.module.loader()

    val_dataloader = train_dataloader


def language(names, folder, devices, **shape):
    kind, width = (Few, 4) if "Newton" in names else (Model, 8)
    shape = {"num_layers": 2, "d_model": width, "num_heads": 2, "zero_init_residual": False} | shape
    return kind(**shape), Text(folder / "text.txt", context_length=8, batch_size=8)


def foreign(kind, names, folder, devices):
    module = kind(batch_size=32 // devices)
    return module, Beside(module)


def task(number, names, folder, devices):
    text = TextDataModule(folder / "text.txt", context_length=8, batch_size=8)
    if number == 0:
        data = SpamDataModule(source="embedded", batch_size=8)
        return SpamClassifier(num_buckets=256), data
    if number == 1:
        return ImageClassifier(num_features=8, max_shift=1), ImageDataModule(batch_size=8)
    if number == 2:  # at width 8 a group is one channel, whose norm cancels the bias
        return Diffusion(
            class_conditional=True, base_channels=16, time_embed_dim=16
        ), ImageDataModule(batch_size=8)
    if number == 3:
        return LanguageModel(num_layers=1, d_model=16, num_heads=2, zero_init_residual=False), text
    prompts = PromptDataModule(
        folder / "text.txt", prompt_length=4, batch_size=8, num_val_prompts=8
    )
    rewards = [CharacterFraction("abcdefghijklm", -1.0), BatchDistance(n=1)]
    return Reinforce(str(folder / "base.ckpt"), rewards, max_new_tokens=5, group_size=2), prompts


def objective(names, folder, devices):
    """Two members of two variables, for the callbacks that need them."""
    module = Objective("quadratic", start=[2.0, 1.0], num_members=2, condition_number=4)
    return module, None  # it has its own batches


TASKS = ("SpamClassifier", "ImageClassifier", "Diffusion", "LanguageModel", "Reinforce")
FOREIGN = ("NetInInit", "NetInConfigureModel", "TwoOptimizers")
MODULES = {
    "transformer": language,
    "mixture": partial(language, num_experts=2),
    **{name: partial(task, number) for number, name in enumerate(TASKS)},
    "NetInInit": partial(foreign, InInit),
    "NetInConfigureModel": partial(foreign, InConfigureModel),
    "TwoOptimizers": partial(foreign, ByHand),
    "Objective": objective,
}


def groups(module):
    """Which callbacks are tried together."""
    if module in TASKS:
        return [()]
    if module == "Objective":
        return [(name,) for name in MEMBER_CALLBACKS]
    together = [(*WATCHERS, "OptimizerPlan"), STIRRERS]
    if module == "TwoOptimizers":  # it refuses the plan and a stirrer
        together = [WATCHERS]
    return together + [(n,) for n in CALLBACKS if not any(n in group for group in together)]


@contextmanager
def observed(names: tuple[str, ...], folder: Path) -> Iterator[dict[str, torch.Tensor]]:
    """What is written into the folder, printed, computed again and compiled, under names of it."""
    seen: dict[str, torch.Tensor] = {}
    first, again, said = os.environ.get("RANK", "0") == "0", [], io.StringIO()
    if first:
        shutil.rmtree(folder, ignore_errors=True)

    def look(*_):
        if torch._C._current_graph_task_id() >= 0:  # a forward pass within a backward pass
            again.append(True)

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    # torch.compile would compile the hook too
    hook = register_module_forward_pre_hook(look) if "Compile" not in names else None
    try:
        with redirect_stdout(said):
            yield seen
    finally:
        if hook is not None:
            hook.remove()
    assert first or not said.getvalue(), "only the first rank prints"
    found = {f"/written/{p.relative_to(folder)}" for p in folder.rglob("*.*") if p.stat().st_size}
    words = set(re.findall("[A-Za-z/]{2,}", said.getvalue()))
    words -= {"process", "rank", "shards"}  # a memory table names the strategy's parts
    words -= {"out", "proj"}  # the layers with the largest errors are those of a stage
    found |= {f"/said/{word}" for word in words}
    found |= {"/computed/again"} if again else set()
    found |= {"/compiled"} if torch._dynamo.utils.counters["stats"]["unique_graphs"] else set()
    seen |= dict.fromkeys(found if first else (), torch.ones(()))


def attempt(module, names, strategy, devices, folder):
    """The weights after two steps with these callbacks and what else came of it, or the refusal."""
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    L.seed_everything(0, verbose=False)
    callbacks = [ARGUMENTS.get(n, KINDS[n])() for n in names]
    model, data = MODULES[module](names, folder, devices)
    if not any(isinstance(c, OptimizerPlan) for c in callbacks) and model.automatic_optimization:
        callbacks.append(OptimizerPlan(partial(torch.optim.SGD, lr=0.1, momentum=0.9)))
    if strategy == "ddp" and not model.automatic_optimization:
        strategy = "ddp_find_unused_parameters_true"
    run = folder / f"{module} {strategy} {len(names)} {''.join(names[:1])}"
    trainer = L.Trainer(
        max_steps=2,
        accelerator="cpu",
        logger=False,
        callbacks=callbacks,
        default_root_dir=run,
        enable_checkpointing="Checkpoint" in names,
        enable_progress_bar="ProgressBar" in names,
        enable_model_summary=False,
        log_every_n_steps=1,
        val_check_interval=1,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        limit_val_batches=int("Compile" not in names),  # tracing doubles the time
        strategy=strategy,
        devices=devices,
    )
    try:
        with observed(names, run) as seen:
            trainer.fit(model, data)
    except ValueError as refusal:
        if getattr(model, "num_starts", 0) > 0:
            raise AssertionError(f"{names} are refused after a step") from refusal
        return str(refusal)
    logged = {n: v for n, v in trainer.callback_metrics.items() if told_alike(n)}
    return whole(model) | logged | seen  # names of all but weights have a slash


def told_alike(name):
    """Whether a metric is equal on all ranks and is not a time."""
    timed = name.endswith(("_duration_s", "_per_second"))
    return name.startswith(("val/", "update/", "train/grad", "train/clip")) and not timed


def rows(modules, *how, trying=attempt):
    """The result of `attempt` for each module and group of callbacks; a refused group is split."""
    found = {}
    for module in modules:
        for names in groups(module):
            found[module, names] = trying(module, names, *how)
            if isinstance(found[module, names], str) and len(names) > 1:
                found |= {(module, (name,)): trying(module, (name,), *how) for name in names}
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A text, and an untrained language model as the base of a policy."""
    folder = tmp_path_factory.mktemp("support")
    (folder / "text.txt").write_text("".join(python_docs_text())[:3000])
    L.seed_everything(0, verbose=False)
    model, text = task(3, (), folder, 1)
    trainer = L.Trainer(max_steps=0, accelerator="cpu", logger=False, enable_checkpointing=False,
                        enable_model_summary=False)  # fmt: skip
    trainer.fit(model, text)
    trainer.save_checkpoint(folder / "base.ckpt", weights_only=False)
    return folder


@pytest.fixture(scope="module")
def single(folder):
    """`single(module, names)`: the result on one process."""
    return cache(lambda module, names: attempt(module, names, *ALONE[1:], folder))


@pytest.fixture(scope="module")
def measure(folder, single, tmp_path_factory):
    """`measure(modules, strategy, world)`: None or the refusal, by module and callback.

    It is measured once for all workers of pytest-xdist.
    """
    known = tmp_path_factory.getbasetemp()
    known = known.parent if "PYTEST_XDIST_WORKER" in os.environ else known

    def measured(modules, strategy, world):
        file = known / f"{strategy}_{'_'.join(modules)}.json"
        if not file.exists():
            cells = look(modules, strategy, world)
            part = Path(folder, file.name)
            part.write_text(json.dumps([[*at, cell] for at, cell in cells.items()]))
            part.replace(file)
        return {(module, name): cell for module, name, cell in json.loads(file.read_text())}

    def look(modules, strategy, world):
        if world == 1:
            found = [rows(modules, trying=single)]
        else:
            found = run_ranks(rows, world, modules, strategy, world, folder, timeout=600)
        cells = {}
        for (module, names), first in found[0].items():
            each = [columns[module, names] for columns in found]
            if isinstance(first, str):
                assert {describe(refusal) for refusal in each} == {describe(first)}
                assert "\n" not in first
            else:
                compare(each, single(module, names), (strategy, module, names))
            if not isinstance(first, str) or len(names) < 2:
                cells |= {(module, name): first for name in names or (module,)}
        return {at: cell if isinstance(cell, str) else None for at, cell in cells.items()}

    return measured


def compare(each, single, what):
    """Weights and metrics of each rank equal those of one process; in a pipeline, those it has."""
    assert {n for weights in each for n in weights} == single.keys(), what
    for found in each:
        for name, value in found.items():
            torch.testing.assert_close(
                value.double(), single[name].double(), rtol=2e-6, atol=2e-6, equal_nan=True,
                msg=lambda text, n=name: f"{what}: {n}: {text}",
            )  # fmt: skip


def describe(refusal):
    """The number of the reason for a refusal, or a tick."""
    if refusal is None:
        return "✓"
    numbers = [str(i) for i, reason in enumerate(REASONS, 1) if reason in refusal]
    assert len(numbers) == 1, refusal
    return numbers[0]


def table(title, columns, rest=""):
    """Markdown: a row for each set of names whose cells are alike in all columns.

    With `rest` the row of ticks alone has this name, so that a new callback changes no row. In
    the other rows all optimizers together are not listed one by one either.
    """
    names = list(next(iter(columns.values())))
    rows_by_text = {}
    for name in names:
        cells = tuple(describe(found[name]) for found in columns.values())
        rows_by_text.setdefault(cells, []).append(name)
    head = [f"| {title} | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    written = []
    for cells, same in rows_by_text.items():
        if rest and set(cells) == {"✓"}:
            row = [rest]
        elif PLANS and set(same) >= PLANS:
            row = [*sorted(f"`{n}`" for n in {*same} - PLANS | {"OptimizerPlan"}), OPTIMIZERS]
        else:
            row = [f"`{n}`" for n in same]
        written.append((sum(c != "✓" for c in cells), row, cells))
    some = [(row, cells) for _, row, cells in sorted(written, key=lambda w: w[:2])]
    return "\n".join([*head, *(f"| {', '.join(n)} | {' | '.join(c)} |" for n, c in some)])


def of_callbacks(measure, strategy):
    experts = "ep" in STRATEGY_PRESETS.get(strategy, ("", {}))[1]
    module = "mixture" if experts else "transformer"
    found = measure((module,), strategy, WORLDS[strategy])
    return {name: found[module, name] for name in CALLBACKS}


def of_tasks(measure, strategy, world):
    found = measure(TASKS, strategy, world)
    return {name: found[name, name] for name in TASKS}


def of_any_strategy(cells):
    """The cells that sharding does not change."""
    return {at: describe(cell) for at, cell in cells.items() if at[1] not in NEEDS_WHOLE_PARAMETERS}


def of_foreign(measure, strategy, world):
    return measure(FOREIGN, strategy, world)


@pytest.mark.parametrize("strategy", WORLDS)
def test_every_callback_trains_as_on_one_process_or_is_refused(measure, strategy):
    refused = {name for name, cell in of_callbacks(measure, strategy).items() if cell}
    if strategy in ("ddp", "zero1"):
        assert not refused
    if strategy in ("zero2", "zero3", "hsdp"):
        assert refused == NEEDS_WHOLE_PARAMETERS
    if strategy in ("tp", "2d"):
        assert not refused & {"Muon", "GradientClipping", "EMA", "LoRA"}


@pytest.mark.parametrize(("strategy", "world"), [("auto", 1), ("ddp", 2), ("zero3", 2)])
def test_every_callback_trains_external_modules_as_on_one_process(measure, strategy, world):
    found = of_foreign(measure, strategy, world)
    refused = {(m, name) for (m, name), cell in found.items() if cell}
    whole_only = NEEDS_WHOLE_PARAMETERS if strategy == "zero3" else set()
    assert {m for m, name in refused if name not in whole_only} <= {"TwoOptimizers"}


@pytest.mark.parametrize(("strategy", "world"), [("ddp", 2), ("zero3", 2), ("tp", 2)])
def test_every_task_trains_as_on_one_process(measure, strategy, world):
    refused = {name for name, cell in of_tasks(measure, strategy, world).items() if cell}
    assert not refused or strategy == "tp"


@pytest.mark.parametrize("name", [name for name in CALLBACKS if name not in AWAITING])
def test_each_callback_changes_something_observable(single, name):
    alone = single("transformer", (name,)), single("transformer", ())
    rest = tuple(other for other in STIRRERS if other != name)
    together = (single("transformer", STIRRERS), single("transformer", rest))
    for found, without in (alone, together)[: 1 + (name in STIRRERS)]:
        assert found.keys() != without.keys() or furthest(found, without) > 1e-4


@pytest.mark.parametrize("name", MEMBER_CALLBACKS)
def test_a_callback_that_needs_members_has_an_effect_on_them(single, name):
    found, without = single("Objective", (name,)), single("Objective", ())
    assert not isinstance(found, str)
    assert found.keys() != without.keys() or furthest(found, without) > 1e-4


def test_callbacks_that_need_members_train_as_on_one_process(measure):
    cells = measure(("Objective",), "ddp", 2)
    assert cells == dict.fromkeys(("Objective", name) for name in MEMBER_CALLBACKS)


@pytest.mark.parametrize("module", ["transformer", *FOREIGN])
@pytest.mark.parametrize("name", sorted({*MEMBER_CALLBACKS} - {"TrajectoryPlot"}))
def test_a_callback_that_needs_members_is_refused_on_other_modules(single, module, name):
    refusal = single(module, (name,))
    assert isinstance(refusal, str)
    assert refusal.startswith(name)
    assert "allowed: Objective, Regression, a module with member_" in refusal
    assert "\n" not in refusal


@pytest.mark.parametrize("module", ["transformer", *FOREIGN])
def test_the_plot_of_a_path_leaves_training_as_it_is_or_needs_a_validation_loss(single, module):
    found, without = single(module, ("TrajectoryPlot",)), single(module, ())
    if isinstance(found, str):
        assert found.startswith("TrajectoryPlot: validation_step of ")
        assert "\n" not in found
    else:
        assert found.keys() - without.keys() == {"/written/trajectory.png"}
        assert furthest({name: found[name] for name in without}, without) == 0


def norms_of_shards():
    gradient_clipping.all_reduce = lambda *args, **how: None


def updates_of_a_stage():
    update_monitor.global_norm = lambda tensors, pipeline=None: global_norm(tensors)


def matrices_in_parts():
    muon.apply_to_full_matrices = lambda function, parts, **how: function(parts)


def faulty(fault, *how):
    fault()
    return attempt("transformer", *how)


@pytest.mark.parametrize(
    ("strategy", "names", "fault"),
    [
        ("zero3", STIRRERS, norms_of_shards),
        ("pp", ("UpdateMonitor",), updates_of_a_stage),
        ("tp", ("Muon",), matrices_in_parts),
    ],
)
def test_a_callback_that_is_wrong_under_one_strategy_is_caught(
    folder, single, strategy, names, fault
):
    found = run_ranks(faulty, 2, fault, names, strategy, 2, folder)
    with pytest.raises(AssertionError, match="not close"):
        compare(found, single("transformer", names), strategy)


def test_the_tables_of_readme_equal_the_measurement(measure):
    by_strategy = {name: of_callbacks(measure, name) for name in WORLDS}
    cells = [cell for column in by_strategy.values() for cell in column.values()]
    assert sum(cell is not None for cell in cells) <= len(cells) / 5
    layouts = (ALONE, ("ddp", "ddp", 2), ("zero3", "zero3", 2))
    by_task = {title: of_tasks(measure, *how) for title, *how in (*layouts, ("tp", "tp", 2))}
    by_module = {title: of_foreign(measure, *how) for title, *how in layouts}
    for found in by_module.values():
        assert of_any_strategy(found) == of_any_strategy(by_module["ddp"])
    by_module = {f"`{m}`": {n: by_module["ddp"][m, n] for n in CALLBACKS} for m in FOREIGN}
    measured = "\n\n".join(
        [
            table("task", by_task),
            table("callback (on the transformer)", by_strategy, EVERY_OTHER),
            table("callback (on external modules)", by_module, EVERY_OTHER),
            "\n".join(f"{i}. `{reason}`" for i, reason in enumerate(REASONS, 1)),
        ]
    )
    text = README.read_text()
    written = re.search(r"<!-- support -->\n(.*?)<!-- /support -->", text, re.DOTALL)
    assert written is not None
    if os.environ.get("WRITE_README"):
        README.write_text(text.replace(written[1], f"{measured}\n"))
        return
    assert written[1].strip() == measured
