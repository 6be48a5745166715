"""TaskModule: what every task shares — its net is built in one place, late, and from plain numbers.

Late, because callbacks and strategies act between `__init__` and the first step: the data tell the
net its sizes (`adopt`), transforms rewrite it, the strategy shards it. None of that is seen here.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves


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
        datamodule = getattr(self.trainer, "datamodule", None)
        if datamodule is not None:
            self.adopt(datamodule)

    def configure_model(self) -> None:
        """Build the net unless it is there; callbacks and strategies do the rest from outside."""
        if self.net is None:
            self.net = self.build()

    def forward(self, *args: Any) -> Any:
        """Apply the net."""
        if self.net is None:
            raise RuntimeError(
                f"{type(self).__name__} has no net yet: call configure_model() first"
            )
        return self.net(*args)

    def configure_optimizers(self) -> Any:
        """AdamW on everything trainable, so that a task also runs with no optimizer callback."""
        return torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), lr=self.lr)

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
            raise ValueError(
                f"the net of the checkpoint was changed by {' and '.join(names)}; allowed: a "
                f"trainer with the same; type --trainer.callbacks+={names[0]}, or in a script "
                "ravine.cli.trained.load(path)"
            )

    @classmethod
    def _check_task(cls, checkpoint: dict[str, Any]) -> None:
        task = checkpoint.get("task", "another program")
        if task not in (c.__name__ for c in cls.__mro__):
            raise ValueError(
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
        return cls.restored(torch.load(path, map_location="cpu", weights_only=True), change)

    @classmethod
    def restored(
        cls,
        checkpoint: dict[str, Any],
        change: Callable[[Self, dict[str, Any]], None] | None = None,
    ) -> Self:
        """The same from a checkpoint that was read already."""
        cls._check_task(checkpoint)
        arguments = checkpoint.get("hyper_parameters", {})
        model = cls(**{k: v for k, v in arguments.items() if not k.startswith("_")})
        model.on_load_checkpoint(checkpoint)
        model.configure_model()
        if change is not None:
            change(model, checkpoint)
        model._check_changes(checkpoint)
        model.load_state_dict(checkpoint["state_dict"])
        return model.eval()
