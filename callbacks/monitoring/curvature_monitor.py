"""CurvatureMonitor: extreme eigenvalues of the Hessian of the training loss, beside 2 / lr.

On a quadratic with curvature h, a step of gradient descent multiplies the distance to the minimum
by 1 - lr h. It is stable for h < 2 / lr. In full-batch training of a network the largest eigenvalue
rises to 2 / lr and stays there: the edge of stability (Cohen et al., 2021).

    curvature/largest            largest eigenvalue at the weights before the step
    curvature/smallest           smallest eigenvalue; negative: a direction of negative curvature
    curvature/stability_limit    limit of the largest eigenvalue, for SGD with one setting

The eigenvalues come from Lanczos (lanczos.py) with Hessian-vector products of double backward.
"""

import inspect
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import numpy
import torch
import torch.distributed as dist
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.seed import isolate_rng
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import SGD, Optimizer

from ravine.errors import UsageError
from ravine.strategies.activation_checkpointing import suspend_activation_checkpointing

from ..base import find_callbacks
from ..checks.monitored_metrics import record_logged_names
from ..checks.preserve_state import snapshot_module
from ..checks.run_checks import add_run_checks
from ..optimizers.composite import CompositeOptimizer
from ..stability.token_weighted_loss import TokenWeightedLoss, mean_over_ranks
from .lanczos import (
    ExtremeEigenvalues,
    HessianProduct,
    find_extreme_eigenvalues,
    flatten_like,
)
from .media_logging import log_values
from .plots import DPI, RecordedCurves, set_plain_ticks

LARGEST, SMALLEST = "curvature/largest", "curvature/smallest"
LIMIT = "curvature/stability_limit"


