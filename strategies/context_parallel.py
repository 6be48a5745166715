"""Context parallelism: a sequence too long for one device is cut along time, over a ring of ranks.

Each rank keeps its queries; keys and values go to the ranks that need them, at each step one rank
further (Liu, 2023). In causal attention late tokens look at more than early ones, so a rank takes
one early piece of 2n and one late piece (zig-zag):

    n = 2:  rank 0 has pieces 0 and 3, rank 1 has 1 and 2

    keys of          early piece              late piece
    this rank        causal within both
    an earlier one   all queries see it       no query sees it: not sent
    a later one      late queries see it      late queries see it

So every rank has the same work at each of the n steps, half of what there is without the mask.
Blocks of keys are joined by their log-sum-exp (block_attention.py); no rank stores scores. Messages
of keys, values and their gradients overlap with the computation of a block.

A net takes part by two slots of its modules: `attend(query, key, value, dropout)`, and `times`,
the positions (t) of the tokens it is given.

Axes: b batch, t time (of this rank), h heads, k head width.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup, distributed_c10d
from torch.distributed.device_mesh import DeviceMesh
from torch.library import custom_op
from torch.nn.modules.dropout import _DropoutNd
from torch.utils._pytree import tree_leaves, tree_map_only

from ravine.errors import UsageError

from .block_attention import accumulation_dtype, attention_with_lse, attention_with_lse_backward

FORWARD_HEAD_GROUPS, BACKWARD_HEAD_GROUPS = (
    2,
    {2: 8, 3: 8},
)  # parts of the heads, by ranks; backward there are more buffers
MIN_MESSAGE_BYTES = {
    "cpu": 2**16,
    "cuda": 2**22,
}  # bytes of a message for which heads are taken apart


def zigzag_positions(length: int, rank: int, num_ranks: int) -> Tensor:
    """Positions (t) that a rank has of a sequence: an early piece and a late one."""
    chunks = torch.arange(length).chunk(2 * num_ranks)
    return torch.cat((chunks[rank], chunks[2 * num_ranks - 1 - rank]))


class ContextParallel:
    """The slots of a module, filled for the length of a step."""

    def __init__(self, module: nn.Module, mesh: DeviceMesh) -> None:
        """Find them; refuse a module that has none."""
        self.group, self.rank, self.num_ranks = mesh.get_group(), mesh.get_local_rank(), mesh.size()
        self.attention_modules: list[Any] = [m for m in module.modules() if hasattr(m, "attend")]
        self.position_modules: list[Any] = [m for m in module.modules() if hasattr(m, "times")]
        self.module, self.module_name = module, type(module).__name__
        name = self.module_name
        self._rng_checked = False
        if not self.attention_modules or not self.position_modules:
            raise UsageError(
                f"cp={self.num_ranks}: {name} has no attention with the slots `attend` and `times`,"
                " which a cut sequence needs; type --trainer.strategy zero3"
            )
        if any(getattr(m, "dropout", 0) for m in self.attention_modules):
            raise UsageError(
                f"cp={self.num_ranks}: {name} drops attention weights, which no rank has whole; "
                "type"
                " --model.dropout=0, or --trainer.strategy zero3"
            )
        for submodule_name, m in module.named_modules():
            if isinstance(m, _DropoutNd) and m.p > 0:
                raise UsageError(
                    f"cp={self.num_ranks}: {name} has dropout ({submodule_name}), and ranks would "
                    "drop the same"
                    " of different tokens; type --model.dropout=0, or --trainer.strategy zero3"
                )
        self.original_attention = [m.attend for m in self.attention_modules]

    def part(self, batch: Any) -> Any:
        """This rank's share of every tensor (b t ...) of a batch."""

        def shard_tensor(tensor: Tensor) -> Tensor:
            if tensor.ndim < 2:
                return tensor
            self._check_divisible(tensor.shape[1])
            positions = zigzag_positions(tensor.shape[1], self.rank, self.num_ranks).to(
                tensor.device
            )
            return tensor.index_select(1, positions)

        return tree_map_only(Tensor, shard_tensor, batch)

    def shard_and_bind(self, batch: Any) -> Any:
        """This rank's share, and the slots filled for it."""
        batch_shard = self.part(batch)
        tensors = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)]
        lengths = {tensor.shape[1] for tensor in tensors if tensor.ndim > 1}
        if len(lengths) != 1:
            raise UsageError(
                f"cp={self.num_ranks} cuts the tensors (b t ...) of a batch along t, and this "
                "batch has"
                f" {' and '.join(map(str, sorted(lengths))) or 'no'} lengths; type"
                " --trainer.strategy zero3"
            )
        times = zigzag_positions(lengths.pop(), self.rank, self.num_ranks).to(self._module_device)
        for module in self.position_modules:
            module.times = times
        for module in self.attention_modules:
            module.attend = self.attend
        return batch_shard

    @contextmanager
    def forbid_rng(self) -> Iterator[None]:
        """Refuse a step that draws random numbers, like a dropout that is no module; look once."""
        rng_states = [] if self._rng_checked else self._rng_states()
        yield
        if rng_states and not all(map(torch.equal, rng_states, self._rng_states())):
            raise UsageError(
                f"cp={self.num_ranks}: {self.module_name}.training_step draws random numbers (a "
                "dropout?), and"
                " ranks would draw the same for different tokens; leave them out, or type"
                " --trainer.strategy zero3"
            )
        self._rng_checked = True

    @property
    def _module_device(self) -> torch.device:
        return next(self.module.parameters()).device

    def _rng_states(self) -> list[Tensor]:
        device = self._module_device
        states = [torch.get_rng_state()]
        return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states

    def restore_attention(self) -> None:
        """Empty the slots: whoever calls the net now has whole sequences."""
        for module in self.position_modules:
            module.times = None
        for module, original in zip(self.attention_modules, self.original_attention, strict=True):
            module.attend = original

    def attend(self, query: Tensor, key: Tensor, value: Tensor, dropout: float = 0.0) -> Tensor:
        """Causal attention over the whole sequence, of this rank's tokens; all (b h t k)."""
        device = query.device.type
        if torch.is_autocast_enabled(device) and query.dtype != torch.float64:
            dtype = torch.get_autocast_dtype(device)  # as for scaled_dot_product_attention
            query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        return _RingAttention.apply(query, key, value, self.group)

    def _check_divisible(self, length: int) -> None:
        num_chunks = 2 * self.num_ranks
        if length % num_chunks:
            nearest = max(num_chunks, round(length / num_chunks) * num_chunks)
            raise UsageError(
                f"cp={self.num_ranks} does not cut {length} tokens into {num_chunks} equal "
                "pieces; type"
                f" --data.context={nearest}"
            )


