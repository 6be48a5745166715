"""Presets that are interrupted at a random step and continued by the command that they print.

    python benchmarks/resume_presets.py [--seed 0] [--only shakespeare] [--left] [--shell]

Each preset that names a model is trained in a short form: few steps, small batches and networks, on
the CPU. A second run of it gets Ctrl-C at a random step. The command in its `command.txt` is then
run: in this process, which has imported everything, or with `--shell` as typed in a shell. The last
checkpoint and the rows of `metrics.csv` are compared with those of the uninterrupted run, bit for
bit. Presets that need another model first get a short one.

A row a preset goes to rows/resume_presets.jsonl.
"""

import argparse
import contextlib
import csv
import io
import os
import random
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent))  # for `resume_cover` and `record`

import torch
import yaml
from resume_cover import SECONDS, content, differences

from ravine.callbacks import GracefulStop
from ravine.cli.config.presets import CONFIGS_FOLDER, list_presets
from ravine.cli.main import run_command

STEPS = 8  # optimizer steps of a run
# the largest values of a short run, by name of the argument
LIMITS = {
    "num_layers": 2,
    "d_model": 32,
    "num_heads": 2,
    "context_length": 32,
    "batch_size": 8,
    "prompt_length": 12,
    "num_val_prompts": 4,
    "max_new_tokens": 6,
    "base_channels": 16,
    "num_steps": 2,
    "warmup": 2,
    "every_n_steps": 2,
    "steps_per_batch": 1,
    "period": 3,
    "accumulate_grad_batches": 2,
}
DATA_DEFAULTS = {"batch_size": 8}  # of datamodules that leave it to their default
# presets that start from the model of another run
BASES = {
    "shakespeare/lora": "shakespeare/finetune_base",
    "shakespeare/qlora": "shakespeare/finetune_base",
    "shakespeare/full_finetune": "shakespeare/finetune_base",
    "diffusion/lora": "diffusion/digits",
    "gpt2/finetune": "gpt2/finetune",  # in place of the published weights
    "gpt2/lora": "gpt2/finetune",
    "reinforce/quick": "reinforce/quick_base",
    "reinforce/quick_v1": "reinforce/quick_base",
    "reinforce/lora": "reinforce/quick_base",
    **{f"reinforce/avoid_e_v{n}": "reinforce/base" for n in range(1, 7)},
}
Config = dict[str, Any]


def presets() -> list[str]:
    """The presets that describe a whole run; those of lectures may have a model without data."""
    return [
        name
        for name in list_presets()
        if "model" in read(name) and ("data" in read(name) or name.startswith("lectures/"))
    ]


def read(preset: str) -> Config:
    """The values of an installed preset."""
    return yaml.safe_load((CONFIGS_FOLDER / f"{preset}.yaml").read_bytes()) or {}


