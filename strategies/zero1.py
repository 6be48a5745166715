"""ZeRO-1: all ranks have all weights; each has the optimizer state of the parameters it owns.

    backward    gradients of a bucket -> the rank that owns each parameter, as soon as all are ready
    step        each rank steps the parameters that it owns
    after step  parameters of a bucket -> all other ranks

With W bytes of parameters, a step sends 2 W (n - 1) / n on each of n ranks. A parameter has one
owner, so an optimizer that needs full matrices (Muon) processes each matrix on one rank only.
Parameters stay plain tensors, so a module computes as it does with ddp.

gloo is fastest with pairs of isend and irecv. The small parameters of a bucket are sent joined,
large ones in chunks from their own memory. With other backends the gradients are reduced to the
owner, and the owner broadcasts the parameters. Sums are taken in a fixed order of ranks.

After the reduction a rank has the averaged gradients of the parameters that it owns, and None for
other parameters. If other code than the optimizer reads gradients (gradient_readers.py), every rank
keeps all gradients: a step then sends W more.
"""

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from types import MappingProxyType, MethodType
from typing import Any

import torch
import torch.distributed as dist
from torch import (
    Tensor,
    _foreach_mul_,  # pyright: ignore[reportPrivateImportUsage]
    nn,
)
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from ravine.errors import RunError, UsageError

from . import zero1_messages
from .fsdp.optimizer_probe import needs_closure
from .work_partition import assign_balanced
from .zero1_messages import (
    ParamMessage,
    add_gradients,
    aligned_bytes,
    iter_buckets,
    iter_messages,
    join_gradients,
    local_view,
    pack_gradients,
    pack_params,
    receive_buffer,
    set_gradient,
    set_reduced_gradients,
    unpack_params,
)

POINT_TO_POINT_BACKENDS = {"gloo"}  # backends whose isend and irecv are faster than reduce_scatter
MESSAGE_TAG = 71  # differs from the tags of other messages between the same ranks (ring attention)


def assign_owners(parameters: Iterable[Tensor], load: list[int]) -> dict[Tensor, int]:
    """Assign each parameter to an owner rank: the largest first, each to the least loaded rank.

    Args:
        parameters: in the same order on every rank.
        load: number of elements that each rank owns already; updated in place.
    """
    parameters = list(parameters)
    ranks = assign_balanced([p.numel() for p in parameters], load)
    return dict(zip(parameters, ranks, strict=True))


def check_not_sharded_over(
    module: nn.Module, group: ProcessGroup, ignored_params: Set[Tensor]
) -> None:
    """Raise UsageError if a parameter is sharded over ranks of the group.

    Args:
        module: the module of the parameters.
        group: the data ranks, of which one is to own each parameter.
        ignored_params: parameters that have no owner; they may be sharded.
    """
    ranks = set(dist.get_process_group_ranks(group))
    for name, parameter in module.named_parameters():
        if not isinstance(parameter, DTensor) or parameter in ignored_params:
            continue
        mesh: Any = parameter.device_mesh
        for axis, placement in enumerate(parameter.placements):
            # the ranks that differ from this rank in this axis of the mesh only
            axis_ranks = set(dist.get_process_group_ranks(mesh.get_group(axis)))
            # every group of ranks contains this rank, so 1 common rank is no overlap
            if not placement.is_replicate() and len(axis_ranks & ranks) > 1:
                raise UsageError(
                    f"zero1: {name} is sharded over the data-parallel ranks, of which one is to "
                    "own it",
                    ["full parameters, or shards over tp"],
                    'use Trainer(strategy="zero3")',
                    flag="--trainer.strategy=zero3",
                )


