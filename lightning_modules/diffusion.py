"""Diffusion: learn to take noise off an image, then make images of nothing but noise (lecture 6).

The formulas are in `imaging/denoising.py`; here: what a step draws, what is logged, what is made.

Axes: b batch, n images, c y x images, s noise steps.
"""

import inspect
import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from ravine.datamodules.image_set import check_labels, describe_classes
from ravine.datamodules.images import to_float, to_uint8
from ravine.datamodules.loaders import Share, global_seed
from ravine.errors import UsageError
from ravine.lightning_compat import attached_trainer, should_update_logs

from .diffusion_core import samplers
from .diffusion_core.captured_denoiser import Recordings
from .diffusion_core.counter_rng import key, normals, of_step
from .diffusion_core.denoiser import Conditioning, Denoising
from .diffusion_core.image_grid import Pictures
from .diffusion_core.loss_by_noise_level import LEVELS, MIDDLES, Levels, named
from .diffusion_core.noise_schedules import Kind, Schedule
from .diffusion_core.parameterization import Prediction, Weight
from .diffusion_core.sampling import Way, pick, sample
from .nn.unet import UNet, write
from .plots import diffusion as draw
from .task_module import TaskModule


def numbered(classes: int) -> tuple[str, ...]:
    """Names of classes that have none: their numbers."""
    return tuple(str(number) for number in range(classes))


