"""Twelve cases of benchmarks/resume_cover.py, drawn by the commit, are cut twice and are exact.

Its comparison detects lost state, and its cover is complete; the benchmark runs all cases.
"""

import functools
import importlib.util
import itertools
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SPEC = importlib.util.spec_from_file_location("resume_cover", BENCHMARKS / "resume_cover.py")
assert SPEC is not None
assert SPEC.loader is not None
resume_cover = sys.modules.setdefault("resume_cover", importlib.util.module_from_spec(SPEC))
if not hasattr(resume_cover, "cover"):
    SPEC.loader.exec_module(resume_cover)

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cover")
    resume_cover.prepare(path)
    return path


def commit() -> str:
    """The commit, which draws other cases than the one before; of an archive always the same."""
    git = ["git", "-C", str(BENCHMARKS), "rev-parse", "HEAD"]
    return subprocess.run(git, capture_output=True, text=True).stdout.strip() or "archive"


def draw_pairs(key: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Ten cases of the cover on one process, and two on two ranks; workers are the benchmark's."""
    cases = [case for case in resume_cover.cover() if "workers" not in case["loader"]]
    random.Random(key).shuffle(cases)
    two = [case for case in cases if case["strategy"] != "one process"][:2]
    rest = [case for case in cases if case not in two][:10]
    return [case | {"strategy": "one process"} for case in rest], two


def cut_all(cases: list[dict[str, Any]], folder: str, key: str) -> list[dict[str, Any]]:
    return [resume_cover.cut_twice(case, folder, key) for case in cases]


def test_twelve_cases_drawn_by_the_commit_resume_bit_for_bit(folder: Path, ranks: Any) -> None:
    key = commit()
    alone, together = draw_pairs(key)
    found = cut_all(alone, str(folder), key)
    found += ranks(cut_all, 2, together, str(folder), key, timeout=600)[0]  # two of diffusion: 90
    different = [
        (list(case.values()), result)
        for case, result in zip([*alone, *together], found, strict=True)
        if result["outcome"] == "different"
    ]
    assert different == []
    assert sum(result["outcome"] == "bitwise" for result in found) >= 6  # the others are refused


@pytest.mark.parametrize(
    "values",
    [
        {"task": "TwoOptimizers"},  # weights were loaded into 32 bits, and converted afterwards
        {"task": "diffusion", "callbacks": "plan, clipping"},  # forgot losses since the log line
    ],
)
def test_earlier_failures_of_the_cover_in_64_true_are_exact(
    values: dict[str, str], folder: Path
) -> None:
    first = {axis: values[0] for axis, values in resume_cover.AXES.items()}
    case = first | {"loader": "random", "precision": "64-true"} | values
    for key in ("", "another"):  # cut at other steps
        found = resume_cover.cut_twice(case, str(folder), key)
        assert found["outcome"] == "bitwise", found


def test_the_cover_has_each_pair_that_is_not_excluded() -> None:
    cases = resume_cover.cover()
    have = set().union(*map(resume_cover.pairs, cases))
    axes = resume_cover.AXES
    for a, b in itertools.combinations(sorted(axes), 2):
        for pair in itertools.product(((a, x) for x in axes[a]), ((b, y) for y in axes[b])):
            assert pair in have or not resume_cover.allowed(dict(pair)), pair
    assert len(cases) <= 90


@functools.cache
def without_a_fault(callbacks: str, folder: Path) -> str:
    first = {axis: values[0] for axis, values in resume_cover.AXES.items()}
    case = first | {"callbacks": callbacks, "loader": "random", "task": "NetInInit"}
    return resume_cover.cut_twice(case, str(folder))["outcome"]


@pytest.mark.parametrize("name", resume_cover.planted_faults())
def test_a_callback_that_does_not_restore_its_state_is_caught(name: str, folder: Path) -> None:
    callbacks, planted = resume_cover.planted_faults()[name]
    first = {axis: values[0] for axis, values in resume_cover.AXES.items()}
    case = first | {"callbacks": callbacks, "loader": "random", "task": "NetInInit"}
    assert without_a_fault(callbacks, folder) == "bitwise"
    with planted():
        found = resume_cover.cut_twice(case, str(folder), name)
    assert found["outcome"] == "different", found
