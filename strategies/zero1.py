"""ZeRO-1: every rank has all weights, and the gradients and optimizer state of some of them.

    backward   gradients of a bucket -> the rank that owns each parameter, as soon as they are ready
    step       each rank steps the parameters that it owns
    after it   parameters of a bucket -> all other ranks

A step sends 2 W (n - 1) / n on each of n ranks. Parameters are not divided, so an optimizer that
works on whole matrices (Muon) processes each on one rank, and not on all of them. Parameters
stay plain tensors, so a module computes as it does with ddp.

gloo is fastest with pairs of isend and irecv. The small parameters of a bucket are sent joined,
the large ones from their own memory, in pieces. Other backends reduce to the owner and broadcast
from it. Sums are taken in a fixed order of ranks.

After the reduction a rank has the averaged gradients of the parameters that it owns, and None for
the rest. Where something besides the optimizer reads gradients (gradient_readers.py), every rank
keeps all of them: a step then sends W more.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from types import MappingProxyType, MethodType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import (
    Tensor,
    _foreach_add_,  # pyright: ignore[reportPrivateImportUsage]
    _foreach_mul_,  # pyright: ignore[reportPrivateImportUsage]
    nn,
)
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from ravine.errors import RunError, UsageError

from .fsdp.optimizer_probe import needs_closure
from .work_partition import spread_evenly

MB = 2**20
BUCKET = 25 * MB  # bytes of gradients sent together, and the most that is received at once
JOINED = MB  # smaller parameters are sent together, larger ones from their own memory
PIECE = 8 * MB  # the largest message of one parameter
PAIRED = {"gloo"}  # backends for which isend and irecv are faster than their reduce_scatter
TAG = 71  # of these messages; other messages between the same ranks (a ring) have other tags


class Message(NamedTuple):
    """Some small parameters one after another, or the numbers [start, stop) of a large one."""

    parameters: list[Tensor]
    numel: int
    dtype: torch.dtype
    sizes: list[int]  # numbers of each parameter
    start: int | None = None
    flagged: Sequence[Tensor] = ()  # at the end, a number for each: 1 where it has a gradient


def owners(parameters: Iterable[Tensor], load: list[int]) -> dict[Tensor, int]:
    """The rank that owns each parameter: the largest first, each to the rank with the least so far.

    Args:
        parameters: in the same order on every rank
        load: how many numbers each rank owns already; those of the parameters are added
    """
    parameters = list(parameters)
    ranks = spread_evenly([p.numel() for p in parameters], load)
    return dict(zip(parameters, ranks, strict=True))


def refuse_shards(module: nn.Module, group: ProcessGroup, apart: Set[Tensor]) -> None:
    """ValueError if ranks of the group have different parts of a parameter."""
    ranks = set(dist.get_process_group_ranks(group))
    for name, parameter in module.named_parameters():
        if not isinstance(parameter, DTensor) or parameter in apart:
            continue
        mesh: Any = parameter.device_mesh
        for axis, placement in enumerate(parameter.placements):
            here = set(dist.get_process_group_ranks(mesh.get_group(axis)))
            if not placement.is_replicate() and len(here & ranks) > 1:
                raise UsageError(
                    f"zero1: {name} is sharded over the ranks that it is to be owned by;"
                    " allowed: whole parameters, or shards over tp; type --trainer.strategy zero3"
                )


class OwnedGradients:
    """Reduces gradients to the ranks that own their parameters, and shares the optimizer steps.

    Args:
        module: its trainable parameters are reduced
        optimizers: each steps, on a rank, the parameters that the rank owns
        group: the ranks with different data and the same parameters
        find_readers: called at the first backward pass; names other code that reads gradients
        apart: parameters whose gradients other code reduces
        known: owners from before the optimizers were replaced, which have the state

    Raises:
        ValueError: an optimizer calls its closure several times a step, or a parameter is sharded
            over these ranks.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizers: Sequence[Optimizer],
        group: ProcessGroup,
        find_readers: Callable[[], list[str]] = list,
        apart: Set[Tensor] = frozenset(),
        known: Mapping[Tensor, int] = MappingProxyType({}),
    ) -> None:
        """Find an owner for each parameter."""
        self.module, self.group, self.apart = module, group, apart
        refuse_shards(module, group, apart)
        self.find_readers = find_readers
        self.rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)
        self.in_pairs = dist.get_backend(group) in PAIRED
        # Newton needs all gradients on every rank, and has no state to share
        self.optimizers = [each for each in optimizers if not getattr(each, "gathers", False)]
        here = set(module.parameters())
        self.owner: dict[Tensor, int] = {p: rank for p, rank in known.items() if p in here}
        self.keeps_all = True  # every rank keeps all gradients; decided at the first backward pass
        self.arrived: dict[Tensor, int] = {}  # in this backward pass: how often, by parameter
        self._load = [0] * self.ranks
        for parameter, rank in self.owner.items():
            self._load[rank] += parameter.numel()
        self._decided = self._open = False
        self._expected: dict[Tensor, int] = {}  # the most that arrived in a backward pass
        self._known: Any = None  # for which parameters the buckets were made
        self._all: list[Tensor] = []
        self._buckets: list[list[Tensor]] = []
        self._plans: list[dict[int | None, list[Message]]] = []  # of each bucket, by holder
        self._handed: dict[tuple[int, ...], list[dict[int, list[Message]]]] = {}
        self._manual = False
        self._bucket_of: dict[Tensor, int] = {}
        self._missing: list[int] = []  # gradients that each bucket waits for
        self._launched = 0
        self._sent: deque[tuple[Any, Tensor]] = deque()
        self._awaited: deque[tuple[int, Message]] = deque()  # to be received, in order
        self._posted: deque[tuple[Any, Tensor, Message]] = deque()
        self._joint: deque[tuple[Any, Tensor, Message]] = deque()  # sums by the backend
        self._memory: Tensor | None = None  # for what is received
        self._used = 0
        self._hooks: dict[Tensor, Any] = {}
        self._replaced: list[tuple[Optimizer, str, Any]] = []  # methods of the optimizers
        for optimizer in self.optimizers:
            self._share_steps(optimizer)
        self._assign()
        if not getattr(module, "automatic_optimization", True):
            self._refresh()  # the first backward pass may be a `loss.backward()`

    def begin(self, loss: Tensor | None = None) -> None:
        """Announce the last backward pass of an optimizer step, which begins at `loss`."""
        if not self._decided:
            self._decided = True
            self.keeps_all = bool(self.find_readers())
        self._refresh()
        self._open, self._launched = True, 0
        self._manual = not getattr(self.module, "automatic_optimization", True)
        self.arrived.clear()
        self._missing = [len(bucket) for bucket in self._buckets]
        if loss is not None and loss.requires_grad:
            loss.register_hook(self._finish_after)

    def _finish_after(self, _: Tensor) -> None:
        """Called as the outermost backward pass begins: reduce the rest at its end."""
        torch.autograd.Variable._execution_engine.queue_callback(self.finish)  # type: ignore

    @torch.no_grad()
    def finish(self) -> None:
        """Send what has not been sent, and wait for what this rank receives."""
        if not self._open:
            return
        while self._launched < len(self._buckets):
            self._launch()
        self._complete()
        self._open, self._memory = False, None
        for parameter, count in self.arrived.items():
            self._expected[parameter] = max(count, self._expected.get(parameter, 0))
        own = [p for p in self._bucket_of if self._holder(p) == self.rank and p.grad is not None]
        if self.in_pairs and own:
            _foreach_mul_([_part(p.grad) for p in own], 1 / self.ranks)

    def close(self) -> None:
        """Leave the module's parameters and the optimizers as they were."""
        while self._replaced:
            optimizer, name, method = self._replaced.pop()
            setattr(optimizer, name, method)
        for handle in self._hooks.values():
            handle.remove()
        self._hooks.clear()

    def _holder(self, parameter: Tensor) -> int | None:
        """The rank that keeps the gradient; None: all of them."""
        return None if self.keeps_all else self.owner.get(parameter)

    # Which parameters there are

    def _assign(self) -> None:
        """Give an owner to parameters that have none: all of them, or those added to a group."""
        groups = [group for each in self.optimizers for group in each.param_groups]
        new = [p for group in groups for p in group["params"] if p not in self.owner]
        new = [p for p in dict.fromkeys(new) if p not in self.apart]
        self.owner |= owners(new, self._load)
        for optimizer in self.optimizers:
            for parameter in new:
                if self.owner[parameter] != self.rank and parameter in optimizer.state:
                    del optimizer.state[parameter]

    def _refresh(self) -> None:
        """Make the buckets anew if parameters were added, frozen or unfrozen."""
        groups = [group for each in self.optimizers for group in each.param_groups]
        known = [len(group["params"]) for group in groups], [p.requires_grad for p in self._all]
        if (*known, self.keeps_all) == self._known:
            return
        self._assign()
        self._all = list(dict.fromkeys([*self.module.parameters(), *self.owner]))
        self._known = known[0], [p.requires_grad for p in self._all], self.keeps_all
        moving = [p for p in reversed(self._all) if p.requires_grad and p not in self.apart]
        self._buckets = list(buckets(moving))
        self._bucket_of = {p: i for i, bucket in enumerate(self._buckets) for p in bucket}
        self._plans = []
        for bucket in self._buckets:
            held: dict[int | None, list[Tensor]] = {}
            for parameter in bucket:
                held.setdefault(self._holder(parameter), []).append(parameter)
            self._plans.append(
                {
                    holder: list(messages(each, True, holder is None or not self.in_pairs))
                    for holder, each in held.items()
                }
            )
        for parameter in moving:
            if parameter not in self._hooks:
                hook = parameter.register_post_accumulate_grad_hook(self._arrive)
                self._hooks[parameter] = hook

    # Backward

    def _arrive(self, parameter: Tensor) -> None:
        """A gradient is ready; send those of its bucket if it is the last one."""
        if not self._open:
            self._manual = not getattr(self.module, "automatic_optimization", True)
            if not self._manual:  # a micro-batch before the last one
                return
            self.begin()  # `loss.backward()` in place of `self.manual_backward(loss)`
            self._finish_after(parameter)
        count = self.arrived[parameter] = self.arrived.get(parameter, 0) + 1
        bucket = self._bucket_of.get(parameter)
        if self._manual or bucket is None or parameter not in self._expected:
            return
        if count > self._expected[parameter] and bucket < self._launched:
            raise RunError(
                f"zero1: the gradient of {self._name(parameter)} arrives more often than in earlier"
                " steps (re-entrant checkpointing?), after it was sent; allowed: the same number"
                " in each step; use checkpoint(..., use_reentrant=False)"
            )
        self._missing[bucket] -= count == self._expected[parameter]
        while self._launched < len(self._buckets) and not self._missing[self._launched]:
            self._launch()

    def _name(self, parameter: Tensor) -> str:
        named = self.module.named_parameters()
        return next((name for name, p in named if p is parameter), "a parameter")

    @torch.no_grad()
    def _launch(self) -> None:
        """Send the gradients of the next bucket, when those of the one before have arrived."""
        self._complete()
        bucket = self._buckets[self._launched]
        self._launched += 1
        plan = self._plans[self._launched - 1]
        for parameter in bucket:
            gradient = parameter.grad
            if gradient is None or (gradient.layout == torch.strided and gradient.is_contiguous()):
                continue
            if gradient.layout != torch.strided:
                raise UsageError(
                    f"zero1: the gradient of {self._name(parameter)} is sparse; allowed: dense"
                    " gradients; set sparse=False"
                )
            _set_gradient(parameter, _part(gradient).contiguous())
        for message in plan.get(None, []):
            data = _joined_gradients(message)
            work = dist.all_reduce(data, group=self.group, async_op=True)
            self._joint.append((work, data, message))
        send = self._send_to if self.in_pairs else self._reduce_to
        for to in _others(self.rank, self.ranks) if self.in_pairs else range(self.ranks):
            for message in plan.get(to, []):
                send(to, message)
        for parameter in bucket:
            if self._holder(parameter) not in (None, self.rank):
                parameter.grad = None
        own = plan.get(self.rank, []) if self.in_pairs else []
        for source in _others(self.rank, self.ranks):
            self._awaited += ((source, message) for message in own)
        if self._awaited:
            sizes = [_aligned(message) for _, message in self._awaited]
            size = min(sum(sizes), max(BUCKET, *sizes))
            if self._memory is None or len(self._memory) < size:
                device = _part(bucket[0]).device
                self._memory = torch.empty(size, dtype=torch.uint8, device=device)
            self._post()

    def _reduce_to(self, holder: int, message: Message) -> None:
        data = _joined_gradients(message)
        work = dist.reduce(data, group=self.group, group_dst=holder, async_op=True)
        if holder == self.rank:
            self._joint.append((work, data, message))
        else:
            self._sent.append((work, data))

    def _send_to(self, holder: int, message: Message) -> None:
        data = _gradients(message)
        work = dist.isend(data, group=self.group, group_dst=holder, tag=TAG)
        self._sent.append((work, data))

    def _post(self) -> None:
        """Begin to receive as many messages as fit into the memory for them."""
        assert self._memory is not None
        if not self._posted:
            self._used = 0
        while self._awaited:
            source, message = self._awaited[0]
            size = message.numel * message.dtype.itemsize
            if self._used + size > len(self._memory):
                return
            buffer = self._memory[self._used : self._used + size].view(message.dtype)
            self._used += _aligned(message)
            work = dist.irecv(buffer, group=self.group, group_src=source, tag=TAG)
            self._posted.append((work, buffer, message))
            self._awaited.popleft()

    def _complete(self) -> None:
        """Wait for all messages that were launched."""
        while self._posted or self._awaited:
            if not self._posted:
                self._post()
            work, buffer, message = self._posted.popleft()
            work.wait()
            _add(buffer, message)
        while self._joint:
            work, data, message = self._joint.popleft()
            work.wait()
            _take(data.mul_(1 / self.ranks), message)
        while self._sent:
            self._sent.popleft()[0].wait()

    # Step

    def _share_steps(self, optimizer: Optimizer) -> None:
        """Replace `step`: each rank steps its own parameters and sends them to the other ranks."""
        if needs_closure(optimizer):
            raise UsageError(
                f"{type(optimizer).__name__} computes the gradient of all parameters several times"
                " a step, which ranks cannot share; allowed: optimizers whose step needs no"
                " closure, such as AdamW; type --trainer.strategy ddp"
            )
        whole_step = optimizer.step

        def step(own: Optimizer, closure: Callable[[], Any] | None = None) -> Any:
            loss = None
            if closure is not None:
                with torch.enable_grad():
                    loss = closure()
            self._refresh()
            parameters = [p for group in own.param_groups for p in group["params"]]
            hidden = [p for p in parameters if self.owner.get(p, self.rank) != self.rank]
            gradients = [p.grad for p in hidden]
            for p in hidden:  # all optimizers skip a parameter without a gradient
                p.grad = None
            whole_step()
            for p, gradient in zip(hidden, gradients, strict=True):
                p.grad = gradient
            self.hand_out([p for p in parameters if p.requires_grad and p in self.owner])
            return loss

        if hasattr(whole_step, "_wrapped_by_lr_sched"):  # else a schedule would warn of this method
            step.__dict__["_wrapped_by_lr_sched"] = True
        self._replaced.append((optimizer, "step", whole_step))
        optimizer.step = MethodType(step, optimizer)  # type: ignore[method-assign]
        for mode in ("train", "eval"):
            if callable(getattr(optimizer, mode, None)):
                self._share_mode(optimizer, mode)

    def _share_mode(self, optimizer: Any, mode: str) -> None:
        """Replace a mode of a schedule-free optimizer: owners change weights and send them."""
        change = getattr(optimizer, mode)

        def changed(*args: Any, **kwargs: Any) -> Any:
            result = change(*args, **kwargs)
            if getattr(optimizer, "two_sets", True):  # of several optimizers, those with two modes
                parameters = [p for group in optimizer.param_groups for p in group["params"]]
                self.hand_out([p for p in parameters if p.requires_grad and p in self.owner])
            return result

        self._replaced.append((optimizer, mode, change))
        setattr(optimizer, mode, changed)

    @torch.no_grad()
    def hand_out(self, parameters: list[Tensor]) -> None:
        """Send the owners' values to every rank, bucket by bucket."""
        waiting: deque[list[tuple[Any, Tensor, Message | None]]] = deque()
        send = self._exchange if self.in_pairs else self._broadcast
        for plan in self._plan_of(parameters):
            waiting.append(send(plan))
            if len(waiting) > 1:
                _receive(waiting.popleft())
        while waiting:
            _receive(waiting.popleft())

    def _plan_of(self, parameters: list[Tensor]) -> list[dict[int, list[Message]]]:
        """For each bucket of parameters, the messages of each owner."""
        key = tuple(map(id, parameters))
        if key not in self._handed:
            if len(self._handed) > len(self.optimizers):  # parameters were frozen or added
                self._handed.clear()
            self._handed[key] = []
            for bucket in buckets(parameters):
                held: dict[int, list[Tensor]] = {}
                for parameter in bucket:
                    held.setdefault(self.owner[parameter], []).append(parameter)
                whole = not self.in_pairs
                plan = {rank: list(messages(each, whole=whole)) for rank, each in held.items()}
                self._handed[key].append(plan)
        return self._handed[key]

    def _exchange(self, plan: dict[int, list[Message]]) -> list[tuple[Any, Tensor, Message | None]]:
        found: list[tuple[Any, Tensor, Message | None]] = []
        for message in plan.get(self.rank, []):
            data = _values(message)
            for to in _others(self.rank, self.ranks):
                how = {"group": self.group, "group_dst": to, "tag": TAG}
                found.append((dist.isend(data, **how), data, None))
        for source in _others(self.rank, self.ranks):
            for message in plan.get(source, []):
                data = _place(message)
                how = {"group": self.group, "group_src": source, "tag": TAG}
                found.append((dist.irecv(data, **how), data, message))
        return found

    def _broadcast(
        self, plan: dict[int, list[Message]]
    ) -> list[tuple[Any, Tensor, Message | None]]:
        found: list[tuple[Any, Tensor, Message | None]] = []
        for source, each in sorted(plan.items()):
            for message in each:
                own = source == self.rank
                data = _values(message) if own else _place(message)
                how = {"group": self.group, "group_src": source, "async_op": True}
                found.append((dist.broadcast(data, **how), data, None if own else message))
        return found


