"""Environment variable checks: an unknown PL_ or RAVINE_ variable is an error, not ignored."""

from collections.abc import Collection, Mapping

from ravine.errors import UsageError, suggest_names

# Variables read by Lightning (its sources have no others) and by Ravine.
KNOWN_VARIABLES = (
    *("PL_GLOBAL_SEED", "PL_SEED_WORKERS", "PL_DEEPSPEED_CONFIG_PATH"),
    *("RAVINE_DEBUG", "RAVINE_FAST_LOOP", "RAVINE_MEMORY_LIMIT"),
    *("RAVINE_STATUS", "RAVINE_TRACEBACK"),
)
CONFIG_SECTIONS = ("TRAINER", "MODEL", "DATA")


def check_env_vars(environ: Mapping[str, str], command: str, commands: Collection[str]) -> None:
    """Raise an error for a variable that looks like a setting but is not read.

    The parser reads PL_<COMMAND>__<KEY>. Lightning's documentation names PL_TRAINER__<KEY>, which a
    program with subcommands ignores: a run of ten steps became one of a thousand epochs. The
    parser, which knows the keys, checks the part after PL_<COMMAND>__.

    Args:
        environ: the environment variables.
        command: the command that runs, for suggestions.
        commands: all commands.
    """
    for name in sorted(environ):
        # KNOWN_VARIABLES: those of Ravine and Lightning that are read
        if not name.startswith(("PL_", "RAVINE_")) or name in KNOWN_VARIABLES:
            continue
        if any(name.startswith(f"PL_{subcommand.upper()}__") for subcommand in commands):
            continue
        # the valid spelling, such as PL_FIT__TRAINER__MAX_STEPS
        suggestions = suggest_variables(name, command, commands)
        value = environ[name]
        raise UsageError(
            f"no environment variable is called {name}",
            suggestions,
            flag=f"export {suggestions[0]}={value}" if suggestions else f"unset {name}",
            label="nearest",
        )


def suggest_variables(name: str, command: str, commands: Collection[str]) -> list[str]:
    """Return the valid spelling: PL_FIT__TRAINER__MAX_STEPS for PL_TRAINER_MAX_STEPS."""
    remainder = name.split("_", 1)[1].lstrip("_")
    for subcommand in commands:
        remainder = remainder.removeprefix(subcommand.upper()).lstrip("_")
    for section in CONFIG_SECTIONS:
        if remainder.startswith(section + "_"):
            key = remainder.removeprefix(section).lstrip("_")
            return [f"PL_{command.upper()}__{section}__{key}"]
    return suggest_names(name, KNOWN_VARIABLES)
