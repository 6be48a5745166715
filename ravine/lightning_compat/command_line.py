"""Private parts of LightningCLI."""

from typing import Any

from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from .versions import private


class CommandLine(LightningCLI):
    """LightningCLI with public names for the methods that a subclass overrides.

    Reason: a subclass runs the chosen subcommand within its own error handling, and reads the
    checkpoint's configuration before the parser does.

    Upstream: pytorch/cli.py
    Seen on: 2.5.6 to 2.6.6
    """

    def _run_subcommand(self, subcommand: str) -> None:
        self.run_subcommand(subcommand)

    def run_subcommand(self, subcommand: str) -> None:
        """Run `fit`, `validate`, `test` or `predict` of the trainer."""
        private(super(), "_run_subcommand")(subcommand)

    def _parse_ckpt_path(self) -> None:
        """Do nothing: Lightning would use the checkpoint's hyperparameters as arguments."""

    def config_value(self, key: str) -> Any:
        """Return a value of the configuration of the subcommand."""
        return private(self, "_get")(self.config, key)

    def subcommand_parser(self, subcommand: str) -> LightningArgumentParser:
        """Return the parser of a subcommand."""
        return private(self, "_subcommand_parsers")[subcommand]
