"""Copy the writes of user code into gathered FSDP2 parameters to this rank's shards.

Within a forward or a step a module sees gathered copies. FSDP2 frees them, so a write such as
`p.mul_(0.9)` or `p.data = new` would be lost. `write_back_group` copies the rows of this rank to
its shards. Gathered copies in half precision cannot be copied without loss: a write is an error.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import (
    Tensor,
    _foreach_copy_,  # pyright: ignore[reportPrivateImportUsage]
)
from torch.autograd import grad_mode
from torch.distributed.tensor import DTensor


class _GroupRows:
    """Views of the rows of a group's gathered parameters that belong to this rank's shards."""

    def __init__(self, group: Any) -> None:
        """Make the views for the gathered parameters of an FSDP2 param group.

        Parameters that are not sharded by rows, and those without a row on this rank, are left out.
        """
        num_ranks, rank = group.mesh_info.shard_mesh_size, group.mesh_info.shard_mesh_rank
        # FSDPParam objects of torch; _unsharded_param is the gathered parameter
        self.parameters = [
            p
            for p in group.fsdp_params
            if not isinstance(p._unsharded_param, DTensor)
            # dim 0: sharded by rows
            and p.fsdp_placement.dim == 0
            and p.sharded_param.to_local().numel()
        ]
        self.copies: list[Tensor] = []  # this rank's rows of the gathered parameters
        self.shards: list[Tensor] = []
        for p in self.parameters:
            shard = p.sharded_param.to_local().detach()
            rows_per_rank = -(-p._unsharded_param.shape[0] // num_ranks)  # rounded up
            first_row = rows_per_rank * rank
            # _gathered_memory: FSDP2's buffer of the gathered parameter, without padding
            self.copies.append(_gathered_memory(p).narrow(0, first_row, shard.shape[0]))
            self.shards.append(shard)
        self.has_same_dtypes = all(
            c.dtype == s.dtype for c, s in zip(self.copies, self.shards, strict=True)
        )
        self.versions: list[int] = []
        self.versions_changed()  # stores the current versions

    def versions_changed(self) -> bool:
        """Whether an operation wrote into a gathered parameter since the last call.

        The version counter counts such operations, except those on `p.data`, which has its own.
        """
        old_versions = self.versions
        self.versions = [p._unsharded_param._version for p in self.parameters]
        return old_versions != self.versions

    def is_stale(self) -> bool:
        """Whether the shards have other memory than when the views were made."""
        pairs = zip(self.shards[:1], self.parameters, strict=False)
        return any(s.data_ptr() != p.sharded_param.to_local().data_ptr() for s, p in pairs)


def _gathered_memory(parameter: Any) -> Tensor:
    """Return FSDP2's memory of a gathered parameter, without padding."""
    flat, strides = parameter.all_gather_outputs[0], parameter._contiguous_orig_stride
    return flat.as_strided(parameter._orig_size, strides, 0)


@torch.no_grad()
def write_back_group(group: Any, refuse: Callable[[Any], None], compare_values: bool) -> None:
    """Copy this rank's rows of a group's gathered parameters to the shards.

    Args:
        group: an FSDP2 param group that is gathered.
        refuse: raises the error for a parameter whose write would be lost; called if the gathered
            copy was changed and has another dtype than the shard.
        compare_values: whether such copies are compared by value, even if no version changed.
    """
    # rows: views of this rank's rows of the gathered copies, and the shards; kept for later calls
    rows: Any = vars(group).get("_written_rows")
    # is_stale: the shards have other memory now
    if rows is None or rows.is_stale():
        rows = group._written_rows = _GroupRows(group)
    for p in rows.parameters:
        gathered_param = p._unsharded_param
        # after `p.data = new` the memory is not FSDP2's: the values are copied there
        # all_gather_outputs: the buffers into which FSDP2 gathers the parameter
        if gathered_param.data_ptr() != p.all_gather_outputs[0].data_ptr():
            # _orig_size: shape of the full parameter
            if not rows.has_same_dtypes or gathered_param.shape != p._orig_size:
                refuse(p)
            gathered = _gathered_memory(p)
            # `p.data = new` does not increment the version counter of a plain parameter either
            with grad_mode._unsafe_preserve_version_counter(p.all_gather_outputs[0]):
                gathered.copy_(gathered_param)
            gathered_param.data = gathered
    if not rows.parameters:  # this rank has no rows of any parameter
        return
    if rows.has_same_dtypes:
        _foreach_copy_(rows.shards, rows.copies)
    # half precision copies cannot be written back without a loss: a write is an error
    elif rows.versions_changed() or compare_values:
        for p, copy, shard in zip(rows.parameters, rows.copies, rows.shards, strict=True):
            if not torch.equal(copy, shard.to(copy.dtype)):
                refuse(p)
