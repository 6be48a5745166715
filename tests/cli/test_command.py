"""Commands as a user types them, run in this process; four run in their own."""

import csv
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml

from ravine.cli.command import next_command
from ravine.cli.main import main
from ravine.datamodules import ImageDataModule, PromptDataModule, SpamDataModule, TextDataModule
from ravine.lightning_modules import (
    Diffusion,
    ImageClassifier,
    LanguageModel,
    Reinforce,
    SpamClassifier,
)

FOREIGN = ("net_in_init.NetInInit", "net_in_configure_model.NetInConfigureModel")
BASE = """
model: {class_path: external_modules.net_in_init.NetInInit, init_args: {width: 8}}
trainer: {accelerator: cpu, max_epochs: 2, log_every_n_steps: 4, enable_model_summary: false}
"""
SPAM = """
model: {class_path: SpamClassifier, init_args: {num_buckets: 64}}
data: {class_path: SpamDataModule, init_args: {source: embedded, batch_size: 10}}
trainer: {accelerator: cpu, max_epochs: 2, enable_model_summary: false}
"""
TEXT = """
model:
  class_path: LanguageModel
  init_args: {num_layers: 2, d_model: 16, num_heads: 2, dropout: 0.1}
data: {class_path: TextDataModule, init_args: {path: poem.txt, context_length: 8, batch_size: 8}}
trainer:
  accelerator: cpu
  max_steps: 8
  accumulate_grad_batches: 2
  val_check_interval: 6
  check_val_every_n_epoch: null
  enable_model_summary: false
  callbacks:
  - class_path: OptimizerPlan
    init_args: {optimizer: {class_path: AdamW, init_args: {lr: 1.0e-2}}}
  - class_path: GenerateSamples
    init_args: {arguments: {prompt: so, max_new_tokens: 8}}
"""
POEM = "so much depends upon a red wheel barrow glazed with rain water\n" * 12


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["ravine"])
    for name, text in (("base", BASE), ("spam", SPAM), ("text", TEXT)):
        Path(f"{name}.yaml").write_text(text)
    Path("poem.txt").write_text(POEM)


def files(name: str, version: int = 0) -> list[str]:
    """What a run has left, checkpoints and the record apart."""
    folder = Path("runs", name, f"version_{version}")
    names = {p.name.split(".out.")[0] for p in folder.iterdir()}
    return sorted(names - {"run.json", "changes.diff", "packages.txt", "command.txt"})


def checkpoints(name: str, version: int = 0) -> list[Path]:
    """Oldest first."""
    return sorted(Path("runs", name, f"version_{version}", "checkpoints").iterdir())


def config(name: str, version: int = 0) -> dict[str, Any]:
    return yaml.safe_load(Path("runs", name, f"version_{version}", "config.yaml").read_text())


def classes(name: str, version: int = 0) -> list[str]:
    specs = config(name, version)["trainer"]["callbacks"] or []
    return [spec["class_path"].rpartition(".")[2] for spec in specs]


USUAL = ["checkpoints", "config.yaml", "events", "hparams.yaml", "loss.png", "metrics.csv"]


def test_spam_is_trained_validated_tested_and_predicted(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["fit", "--config=./spam.yaml"]) == 0
    assert files("spam") == sorted(USUAL)
    assert main(["validate", "--ckpt_path=last"]) == 0
    assert main(["test", "--ckpt_path=last"]) == 0
    run = Path("runs/spam/version_0")
    rows = list(csv.DictReader((run / "test_0/metrics.csv").read_text().splitlines()))
    assert {"test/accuracy", "test/f1", "test/auroc"} <= rows[-1].keys()
    Path("mails.txt").write_text("WIN a free prize now!\nsee you at noon, [bold] as always\n")
    words = ["predict", "--ckpt_path=last", "--data.predict_path=mails.txt"]
    capsys.readouterr()
    assert main(words) == 0
    text = (run / "predict_0/predictions.csv").read_text()
    rows = list(csv.DictReader(text.splitlines()))
    assert list(rows[0]) == ["line", "message", "probability", "label"]
    assert [row["message"] for row in rows] == Path("mails.txt").read_text().splitlines()
    out = capsys.readouterr().out
    assert "2 rows in runs/spam/version_0/predict_0/predictions.csv" in out
    assert "as always" in out


