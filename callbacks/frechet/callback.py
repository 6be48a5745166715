"""FrechetDistance: log the Fréchet distance (FID) and kernel distance (KID) at each validation.

    each rank        draws its blocks of samples and computes their features
    all ranks        gather all blocks; each rank adds them in the order of their indices

The result is equal bit for bit on any number of ranks. The distance is called `fid` only in the
2048 features of InceptionV3; in other features it is called fd_<extractor>. The floor is the
distance of an equal number of real test images. Distances are only meaningful relative to it. The
distances of two draws of test images may differ by a factor of two, so the floor is the mean over
disjoint draws.
"""

import hashlib
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from ravine.errors import UsageError
from ravine.files import atomic_write, cache_folder

from ..base import require_validation
from ..checks.run_checks import add_run_checks
from .distributed_features import (
    FeatureExtractorPool,
    fingerprint_tensors,
    proportional_labels,
    random_subset,
    select_images,
    validate_images,
)
from .inception import WEIGHTS_SHA256, FeatureLayer, Inception, locate_inception_weights
from .statistics import Gaussian, Moments, frechet_distance, kernel_distance

MAX_KEPT = 10_000  # maximum of real images whose features are kept for the kernel distance
BASELINE_DRAWS = 10  # maximum of draws of test images for the floor, each as many as the samples
NUM_PROBES = 8  # real images whose features identify an extractor
CACHE_VERSION = "bytes, statistics 4"  # part of the cache key: change it with the code


class RealStatistics(NamedTuple):
    """Statistics of the real images in an extractor's features, cached in a file."""

    mean: Tensor  # (d) of the training images
    cov_trace: Tensor
    cov_root: Tensor  # (d d)
    features: Tensor  # (n d) of some training images
    baselines: Tensor  # Fréchet and kernel distances (k 2) of k draws of n test images
    accuracy: Tensor  # of the extractor on these test images, nan if it does not classify
    probe: Tensor  # features of a few training images, which identify the extractor


