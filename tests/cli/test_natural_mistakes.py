"""Natural mistakes: each answer names the typed word, and its suggestion works as it is typed.

A row has the command with the mistake, a word of it that the error must name, and the suggestion.
The test types the suggestion in place of the wrong words, and the command must then start: the
parser accepts it, and trainer, model and data are built. Nothing is trained.
"""

import re
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ravine.cli.command import RavineCLI
from ravine.cli.main import main

ADD_ADAMW = "--optimizer=AdamW"
# Lightning replaces 16-mixed without a GPU, with a warning.
FP16 = "16-mixed" if torch.cuda.is_available() else "bf16-mixed"
QUICK = "fit --config shakespeare/quick"
# the command, a word of it, the suggestion
TABLE: list[tuple[str, str, str]] = [
    # the optimizer and its schedule, by their names in other programs
    ("fit --config spam --lr=3", "--lr", "--optimizer.lr=3"),
    (f"{QUICK} --learning_rate=5e-4", "--learning_rate", "--optimizer.lr=5e-4"),
    (f"{QUICK} --model.lr=3", "--model.lr", "--optimizer.lr=3"),
    (
        "fit --config spam --model.learning_rate 3",
        "--model.learning_rate",
        "--optimizer.lr=3",
    ),
    ("fit --config spam --trainer.lr=3", "--trainer.lr", "--optimizer.lr=3"),
    ("fit --config spam lr=0.1", "lr=0.1", "--optimizer.lr=0.1"),
    ("fit --config spam -lr 3", "-lr", "--optimizer.lr=3"),
    ("fit --config spam --optimizer.lr", "--optimizer.lr", "--optimizer.lr=0.001"),
    (
        "fit --model=LanguageModel --data=TextDataModule --lr=3",
        "--lr",
        f"{ADD_ADAMW} --optimizer.lr=3",
    ),
    ("fit --config spam --weight_decay=0.1", "--weight_decay", "--optimizer.weight_decay=0.1"),
    ("fit --config spam --optimizer", "--optimizer", ADD_ADAMW),
    ("fit --config spam --optimizer=adamw", "adamw", ADD_ADAMW),
    ("fit --config spam '--optimizer=AdamW(lr=0.1)'", "AdamW", f"{ADD_ADAMW} --optimizer.lr=0.1"),
    ("fit --config spam --optimizer=OptimizerPlan", "OptimizerPlan", ADD_ADAMW),
    ("fit --config spam --optimizer=EMA", "EMA", "--trainer.callbacks+=EMA"),
    ("fit --config spam AdamW", "AdamW", f"lightning fit --config spam {ADD_ADAMW}"),
    ("fit --config spam --optim=adamw_torch", "--optim", ADD_ADAMW),
    ("fit --config spam --optimizer=muon", "muon", "--optimizer=Muon"),
    ("fit --config spam --trainer.callbacks+=AdamW", "AdamW", ADD_ADAMW),
    ("fit --config spam --lr_scheduler=cosine", "--lr_scheduler", "--schedule.kind=cosine"),
    ("fit --config spam --warmup_ratio=0.1", "--warmup_ratio", "--schedule.warmup=0.1"),
    ("fit --config spam --warmup_steps=10", "--warmup_steps", "--schedule.warmup=10"),
    (
        f"{QUICK} --grad_clip=0.5",
        "--grad_clip",
        "--trainer.callbacks.GradientClipping.max_norm=0.5",
    ),
    (
        "fit --config spam --max_grad_norm=0.5",
        "--max_grad_norm",
        "--trainer.callbacks+=GradientClipping --trainer.callbacks.max_norm=0.5",
    ),
    (
        "fit --config spam --ema_decay=0.9",
        "--ema_decay",
        "--trainer.callbacks+=EMA --trainer.callbacks.decay=0.9",
    ),
    (
        "fit --config diffusion/digits --ema_decay=0.9",
        "--ema_decay",
        "--trainer.callbacks.EMA.decay=0.9",
    ),
    (
        f"{QUICK} --lora_r=8",
        "--lora_r",
        "--trainer.callbacks+=LoRA --trainer.callbacks.rank=8",
    ),
    # the trainer
    ("fit --config spam --max_steps=60", "--max_steps", "--trainer.max_steps=60"),
    ("fit --config spam --max-iters=60", "--max-iters", "--trainer.max_steps=60"),
    ("fit --config spam --epochs=3", "--epochs", "--trainer.max_epochs=3"),
    ("fit --config spam --num_train_epochs 3", "--num_train_epochs", "--trainer.max_epochs=3"),
    ("fit --config spam --seed=3", "--seed", "--seed_everything=3"),
    ("fit --config spam --gpus=1", "--gpus", "--trainer.devices=1"),
    ("fit --config spam --nproc_per_node=1", "--nproc_per_node", "--trainer.devices=1"),
    ("fit --config spam --device=cpu", "--device", "--trainer.accelerator=cpu"),
    ("fit --config spam --dtype=float32", "--dtype", "--trainer.precision=32-true"),
    ("fit --config spam --bf16", "--bf16", "--trainer.precision=bf16-mixed"),
    (
        "fit --config spam --gradient_accumulation_steps=4",
        "--gradient_accumulation_steps",
        "--trainer.accumulate_grad_batches=4",
    ),
    ("fit --config spam --eval_interval=10", "--eval_interval", "--trainer.val_check_interval=10"),
    ("fit --config spam --logging_steps=1", "--logging_steps", "--trainer.log_every_n_steps=1"),
    ("fit --config spam --output_dir=out", "--output_dir", "--trainer.default_root_dir=out"),
    ("fit --config spam --run_name=first", "--run_name", "--trainer.name=first"),
    ("fit --config spam --report_to=tensorboard", "--report_to", "--trainer.logger=tensorboard"),
    ("fit --config spam --use_fsdp", "--use_fsdp", "--trainer.strategy=zero3"),
    ("fit --config spam --resume", "--resume", "--ckpt_path=auto"),
    ("fit --config spam --compile", "--compile", "--trainer.callbacks+=Compile"),
    ("fit --config spam --compile=False", "--compile", "lightning fit --config spam"),
    ("fit --config spam trainer.max_steps=10", "trainer.max_steps=10", "--trainer.max_steps=10"),
    (
        "fit --config spam --trainer.max_steps = 10",
        "--trainer.max_steps = 10",
        "lightning fit --config spam --trainer.max_steps=10",
    ),
    # data and model
    ("fit --config spam --batch_size=64", "--batch_size", "--data.batch_size=64"),
    (
        "fit --config spam --per_device_train_batch_size=8",
        "--per_device_train_batch_size",
        "--data.batch_size=8",
    ),
    (f"{QUICK} --block_size=32", "--block_size", "--data.context_length=32"),
    (f"{QUICK} --n_layer=2", "--n_layer", "--model.num_layers=2"),
    (f"{QUICK} --model.width=64", "--model.width", "--model.d_model=64"),
    (
        "fit --config spam --data=notes.txt",
        "notes.txt",
        "--data.path=notes.txt",
    ),
    # values
    ("fit --config spam --trainer.precision=fp16", "fp16", f"--trainer.precision={FP16}"),
    ("fit --config spam --trainer.max_steps=1e3", "1e3", "--trainer.max_steps=1000"),
    ("fit --config spam --trainer.max_time=1h", "1h", "--trainer.max_time=00:01:00:00"),
    (f"{QUICK} --model.d_model=-64", "d_model=-64", "--model.d_model=64"),
    (
        "fit --config spam --trainer.callbacks+=EMA --trainer.callbacks.decay=fast",
        "fast",
        "--trainer.callbacks.decay=0.999",
    ),
    ("fit --config spam --trainer.accelerator=tpu", "tpu", "--trainer.accelerator=auto"),
    (
        "fit --config spam --trainer.limit_train_batches=2.5",
        "2.5",
        "--trainer.limit_train_batches=2",
    ),
    (
        f"{QUICK} --trainer.val_check_interval=0.5",
        "0.5",
        "--trainer.val_check_interval=0.5 --trainer.check_val_every_n_epoch=1",
    ),
    (
        "fit --config spam --trainer.limit_train_batches",
        "--trainer.limit_train_batches",
        "--trainer.limit_train_batches=10",
    ),
    (
        "fit --config spam --trainer.limit_train_batches --trainer.max_steps=3",
        "--trainer.limit_train_batches",
        "--trainer.limit_train_batches=10",
    ),
    (
        "fit --config spam '--trainer.callbacks+=EMA(decay=0.9)'",
        "EMA(decay=0.9)",
        "--trainer.callbacks+=EMA --trainer.callbacks.decay=0.9",
    ),
    (
        "fit --config spam --trainer.callbacks+=EMA,NaNGuard",
        "EMA,NaNGuard",
        "'--trainer.callbacks+=[EMA,NaNGuard]'",
    ),
    (
        "fit --config classifier/mnist --data.source=faces --data.resize=62x47",
        "62x47",
        "'--data.resize=[62, 47]'",
    ),
    # configs and commands
    ("fit spam", "spam", "lightning fit --config spam"),
    ("spam", "spam", "lightning fit --config spam"),
    ("fit --cofnig spam", "--cofnig", "--config=spam"),
    ("fit --config=quick", "quick", "--config=spam/quick"),
    ("fit --config", "--config", "--config=shakespeare/quick"),
    ("fit --config --trainer.max_steps=3", "--config", "--config=shakespeare/quick"),
    ("fit --config=.", "folder", "lightning list configs"),
    ("fit --config=image.png", "image.png", "lightning list configs"),
    ("fit --config shakespeare", "shakespeare", "--config=shakespeare/quick"),
    (
        "fit --config=spam,logger/csv",
        "spam,logger/csv",
        "--config spam --config logger/csv",
    ),
    ("fit --config spam EMA", "EMA", "lightning fit --config spam --trainer.callbacks+=EMA"),
    ("train --config spam", "train", "lightning fit --config spam"),
    ("run --trainer.max_steps=1", "run", f"lightning {QUICK} --trainer.max_steps=1"),
    ("fit --help=Muon", "--help=Muon", "lightning show Muon"),
    ("help fit", "help", "lightning fit --help"),
    ("version", "version", "lightning --version"),
    ("recipes", "recipes", "lightning list configs"),
    # with a checkpoint, of the run spam/quick
    ("eval", "eval", "lightning validate --ckpt_path=last"),
    ("test", "model", "lightning test --ckpt_path=last"),
    ("test spam/quick/0", "spam/quick/0", "lightning test --ckpt_path=spam/quick/0"),
    ("test --checkpoint=last", "--checkpoint", "--ckpt_path=last"),
    ("test --ckpt_path", "--ckpt_path", "--ckpt_path=last"),
    ("test --ckpt_path --trainer.devices=1", "--ckpt_path", "--ckpt_path=last"),
    ("test --ckpt_path=spam/quik/0", "spam/quik/0", "--ckpt_path=spam/quick/0"),
    (
        f"{QUICK} --ckpt_path=spam/quick/0",
        "SpamClassifier",
        "lightning fit --ckpt_path=runs/spam/quick/version_0/checkpoints/step=000001.ckpt",
    ),
]
# a mistake in run.yaml, its line, a word of it, and the line to write in its place
CONFIGS: list[tuple[str, int, str, str]] = [
    ("trainer:\n\tmax_steps: 1", 2, "\\t", "  max_steps: 1"),
    ("trainer:\n  max_steps:1\n  precision: auto", 2, "line 2", "  max_steps: 1"),
    (
        "trainer: {max_steps: 1 precision: auto}",
        1,
        "':'",
        "trainer: {max_steps: 1, precision: auto}",
    ),
    ("trainer: {max_steps: 1\nseed_everything: 3", 1, "line 1", "trainer: {max_steps: 1}"),
    (
        "trainer:\n  callbacks:\n    EMA: {decay: 0.9}\n    NaNGuard:",
        2,
        "callbacks",
        "callbacks: [{class_path: EMA, init_args: {decay: 0.9}}, {class_path: NaNGuard}]",
    ),
    (
        "trainer:\n  callbacks:\n  - EMA: {decay: 0.9}",
        3,
        "callbacks",
        "- {class_path: EMA, init_args: {decay: 0.9}}",
    ),
    ("trianer:\n  max_steps: 1", 1, "trianer", "trainer:"),
    ("trainer:\n  max_step: 1", 2, "max_step", "max_steps: 1"),
]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder of a user, for the program called lightning."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["/some/bin/lightning"])
    monkeypatch.setattr(sys, "path", [*sys.path])
    Path("notes.txt").write_text("to be or not to be\n" * 100)
    Path("image.png").write_bytes(b"\x89PNG\r\n\x1a\n\xff")
    return tmp_path


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder `runs` with one run, spam/quick/0, of one step."""
    parent = tmp_path_factory.mktemp("finished")
    rows = "".join(f"{label}\tmessage number {i}\n" for i, label in enumerate(["ham", "spam"] * 40))
    (parent / "messages.tsv").write_text(rows)
    words = ["fit", "--config=spam/quick", "--trainer.max_steps=1", "--trainer.logger=false"]
    words += [f"--data.path={parent / 'messages.tsv'}", f"--trainer.default_root_dir={parent}/runs"]
    assert main(words) == 0
    return parent / "runs"


def answer_to(words: list[str], capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Return the lines of the error that a command ends with."""
    capsys.readouterr()
    assert main(words) == 2
    error = capsys.readouterr().err
    lines = error[error.index("lightning: error: ") :].splitlines()
    assert len(lines) <= 4, error
    return lines


