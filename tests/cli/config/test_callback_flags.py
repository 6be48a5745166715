"""One flag changes one argument of one callback: by class, by number, or by a short form."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from parsed_config import changes, config_of

from ravine.callbacks import RankWatchdog
from ravine.cli.error_report import format_parts
from ravine.cli.main import main
from ravine.cli.trainer import DEFAULT_CALLBACKS, Trainer
from ravine.errors import UsageError

QUICK = ("fit", "--config=shakespeare/quick")  # Muon, GradientClipping, GenerateSamples
ADAMW = ("fit", "--config=shakespeare/quick_adamw")  # OptimizerPlan with AdamW
TWICE = """\
trainer:
  callbacks+:
  - {class_path: GradientClipping, init_args: {max_norm: 3.0}}
"""
RULES = """\
trainer:
  callbacks:
  - class_path: OptimizerPlan
    init_args:
      optimizer: {class_path: AdamW, init_args: {lr: 0.1, betas: [0.8, 0.9]}}
      rules:
      - {kind: hidden_matrix, optimizer: {class_path: SGD, init_args: {lr: 0.2}}}
      - {kind: rest}
"""
MUON = "trainer.callbacks.0.init_args"


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["ravine"])
    Path("twice.yaml").write_text(TWICE)
    Path("rules.yaml").write_text(RULES)


@pytest.fixture(scope="module")
def quick() -> dict[str, Any]:
    return config_of(*QUICK)


@pytest.mark.parametrize(
    ("flag", "key", "value"),
    [
        ("--trainer.callbacks.Muon.lr=0.01", f"{MUON}.lr", 0.01),
        ("--trainer.callbacks.Muon.init_args.lr=0.01", f"{MUON}.lr", 0.01),
        ("--optimizer.lr=1e-2", f"{MUON}.lr", 0.01),
        ("--optimizer.weight_decay=0.1", f"{MUON}.weight_decay", 0.1),
        (
            "--trainer.callbacks.Muon.aux_optimizer.lr=0.01",
            f"{MUON}.aux_optimizer.init_args.lr",
            0.01,
        ),
        ("--optimizer.eps=1e-6", f"{MUON}.aux_optimizer.init_args.eps", 1e-6),
        (
            "--trainer.callbacks.Muon.aux_optimizer.betas.1=0.95",
            f"{MUON}.aux_optimizer.init_args.betas.1",
            0.95,
        ),
        ("--trainer.callbacks.Muon.schedule.warmup=5", f"{MUON}.schedule.warmup", 5),
        ("--schedule.warmup=0.2", f"{MUON}.schedule.warmup", 0.2),
        ("--schedule.kind=cosine", f"{MUON}.schedule.kind", "cosine"),
        (
            "--trainer.callbacks.GradientClipping.max_norm=0.5",
            "trainer.callbacks.1.init_args.max_norm",
            0.5,
        ),
        (
            "--trainer.callbacks.GenerateSamples.arguments.max_new_tokens=7",
            "trainer.callbacks.2.init_args.arguments.max_new_tokens",
            7,
        ),
    ],
)
def test_a_flag_changes_one_value_of_the_resolved_configuration(
    quick: dict[str, Any], flag: str, key: str, value: Any
) -> None:
    changed = changes(quick, config_of(*QUICK, flag))
    assert {key: new for key, (_, new) in changed.items()} == {key: value}
    # the same as two words
    if flag.startswith("--opt"):
        assert changes(quick, config_of(*QUICK, *flag.split("="))) == changed


@pytest.mark.parametrize(
    ("flags", "position", "arguments"),
    [
        # a callback of a flag, before or after
        (["--trainer.callbacks+=EMA", "--trainer.callbacks.EMA.decay=0.9"], 3, {"decay": 0.9}),
        (["--trainer.callbacks.EMA.decay=0.9", "--trainer.callbacks+=EMA"], 3, {"decay": 0.9}),
        # a required argument
        (["--trainer.callbacks+=Pretrained", "--trainer.callbacks.Pretrained.path=a.ckpt"], 3,
         {"path": "a.ckpt"}),
        # the later flag applies, also between both forms
        (["--trainer.callbacks.Muon.lr=1", "--optimizer.lr=2"], 0, {"lr": 2.0}),
        (["--optimizer.lr=2", "--trainer.callbacks.Muon.lr=1"], 0, {"lr": 1.0}),
        (["--trainer.callbacks+=EMA", "--trainer.callbacks.EMA.decay=0.9",
          "--trainer.callbacks.decay=0.8"], 3, {"decay": 0.8}),
        (["--trainer.callbacks+=EMA", "--trainer.callbacks.decay=0.8",
          "--trainer.callbacks.EMA.decay=0.9"], 3, {"decay": 0.9}),
        # the plain form is that of the last callback
        (["--trainer.callbacks.arguments={max_new_tokens: 9}"], 2,
         {"arguments": {"max_new_tokens": 9}}),
        # numbers where a class stands twice
        (["--config=twice.yaml", "--trainer.callbacks.GradientClipping.1.max_norm=2"], 3,
         {"max_norm": 2.0}),
        (["--config=twice.yaml", "--trainer.callbacks.GradientClipping.0.max_norm=2"], 1,
         {"max_norm": 2.0}),
        # a class of an argument
        (["--trainer.callbacks.Muon.aux_optimizer=SGD",
          "--trainer.callbacks.Muon.aux_optimizer.momentum=0.5"], 0, {"momentum": 0.5}),
        # an element of a list, and a class and an argument in it
        (["--config=rules.yaml", "--trainer.callbacks.OptimizerPlan.rules.1.lr_scale=0.5"], 0,
         {"lr_scale": 0.5, "kind": "rest"}),
        (["--config=rules.yaml", "--trainer.callbacks.OptimizerPlan.rules.0.optimizer.lr=7"], 0,
         {"lr": 7.0}),
        (["--config=rules.yaml", "--trainer.callbacks+=MetricPlot",
          "--trainer.callbacks.metrics=[train/loss]",
          "--trainer.callbacks.MetricPlot.metrics+=val/loss"], 1,
         {"metrics": ["train/loss", "val/loss"]}),
    ],
)  # fmt: skip
def test_callbacks_of_configs_and_flags_are_addressed_by_class_or_number(
    flags: list[str], position: int, arguments: dict[str, Any]
) -> None:
    callbacks = config_of(*QUICK, *flags)["trainer"]["callbacks"]

    def mappings(value: Any) -> list[dict[str, Any]]:
        if isinstance(value, list | tuple):
            return [found for child in value for found in mappings(child)]
        if not isinstance(value, dict):
            return []
        return [value, *mappings(list(value.values()))]

    assert any(arguments.items() <= found.items() for found in mappings(callbacks[position])), (
        callbacks
    )


def test_a_short_form_is_printed_in_full(capsys: pytest.CaptureFixture[str]) -> None:
    config_of(*QUICK, "--optimizer.lr=0.01", "--schedule.warmup=3")
    config_of(*ADAMW, "--optimizer.lr=0.01")
    assert capsys.readouterr().out.splitlines() == [
        "optimizer.lr: --trainer.callbacks.Muon.lr=0.01",
        "schedule.warmup: --trainer.callbacks.Muon.schedule.warmup=3",
        "optimizer.lr: --trainer.callbacks.OptimizerPlan.optimizer.lr=0.01",
    ]


SHAPE = {"kind": "linear", "warmup": 50}  # the schedule of the preset
PLAN = "ravine.callbacks.OptimizerPlan"
OWN = "import torch\nclass Own(torch.optim.SGD): pass\n"


@pytest.mark.parametrize(
    ("preset", "flags", "callback", "optimizer", "settings", "lines"),
    [
        # lr is set in the preset and stays; betas do not fit; the rest is the default of SGD
        (ADAMW, ["--optimizer=SGD"], PLAN, "torch.optim.SGD", {"lr": 0.005, "weight_decay": 0},
         ["optimizer: --trainer.callbacks.OptimizerPlan.optimizer=SGD",
          "SGD replaces AdamW; kept: lr=0.005, weight_decay=0.0, "
          "schedule=(kind=linear, warmup=50); "
          "lost: betas=[0.9, 0.99]"]),
        # the same by the flag that is printed
        (ADAMW, ["--trainer.callbacks.OptimizerPlan.optimizer=SGD"], PLAN, "torch.optim.SGD",
         {"lr": 0.005, "weight_decay": 0}, ["SGD replaces AdamW"]),
        (ADAMW, ["--optimizer=torch.optim.RMSprop", "--optimizer.lr=1", "--schedule.warmup=50"],
         PLAN, "torch.optim.RMSprop", {"lr": 1.0}, ["optimizer.lr: "]),
        (ADAMW, ["--optimizer=own_file.Own"], PLAN, "own_file.Own", {"lr": 0.005}, []),
        # another callback takes the place of Muon, and keeps its schedule
        (QUICK, ["--optimizer=Adam"], PLAN, "torch.optim.Adam", {"lr": 0.001},
         ["optimizer: --trainer.callbacks+=OptimizerPlan --trainer.callbacks.optimizer=Adam "
          "--trainer.callbacks.schedule='{\"kind\": \"linear\", \"warmup\": 50}'",
          "Adam replaces Muon; kept: schedule=(kind=linear, warmup=50); "
          "lost: lr=0.03, aux_optimizer=AdamW(lr=0.005, betas=[0.9, 0.99], weight_decay=0.0)"]),
        (ADAMW, ["--optimizer=Muon"], "ravine.callbacks.Muon", None, {}, ["Muon replaces "]),
    ],
)  # fmt: skip
def test_one_flag_gives_another_optimizer_and_says_what_is_kept(
    preset: tuple[str, str],
    flags: list[str],
    callback: str,
    optimizer: str | None,
    settings: dict[str, float],
    lines: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Path("own_file.py").write_text(OWN)
    monkeypatch.syspath_prepend(".")
    before = config_of(*preset)["trainer"]["callbacks"]
    capsys.readouterr()
    callbacks = config_of(*preset, *flags)["trainer"]["callbacks"]
    said = capsys.readouterr().out
    assert len(callbacks) == len(before)
    assert callbacks[1:] == before[1:]
    assert callbacks[0]["class_path"] == callback
    arguments = callbacks[0]["init_args"]
    assert SHAPE.items() <= dict(arguments["schedule"]).items()
    if optimizer is not None:
        assert arguments["optimizer"]["class_path"] == optimizer
        assert settings.items() <= arguments["optimizer"]["init_args"].items()
    assert all(line in said for line in lines), said


def test_a_run_without_a_plan_gets_one_by_the_flag(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["fit", "--model=LanguageModel", "--data=TextDataModule"]
    (callback,) = config_of(*words, "--optimizer=SGD", "--optimizer.lr=0.5")["trainer"]["callbacks"]
    assert callback["init_args"]["optimizer"]["init_args"]["lr"] == 0.5
    assert capsys.readouterr().out.splitlines()[:2] == [
        "optimizer: --trainer.callbacks+=OptimizerPlan --trainer.callbacks.optimizer=SGD",
        "SGD replaces the optimizer of LanguageModel",
    ]


def test_the_short_form_addresses_the_last_plan_which_trains(
    capsys: pytest.CaptureFixture[str],
) -> None:
    added = ["--trainer.callbacks+=OptimizerPlan", "--trainer.callbacks.optimizer=AdamW"]
    before = config_of(*QUICK, *added)
    changed = changes(before, config_of(*QUICK, *added, "--optimizer.lr=0.5"))
    key = "trainer.callbacks.3.init_args.optimizer.init_args.lr"
    assert changed == {key: (0.001, 0.5)}
    said = capsys.readouterr().out
    assert "optimizer.lr: --trainer.callbacks.OptimizerPlan.optimizer.lr=0.5\n" in said
    config_of(*QUICK, "--trainer.callbacks+=Muon", "--optimizer.lr=0.5", "--schedule.warmup=3")
    said = capsys.readouterr().out
    assert "optimizer.lr: --trainer.callbacks.Muon.1.lr=0.5\n" in said
    assert "schedule.warmup: --trainer.callbacks.Muon.1.schedule.warmup=3\n" in said


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("Checkpoint.save_top_k", 3),
        ("ProgressBar.refresh_rate", 2),
        ("ExactResume.accept", ["data"]),
        ("RankWatchdog.limit_s", 20.0),
    ],
)
def test_a_callback_that_the_trainer_adds_itself_is_addressed_by_its_class(
    flag: str, value: Any
) -> None:
    name, _, key = flag.partition(".")
    assert name in {cls.__name__ for cls in DEFAULT_CALLBACKS}
    *others, added = config_of(*QUICK, f"--trainer.callbacks.{flag}={value}")["trainer"][
        "callbacks"
    ]
    assert len(others) == 3
    assert added["class_path"].rpartition(".")[2] == name
    assert added["init_args"][key] == value


def test_the_list_of_default_callbacks_is_that_of_the_trainer() -> None:
    added = {type(callback) for callback in Trainer(logger=True).callbacks}  # type: ignore
    assert added | {RankWatchdog} == {*DEFAULT_CALLBACKS}


# `flags`, and the lines of the answer, in blocks
_, *BLOCKS = Path(__file__).with_name("callback_flag_errors.txt").read_text().split("\n\n")
ERRORS = [block.strip().removeprefix("$ ").splitlines() for block in BLOCKS]


UNTYPED_OPTIMIZER = """
import torch

