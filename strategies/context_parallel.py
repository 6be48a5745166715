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

from .block_attention import attention, attention_backward, exact

FORWARD, BACKWARD = 2, {2: 8, 3: 8}  # parts of the heads, by ranks; backward there are more buffers
SHORTEST = {"cpu": 2**16, "cuda": 2**22}  # bytes of a message for which heads are taken apart


def zigzag(length: int, rank: int, ranks: int) -> Tensor:
    """Positions (t) that a rank has of a sequence: an early piece and a late one."""
    pieces = torch.arange(length).chunk(2 * ranks)
    return torch.cat((pieces[rank], pieces[2 * ranks - 1 - rank]))


class Context:
    """The slots of a module, filled for the length of a step."""

    def __init__(self, module: nn.Module, mesh: DeviceMesh) -> None:
        """Find them; refuse a module that has none."""
        self.group, self.rank, self.ranks = mesh.get_group(), mesh.get_local_rank(), mesh.size()
        self.attentions: list[Any] = [m for m in module.modules() if hasattr(m, "attend")]
        self.timed: list[Any] = [m for m in module.modules() if hasattr(m, "times")]
        self.module, self.name = module, type(module).__name__
        name = self.name
        self.seen_sober = False
        if not self.attentions or not self.timed:
            raise UsageError(
                f"cp={self.ranks}: {name} has no attention with the slots `attend` and `times`,"
                " which a cut sequence needs; type --trainer.strategy zero3"
            )
        if any(getattr(m, "dropout", 0) for m in self.attentions):
            raise UsageError(
                f"cp={self.ranks}: {name} drops attention weights, which no rank has whole; type"
                " --model.dropout=0, or --trainer.strategy zero3"
            )
        for part, m in module.named_modules():
            if isinstance(m, _DropoutNd) and m.p > 0:
                raise UsageError(
                    f"cp={self.ranks}: {name} has dropout ({part}), and ranks would drop the same"
                    " of different tokens; type --model.dropout=0, or --trainer.strategy zero3"
                )
        self.usual = [m.attend for m in self.attentions]

    def part(self, batch: Any) -> Any:
        """This rank's share of every tensor (b t ...) of a batch."""

        def share(tensor: Tensor) -> Tensor:
            if tensor.ndim < 2:
                return tensor
            self._check(tensor.shape[1])
            here = zigzag(tensor.shape[1], self.rank, self.ranks).to(tensor.device)
            return tensor.index_select(1, here)

        return tree_map_only(Tensor, share, batch)

    def cut(self, batch: Any) -> Any:
        """This rank's share, and the slots filled for it."""
        mine = self.part(batch)
        tensors = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)]
        lengths = {tensor.shape[1] for tensor in tensors if tensor.ndim > 1}
        if len(lengths) != 1:
            raise UsageError(
                f"cp={self.ranks} cuts the tensors (b t ...) of a batch along t, and this batch has"
                f" {' and '.join(map(str, sorted(lengths))) or 'no'} lengths; type"
                " --trainer.strategy zero3"
            )
        times = zigzag(lengths.pop(), self.rank, self.ranks).to(self._device)
        for module in self.timed:
            module.times = times
        for module in self.attentions:
            module.attend = self.attend
        return mine

    @contextmanager
    def sober(self) -> Iterator[None]:
        """Refuse a step that draws random numbers, like a dropout that is no module; look once."""
        before = [] if self.seen_sober else self._generators()
        yield
        if before and not all(map(torch.equal, before, self._generators())):
            raise UsageError(
                f"cp={self.ranks}: {self.name}.training_step draws random numbers (a dropout?), and"
                " ranks would draw the same for different tokens; leave them out, or type"
                " --trainer.strategy zero3"
            )
        self.seen_sober = True

    @property
    def _device(self) -> torch.device:
        return next(self.module.parameters()).device

    def _generators(self) -> list[Tensor]:
        device = self._device
        states = [torch.get_rng_state()]
        return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states

    def release(self) -> None:
        """Empty the slots: whoever calls the net now has whole sequences."""
        for module in self.timed:
            module.times = None
        for module, usual in zip(self.attentions, self.usual, strict=True):
            module.attend = usual

    def attend(self, query: Tensor, key: Tensor, value: Tensor, dropout: float = 0.0) -> Tensor:
        """Causal attention over the whole sequence, of this rank's tokens; all (b h t k)."""
        device = query.device.type
        if torch.is_autocast_enabled(device) and query.dtype != torch.float64:
            dtype = torch.get_autocast_dtype(device)  # as for scaled_dot_product_attention
            query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        return _Ring.apply(query, key, value, self.group)

    def _check(self, length: int) -> None:
        parts = 2 * self.ranks
        if length % parts:
            nearest = max(parts, round(length / parts) * parts)
            raise UsageError(
                f"cp={self.ranks} does not cut {length} tokens into {parts} equal pieces; type"
                f" --data.context={nearest}"
            )