def suggestion_in(lines: list[str]) -> str:
    """Return what an error tells to type."""
    assert lines[-1].startswith("  type: "), lines
    return lines[-1].removeprefix("  type: ")


def as_typed(words: list[str], problem: str, suggestion: str) -> list[str]:
    """Return a command after the suggestion was typed: a whole command, or other flags.

    Flags replace the word that the error names, or else the flags of the same names.
    """
    new_words = shlex.split(suggestion)
    if new_words[0] == "lightning":
        return new_words[1:]
    new_names = {word.partition("=")[0] for word in new_words}
    location = re.search(r"on the command line, (\S+?): ", problem)
    wrong = {location[1]} if location else new_names
    kept, position = [], None
    remaining = list(words)
    while remaining:
        word = remaining.pop(0)
        if word not in wrong and word.partition("=")[0] not in wrong:
            kept.append(word)
            continue
        position = len(kept) if position is None else position
        if "=" not in word and remaining and not remaining[0].startswith("--"):
            remaining.pop(0)  # the value
    position = len(kept) if position is None else position
    return [*kept[:position], *new_words, *kept[position:]]


def assert_starts(words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Assert that a command builds trainer, model and data, or prints what it is asked for."""
    monkeypatch.setattr(RavineCLI, "run_subcommand", lambda cli, command: None)
    assert main(words) == 0, capsys.readouterr().err


@pytest.mark.parametrize(("line", "word", "suggestion"), TABLE, ids=[row[0] for row in TABLE])
def test_the_answer_to_a_mistake_names_it_and_what_is_typed_then_works(
    line: str,
    word: str,
    suggestion: str,
    folder: Path,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = shlex.split(line)
    if "ckpt_path" in suggestion and "auto" not in suggestion:
        shutil.copytree(request.getfixturevalue("finished_run"), folder / "runs")
    lines = answer_to(words, capsys)
    assert word in lines[0]
    assert suggestion_in(lines) == suggestion
    assert_starts(as_typed(words, lines[0], suggestion), monkeypatch, capsys)


@pytest.mark.parametrize(("text", "number", "word", "line"), CONFIGS)
def test_the_answer_to_a_mistake_in_a_config_is_the_line_to_write(
    text: str,
    number: int,
    word: str,
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base = ["model: LanguageModel", "data: TextDataModule"]
    words = ["fit", "--config=run.yaml"]
    Path("run.yaml").write_text("\n".join([*base, *text.splitlines()]) + "\n")
    lines = answer_to(words, capsys)
    # the number of a line in the whole file
    assert (f"line {number + len(base)}" if "line" in word else word) in lines[0]
    assert suggestion_in(lines) == line
    Path("run.yaml").write_text("\n".join([*base, *replaced(text.splitlines(), number, line)]))
    assert_starts(words, monkeypatch, capsys)


def replaced(lines: list[str], number: int, line: str) -> list[str]:
    """Return lines with another one in place of a line and, if it is complete, of those below it.

    Args:
        lines: the lines of a file.
        number: the wrong line, from 1.
        line: the line to write; without indentation it gets that of the wrong line.
    """
    old = lines[number - 1].expandtabs(2)
    width = len(old) - len(old.lstrip())
    end = number
    while not line.endswith(":") and end < len(lines):
        if len(lines[end]) - len(lines[end].lstrip()) <= width:
            break
        end += 1
    indent = "" if line.startswith(" ") else " " * width
    return [*lines[: number - 1], indent + line, *lines[end:]]


@pytest.mark.parametrize(
    ("line", "suggestion"),
    [
        ("lr: 3", f"{ADD_ADAMW} --optimizer.lr=3"),
        ("max_steps: 3", "--trainer.max_steps=3"),
    ],
)
def test_a_guess_in_a_config_is_answered_with_a_flag(
    line: str,
    suggestion: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = "model: LanguageModel\ndata: TextDataModule\n"
    Path("run.yaml").write_text(text + line)
    lines = answer_to(["fit", "--config=run.yaml"], capsys)
    assert "line 3" in lines[0]
    assert lines[-1] == f"  remove this line, and type {suggestion}"
    Path("run.yaml").write_text(text)
    assert_starts(["fit", "--config=run.yaml", *shlex.split(suggestion)], monkeypatch, capsys)


@pytest.mark.parametrize("name", ["foo", "model.foo", "data.foo", "trainer.foo", "push_to_hub"])
def test_a_name_like_no_other_is_answered_with_the_command_that_lists_the_arguments(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = answer_to(["fit", "--config", "spam", f"--{name}=3"], capsys)
    assert f"--{name}:" in lines[0]
    assert_starts(shlex.split(suggestion_in(lines))[1:], monkeypatch, capsys)


def test_predict_of_a_module_that_cannot_names_a_command_that_can(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["predict", "--model=Diffusion", "--data=ImageDataModule"]
    lines = answer_to(words, capsys)
    assert lines[0].endswith(
        "predict is not possible with Diffusion, which has no method predict_step(batch, batch_idx)"
    )
    assert suggestion_in(lines) == "lightning generate --ckpt_path=last"