def limited(value: Any) -> Any:
    """A value in which the arguments of LIMITS are at most as large as there."""
    if isinstance(value, list):
        return [limited(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {
        key: min(item, LIMITS[key])
        if key in LIMITS and isinstance(item, int) and not isinstance(item, bool)
        else limited(item)
        for key, item in value.items()
    }


def class_of(spec: Any) -> str:
    """The class of a callback in a config, a mapping or a name."""
    return spec["class_path"] if isinstance(spec, dict) else spec


def shorten(preset: str, base: Path | None, steps: int = STEPS) -> Config:
    """The short form of a preset, and the checkpoint that it starts from, or None."""
    config = limited(read(preset))
    trainer, data, model = config["trainer"], config.get("data"), config["model"]
    if isinstance(data, dict) and not preset.startswith("lectures/"):
        data["init_args"] = DATA_DEFAULTS | data.get("init_args", {})
    if isinstance(model, dict) and "base_checkpoint" in model.get("init_args", {}):
        model["init_args"] |= {
            "base_checkpoint": str(base),
            "max_new_tokens": LIMITS["max_new_tokens"],  # the default does not fit into the context
        }
    # a kernel for a network of this size takes longer to compile than the run; a compiler is needed
    trainer["callbacks"] = [spec for spec in trainer["callbacks"] if class_of(spec) != "Compile"]
    for spec in trainer["callbacks"]:
        if class_of(spec) == "Pretrained":
            spec["init_args"]["path"] = str(base)
    if "max_epochs" in trainer:  # the cut may fall into the first or the second epoch
        trainer |= {"max_epochs": 2, "limit_train_batches": steps // 2}
    else:
        trainer["max_steps"] = steps
    if "val_check_interval" in trainer:
        trainer["val_check_interval"] = 3 * trainer.get("accumulate_grad_batches", 1)
    trainer |= {"accelerator": "cpu", "limit_val_batches": 2, "log_every_n_steps": 1}
    trainer["enable_progress_bar"] = False
    trainer.pop("enable_checkpointing", None)  # a run without checkpoints cannot be continued
    return config


def train_base(preset: str, folder: Path) -> Path:
    """The last checkpoint of a short run of a preset, without the weights that it starts from."""
    config = shorten(preset, None)
    config["trainer"]["callbacks"] = [
        spec for spec in config["trainer"]["callbacks"] if class_of(spec) != "Pretrained"
    ]
    if preset == "diffusion/digits":  # as the first command of diffusion/lora
        config["data"]["init_args"]["classes"] = [0, 1, 2, 3, 4]
    write(folder, preset, config)
    run(folder, "fit", f"--config={preset}")
    return last_checkpoint(folder / "runs" / preset).resolve()


def write(folder: Path, preset: str, config: Config) -> None:
    """Put a config where `--config PRESET`, typed in the folder, finds it before the preset."""
    path = folder / f"{preset}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(config))


def run(folder: Path, *words: str) -> tuple[int, str]:
    """The status of a command in this process, typed in a folder, and what it prints."""
    output = io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(output):
        sys.argv[:] = ["lightning"]
        status = run_command(list(words))
    if status not in (0, 130):
        raise RuntimeError(f"{shlex.join(words)} ended with {status}: {output.getvalue()[-600:]}")
    return status, output.getvalue()


@contextmanager
def ctrl_c_at(step: int) -> Iterator[None]:
    """Within it, the trainer of a command gets SIGINT in the optimizer step with that number."""

    def press(self: Any, trainer: Any, module: Any, batch: Any, index: int) -> None:
        is_first_batch = index % trainer.accumulate_grad_batches == 0
        if trainer.global_step == step - 1 and is_first_batch:  # a second signal stops at once
            os.kill(os.getpid(), signal.SIGINT)

    GracefulStop.on_train_batch_start = press  # type: ignore[method-assign]
    try:
        yield
    finally:
        del GracefulStop.on_train_batch_start


def last_checkpoint(run_folder: Path) -> Path:
    """The last checkpoint of the first version of a run."""
    return max((run_folder / "version_0" / "checkpoints").iterdir(), key=lambda path: path.name)


def metric_rows(run_folder: Path) -> list[dict[str, str]]:
    """The rows of metrics.csv without measured times."""
    with (run_folder / "version_0" / "metrics.csv").open() as file:
        rows = [
            {
                key: value
                for key, value in row.items()
                if value and not key.endswith("/s") and not any(word in key for word in SECONDS)
            }
            for row in csv.DictReader(file)
        ]
    return [row for row in rows if row.keys() - {"epoch", "step"}]


def type_in_shell(folder: Path, command: str) -> None:
    """Type a command in a shell."""
    program_folder = str(Path(sys.executable).parent)
    environment = os.environ | {"PATH": f"{program_folder}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-c", command], cwd=folder, env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"{command} ended with {done.returncode}: {done.stderr[-600:]}")


def type_here(folder: Path, command: str) -> None:
    """Type a command in this process, which has imported everything."""
    run(folder, *shlex.split(command)[1:])


def cut_and_resume(
    preset: str,
    folder: Path,
    base: Path | None,
    seed: int = 0,
    type_command: Callable[[Path, str], None] = type_here,
) -> dict[str, Any]:
    """Compare an uninterrupted run of a preset with one that is cut, and continued as printed."""
    config = shorten(preset, base)
    write(folder, preset, config)
    cut = random.Random(f"{seed}{preset}").randrange(1, STEPS)
    run(folder, "fit", f"--config={preset}", "--trainer.name=whole")
    with ctrl_c_at(cut):
        status, _ = run(folder, "fit", f"--config={preset}")
    if status != 130:
        return {"outcome": "not interrupted", "cut": cut, "said": [f"status {status}"]}
    cut_folder = folder / "runs" / preset
    command = (cut_folder / "version_0" / "command.txt").read_text().splitlines()[-1]
    type_command(folder, command)
    whole_folder = folder / "runs" / "whole"
    expected, found = last_checkpoint(whole_folder), last_checkpoint(cut_folder)
    said = [] if expected.name == found.name else [f"{found.name} instead of {expected.name}"]
    said += differences(content(expected), content(found))
    if metric_rows(whole_folder) != metric_rows(cut_folder):
        said.append("metrics.csv")
    return {
        "outcome": "different" if said else "bitwise",
        "cut": cut,
        "command": command,
        "said": said[:8],
    }


def main() -> None:
    from record import ROWS, append, machine

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="a part of the names")
    parser.add_argument("--left", action="store_true", help="presets without a good row")
    parser.add_argument("--shell", action="store_true", help="type each command in a shell")
    arguments = parser.parse_args()
    type_command = type_in_shell if arguments.shell else type_here
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    names = [name for name in presets() if arguments.only in name]
    stored = ROWS / "resume_presets.jsonl"
    if arguments.left and stored.exists():
        rows = [yaml.safe_load(line) for line in stored.read_text().splitlines()]
        good = {row["preset"] for row in rows if row["outcome"] == "bitwise"}
        names = [name for name in names if name not in good]
    with tempfile.TemporaryDirectory() as top:
        bases: dict[str, Path] = {}
        for number, preset in enumerate(names, 1):
            start_s = time.process_time()
            folder = Path(top, f"{number}")
            folder.mkdir()
            try:
                if (base := BASES.get(preset)) and base not in bases:
                    base_folder = Path(top, "base", base)
                    base_folder.mkdir(parents=True)
                    bases[base] = train_base(base, base_folder)
                base_path = bases.get(base or "")
                result = cut_and_resume(preset, folder, base_path, arguments.seed, type_command)
            except Exception as error:
                text = f"{type(error).__name__}: {error}"[:600]
                result = {"outcome": "error", "said": [text]}
            seconds = round(time.process_time() - start_s, 2)
            typed_in = "shell" if arguments.shell else "process"
            row = {"preset": preset, **result, "typed_in": typed_in, "steps": STEPS}
            row["seed"] = arguments.seed
            append("resume_presets", row | {"processor_seconds": seconds} | machine())


if __name__ == "__main__":
    main()
