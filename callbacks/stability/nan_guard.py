"""NaNGuard: a loss or gradient that is not a number is named, its step skipped, then the run stops.

A skipped step has no gradients: every optimizer passes over a parameter whose gradient is None, so
weights, momenta and step counts stay as they were, under accumulation and a gradient scaler too.
"""

from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from ravine.errors import RunError, UsageError
from ravine.strategies.checkpoint.saving import first_non_finite

from ..checks.run_checks import add_run_checks


class NonFiniteError(RunError):
    """Training went to NaN or infinity; the text says where."""


class SkippedSteps:
    """Optimizer steps that were not taken, of one fit: in all, and the last ones in a row."""

    def __init__(self) -> None:
        """Nothing has been looked at."""
        self.looked = self.total = self.in_a_row = 0

    def count(self, is_finite: bool) -> None:
        """One step more, taken or left out."""
        self.looked += 1
        self.total += not is_finite
        self.in_a_row = 0 if is_finite else self.in_a_row + 1

    def check_last_steps(self, step: int) -> None:
        """Refuse to call a run done that learned nothing at its end: one bad step may be chance."""
        if self.in_a_row and self.in_a_row >= min(2, self.looked):
            prefix = "no optimizer step was taken: " if self.in_a_row == self.looked else ""
            raise NonFiniteError(
                f"{prefix}the gradient was not finite in the last {self.in_a_row} of "
                f"{self.looked} optimizer steps, up to step {step}, the end of the run; lower the "
                "learning rate, or see where it begins: --trainer.callbacks+=NaNGuard"
            )


class NaNGuard(Callback):
    """Skip up to `max_skips` steps whose loss or gradients are not finite, then stop the run.

    Costs one read by the host at each optimizer step, which waits for the device; with several
    ranks also one all-reduce of a number, since each sees its own loss. An overflow that a gradient
    scaler answers by halving its scale (16-mixed) counts only once the scale has come down to 1.
    Example: `NaNGuard(skip=3)`.

    Args:
        skip: steps to skip in the whole run before it is stopped.
    """

    acts_on_training = True  # a resume without it is another run
    takes_partial_gradients = True  # with ZeRO-1 a rank has the gradients that it owns

    def __init__(self, skip: int = 3) -> None:
        """Set the number of steps that may be lost."""
        if skip < 0:
            raise UsageError(f"NaNGuard: skip={skip} is negative; set 0 to stop at the first")
        self.max_skips = skip
        self.skipped = 0
        self._skipped_steps = SkippedSteps()
        self._losses_finite: Tensor | None = (
            None  # of the losses since the last step, on their device
        )

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Let the run be checked before the first step."""
        add_run_checks(trainer, pl_module, stage)

    @property
    def state_key(self) -> str:
        """There is one a run."""
        return "NaNGuard"

    def state_dict(self) -> dict[str, int]:
        """How many steps were skipped."""
        return {"skipped": self.skipped}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go on counting."""
        self.skipped = state_dict["skipped"]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Count the steps of this fit."""
        self._skipped_steps = SkippedSteps()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """A run whose last steps were all skipped has failed."""
        self._skipped_steps.check_last_steps(trainer.global_step)

    def on_before_backward(
        self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor
    ) -> None:
        """Look at the loss of each micro-batch, without reading it."""
        finite = loss.detach().isfinite().all()
        self._losses_finite = (
            finite if self._losses_finite is None else self._losses_finite & finite
        )

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer
    ) -> None:
        """Decide on all ranks alike; here gradients are summed, unscaled and not yet clipped."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        loss, self._losses_finite = self._losses_finite, None
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        gradients = [p.grad for p in parameters if p.grad is not None]
        finite = _all_finite(loss, gradients, scaler)
        ranks = trainer.world_size if dist.is_initialized() else 1
        if ranks > 1:
            finite = finite.to(pl_module.device, torch.int32)
            dist.all_reduce(finite, dist.ReduceOp.MIN)
        self._skipped_steps.count(is_finite := bool(finite))  # the one read
        if is_finite:
            return
        named = ((f"the gradient of {n}", p.grad) for n, p in pl_module.named_parameters())
        non_finite_name = first_non_finite((name, grad) for name, grad in named if grad is not None)
        if loss is not None and not bool(loss):
            non_finite_name = "the loss"
        if ranks > 1:  # the first rank that knows says it
            answers: list[str | None] = [None] * ranks
            dist.all_gather_object(answers, non_finite_name)
            non_finite_name = next(filter(None, answers), None)
        where = f"{non_finite_name or 'a gradient'} is not finite at step {trainer.global_step}"
        for parameter in parameters:
            parameter.grad = None
        self.skipped += 1
        if self.skipped > self.max_skips:
            raise NonFiniteError(
                f"{where}, after {self.max_skips} skipped steps; the weights are those of the step "
                "before it; lower the learning rate, or clip: --trainer.callbacks+=GradientClipping"
            )
        rank_zero_warn(f"{where}: step skipped ({self.skipped} of {self.max_skips})")


def _all_finite(loss: Tensor | None, gradients: list[Tensor], scaler: Any) -> Tensor:
    """Whether losses and gradients of this rank are finite, unread."""
    shards = [g.to_local() if isinstance(g, DTensor) else g for g in gradients]
    shards = [
        shard for shard in shards if shard.numel()
    ]  # a shard may be empty, which has no largest
    finite = torch.nn.utils.get_total_norm(shards, float("inf")).isfinite()  # keeps a NaN too
    if scaler is not None and scaler.is_enabled():
        finite = finite | (scaler._scale.to(finite.device) > 1)
    return finite if loss is None else finite & loss.to(finite.device)
