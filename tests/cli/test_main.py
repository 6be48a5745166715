"""The command-line entry point: help, argument order, errors and exit statuses; no training."""

import errno
import importlib
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException

import ravine.errors
from ravine.cli import error_report, help_text, main
from ravine.cli.config import environment, presets
from ravine.errors import UsageError

Run = Callable[[list[str]], int]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Stands in for the module of every command; `ran` holds the words it was run with."""
    module = SimpleNamespace(ran=[], run_argv=lambda argv: module.ran.append(argv) or 0)
    monkeypatch.setattr(main, "import_module", lambda name: module)
    monkeypatch.setattr(sys, "argv", ["/some/bin/lightning"])
    monkeypatch.setattr(sys, "path", ["/some/bin"])
    return module


WITHOUT_TORCH = {
    "--help": 0,
    "--version": 0,
    "fit --help": 0,
    "test -h": 0,
    "": 0,
    "fti --config x": 2,
    "fti --help": 2,
    "--config x": 2,
    "fit --config nowhere/nothing": 2,
    "fit --config broken.yaml": 2,
    "test --ckpt_path nothing.ckpt": 2,
    "list": 0,
    "list --help": 0,
    "list configs quick": 0,
    "list callbacks": 0,
    "list nothing": 2,
    "show shakespeare/quick": 0,
    "show Muon": 0,
    "show Mouon": 2,
    "new task Planets": 0,
    "new task Planets ": 2,
    "show planets.Planets": 0,
    "completion bash": 0,
    "completion words fit": 0,
}
ASK = """
import sys
from ravine.cli.main import main
print([main(line.split()) for line in sys.argv[1].split(";")], file=sys.stderr)
print(sorted({"torch", "lightning", "jsonargparse", "numpy"} & set(sys.modules)), file=sys.stderr)
"""


def test_help_and_simple_errors_do_not_import_torch(tmp_path: Path) -> None:
    (tmp_path / "broken.yaml").write_text("trainer: [")
    words = [sys.executable, "-c", ASK, ";".join(WITHOUT_TORCH)]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, check=True)
    assert done.stderr.splitlines()[-2:] == [str(list(WITHOUT_TORCH.values())), "[]"]


@pytest.mark.parametrize("name", [None, *main.COMMANDS, *main.LOOKUP_COMMANDS])
def test_a_help_page_has_at_most_ten_lines_of_100_columns(name: str | None) -> None:
    lines = help_text.help_text(name, "lightning").splitlines()
    assert len(lines) <= (10 if name else 5 + len(main.COMMANDS) + len(main.LOOKUP_COMMANDS))
    assert max(map(len, lines)) <= 100


@pytest.mark.parametrize("name", ["lightning", "ravine"])
def test_messages_use_the_name_of_the_called_program(
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", [f"/some/bin/{name}"])
    assert main.main(["fit", "--help"]) == 0
    assert capsys.readouterr().out.startswith(f"usage: {name} fit ")
    assert main.main(["fti", "--config", "a b"]) == 2
    assert capsys.readouterr().err == (
        f"{name}: error: no command is called 'fti'\n"
        "  nearest: fit\n"
        f"  type: {name} fit --config 'a b'\n"
    )


def test_the_version_warns_of_another_lightning_on_the_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "lightning"
    monkeypatch.setenv("PATH", str(tmp_path))
    for text, warned in (("from ravine.cli.main import main", False), ("import other", True)):
        script.write_text(f"#!/bin/sh\n{text}\n")
        script.chmod(0o755)
        assert main.main(["--version"]) == 0
        out = capsys.readouterr().out
        assert out.startswith("ravine ")
        assert (f"warning: {script} is another program" in out) == warned


# Words that mean the same, wherever the config and the command stand among them.
SAME = [
    "fit --config={0} --trainer.callbacks+=EMA --trainer.callbacks.decay=0.9",
    "fit --trainer.callbacks+=EMA --trainer.callbacks.decay=0.9 --config {0}",
    "fit --trainer.callbacks+=EMA -c {0} --trainer.callbacks.decay=0.9",
    "--config={0} fit --trainer.callbacks+=EMA --trainer.callbacks.decay=0.9",
    "--trainer.callbacks+=EMA --trainer.callbacks.decay=0.9 fit -c={0}",
]


@pytest.mark.parametrize("line", SAME)
def test_a_flag_means_the_same_before_and_after_a_config(
    line: str, tmp_path: Path, command: SimpleNamespace
) -> None:
    (tmp_path / "base.yaml").write_text("model: M")
    base = str(tmp_path / "base.yaml")
    words = sys.argv
    assert main.main(line.format(base).split()) == 0
    assert command.ran == [SAME[0].format(base).split()]
    assert sys.argv is words  # the launcher of ranks reads it
    assert sys.argv[1:] == command.ran[0]
    assert sys.path[0] == os.getcwd()
    assert main.normalize_argv(command.ran[0]) == command.ran[0]


def test_a_callback_is_added_to_those_of_a_later_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tmp_path / "base.yaml"
    base.write_text("model: LanguageModel\ntrainer: {callbacks: [{class_path: NaNGuard}]}\n")
    monkeypatch.setattr(sys, "argv", ["ravine"])
    words = "fit --trainer.callbacks+=EMA --trainer.callbacks.decay=0.5 --print_config --config"
    assert main.main([*words.split(), str(base)]) == 0
    shown = capsys.readouterr().out
    assert shown.index("NaNGuard") < shown.index("EMA") < shown.index("decay: 0.5")


def test_several_configs_keep_their_order(tmp_path: Path, command: SimpleNamespace) -> None:
    files = [str(tmp_path / f"{name}.yaml") for name in ("z", "a", "m")]
    for file in files:
        Path(file).write_text("model: M")
    main.main(["fit", *(f"--config={file}" for file in files)])
    assert command.ran == [["fit", *(f"--config={file}" for file in files)]]


def test_a_config_is_a_file_as_typed_then_with_yaml_then_a_preset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(presets, "CONFIGS_FOLDER", tmp_path / "configs")
    monkeypatch.chdir(tmp_path)
    places = [tmp_path / "configs/task/quick.yaml", Path("task/quick.yaml"), Path("task/quick")]
    for place in places:
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text("model: M")
        assert presets.find_config("task/quick") == str(place)
    assert presets.find_config(str(tmp_path / "task/quick.yaml")) == str(
        tmp_path / "task/quick.yaml"
    )
    titles = {presets.run_name(str(place)) for place in places}
    assert titles == {"task/quick"}


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("tsk/quik", "  nearest: task/quick"),
        ("task/quik.yaml", "  nearest: task/quick"),
        ("mein", "  nearest: mine"),
        ("task", "  allowed: task/quick"),
    ],
)
def test_the_error_for_a_missing_config_names_the_nearest(
    name: str, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(presets, "CONFIGS_FOLDER", tmp_path / "configs")
    monkeypatch.chdir(tmp_path)
    for file in ("configs/task/quick.yaml", "mine.yaml"):
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        Path(file).write_text("model: M")
    with pytest.raises(UsageError) as mistake:
        presets.find_config(name)
    assert error_report.message_of(mistake.value, []).splitlines()[1] == line


def test_every_installed_config_is_found_by_its_name() -> None:
    assert [presets.run_name(presets.find_config(name)) for name in presets.list_presets()] == (
        presets.list_presets()
    )


def test_the_flag_debug_shows_the_traceback_and_is_removed_from_the_command(
    command: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.main(["fit", "--debug", "--config", "nothing"]) == 2
    assert "Traceback" in capsys.readouterr().err
    assert main.main(["fit", "--debug"]) == 0
    assert command.ran == [["fit"]]


def test_only_the_first_rank_of_a_machine_prints_errors(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert main.main(["fit", "--config", "nothing"]) == 2
    assert capsys.readouterr().err == ""


def raising(folder: Path, line: str, module: str = "part") -> Run:
    """A `run` whose one line stands in a file of ``folder`` and in a module of that name."""
    folder.mkdir(exist_ok=True)
    file = folder / "part.py"
    file.write_text(f"def run(argv):\n    {line}\n")
    scope: dict[str, Any] = vars(ravine.errors) | {"__name__": module, "OwnError": OwnError}
    scope |= {"Misconfiguration": MisconfigurationException}
    exec(compile(file.read_text(), str(file), "exec"), scope)
    return scope["run"]


class OwnError(UsageError):
    """An error class of a user's module."""


