"""The Fréchet distance equals that of other libraries, on any number of ranks."""

import errno
import gc
import hashlib
import os
import re
import time
import weakref
from functools import cache
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch_fidelity
from torch import nn
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torchmetrics.image.fid import FrechetInceptionDistance

from ravine.callbacks import FrechetDistance, GenerateSamples
from ravine.callbacks.frechet import callback as callback_module
from ravine.callbacks.frechet import inception
from ravine.callbacks.frechet.distributed_features import FeatureExtractorPool, proportional_labels
from ravine.callbacks.frechet.statistics import Gaussian, Moments, frechet_distance, kernel_distance

D = 16


class Random(nn.Module):
    """Uint8 images of 8x8 to D features, some of them dead, the others far from zero."""

    name = "random"

    def __init__(self, dead: int = 0, width: int = D):
        super().__init__()
        g = torch.Generator().manual_seed(7)
        self.weight = nn.Parameter(torch.randn(64, width, generator=g).double(), False)
        self.dead = dead

    def forward(self, images):
        features = torch.relu(images.flatten(1).double() / 255 @ self.weight) + 100
        features[:, : self.dead] = 3.0
        return features

    def compute_logits(self, features):
        return features


class Painter(L.LightningModule):
    """A foreign module: each number is its own picture, whatever is drawn beside it."""

    def __init__(self, size: int = 8, bright: int = 256):
        super().__init__()
        self.line, self.size, self.bright = nn.Linear(1, 1), size, bright

    def generate_images(self, index, labels=None):
        return torch.stack([paint(int(i) + 10_000, self.size, self.bright) for i in index])

    def validation_step(self, batch, index):
        self.log("val/loss", self.line(torch.ones(1, 1)).mean(), batch_size=1, sync_dist=True)

    def test_step(self, batch, index):
        pass


def paint(number: int, size: int = 8, bright: int = 256) -> torch.Tensor:
    g = torch.Generator().manual_seed(number)
    return torch.randint(bright, (1, size, size), generator=g, dtype=torch.uint8)


class PaintedData(L.LightningDataModule):
    def __init__(self, train: int = 96, test: int = 64, size: int = 8):
        super().__init__()
        self.counts, self.size = {"train": train, "test": test}, size

    def get_split(self, part):
        first = 0 if part == "train" else 5_000
        images = [paint(i, self.size) for i in range(first, first + self.counts[part])]
        return torch.stack(images), torch.arange(len(images)) % 4

    def val_dataloader(self):
        return torch.utils.data.DataLoader(range(4))

    train_dataloader = test_dataloader = val_dataloader