def test_a_language_model_is_trained_validated_and_tested() -> None:
    assert main(["fit", "--config=./text.yaml"]) == 0
    assert files("text") == sorted([*USUAL, "samples.txt"])
    assert Path("runs/text/version_0/samples.txt").read_text().startswith("--- step 3 ---\nso")
    for command in ("validate", "test"):
        assert main([command, "--ckpt_path=last"]) == 0
    text = Path("runs/text/version_0/test_0/metrics.csv").read_text()
    assert "test/bits_per_byte" in text


@pytest.mark.parametrize("name", [*FOREIGN, "two_optimizers.TwoOptimizers"])
def test_external_modules_run_by_their_dotted_path(name: str) -> None:
    words = [f"--model=external_modules.{name}", "--trainer.accelerator=cpu"]
    quick = ["--trainer.max_epochs=1", "--trainer.enable_model_summary=false"]
    assert main(["fit", *words, *quick]) == 0
    run = name.rpartition(".")[2].lower()
    again = ["validate", f"--ckpt_path={checkpoints(run)[-1]}"]
    assert main(again) == 2  # only the checkpoint names the class
    assert main([*again, "--trust=external_modules"]) == 0
    text = Path("runs", run, "version_0/validate_0/config.yaml").read_text()
    assert yaml.safe_load(text)["model"]["class_path"] == f"external_modules.{name}"


def test_an_overlay_changes_only_the_keys_that_it_sets() -> None:
    Path("over.yaml").write_text("trainer: {max_epochs: 1}\nmodel: {init_args: {lr: 0.5}}")
    assert main(["fit", "--config", "base", "--config", "over"]) == 0
    found = config("base")
    assert found["model"]["init_args"] == {"width": 8, "lr": 0.5, "batch_size": 8}
    assert (found["trainer"]["max_epochs"], found["trainer"]["log_every_n_steps"]) == (1, 4)


@pytest.mark.parametrize("last", [False, True])
def test_a_callback_is_added_before_or_after_a_config(last: bool) -> None:
    Path("more.yaml").write_text("trainer: {callbacks: [{class_path: NaNGuard}]}")
    added = ["--trainer.callbacks+=GradientClipping", "--trainer.callbacks.max_norm=2.5"]
    configs = ["--config=base", "--config=more"]
    assert main(["fit", *(configs + added if last else added + configs)]) == 0
    assert classes("base") == ["NaNGuard", "GradientClipping"]
    assert config("base")["trainer"]["callbacks"][1]["init_args"]["max_norm"] == 2.5


def test_an_overlay_appends_to_the_callbacks_of_its_base() -> None:
    Path("more.yaml").write_text("trainer: {callbacks+: [{class_path: NaNGuard}]}")
    assert main(["fit", "--config=text", "--config=more", "--trainer.max_steps=1"]) == 0
    assert classes("text") == ["OptimizerPlan", "GenerateSamples", "NaNGuard"]


def test_of_two_classes_with_the_same_name_ravines_is_used() -> None:
    words = ["--trainer.callbacks+=Checkpoint", "--trainer.callbacks.save_top_k=-1"]
    words += ["--trainer.callbacks+=ProgressBar", "--trainer.callbacks.refresh_rate=3"]
    assert main(["fit", "--config=base", *words]) == 0
    assert [p.name for p in checkpoints("base")] == ["step=000004.ckpt", "step=000008.ckpt"]


def state(path: Path) -> tuple[Any, ...]:
    """What has to be equal when two runs are one, and the last losses that were logged."""
    checkpoint = torch.load(path, weights_only=True)
    curve = checkpoint["callbacks"]["LossPlot"]
    return checkpoint["state_dict"], checkpoint["optimizer_states"], curve


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other


EVERY_STEP = [
    "--trainer.callbacks+=Checkpoint",
    "--trainer.callbacks.every_n_train_steps=1",
    "--trainer.callbacks.save_top_k=-1",
]


