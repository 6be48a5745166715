"""Claims of lecture 4 beside those of test_minimizers.py and test_regression.py."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ravine.lightning_modules.objectives.losses import LOSSES, logistic, softmax


def test_the_logistic_loss_is_cross_entropy_of_zeros_and_ones():
    """Fed with labels +1 and -1, binary cross-entropy has no lower bound: -10 at a = -10."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(8, generator=generator)
    y = torch.randn(8, generator=generator).sign()
    expected = F.binary_cross_entropy_with_logits(a, (y + 1) / 2)
    assert logistic(a, y).mean().item() == pytest.approx(expected.item())
    assert logistic(a, y).mean().item() == pytest.approx(-F.logsigmoid(y * a).mean().item())
    a, y = torch.tensor([-10.0]), torch.tensor([-1.0])
    assert F.binary_cross_entropy_with_logits(a, y).item() == pytest.approx(-10, abs=1e-3)
    assert logistic(a, y).item() == pytest.approx(4.54e-5, rel=1e-3)


@pytest.mark.parametrize(("classes", "floor"), [(2, 0.3132617), (10, 1.4611502)])
def test_a_softmax_before_the_cross_entropy_has_a_floor(classes: int, floor: float) -> None:
    scores = torch.zeros(1, classes)
    scores[0, 0] = 1e3
    label = torch.zeros(1)
    assert softmax(scores, label).item() == 0
    assert softmax(scores.softmax(-1), label).item() == pytest.approx(floor, abs=1e-6)
    assert floor == pytest.approx(math.log(1 + (classes - 1) / math.e), abs=1e-6)


@pytest.mark.parametrize(
    "name", ["half_squared", "squared", "absolute", "huber", "logistic", "hinge"]
)
def test_a_loss_is_convex_and_least_at_the_label(name: str) -> None:
    p = torch.linspace(-3, 3, 61, dtype=torch.float64)
    values = LOSSES[name](p, torch.ones_like(p))
    assert ((values[2:] + values[:-2]) / 2 >= values[1:-1] - 1e-12).all()
    nearest = values[p >= 1 - 1e-9][0] if name not in ("logistic",) else values[-1]
    assert values.min() == pytest.approx(nearest.item(), abs=1e-9)


def test_the_squared_loss_of_lecture_4_has_twice_the_gradient_of_lecture_2():
    p = torch.tensor([0.3], requires_grad=True)
    y = torch.tensor([1.0])
    slopes = [
        torch.autograd.grad(LOSSES[n](p, y).sum(), p)[0].item() for n in ("squared", "half_squared")
    ]
    assert slopes[0] == pytest.approx(2 * slopes[1])


def test_a_convolution_is_a_toeplitz_matrix_without_a_flip():
    x = torch.randn(1, 1, 12, generator=torch.Generator().manual_seed(0))
    kernel = torch.tensor([1.0, 2.0, -1.0])
    toeplitz = torch.zeros(10, 12)
    for row in range(10):
        toeplitz[row, row : row + 3] = kernel
    output = F.conv1d(x, kernel.view(1, 1, 3))[0, 0]
    assert torch.allclose(toeplitz @ x[0, 0], output, atol=1e-5)
    assert not torch.allclose(F.conv1d(x, kernel.flip(0).view(1, 1, 3))[0, 0], output, atol=0.1)


@pytest.mark.parametrize(
    ("length", "k", "padding", "stride", "expected"),
    [(32, 3, 1, 1, 32), (10, 3, 0, 2, 4), (11, 5, 2, 3, 4)],
)
def test_the_length_after_a_convolution(length, k, padding, stride, expected):
    conv = nn.Conv1d(1, 1, k, stride, padding)
    assert conv(torch.zeros(1, 1, length)).shape[-1] == expected
    assert (length + 2 * padding - k) // stride + 1 == expected


def test_the_pooling_map_of_the_figure():
    rows = "121031 462102 015721 236810 102146 321059"
    image = torch.tensor([[float(c) for c in row] for row in rows.split()])[None]
    mean = [[3.25, 1, 1.5], [1.5, 6.5, 1], [1.5, 1, 6]]
    assert F.avg_pool2d(image, 2)[0].tolist() == mean
    assert F.max_pool2d(image, 2)[0].tolist() == [[6, 2, 3], [3, 8, 2], [3, 2, 9]]


def test_the_models_of_the_lecture_have_their_numbers_of_parameters():
    """SmallCNN has 1,477 parameters in 6 tensors, and not in 7."""
    cnn = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 3, padding=1), nn.Linear(16, 5)
    )
    mlp = nn.Sequential(nn.Linear(5, 10), nn.ReLU(), nn.Linear(10, 3))
    parity = nn.Sequential(nn.Linear(784, 32), nn.ReLU(), nn.Linear(32, 1))
    counts = [sum(p.numel() for p in net.parameters()) for net in (cnn, mlp, parity)]
    assert counts == [1477, 93, 25_153]
    assert len(list(cnn.parameters())) == 6
    assert nn.Linear(784, 1, bias=False).weight.numel() == 784
