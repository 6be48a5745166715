"""Lightning's errors about arguments, in the form of Ravine's: what is wrong, and what to type.

Each row of EXPLANATIONS has a part of Lightning's text, which is the same in all tested versions,
and the error to print instead. Another text of Lightning is printed as it is.
"""

import re
import sys
from collections.abc import Callable
from itertools import pairwise
from typing import Any

from ravine.errors import UsageError

# A row gets the match of its pattern, and the words of the command.
Explanation = Callable[[re.Match[str], list[str]], UsageError]


def last_value(argv: list[str], key: str, default: str = "") -> str:
    """Return the last typed value of a flag; a default if it comes from a config."""
    values = [word.partition("=")[2] for word in argv if word.startswith(f"--{key}=")]
    values += [
        value for word, value in pairwise(argv) if word == f"--{key}" and not value.startswith("--")
    ]
    return values[-1] if values else default


def no_gpu(match: re.Match[str], argv: list[str]) -> UsageError:
    """Explain an accelerator that this machine lacks."""
    torch: Any = sys.modules.get("torch")
    available = ["auto", "cpu"]
    if torch is not None:
        available += ["gpu"] if torch.cuda.is_available() else []
        available += ["mps"] if torch.backends.mps.is_available() else []
    name = last_value(argv, "trainer.accelerator", "gpu")
    return UsageError(
        f"this machine has no accelerator {name!r} that torch can use",
        available,
        flag="--trainer.accelerator=auto",
    )


def missing_gpu(match: re.Match[str], argv: list[str]) -> UsageError:
    """Explain a number of GPUs that this machine lacks."""
    available = [number for number in re.findall(r"\d+", match[2])]
    return UsageError(
        f"this machine has {len(available)} GPUs, but the run needs those numbered {match[1]}",
        [", ".join(available)],
        flag=f"--trainer.devices={len(available)}",
    )


def fraction_needs_epochs(match: re.Match[str], argv: list[str]) -> UsageError:
    """Explain a fraction as val_check_interval, where validation does not follow epochs."""
    value = last_value(argv, "trainer.val_check_interval", "0.5")
    return UsageError(
        f"val_check_interval={value} is a fraction of an epoch, but check_val_every_n_epoch=null "
        "counts batches over all epochs",
        ["a whole number of batches", "a fraction with check_val_every_n_epoch=1"],
        flag=f"--trainer.val_check_interval={value} --trainer.check_val_every_n_epoch=1",
    )


def interval_beyond_epoch(match: re.Match[str], argv: list[str]) -> UsageError:
    """Explain a val_check_interval that is longer than an epoch."""
    return UsageError(
        f"val_check_interval={match[1]} is more than the {match[2]} batches of an epoch",
        [f"1 to {match[2]}", "any number with check_val_every_n_epoch=null"],
        flag="--trainer.check_val_every_n_epoch=null",
    )


def outside_limits(match: re.Match[str], argv: list[str]) -> UsageError:
    """Explain a value of limit_train_batches and its like."""
    value = abs(float(match[1]))
    suggestion = f"{value:g}" if value <= 1 else str(max(1, round(value)))
    return UsageError(
        f"{match[2]}={match[1]} is neither a number of batches nor a fraction",
        ["a whole number of batches", "a fraction from 0.0 to 1.0"],
        flag=f"--trainer.{match[2]}={suggestion}",
    )


def negative_length(match: re.Match[str], argv: list[str]) -> UsageError:
    """Explain a negative max_steps or max_epochs."""
    return UsageError(
        f"{match[1]}={match[2]} is negative",
        ["0 or more", "-1 for no limit"],
        flag=f"--trainer.{match[1]}={match[2].lstrip('-')}",
    )


