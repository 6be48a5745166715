"""The comparison of benchmarks/resume_cover.py detects lost state, and its cover is complete.

The runs of the cover themselves are the benchmark's; one that once differed stands here.
"""

import functools
import importlib.util
import itertools
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
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
