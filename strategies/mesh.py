"""MeshStrategy: one strategy for every way to spread a net, and any LightningModule will do.

The processes form a mesh with named axes (layout.py). Ranks along `dp_shard` see different data and
keep a part of every parameter each (ZeRO-3); ranks along `tp` see the same data and keep a part of
each matrix.

    Trainer(strategy=MeshStrategy(), devices=4)        # --trainer.strategy zero3
    Trainer(strategy=MeshStrategy(tp=2), devices=4)    # two by two
"""

import atexit
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only

from .layout import Layout, lay_out, resolve
from .parallelize import Spread, copy_from_rank_zero, is_parallel, parallelize
from .recompute import Mode
from .zero1 import share_steps


@atexit.register
def leave() -> None:
    """End the job before the interpreter ends: gloo's threads may abort the process otherwise.

    For every strategy; Lightning does it for NCCL alone.
    """
    if dist.is_initialized():
        dist.destroy_process_group()


class MeshStrategy(ModelParallelStrategy):
    """Shard parameters, gradients and optimizer state, and split matrices, from outside.

    Args:
        dp_shard: ranks that share the batch and each parameter; -1: all that the others leave.
        dp_replicate: copies of such a group; between them only gradients travel (HSDP).
        tp: ranks that share each matrix of the net's `tp_plan`; -1: all that the others leave.
        sequence_parallel: cut the activations between the split matrices along time, over `tp`.
        zero: what the ranks of `dp_shard` share: 1 the optimizer's state, 2 gradients as well, 3
            parameters as well. Less is sent at 2 than at 3, more kept.
        recompute: keep fewer activations, and compute them again when going backward.
        save_distributed_checkpoint: a folder with one file a rank instead of a single file, which
            one process can read.
    """

    def __init__(
        self,
        dp_shard: int = -1,
        dp_replicate: int = 1,
        tp: int = 1,
        sequence_parallel: bool = False,
        zero: Literal[1, 2, 3] = 3,
        recompute: Mode = "none",
        save_distributed_checkpoint: bool = False,
    ) -> None:
        """Remember the degrees; the number of processes is known to the trainer only."""
        super().__init__(save_distributed_checkpoint=save_distributed_checkpoint)
        self.degrees = {"dp_shard": dp_shard, "dp_replicate": dp_replicate, "tp": tp}
        if zero not in (1, 2, 3):
            raise ValueError(f"zero is {zero}; allowed: 1, 2, 3; type --trainer.strategy.zero=3")
        self.zero, self.sequence_parallel = zero, sequence_parallel
        self.recompute: Mode = recompute
        self.layout: Layout | None = None
        self.spread: Spread | None = None
        self.owner: dict[Tensor, int] = {}  # with ZeRO-1, who keeps whose state

    def resolved_degrees(self) -> dict[str, int]:
        """The size of each axis with -1 filled in, or an error that says what would fit."""
        return resolve(self.degrees, self.num_processes * self.num_nodes)

    def _configure_launcher(self) -> None:
        degrees = self.resolved_degrees()  # the trainer is being made: fail before a process starts
        if self.sequence_parallel and degrees["tp"] == 1:
            raise ValueError(
                "sequence_parallel cuts along tp, and tp is 1; type --trainer.strategy.tp=2"
            )
        super()._configure_launcher()

    def setup_environment(self) -> None:
        """Join the job and lay out the mesh."""
        self._setup_distributed()
        self.layout = lay_out(self.resolved_degrees(), self.zero, self.root_device)
        self._device_mesh = self.layout.named
        assert self.lightning_module is not None
        self.lightning_module._device_mesh = self._device_mesh  # type: ignore[assignment]
        if self.layout.tp.size() > 1:  # ranks that compute one activation draw one dropout for it
            torch.manual_seed(self.broadcast(torch.initial_seed()))

    def parallelize(self, module: nn.Module) -> Spread:
        """Spread the module over the mesh unless it has done so itself."""
        assert self.layout is not None
        copy_from_rank_zero(module, self.root_device)
        if is_parallel(module):
            return Spread(module, self.layout)
        how = (self.zero, self.sequence_parallel, self.recompute)
        return parallelize(module, self.layout, *how)

    def setup(self, trainer: L.Trainer) -> None:
        """Parallelise after `configure_model`, before weights are restored and optimizers made."""
        module = self.lightning_module
        assert module is not None
        if self.sequence_parallel and not module.automatic_optimization:
            raise ValueError(
                f"{type(module).__name__} steps its own optimizers (manual optimization), which"
                " sequence_parallel cannot follow; type --trainer.strategy tp"
            )
        self.spread = self.parallelize(module)
        own = is_overridden("configure_model", module)
        if not own:  # Lightning insists that the module has one, to shard itself there
            module.configure_model = lambda: None
        super().setup(trainer)
        if not own:
            del module.configure_model
        whole = self.spread.whole()
        if trainer.gradient_clip_val and whole:
            raise ValueError(
                f"gradient_clip_val cannot mix {whole[0]}, which stays whole, with sharded"
                " parameters: use the GradientClipping callback in its place"
            )

    def setup_optimizers(self, trainer: L.Trainer) -> None:
        """Make the optimizers; with ZeRO-1 each rank steps its share of the parameters."""
        super().setup_optimizers(trainer)
        assert self.layout is not None
        self.owner = {}
        if self.zero == 1 and self.layout.data.size() > 1:
            for optimizer in self.optimizers:
                self.owner |= share_steps(optimizer, self.layout.data.get_group())

    def pre_backward(self, closure_loss: Tensor) -> None:
        """Say whether this backward pass is the last of an optimizer step."""
        super().pre_backward(closure_loss)
        self._spread.accumulate(more=self._accumulates())

    def post_backward(self, closure_loss: Tensor) -> None:
        """Reduce what no shard does, once an optimizer step."""
        super().post_backward(closure_loss)
        if not self._accumulates():
            self._spread.settle()

    def _accumulates(self) -> bool:
        module = self.lightning_module
        assert module is not None
        return module.automatic_optimization and module.trainer.fit_loop._should_accumulate()

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

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The whole state on rank 0, parameters numbered by their place in `named_parameters()`."""
        if self._save_distributed_checkpoint:
            return super().optimizer_state(optimizer)
        if isinstance(optimizer, LightningOptimizer):
            optimizer = optimizer._optimizer
        assert self.lightning_module is not None
        place = {p: i for i, p in enumerate(self.lightning_module.parameters())}
        saved = optimizer.state_dict()
        ids = {}
        for group, ours in zip(saved["param_groups"], optimizer.param_groups, strict=True):
            ids |= {i: place[p] for i, p in zip(group["params"], ours["params"], strict=True)}
        state = {
            i: tree_map_only(Tensor, self._whole, state) for i, state in saved["state"].items()
        }
        state = self._gathered(state)
        saved["state"] = {ids[i]: state[i] for i in sorted(state)}
        for group in saved["param_groups"]:
            group["params"] = [ids[i] for i in group["params"]]
        return saved if self.is_global_zero else {}

    def _whole(self, tensor: Tensor) -> Tensor:
        tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        return tensor.cpu() if self.is_global_zero or self.owner else tensor.new_empty(0)

    def _gathered(self, state: dict[int, Any]) -> dict[int, Any]:
        """With ZeRO-1, the states of all owners."""
        if not self.owner or self.layout is None:
            return state
        parts: list[Any] = [None] * self.layout.data.size()
        dist.all_gather_object(parts, state, group=self.layout.data.get_group())
        return {i: values for part in parts for i, values in part.items()}

    def load_checkpoint(
        self, checkpoint_path: str | Path, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a single file, of any strategy, or a folder; weights and optimizers are set here."""
        path = Path(self.broadcast(checkpoint_path))
        if path.is_dir():
            return super().load_checkpoint(path, weights_only)
        checkpoint = self.checkpoint_io.load_checkpoint(path, weights_only=weights_only)
        assert self.model is not None
        assert self.lightning_module is not None
        strict = self.lightning_module.strict_loading
        options = StateDictOptions(full_state_dict=True, strict=strict)
        set_model_state_dict(self.model, checkpoint["state_dict"], options=options)
        states = checkpoint.get("optimizer_states", []) if self.optimizers else []
        for optimizer, state in zip(self.optimizers, states, strict=True):
            _load_optimizer(optimizer, state, self._owned)
        return checkpoint

    def _owned(self, parameter: Tensor) -> bool:
        assert self.layout is not None
        rank = self.layout.data.get_local_rank()
        return self.owner.get(parameter, rank) == rank


def _load_optimizer(
    optimizer: Optimizer, saved: dict[str, Any], owned: Callable[[Tensor], bool]
) -> None:
    """Load whole state tensors; those shaped like their parameter are spread like it."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    ids = [i for group in saved["param_groups"] for i in group["params"]]

    def spread(parameter: Tensor, value: Any) -> Any:
        alike = isinstance(value, Tensor) and value.shape == parameter.shape
        if not alike or not isinstance(parameter, DTensor):
            return value
        value = value.to(parameter.device)
        mesh, placements = parameter.device_mesh, parameter.placements
        return distribute_tensor(value, mesh, placements, src_data_rank=None)  # all ranks have it

    state = {
        i: {key: spread(p, value) for key, value in saved["state"].get(i, {}).items()}
        for i, p in zip(ids, parameters, strict=False)
        if owned(p)
    }
    state = {i: values for i, values in state.items() if values}
    optimizer.load_state_dict({**saved, "state": state})
