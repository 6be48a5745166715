"""`--ckpt_path auto` and `last`: the newest checkpoint of a run's name, found before it begins.

Found here and not by the trainer, because the processes it starts repeat the command: all of them
must read the same file, whatever one of them has written meanwhile.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_only

from ravine.strategies.checkpoint_io import newest_valid

from . import presets
from .errors import Mistake
from .given import Given, in_environment, in_words


def given(argv: list[str]) -> Iterator[Given]:
    """What the user gave, in the order in which it counts; of `trainer`, each key."""
    for each in [*in_environment(argv[0]), *in_words(argv[1:])]:
        yield from each.items() if each.key == "trainer" else [each]


def settle(argv: list[str]) -> tuple[list[str], Path | None]:
    """The words with the run's name and its checkpoint written out, and that checkpoint."""
    values: dict[str, Any] = {each.key: each.value for each in given(argv)}
    configs = [word.partition("=")[2] for word in argv if word.startswith("--config=")]
    if "trainer.name" not in values and configs:
        values["trainer.name"] = presets.title(configs[0])
        argv = [*argv, f"--trainer.name={values['trainer.name']}"]
    asked = values.get("ckpt_path")
    if asked not in ("auto", "last"):
        return argv, Path(asked) if asked else None
    root = str(values.get("trainer.default_root_dir", "runs"))
    path = newest(argv[0], asked, values.get("trainer.name"), root)
    return [*argv, f"--ckpt_path={path or 'null'}"], path


def newest(command: str, asked: str, name: str | None, root: str) -> Path | None:
    """The newest checkpoint of a name, or of all names if none is given.

    auto: the newest that is whole; where `fit` finds none at all it starts anew. last: the newest,
    which must be there and whole.
    """
    place = Path(root, name or "")
    say = rank_zero_only(print)
    found = place.glob("version_*/checkpoints") if name else place.rglob("checkpoints")
    folders = [folder for folder in found if any(folder.glob("*.ckpt"))]
    age = {f: max(p.stat().st_mtime_ns for p in f.glob("*.ckpt")) for f in folders}
    for folder in sorted(folders, key=lambda f: age[f], reverse=True):
        path, damaged = newest_valid(folder)
        if asked == "last" and damaged:
            raise Mistake(
                f"the last checkpoint, {damaged[0][0]}, cannot be used: {damaged[0][1]}",
                [],
                "--ckpt_path auto, which takes the newest that is whole",
            )
        for broken, reason in damaged:
            say(f"--ckpt_path auto: {broken} is passed over: {reason}")
        if path is not None:
            say(f"--ckpt_path {asked}: {path}")
            return path
    if asked == "auto" and command == "fit":
        say(f"--ckpt_path auto: no checkpoint under {place} yet, starting anew")
        return None
    raise Mistake(
        f"--ckpt_path {asked}: there is no checkpoint under {place}",
        sorted({str(p.parent.parent.relative_to(root)) for p in Path(root).rglob("checkpoints")}),
        "--trainer.name=NAME, or --ckpt_path=FILE",
        "names with checkpoints",
    )
