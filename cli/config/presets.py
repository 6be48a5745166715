"""Config presets: find a config by name as a file, a file with .yaml, or an installed preset."""

import json
import os
from pathlib import Path

from ravine.errors import UsageError

from ..error_report import program_name, unknown_name_error
from ..run_folders import index

CONFIG_SECTIONS = ("model", "data", "trainer", "seed_everything", "ckpt_path")
RESOLVED_LATER = ("auto", "last", "best", "hpc", "registry", "null")
ROOT_FLAG = "--trainer.default_root_dir"
MAX_CONFIG_BYTES, MAX_CONFIG_VALUES, MAX_CONFIG_LEVELS = 2**18, 10_000, 100  # limits of a config
CONFIGS_FOLDER = Path(__file__).resolve().parents[2] / "configs"


def list_presets() -> list[str]:
    """Return the names of the installed configs: `shakespeare/quick`, `debug/profiler`."""
    files = CONFIGS_FOLDER.rglob("*.yaml")
    return sorted(p.relative_to(CONFIGS_FOLDER).with_suffix("").as_posix() for p in files)


def find_config(name: str) -> str:
    """Return the path of the config called ``name``; a user's file precedes an installed preset.

    Raises:
        UsageError: there is no such config, or it can be read only once.
    """
    # standard input, a pipe, or `<(command)` of a shell
    if name == "-" or name.startswith(("/dev/", "/proc/")):
        raise UsageError(
            f"{name} can be read only once, but every process of a run reads the configs",
            "a file",
            flag="--config=run.yaml",
        )
    # CONFIGS_FOLDER has the presets, such as shakespeare/quick
    for path in (
        Path(name),
        Path(name + ".yaml"),
        CONFIGS_FOLDER / name,
        CONFIGS_FOLDER / (name + ".yaml"),
    ):
        if path.is_file():
            return str(path)
    if name.endswith(".ckpt"):
        raise UsageError(f"{name} is a checkpoint, not a config", flag=f"--ckpt_path={name}")
    names = name.split(",")
    if len(names) > 1 and all(
        member in list_presets() or Path(member).is_file() for member in names
    ):
        flags = " ".join(f"--config {member}" for member in names)
        raise UsageError(f"{name} is no config; several configs are several flags", flag=flags)
    # a folder of presets, such as shakespeare, in which quick is the fastest
    members = [preset for preset in list_presets() if preset.startswith(f"{name.rstrip('/')}/")]
    if members:
        quickest = sorted(members, key=lambda member: (not member.endswith("/quick"), member))
        raise UsageError(
            f"{name} is a folder of configs, not a config",
            quickest,
            flag=f"--config={quickest[0]}",
        )
    if Path(name).is_dir():
        files = sorted(Path(name).glob("*.y*ml"))
        raise UsageError(
            f"{name} is a folder, and a config is a file",
            map(str, files[:6]),
            flag=f"--config={files[0]}" if files else f"{program_name()} list configs",
        )
    # suggests the nearest preset or .yaml file of this folder as --config=NAME
    raise unknown_name_error(
        f"no config is called {name!r}: no such file, none with .yaml, and no preset",
        name.removesuffix(".yaml"),
        [*list_presets(), *(p.stem for p in Path().glob("[!.]*.yaml"))],
        "--config={}".format,
        "FILE.yaml",
        f"{program_name()} list configs",
    )


def check_checkpoint_exists(argv: list[str]) -> None:
    """Raise an error if no checkpoint and no run has the name in `--ckpt_path`.

    `auto`, `last`, `best` and names of runs are resolved later.

    Args:
        argv: the command and its arguments; the last `--trainer.default_root_dir=X` is the folder
            of all runs.
    """
    # ROOT_FLAG is --trainer.default_root_dir. In the form `FLAG X` it is not read here: names of
    # runs are then looked for in `runs`.
    roots = [word.partition("=")[2] for word in argv if word.startswith(f"{ROOT_FLAG}=")]
    root = Path(roots[-1] if roots else "runs")  # the folder of all runs
    for word, next_word in zip(argv, [*argv[1:], ""], strict=True):
        flag, equals, name = word.partition("=")
        name = name if equals else next_word
        if flag == "--ckpt_path" and not equals and (not name or name.startswith("--")):
            raise UsageError(
                "on the command line, --ckpt_path: the value is missing",
                ["a checkpoint", "a run", "auto", "last", "best"],
                flag="--ckpt_path=last",
            )
        # RESOLVED_LATER: auto, last, best and others. "://" marks a URL, which is not checked.
        if flag != "--ckpt_path" or name in RESOLVED_LATER or "://" in name or os.path.exists(name):
            continue
        # a pair (run, whether its best checkpoint is meant) for the name of a run, else None
        if index.split_run_request(name, root):  # the name of a run
            continue
        existing = [str(path) for path in Path(name).parent.glob("*.ckpt")]
        runs = [index.run_name_of(folder, root) for folder in index.find_run_folders(root)]
        fit_command = f"{program_name()} fit --config shakespeare/quick"
        # suggests the nearest of these names as `--ckpt_path=NAME`, or `--ckpt_path=auto` if none
        # is near
        raise unknown_name_error(
            f"no checkpoint is called {name!r}",
            name,
            [
                *existing,
                *runs,
                "auto",
                "last",
                "best",
            ],
            "--ckpt_path={}".format,
            "auto",
            "" if runs or argv[0] == "fit" else fit_command,
        )


