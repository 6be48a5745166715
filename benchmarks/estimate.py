"""Estimates against real steps: peak by torch's allocator, states, parameters and FLOPs.

python benchmarks/estimate.py                        every row of CASES
python benchmarks/estimate.py "--config spam/quick"  one command, with flags of fit

A row a command into rows/estimate.jsonl. `ratio` is the estimated over the measured peak of the
second optimizer step on this CPU. `states` and `parameters` say whether both numbers are equal,
`flops` is the ratio of the counted FLOPs of a micro-batch. Seconds include building the model. Each
command runs in a process of its own.
"""

import argparse
import contextlib
import io
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

from record import append, machine

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from real_step import RealStep, StepWatch
from tensor_bytes import tensor_bytes

from ravine.cli.command import configure_parser, expand_strategy_preset
from ravine.cli.commands.estimate import EstimateCLI, split_flags
from ravine.cli.estimation import SIMULATION_ARGUMENTS
from ravine.cli.main import normalize_argv
from ravine.cli.trainer import Trainer
from ravine.lightning_modules.spam_classifier import hash_ngrams

MIB = 2**20
ADAMW = "--trainer.callbacks+=OptimizerPlan --trainer.callbacks.optimizer=AdamW"
CASES = [
    "--config shakespeare/quick",
    "--config shakespeare/quick_adamw",
    "--config shakespeare/quick --trainer.accumulate_grad_batches=4",
    "--config shakespeare/quick --trainer.callbacks+=EMA",
    "--config shakespeare/quick --trainer.callbacks+=ActivationCheckpointing",
    "--config shakespeare/quick_adamw --trainer.callbacks+=LoRA",
    "--config shakespeare/quick_adamw --trainer.callbacks+=LoRA --trainer.callbacks+=Quantization",
    "--config shakespeare/quick --trainer.precision=bf16-mixed",
    "--config shakespeare/bigram",
    "--config shakespeare/running_mean",
    "--config shakespeare/attention_qkv",
    "--config shakespeare/transformer_char",
    "--config spam/quick",
    "--config spam/lecture0",
    "--config classifier/mnist --data.source=digits",
    "--config diffusion/digits",
    "--config diffusion/digits --trainer.callbacks+=ActivationCheckpointing",
    *(
        "--config gpt2/124m --data.path=TEXT --data.batch_size=1 "
        f"--trainer.accumulate_grad_batches=1{more}"
        for more in (
            "",
            " --trainer.callbacks+=LoRA",
            " --trainer.callbacks+=LoRA --trainer.callbacks+=Quantization",
            " --trainer.callbacks+=ActivationCheckpointing",
        )
    ),
]
# callbacks that act at a validation only
AT_VALIDATION = ("GenerateSamples", "FrechetDistance", "Summary", "Throughput", "SaveFigures")


class Builder(EstimateCLI):
    """Builds module, data and the arguments of the trainer, and runs nothing."""

    def build_trainer(self, **arguments: Any) -> Any:
        self.arguments = dict(arguments)
        return super().build_trainer(**arguments)

    def run_subcommand(self, subcommand: str) -> None:
        pass


def parse(words: list[str], kind: type[EstimateCLI]) -> Any:
    """The command with these words; Builder has real parameters."""
    flags, others = split_flags(words)
    flags.measure = kind is Builder
    argv = expand_strategy_preset(normalize_argv(["fit", *others]))
    sys.argv[1:] = argv
    return kind(argv, None, flags)


def measure(words: list[str]) -> tuple[RealStep, float]:
    """A real step of the command, and its seconds."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, tensor_bytes() as found:
        builder = parse(words, Builder)
        arguments, watch = builder.arguments, StepWatch(counts_flops=True)
        callbacks = [
            c for c in arguments.pop("callbacks") or [] if type(c).__name__ not in AT_VALIDATION
        ]
        for name in ("strategy", "val_check_interval", "check_val_every_n_epoch"):
            arguments.pop(name, None)
        arguments |= SIMULATION_ARGUMENTS
        arguments |= {"callbacks": [*callbacks, watch], "default_root_dir": folder}
        arguments |= {"limit_val_batches": 0}
        Trainer(**arguments).fit(builder.model, datamodule=builder.datamodule)
    parameters = sum(p.numel() for p in builder.model.parameters())
    step = RealStep(watch.peak(found), watch.state_bytes, parameters, watch.flops)
    return step, time.perf_counter() - start


def compare(command: str) -> dict[str, Any]:
    """The estimate and a real step of one command."""
    hash_ngrams.cache_clear()
    start = time.perf_counter()
    result = parse(command.split(), EstimateCLI).result
    seconds = time.perf_counter() - start
    hash_ngrams.cache_clear()
    real, real_seconds = measure(command.split())
    return {
        "command": command,
        "estimated_mib": round(result.peak_bytes / MIB, 3),
        "measured_mib": round(real.peak / MIB, 3),
        "ratio": round(result.peak_bytes / real.peak, 4),
        "parameters": result.num_parameters == real.parameters,
        "states": result.state_bytes == real.state_bytes,
        "flops": round(result.simulation.flops / real.flops, 4) if real.flops else None,
        "seconds": round(seconds, 1),
        "real_seconds": round(real_seconds, 1),
    }


def main() -> None:
    """Measure and store."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("commands", nargs="*", default=CASES)
    parser.add_argument("--dry", action="store_true", help="store no rows")
    arguments = parser.parse_args()
    if len(arguments.commands) > 1:
        # memory that one command has left, and the next one frees, would count in the next one
        options = ["--dry"] if arguments.dry else []
        for command in arguments.commands:
            subprocess.run([sys.executable, __file__, command, *options], check=True)
        return
    configure_parser()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder, "text.txt")
        text.write_text(
            "All the world's a stage, and all the men and women merely players. " * 9999
        )
        for command in arguments.commands:
            with contextlib.redirect_stdout(io.StringIO()):
                row = compare(command.replace("TEXT", str(text)))
            row["command"] = command
            if arguments.dry:
                print(row, flush=True)
            else:
                append("estimate", row | machine())


if __name__ == "__main__":
    main()