def queries(rank: int, source: int, length: int) -> slice:
    """Which queries of `rank`, as a slice of its time, see keys of `source`."""
    return slice(length // 2 if source > rank else 0, length)


def seen(rank: int, source: int, length: int) -> int:
    """How many keys of `source`, from the first on, are seen by any query of `rank`."""
    return length // 2 if source < rank else length


def pieces(key: Tensor, parts: int) -> list[tuple[slice, slice]]:
    """Slices of sequences and heads of a key (b h t k) that the ring exchanges one after another.

    The buffers of the ring hold one piece, of `parts` equal ones where there are as many heads, and
    of fewer where messages would be too short for the device.
    """
    batch, heads = key.shape[:2]
    size = 2 * key.numel() * key.element_size()  # of keys and values
    parts = min(parts, max(1, size // SHORTEST.get(key.device.type, 2**22)))
    across = max(1, heads // parts)
    rows = batch if parts <= heads else max(1, batch * heads // parts)
    return [
        (slice(row, row + rows), slice(head, head + across))
        for row in range(0, batch, rows)
        for head in range(0, heads, across)
    ]


@custom_op("ravine::ring_attention", mutates_args=())
def ring_attention(query: Tensor, key: Tensor, value: Tensor, group: str) -> tuple[Tensor, Tensor]:
    """Out (b h t k) and log-sum-exp (b h t) of causal attention over the whole sequence.

    Query, key and value (b h t k) are this rank's, `group` is the name of the ring's group. As one
    operator its output is kept by selective recomputation, and torch.compile does not trace it.
    """
    ring, length = _Neighbours(group), query.shape[2]
    out, lse = _results(query)
    for piece in pieces(key, FORWARD):
        own = _packed(key[piece], value[piece], key.dtype)
        block, q, spread, result = own, query[piece], lse[piece], out[piece]
        total = _total(result, lse.dtype)
        for step in range(ring.ranks):
            passing = ring.keys(own, step + 1)
            mine = queries(ring.rank, ring.back(step), length)
            found, now = attention(q[:, :, mine], *_unpacked(block), causal=step == 0)
            if step == 0:
                total.copy_(found)
                spread.copy_(now)
            else:
                _merge(total[:, :, mine], spread[:, :, mine], found, now)
            del found, now  # before the next block is computed
            block = passing.received() if passing else own
        if total is not result:
            result.copy_(total)
        del own, block, passing, total
    return out, lse


@custom_op("ravine::ring_attention_backward", mutates_args=())
def ring_attention_backward(
    d_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, group: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value (b h t k) of this rank.

    Keys and values are exchanged again. The gradients of a block's keys and values return to their
    rank while the next block is computed.
    """
    ring, length = _Neighbours(group), query.shape[2]
    results = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    add: Callable[[], None] | None = None  # adds the gradients that another rank is sending
    for piece in pieces(key, BACKWARD.get(ring.ranks, 4)):
        own = _packed(key[piece], value[piece], key.dtype)
        block, inputs = own, [each[piece] for each in (d_out, query, out, lse)]
        d_piece = [each[piece] for each in results]
        totals = [_total(each, lse.dtype) for each in d_piece]
        for step in range(ring.ranks):
            passing = ring.keys(own, step + 1)
            mine = queries(ring.rank, ring.back(step), length)
            d, q, o, spread = (each[:, :, mine] for each in inputs)
            found = attention_backward(d, q, *_unpacked(block), o, spread, causal=step == 0)
            if step == 0:
                for total, each in zip(totals, found, strict=True):
                    total.copy_(each)
            else:
                totals[0][:, :, mine] += found[0]
            if add is not None:
                add()
            add = None
            if step > 0:
                returning = ring.gradients(_packed(*found[1:], lse.dtype), step, length)
                add = partial(_add, returning, totals, d_piece if step + 1 == ring.ranks else [])
                del returning
            del found  # before the next block is computed
            block = passing.received() if passing else own
        del own, block, passing, totals
    if add is not None:
        add()
    return results


@ring_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, group: str) -> tuple[Tensor, Tensor]:
    return _results(query)


@ring_attention_backward.register_fake
def _(
    d_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, group: str
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _results(query: Tensor) -> tuple[Tensor, Tensor]:
    """Room for out (b h t k), whose heads lie together at each time as in (b t d), and for lse."""
    b, h, t, k = query.shape
    out = query.new_empty(b, t, h, k).transpose(1, 2)
    return out, query.new_empty(b, h, t, dtype=exact(query.dtype))


def _total(result: Tensor, dtype: torch.dtype) -> Tensor:
    """Where blocks are added up: the result itself, or in a wider dtype beside it."""
    return result if result.dtype == dtype else torch.empty_like(result, dtype=dtype)


def _merge(total: Tensor, lse: Tensor, found: Tensor, now: Tensor) -> None:
    """Join a block's result to that over the keys before it, in place."""
    found = found if found.dtype == total.dtype else found.to(total.dtype)
    total.lerp_(found, (now - lse).sigmoid_()[..., None])
    torch.logaddexp(lse, now, out=lse)


def _add(returning: "_Passing", totals: list[Tensor], results: list[Tensor]) -> None:
    """Add a message to the gradients of keys and values; for the last one, copy the results."""
    found = returning.received()
    for total, each in zip(totals[1:], _unpacked(found), strict=True):
        total[:, :, : len(found)] += each
    for total, result in zip(totals, results, strict=False):
        if total is not result:
            result.copy_(total)


def _packed(key: Tensor, value: Tensor, dtype: torch.dtype) -> Tensor:
    """One message (t 2 b h k) of keys and values; the first half of its time is contiguous."""
    b, h, t, k = key.shape
    message = key.new_empty(t, 2, b, h, k, dtype=dtype)
    for room, part in zip(_unpacked(message), (key, value), strict=True):
        room.copy_(part)
    return message


def _unpacked(message: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values (b h t k) of a message, as views."""
    key, value = message.permute(1, 2, 3, 0, 4).unbind()
    return key, value


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, group: ProcessGroup) -> Tensor:
        out, lse = torch.ops.ravine.ring_attention(query, key, value, group.group_name)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.group = group.group_name
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        given = (gradients[0], *ctx.saved_tensors, ctx.group)
        return *torch.ops.ravine.ring_attention_backward(*given), None


class _Neighbours:
    """The ranks of a ring, and the messages between them at each step."""

    def __init__(self, group: str) -> None:
        self.group: Any = distributed_c10d._resolve_process_group(group)  # pyright: ignore
        self.rank, self.ranks = dist.get_rank(self.group), dist.get_world_size(self.group)

    def back(self, step: int) -> int:
        """The rank so many places before this one: its keys are used at this step."""
        return (self.rank - step) % self.ranks

    def keys(self, own: Tensor, step: int) -> "_Passing | None":
        """Exchange the keys and values that are used at this step, if there is such a step."""
        if step == self.ranks:
            return None
        reader, source = self.back(-step), self.back(step)
        sent = own[: seen(reader, self.rank, len(own))]
        return _Passing(sent, seen(self.rank, source, len(own)), reader, source, self.group)

    def gradients(self, found: Tensor, step: int, length: int) -> "_Passing":
        """Send the gradients of this step's keys and values to their rank; receive own ones."""
        source, reader = self.back(step), self.back(-step)
        return _Passing(found, seen(reader, self.rank, length), source, reader, self.group)


class _Passing:
    """A message (t ...) being sent to a rank of the ring, and one being received from another."""

    def __init__(
        self, sent: Tensor, length: int, to: int, source: int, group: ProcessGroup
    ) -> None:
        self.sent = sent
        self.arriving = sent.new_empty(length, *sent.shape[1:])
        messages = [
            dist.P2POp(dist.isend, sent, group=group, group_peer=to),
            dist.P2POp(dist.irecv, self.arriving, group=group, group_peer=source),
        ]
        self.work = dist.batch_isend_irecv(messages)

    def received(self) -> Tensor:
        """What has come, once it has."""
        for each in self.work:
            each.wait()
        return self.arriving
