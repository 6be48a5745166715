"""What Lightning says and nobody can act on: advertisements, and warnings about what is meant."""

import logging
import warnings

SILENCED_LOG_PREFIXES = (  # beginnings, on Lightning's own logger
    "💡 Tip:",  # packages of its makers
    "GPU available:",  # the trainer says in one line what it runs on
    "TPU available:",
    "Using bfloat16 Automatic Mixed Precision",  # and in which precision
    "Restoring states from the checkpoint",  # that it has restored them is said as well
)
SILENCED_WARNINGS = (  # beginnings, as regular expressions
    # data sets in memory are faster without worker processes
    r"The '\w+' does not have many workers",
    # a short run; the last step is logged whatever the interval
    r"The number of training batches \(\d+\) is smaller than the logging interval",
    # each run has a folder of its own: the loggers find config.yaml in it, and nothing to lose;
    # a continued run keeps its new checkpoints in the new one
    r"Experiment logs directory .* exists and is not empty",
    r"Checkpoint directory .* exists and is not empty",
    r"The dirpath has changed from",
    # Lightning's summary of the parameters; it counts them all the same
    r"Precision .* is not supported by the model summary",
    # the figures' font lacks a character of the run's name; the figure shows a box in its place
    r"Glyph \d+ .* missing from",
    # Lightning's own use of torch
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
)


def _is_wanted(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(SILENCED_LOG_PREFIXES)


def silence_lightning() -> None:
    """Leave these out from now on, in this process; whatever else is said still is."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_wanted)
    for text in SILENCED_WARNINGS:
        warnings.filterwarnings("ignore", text)
