"""Estimate what one micro-batch of a run needs, while the run exists: on a copy without values.

    copy of the module on the meta device -> fake parameters -> training_step and backward

Parameters, batch and optimizers of the run stay as they are, and the device is not used.
"""

import contextlib
import time
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves, tree_map

from ravine.errors import UsageError
from ravine.strategies.activation_checkpointing import apply_activation_checkpointing

from .fake_parameters import copy_on_meta, replace_by_fakes
from .simulation import quiet
from .tensor_tracker import TensorTracker

STEP_CLASSES = ("activations", "temporary", "weight casts", "batch")


class MicroBatchEstimate(NamedTuple):
    """Bytes of a forward and backward pass beside parameters, gradients and optimizer state.

    Attributes:
        num_bytes: bytes at the peak.
        seconds: time of the estimate.
    """

    num_bytes: int
    seconds: float


def estimate_micro_batch(
    module: Any,
    trainer: Any,
    batch: Any,
    precision: str,
    recomputes: bool = False,
    fraction: float = 1.0,
) -> MicroBatchEstimate | None:
    """Return the bytes of a micro-batch; None if the module cannot run without values.

    Args:
        module: the LightningModule of the run.
        trainer: its trainer.
        batch: a micro-batch, on any device.
        precision: of the run: with 16 bits and mixed, matrix products use bf16.
        recomputes: apply activation checkpointing to the copy.
        fraction: the part of the samples of the batch to use.
    """
    start = time.perf_counter()
    if any(isinstance(p, DTensor) for p in module.parameters()):
        return None
    # code of users may read values, or use what cannot be copied
    with contextlib.suppress(Exception), quiet():
        num_bytes = _run(module, trainer, batch, precision, recomputes, fraction)
        return MicroBatchEstimate(num_bytes, time.perf_counter() - start)
    return None


def _run(
    module: Any, trainer: Any, batch: Any, precision: str, recomputes: bool, fraction: float
) -> int:
    replica = copy_on_meta(module, shared=[trainer])
    _move_buffers(replica)
    replica.__dict__["log"] = replica.__dict__["log_dict"] = lambda *args, **kwargs: None
    if recomputes:
        apply_activation_checkpointing(replica, "full")
    mode, tracker = FakeTensorMode(allow_non_fake_inputs=True), TensorTracker()
    replace_by_fakes(replica, mode)
    tracker.label(replica.parameters(), "parameters")
    tracker.label(replica.buffers(), "buffers")
    for parameter in replica.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(
                lambda p: tracker.label([p.grad], "gradients")
            )
    samples = tree_map(lambda leaf: take_samples(leaf, fraction), batch)
    is_half = "16" in precision
    with tracker, torch.autocast("cpu", torch.bfloat16, enabled=is_half):
        tracker.label(tree_leaves(samples), "batch")
        tracker.start_recording()
        tracker.phase = "forward"
        output = replica.training_step(samples, 0)
        loss = output if isinstance(output, Tensor) else output["loss"]
        tracker.phase = "backward"
        loss.backward()
    return max(sum(moment.of(name) for name in STEP_CLASSES) for moment in tracker.moments)


def take_samples(leaf: Any, fraction: float) -> Any:
    """Return the first samples of a tensor on the CPU; at least one."""
    if not isinstance(leaf, Tensor):
        return leaf
    local = leaf.detach().cpu()
    return local[: max(1, round(len(local) * fraction))] if local.ndim else local


def _move_buffers(module: nn.Module) -> None:
    for submodule in module.modules():
        for name, buffer in submodule._buffers.items():
            if buffer is not None and not buffer.is_meta:
                submodule._buffers[name] = buffer.cpu()


def supports_checkpointing(module: nn.Module) -> bool:
    """Return whether activation checkpointing is possible, and not used yet."""
    try:
        replica = copy_on_meta(nn.ModuleList(module.children()))
        apply_activation_checkpointing(replica, "full")
    except UsageError:
        return False
    return True