class Diffusion(TaskModule):
    """A U-Net that takes noise off; batches are (images (b c y x) in [-1, 1], labels (b)).

        model = Diffusion(labels=True, process="cosine")
        Trainer(max_steps=4000).fit(model, datamodule=ImageDataModule("mnist"))
        model.generate(labels="0-9", guidance=0.5).save("digits.png")

    Args:
        conditioning: what the net is told: the lecture's three attempts.
        process: how α and σ run.
        prediction: what the net is asked for.
        weight: of the levels in the loss.
        labels: tell the net the label too.
        label_dropout: share of images whose label is withheld, for guidance.
        width: of the U-Net, and below its other arguments.
        time_width: of the embedding of time and label.
        patch: pixels on a side that the net sees as one; 2 makes a step three times as fast.
        attention: at the lowest resolution.
        channels_last: the memory layout; faster in bf16 on a GPU and in fp32 on a CPU.
        sampler: how images are made, unless `generate` is told otherwise, as for the next three.
        steps: calls of the net for an image (two calls each under heun).
        guidance: w; the answer is cond + w (cond - uncond): 0 is the plain conditional answer.
        eta: fresh noise in ddim: 0 is none (the lecture), 1 as much as ancestral.
    """

    unit = "images"
    lr = 2e-4

    def __init__(
        self,
        conditioning: Conditioning = "time",
        process: Kind = "linear",
        prediction: Prediction = "x0",
        weight: Weight = "uniform",
        labels: bool = False,
        label_dropout: float = 0.1,
        width: int = 64,
        time_width: int = 256,
        patch: int = 1,
        attention: bool = False,
        channels_last: bool = False,
        sampler: samplers.Name = "ddim",
        steps: int = 50,
        guidance: float = 0.0,
        eta: float = 0.0,
    ) -> None:
        """Check the arguments before any work is done."""
        super().__init__()
        self.save_hyperparameters()
        schedule = Schedule(process)
        self.denoising = Denoising(schedule, prediction, weight, conditioning, channels_last)
        self.labels, self.label_dropout = labels, label_dropout
        if not 0 <= label_dropout < 1:
            raise UsageError(
                f"label_dropout is {label_dropout}; allowed: 0 to below 1; "
                "type --model.label_dropout=0.1"
            )
        self.one_step = conditioning == "one_step"
        self.withheld = labels and label_dropout > 0
        self.way = Way(sampler, steps, guidance, eta).of(self.withheld, self.one_step)
        schedule.path(self.way.steps)
        names = "width", "time_width", "patch", "attention"
        self.shape = {name: self.hparams[name] for name in names}
        with torch.device("meta"):  # nothing is allocated, every check is made
            UNet(**self.shape)
        self.channels, self.classes, self.size = 0, 0, (0, 0)  # the data's
        self.class_names: tuple[str, ...] = ()  # with labels, in the order of their numbers
        self.recordings = Recordings()  # of sampling, for one evaluation
        self.trained = Levels(1)  # since the last log
        self.judged, self.seen = Levels(2), 0  # of an evaluation; images so far

    def build(self) -> nn.Module:
        """The lecture's U-Net, for the data's images."""
        if not self.channels:
            raise UsageError(
                "Diffusion takes the images' size from the data, and there are none; "
                "type --data=ImageDataModule, or load a checkpoint"
            )
        net = UNet(self.channels, classes=self.classes, **self.shape)
        layout = torch.channels_last if self.denoising.channels_last else torch.contiguous_format
        return net.to(memory_format=layout)  # pyright: ignore[reportCallIssue]

    def adopt(self, datamodule: Any) -> None:
        """Take the images' channels, classes, and size, which may change; refuse others."""
        classes = datamodule.num_classes if self.labels else 0
        if self.labels and not classes:
            raise UsageError("the data have no labels; type --model.labels=false")
        if self.labels and hasattr(datamodule, "pictures"):  # one too high would mean: not given
            check_labels(datamodule.pictures("train")[1], classes, "the data to train")
        if self.labels and classes == 1:
            raise UsageError(
                "all images of the data are of one class, so a label tells the model nothing; "
                "allowed are two classes or more: type --model.labels=false"
            )
        names = tuple(getattr(datamodule, "class_names", ())) or numbered(classes)
        found = (datamodule.channels, classes)
        self._agree(found, names, (self.channels, self.classes), self.class_names)
        self.size, (self.channels, self.classes) = tuple(datamodule.size), found
        self.class_names = names if self.labels else ()

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """The net's answers to x (b c y x), in its own type: noise is fp32 whatever that is."""
        own = next(w.dtype for w in self.parameters() if w.is_floating_point())
        return super().forward(x.to(own), t, y)

    def denoise(
        self, x: Tensor, t: Tensor, y: Tensor | None = None, guidance: float = 0.0
    ) -> Tensor:
        """The images x0 that x (b c y x) at times t (b), with labels y (b), are taken to be."""
        return self.denoising.denoise(self, x, t, y, guidance, self.classes)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        """Mean loss at times spread evenly over the whole step's images.

        Times, noise and dropped labels are those of (seed, step, place in the step): the same on
        any number of ranks and accumulated batches.
        """
        x0, y, *_ = batch
        trainer = attached_trainer(self)
        share, b = Share.of(trainer), len(x0)
        first = (index % share.accumulate * share.size + share.rank) * b
        places = torch.arange(first, first + b, device=x0.device)
        name = (global_seed(None), "training", self.global_step)
        draws = of_step(name, places, b * share.size * share.accumulate, x0)
        if self.classes:
            y = y.masked_fill(draws.label < self.label_dropout, self.classes)
        t = self.denoising.times(draws.u)
        error = self.denoising.errors(self, x0, t, y, draws.noise)[0]
        loss = error.mean()
        self.log("train/loss", loss)
        if trainer is not None and not self.one_step:
            level = (draws.u * LEVELS).long().clamp(max=LEVELS - 1)
            self.trained.add(level, error.detach()[:, None])
            if should_update_logs(trainer):  # ten `log`s cost 1 ms
                means, _ = self.trained.means()
                self.log_dict(named("train/loss", self.denoising.times, means[:, 0]))
                self.trained = Levels(1)
        return loss

    def on_validation_epoch_start(self) -> None:
        """Start the sums anew."""
        self.judged, self.seen = Levels(2), 0

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        """Errors at a fixed grid of times with fixed noise: image i at level i modulo 10."""
        x0, y, *_ = batch
        share, b = Share.of(attached_trainer(self)), len(x0)
        numbers = share.rank + share.size * torch.arange(self.seen, self.seen + b, device=x0.device)
        self.seen += b
        level = numbers % LEVELS
        t = self.denoising.times(MIDDLES.to(x0.device)[level])
        eps = normals(key("validation"), numbers, tuple(x0.shape[1:]))
        error, x, answer = self.denoising.errors(self, x0, t, y, eps)
        of_x0 = (self.denoising.meant(answer, x, t) - x0).square().mean((1, 2, 3))
        self.judged.add(level, torch.stack((error, of_x0), 1))

    def on_validation_epoch_end(self) -> None:
        """Log the loss, and the squared error of the image at each level."""
        stage = "test" if self.trainer.testing else "val"
        total = self.trainer.strategy.reduce(self.judged.sums, reduce_op="sum")
        mean, there = self.judged.means(total)  # of few images some levels may have none
        self.log(f"{stage}/loss", mean[there, 0].mean().float())
        self.log(f"{stage}/x0_mse", mean[there, 1].mean().float())
        if not self.one_step:
            self.log_dict(named(f"{stage}/x0_mse", self.denoising.times, mean[:, 1]))

    def on_validation_end(self) -> None:
        """Give the recordings' memory back; callbacks have drawn their images by now."""
        self.recordings = Recordings()

    on_test_epoch_start = on_validation_epoch_start
    test_step = validation_step
    on_test_epoch_end = on_validation_epoch_end
    on_test_end = on_validation_end

    def sample_images(self, index: Tensor, labels: Tensor | None = None, seed: int = 0) -> Tensor:
        """The images of these numbers (n), of these labels (n), as bytes, uint8 (n c y x).

        A number always gives the same image. Without labels, a net that knows them takes them in
        turn.
        """
        index = index.to(self.device)
        if self.classes:
            labels = index % self.classes if labels is None else labels.to(self.device)
        return self._sample(index, labels, self.way, seed, 256)

    def generate(
        self,
        labels: Sequence[int | str] | str | None = None,
        num_samples: int | None = None,
        guidance: float | None = None,
        steps: int | None = None,
        sampler: samplers.Name | None = None,
        eta: float | None = None,
        seed: int = 0,
        batch_size: int = 256,
    ) -> Pictures:
        """Make images; the same seed gives the same ones.

        model.generate(labels="0-9", guidance=0.5, steps=20).save("digits.png")

        Args:
            labels: what they shall show, by number or by the name of a class, "3", "0-4,7",
                "cat,dog" or [3, 5]: a row each; by default all.
            num_samples: images of each label, by default 8; without labels in all, by default 64.
            guidance: by default that of the model, as for the next three.
            steps: calls of the net.
            sampler: ddim, ancestral, euler, heun or dpm.
            eta: fresh noise in ddim.
            seed: decides the images, each by its number.
            batch_size: images made at once.
        """
        given = {"guidance": guidance, "steps": steps, "sampler": sampler, "eta": eta}
        way = self.way.of(self.withheld, self.one_step, **given)
        asked = pick(labels, self._names())
        count = (8 if asked else 64) if num_samples is None else num_samples
        if count < 1 or batch_size < 1:
            raise UsageError("num_samples and batch_size must be 1 or more; type --num_samples=8")
        index = torch.arange(count * max(1, len(asked)), device=self.device)
        shown = torch.tensor(asked, device=self.device).repeat_interleave(count)
        images = self._sample(index, shown if asked else None, way, seed, batch_size)
        rows = tuple(self._names()[number] for number in asked)
        return Pictures(images, count if asked else math.ceil(math.sqrt(count)), rows)

    def try_generate(self, **arguments: Any) -> Pictures:
        """One image in one step for these arguments of `generate`, all of which are checked."""
        given = inspect.signature(self.generate).bind(**arguments)
        given.apply_defaults()
        asked: Any = given.arguments
        names = "guidance", "steps", "sampler", "eta"
        way = self.way.of(self.withheld, self.one_step, **{name: asked[name] for name in names})
        labels = pick(asked["labels"], self._names())
        count = asked["num_samples"]
        if (count is not None and count < 1) or asked["batch_size"] < 1:
            raise UsageError("num_samples and batch_size must be 1 or more; type --num_samples=8")
        index = torch.arange(1, device=self.device)
        shown = torch.tensor(labels[:1], device=self.device) if labels else None
        images = self._sample(index, shown, replace(way, steps=1), asked["seed"], 1)
        self.recordings = Recordings()
        return Pictures(images, 1)

    def figures(self, datamodule: Any) -> dict[str, Any]:
        """The way back, estimates at each level, and what lies between two noises."""
        few = to_float(datamodule.pictures("train")[0][:2].to(self.device))
        return draw.everything(self.denoise, self.denoising.schedule, self.way, few, self.classes)

    def export(self, folder: str, format: Literal["safetensors"] = "safetensors") -> str:
        """Write the net's weights, and what it takes to build it again, into a folder.

        Args:
            folder: where; files of the same names are replaced.
            format: safetensors.
        """
        names = "process", "prediction", "conditioning"
        return write(cast(UNet, self.net), folder, {name: self.hparams[name] for name in names})

    def _names(self) -> tuple[str, ...]:
        """The classes' names; their numbers where neither data nor checkpoint name them."""
        return self.class_names or numbered(self.classes)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The data's sizes travel with the weights."""
        super().on_save_checkpoint(checkpoint)
        sizes = {"channels": self.channels, "size": [*self.size], "classes": self.classes}
        checkpoint["images"] = sizes | {"class_names": [*self.class_names]}
        checkpoint["images"]["trained"] = self.trained.sums.cpu()  # until the next log line

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take them from a checkpoint, unless the data brought others."""
        super().on_load_checkpoint(checkpoint)
        saved = checkpoint["images"]
        self.trained.sums = saved.get("trained", self.trained.sums)
        model = saved["channels"], saved["classes"]
        names = tuple(saved.get("class_names", ())) or numbered(saved["classes"])
        if self.channels:
            self._agree((self.channels, self.classes), self.class_names, model, names)
        else:
            (self.channels, self.classes), self.size = model, tuple(saved["size"])
            self.class_names = names

    def _agree(
        self,
        data: tuple[int, int],
        names: tuple[str, ...],
        model: tuple[int, int],
        known: tuple[str, ...],
    ) -> None:
        """Refuse data of other channels and classes than the model has, if it has any yet."""
        if model[0] and data != model:
            raise UsageError(
                f"the data have {data[0]} channels and {data[1]} classes, the model {model[0]} and "
                f"{model[1]}; type --data.source=... with the data that the model was trained on"
            )
        if model[1] and names != known:
            raise UsageError(
                f"the data have the classes {describe_classes(names)}; the model was trained on "
                f"{describe_classes(known)}, in this order; type --data.source=... with the same "
                "folders"
            )

    def _sample(
        self, index: Tensor, labels: Tensor | None, way: Way, seed: int, batch_size: int
    ) -> Tensor:
        net, trainer = cast(nn.Module, self.net), attached_trainer(self)
        context, recordings = nullcontext(), Recordings()
        if trainer is not None and trainer.state.status == "running":  # as in a validation step
            context, recordings = trainer.precision_plugin.forward_context(), self.recordings

        def denoise(x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
            return self.denoise(x, t, y, way.guidance).clamp(-1, 1)

        size = (self.channels, self.size[0], self.size[1])
        asked = self.denoising.schedule, way, index, labels, size, seed, batch_size
        with context, recordings.used_by(net) as record:
            return to_uint8(sample(denoise, *asked, record))