@pytest.mark.parametrize(
    ("line", "status"),
    [
        ('raise UsageError("the text")', 2),
        ('raise UsageTypeError("the text")', 2),
        ('raise MissingFileError("the text")', 2),
        ('raise RunError("the text")', 1),
        ('raise OwnError("the text")', 2),  # of a user, who has written it for the user
        (f'raise OSError({errno.ENOSPC}, "the text")', 1),
        ("raise SystemExit(143)", 143),
    ],
)
def test_an_error_for_the_user_is_one_line_and_a_status(
    line: str,
    status: int,
    tmp_path: Path,
    command: SimpleNamespace,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command.run_argv = raising(tmp_path, line)
    assert main.main(["fit"]) == status
    said = capsys.readouterr().err
    fix = "  allowed: a disk with free space\n  free disk space, then run the same command again\n"
    said = said.removesuffix(fix) if "OSError" in line else said
    saved = "; no checkpoint was saved" if "OSError" in line else ""
    assert said == (f"lightning: error: the text{saved}\n" if "the text" in line else "")


@pytest.mark.parametrize(
    ("module", "line", "kind"),
    [
        ("ravine.callbacks.part", 'int("x")', ValueError),
        ("ravine.callbacks.part", "{}[0]", KeyError),
        ("ravine.callbacks.part", 'raise ValueError("not written for a user")', ValueError),
        ("task", 'raise ValueError("in the module of the user")', ValueError),
        ("task", 'raise RuntimeError("size mismatch")', RuntimeError),
        ("task", 'raise type("UsageError", (ValueError,), {"exit_status": 2})("x")', ValueError),
        ("task", 'raise type("MisconfigurationException", (Exception,), {})("x")', Exception),
        ("task", 'raise type("OutOfMemoryError", (Exception,), {})("x")', Exception),
        ("task", 'raise Misconfiguration("Lightning did not raise it")', Exception),
        ("lightning_addons.part", 'raise ValueError("not Lightning")', ValueError),
        ("lightning.pytorch.part", "None + 1", TypeError),  # a bug met inside Lightning
        ("lightning.pytorch.part", 'int("x")', ValueError),
        (
            "lightning.pytorch.loops.part",
            'raise RuntimeError("no argument is wrong")',
            RuntimeError,
        ),
    ],
)
def test_every_other_error_keeps_its_traceback(
    module: str, line: str, kind: type[Exception], tmp_path: Path, command: SimpleNamespace
) -> None:
    command.run_argv = raising(tmp_path, line, module)
    with pytest.raises(kind):
        main.main(["fit"])


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("lightning.pytorch.trainer.part", 'raise Misconfiguration("the text")'),
        ("lightning.fabric.part", 'raise ValueError("the text")'),
        ("lightning.fabric.part", 'raise KeyError("the text")'),
        ("lightning.pytorch.part", 'raise ModuleNotFoundError("the text")'),
        ("lightning.pytorch.callbacks.part", 'raise RuntimeError("the text")'),
    ],
)
def test_an_error_that_lightning_raises_about_an_argument_is_one_line(
    module: str,
    line: str,
    tmp_path: Path,
    command: SimpleNamespace,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command.run_argv = raising(tmp_path, line, module)
    assert main.main(["fit"]) == 2
    assert capsys.readouterr().err == "lightning: error: the text\n"


def test_each_part_of_an_error_has_a_line_of_its_own(
    command: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(argv: list[str]) -> int:
        raise UsageError("no heads", [4, 8], "set num_heads=4", flag="--model.num_heads=4")

    command.run_argv = run
    assert main.main(["fit"]) == 2
    assert capsys.readouterr().err == (
        "lightning: error: no heads\n  allowed: 4, 8\n  type: --model.num_heads=4\n"
    )
    assert error_report.message_of(UsageError("no heads", hint="use 4"), []) == "no heads\n  use 4"


def test_an_error_of_a_run_has_its_flag_on_the_command_line_and_its_hint_in_a_script() -> None:
    error = ravine.errors.RunError("no value", "a number", "use a=1", flag="--model.a=1")
    assert str(error) == "no value; allowed: a number; use a=1"
    assert (
        error_report.message_of(error, []) == "no value\n  allowed: a number\n  type: --model.a=1"
    )
    assert error_report.exit_status(error) == 1


NO_MEMORY = "allowed: a smaller batch or a smaller model"


@pytest.mark.parametrize(
    ("error", "command", "lines"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device", "a.ckpt"),
            "generate",
            [
                "No space left on device: a.ckpt",
                "allowed: a disk with free space",
                "free disk space, then run the same command again",
            ],
        ),
        (
            PermissionError(errno.EACCES, "Permission denied", "a.ckpt"),
            "fit",
            [
                "Permission denied: a.ckpt",
                "allowed: a path with the needed permission",
                "change the permission, or use another path",
            ],
        ),
        (
            MemoryError(),
            "fit",
            ["out of memory", NO_MEMORY, "type: --data.batch_size=NUMBER"],
        ),
        (
            RuntimeError("DefaultCPUAllocator: not enough memory"),
            "generate",
            [
                "out of memory: DefaultCPUAllocator: not enough memory",
                NO_MEMORY,
                "type: --batch_size=NUMBER",
            ],
        ),
        (MemoryError(), "export", ["out of memory", NO_MEMORY, "use a smaller model"]),
    ],
)
def test_an_error_of_the_system_has_problem_allowed_values_and_fix(
    error: Exception, command: str, lines: list[str]
) -> None:
    assert error_report.exit_status(error) == 1
    assert error_report.message_of(error, [command]) == "\n  ".join(lines)


def test_a_full_disk_after_a_checkpoint_says_from_which_file_to_resume() -> None:
    error = OSError(errno.ENOSPC, "No space left on device")
    error.checkpoint = "step=4.ckpt"  # type: ignore[attr-defined]
    assert error_report.message_of(error, ["fit"]).splitlines() == [
        "No space left on device",
        "  allowed: a disk with free space",
        "  free disk space, then run the same command with --ckpt_path=step=4.ckpt",
    ]


def test_an_error_in_a_process_of_a_loader_is_one_line_without_the_workers_traceback() -> None:
    from torch._utils import ExceptionWrapper

    for kind in (UsageError, ravine.errors.MissingFileError, ravine.errors.RunError):
        try:
            raise kind("picture 3 is damaged: remove it")
        except kind:
            wrapped = ExceptionWrapper(where="in DataLoader worker process 1")
        with pytest.raises(kind, match="Original Traceback") as raised:
            wrapped.reraise()
        assert error_report.exit_status(raised.value) == kind.exit_status
        assert error_report.message_of(raised.value, []) == "picture 3 is damaged: remove it"


SYMLINKED = """
import sys
from ravine.cli.main import main
import ravine.cli.error_report
assert ravine.cli.error_report.__file__.startswith(sys.argv[1]), ravine.cli.error_report.__file__
model = ["fit", "--model=LanguageModel", "--data=TextDataModule", "--trainer.max_steps=1"]
model += ["--trainer.accelerator=cpu", "--trainer.logger=false", "--data.path=text.txt"]
for words in (
    ["fit", "--config=language/quikc"],
    [*model, "--trainer.callbacks=OptimizerPlan", "--trainer.callbacks.optimizer=AdamM"],
    [*model, "--model.width=128", "--model.num_heads=5"],
    [*model, "--trainer.callbacks=OptimizerPlan"],
    [*model[:-1], "--data.path=nothing.txt"],
    [*model, "--trainer.precision=17"],
    [*model, "--trainer.devices=0"],
):
    print(main(words), file=sys.stderr)
"""


def test_behind_a_symlink_a_user_error_is_one_line_with_status_2(tmp_path: Path) -> None:
    """A virtual environment in a home folder that is a link, for example."""
    site = tmp_path / "real" / "ravine"
    site.mkdir(parents=True)
    checkout = Path(__file__).resolve().parents[2]
    folders = ("lightning_modules", "datamodules", "callbacks", "strategies", "cli", "configs")
    for part in [*(checkout / name for name in folders), *(checkout / "ravine").iterdir()]:
        (site / part.name).symlink_to(part)
    (tmp_path / "home").symlink_to("real")
    (tmp_path / "text.txt").write_text("to be or not to be\n" * 200)
    home = str(tmp_path / "home")
    env = os.environ | {"PYTHONPATH": home, "PYTHONWARNINGS": "ignore"}
    words = [sys.executable, "-c", SYMLINKED, home]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, env=env)
    assert "Traceback" not in done.stderr
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert [line for line in lines if line.isdecimal()] == ["2"] * 7, done.stderr
    assert sum(": error: " in line for line in lines) == 7, done.stderr


