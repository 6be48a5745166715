"""Fréchet distance compared with other packages: python benchmarks/frechet.py [matrix | inception]

    matrix      the step from statistics to the number at d = 2048, against torchmetrics: ours with
                the root of the real data kept, ours cold, and ours again (the A/A control), taking
                turns; one thread, seconds of the processor, so that a busy machine counts less
    inception   val/fid's way from images to the number, against torch_fidelity.calculate_metrics:
                512 images of each kind, InceptionV3 of random weights, layer 64 (about 3 minutes)

One raw row a run, in rows/frechet.jsonl.
"""

import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import torch
import torch_fidelity
from record import append, machine
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torchmetrics.image.fid import _compute_fid
from versus import compare, rounds

from ravine.callbacks.frechet.inception import Inception
from ravine.callbacks.frechet.statistics import Gaussian, Moments, frechet_distance

D, N, ROUNDS, IMAGES = 2048, 10_000, 3, 512


def gathered(features: Tensor) -> Moments:
    moments = Moments(features[:500].mean(0))
    for part in features.split(500):
        moments.add(part)
    return moments


def matrix() -> None:
    torch.set_num_threads(1)
    mix = torch.randn(D, D, dtype=torch.float64) / D**0.5
    generated, real = (gathered(torch.randn(N, D, dtype=torch.float64) @ mix + m) for m in (0, 0.1))
    kept = Gaussian.from_moments(real)
    expected = generated.mean(), generated.covariance(), real.mean(), real.covariance()
    ways = {
        "ours": lambda: frechet_distance(generated, kept),
        "ours, cold": lambda: frechet_distance(generated, Gaussian.from_moments(real)),
        "torchmetrics": lambda: _compute_fid(*expected),
        "ours again": lambda: frechet_distance(generated, kept),
    }
    difference = abs(float(ways["torchmetrics"]()) / float(ways["ours"]()) - 1)
    times = rounds(ways, ROUNDS)
    what = f"Frechet's distance out of {D} means and covariances"
    compare("frechet", what, times, ["torchmetrics"], relative_difference=difference)


class Rows(torch.utils.data.Dataset[Tensor]):
    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> Tensor:
        return self.images[i]


def random_weights(path: Path) -> None:
    """InceptionV3 as torch initialises it, in torch-fidelity's layout."""
    load = nn.Module.load_state_dict
    nn.Module.load_state_dict = lambda self, state: None  # type: ignore[method-assign]
    empty = path.with_suffix(".none")
    torch.save({}, empty)
    net = FeatureExtractorInceptionV3("x", ["64"], feature_extractor_weights_path=str(empty))
    nn.Module.load_state_dict = load  # type: ignore[method-assign]
    torch.save(net.state_dict(), path)


@torch.no_grad()
def inception() -> None:
    real = torch.randint(256, (IMAGES, 3, 32, 32), dtype=torch.uint8)
    generated = torch.randint(200, (IMAGES, 3, 32, 32), dtype=torch.uint8)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "inception.pth")
        random_weights(path)
        start_s = time.perf_counter()
        net = Inception(path, 64)
        one, other = (torch.cat([net(p) for p in images.split(64)]) for images in (generated, real))
        actual = float(frechet_distance(gathered(one), Gaussian.from_moments(gathered(other))))
        took = time.perf_counter() - start_s
        start_s = time.perf_counter()
        found = torch_fidelity.calculate_metrics(
            input1=Rows(generated), input2=Rows(real), fid=True, cuda=False, verbose=False,
            cache=False, feature_layer_fid="64", feature_extractor_weights_path=str(path),
        )  # fmt: skip
    expected = found["frechet_inception_distance"]
    seconds = {"ours": round(took, 1), "torch_fidelity": round(time.perf_counter() - start_s, 1)}
    values = {
        "ours": actual,
        "torch_fidelity": expected,
        "relative_difference": abs(actual / expected - 1),
    }
    what = f"val/fid at layer 64, {IMAGES} images of each kind"
    versions = {"torch-fidelity": version("torch-fidelity")}
    append("frechet", {"what": what} | machine() | versions | values | {"seconds": seconds})


if __name__ == "__main__":
    torch.manual_seed(0)
    for name in sys.argv[1:] or ["matrix", "inception"]:
        {"matrix": matrix, "inception": inception}[name]()
