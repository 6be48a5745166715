"""NaNGuard: skip optimizer steps with a NaN or infinite loss or gradient, then stop the run.

The gradients of a skipped step are set to None. Optimizers skip parameters without a gradient, so
weights, momenta and step counts do not change, also with accumulation and with a gradient scaler.
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
    """Raised for a NaN or infinity in training; the message names the step or tensor."""


class SkippedSteps:
    """Counts of skipped optimizer steps in one fit: the total, and the last ones in a row."""

    def __init__(self) -> None:
        """Start all counts at 0."""
        self.num_steps = self.num_skipped = self.num_consecutive = 0

    def count(self, is_finite: bool) -> None:
        """Count one step, taken or skipped."""
        self.num_steps += 1
        self.num_skipped += not is_finite
        self.num_consecutive = 0 if is_finite else self.num_consecutive + 1

    def check_last_steps(self, step: int) -> None:
        """Raise if a run ends with two or more skipped steps, or had no other steps."""
        if self.num_consecutive and self.num_consecutive >= min(2, self.num_steps):
            prefix = (
                "no optimizer step was taken: " if self.num_consecutive == self.num_steps else ""
            )
            raise NonFiniteError(
                f"{prefix}the gradient was not finite in the last {self.num_consecutive} of "
                f"{self.num_steps} optimizer steps, up to step {step}, the end of the run",
                hint="use a lower learning rate, or add NaNGuard() to Trainer(callbacks=...) to "
                "find the first tensor",
                flag="--trainer.callbacks+=NaNGuard",
            )


class NaNGuard(Callback):
    """Skip up to `max_skips` steps whose loss or gradients are not finite, then stop the run.

    Each optimizer step needs one read by the host, which waits for the device. With several ranks
    it also needs one all-reduce of a number, because each rank has its own loss. A gradient scaler
    (16-mixed) halves its scale at an overflow, which counts only once the scale has reached 1.
    Example: `NaNGuard(max_skips=3)`.

    Args:
        max_skips: number of steps to skip in the whole run before it is stopped.
    """

    acts_on_training = True  # a resume without this callback changes the training
    takes_partial_gradients = True  # with ZeRO-1 a rank has only the gradients that it owns

    def __init__(self, max_skips: int = 3) -> None:
        """Set the number of steps that may be skipped."""
        if max_skips < 0:
            raise UsageError(
                f"NaNGuard: max_skips={max_skips} is negative",
                ["0 (stop at the first) or more"],
                hint="use max_skips=0",
                flag=f"--trainer.callbacks.{type(self).__name__}.max_skips=0",
            )
        self.max_skips = max_skips
        self.num_skipped = 0
        self._skipped_steps = SkippedSteps()
        # whether all losses since the last step are finite, on their device
        self._losses_finite: Tensor | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Add RunChecks to the trainer."""
        add_run_checks(trainer, pl_module, stage)

    @property
    def state_key(self) -> str:
        """Return a constant key: a run has one NaNGuard."""
        return "NaNGuard"

    def state_dict(self) -> dict[str, int]:
        """Return the number of skipped steps."""
        return {"num_skipped": self.num_skipped}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Restore the number of skipped steps."""
        self.num_skipped = state_dict["num_skipped"]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the step counts of this fit."""
        self._skipped_steps = SkippedSteps()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Raise NonFiniteError if the last steps of the run were all skipped."""
        self._skipped_steps.check_last_steps(trainer.global_step)

    def on_before_backward(
        self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor
    ) -> None:
        """Check the loss of each micro-batch on its device, without a read by the host."""
        finite = loss.detach().isfinite().all()
        self._losses_finite = (
            finite if self._losses_finite is None else self._losses_finite & finite
        )

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer
    ) -> None:
        """Skip the step if a loss or gradient of any rank is not finite; raise after too many.

        Lightning calls it with gradients that are summed, unscaled and not yet clipped. All ranks
        decide equally.

        Raises:
            NonFiniteError: `max_skips` steps were skipped before.
        """
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        # a tensor: whether the losses of all micro-batches of this step are finite; None if unknown
        losses_finite = self._losses_finite
        self._losses_finite = None  # the next step has other losses
        # of float16: while its scale is above 1, it skips such steps and lowers the scale itself
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        gradients = [p.grad for p in parameters if p.grad is not None]
        finite = _all_finite(losses_finite, gradients, scaler)
        num_ranks = trainer.world_size if dist.is_initialized() else 1
        if num_ranks > 1:
            finite = finite.to(pl_module.device, torch.int32)  # 0 on any rank gives 0 on all
            dist.all_reduce(finite, dist.ReduceOp.MIN)
        is_finite = bool(finite)  # the only read by the host
        self._skipped_steps.count(is_finite)
        if is_finite:
            return
        # name of the first such gradient on this rank, for the message; None if it has none
        named = ((f"the gradient of {n}", p.grad) for n, p in pl_module.named_parameters())
        non_finite_name = first_non_finite((name, grad) for name, grad in named if grad is not None)
        if losses_finite is not None and not bool(losses_finite):
            non_finite_name = "the loss"
        if num_ranks > 1:  # take the name from the first rank that has one
            gathered_names: list[str | None] = [None] * num_ranks
            dist.all_gather_object(gathered_names, non_finite_name)
            non_finite_name = next(filter(None, gathered_names), None)
        where = f"{non_finite_name or 'a gradient'} is not finite at step {trainer.global_step}"
        for parameter in parameters:
            parameter.grad = None  # optimizers skip parameters without a gradient
        self.num_skipped += 1
        if self.num_skipped > self.max_skips:
            raise NonFiniteError(
                f"{where}, after {self.max_skips} skipped steps; the weights are those before "
                "this step",
                hint="use a lower learning rate, or add GradientClipping() to "
                "Trainer(callbacks=...)",
                flag="--trainer.callbacks+=GradientClipping",
            )
        rank_zero_warn(f"{where}: step skipped ({self.num_skipped} of {self.max_skips})")


def _all_finite(loss: Tensor | None, gradients: list[Tensor], scaler: Any) -> Tensor:
    """Return whether losses and gradients of this rank are finite, as a tensor on the device."""
    shards = [g.to_local() if isinstance(g, DTensor) else g for g in gradients]
    shards = [shard for shard in shards if shard.numel()]  # an empty shard has no maximum
    finite = torch.nn.utils.get_total_norm(shards, float("inf")).isfinite()  # NaN is propagated
    if scaler is not None and scaler.is_enabled():
        finite = finite | (scaler._scale.to(finite.device) > 1)
    return finite if loss is None else finite & loss.to(finite.device)
