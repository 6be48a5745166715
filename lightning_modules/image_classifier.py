"""Which class an image shows: lecture 4's three models, from a line to convolutions.

    linear          W x + b
    mlp             W2 relu(W1 x + b1) + b2
    convolutional   3 x (convolution 3x3, halve, normalise, relu), 64 features, W f + b

The features before the last layer are what distances between sets of images are measured in.
Axes: b batch, c channels, y rows, x columns, k classes, d features.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ravine.datamodules.image_set import describe_classes
from ravine.datamodules.images import to_float
from ravine.datamodules.loaders import generator, global_seed
from ravine.errors import UsageError

from .task_module import TaskModule

Variant = Literal["linear", "mlp", "convolutional"]
SHORT = {"linear": "linear", "mlp": "mlp", "convolutional": "cnn"}
GROUPS = 8  # of channels that are normalised together


class Flat(nn.Module):
    """(b c y x) -> (b c*y*x)."""

    def forward(self, images: Tensor) -> Tensor:
        """Lay the pixels in a row."""
        return rearrange(images, "b c y x -> b (c y x)")


class Net(nn.Module):
    """Images (b c y x) to features (b d) by `body`, and to logits (b k) by `head`."""

    def __init__(self, body: nn.Module, features: int, classes: int) -> None:
        """Put a linear layer on top."""
        super().__init__()
        self.body, self.head = body, nn.Linear(features, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (b k)."""
        return self.head(self.body(images))


def convolutions(channels: int, size: tuple[int, int], features: int) -> nn.Sequential:
    """Three convolutions of 16, 32 and 64 channels, then one dense layer of features.

    Groups of channels are normalised within each image, never over the batch: features then do not
    depend on what else is in the batch, nor on how many ranks share it.
    """
    layers: list[nn.Module] = []
    widths = (channels, 16, 32, 64)
    y, x = size
    for number in range(3):
        inside, outside = widths[number : number + 2]
        layers.append(nn.Conv2d(inside, outside, 3, padding=1, bias=False))  # the norm shifts
        if number < 2 and min(y, x) > 1:
            layers.append(nn.MaxPool2d(2))  # before the norm: a quarter of the work, 99.4 % as well
            y, x = y // 2, x // 2
        layers += [nn.GroupNorm(GROUPS, outside), nn.ReLU()]
    return nn.Sequential(*layers, Flat(), nn.Linear(64 * y * x, features), nn.ReLU())


