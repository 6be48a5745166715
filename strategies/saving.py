"""One save on all ranks: it succeeds on every one or ends every one, and never writes a NaN."""

import math
from collections.abc import Iterable
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.distributed.tensor import DTensor

from .checkpoint_io import CheckpointError

SQUARABLE = 2.0**64  # the square of this is infinite in fp32, and so is a norm of such weights


def save(trainer: L.Trainer, path: str | Path) -> None:
    """Write one checkpoint, called on all ranks.

    After a stock `trainer.save_checkpoint` whose writer fails, the other ranks wait for it at a
    barrier until their time is over. Here all of them end with its error.
    """
    error: Exception | None = None
    try:
        trainer.save_checkpoint(path, weights_only=False)
    except Exception as problem:
        error = problem
        trainer.strategy.barrier("failed save")  # meets the others at the one that ends a save
    if not trainer.strategy.reduce_boolean_decision(error is None):
        text = trainer.strategy.broadcast(str(error or "another rank could not save"))
        raise error or CheckpointError(text, exit_status=1)


def worth_saving(trainer: L.Trainer) -> bool:
    """Whether the weights are finite on all ranks; where not, a warning names the first."""
    name = non_finite(trainer.lightning_module.named_parameters(), below=SQUARABLE)
    if trainer.strategy.reduce_boolean_decision(name is None):
        return True
    rank_zero_warn(
        f"no checkpoint at step {trainer.global_step}: {name or 'a tensor of another rank'} is "
        "not finite, or its square is not; the last good file stays; "
        "--trainer.callbacks+=NaNGuard stops such a run"
    )
    return False


def non_finite(tensors: Iterable[tuple[str, Tensor]], below: float = math.inf) -> str | None:
    """Name of the first tensor with a NaN or a number not below; one host read where there is none.

    Of a sharded tensor, this rank's part is looked at.
    """
    parts = [
        (name, t.to_local() if isinstance(t, DTensor) else t)
        for name, t in tensors
        if t.is_floating_point() and t.element_size() > 1  # torch has no isfinite for 8 bits
    ]
    parts = [(name, part) for name, part in parts if part.numel()]
    norms = [torch.linalg.vector_norm(part.detach(), math.inf) for _, part in parts]  # keep a NaN
    flags = [norm < below for norm in norms]
    if not flags or bool(torch.stack([flag.to(flags[0].device) for flag in flags]).all()):
        return None
    return next(name for (name, _), flag in zip(parts, flags, strict=True) if not flag)
