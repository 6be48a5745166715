"""GenerateSamples: generate text or images after each validation, and save or log them."""

import inspect
import shlex
from typing import Any

import lightning as L

from ravine.errors import UsageError, suggest_names

from ..base import require_validation
from ..checks.run_checks import add_run_checks
from ..monitoring.media_logging import get_run_dir, log_image


class GenerateSamples(L.Callback):
    """Calls the module's `generate` at each validation; the last text is printed at the end.

        Trainer(callbacks=[GenerateSamples({"prompt": "ROMEO:", "max_new_tokens": 300})])
        Trainer(callbacks=[GenerateSamples({"labels": "0-9", "num_steps": 20})])

    Args:
        arguments: keyword arguments of `generate`; its own defaults if not given.
    """

    def __init__(self, arguments: dict[str, Any] | None = None) -> None:
        """Store the arguments."""
        self.arguments = arguments or {}
        self.last_text: str | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse a module without `generate`, unknown arguments, and a fit without validation."""
        add_run_checks(trainer, pl_module, stage)
        if not callable(getattr(pl_module, "generate", None)):
            raise UsageError(
                f"GenerateSamples: {type(pl_module).__name__} has no method generate",
                ["a module with a method generate()"],
                hint="remove GenerateSamples() from Trainer(callbacks=...)",
            )
        require_validation(trainer, "GenerateSamples", stage)
        check_generate_arguments(pl_module, self.arguments)

    def check(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any) -> None:
        """Try the arguments with the module's short `try_generate`, or else with `generate`."""
        module: Any = pl_module
        output = getattr(module, "try_generate", module.generate)(**self.arguments)
        if callable(getattr(output, "grid", None)):
            output.grid()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save a sample; all ranks generate it, because a sharded net needs all of them.

        Text is appended to samples.txt. Images, which have a method `grid`, are saved as
        samples/000100.png and passed to every logger that takes images.
        """
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        output: Any = pl_module.generate(**self.arguments)  # pyright: ignore
        step, folder = trainer.global_step, get_run_dir(trainer)
        is_images = callable(getattr(output, "grid", None))
        if is_images:
            if trainer.is_global_zero and folder:
                output.save(folder / "samples" / f"{step:06}.png")
            log_image(trainer, "samples", output.grid())  # to each logger that takes images
            return
        self.last_text = str(output)
        if trainer.is_global_zero and folder:
            with (folder / "samples.txt").open(
                "a", encoding="utf-8", errors="backslashreplace"
            ) as file:
                file.write(f"--- step {step} ---\n{self.last_text}\n")

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print the last text."""
        if self.last_text is not None:
            pl_module.print(f"--- a sample after step {trainer.global_step} ---\n{self.last_text}")


def check_generate_arguments(module: Any, arguments: dict[str, Any]) -> None:
    """Raise UsageError for an argument that `module.generate` does not take, or a missing one.

    `arguments` are keyword arguments. The message names the argument with the nearest name.
    """
    signature = inspect.signature(module.generate)
    try:
        signature.bind(**arguments)  # TypeError, without a call of the method
    except TypeError as error:
        # `on_text` is a function, which a config cannot give
        names = [name for name in signature.parameters if name != "on_text"]
        unknown = [name for name in arguments if name not in signature.parameters]
        near = suggest_names(unknown[0], names, 1) if unknown else []
        value = arguments[unknown[0]] if near else None  # it is kept under the corrected name
        text = shlex.quote(str(value))
        raise UsageError(
            f"GenerateSamples: {type(module).__name__}.generate does not accept the arguments: "
            f"{error}",
            names,
            hint=f"use GenerateSamples({{{near[0]!r}: {value!r}}})"
            if near
            else "change the arguments of GenerateSamples",
            flag=f"--trainer.callbacks.GenerateSamples.arguments.{near[0]}={text}" if near else "",
        ) from error
