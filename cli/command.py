"""The command line proper: LightningCLI with our Trainer, reached through the front door."""

from typing import Any

from jsonargparse import set_parsing_settings
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI

import ravine.callbacks
import ravine.datamodules
import ravine.lightning_modules
import ravine.strategies  # noqa: F401  bare class names are found among what is imported
from ravine.cli.trainer import Trainer


class Command(LightningCLI):
    """fit, validate, test, predict."""

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse the words given; Lightning would warn that sys.argv holds words as well."""
        self.config = parser.parse_args(args)  # type: ignore[arg-type]

    def _parse_ckpt_path(self) -> None:
        """Nothing: the checkpoint's own words stand before the user's already."""


def run(argv: list[str]) -> int:
    """Run one command and return the exit status; errors are for the front door to word."""
    # A configuration names classes: those that run commands or delete files are denied.
    set_parsing_settings(import_path_denylist=[], config_read_mode_fsspec_enabled=False)
    settings: dict[str, Any] = {"exit_on_error": False, "default_env": True}
    Command(
        save_config_callback=None,
        trainer_class=Trainer,
        seed_everything_default=0,
        parser_kwargs=settings,
        args=argv,
        auto_configure_optimizers=False,
    )
    return 0
