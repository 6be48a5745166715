"""Give the parameters of a sharded network their initial values, each rank its own part.

The network was built on the meta device and sharded there. A part of a parameter is
drawn in blocks of rows, so at most `BLOCK` bytes are in memory besides the parts, and no rank has a
whole tensor. Parameters that two modules share get one part.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

BLOCK = 2**24  # bytes that are drawn at once


@torch.no_grad()
def materialize(module: nn.Module, values: Any, device: torch.device) -> dict[int, nn.Parameter]:
    """Replace every meta parameter by this rank's part of its values.

    Args:
        module: the LightningModule, sharded already.
        values: its `InitialValues`, with the same seed on every rank.
        device: where the parts are kept.

    Returns:
        the new parameters by the id of the one that each replaces.
    """
    new: dict[int, nn.Parameter] = {}
    for name, parameter in module.named_parameters():
        if not parameter.is_meta:
            continue
        shape, start = torch.Size(parameter.shape), (0,) * parameter.ndim
        if isinstance(parameter, DTensor):
            shape, start = compute_local_shape_and_global_offset(
                parameter.shape, parameter.device_mesh, parameter.placements
            )
        part = torch.empty(shape, dtype=parameter.dtype, device=device)
        for rows, block in _blocks(values, name, parameter, shape, start):
            part[rows] = block.to(device)
        whole: Tensor = part
        if isinstance(parameter, DTensor):
            whole = DTensor.from_local(
                part,
                parameter.device_mesh,
                parameter.placements,
                run_check=False,
                shape=parameter.shape,
                stride=parameter.stride(),
            )
        new[id(parameter)] = nn.Parameter(whole, parameter.requires_grad)
    for part_of in module.modules():
        for name, parameter in part_of._parameters.items():
            if parameter is not None and id(parameter) in new:
                part_of._parameters[name] = new[id(parameter)]
    return new


def _blocks(
    values: Any, name: str, parameter: Tensor, shape: Any, start: Any
) -> Iterator[tuple[Any, Tensor]]:
    """Rows of a part, as a slice of it, and their values."""
    if not shape:
        yield ..., values.draw(name, parameter.shape, 0, 1, parameter.dtype).view(())
        return
    columns = tuple(slice(a, a + n) for a, n in zip(start[1:], shape[1:], strict=True))
    row = parameter.shape[1:].numel() * parameter.itemsize
    rows = max(1, BLOCK // max(1, row))
    for first in range(0, shape[0], rows):
        last = min(first + rows, shape[0])
        whole = (name, parameter.shape, start[0] + first, start[0] + last, parameter.dtype)
        yield slice(first, last), values.draw(*whole)[(slice(None), *columns)]