def test_a_run_resumed_at_any_of_three_steps_equals_the_uninterrupted_run_bit_for_bit() -> None:
    Path("drop.yaml").write_text(  # replaces the list: what makes resuming exact is not in it
        "trainer: "
        "{callbacks: [{class_path: GenerateSamples, init_args: {arguments: {prompt: so}}}]}"
    )
    words = ["fit", "--config=text", "--config=drop", *EVERY_STEP]
    assert main(words) == 0
    whole = checkpoints("text")
    assert len(whole) == 8
    for version, cut in enumerate((2, 3, 5), 1):  # before, at and after a validation
        assert main([*words, f"--ckpt_path={whole[cut - 1]}"]) == 0
        assert equal(state(checkpoints("text", version)[-1]), state(whole[-1]))


def test_a_run_resumed_at_its_end_prints_that_no_step_was_trained(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["fit", "--config=text", "--trainer.max_steps=2"]
    assert main(words) == 0
    assert "done: " in capsys.readouterr().out
    assert main([*words, "--ckpt_path=auto"]) == 0
    out = capsys.readouterr().out
    assert "no step was trained: " in out
    assert "--trainer.max_steps=4" in out
    assert "done: " not in out


def test_another_seed_gives_other_weights() -> None:
    words = ["fit", "--config=text", "--trainer.max_steps=2"]
    assert main(words) == 0
    assert main([*words, "--seed_everything=1"]) == 0
    assert main(words) == 0
    one, other, again = (state(checkpoints("text", v)[-1]) for v in range(3))
    assert equal(one, again)
    assert not equal(one[0], other[0])


def test_a_second_run_of_the_same_name_is_a_second_version() -> None:
    for _ in range(2):
        assert main(["fit", "--config=base", "--trainer.logger=false"]) == 0
    assert files("base", 0) == files("base", 1) == ["checkpoints", "config.yaml"]


def test_debug_overlays_have_their_described_effect(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--config=base", "--config=debug/fast_dev_run"]) == 0
    assert not Path("runs").exists()
    assert main(["fit", "--config=base", "--config=debug/profiler", "--trainer.max_steps=2"]) == 0
    assert "run_training_batch" in Path("runs/base/version_0/fit-profile.txt").read_text()
    capsys.readouterr()
    one = ["--config=debug/overfit_one_batch", "--trainer.max_epochs=40"]
    assert main(["fit", "--config=spam", *one]) == 0
    rows = csv.DictReader(Path("runs/spam/version_0/metrics.csv").read_text().splitlines())
    losses = [float(row["train/loss"]) for row in rows if row.get("train/loss")]
    assert losses == sorted(losses, reverse=True)  # one batch: each step improves on it


def test_logger_overlays_write_their_log_files() -> None:
    for version, (name, kept) in enumerate({"csv": "metrics.csv", "tensorboard": "events"}.items()):
        assert main(["fit", "--config=base", f"--config=logger/{name}"]) == 0
        assert {"metrics.csv", "events"} & set(files("base", version)) == {kept}


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_logger_that_is_not_installed_is_one_error(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("ravine.cli.trainer.find_spec", lambda package: None)
    assert main(["fit", "--config=base", f"--config=logger/{name}"]) == 2
    assert capsys.readouterr().err == (
        f"ravine: error: the logger {name!r} needs the package {name}, which is not installed\n"
        f"  type: pip install {name}, or --trainer.logger=[csv,tensorboard]\n"
    )


class PressesCtrlC(L.Callback):
    """As the user would, at the second step."""

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == 1:
            os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_once_ends_in_a_checkpoint_and_130() -> None:
    words = ["fit", "--config=base", f"--trainer.callbacks+={__name__}.PressesCtrlC"]
    assert main(words) == 130
    assert [p.name for p in checkpoints("base")] == ["step=000002.ckpt"]
    assert "loss.png" in files("base")
    assert main(["fit", "--config=base", "--ckpt_path=auto"]) == 0
    assert main(["fit", "--config=base"]) == 0
    assert equal(state(checkpoints("base", 1)[-1])[0], state(checkpoints("base", 2)[-1])[0])


@pytest.mark.parametrize(
    "place", ["model", "data", "trainer.callbacks", "trainer.strategy", "trainer.profiler"]
)
def test_no_config_and_no_checkpoint_may_name_a_function_that_runs_commands(place: str) -> None:
    run = '{"class_path": "subprocess.Popen", "init_args": {"args": ["touch", "it_ran"]}}'
    assert main(["fit", "--config=base", f"--{place}={run}"]) == 2
    assert not Path("it_ran").exists()


def two(name: str) -> list[str]:
    return ["fit", f"--config={name}", "--trainer.devices=2", "--ckpt_path=auto"]


def test_the_processes_that_a_command_starts_agree_on_its_run() -> None:
    program = Path(sys.executable).with_name("lightning")
    words = [str(program), *two("text"), "--trainer.strategy=ddp", "--trainer.max_steps=3"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("run: runs") == 1
    assert files("text") == sorted([*USUAL, "samples.txt"])
    assert not Path("runs/text/version_1").exists()
    assert main(["validate", "--ckpt_path=last"]) == 0


def _zero3() -> int:
    model = f"--model=external_modules.{FOREIGN[1]}"
    return main([*two("base"), model, "--trainer.strategy=zero3"])


def test_an_external_module_is_sharded_from_the_command_line(
    ranks: Callable[..., list[Any]],
) -> None:
    assert ranks(_zero3, 2) == [0, 0]
    assert files("base") == sorted(USUAL)
    assert main(["validate", "--ckpt_path=last", "--trust=external_modules"]) == 0


def test_a_run_that_fails_before_its_first_step_leaves_no_folder() -> None:
    words = ["fit", "--config", "text.yaml", "--trainer.callbacks.arguments={prompt: so}"]
    schedule = "--trainer.callbacks.schedule={kind: step, period: 50}"
    plan = ["--trainer.callbacks+=OptimizerPlan", "--trainer.callbacks.optimizer=SGD", schedule]
    assert main([*words, *plan]) == 2
    assert list(Path("runs").glob("*/version_*")) == []
    assert main(words) == 0
    assert checkpoints("text")


def test_the_end_of_a_run_prints_the_next_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--config", "text.yaml"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert "done: runs/text/version_0" in said
    path = checkpoints("text")[-1]
    assert f"next: ravine generate --ckpt_path {path}" in said
    assert main(["generate", "--ckpt_path", str(path), "--max_new_tokens=1"]) == 0


def test_the_next_command_for_an_external_module_works(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["fit", "--config", "base.yaml"]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    path = checkpoints("base")[-1]
    assert line == f"next: ravine validate --trust=external_modules --ckpt_path {path}"
    assert main(line.split()[2:]) == 0


def test_a_fit_without_a_validation_says_so_before_its_first_step(
    capsys: pytest.CaptureFixture[str],
) -> None:
    short = ["fit", "--config", "text.yaml", "--trainer.max_steps=2"]
    assert main([*short, "--trainer.log_every_n_steps=1"]) == 0
    expected = (
        "no validation runs: the run ends after batch 4, before the first validation "
        "(val_check_interval=6); type --trainer.val_check_interval=2"
    )
    lines = capsys.readouterr().out.splitlines()
    (first_step,) = [i for i, line in enumerate(lines) if line.startswith("step 1/2 ")]
    assert lines.index(expected) < first_step
    assert sum("no validation" in line for line in lines) == 1
    assert main([*short, "--trainer.val_check_interval=2"]) == 0
    assert "no validation" not in capsys.readouterr().out


class NoDataModule(L.LightningDataModule):
    def train_dataloader(self) -> Any: ...


class OnlyTestData(NoDataModule):
    def test_dataloader(self) -> Any: ...


class GeneratesAlone(L.LightningModule):
    """No TaskModule, so that the command `generate` would not load it."""

    def generate(self) -> str:
        return ""

    def test_step(self, batch: Any) -> None: ...


class ValidatesItself(L.LightningModule):
    def validation_step(self, batch: Any) -> None: ...
    def val_dataloader(self) -> Any: ...


@pytest.mark.parametrize(
    ("model", "data", "expected"),
    [
        (LanguageModel, TextDataModule, "generate"),
        (Diffusion, ImageDataModule, "generate"),
        (Reinforce, PromptDataModule, "generate"),
        (ImageClassifier, ImageDataModule, "test"),
        (SpamClassifier, SpamDataModule, "test"),
        (SpamClassifier, NoDataModule, None),
        (GeneratesAlone, OnlyTestData, "test"),
        (GeneratesAlone, NoDataModule, None),
        (ValidatesItself, None, "validate"),
    ],
)
def test_the_next_command_needs_a_step_and_a_loader_of_the_module_and_its_data(
    model: Any, data: Any, expected: str | None
) -> None:
    # the methods of the classes decide
    bare_model = object.__new__(model)
    bare_data = None if data is None else object.__new__(data)
    found = next_command(bare_model, bare_data)
    assert found == expected


def test_missing_base_weights_are_refused_before_the_data_with_the_command_that_makes_them(
    capsys: pytest.CaptureFixture[str],
) -> None:
    lora = ["--trainer.callbacks+=LoRA", "--trainer.callbacks+=Pretrained"]
    base = ["--trainer.callbacks.path=runs/text", "--trainer.callbacks.command=ravine fit -c text"]
    words = ["fit", "--config", "text.yaml", "--trainer.name=lora", *lora, *base]
    assert main([*words, "--data.path=gone.txt"]) == 2  # the data are not even looked for
    expected = (
        "Pretrained: the path runs/text does not exist\n"
        "  type: ravine fit -c text, or --trainer.callbacks.Pretrained.path=FILE\n"
    )
    assert expected in capsys.readouterr().err
    # a path that the command does not make
    assert main([*words, "--trainer.callbacks.path=runs/other"]) == 2
    assert "ravine fit" not in capsys.readouterr().err
    Path("runs/text/version_0/checkpoints").mkdir(parents=True)
    assert main(words) == 2
    assert "the runs in runs/text have no complete checkpoint file" in capsys.readouterr().err


def test_adapters_are_trained_on_the_newest_checkpoint_of_a_folder_of_runs() -> None:
    for steps in (1, 2):
        assert main(["fit", "--config", "text.yaml", f"--trainer.max_steps={steps}"]) == 0
    (newest,) = checkpoints("text", 1)
    assert newest.name == "step=000002.ckpt"
    lora = ["--trainer.callbacks+=LoRA", "--trainer.callbacks+=Pretrained"]
    words = ["--trainer.name=lora", "--trainer.max_steps=1", "--trainer.callbacks.path=runs/text"]
    assert main(["fit", "--config", "text.yaml", *lora, *words]) == 0
    (adapters,) = checkpoints("lora")
    saved = torch.load(adapters, weights_only=True)
    assert saved["lora"]["base"]["file"] == saved["transforms"]["load"]["arguments"]["path"]
    assert saved["lora"]["base"]["file"] == str(newest)
    # a later run of the base does not change the base of the adapters
    assert main(["fit", "--config", "text.yaml", "--trainer.max_steps=1"]) == 0
    assert main(["generate", "--ckpt_path", str(adapters), "--max_new_tokens=1"]) == 0


@pytest.mark.parametrize("monitor", ["Checkpoint", "EarlyStopping"])
@pytest.mark.parametrize("val_fraction", [0.2, 0])
def test_a_monitored_metric_that_nothing_logs_is_refused_before_the_first_step(
    monitor: str, val_fraction: float, capsys: pytest.CaptureFixture[str]
) -> None:
    callback = [f"--trainer.callbacks+={monitor}", "--trainer.callbacks.monitor=val/acuracy"]
    data = [f"--data.val_fraction={val_fraction}", "--trainer.log_every_n_steps=1"]
    assert main(["fit", "--config", "spam.yaml", *data, *callback]) == 2
    said = capsys.readouterr()
    assert f"{monitor} monitors 'val/acuracy', which SpamClassifier does not log" in said.err
    assert "step 1/" not in said.out


def test_print_groups_lists_the_parameters_of_each_rule(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--config", "text.yaml", "--trainer.max_steps=1", "--print_groups"]) == 0
    assert "net.embed.weight" in capsys.readouterr().out
    assert main(["fit", "--config", "base.yaml", "--print_groups"]) == 2
    assert "--print_groups needs OptimizerPlan" in capsys.readouterr().err
