"""`--ckpt_path auto` and `last`: the newest checkpoint of a run's name, found before it begins.

Found here and not by the trainer, because the processes it starts repeat the command: all of them
must read the same file, whatever one of them has written meanwhile. Where a launcher starts the
ranks, rank 0 finds it for all, because the search compares the checksums of whole files.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_only

from ravine.errors import UsageError
from ravine.strategies.checkpoint.atomic_io import CheckpointError, check, dated

from .checkpoint_connector import config_of, read
from .config import presets
from .config.values import Given, in_environment, in_words
from .rank_zero import from_first
from .trainer import ELSEWHERE


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
        from_first(None)
        return argv, Path(asked) if asked else None
    root = str(values.get("trainer.default_root_dir", "runs"))

    def find() -> str | None:
        found = newest(argv[0], asked, values.get("trainer.name"), root)
        return None if found is None else str(found)

    said = from_first(find)
    path = None if said is None else Path(said)
    return [*argv, f"--ckpt_path={path or 'null'}"], path


def newest(command: str, asked: str, name: str | None, root: str) -> Path | None:
    """The newest checkpoint of a name, or of all names if none is given.

    auto: the newest that is whole; where `fit` finds none at all it starts anew. last: the newest,
    which must be there and whole.
    """
    place = Path(root, name or "")
    say = rank_zero_only(print)
    for path, run in candidates(place, name):
        reason, own = _judged(path)
        if run is not None and reason is None and own not in (None, run):
            continue  # two runs of other names write into one folder
        if reason is None:
            say(f"--ckpt_path {asked}: {path}")
            return path
        if asked == "last":
            raise UsageError(
                f"the last checkpoint, {path}, cannot be used: {reason}",
                flag="--ckpt_path auto, which takes the newest that is whole",
            )
        say(f"--ckpt_path auto: {path} is passed over: {reason}")
    if asked == "auto" and command == "fit":
        say(f"--ckpt_path auto: no checkpoint under {place} yet, starting anew")
        return None
    raise UsageError(
        f"--ckpt_path {asked}: there is no checkpoint under {place}",
        sorted({str(run.parent.relative_to(root)) for run in _runs(Path(root), None)}),
        flag="--trainer.name=NAME, or --ckpt_path=FILE",
        label="names with checkpoints",
    )


def candidates(place: Path, name: str | None) -> Iterator[tuple[Path, str | None]]:
    """Checkpoints of the runs at a place, newest first, and the run's name if one must be asked.

    A run whose checkpoints stand in a folder of their own says so in ELSEWHERE; there the files of
    other runs may be among them.
    """
    found: dict[Path, tuple[int, str | None]] = {}
    for run in _runs(place, name):
        for folder in elsewhere(run):
            for time, path in dated(folder):
                found.setdefault(path, (time, name))
        for time, path in dated(run / "checkpoints"):
            found[path] = time, None
    for path in sorted(found, key=lambda each: (found[each][0], str(each)), reverse=True):
        yield path, found[path][1]


def elsewhere(run: Path) -> list[Path]:
    """The folders outside of a run's own that it has written checkpoints into."""
    try:
        lines = (run / ELSEWHERE).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return []
    return [Path(line) for line in lines if line]


def _runs(place: Path, name: str | None) -> Iterator[Path]:
    if name:
        yield from place.glob("version_*")
        return
    found = {each.parent for mark in ("checkpoints", ELSEWHERE) for each in place.rglob(mark)}
    yield from sorted(found)


def _judged(path: Path) -> tuple[str | None, str | None]:
    """Why a file is no checkpoint to go on from, if it is none, and the name of its run."""
    if reason := check(path):
        return reason, None
    try:
        return None, config_of(read(path), path).get("trainer.name")
    except (CheckpointError, UsageError) as error:  # of another program, in a folder of one's own
        text = error.problem if isinstance(error, UsageError) else str(error)
        return text.partition("\n")[0], None