class FrechetDistance(L.Callback):
    """Logs val/fid or val/fd_<extractor>, val/kid or val/kd_<extractor>, baseline, ratio and speed.

    Example: `Trainer(callbacks=[FrechetDistance(ClassifierFeatures("FILE.ckpt"))])`.

    The module's `generate_images(index, labels)` returns uint8 images (n c y x) for sample indices
    (n) and labels (n), which only class-conditional models use. The datamodule's `get_split(split)`
    returns the real uint8 images (n c y x) and labels (n) of "train" and "test".

    Args:
        extractor: any module that maps uint8 images to features (b d); by default InceptionV3.
        num_samples: number n of samples, and of real test images in each draw for the baseline.
            Below 5,000 prefer the kernel distance: the Fréchet distance and its baseline are too
            large by about c / n.
        layer: feature layer of InceptionV3.
        weights: file of InceptionV3's weights in torch-fidelity's layout; by default the published.
        num_real_images: number of training images to compare with; by default all.
        batch_size: images sampled at once; it changes the last bits of the distance.
        cache_dir: folder for the statistics of the real images; by default Ravine's cache.
    """

    def __init__(
        self,
        extractor: nn.Module | None = None,
        num_samples: int = 1000,
        layer: FeatureLayer = 2048,
        weights: str | None = None,
        num_real_images: int | None = None,
        batch_size: int = 128,
        cache_dir: str | None = None,
    ) -> None:
        """Check the sizes and store the arguments.

        Args:
            extractor: module that maps uint8 images to features (b d); None for InceptionV3.
            num_samples: number of samples, and of real test images in each draw for the baseline.
            layer: feature layer of InceptionV3.
            weights: file of InceptionV3's weights; None for the published ones.
            num_real_images: number of training images to compare with; None for all.
            batch_size: images sampled at once.
            cache_dir: folder for the statistics of the real images; None for Ravine's cache.
        """
        # None for num_real_images, which means all, is valid
        for name, value, least in (
            ("num_samples", num_samples, 2),  # a covariance needs two
            ("num_real_images", num_real_images or 2, 2),
            ("batch_size", batch_size, 1),
        ):
            if value < least:
                example = 1000 if name == "num_samples" else least
                raise UsageError(
                    f"FrechetDistance: {name}={value} is too small",
                    [f"{least} or more"],
                    hint=f"use {name}={example}",
                    flag=f"--trainer.callbacks.{type(self).__name__}.{name}={example}",
                )
        self.extractor, self.weights = extractor, weights
        self.layer: FeatureLayer = layer
        self.num_samples = num_samples
        self.num_real_images = num_real_images
        self.batch_size = batch_size
        self.cache_dir = Path(cache_dir).expanduser() if cache_dir else None
        self.last_metrics: dict[str, float] = {}  # the last measurement, unrounded
        self._weights_file, self._weights_sha256 = Path(), ""  # of the extractor; set in `setup`
        self._real_statistics: RealStatistics | None = None  # of this run

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Raise UsageError if the distance cannot be measured; find the extractor's weights.

        Module and datamodule need methods, the fit needs a validation, and each split two images.
        """
        add_run_checks(trainer, pl_module, stage)  # calls `check` before the first step
        self._real_statistics = None
        if not callable(getattr(pl_module, "generate_images", None)):
            raise UsageError(
                f"FrechetDistance: {type(pl_module).__name__} has no method generate_images",
                ["a module with a method generate_images(index, labels)"],
                hint="remove FrechetDistance() from Trainer(callbacks=...)",
            )
        data: Any = getattr(trainer, "datamodule", None)
        if not callable(getattr(data, "get_split", None)):
            raise UsageError(
                f"FrechetDistance: {type(data).__name__} has no method get_split"
                if data
                else "FrechetDistance: this fit has no datamodule",
                ["a datamodule with a method get_split('train')"],
                hint="pass datamodule=ImageDataModule() to trainer.fit",
                flag="--data=ImageDataModule",
            )
        require_validation(trainer, "FrechetDistance", stage)
        for split in ("train", "test"):
            images, _ = data.get_split(split)
            if (count := len(images)) < 2:
                raise UsageError(
                    f"FrechetDistance: the {split} split has {count} image{'s' * (count != 1)}, "
                    "too few for a covariance",
                    ["splits of 2 images or more"],
                    hint="use more images, or ImageDataModule(test_fraction=0.5)",
                    flag="--data.test_fraction=0.5",
                )
        if self.extractor is None:
            # downloads the file if it is missing
            self._weights_file, self._weights_sha256 = locate_inception_weights(
                self.weights, trainer
            )
            if self._weights_sha256 != WEIGHTS_SHA256:
                rank_zero_warn(
                    f"{self._weights_file} is not the published InceptionV3 (SHA-256 "
                    f"{self._weights_sha256[:8]}, not {WEIGHTS_SHA256[:8]}), so its distances do "
                    "not compare with published ones"
                )
        else:
            self._weights_sha256 = fingerprint_tensors(*self.extractor.state_dict().values())

    def check(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any) -> None:
        """Compute the statistics of the real images, and try the extractor on two samples.

        RunChecks calls it on all ranks before the first training step.

        Raises:
            UsageError: samples and real images have features of different shapes.
        """
        module: Any = pl_module
        with self._extractor_on_device(pl_module.device) as extractor:
            # computes features on all ranks, each a part of the images
            pool = FeatureExtractorPool(trainer, extractor, self.batch_size, pl_module.device)
            real = self._load_real(trainer, pool)
            data: Any = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
            # classes in the proportions of the training images, the same at each call
            labels = proportional_labels(data.get_split("train")[1], self.num_samples)[:2]
            with trainer.precision_plugin.val_step_context():
                images = module.generate_images(torch.arange(2, device=module.device), labels)
            features = extractor(validate_images(images, 2, type(module).__name__).to(pool.device))
            if features.shape[1:] != real.mean.shape:
                raise UsageError(
                    f"FrechetDistance: the features of samples have the shape "
                    f"{tuple(features.shape[1:])}, and those of the data {tuple(real.mean.shape)}",
                    hint=f"return images with the size of the data from "
                    f"{type(module).__name__}.generate_images",
                )

    def logged_metrics(self, trainer: L.Trainer) -> set[str]:
        """Return the names of the logged metrics; without the ratio if the floor is 0."""
        kernel_name = (
            "kid" if self.metric_name == "fid" else self.metric_name.replace("fd_", "kd_", 1)
        )
        suffixes = ("", "_real_baseline", "_num_samples", "_duration_s", "_images_per_second")
        names = {f"{self.metric_name}{suffix}" for suffix in suffixes} | {
            kernel_name,
            f"{kernel_name}_real_baseline",
        }
        if self._real_statistics is None or self._real_statistics.baselines[:, 0].mean() > 0:
            names.add(f"{self.metric_name}_over_baseline")
        return {f"val/{name}" for name in names}

    @property
    def metric_name(self) -> str:
        """Return the name of the distance: fid for InceptionV3's 2048, else fd_<extractor>."""
        if self.extractor is not None:
            return f"fd_{getattr(self.extractor, 'name', type(self.extractor).__name__.lower())}"
        return "fid" if self.layer == 2048 else f"fd_inception_{self.layer}"

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure the distances before the checkpoint callbacks, which may monitor them."""
        if not trainer.sanity_checking:
            self._measure(trainer, pl_module, "val")

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure the distances of the test."""
        self._measure(trainer, pl_module, "test")

    @torch.no_grad()
    def _measure(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Sample images on all ranks, and log their distances from the real images.

        Args:
            trainer: its datamodule gives the real images.
            pl_module: samples the images, and logs the metrics.
            stage: prefix of the metrics: val or test.
        """
        module: Any = pl_module
        with self._extractor_on_device(pl_module.device) as extractor:
            # computes features on all ranks, each a part of the images
            pool = FeatureExtractorPool(trainer, extractor, self.batch_size, pl_module.device)
            real = self._load_real(trainer, pool)
            # classes in the proportions of the training images, the same at each call
            labels = proportional_labels(trainer.datamodule.get_split("train")[1], self.num_samples)  # pyright: ignore

            def sample(index: Tensor) -> Tensor:  # (n) -> images (n c y x)
                with trainer.precision_plugin.val_step_context():
                    images = module.generate_images(index.to(module.device), labels[index])
                return validate_images(images, len(index), type(module).__name__)

            start_time = time.perf_counter()
            # Sums over the features of all samples, and the features themselves. `pivot` is
            # subtracted in the sums, against cancellation.
            moments, features = pool.compute_moments(
                sample, count=self.num_samples, pivot=real.mean, keep=self.num_samples
            )
            seconds = time.perf_counter() - start_time
        # mean, trace of the covariance, and a root of the covariance
        gaussian = Gaussian(real.mean, real.cov_trace, real.cov_root)
        distance, kernel = self._distances(moments, features, gaussian, real.features)
        baseline, kernel_baseline = real.baselines.mean(0)  # mean over draws of test images
        name = self.metric_name  # `fid`, or `fd_` and the name of another extractor
        kernel_name = "kid" if name == "fid" else name.replace("fd_", "kd_", 1)
        metrics = {
            name: distance,
            f"{name}_real_baseline": baseline,
            **({f"{name}_over_baseline": distance / baseline} if baseline > 0 else {}),
            kernel_name: kernel,
            f"{kernel_name}_real_baseline": kernel_baseline,
            f"{name}_num_samples": self.num_samples,
            f"{name}_duration_s": seconds,
            f"{name}_images_per_second": self.num_samples / seconds,
        }
        self.last_metrics = {f"{stage}/{key}": float(value) for key, value in metrics.items()}
        pl_module.log_dict(self.last_metrics, sync_dist=True)

    @contextmanager
    def _extractor_on_device(self, device: torch.device) -> Iterator[nn.Module]:
        """Move the extractor to the device within the context, and free the memory afterwards."""
        extractor = self.extractor or Inception(self._weights_file, self.layer)
        try:
            yield extractor.to(device).eval()
        finally:
            extractor.to("cpu")  # other references to it may exist
            if device.type == "cuda":
                torch.cuda.empty_cache()

    def _load_real(self, trainer: L.Trainer, pool: FeatureExtractorPool) -> RealStatistics:
        """Return the statistics of the real images: of this run, from the cache, or computed.

        All ranks must call it. They are computed if any rank cannot read the cached file; rank 0
        then writes it. Its name is a hash of all that the statistics depend on.
        """
        if self._real_statistics is not None:
            return self._real_statistics
        data: Any = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        train_images, _ = data.get_split("train")
        test_images, test_labels = data.get_split("test")
        key_parts = (
            CACHE_VERSION,
            self.metric_name,
            self._weights_sha256,
            f"{self.num_samples} {self.num_real_images}",
            fingerprint_tensors(train_images),
            fingerprint_tensors(test_images, test_labels),
        )
        key = hashlib.sha256("\n".join(key_parts).encode()).hexdigest()
        path = (self.cache_dir or cache_folder() / "features") / f"{key}.safetensors"
        statistics = load_statistics(path)
        # the probe has features of a few training images
        if statistics and not is_close(statistics.probe, feature_probe(pool, train_images)):
            statistics = None  # a different extractor of the same name and weights
        is_cached_everywhere = trainer.strategy.reduce_boolean_decision(statistics is not None)
        if statistics is None or not is_cached_everywhere:
            statistics = self._compute_real(pool, train_images, test_images, test_labels)
            if trainer.is_global_zero:
                save_statistics(path, statistics)
        self._real_statistics = RealStatistics(
            *(value.to(pool.float64_device) for value in statistics)
        )
        num_train = min(len(train_images), self.num_real_images or len(train_images))
        self._log_baseline(self._real_statistics, num_train, num_test=len(test_images))
        return self._real_statistics

    def _compute_real(
        self,
        pool: FeatureExtractorPool,
        train_images: Tensor,
        test_images: Tensor,
        test_labels: Tensor,
    ) -> RealStatistics:
        """Return the statistics of the training images, and the distances of test images from them.

        Args:
            pool: runs the extractor on all ranks.
            train_images: uint8 (n c y x).
            test_images: uint8 (m c y x), of which disjoint random draws are compared.
            test_labels: classes (m), for the accuracy of an extractor that classifies.
        """
        indices = random_subset(len(train_images), self.num_real_images)
        # `select_images` returns a function from numbers 0, 1, ... to the chosen images. All their
        # features are summed, and the first MAX_KEPT are kept for the kernel distance.
        moments, train_features = pool.compute_moments(
            select_images(train_images, indices), count=len(indices), keep=MAX_KEPT
        )
        gaussian = Gaussian.from_moments(moments)
        # a method of extractors that classify: features to class scores
        classify = getattr(pool.extractor, "compute_logits", None)
        baselines, is_correct = [], []
        # each draw has as many test images as there are samples, if the test split has enough
        num_draws = max(1, min(BASELINE_DRAWS, len(test_images) // self.num_samples))
        drawn = random_subset(len(test_images), num_draws * self.num_samples)
        for draw in drawn.split(self.num_samples):  # indices of test images
            moments, features = pool.compute_moments(
                select_images(test_images, draw),
                count=len(draw),
                pivot=gaussian.mean,
                keep=self.num_samples,
            )
            # Fréchet and kernel distance of the draw from the training images
            distances = self._distances(moments, features, gaussian, train_features)
            baselines.append(torch.stack(distances))
            if classify:
                predicted = classify(features.to(pool.device)).argmax(1)
                is_correct.append(predicted.cpu() == test_labels[draw].cpu())
        accuracy = torch.cat(is_correct).double().mean() if is_correct else torch.tensor(torch.nan)
        return RealStatistics(
            mean=gaussian.mean,
            cov_trace=gaussian.cov_trace,
            cov_root=gaussian.cov_root,
            features=train_features,
            baselines=torch.stack(baselines),
            accuracy=accuracy,
            probe=feature_probe(pool, train_images),
        )

    def _distances(
        self, moments: Moments, features: Tensor, gaussian: Gaussian, train_features: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the Fréchet and kernel distance of a set of images from the training images."""
        kernel = kernel_distance(features, train_features[: self.num_samples])
        return frechet_distance(moments, gaussian), kernel

    def _log_baseline(self, real: RealStatistics, num_train: int, num_test: int) -> None:
        """Print the baseline: the mean distance of real test images from the training images.

        It warns if there are too few images for the covariance or for the baseline, or if the
        baseline is 0. Rank 0 prints.

        Args:
            real: statistics of the real images.
            num_train: number of training images that are compared with.
            num_test: number of all test images.
        """
        num_features = len(real.mean)
        least_images = min(self.num_samples, num_train)
        if least_images <= num_features:
            rank_zero_warn(
                f"FrechetDistance: the covariance of {least_images} images in {num_features} "
                "features cannot have full rank, so the distance is less accurate; use "
                f"num_samples={4 * num_features}"
            )
        if num_test < self.num_samples:
            rank_zero_warn(
                f"FrechetDistance: the baseline uses {num_test} real test images and the distance "
                f"uses {self.num_samples} samples, so they do not compare; "
                f"use num_samples={num_test}"
            )
        baselines = real.baselines[:, 0]  # Fréchet distance of each draw
        if not baselines.mean() > 0:
            rank_zero_warn(
                "FrechetDistance: the distance between real images is 0 (they may all be equal), "
                f"so {self.metric_name}_over_baseline is not logged"
            )
        draws_note = accuracy_note = ""
        if len(baselines) > 1:
            draws_note = (
                f" ({len(baselines)} draws, {baselines.min():.4g} to {baselines.max():.4g})"
            )
        if not real.accuracy.isnan():  # NaN: the extractor does not classify
            accuracy_note = f"; the extractor classifies {real.accuracy:.2%} of them correctly"
        rank_zero_info(
            f"{self.metric_name}: {num_features} features, weights {self._weights_sha256[:8]}; "
            f"the distance of {min(self.num_samples, num_test):,} real test images from "
            f"{num_train:,} training images is {baselines.mean():.4g}{draws_note}{accuracy_note}"
        )


def feature_probe(pool: FeatureExtractorPool, train: Tensor) -> Tensor:
    """Return the features (p d) of a few of the images (n c y x), on the CPU."""
    return pool.extractor(train[random_subset(len(train), NUM_PROBES)].to(pool.device)).cpu()


def is_close(left: Tensor, right: Tensor) -> bool:
    """Whether features are equal up to the rounding of another device or batch size."""
    same = left.shape == right.shape and left.dtype == right.dtype
    return same and bool((left - right).abs().max() <= 1e-4 * left.abs().max())


def load_statistics(path: Path) -> RealStatistics | None:
    """Load cached statistics; return None if the file is missing or incomplete."""
    try:
        tensors = load_file(path)
        return RealStatistics(**tensors)
    except (OSError, SafetensorError, TypeError):
        return None


def save_statistics(path: Path, statistics: RealStatistics) -> None:
    """Cache statistics by an atomic write; a failed write is a warning, not an error."""
    tensors = {name: value.cpu().contiguous() for name, value in statistics._asdict().items()}
    try:
        with atomic_write(path) as file:
            file.write(save(tensors))  # save_file raises an error of its own type on a full disk
    except OSError as error:
        rank_zero_warn(
            f"FrechetDistance: the statistics of the real images cannot be cached: {error}"
        )
