"""Messages of ZeRO-1: pack the parameters and gradients of a bucket, and unpack them.

    small parameters of a bucket    joined in one message
    a large parameter               slices of its own memory, without a copy
    gradients                       the same; the joined message ends with a flag for each parameter

Sender and receiver derive the same messages from the same parameters (`iter_messages`).
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import (
    Tensor,
    _foreach_add_,  # pyright: ignore[reportPrivateImportUsage]
)
from torch.distributed.tensor import DTensor

MIB = 2**20
MAX_BUCKET_BYTES = 25 * MIB  # gradients that are sent together, and size of the receive buffer
MAX_JOINED_BYTES = MIB  # smaller parameters are sent together, larger ones from their own memory
MAX_MESSAGE_BYTES = 8 * MIB  # the largest message of one parameter


class ParamMessage(NamedTuple):
    """The content of a message: several small parameters, or a slice of a large one.

    The slice is [start, start + numel) of the flattened parameter.
    """

    parameters: list[Tensor]
    numel: int
    dtype: torch.dtype
    numels: list[int]  # of each parameter
    start: int | None = None
    # the message ends with a flag for each of these: 1 if the parameter has a gradient
    flagged_params: Sequence[Tensor] = ()


def iter_buckets(parameters: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Split parameters into buckets of about MAX_BUCKET_BYTES; a small net has one or two."""
    total = sum(_num_bytes(p) for p in parameters)
    max_bytes = min(MAX_BUCKET_BYTES, max(MAX_JOINED_BYTES, -(-total // 2)))
    bucket, size = [], 0
    for parameter in parameters:
        bucket.append(parameter)
        size += _num_bytes(parameter)
        if size >= max_bytes:
            yield bucket
            bucket, size = [], 0
    if bucket:
        yield bucket


def iter_messages(
    parameters: Sequence[Tensor], with_flags: bool = False, join_all: bool = False
) -> Iterator[ParamMessage]:
    """Yield the messages for some parameters; sender and receiver get the same messages.

    Args:
        parameters: the parameters of one bucket and one owner.
        with_flags: whether messages have a flag for each parameter: has it a gradient.
        join_all: whether large parameters are joined with the small ones.
    """
    # a dict instead of a set: the same order on all ranks
    # local_view: this rank's shard of a DTensor, or the tensor itself
    for dtype in {local_view(p).dtype: None for p in parameters}:
        same_dtype = [p for p in parameters if local_view(p).dtype == dtype]
        large: list[Tensor] = []
        if not join_all:
            large = [
                p
                for p in same_dtype
                if _num_bytes(p) >= MAX_JOINED_BYTES and local_view(p).is_contiguous()
            ]
        large_ids = set(map(id, large))
        small = [p for p in same_dtype if id(p) not in large_ids]
        flagged = same_dtype if with_flags else []
        numels = [local_view(p).numel() for p in small]
        total = sum(numels) + len(flagged)
        if total:  # a joined message has start=None, a slice the index of its first element
            yield ParamMessage(small, total, dtype, numels, start=None, flagged_params=flagged)
        max_numel = MAX_MESSAGE_BYTES // dtype.itemsize
        for parameter in large:
            numel = local_view(parameter).numel()
            for start in range(0, numel, max_numel):
                slice_numel = min(max_numel, numel - start)
                yield ParamMessage([parameter], slice_numel, dtype, [numel], start)


def aligned_bytes(message: ParamMessage) -> int:
    """Return the bytes of a message, rounded up to 16: the alignment of any dtype."""
    return -(-message.numel * message.dtype.itemsize // 16) * 16


def local_view(tensor: Any) -> Tensor:
    """Return this rank's shard as a detached view; complex numbers as pairs of real numbers."""
    local: Tensor = tensor
    if isinstance(tensor, DTensor):
        local = tensor._local_tensor  # detached, and faster than `to_local`
    return torch.view_as_real(local.detach()) if local.dtype.is_complex else local


def _num_bytes(tensor: Tensor) -> int:
    local = local_view(tensor)
    return local.numel() * local.element_size()


def pack_params(message: ParamMessage) -> Tensor:
    """Return the values of a message's parameters; for a large parameter a view."""
    if message.start is not None:
        values = local_view(message.parameters[0]).view(-1)
        return values[message.start : message.start + message.numel]
    return torch.cat([local_view(p).reshape(-1) for p in message.parameters])


def receive_buffer(message: ParamMessage) -> Tensor:
    """Return a buffer to receive parameters; for a large parameter its own memory."""
    if message.start is not None:
        return pack_params(message)
    return torch.empty(
        message.numel, dtype=message.dtype, device=local_view(message.parameters[0]).device
    )


def unpack_params(works: list[tuple[Any, Tensor, ParamMessage | None]]) -> None:
    """Wait for messages, and copy received values into the small parameters; None: it was sent."""
    for work, data, message in works:
        work.wait()
        if message is None:
            continue
        if message.start is None:
            for p, values in zip(message.parameters, data.split(message.numels), strict=True):
                local = local_view(p)
                local.copy_(values.view(local.shape))
        else:  # a receive does not increment the version counter
            torch.autograd.graph.increment_version(message.parameters[0])


def pack_gradients(message: ParamMessage) -> Tensor:
    """Return the gradients of a message; for a large parameter a view."""
    if message.start is None:
        return join_gradients(message)
    gradient = message.parameters[0].grad
    if gradient is None:
        local = local_view(message.parameters[0])
        return torch.zeros(message.numel, dtype=message.dtype, device=local.device)
    return local_view(gradient).view(-1)[message.start : message.start + message.numel]


def join_gradients(message: ParamMessage) -> Tensor:
    """Return the joined gradients (zeros if there is none) of the parameters, then their flags."""
    flat_grads = []
    for p in message.parameters:
        if (gradient := p.grad) is None:
            local = local_view(p)
            flat_grads.append(local.new_zeros(local.numel()))
        else:
            flat_grads.append(local_view(gradient).view(-1))
    reference = local_view((*message.parameters, *message.flagged_params)[0])
    flags = reference.new_ones(len(message.flagged_params), dtype=message.dtype)
    for number, p in enumerate(message.flagged_params):
        if p.grad is None:
            flags[number] = 0
    return torch.cat([*flat_grads, flags])


def _unpack_flags(data: Tensor, message: ParamMessage) -> list[bool]:
    """Return whether each flagged parameter has a gradient on this rank or on the sender."""
    if all(p.grad is not None for p in message.flagged_params):
        return [True] * len(message.flagged_params)
    sender_flags = data[len(data) - len(message.flagged_params) :].tolist()
    return [
        p.grad is not None or number > 0
        for p, number in zip(message.flagged_params, sender_flags, strict=True)
    ]


def add_gradients(data: Tensor, message: ParamMessage) -> None:
    """Add the received gradients of another rank to the gradients of this rank.

    Args:
        data: the received values: gradients, then a flag for each parameter.
        message: the parameters of these values.
    """
    if message.start is not None:  # a slice of one large parameter
        gradient = message.parameters[0].grad
        if gradient is not None:
            # local_view: shares memory with the gradient
            flat = local_view(gradient).view(-1)
            flat[message.start : message.start + message.numel].add_(data)
        return
    for parameter, has_grad in zip(
        # the flags: whether this rank or the sender has a gradient
        message.flagged_params,
        _unpack_flags(data, message),
        strict=True,
    ):
        # a gradient that only the sender has is added to zeros; set_gradient: also of a DTensor
        if has_grad and parameter.grad is None:
            set_gradient(
                parameter,
                torch.zeros_like(local_view(parameter), memory_format=torch.contiguous_format),
            )
    *received_grads, _ = data.split([*message.numels, len(message.flagged_params)])
    local_grads, grads_to_add = [], []
    for parameter, received in zip(message.parameters, received_grads, strict=True):
        if parameter.grad is not None:
            local_grads.append(local_view(parameter.grad).view(-1))
            grads_to_add.append(received)
    if local_grads:
        _foreach_add_(local_grads, grads_to_add)


def set_reduced_gradients(data: Tensor, message: ParamMessage) -> None:
    """Set gradients to views of the sum, for parameters with a gradient on any rank."""
    chunks = data.split([*message.numels, len(message.flagged_params)])
    flags = _unpack_flags(data, message)
    ids_with_grad = {id(p) for p, flag in zip(message.flagged_params, flags, strict=True) if flag}
    for parameter, values in zip(message.parameters, chunks, strict=False):
        if id(parameter) in ids_with_grad:
            set_gradient(parameter, values.view(local_view(parameter).shape))


def set_gradient(parameter: Any, values: Tensor) -> None:
    """Set a parameter's gradient from its local values, of the shape of `local_view`."""
    if parameter.is_complex():
        values = torch.view_as_complex(values)
    if isinstance(parameter, DTensor):
        mesh, placements = parameter.device_mesh, parameter.placements
        size = {"shape": parameter.shape, "stride": parameter.stride()}
        values = DTensor.from_local(values, mesh, placements, run_check=False, **size)
    parameter.grad = values
