"""Pipeline parallelism: each rank has some of the blocks, and micro-batches follow each other.

    rank 0   enter, blocks 0 1    F0 F1 F2 F3 -- B0 -- B1 -- B2 -- B3       F forward, B backward
    rank 1   blocks 2 3, leave    -- F0 B0 F1 B1 F2 B2 F3 B3                (1f1b, two stages)

With P stages and m micro-batches a share (P-1)/m of the time is idle; `interleaved` gives each rank
two shorter stages, and half of that. The schedules are torch's. A net takes part by four things:
`blocks_by_stage` (a ModuleDict), `enter(inputs)` before them, `through(x, names)`, `leave(x)`
after them, and `end_placeholders()`, the names of the modules that the first and the last stage
need.

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

from .expert_parallel import find_experts
from .pipeline_stages import (
    CapturedInput,
    PipelineStageModule,
    PrecomputedGradLoss,
    drop_other_stages,
    find_pipeline_net,
    full_net,
    meta_copy,
    partition_blocks,
)

PipelineSchedule = Literal["gpipe", "1f1b", "interleaved"]
SCHEDULE_CLASSES: dict[str, tuple[Any, int]] = {  # and stages a rank
    "gpipe": (schedules.ScheduleGPipe, 1),
    "1f1b": (schedules.Schedule1F1B, 1),
    "interleaved": (schedules.ScheduleInterleaved1F1B, 2),
}


class Pipeline:
    """The stages of this rank, and how the others are reached."""

    def __init__(
        self,
        module: Any,
        mesh: DeviceMesh,
        pipeline_schedule: PipelineSchedule,
        num_microbatches: int,
    ) -> None:
        """Keep the blocks of this rank; the others are let go."""
        self.module, self.net = module, find_pipeline_net(module, mesh.size())
        self.group, self.rank, self.num_ranks = mesh.get_group(), mesh.get_local_rank(), mesh.size()
        if find_experts(module):
            raise UsageError(
                f"pp={mesh.size()}: the balance of experts is part of the loss, and only the last"
                " stage has a loss; type --trainer.strategy ep"
            )
        schedule_class, stages_per_rank = SCHEDULE_CLASSES[pipeline_schedule]
        self.schedule_class, self.num_microbatches, self.num_stages = (
            schedule_class,
            num_microbatches,
            stages_per_rank * self.num_ranks,
        )
        self.param_names = [name for name, _ in module.named_parameters()]  # of the whole net
        self.block_names = list(self.net.blocks)
        self.blocks_by_stage = partition_blocks(
            self.block_names, self.num_stages, type(module).__name__, self.num_ranks
        )
        self.local_stages = range(self.rank, self.num_stages, self.num_ranks)
        self.is_first, self.is_last = self.rank == 0, self.rank == self.num_ranks - 1
        self.block_placeholders: dict[
            str, nn.Module
        ] = {}  # stand-ins for blocks, and for what is at the ends
        self.end_placeholders: dict[str, nn.Module] = {}
        self.tied_params = drop_other_stages(self)
        self.meta_net = meta_copy(self.net)  # to ask for shapes, before anything is spread
        self.net.forward = lambda *args, **how: self.forward_fn(*args, **how)
        self.forward_fn: Callable[..., Any] = self.forward_sequential
        # of the batch: gradients meet other ranks' in the schedule
        self.weight: Tensor | float = 1.0
        self.losses: list[Tensor] = []
        self.schedules_by_shape: dict[Any, Any] = {}  # schedules by the shape of their input
        self.stage_dtypes: dict[int, torch.dtype] = {}  # of what each stage makes
        self.logged_by_microbatch: dict[int, dict[str, Any]] = {}
        self.log_spec: list[Any] | None = None  # names and options of what training_step logs

    def full_net(self) -> AbstractContextManager[None]:
        """The whole net for a moment, to look at: optimizers are chosen by what it is."""
        return full_net(self)

    def run_stage(self, stage: int, x: Any, *args: Any, net: Any = None) -> Tensor:
        """What one stage of this rank makes of what it is given."""
        net = net or self.net
        if stage == 0:
            x = net.enter(x, *args)
        return net.through(x, self.blocks_by_stage[stage], *args)

    def forward_sequential(self, inputs: Any, cache: Any = None, *args: Any, **kwargs: Any) -> Any:
        """The net's answer, on all ranks: each stage by itself, one after the other."""
        x = inputs
        for stage in range(self.num_stages):
            x = self.run_stage(stage, x, cache) if stage in self.local_stages else None
            x = self._broadcast(x, stage % self.num_ranks)
        return self._broadcast(
            self.net.leave(x, cache, *args, **kwargs) if self.is_last else None, self.num_ranks - 1
        )

    def _broadcast(self, tensor: Tensor | None, source: int) -> Tensor:
        spec: list[Any] = [None if tensor is None else (tensor.shape, tensor.dtype)]
        source_rank = dist.get_global_rank(self.group, source)
        dist.broadcast_object_list(spec, source_rank, self.group)
        device = next(self.net.parameters()).device
        if tensor is None:
            tensor = torch.empty(spec[0][0], dtype=spec[0][1], device=device)
        tensor = tensor.detach().contiguous()
        dist.broadcast(tensor, source_rank, self.group)
        return tensor

    @contextmanager
    def _override_forward(self, forward_fn: Callable[..., Any]) -> Iterator[None]:
        previous, self.forward_fn = self.forward_fn, forward_fn
        try:
            yield
        finally:
            self.forward_fn = previous

    def step(self, batch: Any, args: tuple[Any, ...], context: Callable[[], Any]) -> Tensor:
        """Forward and backward of all micro-batches; the loss, whose backward hands out gradients.

        `step_context` is what a step runs in (autocast).
        """
        microbatches = self._split_batch(batch)
        inputs = [self._capture_net_input(micro, args) for micro in microbatches]
        schedule = self._get_schedule(inputs[0], context)
        self.current_microbatches, self.step_args, self.microbatch_weights = (
            microbatches,
            args,
            self._compute_microbatch_weights(microbatches),
        )
        parameters = [p for p in self.module.parameters() if p.requires_grad]
        old_grads = [p.grad for p in parameters]
        for p in parameters:
            p.grad = None
        kwargs: dict[str, Any] = {}
        if "return_outputs" in inspect.signature(schedule.step).parameters:
            kwargs["return_outputs"] = False
        self.losses = []
        if self.is_last:
            kwargs["target"] = torch.arange(len(microbatches))
        schedule.step(*([torch.cat(inputs)] if self.is_first else []), **kwargs)
        new_grads = [p.grad for p in parameters]
        for p, gradient in zip(parameters, old_grads, strict=True):
            p.grad = gradient
        total = torch.stack(self.losses).sum() if self.is_last else None
        return PrecomputedGradLoss.apply(
            self._broadcast_results(total).requires_grad_(), parameters, new_grads
        )

    def _split_batch(self, batch: Any) -> list[Any]:
        sizes = {len(leaf) for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)}
        size, n = min(sizes), self.num_microbatches
        if size % n:
            largest_divisor = max(d for d in range(1, min(size, n) + 1) if size % d == 0)
            raise UsageError(
                f"microbatches={n} does not divide the {size} samples of a rank's batch; type"
                f" --trainer.strategy.microbatches={largest_divisor}, or --data.batch_size={n}"
            )
        microbatches = [
            tree_map_only(Tensor, lambda leaf, i=i: leaf.chunk(n)[i], batch) for i in range(n)
        ]
        return microbatches

    def _capture_net_input(self, microbatch: Any, args: tuple[Any, ...]) -> Tensor:
        """What training_step gives the net: it is run up to there."""

        def raise_with_input(net: nn.Module, inputs: tuple[Any, ...]) -> None:
            raise CapturedInput(inputs[0])

        hook = self.net.register_forward_pre_hook(
            raise_with_input, prepend=True
        )  # before anything is gathered
        try:
            with self._record_logs(-1):
                self.module.training_step(microbatch, *args)
        except CapturedInput as captured:
            return captured.inputs
        finally:
            hook.remove()
        raise UsageError(f"pp: {type(self.module).__name__}.training_step does not call its net")

    def _microbatch_loss(self, x: Tensor, number: Tensor) -> Tensor:
        """The loss of a micro-batch, as training_step computes it from what the stages made."""
        i = int(number)
        leave = self.net.leave
        with (
            self.step_context(),
            self._override_forward(lambda inputs, *args, **how: leave(x, *args, **how)),
            self._record_logs(i),
        ):
            output = self.module.training_step(self.current_microbatches[i], *self.step_args)
        loss = (output["loss"] if isinstance(output, dict) else output) * self.microbatch_weights[i]
        self.losses.append(loss.detach())
        return loss * self.weight

    def _compute_microbatch_weights(self, microbatches: list[Any]) -> Tensor:
        """How much of the batch's mean each micro-batch is, where they may have unequal terms."""
        terms = getattr(self.module, "terms", None)
        counts = [
            torch.as_tensor(terms(microbatch) if callable(terms) else 1.0)
            for microbatch in microbatches
        ]
        totals = torch.stack(counts)
        return totals / totals.sum().clamp(min=1)

    @contextmanager
    def _record_logs(self, number: int) -> Iterator[None]:
        attributes, records = self.module.__dict__, {}
        previous_log = attributes.get("log")

        def log(name: str, value: Any, *args: Any, **kwargs: Any) -> None:
            records[name] = (value, args, kwargs)

        attributes["log"] = log
        try:
            yield
        finally:
            attributes.pop("log")
            if previous_log is not None:
                attributes["log"] = previous_log
        self.logged_by_microbatch[number] = records

    def _broadcast_results(self, total: Tensor | None) -> Tensor:
        """Tell all ranks the loss and what was logged, the mean over the batch."""
        source_rank = dist.get_global_rank(self.group, self.num_ranks - 1)
        logged = (
            [self.logged_by_microbatch[i] for i in range(self.num_microbatches)]
            if self.is_last
            else []
        )
        local_spec = (
            [(name, args, kwargs) for name, (_, args, kwargs) in logged[0].items()]
            if logged
            else []
        )
        if self.log_spec is None:
            message = [local_spec]
            dist.broadcast_object_list(message, source_rank, self.group)
            self.log_spec = message[0]
        device = next(self.module.parameters()).device
        values = torch.zeros(1 + len(self.log_spec), device=device)
        if total is not None:
            if local_spec != self.log_spec:
                raise UsageError(
                    f"pp: {type(self.module).__name__}.training_step logs other names than in its"
                    " first step; log the same in each"
                )
            values[0] = total
            for i, (name, _, _) in enumerate(self.log_spec, 1):
                microbatch_values = [
                    torch.as_tensor(records[name][0]).detach().float() for records in logged
                ]
                values[i] = (torch.stack(microbatch_values) * self.microbatch_weights).sum()
        dist.broadcast(values, source_rank, self.group)
        for (name, args, kwargs), value in zip(self.log_spec, values[1:], strict=True):
            self.module.log(name, value.clone(), *args, **kwargs)
        return values[0].clone()

    def _get_schedule(self, inputs: Tensor, context: Callable[[], Any]) -> Any:
        self.step_context = context
        key = (inputs.shape, inputs.dtype)
        if key not in self.schedules_by_shape:
            device = next(self.net.parameters()).device
            stages = []
            activation: Tensor = inputs
            for stage in range(self.num_stages):  # once in turn, to see the shapes
                stage_input = activation
                stage_output = (
                    self._probe_output(stage, activation) if stage in self.local_stages else None
                )
                activation = self._broadcast(stage_output, stage % self.num_ranks)
                if stage in self.local_stages:
                    shapes = (_empty_like(stage_input), _empty_like(activation))
                    stage_module = PipelineStageModule(self, stage)
                    stages.append(
                        PipelineStage(
                            stage_module, stage, self.num_stages, device, *shapes, group=self.group
                        )
                    )
            is_multi_stage = issubclass(self.schedule_class, schedules.PipelineScheduleMulti)
            self.schedules_by_shape[key] = self.schedule_class(
                stages if is_multi_stage else stages[0],
                self.num_microbatches,
                loss_fn=self._microbatch_loss,
                scale_grads=False,
            )
        return self.schedules_by_shape[key]

    @torch.no_grad()
    def _probe_output(self, stage: int, x: Tensor) -> Tensor:
        """What a stage makes, the first time; afterwards, a tensor of its shape and type.

        Data ranks see new shapes at different times, and only together could they gather.
        """
        if stage not in self.stage_dtypes:
            with self.step_context(), self._override_forward(self._stage_fn(stage)):
                output = self.net(x)
            self.stage_dtypes[stage] = output.dtype
            return output
        output = self.run_stage(stage, x.to("meta"), net=self.meta_net)
        return torch.empty(output.shape, dtype=self.stage_dtypes[stage], device=x.device)

    def _stage_fn(self, stage: int) -> Callable[[Tensor], Tensor]:
        return lambda x: self.run_stage(stage, x)

    def duplicated_params(self) -> list[Tensor]:
        """Parameters of this rank that another one counts: a norm has each once."""
        names = {name for name, *_ in self.tied_params} if not self.is_first else set()
        return [p for name, p in self.module.named_parameters() if name in names]

    def reduce_tied_gradients(self) -> None:
        """Add up the gradients of what the first and the last stage both have."""
        for name, shape, dtype in self.tied_params:
            parameter = dict(self.module.named_parameters()).get(name)
            device = next(self.module.parameters()).device
            gradient = None if parameter is None else parameter.grad
            if gradient is None:
                gradient = torch.zeros(shape, dtype=dtype, device=device)
            local_grad = gradient.to_local() if isinstance(gradient, DTensor) else gradient
            dist.all_reduce(local_grad, group=self.group)


def _empty_like(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, requires_grad=tensor.is_floating_point())
