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
from ravine.datamodules.loaders import DataParallelInfo, resolve_seed
from ravine.errors import UsageError
from ravine.lightning_compat import attached_trainer, should_update_logs

from .diffusion_core import samplers
from .diffusion_core.captured_denoiser import GraphCache
from .diffusion_core.counter_rng import derive_key, draw_step_noise, normals
from .diffusion_core.denoiser import Denoiser, TimeConditioning
from .diffusion_core.image_grid import ImageGrid
from .diffusion_core.loss_by_noise_level import (
    BUCKET_CENTERS,
    NUM_BUCKETS,
    LossByNoiseLevel,
    name_bucket_metrics,
)
from .diffusion_core.noise_schedules import NoiseScheduleName, Schedule
from .diffusion_core.parameterization import LossWeighting, PredictionType
from .diffusion_core.sampling import SamplerConfig, parse_labels, sample_images
from .nn.unet import UNet, save_pretrained
from .plots import diffusion as draw
from .task_module import TaskModule


def default_class_names(num_classes: int) -> tuple[str, ...]:
    """Names of classes that have none: their numbers."""
    return tuple(str(number) for number in range(num_classes))


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
        conditioning: TimeConditioning = "time",
        process: NoiseScheduleName = "linear",
        prediction: PredictionType = "x0",
        weight: LossWeighting = "uniform",
        labels: bool = False,
        label_dropout: float = 0.1,
        width: int = 64,
        time_width: int = 256,
        patch: int = 1,
        attention: bool = False,
        channels_last: bool = False,
        sampler: samplers.SamplerName = "ddim",
        steps: int = 50,
        guidance: float = 0.0,
        eta: float = 0.0,
    ) -> None:
        """Check the arguments before any work is done."""
        super().__init__()
        self.save_hyperparameters()
        schedule_object = Schedule(process)
        self.denoiser = Denoiser(schedule_object, prediction, weight, conditioning, channels_last)
        self.class_conditional, self.class_dropout_prob = labels, label_dropout
        if not 0 <= label_dropout < 1:
            raise UsageError(
                f"label_dropout is {label_dropout}; allowed: 0 to below 1; "
                "type --model.label_dropout=0.1"
            )
        self.is_one_step = conditioning == "one_step"
        self.supports_guidance = labels and label_dropout > 0
        self.sampler_config = SamplerConfig(sampler, steps, guidance, eta).override(
            self.supports_guidance, self.is_one_step
        )
        schedule_object.timesteps(self.sampler_config.steps)
        net_arguments = "width", "time_width", "patch", "attention"
        self.shape = {name: self.hparams[name] for name in net_arguments}
        with torch.device("meta"):  # nothing is allocated, every check is made
            UNet(**self.shape)
        self.channels, self.classes, self.size = 0, 0, (0, 0)  # the data's
        self.class_names: tuple[str, ...] = ()  # with labels, in the order of their numbers
        self.graph_cache = GraphCache()  # of sampling, for one evaluation
        self.trained = LossByNoiseLevel(1)  # since the last log
        self.eval_loss_by_level, self.num_eval_images = (
            LossByNoiseLevel(2),
            0,
        )  # of an evaluation; images so far

    def build(self) -> nn.Module:
        """The lecture's U-Net, for the data's images."""
        if not self.channels:
            raise UsageError(
                "Diffusion takes the images' size from the data, and there are none; "
                "type --data=ImageDataModule, or load a checkpoint"
            )
        net = UNet(self.channels, classes=self.classes, **self.shape)
        layout = torch.channels_last if self.denoiser.channels_last else torch.contiguous_format
        return net.to(memory_format=layout)  # pyright: ignore[reportCallIssue]

    def adopt(self, datamodule: Any) -> None:
        """Take the images' channels, classes, and size, which may change; refuse others."""
        num_classes = datamodule.num_classes if self.class_conditional else 0
        if self.class_conditional and not num_classes:
            raise UsageError("the data have no labels; type --model.labels=false")
        if self.class_conditional and hasattr(
            datamodule, "pictures"
        ):  # one too high would mean: not given
            check_labels(datamodule.pictures("train")[1], num_classes, "the data to train")
        if self.class_conditional and num_classes == 1:
            raise UsageError(
                "all images of the data are of one class, so a label tells the model nothing; "
                "allowed are two classes or more: type --model.labels=false"
            )
        names = tuple(getattr(datamodule, "class_names", ())) or default_class_names(num_classes)
        sizes = (datamodule.channels, num_classes)
        self._check_same_data(sizes, names, (self.channels, self.classes), self.class_names)
        self.size, (self.channels, self.classes) = tuple(datamodule.size), sizes
        self.class_names = names if self.class_conditional else ()

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """The net's answers to x (b c y x), in its own type: noise is fp32 whatever that is."""
        net_dtype = next(w.dtype for w in self.parameters() if w.is_floating_point())
        return super().forward(x.to(net_dtype), t, y)

    def denoise(
        self, x: Tensor, t: Tensor, y: Tensor | None = None, guidance_scale: float = 0.0
    ) -> Tensor:
        """The images x0 that x (b c y x) at times t (b), with labels y (b), are taken to be."""
        return self.denoiser.denoise(self, x, t, y, guidance_scale, self.classes)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        """Mean loss at times spread evenly over the whole step's images.

        Times, noise and dropped labels are those of (seed, step, place in the step): the same on
        any number of ranks and accumulated batches.
        """
        x0, y, *_ = batch
        trainer = attached_trainer(self)
        data_parallel, b = DataParallelInfo.of(trainer), len(x0)
        first_index = (
            index % data_parallel.accumulate * data_parallel.dp_size + data_parallel.dp_rank
        ) * b
        sample_indices = torch.arange(first_index, first_index + b, device=x0.device)
        key_parts = (resolve_seed(None), "training", self.global_step)
        step_noise = draw_step_noise(
            key_parts, sample_indices, b * data_parallel.dp_size * data_parallel.accumulate, x0
        )
        if self.classes:
            y = y.masked_fill(step_noise.uniform_label < self.class_dropout_prob, self.classes)
        t = self.denoiser.sample_t(step_noise.uniform_t)
        losses = self.denoiser.training_loss(self, x0, t, y, step_noise.noise)[0]
        loss = losses.mean()
        self.log("train/loss", loss)
        if trainer is not None and not self.is_one_step:
            level = (step_noise.uniform_t * NUM_BUCKETS).long().clamp(max=NUM_BUCKETS - 1)
            self.trained.add(level, losses.detach()[:, None])
            if should_update_logs(trainer):  # ten `log`s cost 1 ms
                means, _ = self.trained.means()
                self.log_dict(
                    name_bucket_metrics("train/loss", self.denoiser.sample_t, means[:, 0])
                )
                self.trained = LossByNoiseLevel(1)
        return loss

    def on_validation_epoch_start(self) -> None:
        """Start the sums anew."""
        self.eval_loss_by_level, self.num_eval_images = LossByNoiseLevel(2), 0

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        """Errors at a fixed grid of times with fixed noise: image i at level i modulo 10."""
        x0, y, *_ = batch
        data_parallel, b = DataParallelInfo.of(attached_trainer(self)), len(x0)
        image_ids = data_parallel.dp_rank + data_parallel.dp_size * torch.arange(
            self.num_eval_images, self.num_eval_images + b, device=x0.device
        )
        self.num_eval_images += b
        level = image_ids % NUM_BUCKETS
        t = self.denoiser.sample_t(BUCKET_CENTERS.to(x0.device)[level])
        eps = normals(derive_key("validation"), image_ids, tuple(x0.shape[1:]))
        losses, x, output = self.denoiser.training_loss(self, x0, t, y, eps)
        x0_error = (self.denoiser.to_x0(output, x, t) - x0).square().mean((1, 2, 3))
        self.eval_loss_by_level.add(level, torch.stack((losses, x0_error), 1))

    def on_validation_epoch_end(self) -> None:
        """Log the loss, and the squared error of the image at each level."""
        stage = "test" if self.trainer.testing else "val"
        total = self.trainer.strategy.reduce(self.eval_loss_by_level.sums, reduce_op="sum")
        mean, has_samples = self.eval_loss_by_level.means(
            total
        )  # of few images some levels may have none
        self.log(f"{stage}/loss", mean[has_samples, 0].mean().float())
        self.log(f"{stage}/x0_mse", mean[has_samples, 1].mean().float())
        if not self.is_one_step:
            self.log_dict(
                name_bucket_metrics(f"{stage}/x0_mse", self.denoiser.sample_t, mean[:, 1])
            )

    def on_validation_end(self) -> None:
        """Give the recordings' memory back; callbacks have drawn their images by now."""
        self.graph_cache = GraphCache()

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
        return self._sample_batches(index, labels, self.sampler_config, seed, 256)

    def generate(
        self,
        labels: Sequence[int | str] | str | None = None,
        num_samples: int | None = None,
        guidance: float | None = None,
        steps: int | None = None,
        sampler: samplers.SamplerName | None = None,
        eta: float | None = None,
        seed: int = 0,
        batch_size: int = 256,
    ) -> ImageGrid:
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
        overrides = {"guidance": guidance, "steps": steps, "sampler": sampler, "eta": eta}
        sampler_config = self.sampler_config.override(
            self.supports_guidance, self.is_one_step, **overrides
        )
        class_ids = parse_labels(labels, self._resolve_class_names())
        images_per_class = (8 if class_ids else 64) if num_samples is None else num_samples
        if images_per_class < 1 or batch_size < 1:
            raise UsageError("num_samples and batch_size must be 1 or more; type --num_samples=8")
        index = torch.arange(images_per_class * max(1, len(class_ids)), device=self.device)
        class_labels = torch.tensor(class_ids, device=self.device).repeat_interleave(
            images_per_class
        )
        images = self._sample_batches(
            index, class_labels if class_ids else None, sampler_config, seed, batch_size
        )
        row_names = tuple(self._resolve_class_names()[number] for number in class_ids)
        return ImageGrid(
            images,
            images_per_class if class_ids else math.ceil(math.sqrt(images_per_class)),
            row_names,
        )

    def try_generate(self, **arguments: Any) -> ImageGrid:
        """One image in one step for these arguments of `generate`, all of which are checked."""
        bound = inspect.signature(self.generate).bind(**arguments)
        bound.apply_defaults()
        values: Any = bound.arguments
        names = "guidance", "steps", "sampler", "eta"
        sampler_config = self.sampler_config.override(
            self.supports_guidance, self.is_one_step, **{name: values[name] for name in names}
        )
        class_ids = parse_labels(values["labels"], self._resolve_class_names())
        count = values["num_samples"]
        if (count is not None and count < 1) or values["batch_size"] < 1:
            raise UsageError("num_samples and batch_size must be 1 or more; type --num_samples=8")
        index = torch.arange(1, device=self.device)
        class_labels = torch.tensor(class_ids[:1], device=self.device) if class_ids else None
        images = self._sample_batches(
            index, class_labels, replace(sampler_config, steps=1), values["seed"], 1
        )
        self.graph_cache = GraphCache()
        return ImageGrid(images, 1)

    def figures(self, datamodule: Any) -> dict[str, Any]:
        """The way back, estimates at each level, and what lies between two noises."""
        example_images = to_float(datamodule.pictures("train")[0][:2].to(self.device))
        return draw.plot_all(
            self.denoise,
            self.denoiser.noise_schedule,
            self.sampler_config,
            example_images,
            self.classes,
        )

    def export(self, folder: str, format: Literal["safetensors"] = "safetensors") -> str:
        """Write the net's weights, and what it takes to build it again, into a folder.

        Args:
            folder: where; files of the same names are replaced.
            format: safetensors.
        """
        names = "process", "prediction", "conditioning"
        return save_pretrained(
            cast(UNet, self.net), folder, {name: self.hparams[name] for name in names}
        )

    def _resolve_class_names(self) -> tuple[str, ...]:
        """The classes' names; their numbers where neither data nor checkpoint name them."""
        return self.class_names or default_class_names(self.classes)

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
        model_sizes = saved["channels"], saved["classes"]
        names = tuple(saved.get("class_names", ())) or default_class_names(saved["classes"])
        if self.channels:
            self._check_same_data(
                (self.channels, self.classes), self.class_names, model_sizes, names
            )
        else:
            (self.channels, self.classes), self.size = model_sizes, tuple(saved["size"])
            self.class_names = names

    def _check_same_data(
        self,
        data_sizes: tuple[int, int],
        data_names: tuple[str, ...],
        model_sizes: tuple[int, int],
        model_names: tuple[str, ...],
    ) -> None:
        """Refuse data of other channels and classes than the model has, if it has any yet."""
        if model_sizes[0] and data_sizes != model_sizes:
            raise UsageError(
                f"the data have {data_sizes[0]} channels and {data_sizes[1]} classes, the model "
                f"{model_sizes[0]} and "
                f"{model_sizes[1]}; type --data.source=... with the data that the model was "
                "trained on"
            )
        if model_sizes[1] and data_names != model_names:
            raise UsageError(
                f"the data have the classes {describe_classes(data_names)}; the model was trained "
                "on "
                f"{describe_classes(model_names)}, in this order; type --data.source=... with the "
                "same "
                "folders"
            )

    def _sample_batches(
        self,
        index: Tensor,
        labels: Tensor | None,
        sampler_config: SamplerConfig,
        seed: int,
        batch_size: int,
    ) -> Tensor:
        net, trainer = cast(nn.Module, self.net), attached_trainer(self)
        context, graph_cache = nullcontext(), GraphCache()
        if trainer is not None and trainer.state.status == "running":  # as in a validation step
            context, graph_cache = trainer.precision_plugin.forward_context(), self.graph_cache

        def denoise(x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
            return self.denoise(x, t, y, sampler_config.guidance).clamp(-1, 1)

        size = (self.channels, self.size[0], self.size[1])
        arguments = (
            self.denoiser.noise_schedule,
            sampler_config,
            index,
            labels,
            size,
            seed,
            batch_size,
        )
        with context, graph_cache.bind(net) as make_denoiser:
            return to_uint8(sample_images(denoise, *arguments, make_denoiser))
