"""Deferred initialization: materialize the sharded parameters of a network on the meta device.

    network on the meta device -> changed by callbacks -> sharded -> materialize_params

A parameter with deferred values has an attribute `initial_values`. Its method
`get_rows(start, stop)` returns rows on the CPU. It draws them, reads them from a file, or computes
them from another parameter. Sharding replaces parameters, so `collect_deferred_values` collects
these objects by name before. A shard is filled in blocks of rows: besides the shards at most
`MAX_BLOCK_BYTES` bytes are in memory, and no rank has a full tensor. A parameter that two modules
share gets one shard.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

MAX_BLOCK_BYTES = 2**24  # size of a block of rows


def deferred_values(parameter: Tensor | None) -> Any:
    """Return the object with a parameter's deferred values; None if values are not deferred."""
    is_deferred = parameter is not None and parameter.is_meta
    return getattr(parameter, "initial_values", None) if is_deferred else None


def collect_deferred_values(module: nn.Module) -> dict[str, Any]:
    """Return the objects with deferred values, by all names of their parameters."""
    named = module.named_parameters(remove_duplicate=False)
    return {name: values for name, p in named if (values := deferred_values(p)) is not None}


def iter_value_blocks(parameter: Tensor) -> Iterator[Tensor]:
    """Yield a parameter's values in blocks of rows; values that are not deferred in one block."""
    values = deferred_values(parameter)
    if values is None:
        yield parameter.detach()
        return
    size = parameter.shape[0] if parameter.ndim else 1
    for first in range(0, size, rows := _rows_per_block(parameter)):
        yield values.get_rows(first, min(first + rows, size))


@torch.no_grad()
def materialize_params(
    module: nn.Module, values: Mapping[str, Any], device: torch.device | str
) -> dict[int, nn.Parameter]:
    """Replace every deferred parameter on the meta device by this rank's shard of its values.

    The values of a deferred parameter are drawn or read only here, after sharding.

    Args:
        module: the LightningModule, sharded or not.
        values: the result of `collect_deferred_values` before sharding; the same on every rank.
        device: the device of the shards.

    Returns:
        the new parameters, by the ids of the replaced parameters.
    """
    new_params: dict[int, nn.Parameter] = {}
    for name, parameter in module.named_parameters():
        if not parameter.is_meta or name not in values:
            continue
        if isinstance(parameter, DTensor):
            # shape of this rank's shard, and the index of its first element in the full tensor
            shape, start = compute_local_shape_and_global_offset(
                parameter.shape, parameter.device_mesh, parameter.placements
            )
            shard = torch.empty(shape, dtype=parameter.dtype, device=device)
        else:
            shape, start = parameter.shape, (0,) * parameter.ndim
            shard = torch.empty_like(parameter, device=device, requires_grad=False)  # its strides
        # in blocks of rows, so that no full tensor is in memory
        for rows, block in _iter_shard_blocks(values[name], parameter, shape, start):
            shard[rows] = block.to(device)
        new_value: Tensor = shard
        if isinstance(parameter, DTensor):
            new_value = DTensor.from_local(
                shard,
                parameter.device_mesh,
                parameter.placements,
                run_check=False,
                shape=parameter.shape,
                stride=parameter.stride(),
            )
        new_params[id(parameter)] = nn.Parameter(new_value, parameter.requires_grad)
    for submodule in module.modules():  # modules that share a parameter get the same new one
        for name, parameter in submodule._parameters.items():
            if parameter is not None and id(parameter) in new_params:
                submodule._parameters[name] = new_params[id(parameter)]
    return new_params


def _rows_per_block(parameter: Tensor) -> int:
    row = parameter.shape[1:].numel() * parameter.itemsize
    return max(1, MAX_BLOCK_BYTES // max(1, row))


def _iter_shard_blocks(
    values: Any, parameter: Tensor, shape: Any, start: Any
) -> Iterator[tuple[Any, Tensor]]:
    """Yield slices of a shard's rows and their values."""
    if not shape:
        yield ..., values.get_rows(0, 1).view(())
        return
    columns = tuple(slice(a, a + n) for a, n in zip(start[1:], shape[1:], strict=True))
    rows = _rows_per_block(parameter)
    for first in range(0, shape[0], rows):
        last = min(first + rows, shape[0])
        block = values.get_rows(start[0] + first, start[0] + last)
        yield slice(first, last), block[(slice(None), *columns)]
