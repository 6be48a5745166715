"""MeshStrategy: one strategy for every way to spread a net, and any LightningModule will do.

The processes form a mesh with named axes. Ranks along `dp_shard` see different data and keep a part
of every parameter each (ZeRO-3); ranks along `tp` see the same data and keep a part of each matrix.

    Trainer(strategy=MeshStrategy(), devices=4)        # --trainer.strategy zero3
    Trainer(strategy=MeshStrategy(tp=2), devices=4)    # two by two
"""

import atexit
from pathlib import Path
from typing import Any

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

from .parallelize import average_whole, copy_from_rank_zero, is_parallel, parallelize

DP, TP = "data_parallel", "tensor_parallel"  # Lightning's names, known to modules of others


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
        dp_shard: ranks that share the batch and each parameter; -1: all that `tp` leaves.
        tp: ranks that share each matrix of the net's `tp_plan`; -1: all that `dp_shard` leaves.
        save_distributed_checkpoint: a folder with one file a rank instead of a single file, which
            one process can read.
    """

    def __init__(
        self, dp_shard: int = -1, tp: int = 1, save_distributed_checkpoint: bool = False
    ) -> None:
        """Remember the degrees; the number of processes is known to the trainer only."""
        super().__init__(save_distributed_checkpoint=save_distributed_checkpoint)
        self.degrees = {"dp_shard": dp_shard, "tp": tp}

    def resolved_degrees(self) -> dict[str, int]:
        """The size of each axis with -1 filled in, or an error that says what would fit."""
        world, given = self.num_processes * self.num_nodes, dict(self.degrees)
        asked = f"MeshStrategy({', '.join(f'{axis}={size}' for axis, size in given.items())})"
        free = [axis for axis, size in given.items() if size == -1]
        if len(free) > 1 or any(size < 1 and size != -1 for size in given.values()):
            raise ValueError(
                f"{asked}: a degree is 1 or more, and one may be -1 (what the others leave); type"
                " --trainer.strategy.dp_shard=-1 --trainer.strategy.tp=1"
            )
        product = 1
        for axis, size in given.items():
            product *= 1 if axis in free else size
        if free and world % product == 0:
            return given | {free[0]: world // product}
        if product != world:
            raise ValueError(
                f"{asked} needs {'a multiple of ' if free else ''}{product} processes; there are"
                f" {world} (devices x nodes); type --trainer.devices={product}"
            )
        return given

    def _configure_launcher(self) -> None:
        self.resolved_degrees()  # the trainer is being made: fail before a process is started
        super()._configure_launcher()

    def setup_environment(self) -> None:
        """Join the job and lay out the mesh."""
        degrees = self.resolved_degrees()
        self._data_parallel_size, self._tensor_parallel_size = degrees["dp_shard"], degrees["tp"]
        super().setup_environment()
        if degrees["tp"] > 1:  # ranks that compute one activation draw the same dropout for it
            torch.manual_seed(self.broadcast(torch.initial_seed()))

    def parallelize(self, module: nn.Module) -> None:
        """Spread the module over the mesh unless it has done so itself."""
        copy_from_rank_zero(module, self.root_device)
        if not is_parallel(module):
            parallelize(module, self.device_mesh[DP], self.device_mesh[TP])

    def setup(self, trainer: L.Trainer) -> None:
        """Parallelise after `configure_model`, before weights are restored and optimizers made."""
        module = self.lightning_module
        assert module is not None
        self.parallelize(module)
        own = is_overridden("configure_model", module)
        if not own:  # Lightning insists that the module has one, to shard itself there
            module.configure_model = lambda: None
        super().setup(trainer)
        if not own:
            del module.configure_model
        whole = average_whole(module, self.device_mesh[DP])
        if trainer.gradient_clip_val and whole:
            raise ValueError(
                f"gradient_clip_val cannot mix {whole[0]}, which stays whole, with sharded"
                " parameters: use the GradientClipping callback in its place"
            )

    def reduce(self, tensor: Tensor | Any, group: Any = None, reduce_op: Any = "mean") -> Tensor:
        """Reduce over the ranks that see different data, so that a sum counts a sample once."""
        group = self.device_mesh[DP].get_group() if group is None else group
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
        saved["state"] = {
            ids[i]: tree_map_only(Tensor, self._whole, state) for i, state in saved["state"].items()
        }
        for group in saved["param_groups"]:
            group["params"] = [ids[i] for i in group["params"]]
        return saved if self.is_global_zero else {}

    def _whole(self, tensor: Tensor) -> Tensor:
        tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        return tensor.cpu() if self.is_global_zero else tensor.new_empty(0)

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
            _load_optimizer(optimizer, state)
        return checkpoint


def _load_optimizer(optimizer: Optimizer, saved: dict[str, Any]) -> None:
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
    }
    state = {i: values for i, values in state.items() if values}
    optimizer.load_state_dict({**saved, "state": state})
