"""loss.png: the training and validation loss of a run, drawn at its end."""

from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor

from .progress import log_interval, total_steps

Curve = list[tuple[int, float | Tensor]]
POINTS = 2000  # of a curve; beyond that every second one is dropped


class LossPlot(L.Callback):
    """Draws `loss.png` in the run's folder; a continued run draws the whole curve.

    Trainer(callbacks=[LossPlot()])
    """

    def __init__(self) -> None:
        """Begin with empty curves."""
        self.train: Curve = []
        self.val: Curve = []
        self.every = 1  # optimizer steps whose mean is a point
        self.step = 0
        self.folder: str | None = None
        self.losses: list[Tensor] = []  # since the last point

    @property
    def state_key(self) -> str:
        """The curves are kept in checkpoints under this name."""
        return "LossPlot"

    def state_dict(self) -> dict[str, Any]:
        """The curves as plain numbers."""
        return {
            "train": [(step, float(value)) for step, value in self.train],
            "val": [(step, float(value)) for step, value in self.val],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the curves of a checkpoint."""
        self.train = [tuple(point) for point in state_dict["train"]]
        self.val = [tuple(point) for point in state_dict["val"]]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take a point every log interval, more often in a short run."""
        total = total_steps(trainer)
        self.every = min(log_interval(trainer), max(1, (total or 10_000) // 200))
        self.losses.clear()
        self.step, self.folder = trainer.global_step, trainer.log_dir  # asked for on all ranks

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: STEP_OUTPUT,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Keep the losses on their device: nobody has to wait for them."""
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if isinstance(loss, Tensor):
            self.losses.append(loss.detach() if loss.requires_grad else loss)
        before, self.step = self.step, trainer.global_step
        if self.step == before or self.step % self.every or not self.losses:
            return
        mean = torch.stack(self.losses).mean() * trainer.accumulate_grad_batches
        self.losses.clear()
        self.train.append((self.step, mean))
        if len(self.train) > POINTS:
            del self.train[1::2]
            self.every *= 2

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep the validation loss: the first metric called after it, `val/loss` or `val_loss`."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            metrics = trainer.callback_metrics
            name = next((n for n in metrics if n.startswith("val") and n.endswith("loss")), None)
            if name is not None:
                self.val.append((trainer.global_step, metrics[name].detach().clone()))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw."""
        curves = self.state_dict()
        if trainer.is_global_zero and self.folder and (curves["train"] or curves["val"]):
            unit = getattr(pl_module, "unit", "samples").removesuffix("s")
            nats = " in nats" if unit == "token" else ""
            label = f"loss{nats} (mean per {unit})"
            draw(curves, Path(self.folder) / "loss.png", label, self.every)

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Draw what there is when the run is stopped; one that fails has other worries."""
        if isinstance(exception, SystemExit | KeyboardInterrupt):
            self.on_train_end(trainer, pl_module)


def draw(curves: dict[str, Any], path: Path, label: str, every: int) -> None:
    """Write the picture; a point of the training curve is the mean of `every` steps."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no window, no global state
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot(xlabel="optimizer step", ylabel=label, title=path.parent.as_posix())
    values = [value for curve in curves.values() for _, value in curve if value > 0]
    if values and max(values) > 3 * min(values):
        axes.set_yscale("log")
    steps = f"mean of {every} steps" if every > 1 else "each step"
    if curves["train"]:
        axes.plot(*zip(*curves["train"], strict=True), lw=1, alpha=0.8, label=f"training ({steps})")
    if curves["val"]:
        step, best = min(curves["val"], key=lambda point: point[1])
        marker = f"validation (best {best:.4g} at step {step})"
        axes.plot(*zip(*curves["val"], strict=True), "o-", ms=4, label=marker)
    axes.legend()
    axes.grid(alpha=0.3, which="both")
    FigureCanvasAgg(figure).print_png(path)
