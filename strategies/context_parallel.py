"""Context parallelism: ring attention over ranks that each hold a part of every sequence.

Each rank keeps its queries. Keys and values are sent to the ranks that need them, at each step one
rank further (ring attention, Liu et al., 2023). In causal attention late tokens attend to more keys
than early ones. So the sequence is split into 2n chunks, and a rank holds one early and one late
chunk (zig-zag):

    n = 2:  rank 0 has chunks 0 and 3, rank 1 has chunks 1 and 2

    keys of          early chunk                late chunk
    this rank        causal within both
    an earlier rank  visible to all queries     visible to no query: not sent
    a later rank     visible to late queries    visible to late queries

So every rank has the same work at each of the n steps: half of the work without the causal mask.
The results over blocks of keys are combined by their log-sum-exp (block_attention.py); no rank
stores scores. Sending keys, values and their gradients overlaps with the computation of a block.

A net supports context parallelism by two attributes of its modules:

    attention_fn(query, key, value, dropout)    the attention function
    position_ids_override                       the positions (t) of the input tokens, or None

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
from .expert_parallel import find_experts

# groups of heads that are exchanged one after another; backward by the number of ranks, and more of
# them, because the backward pass needs more buffers
FORWARD_HEAD_GROUPS, BACKWARD_HEAD_GROUPS = 2, {2: 8, 3: 8}
MIN_MESSAGE_BYTES = {"cpu": 2**16, "cuda": 2**22}  # heads are not split into smaller messages


def zigzag_positions(length: int, rank: int, num_ranks: int) -> Tensor:
    """Return the positions (t) of a sequence that a rank holds: an early and a late chunk."""
    chunks = torch.arange(length).chunk(2 * num_ranks)
    return torch.cat((chunks[rank], chunks[2 * num_ranks - 1 - rank]))


class ContextParallel:
    """Sets attention and position ids of the modules of a net during a step."""

    def __init__(self, module: nn.Module, mesh: DeviceMesh) -> None:
        """Find the attention modules; raise UsageError if there are none or dropout is used.

        Args:
            module: the LightningModule.
            mesh: the ranks that each hold a part of every sequence (axis cp).
        """
        self.group, self.rank, self.num_ranks = mesh.get_group(), mesh.get_local_rank(), mesh.size()
        # `attention_fn(query, key, value, dropout)` computes the attention; a step replaces it
        self.attention_modules: list[Any] = [
            m for m in module.modules() if hasattr(m, "attention_fn")
        ]
        # `position_ids_override` are the positions of the tokens; a step sets it
        self.position_modules: list[Any] = [
            m for m in module.modules() if hasattr(m, "position_ids_override")
        ]
        self.module = module
        self.module_name = name = type(module).__name__
        self._rng_checked = False  # whether a step was found to draw no random numbers
        if not self.attention_modules or not self.position_modules:
            raise UsageError(
                f"cp={self.num_ranks}: {name} has no modules with the attributes attention_fn and "
                "position_ids_override, which context parallelism sets",
                ["networks with both attributes"],
                'use Trainer(strategy="zero3")',
                flag="--trainer.strategy=zero3",
            )
        # find_experts: the submodules called `experts`
        if find_experts(module):
            raise UsageError(
                f"cp={self.num_ranks}: the capacity and the load balancing loss of experts need "
                "whole sequences, and each rank has a part of every sequence",
                ["networks without experts"],
                'use Trainer(strategy="ep")',
                flag="--trainer.strategy=ep",
            )
        # `dropout` of an attention module is a probability
        if any(getattr(m, "dropout", 0) for m in self.attention_modules):
            raise UsageError(
                f"cp={self.num_ranks}: {name} applies dropout to attention weights, and no rank "
                "has all weights of a query",
                ["attention without dropout"],
                'use dropout=0 in the network, or Trainer(strategy="zero3")',
                flag="--model.dropout=0, or --trainer.strategy=zero3",
            )
        for submodule_name, m in module.named_modules():
            if isinstance(m, _DropoutNd) and m.p > 0:
                raise UsageError(
                    f"cp={self.num_ranks}: {name} has dropout ({submodule_name}), and the ranks "
                    "would draw the same mask for different tokens",
                    ["networks without dropout"],
                    'use dropout=0 in the network, or Trainer(strategy="zero3")',
                    flag="--model.dropout=0, or --trainer.strategy=zero3",
                )
        self.original_attention = [m.attention_fn for m in self.attention_modules]

    def shard_batch(self, batch: Any) -> Any:
        """Return this rank's part along t of every tensor (b t ...) of a batch."""

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
        """Return this rank's part of a batch along t, and set attention and position ids for it.

        MeshStrategy calls it before a step. After the backward pass it calls `restore_attention`.

        Raises:
            UsageError: the tensors (b t ...) of the batch do not have exactly one length t.
        """
        # shard_batch: of each tensor (b t ...) the positions of this rank
        batch_shard = self.shard_batch(batch)
        tensors = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)]
        lengths = {tensor.shape[1] for tensor in tensors if tensor.ndim > 1}
        if len(lengths) != 1:
            raise UsageError(
                f"cp={self.num_ranks}: the tensors (b t ...) of this batch have "
                f"{' and '.join(map(str, sorted(lengths))) or 'no'} lengths t, and cp splits all "
                "tensors along one t",
                ["batches whose tensors (b t ...) have one length t"],
                'use Trainer(strategy="zero3")',
                flag="--trainer.strategy=zero3",
            )
        (length,) = lengths
        # rank r of n has the pieces r and 2n - 1 - r of 2n pieces: equal work with a causal mask
        positions = zigzag_positions(length, self.rank, self.num_ranks).to(self._module_device)
        for module in self.position_modules:
            module.position_ids_override = positions
        for module in self.attention_modules:
            module.attention_fn = self.ring_attend
        return batch_shard

    @contextmanager
    def forbid_rng(self) -> Iterator[None]:
        """Raise UsageError if a step draws random numbers, e.g. `F.dropout`; checked once."""
        rng_states = [] if self._rng_checked else self._rng_states()
        yield
        if rng_states and not all(map(torch.equal, rng_states, self._rng_states())):
            raise UsageError(
                f"cp={self.num_ranks}: {self.module_name}.training_step draws random numbers "
                "(e.g. dropout), and the ranks would draw the same numbers for different tokens",
                ["steps without random numbers"],
                'use Trainer(strategy="zero3")',
                flag="--trainer.strategy=zero3",
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
        """Restore attention and position ids, for calls with full sequences."""
        for module in self.position_modules:
            module.position_ids_override = None
        for module, original in zip(self.attention_modules, self.original_attention, strict=True):
            module.attention_fn = original

    def ring_attend(
        self, query: Tensor, key: Tensor, value: Tensor, dropout: float = 0.0
    ) -> Tensor:
        """Compute causal attention of this rank's queries over the full sequence; all (b h t k)."""
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
                f"cp={self.num_ranks} does not split {length} tokens into {num_chunks} equal "
                "pieces",
                [f"multiples of {num_chunks}"],
                f"use sequences of {nearest} tokens",
                flag=f"--data.context_length={nearest}",
            )


