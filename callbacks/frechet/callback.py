"""How far samples are from the data: Fréchet's distance and the kernel distance at each validation.

    every rank       draws its blocks of samples, and takes their features
    all together     blocks are handed round, and every rank adds them in the order of their numbers

so the same bits come out on any number of ranks. `fid` is said of the 2048 features of InceptionV3
alone; in any other features the distance is called fd_<extractor>. Beside it stands its floor, the
distance of as many real test images: no number of this kind means anything without it. One draw of
them may be twice as far as another, so the floor is the mean over disjoint draws.
"""

import hashlib
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from ravine.errors import UsageError

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

MAX_KEPT = 10_000  # real images at most whose features are kept for the kernel distance
BASELINE_DRAWS = 10  # of test images at most, each as large as the samples, for the floor
NUM_PROBES = 8  # real images by which an extractor is known again
CACHE_VERSION = "bytes, statistics 4"  # of what is cached: another code must not find it


class RealStatistics(NamedTuple):
    """What is known of the real images in an extractor's features, and kept in a file."""

    mean: Tensor  # (d) of the training images
    trace: Tensor
    root: Tensor  # (d d)
    features: Tensor  # (n d) of some training images
    floors: Tensor  # distances of draws k of n test images: Fréchet's and the kernel's (k 2)
    accuracy: Tensor  # of the extractor on all of them, nan where it does not classify
    probe: Tensor  # features of a few training images, by which the extractor is known again