def queries(rank: int, source: int, length: int) -> slice:
    """Which queries of `rank`, as a slice of its time, see keys of `source`."""
    return slice(length // 2 if source > rank else 0, length)


def num_visible_keys(rank: int, source: int, length: int) -> int:
    """How many keys of `source`, from the first on, are seen by any query of `rank`."""
    return length // 2 if source < rank else length


def ring_slices(key: Tensor, num_groups: int) -> list[tuple[slice, slice]]:
    """Slices of sequences and heads of a key (b h t k) that the ring exchanges one after another.

    The buffers of the ring hold one piece, of `num_groups` equal ones where there are as many
    heads, and of fewer where messages would be too short for the device.
    """
    batch, heads = key.shape[:2]
    size = 2 * key.numel() * key.element_size()  # of keys and values
    num_groups = min(num_groups, max(1, size // MIN_MESSAGE_BYTES.get(key.device.type, 2**22)))
    heads_per_slice = max(1, heads // num_groups)
    rows = batch if num_groups <= heads else max(1, batch * heads // num_groups)
    return [
        (slice(row, row + rows), slice(head, head + heads_per_slice))
        for row in range(0, batch, rows)
        for head in range(0, heads, heads_per_slice)
    ]


@custom_op("ravine::ring_attention", mutates_args=())
def ring_attention(query: Tensor, key: Tensor, value: Tensor, group: str) -> tuple[Tensor, Tensor]:
    """Out (b h t k) and log-sum-exp (b h t) of causal attention over the whole sequence.

    Query, key and value (b h t k) are this rank's, `group` is the name of the ring's group. As one
    operator its output is kept by selective recomputation, and torch.compile does not trace it.
    """
    ring, length = _RingNeighbours(group), query.shape[2]
    out, lse = _empty_results(query)
    for ring_slice in ring_slices(key, FORWARD_HEAD_GROUPS):
        local_kv = _pack_kv(key[ring_slice], value[ring_slice], key.dtype)
        remote_kv, q, slice_lse, result = (
            local_kv,
            query[ring_slice],
            lse[ring_slice],
            out[ring_slice],
        )
        total = _accumulator(result, lse.dtype)
        for step in range(ring.num_ranks):
            transfer = ring.exchange_kv(local_kv, step + 1)
            query_slice = queries(ring.rank, ring.rank_at(step), length)
            block_out, block_lse = attention_with_lse(
                q[:, :, query_slice], *_unpack_kv(remote_kv), causal=step == 0
            )
            if step == 0:
                total.copy_(block_out)
                slice_lse.copy_(block_lse)
            else:
                _merge(total[:, :, query_slice], slice_lse[:, :, query_slice], block_out, block_lse)
            del block_out, block_lse  # before the next block is computed
            remote_kv = transfer.received() if transfer else local_kv
        if total is not result:
            result.copy_(total)
        del local_kv, remote_kv, transfer, total
    return out, lse


@custom_op("ravine::ring_attention_backward", mutates_args=())
def ring_attention_backward(
    d_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, group: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value (b h t k) of this rank.

    Keys and values are exchanged again. The gradients of a block's keys and values return to their
    rank while the next block is computed.
    """
    ring, length = _RingNeighbours(group), query.shape[2]
    results = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    add_pending: Callable[[], None] | None = None  # adds the gradients that another rank is sending
    for ring_slice in ring_slices(key, BACKWARD_HEAD_GROUPS.get(ring.num_ranks, 4)):
        local_kv = _pack_kv(key[ring_slice], value[ring_slice], key.dtype)
        remote_kv, inputs = local_kv, [item[ring_slice] for item in (d_out, query, out, lse)]
        slice_grads = [item[ring_slice] for item in results]
        totals = [_accumulator(item, lse.dtype) for item in slice_grads]
        for step in range(ring.num_ranks):
            transfer = ring.exchange_kv(local_kv, step + 1)
            query_slice = queries(ring.rank, ring.rank_at(step), length)
            d, q, o, lse_rows = (item[:, :, query_slice] for item in inputs)
            block_grads = attention_with_lse_backward(
                d, q, *_unpack_kv(remote_kv), o, lse_rows, causal=step == 0
            )
            if step == 0:
                for total, item in zip(totals, block_grads, strict=True):
                    total.copy_(item)
            else:
                totals[0][:, :, query_slice] += block_grads[0]
            if add_pending is not None:
                add_pending()
            add_pending = None
            if step > 0:
                grad_transfer = ring.exchange_grads(
                    _pack_kv(*block_grads[1:], lse.dtype), step, length
                )
                add_pending = partial(
                    _add, grad_transfer, totals, slice_grads if step + 1 == ring.num_ranks else []
                )
                del grad_transfer
            del block_grads  # before the next block is computed
            remote_kv = transfer.received() if transfer else local_kv
        del local_kv, remote_kv, transfer, totals
    if add_pending is not None:
        add_pending()
    return results


@ring_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, group: str) -> tuple[Tensor, Tensor]:
    return _empty_results(query)


@ring_attention_backward.register_fake
def _(
    d_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, group: str
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _empty_results(query: Tensor) -> tuple[Tensor, Tensor]:
    """Room for out (b h t k), whose heads lie together at each time as in (b t d), and for lse."""
    b, h, t, k = query.shape
    out = query.new_empty(b, t, h, k).transpose(1, 2)
    return out, query.new_empty(b, h, t, dtype=accumulation_dtype(query.dtype))


def _accumulator(result: Tensor, dtype: torch.dtype) -> Tensor:
    """Where blocks are added up: the result itself, or in a wider dtype beside it."""
    return result if result.dtype == dtype else torch.empty_like(result, dtype=dtype)


def _merge(total: Tensor, lse: Tensor, block_out: Tensor, block_lse: Tensor) -> None:
    """Join a block's result to that over the keys before it, in place."""
    block_out = block_out if block_out.dtype == total.dtype else block_out.to(total.dtype)
    total.lerp_(block_out, (block_lse - lse).sigmoid_()[..., None])
    torch.logaddexp(lse, block_lse, out=lse)


def _add(transfer: "_RingSendRecv", totals: list[Tensor], results: list[Tensor]) -> None:
    """Add a message to the gradients of keys and values; for the last one, copy the results."""
    received = transfer.received()
    for total, grad in zip(totals[1:], _unpack_kv(received), strict=True):
        total[:, :, : len(received)] += grad
    for total, result in zip(totals, results, strict=False):
        if total is not result:
            result.copy_(total)


def _pack_kv(key: Tensor, value: Tensor, dtype: torch.dtype) -> Tensor:
    """One message (t 2 b h k) of keys and values; the first half of its time is contiguous."""
    b, h, t, k = key.shape
    message = key.new_empty(t, 2, b, h, k, dtype=dtype)
    for view, tensor in zip(_unpack_kv(message), (key, value), strict=True):
        view.copy_(tensor)
    return message


def _unpack_kv(message: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values (b h t k) of a message, as views."""
    key, value = message.permute(1, 2, 3, 0, 4).unbind()
    return key, value


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, group: ProcessGroup) -> Tensor:
        out, lse = torch.ops.ravine.ring_attention(query, key, value, group.group_name)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.group = group.group_name
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        inputs = (gradients[0], *ctx.saved_tensors, ctx.group)
        return *torch.ops.ravine.ring_attention_backward(*inputs), None


class _RingNeighbours:
    """The ranks of a ring, and the messages between them at each step."""

    def __init__(self, group: str) -> None:
        self.group: Any = distributed_c10d._resolve_process_group(group)  # pyright: ignore
        self.rank, self.num_ranks = dist.get_rank(self.group), dist.get_world_size(self.group)

    def rank_at(self, step: int) -> int:
        """The rank so many places before this one: its keys are used at this step."""
        return (self.rank - step) % self.num_ranks

    def exchange_kv(self, local_kv: Tensor, step: int) -> "_RingSendRecv | None":
        """Exchange the keys and values that are used at this step, if there is such a step."""
        if step == self.num_ranks:
            return None
        target, source = self.rank_at(-step), self.rank_at(step)
        sent = local_kv[: num_visible_keys(target, self.rank, len(local_kv))]
        return _RingSendRecv(
            sent, num_visible_keys(self.rank, source, len(local_kv)), target, source, self.group
        )

    def exchange_grads(self, grads: Tensor, step: int, length: int) -> "_RingSendRecv":
        """Send the gradients of this step's keys and values to their rank; receive own ones."""
        source, target = self.rank_at(step), self.rank_at(-step)
        return _RingSendRecv(
            grads, num_visible_keys(target, self.rank, length), source, target, self.group
        )


class _RingSendRecv:
    """A message (t ...) being sent to a rank of the ring, and one being received from another."""

    def __init__(
        self, sent: Tensor, length: int, to: int, source: int, group: ProcessGroup
    ) -> None:
        self.sent = sent
        self.receive_buffer = sent.new_empty(length, *sent.shape[1:])
        messages = [
            dist.P2POp(dist.isend, sent, group=group, group_peer=to),
            dist.P2POp(dist.irecv, self.receive_buffer, group=group, group_peer=source),
        ]
        self.pending_ops = dist.batch_isend_irecv(messages)

    def received(self) -> Tensor:
        """What has come, once it has."""
        for op in self.pending_ops:
            op.wait()
        return self.receive_buffer
