"""TaskModule: what every task shares — its net is built in one place, late, and from plain numbers.

Late, because callbacks and strategies act between `__init__` and the first step: the data tell the
net its sizes (`adopt`), transforms rewrite it, the strategy shards it. None of that is seen here.
"""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import lightning as L
import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ravine.errors import RunError, UsageError
from ravine.lightning_compat import attached_trainer
from ravine.strategies.checkpoint_io import AtomicCheckpointIO

from .initial_values import InitialValues

FUSED = ("cpu", "cuda")  # devices with a fused kernel of AdamW in every supported torch


class _Bounded(TorchDispatchMode):
    """Build on the meta device, and stop if a net becomes far larger than its weights.

    The sizes come from a checkpoint, which may hold a width of 10**9 and four numbers.
    """

    def __init__(self, state: dict[str, Any]) -> None:
        super().__init__()
        self.over = False
        sizes = [value.numel() for value in state.values() if isinstance(value, Tensor)]
        self.tensors, self.numbers = 100 * len(sizes) + 10_000, 16 * sum(sizes) + 2**24
        self.device = torch.device("meta")

    def __enter__(self) -> Self:
        self.device.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.device.__exit__(*error)

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        self.tensors -= 1
        if isinstance(result, Tensor) and not result._is_view():
            self.numbers -= result.numel()
        self.over |= self.tensors < 0 or self.numbers < 0
        self.check()
        return result

    def check(self) -> None:
        """Refuse a net that has grown too far."""
        if self.over:
            raise UsageError(
                "the hyperparameters of the checkpoint make a net far larger than its weights; it "
                "was changed: choose another checkpoint"
            )


def refuse_early_copies(callbacks: list[L.Callback]) -> None:
    """ValueError for a callback that has copied a module whose net is not built yet."""
    for each in callbacks:
        if isinstance(each, WeightAveraging | StochasticWeightAveraging):
            name = type(each).__name__
            raise UsageError(
                f"{name} copies the network in setup, before it is built, and would average "
                f"nothing; take {name} out of trainer.callbacks and use ravine.callbacks.EMA"
            )


def _is_ours(method: Any) -> bool:
    """Whether this package defines a method: another's may compute with values."""
    return method.__module__.partition(".")[0] == __name__.partition(".")[0]