def measured(callback, module=None, data=None, world: int = 1):
    trainer = L.Trainer(
        accelerator="cpu", devices=world, strategy="ddp" if world > 1 else "auto",
        logger=False, callbacks=[callback], enable_progress_bar=False, enable_checkpointing=False,
        enable_model_summary=False, use_distributed_sampler=False,
    )  # fmt: skip
    trainer.validate(module or Painter(), data or PaintedData(), verbose=False)
    return callback.last_metrics | {"logged": dict(trainer.callback_metrics)}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def correlated(n: int, d: int, seed: int, shift: float = 0.0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(d, d, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return torch.randn(n, d, generator=g, dtype=torch.float64) @ mix + shift


def gathered(features: torch.Tensor, block: int = 50) -> Moments:
    moments = Moments(features[:block].mean(0))
    for part in features.split(block):
        moments.add(part)
    return moments


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return float(frechet_distance(gathered(one), Gaussian.from_moments(gathered(other))))


def test_the_distance_of_two_gaussians_is_the_closed_form() -> None:
    # commuting covariances: |m1 - m2|² + sum of (s1 - s2)²
    g = torch.Generator().manual_seed(0)
    q = torch.linalg.qr(torch.randn(5, 5, generator=g, dtype=torch.float64)).Q
    rows = torch.cat((torch.eye(5), -torch.eye(5))).double() * 3  # covariance 2
    s1, s2, m = torch.rand(3, 5, generator=g, dtype=torch.float64)
    one, other = rows * s1 @ q, rows * s2 @ q + m
    expected = m.square().sum() + 2 * (s1 - s2).square().sum()
    assert distance(one, other) == pytest.approx(float(expected), rel=1e-12)
    assert distance(one, one) == pytest.approx(0, abs=1e-12)


def test_products_in_blocks_equal_the_full_products() -> None:
    one, other = correlated(900, 300, 1), correlated(900, 300, 2, 0.1)  # blocks are of 256
    product = torch.cov(one.T) @ torch.cov(other.T)
    shared = torch.linalg.eigvals(product).sqrt().real.sum()
    distance_squared = (one.mean(0) - other.mean(0)).square().sum()
    exact = distance_squared + torch.cov(one.T).trace() + torch.cov(other.T).trace() - 2 * shared
    assert distance(one, other) == pytest.approx(float(exact), rel=1e-10)


@pytest.mark.parametrize("shift", [0.0, 100.0])
def test_one_pass_around_a_pivot_loses_no_precision(shift: float) -> None:
    features = correlated(300, 8, 1, shift)
    moments = gathered(features)
    assert torch.allclose(moments.mean(), features.mean(0), rtol=1e-14)
    assert torch.allclose(moments.covariance(), torch.cov(features.T), rtol=1e-12, atol=1e-12)


class Registered(FeatureExtractorBase):
    """For torch-fidelity: our random features, in float64 (it keeps whatever type it is given)."""

    def __init__(self, name, features_list, **kwargs):
        super().__init__(name, features_list)
        self.inner = Random()

    @staticmethod
    def get_provided_features_list():
        return ("f",)

    @staticmethod
    def get_default_feature_layer_for_metric(metric):
        return "f"

    @staticmethod
    def can_be_compiled():
        return False

    @staticmethod
    def get_dummy_input_for_compile():
        return torch.zeros(1, 1, 8, 8, dtype=torch.uint8)

    def forward(self, images):
        return (self.inner(images),)


class Rows(torch.utils.data.Dataset):
    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.images[i]


def official(one: torch.Tensor, other: torch.Tensor, **arguments) -> dict[str, float]:
    if "random" not in torch_fidelity.registry.FEATURE_EXTRACTORS_REGISTRY:
        torch_fidelity.register_feature_extractor("random", Registered)
    return torch_fidelity.calculate_metrics(
        input1=Rows(one), input2=Rows(other), fid=True, cuda=False, verbose=False, cache=False,
        save_cpu_ram=True, **({"feature_extractor": "random"} | arguments),
    )  # fmt: skip


def mixed(count: int) -> torch.Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))


def both(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    real = torch.stack([paint(i) for i in range(n)])
    return real, torch.stack([paint(i + 10_000, bright=220) for i in range(n)])


def test_torch_fidelity_computes_the_same_to_nine_digits() -> None:
    real, generated = both(400)
    expected = official(generated, real, kid=True, kid_subsets=1, kid_subset_size=400)
    extract = Random()
    actual = distance(extract(generated), extract(real))
    assert actual == pytest.approx(expected["frechet_inception_distance"], rel=1e-9)
    kernel = float(kernel_distance(extract(generated), extract(real)))
    assert kernel == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-7)


def test_torchmetrics_computes_the_same_to_six_digits() -> None:
    class Features(Random):
        num_features = D

    real, generated = both(400)
    metric = FrechetInceptionDistance(feature=Features(), normalize=False)
    metric.update(real, real=True)
    metric.update(generated, real=False)
    extract = Random()
    actual = distance(extract(generated), extract(real))
    assert actual == pytest.approx(float(metric.compute()), rel=1e-6)


def test_the_kernel_distance_is_unbiased() -> None:
    means = [
        float(kernel_distance(correlated(40, 4, 2 * i), correlated(30, 4, 2 * i + 1)))
        for i in range(200)
    ]
    spreads = torch.tensor(means)
    assert abs(spreads.mean()) < 4 * spreads.std() / 200**0.5
    assert spreads.min() < 0 < spreads.max()