class Zero1Reducer:
    """Reduces gradients to the ranks that own the parameters, and shards the optimizer steps.

    A bucket is a list of parameters whose gradients are sent together. In a backward pass a bucket
    is launched (its messages are started) once all of its gradients have arrived, in order:

        owner_of[p]             the rank that owns a parameter; it has its optimizer state
        _bucket_of[p]           index of the bucket of a parameter
        _expected_arrivals[p]   how often the gradient of a parameter arrives, from earlier passes
        _num_missing[i]         number of gradients that bucket i still waits for
        _num_launched           number of buckets launched in this pass
        _gradient_plans[i]      messages of bucket i, by the rank that keeps the gradients

    Raises:
        UsageError: an optimizer calls its closure several times a step, or a parameter is sharded
            over these ranks.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizers: Sequence[Optimizer],
        group: ProcessGroup,
        find_gradient_readers: Callable[[], list[str]] = list,
        ignored_params: Set[Tensor] = frozenset(),
        known_owners: Mapping[Tensor, int] = MappingProxyType({}),
    ) -> None:
        """Assign an owner to each parameter, and replace the optimizers' methods.

        Args:
            module: the LightningModule.
            optimizers: its optimizers.
            group: the data ranks, over which gradients are averaged.
            find_gradient_readers: called at the first backward pass; returns names of code, besides
                the optimizers, that reads gradients; every rank then keeps all gradients.
            ignored_params: parameters whose gradients other code reduces.
            known_owners: owner ranks of parameters that have optimizer state already.
        """
        check_not_sharded_over(module, group, ignored_params)
        self.module, self.group, self.ignored_params = module, group, ignored_params
        self.find_gradient_readers = find_gradient_readers
        self.rank, self.num_ranks = dist.get_rank(group), dist.get_world_size(group)
        # true for gloo: isend and irecv; otherwise reductions and broadcasts of the backend
        self.is_point_to_point = dist.get_backend(group) in POINT_TO_POINT_BACKENDS
        # Newton needs all gradients on every rank, and has no state to shard
        self.optimizers = [
            optimizer
            for optimizer in optimizers
            if not getattr(optimizer, "needs_full_gradient", False)
        ]
        module_params = set(module.parameters())
        self.owner_of: dict[Tensor, int] = {
            p: rank for p, rank in known_owners.items() if p in module_params
        }
        self.keeps_all_gradients = True  # on every rank; decided at the first backward pass
        self.arrival_counts: dict[Tensor, int] = {}  # gradients of a parameter in this backward
        self._owned_numel = [0] * self.num_ranks  # elements of the parameters of each owner
        for parameter, rank in self.owner_of.items():
            self._owned_numel[rank] += parameter.numel()
        self._has_searched_readers = False  # whether `find_gradient_readers` was called
        self._is_reducing = False  # from `begin_backward` to `finish_reduction`
        self._expected_arrivals: dict[Tensor, int] = {}  # maximum over earlier backward passes
        self._bucket_key: Any = None  # result of `_make_bucket_key` when the buckets were built
        self._all_params: list[Tensor] = []
        self._buckets: list[list[Tensor]] = []
        self._bucket_of: dict[Tensor, int] = {}  # index of a parameter's bucket
        # messages of each bucket by the rank that keeps the gradient; None: all ranks keep it
        self._gradient_plans: list[dict[int | None, list[ParamMessage]]] = []
        # messages of each bucket by owner, for the ids of the parameters to be sent
        self._param_plans: dict[tuple[int, ...], list[dict[int, list[ParamMessage]]]] = {}
        self._is_manual = False  # whether the module steps its optimizers itself
        self._num_missing: list[int] = []  # gradients that each bucket waits for
        self._num_launched = 0  # buckets whose messages were started in this backward
        # messages in flight, with the work object of torch and the memory that it uses
        self._sends: deque[tuple[Any, Tensor]] = deque()
        self._queued_receives: deque[tuple[int, ParamMessage]] = deque()  # source; not yet posted
        self._posted_receives: deque[tuple[Any, Tensor, ParamMessage]] = deque()
        self._backend_reductions: deque[tuple[Any, Tensor, ParamMessage]] = deque()
        self._receive_memory: Tensor | None = None  # bytes into which receives are posted
        self._num_used_bytes = 0  # of the receive memory
        self._hooks: dict[Tensor, Any] = {}  # handles of the hooks of the parameters
        self._replaced_methods: list[tuple[Optimizer, str, Any]] = []  # methods of the optimizers
        for optimizer in self.optimizers:
            # replaces its `step`
            self._shard_optimizer_step(optimizer)
        # the ranks get about equal numbers of elements
        self._assign_new_owners()
        if not getattr(module, "automatic_optimization", True):
            self._rebuild_buckets()  # hooks are needed before the first `loss.backward()`

    def begin_backward(self, loss: Tensor | None = None) -> None:
        """Prepare the reduction for the last backward pass of an optimizer step, from `loss`."""
        if not self._has_searched_readers:
            self._has_searched_readers = True
            # without an owner of any parameter, every rank gets all gradients, too
            self.keeps_all_gradients = not self.owner_of or bool(self.find_gradient_readers())
        self._rebuild_buckets()
        self._is_reducing, self._num_launched = True, 0
        self._is_manual = not getattr(self.module, "automatic_optimization", True)
        self.arrival_counts.clear()
        self._num_missing = [len(bucket) for bucket in self._buckets]
        if loss is not None and loss.requires_grad:
            loss.register_hook(self._finish_after)

    def _finish_after(self, _: Tensor) -> None:
        """Queue `finish_reduction` for the end of the running backward pass."""
        torch.autograd.Variable._execution_engine.queue_callback(self.finish_reduction)  # type: ignore

    @torch.no_grad()
    def finish_reduction(self) -> None:
        """Send the remaining buckets, wait for all messages, and average the owned gradients.

        Called at the end of the backward pass, and by MeshStrategy after it.
        """
        if not self._is_reducing:
            return
        while self._num_launched < len(self._buckets):
            self._launch_bucket()
        self._wait_for_all()
        self._is_reducing, self._receive_memory = False, None
        # how often gradients have arrived tells when a bucket is complete in the next step
        for parameter, count in self.arrival_counts.items():
            self._expected_arrivals[parameter] = max(
                count, self._expected_arrivals.get(parameter, 0)
            )
        owned_params = [
            p
            for p in self._bucket_of
            # _gradient_holder: the rank that keeps the gradient; None, if all ranks keep it
            if self._gradient_holder(p) == self.rank and p.grad is not None
        ]
        if self.is_point_to_point and owned_params:  # reductions by the backend are scaled already
            _foreach_mul_([local_view(p.grad) for p in owned_params], 1 / self.num_ranks)

    def restore(self) -> None:
        """Remove the hooks of the parameters, and restore the methods of the optimizers."""
        while self._replaced_methods:
            optimizer, name, method = self._replaced_methods.pop()
            setattr(optimizer, name, method)
        for handle in self._hooks.values():
            handle.remove()
        self._hooks.clear()

    def _gradient_holder(self, parameter: Tensor) -> int | None:
        """Return the rank that keeps the gradient of a parameter; None: all ranks."""
        return None if self.keeps_all_gradients else self.owner_of.get(parameter)

    # Owners and buckets

    def _assign_new_owners(self) -> None:
        """Assign owners to parameters without one: all at first, later the added parameters."""
        groups = [
            group for source_optimizer in self.optimizers for group in source_optimizer.param_groups
        ]
        new_params = [p for group in groups for p in group["params"] if p not in self.owner_of]
        new_params = [p for p in dict.fromkeys(new_params) if p not in self.ignored_params]
        self.owner_of |= assign_owners(new_params, self._owned_numel)
        for optimizer in self.optimizers:
            for parameter in new_params:
                if self.owner_of[parameter] != self.rank and parameter in optimizer.state:
                    del optimizer.state[parameter]

    def _rebuild_buckets(self) -> None:
        """Rebuild the buckets if parameters were added, frozen or unfrozen.

        A bucket is a list of parameters whose gradients are sent together. Called before a backward
        pass and in a step.
        """
        # the key: sizes of param groups, `requires_grad` of each, and whether all ranks keep all
        if self._make_bucket_key() == self._bucket_key:
            return
        self._assign_new_owners()
        self._all_params = list(dict.fromkeys([*self.module.parameters(), *self.owner_of]))
        self._bucket_key = self._make_bucket_key()
        # reversed: about the order in which the backward pass computes gradients
        trainable = [
            p
            for p in reversed(self._all_params)
            if p.requires_grad and p not in self.ignored_params
        ]
        self._buckets = list(iter_buckets(trainable))
        self._bucket_of = {p: i for i, bucket in enumerate(self._buckets) for p in bucket}
        self._gradient_plans = []
        for bucket in self._buckets:
            params_by_holder: dict[int | None, list[Tensor]] = {}
            for parameter in bucket:
                params_by_holder.setdefault(self._gradient_holder(parameter), []).append(parameter)
            plan = {}
            # holder: the rank that keeps the gradients; None: all ranks
            for holder, params in params_by_holder.items():
                is_joined = holder is None or not self.is_point_to_point
                # large gradients are sent alone between two ranks, which needs no copy
                plan[holder] = list(iter_messages(params, with_flags=True, join_all=is_joined))
            self._gradient_plans.append(plan)
        for parameter in trainable:
            if parameter not in self._hooks:
                hook = parameter.register_post_accumulate_grad_hook(self._on_gradient_ready)
                self._hooks[parameter] = hook

    # Backward

    def _make_bucket_key(self) -> tuple[Any, ...]:
        """Return the values of which a change requires new buckets."""
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        group_sizes = [len(group["params"]) for group in groups]
        is_trainable = [p.requires_grad for p in self._all_params]
        return group_sizes, is_trainable, self.keeps_all_gradients

    def _on_gradient_ready(self, parameter: Tensor) -> None:
        """Count a gradient that is ready, and launch buckets whose gradients are complete.

        It is the post-accumulate hook of each trainable parameter. How often a gradient arrives in
        a backward pass is known from earlier passes; without them no bucket is launched here.
        """
        if not self._is_reducing:
            # else MeshStrategy calls begin_backward for the last micro-batch
            self._is_manual = not getattr(self.module, "automatic_optimization", True)
            if not self._is_manual:  # a micro-batch before the last one
                return
            self.begin_backward()  # `loss.backward()` in place of `self.manual_backward(loss)`
            # queues finish_reduction for the end of this backward pass
            self._finish_after(parameter)
        count = self.arrival_counts.get(parameter, 0) + 1
        self.arrival_counts[parameter] = count
        bucket = self._bucket_of.get(parameter)
        expected_count = self._expected_arrivals.get(parameter)
        if self._is_manual or bucket is None or expected_count is None:
            return
        if count > expected_count and bucket < self._num_launched:
            raise RunError(
                f"zero1: the gradient of {self._param_name(parameter)} arrives more often than in "
                "earlier steps, after it was sent (e.g. with re-entrant checkpointing)",
                ["the same number of gradients in each step"],
                "use checkpoint(..., use_reentrant=False)",
            )
        if count == expected_count:
            self._num_missing[bucket] -= 1
        # in order of the buckets, so that all ranks send in the same order
        while self._num_launched < len(self._buckets) and not self._num_missing[self._num_launched]:
            self._launch_bucket()

    def _param_name(self, parameter: Tensor) -> str:
        named = self.module.named_parameters()
        return next((name for name, p in named if p is parameter), "a parameter")

    @torch.no_grad()
    def _launch_bucket(self) -> None:
        """Wait for the previous bucket, then start the messages of the next one."""
        self._wait_for_all()
        bucket = self._buckets[self._num_launched]
        plan = self._gradient_plans[self._num_launched]
        self._num_launched += 1
        self._make_gradients_contiguous(bucket)  # a message is a slice of a gradient's memory
        for message in plan.get(None, []):  # gradients that every rank keeps
            # one flat tensor: the gradients, and a flag for each parameter
            data = join_gradients(message)
            work = dist.all_reduce(data, group=self.group, async_op=True)
            self._backend_reductions.append((work, data, message))
        if self.is_point_to_point:
            # all other ranks, in an order in which ranks exchange in pairs
            for target in _partner_order(self.rank, self.num_ranks):
                for message in plan.get(target, []):
                    # starts to send the gradients; the target adds them to its own
                    self._send_to(target, message)
        else:
            for holder in range(self.num_ranks):
                for message in plan.get(holder, []):
                    # starts a reduction by the backend; only the holder gets the sum
                    self._reduce_to(holder, message)
        for parameter in bucket:  # the messages keep the memory of the gradients
            if self._gradient_holder(parameter) not in (None, self.rank):
                parameter.grad = None
        if self.is_point_to_point:
            # the same messages from each other rank: gradients that this rank keeps
            self._queue_receives(plan.get(self.rank, []), local_view(bucket[0]).device)

    def _make_gradients_contiguous(self, parameters: list[Tensor]) -> None:
        """Copy gradients that are not contiguous; raise UsageError for a sparse one."""
        for parameter in parameters:
            gradient = parameter.grad
            if gradient is None or (gradient.layout == torch.strided and gradient.is_contiguous()):
                continue
            if gradient.layout != torch.strided:
                raise UsageError(
                    f"zero1: the gradient of {self._param_name(parameter)} is sparse",
                    ["dense gradients"],
                    "use sparse=False in the layer",
                )
            set_gradient(parameter, local_view(gradient).contiguous())

    def _queue_receives(self, messages: list[ParamMessage], device: torch.device) -> None:
        """Queue a receive of these messages from each other rank, and post the first receives."""
        for source in _partner_order(self.rank, self.num_ranks):
            self._queued_receives += ((source, message) for message in messages)
        if not self._queued_receives:
            return
        sizes = [aligned_bytes(message) for _, message in self._queued_receives]
        needed_bytes = min(sum(sizes), max(zero1_messages.MAX_BUCKET_BYTES, *sizes))
        if self._receive_memory is None or len(self._receive_memory) < needed_bytes:
            self._receive_memory = torch.empty(needed_bytes, dtype=torch.uint8, device=device)
        self._post_receives()

    def _reduce_to(self, holder: int, message: ParamMessage) -> None:
        data = join_gradients(message)
        work = dist.reduce(data, group=self.group, group_dst=holder, async_op=True)
        if holder == self.rank:
            self._backend_reductions.append((work, data, message))
        else:
            self._sends.append((work, data))

    def _send_to(self, holder: int, message: ParamMessage) -> None:
        data = pack_gradients(message)
        work = dist.isend(data, group=self.group, group_dst=holder, tag=MESSAGE_TAG)
        self._sends.append((work, data))

    def _post_receives(self) -> None:
        """Post receives for as many queued messages as fit into the receive memory.

        Other messages stay queued until all posted ones have arrived.
        """
        assert self._receive_memory is not None
        if not self._posted_receives:
            self._num_used_bytes = 0
        while self._queued_receives:
            source, message = self._queued_receives[0]
            start = self._num_used_bytes
            end = start + message.numel * message.dtype.itemsize
            if end > len(self._receive_memory):
                return
            buffer = self._receive_memory[start:end].view(message.dtype)
            # rounded up to 16 bytes, because a view of any dtype needs an aligned start
            self._num_used_bytes += aligned_bytes(message)
            work = dist.irecv(buffer, group=self.group, group_src=source, tag=MESSAGE_TAG)
            self._posted_receives.append((work, buffer, message))
            self._queued_receives.popleft()

    def _wait_for_all(self) -> None:
        """Wait for all launched messages, and accumulate the received gradients."""
        while self._posted_receives or self._queued_receives:
            if not self._posted_receives:
                self._post_receives()
            work, buffer, message = self._posted_receives.popleft()
            work.wait()
            add_gradients(buffer, message)
        while self._backend_reductions:
            work, data, message = self._backend_reductions.popleft()
            work.wait()
            set_reduced_gradients(data.mul_(1 / self.num_ranks), message)
        while self._sends:
            self._sends.popleft()[0].wait()

    # Step

    def _shard_optimizer_step(self, optimizer: Optimizer) -> None:
        """Replace `step`: each rank steps the parameters it owns and sends them to other ranks.

        Methods `train` and `eval` (of a schedule-free optimizer) are replaced as well.

        Raises:
            UsageError: its step needs a closure.
        """
        # needs_closure: true for LBFGS, which evaluates the loss several times
        if needs_closure(optimizer):
            raise UsageError(
                f"{type(optimizer).__name__} computes the gradient of all parameters several "
                "times a step, which ranks with different parameters cannot do",
                ["optimizers whose step needs no closure, such as AdamW"],
                'use Trainer(strategy="ddp")',
                flag="--trainer.strategy=ddp",
            )
        original_step = optimizer.step

        def step(stepped: Optimizer, closure: Callable[[], Any] | None = None) -> Any:
            """Step the parameters that this rank owns, and all-gather all parameters."""
            loss = None
            if closure is not None:
                with torch.enable_grad():
                    loss = closure()
            self._rebuild_buckets()  # assigns owners to new parameters
            parameters = [p for group in stepped.param_groups for p in group["params"]]
            # every rank steps a parameter without an owner, such as one of an expert
            unowned_params = [p for p in parameters if self.owner_of.get(p, self.rank) != self.rank]
            gradients = [p.grad for p in unowned_params]
            for p in unowned_params:  # so that the original step skips them
                p.grad = None
            original_step()
            for p, gradient in zip(unowned_params, gradients, strict=True):
                p.grad = gradient
            self.all_gather_params(
                [p for p in parameters if p.requires_grad and p in self.owner_of]
            )
            return loss

        # without this attribute torch's LR schedulers warn about a replaced step
        if hasattr(original_step, "_wrapped_by_lr_sched"):
            step.__dict__["_wrapped_by_lr_sched"] = True
        self._replaced_methods.append((optimizer, "step", original_step))
        optimizer.step = MethodType(step, optimizer)  # type: ignore[method-assign]
        for mode in ("train", "eval"):
            if callable(getattr(optimizer, mode, None)):
                self._shard_mode_switch(optimizer, mode)

    def _shard_mode_switch(self, optimizer: Any, mode: str) -> None:
        """Replace `train` or `eval` of a schedule-free optimizer: owners send the new weights.

        Such an optimizer has two sets of weights, and these methods switch between them.

        Args:
            optimizer: the optimizer.
            mode: name of the method, "train" or "eval".
        """
        original_method = getattr(optimizer, mode)

        def switch_and_send(*args: Any, **kwargs: Any) -> Any:
            result = original_method(*args, **kwargs)
            # false if no member of a composite optimizer has two sets of weights
            if getattr(optimizer, "schedule_free", True):
                parameters = [p for group in optimizer.param_groups for p in group["params"]]
                self.all_gather_params(
                    [p for p in parameters if p.requires_grad and p in self.owner_of]
                )
            return result

        self._replaced_methods.append((optimizer, mode, original_method))
        setattr(optimizer, mode, switch_and_send)

    @torch.no_grad()
    def all_gather_params(self, parameters: list[Tensor]) -> None:
        """All-gather parameters: owners send their values to every rank, bucket by bucket."""
        in_flight: deque[list[tuple[Any, Tensor, ParamMessage | None]]] = deque()
        send = self._exchange_params if self.is_point_to_point else self._broadcast_params
        for plan in self._build_param_plan(parameters):
            in_flight.append(send(plan))
            if len(in_flight) > 1:
                unpack_params(in_flight.popleft())
        while in_flight:
            unpack_params(in_flight.popleft())

    def _build_param_plan(self, parameters: list[Tensor]) -> list[dict[int, list[ParamMessage]]]:
        """Return the messages of each owner, for each bucket of parameters.

        The result is kept for later steps with the same parameters.
        """
        key = tuple(map(id, parameters))
        if key not in self._param_plans:
            if len(self._param_plans) > len(self.optimizers):  # parameters were frozen or added
                self._param_plans.clear()
            self._param_plans[key] = []
            # iter_buckets: lists of parameters of about MAX_BUCKET_BYTES bytes
            for bucket in iter_buckets(parameters):
                params_by_owner: dict[int, list[Tensor]] = {}
                for parameter in bucket:
                    params_by_owner.setdefault(self.owner_of[parameter], []).append(parameter)
                plan = {
                    # iter_messages: small parameters joined in one message, large ones in slices
                    owner: list(iter_messages(owned, join_all=not self.is_point_to_point))
                    for owner, owned in params_by_owner.items()
                }
                self._param_plans[key].append(plan)
        return self._param_plans[key]

    def _exchange_params(
        self, plan: dict[int, list[ParamMessage]]
    ) -> list[tuple[Any, Tensor, ParamMessage | None]]:
        works: list[tuple[Any, Tensor, ParamMessage | None]] = []
        for message in plan.get(self.rank, []):
            data = pack_params(message)
            for target in _partner_order(self.rank, self.num_ranks):
                kwargs = {"group": self.group, "group_dst": target, "tag": MESSAGE_TAG}
                works.append((dist.isend(data, **kwargs), data, None))
        for source in _partner_order(self.rank, self.num_ranks):
            for message in plan.get(source, []):
                data = receive_buffer(message)
                kwargs = {"group": self.group, "group_src": source, "tag": MESSAGE_TAG}
                works.append((dist.irecv(data, **kwargs), data, message))
        return works

    def _broadcast_params(
        self, plan: dict[int, list[ParamMessage]]
    ) -> list[tuple[Any, Tensor, ParamMessage | None]]:
        works: list[tuple[Any, Tensor, ParamMessage | None]] = []
        for source, source_messages in sorted(plan.items()):
            for message in source_messages:
                is_source = source == self.rank
                data = pack_params(message) if is_source else receive_buffer(message)
                kwargs = {"group": self.group, "group_src": source, "async_op": True}
                works.append((dist.broadcast(data, **kwargs), data, None if is_source else message))
        return works


def has_gradient(trainer: Any, parameter: Tensor) -> bool:
    """Whether the last backward pass on this rank computed a gradient of a parameter.

    With ZeRO-1 `p.grad` may be None, because the gradient was sent to the parameter's owner.
    """
    with_gradient = getattr(trainer.strategy, "params_with_gradient", ())
    return parameter.grad is not None or parameter in with_gradient


def _partner_order(rank: int, num_ranks: int) -> list[int]:
    """Return the other ranks, ordered so that ranks exchange in pairs at each index."""
    is_power_of_two = num_ranks & (num_ranks - 1) == 0
    partners = [rank ^ i if is_power_of_two else (i - rank) % num_ranks for i in range(num_ranks)]
    return [partner for partner in partners if partner != rank]
