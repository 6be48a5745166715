"""A fit that is given a checkpoint alone, and the command that a run prints for it."""

import json
import os
import shlex
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import numpy
import pytest
import torch
import yaml
from PIL import Image
from token_pieces import from_merges

from ravine.cli.config.trainer_arguments import (
    DRY_RUN_ARGS,
    LENGTH_ARGS,
    MACHINE_ARGS,
    OUTPUT_ARGS,
    TRAINING_ARGS,
    is_restorable,
)
from ravine.cli.main import main

BASE = """
model: {class_path: external_modules.net_in_init.NetInInit, init_args: {width: 8}}
trainer: {accelerator: cpu, max_steps: 4, enable_model_summary: false}
"""
TEXT = """
model:
  class_path: LanguageModel
  init_args: {num_layers: 1, d_model: 16, num_heads: 2}
data: {class_path: TextDataModule, init_args: {path: poem.txt, context_length: 8, batch_size: 4}}
trainer:
  accelerator: cpu
  max_steps: 4
  enable_model_summary: false
  callbacks:
  - class_path: OptimizerPlan
    init_args: {optimizer: {class_path: SGD, init_args: {lr: 0.1}}, schedule: {kind: linear}}
  - class_path: GradientClipping
"""
POEM = "so much depends upon a red wheel barrow glazed with rain water\n" * 12
TRUST = "--trust=external_modules"  # only the checkpoint names the module


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["ravine"])
    Path("base.yaml").write_text(BASE)
    Path("text.yaml").write_text(TEXT)
    Path("poem.txt").write_text(POEM)


def newest(name: str = "text", version: int = 0) -> Path:
    files = Path("runs", name, f"version_{version}", "checkpoints").iterdir()
    return max(files, key=lambda p: p.stat().st_mtime_ns)


def config(name: str = "text", version: int = 0) -> dict[str, Any]:
    return yaml.safe_load(Path("runs", name, f"version_{version}", "config.yaml").read_text())


def callbacks(name: str = "text", version: int = 0) -> list[str]:
    specs = config(name, version)["trainer"]["callbacks"] or []
    return [spec["class_path"].rpartition(".")[2] for spec in specs]


def command(name: str = "text", version: int = 0) -> list[str]:
    """The words of the command in the folder of a run, without the program."""
    line = Path("runs", name, f"version_{version}", "command.txt").read_text().splitlines()[-1]
    return shlex.split(line)[1:]


def saved(path: Path) -> tuple[Any, ...]:
    checkpoint = torch.load(path, weights_only=True)
    return checkpoint["state_dict"], checkpoint["optimizer_states"], checkpoint["lr_schedulers"]


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other


@pytest.fixture
def trained(capsys: pytest.CaptureFixture[str]) -> Path:
    """The checkpoint of a run that ended at step 4."""
    assert main(["fit", "--config=text"]) == 0
    capsys.readouterr()
    return newest()


def test_each_argument_of_the_trainer_is_restored_or_of_the_machine(trained: Path) -> None:
    groups = (*LENGTH_ARGS, *TRAINING_ARGS, *OUTPUT_ARGS, *MACHINE_ARGS, *DRY_RUN_ARGS)
    assert len(groups) == len({*groups})
    assert {*config()["trainer"]} == {*groups, "name", "callbacks"}


OTHER_VALUES = {
    "accumulate_grad_batches": 2,
    "check_val_every_n_epoch": None,
    "detect_anomaly": True,
    "deterministic": True,
    "enable_autolog_hparams": False,
    "enable_progress_bar": False,
    "gradient_clip_algorithm": "norm",
    "inference_mode": False,
    "limit_predict_batches": 3,
    "limit_test_batches": 3,
    "limit_train_batches": 9,
    "limit_val_batches": 0.5,
    "log_every_n_steps": 2,
    "logger": ["csv"],
    "max_epochs": 3,
    "max_time": "00:01:00:00",
    "min_steps": 2,
    "num_sanity_val_steps": 1,
    "precision": "64-true",
    "profiler": "simple",
    "reload_dataloaders_every_n_epochs": 1,
    "sync_batchnorm": True,
    "use_distributed_sampler": False,
    "val_check_interval": 3,
}