def wrong_time(match: re.Match[str], argv: list[str]) -> UsageError:
    """Explain a duration that is not written as DD:HH:MM:SS."""
    key = "trainer.max_time" if "Timer" in match[0] else "trainer.val_check_interval"
    return UsageError(
        f"{key.rpartition('.')[2]}={match[1]} is not a time",
        ["DD:HH:MM:SS, for days, hours, minutes and seconds"],
        flag=f"--{key}={as_duration(match[1].strip(chr(39)))}",
    )


def as_duration(text: str) -> str:
    """Return a time as DD:HH:MM:SS: 1h30m, 90 min, 01:30:00 and 5400 are 00:01:30:00."""
    units = {"d": 86400, "h": 3600, "m": 60, "s": 1}
    numbers = [int(number) for number in re.findall(r"\d+", text)]
    if ":" in text:
        seconds = sum(n * f for n, f in zip(reversed(numbers), (1, 60, 3600, 86400), strict=False))
    elif pairs := re.findall(r"(\d+(?:\.\d+)?)\s*([dhms])", text.lower()):
        seconds = round(sum(float(number) * units[unit] for number, unit in pairs))
    else:
        seconds = numbers[0] if numbers else 3600
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return f"{days:02d}:{hours:02d}:{minutes:02d}:{seconds:02d}"


def unknown_profiler(match: re.Match[str], argv: list[str]) -> UsageError:
    """Explain the name of a profiler that does not exist."""
    names = re.findall(r"\w+", match[1])
    value = last_value(argv, "trainer.profiler")
    return UsageError(f"no profiler is called {value!r}", names, flag="--trainer.profiler=simple")


def clipping_algorithm(match: re.Match[str], argv: list[str]) -> UsageError:
    """Explain the name of a clipping algorithm that does not exist."""
    return UsageError(
        f"no gradient_clip_algorithm is called {match[1]!r}",
        ["norm", "value"],
        flag="--trainer.gradient_clip_algorithm=norm",
    )


def no_deepspeed(match: re.Match[str], argv: list[str]) -> UsageError:
    """Explain the strategy deepspeed, whose package is not installed."""
    return UsageError(
        "the strategy deepspeed needs the package deepspeed, which is not installed",
        ["zero1, zero2 and zero3, which are built in"],
        flag="--trainer.strategy=zero3",
    )


EXPLANATIONS: list[tuple[str, Explanation]] = [
    (
        r"No supported gpu backend found|can not run on your system|GPUs requested but none|"
        r"torch_xla",
        no_gpu,
    ),
    (r"You requested gpu: (\[.*?\])\s*But your machine only has: (\[.*?\])", missing_gpu),
    (
        r"`val_check_interval` should be an integer.*when `check_val_every_n_epoch=None`",
        fraction_needs_epochs,
    ),
    (
        r"`val_check_interval` \((\d+)\) must be less than or equal\s+to the number of the "
        r"training batches \((\d+)\)",
        interval_beyond_epoch,
    ),
    (r"invalid value (\S+) for (\w+), it has to be in \[0\.0, 1\.0\] or an int", outside_limits),
    (
        r"`(max_steps|max_epochs)` must be a non-negative integer.*?passed in (-\d+)",
        negative_length,
    ),
    (r"`Timer\(duration=(.*?)\)` is not a valid duration", wrong_time),
    (r"Invalid time format for `val_check_interval`: (.*?)\. Expected", wrong_time),
    (r"`profiler` parameter of `Trainer`, it can only be one of (\[.*\])", unknown_profiler),
    (r"you must have DeepSpeed installed", no_deepspeed),
    (r"`gradient_clip_algorithm` '?(\w+)'? is invalid", clipping_algorithm),
]


def explain(text: str, argv: list[str]) -> UsageError | None:
    """Return an error with what to type, for a text of Lightning; None for an unknown text.

    Args:
        text: the message of Lightning's error.
        argv: the command and its arguments.
    """
    for pattern, explanation in EXPLANATIONS:
        if match := re.search(pattern, text, re.DOTALL):
            return explanation(match, argv)
    return None