class TaskModule(L.LightningModule):
    """A LightningModule whose net is made by `build()`, once, when the sizes are known.

    A task of your own needs `build` and `training_step`:

        class Line(TaskModule):
            def build(self): return nn.Linear(1, 1)
            def training_step(self, batch, index): return F.mse_loss(self(batch[0]), batch[1])
    """

    unit: str = "samples"  # what `count` counts: the unit of throughput
    headline: tuple[str, ...] = ()  # metrics to show in the place of a loss that means nothing
    lr: float = 1e-3  # of the default optimizer only; a plan callback brings its own

    def __init__(self) -> None:
        """Start without a net."""
        super().__init__()
        self.net: nn.Module | None = None  # not a class attribute: it would hide the submodule

    def build(self) -> nn.Module:
        """Make the plain single-device net."""
        raise NotImplementedError(f"{type(self).__name__} needs a build() that returns its net")

    def adopt(self, datamodule: Any) -> None:
        """Take from the data what the net needs (vocabulary, number of features) before `build`."""

    def setup(self, stage: str) -> None:
        """Let the task look at the data, whose own `setup` has run by now."""
        if self.net is None:
            refuse_early_copies(self.trainer.callbacks)  # type: ignore[attr-defined]
        datamodule = getattr(self.trainer, "datamodule", None)
        if datamodule is not None:
            self.adopt(datamodule)

    def configure_model(self) -> None:
        """Build the net unless it is there; callbacks and strategies do the rest from outside."""
        if self.net is not None:
            return
        device = torch.get_default_device()
        known = _is_ours(type(self).build)
        values = InitialValues.of(self.build) if known and device.type != "meta" else None
        if values is None:
            self.net = self.build()
        elif self._may_wait():
            self.net = values.net
            self.__dict__["initial_values"] = (
                values  # a strategy draws them once it has cut the net
            )
        else:
            self.net = values.materialize(device)

    def _may_wait(self) -> bool:
        """Whether nothing here needs the values of the parameters before the strategy is set up.

        A callback that does gives the parameters their values before it changes the net.
        """
        return bool(self.__dict__.get("strategy_draws_values")) and _is_ours(
            type(self).configure_model
        )

    def forward(self, *args: Any) -> Any:
        """Apply the net."""
        if self.net is None:
            raise RunError(f"{type(self).__name__} has no net yet: call configure_model() first")
        return self.net(*args)

    def configure_optimizers(self) -> Any:
        """AdamW on everything trainable, so that a task also runs with no optimizer callback.

        Its fused kernel keeps no temporary tensors: one step of torch's loop over parameters has
        two of the size of the largest parameter. Values may differ in the last bit. Lightning's
        gradient scaler refuses to clip with it, and half precisions round in another way there.
        """
        parameters = [p for p in self.parameters() if p.requires_grad]
        if any(p.dtype == torch.float16 for p in parameters):
            raise UsageError(
                "AdamW's eps of 1e-08 is 0 in float16, so that weights turn to NaN (0 / 0); "
                "allowed: 16-mixed, bf16-mixed, bf16-true, 32-true; type "
                "--trainer.precision=16-mixed, or OptimizerPlan(partial(AdamW, eps=1e-4))"
            )
        exact = all(p.dtype in (torch.float32, torch.float64) for p in parameters)
        trainer = attached_trainer(self)
        scaled = getattr(trainer.precision_plugin, "scaler", None) if trainer else None
        fused = exact and scaled is None and all(p.device.type in FUSED for p in parameters)
        return torch.optim.AdamW(parameters, lr=self.lr, fused=fused or None)

    def count(self, batch: Any) -> int:
        """Units in a batch: here the rows of its first tensor."""
        return next(len(leaf) for leaf in tree_leaves(batch) if isinstance(leaf, Tensor))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Say whose weights these are."""
        checkpoint["task"] = type(self).__name__

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse another task's weights in words, before the tensors disagree in numbers."""
        self._check_task(checkpoint)
        if self.net is not None:  # built, so whatever changes it has changed it by now
            self._check_changes(checkpoint)

    def _check_changes(self, checkpoint: dict[str, Any]) -> None:
        done = getattr(self.__dict__.get("_transforms"), "applied", {})
        phases = {"quantize", "adapt"} & checkpoint.get("transforms", {}).keys() - done.keys()
        if phases:
            names = [checkpoint["transforms"][phase]["class"] for phase in sorted(phases)]
            raise UsageError(
                f"the net of the checkpoint was changed by {' and '.join(names)}; allowed: a "
                f"trainer with the same; type --trainer.callbacks+={names[0]}, or in a script "
                "ravine.cli.trained.load(path)"
            )

    @classmethod
    def _check_task(cls, checkpoint: dict[str, Any]) -> None:
        task = checkpoint.get("task", "another program")
        if task not in (c.__name__ for c in cls.__mro__):
            raise UsageError(
                f"the checkpoint was written by {task}, the model is {cls.__name__}; "
                f"allowed: a checkpoint of {cls.__name__}; type --model={task}"
            )

    @classmethod
    def load(
        cls, path: str | Path, change: Callable[[Self, dict[str, Any]], None] | None = None
    ) -> Self:
        """Rebuild a trained task from a checkpoint alone, on the CPU, ready to use.

        model = LanguageModel.load("runs/shakespeare/quick/version_0/checkpoints/step=001000.ckpt")
        print(model.generate("ROMEO:", max_new_tokens=200))

        Args:
            path: the file.
            change: does to the built net what was done to that of the checkpoint; see
                `ravine.cli.trained.load`, which loads adapters and quantized weights.
        """
        return cls.restored(AtomicCheckpointIO().load_checkpoint(path), change)

    @classmethod
    def restored(
        cls,
        checkpoint: dict[str, Any],
        change: Callable[[Self, dict[str, Any]], None] | None = None,
    ) -> Self:
        """The same from a checkpoint that was read already.

        Raises:
            ValueError: if its hyperparameters, or its weights, make no model of this class.
        """
        if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("state_dict"), dict):
            raise UsageError(
                f"this is no checkpoint of a {cls.__name__}: it has no state_dict; choose a file "
                "that a trainer has written"
            )
        cls._check_task(checkpoint)
        try:
            arguments = checkpoint.get("hyper_parameters", {})
            arguments = {k: v for k, v in arguments.items() if not k.startswith("_")}
            with suppress(Exception), _Bounded(checkpoint["state_dict"]) as sizes:
                cls._built(arguments, checkpoint)  # an error of it is raised again below
            sizes.check()
            model = cls._built(arguments, checkpoint)
            if change is not None:
                change(model, checkpoint)
            model._check_changes(checkpoint)
            model.load_state_dict(checkpoint["state_dict"])
        except (FileNotFoundError, ValueError):  # already a sentence
            raise
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError) as error:
            text = " ".join(str(error).split())[:160] or type(error).__name__
            raise UsageError(
                f"the checkpoint makes no {cls.__name__}: {type(error).__name__}: {text}; it was "
                "changed, or written by another version: choose another checkpoint"
            ) from error
        return model.eval()

    @classmethod
    def _built(cls, arguments: dict[str, Any], checkpoint: dict[str, Any]) -> Self:
        model = cls(**arguments)
        model.on_load_checkpoint(checkpoint)
        model.configure_model()
        return model
