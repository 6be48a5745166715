"""Curves: what was logged in a run, one panel a metric, drawn at its end."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor

from ravine.errors import UsageError

from ..checks.run_checks import add_run_checks
from .media_logging import get_run_dir
from .progress import get_log_interval

Curve = list[tuple[int, float | Tensor]]
POINTS = 2000  # of a curve; beyond that every second one is dropped
NUM_COLUMNS = 3  # panels side by side


class RecordedCurves(L.Callback, ABC):
    """Curves of a run that go into its checkpoints, and into a picture at its end."""

    def __init__(self) -> None:
        """Begin with empty curves."""
        self.curves: dict[str, Curve] = {}
        self.step = 0
        self.run_dir: Path | None = None

    @abstractmethod
    def save_plot(self, folder: Path, module: L.LightningModule) -> None:
        """Write the picture into the run's folder."""

    def add_point(self, name: str, value: Tensor) -> bool:
        """Put a value of this step on a curve; true if the curve was too long and lost half."""
        curve = self.curves.setdefault(name, [])
        curve.append((self.step, value.detach().clone()))
        is_thinned = len(curve) > POINTS
        if is_thinned:
            del curve[1::2]
        return is_thinned

    @property
    def state_key(self) -> str:
        """The curves are kept in checkpoints under the class's name."""
        return type(self).__name__

    def state_dict(self) -> dict[str, Any]:
        """The curves as plain numbers."""
        return {name: [(s, float(v)) for s, v in curve] for name, curve in self.curves.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the curves of a checkpoint."""
        self.curves = {name: [tuple(p) for p in curve] for name, curve in state_dict.items()}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Find the folder, which is asked for on all ranks."""
        self.step, self.run_dir = trainer.global_step, get_run_dir(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw."""
        if trainer.is_global_zero and self.run_dir and any(self.curves.values()):
            self.save_plot(self.run_dir, pl_module)

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Draw what there is when the run is stopped; one that fails has other worries."""
        if isinstance(exception, SystemExit | KeyboardInterrupt):
            self.on_train_end(trainer, pl_module)


class Curves(RecordedCurves):
    """Draws `curves.png` in the run's folder; a continued run draws the whole curves.

    Trainer(callbacks=[Curves(["train/reward", "train/kl", "val/reward"])])

    Args:
        metrics: as the module logs them; one that begins with val/ is taken at validations, any
            other one every log interval. All that begin with train/ if not given.
    """

    def __init__(self, metrics: Sequence[str] | None = None) -> None:
        """Begin with empty curves."""
        super().__init__()
        self.metrics, self.is_new_run, self.is_checked = metrics, True, False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Let the metrics be looked for before the first step."""
        add_run_checks(trainer, pl_module, stage)

    def needed_metrics(self) -> tuple[str, list[set[str]]]:
        """One of those that were given, at least."""
        return "metrics", [set(self.metrics)] if self.metrics else []

    def save_plot(self, folder: Path, module: L.LightningModule) -> None:
        """A panel for each metric."""
        save_metric_plot(self.state_dict(), folder / "curves.png")

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Find the folder, and look at the first step whatever the interval."""
        super().on_train_start(trainer, pl_module)
        self.is_new_run, self.is_checked = not self.curves, False

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: STEP_OUTPUT,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Keep the values on their device: nobody has to wait for them."""
        stepped, self.step = trainer.global_step != self.step, trainer.global_step
        first = stepped and not self.is_checked
        if not first and not (stepped and self.step % get_log_interval(trainer) == 0):
            return
        metrics = trainer.callback_metrics
        if first and self.metrics is not None:
            self._check_metrics_logged(metrics, pl_module)
        self.is_checked, is_new_run, self.is_new_run = True, self.is_new_run, False
        if not is_new_run and self.step % get_log_interval(trainer):
            return  # a resumed run has had its first step
        wanted = [n for n in metrics if n[:6] == "train/"] if self.metrics is None else self.metrics
        for name in wanted:
            if name in metrics and name[:4] != "val/":
                self.add_point(name, metrics[name])

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep what a validation has found, if it is wanted."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            metrics = trainer.callback_metrics
            for name in [n for n in self.metrics or () if n[:4] == "val/" and n in metrics]:
                self.add_point(name, metrics[name])

    def _check_metrics_logged(self, metrics: dict[str, Any], module: L.LightningModule) -> None:
        wanted = [n for n in self.metrics or () if n[:4] != "val/"]
        missing = [n for n in wanted if n not in metrics]
        if missing and missing == wanted:
            raise UsageError(
                f"Curves: {type(module).__name__} logs none of {', '.join(missing)}, but "
                f"{', '.join(sorted(metrics)) or 'nothing'}; type --trainer.callbacks.metrics=[...]"
            )
        if missing:
            module.print(f"Curves: {type(module).__name__} logs no {', '.join(missing)}")


def save_metric_plot(curves: dict[str, Any], path: Path) -> None:
    """Write the picture."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no window, no global state
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    num_rows = -(-len(curves) // NUM_COLUMNS)
    figure = Figure(figsize=(4 * NUM_COLUMNS, 2.4 * num_rows), layout="constrained")
    figure.suptitle(path.parent.as_posix(), fontsize=10)
    figure.supxlabel("optimizer step", fontsize=9)
    for index, (name, curve) in enumerate(curves.items(), 1):
        axes = figure.add_subplot(num_rows, NUM_COLUMNS, index, title=name)
        axes.plot(*zip(*curve, strict=True), "o-" if name[:4] == "val/" else "-", ms=3, lw=1.2)
        axes.grid(alpha=0.3)
        axes.title.set_fontsize(9)
        axes.tick_params(labelsize=7)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))  # there is no half a step
    FigureCanvasAgg(figure).print_png(path)