def test_an_error_of_sharded_tensors_in_a_hook_is_one_line(
    tmp_path: Path,
    command: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Where nothing was sharded, or the traceback is wanted, the error stays as it is."""
    line = 'raise RuntimeError("got mixed torch.Tensor and DTensor")'
    command.run_argv = raising(tmp_path / "theirs", line)
    monkeypatch.delitem(sys.modules, "ravine.strategies.sharding_errors", raising=False)
    with pytest.raises(RuntimeError, match="got mixed"):
        main.main(["fit"])
    sharding = importlib.import_module("ravine.strategies.sharding_errors")
    assert main.main(["fit"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 3
    assert said.startswith("lightning: error: the module or a callback: an operation in a hook (")
    assert said.endswith("  type: --trainer.strategy=ddp\n")
    assert sharding.is_sharding_error(RuntimeError("")) is False
    command.run_argv = raising(tmp_path / "theirs", 'raise RuntimeError("size mismatch")')
    with pytest.raises(RuntimeError, match="size mismatch"):
        main.main(["fit"])
    command.run_argv = raising(tmp_path / "theirs", line)
    monkeypatch.setenv("RAVINE_TRACEBACK", "1")
    with pytest.raises(RuntimeError, match="got mixed"):
        main.main(["fit"])


def test_an_error_of_the_lightning_trainer_is_one_line(
    command: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    from lightning.pytorch import Trainer

    command.run_argv = lambda argv: Trainer(devices=0, accelerator="cpu")
    assert main.main(["fit"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_duplicate_callback_is_one_line(
    command: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    from lightning.pytorch import Trainer
    from lightning.pytorch.callbacks import Timer

    command.run_argv = lambda argv: Trainer(accelerator="cpu", callbacks=[Timer(), Timer()])
    assert main.main(["fit"]) == 2
    assert capsys.readouterr().err.startswith("lightning: error: Found more than one stateful")


def test_a_full_disk_in_a_thread_is_one_error(
    command: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    def write() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def run(argv: list[str]) -> None:
        thread = threading.Thread(target=write)  # TensorBoard's, which keeps the exception ...
        thread.start()
        thread.join()
        write()  # ... and raises it again when asked to write

    command.run_argv = run
    assert main.main(["fit"]) == 1
    assert capsys.readouterr().err == (
        "lightning: error: No space left on device; no checkpoint was saved\n"
        "  allowed: a disk with free space\n"
        "  free disk space, then run the same command again\n"
    )


def test_a_removed_current_folder_is_one_error(
    tmp_path: Path,
    command: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert main.main(["fit"]) == 2
    assert capsys.readouterr().err == (
        "lightning: error: the current folder has been removed\n  type: cd FOLDER\n"
    )


def test_a_ctrl_c_that_lightning_turns_into_an_exit_has_status_130(
    command: SimpleNamespace,
) -> None:
    def run(argv: list[str]) -> int:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            sys.exit(1)

    command.run_argv = run
    assert main.main(["fit"]) == 130


@pytest.mark.parametrize(
    ("name", "said"),
    [("fit", " before the first step: no checkpoint was saved"), ("generate", "")],
)
def test_a_ctrl_c_before_a_handler_is_set_is_one_message(
    name: str, said: str, command: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(argv: list[str]) -> int:
        raise KeyboardInterrupt

    command.run_argv = run
    assert main.main([name]) == 130
    hint = "  run the same command to start again"
    assert capsys.readouterr().err == f"\nstopped by Ctrl-C{said}\n{hint}\n"


def test_torch_and_torchvision_of_different_builds_are_named(
    monkeypatch: pytest.MonkeyPatch, command: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(name: str) -> None:
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(main, "import_module", fail)
    assert main.main(["fit"]) == 2
    assert capsys.readouterr().err == (
        "lightning: error: torch and torchvision are of different builds, "
        "so torchvision cannot be imported\n"
        "  type: pip install --force-reinstall torch torchvision\n"
    )


SIGNALLED = """
import os, signal
from types import SimpleNamespace
from ravine.cli import main as door

def run(argv):
    os.kill(os.getpid(), signal.SIGUSR1)  # it comes while torch is being imported
    if argv[0] == "fit":  # the handler comes later, and lets it through
        signal.signal(signal.SIGUSR1, lambda *_: print("handled"))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})
        signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    return 0

