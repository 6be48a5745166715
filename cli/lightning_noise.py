"""Silence Lightning's advertisements and its warnings about intended behavior."""

import logging
import warnings

SILENCED_LOG_PREFIXES = (  # prefixes of messages of Lightning's logger
    "💡 Tip:",  # advertises other packages
    "GPU available:",  # the trainer prints the device in one line
    "TPU available:",
    "Using bfloat16 Automatic Mixed Precision",  # and the precision
    "-" * 100 + "\ndistributed_backend=",  # a banner; the trainer prints the number of ranks
    "Restoring states from the checkpoint",  # a second message follows after the restore
)
SILENCED_WARNINGS = (  # prefixes, as regular expressions
    # in-memory datasets are faster without worker processes
    r"The '\w+' does not have many workers",
    # short runs: the last step is logged at any interval
    r"The number of training batches \(\d+\) is smaller than the logging interval",
    # each run has its own folder, which contains only config.yaml when the loggers start;
    # a resumed run saves its checkpoints in a new folder
    r"Experiment logs directory .* exists and is not empty",
    r"Checkpoint directory .* exists and is not empty",
    r"The dirpath has changed from",
    # RunChecks prints before the first step that no validation runs, and the reason
    r"You (passed in|defined) a .* Skipping val loop",
    # Lightning's model summary counts the parameters correctly anyway
    r"Precision .* is not supported by the model summary",
    # the font lacks a character of the run's name, and the figure shows a box instead
    r"Glyph \d+ .* missing from",
    # caused by Lightning's own use of torch
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
)


def _is_wanted(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(SILENCED_LOG_PREFIXES)


def silence_lightning() -> None:
    """Filter these messages in this process from now on; other messages are not changed."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_wanted)
    for text in SILENCED_WARNINGS:
        warnings.filterwarnings("ignore", text)
