"""LossPlot: draw the training and validation loss curves of a run in loss.png at its end."""

from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor

from .plots import RecordedCurves
from .progress import count_total_steps, get_log_interval


class LossPlot(RecordedCurves):
    """Draws the loss curves in `loss.png` in the run's folder; a resumed run draws whole curves.

    Example: `Trainer(callbacks=[LossPlot()])`.
    """

    def __init__(self) -> None:
        """Start with empty curves."""
        super().__init__()
        self.curves = {"train": [], "val": []}
        self.interval = 1  # number of optimizer steps that are averaged in a point
        self.initial_interval = 1  # the interval before a long curve was thinned
        self.losses: list[Tensor] = []  # since the last point
        self._saved_state: dict[str, Any] = {}  # of a checkpoint

    def save_plot(self, folder: Path, module: L.LightningModule) -> None:
        """Draw both curves in one panel; draw nothing for a module with `progress_metrics`."""
        if getattr(module, "progress_metrics", ()):
            return
        unit = getattr(module, "unit", "samples").removesuffix("s")
        nats = " in nats" if unit == "token" else ""
        save_loss_plot(
            self.state_dict(), folder / "loss.png", f"loss{nats} (mean per {unit})", self.interval
        )

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Set the interval of points: the log interval, or less in a short run."""
        super().on_train_start(trainer, pl_module)
        total = count_total_steps(trainer)
        self.interval = min(get_log_interval(trainer), max(1, (total or 10_000) // 200))
        self.initial_interval, self.losses = self.interval, []
        if self._saved_state:  # a resumed run
            self.interval *= self._saved_state["thinned"]
            self.losses = list(self._saved_state["losses"].to(pl_module.device))
            self._saved_state = {}

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Save the losses since the last point."""
        losses = torch.stack(self.losses).cpu() if self.losses else torch.empty(0)
        checkpoint["loss_plot"] = {
            "thinned": self.interval // self.initial_interval,
            "losses": losses,
        }

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Read the losses since the last point, which `on_train_start` restores."""
        self._saved_state = checkpoint.get("loss_plot", {})

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: STEP_OUTPUT,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Keep the losses on their device, which needs no synchronization."""
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if isinstance(loss, Tensor):
            self.losses.append(loss.detach() if loss.requires_grad else loss)
        before, self.step = self.step, trainer.global_step
        if self.step == before or self.step % self.interval or not self.losses:
            return
        mean = torch.stack(self.losses).mean() * trainer.accumulate_grad_batches
        self.losses.clear()
        if self.add_point("train", mean):
            self.interval *= 2

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep the validation loss: the first metric with a name such as `val/loss`, `val_loss`."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            metrics = trainer.callback_metrics
            name = next((n for n in metrics if n.startswith("val") and n.endswith("loss")), None)
            if name is not None:
                self.add_point("val", metrics[name])


def save_loss_plot(curves: dict[str, Any], path: Path, label: str, interval: int) -> None:
    """Draw the PNG file; a point of the training curve is the mean of `interval` steps."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # needs no window or global state
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot(xlabel="optimizer step", ylabel=label, title=path.parent.as_posix())
    values = [value for curve in curves.values() for _, value in curve if value > 0]
    if values and max(values) > 3 * min(values):
        axes.set_yscale("log")
    steps = f"mean of {interval} steps" if interval > 1 else "each step"
    if curves["train"]:
        axes.plot(*zip(*curves["train"], strict=True), lw=1, alpha=0.8, label=f"training ({steps})")
    if curves["val"]:
        step, best = min(curves["val"], key=lambda point: point[1])
        marker = f"validation (best {best:.4g} at step {step})"
        axes.plot(*zip(*curves["val"], strict=True), "o-", ms=4, label=marker)
    axes.legend()
    axes.grid(alpha=0.3, which="both")
    FigureCanvasAgg(figure).print_png(path)
