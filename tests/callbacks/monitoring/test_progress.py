"""Output of a run: a bar or lines, plots, samples and a table of predictions."""

import csv
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from external_modules.net_in_init import NetInInit
from external_modules.two_optimizers import TwoOptimizers
from rich.console import Console
from torch.utils.data import DataLoader

from ravine.callbacks import GenerateSamples, PredictionTable, ProgressBar
from ravine.callbacks.generation.predictions import print_table
from ravine.callbacks.monitoring import progress as progress_module
from ravine.callbacks.monitoring.progress import count_total_steps, count_units, format_duration
from ravine.cli.trainer import Trainer


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


class Counting(NetInInit):
    """Counts its own units, as a task of ours does; generates and predicts."""

    unit = "tokens"

    def count_units(self, batch: Any) -> int:
        return 1000 * len(batch[0])

    def generate(self, word: str = "la") -> str:
        return f"{word} {self.trainer.global_step}"

    def predict_dataloader(self) -> DataLoader:
        return DataLoader(list(range(5)), batch_size=2)

    def predict_step(self, batch: Any, batch_idx: int) -> list[dict[str, Any]]:
        return [{"number": i, "half": i / 2, "[word]": f"[bold]{i}, ü"} for i in batch.tolist()]


def trainer(*callbacks: Any, **settings: Any) -> Trainer:
    return Trainer(
        accelerator="cpu",
        callbacks=list(callbacks),
        enable_checkpointing=False,
        enable_model_summary=False,
        **settings,
    )


LINE = (
    r"step (\d+)/(\d+) loss [\d.e-]+  lr 0.01  (?:grad_norm [\d.e-]+  )?[\d,]+ {unit}/s  "
    r"\d+:\d\d of \d+:\d\d"
)