class ImageClassifier(TaskModule):
    """The class of an image; batches are (images (b c y x) in [-1, 1], labels (b)).

        Trainer(max_epochs=3).fit(ImageClassifier(), datamodule=ImageDataModule("mnist"))

    Sizes come from the data, or from a checkpoint.

    Args:
        variant: the model.
        features: width of the last hidden layer; a linear model has none.
        shift: in training, each batch is moved by up to so many pixels in both directions.
    """

    lr = 1e-3
    columns = ("file", "class", "probability", "label")  # of what predict_step returns

    def __init__(
        self, variant: Variant = "convolutional", features: int = 64, shift: int = 0
    ) -> None:
        """Check the sizes."""
        super().__init__()
        if features < 1 or shift < 0:
            raise UsageError(
                f"features is {features} and shift {shift}; allowed: features 1 or more, shift 0 "
                "or more; type --model.features=64 --model.shift=2"
            )
        self.save_hyperparameters()
        self.variant, self.features, self.shift = variant, features, shift
        self.form: dict[str, Any] = {}  # what the data say: channels, size, class_names, source

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the classes, in the order of their numbers."""
        return tuple(self._form()["class_names"])

    def adopt(self, datamodule: Any) -> None:
        """Take channels, size and classes from the data; refuse data of another form."""
        found = {
            "channels": datamodule.channels,
            "size": list(datamodule.size),
            "class_names": list(datamodule.class_names),
            "source": Path(datamodule.source).name,
        }
        if len(found["class_names"]) < 2:
            raise UsageError(
                f"all images of {found['source']} are of one class, {found['class_names'][0]}, and "
                "a classifier needs two or more; allowed is a folder with a folder for each class: "
                "type --data.source=FOLDER"
            )
        self._take(found, "the data")

    def build(self) -> nn.Module:
        """The net of the variant."""
        form = self._form()
        channels, (y, x) = form["channels"], form["size"]
        pixels, classes = channels * y * x, len(form["class_names"])
        if self.variant == "linear":
            return Net(Flat(), pixels, classes)
        if self.variant == "mlp":
            body = nn.Sequential(Flat(), nn.Linear(pixels, self.features), nn.ReLU())
        else:
            body = convolutions(channels, (y, x), self.features)
        return Net(body, self.features, classes)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        """Mean cross-entropy."""
        images, labels = batch
        if self.shift:
            images = self._moved(images, index)
        loss = F.cross_entropy(self(images).float(), labels)
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        """Loss and accuracy."""
        self._judge(batch, "val")

    def test_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        """Loss and accuracy."""
        self._judge(batch, "test")

    def predict_step(self, batch: Sequence[Any], index: int) -> list[tuple[Any, ...]]:
        """(file, class, its probability, label) for each image; the label is "" where unknown."""
        best = self(batch[0]).float().softmax(1).max(1)  # (b)
        names = self.class_names
        files = batch[2] if len(batch) > 2 else [""] * len(batch[0])
        rows = zip(
            files, best.indices.tolist(), best.values.tolist(), batch[1].tolist(), strict=True
        )
        return [(file, names[k], p, names[true] if true >= 0 else "") for file, k, p, true in rows]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """What the data said travels with the weights."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["images"] = self.form

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take it from a checkpoint, unless the data brought other."""
        super().on_load_checkpoint(checkpoint)
        self._take(checkpoint["images"], "the checkpoint")

    def _take(self, found: dict[str, Any], whose: str) -> None:
        ours, theirs = (one.get("class_names", []) for one in (found, self.form))
        if theirs and sorted(ours) == sorted(theirs) and ours != theirs:
            raise UsageError(
                f"{whose} has the classes in the order {describe_classes(ours)}, the classifier in"
                f" the order {describe_classes(theirs)}; the order must be the same: type"
                " --data.source=... as it was trained"
            )
        for key in ("channels", "size", "class_names"):
            if self.form and self.form[key] != found[key]:
                raise UsageError(
                    f"{whose} has {key} {found[key]} and the classifier {self.form[key]}; they "
                    "must be the same: type --data.source=... as it was trained"
                )
        self.form = self.form or found

    def _form(self) -> dict[str, Any]:
        if not self.form:
            raise UsageError(
                "ImageClassifier takes the size of images and the classes from its data, and there "
                "are none; type --data=ImageDataModule"
            )
        return self.form

    def _moved(self, images: Tensor, index: int) -> Tensor:
        """The batch moved by one draw of (seed, step, batch), which is the same on all ranks."""
        g = generator(global_seed(None), "shift", self.global_step, index)
        r = self.shift
        down, right = torch.randint(2 * r + 1, (2,), generator=g).tolist()
        y, x = images.shape[2:]
        return F.pad(images, (r, r, r, r), value=-1.0)[:, :, down : down + y, right : right + x]

    def _judge(self, batch: tuple[Tensor, Tensor], stage: str) -> None:
        images, labels = batch
        logits, size = self(images).float(), len(labels)
        right = (logits.argmax(1) == labels).float().mean()
        self.log(f"{stage}/loss", F.cross_entropy(logits, labels), batch_size=size, sync_dist=True)
        self.log(f"{stage}/accuracy", right, batch_size=size, sync_dist=True)


class ClassifierFeatures(nn.Module):
    """A trained classifier as a measure of images: bytes (b c y x) -> features (b d).

    FrechetDistance(extractor=ClassifierFeatures("step=000600.ckpt"))

    `name`, e.g. mnist_cnn, is the one its distances are logged by.

    Args:
        path: checkpoint of an `ImageClassifier`.
    """

    def __init__(self, path: str) -> None:
        """Load the weights."""
        super().__init__()
        try:
            module = ImageClassifier.load_from_checkpoint(path, map_location="cpu")
        except Exception as error:  # torch says it in many ways
            why = (str(error) or type(error).__name__).splitlines()[0].partition(";")[0]
            raise UsageError(
                f"{path} cannot be read as a classifier's checkpoint: {why}; train one (lightning "
                "fit --config classifier/mnist), and type --trainer.callbacks.extractor.path=FILE"
            ) from error
        self.net = cast(Net, module.net).requires_grad_(False)
        self.name = f"{module.form['source']}_{SHORT[module.variant]}"
        self.form = (module.form["channels"], *module.form["size"])

    def forward(self, images: Tensor) -> Tensor:
        """Features (b d) of uint8 images."""
        if tuple(images.shape[1:]) != self.form:
            raise UsageError(
                f"images of {tuple(images.shape[1:])} (channels, rows, columns), and {self.name} "
                f"knows {self.form}; give an extractor trained on such images"
            )
        return self.net.body(to_float(images))

    def logits(self, features: Tensor) -> Tensor:
        """What the classifier makes of features, (b d) -> (b k)."""
        return self.net.head(features)
