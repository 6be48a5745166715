"""The table of usage errors: each has the location, the wrong word, the names and the flag.

The words are asserted to the letter, since the parser's own types and texts stand behind them and
are no promise of its authors: a new version of it that changes an answer must show here.
"""

import sys
from pathlib import Path

import pytest

from ravine.cli.main import main

MODEL = ["fit", "--model=LanguageModel"]
PLAN = """\
model: LanguageModel
trainer:
  callbacks:
  - class_path: OptimizerPlan
    init_args:
      optimizer:
        class_path: {}
        init_args: {{{}: 0.1}}
      schedule: {{{}}}
"""

# what is wrong: the words, the text of run.yaml (put in as a config where there is one), the answer
TABLE: dict[str, tuple[list[str], str, list[str]]] = {
    "a command": (
        ["fitt", "--model=LanguageModel"],
        "",
        [
            "no command is called 'fitt'",
            "  nearest: fit",
            "  type: ravine fit --model=LanguageModel",
        ],
    ),
    "what the constructor of a single callback refuses": (
        [*MODEL, "--data=TextDataModule", "--trainer.callbacks=OptimizerPlan"],
        "",
        [
            "OptimizerPlan needs an optimizer or rules",
            "  type: --optimizer=AdamW",
        ],
    ),
    "a preset": (
        ["fit", "--config=rum"],
        "",
        [
            "no config is called 'rum': no such file, none with .yaml, and no preset",
            "  nearest: run",
            "  type: --config=run",
        ],
    ),
    "a config that is not YAML": (
        ["fit"],
        "trainer:\n\tmax_steps: 1\n",
        [
            "in run.yaml, line 2: not YAML: found character '\\t' that cannot start any token",
            "  type:   max_steps: 1",
        ],
    ),
    "a kind of parameter in callbacks+": (
        MODEL,
        "trainer:\n  callbacks+:\n  - class_path: OptimizerPlan\n    init_args:\n      rules:\n"
        "      - kind: hiden_matrix\n",
        [
            "in run.yaml, line 6, trainer.callbacks+.0.init_args.rules.0.kind: kind cannot be "
            "'hiden_matrix'",
            "  nearest: hidden_matrix",
            "  type: kind: hidden_matrix",
        ],
    ),
    "a config without a word": (
        ["fit"],
        "# model: LanguageModel\n",
        [
            "run.yaml is empty, but a config maps keys to values",
            "  allowed: model, data, trainer, seed_everything, ckpt_path",
            "  type: model: LanguageModel",
        ],
    ),
    "a config that can be read once": (
        ["fit", "--config=/dev/fd/63"],
        "",
        [
            "/dev/fd/63 can be read only once, but every process of a run reads the configs",
            "  allowed: a file",
            "  type: --config=run.yaml",
        ],
    ),
    "a list instead of arguments": (
        ["fit"],
        "model: LanguageModel\ntrainer: [1]\n",
        [
            "in run.yaml, line 2: 'trainer' must map arguments to values",
            "  type: trainer: {max_steps: 100}",
        ],
    ),
    "a list instead of a class": (
        ["fit"],
        "model: [LanguageModel]\n",
        [
            "in run.yaml, line 1, model: model cannot be [LanguageModel]",
            "  allowed: LightningModule, null",
            "  type: model: LanguageModel",
        ],
    ),
    "a list instead of a mapping": (
        ["fit"],
        "- model: LanguageModel\n",
        [
            "run.yaml is a list, but a config maps keys to values",
            "  allowed: model, data, trainer, seed_everything, ckpt_path",
            "  type: model: LanguageModel",
        ],
    ),
    "a section given twice": (
        ["fit"],
        "trainer: {max_steps: 1}\nmodel: LanguageModel\ntrainer: {devices: 1}\n",
        [
            "in run.yaml, line 3: 'trainer' is already in line 1",
            "  allowed: each key once",
            "  join both under one 'trainer'",
        ],
    ),
    "the model, on the command line": (
        ["fit", "--model=LangageModel"],
        "",
        [
            "on the command line, --model: no LightningModule is called 'LangageModel'",
            "  nearest: LanguageModel",
            "  type: --model=LanguageModel",
        ],
    ),
    "no value, where the class is named": (
        [*MODEL, "--model.d_model="],
        "",
        [
            "on the command line, --model.d_model: d_model cannot be ''",
            "  allowed: a whole number",
            "  type: --model.d_model=128",
        ],
    ),
    "the model, in a file": (
        ["fit"],
        "# a comment\nmodel:\n  class_path: LangageModel\n",
        [
            "in run.yaml, line 3, model.class_path: no LightningModule is called 'LangageModel'",
            "  nearest: LanguageModel",
            "  type: class_path: LanguageModel",
        ],
    ),
    "no model": (
        ["fit", "--trainer.max_steps=1"],
        "",
        ["no model was given", "  type: ravine fit --config shakespeare/quick"],
    ),
    "no checkpoint": (
        ["test", "--trainer.devices=1"],
        "",
        ["no model was given", "  type: ravine test --ckpt_path=last"],
    ),
    "arguments of no class": (
        ["fit"],
        "model:\n  init_args: {num_layers: 2}\n",
        ["in run.yaml, line 1, model: class_path is missing", "  type: class_path: LanguageModel"],
    ),
    "arguments beside init_args": (
        ["fit"],
        "model:\n  class_path: LanguageModel\n  num_layers: 2\n",
        [
            "in run.yaml, line 3, model.num_layers: arguments of a class belong under init_args",
            "  allowed: class_path, init_args, dict_kwargs",
            "  type: init_args: {num_layers: 2}",
        ],
    ),
    "the data": (
        [*MODEL, "--data", "TextDatamodul"],
        "",
        [
            "on the command line, --data: no LightningDataModule is called 'TextDatamodul'",
            "  nearest: TextDataModule",
            "  type: --data=TextDataModule",
        ],
    ),
    "a callback": (
        [*MODEL, "--trainer.callbacks+=EarlyStoping"],
        "",
        [
            "on the command line, --trainer.callbacks+: no Callback is called 'EarlyStoping'",
            "  nearest: EarlyStopping",
            "  type: --trainer.callbacks+=EarlyStopping",
        ],
    ),
    "an optimizer inside a callback": (
        ["fit"],
        PLAN.format("AdamW2", "lr", "kind: linear"),
        [
            "in run.yaml, line 7, trainer.callbacks.0.init_args.optimizer.class_path: "
            "no Optimizer is called 'AdamW2'",
            "  nearest: AdamW, Adam",
            "  type: class_path: AdamW",
        ],
    ),
    "an argument of the model": (
        [*MODEL, "--model.layrs=3"],
        "",
        [
            "on the command line, --model.layrs: LanguageModel has no argument 'layrs'",
            "  nearest: num_layers",
            "  type: --model.num_layers=3",
        ],
    ),
    "an argument of the optimizer inside a callback": (
        ["fit"],
        PLAN.format("AdamW", "lrr", "kind: linear"),
        [
            "in run.yaml, line 8, trainer.callbacks.0.init_args.optimizer.init_args.lrr: "
            "AdamW has no argument 'lrr'",
            "  nearest: lr",
            "  type: lr: 0.1",
        ],
    ),
    "the same in flags": (
        [
            *MODEL,
            "--trainer.callbacks+=OptimizerPlan",
            "--trainer.callbacks.optimizer=AdamW",
            "--trainer.callbacks.optimizer.lrr=0.1",
        ],
        "",
        [
            "on the command line, --trainer.callbacks.optimizer.lrr: AdamW has no argument 'lrr'",
            "  nearest: lr",
            "  type: --trainer.callbacks.optimizer.lr=0.1",
        ],
    ),
    "a choice inside a record inside a callback": (
        ["fit"],
        PLAN.format("AdamW", "lr", "kind: liner"),
        [
            "in run.yaml, line 9, trainer.callbacks.0.init_args.schedule.kind: "
            "kind cannot be 'liner'",
            "  nearest: linear",
            "  type: kind: linear",
        ],
    ),
    "a section": (
        ["fit"],
        "model: LanguageModel\ntrianer:\n  max_steps: 1\n",
        [
            "in run.yaml, line 2, trianer: fit has no argument 'trianer'",
            "  nearest: trainer",
            "  type: trainer:",
        ],
    ),
    "a key of the trainer, cut short": (
        [*MODEL, "--trainer.max_step", "3"],
        "",
        [
            "on the command line, --trainer.max_step: trainer has no argument 'max_step'",
            "  nearest: max_steps",
            "  type: --trainer.max_steps=3",
        ],
    ),
    "a number": (
        ["fit"],
        "model: LanguageModel\ntrainer:\n  max_steps: many\n",
        [
            "in run.yaml, line 3, trainer.max_steps: max_steps cannot be 'many'",
            "  allowed: a whole number",
            "  type: max_steps: 10",
        ],
    ),
    "a value left out": (
        [*MODEL, "--trainer.max_steps"],
        "",
        [
            "on the command line, --trainer.max_steps: the value is missing",
            "  allowed: a whole number",
            "  type: --trainer.max_steps=10",
        ],
    ),
    "a word without a flag": (
        [*MODEL, "10"],
        "",
        [
            "on the command line, 10: a value without a flag",
            "  type: ravine fit --model=LanguageModel",
        ],
    ),
    "the precision": (
        [*MODEL, "--trainer.precision=bf16-mixd"],
        "",
        [
            "on the command line, --trainer.precision: no precision is called 'bf16-mixd'",
            "  nearest: bf16-mixed, 16-mixed",
            "  type: --trainer.precision=bf16-mixed",
        ],
    ),
    "the strategy": (
        ["fit"],
        "model: LanguageModel\ntrainer:\n  strategy: zero_3\n",
        [
            "in run.yaml, line 3, trainer.strategy: no strategy is called 'zero_3'",
            "  nearest: zero3",
            "  type: strategy: zero3",
        ],
    ),
    "an argument of a strategy's name": (
        [*MODEL, "--trainer.strategy=zero3", "--trainer.strategy.dp_shrd=2"],
        "",
        [
            "on the command line, --trainer.strategy.dp_shrd: MeshStrategy has no argument "
            "'dp_shrd'",
            "  nearest: dp_shard",
            "  type: --trainer.strategy.dp_shard=2",
        ],
    ),
    "an argument of no strategy": (
        [*MODEL, "--trainer.strategy.tp=2"],
        "",
        [
            "on the command line, --trainer.strategy.tp: no class is given that has this argument",
            "  type: --trainer.strategy=MeshStrategy --trainer.strategy.tp=2",
        ],
    ),
    "an argument of Lightning's strategies": (
        [*MODEL, "--trainer.strategy=ddp", "--trainer.strategy.zero_stage=1"],
        "",
        [
            "on the command line, --trainer.strategy.zero_stage: no class is given that has this "
            "argument",
            "  type: --trainer.strategy=MeshStrategy --trainer.strategy.zero_stage=1",
        ],
    ),
    "a name after an argument of it": (
        [*MODEL, "--trainer.strategy.min_unit_byts=2", "--trainer.strategy", "zero3"],
        "",
        [
            "on the command line, --trainer.strategy.min_unit_byts: MeshStrategy has no argument "
            "'min_unit_byts'",
            "  nearest: min_unit_bytes",
            "  type: --trainer.strategy.min_unit_bytes=2",
        ],
    ),
    "an argument of ddp": (
        [*MODEL, "--trainer.strategy=ddp", "--trainer.strategy.gradient_as_bucket_vew=false"],
        "",
        [
            "on the command line, --trainer.strategy.gradient_as_bucket_vew: DataParallelStrategy "
            "has no argument 'gradient_as_bucket_vew'",
            "  nearest: gradient_as_bucket_view",
            "  type: --trainer.strategy.gradient_as_bucket_view=false",
        ],
    ),
    "what the constructor of a strategy refuses": (
        [*MODEL, "--trainer.strategy=pp", "--trainer.strategy.num_microbatches=0"],
        "",
        [
            "num_microbatches is 0",
            "  allowed: 1 or more",
            "  type: --trainer.strategy.num_microbatches=4",
        ],
    ),
    "a value of a strategy's argument": (
        [*MODEL, "--trainer.strategy=MeshStrategy", "--trainer.strategy.pipeline_schedule=1f2b"],
        "",
        [
            "on the command line, --trainer.strategy.pipeline_schedule: pipeline_schedule cannot "
            "be '1f2b'",
            "  nearest: 1f1b",
            "  type: --trainer.strategy.pipeline_schedule=1f1b",
        ],
    ),
    "the class of a strategy": (
        [*MODEL, "--trainer.strategy=MeshStrategi"],
        "",
        [
            "on the command line, --trainer.strategy: no strategy is called 'MeshStrategi'",
            "  nearest: MeshStrategy",
            "  type: --trainer.strategy=MeshStrategy",
        ],
    ),
    "the accelerator": (
        [*MODEL, "--trainer.accelerator=gpuu"],
        "",
        [
            "on the command line, --trainer.accelerator: no accelerator is called 'gpuu'",
            "  nearest: gpu",
            "  type: --trainer.accelerator=gpu",
        ],
    ),
    "a checkpoint": (
        ["test", "--ckpt_path=lst"],
        "",
        ["no checkpoint is called 'lst'", "  nearest: last", "  type: --ckpt_path=last"],
    ),
    "a module of the user's": (
        ["fit", "--model=my_tsk.MyTask"],
        "",
        [
            "on the command line, --model: no module is called 'my_tsk', "
            "in this folder or among the installed packages",
            "  nearest: my_task",
            "  type: --model=my_task.MyTask",
        ],
    ),
    "a class of the user's": (
        ["fit", "--model=my_task.MyTsk"],
        "",
        [
            "on the command line, --model: my_task has no LightningModule called 'MyTsk'",
            "  nearest: MyTask",
            "  type: --model=my_task.MyTask",
        ],
    ),
    "data for a model": (
        ["fit", "--model=my_task.MyTaskData"],
        "",
        [
            "on the command line, --model: my_task.MyTaskData is not a LightningModule",
            "  nearest: MyTask",
            "  type: --model=my_task.MyTask",
        ],
    ),
    "a module of the user's that fails": (
        ["fit", "--model=fails.MyTask"],
        "",
        [
            "on the command line, --model: the import of fails raises ZeroDivisionError: "
            "division by zero",
            '  type: python -c "import fails"',
        ],
    ),
    "an argument that must be given": (
        ["fit", "--model=my_task.MyTask"],
        "",
        ["MyTask needs 'width'", "  type: --model.width=10"],
    ),
}
VARIABLES = {
    "PL_TRAINER__MAX_STEPS": [
        "no environment variable is called PL_TRAINER__MAX_STEPS",
        "  nearest: PL_FIT__TRAINER__MAX_STEPS",
        "  type: export PL_FIT__TRAINER__MAX_STEPS=many",
    ],
    "PL_FIT__TRAINER__MAX_STEPS": [
        "in the environment, PL_FIT__TRAINER__MAX_STEPS: max_steps cannot be 'many'",
        "  allowed: a whole number",
        "  type: export PL_FIT__TRAINER__MAX_STEPS=10",
    ],
    "PL_FIT__TRAINER__MAX_STEPZ": [
        "in the environment, PL_FIT__TRAINER__MAX_STEPZ: trainer has no argument 'max_stepz'",
        "  nearest: max_steps",
        "  type: export PL_FIT__TRAINER__MAX_STEPS=many",
    ],
    "PL_FIT__MODEL__NUM_LAYERS": [
        "in the environment, PL_FIT__MODEL__NUM_LAYERS: no variable can set an argument of a class",
        "  type: --model.num_layers=many",
    ],
}
MY_TASK = """\
import lightning

class MyTask(lightning.LightningModule):
    def __init__(self, width: int):
        super().__init__()

class MyTaskData(lightning.LightningDataModule):
    pass
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's own: an empty config, a task, and a file that cannot be imported."""
    (tmp_path / "run.yaml").write_text("model: LanguageModel\n")
    (tmp_path / "my_task.py").write_text(MY_TASK)
    (tmp_path / "fails.py").write_text("1 / 0\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["ravine"])
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "my_task", raising=False)
    return tmp_path