class CurvatureMonitor(RecordedCurves):
    """Logs the extreme eigenvalues of the training loss's Hessian, and draws `curvature.png`.

    The loss is that of `training_step` on the first micro-batch of a step, at the weights before
    the step, averaged over ranks as DDP averages gradients. Only trainable parameters count. The
    products are in fp32 (in fp64 for such weights) with the math kernel of attention, also in mixed
    precision. The module stays in training mode: BatchNorm uses the batch, and dropout has one
    fixed mask for each measurement. Training is bitwise the same with and without the callback.

    A measurement needs memory for the graph of the gradient and for `max_products` vectors of the
    size of the weights. It takes the time of about three training steps a product.

    Example: `Trainer(callbacks=[CurvatureMonitor(every_n_steps=100)])`.

    Args:
        every_n_steps: optimizer steps between two measurements; the first is before step 1.
        tolerance: allowed error of an eigenvalue, relative to it, or to 1 % of the largest absolute
            eigenvalue if that is more.
        max_products: Hessian-vector products after which a measurement stops.
        seed: seed of the start vector and of dropout masks.
        title: title of the figure; by default the run's folder.
    """

    def __init__(
        self,
        every_n_steps: int = 100,
        tolerance: float = 0.01,
        max_products: int = 100,
        seed: int = 0,
        title: str = "",
    ) -> None:
        """Check and store the arguments."""
        super().__init__()
        for name, value in (("every_n_steps", every_n_steps), ("max_products", max_products)):
            if value < 1:
                raise UsageError(
                    f"CurvatureMonitor: {name}={value} is too small",
                    ["1 or more"],
                    hint=f"use {name}=100",
                    flag=f"--trainer.callbacks.CurvatureMonitor.{name}=100",
                )
        if not 0 < tolerance < 1:
            raise UsageError(
                f"CurvatureMonitor: tolerance={tolerance} is out of range",
                ["above 0 and below 1"],
                hint="use tolerance=0.01",
                flag="--trainer.callbacks.CurvatureMonitor.tolerance=0.01",
            )
        self.every_n_steps, self.tolerance = every_n_steps, tolerance
        self.max_products, self.seed, self.title = max_products, seed, title
        self.is_measuring = False  # whether the running training_step is that of a measurement
        self.eigenvalues: ExtremeEigenvalues | None = None  # of the last measurement
        self._last_step = -1  # of the last measurement
        self._is_verified = self._has_warned = False  # in this fit

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse a module without one training loss, and add RunChecks, which calls `check`."""
        add_run_checks(trainer, pl_module, stage)
        if stage != "fit":
            return
        name = type(pl_module).__name__
        if not pl_module.automatic_optimization:
            raise UsageError(
                f"CurvatureMonitor needs one training loss, and {name} steps its own optimizers "
                "(manual optimization)",
                ["modules with automatic optimization"],
                hint="remove CurvatureMonitor() from Trainer(callbacks=...)",
            )
        if "dataloader_iter" in inspect.signature(pl_module.training_step).parameters:
            raise UsageError(
                f"CurvatureMonitor computes the loss of a batch twice, and {name}.training_step "
                "takes an iterator",
                ["training_step(batch, batch_idx)"],
                hint="remove CurvatureMonitor() from Trainer(callbacks=...)",
            )

    def check(self, trainer: L.Trainer, module: L.LightningModule, batch: Any) -> None:
        """Refuse sharded and half-precision weights; called before the first step."""
        parameters = _trainable(module)
        layout = getattr(trainer.strategy, "mesh_layout", None)
        degrees = {} if layout is None else layout.degrees
        is_split = any(degrees.get(axis, 1) > 1 for axis in ("tp", "pp", "cp", "ep"))
        is_sharded = any(isinstance(p, DTensor) for p in parameters)
        # Lightning's FSDPStrategy and DeepSpeedStrategy shard parameters of plain tensors
        names = [kind.__name__ for kind in type(trainer.strategy).__mro__]
        is_sharded |= "FSDPStrategy" in names or "DeepSpeedStrategy" in names
        is_sharded |= getattr(trainer.strategy, "zero_stage", 1) > 1
        if is_split or is_sharded:
            raise UsageError(
                "CurvatureMonitor differentiates the loss twice and needs whole parameters on each "
                "rank, which the strategy splits",
                ["one device", "ddp", "zero1"],
                hint='use Trainer(strategy="ddp")',
                flag="--trainer.strategy=ddp",
            )
        if not parameters:
            raise UsageError(
                f"CurvatureMonitor: {type(module).__name__} has no trainable parameter",
                ["one trainable parameter or more"],
                hint="remove CurvatureMonitor() from Trainer(callbacks=...)",
            )
        if any(p.dtype not in (torch.float32, torch.float64) for p in parameters):
            raise UsageError(
                "CurvatureMonitor needs weights in fp32, and some are in half precision",
                ["32-true", "bf16-mixed", "16-mixed", "64-true"],
                hint="use Trainer(precision='bf16-mixed')",
                flag="--trainer.precision=bf16-mixed",
            )

    def logged_metrics(self, trainer: L.Trainer) -> set[str]:
        """Return the names of the metrics that `trainer.callback_metrics` gets."""
        limits = [LIMIT] if stability_limit(trainer.optimizers) is not None else []
        return {LARGEST, SMALLEST, *limits}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Find the run's folder; a resumed run keeps the curves of its checkpoint."""
        super().on_train_start(trainer, pl_module)
        self._last_step, self._is_verified, self._has_warned = -1, False, False

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Measure before the first micro-batch of a step that is due."""
        step = trainer.global_step
        if step % self.every_n_steps or step == self._last_step:
            return
        self._last_step = step
        loss, result = self._measure(trainer, pl_module, batch, batch_idx)
        self.eigenvalues = result
        values: dict[str, float] = {LARGEST: result.largest, SMALLEST: result.smallest}
        limit = stability_limit(trainer.optimizers)
        if limit is not None:
            values[LIMIT] = limit
        log_values(trainer, values, step)
        for name, value in ({"loss": float(loss)} | values).items():
            self.add_point(name.rpartition("/")[2], torch.tensor(value, dtype=torch.float64))
        if not result.has_converged and not self._has_warned:
            self._has_warned = True
            pl_module.print(
                f"CurvatureMonitor: after {result.num_products} products the largest eigenvalue is "
                f"{result.largest:.4g} within {result.largest_error:.2g}, the smallest "
                f"{result.smallest:.4g} within {result.smallest_error:.2g}; a larger max_products "
                "makes them exact"
            )

    def save_plot(self, folder: Path, module: L.LightningModule) -> None:
        """Draw eigenvalues, limit and loss over the optimizer steps."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # no window, no global state
        from matplotlib.figure import Figure

        figure = Figure(figsize=(10, 4.2), layout="constrained", dpi=DPI)
        figure.suptitle(self.title or folder.as_posix(), fontsize=11)
        curves = self.state_dict()
        axes = figure.add_subplot(
            1, 2, 1, xlabel="optimizer step", ylabel="eigenvalue of the Hessian"
        )
        limit_label = "stability limit (2 / lr for gradient descent)"
        for name, label, style in (
            ("largest", "largest", "o-"),
            ("smallest", "smallest", "o-"),
            ("stability_limit", limit_label, "k--"),
        ):
            if curves.get(name):
                axes.plot(*zip(*curves[name], strict=True), style, ms=3, lw=1.3, label=label)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=9)
        losses = figure.add_subplot(1, 2, 2, xlabel="optimizer step", ylabel="training loss")
        losses.plot(*zip(*curves["loss"], strict=True), "o-", ms=3, lw=1.3)
        set_plain_ticks(losses, [value for _, value in curves["loss"]])
        losses.grid(alpha=0.3, which="both")
        FigureCanvasAgg(figure).print_png(folder / "curvature.png")

    def _measure(
        self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int
    ) -> tuple[Tensor, ExtremeEigenvalues]:
        """Return the loss () of the batch over all ranks, and the eigenvalues of its Hessian."""
        parameters = _trainable(module)
        average = _rank_average(trainer, module, batch)
        with self._loss_only(trainer, module) as restore_module:

            def compute_loss() -> Tensor:
                restore_module()
                _seed(self.seed + trainer.global_rank)  # ranks have other samples, and other masks
                return _training_loss(module, batch, batch_idx)

            loss = compute_loss()
            is_handwritten = not self._is_verified and has_handwritten_backward(loss)
            # the graph is freed at the return: later calls restore buffers that it has saved
            result, direction, product = self._find_eigenvalues(module, loss, parameters, average)
            loss = loss.detach()
            # another value at the same weights: random numbers that no seed determines
            if is_handwritten and torch.equal(compute_loss().detach(), loss):
                _verify(module, compute_loss, parameters, average, direction, product)
            self._is_verified = True
        return average(loss), result

    def _find_eigenvalues(
        self,
        module: L.LightningModule,
        loss: Tensor,
        parameters: list[Tensor],
        average: Callable[[Tensor], Tensor],
    ) -> tuple[ExtremeEigenvalues, Tensor, Tensor]:
        """Return the eigenvalues, the start vector (n) and its product (n) with the Hessian."""
        with _refuse_single_derivatives(module):
            hessian = HessianProduct(loss, parameters)

        def multiply(vector: Tensor) -> Tensor:
            with _refuse_single_derivatives(module):
                product = hessian(vector)
            return average(product)  # an error of another rank keeps its text

        generator = torch.Generator().manual_seed(self.seed)  # equal on all ranks
        size = sum(p.numel() for p in parameters)
        start = torch.randn(size, generator=generator, dtype=torch.float64).to(parameters[0])
        start /= start.norm()
        product = start if self._is_verified else multiply(start)
        result = find_extreme_eigenvalues(multiply, start, self.tolerance, self.max_products)
        return result, start, product

    @contextmanager
    def _loss_only(
        self, trainer: L.Trainer, module: L.LightningModule
    ) -> Iterator[Callable[[], Any]]:
        """Compute losses without any effect on the run: logs, buffers, attributes, generators.

        Yields the function that restores the buffers and attributes of the module.
        """
        restore = snapshot_module(module)
        loggers = list(trainer.loggers)
        self.is_measuring = True
        try:
            with (
                isolate_rng(),
                torch.enable_grad(),
                record_logged_names(module, 1),  # logs nothing
                trainer.precision_plugin.train_step_context(),  # sets the dtype of 64-true
                torch.autocast(module.device.type, enabled=False),
                sdpa_kernel(SDPBackend.MATH),  # the CPU's flash kernel has no second derivative
                torch.compiler.set_stance("force_eager"),  # nor has compiled code
                suspend_activation_checkpointing(),  # each product would recompute all blocks
            ):
                trainer.loggers = [DummyLogger() for _ in loggers]
                yield restore
        finally:
            self.is_measuring = False
            trainer.loggers = loggers
            restore()


