"""`lightning show NAME`: a config with all its values, or the page of a class."""

import sys
from pathlib import Path

from ravine.errors import UsageError, suggest_names

from ..config import presets
from ..discovery import class_pages, config_pages, registry
from ..error_report import program_name


def run_argv(argv: list[str]) -> int:
    """Print the pages of the names; several configs are resolved together, in order."""
    names = read_names(argv[1:])
    configs: list[str] = []
    pages: list[str] = []
    for name in names:
        # the path of a preset or a config file; None if there is none of that name
        path = None if name.endswith(".py") else config_path(name)
        if not path and "." not in (module := name.removesuffix(".py")):
            # raises an error if the name is that of a Python file, and says how to name its class
            check_no_python_file(module)
        # classes, data sets and presets of that name, in all lists
        entries = [] if path else class_pages.find_pages(name)
        if not path and not entries:
            raise unknown_error(name)
        configs += [path] if path else []
        pages += [class_pages.class_page(entry, program_name()) for entry in entries]
    if configs:
        pages.insert(0, config_page(configs))
    sys.stdout.write("\n".join(pages))
    return 0


def read_names(words: list[str]) -> list[str]:
    """Return the names in the arguments; `--config NAME` is a name, too.

    Raises:
        UsageError: there is no name, or another flag.
    """
    names, remaining = [], iter(words)
    for word in remaining:
        flag, equals, value = word.partition("=")
        if flag in ("-c", "--config"):
            # a missing name is an empty text, which is reported below
            names.append(value if equals else next(remaining, ""))
        elif word.startswith("-"):
            config = names[0] if names else "shakespeare/quick"
            resolved = f"fit --config {config} {word} --print_config"
            raise UsageError(
                f"show has no flag {flag}; the values of a command with flags are shown by "
                "--print_config",
                flag=f"{program_name()} {resolved if equals else 'show --help'}",
            )
        else:
            names.append(word)
    if not any(names):
        raise UsageError("show needs a name", flag=f"{program_name()} show shakespeare/quick")
    return names


def config_path(name: str) -> str | None:
    """Return the path of the config with this name; None if there is none."""
    try:
        return presets.find_config(name)
    except UsageError:
        return None


def check_no_python_file(module: str) -> None:
    """Raise an error for the name of a Python file, which lists the classes in it."""
    if not Path(f"{module}.py").is_file():
        return
    classes = [e.name for e in registry.user_entries() if e.name.startswith(f"{module}.")]
    raise UsageError(
        f"{module}.py is a file, but show needs the name of a class in it",
        classes,
        flag=f"{program_name()} show {classes[0] if classes else f'{module}.NAME'}",
    )


def config_page(paths: list[str]) -> str:
    """Return the headers of configs, and their values, resolved in order."""
    nodes = [config_pages.load_config(path) for path in paths]
    presets.check_config_order(paths)
    merged = config_pages.merge_configs(nodes)
    headers = [config_pages.read_header(Path(path).read_text(encoding="utf-8")) for path in paths]
    names = " ".join(f"--config {shown_name(path)}" for path in paths)
    lines = [line for header in headers for line in [*header.text.splitlines(), ""] if header.text]
    lines += [
        f"The values of {program_name()} fit {names}",
        f"Further arguments of trainer: {program_name()} show Trainer",
    ]
    comment = "".join(f"# {line}".rstrip() + "\n" for line in lines)
    return comment + config_pages.to_yaml(config_pages.add_defaults(merged))


def shown_name(path: str) -> str:
    """Return a config's name as it is typed: that of a preset, or the path."""
    file = Path(path).resolve()
    return presets.run_name(path) if file.is_relative_to(presets.CONFIGS_FOLDER) else path


def unknown_error(name: str) -> UsageError:
    """Return the error for a name that is in no list, with the nearest names."""
    names = [*(config.name for config in config_pages.list_configs()), *registry.all_names()]
    nearest = suggest_names(name.removesuffix(".yaml"), names)
    flag = f"{program_name()} show {nearest[0]}" if nearest else f"{program_name()} list"
    return UsageError(
        f"no config and no class is called {name!r}", nearest, flag=flag, label="nearest"
    )
