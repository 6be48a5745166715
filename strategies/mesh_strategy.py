"""MeshStrategy: ZeRO-1, 2 and 3, HSDP, tensor, context, pipeline and expert parallelism.

It applies to any LightningModule. The processes form a mesh with named axes (device_mesh.py). Ranks
along `dp_shard` see different data, and each keeps a shard of every parameter (ZeRO-3). Ranks along
`tp` see the same data, and each keeps a shard of every matrix.

    Trainer(strategy=MeshStrategy(), devices=4)        # --trainer.strategy=zero3
    Trainer(strategy=MeshStrategy(tp=2), devices=4)    # dp_shard 2 x tp 2
"""

import atexit
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
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

from .activation_checkpointing import CheckpointingMode
from .buffer_sync import BufferSync
from .checkpoint import sharded, sharded_index, state_dict
from .checkpoint.atomic_io import (
    AtomicCheckpointIO,
    check_serializable,
    collective_loading,
    require_valid_folder,
    with_resolved_parent,
    write_error,
)
from .checkpoint.plain_values import with_plain_hyperparameters
from .context_parallel import ContextParallel
from .device_mesh import (
    MeshLayout,
    build_mesh,
    resolve_degrees,
    validate_combination,
    validate_module,
    validate_strategy_args,
)
from .fsdp.gather_on_use import GatherOnUse
from .fsdp.mixed_precision import half_precision_dtype
from .fsdp.original_parameters import OriginalParameters, check_no_shared_memory
from .fsdp.sharded_optimizer import (
    check_members_not_coupled,
    copy_methods_to_wrapper,
    owns_parameter,
    shard_optimizer_steps,
)
from .fsdp.sharded_parameter import has_sharded_parameter_class
from .fsdp.torch_attributes import check_fsdp_attributes
from .gradient_norm import clip_grad_norm
from .gradient_readers import can_free_gradients_early, find_gradient_readers, free_gradients
from .gradient_scaling import restore_scaler, unscale_on_all_ranks
from .materialize import collect_deferred_values, materialize_params
from .parallel_module import (
    ParallelModule,
    UnitOptions,
    broadcast_from_rank_zero,
    has_sharded_params,
    parallelize_module,
)
from .pipeline_parallel import SCHEDULE_CLASSES, Pipeline, PipelineSchedule
from .sharding_errors import raise_as_sharding_error
from .stock_callbacks import check_stock_callbacks
from .zero1 import Zero1Reducer


@atexit.register
def destroy_process_group_at_exit() -> None:
    """Destroy the process group at exit; otherwise gloo threads may abort the interpreter.

    This applies to every strategy. Lightning destroys the process group for NCCL only.
    """
    if dist.is_initialized():
        dist.destroy_process_group()


