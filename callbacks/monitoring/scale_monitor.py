"""ScaleMonitor: root mean square of activations and gradients by layer and depth.

    scale/activation/<layer>    sqrt(mean y²) of the layer's output y
    scale/gradient/<layer>      sqrt(mean g²) of g, the gradient of the step's loss by y

The depth of a layer is its place in the order of the forward pass. In a network with a good
initialization both are similar at all depths (CS336, lecture 2). If each layer multiplies them by a
factor, they vanish or explode as a power of the depth.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ravine.errors import UsageError, check_at_least_one
from ravine.strategies.activation_checkpointing import find_blocks
from ravine.strategies.dtensor import to_local

from ..base import find_callbacks
from ..checks.run_checks import add_run_checks
from ..transforms.layer_selection import Patterns, select_names
from .curvature_monitor import CurvatureMonitor
from .media_logging import log_values
from .plots import DPI, RecordedCurves

ACTIVATION, GRADIENT = "scale/activation/", "scale/gradient/"
MAX_DRAWN_STEPS = 5  # lines in a panel
MAX_NAMED_LAYERS = 40  # with more layers the axis has their numbers


class ScaleMonitor(RecordedCurves):
    """Logs the scale of activations and gradients of each layer, and draws `scale.png`.

    The layers are the blocks of the network (members of a ModuleDict or ModuleList), and the layers
    with parameters outside of blocks. Forward passes without gradients are left out. A layer that
    runs several times in a step, as with gradient accumulation, has the mean over its calls.
    Several ranks log the scales of their joint batch. Training is bitwise the same with and without
    the callback. Compiled layers run no hooks, so they are refused.

    Example: `Trainer(callbacks=[ScaleMonitor(every_n_steps=100)])`.

    Args:
        every_n_steps: optimizer steps between two measurements; the first is step 1.
        layers: globs of layer names, such as `blocks.*.mlp`, in place of the default.
        title: title of the figure; by default the run's folder.
    """

    def __init__(
        self, every_n_steps: int = 100, layers: Patterns | None = None, title: str = ""
    ) -> None:
        """Check and store the arguments."""
        super().__init__()
        check_at_least_one(
            "ScaleMonitor",
            flag_prefix="--trainer.callbacks.ScaleMonitor.",
            every_n_steps=every_n_steps,
        )
        self.every_n_steps, self.layers, self.title = every_n_steps, layers, title
        self._hooks: list[Any] = []  # handles; [] between measurements
        # of the running step, by layer in the order of the forward pass: sum of squares, count
        self._activations: dict[str, list[Tensor]] = {}
        self._gradients: dict[str, list[Tensor]] = {}
        self._loss_gradients: list[Tensor] = []  # of each backward pass

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Add RunChecks, which calls `check`."""
        add_run_checks(trainer, pl_module, stage)

    def check(self, trainer: L.Trainer, module: L.LightningModule, batch: Any) -> None:
        """Refuse split and compiled layers, and globs that match no layer."""
        layout = getattr(trainer.strategy, "mesh_layout", None)
        degrees = {} if layout is None else layout.degrees
        if any(degrees.get(axis, 1) > 1 for axis in ("tp", "pp", "cp", "ep")):
            raise UsageError(
                "ScaleMonitor needs whole layers on each rank, which the strategy splits",
                ["one device", "ddp", "zero1", "zero2", "zero3", "hsdp"],
                hint='use Trainer(strategy="zero3")',
                flag="--trainer.strategy=zero3",
            )
        if any(
            type(layer).__name__ == "OptimizedModule"  # of torch.compile(layer)
            or getattr(layer, "_compiled_call_impl", None) is not None
            or hasattr(layer.__dict__.get("forward"), "_torchdynamo_orig_callable")
            for layer in module.modules()
        ):
            raise UsageError(
                f"ScaleMonitor reads layers by hooks, and {type(module).__name__} has compiled "
                "layers, which run no hooks",
                ["layers that are not compiled"],
                hint="remove Compile() or ScaleMonitor() from Trainer(callbacks=...)",
            )
        if not self._select_layers(module):
            raise UsageError(
                f"ScaleMonitor: {type(module).__name__} has no layer with parameters",
                ["one layer or more"],
                hint="remove ScaleMonitor() from Trainer(callbacks=...)",
            )

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Add the hooks before the first micro-batch of a step that is due."""
        if trainer.global_step % self.every_n_steps or self._hooks:
            return
        self._activations, self._gradients, self._loss_gradients = {}, {}, []
        watchers = find_callbacks(trainer, CurvatureMonitor)  # they compute further losses

        def should_record() -> bool:
            # not in a recomputation of activations, which runs in the backward pass
            is_recomputed = torch._C._current_graph_task_id() >= 0  # pyright: ignore
            is_extra = any(watcher.is_measuring for watcher in watchers)
            return torch.is_grad_enabled() and not is_recomputed and not is_extra

        for name, layer in self._select_layers(pl_module).items():
            self._hooks.append(layer.register_forward_hook(self._make_hook(name, should_record)))

    def on_before_backward(
        self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor
    ) -> None:
        """Record the gradient of the loss: a gradient scaler or weights of tokens multiply it."""
        if self._hooks and loss.requires_grad:
            loss.register_hook(lambda g: self._loss_gradients.append(g.detach().double().sum()))

    def on_optimizer_step_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: STEP_OUTPUT, batch: Any
    ) -> None:
        """Log the scales of the step, and remove the hooks."""
        if not self._hooks:
            return
        self._remove_hooks()
        if not self._activations:
            raise UsageError(
                f"ScaleMonitor: none of the layers of {type(pl_module).__name__} ran with "
                "gradients in the step",
                list(self._select_layers(pl_module)),
                hint="use layers=[...] with the names of layers that are called",
            )
        values = self._compute_scales(trainer, pl_module.device)
        log_values(trainer, values, self.step)
        for name, value in values.items():
            self.add_point(name, torch.tensor(value, dtype=torch.float64))

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Remove the hooks of a step that did not end."""
        self._remove_hooks()

    def save_plot(self, folder: Path, module: L.LightningModule) -> None:
        """Draw the scales over the depth, for the first and the last step and some between."""
        save_scale_plot(self.state_dict(), folder / "scale.png", self.title or folder.as_posix())

    def _select_layers(self, module: L.LightningModule) -> dict[str, nn.Module]:
        """Return the layers by name, in the order of the module."""
        named = {name: layer for name, layer in module.named_modules() if name}
        if self.layers is not None:
            return {
                n: named[n] for n in select_names(self.layers, list(named), "ScaleMonitor.layers")
            }
        blocks = find_blocks(module)
        inner = {id(layer) for block in blocks for layer in block.modules()}
        return {
            name: layer
            for name, layer in named.items()
            if any(layer is block for block in blocks)
            or (id(layer) not in inner and any(p is not None for p in layer._parameters.values()))
        }

    def _make_hook(
        self, name: str, should_record: Callable[[], bool]
    ) -> Callable[[nn.Module, Any, Any], None]:
        """Return a forward hook that adds up the squares of a layer's output and its gradient."""

        def hook(layer: nn.Module, inputs: Any, output: Any) -> None:
            if not should_record():
                return
            tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
            tensor = next((t for t in tensors if t.is_floating_point()), None)
            if tensor is None:
                return
            _add_squares(self._activations, name, tensor)
            if tensor.requires_grad:  # a hook of the tensor leaves the graph as it is
                tensor.register_hook(lambda gradient: _add_squares(self._gradients, name, gradient))

        return hook

    def _compute_scales(self, trainer: L.Trainer, device: torch.device) -> dict[str, float]:
        """Return the scales of the step over all ranks, by the name of the metric."""
        loss_gradients = self._loss_gradients
        keys = [(ACTIVATION + name, sums) for name, sums in self._activations.items()]
        # backward passes run in the reverse order
        keys += [
            (GRADIENT + name, self._gradients[name])
            for name in self._activations
            if name in self._gradients
        ]
        rows = [torch.stack([s.double() for s in sums]) for _, sums in keys]
        total = torch.stack(loss_gradients).sum() if loss_gradients else torch.zeros(())
        rows.append(torch.tensor([float(total), len(loss_gradients)], dtype=torch.float64))
        sums = torch.stack([row.to(device, torch.float64) for row in rows])  # (layers + 1, 2)
        if trainer.world_size > 1:
            dist.all_reduce(sums)
        *scales, (loss_gradient, num_losses) = sums.tolist()
        # gradients are averaged over ranks, and divided by the mean gradient of their losses
        mean = loss_gradient / num_losses if num_losses and loss_gradient else 1.0
        factor = 1 / (abs(mean) * trainer.world_size)
        return {
            name: math.sqrt(squares / count) * (factor if name.startswith(GRADIENT) else 1.0)
            for (name, _), (squares, count) in zip(keys, scales, strict=True)
        }

    def _remove_hooks(self) -> None:
        for handle in self._hooks:
            handle.remove()
        self._hooks = []


