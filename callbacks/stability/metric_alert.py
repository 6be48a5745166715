"""MetricAlert: warn of mode collapse when a metric of sample quality falls below a bound."""

from typing import Any

import lightning as L
from lightning.pytorch.utilities.types import STEP_OUTPUT

from ravine.errors import UsageError, sort_by_similarity

from ..base import OptimizerStepCallback
from ..checks.run_checks import add_run_checks
from ..monitoring.progress import get_log_interval

DEFAULT_MIN_VALUES = {"train/frac_unique_texts": 0.5}
# relative to the first value: short texts have no word n-grams and a Jaccard distance of 0
DEFAULT_MIN_FRACTIONS = {"train/jaccard_distance_mean": 0.5, "train/frac_in_vocab": 0.25}


class MetricAlert(OptimizerStepCallback):
    """Prints a line when a logged metric falls below a bound, and another when it has recovered.

    Example: `Trainer(callbacks=[MetricAlert(min_fraction_of_first={"train/frac_in_vocab":
    0.25})])`. The metrics are read every log interval. By default they are those of a policy, of
    which the module must log one: fraction of distinct samples, mean distance between samples,
    fraction of real words.

    Args:
        min_value: smallest value of each metric.
        min_fraction_of_first: smallest fraction of the first value of each metric.
    """

    def __init__(
        self,
        min_value: dict[str, float] | None = None,
        min_fraction_of_first: dict[str, float] | None = None,
    ) -> None:
        """Set the bounds, and start without an active alert.

        Args:
            min_value: smallest value by metric.
            min_fraction_of_first: smallest fraction of the first value by metric.
        """
        # all of these must be logged; of the defaults, one is enough
        self.requested = {*(min_value or {}), *(min_fraction_of_first or {})}
        if min_value is None and min_fraction_of_first is None:
            min_value, min_fraction_of_first = DEFAULT_MIN_VALUES, DEFAULT_MIN_FRACTIONS
        self.min_value, self.min_fraction_of_first = min_value or {}, min_fraction_of_first or {}
        self.first_values: dict[str, float] = {}  # by metric
        self.events: list[dict[str, Any]] = []  # past alerts: step, metric, value, bound
        self.active: list[str] = []  # metrics that are below their bound

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Add RunChecks, which looks for the metrics before the first step."""
        add_run_checks(trainer, pl_module, stage)

    def needed_metrics(self) -> tuple[str, list[set[str]]]:
        """Return the required metrics: all of the given ones, or any one of the defaults."""
        watched = {*self.min_value, *self.min_fraction_of_first}
        groups = [{name} for name in sorted(self.requested)] or [watched]
        return (
            "min_value" if self.requested & self.min_value.keys() else "min_fraction_of_first",
            groups,
        )

    @property
    def state_key(self) -> str:
        """Return a constant key: a run has one MetricAlert."""
        return "MetricAlert"

    def state_dict(self) -> dict[str, Any]:
        """Return the first values, the past alerts and the active ones."""
        return {"first_values": self.first_values, "events": self.events, "active": self.active}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the first values and the alerts."""
        self.first_values, self.events = (
            dict(state_dict["first_values"]),
            list(state_dict["events"]),
        )
        self.active = list(state_dict["active"])

    def on_optimizer_step_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: STEP_OUTPUT, batch: Any
    ) -> None:
        """Check the metrics after the first step of the run, and every log interval.

        The base class calls it after each optimizer step and counts the steps in `self.step`.

        Raises:
            UsageError: the module does not log a requested metric, or logs none of the defaults.
        """
        is_log_step = self.step % get_log_interval(trainer) == 0
        if self.first_values and not is_log_step:
            return
        metrics = trainer.callback_metrics
        watched = {*self.min_value, *self.min_fraction_of_first}
        values = {name: float(metrics[name]) for name in sorted(watched & metrics.keys())}
        # self.requested: the metrics that the user named
        missing = self.requested - values.keys() if values else watched
        if missing:
            name = type(pl_module).__name__
            logged = sorted(metrics)
            near = sort_by_similarity(min(missing), logged)[0] if logged else ""
            raise UsageError(
                f"MetricAlert: {name} does not log {', '.join(sorted(missing))}",
                logged or ["none: the module logs no metric"],
                hint=f"use min_value={{{near!r}: 0.5}}"
                if near
                else "remove MetricAlert() from Trainer(callbacks=...)",
                flag=f"--trainer.callbacks.{type(self).__name__}.min_value='{{{near}: 0.5}}'"
                if near
                else "",
            )
        # a metric may be logged for the first time now
        self.first_values = values | self.first_values  # earlier values are kept
        for name, value in values.items():
            self._check_metric(pl_module, name, value)

    def _check_metric(self, module: L.LightningModule, name: str, value: float) -> None:
        """Compare a metric with its bound; print a line when it falls below, or has recovered."""
        min_fraction = self.min_fraction_of_first.get(name)
        # `min_value` takes precedence over a fraction of the first value
        bound = 0.0 if min_fraction is None else min_fraction * self.first_values[name]
        bound = self.min_value.get(name, bound)
        if value >= bound:
            if name in self.active:
                self.active.remove(name)
                module.print(f"step {self.step}: {name} has recovered: {value:.3g}")
            return
        if name in self.active:
            return  # reported when it fell below
        self.active.append(name)
        self.events.append({"step": self.step, "metric": name, "value": value, "bound": bound})
        first_value_note = (
            f" (at first {self.first_values[name]:.3g})" if min_fraction is not None else ""
        )
        module.print(
            f"step {self.step}: {name} is {value:.3g}, below {bound:.3g}{first_value_note}: the "
            "samples have degenerated; a lower learning rate, a KL penalty (kl.beta) or another "
            "reward may prevent it"
        )
