"""Environment variables: PL_ and RAVINE_ ones that nobody reads are refused, not passed over."""

from collections.abc import Collection, Mapping

from ravine.errors import UsageError, suggest_names

# Read by Lightning itself (its sources hold no others), and by the front door.
READ = (
    *("PL_GLOBAL_SEED", "PL_SEED_WORKERS", "PL_DEEPSPEED_CONFIG_PATH"),
    *("RAVINE_DEBUG", "RAVINE_FAST_LOOP", "RAVINE_STATUS", "RAVINE_TRACEBACK"),
)
SECTIONS = ("TRAINER", "MODEL", "DATA")


def check(environ: Mapping[str, str], command: str, commands: Collection[str]) -> None:
    """Refuse a variable that looks like a setting and is none.

    The parser reads PL_<COMMAND>__<KEY>. Lightning's own documentation names PL_TRAINER__<KEY>,
    which a program with subcommands ignores: a run of ten steps became one of a thousand epochs.
    What follows PL_<COMMAND>__ is checked by the parser, which knows the keys.
    """
    for name in sorted(environ):
        if not name.startswith(("PL_", "RAVINE_")) or name in READ:
            continue
        if any(name.startswith(f"PL_{known.upper()}__") for known in commands):
            continue
        near = meant(name, command, commands)
        value = environ[name]
        raise UsageError(
            f"no environment variable is called {name}",
            near,
            flag=f"export {near[0]}={value}" if near else f"unset {name}",
            label="nearest",
        )


def meant(name: str, command: str, commands: Collection[str]) -> list[str]:
    """The spelling that is read: PL_FIT__TRAINER__MAX_STEPS for PL_TRAINER_MAX_STEPS."""
    rest = name.split("_", 1)[1].lstrip("_")
    for known in commands:
        rest = rest.removeprefix(known.upper()).lstrip("_")
    for section in SECTIONS:
        if rest.startswith(section + "_"):
            key = rest.removeprefix(section).lstrip("_")
            return [f"PL_{command.upper()}__{section}__{key}"]
    return suggest_names(name, READ)
