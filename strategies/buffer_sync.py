"""Broadcast the buffers of a sharded module from rank 0 at each training step, as DDP does.

BatchNorm computes its running statistics from the batch of its rank. Without a broadcast they would
differ, validation would average over different models, and a checkpoint would hold one of them.
Only buffers that training changes are sent: BatchNorm statistics from the start, other buffers once
they have changed. All ranks check for changes after the batches 1, 2, 4, 8, ...
"""

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

# BatchNorm kernels update these without incrementing the version counter
NORM_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


class BufferSync:
    """Broadcasts the changing buffers of a module from the first rank of a group.

    For example:

        sync = BufferSync(module, group)
        sync.before_step(); loss = module.training_step(batch, batch_idx); sync.after_step()
    """

    def __init__(self, module: nn.Module, group: ProcessGroup) -> None:
        """Record a fingerprint of each buffer; the buffers must be equal on all ranks."""
        self.module, self.group = module, group
        self.broadcast_names: set[str] = set()  # names of buffers that change
        # fingerprints of buffers that have not changed so far
        self.unchanged_fingerprints: dict[str, tuple[Any, ...]] = {}
        self._num_batches = 0
        for name, buffer in _syncable_buffers(module).items():
            if name.rpartition(".")[2] in NORM_STATISTICS:
                self.broadcast_names.add(name)
            else:
                self.unchanged_fingerprints[name] = buffer_fingerprint(buffer)

    def before_step(self) -> None:
        """Broadcast the changing buffers; every rank of the group calls it."""
        if self.broadcast_names and self._num_batches > 0:
            self.broadcast()

    def after_step(self) -> None:
        """Check for changed buffers after the steps 1, 2, 4, 8, ...; all ranks call it."""
        self._num_batches += 1
        if self.unchanged_fingerprints and is_power_of_two(self._num_batches):
            self._find_changed()

    def _find_changed(self) -> None:
        buffers = _syncable_buffers(self.module)
        device = next(iter(buffers.values())).device if buffers else torch.device("cpu")
        for name in find_changed_buffers(self.unchanged_fingerprints, buffers, device, self.group):
            self.broadcast_names.add(name)
            del self.unchanged_fingerprints[name]

    @torch.no_grad()
    def broadcast(self) -> None:
        """Broadcast the first rank's values, in one message per device."""
        buffers = _syncable_buffers(self.module)
        tensors = [buffers[name] for name in sorted(self.broadcast_names) if name in buffers]
        for device in {tensor.device for tensor in tensors}:
            device_tensors = [tensor for tensor in tensors if tensor.device == device]
            flat = torch.cat([_as_bytes(tensor) for tensor in device_tensors])
            dist.broadcast(flat, dist.get_global_rank(self.group, 0), group=self.group)
            if dist.get_rank(self.group) != 0:
                sizes = [tensor.numel() * tensor.element_size() for tensor in device_tensors]
                for tensor, chunk in zip(device_tensors, flat.split(sizes), strict=True):
                    values = chunk.clone().view(tensor.dtype)  # the clone has aligned memory
                    tensor.copy_(values.view(tensor.shape))


def _as_bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(-1).contiguous().view(torch.uint8)


def _syncable_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Return the plain, non-empty buffers by name, each once."""
    return {
        name: buffer
        for name, buffer in module.named_buffers()
        if not isinstance(buffer, DTensor) and not buffer.is_meta and buffer.numel()
    }


def buffer_fingerprint(buffer: Tensor) -> tuple[Any, ...]:
    """Return values that change with a buffer: address, version counter and sum, if any."""
    version = None if buffer.is_inference() else buffer._version
    if buffer.is_meta or buffer.numel() == 0 or buffer.layout != torch.strided:
        return tuple(buffer.shape), id(buffer), version
    numbers = torch.view_as_real(buffer) if buffer.is_complex() else buffer
    sum_dtype = torch.float64 if numbers.is_floating_point() else torch.int64
    total = None
    with suppress(
        RuntimeError, NotImplementedError
    ):  # a dtype without a sum, as 8-bit floats in some versions
        total = numbers.detach().sum(dtype=sum_dtype).item()
    return buffer.data_ptr(), version, str(total)  # as text, because NaN != NaN


def is_power_of_two(number: int) -> bool:
    """Whether a number is a power of two (or 0): buffers are compared often at first."""
    return number & (number - 1) == 0


def find_changed_buffers(
    old_fingerprints: Mapping[str, tuple[Any, ...]],
    buffers: Mapping[str, Tensor],
    device: torch.device,
    group: ProcessGroup | None = None,
) -> list[str]:
    """Return the names of buffers that have changed on any rank; every rank of the group calls it.

    Args:
        old_fingerprints: results of `buffer_fingerprint` by name; each rank has the same names.
        buffers: all buffers by name.
        device: the device on which the group communicates.
        group: the ranks; None: all.
    """
    changed = [
        # buffer_fingerprint: address, version counter and sum of a buffer
        # a buffer that the module has deleted counts as unchanged
        name in buffers and buffer_fingerprint(buffers[name]) != old
        for name, old in old_fingerprints.items()
    ]
    flags = torch.tensor(changed, dtype=torch.uint8, device=device)  # one per buffer
    # MAX: 1 if the buffer has changed on at least one rank
    dist.all_reduce(flags, dist.ReduceOp.MAX, group=group)
    return [name for name, flag in zip(old_fingerprints, flags.tolist(), strict=True) if flag]
