"""torch.compile callback: compile the net in place as the last transform before sharding.

`net.compile()` works in place, so that no name in a checkpoint changes. It follows adapters and
activation checkpointing. Generation runs uncompiled, because each prompt length would recompile.
Some strategies run the net in parts: as pipeline stages, or with blocks gathered one at a time.
Each block is then compiled inside its hooks, as one graph that equal blocks share.
"""

from typing import Any, Literal

import lightning as L
import torch

from ravine.errors import UsageError
from ravine.strategies.activation_checkpointing import find_blocks, find_sequentials

from .base import Transform


class Compile(Transform):
    """Compile a module's children, or their blocks, with torch.compile for static shapes.

        lightning fit --config gpt2/124m --trainer.callbacks+=Compile

    Args:
        mode: reduce-overhead captures CUDA graphs, for small nets whose kernel launches take longer
            than the kernels; max-autotune tries kernels for minutes.
        blocks: compile each block of a net separately; equal blocks are compiled once.
        backend: backend of torch.compile; eager and aot_eager need no compiler, for debugging.
    """

    phase = "compile"
    accepts_meta_params = True

    def __init__(
        self,
        mode: Literal["default", "reduce-overhead", "max-autotune"] = "default",
        blocks: bool = False,
        backend: str = "inductor",
    ) -> None:
        """Check and store the arguments.

        Args:
            mode: mode of torch.compile with the inductor backend.
            blocks: compile each block of a net separately.
            backend: backend of torch.compile.
        """
        if backend != "inductor" and mode != "default":
            raise UsageError(
                f"Compile: mode={mode!r} is not available with backend={backend!r}",
                ["mode='default'", "backend='inductor'"],
                hint="use mode='default'",
                flag=f"--trainer.callbacks.{type(self).__name__}.mode=default, or "
                f"--trainer.callbacks.{type(self).__name__}.backend=inductor",
            )
        self.mode, self.blocks, self.backend = mode, blocks, backend
        # whether the strategy runs the net in parts: pipeline stages, or blocks gathered singly
        self._runs_in_pieces = False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Register the phase."""
        self._runs_in_pieces = getattr(
            getattr(trainer.strategy, "mesh_layout", None), "runs_in_pieces", False
        )
        super().setup(trainer, pl_module, stage)

    def config_key(self) -> tuple[str, bool, str]:
        """Return the arguments."""
        return self.mode, self.blocks, self.backend

    def transform(self, module: L.LightningModule) -> None:
        """Mark the submodules to compile; torch compiles them in the first step.

        They are the blocks, if `blocks` is set or the strategy runs the net in parts. Else they are
        the children of the module.

        Raises:
            UsageError: the module has no such submodule.
        """
        submodules = find_blocks(module)  # members of a ModuleDict or ModuleList
        use_blocks = self.blocks or (self._runs_in_pieces and submodules)
        if not use_blocks:
            # the strategy gathers the members of a Sequential one at a time
            sequentials = find_sequentials(module) if self._runs_in_pieces else []
            children = [child for parent in sequentials or [module] for child in parent.children()]
            submodules = [child for child in children if any(True for _ in child.parameters())]
        if not submodules:
            name = type(module).__name__
            if self.blocks:
                raise UsageError(
                    f"Compile: {name} has no blocks (a ModuleDict or ModuleList)",
                    hint="use blocks=False",
                    flag=f"--trainer.callbacks.{type(self).__name__}.blocks=false",
                )
            raise UsageError(
                f"Compile: {name} has no submodule with parameters",
                hint="remove Compile() from Trainer(callbacks=...)",
            )
        mode = None if self.backend != "inductor" else self.mode
        compile_kwargs: Any = {"mode": mode, "backend": self.backend, "dynamic": False}
        for submodule in submodules:
            if self._runs_in_pieces:  # keep FSDP hooks outside, as each would break the graph
                submodule.forward = torch.compile(submodule.forward, **compile_kwargs)
            else:
                submodule.compile(**compile_kwargs)
