"""Quality of diffusion samples by independent classifiers: python benchmarks/diffusion_quality.py

    mnist [seed ...]     diffusion/mnist_quick, 1,000 images of all ten labels
    digits [seed ...]    the three attempts of lecture 6 on 8x8 digits, 500 images each

Each row is scored by a classifier that was not trained on samples of the model. Its features give
the Fréchet distance of the samples to the training images. The floor is the distance of as many
real test images, as the mean over disjoint draws: two draws may differ by a factor of 1.5. The
first thousand test images of MNIST come from few writers and are twice as far (`floor_first`).
A floor depends on its classifier, because an overfitted classifier separates test from training
images. MNIST has two classifiers: the preset's, and `batch_norm`, trained 1.5 times as long. The
distance of each image to the nearest training image, in pixels from 0 to 1, is reported with that
of real test images and shows whether the model copies. MNIST is read from DATA_ROOT. Raw rows are
in rows/diffusion_quality.jsonl; runs are kept in the folder RUNS, runs/quality by default.
"""

import json
import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from record import append, circumstances, ravine
from torch import Tensor

from ravine.callbacks.frechet.statistics import Gaussian, Moments, frechet_distance
from ravine.datamodules import ImageDataModule
from ravine.datamodules.images import to_float
from ravine.lightning_modules import Diffusion
from ravine.lightning_modules.image_classifier import ClassifierFeatures

RUNS = Path(os.environ.get("RUNS", "runs/quality")).resolve()
WAYS = [(20, 0.5), (10, 0.0), (20, 0.0), (20, 2.0)]  # steps and guidance; the last is a control


def trained(config: str, seed: int, *words: str, over: str = "") -> tuple[Path, dict[str, float]]:
    """Checkpoint of a run with this seed, made if it is not there; and its seconds."""
    root = RUNS / (over or config)
    folder = root / f"seed{seed}" / "version_0"
    if not (folder / "stopwatch.json").exists():
        configs = ["--config", config, *(["--config", over] if over else [])]
        ravine("fit", *configs, f"--seed_everything={seed}", *words,
               f"--trainer.default_root_dir={root}", f"--trainer.name=seed{seed}",
               "--trainer.callbacks+=benchmarks.record.Stopwatch")  # fmt: skip
    newest = max((folder / "checkpoints").glob("step*.ckpt"))
    return newest, json.loads((folder / "stopwatch.json").read_text())