def run_name(path: str) -> str:
    """Return the run name for a config, `shakespeare/quick`, which is its folder below `runs`."""
    file = Path(path).resolve()
    for root in (CONFIGS_FOLDER, Path.cwd()):
        if file.is_relative_to(root):
            return file.relative_to(root).with_suffix("").as_posix()
    return file.stem


def check_config_file(path: str) -> None:
    """Raise an error if a file is no YAML mapping.

    This runs before the import of torch, which takes four seconds.
    """
    import yaml

    from . import yaml_repair

    try:
        if (size := Path(path).stat().st_size) > MAX_CONFIG_BYTES:
            raise UsageError(
                f"{path} has {size:,} bytes, too many for a config",
                f"at most {MAX_CONFIG_BYTES:,} bytes",
                "keep only the values that differ from the defaults",
            )
        text = Path(path).read_text(encoding="utf-8")
        # raises an error if aliases would make the built value too large for the memory
        check_yaml_size(text, path)
        root = yaml.compose(text, yaml.SafeLoader)  # nodes, which know their lines
        json.dumps(yaml.safe_load(text), default=str)  # rejects tags and recursive anchors
    except UnicodeDecodeError as error:
        if Path(path).suffix not in (".yaml", ".yml"):  # an image, or an archive
            reason = f"{path} is not a config, which is a YAML file"
            raise UsageError(reason, flag=f"{program_name()} list configs") from error
        reason = f"{path} is not text: byte {error.start} is not UTF-8"
        raise UsageError(reason, hint="save the file as UTF-8") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        location = f"{path}, line {mark.line + 1}" if mark else path
        reason = getattr(error, "problem", None) or error
        problem = f"in {location}: not YAML: {reason}"
        # the number of the wrong line, and the line with the error corrected; None if not found
        repaired = yaml_repair.repaired_line(text, error)
        if repaired is None:
            raise UsageError(
                problem, hint="correct the line; a key and its value are `key: value`"
            ) from error
        number, line = repaired
        if mark and number != mark.line + 1:
            problem = f"{problem}; the cause is in line {number}"
        raise UsageError(problem, flag=line.rstrip()) from error
    except UsageError:
        raise
    except (TypeError, ValueError, RecursionError) as error:
        reason = f"{path} is YAML with values that are not plain: {error}"
        raise UsageError(
            reason, ["text", "numbers", "lists", "mappings"], flag="key: value"
        ) from error
    # `root` is None for an empty file
    if not isinstance(root, yaml.MappingNode):
        found_type = "empty" if root is None else "a list" if root.id == "sequence" else "one value"
        raise UsageError(
            f"{path} is {found_type}, but a config maps keys to values",
            CONFIG_SECTIONS,
            flag="model: LanguageModel",
        )
    first_lines: dict[str, int] = {}  # line of each top-level key
    # YAML accepts a key twice, and the later value would silently replace the first
    for key, value in root.value:
        line = key.start_mark.line + 1
        if key.value in first_lines:
            first_line = first_lines[key.value]
            reason = f"in {path}, line {line}: {key.value!r} is already in line {first_line}"
            raise UsageError(reason, ["each key once"], f"join both under one {key.value!r}")
        first_lines[key.value] = line
        if key.value == "trainer" and not isinstance(value, yaml.MappingNode):
            reason = f"in {path}, line {line}: 'trainer' must map arguments to values"
            raise UsageError(reason, flag="trainer: {max_steps: 100}")


def check_yaml_size(text: str, name: str) -> None:
    """Raise an error for YAML with too many values before it is built; aliases count in full.

    Nine aliases of a list of nine aliases, nine levels deep, are 341 bytes and 400 million values.

    Args:
        text: the YAML text.
        name: the file, for errors.
    """
    import yaml

    # `&name` (anchor) marks a value, and each `*name` (alias) repeats it
    sizes: dict[str, int] = {}  # number of values by anchor
    open_collections: list[tuple[str | None, int]] = []  # anchor, and number of values before
    count = 0
    # The parser yields events in order of the text, and builds no values.
    for event in yaml.parse(text, yaml.SafeLoader):
        if isinstance(event, yaml.CollectionStartEvent):
            open_collections.append((event.anchor, count))
            count += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, count_before = open_collections.pop()
            if anchor is not None:
                # the size of the whole collection, each alias in it counted in full
                sizes[anchor] = count - count_before
        elif isinstance(event, yaml.AliasEvent):
            count += sizes.get(event.anchor, 1)
        elif isinstance(event, yaml.ScalarEvent):
            count += 1
            if event.anchor is not None:
                sizes[event.anchor] = 1
        if count > MAX_CONFIG_VALUES or len(open_collections) > MAX_CONFIG_LEVELS:
            raise UsageError(
                f"{name} is too large for a config",
                f"at most {MAX_CONFIG_VALUES:,} values and {MAX_CONFIG_LEVELS} levels, aliases "
                "counted in full",
                "keep only the values that differ from the defaults",
            )


def check_config_order(paths: list[str]) -> None:
    """Raise an error if a config that adds callbacks precedes one that sets them.

    The second config would discard the added callbacks.
    """
    import yaml

    adding_config = ""
    for path in paths:
        trainer = yaml.safe_load(Path(path).read_text(encoding="utf-8")).get("trainer") or {}
        if adding_config and "callbacks" in trainer:
            reason = f"{adding_config} adds to trainer.callbacks, but {path} after it replaces them"
            raise UsageError(reason, flag=f"--config {path} --config {adding_config}")
        adding_config = path if "callbacks+" in trainer else adding_config
