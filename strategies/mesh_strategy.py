"""MeshStrategy: one strategy for every way to spread a net, and any LightningModule will do.

The processes form a mesh with named axes (layout.py). Ranks along `dp_shard` see different data and
keep a part of every parameter each (ZeRO-3); ranks along `tp` see the same data and keep a part of
each matrix.

    Trainer(strategy=MeshStrategy(), devices=4)        # --trainer.strategy zero3
    Trainer(strategy=MeshStrategy(tp=2), devices=4)    # two by two
"""

import atexit
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal, cast

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.optim import Optimizer

from ravine.errors import UsageError
from ravine.lightning_compat import (
    ModelParallelAccess,
    allow_any_precision,
    replace_method,
    restore_method,
    should_accumulate,
)

from .activation_checkpointing import Mode
from .buffer_sync import BufferSync
from .checkpoint import sharded
from .checkpoint import state_dict as states
from .checkpoint.atomic_io import (
    AtomicCheckpointIO,
    check_folder,
    reading_together,
    refuse_foreign,
    resolved,
    unwritable,
)
from .checkpoint.plain_values import with_plain_hyperparameters
from .context_parallel import Context
from .device_mesh import Layout, check_choices, check_module, check_together, lay_out, resolve
from .fsdp.mixed_precision import half_of
from .fsdp.original_parameters import OriginalParameters, refuse_common_memory
from .fsdp.sharded_optimizer import owns, refuse_coupled_members, shard_steps, share_methods
from .fsdp.sharded_parameter import GatherOnUse, is_marked
from .fsdp.torch_attributes import check_fsdp
from .gradient_norm import clip_grad_norm
from .gradient_readers import find_readers, free_gradients, frees_early
from .materialize import deferred, materialize
from .parallel_module import (
    Spread,
    UnitOptions,
    copy_from_rank_zero,
    is_parallel,
    parallelize,
)
from .pipeline_parallel import SCHEDULES, Pipeline, Schedule
from .sharding_errors import in_one_line
from .stock_callbacks import refuse_stock_callbacks
from .zero1 import OwnedGradients


@atexit.register
def leave() -> None:
    """End the job before the interpreter ends: gloo's threads may abort the process otherwise.

    For every strategy; Lightning does it for NCCL alone.
    """
    if dist.is_initialized():
        dist.destroy_process_group()