class BatchNormed(torch.nn.Module):
    """Three convolutions with BatchNorm, 64 features, in the form of ClassifierFeatures."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[torch.nn.Module] = []
        for before, after in ((1, 16), (16, 32), (32, 64)):
            layers += [torch.nn.Conv2d(before, after, 3, padding=1), torch.nn.BatchNorm2d(after)]
            layers += [torch.nn.ReLU(), torch.nn.MaxPool2d(2)]
        layers += [torch.nn.Flatten(), torch.nn.Linear(576, 64), torch.nn.ReLU()]
        self.body, self.logits = torch.nn.Sequential(*layers), torch.nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.body(to_float(images))

    def learned(self, images: Tensor, labels: Tensor) -> "BatchNormed":
        path = RUNS / "batch_norm.pt"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(self.learn(images, labels).state_dict(), path)
        self.load_state_dict(torch.load(path, weights_only=True))
        return self.eval()

    @torch.enable_grad()
    def learn(self, images: Tensor, labels: Tensor, steps: int = 1400) -> "BatchNormed":
        torch.manual_seed(1)
        optimizer = torch.optim.AdamW(self.parameters())
        rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-3, total_steps=steps)
        for _ in range(steps):
            items = torch.randint(len(labels), (128,))
            down, right = torch.randint(5, (2,)).tolist()
            x = F.pad(images[items], (2, 2, 2, 2))[..., down : down + 28, right : right + 28]
            loss = F.cross_entropy(self.logits(self(x)), labels[items])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rate.step()
        return self.eval()


class ImageScorer:
    """A classifier, and its distances between real images."""

    def __init__(self, features: Any, data: ImageDataModule, n: int) -> None:
        self.features = features.eval()
        self.train, _ = data.get_split("train")
        self.reference = Gaussian.from_moments(self.moments(self.train))
        self.test, labels = data.get_split("test")
        self.accuracy = self.right(self.test, labels).float().mean().item()
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
        draws = [self.test[part] for part in order.split(n) if len(part) == n]
        self.floors = [self.distance(draw) for draw in draws]
        self.floor, self.first = statistics.mean(self.floors), self.distance(self.test[:n])
        self.real = self.nearest(draws[0])

    def of(self, images: Tensor) -> Tensor:
        return torch.cat([self.features(part) for part in images.split(1000)])

    def moments(self, images: Tensor) -> Moments:
        features = self.of(images)
        sums = Moments(features[:1000].mean(0))
        sums.add(features)
        return sums

    def right(self, images: Tensor, labels: Tensor) -> Tensor:
        return self.features.logits(self.of(images)).argmax(1) == labels

    def distance(self, images: Tensor) -> float:
        return float(frechet_distance(self.moments(images), self.reference))

    def nearest(self, images: Tensor) -> Tensor:
        """Distance of each image to the nearest training image."""
        train = self.train.flatten(1).float() / 255
        parts = (images.flatten(1).float() / 255).split(250)
        return torch.cat([torch.cdist(part, train).amin(1) for part in parts])


@torch.no_grad()
def score_samples(
    model: Diffusion, scorer: ImageScorer, n: int, steps: int, guidance: float
) -> dict[str, Any]:
    """One way of making images, in figures."""
    count = n // max(1, model.num_classes)
    pictures = model.generate(num_samples=count, num_steps=steps, guidance_scale=guidance)
    read: dict[str, Any] = {}
    if model.num_classes:
        labels = torch.arange(model.num_classes).repeat_interleave(count)
        right = scorer.right(pictures.images, labels).float().view(-1, count).mean(1)  # (classes)
        read["accuracy"] = round(right.mean().item(), 4)
        read["worst_class"] = round(right.min().item(), 4)
    near, real = scorer.nearest(pictures.images), scorer.real
    distance = scorer.distance(pictures.images)
    return read | {
        "fd": round(distance, 3),
        "fd_over_floor": round(distance / scorer.floor, 3),
        "nn_median": round((near.median() / real.median()).item(), 3),
        "nn_p1": round((near.quantile(0.01) / real.quantile(0.01)).item(), 3),
    }


def mnist(seed: int) -> None:
    data = ImageDataModule("mnist", val_fraction=0.0)
    data.setup("test")
    classifier = ClassifierFeatures(str(trained("classifier/mnist", 1)[0]))
    feature_extractors = {
        "mnist_cnn": classifier,
        "batch_norm": BatchNormed().learned(*data.get_split("train")),
    }
    path, seconds = trained("diffusion/mnist_quick", seed)
    model = Diffusion.load_from_checkpoint(path, map_location="cpu")
    row = circumstances("diffusion/mnist_quick") | {"seed": seed, "n": 1000} | seconds
    for name, features in feature_extractors.items():
        scorer = ImageScorer(features, data, 1000)
        row |= {"judge": name, "judge_accuracy": round(scorer.accuracy, 4)}
        row |= {"floor": round(scorer.floor, 3), "floor_first": round(scorer.first, 3)}
        row["floors"] = [round(floor, 2) for floor in scorer.floors]
        for steps, guidance in WAYS:
            row[f"{steps} steps, w {guidance}"] = score_samples(
                model, scorer, 1000, steps, guidance
            )
        append("diffusion_quality", row)


def digits(seed: int) -> None:
    data = ImageDataModule("digits")
    data.setup("test")
    words = ["--data.source=digits", "--trainer.max_steps=1000", "--model.max_shift=0"]
    features = ClassifierFeatures(str(trained("classifier/mnist", 2, *words)[0]))
    scorer = ImageScorer(features, data, 359)
    for over in ("one_step", "none", ""):
        over = f"diffusion/{over}" if over else ""
        path, seconds = trained("diffusion/digits", seed, over=over)
        row = circumstances("diffusion/digits") | {"seed": seed, "n": 500} | seconds
        row |= {"over": over, "judge": round(scorer.accuracy, 4), "floor": round(scorer.floor, 3)}
        steps = 1 if over.endswith("one_step") else 20
        model = Diffusion.load_from_checkpoint(path, map_location="cpu")
        append("diffusion_quality", row | score_samples(model, scorer, 500, steps, 0.0))


if __name__ == "__main__":
    what: Callable[[int], None] = {"mnist": mnist, "digits": digits}[sys.argv[1]]
    with torch.no_grad():
        for seed in [int(word) for word in sys.argv[2:]] or [0]:
            what(seed)
