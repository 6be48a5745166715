"""Wrong flags and stray words that are answered before torch is imported, which takes seconds.

An answer is given only if it does not depend on an imported class: a typing error in the first part
of a flag (`--cofnig`), a name of another program whose argument is known from source text
(`--max_steps`, and `--lr` if the callback that trains has one `lr`), and a word without a flag. The
parser reports all other mistakes. tests/cli/config/test_early_checks.py compares the answers.
"""

import re
import shlex
from collections.abc import Iterator

from ravine.errors import UsageError, suggest_names

from ..discovery import completion, config_pages, registry
from ..discovery.source_index import Parameter
from . import presets, stray_words
from .guessed_names import GUESSES, canonical

# The first parts of flags, as the parsers of the commands have them, and those that are read before
# the parser. The test compares them with the parsers.
TOP_LEVEL_NAMES = (
    *("config", "seed_everything", "trainer", "model", "data", "ckpt_path", "weights_only"),
    *("print_config", "print_groups", "help", "trust", "optimizer", "schedule"),
)
COMMAND_NAMES = {
    "fit": ("allow_changed_data",),
    "validate": ("verbose",),
    "test": ("verbose",),
    "predict": ("return_predictions",),
}
# `type` of the words that a flag may have as its value
PLAIN_WORD = re.compile(r"[\w./-]*[A-Za-z][\w./-]*")


def check_argv(argv: list[str]) -> None:
    """Raise UsageError for the first wrong name or stray word that can be answered now.

    Args:
        argv: the command and its arguments, with the configs as `--config=PATH`.
    """
    known = known_names(argv[0])
    remaining = list(argv[1:])
    while remaining:
        word = remaining.pop(0)
        name, equals, text = word.partition("=")
        if not name.startswith("--") or name in stray_words.SWITCHES:
            continue
        is_missing = not equals and (not remaining or remaining[0].startswith("--"))
        if not equals and not is_missing:
            text = remaining.pop(0)
        key = name[2:].rstrip("+")
        first = key.partition(".")[0]
        if first in known:
            continue
        # None: only the parser knows
        if is_missing or (fix := correct_flag(argv, key, text)) is None:
            return
        problem = f"on the command line, {name}: {argv[0]} has no argument {first!r}"
        raise UsageError(problem, **fix)
    stray_words.check_stray_words(argv, lambda flag: _stray_fix(argv, flag))


def known_names(command: str) -> tuple[str, ...]:
    """Return the first parts of the flags of a command."""
    return (*TOP_LEVEL_NAMES, *COMMAND_NAMES.get(command, ()))


def correct_flag(argv: list[str], key: str, text: str) -> stray_words.FlagFix | None:
    """Return what to type in place of an unknown flag; None if that is not certain.

    Args:
        argv: the command and its arguments.
        key: the name of the flag without dashes.
        text: its value.
    """
    first, dot, remainder = key.partition(".")
    known = known_names(argv[0])
    guess, near = GUESSES.get(canonical(first)), suggest_names(first, known)
    # a typing error, and not a name of another program that resembles it
    if near and (guess is None or suggest_names(first, known, least=0.85)):
        flag = shlex.quote(f"--{near[0]}{dot}{remainder}={text}")
        is_certain = dot or (near[0] == "config" and text in presets.list_presets())
        return {"allowed": near, "flag": flag, "label": "nearest"} if is_certain else None
    if dot or (guess is not None and guess.value):
        return None
    # a name that is in no table may be an argument of the trainer, such as max_steps
    key = guess.keys[0] if guess else f"trainer.{canonical(first)}"
    new_text = guess.values.get(canonical(text), text) if guess else text
    flag = _certain_flag(argv[1:], key, new_text)
    name = flag.partition("=")[0][2:]
    return {"allowed": [name], "flag": flag, "label": "nearest"} if flag else None


def _stray_fix(argv: list[str], flag: str) -> stray_words.FlagFix | None:
    """Return what to type for `lr=3`, which lacks its dashes; None if that is not certain."""
    key, _, text = flag[2:].partition("=")
    if key.partition(".")[0] not in known_names(argv[0]):
        return correct_flag(argv, key, text)
    certain = _certain_flag(argv[1:], key, text)
    return {"flag": certain} if certain else None


def _certain_flag(arguments: list[str], key: str, text: str) -> str:
    """Return `--key=text` if the run surely has such an argument and accepts the value, else ""."""
    owner, _, argument = key.partition(".")
    is_resumed = any(word.partition("=")[0] == "--ckpt_path" for word in arguments)
    if owner == "seed_everything":
        return f"--{key}={text}" if text.isdigit() else ""
    if owner == "trainer":
        parameters = completion.section_parameters("--trainer", arguments)
    elif is_resumed:  # the checkpoint may have other classes
        return ""
    elif owner in ("data", "model"):
        parameters = config_pages.class_parameters(_class_of(owner, arguments)) or []
    elif owner in ("optimizer", "schedule"):
        parameters = list(_plan_parameters(owner, arguments))
    else:
        return ""
    matching = [p for p in parameters if p.name == argument]
    return f"--{key}={text}" if len(matching) == 1 and _accepts(matching[0], text) else ""


def _class_of(key: str, arguments: list[str]) -> str:
    """Return the class of `--model` or `--data`, of a flag or a config."""
    return completion.named_class(f"--{key}", arguments)


def _plan_parameters(owner: str, arguments: list[str]) -> Iterator[Parameter]:
    """Yield the arguments that a short form may mean in the callback that trains."""
    specs = completion.run_callbacks(arguments)
    plans = []
    for spec in specs:
        entries = registry.find_named(completion.class_path(spec))
        # flags may set further arguments of an appended callback
        if not entries or (entries[0].is_plan and spec not in _config_callbacks(arguments)):
            return
        plans += [(spec, entries[0])] if entries[0].is_plan else []
    if not plans:
        return
    spec, entry = plans[-1]
    inner = completion.nested_class(spec, ["optimizer"])
    settings = spec.get("init_args") if isinstance(spec, dict) else None
    if isinstance(settings, dict) and settings.get("rules"):  # each rule may have an optimizer
        return
    names = {p.name for p in entry.parameters or ()}
    if owner == "schedule":
        if "schedule" in names:
            yield from config_pages.class_parameters("LRSchedule") or []
        return
    yield from entry.parameters or ()
    if inner:
        matching = config_pages.class_parameters(inner) or []
        yield from (p for p in matching if p.name not in names)


def _config_callbacks(arguments: list[str]) -> list[object]:
    return completion.run_callbacks([word for word in arguments if word.startswith("--config=")])


def _accepts(parameter: Parameter, text: str) -> bool:
    """Return whether an argument surely accepts a number, or a plain word."""
    types = set(re.findall(r"\w+", parameter.annotation))
    if text.isdigit():
        return bool(types & {"int", "float"}) and text != "0"
    if re.fullmatch(r"\d+\.\d+|\d+(\.\d+)?e-\d+", text):
        return "float" in types
    return "str" in types and "Literal" not in types and bool(PLAIN_WORD.fullmatch(text))
