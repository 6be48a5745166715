"""Context parallelism: a sequence too long for one device is cut along time, over a ring of ranks.

Each rank keeps its queries; keys and values go round (Liu, 2023). In causal attention late tokens
look at more than early ones, so a rank takes one early piece of 2n and one late piece (zig-zag):

    n = 2:  rank 0 has pieces 0 and 3, rank 1 has 1 and 2

    keys of          early piece              late piece
    this rank        causal within both
    an earlier one   all queries see it       nobody
    a later one      late queries see it      late queries see it

So every rank has the same work at each of the n steps, half of what there is without the mask.
A net takes part by two slots of its modules: `attend(query, key, value, dropout)`, and `times`,
the positions (t) of the tokens it is given.

Axes: b batch, t time (of this rank), h heads, k head width.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.modules.dropout import _DropoutNd
from torch.utils._pytree import tree_leaves, tree_map_only


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
        self.name = name = type(module).__name__
        self.seen_sober = False
        if not self.attentions or not self.timed:
            raise ValueError(
                f"cp={self.ranks}: {name} has no attention with the slots `attend` and `times`,"
                " which a cut sequence needs; type --trainer.strategy zero3"
            )
        if any(getattr(m, "dropout", 0) for m in self.attentions):
            raise ValueError(
                f"cp={self.ranks}: {name} drops attention weights, which no rank has whole; type"
                " --model.dropout=0, or --trainer.strategy zero3"
            )
        for part, m in module.named_modules():
            if isinstance(m, _DropoutNd) and m.p > 0:
                raise ValueError(
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
            raise ValueError(
                f"cp={self.ranks} cuts the tensors (b t ...) of a batch along t, and this batch has"
                f" {' and '.join(map(str, sorted(lengths))) or 'no'} lengths; type"
                " --trainer.strategy zero3"
            )
        times = zigzag(lengths.pop(), self.rank, self.ranks)
        for module in self.timed:
            module.times = times.to(next(module.parameters()).device)
        for module in self.attentions:
            module.attend = self.attend
        return mine

    @contextmanager
    def sober(self) -> Iterator[None]:
        """Refuse a step that draws random numbers, like a dropout that is no module; look once."""
        before = [] if self.seen_sober else self._generators()
        yield
        if before and not all(map(torch.equal, before, self._generators())):
            raise ValueError(
                f"cp={self.ranks}: {self.name}.training_step draws random numbers (a dropout?), and"
                " ranks would draw the same for different tokens; leave them out, or type"
                " --trainer.strategy zero3"
            )
        self.seen_sober = True

    def _generators(self) -> list[Tensor]:
        device = next(self.timed[0].parameters()).device
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
        return _Ring.apply(query, key, value, self.group)

    def _check(self, length: int) -> None:
        parts = 2 * self.ranks
        if length % parts:
            nearest = max(parts, round(length / parts) * parts)
            raise ValueError(
                f"cp={self.ranks} does not cut {length} tokens into {parts} equal pieces; type"
                f" --data.context={nearest}"
            )


def pairs(rank: int, source: int, length: int) -> tuple[slice, slice]:
    """Which queries of a rank see which keys of another, as slices of time."""
    half = length // 2
    if source < rank:
        return slice(None), slice(half)
    return (slice(half, None) if source > rank else slice(None)), slice(None)


def scores(query: Tensor, key: Tensor, causal: bool) -> Tensor:
    """q kᵀ / √k in fp32, masked on the rank's own keys: (b h t t)."""
    found = (query @ key.mT).float() * query.shape[-1] ** -0.5
    if causal:
        found = found + torch.full(found.shape[-2:], -torch.inf, device=found.device).triu(1)
    return found


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, group: ProcessGroup) -> Tensor:
        rank, ranks = dist.get_rank(group), dist.get_world_size(group)
        both = torch.stack((key, value))  # one message a step
        answer = torch.zeros_like(query, dtype=torch.float32)  # many small terms are added up
        spread = answer.new_full(query.shape[:-1], -torch.inf)  # logsumexp of the scores so far
        for step in range(ranks):
            source = (rank - step) % ranks
            passing = _Passing(both, group) if step < ranks - 1 else None
            mine, theirs = pairs(rank, source, query.shape[2])
            some, values = both[0, :, :, theirs], both[1, :, :, theirs]
            found = scores(query[:, :, mine], some, causal=source == rank)
            now = torch.logaddexp(spread[:, :, mine], found.logsumexp(-1))
            weights = (found - now[..., None]).exp()
            keep = (spread[:, :, mine] - now).exp()[..., None]
            added = (weights.to(values.dtype) @ values).float()
            answer[:, :, mine] = answer[:, :, mine] * keep + added
            spread[:, :, mine] = now
            both = passing.received() if passing else both
        answer = answer.to(query.dtype)
        ctx.save_for_backward(query, key, value, answer, spread)
        ctx.group = group
        return answer

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        query, key, value, answer, spread = ctx.saved_tensors
        group, d_answer = ctx.group, gradients[0]
        rank, ranks = dist.get_rank(group), dist.get_world_size(group)
        both = torch.stack((key, value))
        d_both = torch.zeros_like(both, dtype=torch.float32)  # goes round with its keys and values
        d_query = torch.zeros_like(query, dtype=torch.float32)
        inner = (d_answer.float() * answer.float()).sum(-1, keepdim=True)  # (b h t 1)
        for step in range(ranks):
            source = (rank - step) % ranks
            passing = _Passing(both, group) if step < ranks - 1 else None
            mine, theirs = pairs(rank, source, query.shape[2])
            some, values = both[0, :, :, theirs], both[1, :, :, theirs]
            q, d = query[:, :, mine], d_answer[:, :, mine]
            found = scores(q, some, causal=source == rank)
            weights = (found - spread[:, :, mine, None]).exp()
            d_found = weights * ((d @ values.mT).float() - inner[:, :, mine])
            d_found = (d_found * q.shape[-1] ** -0.5).to(q.dtype)
            d_query[:, :, mine] += (d_found @ some).float()
            d_both[0, :, :, theirs] += (d_found.mT @ q).float()
            d_both[1, :, :, theirs] += (weights.to(d.dtype).mT @ d).float()
            both = passing.received() if passing else both
            d_both = _Passing(d_both, group).received()
        return d_query.to(query.dtype), *d_both.to(key.dtype), None


class _Passing:
    """A tensor on its way to the next rank of the ring, while one comes from the rank before."""

    def __init__(self, tensor: Tensor, group: ProcessGroup) -> None:
        rank, ranks = dist.get_rank(group), dist.get_world_size(group)
        after, before = (dist.get_global_rank(group, (rank + i) % ranks) for i in (1, -1))
        self.sent = tensor.contiguous()
        self.arriving = torch.empty_like(self.sent)
        messages = [
            dist.P2POp(dist.isend, self.sent, after, group),
            dist.P2POp(dist.irecv, self.arriving, before, group),
        ]
        self.work = dist.batch_isend_irecv(messages)

    def received(self) -> Tensor:
        """What has come, once it has."""
        for each in self.work:
            each.wait()
        return self.arriving