def test_all_arguments_that_are_not_of_the_machine_come_back(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = [f"--trainer.{key}={json.dumps(value)}" for key, value in OTHER_VALUES.items()]
    words = [word.replace('"', "") for word in words]
    assert main(["fit", "--config=base", *words]) == 0
    before = config("base")["trainer"]
    assert {key: before[key] for key in OTHER_VALUES} == OTHER_VALUES
    capsys.readouterr()
    assert main([*command("base")[:3], TRUST, "--trainer.accelerator=cpu"]) == 0
    assert "is used" not in capsys.readouterr().out
    assert config("base")["trainer"] == before


def test_a_typed_argument_wins_and_each_difference_is_printed(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--trainer.max_steps=6", "--data.batch_size=8", "--trainer.log_every_n_steps=7"]
    assert main(["fit", f"--ckpt_path={trained}", *words]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.endswith("is used")] == [
        "data.batch_size is 8 here and 4 in the checkpoint: 8 is used",
        "trainer.log_every_n_steps is 7 here and 50 in the checkpoint: 7 is used",
        "trainer.max_steps is 6 here and 4 in the checkpoint: 6 is used",
    ]
    assert "callbacks of the checkpoint: OptimizerPlan, GradientClipping" in lines
    assert torch.load(newest(version=1), weights_only=True)["global_step"] == 6


def test_a_variable_of_the_environment_wins_too(
    trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PL_FIT__TRAINER__LOG_EVERY_N_STEPS", "3")
    assert main(["fit", f"--ckpt_path={trained}", "--trainer.max_steps=5"]) == 0
    assert config()["trainer"]["log_every_n_steps"] == 3


def test_an_overlay_and_an_added_callback_keep_those_of_the_run(trained: Path) -> None:
    Path("more.yaml").write_text("trainer: {callbacks+: [{class_path: NaNGuard}]}")
    Path("over.yaml").write_text("trainer: {log_every_n_steps: 1}")
    clipping = ["--trainer.callbacks+=GradientClipping", "--trainer.callbacks.max_norm=0.5"]
    words = ["fit", f"--ckpt_path={trained}", "--trainer.max_steps=5"]
    assert main([*words, "--config=over", "--config=more", *clipping]) == 0
    assert callbacks(version=1) == ["OptimizerPlan", "NaNGuard", "GradientClipping"]
    assert config(version=1)["trainer"]["callbacks"][2]["init_args"]["max_norm"] == 0.5
    rate = ["--optimizer.lr=0.5", "--trainer.callbacks.GradientClipping.max_norm=0.25"]
    assert main([*words, *rate]) == 0
    plan, clipping_spec = config(version=2)["trainer"]["callbacks"]
    assert plan["init_args"]["optimizer"]["init_args"]["lr"] == 0.5
    assert clipping_spec["init_args"]["max_norm"] == 0.25


def test_a_callback_that_is_left_out_or_added_is_named(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("other.yaml").write_text(TEXT.replace("GradientClipping", "NaNGuard"))
    words = ["fit", f"--ckpt_path={trained}", "--trainer.max_steps=5"]
    assert main([*words, "--config=other"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if "Clipping" in line or "NaNGuard" in line] == [
        "trainer.callbacks.GradientClipping of the checkpoint's run is left out in this run",
        "trainer.callbacks.NaNGuard is not in the checkpoint: it starts in this run",
    ]
    specs = json.dumps(config()["trainer"]["callbacks"][:1])
    assert main([*words, f"--trainer.callbacks={specs}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if "Clipping" in line] == [
        "trainer.callbacks.GradientClipping of the checkpoint's run is left out in this run"
    ]


MINE = """
import lightning as L
from external_modules.net_in_init import NetInInit

class Own(L.Callback):
    def __init__(self, note: str = "a.b"): ...
class Net(NetInInit): ...
"""


def train_own() -> None:
    """A run of a module and a callback of the user's file, which ended at step 4."""
    Path("mine.py").write_text(MINE)
    own = ["--model=mine.Net", "--trainer.name=own", "--trainer.callbacks+=mine.Own"]
    assert main(["fit", "--trainer.accelerator=cpu", "--trainer.max_steps=4", *own]) == 0


def test_a_callback_that_cannot_be_imported_is_refused_by_name(
    capsys: pytest.CaptureFixture[str],
) -> None:
    train_own()
    words = ["fit", f"--ckpt_path={newest('own')}", "--trainer.accelerator=cpu"]
    assert main([*words, "--model=mine.Net"]) == 2
    err = capsys.readouterr().err
    assert "names 'mine.Own', which is not a class of Ravine" in err
    assert "type: --trust=mine" in err
    Path("mine.py").write_text(MINE.replace("class Own", "class Renamed"))
    del sys.modules["mine"]
    assert main([*words, "--trust=mine"]) == 2
    err = capsys.readouterr().err
    assert "has the callback 'mine.Own', which cannot be imported (AttributeError: " in err
    assert "or --config=runs/own/version_0/config.yaml, after" in err
    text = Path("runs/own/version_0/config.yaml").read_text()
    edited = yaml.safe_load(text)
    edited["trainer"]["callbacks"] = None
    Path("edited.yaml").write_text(yaml.safe_dump(edited))
    assert main([*words, "--trust=mine", "--config=edited", "--trainer.max_steps=5"]) == 0
    assert "trainer.callbacks.Own of the checkpoint's run is left out" in capsys.readouterr().out


def test_the_end_of_a_run_prints_the_whole_command_that_goes_on(
    capsys: pytest.CaptureFixture[str],
) -> None:
    train_own()
    lines = capsys.readouterr().out.splitlines()
    path = newest("own")
    expected = (
        f"ravine fit --ckpt_path {path} --trainer.max_steps=8 --trust=mine "
        "--trainer.accelerator=cpu"
    )
    assert f"resume: {expected}" in lines
    assert shlex.split(expected)[1:] == command("own")
    assert f"next: ravine validate --trust=mine --ckpt_path {path}" in lines
    assert main(command("own")) == 0
    assert torch.load(newest("own"), weights_only=True)["global_step"] == 8
    assert callbacks("own") == ["Own"]
    assert command("own")[3] == "--trainer.max_steps=16"


def test_a_run_of_epochs_is_made_longer_by_epochs() -> None:
    assert main(["fit", "--config=base", "--trainer.max_steps=-1", "--trainer.max_epochs=2"]) == 0
    assert command("base")[3] == "--trainer.max_epochs=4"
    assert main(command("base")) == 0
    assert config("base")["trainer"]["max_epochs"] == 4


class PressesCtrlC(L.Callback):
    """As the user would, at the second step."""

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == 1:
            os.kill(os.getpid(), signal.SIGINT)


def test_after_ctrl_c_the_printed_command_gives_the_uninterrupted_run(
    caplog: pytest.LogCaptureFixture,
) -> None:
    stop = ["--trainer.callbacks+=tests_resume.PressesCtrlC"]
    sys.modules["tests_resume"] = sys.modules[__name__]
    keep = ["--trainer.callbacks+=Checkpoint", "--trainer.callbacks.dirpath=kept files"]
    root = ["--trainer.default_root_dir=my runs", "--trainer.devices=1"]
    assert main(["fit", "--config=text", *root, *keep]) == 0
    whole = saved(Path("kept files/step=000004.ckpt"))
    Path("kept files/step=000004.ckpt").unlink()
    PressesCtrlC.__module__ = "tests_resume"
    try:
        assert main(["fit", "--config=text", *root, *keep, *stop]) == 130
    finally:
        PressesCtrlC.__module__ = __name__
    line = Path("my runs/text/version_1/command.txt").read_text().splitlines()[-1]
    assert f"stopped by SIGINT at step 2; resume: {line}" in caplog.text
    words = shlex.split(line)[1:]
    assert words[:3] == ["fit", "--ckpt_path", str(Path("kept files/step=000002.ckpt").resolve())]
    assert "--trust=tests_resume" in words
    assert "--trainer.default_root_dir=my runs" in words
    PressesCtrlC.__module__ = "tests_resume"
    try:
        assert main(words) == 0
    finally:
        PressesCtrlC.__module__ = __name__
        del sys.modules["tests_resume"]
    assert equal(saved(Path("kept files/step=000004.ckpt")), whole)


def test_a_killed_run_has_a_command_that_takes_its_newest_checkpoint(trained: Path) -> None:
    keep = ["--trainer.callbacks+=Checkpoint", "--trainer.callbacks.every_n_train_steps=1"]
    assert main(["fit", "--config=text", *keep, "--trainer.callbacks+=mine_killer.Killer"]) == 2
    Path("mine_killer.py").write_text(
        "import lightning as L\nimport shutil\n"
        "class Killer(L.Callback):\n"
        "    def on_train_batch_start(self, trainer, *args):\n"
        "        if trainer.global_step == 2:\n"
        "            shutil.copy(trainer.log_dir + '/command.txt', 'seen.txt')\n"
    )
    assert main(["fit", "--config=text", *keep, "--trainer.callbacks+=mine_killer.Killer"]) == 0
    words = shlex.split(Path("seen.txt").read_text().splitlines()[-1])
    assert words[:4] == ["ravine", "fit", "--ckpt_path", "runs/text/version_1"]
    assert main([*words[1:], "--trainer.max_steps=5"]) == 0
    assert torch.load(newest(version=1), weights_only=True)["global_step"] == 5


def test_an_object_of_a_checkpoint_is_not_built_and_is_named(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("acts.py").write_text("from pathlib import Path\nPath('mark').touch()\n")
    for value in ("acts.Thing", {"class_path": "acts.Thing"}, ["csv", "acts.Thing"]):
        assert not any(is_restorable(key, value) for key in ("logger", "profiler"))
    checkpoint = torch.load(trained, weights_only=True)
    saved_values = checkpoint["ravine"]["config"]
    saved_values |= {"trainer.logger": "acts.Thing", "trainer.profiler": {"class_path": "acts.X"}}
    torch.save(checkpoint, "evil.ckpt")
    assert main(["fit", "--ckpt_path=evil.ckpt", "--trainer.max_steps=5"]) == 0
    out = capsys.readouterr().out
    for key in ("logger", "profiler"):
        assert f"trainer.{key} of evil.ckpt is an object: the default is used instead" in out
    assert not Path("mark").exists()


def test_a_logger_object_stands_in_the_printed_command() -> None:
    logger = '{"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "x"}}'
    assert main(["fit", "--config=text", f"--trainer.logger={logger}"]) == 0
    (word,) = (word for word in command() if word.startswith("--trainer.logger="))
    assert json.loads(word.partition("=")[2])["init_args"]["save_dir"] == "x"
    assert main(command()) == 0
    assert torch.load(newest(), weights_only=True)["global_step"] == 8


def test_a_checkpoint_of_an_older_version_goes_on_with_the_defaults(trained: Path) -> None:
    checkpoint = torch.load(trained, weights_only=True)
    own = checkpoint["ravine"]["config"]
    for key in ("logger", "deterministic", "log_every_n_steps", "max_time", "profiler"):
        del own[f"trainer.{key}"]
    own["trainer.callbacks"] = None
    del checkpoint["exact_resume"]["location"]
    checkpoint.pop("optimizer_plan")
    checkpoint["callbacks"] = {}
    torch.save(checkpoint, trained)
    plan = ["--trainer.callbacks+=OptimizerPlan", "--trainer.callbacks.optimizer=SGD"]
    assert main(["fit", f"--ckpt_path={trained}", "--trainer.max_steps=5", *plan]) == 0
    assert torch.load(newest(version=1), weights_only=True)["global_step"] == 5


def test_a_wrong_value_of_a_checkpoint_is_not_blamed_on_the_command(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = torch.load(trained, weights_only=True)
    checkpoint["ravine"]["config"]["trainer.callbacks"][1]["init_args"]["max_nrom"] = 1.0
    torch.save(checkpoint, "older.ckpt")
    assert main(["fit", "--ckpt_path=older.ckpt", "--trainer.max_steps=5"]) == 2
    err = capsys.readouterr().err
    assert "the configuration in older.ckpt does not fit the classes of this version" in err
    assert "max_nrom" in err
    assert "on the command line" not in err


def test_a_checkpoint_of_another_task_is_blamed_and_no_word_that_was_not_typed(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", "--config=spam/quick", f"--ckpt_path={trained}"]) == 2
    err = capsys.readouterr().err
    assert "contains the weights of a LanguageModel, which do not fit" in err
    assert "--data" not in err


# Each kind of data: a file, a change of it, and the arguments that read it.


def write_mails(word: str) -> None:
    lines = [f"ham\tsee you at {i}" for i in range(12)] + [
        f"spam\twin {word} {i}" for i in range(8)
    ]
    Path("mails.tsv").write_text("\n".join(lines) + "\n")


def write_answers(word: str) -> None:
    rows = [{"prompt": f"{i}?", "answer": word * (1 + i % 3)} for i in range(20)]
    Path("answers.jsonl").write_text("\n".join(map(json.dumps, rows)))


def write_images(value: int) -> None:
    rng = numpy.random.RandomState(0)
    for label in ("cat", "dog"):
        Path("photos", label).mkdir(parents=True, exist_ok=True)
        for number in range(8):
            pixels = rng.randint(0, 256, (8, 8, 3), dtype=numpy.uint8)
            pixels[0, 0] = value
            Image.fromarray(pixels).save(f"photos/{label}/{number}.png")


def write_tokenizer(is_changed: bool) -> None:
    content = json.loads(from_merges().json_text)
    if is_changed:  # two tokens change places
        table = content["model"]["vocab"]
        first, second = list(table)[:2]
        table[first], table[second] = table[second], table[first]
    Path("tokenizer.json").write_text(json.dumps(content))


def write_poem(text: str) -> None:
    Path("poem.txt").write_text(text)


LANGUAGE = ["--model=LanguageModel", "--model.num_layers=1", "--model.d_model=16"]
LANGUAGE += ["--model.num_heads=2"]
POEM_DATA = ["--data=TextDataModule", "--data.path=poem.txt", "--data.context_length=8"]
DATA: dict[str, tuple[Callable[[Any], None], Any, Any, str, list[str]]] = {
    "text": (write_poem, POEM, POEM[::-1], "poem.txt", [*LANGUAGE, *POEM_DATA]),
    "JSONL": (
        write_answers,
        "a",
        "b",
        "answers.jsonl",
        [
            *LANGUAGE,
            "--data=InstructionDataModule",
            "--data.path=answers.jsonl",
            "--data.tokenizer=bytes",
            "--data.context_length=8",
        ],
    ),
    "spam": (
        write_mails,
        "prize",
        "money",
        "mails.tsv",
        [
            "--model=SpamClassifier",
            "--model.num_buckets=64",
            "--data=SpamDataModule",
            "--data.path=mails.tsv",
        ],
    ),
    "images": (
        write_images,
        0,
        255,
        "photos",
        [
            "--model=ImageClassifier",
            "--model.num_features=4",
            "--data=ImageDataModule",
            "--data.source=photos",
        ],
    ),
    "tokenizer": (
        write_tokenizer,
        False,
        True,
        "tokenizer_sha256",
        [*LANGUAGE, *POEM_DATA, "--data.tokenizer=tokenizer.json"],
    ),
}


@pytest.mark.parametrize("kind", DATA)
def test_changed_data_are_refused_unless_allowed(
    kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write, before, after, named, words = DATA[kind]
    write(before)
    short = ["--trainer.accelerator=cpu", "--trainer.max_steps=2", "--data.batch_size=4"]
    assert main(["fit", *words, *short, "--trainer.name=run"]) == 0
    again = command("run")
    write(after)
    capsys.readouterr()
    assert main(again) == 2
    lines = capsys.readouterr().err.splitlines()
    (problem, fix) = (line for line in lines if "data: " not in line)
    assert problem.startswith("ravine: error: the training data have changed: ")
    assert named in problem
    assert "is not as it was when the checkpoint was written" in problem
    assert fix.startswith("  type: --allow_changed_data")
    assert torch.load(newest("run"), weights_only=True)["global_step"] == 2
    assert main([*again, "--allow_changed_data"]) == 0
    assert "the training data have changed, which is accepted: " in capsys.readouterr().out
    assert torch.load(newest("run"), weights_only=True)["global_step"] == 4
    assert main(command("run")) == 0  # the new checkpoint is of the changed data


def test_other_characters_are_refused_and_no_flag_is_offered(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_poem(POEM.replace("red", "RED"))
    for flag in ([], ["--allow_changed_data"]):
        assert main(["fit", f"--ckpt_path={trained}", "--trainer.max_steps=5", *flag]) == 2
        err = capsys.readouterr().err
        assert "type: --allow_changed_data" not in err
    assert main(["fit", f"--ckpt_path={trained}", "--trainer.max_steps=5"]) == 2
    err = capsys.readouterr().err
    assert "poem.txt is not as it was when the checkpoint was written (data vocab_size: 21" in err


def test_another_file_is_named_beside_that_of_the_checkpoint(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("other.txt").write_text(POEM[::-1])
    words = [f"--ckpt_path={trained}", "--data.path=other.txt"]
    assert main(["fit", *words, "--trainer.max_steps=5"]) == 2
    assert "they are other.txt and were poem.txt" in capsys.readouterr().err
    assert main(["test", *words]) == 0
    said = "the data are not those of the training: they are other.txt and were poem.txt"
    assert said in capsys.readouterr().out
    assert main(["test", f"--ckpt_path={trained}"]) == 0
    assert "are not those of the training" not in capsys.readouterr().out


def cut_on_two_ranks() -> tuple[list[int], list[str]]:
    """Statuses of a whole run, of one that is cut, and of the printed command."""
    ddp = ["--trainer.devices=2", "--trainer.strategy=ddp"]
    every = ["--trainer.callbacks+=Checkpoint", "--trainer.callbacks.every_n_train_steps=1"]
    every += ["--trainer.callbacks.save_top_k=-1"]
    statuses = [main(["fit", "--config=text", *ddp, *every])]
    half = Path("runs/text/version_0/checkpoints/step=000002.ckpt")
    words = command()
    words[2] = str(half)
    words = [word for word in words if "max_steps" not in word]
    statuses.append(main(words))
    statuses.append(
        main(
            [
                "fit",
                f"--ckpt_path={half}",
                "--trainer.devices=2",
                "--trainer.strategy=zero2",
                "--trainer.accelerator=cpu",
            ]
        )
    )
    return statuses, words


def test_two_ranks_go_on_by_the_printed_command_and_with_another_strategy(
    ranks: Callable[..., list[Any]],
) -> None:
    (statuses, words), other = ranks(cut_on_two_ranks, 2)
    assert statuses == other[0] == [0, 0, 0]
    assert {"--trainer.devices=2", "--trainer.strategy=ddp"} <= {*words}
    whole = saved(Path("runs/text/version_0/checkpoints/step=000004.ckpt"))
    assert equal(saved(newest(version=1)), whole)
    assert equal(saved(newest(version=2))[0].keys(), whole[0].keys())


def test_a_run_without_the_monitored_metric_says_so_and_what_to_type(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["fit", "--config=base"]  # NetInInit logs val_loss
    assert main(words) == 0
    flag = "--trainer.callbacks.Checkpoint.monitor=val_loss"
    said = capsys.readouterr().out
    (line,) = [text for text in said.splitlines() if text.startswith("Checkpoint: ")]
    assert "monitor='val/loss' is not logged by the end of the validation" in line
    assert line.endswith(f"; type {flag}")
    assert main(["validate", "--config=base", "--ckpt_path=best"]) == 2
    said = capsys.readouterr().err
    assert (
        "has no best checkpoint: the metric val/loss was never logged\n  logged: val_loss" in said
    )
    assert f"  type: --ckpt_path=last, or fit again with {flag}\n" in said
    # what it says works
    assert main([*words, flag, "--trainer.max_steps=2"]) == 0
    assert "not logged" not in capsys.readouterr().out