def stability_limit(optimizers: Sequence[Optimizer]) -> float | None:
    """Return the curvature above which SGD diverges on a quadratic; None for other optimizers.

    With momentum m and weight decay c it is 2 (1 + m) / lr - c, and with Nesterov momentum
    2 (1 + m) / (lr (1 + 2 m)) - c. All param groups must have the same settings.
    """
    members = [
        member
        for optimizer in optimizers
        for member in (
            optimizer.optimizers if isinstance(optimizer, CompositeOptimizer) else [optimizer]
        )
    ]
    groups = [group for member in members for group in member.param_groups]
    if not groups or any(type(member) is not SGD for member in members):
        return None
    names = ("lr", "momentum", "dampening", "nesterov", "weight_decay", "maximize")
    first = [group_settings(groups[0], names), *(group_settings(g, names) for g in groups[1:])]
    if any(settings != first[0] for settings in first):
        return None
    lr, momentum, dampening, nesterov, decay, maximize = first[0]
    if maximize or lr <= 0:
        return None
    factor = 1 + 2 * momentum if nesterov else 1 - dampening if momentum else 1
    return 2 * (1 + momentum) / (lr * factor) - decay


def group_settings(group: dict[str, Any], names: Sequence[str]) -> tuple[float, ...]:
    """Return settings of a param group as numbers."""
    return tuple(float(group[name]) for name in names)


def has_handwritten_backward(loss: Tensor) -> bool:
    """Return whether the graph of a loss has a `torch.autograd.Function`."""
    seen, pending = set(), [loss.grad_fn]
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            return True
        seen.add(node)
        pending += [following for following, _ in node.next_functions]
    return False


