"""Pretrained: start from weights that somebody has trained, before anything changes the net."""

import lightning as L

from .transforms import Transform


class Pretrained(Transform):
    """Lets the module's `load_pretrained(path)` fill its net when a training begins.

    lightning fit --config gpt2/finetune --trainer.callbacks.path=gpt2

    A run that goes on from a checkpoint, and an evaluation of one, take their weights from there.

    Args:
        path: a file or folder that the module can read.
    """

    phase = "load"

    def __init__(self, path: str) -> None:
        """Remember where they are."""
        self.path = path
        self.begins = True
        self.missing: FileNotFoundError | None = None

    def identity(self) -> str:
        """The place."""
        return self.path

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Announce the phase; refuse a module that cannot read weights."""
        if not callable(getattr(pl_module, "load_pretrained", None)):
            raise ValueError(
                f"{type(pl_module).__name__} has no method load_pretrained(path); give it one, or "
                "take Pretrained out of trainer.callbacks"
            )
        self.begins = stage == "fit"
        super().setup(trainer, pl_module, stage)

    def transform(self, module: L.LightningModule) -> None:
        """Fill the net."""
        try:
            if self.begins:
                module.load_pretrained(self.path)  # pyright: ignore[reportCallIssue]
        except FileNotFoundError as error:
            self.missing = error  # a run that goes on can do without, and is known only later

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuse to begin without the weights."""
        if self.missing is not None and trainer.ckpt_path is None:
            raise self.missing