@pytest.mark.parametrize("mistake", TABLE)
def test_a_usage_error_has_problem_allowed_values_and_fix(
    mistake: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words, text, answer = TABLE[mistake]
    if text:
        (folder / "run.yaml").write_text(text)
        words = [*words, "--config=run.yaml"]
    assert main(words) == 2
    assert capsys.readouterr().err == "ravine: error: " + "\n".join(answer) + "\n"


@pytest.mark.parametrize("name", VARIABLES)
def test_an_environment_variable_has_the_same_errors(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "many")
    assert main(MODEL) == 2
    assert capsys.readouterr().err == "ravine: error: " + "\n".join(VARIABLES[name]) + "\n"


def test_a_config_that_is_not_text_is_refused(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "run.yaml").write_bytes("model: Größe".encode("latin-1"))
    assert main(["fit", "--config=run.yaml"]) == 2
    assert capsys.readouterr().err == (
        "ravine: error: run.yaml is not text: byte 9 is not UTF-8\n  save the file as UTF-8\n"
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "a: &b [*b]",
            "run.yaml is YAML with values that are not plain: Circular reference detected",
        ),
        ("? [a, b]\n: 3", "in run.yaml, line 1: not YAML: found unhashable key"),
        ("model: !!python/object/apply:os.getcwd []", "not YAML: could not determine"),
    ],
)
def test_yaml_with_values_that_are_not_plain_is_refused(
    folder: Path, capsys: pytest.CaptureFixture[str], text: str, said: str
) -> None:
    (folder / "run.yaml").write_text(text)
    assert main(["fit", "--config=run.yaml"]) == 2
    assert said in capsys.readouterr().err


