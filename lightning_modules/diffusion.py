"""Diffusion model: train a U-Net to remove noise from images, then sample from noise (lecture 6).

The formulas are in diffusion_core/denoiser.py. This file has the training step, metrics and
sampling.

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

from ravine.datamodules.image_set import check_labels
from ravine.datamodules.images import to_float, to_uint8
from ravine.datamodules.loaders import DataParallelInfo
from ravine.datamodules.samplers import resolve_seed
from ravine.errors import UsageError, check_at_least_one
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
from .diffusion_core.noise_schedules import NoiseSchedule, NoiseScheduleName
from .diffusion_core.parameterization import LossWeighting, PredictionType
from .diffusion_core.sampling import SamplerConfig, parse_labels, sample_images
from .nn.initialization import Initialization
from .nn.unet import UNet, save_pretrained
from .plots import diffusion
from .task_module import TaskModule


def default_class_names(num_classes: int) -> tuple[str, ...]:
    """Names of unnamed classes: their indices."""
    return tuple(str(number) for number in range(num_classes))


def _data_fields(channels: int, num_classes: int, class_names: tuple[str, ...]) -> dict[str, Any]:
    """Return what data must have in common with a model; {} for a model without data.

    The names of classes count only if the model is class-conditional.
    """
    fields = {"channels": channels, "num_classes": num_classes} if channels else {}
    return fields | ({"class_names": class_names} if num_classes else {})


class Diffusion(TaskModule):
    """Diffusion model with a U-Net; batches are (images (b c y x) in [-1, 1], labels (b)).

        model = Diffusion(class_conditional=True, noise_schedule="cosine")
        Trainer(max_steps=4000).fit(model, datamodule=ImageDataModule("mnist"))
        model.generate(labels="0-9", guidance_scale=0.5).save("digits.png")

    Args:
        time_conditioning: time conditioning of the net: the three attempts of the lecture.
        noise_schedule: noise schedule, α and σ over time.
        prediction_type: prediction type of the net.
        loss_weighting: weight of the noise levels in the loss.
        class_conditional: whether the model is class-conditional.
        class_dropout_prob: fraction of images trained with the null class, for classifier-free
            guidance.
        base_channels: channels of the U-Net at full size.
        time_embed_dim: channels of the time and label embedding.
        patch_size: squares of this many pixels become one pixel; 2 makes a step three times as
            fast.
        has_attention: self-attention at the lowest resolution.
        channels_last: memory layout; faster in bf16 on a GPU and in fp32 on a CPU.
        sampler: default sampler of `generate`.
        num_steps: default number of sampling steps (heun evaluates the net twice a step).
        guidance_scale: default guidance scale w: cond + w (cond - uncond); 0 is plain conditional.
        eta: default fresh noise in ddim: 0 is none (the lecture), 1 as much as ddpm.
        initialization: distribution of the net's weights; nn/initialization.py has the formulas.
    """

    unit = "images"
    lr = 2e-4
    _datamodule_name, _data_flag = "ImageDataModule", "--data.source=FOLDER"

    def __init__(
        self,
        time_conditioning: TimeConditioning = "time",  # which noise levels, and whether t is known
        noise_schedule: NoiseScheduleName = "linear",
        prediction_type: PredictionType = "x0",
        loss_weighting: LossWeighting = "uniform",
        class_conditional: bool = False,
        class_dropout_prob: float = 0.1,  # images trained with the null class, for guidance
        base_channels: int = 64,  # of the U-Net at full size
        time_embed_dim: int = 256,
        patch_size: int = 1,  # squares of this many pixels become one pixel
        has_attention: bool = False,  # at the lowest resolution
        channels_last: bool = False,  # memory layout
        sampler: samplers.SamplerName = "ddim",  # this and the next: defaults of `generate`
        num_steps: int = 50,
        guidance_scale: float = 0.0,
        eta: float = 0.0,
        initialization: Initialization = "default",
    ) -> None:
        """Store the arguments and check them by building the net on the meta device.

        The net itself is built later, by `build_net`, when the data have set `channels`,
        `num_classes` and `image_size`.
        """
        super().__init__()
        self.save_hyperparameters()
        # the denoiser computes the loss and x0 estimates from the output of any net
        schedule = NoiseSchedule(noise_schedule)
        self.denoiser = Denoiser(
            schedule, prediction_type, loss_weighting, time_conditioning, channels_last
        )
        self.class_conditional, self.class_dropout_prob = class_conditional, class_dropout_prob
        if not 0 <= class_dropout_prob < 1:
            raise UsageError(
                f"Diffusion: class_dropout_prob={class_dropout_prob} is out of range",
                ["0 to below 1"],
                "use class_dropout_prob=0.1",
                flag="--model.class_dropout_prob=0.1",
            )
        self.is_one_step = time_conditioning == "one_step"
        self.supports_guidance = class_conditional and class_dropout_prob > 0
        # guidance mixes in the output for the null class, which class dropout trains.
        # Defaults of `generate`; nothing is overridden, but they are checked against the model
        self.sampler_config = SamplerConfig(sampler, num_steps, guidance_scale, eta).override(
            supports_guidance=self.supports_guidance, is_one_step=self.is_one_step
        )
        schedule.timesteps(self.sampler_config.num_steps)  # raises if the schedule has fewer steps
        net_arguments = "base_channels", "time_embed_dim", "patch_size", "has_attention"
        self.net_kwargs = {name: self.hparams[name] for name in net_arguments}
        self.net_kwargs["initialization"] = initialization
        with torch.device("meta"):  # runs the checks without memory
            UNet(**self.net_kwargs)
        self.channels, self.num_classes, self.image_size = 0, 0, (0, 0)  # set from the data
        self.class_names: tuple[str, ...] = ()  # with labels, in the order of their indices
        self.graph_cache = GraphCache()  # CUDA graphs of sampling, for one evaluation
        # sums of metrics over images, for ten ranges of noise levels; the number is that of metrics
        self.train_loss_by_level = LossByNoiseLevel(1)  # loss since the last log
        self.eval_loss_by_level = LossByNoiseLevel(2)  # loss and x0 error of an evaluation
        self.num_eval_images = 0  # images of this rank so far in the evaluation

    def build_net(self) -> nn.Module:
        """Create the U-Net for the data's images."""
        if not self.channels:
            raise self.missing_data_error("the image size")
        net = UNet(self.channels, num_classes=self.num_classes, **self.net_kwargs)
        layout = torch.channels_last if self.denoiser.channels_last else torch.contiguous_format
        return net.to(memory_format=layout)  # pyright: ignore[reportCallIssue]

    def configure_from_data(self, datamodule: Any) -> None:
        """Set channels, classes and size from the data; a model keeps its channels and classes.

        `setup` calls it before the net is built; a later datamodule must fit the model. The label
        `num_classes` is the null class: the label of images without class.

        Raises:
            UsageError: labels are missing or too few, or the data differ from those of the model.
        """
        num_classes = datamodule.num_classes if self.class_conditional else 0
        if self.class_conditional and not num_classes:
            raise UsageError(
                "Diffusion: class_conditional=True needs labels, but the data contain none",
                ["data with labels", "class_conditional=False"],
                "use class_conditional=False",
                flag="--model.class_conditional=false",
            )
        if self.class_conditional and hasattr(datamodule, "get_split"):
            # the label `num_classes` would be taken for the null class
            _, train_labels, *_ = datamodule.get_split("train")  # images, labels, ...
            check_labels(train_labels, num_classes, "the data to train")
        if self.class_conditional and num_classes == 1:
            raise UsageError(
                "Diffusion: class_conditional=True needs two classes, but all images of the data "
                "are of one class",
                ["two classes or more"],
                "use class_conditional=False",
                flag="--model.class_conditional=false",
            )
        names = tuple(getattr(datamodule, "class_names", ())) or default_class_names(num_classes)
        values = {"channels": datamodule.channels, "num_classes": num_classes, "class_names": names}
        # what the model has already from earlier data or a checkpoint; {} for a new model
        known = _data_fields(self.channels, self.num_classes, self.class_names)
        self.check_data_fields("the datamodule", values, known)  # raises if a known value differs
        self.channels, self.num_classes = datamodule.channels, num_classes
        self.image_size = tuple(datamodule.image_size)
        self.class_names = names if self.class_conditional else ()

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """Compute the net's output for x (b c y x) in the net's dtype; noise is always fp32."""
        net_dtype = next(w.dtype for w in self.parameters() if w.is_floating_point())
        return super().forward(x.to(net_dtype), t, y)

    def denoise(
        self, x: Tensor, t: Tensor, y: Tensor | None = None, guidance_scale: float = 0.0
    ) -> Tensor:
        """Estimate the images x0 from x (b c y x) at times t (b), with labels y (b)."""
        return self.denoiser.denoise(self, x, t, y, guidance_scale, self.num_classes)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        """Mean loss at times stratified over all images of the step.

        Times, noise and class dropout depend on (seed, step, index in the step). So they are the
        same for any number of ranks and accumulated batches.

        Args:
            batch: images x0 (b c y x) and labels y (b) of this rank.
            index: index of the micro-batch in the epoch.
        """
        x0, y, *_ = batch
        trainer = attached_trainer(self)  # None if a script calls the step without a trainer
        data_parallel, b = DataParallelInfo.from_trainer(trainer), len(x0)
        # index of this batch's first image among the images of the step: by micro-batch, then rank
        micro_batch = index % data_parallel.accumulate
        first_index = (micro_batch * data_parallel.dp_size + data_parallel.dp_rank) * b
        sample_indices = torch.arange(first_index, first_index + b, device=x0.device)
        images_per_step = b * data_parallel.dp_size * data_parallel.accumulate
        # resolve_seed(None) is the seed of the run
        key_parts = (resolve_seed(None), "training", self.global_step)
        # uniform_t (b) and uniform_label (b), in (0, 1), and noise (b c y x)
        step_noise = draw_step_noise(key_parts, sample_indices, images_per_step, x0)
        if self.num_classes:  # class dropout: the label `num_classes` is the null class
            is_dropped = step_noise.uniform_label < self.class_dropout_prob
            y = y.masked_fill(is_dropped, self.num_classes)
        t = self.denoiser.sample_t(step_noise.uniform_t)
        # the unused results are the noisy images and the output of the net for them
        losses, _, _ = self.denoiser.training_loss(self, x0, t, y, step_noise.noise)  # (b)
        loss = losses.mean()
        self.log("train/loss", loss)
        if trainer is not None and not self.is_one_step:
            # (b) one of ten ranges of noise levels
            level = (step_noise.uniform_t * NUM_BUCKETS).long().clamp(max=NUM_BUCKETS - 1)
            self.train_loss_by_level.add(level, losses.detach()[:, None])
            if should_update_logs(trainer):  # not in each step: ten calls of `log` cost 1 ms
                # with the metric of each level, such as train/loss_t051, named by its time
                means, _ = self.train_loss_by_level.means()  # (levels 1)
                self.log_dict(
                    name_bucket_metrics("train/loss", self.denoiser.sample_t, means[:, 0])
                )
                self.train_loss_by_level = LossByNoiseLevel(1)  # start anew after each log
        return loss

    def on_validation_epoch_start(self) -> None:
        """Reset the sums."""
        self.eval_loss_by_level, self.num_eval_images = LossByNoiseLevel(2), 0

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        """Errors at fixed times with fixed noise: image i at noise level i modulo 10."""
        x0, y, *_ = batch
        data_parallel, b = DataParallelInfo.from_trainer(attached_trainer(self)), len(x0)
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
        """Log the loss, and the squared error of x0 at each noise level."""
        stage = "test" if self.trainer.testing else "val"
        total = self.trainer.strategy.reduce(self.eval_loss_by_level.sums, reduce_op="sum")
        mean, has_samples = self.eval_loss_by_level.means(
            total
        )  # with few images some levels may have none
        self.log(f"{stage}/loss", mean[has_samples, 0].mean().float())
        self.log(f"{stage}/x0_mse", mean[has_samples, 1].mean().float())
        if not self.is_one_step:
            self.log_dict(
                name_bucket_metrics(f"{stage}/x0_mse", self.denoiser.sample_t, mean[:, 1])
            )

    def on_validation_end(self) -> None:
        """Free the CUDA graphs; callbacks have sampled their images before."""
        self.graph_cache = GraphCache()

    on_test_epoch_start = on_validation_epoch_start
    test_step = validation_step
    on_test_epoch_end = on_validation_epoch_end
    on_test_end = on_validation_end

    def generate_images(self, index: Tensor, labels: Tensor | None = None, seed: int = 0) -> Tensor:
        """Sample the images with these ids (n) and labels (n), as uint8 (n c y x).

        An id always gives the same image. Without labels, a class-conditional model uses the
        classes in turn.
        """
        index = index.to(self.device)
        if self.num_classes:
            labels = index % self.num_classes if labels is None else labels.to(self.device)
        return self._sample_batches(index, labels, self.sampler_config, seed, batch_size=256)

    def generate(
        self,
        labels: Sequence[int | str] | str | None = None,
        num_samples: int | None = None,
        guidance_scale: float | None = None,
        num_steps: int | None = None,
        sampler: samplers.SamplerName | None = None,
        eta: float | None = None,
        seed: int = 0,
        batch_size: int = 256,
    ) -> ImageGrid:
        """Sample images; equal seeds give equal images.

            model.generate(labels="0-9", guidance_scale=0.5, num_steps=20).save("digits.png")

        Args:
            labels: classes by index or name, "3", "0-4,7", "cat,dog" or [3, 5], a row each; by
                default all.
            num_samples: images of each label, by default 8; without labels the total, by default
                64.
            guidance_scale: guidance scale; by default that of the model.
            num_steps: number of sampling steps; by default that of the model.
            sampler: ddim, ddpm, euler, heun or dpmpp_2m; by default that of the model.
            eta: fresh noise in ddim; by default that of the model.
            seed: random seed; each image depends on the seed and its index.
            batch_size: number of images sampled at once.
        """
        # None keeps the model's value; a guidance that the model does not support is an error
        overrides = {
            "guidance_scale": guidance_scale,
            "num_steps": num_steps,
            "sampler": sampler,
            "eta": eta,
        }
        sampler_config = self.sampler_config.override(
            supports_guidance=self.supports_guidance, is_one_step=self.is_one_step, **overrides
        )
        class_names = self._resolve_class_names()
        class_ids = parse_labels(labels, class_names)  # [] for a model without labels
        if num_samples is None:
            num_samples = 8 if class_ids else 64
        check_at_least_one(
            "generate", flag_prefix="--", num_samples=num_samples, batch_size=batch_size
        )
        if class_ids:  # a row of the grid for each class
            class_labels = torch.tensor(class_ids, device=self.device)
            class_labels = class_labels.repeat_interleave(num_samples)
            total, columns = num_samples * len(class_ids), num_samples
        else:
            class_labels, total = None, num_samples
            columns = math.ceil(math.sqrt(num_samples))
        # an image's noise depends on the seed and its id only
        image_ids = torch.arange(total, device=self.device)
        images = self._sample_batches(image_ids, class_labels, sampler_config, seed, batch_size)
        row_names = tuple(class_names[class_id] for class_id in class_ids)
        return ImageGrid(images, columns=columns, row_names=row_names)

    def try_generate(self, **arguments: Any) -> ImageGrid:
        """Check the arguments of `generate`, and sample one image in one step.

        The callback GenerateSamples calls it before training, to reject invalid arguments early.
        `arguments` are some of those of `generate`; the others have their defaults.
        """
        bound = inspect.signature(self.generate).bind(**arguments)
        bound.apply_defaults()
        values: Any = bound.arguments
        names = "guidance_scale", "num_steps", "sampler", "eta"
        sampler_config = self.sampler_config.override(
            supports_guidance=self.supports_guidance,
            is_one_step=self.is_one_step,
            **{name: values[name] for name in names},
        )
        class_ids = parse_labels(values["labels"], self._resolve_class_names())
        sizes = {name: values[name] for name in ("num_samples", "batch_size")}
        check_at_least_one(
            "generate",
            flag_prefix="--",
            **{n: size for n, size in sizes.items() if size is not None},
        )
        image_ids = torch.arange(1, device=self.device)
        class_labels = torch.tensor(class_ids[:1], device=self.device) if class_ids else None
        short_config = replace(sampler_config, num_steps=1)
        images = self._sample_batches(
            image_ids, class_labels, short_config, values["seed"], batch_size=1
        )
        self.graph_cache = GraphCache()  # free the CUDA graphs
        return ImageGrid(images, columns=1)

    def make_figures(self, datamodule: Any) -> dict[str, Any]:
        """Create figures: the reverse process, x0 estimates at each level, and interpolations."""
        example_images = to_float(datamodule.get_split("train")[0][:2].to(self.device))
        return diffusion.plot_all(
            self.denoise,
            self.denoiser.noise_schedule,
            self.sampler_config,
            example_images,
            self.num_classes,
            self._resolve_class_names() if self.num_classes else (),
        )

    def export(self, folder: str, format: Literal["safetensors"] = "safetensors") -> str:
        """Write the net's weights and its config into a folder.

        Args:
            folder: output folder; files of the same names are replaced.
            format: safetensors.
        """
        names = "noise_schedule", "prediction_type", "time_conditioning"
        return save_pretrained(
            cast(UNet, self.net), folder, {name: self.hparams[name] for name in names}
        )

    def _resolve_class_names(self) -> tuple[str, ...]:
        """Names of the classes; their indices if neither data nor checkpoint contain names."""
        return self.class_names or default_class_names(self.num_classes)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the data's sizes with the weights."""
        super().on_save_checkpoint(checkpoint)
        sizes = {
            "channels": self.channels,
            "image_size": [*self.image_size],
            "num_classes": self.num_classes,
        }
        checkpoint["images"] = sizes | {"class_names": [*self.class_names]}
        checkpoint["images"]["train_loss_by_level"] = (
            self.train_loss_by_level.sums.cpu()
        )  # the sums since the last log

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Load the sizes; if they are already set from the data, check that they are equal.

        Lightning calls it before it loads the weights.

        Raises:
            UsageError: the data differ from those that the checkpoint was trained on.
        """
        super().on_load_checkpoint(checkpoint)
        saved = self.saved_data_fields(
            checkpoint, "images", ("channels", "num_classes", "image_size")
        )
        # sums of the losses since the last log; zero for a file without them
        self.train_loss_by_level.sums = saved.get(
            "train_loss_by_level", self.train_loss_by_level.sums
        )
        names = tuple(saved.get("class_names", ())) or default_class_names(saved["num_classes"])
        if self.channels:  # set from the data
            values = {"channels": self.channels, "num_classes": self.num_classes}
            # channels, classes and their names; the image size may differ
            known = _data_fields(saved["channels"], saved["num_classes"], names)
            self.check_data_fields(
                "the datamodule", values | {"class_names": self.class_names}, known
            )
        else:
            self.channels, self.num_classes = saved["channels"], saved["num_classes"]
            self.image_size, self.class_names = tuple(saved["image_size"]), names

    def _sample_batches(
        self,
        image_ids: Tensor,
        labels: Tensor | None,
        sampler_config: SamplerConfig,
        seed: int,
        batch_size: int,
    ) -> Tensor:
        """Sample the images with these ids (n) and labels (n), as uint8 (n c y x).

        During training the trainer's precision is used, and the CUDA graphs are kept.
        """
        net, trainer = cast(nn.Module, self.net), attached_trainer(self)
        precision_context, graph_cache = nullcontext(), GraphCache()
        if trainer is not None and trainer.state.status == "running":  # as in a validation step
            precision_context = trainer.precision_plugin.forward_context()
            graph_cache = self.graph_cache  # until the evaluation ends

        def denoise(x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
            return self.denoise(x, t, y, sampler_config.guidance_scale).clamp(-1, 1)

        # bind: on a GPU, denoising steps are recorded as CUDA graphs of this net, and replayed
        with precision_context, graph_cache.bind(net) as make_denoiser:
            images = sample_images(
                denoise,
                self.denoiser.noise_schedule,
                sampler_config,
                image_ids,
                labels,
                image_shape=(self.channels, self.image_size[0], self.image_size[1]),
                seed=seed,
                batch_size=batch_size,
                make_denoiser=make_denoiser,
            )
            return to_uint8(images)
