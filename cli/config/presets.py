"""Configs and checkpoints by name: a config is a file as typed, then with .yaml, then a preset."""

import json
import os
from pathlib import Path

from ravine.errors import UsageError

from ..error_report import unknown_name

SECTIONS = ("model", "data", "trainer", "seed_everything", "ckpt_path")
FOUND_LATER = ("auto", "last", "best", "hpc", "registry", "null")
MAX_BYTES, MAX_VALUES, MAX_LEVELS = 2**18, 10_000, 100  # of a config
INSTALLED = Path(__file__).resolve().parents[2] / "configs"


def installed() -> list[str]:
    """Names of the installed configs: `shakespeare/quick`, `debug/profiler`."""
    files = INSTALLED.rglob("*.yaml")
    return sorted(p.relative_to(INSTALLED).with_suffix("").as_posix() for p in files)


def find(name: str) -> str:
    """Path of the config called ``name``; a file of the user's comes before ours."""
    if name == "-" or name.startswith(("/dev/", "/proc/")):
        raise UsageError(
            f"{name} can be read only once, and every process of a run reads its configs: save it",
            flag="--config=run.yaml",
        )
    for path in (Path(name), Path(name + ".yaml"), INSTALLED / name, INSTALLED / (name + ".yaml")):
        if path.is_file():
            return str(path)
    raise unknown_name(
        f"no config is called {name!r}: no such file, none with .yaml, and no preset",
        name.removesuffix(".yaml"),
        [*installed(), *(p.stem for p in Path().glob("[!.]*.yaml"))],
        "--config={}".format,
        "FILE.yaml",
    )


def checkpoint(words: list[str]) -> None:
    """Refuse a checkpoint that is not there; `auto` and its like are found when the run starts."""
    for word, after in zip(words, [*words[1:], ""], strict=True):
        flag, equals, name = word.partition("=")
        name = name if equals else after
        if flag != "--ckpt_path" or name in FOUND_LATER or "://" in name or os.path.exists(name):
            continue
        there = [str(path) for path in Path(name).parent.glob("*.ckpt")]
        raise unknown_name(
            f"no checkpoint is called {name!r}",
            name,
            [*there, "auto", "last"],
            "--ckpt_path={}".format,
            "auto",
        )


def title(path: str) -> str:
    """What a run with this config is called: `shakespeare/quick`; its folder below `runs`."""
    file = Path(path).resolve()
    for root in (INSTALLED, Path.cwd()):
        if file.is_relative_to(root):
            return file.relative_to(root).with_suffix("").as_posix()
    return file.stem


def check(path: str) -> None:
    """Refuse a file that is no YAML mapping, before the four seconds that importing torch takes."""
    import yaml

    try:
        if (size := Path(path).stat().st_size) > MAX_BYTES:
            why = f"{path} has {size:,} bytes, and a config has at most {MAX_BYTES:,}"
            raise UsageError(
                why, flag="--config=FILE.yaml, with what differs from the defaults alone"
            )
        text = Path(path).read_text(encoding="utf-8")
        check_size(text, path)
        root = yaml.compose(text, yaml.SafeLoader)
        json.dumps(yaml.safe_load(text), default=str)  # refuses tags, and anchors in themselves
    except UnicodeDecodeError as error:
        why = f"{path} is not text: byte {error.start} is not UTF-8"
        raise UsageError(why, flag="--config=FILE.yaml") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{path}, line {mark.line + 1}" if mark else path
        why = getattr(error, "problem", None) or error
        raise UsageError(f"in {place}: not YAML: {why}", flag="key: value") from error
    except UsageError:
        raise
    except (TypeError, ValueError, RecursionError) as error:
        why = f"{path} is YAML, but no plain values: {error}"
        raise UsageError(
            why, ["text", "numbers", "lists", "mappings"], flag="key: value"
        ) from error
    if not isinstance(root, yaml.MappingNode):
        kind = "empty" if root is None else "a list" if root.id == "sequence" else "one value"
        raise UsageError(
            f"{path} is {kind}; it must map keys to values", SECTIONS, flag="model: NAME"
        )
    first: dict[str, int] = {}
    for key, value in root.value:
        line = key.start_mark.line + 1
        if key.value in first:
            why = f"in {path}, line {line}: {key.value!r} stands in line {first[key.value]} already"
            raise UsageError(why, flag=f"{key.value}: once, with what stands below both")
        first[key.value] = line
        if key.value == "trainer" and not isinstance(value, yaml.MappingNode):
            why = f"in {path}, line {line}: 'trainer' must map arguments to values"
            raise UsageError(why, flag="trainer: {max_steps: 100}")


def check_size(text: str, name: str) -> None:
    """Refuse YAML of too many values, aliases counted as what they stand for, before it is built.

    Nine aliases of a list of nine aliases, nine times over, are 341 bytes and 400 million values.
    """
    import yaml

    sizes: dict[str, int] = {}  # of what an anchor names
    open_: list[tuple[str | None, int]] = []  # collections: anchor, values before it
    count = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        if isinstance(event, yaml.CollectionStartEvent):
            open_.append((event.anchor, count))
            count += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = open_.pop()
            if anchor is not None:
                sizes[anchor] = count - before
        elif isinstance(event, yaml.AliasEvent):
            count += sizes.get(event.anchor, 1)
        elif isinstance(event, yaml.ScalarEvent):
            count += 1
            if event.anchor is not None:
                sizes[event.anchor] = 1
        if count > MAX_VALUES or len(open_) > MAX_LEVELS:
            most = f"{MAX_VALUES:,} values and {MAX_LEVELS} levels, aliases counted in full"
            why = f"{name} holds too much: a config has at most {most}"
            raise UsageError(
                why, flag="--config=FILE.yaml, with what differs from the defaults alone"
            )


def check_order(paths: list[str]) -> None:
    """Refuse a config that adds callbacks before another that sets them: it would add nothing."""
    import yaml

    adds = ""
    for path in paths:
        trainer = yaml.safe_load(Path(path).read_text(encoding="utf-8")).get("trainer") or {}
        if adds and "callbacks" in trainer:
            why = f"{adds} adds to trainer.callbacks, and {path} behind it sets them anew"
            raise UsageError(why, flag=f"--config {path} --config {adds}")
        adds = path if "callbacks+" in trainer else adds
