"""Fixtures of all tests: one thread, fixed seeds, warnings as errors, forked ranks."""

import gc
import os
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported, here and in forked ranks
sys.path.append(str(Path(__file__).parent))  # `ranks`, `external_modules`: by name

import numpy
import pytest
import torch

# Third-party noise that no change of ours can silence: beginning of the text (a regular
# expression without colons), category, and why it is harmless.
POSSIBLE = "lightning.fabric.utilities.warnings.PossibleUserWarning"
JSONARGPARSE = "jsonargparse._deprecated.JsonargparseDeprecationWarning"
NOISE = [
    # LightningCLI of 2.6 calls methods that jsonargparse 4.5x renames; we pin below 5
    ("", JSONARGPARSE),
    # lightning 2.6 asks torch's tree code the old way at every loader
    (r".isinstance\(treespec, LeafSpec\). is deprecated", "FutureWarning"),
    # tiny in-memory sets are faster without worker processes
    (r"The '\w+' does not have many workers", POSSIBLE),
    # on a machine with SLURM: the tests do without
    (r"The .srun. command is available on your system but is not used", POSSIBLE),
    # tests take fewer steps than the interval at which they would be logged
    (r"The number of training batches \(\d+\) is smaller than the logging interval", POSSIBLE),
]


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)
    for text, category in NOISE:
        config.addinivalue_line("filterwarnings", f"ignore:{text}:{category}")


def pytest_collection_finish() -> None:
    """Exclude the imported modules from garbage collection, which would take 0.4 s each time."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With `-n`, a process runs whole files, in the order of their names."""
    from xdist.scheduler import LoadFileScheduling

    config.option.loadscopereorder = False  # the files with the most tests are not the longest
    return LoadFileScheduling(config, log)


@pytest.fixture(autouse=True, scope="module")
def same_environment() -> Iterator[None]:
    """Fixtures of a module may set variables, such as PL_GLOBAL_SEED, until its last test."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(autouse=True)
def same_start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Every test begins with the same generators and leaves the environment as it was."""
    before, imported = dict(os.environ), set(sys.modules)
    folders = str(tmp_path_factory.getbasetemp())
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)
    yield
    os.environ.clear()
    os.environ.update(before)
    for name in set(sys.modules) - imported:  # a file in a test's folder: the next has its own
        if str(getattr(sys.modules[name], "__file__", "")).startswith(folders):
            del sys.modules[name]


@pytest.fixture
def ranks() -> Callable[..., list[Any]]:
    """``ranks(function, world, *args)``: results of ``function(*args)`` in forked gloo ranks."""
    from ranks import run_ranks

    return run_ranks
