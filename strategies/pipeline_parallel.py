"""Pipeline parallelism: each rank holds a stage of the net, and micro-batches pass through them.

    rank 0   embed, blocks 0 1    F0 F1 F2 F3 -- B0 -- B1 -- B2 -- B3       F forward, B backward
    rank 1   blocks 2 3, head     -- F0 B0 F1 B1 F2 B2 F3 B3                (1f1b, two stages)

With P stages and m micro-batches the idle time (bubble) is (P-1)/m of the computing time. The
schedule `interleaved` gives each rank two shorter stages, which halves the bubble. The schedules
are those of torch.distributed.pipelining. A net supports pipeline parallelism by:

    blocks                a ModuleDict
    embed_tokens(inputs)  the layers before the blocks
    run_blocks(x, names)  the blocks of these names
    compute_logits(x)     the layers after the blocks
    stage_modules()       the names of the modules that `embed_tokens` and `compute_logits` need

The `training_step` of the module needs no change. The last rank runs it for each micro-batch, with
the output of the stages in place of the net's forward. The values that it logs are broadcast to all
ranks. Outside of training (validation, sampling) a call of the net runs the stages sequentially.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.pipelining import PipelineStage, schedules
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
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
    split_param_groups,
)

PipelineSchedule = Literal["gpipe", "1f1b", "interleaved"]
SCHEDULE_CLASSES: dict[str, tuple[Any, int]] = {  # torch's class, and the stages per rank
    "gpipe": (schedules.ScheduleGPipe, 1),
    "1f1b": (schedules.Schedule1F1B, 1),
    "interleaved": (schedules.ScheduleInterleaved1F1B, 2),
}


class Pipeline:
    """The pipeline stages of this rank, and their communication with other ranks."""

    def __init__(
        self,
        module: Any,
        mesh: DeviceMesh,
        pipeline_schedule: PipelineSchedule,
        num_microbatches: int,
    ) -> None:
        """Keep the stages of this rank, and replace the other modules by placeholders.

        Args:
            module: the LightningModule that contains the net.
            mesh: the ranks of the pipeline (axis pp).
            pipeline_schedule: a key of SCHEDULE_CLASSES.
            num_microbatches: number of micro-batches of a batch.

        Raises:
            UsageError: the net cannot be split into these stages.
        """
        self.module = module
        # the submodule with `blocks` (by name), `stage_modules` and methods for the parts
        self.net = find_pipeline_net(module, mesh.size())
        self.group = mesh.get_group()
        self.rank, self.num_ranks = mesh.get_local_rank(), mesh.size()
        if find_experts(module):
            raise UsageError(
                f"pp={mesh.size()}: the load balancing loss of experts needs all layers, and only "
                "the last stage computes a loss",
                ["networks without experts"],
                'use Trainer(strategy="ep")',
                flag="--trainer.strategy=ep",
            )
        self.schedule_class, stages_per_rank = SCHEDULE_CLASSES[pipeline_schedule]
        self.num_stages = stages_per_rank * self.num_ranks
        self.num_microbatches = num_microbatches
        self.param_names = [name for name, _ in module.named_parameters()]  # of the full net
        # of each optimizer that was built for the full net: the parameters of its groups, as
        # indices of param_names
        self.group_indices: WeakKeyDictionary[Optimizer, list[list[int]]] = WeakKeyDictionary()
        self.shows_full_net = False
        self.block_names = list(self.net.blocks)
        self.blocks_by_stage = partition_blocks(
            self.block_names, self.num_stages, type(module).__name__, self.num_ranks
        )
        # rank r of P ranks has the stages r, r + P, ...
        self.local_stages = range(self.rank, self.num_stages, self.num_ranks)
        self.is_first, self.is_last = self.rank == 0, self.rank == self.num_ranks - 1
        # placeholders for blocks, embedding and head of other ranks
        self.block_placeholders: dict[str, nn.Module] = {}
        self.end_placeholders: dict[str, nn.Module] = {}
        # name, shape and dtype of parameters that the first and the last stage share
        self.tied_params = drop_other_stages(self)
        self.meta_net = meta_copy(self.net)  # to infer shapes; copied before sharding
        # a call of the net runs forward_fn, which a training step replaces for a while
        self.forward_fn: Callable[..., Any] = self.forward_sequential
        self.net.forward = lambda *args, **kwargs: self.forward_fn(*args, **kwargs)
        # weight of this batch's loss: the schedule reduces its gradients with other ranks
        self.loss_weight: Tensor | float = 1.0
        self.losses: list[Tensor] = []  # of the micro-batches of this step, on the last rank
        self.schedules_by_shape: dict[Any, Any] = {}  # by shape and dtype of the input
        self.stage_dtypes: dict[int, torch.dtype] = {}  # of the output of each stage
        self.logged_by_microbatch: dict[int, dict[str, Any]] = {}
        self.log_spec: list[Any] | None = None  # names and options of the logged values

    def full_net(self) -> AbstractContextManager[None]:
        """Return a context in which the module shows the full net, e.g. to build param groups."""
        return full_net(self)

    def split_optimizers(self, optimizers: list[Optimizer]) -> None:
        """Leave to new optimizers the parameters of this rank, and note all of their groups."""
        for optimizer in optimizers:
            if (group_indices := split_param_groups(self, optimizer)) is not None:
                self.group_indices[optimizer] = group_indices

    def run_stage(self, stage: int, x: Any, *args: Any, net: Any = None) -> Tensor:
        """Return the output of one stage of this rank for its input x."""
        net = net or self.net
        if stage == 0:
            x = net.embed_tokens(x, *args)
        return net.run_blocks(x, self.blocks_by_stage[stage], *args)

    def forward_sequential(self, inputs: Any, cache: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Return the net's output on all ranks, by running the stages sequentially."""
        x = inputs
        for stage in range(self.num_stages):
            x = self.run_stage(stage, x, cache) if stage in self.local_stages else None
            x = self._broadcast(x, stage % self.num_ranks)
        return self._broadcast(
            self.net.compute_logits(x, cache, *args, **kwargs) if self.is_last else None,
            self.num_ranks - 1,
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

    def step(
        self, batch: Any, args: tuple[Any, ...], make_step_context: Callable[[], Any]
    ) -> Tensor:
        """Run forward and backward of all micro-batches, and return the loss of the batch.

        MeshStrategy calls it in place of `training_step`. The gradients are computed here. The
        backward of the returned loss adds them to the gradients of the parameters.

        Args:
            batch: the batch of this rank.
            args: the other arguments of `training_step`, e.g. the index of the batch.
            make_step_context: makes the context in which a step runs (autocast).
        """
        # parts of equal size along the first axis of each tensor
        microbatches = self._split_batch(batch)
        # the tensor that training_step gives to the net; found without running the net
        net_inputs = [self._stop_step_at_net_input(micro, args) for micro in microbatches]
        self.step_context = make_step_context
        # torch's schedule for this input shape; a first call builds the stages
        schedule = self._get_schedule(net_inputs[0])
        self.current_microbatches, self.step_args = microbatches, args
        # (m) of each micro-batch in the mean over the batch
        self.microbatch_weights = self._compute_microbatch_weights(microbatches)
        parameters = [p for p in self.module.parameters() if p.requires_grad]
        grads = self._compute_gradients(schedule, net_inputs, parameters)
        # the losses of the micro-batches, each times its weight
        local_loss = torch.stack(self.losses).sum() if self.is_last else None
        loss = self._broadcast_loss_and_logs(local_loss)
        # its backward adds the gradients, scaled, to the parameters
        return PrecomputedGradLoss.apply(loss.requires_grad_(), parameters, grads)

    def _compute_gradients(
        self, schedule: Any, net_inputs: list[Tensor], parameters: list[Tensor]
    ) -> list[Tensor | None]:
        """Return the gradients that the schedule computes, and leave each `p.grad` unchanged.

        On the last rank the losses of the micro-batches are put into `self.losses`.
        """
        old_grads = [p.grad for p in parameters]
        for p in parameters:
            p.grad = None
        self.losses = []
        kwargs: dict[str, Any] = {"return_outputs": False}
        if self.is_last:
            # torch passes element i to the loss function of micro-batch i (`_microbatch_loss`)
            kwargs["target"] = torch.arange(len(net_inputs))
        if self.is_first:
            # only the first rank gets an input; torch splits it into the micro-batches again
            schedule.step(torch.cat(net_inputs), **kwargs)
        else:
            schedule.step(**kwargs)
        new_grads = [p.grad for p in parameters]
        for p, old_grad in zip(parameters, old_grads, strict=True):
            p.grad = old_grad
        return new_grads

    def _split_batch(self, batch: Any) -> list[Any]:
        """Split the tensors of a batch along their first axis into micro-batches of equal size."""
        sizes = {len(leaf) for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)}
        size, n = min(sizes), self.num_microbatches
        if size % n:
            largest_divisor = max(d for d in range(1, min(size, n) + 1) if size % d == 0)
            raise UsageError(
                f"num_microbatches={n} does not divide the {size} samples of a rank's batch",
                [f"divisors of {size}"],
                f"use MeshStrategy(num_microbatches={largest_divisor}), or a batch size of {n}",
                flag=f"--trainer.strategy.num_microbatches={largest_divisor}, or "
                f"--data.batch_size={n}",
            )
        return [tree_map_only(Tensor, lambda leaf, i=i: leaf.chunk(n)[i], batch) for i in range(n)]

    def _stop_step_at_net_input(self, microbatch: Any, args: tuple[Any, ...]) -> Tensor:
        """Run training_step up to its call of the net, and return the input of that call."""

        def raise_with_input(net: nn.Module, inputs: tuple[Any, ...]) -> None:
            raise CapturedInput(inputs[0])

        # prepended: it raises before the hook of FSDP2 gathers parameters
        hook = self.net.register_forward_pre_hook(raise_with_input, prepend=True)
        try:
            # _record_logs: keeps the values that the step logs, by the number of the micro-batch
            with self._record_logs(-1):  # -1: these logged values are not used
                self.module.training_step(microbatch, *args)
        except CapturedInput as captured:
            return captured.inputs
        finally:
            hook.remove()
        raise UsageError(
            f"pp: {type(self.module).__name__}.training_step does not call its network",
            ["steps that call the network once"],
            "call self.net in training_step",
        )

    def _microbatch_loss(self, x: Tensor, number: Tensor) -> Tensor:
        """Compute the loss of micro-batch `number` by training_step, from the stage output x."""
        i = int(number)
        compute_logits = self.net.compute_logits
        with (
            self.step_context(),
            self._override_forward(
                lambda inputs, *args, **kwargs: compute_logits(x, *args, **kwargs)
            ),
            self._record_logs(i),
        ):
            output = self.module.training_step(self.current_microbatches[i], *self.step_args)
        loss = (output["loss"] if isinstance(output, dict) else output) * self.microbatch_weights[i]
        self.losses.append(loss.detach())
        return loss * self.loss_weight

    def _compute_microbatch_weights(self, microbatches: list[Any]) -> Tensor:
        """Return the weight (m) of each micro-batch in the mean over the batch.

        It is proportional to the number of loss terms, if the module has a method `num_loss_terms`.
        """
        terms = getattr(self.module, "num_loss_terms", None)
        counts = [
            torch.as_tensor(terms(microbatch) if callable(terms) else 1.0)
            for microbatch in microbatches
        ]
        totals = torch.stack(counts)
        return totals / totals.sum().clamp(min=1)

    @contextmanager
    def _record_logs(self, number: int) -> Iterator[None]:
        """Within the context `module.log` only records; micro-batch `number` gets the records.

        The values are logged later, on all ranks, as their mean over the micro-batches.
        """
        # an attribute of the object, which hides the method of the class
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

    def _broadcast_loss_and_logs(self, loss: Tensor | None) -> Tensor:
        """Broadcast the loss and the logged values from the last rank, and log on all ranks.

        Args:
            loss: the loss of the batch on the last rank, None on other ranks.

        Raises:
            UsageError: the names of the logged values differ from those of the first step. All
                ranks raise it, so that none waits for another.
        """
        source_rank = dist.get_global_rank(self.group, self.num_ranks - 1)
        logged = []  # on the last rank: of each micro-batch {name: (value, args, kwargs)}
        if self.is_last:
            logged = [self.logged_by_microbatch[i] for i in range(self.num_microbatches)]
        local_spec = []
        if logged:
            local_spec = [(name, args, kwargs) for name, (_, args, kwargs) in logged[0].items()]
        if self.log_spec is None:  # in the first step
            message = [local_spec]
            dist.broadcast_object_list(message, source_rank, self.group)
            self.log_spec = message[0]
        device = next(self.module.parameters()).device
        # the loss, the logged values, and 1 if their names have changed
        values = torch.zeros(len(self.log_spec) + 2, device=device)
        if loss is not None and local_spec != self.log_spec:
            values[-1] = 1
        elif loss is not None:
            values[0] = loss
            for i, (name, _, _) in enumerate(self.log_spec, 1):
                microbatch_values = [
                    torch.as_tensor(records[name][0]).detach().float() for records in logged
                ]
                # microbatch_weights (m): weights of the micro-batches in the mean over the batch
                values[i] = (torch.stack(microbatch_values) * self.microbatch_weights).sum()
        dist.broadcast(values, source_rank, self.group)
        if values[-1] > 0:
            raise UsageError(
                f"pp: {type(self.module).__name__}.training_step logs other names than in its "
                "first step",
                ["the same names in each step"],
                "log the same names in each step",
            )
        for (name, args, kwargs), value in zip(self.log_spec, values[1:-1], strict=True):
            self.module.log(name, value.clone(), *args, **kwargs)
        return values[0].clone()

    def _get_schedule(self, net_input: Tensor) -> Any:
        """Return torch's schedule for a micro-batch with this input; built once per shape."""
        key = (net_input.shape, net_input.dtype)
        if key not in self.schedules_by_shape:
            stages = self._build_stages(net_input)
            is_multi_stage = issubclass(self.schedule_class, schedules.PipelineScheduleMulti)
            self.schedules_by_shape[key] = self.schedule_class(
                stages if is_multi_stage else stages[0],
                self.num_microbatches,
                loss_fn=self._microbatch_loss,
                scale_grads=False,
            )
        return self.schedules_by_shape[key]

    def _build_stages(self, net_input: Tensor) -> list[PipelineStage]:
        """Return torch's PipelineStage of each stage of this rank, with its input and output shape.

        The stages run sequentially on all ranks to infer these shapes.
        """
        device = next(self.net.parameters()).device
        stages = []
        activation: Tensor = net_input
        for stage in range(self.num_stages):
            is_local = stage in self.local_stages
            stage_input = activation
            # _probe_output: runs the stage, after the first time on the meta device only
            stage_output = self._probe_output(stage, stage_input) if is_local else None
            # stage s is on rank s modulo the number of ranks
            activation = self._broadcast(stage_output, stage % self.num_ranks)
            if is_local:
                stages.append(
                    PipelineStage(
                        # it runs one stage by a call of the net
                        PipelineStageModule(self, stage),
                        stage,
                        self.num_stages,
                        device,
                        # empty tensors: torch only reads their shape and dtype
                        input_args=_empty_like(stage_input),
                        output_args=_empty_like(activation),
                        group=self.group,
                    )
                )
        return stages

    @torch.no_grad()
    def _probe_output(self, stage: int, x: Tensor) -> Tensor:
        """Return the output of a stage: real the first time, later an empty tensor like it.

        A forward pass gathers parameters, which needs all data ranks. They get new shapes at
        different times, so later shapes are inferred on the meta device.
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
        """Return tied parameters that the first rank also holds, to count them once in a norm."""
        names = {name for name, *_ in self.tied_params} if not self.is_first else set()
        return [p for name, p in self.module.named_parameters() if name in names]

    def reduce_tied_gradients(self) -> None:
        """Sum the gradients of parameters that the first and the last stage share."""
        for name, shape, dtype in self.tied_params:
            parameter = dict(self.module.named_parameters()).get(name)
            device = next(self.module.parameters()).device
            gradient = None if parameter is None else parameter.grad
            if gradient is None:
                gradient = torch.zeros(shape, dtype=dtype, device=device)
            local_grad = gradient.to_local() if isinstance(gradient, DTensor) else gradient
            dist.all_reduce(local_grad, group=self.group)


def full_module(trainer: Any) -> AbstractContextManager[None]:
    """Return a context in which a pipeline's module shows the full net, e.g. to count it."""
    pipeline = getattr(trainer.strategy, "pipeline", None)
    return nullcontext() if pipeline is None else pipeline.full_net()


def _empty_like(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, requires_grad=tensor.is_floating_point())
