"""Flags from a method signature: `--top_k=40` sets the argument `top_k: int | None` of a method.

The arguments of a task's method (generate, export) define its flags; the command line adds none to
them. An argument that takes a text or a sequence of texts is a flag that can be repeated.
"""

import inspect
import shlex
from collections.abc import Callable, Iterable, Sequence
from types import UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from ravine.errors import UsageError

from ..error_report import program_name, unknown_name_error

# Names of other programs, each with the flags that mean the same.
GUESSES = {
    **dict.fromkeys(
        ("max_tokens", "max_length", "length", "n_predict", "num_tokens", "tokens"),
        ("max_new_tokens",),
    ),
    **dict.fromkeys(("temp", "t"), ("temperature",)),
    **dict.fromkeys(
        ("n", "samples", "num_return_sequences", "count", "num_images"), ("num_samples",)
    ),
    **dict.fromkeys(("text", "start", "input", "query"), ("prompt",)),
    **dict.fromkeys(("cfg", "cfg_scale", "guidance", "scale"), ("guidance_scale",)),
    **dict.fromkeys(("steps", "num_inference_steps", "ddim_steps"), ("num_steps",)),
    **dict.fromkeys(("label", "class", "classes", "class_labels"), ("labels",)),
    **dict.fromkeys(
        ("output", "out", "output_dir", "out_dir", "save_dir", "dir"), ("folder", "file")
    ),
    **dict.fromkeys(("scheduler", "method"), ("sampler",)),
    **dict.fromkeys(("topk", "k"), ("top_k",)),
    **dict.fromkeys(("topp", "p", "nucleus"), ("top_p",)),
    **dict.fromkeys(("bs", "batch"), ("batch_size",)),
    **dict.fromkeys(
        ("checkpoint", "ckpt", "model", "load", "weights", "model_path", "checkpoint_path"),
        ("ckpt_path",),
    ),
    **dict.fromkeys(("to", "type"), ("format",)),
}
EXAMPLE_VALUES = {  # of flags without a value
    "ckpt_path": "last",
    "prompt": "A",
    "folder": "exported",
    "file": "samples.png",
    "labels": "0",
    "device": "cpu",
    "temperature": "0.8",
    "format": "safetensors",
}
NUMBER_DESCRIPTIONS = {int: "a whole number", float: "a number"}


class MethodFlag(NamedTuple):
    """An argument of a method that can be set by a flag."""

    value_type: type
    default: Any
    choices: tuple[str, ...] = ()
    is_repeatable: bool = False


def method_flags(method: Callable[..., Any]) -> dict[str, MethodFlag]:
    """Return the arguments of a method that can be set by flags, by name.

    These are the arguments whose type hint is int, float, str, a Literal of texts, or a union with
    one of them. An argument that also accepts a Sequence is a flag that can be repeated.
    """
    hints, flags_by_name = get_type_hints(method), {}
    for name, parameter in inspect.signature(method).parameters.items():
        hint = hints.get(name)
        # the types of a union, X | Y or Union[X, Y]
        members = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
        plain_type = next((t for t in (int, float, str) if t in members), None)
        is_repeatable = any(get_origin(member) is Sequence for member in members)
        literals = (get_args(member) for member in members if get_origin(member) is Literal)
        choices = next(literals, ())
        if choices:
            # (type, default, choices)
            flags_by_name[name] = MethodFlag(str, parameter.default, choices)
        elif plain_type is not None:
            flags_by_name[name] = MethodFlag(
                plain_type, parameter.default, is_repeatable=is_repeatable
            )
    return flags_by_name


def parse_flags(argv: Iterable[str], suggested: str = "prompt") -> list[tuple[str, str]]:
    """Parse `--key=value` and `--key value` into pairs.

    Args:
        argv: the arguments after the command.
        suggested: the flag to suggest for a value without a flag.
    """
    flag_values, remaining = [], iter(argv)
    for word in remaining:
        is_checkpoint = word in ("auto", "last", "best") or word.endswith(".ckpt")
        if is_checkpoint and not word.startswith("-"):
            raise UsageError(
                f"the checkpoint {word!r} has no flag", flag=shlex.quote(f"--ckpt_path={word}")
            )
        if not word.startswith("--"):
            raise UsageError(f"the value {word!r} has no flag", flag=f"--{suggested}={word!r}")
        name, equals, value = word[2:].partition("=")
        if not equals:
            value = next(remaining, None)
            if value is None:
                example = EXAMPLE_VALUES.get(name, "10")
                raise UsageError(f"--{name} has no value", flag=f"--{name}={example}")
        # a flag that is given twice gives two pairs
        flag_values.append((name, value))
    return flag_values


def convert_flags(
    typed_flags: list[tuple[str, str]], flags_by_name: dict[str, MethodFlag], command: str
) -> dict[str, Any]:
    """Convert flag values to their types: the last value is used, repeatable texts form a list.

    Args:
        typed_flags: the flags and values as typed.
        flags_by_name: the flags of the command.
        command: the command, for errors.

    Raises:
        UsageError: a flag is not known, or a value has the wrong type.
    """
    values: dict[str, Any] = {}
    for name, text in typed_flags:
        if name not in flags_by_name:
            raise unknown_flag_error(name, text, flags_by_name, command)
        flag = flags_by_name[name]
        # raises an error for a text that is no value of the flag's type
        value = convert_value(name, text, flag)
        values[name] = [*values.get(name, []), value] if flag.is_repeatable else value
    # a repeatable flag that is given once is a single value
    return {
        name: v[0] if flags_by_name[name].is_repeatable and len(v) == 1 else v
        for name, v in values.items()
    }


def unknown_flag_error(
    name: str, text: str, flags_by_name: dict[str, MethodFlag], command: str
) -> UsageError:
    """Return the error for an unknown flag, with the flag that means the same.

    Args:
        name: the name as typed.
        text: its value.
        flags_by_name: the flags of the command.
        command: generate or export.
    """
    problem = f"{command} has no flag --{name}"
    # the flags of the command that other programs call so
    meanings = [*GUESSES.get(name.lower().replace("-", "_"), ()), name.replace("-", "_")]
    for key in meanings:
        if key in flags_by_name or key == "ckpt_path":
            flag = shlex.quote(f"--{key}={text}")
            return UsageError(problem, [key], flag=flag, label="nearest")
    return unknown_name_error(
        problem,
        name,
        flags_by_name,
        lambda near: shlex.quote(f"--{near}={text}"),
        "NAME",
        f"{program_name()} {command} --help",
    )


def convert_value(name: str, text: str, flag: MethodFlag) -> Any:
    """Convert one value; in repeatable texts \\n is a line break, hard to type in a shell."""
    if flag.choices and text not in flag.choices:
        problem, first = f"--{name} cannot be {text!r}", flag.choices[0]
        raise unknown_name_error(problem, text, flag.choices, lambda n: f"--{name}={n}", first)
    if flag.value_type is str:
        return unescape_text(text) if flag.is_repeatable else text
    try:
        return flag.value_type(text)
    except ValueError:
        fix = f"--{name}={flag.default if isinstance(flag.default, int | float) else 10}"
        allowed = NUMBER_DESCRIPTIONS[flag.value_type]
        raise UsageError(f"--{name} cannot be {text!r}", allowed, flag=fix) from None


def unescape_text(text: str) -> str:
    """Replace \\n by a line break, \\t by a tab, and two backslashes by one."""
    segments = text.split(r"\\")
    return "\\".join(segment.replace(r"\n", "\n").replace(r"\t", "\t") for segment in segments)