def test_one_image_has_no_distance() -> None:
    x = torch.rand(5, 3, dtype=torch.float64)
    one = Moments(x.mean(0))
    one.add(x[:1])
    for measure in (one.covariance, lambda: kernel_distance(x[:1], x)):
        with pytest.raises(ValueError, match="the covariance of 1 image is not defined"):
            measure()


def test_a_rank_deficient_covariance_gives_a_finite_number_near_the_singular_values() -> None:
    one, other = correlated(30, 64, 1), correlated(30, 64, 2, 0.5)
    (a, b), (n, m) = ((f - f.mean(0) for f in (one, other)), (29, 29))
    shared = torch.linalg.svdvals(a @ b.T).sum() / (n * m) ** 0.5
    distance_squared = (one.mean(0) - other.mean(0)).square().sum()
    exact = distance_squared + a.square().sum() / n + b.square().sum() / m - 2 * shared
    assert distance(one, other) == pytest.approx(float(exact), rel=1e-6)


def on_ranks(world: int, dead: int, width: int) -> dict[str, float]:
    callback = FrechetDistance(
        Random(dead, width), num_samples=90, batch_size=20, cache_dir=f"cache{world}"
    )
    found = measured(callback, world=world)
    assert float(found["logged"]["val/fd_random"]) == pytest.approx(found["val/fd_random"])
    return {k: found[f"val/{k}"] for k in ("fd_random", "fd_random_real_baseline", "kd_random")}


