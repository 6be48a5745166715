"""Changes that a user wants, on the presets: one flag changes one value, or the error names a way.

A thirteenth of the pairs of preset and change is checked here, and all of them by
benchmarks/config_changes.py.
"""

import importlib.util
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SPEC = importlib.util.spec_from_file_location("config_changes", BENCHMARKS / "config_changes.py")
assert SPEC is not None
assert SPEC.loader is not None
config_changes = sys.modules.setdefault("config_changes", importlib.util.module_from_spec(SPEC))
SPEC.loader.exec_module(config_changes)

PRESETS, SHARE = config_changes.preset_names(), 13


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["ravine"])


def test_a_change_of_a_preset_is_one_flag_or_an_error_that_says_what_to_add() -> None:
    counted = config_changes.count_outcomes(
        PRESETS, lambda preset, change: (preset + change) % SHARE == 0
    )
    for _, outcomes, _ in counted:
        assert {*outcomes} <= {"changed", "several", "added", "refused"}


def test_the_table_has_forty_changes_and_each_is_checked_on_a_preset() -> None:
    assert len({change.words for change in config_changes.CHANGES}) >= 40
    assert len(PRESETS) >= SHARE


def test_the_check_sees_a_second_value_that_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    preset = config_changes.Preset("spam")
    change = config_changes.CHANGES[0]
    assert config_changes.check(preset, change) == "changed"
    whole = preset.with_flags
    both = " --trainer.callbacks.OptimizerPlan.decay=all"
    monkeypatch.setattr(preset, "with_flags", lambda words: whole(words + both))
    with pytest.raises(AssertionError, match="decay"):
        config_changes.check(preset, change)
