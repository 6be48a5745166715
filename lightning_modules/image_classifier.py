"""Image classifier: the models of lecture 4 (linear, MLP, small CNN), and a deeper network.

    linear          W x + b
    mlp             W2 relu(W1 x + b1) + b2
    small_cnn       2 x (convolution 3x3, relu), mean over the pixels, W f + b
    convolutional   3 x (convolution 3x3, halve, normalize, relu), 64 features, W f + b

With `head="logistic"`, two classes have one logit a: P(second class) = sigmoid(a). It is the
difference of two logits, so (0, a) takes their place in the loss.

The features before the last layer are the basis of Fréchet distances between sets of images.
Axes: b batch, c channels, y rows, x columns, k classes, d features.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor, nn

from ravine.datamodules.images import to_float
from ravine.datamodules.samplers import resolve_seed, seeded_generator
from ravine.errors import UsageError

from .nn.initialization import Initialization, check_initialization, initialize
from .task_module import TaskModule

Variant = Literal["linear", "mlp", "small_cnn", "convolutional"]
Head = Literal["softmax", "logistic"]
VARIANT_SUFFIXES = {
    "linear": "linear",
    "mlp": "mlp",
    "small_cnn": "small_cnn",
    "convolutional": "cnn",
}
NUM_GROUPS = 8  # groups of channels of GroupNorm
IMAGE_FIELDS = ("channels", "image_size", "class_names")  # the net and its labels depend on them


class FlattenImages(nn.Module):
    """Flatten images: (b c y x) -> (b c*y*x)."""

    def forward(self, images: Tensor) -> Tensor:
        """Flatten the pixels of each image."""
        return rearrange(images, "b c y x -> b (c y x)")


class NormalizePixels(nn.Module):
    """Normalize pixels p of [-1, 1]: ((p + 1) / 2 - mean) / std, so the mean is that of [0, 1]."""

    def __init__(self, mean: float, std: float) -> None:
        """Store the mean and the standard deviation of all channels."""
        super().__init__()
        self.mean, self.std = mean, std

    def forward(self, images: Tensor) -> Tensor:
        """Normalize images of any shape."""
        return images.sub(2 * self.mean - 1).div_(2 * self.std)


class MeanOverPixels(nn.Module):
    """Global mean pooling: (b c y x) -> (b c)."""

    def forward(self, images: Tensor) -> Tensor:
        """Compute the mean of each channel."""
        return reduce(images, "b c y x -> b c", "mean")


class LogisticHead(nn.Linear):
    """One logit a of features (b d), returned as the logits (0, a) of two classes (b 2)."""

    def __init__(self, num_features: int, bias: bool = True) -> None:
        """Create the weights of the logit."""
        super().__init__(num_features, 1, bias)

    def forward(self, input: Tensor) -> Tensor:
        """Compute the logits (b 2); their cross-entropy is the binary one of the logit."""
        return F.pad(super().forward(input), (1, 0))  # (b 2)


class BackboneAndHead(nn.Module):
    """Images (b c y x) to features (b d) by `backbone`, and to logits (b k) by `head`."""

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        """Store both."""
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, images: Tensor) -> Tensor:
        """Compute logits (b k)."""
        return self.head(self.backbone(images))


def make_conv_backbone(
    channels: int, image_size: tuple[int, int], num_features: int
) -> nn.Sequential:
    """Create three convolutions of 16, 32 and 64 channels, then a dense layer of features.

    It maps images (b channels y x) to features (b num_features). Each of the first two convolutions
    is followed by a pooling that halves y and x, unless one of them is 1 already.

    GroupNorm normalizes channels within each image, not over the batch. So features do not depend
    on the other images of the batch, nor on the number of ranks.
    """
    layers: list[nn.Module] = []
    conv_channels = (16, 32, 64)
    in_channels, (y, x) = channels, image_size
    for number, out_channels in enumerate(conv_channels):
        # no bias: the norm has one
        layers.append(nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False))
        if number < 2 and min(y, x) > 1:
            layers.append(nn.MaxPool2d(2))  # before the norm: 1/4 of its work, accuracy also 99.4 %
            y, x = y // 2, x // 2
        layers += [nn.GroupNorm(NUM_GROUPS, out_channels), nn.ReLU()]
        in_channels = out_channels
    dense = nn.Linear(in_channels * y * x, num_features)
    return nn.Sequential(*layers, FlattenImages(), dense, nn.ReLU())


def make_small_cnn_backbone(channels: int, num_features: int) -> nn.Sequential:
    """Create lecture 4's SmallCNN: two convolutions, to half of the features and to all of them.

    It maps images (b channels y x) of any size to features (b num_features). With 3 channels, 16
    features and 5 classes the model has 1,477 parameters in 6 tensors.
    """
    hidden = num_features // 2
    return nn.Sequential(
        nn.Conv2d(channels, hidden, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(hidden, num_features, 3, padding=1),
        nn.ReLU(),
        MeanOverPixels(),
    )


class ImageClassifier(TaskModule):
    """Image classifier; batches are (images (b c y x) in [-1, 1], labels (b)).

        Trainer(max_epochs=3).fit(ImageClassifier(), datamodule=ImageDataModule("mnist"))

    Sizes come from the data, or from a checkpoint.

    Args:
        variant: the model.
        num_features: width of the last hidden layer; a linear model has none.
        max_shift: augmentation: each training batch is shifted by up to this many pixels in y and
            x.
        head: softmax has a logit for each class; logistic has one logit for two classes.
        head_bias: whether the last layer has a bias.
        pixel_mean: mean of the pixels in [0, 1], which the model subtracts.
        pixel_std: standard deviation by which it then divides; 0.5 and 0.5 keep the range [-1, 1].
        initialization: distribution of the net's weights; nn/initialization.py has the formulas.
    """

    lr = 1e-3
    prediction_columns = ("file", "class", "probability", "label")  # columns of predict_step's rows
    _datamodule_name, _data_flag = "ImageDataModule", "--data.source=FOLDER"

    def __init__(
        self,
        variant: Variant = "convolutional",
        num_features: int = 64,
        max_shift: int = 0,
        head: Head = "softmax",
        head_bias: bool = True,
        pixel_mean: float = 0.5,
        pixel_std: float = 0.5,
        initialization: Initialization = "default",
    ) -> None:
        """Store the options; raise UsageError for a size out of range.

        The net is built later, by `build_net`, when the data have set `image_info`.
        """
        super().__init__()
        if num_features < 1 or max_shift < 0:
            raise UsageError(
                f"ImageClassifier: num_features={num_features} and max_shift={max_shift} are not "
                "both valid",
                ["num_features: 1 or more", "max_shift: 0 or more"],
                "use num_features=64, max_shift=2",
                flag="--model.num_features=64 --model.max_shift=2",
            )
        if variant == "small_cnn" and num_features < 2:
            raise UsageError(
                "ImageClassifier: the first convolution of small_cnn has half of num_features, and "
                f"num_features={num_features}",
                ["2 or more"],
                "use num_features=16",
                flag="--model.num_features=16",
            )
        if not (abs(pixel_mean) < float("inf") and 0 < pixel_std < float("inf")):
            raise UsageError(
                f"ImageClassifier: pixel_mean={pixel_mean} and pixel_std={pixel_std} do not "
                "normalize pixels",
                ["a finite mean, and a standard deviation above 0"],
                "use pixel_mean=0.1307, pixel_std=0.3081",
                flag="--model.pixel_mean=0.1307 --model.pixel_std=0.3081",
            )
        check_initialization("ImageClassifier", initialization)
        self.initialization: Initialization = initialization
        self.save_hyperparameters()
        self.variant, self.num_features, self.max_shift = variant, num_features, max_shift
        self.head, self.head_bias = head, head_bias
        self.pixel_mean, self.pixel_std = pixel_mean, pixel_std
        # from the data: channels, image_size, class_names, source
        self.image_info: dict[str, Any] = {}

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, in the order of their indices."""
        return tuple(self._require_image_info()["class_names"])

    def configure_from_data(self, datamodule: Any) -> None:
        """Set channels, size and classes from the data; raise UsageError if the model differs."""
        image_info = {
            "channels": datamodule.channels,
            "image_size": list(datamodule.image_size),
            "class_names": list(datamodule.class_names),
            "source": Path(datamodule.source).name,
        }
        if len(image_info["class_names"]) < 2:
            raise UsageError(
                f"ImageClassifier needs two classes, but all images of {image_info['source']} are "
                f"of the class {image_info['class_names'][0]}",
                ["a folder with a folder for each class"],
                "use ImageDataModule(source=FOLDER)",
                flag="--data.source=FOLDER",
            )
        if self.head == "logistic" and len(image_info["class_names"]) != 2:
            raise UsageError(
                "ImageClassifier: head='logistic' has one logit for two classes, and "
                f"{image_info['source']} has {len(image_info['class_names'])} classes",
                ["head='softmax'", "two classes, or two groups of classes"],
                "use head='softmax'",
                flag="--model.head=softmax",
            )
        # raises UsageError if the model has other channels, size or classes already
        self._set_image_info(image_info, "the datamodule")

    def build_net(self) -> nn.Module:
        """Create the net of the variant, with its initialization."""
        net = self._build_layers()
        initialize(net, self.initialization, output_layer="head")
        return net

    def _build_layers(self) -> BackboneAndHead:
        image_info = self._require_image_info()
        channels, (y, x) = image_info["channels"], image_info["image_size"]
        pixels, num_classes = channels * y * x, len(image_info["class_names"])
        num_features = pixels if self.variant == "linear" else self.num_features
        if self.variant == "linear":
            backbone: nn.Module = FlattenImages()
        elif self.variant == "mlp":
            backbone = nn.Sequential(FlattenImages(), nn.Linear(pixels, num_features), nn.ReLU())
        elif self.variant == "small_cnn":
            backbone = make_small_cnn_backbone(channels, num_features)
        else:
            backbone = make_conv_backbone(channels, (y, x), num_features)
        if (self.pixel_mean, self.pixel_std) != (0.5, 0.5):
            backbone = nn.Sequential(NormalizePixels(self.pixel_mean, self.pixel_std), backbone)
        if self.head == "logistic":
            return BackboneAndHead(backbone, LogisticHead(num_features, self.head_bias))
        return BackboneAndHead(backbone, nn.Linear(num_features, num_classes, self.head_bias))

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        """Mean cross-entropy."""
        images, labels = batch
        if self.max_shift:
            images = self._random_shift(images, index)
        loss = F.cross_entropy(self(images).float(), labels)
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        """Log loss and accuracy."""
        self._eval_step(batch, "val")

    def test_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        """Log loss and accuracy."""
        self._eval_step(batch, "test")

    def predict_step(self, batch: Sequence[Any], index: int) -> list[tuple[Any, ...]]:
        """Return (file, class, probability, label) for each image; an unknown label is ""."""
        best = self(batch[0]).float().softmax(1).max(1)  # (b)
        names = self.class_names
        files = batch[2] if len(batch) > 2 else [""] * len(batch[0])
        rows = zip(
            files, best.indices.tolist(), best.values.tolist(), batch[1].tolist(), strict=True
        )
        return [(file, names[k], p, names[true] if true >= 0 else "") for file, k, p, true in rows]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save image size and classes with the weights."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["images"] = self.image_info

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Load image size and classes, unless they are already set from the data."""
        super().on_load_checkpoint(checkpoint)
        saved = self.saved_data_fields(checkpoint, "images", IMAGE_FIELDS)
        self._set_image_info(saved, "the checkpoint")

    def _set_image_info(self, image_info: dict[str, Any], origin: str) -> None:
        known = {name: self.image_info[name] for name in IMAGE_FIELDS if self.image_info}
        self.check_data_fields(origin, image_info, known)
        self.image_info = self.image_info or image_info

    def _require_image_info(self) -> dict[str, Any]:
        if not self.image_info:
            raise self.missing_data_error("the image size and the classes")
        return self.image_info

    def _random_shift(self, images: Tensor, index: int) -> Tensor:
        """Shift the batch by a random offset of (seed, step, batch), equal on all ranks."""
        g = seeded_generator(resolve_seed(None), "shift", self.global_step, index)
        r = self.max_shift
        shift_down, shift_right = torch.randint(2 * r + 1, (2,), generator=g).tolist()
        y, x = images.shape[2:]
        return F.pad(images, (r, r, r, r), value=-1.0)[
            :, :, shift_down : shift_down + y, shift_right : shift_right + x
        ]

    def _eval_step(self, batch: tuple[Tensor, Tensor], stage: str) -> None:
        images, labels = batch
        logits, batch_size = self(images).float(), len(labels)
        accuracy = (logits.argmax(1) == labels).float().mean()
        self.log(
            f"{stage}/loss", F.cross_entropy(logits, labels), batch_size=batch_size, sync_dist=True
        )
        self.log(f"{stage}/accuracy", accuracy, batch_size=batch_size, sync_dist=True)


class ClassifierFeatures(nn.Module):
    """Feature extractor from a trained classifier: bytes (b c y x) -> features (b d).

        FrechetDistance(extractor=ClassifierFeatures("step=000600.ckpt"))

    `name`, such as mnist_cnn, is part of the logged metric's name.

    Args:
        path: checkpoint of an `ImageClassifier`.
    """

    def __init__(self, path: str) -> None:
        """Load the classifier at `path` and freeze its weights.

        Raises:
            UsageError: the file cannot be loaded; the message has the reason.
        """
        super().__init__()
        try:
            module = ImageClassifier.load_from_checkpoint(path, map_location="cpu")
        except Exception as error:  # torch raises many types of errors
            # `problem` is the first line of a UsageError, without the allowed values and the hint
            text = error.problem if isinstance(error, UsageError) else str(error)
            reason = (text or type(error).__name__).splitlines()[0]
            raise UsageError(
                f"ClassifierFeatures: {path} cannot be loaded as an ImageClassifier: {reason}",
                ["a checkpoint of an ImageClassifier"],
                "train one, and use ClassifierFeatures(FILE)",
                flag="--trainer.callbacks.FrechetDistance.extractor.path=FILE",
            ) from error
        self.net = cast(BackboneAndHead, module.net).requires_grad_(False)
        # the data and the variant, such as mnist_cnn
        self.name = f"{module.image_info['source']}_{VARIANT_SUFFIXES[module.variant]}"
        self.image_shape = (module.image_info["channels"], *module.image_info["image_size"])

    def forward(self, images: Tensor) -> Tensor:
        """Compute features (b d) of uint8 images (b c y x)."""
        if tuple(images.shape[1:]) != self.image_shape:
            raise UsageError(
                f"ClassifierFeatures: images of shape {tuple(images.shape[1:])} (channels, rows, "
                f"columns) do not fit {self.name}, which was trained on {self.image_shape}",
                [f"images of shape {self.image_shape}"],
                "use an extractor that was trained on such images",
            )
        return self.net.backbone(to_float(images))

    def compute_logits(self, features: Tensor) -> Tensor:
        """Map features (b d) to logits (b k)."""
        return self.net.head(features)
