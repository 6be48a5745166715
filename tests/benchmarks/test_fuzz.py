"""benchmarks/fuzz.py in short: a fixed seed, 25 inputs for each reader, and planted faults."""

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SOURCE = Path(__file__).resolve().parents[2] / "benchmarks" / "fuzz.py"
SPEC = importlib.util.spec_from_file_location("fuzz", SOURCE)
assert SPEC is not None
assert SPEC.loader is not None
fuzz: ModuleType = importlib.util.module_from_spec(SPEC)
sys.modules["fuzz"] = fuzz
SPEC.loader.exec_module(fuzz)


@pytest.mark.parametrize("name", list(fuzz.TARGETS))
def test_no_changed_input_runs_code_hangs_or_gives_a_traceback(name: str) -> None:
    campaign = fuzz.Campaign(name, seed=1, keep=None)
    campaign.run(600, inputs=25)
    assert campaign.counts["inputs"] == 25
    assert campaign.counts["passed_first_check"] > 5
    assert dict(campaign.faults) == {}


def remove_outside(path: Path) -> None:
    (path.parent.parent / "canary" / "passwd").unlink()


def read_outside(path: Path) -> None:
    (path.parent.parent / "canary" / "passwd").read_text()


def run_a_program(path: Path) -> None:
    os.system("true")


def import_a_module(path: Path) -> None:
    import canary_module  # noqa: F401  # pyright: ignore[reportMissingImports]


def take_memory(path: Path) -> None:
    _ = b"x" * (600 * 2**20)


def fail(path: Path) -> None:
    _ = [][0]


@pytest.mark.parametrize(
    ("read", "fault"),
    [
        (remove_outside, "touched: os.remove"),
        (read_outside, "touched: open"),
        (run_a_program, "ran: os.system"),
        (import_a_module, "ran: import canary_module"),
        (take_memory, "grew: 6"),
        (fail, "raised: IndexError"),
        (lambda path: os._exit(3), "crashed"),
    ],
)
def test_a_planted_fault_is_detected(
    monkeypatch: pytest.MonkeyPatch, read: Any, fault: str
) -> None:
    def once_warm(path: Path) -> None:
        if path.parent.name == "input.ckpt":  # not while good files are read
            read(path)

    seeds = lambda: [{"a.bin": b"good"}]  # noqa: E731
    target = fuzz.Target(seeds, once_warm, [], lambda path: True)
    monkeypatch.setitem(fuzz.TARGETS, "planted", target)
    campaign = fuzz.Campaign("planted", seed=1, keep=None)
    campaign.run(600, inputs=1)
    assert any(found.startswith(fault) for found in campaign.faults)