@pytest.mark.parametrize(("kind", "unit"), [(Counting, "tokens"), (NetInInit, "samples")])
def test_without_a_terminal_each_log_interval_is_a_line(
    kind: type[NetInInit], unit: str, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer(max_epochs=3, log_every_n_steps=5).fit(kind())
    lines = [x for x in capsys.readouterr().out.splitlines() if x.startswith("step")]
    found = [re.fullmatch(LINE.replace("{unit}", unit), x) for x in lines if " loss" in x]
    assert [m and m.groups() for m in found] == [("5", "12"), ("10", "12"), ("12", "12")]
    # a norm is known at log steps
    assert ["grad_norm" in x for x in lines if " loss" in x] == [True, True, False]
    validations = [x for x in lines if "val_loss" in x]
    assert [x.split()[1] for x in validations] == ["4/12", "8/12", "12/12"]


def test_a_line_has_at_most_four_metrics(capsys: pytest.CaptureFixture[str]) -> None:
    class Many(NetInInit):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log_dict({f"val/m{i}": float(i) for i in range(9)})

    trainer(max_steps=4).fit(Many())
    lines = [x for x in capsys.readouterr().out.splitlines() if "val/" in x]
    assert [x.count("val/") for x in lines] == [4, 4, 1]
    assert lines[0].startswith("step 4/4  val/m0 0 ")
    assert lines[2] == "          val/m8 8"


def test_a_terminal_shows_a_bar_that_is_redrawn_at_intervals(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(
        progress_module, "Console", lambda: Console(file=screen, force_terminal=True, width=120)
    )
    monkeypatch.setattr(progress_module, "MIN_REDRAW_S", 0.0)
    run = trainer(ProgressBar(refresh_rate=4), max_epochs=2)
    run.fit(Counting())
    run.validate(Counting(), verbose=False)
    text = screen.getvalue()
    assert [f"{n}/8" in text for n in (1, 4, 8)] == [False, True, True]
    assert "tokens/s" in text
    assert "val_loss" in text
    assert "validate" in text
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 2  # the cursor comes back


def test_a_failed_run_restores_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(
        progress_module, "Console", lambda: Console(file=screen, force_terminal=True)
    )
    module = NetInInit()
    module.training_step = lambda *args: 1 / 0  # type: ignore
    with pytest.raises(ZeroDivisionError):
        trainer(max_epochs=1).fit(module)
    assert screen.getvalue().endswith("\x1b[?25h")


def test_a_module_with_manual_optimization_is_shown_without_a_loss(
    capsys: pytest.CaptureFixture[str],
) -> None:
    trainer(max_steps=4, log_every_n_steps=2).fit(TwoOptimizers())
    lines = [x for x in capsys.readouterr().out.splitlines() if x.startswith("step")]
    assert [x.split()[1] for x in lines] == ["2/4", "4/4"]


def test_a_module_with_a_headline_metric_shows_it_instead_of_the_loss_without_a_loss_plot(
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Surrogate(NetInInit):
        progress_metrics = ("train/reward", "train/missing")

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.log("train/reward", 0.25)
            return super().training_step(batch, batch_idx)

    trainer(max_steps=2).fit(Surrogate())
    (line,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("step 2/2 rew")]
    assert line.startswith("step 2/2 reward 0.25  lr 0.01 ")
    assert not Path("runs/surrogate/version_0/loss.png").exists()


def _said() -> str:
    import contextlib

    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        trainer(devices=2, strategy="ddp", max_epochs=1, log_every_n_steps=1).fit(NetInInit())
    return said.getvalue()


def test_only_rank_0_prints_and_its_counts_include_all_ranks(
    ranks: Callable[..., list[Any]],
) -> None:
    first, second = ranks(_said, 2)
    assert "step 2/2" in first
    assert second == ""


def test_steps_are_counted_over_epochs_and_accumulation() -> None:
    totals = []
    for settings in ({"max_epochs": 3}, {"max_epochs": 3, "max_steps": 5}, {"max_steps": 5}):
        for accumulate in (1, 3):
            run = trainer(accumulate_grad_batches=accumulate, limit_val_batches=0, **settings)
            run.fit(NetInInit())
            totals.append((count_total_steps(run), run.global_step))
    assert totals == [(12, 12), (6, 6), (5, 5), (5, 5), (5, 5), (5, 5)]


def test_units_are_rows_of_the_first_tensor_unless_the_module_counts() -> None:
    batch = {"x": [torch.zeros(3, 2)], "y": torch.zeros(7)}
    assert count_units(NetInInit(), batch) == 3
    assert count_units(Counting(), [torch.zeros(2)]) == 2000
    assert count_units(NetInInit(), ["words"]) == 0


def test_durations_are_printed_as_hours_minutes_and_seconds() -> None:
    assert [format_duration(s) for s in (0, 59.6, 61, 3600, 36_061)] == [
        "0:00",
        "1:00",
        "1:01",
        "1:00:00",
        "10:01:01",
    ]


def test_samples_are_kept_for_each_validation_and_the_last_is_printed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    trainer(GenerateSamples({"word": "do"}), max_epochs=2, num_sanity_val_steps=1).fit(Counting())
    text = Path("runs/counting/version_0/samples.txt").read_text()
    assert text == "--- step 4 ---\ndo 4\n--- step 8 ---\ndo 8\n"
    assert capsys.readouterr().out.endswith("--- a sample after step 8 ---\ndo 8\n")


@pytest.mark.filterwarnings("ignore:.*configure_optimizers. returned .None.")
def test_a_module_without_an_optimizer_has_no_rate_to_show(
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Still(NetInInit):
        def configure_optimizers(self) -> None:
            return None

    trainer(ProgressBar(), max_steps=2).fit(Still())
    (line,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("step 2/2 loss")]
    assert " lr " not in line


def test_samples_of_a_module_that_generates_nothing_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"NetInInit has no method generate; .*remove GenerateSamples\(\) from"
    ):
        trainer(GenerateSamples(), max_epochs=1).fit(NetInInit())


def test_predictions_become_a_table_and_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    run = trainer(PredictionTable(max_rows=3))
    run.predict(Counting(), return_predictions=False)
    path = Path("runs/counting/version_0/predictions.csv")
    rows = list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))
    assert [row["number"] for row in rows] == ["0", "1", "2", "3", "4"]
    assert rows[3]["[word]"] == "[bold]3, ü"
    out = capsys.readouterr().out
    assert "[bold]2, ü" in out
    assert "[bold]3" not in out
    assert f"5 rows in {path}" in out


def test_a_long_message_is_cut_and_terminal_codes_are_removed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    print_table([{"message": "\x1b[31m\x1b]0;owned\x07[/red]\\"}, {"message": "long " * 100_000}])
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "\x07" not in out
    assert "[/red]\\" in out
    assert len(out) < 2000


def test_predictions_that_are_not_rows_give_no_table() -> None:
    class Plain(Counting):
        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            return batch

    run = trainer()
    predictions = run.predict(Plain())
    assert predictions is not None
    assert len(predictions) == 3
    assert not list(Path("runs").rglob("predictions.csv"))


def _predict() -> None:
    Trainer(devices=2, strategy="ddp", accelerator="cpu", logger=False).predict(
        Counting(), return_predictions=False
    )


def test_rows_of_several_ranks_are_in_the_order_of_the_data(
    ranks: Callable[..., list[Any]],
) -> None:
    ranks(_predict, 2)
    (path,) = Path("runs").rglob("predictions.csv")
    rows = list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))
    assert [row["number"] for row in rows][:5] == ["0", "1", "2", "3", "4"]
