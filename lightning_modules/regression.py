"""Regression: linear models on finite sums, trained by SGD, with exact gaps (lectures 2 and 4).

    objective(w) = (1/n) sum_i loss(x_i'w, y_i) + l1 |w|_1 + (l2/2) |w|^2

The minimizer w* is known in closed form or to the precision of float64. So the gap to the smallest
value and the distance to w* are exact. With `proximal`, the l1 term is not differentiated: each
optimizer step of SGD is followed by its proximal step, w <- soft_threshold(w, lr l1), which gives
exact zeros.

Axes: s steps of a batch, m members, b draws, n samples, d weights, k points, c classes.
"""

from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

from ravine.datamodules.regression import RegressionBatch
from ravine.errors import UsageError

from .objectives.losses import CURVATURES, LOSSES, SIGN_LOSSES, LossName, soft_threshold
from .objectives.minimizers import find_minimizer
from .objectives.sgd_theory import compute_moments, noise_floor
from .optimization_problem import DtypeName, OptimizationProblem, check_dtype

MAX_NUMBERS = 2**22  # of predictions that are computed at once
MAX_WEIGHTS_OF_MOMENTS = 30  # the fourth moment has d^4 numbers


class Regression(OptimizationProblem):
    """Linear model of a `RegressionDataModule`: regression or classification.

        data = RegressionDataModule("line", batch_size=10)
        Trainer(max_steps=5000, callbacks=[OptimizerPlan(partial(SGD, lr=0.05))]).fit(
            Regression(), datamodule=data
        )

    Args:
        loss: the loss of a sample; `objectives/losses.py` has the formulas.
        l1: weight of the sum of absolute weights; the intercept has no penalty.
        l2: weight of half the sum of squared weights.
        proximal: apply l1 by a proximal step after each step of SGD, instead of by its gradient.
        start: value of every weight at the start.
        dtype: float64 or float32.
    """

    _datamodule_name, _data_flag = "RegressionDataModule", "--data=RegressionDataModule"

    def __init__(
        self,
        loss: LossName = "half_squared",
        l1: float = 0.0,
        l2: float = 0.0,
        proximal: bool = True,
        start: float = 0.0,
        dtype: DtypeName = "float64",
    ) -> None:
        """Check the arguments; sizes come from the data."""
        super().__init__()
        self.save_hyperparameters()
        if loss not in LOSSES:
            raise UsageError(
                f"Regression: there is no loss {loss!r}",
                list(LOSSES),
                "use loss='half_squared'",
                flag="--model.loss=half_squared",
            )
        for name, penalty in (("l1", l1), ("l2", l2)):
            if not 0 <= penalty < float("inf"):
                raise UsageError(
                    f"Regression: {name}={penalty} is not a penalty",
                    ["0 or more"],
                    f"use {name}=0.1",
                    flag=f"--model.{name}=0.1",
                )
        self.loss, self.l1, self.l2, self.proximal, self.start = loss, l1, l2, proximal, start
        self.tensor_dtype = check_dtype("Regression", dtype)
        # from the data: numbers of features, members, replicas and classes, and the intercept
        self.sizes: dict[str, Any] = {}
        self._data: Any = None  # x (n d), y (m n) and batch sizes of the datamodule

    def configure_from_data(self, datamodule: Any) -> None:
        """Read the data and the numbers of features, members and classes."""
        if not all(hasattr(datamodule, name) for name in ("num_members", "batch_sizes", "x", "y")):
            raise UsageError(
                f"Regression: {type(datamodule).__name__} has no finite sum",
                ["RegressionDataModule"],
                "use datamodule=RegressionDataModule()",
                flag="--data=RegressionDataModule",
            )
        self._check_labels(datamodule.num_classes, datamodule.source)
        sizes = {
            "num_features": datamodule.x.shape[1],
            "num_members": datamodule.num_members,
            "num_replicas": datamodule.num_replicas,
            "num_classes": datamodule.num_classes,
            "intercept": datamodule.intercept,
        }
        self.check_data_fields("the datamodule", sizes, self.sizes)
        self.sizes, self.steps_per_batch = sizes, datamodule.steps_per_batch
        self._data = datamodule
        for name in ("minimizers", "hessian"):  # of other data
            self.__dict__.pop(name, None)

    def _check_labels(self, num_classes: int, source: str) -> None:
        """Raise UsageError for a loss that does not fit the labels of the data."""
        # SIGN_LOSSES: losses of labels +1 and -1, such as hinge
        if self.loss in SIGN_LOSSES:
            fits, wanted = num_classes == 2, ["breast_cancer", "separable"]
        elif self.loss == "softmax":
            fits, wanted = num_classes > 2, ["wine"]
        else:
            fits, wanted = num_classes == 1, ["line", "diabetes"]
        if not fits:
            raise UsageError(
                f"Regression: loss={self.loss!r} does not fit the labels of {source}, which have "
                f"{'real values' if num_classes == 1 else f'{num_classes} classes'}",
                [f"source='{name}'" for name in wanted],
                f"use RegressionDataModule({wanted[0]!r})",
                flag=f"--data.source={wanted[0]}",
            )

    @property
    def num_replicas(self) -> int:
        """The number of neighbouring members with the same settings."""
        return self.sizes.get("num_replicas", 1)

    @property
    def num_outputs(self) -> int:
        """Scores of a prediction: the classes of softmax, else 1."""
        return self.sizes["num_classes"] if self.loss == "softmax" else 1

    def start_points(self) -> Tensor:
        """Return the start (m d) of each member; d has every weight of every class."""
        if not self.sizes:
            raise self.missing_data_error("the number of features")
        num_weights = self.sizes["num_features"] * self.num_outputs
        shape = (self.sizes["num_members"], num_weights)
        return torch.full(shape, self.start, dtype=self.tensor_dtype)

    def training_step(self, batch: RegressionBatch) -> Tensor:
        """Return the sum over members of the mean loss of their draws in this step."""
        step = self.step_in_batch
        x, y = batch.x[step], batch.y[step]
        if self.tensor_dtype is not x.dtype:
            x, y = x.to(self.tensor_dtype), y.to(self.tensor_dtype)
        points = self.forward()  # (m d)
        losses = LOSSES[self.loss](self._predict(x, points), y)  # (m b)
        weights = None if batch.weights is None else batch.weights[step]
        if weights is not None:
            values = (losses * weights).sum(-1)  # (m)
        else:  # one draw needs no mean, which would take a tenth of a small step
            values = losses.squeeze(-1) if losses.shape[-1] == 1 else losses.mean(-1)  # (m)
        if self.l2 or (self.l1 and not self.proximal):
            values = values + self._penalty(points, with_l1=not self.proximal)
        if step == 0:  # once in a batch
            self.log("train/objective", values.detach().mean())
        return values.sum()

    def validation_step(self, batch: RegressionBatch) -> None:
        """Log the mean loss of the validation samples, over members."""
        losses = LOSSES[self.loss](self._predict(batch.x[0], self.forward()), batch.y[0])
        self.log("val/loss", losses.mean(), batch_size=losses.shape[-1])

    def count_units(self, batch: RegressionBatch) -> int:
        """Return the draws of a batch, over all steps and members."""
        return batch.y.numel() if batch.weights is None else int((batch.weights > 0).sum())

    def on_train_start(self) -> None:
        """Refuse a proximal step after another step than lr times the gradient."""
        if not (self.l1 and self.proximal):
            return
        for optimizer in self.trainer.optimizers:
            for member in getattr(optimizer, "optimizers", [optimizer]):
                if not isinstance(member, SGD):
                    raise UsageError(
                        "Regression: the proximal step of l1 needs a step of lr times the "
                        f"gradient, and the optimizer is {type(member).__name__}",
                        ["SGD", "proximal=False"],
                        "use OptimizerPlan(partial(SGD, lr=0.1))",
                        flag="--optimizer=SGD",
                    )

    @torch.no_grad()
    def after_optimizer_step(self, optimizer: Optimizer) -> None:
        """Apply the proximal step of l1: soft thresholding by lr l1."""
        if not (self.l1 and self.proximal):
            return
        mask = self._penalized_weights()
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.copy_(soft_threshold(parameter, group["lr"] * self.l1 * mask))

    def evaluate_points(self, points: Tensor) -> Tensor:
        """Return the objective (k m) of all samples at points (k m d)."""
        x, y = self._data.x.to(points.dtype), self._data.y.to(points.dtype)
        size = max(1, MAX_NUMBERS // (y.numel() * self.num_outputs))
        values = [
            LOSSES[self.loss](self._predict(x, piece), y).mean(-1) for piece in points.split(size)
        ]
        return torch.cat(values) + self._penalty(points, with_l1=True)

    def evaluate_gaps(self, points: Tensor) -> Tensor | None:
        """Return the gaps (k m) of points (k m d) to the minimum; None if it is unknown.

        A squared loss without l1 is exactly quadratic, (w - w*)' H (w - w*) / 2, which loses no
        digits to the subtraction of the minimum.
        """
        if self.minimizers is None:
            return None
        if self.loss in CURVATURES and not self.l1:
            errors = points - self.minimizers.to(points.dtype)
            hessian = self.hessian.to(points.dtype)
            return torch.einsum("kmi,ij,kmj->km", errors, hessian, errors) / 2
        minimum = self.known_minimum()
        assert minimum is not None
        return self.evaluate_points(points) - minimum

    @cached_property
    def minimizers(self) -> Tensor | None:
        """The minimizer of each member (m d), float64; None if one has none."""
        penalized = self._penalized_weights()[: self.sizes["num_features"]]
        results: dict[tuple[float, ...], Tensor | None] = {}
        for y in self._data.y:
            key = tuple(y.tolist())
            if key not in results:
                results[key] = find_minimizer(
                    self._data.x, y, self.loss, self.l1, self.l2, penalized, self.num_outputs
                )
            if results[key] is None:
                return None
        return torch.stack([results[tuple(y.tolist())] for y in self._data.y])  # type: ignore

    @cached_property
    def hessian(self) -> Tensor:
        """The Hessian (d d) of a squared loss."""
        x = self._data.x
        penalty = self.l2 * torch.diag(self._penalized_weights())
        return CURVATURES[self.loss] * x.T @ x / len(x) + penalty

    def known_minimizers(self) -> Tensor | None:
        """Return the minimizer of each member (m 1 d); None if unknown."""
        return None if self.minimizers is None else self.minimizers[:, None]

    def known_minimum(self) -> Tensor | None:
        """Return the smallest value of each member's objective (m); None if unknown."""
        return None if self.minimizers is None else self.evaluate_points(self.minimizers[None])[0]

    def predicted_gap(self, lrs: Tensor) -> Tensor | None:
        """Return the noise floors (m) at constant rates (m), of a squared loss with replacement."""
        # CURVATURES: the second derivative of the squared losses, by name
        is_known = self.loss in CURVATURES and self._data.replacement and not (self.l1 or self.l2)
        # the fourth moment of the data has d^4 numbers
        if (
            not is_known
            or self._data.x.shape[1] > MAX_WEIGHTS_OF_MOMENTS
            or self.minimizers is None
        ):
            return None
        return torch.stack(
            [
                noise_floor(
                    compute_moments(self._data.x, y, minimizer, CURVATURES[self.loss]), lr, size
                )
                for y, minimizer, lr, size in zip(
                    self._data.y,
                    self.minimizers,
                    lrs.tolist(),
                    self._data.batch_sizes,
                    strict=True,
                )
            ]
        )

    def samples_per_step(self) -> Tensor | None:
        """Return the batch size of each member (m)."""
        return torch.tensor(self._data.batch_sizes)

    def _predict(self, x: Tensor, points: Tensor) -> Tensor:
        """Return predictions: points (... m d) with features (m b d) or (n d) give (... m b)."""
        if self.num_outputs == 1 and points.shape[-1] == 1:
            return x.squeeze(-1) * points  # one variable: without a matrix product
        if self.num_outputs == 1:
            return (x @ points.unsqueeze(-1)).squeeze(-1)
        matrices = points.unflatten(-1, (self.sizes["num_features"], self.num_outputs))
        return x @ matrices  # (... m b c)

    def _penalized_weights(self) -> Tensor:
        """Return 1 for weights with a penalty and 0 for those of the intercept (d)."""
        mask = torch.ones(self.sizes["num_features"], self.num_outputs, dtype=self.tensor_dtype)
        if self.sizes["intercept"]:
            mask[-1] = 0
        return mask.flatten()

    def _penalty(self, points: Tensor, with_l1: bool) -> Tensor:
        """Return the penalties (...) of points (... d)."""
        penalty = points.new_zeros(points.shape[:-1])
        if not (self.l2 or (self.l1 and with_l1)):
            return penalty
        mask = self._penalized_weights().to(points.dtype)
        if self.l2:
            penalty = penalty + self.l2 / 2 * (mask * points**2).sum(-1)
        if self.l1 and with_l1:
            penalty = penalty + self.l1 * (mask * points.abs()).sum(-1)
        return penalty

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the sizes that come from the data."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["regression"] = dict(self.sizes)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Load the sizes, unless they are already set from the data."""
        super().on_load_checkpoint(checkpoint)
        names = ("num_features", "num_members", "num_replicas", "num_classes", "intercept")
        saved = self.saved_data_fields(checkpoint, "regression", names)
        self.check_data_fields("the checkpoint", saved, self.sizes)
        self.sizes = self.sizes or {name: saved[name] for name in names}