def visible_queries(rank: int, source: int, length: int) -> slice:
    """Return the slice of `rank`'s queries that attend to keys of `source`."""
    return slice(length // 2 if source > rank else 0, length)


def num_visible_keys(rank: int, source: int, length: int) -> int:
    """Return how many keys of `source`, from the first on, any query of `rank` attends to."""
    return length // 2 if source < rank else length


def ring_slices(key: Tensor, num_groups: int) -> list[tuple[slice, slice]]:
    """Return slices of batch and heads of a key (b h t k), which the ring exchanges in turn.

    The buffers of the ring hold one slice. There are `num_groups` equal slices if there are as many
    heads, and fewer if messages would be shorter than MIN_MESSAGE_BYTES. If there are fewer heads,
    the batch is split, too.
    """
    batch_size, num_heads = key.shape[:2]
    num_bytes = 2 * key.numel() * key.element_size()  # of keys and values
    # another device than those of the table: 4 MiB, as for a GPU
    max_groups = max(1, num_bytes // MIN_MESSAGE_BYTES.get(key.device.type, 2**22))
    num_groups = min(num_groups, max_groups)
    heads_per_slice = max(1, num_heads // num_groups)
    if num_groups <= num_heads:
        rows_per_slice = batch_size
    else:
        # fewer heads than groups: a slice has one head, and a part of the batch
        rows_per_slice = max(1, batch_size * num_heads // num_groups)
    return [
        (slice(row, row + rows_per_slice), slice(head, head + heads_per_slice))
        for row in range(0, batch_size, rows_per_slice)
        for head in range(0, num_heads, heads_per_slice)
    ]


@custom_op("ravine::ring_attention", mutates_args=())
def ring_attention(query: Tensor, key: Tensor, value: Tensor, group: str) -> tuple[Tensor, Tensor]:
    """Compute out (b h t k) and log-sum-exp (b h t) of causal attention over the full sequence.

    Query, key and value (b h t k) are this rank's; `group` is the name of the process group. At
    step s the block of keys is that of the rank s places before this one. It is a custom operator
    so that selective activation checkpointing saves its output, and torch.compile does not trace
    it.

    Axes: b batch, h heads, t tokens of this rank, k channels of a head.
    """
    ring, length = _RingNeighbours(group), query.shape[2]
    out, lse = _empty_results(query)  # without values: the first step sets them
    for ring_slice in ring_slices(key, FORWARD_HEAD_GROUPS):  # slices of batch and heads
        # keys and values as one message (t 2 b h k), of which a rank can send the first half of t
        local_kv = _pack_kv(key[ring_slice], value[ring_slice], key.dtype)
        block_kv = local_kv  # keys and values of the rank of this step
        slice_query, slice_out, slice_lse = query[ring_slice], out[ring_slice], lse[ring_slice]
        # the output slice itself, or a copy in the dtype of lse if that is wider
        total = _accumulator(slice_out, lse.dtype)
        for step in range(ring.num_ranks):
            # exchange_kv: starts to send this rank's keys and values; None after the last step
            transfer = ring.exchange_kv(local_kv, step + 1)  # while this block is computed
            # keys of a later rank are visible to the second half of the queries only
            query_slice = visible_queries(ring.rank, ring.rank_at(step), length)
            block_out, block_lse = attention_with_lse(
                slice_query[:, :, query_slice],
                *_unpack_kv(block_kv),
                # a rank sends only the keys that the receiver sees, so later steps need no mask
                causal=step == 0,
            )
            if step == 0:
                total.copy_(block_out)
                slice_lse.copy_(block_lse)
            else:
                # combines the block with the result over earlier blocks, by their log-sum-exp
                _merge_blocks(
                    total[:, :, query_slice], slice_lse[:, :, query_slice], block_out, block_lse
                )
            del block_out, block_lse  # frees memory before the next block is computed
            block_kv = transfer.wait() if transfer else local_kv
        if total is not slice_out:  # it has a wider dtype
            slice_out.copy_(total)
        del local_kv, block_kv, transfer, total  # frees memory before the next slice is packed
    return out, lse


@custom_op("ravine::ring_attention_backward", mutates_args=())
def ring_attention_backward(
    d_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, group: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of this rank's query, key and value (b h t k).

    Keys and values are exchanged again. The gradients of a block's keys and values are sent back
    to their rank while the next block is computed.

    Axes: b batch, h heads, t tokens of this rank, k channels of a head.

    Args:
        d_out: gradient of `out` (b h t k).
        query: this rank's queries (b h t k).
        key: this rank's keys (b h t k).
        value: this rank's values (b h t k).
        out: result of `ring_attention` (b h t k).
        lse: log-sum-exp of `ring_attention` (b h t).
        group: name of the process group.
    """
    ring, length = _RingNeighbours(group), query.shape[2]
    # gradients of query, key and value
    results = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    add_pending: Callable[[], None] | None = None  # adds the gradients that another rank is sending
    # BACKWARD_HEAD_GROUPS: by the number of ranks; 4 for numbers that are not in the table
    num_groups = BACKWARD_HEAD_GROUPS.get(ring.num_ranks, 4)
    for ring_slice in ring_slices(key, num_groups):  # slices of batch and heads
        local_kv = _pack_kv(key[ring_slice], value[ring_slice], key.dtype)
        block_kv = local_kv  # keys and values of the rank of this step
        inputs = [tensor[ring_slice] for tensor in (d_out, query, out, lse)]
        slice_grads = [grad[ring_slice] for grad in results]
        # the result slices, or new tensors in the dtype of lse if that is wider
        totals = [_accumulator(grad, lse.dtype) for grad in slice_grads]
        for step in range(ring.num_ranks):
            # starts to send this rank's keys and values; None after the last step
            transfer = ring.exchange_kv(local_kv, step + 1)
            # keys of a later rank are visible to the second half of the queries only
            query_slice = visible_queries(ring.rank, ring.rank_at(step), length)
            block_d_out, block_query, block_out, block_lse = (
                tensor[:, :, query_slice] for tensor in inputs
            )
            block_key, block_value = _unpack_kv(block_kv)
            block_grads = attention_with_lse_backward(
                *(block_d_out, block_query, block_key, block_value, block_out, block_lse),
                causal=step == 0,
            )
            if step == 0:  # keys and values are this rank's own
                for total, grad in zip(totals, block_grads, strict=True):
                    total.copy_(grad)
            else:
                totals[0][:, :, query_slice] += block_grads[0]
            if add_pending is not None:
                add_pending()
            add_pending = None
            if step > 0:
                _, d_key, d_value = block_grads
                # returns at once; it receives the gradients of this rank's keys from another rank
                grad_transfer = ring.exchange_grads(
                    _pack_kv(d_key, d_value, lse.dtype), step, length
                )
                is_last_step = step + 1 == ring.num_ranks  # then the totals become results
                add_pending = partial(
                    # waits, adds to totals[1:], and copies the totals to the given results
                    _add_received_grads,
                    grad_transfer,
                    totals,
                    slice_grads if is_last_step else [],
                )
                del grad_transfer, d_key, d_value
            del block_grads, block_key, block_value  # frees memory before the next block
            block_kv = transfer.wait() if transfer else local_kv
        # the last message of a slice arrives while the next slice is computed
        del local_kv, block_kv, transfer, totals
    if add_pending is not None:  # of the last slice
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
    """Allocate out (b h t k), with the memory layout (b t h k), and lse (b h t)."""
    b, h, t, k = query.shape
    out = query.new_empty(b, t, h, k).transpose(1, 2)
    return out, query.new_empty(b, h, t, dtype=accumulation_dtype(query.dtype))


def _accumulator(result: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the tensor in which blocks are summed: `result`, or a new one in a wider dtype."""
    return result if result.dtype == dtype else torch.empty_like(result, dtype=dtype)


def _merge_blocks(total: Tensor, lse: Tensor, block_out: Tensor, block_lse: Tensor) -> None:
    """Combine a block's result with the result over earlier blocks, in place."""
    block_out = block_out if block_out.dtype == total.dtype else block_out.to(total.dtype)
    total.lerp_(block_out, (block_lse - lse).sigmoid_()[..., None])
    torch.logaddexp(lse, block_lse, out=lse)


def _add_received_grads(
    transfer: "_RingSendRecv", totals: list[Tensor], results: list[Tensor]
) -> None:
    """Add received gradients of keys and values; after the last message, copy to `results`."""
    received = transfer.wait()
    for total, grad in zip(totals[1:], _unpack_kv(received), strict=True):
        total[:, :, : len(received)] += grad
    for total, result in zip(totals, results, strict=False):
        if total is not result:
            result.copy_(total)


def _pack_kv(key: Tensor, value: Tensor, dtype: torch.dtype) -> Tensor:
    """Pack keys and values into one message (t 2 b h k); its first half of t is contiguous."""
    b, h, t, k = key.shape
    message = key.new_empty(t, 2, b, h, k, dtype=dtype)
    for view, tensor in zip(_unpack_kv(message), (key, value), strict=True):
        view.copy_(tensor)
    return message


def _unpack_kv(message: Tensor) -> tuple[Tensor, Tensor]:
    """Return keys and values (b h t k) of a message, as views."""
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
    """The ranks of a ring, and the messages that they exchange at each step."""

    def __init__(self, group: str) -> None:
        self.group: Any = distributed_c10d._resolve_process_group(group)  # pyright: ignore
        self.rank, self.num_ranks = dist.get_rank(self.group), dist.get_world_size(self.group)

    def rank_at(self, step: int) -> int:
        """Return the rank whose keys this rank uses at `step`: rank - step, modulo num_ranks."""
        return (self.rank - step) % self.num_ranks

    def exchange_kv(self, local_kv: Tensor, step: int) -> "_RingSendRecv | None":
        """Exchange the keys and values for `step`; return None after the last step."""
        if step == self.num_ranks:
            return None
        target, source = self.rank_at(-step), self.rank_at(step)
        sent = local_kv[: num_visible_keys(target, self.rank, len(local_kv))]
        return _RingSendRecv(
            sent, num_visible_keys(self.rank, source, len(local_kv)), target, source, self.group
        )

    def exchange_grads(self, grads: Tensor, step: int, length: int) -> "_RingSendRecv":
        """Send the gradients of this step's keys and values to their rank, and receive own ones.

        `length` is the number of tokens of a rank.
        """
        source, target = self.rank_at(step), self.rank_at(-step)
        return _RingSendRecv(
            grads, num_visible_keys(target, self.rank, length), source, target, self.group
        )


class _RingSendRecv:
    """A pending send to one rank of the ring and a pending receive from another; each (t ...)."""

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

    def wait(self) -> Tensor:
        """Wait for both, and return the received message."""
        for op in self.pending_ops:
            op.wait()
        return self.receive_buffer
