"""`--ckpt_path auto` and `last`: the newest checkpoint of a run's name, found before it begins.

Found here and not by the trainer, because the processes it starts repeat the command: all of them
must read the same file, whatever one of them has written meanwhile.
"""

from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_only

from ravine.strategies.checkpoint_io import newest_valid

from . import presets
from .errors import Mistake
from .given import in_environment, in_words


def settle(argv: list[str]) -> tuple[list[str], Path | None]:
    """The words with the run's name and its checkpoint written out, and that checkpoint."""
    given: dict[str, Any] = {}
    for each in [*in_environment(argv[0]), *in_words(argv[1:])]:
        for value in each.items() if each.key == "trainer" else [each]:
            given[value.key] = value.value
    configs = [word.partition("=")[2] for word in argv if word.startswith("--config=")]
    if "trainer.name" not in given and configs:
        given["trainer.name"] = presets.title(configs[0])
        argv = [*argv, f"--trainer.name={given['trainer.name']}"]
    asked = given.get("ckpt_path")
    if asked not in ("auto", "last"):
        return argv, Path(asked) if asked else None
    root = given.get("trainer.default_root_dir", "runs")
    path = newest(argv[0], asked, given.get("trainer.name"), root)
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