@torch.no_grad()
def _add_squares(sums: dict[str, list[Tensor]], name: str, tensor: Tensor) -> None:
    """Add the sum of squares of a tensor, and its number of elements, to those of a layer."""
    local = to_local(tensor.detach())
    dtype = torch.promote_types(local.dtype, torch.float32)  # squares overflow in float16
    squares = torch.linalg.vector_norm(local, dtype=dtype).double().square()
    count = squares.new_tensor(float(local.numel()))
    if name in sums:
        sums[name] = [sums[name][0] + squares, sums[name][1] + count]
    else:
        sums[name] = [squares, count]


def save_scale_plot(curves: dict[str, Any], path: Path, title: str) -> None:
    """Draw activation and gradient scales over the depth to a PNG file.

    Args:
        curves: lists of (step, scale) by name of the metric, in the order of the forward pass.
        path: the PNG file.
        title: title of the figure.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no window, no global state
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    names = [name.removeprefix(ACTIVATION) for name in curves if name.startswith(ACTIVATION)]
    is_named = len(names) <= MAX_NAMED_LAYERS
    figure = Figure(figsize=(11, 5.6 if is_named else 4.4), layout="constrained", dpi=DPI)
    figure.suptitle(title, fontsize=11)
    for index, (prefix, label) in enumerate(
        ((ACTIVATION, "RMS of activations"), (GRADIENT, "RMS of gradients")), 1
    ):
        axes = figure.add_subplot(1, 2, index, xlabel="layer", ylabel=label)
        points = {name: dict(curves.get(prefix + name, [])) for name in names}
        steps = sorted({step for by_step in points.values() for step in by_step})
        last, intervals = len(steps) - 1, MAX_DRAWN_STEPS - 1
        for step in dict.fromkeys(steps[round(i * last / intervals)] for i in range(intervals + 1)):
            line = [
                (depth, points[name][step])
                for depth, name in enumerate(names)
                if points[name].get(step)  # not of a layer without gradient
            ]
            if line:
                axes.plot(*zip(*line, strict=True), "o-", ms=3, lw=1.2, label=f"step {step}")
        axes.set_yscale("log")
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize=9)
        if is_named:
            axes.set_xticks(range(len(names)), names, rotation=90, fontsize=8)
        else:
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    FigureCanvasAgg(figure).print_png(path)
