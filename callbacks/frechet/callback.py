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

from ..base import refuse_without_validation
from ..checks.run_checks import before_training
from .distributed_features import SharedFeatures, checked, fingerprint, picked, some, spread
from .inception import SHA256, Inception, Layer, weights
from .statistics import Gaussian, Moments, frechet, kernel_distance

KEPT = 10_000  # real images at most whose features are kept for the kernel distance
DRAWS = 10  # of test images at most, each as large as the samples, for the floor
PROBES = 8  # real images by which an extractor is known again
FORM = "bytes, statistics 4"  # of what is cached: another code must not find it


class Reference(NamedTuple):
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
        layer: Layer = 2048,
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
        self.layer: Layer = layer
        self.n, self.reference, self.batch_size = n, reference, batch_size
        self.cache = Path(cache).expanduser() if cache else None
        self.found: dict[str, float] = {}  # the last measurement, unrounded
        self._file, self._sha256 = Path(), ""
        self._known: Reference | None = None  # of this run

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse what cannot be measured before anything is trained."""
        before_training(trainer, pl_module, stage)
        self._known = None
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
        refuse_without_validation(trainer, "FrechetDistance", stage)
        for part in ("train", "test"):
            if (count := len(data.pictures(part)[0])) < 2:
                raise UsageError(
                    f"FrechetDistance: the {part} part has {count} image{'s' * (count != 1)}, and "
                    "a covariance needs 2; allowed: parts of 2 images or more; add images, type "
                    "--data.test_fraction=0.5, or take FrechetDistance out of trainer.callbacks"
                )
        if self.extractor is None:
            self._file, self._sha256 = weights(self.weights, trainer)
            if self._sha256 != SHA256:
                rank_zero_warn(
                    f"{self._file} is not the published InceptionV3 (SHA-256 {self._sha256[:8]}, "
                    f"not {SHA256[:8]}): distances in it can be compared with nobody's"
                )
        else:
            self._sha256 = fingerprint(*self.extractor.state_dict().values())

    def check(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any) -> None:
        """Measure the real images, as a run needs them once, and sample two."""
        module: Any = pl_module
        with self._at_work(pl_module.device) as extractor:
            work = SharedFeatures(trainer, extractor, self.batch_size, pl_module.device)
            real = self._real(trainer, work)
            labels = spread(trainer.datamodule.pictures("train")[1], self.n)[:2]  # pyright: ignore
            with trainer.precision_plugin.val_step_context():
                images = module.sample_images(torch.arange(2, device=module.device), labels)
            features = extractor(checked(images, 2, type(module).__name__).to(work.device))
            if features.shape[1:] != real.mean.shape:
                raise UsageError(
                    f"FrechetDistance: samples have features {tuple(features.shape[1:])} and the "
                    f"data's images {tuple(real.mean.shape)}; sample images of the data's size"
                )

    def logged_metrics(self, trainer: L.Trainer) -> set[str]:
        """What it logs; no ratio where real images are no distance apart."""
        other = "kid" if self.name == "fid" else self.name.replace("fd_", "kd_", 1)
        ends = ("", "_floor", "_n", "_seconds", "_images_per_second")
        names = {f"{self.name}{end}" for end in ends} | {other, f"{other}_floor"}
        if self._known is None or self._known.floors[:, 0].mean() > 0:
            names.add(f"{self.name}_ratio")
        return {f"val/{name}" for name in names}

    @property
    def name(self) -> str:
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
        with self._at_work(pl_module.device) as extractor:
            work = SharedFeatures(trainer, extractor, self.batch_size, pl_module.device)
            real = self._real(trainer, work)
            labels = spread(trainer.datamodule.pictures("train")[1], self.n)  # pyright: ignore

            def draw(index: Tensor) -> Tensor:
                with trainer.precision_plugin.val_step_context():
                    images = module.sample_images(index.to(module.device), labels[index])
                return checked(images, len(index), type(module).__name__)

            begun = time.perf_counter()
            moments, features = work.moments(draw, self.n, real.mean, self.n)
            seconds = time.perf_counter() - begun
        gaussian = Gaussian(real.mean, real.trace, real.root)
        distance, kernel = self._apart(moments, features, gaussian, real.features)
        floor, kernel_floor = real.floors.mean(0)
        other = "kid" if self.name == "fid" else self.name.replace("fd_", "kd_", 1)
        found = {
            self.name: distance,
            f"{self.name}_floor": floor,
            **({f"{self.name}_ratio": distance / floor} if floor > 0 else {}),
            other: kernel,
            f"{other}_floor": kernel_floor,
            f"{self.name}_n": self.n,
            f"{self.name}_seconds": seconds,
            f"{self.name}_images_per_second": self.n / seconds,
        }
        self.found = {f"{stage}/{key}": float(value) for key, value in found.items()}
        pl_module.log_dict(self.found, sync_dist=True)

    @contextmanager
    def _at_work(self, device: torch.device) -> Iterator[nn.Module]:
        """The extractor on the device, and gone from it afterwards, with all that it needed."""
        extractor = self.extractor or Inception(self._file, self.layer)
        try:
            yield extractor.to(device).eval()
        finally:
            extractor.to("cpu")  # whoever still holds it
            if device.type == "cuda":
                torch.cuda.empty_cache()

    def _real(self, trainer: L.Trainer, work: SharedFeatures) -> Reference:
        """What is known of the real images: from this run, from the cache, or measured now."""
        if self._known is not None:
            return self._known
        data: Any = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        (train, _), test = data.pictures("train"), data.pictures("test")
        sizes = f"{self.n} {self.reference}"
        parts = (FORM, self.name, self._sha256, sizes, fingerprint(train), fingerprint(*test))
        key = hashlib.sha256("\n".join(parts).encode()).hexdigest()
        path = (self.cache or cache_folder()) / f"{key}.safetensors"
        known = read(path)
        if known and not alike(known.probe, probe(work, train)):
            known = None  # an extractor of the same name and weights, and yet another one
        everywhere = trainer.strategy.reduce_boolean_decision(known is not None)
        if known is None or not everywhere:
            known = self._measured(work, train, *test)
            if trainer.is_global_zero:
                write(path, known)
        self._known = Reference(*(value.to(work.exact) for value in known))
        self._announce(self._known, min(len(train), self.reference or len(train)), len(test[0]))
        return self._known

    def _measured(
        self, work: SharedFeatures, train: Tensor, test: Tensor, labels: Tensor
    ) -> Reference:
        chosen = some(len(train), self.reference)
        moments, kept = work.moments(picked(train, chosen), len(chosen), None, KEPT)
        gaussian = Gaussian.of(moments)
        classify = getattr(work.extractor, "logits", None)
        floors, right = [], []
        draws = max(1, min(DRAWS, len(test) // self.n))
        for draw in some(len(test), draws * self.n).split(self.n):
            moments, features = work.moments(picked(test, draw), len(draw), gaussian.mean, self.n)
            floors.append(torch.stack(self._apart(moments, features, gaussian, kept)))
            if classify:
                answers = classify(features.to(work.device)).argmax(1)
                right.append(answers.cpu() == labels[draw].cpu())
        accuracy = torch.cat(right).double().mean() if right else torch.tensor(torch.nan)
        return Reference(*gaussian, kept, torch.stack(floors), accuracy, probe(work, train))

    def _apart(
        self, moments: Moments, features: Tensor, gaussian: Gaussian, kept: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Both distances of a set from the training images, by its sums and its features."""
        return frechet(moments, gaussian), kernel_distance(features, kept[: self.n])

    def _announce(self, real: Reference, train: int, test: int) -> None:
        d = len(real.mean)
        if min(self.n, train) <= d:
            rank_zero_warn(
                f"FrechetDistance: {min(self.n, train)} images and {d} features: the covariance "
                f"cannot have full rank, and the distance says less; type "
                f"--trainer.callbacks.n={4 * d}"
            )
        if test < self.n:
            rank_zero_warn(
                f"FrechetDistance: the floor is of {test} real test images and the distance of "
                f"{self.n} samples: they are not alike; type --trainer.callbacks.n={test}"
            )
        floors = real.floors[:, 0]
        if not floors.mean() > 0:
            rank_zero_warn(
                "FrechetDistance: the real images are no distance apart (are they all equal?): "
                f"{self.name}_ratio is not logged"
            )
        draws = f" ({len(floors)} draws, {floors.min():.4g} to {floors.max():.4g})"
        knows = "" if real.accuracy.isnan() else f", right on {real.accuracy:.2%} of them"
        rank_zero_info(
            f"{self.name}: {d} features, weights {self._sha256[:8]}; {min(self.n, test):,} real "
            f"test images are {floors.mean():.4g}{draws if len(floors) > 1 else ''} away from "
            f"{train:,} to train{knows}"
        )


