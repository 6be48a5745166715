"""Draw docs/figures/initialization.png: `python docs/draw_initialization.py`.

Each line is the scale of the activations by depth in the first training step of a network, as
ScaleMonitor measures it. The panels are the networks of the project, and two chains of linear
layers.
"""

import contextlib
import io
import logging
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import lightning as L
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ravine.callbacks import ScaleMonitor
from ravine.datamodules import ImageDataModule, TextDataModule
from ravine.lightning_modules import Diffusion, ImageClassifier, LanguageModel
from ravine.lightning_modules.nn.initialization import Initialization, initialize

TARGET = Path(__file__).resolve().parent / "figures" / "initialization.png"
PREFIX = "scale/activation/"
NUM_LAYERS, WIDTH = 20, 256  # of the chains


class Chain(L.LightningModule):
    """Linear layers in a row on normal inputs (512 256), with or without relu between them."""

    def __init__(self, initialization: Initialization, has_relu: bool) -> None:
        """Create the layers."""
        super().__init__()
        self.net = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(NUM_LAYERS)))
        self.has_relu = has_relu
        initialize(self.net, initialization)

    def train_dataloader(self) -> DataLoader[Tensor]:
        """Return one batch."""
        return DataLoader(torch.randn(512, WIDTH), batch_size=512)  # type: ignore[arg-type]

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        """Return the mean square of the output."""
        for layer in self.net:
            batch = layer(batch)
            batch = batch.relu() if self.has_relu else batch
        return batch.square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return gradient descent."""
        return torch.optim.SGD(self.parameters(), lr=0.0)


def make_text_data(folder: str) -> TextDataModule:
    """Return a small text."""
    path = Path(folder, "text.txt")
    path.write_text("the quick brown fox jumps over the lazy dog; " * 200)
    return TextDataModule(path, context_length=32, batch_size=16)


def make_networks(folder: str) -> dict[str, Callable[[Initialization], tuple[Any, Any]]]:
    """Return a function from the initialization to module and data, by the title of a panel."""

    def digits() -> ImageDataModule:
        return ImageDataModule("digits", batch_size=64)

    layers = {"num_layers": 12, "d_model": 128, "num_heads": 4}
    return {
        "20 linear layers of 256": lambda name: (Chain(name, False), None),
        "20 linear layers of 256 with relu": lambda name: (Chain(name, True), None),
        "LanguageModel, zero_init_residual=False": lambda name: (
            LanguageModel(**layers, zero_init_residual=False, initialization=name),
            make_text_data(folder),
        ),
        "LanguageModel (default)": lambda name: (
            LanguageModel(**layers, initialization=name),
            make_text_data(folder),
        ),
        "Diffusion (U-Net)": lambda name: (
            Diffusion(base_channels=32, time_embed_dim=64, initialization=name),
            digits(),
        ),
        "ImageClassifier, convolutional": lambda name: (
            ImageClassifier("convolutional", initialization=name),
            digits(),
        ),
        "ImageClassifier, small_cnn": lambda name: (
            ImageClassifier("small_cnn", initialization=name),
            digits(),
        ),
        "ImageClassifier, mlp": lambda name: (
            ImageClassifier("mlp", initialization=name),
            digits(),
        ),
    }


def measure(module: L.LightningModule, data: Any, folder: str) -> dict[str, float]:
    """Return the scale of the activations by layer, in the order of the forward pass."""
    trainer = L.Trainer(
        max_steps=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[ScaleMonitor()],
    )
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.fit(module, data)
    scales = trainer.callback_metrics
    return {n.removeprefix(PREFIX): float(scales[n]) for n in scales if n.startswith(PREFIX)}


def draw(names: tuple[Initialization, ...] = get_args(Initialization)) -> None:
    """Measure all networks, print the last scale of each, and draw the figure."""
    figure = Figure(figsize=(16, 9), layout="constrained", dpi=110)
    figure.suptitle("Scale of the activations at the start of training", fontsize=13)
    with tempfile.TemporaryDirectory() as folder:
        for index, (title, make) in enumerate(make_networks(folder).items(), 1):
            axes = figure.add_subplot(2, 4, index, ylabel="RMS of activations")
            for style, name in zip(("k-", "o-", "s-", "^-", "v-", "D-"), names, strict=False):
                L.seed_everything(0, verbose=False)
                scales = measure(*make(name), folder)
                positive = [(i, s) for i, s in enumerate(scales.values()) if s > 0]
                axes.plot(*zip(*positive, strict=True), style, ms=3, lw=1.1, label=name)
                print(f"{title}: {name}: {list(scales.values())[-1]:.3g}", flush=True)
            axes.set_title(title, fontsize=11)
            axes.set_yscale("log")
            axes.grid(alpha=0.3)
            labels = [layer.removeprefix("net.").removeprefix("blocks.") for layer in scales]
            if title.startswith("20"):
                axes.set_xlabel("layer")
            else:
                axes.set_xticks(range(len(labels)), labels, rotation=90, fontsize=8)
            if index == 1:
                axes.legend(fontsize=9)
    TARGET.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_png(TARGET)


if __name__ == "__main__":
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    if not sys.warnoptions:
        import warnings

        warnings.simplefilter("ignore")
    draw()
