"""`self.log`, short where a training step logs the same name as the step before: 4 us, not 370."""

from typing import Any

import lightning as L
import torch
from torch import Tensor


def quick_log(self: L.LightningModule, name: str, value: Any, *args: Any, **options: Any) -> None:
    """Take the place of `LightningModule.log` while a lean loop runs an epoch.

    The first call of a name goes the long way and remembers where its value is kept; any other
    kind of value, hook or option always does.
    """
    loop: Any = self.trainer.fit_loop.epoch_loop
    plain = self._current_fx_name == "training_step" and not args and isinstance(value, Tensor)
    metric, known = loop.logged.get(name, (None, None))
    if (
        plain
        and metric is not None
        and known == options
        and value.ndim == 0
        and not (metric.meta.on_epoch and options.get("batch_size") is None)
        and self.trainer._logger_connector._first_loop_iter is False
    ):
        value = value.detach()
        if metric.meta.on_epoch or metric.meta.sync.should or value.dtype is not torch.float32:
            metric.forward(value, options.get("batch_size", 1))
        else:  # what `forward` comes to when nothing is summed up: the value of this step
            metric._forward_cache = metric.value = value.clone()  # it may be changed in place
            metric._computed = None
        metric.has_reset = False
        return
    type(self).log(self, name, value, *args, **options)
    if plain:
        metric = loop._results.get(f"training_step.{name}")
        if metric is not None and metric.is_tensor:
            loop.logged[name] = (metric, options)