door.import_module = lambda name: SimpleNamespace(run_argv=run)
print(door.main(["fit"]), door.main(["predict"]))  # in predict nobody takes it: dropped
assert not signal.pthread_sigmask(signal.SIG_BLOCK, set())
"""


def test_a_signal_before_a_handler_is_set_stays_pending() -> None:
    done = subprocess.run([sys.executable, "-c", SIGNALLED], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "handled\n0 0\n", "")


@pytest.mark.parametrize(
    "name",
    [
        "PL_GLOBAL_SEED",
        "PL_FIT__TRAINER__MAX_STEPS",
        "PL_TEST__CKPT_PATH",
        "RAVINE_TRACEBACK",
        "PATH",
    ],
)
def test_a_known_environment_variable_is_accepted(name: str) -> None:
    environment.check_env_vars({name: "1"}, "fit", main.COMMANDS)


@pytest.mark.parametrize(
    ("name", "fix"),
    [
        ("PL_TRAINER__MAX_STEPS", "export PL_FIT__TRAINER__MAX_STEPS=7"),
        ("PL_TRAINER_MAX_STEPS", "export PL_FIT__TRAINER__MAX_STEPS=7"),
        ("PL_FIT_TRAINER_MAX_STEPS", "export PL_FIT__TRAINER__MAX_STEPS=7"),
        ("RAVINE_DATA__BATCH_SIZE", "export PL_FIT__DATA__BATCH_SIZE=7"),
        ("PL_GLOBALSEED", "export PL_GLOBAL_SEED=7"),
        ("RAVINE_DEBUGG", "export RAVINE_DEBUG=7"),
        ("PL_WHATEVER", "unset PL_WHATEVER"),
    ],
)
def test_an_unknown_environment_variable_is_refused(name: str, fix: str) -> None:
    with pytest.raises(UsageError) as mistake:
        environment.check_env_vars({name: "7"}, "fit", main.COMMANDS)
    first, *_, last = error_report.message_of(mistake.value, []).splitlines()
    assert first == f"no environment variable is called {name}"
    assert last == f"  type: {fix}"


def test_the_known_variables_include_all_that_lightning_reads() -> None:
    import re

    import lightning

    root = Path(lightning.__file__).parent
    found = {
        name
        for file in root.rglob("*.py")
        if "testing" not in file.parts and "demos" not in file.parts
        for name in re.findall(r'(?<!\[)"(PL_[A-Z_]+)"', file.read_text(encoding="utf-8"))
    }
    assert found <= {name for name in environment.KNOWN_VARIABLES if name.startswith("PL_")}
