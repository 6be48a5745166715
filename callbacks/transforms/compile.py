"""Compile: torch.compile as a line of a config, applied last, to the net where it stands.

In place (`net.compile()`), so that no name in a checkpoint changes; after adapters and
recomputation, before sharding. Sampling runs uncompiled: a prompt of each length would recompile.
Where a strategy runs the net in parts, stages of a pipeline or blocks that are gathered one by one,
each block is compiled within its hooks: one graph, and one for all that are equal.
"""

from typing import Any, Literal

import lightning as L
import torch

from ravine.errors import UsageError
from ravine.strategies.activation_checkpointing import find_blocks, find_sequentials

from .base import Transform


class Compile(Transform):
    """Compile a module's children, or their blocks, for shapes that stay the same.

    lightning fit --config gpt2/124m --trainer.callbacks+=Compile

    Args:
        mode: reduce-overhead captures CUDA graphs, for nets so small that starting a kernel takes
            longer than the kernel; max-autotune tries kernels for minutes.
        blocks: compile each block of a net by itself: equal blocks are compiled once.
        backend: of torch.compile; eager and aot_eager need no compiler, and find faults.
    """

    phase = "compile"
    without_values = True

    def __init__(
        self,
        mode: Literal["default", "reduce-overhead", "max-autotune"] = "default",
        blocks: bool = False,
        backend: str = "inductor",
    ) -> None:
        """Choose."""
        if backend != "inductor" and mode != "default":
            raise UsageError(
                f"Compile: mode={mode!r} is a mode of inductor, and backend={backend!r} has none; "
                "type --trainer.callbacks.mode=default, or --trainer.callbacks.backend=inductor"
            )
        self.mode, self.blocks, self.backend = mode, blocks, backend
        self._runs_in_pieces = False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Announce the phase."""
        self._runs_in_pieces = getattr(getattr(trainer.strategy, "layout", None), "in_parts", False)
        super().setup(trainer, pl_module, stage)

    def identity(self) -> tuple[str, bool, str]:
        """The arguments."""
        return self.mode, self.blocks, self.backend

    def transform(self, module: L.LightningModule) -> None:
        """Mark what is to be compiled; it happens at the first step."""
        submodules = find_blocks(module)
        if not self.blocks and not (self._runs_in_pieces and submodules):
            sequentials = (
                find_sequentials(module) if self._runs_in_pieces else []
            )  # their members are gathered apart
            submodules = [
                submodule for row in sequentials or [module] for submodule in row.children()
            ]
            submodules = [
                submodule for submodule in submodules if any(True for _ in submodule.parameters())
            ]
        if not submodules:
            reason = "no net with blocks (a ModuleDict or ModuleList)" if self.blocks else "no net"
            raise UsageError(
                f"Compile: {type(module).__name__} has {reason}; "
                + ("type --trainer.callbacks.blocks=false" if self.blocks else "leave it out")
            )
        mode = None if self.backend != "inductor" else self.mode
        compile_kwargs: Any = {"mode": mode, "backend": self.backend, "dynamic": False}
        for submodule in submodules:
            if self._runs_in_pieces:  # hooks that gather stay outside: each would cut the graph
                submodule.forward = torch.compile(submodule.forward, **compile_kwargs)
            else:
                submodule.compile(**compile_kwargs)