class MeshStrategy(ModelParallelAccess, ModelParallelStrategy):
    """Shard parameters, gradients and optimizer state, and split matrices, of any module.

    With every layout, optimizer states in a checkpoint are indexed by the order of
    `named_parameters()`.

    Args:
        dp_shard: number of data-parallel ranks that shard each parameter; -1: all remaining ranks.
        dp_replicate: number of replicas of such a group; replicas exchange only gradients (HSDP).
        cp: number of ranks that share each sequence; needs the attributes that
            context_parallel.py names.
        tp: number of ranks that split each matrix of the net's `tensor_parallel_plan`; -1: all
            remaining ranks.
        sequence_parallel: shard the activations between the split matrices along time, over `tp`.
        zero_stage: ZeRO stage. The ranks of `dp_shard` shard the optimizer state (1), the gradients
            as well (2), the parameters as well (3). Stage 2 sends less than 3 and needs more
            memory.
        pp: number of pipeline ranks; needs a net with the methods that pipeline_parallel.py names.
        ep: number of ranks of `dp_shard` that keep different experts; -1: all of them.
        pipeline_schedule: order of the forward and backward passes of a pipeline's micro-batches.
        num_microbatches: number of micro-batches into which a pipeline splits each batch of a rank.
        activation_checkpointing: recompute activations in the backward pass.
        min_unit_bytes: bytes of the smallest block that is an FSDP unit of its own (default:
            1 MiB); smaller blocks are gathered with their parent.
        gather_once: with zero 2 and 3 and gradient accumulation, gather the parameters once per
            optimizer step, for all micro-batches. This sends less and needs more memory.
        save_distributed_checkpoint: save a folder with one file per rank instead of a single file.
            One process can read either.
    """

    renumbers_params = True

    def __init__(
        self,
        dp_shard: int = -1,
        dp_replicate: int = 1,
        cp: int = 1,
        tp: int = 1,
        sequence_parallel: bool = False,
        zero_stage: Literal[1, 2, 3] = 3,
        pp: int = 1,
        ep: int = 1,
        pipeline_schedule: PipelineSchedule = "1f1b",
        num_microbatches: int = 4,
        activation_checkpointing: CheckpointingMode = "none",
        min_unit_bytes: int | None = None,
        gather_once: bool = False,
        save_distributed_checkpoint: bool = False,
    ) -> None:
        """Store the arguments, which the class documents, and raise UsageError for invalid ones.

        A degree of -1 is resolved once the trainer has set the number of processes.
        """
        super().__init__(save_distributed_checkpoint=save_distributed_checkpoint)
        # ep is kept apart, because it divides dp_shard and is no axis of its own
        axes = {"dp_shard": dp_shard, "dp_replicate": dp_replicate, "cp": cp, "tp": tp, "pp": pp}
        self.degrees = axes | {"ep": ep}
        validate_strategy_args(
            zero_stage=zero_stage,
            pipeline_schedule=pipeline_schedule,
            # SCHEDULE_CLASSES: torch's schedule classes, by name
            allowed_schedules=list(SCHEDULE_CLASSES),
            num_microbatches=num_microbatches,
            min_unit_bytes=min_unit_bytes,
            gather_once=gather_once,
        )
        self.pipeline_schedule: PipelineSchedule = pipeline_schedule
        self.num_microbatches = num_microbatches
        self.pipeline: Pipeline | None = None  # with pp > 1
        self.zero_stage, self.sequence_parallel = zero_stage, sequence_parallel
        self.activation_checkpointing: CheckpointingMode = activation_checkpointing
        self.min_unit_bytes, self.gather_once = min_unit_bytes, gather_once
        self.mesh_layout: MeshLayout | None = None  # until the process group is ready
        self.parallel_module: ParallelModule | None = None  # until `setup`
        self.context_parallel: ContextParallel | None = None  # with cp > 1
        # what the parameters had before sharding: names, hooks, attributes
        self.original_parameters: OriginalParameters | None = None  # with ZeRO-2 and 3
        self.gather_on_use: GatherOnUse | None = None  # with ZeRO-2 and 3
        # sends changed buffers from the first data rank to the others
        self.buffer_sync: BufferSync | None = None  # with several data ranks
        # averages gradients, and makes each rank step the parameters it owns
        self.zero1_reducer: Zero1Reducer | None = None  # with ZeRO-1
        self._adapted_optimizers: list[Optimizer] = []  # see `_adapt_optimizers`
        # called before the mesh is built
        self.on_process_group_ready: Callable[[], None] | None = None
        self.should_free_gradients = False  # whether gradients are freed before the forward pass

    def resolved_degrees(self) -> dict[str, int]:
        """Return the size of each axis, with -1 resolved; raise UsageError if they do not fit."""
        return resolve_degrees(self.degrees, self.num_processes * self.num_nodes)

    def before_launch(self) -> None:
        """Check the axes when the trainer is created, before any process starts."""
        degrees = self.resolved_degrees()
        validate_combination(
            degrees, self.sequence_parallel, self.pipeline_schedule, self.num_microbatches
        )

    def setup_environment(self) -> None:
        """Join the process group and build the device mesh."""
        self.join_processes()
        if self.on_process_group_ready is not None:
            self.on_process_group_ready()
        self.mesh_layout = build_mesh(self.resolved_degrees(), self.zero_stage, self.root_device)
        assert self.lightning_module is not None
        self.set_device_mesh(self.mesh_layout.lightning_mesh)
        self.lightning_module.__dict__["strategy_draws_values"] = True  # read by TaskModule
        # tp ranks compute the same activations, so they need the same dropout masks
        if self.mesh_layout.tp_mesh.size() > 1:
            torch.manual_seed(self.broadcast(torch.initial_seed()))

    def parallelize_module(self, module: nn.Module) -> ParallelModule:
        """Parallelize the module over the mesh, unless its own code has sharded it already."""
        assert self.mesh_layout is not None
        broadcast_from_rank_zero(module, self.root_device)
        if self.mesh_layout.degrees["pp"] > 1 and self.pipeline is None:
            mesh = self.mesh_layout.lightning_mesh["pp"]
            self.pipeline = Pipeline(module, mesh, self.pipeline_schedule, self.num_microbatches)
        if has_sharded_params(module):
            return ParallelModule(module, self.mesh_layout)
        options = self._unit_options(module)
        return parallelize_module(
            module, self.mesh_layout, options, self.sequence_parallel, self.activation_checkpointing
        )

    def _unit_options(self, module: nn.Module) -> UnitOptions:
        assert self.mesh_layout is not None
        shards = self.mesh_layout.fsdp_mesh.size(-1)  # the last axis is the shard axis
        automatic = getattr(module, "automatic_optimization", False)
        return UnitOptions(
            is_sharded=self.zero_stage > 1,
            keep_until_backward=self.zero_stage == 2 or self.gather_once,
            min_unit_bytes=self.min_unit_bytes,
            half_dtype=half_precision_dtype(self.precision_plugin) if shards > 1 else None,
            gather_around_steps=automatic and self.mesh_layout.degrees["pp"] == 1,
            gather_once=self.gather_once,
        )

    def setup(self, trainer: L.Trainer) -> None:
        """Parallelize the module; Lightning calls it after `configure_model`.

        Weights are loaded and optimizers are built later.
        """
        module = self.lightning_module
        assert module is not None
        assert self.mesh_layout is not None
        # raises for callbacks of Lightning that would have a wrong effect or none
        check_stock_callbacks(trainer)
        validate_module(module, self.mesh_layout.degrees, self.sequence_parallel)
        if self.mesh_layout.degrees["cp"] > 1:
            # splits sequences over ranks; it checks here that the module allows it
            self.context_parallel = ContextParallel(module, self.mesh_layout.lightning_mesh["cp"])
        # DTensors that are not of the class that an earlier `fit` with this strategy has made
        is_parallelized_by_module = has_sharded_params(module) and not has_sharded_parameter_class(
            module
        )
        if self.world_size > 1:
            check_no_shared_memory(module)
        if self.synchronizes_batchnorm and trainer.training:
            self._synchronize_batchnorm(module)
        # recorded before sharding, which replaces parameters
        if self.zero_stage > 1:
            self.original_parameters = OriginalParameters(module)
        # values of parameters on the meta device, which are drawn after sharding
        deferred_values = collect_deferred_values(module)  # by name of the parameter
        # sends rank 0's weights to all ranks, and shards or splits the module
        self.parallel_module = self.parallelize_module(module)
        if self.zero_stage > 1 and not is_parallelized_by_module:
            # raises if this version of torch lacks private attributes that are used below
            check_fsdp_attributes(module)
        self._materialize(module, self.parallel_module, deferred_values)
        has_configure_model = is_overridden("configure_model", module)
        # Lightning's ModelParallelStrategy requires the module to override configure_model
        if not has_configure_model:
            module.configure_model = lambda: None
        super().setup(trainer)
        if not has_configure_model:
            del module.configure_model
        has_no_model_axes = self.mesh_layout.tp_mesh.size() * self.mesh_layout.degrees["pp"] == 1
        if self.zero_stage > 1 and has_no_model_axes and not is_parallelized_by_module:
            # parameters that are used outside of their FSDP unit are then gathered at their use
            self._install_gather_on_use(module)
        if self.mesh_layout.data_mesh.size() > 1:
            # sends changed buffers, e.g. of BatchNorm, from the first data rank to the others
            self.buffer_sync = BufferSync(module, self.mesh_layout.data_mesh.get_group())
        if trainer.gradient_clip_val and trainer.gradient_clip_algorithm != "value":
            # raises if each rank would clip by the norm of its own gradients
            self._check_norm_clipping(trainer.gradient_clip_val)
        # Lightning's method does not add the norms of shards on different meshes
        replace_method(self.precision_plugin, "clip_grad_by_norm", self._clip_by_norm)
        scaler = getattr(self.precision_plugin, "scaler", None)
        if scaler is not None:
            # scaler: of 16-bit precision; the ranks agree whether a gradient is infinite
            unscale_on_all_ranks(scaler)

    def _materialize(
        self,
        module: L.LightningModule,
        parallel_module: ParallelModule,
        deferred_values: dict[str, Any],
    ) -> None:
        """Fill shards on the meta device, and replace references to the parameters before sharding.

        `deferred_values` are the results of `collect_deferred_values` before sharding.
        """
        # initial_values: draws the values of parameters on the meta device from its `seed`
        value_source = module.__dict__.pop("initial_values", None)
        if value_source is not None:  # all ranks draw the same values
            value_source.seed = self.broadcast(value_source.seed)
        new_params = materialize_params(module, deferred_values, self.root_device)
        # it keeps ids of replicated parameters, and some are new objects now
        parallel_module.update_replaced_ids(new_params)
        if self.original_parameters is not None:
            # attributes that hold a parameter from before sharding get the sharded one
            self.original_parameters.update_references()

    def _install_gather_on_use(self, module: L.LightningModule) -> None:
        """Gather parameters that are used outside of their unit, and adapt the module's optimizers.

        The latter are optimizers that the module itself keeps in its attributes.
        """
        self.gather_on_use = GatherOnUse(module)
        self.gather_on_use.install()
        if self.original_parameters is None:
            return
        self.gather_on_use.attach_original_attributes(
            self.original_parameters.hooks_by_name, self.original_parameters.attributes_by_name
        )
        for optimizer in self.original_parameters.find_module_optimizers():
            self.original_parameters.update_optimizer(optimizer)
            shard_optimizer_steps(optimizer)

    def _check_norm_clipping(self, bound: float) -> None:
        """Raise UsageError if `gradient_clip_val` would use the norm of this rank's gradients."""
        assert self.mesh_layout is not None
        degrees = self.mesh_layout.degrees
        unsummed_degrees = [f"{k}={degrees[k]}" for k in ("pp", "ep") if degrees[k] > 1]
        if unsummed_degrees:
            raise UsageError(
                f"gradient_clip_val={bound:g} clips by the gradient norm of one rank, and with "
                f"{', '.join(unsummed_degrees)} the ranks have different parameters",
                ["strategies without pp and ep"],
                f"remove gradient_clip_val, and add GradientClipping(max_norm={bound:g}) to "
                "Trainer(callbacks=...)",
            )

    def _synchronize_batchnorm(self, module: nn.Module) -> None:
        """Convert BatchNorm to use the statistics of all data ranks (`sync_batchnorm=True`).

        Raises:
            UsageError: on a CPU, for which torch has no SyncBatchNorm.
        """
        assert self.mesh_layout is not None
        if self.root_device.type == "cpu":
            raise UsageError(
                "sync_batchnorm=True: torch synchronizes BatchNorm on GPUs only, and this run "
                "uses a CPU",
                [False],
                "use Trainer(sync_batchnorm=False)",
                flag="--trainer.sync_batchnorm=false",
            )
        nn.SyncBatchNorm.convert_sync_batchnorm(module, self.mesh_layout.data_mesh.get_group())

    def _clip_by_norm(self, optimizer: Optimizer, clip_val: float) -> None:
        """Clip by the total norm: sharded and replicated gradients, and those of other ranks."""
        self._check_norm_clipping(clip_val)
        parameters = self.precision_plugin.main_params(optimizer)
        clip_grad_norm(parameters, clip_val, self.zero1_group)

    def teardown(self) -> None:
        """Undo the changes that `setup` made to the module, precision plugin and optimizers."""
        if self.zero1_reducer is not None:
            self.zero1_reducer.restore()
        if self.lightning_module is not None:
            self.lightning_module.__dict__.pop("strategy_draws_values", None)
        restore_method(self.precision_plugin, "clip_grad_by_norm")
        restore_scaler(getattr(self.precision_plugin, "scaler", None))
        super().teardown()

    def setup_optimizers(self, trainer: L.Trainer) -> None:
        """Build the optimizers; the setter of `optimizers` adapts them to sharded parameters."""
        if self.original_parameters is not None:  # moving parameters to a device dropped them
            self.original_parameters.copy_attributes()
        self._adapted_optimizers = []  # a second fit may reuse the optimizers of the first
        with self._build_for_full_net():
            super().setup_optimizers(trainer)

    @contextmanager
    def _build_for_full_net(self) -> Iterator[None]:
        """Show the full net to `configure_optimizers`; a pipeline stage lacks parameters.

        So the param groups are those of one process, in which their states can be loaded.
        """
        module, pipeline = self.lightning_module, self.pipeline
        assert module is not None
        if pipeline is None:
            yield
            return
        attributes = vars(module)
        previous = attributes.get("configure_optimizers")  # OptimizerPlan overrides it here
        configure = module.configure_optimizers

        def configure_optimizers() -> Any:
            with pipeline.full_net():
                return configure()

        attributes["configure_optimizers"] = configure_optimizers
        try:
            yield
        finally:
            attributes.pop("configure_optimizers")
            if previous is not None:
                attributes["configure_optimizers"] = previous

    @property
    def optimizers(self) -> list[Optimizer]:
        """Return the optimizers; a module may replace them (`trainer.optimizers = [...]`)."""
        return super().optimizers

    @optimizers.setter
    def optimizers(self, optimizers: list[Optimizer]) -> None:
        """Set the optimizers, and adapt new ones to sharded parameters."""
        if self.pipeline is not None:
            self.pipeline.split_optimizers(optimizers)
        cast(Any, ModelParallelStrategy.optimizers).fset(self, optimizers)
        is_unchanged = [id(o) for o in optimizers] == [id(o) for o in self._adapted_optimizers]
        if self.parallel_module is not None and optimizers and not is_unchanged:
            self._adapted_optimizers = list(optimizers)
            self._adapt_optimizers()

    def _adapt_optimizers(self) -> None:
        """Make new optimizers step shards; with ZeRO-1 each rank steps the parameters it owns.

        The setter of `optimizers` calls it.
        """
        assert self.mesh_layout is not None
        if self.original_parameters is not None and self.mesh_layout.degrees["pp"] == 1:
            for optimizer in self.optimizers:
                # the optimizer may have been built before sharding replaced the parameters
                self.original_parameters.update_optimizer(optimizer)
        # with ZeRO-2 and 3 it makes optimizers step shards; it rejects coupled ones
        self._prepare_optimizers()
        known_owners: dict[Tensor, int] = {}  # a parameter with state keeps its owner
        if self.zero1_reducer is not None:
            known_owners = self.zero1_reducer.owner_of
            # puts back the methods of the optimizers of an earlier call
            self.zero1_reducer.restore()
            self.zero1_reducer = None
        if self.zero_stage == 1 and self.mesh_layout.data_mesh.size() > 1:
            module, parallel_module = self.lightning_module, self._required_parallel_module
            assert module is not None
            expert_params = {
                p for experts in parallel_module.expert_modules for p in experts.parameters()
            }
            self.zero1_reducer = Zero1Reducer(
                module,
                self.optimizers,
                self.mesh_layout.data_mesh.get_group(),
                # called at the first backward pass, when all hooks are known
                find_gradient_readers=lambda: find_gradient_readers(module.trainer),
                ignored_params=expert_params,
                known_owners=known_owners,
            )
            parallel_module.zero1_reducer = self.zero1_reducer

    @property
    def zero1_group(self) -> Any:
        """Return the ranks that hold gradients of different parameters (ZeRO-1), or None."""
        reducer = self.zero1_reducer
        return None if reducer is None or reducer.keeps_all_gradients else reducer.group

    @property
    def params_with_gradient(self) -> Collection[Tensor]:
        """Return the parameters that got a gradient in the last backward pass, with ZeRO-1."""
        return () if self.zero1_reducer is None else self.zero1_reducer.arrival_counts

    def _prepare_optimizers(self) -> None:
        """Replace the methods of optimizers without DTensor support; reject coupled ones."""
        for optimizer in self.optimizers:
            if self.zero_stage > 1:
                shard_optimizer_steps(optimizer)
                for wrapper in self.wrapped_optimizers:
                    if wrapper.optimizer is optimizer:
                        copy_methods_to_wrapper(optimizer, wrapper)
            elif self.world_size > 1:
                check_members_not_coupled(optimizer)

    def on_train_start(self) -> None:
        """Decide whether gradients are freed before the next forward pass."""
        super().on_train_start()
        assert self.lightning_module is not None
        self.should_free_gradients = can_free_gradients_early(self.lightning_module.trainer)

    def on_train_end(self) -> None:
        """Broadcast the changed buffers, so that they are equal on all ranks."""
        self._sync_buffers()
        super().on_train_end()

    def _sync_buffers(self) -> None:
        if self.buffer_sync is not None:
            self.buffer_sync.before_step()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Free the gradients of the last optimizer step before the next forward pass."""
        super().on_train_batch_start(batch, batch_idx)
        assert self.lightning_module is not None
        if (
            self.should_free_gradients
            and batch_idx % self.lightning_module.trainer.accumulate_grad_batches == 0
        ):
            free_gradients(self.optimizers[0])

    def shard_batch(self, batch: Any) -> Any:
        """Return this rank's part of a batch: with `cp`, a part of each sequence."""
        return self.context_parallel.shard_batch(batch) if self.context_parallel else batch

    def training_step(self, batch: Any, *args: Any) -> Any:
        """Run the module's `training_step` on this rank's part of each sequence."""
        self._sync_buffers()
        result = self._training_step(batch, *args)
        if self.buffer_sync is not None:
            self.buffer_sync.after_step()
        return result

    def _training_step(self, batch: Any, *args: Any) -> Any:
        batch = self.context_parallel.shard_and_bind(batch) if self.context_parallel else batch
        with self.context_parallel.forbid_rng() if self.context_parallel else nullcontext():
            if self.pipeline is None:
                return self._run_gathered(super().training_step, batch, *args)
            self._required_parallel_module.set_requires_all_reduce(
                is_accumulating=self._is_accumulating()
            )
            return self.pipeline.step(batch, args, self.precision_plugin.train_step_context)

    def on_validation_start(self) -> None:
        """Broadcast rank 0's buffers: BatchNorm statistics differ after the last step."""
        super().on_validation_start()
        if self.buffer_sync is not None:
            self.buffer_sync.before_step()

    def validation_step(self, batch: Any, *args: Any) -> Any:
        """Run the module's `validation_step` on this rank's part of each sequence."""
        return self._evaluate(super().validation_step, batch, args)

    def test_step(self, batch: Any, *args: Any) -> Any:
        """Run the module's `test_step` on this rank's part of each sequence."""
        return self._evaluate(super().test_step, batch, args)

    def _evaluate(self, step: Callable[..., Any], batch: Any, args: tuple[Any, ...]) -> Any:
        if self.context_parallel is None:
            return self._run_gathered(step, batch, *args)
        try:
            return self._run_gathered(step, self.context_parallel.shard_and_bind(batch), *args)
        finally:
            self.context_parallel.restore_attention()

    def predict_step(self, *args: Any) -> Any:
        """Run the module's `predict_step`, with its small children gathered."""
        return self._run_gathered(super().predict_step, *args)

    def _run_gathered(self, step: Callable[..., Any], *args: Any) -> Any:
        """Run a step with the small children, and weights used outside of a forward, gathered."""
        unit = self._required_parallel_module.step_unit
        step = step if self.gather_on_use is None else self.gather_on_use.wrap_step(step)
        with raise_as_sharding_error(self.lightning_module, "in its step"):
            return step(*args) if unit is None else unit(step, *args)

    def backward_context(self) -> AbstractContextManager[None]:
        """Return a context that turns errors of sharded tensors into a one-line error."""
        return raise_as_sharding_error(self.lightning_module, "in the backward pass")

    def optimizer_step(self, *args: Any, **kwargs: Any) -> Any:
        """Step, then reshard units: gathered parameters have the values from before the step."""
        module = self.lightning_module
        if (
            self.gather_on_use is not None
            and module is not None
            and not module.automatic_optimization
        ):
            self.gather_on_use.write_back()
        result = super().optimizer_step(*args, **kwargs)
        if (self.gather_on_use is not None or self.gather_once) and module is not None:
            for unit in self._required_parallel_module.cached_units():
                unit.reshard()
        return result

    def pre_backward(self, closure_loss: Tensor) -> None:
        """Set whether this backward pass is the last of an optimizer step, for the reductions."""
        super().pre_backward(closure_loss)
        is_accumulating = self._is_accumulating()
        self._required_parallel_module.set_requires_all_reduce(is_accumulating=is_accumulating)
        if self.gather_on_use is not None:
            self.gather_on_use.begin_backward(closure_loss)
        if self.zero1_reducer is not None and not is_accumulating:
            # an overridden backward may run several backward passes
            overrides_backward = is_overridden("backward", self.lightning_module)
            self.zero1_reducer.begin_backward(None if overrides_backward else closure_loss)

    def post_backward(self, closure_loss: Tensor) -> None:
        """Reduce the gradients that FSDP2 does not reduce, once per optimizer step."""
        super().post_backward(closure_loss)
        if self.gather_on_use is not None:
            self.gather_on_use.end_backward()
        if self.context_parallel is not None:
            self.context_parallel.restore_attention()
        if not self._is_accumulating():
            if self.zero1_reducer is not None:
                self.zero1_reducer.finish_reduction()
            self._required_parallel_module.reduce_gradients()
            if self.pipeline is not None:
                self.pipeline.reduce_tied_gradients()

    def _is_accumulating(self) -> bool:
        module = self.lightning_module
        assert module is not None
        return module.automatic_optimization and should_accumulate(module.trainer)

    @property
    def _required_parallel_module(self) -> ParallelModule:
        assert self.parallel_module is not None
        return self.parallel_module

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Return the data-parallel size and rank, as arguments of a DistributedSampler."""
        assert self.mesh_layout is not None
        batch = self.mesh_layout.batch_mesh
        return {"num_replicas": batch.size(), "rank": batch.get_local_rank()}

    def reduce(self, tensor: Tensor | Any, group: Any = None, reduce_op: Any = "mean") -> Tensor:
        """Reduce over the data-parallel ranks, so that a sum counts each sample once."""
        if group is None and self.mesh_layout is not None:
            group = self.mesh_layout.data_mesh.get_group()
        return super().reduce(tensor, group, reduce_op)

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        """Return whether all processes (or any, if `all` is false) have a true decision.

        The vote is over all processes, not over the data-parallel ranks only.
        """
        votes = super().reduce(
            torch.tensor(int(decision), device=self.root_device), reduce_op="sum"
        )
        return int(votes) == self.world_size if all else int(votes) > 0

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return the weights: this rank's shards for a folder, else all weights on rank 0."""
        assert self.lightning_module is not None
        is_distributed = self.saves_sharded
        return state_dict.gather_model_state(
            self.lightning_module, is_distributed, self.stage_names
        )

    @property
    def stage_names(self) -> state_dict.StageNames | None:
        """Return the names of all parameters and the pipeline ranks; None without a pipeline."""
        pipeline = self.pipeline
        return (
            None
            if pipeline is None
            else state_dict.StageNames(pipeline.param_names, pipeline.group, pipeline.group_indices)
        )

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return the optimizer state, indexed by the order of `named_parameters()`.

        It is sharded or gathered on rank 0, as the weights are.
        """
        if isinstance(optimizer, LightningOptimizer):
            optimizer = optimizer.optimizer
        assert self.lightning_module is not None
        has_owners = bool(self.zero1_reducer and self.zero1_reducer.owner_of)
        has_owners |= any(self._has_full_state(p) for p in self.lightning_module.parameters())
        group = self.mesh_layout.data_mesh.get_group() if has_owners and self.mesh_layout else None
        gather_args = (self.saves_sharded, group, self.stage_names)
        return state_dict.gather_optimizer_state(
            self.lightning_module, optimizer, *gather_args, lambda p: bool(self._is_owner(p))
        )

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None = None
    ) -> None:
        """Write a single file, or a folder to which each rank writes its shards.

        Every rank calls it. It is a folder if `save_distributed_checkpoint` was set; then
        `storage_options` are not used.

        Raises:
            CheckpointError: a file cannot be written, or a value is not serializable.
        """
        if not self.saves_sharded:
            return super().save_checkpoint(checkpoint, filepath, storage_options)
        # hyperparameters in plain types, e.g. paths as text
        checkpoint = with_plain_hyperparameters(checkpoint)
        check_serializable(
            # SHARDED_KEYS: weights, optimizer states and averaged weights, which hold DTensors
            {k: v for k, v in checkpoint.items() if k not in sharded_index.SHARDED_KEYS}
        )
        path = Path(self.broadcast(filepath))  # rank 0's: a name with a time may differ
        if isinstance(self.checkpoint_io, AtomicCheckpointIO):
            # it removes only paths that it knows to be written by this run
            self.checkpoint_io.written_paths.add(with_resolved_parent(path))
        try:
            sharded.save_sharded(checkpoint, path)
        except OSError as error:
            raise write_error(path, error) from error

    def load_checkpoint(
        self, checkpoint_path: str | Path, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Load a checkpoint of any strategy and layout into the module and the optimizers.

        Every rank calls it, and copies its shards. `weights_only` is for a single file: a folder
        never holds more than tensors and plain values.

        Returns:
            the checkpoint; of a folder without optimizer states, which are loaded already.
        """
        path = Path(self.broadcast(checkpoint_path))
        module, optimizers = self.lightning_module, self.optimizers
        assert module is not None
        # the ranks divide the checksums; weights and states are views of the mapped file
        with collective_loading(mapped_sections=sharded_index.SHARDED_KEYS):
            if path.is_dir():
                require_valid_folder(path)
                state_dict.check_shapes(
                    # weight_shapes: shapes of the full net, with a pipeline of all stages
                    module,
                    self.weight_shapes(),
                    state_dict.stored_tensor_shapes(path),
                )
                return state_dict.load_sharded_state(
                    module,
                    optimizers,
                    path,
                    # whether this rank has optimizer state of a parameter, sharded or full
                    is_owned=self._has_state,
                    stages=self.stage_names,
                    is_unsharded=self._has_full_state,
                )
            checkpoint = self.checkpoint_io.load_checkpoint(path, weights_only=weights_only)
        state_dict.check_shapes(
            module, self.weight_shapes(), state_dict.tensor_shapes(checkpoint["state_dict"])
        )
        state_dict.load_full_state(
            module,
            optimizers,
            checkpoint,
            is_owned=self._has_state,
            stages=self.stage_names,
            is_unsharded=self._has_full_state,
        )
        return checkpoint

    def weight_shapes(self) -> state_dict.TensorShapes:
        """Return the shape of each weight of the full net, including other pipeline stages."""
        assert self.lightning_module is not None
        with self.pipeline.full_net() if self.pipeline else nullcontext():
            return state_dict.tensor_shapes(self.lightning_module.state_dict())

    def _has_state(self, parameter: Tensor) -> bool:
        """Whether this rank has optimizer state of a parameter, sharded or full."""
        return self._is_owner(parameter) is not False

    def _has_full_state(self, parameter: Tensor) -> bool:
        """Whether one rank keeps the full optimizer state of a sharded parameter."""
        return owns_parameter(self.optimizers, parameter) is not None

    def _is_owner(self, parameter: Tensor) -> bool | None:
        """Whether this rank owns a parameter; None if each rank has the state of its shard."""
        assert self.mesh_layout is not None
        owner_ranks = self.zero1_reducer.owner_of if self.zero1_reducer else {}
        if parameter in owner_ranks:
            return owner_ranks[parameter] == self.mesh_layout.data_mesh.get_local_rank()
        return owns_parameter(self.optimizers, parameter)


allow_any_precision(MeshStrategy)
