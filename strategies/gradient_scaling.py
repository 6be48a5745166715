"""Unscale sharded gradients under `16-mixed`, and skip a step on all ranks or on none.

torch's GradScaler divides gradients by the scale, and skips the step if one is not finite. It does
not support sharded gradients beside whole ones: either kind may stay scaled. It also decides on
each rank alone, although only one rank may have the shard that is not finite. Here it gets this
rank's shards as plain tensors, and the ranks share the result in one all-reduce of a number.
"""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor


def unscale_on_all_ranks(scaler: Any) -> None:
    """Make a GradScaler unscale this rank's shards, and agree with the scalers of other ranks."""
    unscale_local = type(scaler)._unscale_grads_

    def unscale_grads(
        optimizer: Any, inv_scale: Tensor, found_inf: Tensor, allow_fp16: bool
    ) -> dict[torch.device, Tensor]:
        local = SimpleNamespace(param_groups=[{"params": list(_params_with_grad(optimizer))}])
        flags = unscale_local(scaler, local, inv_scale, found_inf, allow_fp16)
        flags = flags or {found_inf.device: found_inf}  # a rank may have no gradient
        for flag in flags.values():
            dist.all_reduce(flag, dist.ReduceOp.MAX)
        return flags

    vars(scaler)["_unscale_grads_"] = unscale_grads


def restore_scaler(scaler: Any) -> None:
    """Undo `unscale_on_all_ranks`; do nothing for None."""
    if scaler is not None:
        vars(scaler).pop("_unscale_grads_", None)


def _params_with_grad(optimizer: Any) -> Iterator[Tensor]:
    """Yield parameters with a gradient; for a sharded one a plain tensor with its memory."""
    for parameter in (p for group in optimizer.param_groups for p in group["params"]):
        gradient: Any = parameter.grad
        if isinstance(parameter, DTensor) and gradient is not None:
            plain = parameter._local_tensor.detach()
            plain.grad = gradient.to_local()
            yield plain
        elif gradient is not None:
            yield parameter