def probe(work: SharedFeatures, train: Tensor) -> Tensor:
    """Features (p d) of a few of the images (n c y x), on the CPU."""
    return work.extractor(train[some(len(train), PROBES)].to(work.device)).cpu()


def alike(one: Tensor, other: Tensor) -> bool:
    """Whether features are the same up to what another device or batch may change."""
    same = one.shape == other.shape and one.dtype == other.dtype
    return same and bool((one - other).abs().max() <= 1e-4 * one.abs().max())


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/ravine/features, by default ~/.cache/ravine/features."""
    folder = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(folder) / "ravine" / "features"


def read(path: Path) -> Reference | None:
    """What was kept; None if nothing was, or not whole."""
    try:
        found = load_file(path)
        return Reference(**found)
    except (OSError, SafetensorError, TypeError):
        return None


def write(path: Path, known: Reference) -> None:
    """Keep it under its name when it is whole; a cache that cannot be written is no error."""
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    tensors = {name: value.cpu().contiguous() for name, value in known._asdict().items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(save(tensors))  # save_file has an error of its own for a full disk
        os.replace(part, path)
    except OSError as error:
        rank_zero_warn(f"FrechetDistance: the real images' statistics are not kept: {error}")
    finally:
        with suppress(OSError):  # there is none, or no folder for one
            part.unlink()