def buckets(parameters: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Cut a list of parameters into buckets of about BUCKET bytes; a small net has two, or one."""
    total = sum(_bytes(p) for p in parameters)
    most = min(BUCKET, max(JOINED, -(-total // 2)))
    bucket, size = [], 0
    for parameter in parameters:
        bucket.append(parameter)
        size += _bytes(parameter)
        if size >= most:
            yield bucket
            bucket, size = [], 0
    if bucket:
        yield bucket


def messages(
    parameters: Sequence[Tensor], flagged: bool = False, whole: bool = False
) -> Iterator[Message]:
    """The messages for some parameters, alike on the sender and the receiver.

    Args:
        parameters: those of one bucket and one owner
        flagged: whether the message says for each parameter if it has a gradient
        whole: whether large parameters are joined to the small ones
    """
    for dtype in {_part(p).dtype: None for p in parameters}:
        alike = [p for p in parameters if _part(p).dtype == dtype]
        large = [p for p in alike if _bytes(p) >= JOINED and _part(p).is_contiguous()]
        large = [] if whole else large
        apart = set(map(id, large))
        small = [p for p in alike if id(p) not in apart]
        flags = alike if flagged else []
        if numel := sum(_part(p).numel() for p in small) + len(flags):
            sizes = [_part(p).numel() for p in small]
            yield Message(small, numel, dtype, sizes, None, flags)
        step = PIECE // dtype.itemsize
        for parameter in large:
            numel = _part(parameter).numel()
            for start in range(0, numel, step):
                yield Message([parameter], min(step, numel - start), dtype, [numel], start)


def _others(rank: int, ranks: int) -> list[int]:
    """The other ranks, in an order in which ranks exchange in pairs at each index."""
    even = ranks & (ranks - 1) == 0
    partners = [rank ^ i if even else (i - rank) % ranks for i in range(ranks)]
    return [each for each in partners if each != rank]


def _aligned(message: Message) -> int:
    """Bytes of a message, up to the next place where a tensor of any dtype may begin."""
    return -(-message.numel * message.dtype.itemsize // 16) * 16


def _part(tensor: Any) -> Tensor:
    """This rank's numbers of a tensor, of the same memory; complex ones as pairs of real ones."""
    part: Tensor = tensor
    if isinstance(tensor, DTensor):
        part = tensor._local_tensor  # detached, and faster than `to_local`
    return torch.view_as_real(part.detach()) if part.dtype.is_complex else part


def _bytes(tensor: Tensor) -> int:
    part = _part(tensor)
    return part.numel() * part.element_size()


def _values(message: Message) -> Tensor:
    """The numbers of parameters; a view of a large one."""
    if message.start is not None:
        flat = _part(message.parameters[0]).view(-1)
        return flat[message.start : message.start + message.numel]
    return torch.cat([_part(p).reshape(-1) for p in message.parameters])


def _place(message: Message) -> Tensor:
    """Memory to receive parameters in: a large one's own."""
    if message.start is not None:
        return _values(message)
    return torch.empty(
        message.numel, dtype=message.dtype, device=_part(message.parameters[0]).device
    )


def _receive(works: list[tuple[Any, Tensor, Message | None]]) -> None:
    for work, data, message in works:
        work.wait()
        if message is None:
            continue
        if message.start is None:
            for p, values in zip(message.parameters, data.split(message.sizes), strict=True):
                part = _part(p)
                part.copy_(values.view(part.shape))
        else:  # torch does not count a message as a change
            torch.autograd.graph.increment_version(message.parameters[0])


def _gradients(message: Message) -> Tensor:
    """What is sent of gradients; a view of a large one."""
    if message.start is None:
        return _joined_gradients(message)
    gradient = message.parameters[0].grad
    if gradient is None:
        part = _part(message.parameters[0])
        return torch.zeros(message.numel, dtype=message.dtype, device=part.device)
    return _part(gradient).view(-1)[message.start : message.start + message.numel]


def _joined_gradients(message: Message) -> Tensor:
    parts = []
    for p in message.parameters:
        if (gradient := p.grad) is None:
            part = _part(p)
            parts.append(part.new_zeros(part.numel()))
        else:
            parts.append(_part(gradient).view(-1))
    like = _part((*message.parameters, *message.flagged)[0])
    flags = like.new_ones(len(message.flagged), dtype=message.dtype)
    for number, p in enumerate(message.flagged):
        if p.grad is None:
            flags[number] = 0
    return torch.cat([*parts, flags])


def _flags(data: Tensor, message: Message) -> list[bool]:
    """Whether each flagged parameter has a gradient on this rank or on the sender."""
    if all(p.grad is not None for p in message.flagged):
        return [True] * len(message.flagged)
    there = data[len(data) - len(message.flagged) :].tolist()
    return [
        p.grad is not None or number > 0 for p, number in zip(message.flagged, there, strict=True)
    ]


def _add(data: Tensor, message: Message) -> None:
    """Add the gradients of another rank."""
    if message.start is not None:
        gradient = message.parameters[0].grad
        if gradient is not None:
            flat = _part(gradient).view(-1)
            flat[message.start : message.start + message.numel].add_(data)
        return
    for parameter, has in zip(message.flagged, _flags(data, message), strict=True):
        if has and parameter.grad is None:
            _set_gradient(
                parameter, torch.zeros_like(_part(parameter), memory_format=torch.contiguous_format)
            )
    parts = data.split([*message.sizes, len(message.flagged)])
    pairs = zip(message.parameters, parts, strict=False)
    moving = [(_part(p.grad).view(-1), values) for p, values in pairs if p.grad is not None]
    if moving:
        _foreach_add_([own for own, _ in moving], [values for _, values in moving])


def _take(data: Tensor, message: Message) -> None:
    """Set the gradients of parameters that have one on any rank to views of the sum."""
    parts = data.split([*message.sizes, len(message.flagged)])
    flags = _flags(data, message)
    has = {id(p) for p, flag in zip(message.flagged, flags, strict=True) if flag}
    for parameter, values in zip(message.parameters, parts, strict=False):
        if id(parameter) in has:
            _set_gradient(parameter, values.view(_part(parameter).shape))


def _set_gradient(parameter: Any, values: Tensor) -> None:
    """Set a gradient from this rank's numbers of it, of the shape of `_part`."""
    if parameter.is_complex():
        values = torch.view_as_complex(values)
    if isinstance(parameter, DTensor):
        mesh, places = parameter.device_mesh, parameter.placements
        size = {"shape": parameter.shape, "stride": parameter.stride()}
        values = DTensor.from_local(values, mesh, places, run_check=False, **size)
    parameter.grad = values