@pytest.mark.parametrize(("dead", "width"), [(0, D), (3, D), (3, 128)])
@pytest.mark.filterwarnings("ignore:FrechetDistance")
def test_any_number_of_ranks_gives_the_same_bits(
    ranks, dead: int, width: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    alone = on_ranks(1, dead, width)
    assert alone["fd_random"] > 0
    for world in (2, 4):
        assert ranks(on_ranks, world, world, dead, width) == [alone] * world


def test_the_callback_logs_the_value_of_the_formula() -> None:
    data, callback = (
        PaintedData(train=200, test=130),
        FrechetDistance(Random(), num_samples=100, batch_size=32),
    )
    found = measured(callback, Painter(bright=200), data)
    extract, (real, _), (test, _) = Random(), data.get_split("train"), data.get_split("test")
    generated = torch.stack([paint(i + 10_000, bright=200) for i in range(100)])
    assert found["val/fd_random"] == pytest.approx(distance(extract(generated), extract(real)))
    chosen = mixed(130)[:100]
    floor = distance(extract(test[chosen]), extract(real))
    assert found["val/fd_random_real_baseline"] == pytest.approx(floor)
    assert found["val/fd_random_over_baseline"] == pytest.approx(found["val/fd_random"] / floor)
    kernel = kernel_distance(extract(generated), extract(real[mixed(200)])[:100])
    assert found["val/kd_random"] == pytest.approx(float(kernel))
    assert found["val/fd_random_num_samples"] == 100
    assert found["val/fd_random_images_per_second"] > 0
    assert set(found["logged"]) == {*found} - {"logged"} | {"val/loss"}


def test_the_reference_is_a_random_draw_of_the_training_images() -> None:
    data = Sorted(200, 60)
    found = measured(
        FrechetDistance(Random(), num_samples=40, num_real_images=60), Painter(bright=200), data
    )
    real, extract = data.get_split("train")[0][mixed(200)[:60]], Random()
    generated = torch.stack([paint(i + 10_000, bright=200) for i in range(40)])
    assert found["val/fd_random"] == pytest.approx(distance(extract(generated), extract(real)))


def test_the_floor_is_the_mean_over_disjoint_draws_of_the_test_images(
    caplog: pytest.LogCaptureFixture,
) -> None:
    seen = []

    class Seeing(Random):
        def forward(self, images):
            seen.append(images)
            return super().forward(images)

    data, n = Sorted(400, 130), 40
    with caplog.at_level("INFO"):
        found = measured(FrechetDistance(Seeing(), num_samples=n, batch_size=16), data=data)
    (real, _), (test, labels), extract = data.get_split("train"), data.get_split("test"), Random()
    draws = mixed(130)[: 3 * n].split(n)
    floors = [distance(extract(test[draw]), extract(real)) for draw in draws]
    assert found["val/fd_random_real_baseline"] == pytest.approx(sum(floors) / 3)
    assert found["val/fd_random_over_baseline"] == pytest.approx(
        found["val/fd_random"] * 3 / sum(floors)
    )
    assert max(floors) > 1.02 * min(floors)  # one of them would not do
    kernels = [kernel_distance(extract(test[d]), extract(real[mixed(400)])[:n]) for d in draws]
    assert found["val/kd_random_real_baseline"] == pytest.approx(float(sum(kernels)) / 3)
    looked_at = torch.cat(seen).flatten(1).unique(dim=0, return_counts=True)
    tested = test[torch.cat(draws)].flatten(1)
    for image in tested:  # a class comes after another, and none twice
        assert looked_at[1][(looked_at[0] == image).all(1)].tolist() == [1]
    answers = extract(test[torch.cat(draws)]).argmax(1) == labels[torch.cat(draws)]
    assert 0 < answers.sum() < len(answers)
    assert f"classifies {answers.double().mean():.2%} of them correctly" in caplog.text
    first = distance(extract(test[:n]), extract(real))
    assert first > 5 * max(floors)  # they are of one class


@pytest.mark.parametrize(("test", "draws"), [(20, 1), (64, 1), (127, 1), (128, 2), (2000, 10)])
@pytest.mark.filterwarnings("ignore:FrechetDistance")
def test_there_are_as_many_draws_as_the_test_images_allow_up_to_ten(
    test: int, draws: int, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        measured(FrechetDistance(Random(), num_samples=64), data=PaintedData(test=test))
    said = re.findall(r"training images is [\d.]+ \((\d+) draws, [\d.]+ to [\d.]+\)", caplog.text)
    assert said == ([] if draws == 1 else [str(draws)])


@cache
def random_inception(folder: Path) -> Path:
    """A file in torch-fidelity's layout, of weights as torch initialises them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Module, "load_state_dict", lambda self, state: None)
        patch.setattr(
            "torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url",
            lambda *a, **k: None,
        )
        torch.manual_seed(0)
        net = FeatureExtractorInceptionV3("inception-v3-compat", ["64"], verbose=False)
    torch.save(net.state_dict(), folder / "inception.pth")
    return folder / "inception.pth"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_inception(tmp_path_factory.mktemp("weights"))


UNPUBLISHED = "is not the published InceptionV3"


@pytest.mark.filterwarnings("ignore:FrechetDistance")
def test_the_distance_in_inceptions_features_is_that_of_torch_fidelity(weights: Path) -> None:
    data, painter = PaintedData(train=80, test=40), Painter(bright=180)
    callback = FrechetDistance(layer=64, weights=str(weights), num_samples=40, batch_size=20)
    with pytest.warns(UserWarning, match=UNPUBLISHED):
        found = measured(callback, painter, data)
    real, generated = data.get_split("train")[0], painter.generate_images(torch.arange(40))
    expected = official(
        generated.expand(-1, 3, -1, -1), real.expand(-1, 3, -1, -1),
        feature_extractor="inception-v3-compat", feature_layer_fid="64",
        feature_extractor_weights_path=str(weights),
    )["frechet_inception_distance"]  # fmt: skip
    assert found["val/fd_inception_64"] == pytest.approx(expected, rel=1e-4)
    assert "val/fid" not in found


@pytest.mark.filterwarnings("ignore:.*is not the published InceptionV3")
def test_fid_uses_2048_features_is_finite_and_frees_the_inception_network(
    weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, moved = [], []

    class Watched(inception.Inception):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            made.append(weakref.ref(self))

        def to(self, device):
            moved.append(str(device))
            return super().to(device)

    monkeypatch.setattr(callback_module, "Inception", Watched)
    callback = FrechetDistance(weights=str(weights), num_samples=4, batch_size=4)
    with pytest.warns(
        UserWarning, match="covariance of 4 images in 2048 features cannot have full rank"
    ):
        found = measured(callback, data=PaintedData(train=4, test=4))
    assert 0 < found["val/fid"] < float("inf")
    assert "val/kid" in found
    gc.collect()
    assert len(made) == 1
    assert made[0]() is None
    assert moved == ["cpu", "cpu"]  # to the device, and off it again


def test_statistics_of_real_images_are_cached_under_a_key_of_all_their_inputs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    original = FrechetDistance._compute_real
    monkeypatch.setattr(
        FrechetDistance, "_compute_real", lambda *a: calls.append(1) or original(*a)
    )
    extractor, folder = Random(), str(tmp_path / "kept")

    def again(train=80, test=64, **changes):
        callback = FrechetDistance(
            **({"extractor": extractor, "num_samples": 40, "cache_dir": folder} | changes)
        )
        return measured(callback, data=PaintedData(train, test))["val/fd_random"]

    first = again()
    assert again() == first
    assert len(calls) == 1
    again(num_samples=30)
    again(num_real_images=60)
    with torch.no_grad():
        extractor.weight[0, 0] += 1
    again()
    assert len(calls) == 4
    again(train=79)
    again(test=63)
    assert len(calls) == 6
    for path in Path(folder).iterdir():
        path.write_bytes(path.read_bytes()[:50])  # damaged: measured again
    assert again() == again()
    assert len(calls) == 7


@pytest.mark.parametrize("why", ["a file", "a full disk"])
def test_an_unwritable_cache_gives_a_line_and_the_same_result(
    why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "kept"
    if why == "a file":
        cache.write_bytes(b"mine")
    else:

        def full(descriptor: int) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
    with pytest.warns(UserWarning, match="the statistics of the real images cannot be cached"):
        found = measured(FrechetDistance(Random(), num_samples=40, cache_dir=str(cache)))
    assert found["val/fd_random"] > 0
    assert cache.read_bytes() == b"mine" if why == "a file" else not list(cache.iterdir())


class Brightness(nn.Module):
    """Without parameters, and with an argument that no name tells."""

    name = "brightness"

    def __init__(self, power: float):
        super().__init__()
        self.power = power

    def forward(self, images):
        return (images.flatten(1).double() / 255)[:, :8] ** self.power


def test_extractors_without_parameters_do_not_share_a_cache_entry(tmp_path: Path) -> None:
    def of(power: float, cache: str) -> float:
        callback = FrechetDistance(
            Brightness(power), num_samples=40, cache_dir=str(tmp_path / cache)
        )
        return measured(callback, Painter(bright=200))["val/fd_brightness"]

    of(1.0, "shared")
    assert of(2.0, "shared") == of(2.0, "own")


class Sorted(PaintedData):
    """Four classes of four brightnesses, one after another, or mixed."""

    mixed = False

    def get_split(self, part):
        labels = torch.arange(self.counts[part]) * 4 // self.counts[part]
        first = 0 if part == "train" else 5_000
        images = torch.stack([paint(i, 8, 60 * (int(c) + 1)) for i, c in enumerate(labels, first)])
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(5))
        return (images[order], labels[order]) if self.mixed else (images, labels)


class Labelled(Painter):
    """As bright as its label says."""

    def generate_images(self, index, labels=None):
        pairs = zip(index.tolist(), labels.tolist(), strict=True)
        return torch.stack([paint(i + 10_000, 8, 60 * (c + 1)) for i, c in pairs])


def test_the_kernel_distance_does_not_depend_on_the_order_of_the_images() -> None:
    found = []
    for mixed in (False, True):
        data = Sorted(400, 100)
        data.mixed = mixed
        found.append(measured(FrechetDistance(Brightness(1), num_samples=100), Labelled(), data))
    one, other = (each["val/kd_brightness"] for each in found)
    distance_squared = measured(
        FrechetDistance(Brightness(1), num_samples=100), Painter(bright=60), data
    )
    assert abs(one - other) < 0.1 * distance_squared["val/kd_brightness"]


def test_samples_are_drawn_with_the_labels_of_the_data() -> None:
    """A painter whose brightness is its label is near; with its labels rolled on, it is not."""

    class Rolled(Labelled):
        def generate_images(self, index, labels=None):
            return super().generate_images(index, labels.div(2, rounding_mode="floor"))

    data, callback = Sorted(400, 100), FrechetDistance(Brightness(1), num_samples=100)
    near = measured(callback, Labelled(), data)["val/fd_brightness_over_baseline"]
    assert near < 3 < measured(callback, Rolled(), data)["val/fd_brightness_over_baseline"]


def test_at_most_the_kept_features_are_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, cat = [], torch.cat
    monkeypatch.setattr(torch, "cat", lambda parts, *a: sizes.extend(parts) or cat(parts, *a))
    work = FeatureExtractorPool(L.Trainer(accelerator="cpu"), Random(), 32, torch.device("cpu"))
    real = PaintedData(train=128).get_split("train")[0]
    for keep in (0, 40, 200):
        _, features = work.compute_moments(lambda i: real[i], 128, None, keep)
        assert torch.equal(features, Random()(real)[:keep])
        sizes.append(features)
        assert all(part.untyped_storage().nbytes() == part.nbytes for part in sizes)


class Trained(Painter):
    def generate(self):
        return "words"

    def training_step(self, batch, index):
        return self.line(torch.ones(1, 1)).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(callback: L.Callback, **more: int) -> None:
    trainer = L.Trainer(
        accelerator="cpu", logger=False, callbacks=[callback], enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, **more,
    )  # fmt: skip
    trainer.fit(Trained(), datamodule=PaintedData())


@pytest.mark.parametrize("callback", [FrechetDistance(Random()), GenerateSamples()])
def test_a_fit_without_validation_is_refused(callback: L.Callback) -> None:
    with pytest.raises(
        ValueError, match=r"this fit has none; allowed: .*pass limit_val_batches=1.0 to Trainer"
    ):
        fit(callback, limit_val_batches=0, max_steps=1)


def test_the_real_images_are_read_once_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, distances = [], []
    original, measure = callback_module.fingerprint_tensors, FrechetDistance._measure
    monkeypatch.setattr(
        callback_module, "fingerprint_tensors", lambda *a: seen.append(len(a)) or original(*a)
    )
    monkeypatch.setattr(FrechetDistance, "_measure", lambda *a: distances.append(measure(*a)))
    fit(FrechetDistance(Random(), num_samples=64), max_epochs=3)
    assert (len(distances), len(seen)) == (3, 3)  # of the extractor, and of either part


def test_labels_are_drawn_in_the_proportions_of_the_data() -> None:
    labels = torch.tensor([2] * 60 + [0] * 20 + [1] * 20)
    assert proportional_labels(labels, 10).bincount().tolist() == [2, 2, 6]
    assert proportional_labels(torch.arange(100) % 2, 50).bincount().tolist() == [25, 25]


def test_the_accuracy_of_the_extractor_and_the_floor_are_printed(capsys, caplog) -> None:
    with caplog.at_level("INFO"):
        measured(FrechetDistance(Random(), num_samples=64))
    assert "64 real test images from" in caplog.text
    assert "correctly" in caplog.text


class Nothing(L.LightningModule):
    def validation_step(self, batch, index):
        pass


class Floats(Painter):
    def generate_images(self, index, labels=None):
        return torch.rand(len(index), 1, 8, 8)


class Few(Painter):
    def generate_images(self, index, labels=None):
        return paint(0)[None]


class NotFinite(Random):
    def forward(self, images):
        return super().forward(images) * float("nan")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (
            {"module": Nothing()},
            r"FrechetDistance: Nothing has no method generate_images; allowed: a module with",
        ),
        (
            {"data": L.LightningDataModule()},
            r"LightningDataModule has no method get_split; allowed: a datamodule with",
        ),
        (
            {"module": Floats()},
            r"Floats\.generate_images returns torch.float32 of shape .*to_uint8",
        ),
        ({"module": Few()}, r"Few\.generate_images returns 1 images for 64 indices"),
        (
            {"callback": FrechetDistance(NotFinite(), num_samples=64)},
            "NotFinite returns features that are not finite",
        ),
        (
            {"callback": FrechetDistance(nn.Identity(), num_samples=64)},
            r"Identity returns features of shape \(96, 1, 8, 8\) for",
        ),
    ],
)
def test_an_unmeasurable_configuration_is_refused_in_one_line(arguments, text: str) -> None:
    arguments = {"callback": FrechetDistance(Random(), num_samples=64)} | arguments
    with pytest.raises(ValueError, match=text) as error:
        measured(**arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("bad", [{"num_samples": 1}, {"num_real_images": 1}, {"batch_size": 0}])
def test_invalid_sizes_are_refused(bad: dict[str, int]) -> None:
    (name,) = bad
    with pytest.raises(
        ValueError, match=rf"{name}={bad[name]} is too small; allowed: .* or more; use {name}="
    ):
        FrechetDistance(**bad)


def test_more_samples_than_test_images_give_a_line_about_the_floor() -> None:
    message = r"baseline uses 20 real test images .*; use num_samples=20"
    with pytest.warns(UserWarning, match=message):
        measured(FrechetDistance(Random(), num_samples=64), data=PaintedData(test=20))


def test_the_error_for_missing_weights_names_the_file_and_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(*a, **k):
        raise OSError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    monkeypatch.setenv("DATA_ROOT", str(tmp_path / "data"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    place = (
        rf"copy {inception.WEIGHTS_FILE} to {tmp_path}/hub/hub/checkpoints/{inception.WEIGHTS_FILE}"
    )
    with pytest.raises(FileNotFoundError, match=f"no network.*{place}"):
        measured(FrechetDistance())
    with pytest.raises(
        FileNotFoundError, match=r"the file gone\.pth does not exist; .*InceptionV3"
    ):
        measured(FrechetDistance(weights="gone.pth"))


def test_a_file_of_weights_never_runs_code(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    torch.save(Evil(), tmp_path / "evil.pth")
    (tmp_path / "short.pth").write_bytes(b"PK\3\4")
    torch.save({"a": torch.ones(1)}, tmp_path / "other.pth")
    for name in ("evil", "short", "other"):
        with pytest.raises(ValueError, match=rf"{name}\.pth is not an InceptionV3"):
            inception.Inception(tmp_path / f"{name}.pth")
    assert not (tmp_path / "ran").exists()


def test_a_download_with_another_checksum_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "wrong.pth").write_bytes(b"something else")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    monkeypatch.setattr(inception, "WEIGHTS_URL", (tmp_path / "wrong.pth").as_uri())
    with pytest.raises(FileNotFoundError, match="invalid hash value"):
        inception.locate_inception_weights()
    assert not list((tmp_path / "hub").rglob("*.pth"))


def fetched_on_ranks(folder: str) -> tuple[int, str]:
    """How often this rank downloaded, and what it then found."""
    os.environ["TORCH_HOME"], calls = folder, []
    os.environ.pop("DATA_ROOT", None)

    def download(url: str, target: str, **more: Any) -> None:
        time.sleep(0.3)  # the others are sooner at the barrier
        calls.append(url)
        Path(target).write_bytes(b"weights")

    inception.WEIGHTS_SHA256 = hashlib.sha256(b"weights").hexdigest()
    torch.hub.download_url_to_file = download
    trainer = L.Trainer(accelerator="cpu", devices=2, strategy="ddp", logger=False)
    trainer.strategy.setup_environment()
    path, _ = inception.locate_inception_weights(None, trainer)
    return len(calls), path.read_text()


def test_one_rank_of_a_machine_downloads_and_the_others_wait(ranks: Any, tmp_path: Path) -> None:
    assert list(ranks(fetched_on_ranks, 2, str(tmp_path))) == [(1, "weights"), (0, "weights")]
