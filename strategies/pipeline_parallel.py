"""Pipeline parallelism: each rank has some of the blocks, and micro-batches follow each other.

    rank 0   enter, blocks 0 1    F0 F1 F2 F3 -- B0 -- B1 -- B2 -- B3       F forward, B backward
    rank 1   blocks 2 3, leave    -- F0 B0 F1 B1 F2 B2 F3 B3                (1f1b, two stages)

With P stages and m micro-batches a share (P-1)/m of the time is idle; `interleaved` gives each rank
two shorter stages, and half of that. The schedules are torch's. A net takes part by four things:
`blocks` (a ModuleDict), `enter(inputs)` before them, `through(x, names)`, `leave(x)` after them,
and `ends()`, the names of the modules that the first and the last stage need.

A `training_step` stays as it is: it is run for each micro-batch where the last stage is, with what
the stages have made in the place of the net's own answer; what it logs is told to all ranks. Else
(validation, samples) a call of the net runs the stages in turn.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.pipelining import PipelineStage, schedules
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves, tree_map_only

from ravine.errors import UsageError

from .expert_parallel import mixtures
from .pipeline_stages import Asked, HandOut, Stage, ghost, let_go, net_of, shares, whole

Schedule = Literal["gpipe", "1f1b", "interleaved"]
SCHEDULES: dict[str, tuple[Any, int]] = {  # and stages a rank
    "gpipe": (schedules.ScheduleGPipe, 1),
    "1f1b": (schedules.Schedule1F1B, 1),
    "interleaved": (schedules.ScheduleInterleaved1F1B, 2),
}


class Pipeline:
    """The stages of this rank, and how the others are reached."""

    def __init__(
        self, module: Any, mesh: DeviceMesh, schedule: Schedule, microbatches: int
    ) -> None:
        """Keep the blocks of this rank; the others are let go."""
        self.module, self.net = module, net_of(module, mesh.size())
        self.group, self.rank, self.ranks = mesh.get_group(), mesh.get_local_rank(), mesh.size()
        if mixtures(module):
            raise UsageError(
                f"pp={mesh.size()}: the balance of experts is part of the loss, and only the last"
                " stage has a loss; type --trainer.strategy ep"
            )
        kind, each = SCHEDULES[schedule]
        self.kind, self.microbatches, self.count = kind, microbatches, each * self.ranks
        self.names = [name for name, _ in module.named_parameters()]  # of the whole net
        self.order = list(self.net.blocks)
        self.blocks = shares(self.order, self.count, type(module).__name__, self.ranks)
        self.mine = range(self.rank, self.count, self.ranks)
        self.first, self.last = self.rank == 0, self.rank == self.ranks - 1
        self.absent: dict[str, nn.Module] = {}  # stand-ins for blocks, and for what is at the ends
        self.ends: dict[str, nn.Module] = {}
        self.tied = let_go(self)
        self.ghost = ghost(self.net)  # to ask for shapes, before anything is spread
        self.net.forward = lambda *args, **how: self.answer(*args, **how)
        self.answer: Callable[..., Any] = self.in_turn
        # of the batch: gradients meet other ranks' in the schedule
        self.weight: Tensor | float = 1.0
        self.losses: list[Tensor] = []
        self.made: dict[Any, Any] = {}  # schedules by the shape of their input
        self.types: dict[int, torch.dtype] = {}  # of what each stage makes
        self.logged: dict[int, dict[str, Any]] = {}
        self.known: list[Any] | None = None  # names and options of what training_step logs

    def whole(self) -> AbstractContextManager[None]:
        """The whole net for a moment, to look at: optimizers are chosen by what it is."""
        return whole(self)

    def part(self, stage: int, x: Any, *others: Any, net: Any = None) -> Tensor:
        """What one stage of this rank makes of what it is given."""
        net = net or self.net
        if stage == 0:
            x = net.enter(x, *others)
        return net.through(x, self.blocks[stage], *others)

    def in_turn(self, inputs: Any, cache: Any = None, *args: Any, **how: Any) -> Any:
        """The net's answer, on all ranks: each stage by itself, one after the other."""
        x = inputs
        for stage in range(self.count):
            x = self.part(stage, x, cache) if stage in self.mine else None
            x = self._tell(x, stage % self.ranks)
        return self._tell(
            self.net.leave(x, cache, *args, **how) if self.last else None, self.ranks - 1
        )

    def _tell(self, tensor: Tensor | None, source: int) -> Tensor:
        kind: list[Any] = [None if tensor is None else (tensor.shape, tensor.dtype)]
        start = dist.get_global_rank(self.group, source)
        dist.broadcast_object_list(kind, start, self.group)
        device = next(self.net.parameters()).device
        if tensor is None:
            tensor = torch.empty(kind[0][0], dtype=kind[0][1], device=device)
        tensor = tensor.detach().contiguous()
        dist.broadcast(tensor, start, self.group)
        return tensor

    @contextmanager
    def _answering(self, answer: Callable[..., Any]) -> Iterator[None]:
        before, self.answer = self.answer, answer
        try:
            yield
        finally:
            self.answer = before

    def step(self, batch: Any, args: tuple[Any, ...], context: Callable[[], Any]) -> Tensor:
        """Forward and backward of all micro-batches; the loss, whose backward hands out gradients.

        `context` is what a step runs in (autocast).
        """
        micros = self._cut(batch)
        inputs = [self._asked(micro, args) for micro in micros]
        schedule = self._schedule(inputs[0], context)
        self.micros, self.args, self.shares = micros, args, self._shares(micros)
        parameters = [p for p in self.module.parameters() if p.requires_grad]
        before = [p.grad for p in parameters]
        for p in parameters:
            p.grad = None
        how: dict[str, Any] = {}
        if "return_outputs" in inspect.signature(schedule.step).parameters:
            how["return_outputs"] = False
        self.losses = []
        if self.last:
            how["target"] = torch.arange(len(micros))
        schedule.step(*([torch.cat(inputs)] if self.first else []), **how)
        made = [p.grad for p in parameters]
        for p, gradient in zip(parameters, before, strict=True):
            p.grad = gradient
        total = torch.stack(self.losses).sum() if self.last else None
        return HandOut.apply(self._report(total).requires_grad_(), parameters, made)

    def _cut(self, batch: Any) -> list[Any]:
        sizes = {len(leaf) for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)}
        size, n = min(sizes), self.microbatches
        if size % n:
            fitting = max(d for d in range(1, min(size, n) + 1) if size % d == 0)
            raise UsageError(
                f"microbatches={n} does not divide the {size} samples of a rank's batch; type"
                f" --trainer.strategy.microbatches={fitting}, or --data.batch_size={n}"
            )
        pieces = [
            tree_map_only(Tensor, lambda leaf, i=i: leaf.chunk(n)[i], batch) for i in range(n)
        ]
        return pieces

    def _asked(self, micro: Any, args: tuple[Any, ...]) -> Tensor:
        """What training_step gives the net: it is run up to there."""

        def stop(net: nn.Module, inputs: tuple[Any, ...]) -> None:
            raise Asked(inputs[0])

        hook = self.net.register_forward_pre_hook(stop, prepend=True)  # before anything is gathered
        try:
            with self._recording(-1):
                self.module.training_step(micro, *args)
        except Asked as asked:
            return asked.inputs
        finally:
            hook.remove()
        raise UsageError(f"pp: {type(self.module).__name__}.training_step does not call its net")

    def _loss(self, x: Tensor, number: Tensor) -> Tensor:
        """The loss of a micro-batch, as training_step computes it from what the stages made."""
        i = int(number)
        leave = self.net.leave
        with (
            self.context(),
            self._answering(lambda inputs, *args, **how: leave(x, *args, **how)),
            self._recording(i),
        ):
            found = self.module.training_step(self.micros[i], *self.args)
        loss = (found["loss"] if isinstance(found, dict) else found) * self.shares[i]
        self.losses.append(loss.detach())
        return loss * self.weight

    def _shares(self, micros: list[Any]) -> Tensor:
        """How much of the batch's mean each micro-batch is, where they may have unequal terms."""
        terms = getattr(self.module, "terms", None)
        counts = [torch.as_tensor(terms(m) if callable(terms) else 1.0) for m in micros]
        found = torch.stack(counts)
        return found / found.sum().clamp(min=1)

    @contextmanager
    def _recording(self, number: int) -> Iterator[None]:
        names, found = self.module.__dict__, {}
        before = names.get("log")

        def log(name: str, value: Any, *args: Any, **how: Any) -> None:
            found[name] = (value, args, how)

        names["log"] = log
        try:
            yield
        finally:
            names.pop("log")
            if before is not None:
                names["log"] = before
        self.logged[number] = found

    def _report(self, total: Tensor | None) -> Tensor:
        """Tell all ranks the loss and what was logged, the mean over the batch."""
        start = dist.get_global_rank(self.group, self.ranks - 1)
        each = [self.logged[i] for i in range(self.microbatches)] if self.last else []
        ours = [(name, args, how) for name, (_, args, how) in each[0].items()] if each else []
        if self.known is None:
            told = [ours]
            dist.broadcast_object_list(told, start, self.group)
            self.known = told[0]
        device = next(self.module.parameters()).device
        values = torch.zeros(1 + len(self.known), device=device)
        if total is not None:
            if ours != self.known:
                raise UsageError(
                    f"pp: {type(self.module).__name__}.training_step logs other names than in its"
                    " first step; log the same in each"
                )
            values[0] = total
            for i, (name, _, _) in enumerate(self.known, 1):
                parts = [torch.as_tensor(found[name][0]).detach().float() for found in each]
                values[i] = (torch.stack(parts) * self.shares).sum()
        dist.broadcast(values, start, self.group)
        for (name, args, how), value in zip(self.known, values[1:], strict=True):
            self.module.log(name, value.clone(), *args, **how)
        return values[0].clone()

    def _schedule(self, inputs: Tensor, context: Callable[[], Any]) -> Any:
        self.context = context
        key = (inputs.shape, inputs.dtype)
        if key not in self.made:
            device = next(self.net.parameters()).device
            stages = []
            x: Tensor = inputs
            for stage in range(self.count):  # once in turn, to see the shapes
                given = x
                made = self._seen(stage, x) if stage in self.mine else None
                x = self._tell(made, stage % self.ranks)
                if stage in self.mine:
                    shapes = (_like(given), _like(x))
                    part = Stage(self, stage)
                    stages.append(
                        PipelineStage(part, stage, self.count, device, *shapes, group=self.group)
                    )
            several = issubclass(self.kind, schedules.PipelineScheduleMulti)
            self.made[key] = self.kind(
                stages if several else stages[0],
                self.microbatches,
                loss_fn=self._loss,
                scale_grads=False,
            )
        return self.made[key]

    @torch.no_grad()
    def _seen(self, stage: int, x: Tensor) -> Tensor:
        """What a stage makes, the first time; afterwards, a tensor of its shape and type.

        Data ranks see new shapes at different times, and only together could they gather.
        """
        if stage not in self.types:
            with self.context(), self._answering(self._of(stage)):
                made = self.net(x)
            self.types[stage] = made.dtype
            return made
        made = self.part(stage, x.to("meta"), net=self.ghost)
        return torch.empty(made.shape, dtype=self.types[stage], device=x.device)

    def _of(self, stage: int) -> Callable[[Tensor], Tensor]:
        return lambda x: self.part(stage, x)

    def repeated(self) -> list[Tensor]:
        """Parameters of this rank that another one counts: a norm has each once."""
        names = {name for name, *_ in self.tied} if not self.first else set()
        return [p for name, p in self.module.named_parameters() if name in names]

    def settle(self) -> None:
        """Add up the gradients of what the first and the last stage both have."""
        for name, shape, dtype in self.tied:
            parameter = dict(self.module.named_parameters()).get(name)
            device = next(self.module.parameters()).device
            gradient = None if parameter is None else parameter.grad
            if gradient is None:
                gradient = torch.zeros(shape, dtype=dtype, device=device)
            part = gradient.to_local() if isinstance(gradient, DTensor) else gradient
            dist.all_reduce(part, group=self.group)


def _like(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, requires_grad=tensor.is_floating_point())
