"""Private parts of Lightning's strategies and of its optimizer wrappers."""

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, cast, get_args

from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from .versions import private, private_import, set_private

_Base: Any = object  # a mixin: a subclass of Strategy would be offered on the command line
if TYPE_CHECKING:
    _Base = ModelParallelStrategy


class ModelParallelAccess(_Base):
    """Public names for the parts of ModelParallelStrategy that a strategy with its own mesh sets.

    class MeshStrategy(ModelParallelAccess, ModelParallelStrategy): ...

    Reason: Lightning's strategy has a mesh of two axes, data parallel and tensor parallel. It
    creates the mesh in `setup_environment` and leaves all sharding to the module.

    Upstream: pytorch/strategies/model_parallel.py
    Seen on: 2.5.6 to 2.6.6
    """

    def _configure_launcher(self) -> None:
        self.before_launch()
        private(super(), "_configure_launcher")()

    def before_launch(self) -> None:
        """Do nothing; called while the trainer is created, before a process is started."""

    def join_processes(self) -> None:
        """Create the process group of this job."""
        private(self, "_setup_distributed")()

    def set_device_mesh(self, mesh: DeviceMesh) -> None:
        """Set the mesh of the strategy and of its module."""
        set_private(self, "_device_mesh", mesh)
        set_private(self.lightning_module, "_device_mesh", mesh)

    @property
    def synchronizes_batchnorm(self) -> bool:
        """Whether the trainer was created with `sync_batchnorm=True`."""
        return private(self, "_layer_sync") is not None

    @property
    def saves_sharded(self) -> bool:
        """Whether each rank writes its shards of a checkpoint into a common folder."""
        return private(self, "_save_distributed_checkpoint")

    @property
    def wrapped_optimizers(self) -> list[LightningOptimizer]:
        """The wrapped optimizers, which `module.optimizers()` returns."""
        return private(self, "_lightning_optimizers")

    def backward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Run the backward pass within `around_backward`."""
        with self.around_backward():
            return super().backward(*args, **kwargs)

    def around_backward(self) -> AbstractContextManager[None]:
        """Return the context of a backward pass; the fast loop enters it directly."""
        return nullcontext()


def saves_sharded(strategy: Any) -> bool:
    """Return whether a strategy writes a checkpoint as a folder with a file from each rank.

    Reason: the argument `save_distributed_checkpoint` is kept under a private name only.

    Upstream: pytorch/strategies/model_parallel.py
    Seen on: 2.5.6 to 2.6.6
    """
    return bool(getattr(strategy, "_save_distributed_checkpoint", False))


def set_saves_sharded(strategy: Any, sharded: bool) -> None:
    """Set whether a strategy writes its next checkpoints as folders or as single files.

    Reason: as for `saves_sharded`; a benchmark compares both in one run.

    Upstream: pytorch/strategies/model_parallel.py
    Seen on: 2.5.6 to 2.6.6
    """
    set_private(strategy, "_save_distributed_checkpoint", sharded)


def ddp_options(strategy: Any) -> dict[str, Any]:
    """Return the options that a DDPStrategy passes to DistributedDataParallel.

    Reason: they are kept under a private name only. The dictionary may be changed before `setup`.

    Upstream: pytorch/strategies/ddp.py
    Seen on: 2.5.6 to 2.6.6
    """
    return private(strategy, "_ddp_kwargs")


def start_method(strategy: Any) -> str:
    """Return how a strategy starts processes: popen, fork, spawn, ...; empty if it starts none.

    Reason: a trainer that would be pickled for new processes is refused before they start.

    Upstream: pytorch/strategies/ddp.py
    Seen on: 2.5.6 to 2.6.6
    """
    return getattr(strategy, "_start_method", "")


def precision_names() -> list[str]:
    """Return the values that `Trainer(precision=...)` accepts, without their short forms.

    Reason: Lightning defines them as a type hint with a private name.

    Upstream: fabric/plugins/precision/precision.py
    Seen on: 2.5.6 to 2.6.6
    """
    hint = private_import("lightning.fabric.plugins.precision.precision", "_PRECISION_INPUT_STR")
    return [str(name) for name in get_args(hint)]


def allow_any_precision(kind: type) -> None:
    """Allow the precisions `64-true` and `16-mixed` with a strategy of class ``kind``.

    Reason: Lightning refuses them for an instance of ModelParallelStrategy, but not for a strategy
    that is given by name: during the check, the instance is replaced by its class name. Called
    once, where the class is defined.

    Upstream: pytorch/trainer/connectors/accelerator_connector.py
    Seen on: 2.5.6 to 2.6.6
    """
    # imports a private class of Lightning; `private` reads a private attribute
    connector = private_import(
        "lightning.pytorch.trainer.connectors.accelerator_connector", "_AcceleratorConnector"
    )
    original_method = private(connector, "_validate_precision_choice")

    @functools.wraps(original_method)
    def validate_with_name(self: Any) -> None:
        strategy = private(self, "_strategy_flag")  # the trainer's argument `strategy`
        if isinstance(strategy, kind):
            # the check then takes it for a strategy that is given by name
            self._strategy_flag = kind.__name__
        try:
            original_method(self)
        finally:
            self._strategy_flag = strategy

    cast(Any, connector)._validate_precision_choice = validate_with_name
