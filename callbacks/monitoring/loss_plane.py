"""WeightPlane: a plane in the space of a module's weights, and the validation loss on it.

    w(s, t) = origin + s e1 + t e2

    three checkpoints   the origin is the first one; e1 and e2 lead to the other two
    main directions     the origin is the end of a path; e1 and e2 are the first two principal
                        components of the path (Li et al., 2018, Visualizing the Loss Landscape of
                        Neural Nets)

Coordinates in the plane are those of an orthonormal basis (Gram-Schmidt), so that a picture shows
distances of weights as they are. Buffers, such as the averages of BatchNorm, are not moved.

Axes: k points, n numbers of the trainable weights.
"""

import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.data import extract_batch_size
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor

from ravine.errors import MissingFileError, UsageError
from ravine.lightning_compat import load_batch, validation_loaders
from ravine.strategies.checkpoint.atomic_io import AtomicCheckpointIO

from ..checks.preserve_state import preserve_state
from .progress import count_rows

LEAST_ANGLE = 1e-6  # of the edges of a plane, in radians


class WeightPlane:
    """A plane through an origin, along two edges.

    Args:
        origin: a point (n).
        edges: two vectors (2 n) that are not parallel.
    """

    def __init__(self, origin: Tensor, edges: Tensor) -> None:
        """Compute the coordinates of the edges; in float64, so that corners are met exactly."""
        self.origin, self.edges = origin.double(), edges.double()
        first, second = self.edges
        # e1 = (width, 0) and e2 = (shift, height) in the orthonormal basis
        self.width = float(first.norm())
        self.shift = float(first @ second) / self.width if self.width else 0.0
        along = first * (self.shift / self.width) if self.width else torch.zeros_like(first)
        self.height = float((second - along).norm())
        self.is_flat = self.height <= LEAST_ANGLE * float(second.norm()) or not self.width

    def coordinates(self, points: Tensor) -> Tensor:
        """Return the coordinates (k 2) of points (k n), projected onto the plane."""
        offsets = points.double() - self.origin
        a = offsets @ self.edges[0] / self.width
        b = (offsets @ self.edges[1] - self.shift * a) / self.height
        return torch.stack((a, b), 1)

    def weights(self, a: float, b: float) -> Tensor:
        """Return the point (n), float64, with these coordinates."""
        t = b / self.height
        s = (a - t * self.shift) / self.width
        return self.origin + s * self.edges[0] + t * self.edges[1]


def plane_of_points(points: Tensor) -> WeightPlane:
    """Return the plane through three points (3 n)."""
    points = points.double()
    return WeightPlane(points[0], points[1:] - points[0])


def plane_of_path(path: Tensor) -> tuple[WeightPlane, list[float]] | None:
    """Return the plane of the main directions of a path (k n), and their shares of the variance.

    None if the path has fewer than two directions.
    """
    origin = path[-1].double()
    offsets = path.double() - origin
    # the eigenvectors of the small matrix (k k) give the principal components
    variances, vectors = torch.linalg.eigh(offsets @ offsets.T)
    if len(path) < 3 or float(variances[-2]) <= 1e-12 * float(variances[-1]):
        return None
    components = vectors[:, [-1, -2]].T @ offsets  # (2 n)
    shares = variances[[-1, -2]] / variances.sum()
    plane = WeightPlane(origin, components / components.norm(dim=1, keepdim=True))
    return plane, shares.tolist()


def trainable_names(module: L.LightningModule) -> list[str]:
    """Return the names of the trainable parameters.

    They are read once in a run: a module with several optimizers freezes some within a step.
    """
    return [name for name, p in module.named_parameters() if p.requires_grad]


def flatten_weights(module: L.LightningModule, names: Sequence[str]) -> Tensor:
    """Return a copy of the parameters of these names (n), on the CPU."""
    return torch.cat([module.get_parameter(name).detach().reshape(-1) for name in names]).cpu()


def read_weights(module: L.LightningModule, names: Sequence[str], path: str) -> Tensor:
    """Return the weights (n) of these names in a checkpoint.

    Raises:
        MissingFileError: there is no such file.
        UsageError: it has no weights of this module.
    """
    if not Path(path).exists():
        raise MissingFileError(
            f"TrajectoryPlot: the checkpoint {path} does not exist",
            hint="pass three existing checkpoints",
            flag="--trainer.callbacks.TrajectoryPlot.checkpoints=[A.ckpt,B.ckpt,C.ckpt]",
        )
    state = AtomicCheckpointIO().load_checkpoint(path, map_location="cpu").get("state_dict", {})
    pieces = []
    for name in names:
        parameter, saved = module.get_parameter(name), state.get(name)
        if not isinstance(saved, Tensor) or saved.shape != parameter.shape:
            saved_shape = "no such weight" if saved is None else f"{tuple(saved.shape)}"
            raise UsageError(
                f"TrajectoryPlot: {path} has no weights of this {type(module).__name__}: {name} "
                f"has the shape {tuple(parameter.shape)}, and the file has {saved_shape}",
                ["checkpoints of this model"],
                hint="pass three checkpoints of this model",
                flag="--trainer.callbacks.TrajectoryPlot.checkpoints=[A.ckpt,B.ckpt,C.ckpt]",
            )
        pieces.append(saved.reshape(-1))
    return torch.cat(pieces)