class FrechetDistance(L.Callback):
    """Logs val/fid or val/fd_<extractor>, val/kid or val/kd_<extractor>, floor, ratio and speed.

        Trainer(callbacks=[FrechetDistance(ClassifierFeatures("FILE.ckpt"), n=1000)])

    The module draws samples by `sample_images(index, labels)`: uint8 images (n c y x) of these
    sample numbers (n) and, where it can choose, these labels (n). The datamodule gives the real
    ones by `pictures(part)`: uint8 images (n c y x) and labels (n) of "train" and "test".

    Args:
        extractor: any module that maps uint8 images to features (b d); by default InceptionV3.
        n: samples, and real test images of each draw for the floor. Below 5,000 trust the kernel
            distance more: Fréchet's is too large by about c / n, its floor alike.
        layer: of InceptionV3.
        weights: InceptionV3's file, in torch-fidelity's layout; by default the published one.
        reference: training images compared with; by default all.
        batch_size: images sampled at once; the distance depends on it in the last bits.
        cache: folder for what is known of the real images; by default ravine's cache.
    """

    def __init__(
        self,
        extractor: nn.Module | None = None,
        n: int = 1000,
        layer: FeatureLayer = 2048,
        weights: str | None = None,
        reference: int | None = None,
        batch_size: int = 128,
        cache: str | None = None,
    ) -> None:
        """Check the sizes."""
        for name, value, least in (("n", n, 2), ("reference", reference or 2, 2),
                                   ("batch_size", batch_size, 1)):  # fmt: skip
            if value < least:
                raise UsageError(
                    f"FrechetDistance: {name} is {value}; allowed: {least} or more; type "
                    f"--trainer.callbacks.{name}={max(least, 1000 if name == 'n' else least)}"
                )
        self.extractor, self.weights = extractor, weights
        self.layer: FeatureLayer = layer
        self.num_samples, self.num_real_images, self.batch_size = n, reference, batch_size
        self.cache_dir = Path(cache).expanduser() if cache else None
        self.last_metrics: dict[str, float] = {}  # the last measurement, unrounded
        self._weights_file, self._weights_sha256 = Path(), ""
        self._real_statistics: RealStatistics | None = None  # of this run

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse what cannot be measured before anything is trained."""
        add_run_checks(trainer, pl_module, stage)
        self._real_statistics = None
        if not callable(getattr(pl_module, "sample_images", None)):
            raise UsageError(
                "FrechetDistance needs a module with a method sample_images(index, labels), and "
                f"{type(pl_module).__name__} has none; take FrechetDistance out of "
                "trainer.callbacks"
            )
        data: Any = getattr(trainer, "datamodule", None)
        if not callable(getattr(data, "pictures", None)):
            raise UsageError(
                'FrechetDistance needs a datamodule with a method pictures("train"), and '
                f"{type(data).__name__ if data else 'none'} is given; type --data=ImageDataModule"
            )
        require_validation(trainer, "FrechetDistance", stage)
        for split in ("train", "test"):
            if (count := len(data.pictures(split)[0])) < 2:
                raise UsageError(
                    f"FrechetDistance: the {split} part has {count} image{'s' * (count != 1)}, and "
                    "a covariance needs 2; allowed: parts of 2 images or more; add images, type "
                    "--data.test_fraction=0.5, or take FrechetDistance out of trainer.callbacks"
                )
        if self.extractor is None:
            self._weights_file, self._weights_sha256 = locate_inception_weights(
                self.weights, trainer
            )
            if self._weights_sha256 != WEIGHTS_SHA256:
                rank_zero_warn(
                    f"{self._weights_file} is not the published InceptionV3 (SHA-256 "
                    f"{self._weights_sha256[:8]}, "
                    f"not {WEIGHTS_SHA256[:8]}): distances in it can be compared with nobody's"
                )
        else:
            self._weights_sha256 = fingerprint_tensors(*self.extractor.state_dict().values())

    def check(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any) -> None:
        """Measure the real images, as a run needs them once, and sample two."""
        module: Any = pl_module
        with self._extractor_on_device(pl_module.device) as extractor:
            pool = FeatureExtractorPool(trainer, extractor, self.batch_size, pl_module.device)
            real = self._load_real(trainer, pool)
            data: Any = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
            labels = proportional_labels(data.pictures("train")[1], self.num_samples)[:2]
            with trainer.precision_plugin.val_step_context():
                images = module.sample_images(torch.arange(2, device=module.device), labels)
            features = extractor(validate_images(images, 2, type(module).__name__).to(pool.device))
            if features.shape[1:] != real.mean.shape:
                raise UsageError(
                    f"FrechetDistance: samples have features {tuple(features.shape[1:])} and the "
                    f"data's images {tuple(real.mean.shape)}; sample images of the data's size"
                )

    def logged_metrics(self, trainer: L.Trainer) -> set[str]:
        """What it logs; no ratio where real images are no distance apart."""
        kernel_name = (
            "kid" if self.metric_name == "fid" else self.metric_name.replace("fd_", "kd_", 1)
        )
        suffixes = ("", "_floor", "_n", "_seconds", "_images_per_second")
        names = {f"{self.metric_name}{suffix}" for suffix in suffixes} | {
            kernel_name,
            f"{kernel_name}_floor",
        }
        if self._real_statistics is None or self._real_statistics.floors[:, 0].mean() > 0:
            names.add(f"{self.metric_name}_ratio")
        return {f"val/{name}" for name in names}

    @property
    def metric_name(self) -> str:
        """What the distance is called: fid for Inception's 2048, else after the extractor."""
        if self.extractor is not None:
            return f"fd_{getattr(self.extractor, 'name', type(self.extractor).__name__.lower())}"
        return "fid" if self.layer == 2048 else f"fd_inception_{self.layer}"

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure, so early that a checkpoint can be chosen by it."""
        if not trainer.sanity_checking:
            self._measure(trainer, pl_module, "val")

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure."""
        self._measure(trainer, pl_module, "test")

    @torch.no_grad()
    def _measure(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        module: Any = pl_module
        with self._extractor_on_device(pl_module.device) as extractor:
            pool = FeatureExtractorPool(trainer, extractor, self.batch_size, pl_module.device)
            real = self._load_real(trainer, pool)
            labels = proportional_labels(trainer.datamodule.pictures("train")[1], self.num_samples)  # pyright: ignore

            def sample(index: Tensor) -> Tensor:
                with trainer.precision_plugin.val_step_context():
                    images = module.sample_images(index.to(module.device), labels[index])
                return validate_images(images, len(index), type(module).__name__)

            start_time = time.perf_counter()
            moments, features = pool.compute_moments(
                sample, self.num_samples, real.mean, self.num_samples
            )
            seconds = time.perf_counter() - start_time
        gaussian = Gaussian(real.mean, real.trace, real.root)
        distance, kernel = self._distances(moments, features, gaussian, real.features)
        baseline, kernel_baseline = real.floors.mean(0)
        kernel_name = (
            "kid" if self.metric_name == "fid" else self.metric_name.replace("fd_", "kd_", 1)
        )
        metrics = {
            self.metric_name: distance,
            f"{self.metric_name}_floor": baseline,
            **({f"{self.metric_name}_ratio": distance / baseline} if baseline > 0 else {}),
            kernel_name: kernel,
            f"{kernel_name}_floor": kernel_baseline,
            f"{self.metric_name}_n": self.num_samples,
            f"{self.metric_name}_seconds": seconds,
            f"{self.metric_name}_images_per_second": self.num_samples / seconds,
        }
        self.last_metrics = {f"{stage}/{key}": float(value) for key, value in metrics.items()}
        pl_module.log_dict(self.last_metrics, sync_dist=True)

    @contextmanager
    def _extractor_on_device(self, device: torch.device) -> Iterator[nn.Module]:
        """The extractor on the device, and gone from it afterwards, with all that it needed."""
        extractor = self.extractor or Inception(self._weights_file, self.layer)
        try:
            yield extractor.to(device).eval()
        finally:
            extractor.to("cpu")  # whoever still holds it
            if device.type == "cuda":
                torch.cuda.empty_cache()

    def _load_real(self, trainer: L.Trainer, pool: FeatureExtractorPool) -> RealStatistics:
        """What is known of the real images: from this run, from the cache, or measured now."""
        if self._real_statistics is not None:
            return self._real_statistics
        data: Any = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        (train, _), test = data.pictures("train"), data.pictures("test")
        sizes = f"{self.num_samples} {self.num_real_images}"
        key_parts = (
            CACHE_VERSION,
            self.metric_name,
            self._weights_sha256,
            sizes,
            fingerprint_tensors(train),
            fingerprint_tensors(*test),
        )
        key = hashlib.sha256("\n".join(key_parts).encode()).hexdigest()
        path = (self.cache_dir or get_feature_cache_dir()) / f"{key}.safetensors"
        statistics = load_statistics(path)
        if statistics and not is_close(statistics.probe, feature_probe(pool, train)):
            statistics = None  # an extractor of the same name and weights, and yet another one
        is_cached_everywhere = trainer.strategy.reduce_boolean_decision(statistics is not None)
        if statistics is None or not is_cached_everywhere:
            statistics = self._measured(pool, train, *test)
            if trainer.is_global_zero:
                save_statistics(path, statistics)
        self._real_statistics = RealStatistics(
            *(value.to(pool.float64_device) for value in statistics)
        )
        self._log_baseline(
            self._real_statistics, min(len(train), self.num_real_images or len(train)), len(test[0])
        )
        return self._real_statistics

    def _measured(
        self, pool: FeatureExtractorPool, train: Tensor, test: Tensor, labels: Tensor
    ) -> RealStatistics:
        indices = random_subset(len(train), self.num_real_images)
        moments, kept = pool.compute_moments(
            select_images(train, indices), len(indices), None, MAX_KEPT
        )
        gaussian = Gaussian.from_moments(moments)
        classify = getattr(pool.extractor, "logits", None)
        baselines, correct = [], []
        num_draws = max(1, min(BASELINE_DRAWS, len(test) // self.num_samples))
        for draw in random_subset(len(test), num_draws * self.num_samples).split(self.num_samples):
            moments, features = pool.compute_moments(
                select_images(test, draw), len(draw), gaussian.mean, self.num_samples
            )
            baselines.append(torch.stack(self._distances(moments, features, gaussian, kept)))
            if classify:
                predicted = classify(features.to(pool.device)).argmax(1)
                correct.append(predicted.cpu() == labels[draw].cpu())
        accuracy = torch.cat(correct).double().mean() if correct else torch.tensor(torch.nan)
        return RealStatistics(
            *gaussian, kept, torch.stack(baselines), accuracy, feature_probe(pool, train)
        )

    def _distances(
        self, moments: Moments, features: Tensor, gaussian: Gaussian, kept: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Both distances of a set from the training images, by its sums and its features."""
        return frechet_distance(moments, gaussian), kernel_distance(
            features, kept[: self.num_samples]
        )

    def _log_baseline(self, real: RealStatistics, train: int, test: int) -> None:
        d = len(real.mean)
        if min(self.num_samples, train) <= d:
            rank_zero_warn(
                f"FrechetDistance: {min(self.num_samples, train)} images and {d} features: the "
                "covariance "
                f"cannot have full rank, and the distance says less; type "
                f"--trainer.callbacks.n={4 * d}"
            )
        if test < self.num_samples:
            rank_zero_warn(
                f"FrechetDistance: the floor is of {test} real test images and the distance of "
                f"{self.num_samples} samples: they are not alike; type --trainer.callbacks.n={test}"
            )
        baselines = real.floors[:, 0]
        if not baselines.mean() > 0:
            rank_zero_warn(
                "FrechetDistance: the real images are no distance apart (are they all equal?): "
                f"{self.metric_name}_ratio is not logged"
            )
        draws = f" ({len(baselines)} draws, {baselines.min():.4g} to {baselines.max():.4g})"
        accuracy_note = "" if real.accuracy.isnan() else f", right on {real.accuracy:.2%} of them"
        rank_zero_info(
            f"{self.metric_name}: {d} features, weights {self._weights_sha256[:8]}; "
            f"{min(self.num_samples, test):,} real "
            f"test images are {baselines.mean():.4g}{draws if len(baselines) > 1 else ''} away "
            "from "
            f"{train:,} to train{accuracy_note}"
        )


def feature_probe(pool: FeatureExtractorPool, train: Tensor) -> Tensor:
    """Features (p d) of a few of the images (n c y x), on the CPU."""
    return pool.extractor(train[random_subset(len(train), NUM_PROBES)].to(pool.device)).cpu()


def is_close(left: Tensor, right: Tensor) -> bool:
    """Whether features are the same up to what another device or batch may change."""
    same = left.shape == right.shape and left.dtype == right.dtype
    return same and bool((left - right).abs().max() <= 1e-4 * left.abs().max())


def get_feature_cache_dir() -> Path:
    """$XDG_CACHE_HOME/ravine/features, by default ~/.cache/ravine/features."""
    folder = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(folder) / "ravine" / "features"


def load_statistics(path: Path) -> RealStatistics | None:
    """What was kept; None if nothing was, or not whole."""
    try:
        tensors = load_file(path)
        return RealStatistics(**tensors)
    except (OSError, SafetensorError, TypeError):
        return None


def save_statistics(path: Path, statistics: RealStatistics) -> None:
    """Keep it under its name when it is whole; a cache that cannot be written is no error."""
    temp_path = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    tensors = {name: value.cpu().contiguous() for name, value in statistics._asdict().items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temp_path.write_bytes(save(tensors))  # save_file has an error of its own for a full disk
        os.replace(temp_path, path)
    except OSError as error:
        rank_zero_warn(f"FrechetDistance: the real images' statistics are not kept: {error}")
    finally:
        with suppress(OSError):  # there is none, or no folder for one
            temp_path.unlink()
