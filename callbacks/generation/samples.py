"""Samples: what a generative model makes, looked at after each validation."""

import inspect
from typing import Any

import lightning as L

from ravine.errors import UsageError, suggest_names

from ..base import refuse_without_validation
from ..checks.run_checks import before_training
from ..monitoring.media_logging import run_folder, show


class Samples(L.Callback):
    """Calls the task's `generate` at each validation; the last text is printed at the end.

    Trainer(callbacks=[Samples({"prompt": "ROMEO:", "max_new_tokens": 300})])
    Trainer(callbacks=[Samples({"labels": "0-9", "steps": 20})])

    Args:
        arguments: of `generate`; its own defaults if not given.
    """

    def __init__(self, arguments: dict[str, Any] | None = None) -> None:
        """Keep the arguments."""
        self.arguments = arguments or {}
        self.last: str | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse a module without `generate`, unknown arguments, and a fit without validation."""
        before_training(trainer, pl_module, stage)
        if not callable(getattr(pl_module, "generate", None)):
            raise UsageError(
                f"Samples needs a module with a method generate(), and {type(pl_module).__name__} "
                "has none; take Samples out of trainer.callbacks"
            )
        refuse_without_validation(trainer, "Samples", stage)
        refuse_unknown_arguments(pl_module, self.arguments)

    def check(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any) -> None:
        """Try the arguments: by the module's `try_generate`, which is short, or by `generate`."""
        module: Any = pl_module
        made = getattr(module, "try_generate", module.generate)(**self.arguments)
        if callable(getattr(made, "grid", None)):
            made.grid()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep a sample; all ranks generate, as a sharded net needs all of them.

        Texts are added to samples.txt; pictures, which have a method `grid`, become
        samples/000100.png, and go to every logger that takes images.
        """
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        made: Any = pl_module.generate(**self.arguments)  # pyright: ignore
        step, folder = trainer.global_step, run_folder(trainer)
        if callable(getattr(made, "grid", None)):
            if trainer.is_global_zero and folder:
                made.save(folder / "samples" / f"{step:06}.png")
            show(trainer, "samples", made.grid())
            return
        self.last = str(made)
        if trainer.is_global_zero and folder:
            with (folder / "samples.txt").open(
                "a", encoding="utf-8", errors="backslashreplace"
            ) as file:
                file.write(f"--- step {step} ---\n{self.last}\n")

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print the last text."""
        if self.last is not None:
            pl_module.print(f"--- a sample after step {trainer.global_step} ---\n{self.last}")


def refuse_unknown_arguments(module: Any, arguments: dict[str, Any]) -> None:
    """ValueError for an argument that the module's `generate` does not take, or lacks."""
    signature = inspect.signature(module.generate)
    try:
        signature.bind(**arguments)
    except TypeError as error:
        names = [name for name in signature.parameters if name != "show"]
        wrong = [name for name in arguments if name not in signature.parameters]
        near = suggest_names(wrong[0], names, 1) if wrong else []
        raise UsageError(
            f"Samples: generate() of {type(module).__name__}: {error}; allowed: "
            f"{', '.join(names)}; "
            + (
                f"type --trainer.callbacks.arguments.{near[0]}=..."
                if near
                else "change --trainer.callbacks.arguments"
            )
        ) from error
