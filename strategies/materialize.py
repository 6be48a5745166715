"""Give the parameters of a network on the meta device their values, each rank its own part.

    network on the meta device -> changed by callbacks -> sharded -> materialize

A parameter whose values are made later has an attribute `initial_values`, an object whose method
`rows(start, stop)` makes some rows on the CPU: it draws them, reads them from a file, or computes
them from another parameter's rows. Sharding replaces parameters, so `collect_deferred_values`
finds the attributes by name before it. A part is made in blocks of rows: at most `MAX_BLOCK_BYTES`
bytes are in memory besides the parts, and no rank has a whole tensor. Parameters that two modules
share get one part.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

MAX_BLOCK_BYTES = 2**24  # bytes that are made at once


def deferred_values(parameter: Tensor | None) -> Any:
    """The object that makes a parameter's values later; None if it has values, or never will."""
    is_deferred = parameter is not None and parameter.is_meta
    return getattr(parameter, "initial_values", None) if is_deferred else None


def collect_deferred_values(module: nn.Module) -> dict[str, Any]:
    """The objects that make values later, by the names of their parameters; shared ones by all."""
    named = module.named_parameters(remove_duplicate=False)
    return {name: values for name, p in named if (values := deferred_values(p)) is not None}


def blocks(parameter: Tensor) -> Iterator[Tensor]:
    """A parameter's values in the order of its rows; those it has already are one block."""
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
    """Replace every parameter on the meta device by this rank's part of its values.

    Args:
        module: the LightningModule, sharded or not.
        values: what `collect_deferred_values` found before it was sharded; the same values on
        every rank.
        device: where the parts are kept.

    Returns:
        the new parameters by the id of the one that each replaces.
    """
    new_params: dict[int, nn.Parameter] = {}
    for name, parameter in module.named_parameters():
        if not parameter.is_meta or name not in values:
            continue
        if isinstance(parameter, DTensor):
            shape, start = compute_local_shape_and_global_offset(
                parameter.shape, parameter.device_mesh, parameter.placements
            )
            shard = torch.empty(shape, dtype=parameter.dtype, device=device)
        else:
            shape, start = parameter.shape, (0,) * parameter.ndim
            shard = torch.empty_like(parameter, device=device, requires_grad=False)  # its strides
        for rows, block in _iter_shard_blocks(values[name], parameter, shape, start):
            shard[rows] = block.to(device)
        full: Tensor = shard
        if isinstance(parameter, DTensor):
            full = DTensor.from_local(
                shard,
                parameter.device_mesh,
                parameter.placements,
                run_check=False,
                shape=parameter.shape,
                stride=parameter.stride(),
            )
        new_params[id(parameter)] = nn.Parameter(full, parameter.requires_grad)
    for submodule in module.modules():
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
    """Rows of a part, as a slice of it, and their values."""
    if not shape:
        yield ..., values.get_rows(0, 1).view(())
        return
    columns = tuple(slice(a, a + n) for a, n in zip(start[1:], shape[1:], strict=True))
    rows = _rows_per_block(parameter)
    for first in range(0, shape[0], rows):
        last = min(first + rows, shape[0])
        block = values.get_rows(start[0] + first, start[0] + last)
        yield slice(first, last), block[(slice(None), *columns)]