def test_the_suggested_flags_lead_to_a_valid_command(capsys: pytest.CaptureFixture[str]) -> None:
    """Typed as told, one mistake after the other, a command comes to run."""
    words = ["fitt", "--modl=LangageModel", "--modl.layrs=3", "--trainer.max_step=1"]
    for _ in range(10):
        if main([*words, "--print_config"]) == 0:
            break
        said, *_, hint = capsys.readouterr().err.splitlines()
        hint = hint.removeprefix("  type: ")
        if hint.startswith("ravine "):
            words = hint.split()[1:-1]
        else:
            flag = said.removeprefix("ravine: error: on the command line, ").split(":")[0]
            words = [hint if word.startswith(f"{flag}=") else word for word in words]
    assert words == [
        "fit",
        "--model=LanguageModel",
        "--model.num_layers=3",
        "--trainer.max_steps=1",
    ]
    assert "num_layers: 3" in capsys.readouterr().out


def test_callbacks_that_a_later_config_would_drop_are_refused(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("more.yaml").write_text("trainer:\n  callbacks+:\n  - class_path: EMA\n")
    Path("run.yaml").write_text("model: LanguageModel\ntrainer:\n  callbacks: []\n")
    assert main(["fit", "--config=more.yaml", "--config=run.yaml"]) == 2
    hint = capsys.readouterr().err
    assert "more.yaml adds to trainer.callbacks, but run.yaml after it replaces them" in hint
    assert "type: --config run.yaml --config more.yaml" in hint


def test_a_function_in_place_of_an_optimizer_needs_a_return_type(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "own_optimizers.py").write_text(
        "import torch\n\nclass Own(torch.optim.SGD):\n    pass\n\n"
        "def make(params, lr=0.1):\n    return Own(params, lr=lr)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    argv = ["lightning", "fit", "--config", "spam", "--optimizer=own_optimizers.make"]
    monkeypatch.setattr(sys, "argv", argv)
    assert main(argv[1:]) == 2
    error = capsys.readouterr().err
    assert "make is a function without the return type Optimizer" in error
    assert "type: --optimizer=own_optimizers.Own" in error
