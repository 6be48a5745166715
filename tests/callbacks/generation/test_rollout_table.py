"""RolloutTable prints the samples of the first, the due and the last steps."""

from pathlib import Path
from typing import Any

import pytest
from scripted_module import Scripted, fit

from ravine.callbacks import RolloutTable


def test_the_table_shows_the_first_the_due_and_the_last_rows_without_terminal_codes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = fit(Scripted(), RolloutTable(every_n_steps=3, num_samples=2), tmp_path, 5)
    said = capsys.readouterr().out
    for step in (1, 3, 5):
        assert f"samples of step {step}" in said
    assert "samples of step 2" not in said
    assert "\x1b[31m" not in said
    assert "[bold]" in said
    written = (Path(folder) / "rollouts.txt").read_text()
    assert written.count("reward 0.5") == 6
    with pytest.raises(
        ValueError, match="every_n_steps=0 is too small; allowed: 1 or more; use every_n_steps=10"
    ):
        RolloutTable(every_n_steps=0)


class Validated(Scripted):
    """Writes in validations too."""

    def validation_step(self, batch: Any, index: int) -> None:
        self.rows = [{"text": "of a validation", "reward": 0.5}]

    def training_step(self, batch: Any, index: int) -> Any:
        self.rows = [{"text": "of a step", "reward": 0.5}]
        return super().training_step(batch, index)

    def last_samples(self) -> list[dict[str, Any]]:
        return self.rows


def test_the_last_table_shows_the_last_step_and_no_validation(tmp_path: Path) -> None:
    table = RolloutTable(every_n_steps=10)
    folder = fit(Validated(), table, tmp_path, 2, limit_val_batches=1)
    written = (Path(folder) / "rollouts.txt").read_text()
    assert written.count("of a step") == 2
    assert "of a validation" not in written
