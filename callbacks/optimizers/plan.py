"""OptimizerPlan: any torch optimizer on any LightningModule, as a callback.

Lightning builds optimizers by calling the module's `configure_optimizers`, after the model has
been rewritten and sharded. The plan takes that one method over; everything after it (accumulation,
mixed precision, clipping, checkpoints) goes the usual way.
"""

import difflib
import inspect
from collections.abc import Callable, Iterable
from typing import Any, Literal

import lightning as L
from lightning.pytorch.callbacks import Callback
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from ravine.callbacks.optimizers.composite import Composite, needs_closure
from ravine.callbacks.optimizers.schedules import Schedule
from ravine.callbacks.patching import patch, unpatch

OptimizerFactory = Callable[[Iterable], Optimizer]
Decay = Literal["none", "matrices", "all"]


class OptimizerPlan(Callback):
    """Train with `optimizer` instead of the module's own.

    Example, in a script: `OptimizerPlan(partial(torch.optim.AdamW, lr=5e-3), decay="matrices")`;
    on the command line: `--trainer.callbacks+=OptimizerPlan --trainer.callbacks.optimizer=AdamW
    --trainer.callbacks.optimizer.lr=5e-3`.

    Args:
        optimizer: an optimizer class, or a function of the parameters that makes one.
        decay: which tensors get the optimizer's weight decay; a matrix has two axes or more.
        schedule: what multiplies the learning rate at each optimizer step.
    """

    def __init__(
        self,
        optimizer: OptimizerFactory,
        decay: Decay = "matrices",
        schedule: Schedule | None = None,
    ) -> None:
        """Choose the optimizer; it is built when the parameters exist."""
        self.optimizer = optimizer
        self.decay: Decay = decay
        self.schedule = schedule
        self._length = float("inf")  # optimizer steps of the run, once known
        self._names: list[str] = []
        self._saved_names: list[str] = []

    @property
    def state_key(self) -> str:
        """The same for every kind of plan: a resumed run is compared with what was saved."""
        return "OptimizerPlan"

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Take over `configure_optimizers` for one fit."""
        if stage != "fit":
            return
        if not pl_module.automatic_optimization:
            raise ValueError(
                f"{type(pl_module).__name__} steps its own optimizers (manual optimization), so "
                f"{type(self).__name__} has nothing to replace; leave it out of the callbacks"
            )
        self._length = float("inf")
        if trainer.max_steps >= 0:
            self._know_length(trainer.max_steps)

        def configure_optimizers(module: L.LightningModule) -> dict[str, Any]:
            return self._configure(trainer, module)

        patch(trainer, pl_module, "configure_optimizers", configure_optimizers, self)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Give `configure_optimizers` back."""
        if stage == "fit":
            unpatch(pl_module, "configure_optimizers", self)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Learn the run's length from the loaders, which exist only now."""
        if trainer.max_steps < 0:
            self._know_length(trainer.estimated_stepping_batches)

    def state_dict(self) -> dict[str, Any]:
        """The optimizers' names, to refuse a resume that would misread their state."""
        return {"optimizers": list(self._names)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Compare at once where optimizers exist already (sharded), else when they are built."""
        self._saved_names = state_dict["optimizers"]
        self._compare()

    def _know_length(self, length: float) -> None:
        if self.schedule is not None:
            self.schedule.check(length)
        self._length = length

    def _configure(self, trainer: L.Trainer, module: L.LightningModule) -> dict[str, Any]:
        composite = Composite([self._build(module)])
        self._names = [type(member).__name__ for member in composite.members]
        self._compare()
        self._refuse_closure(trainer, composite)
        if self.schedule is None:
            return {"optimizer": composite}
        schedule = self.schedule
        scheduler = LambdaLR(composite, lambda step: schedule.factor(step, self._length))
        return {
            "optimizer": composite,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def _build(self, module: L.LightningModule) -> Optimizer:
        trainable = [p for p in module.parameters() if p.requires_grad]
        if not trainable:
            raise ValueError(
                f"{type(module).__name__} has no trainable parameter: nothing to optimize"
            )
        optimizer = make(self.optimizer, [{"params": trainable}])
        split_decay(optimizer, self.decay)
        return optimizer

    def _compare(self) -> None:
        if self._saved_names and self._names and self._saved_names != self._names:
            raise ValueError(
                f"the checkpoint was trained with {' + '.join(self._saved_names)}, this run uses "
                f"{' + '.join(self._names)}, whose state is another; resume with the former, or "
                "start a new run from the weights alone"
            )
        if self._names:
            self._saved_names = []

    def _refuse_closure(self, trainer: L.Trainer, composite: Composite) -> None:
        name = next((type(m).__name__ for m in composite.members if needs_closure(m)), None)
        if name is None:
            return
        obstacles = {
            "other optimizers beside it": len(composite.members) > 1,
            "gradient accumulation": trainer.accumulate_grad_batches > 1,
            "a gradient scaler": getattr(trainer.precision_plugin, "scaler", None) is not None,
            "several ranks": trainer.world_size > 1,
        }
        if found := [obstacle for obstacle, there in obstacles.items() if there]:
            raise ValueError(
                f"{name} computes the loss several times a step, which is not possible with "
                f"{', '.join(found)}; leave that out, or take an optimizer such as AdamW"
            )


def make(factory: OptimizerFactory, groups: list[dict[str, Any]]) -> Optimizer:
    """Call the factory; an argument that its class does not know ends in the nearest valid ones."""
    try:
        return factory(groups)
    except TypeError as error:
        function = getattr(factory, "func", factory)  # what a functools.partial holds
        given = getattr(factory, "keywords", {})
        allowed = list(inspect.signature(function).parameters)[1:]
        wrong = next((word for word in given if word not in allowed), None)
        if wrong is None or "unexpected keyword" not in str(error):
            raise
        nearest = difflib.get_close_matches(wrong, allowed, n=3, cutoff=0.3) or allowed
        raise ValueError(
            f"{function.__name__} has no argument {wrong!r}; nearest: {', '.join(nearest)}"
        ) from None


def split_decay(optimizer: Optimizer, decay: Decay) -> None:
    """Leave weight decay to the tensors that it is meant for; each group becomes at most two."""
    if "weight_decay" not in optimizer.defaults or decay == "all":
        return
    for group in list(optimizer.param_groups):
        spared = [p for p in group["params"] if decay == "none" or p.ndim < 2]
        if len(spared) == len(group["params"]):
            group["weight_decay"] = 0.0
        elif spared:
            group["params"] = [p for p in group["params"] if p.ndim >= 2]
            settings = {k: v for k, v in group.items() if k != "params"}
            optimizer.add_param_group({**settings, "params": spared, "weight_decay": 0.0})