class Untyped(torch.optim.SGD):
    def __init__(self, params, lr: float = 1e-3):
        super().__init__(params, lr)
"""


def test_an_optimizer_without_a_type_of_its_parameters_is_addressed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "untyped_optimizer.py").write_text(UNTYPED_OPTIMIZER)
    monkeypatch.syspath_prepend(str(tmp_path))
    plan = "--trainer.callbacks=OptimizerPlan"
    words = [plan, "--trainer.callbacks.optimizer=untyped_optimizer.Untyped", "--optimizer.lr=0.5"]
    config = config_of("fit", "--config", "shakespeare/quick_adamw", *words)
    (callback,) = config["trainer"]["callbacks"]
    assert callback["init_args"]["optimizer"]["init_args"]["lr"] == 0.5


@pytest.mark.parametrize("block", ERRORS, ids=lambda block: block[0])
def test_a_wrong_flag_is_answered_with_one_that_works(block: list[str]) -> None:
    flags, *lines = block
    typed = [*QUICK, *shlex.split(flags)]
    with pytest.raises(UsageError) as raised:
        config_of(*typed)
    said = format_parts(raised.value).splitlines()
    assert said == lines
    # what it says can be typed in the place of the wrong flag, and is accepted
    suggestion = lines[-1].removeprefix("  type: ").partition(", or")[0]
    if suggestion.startswith("--") and "VALUE" not in suggestion:
        assert config_of(*typed[:-1], *shlex.split(suggestion))


def test_print_config_shows_the_changed_value(capsys: pytest.CaptureFixture[str]) -> None:
    def printed(*flags: str) -> str:
        assert main([*QUICK, *flags, "--print_config"]) == 0
        return capsys.readouterr().out

    before, after = printed(), printed("--trainer.callbacks.Muon.aux_optimizer.lr=0.25")
    assert changes(yaml.safe_load(before), yaml.safe_load(after)) == {
        f"{MUON}.aux_optimizer.init_args.lr": (0.005, 0.25)
    }


def test_a_line_names_what_a_flag_drops(capsys: pytest.CaptureFixture[str]) -> None:
    config_of(*QUICK, "--trainer.callbacks=EMA")
    config_of(*QUICK, "--trainer.callbacks=OptimizerPlan", "--trainer.callbacks.optimizer=SGD")
    config_of(*QUICK, "--config=rules.yaml")
    config_of(*QUICK, "--trainer.callbacks+=Muon", "--trainer.callbacks.lr=0.1")
    config_of(*QUICK, "--trainer.callbacks+=EMA", "--trainer.callbacks.decay=0.1")
    dropped = "drops the callbacks Muon, GradientClipping, GenerateSamples"
    assert capsys.readouterr().out.splitlines() == [
        f"--trainer.callbacks=EMA {dropped}; --trainer.callbacks+=EMA would keep them; "
        "TaskModule.configure_optimizers now gives the optimizer",
        f"--trainer.callbacks=OptimizerPlan {dropped}; --trainer.callbacks+=OptimizerPlan would "
        "keep them; OptimizerPlan now gives the optimizer",
        f"rules.yaml {dropped}; OptimizerPlan now gives the optimizer",
        "to keep the other arguments of the Muon that is there: --trainer.callbacks.Muon.lr=0.1",
    ]


def test_the_callbacks_of_a_checkpoint_are_addressed(capsys: pytest.CaptureFixture[str]) -> None:
    """Also those of a run without an optimizer callback, whose own optimizer is named."""
    tiny = [
        "--config=spam/lecture0",
        "--trainer.max_steps=2",
        "--trainer.enable_progress_bar=false",
    ]
    assert main(["fit", *tiny, "--optimizer.lr=0.5", "--trainer.callbacks+=EMA"]) == 0
    saved = "--ckpt_path=runs/spam/lecture0/version_0/checkpoints/step=000002.ckpt"
    more = ["fit", saved, "--trainer.max_steps=3"]
    before = config_of(*more)
    capsys.readouterr()
    after = config_of(*more, "--optimizer.lr=0.25", "--trainer.callbacks.EMA.decay=0.5")
    assert changes(before, after) == {
        "trainer.callbacks.0.init_args.optimizer.init_args.lr": (0.5, 0.25),
        "trainer.callbacks.1.init_args.decay": (0.999, 0.5),
    }
    said = capsys.readouterr().out
    assert "optimizer.lr: --trainer.callbacks.OptimizerPlan.optimizer.lr=0.25\n" in said
    key = "trainer.callbacks.OptimizerPlan.optimizer.lr"
    assert f"{key} is 0.25 here and 0.5 in the checkpoint: 0.25 is used\n" in said
    with pytest.raises(UsageError, match="test trains nothing"):
        config_of("test", saved, "--optimizer.lr=1")
    assert main(["fit", *tiny, "--trainer.callbacks=EMA"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"\noptimizer: \w+ with lr [\d.]+, from \w+\.configure_optimizers\n", said)