class MeshStrategy(ModelParallelAccess, ModelParallelStrategy):
    """Shard parameters, gradients and optimizer state, and split matrices, from outside.

    Optimizer states are numbered by place here already (`numbered`).

    Args:
        dp_shard: ranks that share the batch and each parameter; -1: all that the others leave.
        dp_replicate: copies of such a group; between them only gradients travel (HSDP).
        cp: ranks that share each sequence, for attention modules with the slots of context.py.
        tp: ranks that share each matrix of the net's `tp_plan`; -1: all that the others leave.
        sequence_parallel: cut the activations between the split matrices along time, over `tp`.
        zero: what the ranks of `dp_shard` share: 1 the optimizer's state, 2 gradients as well, 3
            parameters as well. Less is sent at 2 than at 3, more kept.
        pp: ranks that have different blocks, for nets with the methods of pipeline.py.
        ep: ranks of `dp_shard` that keep different experts of a mixture; -1: all of them.
        schedule: in which order the micro-batches of a pipeline go forward and backward.
        microbatches: into how many a pipeline cuts each batch of a rank.
        recompute: keep fewer activations, and compute them again when going backward.
        smallest_unit: bytes of the smallest block that is gathered by itself (default: 1 MiB);
            smaller blocks are gathered with their parent.
        gather_once: under zero 2 and 3 with accumulated micro-batches, gather the parameters once
            an optimizer step and keep all of them until its last micro-batch: fewer bytes sent,
            more memory.
        save_distributed_checkpoint: a folder with one file a rank instead of a single file, which
            one process can read.
    """

    numbered = True

    def __init__(
        self,
        dp_shard: int = -1,
        dp_replicate: int = 1,
        cp: int = 1,
        tp: int = 1,
        sequence_parallel: bool = False,
        zero: Literal[1, 2, 3] = 3,
        pp: int = 1,
        ep: int = 1,
        schedule: Schedule = "1f1b",
        microbatches: int = 4,
        recompute: Mode = "none",
        smallest_unit: int | None = None,
        gather_once: bool = False,
        save_distributed_checkpoint: bool = False,
    ) -> None:
        """Remember the degrees; the number of processes is known to the trainer only."""
        super().__init__(save_distributed_checkpoint=save_distributed_checkpoint)
        axes = {"dp_shard": dp_shard, "dp_replicate": dp_replicate, "cp": cp, "tp": tp, "pp": pp}
        self.degrees = axes | {"ep": ep}
        choices = (zero, schedule, list(SCHEDULES), microbatches)
        check_choices(*choices, smallest_unit, gather_once)
        self.schedule: Schedule = schedule
        self.microbatches = microbatches
        self.pipeline: Pipeline | None = None
        self.zero, self.sequence_parallel = zero, sequence_parallel
        self.recompute: Mode = recompute
        self.smallest_unit, self.gather_once = smallest_unit, gather_once
        self.layout: Layout | None = None
        self.spread: Spread | None = None
        self.context: Context | None = None
        self.originals: OriginalParameters | None = None  # with ZeRO-2 and 3
        self.gather: GatherOnUse | None = None  # with ZeRO-2 and 3
        self.buffers: BufferSync | None = None
        self.gradients: OwnedGradients | None = None  # with ZeRO-1
        self._adapted: list[Optimizer] = []
        self.when_joined: Callable[[], None] | None = None  # called before the mesh is made
        self.frees = False  # whether gradients are freed before the forward pass

    def resolved_degrees(self) -> dict[str, int]:
        """The size of each axis with -1 filled in, or an error that says what would fit."""
        return resolve(self.degrees, self.num_processes * self.num_nodes)

    def before_launch(self) -> None:
        """Check the axes while the trainer is created: fail before a process starts."""
        degrees = self.resolved_degrees()
        check_together(degrees, self.sequence_parallel, self.schedule, self.microbatches)

    def setup_environment(self) -> None:
        """Join the job and lay out the mesh."""
        self.join_processes()
        if self.when_joined is not None:
            self.when_joined()
        self.layout = lay_out(self.resolved_degrees(), self.zero, self.root_device)
        assert self.lightning_module is not None
        self.set_device_mesh(self.layout.named)
        self.lightning_module.__dict__["strategy_draws_values"] = True  # read by TaskModule
        if self.layout.tp.size() > 1:  # ranks that compute one activation draw one dropout for it
            torch.manual_seed(self.broadcast(torch.initial_seed()))

    def parallelize(self, module: nn.Module) -> Spread:
        """Spread the module over the mesh unless it has done so itself."""
        assert self.layout is not None
        copy_from_rank_zero(module, self.root_device)
        if self.layout.degrees["pp"] > 1 and self.pipeline is None:
            mesh = self.layout.named["pp"]
            self.pipeline = Pipeline(module, mesh, self.schedule, self.microbatches)
        if is_parallel(module):
            return Spread(module, self.layout)
        options = self._unit_options(module)
        return parallelize(module, self.layout, options, self.sequence_parallel, self.recompute)

    def _unit_options(self, module: nn.Module) -> UnitOptions:
        assert self.layout is not None
        shards = self.layout.shard.size(-1)  # the last axis is that of the shards
        automatic = getattr(module, "automatic_optimization", False)
        return UnitOptions(
            sharded=self.zero > 1,
            keep=self.zero == 2 or self.gather_once,
            smallest=self.smallest_unit,
            half=half_of(self.precision_plugin) if shards > 1 else None,
            around_steps=automatic and self.layout.degrees["pp"] == 1,
            gather_once=self.gather_once,
        )

    def setup(self, trainer: L.Trainer) -> None:
        """Parallelise after `configure_model`, before weights are restored and optimizers made."""
        module = self.lightning_module
        assert module is not None
        assert self.layout is not None
        refuse_stock_callbacks(trainer)
        check_module(module, self.layout.degrees, self.sequence_parallel)
        if self.layout.degrees["cp"] > 1:
            self.context = Context(module, self.layout.named["cp"])
        foreign = is_parallel(module) and not is_marked(module)  # sharded by the module itself
        if self.world_size > 1:
            refuse_common_memory(module)
        if self.synchronizes_batchnorm and trainer.training:
            self._synchronize_batchnorm(module)
        if self.zero > 1:
            self.originals = OriginalParameters(module)
        values = deferred(module)  # by name: sharding replaces the parameters
        self.spread = self.parallelize(module)
        if self.zero > 1 and not foreign:
            check_fsdp(module)
        drawn = module.__dict__.pop("initial_values", None)
        if drawn is not None:
            drawn.seed = self.broadcast(drawn.seed)
        self.spread.replaced(materialize(module, values, self.root_device))
        if self.originals is not None:
            self.originals.update_references()
        own = is_overridden("configure_model", module)
        if not own:  # Lightning insists that the module has one, to shard itself there
            module.configure_model = lambda: None
        super().setup(trainer)
        if not own:
            del module.configure_model
        if self.zero > 1 and self.layout.tp.size() * self.layout.degrees["pp"] == 1 and not foreign:
            self.gather = GatherOnUse(module)
            self.gather.mark()
            if self.originals is not None:
                self.gather.keep(self.originals.hooks, self.originals.attributes)
        if self.originals is not None and self.gather is not None:
            for optimizer in self.originals.kept_optimizers():
                self.originals.update_optimizer(optimizer)
                shard_steps(optimizer)
        if self.layout.data.size() > 1:
            self.buffers = BufferSync(module, self.layout.data.get_group())
        if trainer.gradient_clip_val and trainer.gradient_clip_algorithm != "value":
            self._check_norm(trainer.gradient_clip_val)
        replace_method(self.precision_plugin, "clip_grad_by_norm", self._clip_by_norm)

    def _check_norm(self, bound: float) -> None:
        """ValueError where `gradient_clip_val` would measure the gradients of this rank alone."""
        assert self.layout is not None
        degrees = self.layout.degrees
        apart = [f"{k}={degrees[k]}" for k in ("pp", "ep") if degrees[k] > 1]
        if apart:
            raise UsageError(
                f"gradient_clip_val={bound:g} cannot add up the norm over ranks with different "
                f"parameters ({', '.join(apart)}); allowed: strategies without pp and ep; use "
                f"the callback GradientClipping(max_norm={bound:g})"
            )

    def _synchronize_batchnorm(self, module: nn.Module) -> None:
        """Let BatchNorm use the statistics of all data ranks (`sync_batchnorm=True`).

        Raises:
            ValueError: on a CPU, for which torch has no such layer.
        """
        assert self.layout is not None
        if self.root_device.type == "cpu":
            raise UsageError(
                "sync_batchnorm=True: torch synchronizes BatchNorm on GPUs only, and this run is on"
                " a CPU; allowed: false; type --trainer.sync_batchnorm=false"
            )
        nn.SyncBatchNorm.convert_sync_batchnorm(module, self.layout.data.get_group())

    def _clip_by_norm(self, optimizer: Optimizer, clip_val: float) -> None:
        """Clip all gradients together: sharded ones, whole ones, and those of other ranks."""
        self._check_norm(clip_val)
        parameters = self.precision_plugin.main_params(optimizer)
        clip_grad_norm(parameters, clip_val, self.gradient_group)

    def teardown(self) -> None:
        """Undo what `setup` has changed."""
        if self.gradients is not None:
            self.gradients.close()
        if self.lightning_module is not None:
            self.lightning_module.__dict__.pop("strategy_draws_values", None)
        restore_method(self.precision_plugin, "clip_grad_by_norm")
        super().teardown()

    def setup_optimizers(self, trainer: L.Trainer) -> None:
        """Make the optimizers, which the setter of `optimizers` adapts."""
        if self.originals is not None:  # moved to a device, parameters have lost them
            self.originals.copy_attributes()
        self._adapted = []  # a second fit may have the optimizers of the first
        super().setup_optimizers(trainer)

    @property
    def optimizers(self) -> list[Optimizer]:
        """The optimizers; a module may set others at any time (`trainer.optimizers = [...]`)."""
        return super().optimizers

    @optimizers.setter
    def optimizers(self, optimizers: list[Optimizer]) -> None:
        """Set them; those that are new are adapted to shards."""
        cast(Any, ModelParallelStrategy.optimizers).fset(self, optimizers)
        same = [id(o) for o in optimizers] == [id(o) for o in self._adapted]
        if self.spread is not None and optimizers and not same:
            self._adapted = list(optimizers)
            self._adapt_optimizers()

    def _adapt_optimizers(self) -> None:
        """Let optimizers step shards; with ZeRO-1 each rank steps its share of the parameters."""
        assert self.layout is not None
        if self.originals is not None and self.layout.degrees["pp"] == 1:
            for optimizer in self.optimizers:
                self.originals.update_optimizer(optimizer)
        self._prepare_optimizers()
        known: dict[Tensor, int] = {}
        if self.gradients is not None:
            known = self.gradients.owner
            self.gradients.close()
            self.gradients = None
        if self.zero == 1 and self.layout.data.size() > 1:
            module, spread = self.lightning_module, self._spread
            assert module is not None
            self.gradients = OwnedGradients(
                module,
                self.optimizers,
                self.layout.data.get_group(),
                lambda: find_readers(module.trainer),
                {p for experts in spread.experts for p in experts.parameters()},
                known,
            )
            spread.owned = self.gradients

    @property
    def gradient_group(self) -> Any:
        """With ZeRO-1, the ranks that have the gradients of different parameters; else None."""
        own = self.gradients
        return None if own is None or own.keeps_all else own.group

    @property
    def arrived(self) -> Collection[Tensor]:
        """With ZeRO-1, the parameters that the last backward pass has reached on this rank."""
        return () if self.gradients is None else self.gradients.arrived

    def _prepare_optimizers(self) -> None:
        """Replace methods of optimizers that are not written for shards; refuse coupled ones."""
        for optimizer in self.optimizers:
            if self.zero > 1:
                shard_steps(optimizer)
                for wrapper in self.wrapped_optimizers:
                    if wrapper.optimizer is optimizer:
                        share_methods(optimizer, wrapper)
            elif self.world_size > 1:
                refuse_coupled_members(optimizer)

    def on_train_start(self) -> None:
        """Decide whether gradients are freed before the next forward pass."""
        super().on_train_start()
        assert self.lightning_module is not None
        self.frees = frees_early(self.lightning_module.trainer)

    def on_train_end(self) -> None:
        """Leave equal buffers on all ranks."""
        self._sync_buffers()
        super().on_train_end()

    def _sync_buffers(self) -> None:
        if self.buffers is not None:
            self.buffers.before_step()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Free the gradients of the last optimizer step, before the forward pass of the next."""
        super().on_train_batch_start(batch, batch_idx)
        assert self.lightning_module is not None
        if self.frees and batch_idx % self.lightning_module.trainer.accumulate_grad_batches == 0:
            free_gradients(self.optimizers[0])

    def part(self, batch: Any) -> Any:
        """What this rank computes of a batch: with `cp`, a part of each sequence."""
        return self.context.part(batch) if self.context else batch

    def training_step(self, batch: Any, *args: Any) -> Any:
        """The module's step, on this rank's part of each sequence."""
        self._sync_buffers()
        result = self._training_step(batch, *args)
        if self.buffers is not None:
            self.buffers.after_step()
        return result

    def _training_step(self, batch: Any, *args: Any) -> Any:
        batch = self.context.cut(batch) if self.context else batch
        with self.context.sober() if self.context else nullcontext():
            if self.pipeline is None:
                return self._gathered(super().training_step, batch, *args)
            self._spread.accumulate(more=self._accumulates())
            return self.pipeline.step(batch, args, self.precision_plugin.train_step_context)

    def on_validation_start(self) -> None:
        """Give all ranks the statistics of rank 0: those of the last training step differ."""
        super().on_validation_start()
        if self.buffers is not None:
            self.buffers.before_step()

    def validation_step(self, batch: Any, *args: Any) -> Any:
        """As in training."""
        return self._evaluate(super().validation_step, batch, args)

    def test_step(self, batch: Any, *args: Any) -> Any:
        """As in training."""
        return self._evaluate(super().test_step, batch, args)

    def _evaluate(self, step: Callable[..., Any], batch: Any, args: tuple[Any, ...]) -> Any:
        if self.context is None:
            return self._gathered(step, batch, *args)
        try:
            return self._gathered(step, self.context.cut(batch), *args)
        finally:
            self.context.release()

    def predict_step(self, *args: Any) -> Any:
        """As in training."""
        return self._gathered(super().predict_step, *args)

    def _gathered(self, step: Callable[..., Any], *args: Any) -> Any:
        """Run a step of the module with its small children and weights it uses itself gathered."""
        unit = self._spread.step_unit
        step = step if self.gather is None else self.gather.around(step)
        with in_one_line(self.lightning_module, "in its step"):
            return step(*args) if unit is None else unit(step, *args)

    def around_backward(self) -> AbstractContextManager[None]:
        """The context of a backward pass: errors of sharded tensors are raised in one line."""
        return in_one_line(self.lightning_module, "in the backward pass")

    def optimizer_step(self, *args: Any, **kwargs: Any) -> Any:
        """Step, and free gathered parameters, which have the values from before it."""
        module = self.lightning_module
        if self.gather is not None and module is not None and not module.automatic_optimization:
            self.gather.write_back()
        result = super().optimizer_step(*args, **kwargs)
        if (self.gather is not None or self.gather_once) and module is not None:
            for unit in self._spread.units():
                unit.reshard()
        return result

    def pre_backward(self, closure_loss: Tensor) -> None:
        """Say whether this backward pass is the last of an optimizer step."""
        super().pre_backward(closure_loss)
        more = self._accumulates()
        self._spread.accumulate(more=more)
        if self.gather is not None:
            self.gather.begin_backward(closure_loss)
        if self.gradients is not None and not more:
            own = is_overridden("backward", self.lightning_module)  # may go backward several times
            self.gradients.begin(None if own else closure_loss)

    def post_backward(self, closure_loss: Tensor) -> None:
        """Reduce what no shard does, once an optimizer step."""
        super().post_backward(closure_loss)
        if self.gather is not None:
            self.gather.end_backward()
        if self.context is not None:
            self.context.release()
        if not self._accumulates():
            if self.gradients is not None:
                self.gradients.finish()
            self._spread.settle()
            if self.pipeline is not None:
                self.pipeline.settle()

    def _accumulates(self) -> bool:
        module = self.lightning_module
        assert module is not None
        return module.automatic_optimization and should_accumulate(module.trainer)

    @property
    def _spread(self) -> Spread:
        assert self.spread is not None
        return self.spread

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Which share of the samples this rank takes."""
        assert self.layout is not None
        batch = self.layout.batch
        return {"num_replicas": batch.size(), "rank": batch.get_local_rank()}

    def reduce(self, tensor: Tensor | Any, group: Any = None, reduce_op: Any = "mean") -> Tensor:
        """Reduce over the ranks that see different data, so that a sum counts a sample once."""
        if group is None and self.layout is not None:
            group = self.layout.data.get_group()
        return super().reduce(tensor, group, reduce_op)

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        """Whether all processes, or any, decide so: these count one by one, whatever they see."""
        votes = super().reduce(
            torch.tensor(int(decision), device=self.root_device), reduce_op="sum"
        )
        return int(votes) == self.world_size if all else int(votes) > 0

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The weights: this rank's parts for a folder, else all of them on rank 0."""
        assert self.lightning_module is not None
        parts = self.saves_sharded
        return states.weights(self.lightning_module, parts, self.stages)

    @property
    def stages(self) -> states.Stages | None:
        """With a pipeline, the names of all parameters and the ranks that have them."""
        pipeline = self.pipeline
        return None if pipeline is None else states.Stages(pipeline.names, pipeline.group)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The state, parameters numbered by their place in `named_parameters()`, as the weights."""
        if isinstance(optimizer, LightningOptimizer):
            optimizer = optimizer.optimizer
        assert self.lightning_module is not None
        owners = bool(self.gradients and self.gradients.owner)
        owners |= any(self._whole(p) for p in self.lightning_module.parameters())
        group = self.layout.data.get_group() if owners and self.layout else None
        how = (self.saves_sharded, group, self.stages)
        return states.optimizer_state(
            self.lightning_module, optimizer, *how, lambda p: bool(self._owner_here(p))
        )

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None = None
    ) -> None:
        """Write a single file, or a folder with a part from each rank."""
        if not self.saves_sharded:
            return super().save_checkpoint(checkpoint, filepath, storage_options)
        checkpoint = with_plain_hyperparameters(checkpoint)
        refuse_foreign({k: v for k, v in checkpoint.items() if k not in sharded.SPREAD})
        path = Path(self.broadcast(filepath))
        if isinstance(self.checkpoint_io, AtomicCheckpointIO):
            self.checkpoint_io.written.add(resolved(path))
        try:
            sharded.write(checkpoint, path)
        except OSError as error:
            raise unwritable(path, error) from error

    def load_checkpoint(
        self, checkpoint_path: str | Path, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read what any strategy has written; weights and optimizers are set here."""
        path = Path(self.broadcast(checkpoint_path))
        module, optimizers = self.lightning_module, self.optimizers
        assert module is not None
        with reading_together(mapped=sharded.SPREAD):
            if path.is_dir():
                check_folder(path)
                states.refuse_others(module, self.sizes(), states.sizes_in(path))
                return states.load_parts(
                    module, optimizers, path, self._owned, self.stages, self._whole
                )
            checkpoint = self.checkpoint_io.load_checkpoint(path, weights_only=weights_only)
        states.refuse_others(module, self.sizes(), states.sizes(checkpoint["state_dict"]))
        states.load(module, optimizers, checkpoint, self._owned, self.stages, self._whole)
        return checkpoint

    def sizes(self) -> states.Sizes:
        """The size of each weight of the whole net, wherever its stages are."""
        assert self.lightning_module is not None
        with self.pipeline.whole() if self.pipeline else nullcontext():
            return states.sizes(self.lightning_module.state_dict())

    def _owned(self, parameter: Tensor) -> bool:
        """Whether this rank has state of a parameter: its shard's, or all of it."""
        return self._owner_here(parameter) is not False

    def _whole(self, parameter: Tensor) -> bool:
        """Whether a sharded parameter's state is whole, on one rank."""
        return owns(self.optimizers, parameter) is not None

    def _owner_here(self, parameter: Tensor) -> bool | None:
        """Whether this rank owns a parameter; None where each rank has state of its shard."""
        assert self.layout is not None
        owners = self.gradients.owner if self.gradients else {}
        if parameter in owners:
            return owners[parameter] == self.layout.data.get_local_rank()
        return owns(self.optimizers, parameter)


allow_any_precision(MeshStrategy)