@torch.no_grad()
def compute_losses(
    trainer: L.Trainer,
    module: L.LightningModule,
    names: Sequence[str],
    points: Iterable[Tensor],
    metric: str | None = None,
    num_batches: int | None = None,
) -> list[float]:
    """Return the validation loss at weights, as a validation would log it.

    Weights, buffers, attributes and random generators are restored afterwards.

    Args:
        trainer: its first validation loader has the data.
        module: its `validation_step` logs the loss.
        names: the parameters that the points replace.
        points: the weights (n) of each evaluation.
        metric: name of the logged loss; by default the first one with a name such as `val/loss`.
        num_batches: validation batches of an evaluation; by default all.

    Raises:
        UsageError: `validation_step` does not log the metric.
    """
    parameters = [module.get_parameter(name) for name in names]
    saved = [p.detach().clone() for p in parameters]
    losses: list[float] = []
    with preserve_state(trainer, module), validation_loaders(trainer, forget=True) as loaders:
        batches = _read_batches(trainer, module, loaders[0], num_batches)
        try:
            for weights in points:
                _set_weights(parameters, weights)
                losses.append(_validate(trainer, module, batches, metric))
        finally:
            for parameter, values in zip(parameters, saved, strict=True):
                parameter.copy_(values)
    return losses


def _read_batches(
    trainer: L.Trainer, module: L.LightningModule, loader: Any, num_batches: int | None
) -> list[Any]:
    limit = trainer.num_val_batches[0] if trainer.num_val_batches else float("inf")
    limit = min(limit, float("inf") if num_batches is None else num_batches)
    batches: list[Any] = []
    for batch in loader:
        if len(batches) >= limit:
            break
        batches.append(load_batch(trainer, module, batch))
    return batches


def _set_weights(parameters: list[torch.nn.Parameter], weights: Tensor) -> None:
    pieces = weights.split([p.numel() for p in parameters])
    for parameter, piece in zip(parameters, pieces, strict=True):
        parameter.copy_(piece.view_as(parameter))


def _validate(
    trainer: L.Trainer, module: L.LightningModule, batches: list[Any], metric: str | None
) -> float:
    """Return the mean of the logged loss over batches, weighted by their sizes as in Lightning."""
    total, count = torch.zeros(()), 0
    names: list[str] = []  # all logged names
    size = 0  # of the running batch
    original = L.LightningModule.log

    def record(self: Any, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        nonlocal total, count, metric
        if self is not module:
            return original(self, name, value, *args, **kwargs)
        names.append(name)
        if metric is None and name.startswith("val") and name.endswith("loss"):
            metric = name
        if name == metric and isinstance(value, Tensor | float | int):
            rows = kwargs.get("batch_size") or size
            total = total + torch.as_tensor(value).detach().float().cpu() * rows
            count += rows
        return None

    step = module.validation_step
    takes_index = is_param_in_hook_signature(step, "batch_idx", min_args=2)
    # the class is patched, because a module's own `log` calls it by `super().log`
    L.LightningModule.log = record  # type: ignore[method-assign]
    try:
        for index, batch in enumerate(batches):
            size = _count_samples(batch)
            step_args = (batch, index) if takes_index else (batch,)
            trainer.strategy.validation_step(*step_args)
    finally:
        L.LightningModule.log = original
    if not count:
        allowed = list(dict.fromkeys(names)) or ["none: validation_step logs nothing"]
        raise UsageError(
            f"TrajectoryPlot: validation_step of {type(module).__name__} does not log "
            f"{metric or 'a loss such as val/loss'}",
            allowed,
            hint=f"use metric={allowed[0]!r}" if names else "log the loss in validation_step",
            flag=f"--trainer.callbacks.TrajectoryPlot.metric={allowed[0]}" if names else "",
        )
    return float(total / count)


def _count_samples(batch: Any) -> int:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of tensors with different sizes
            return extract_batch_size(batch)
    except Exception:  # Lightning cannot tell the size
        return count_rows(batch) or 1
