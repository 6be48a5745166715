"""The private parts of Lightning that Ravine uses. No other package of Ravine touches them.

Each docstring gives the reason for the access (`Reason`), the file of Lightning (`Upstream`) and
the tested versions (`Seen on`). `Upstream: PATH` is the file
https://github.com/Lightning-AI/pytorch-lightning/blob/2.6.1/src/lightning/PATH of Lightning.

    versions.py      tested versions, and the error for a version that lacks a private name
    loops.py         data loaders, fetchers and counters of the training loop
    connectors.py    the parts of a trainer that log, restore and handle signals
    callbacks.py     Lightning's own callbacks
    strategies.py    strategies and optimizers
    command_line.py  LightningCLI; imported by the command line only
    fast_loop.py     the training loop that calls only the implemented hooks

This package imports lightning, torch and `ravine.errors`, and nothing else of Ravine.
"""

from .callbacks import (
    ModelCheckpointAccess,
    averaging_callbacks,
    batch_size_attribute,
    last_saved,
    sets_learning_rate,
    stops_after_search,
)
from .connectors import (
    CheckpointConnector,
    after_registering_signals,
    checkpoint_connector,
    collected_metrics,
    is_log_step,
    log_step_values,
    log_train_step,
    logged_step,
    number_logs_by_step,
    original_handlers,
    replace_checkpoint_connector,
    restore_signal_registration,
    should_update_logs,
)
from .loops import (
    MODULE_REFERENCES,
    after_resuming_at_epoch_end,
    after_resuming_within_epoch,
    attached_trainer,
    combined_iterator,
    combined_loader,
    combined_mode,
    count_optimizer_step,
    data_fetcher,
    install_fast_loop,
    is_prefetching,
    load_batch,
    restore_before_fetch,
    restore_loader_states,
    restore_sigterm_broadcast,
    set_before_fetch,
    set_sampler_epoch,
    should_accumulate,
    skip_next_validation,
    skip_sigterm_broadcast,
    validation_follows,
    validation_loaders,
    without_profiling,
)
from .strategies import (
    ModelParallelAccess,
    allow_any_precision,
    ddp_options,
    precision_names,
    saves_sharded,
    set_saves_sharded,
    start_method,
)
from .versions import (
    SEEN_VERSIONS,
    fast_loop_refusal,
    private,
    replace_method,
    restore_method,
    set_private,
)

__all__ = [
    "MODULE_REFERENCES",
    "SEEN_VERSIONS",
    "CheckpointConnector",
    "ModelCheckpointAccess",
    "ModelParallelAccess",
    "after_registering_signals",
    "after_resuming_at_epoch_end",
    "after_resuming_within_epoch",
    "allow_any_precision",
    "attached_trainer",
    "averaging_callbacks",
    "batch_size_attribute",
    "checkpoint_connector",
    "collected_metrics",
    "combined_iterator",
    "combined_loader",
    "combined_mode",
    "count_optimizer_step",
    "data_fetcher",
    "ddp_options",
    "fast_loop_refusal",
    "install_fast_loop",
    "is_log_step",
    "is_prefetching",
    "last_saved",
    "load_batch",
    "log_step_values",
    "log_train_step",
    "logged_step",
    "number_logs_by_step",
    "original_handlers",
    "precision_names",
    "private",
    "replace_checkpoint_connector",
    "replace_method",
    "restore_before_fetch",
    "restore_loader_states",
    "restore_method",
    "restore_signal_registration",
    "restore_sigterm_broadcast",
    "saves_sharded",
    "set_before_fetch",
    "set_private",
    "set_sampler_epoch",
    "set_saves_sharded",
    "sets_learning_rate",
    "should_accumulate",
    "should_update_logs",
    "skip_next_validation",
    "skip_sigterm_broadcast",
    "start_method",
    "stops_after_search",
    "validation_follows",
    "validation_loaders",
    "without_profiling",
]