def _seed(seed: int) -> None:
    """Seed the default generators."""
    torch.manual_seed(seed)
    random.seed(seed)
    numpy.random.seed(seed)


def _trainable(module: L.LightningModule) -> list[Tensor]:
    return [p for p in module.parameters() if p.requires_grad]


def _rank_average(
    trainer: L.Trainer, module: L.LightningModule, batch: Any
) -> Callable[[Tensor], Tensor]:
    """Return the function that averages a tensor over ranks in place, as gradients are averaged.

    With TokenWeightedLoss the weight of a rank is its number of loss terms.
    """
    if trainer.world_size == 1:
        return lambda tensor: tensor
    weight: Tensor | float = 1.0
    count_terms = getattr(module, "num_loss_terms", None)
    if count_terms is not None and find_callbacks(trainer, TokenWeightedLoss):
        terms = torch.as_tensor(count_terms(batch), dtype=torch.float64, device=module.device)
        weight = terms / mean_over_ranks(terms.clone(), trainer)

    def average(tensor: Tensor) -> Tensor:
        tensor = tensor * (weight / trainer.world_size)
        dist.all_reduce(tensor)
        return tensor

    return average


def _training_loss(module: L.LightningModule, batch: Any, batch_idx: int) -> Tensor:
    """Return the loss () of a batch."""
    step = module.training_step
    module.on_train_batch_start(batch, batch_idx)
    has_index = is_param_in_hook_signature(step, "batch_idx", min_args=2)
    output: Any = step(batch, batch_idx) if has_index else step(batch)
    loss = output["loss"] if isinstance(output, dict) else output
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
        text = "a tensor without a gradient" if isinstance(loss, Tensor) else type(loss).__name__
        raise UsageError(
            f"CurvatureMonitor: {type(module).__name__}.training_step returned {text}",
            ["a scalar loss that depends on trainable parameters"],
            hint="remove CurvatureMonitor() from Trainer(callbacks=...)",
        )
    return loss.reshape(())


@contextmanager
def _refuse_single_derivatives(module: L.LightningModule) -> Iterator[None]:
    """Turn torch's error for an operation without second derivative into a UsageError."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        text = " ".join(str(error).split())[:160]
        raise _not_differentiable(module, f"torch: {text}") from error


def _not_differentiable(module: L.LightningModule, reason: str) -> UsageError:
    return UsageError(
        f"CurvatureMonitor: the loss of {type(module).__name__} has an operation without a second "
        f"derivative ({reason})",
        ["losses of operations that can be differentiated twice"],
        hint="remove CurvatureMonitor() from Trainer(callbacks=...)",
    )


def _verify(
    module: L.LightningModule,
    compute_loss: Callable[[], Tensor],
    parameters: list[Tensor],
    average: Callable[[Tensor], Tensor],
    direction: Tensor,
    product: Tensor,
) -> None:
    """Compare a Hessian-vector product (n) with differences of gradients along the direction (n).

    A hand-written backward may be a constant to autograd, whose second derivative is then missing
    without an error. An error of a third is allowed. Other losses are not compared: kinks such as
    those of relu count in a difference only, and can be most of it. The weights are restored
    bitwise.

    Raises:
        UsageError: they differ for each of three steps.
    """
    saved = [p.detach().clone() for p in parameters]
    segments = direction.split([p.numel() for p in parameters])
    weight_norm = float(torch.stack([p.norm() for p in saved]).norm())
    precision = torch.finfo(direction.dtype).eps

    def gradient_at(distance: float) -> Tensor:  # (n), at this distance along the direction
        with torch.no_grad():
            for p, old, segment in zip(parameters, saved, segments, strict=True):
                p.copy_(old + distance * segment.view_as(old))
        gradients = torch.autograd.grad(compute_loss(), parameters, allow_unused=True)
        return average(flatten_like(gradients, parameters))

    agrees, error = False, 0.0
    try:
        for fraction in (1.0, 0.1, 0.01):
            distance = fraction * precision ** (1 / 3) * max(weight_norm, 1.0)
            above, below = gradient_at(distance), gradient_at(-distance)
            difference = (above - below) / (2 * distance)
            size = max(float(difference.norm()), float(product.norm()))
            rounding = 10 * precision * float(above.norm()) / distance
            error = float((difference - product).norm())
            agrees |= not error > size / 3 + rounding  # NaN is left to other checks
    finally:
        with torch.no_grad():
            for p, old in zip(parameters, saved, strict=True):
                p.copy_(old)
    if not agrees:
        raise _not_differentiable(
            module,
            f"double backward and differences of gradients differ by {error / size:.0%}",
        )
