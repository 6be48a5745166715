"""Claims of lecture 4 beside those of test_minimizers.py and test_regression.py."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ravine.cli.main import main
from ravine.datamodules.images import to_float
from ravine.errors import UsageError
from ravine.lightning_modules import ImageClassifier, Regression
from ravine.lightning_modules.nn.pattern_filters import (
    PatternFilter,
    checkerboard_pattern,
    count_positions,
    pool,
    ramp_pattern,
    toeplitz_matrix,
)
from ravine.lightning_modules.objectives.losses import LOSSES, logistic, softmax


def lecture_net(shape: tuple[int, int, int], num_classes: int, **arguments: Any) -> nn.Module:
    """The net of a classifier, with the initial values of torch's global generator."""
    module = ImageClassifier(**arguments)
    module.image_info = {
        "channels": shape[0],
        "image_size": list(shape[1:]),
        "class_names": [str(k) for k in range(num_classes)],
        "source": "lecture",
    }
    return module.build_net()


def gradient_norms(net: nn.Module) -> list[float]:
    return [p.grad.norm().item() for p in net.parameters() if p.grad is not None]


def test_the_printed_losses_of_linear_models():
    """Section 2.4, seed 0: mse and logistic loss of random data, without and with 0.1 |w|_1."""
    torch.manual_seed(0)
    x, y = torch.randn(6, 4), torch.randn(6)
    signs = 2.0 * torch.randint(0, 2, (6,)) - 1
    w = torch.randn(4)
    values = []
    for l1 in (0.0, 0.1):
        for loss, labels, num_classes in (("squared", y, 1), ("logistic", signs, 2)):
            module = Regression(loss, l1=l1, dtype="float32")
            data = SimpleNamespace(
                x=x, y=labels[None], num_members=1, num_replicas=1, batch_sizes=[6],
                num_classes=num_classes, intercept=False, steps_per_batch=1, source="lecture",
            )  # fmt: skip
            module.configure_from_data(data)
            values.append(module.evaluate_points(w[None, None]).item())
    assert values == pytest.approx([2.2887826, 1.1406341, 2.5880327, 1.4398842], abs=1e-6)


def test_the_printed_losses_and_gradients_of_networks():
    """Sections 3.4.1 and 6.3, seed 0: an MLP 5-10-3 and an MLP 5-12-4, on rows of 5 pixels."""
    torch.manual_seed(0)
    x = torch.randn(4, 5)
    net = lecture_net((1, 1, 5), 3, variant="mlp", num_features=10)
    loss = LOSSES["squared"](net(x[:, None, None]), torch.randn(4, 3)).mean()
    loss.backward()
    assert loss.item() == pytest.approx(1.4646908, abs=1e-6)
    assert gradient_norms(net)[::2] == pytest.approx([0.486690, 0.686364], abs=1e-6)
    torch.manual_seed(0)
    x, y = torch.randn(8, 5), torch.randint(0, 4, (8,))
    net = lecture_net((1, 1, 5), 4, variant="mlp", num_features=12)
    loss = softmax(net(x[:, None, None]), y).mean()
    loss.backward()
    assert loss.item() == pytest.approx(1.3634218, abs=1e-6)
    assert gradient_norms(net) == pytest.approx([0.1680, 0.0856, 0.3842, 0.4014], abs=5e-5)


@pytest.mark.parametrize(
    ("shape", "num_classes", "arguments", "counts"),
    [
        ((3, 32, 32), 5, {"variant": "small_cnn", "num_features": 16}, (1477, 6)),
        ((1, 1, 5), 3, {"variant": "mlp", "num_features": 10}, (93, 4)),
        ((1, 28, 28), 2, {"variant": "mlp", "num_features": 32, "head": "logistic"}, (25_153, 4)),
        ((1, 28, 28), 2, {"variant": "linear", "head": "logistic", "head_bias": False}, (784, 1)),
    ],
)
def test_the_models_of_the_lecture_have_their_numbers_of_parameters(
    shape, num_classes, arguments, counts
):
    """SmallCNN has 1,477 parameters in 6 tensors, and not in 7, as a comment says."""
    net = lecture_net(shape, num_classes, **arguments)
    parameters = list(net.parameters())
    assert (sum(p.numel() for p in parameters), len(parameters)) == counts
    assert net(torch.zeros(2, *shape)).shape == (2, num_classes)


def test_the_small_cnn_is_two_convolutions_the_mean_and_a_linear_layer():
    torch.manual_seed(0)
    net = lecture_net((3, 9, 7), 5, variant="small_cnn", num_features=16)
    x = torch.randn(2, 3, 9, 7)
    w1, b1, w2, b2, w, b = net.parameters()
    a = F.relu(F.conv2d(F.relu(F.conv2d(x, w1, b1, padding=1)), w2, b2, padding=1))
    assert torch.allclose(net(x), a.mean((2, 3)) @ w.T + b, atol=1e-6)


def test_a_logistic_head_has_the_binary_cross_entropy_of_normalized_pixels():
    """The recipe of the parity of digits: pixels (p - 0.1307) / 0.3081, labels 0 and 1."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (20, 1, 3, 4), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, 2, (20,), generator=generator)
    options: dict[str, Any] = {"head": "logistic", "pixel_mean": 0.1307, "pixel_std": 0.3081}
    net = lecture_net((1, 3, 4), 2, variant="linear", **options)
    w, b = net.parameters()
    logits = ((images.flatten(1) / 255 - 0.1307) / 0.3081) @ w[0] + b
    expected = F.binary_cross_entropy_with_logits(logits, labels.float())
    assert F.cross_entropy(net(to_float(images)), labels).item() == pytest.approx(
        expected.item(), abs=1e-6
    )


def test_an_mlp_is_more_accurate_on_the_parity_of_digits_than_logistic_regression(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The configs with scikit-learn's digits: no line separates even from odd ones."""
    monkeypatch.chdir(tmp_path)
    accuracies = {}
    for name in ("logistic", "mlp"):
        words = [
            f"--config=lectures/4_parity_{name}",
            "--data.source=digits",
            "--data.num_train_images=1000",
            "--data.batch_size=1000",
            "--trainer.callbacks.OptimizerPlan.optimizer.lr=0.3",
            "--trainer.max_steps=200",
        ]
        assert main(["fit", *words]) == 0
        assert Path("runs/lectures", f"4_parity_{name}", "version_0/curves.png").exists()
        capsys.readouterr()
        assert main(["test", "--ckpt_path=last"]) == 0
        table = capsys.readouterr().out
        accuracies[name] = float(table.partition("test/accuracy")[2].split()[1])
    assert 0.85 < accuracies["logistic"] < 0.94  # at most 0.931 with other rates and seeds
    assert accuracies["mlp"] > 0.96


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
    """Also with stride and padding; a flipped kernel gives other scores."""
    x = torch.randn(4, 12, generator=torch.Generator().manual_seed(0))
    kernel = torch.tensor([1.0, 2.0, -1.0])
    for padding, stride in ((0, 1), (2, 3)):
        matrix = toeplitz_matrix(kernel, 12, padding, stride)
        scores = F.conv1d(x[:, None], kernel[None, None], None, stride, padding)[:, 0]
        assert torch.allclose(x @ matrix.T, scores, atol=1e-5)
        flipped = toeplitz_matrix(kernel.flip(0), 12, padding, stride)
        assert (x @ flipped.T - scores).abs().max() > 1
    rows = toeplitz_matrix(kernel, 5).tolist()
    assert rows == [[1, 2, -1, 0, 0], [0, 1, 2, -1, 0], [0, 0, 1, 2, -1]]


@pytest.mark.parametrize(
    ("length", "k", "padding", "stride", "expected"),
    [(32, 3, 1, 1, 32), (10, 3, 0, 2, 4), (11, 5, 2, 3, 4)],
)
def test_the_length_after_a_convolution(length, k, padding, stride, expected):
    assert count_positions(length, k, padding, stride) == expected
    conv = nn.Conv1d(1, 1, k, stride, padding)
    assert conv(torch.zeros(1, 1, length)).shape[-1] == expected
    assert toeplitz_matrix(torch.ones(k), length, padding, stride).shape == (expected, length)


def test_the_pooling_map_of_the_figure():
    rows = "121031 462102 015721 236810 102146 321059"
    image = torch.tensor([[float(c) for c in row] for row in rows.split()])[None]
    mean = [[3.25, 1, 1.5], [1.5, 6.5, 1], [1.5, 1, 6]]
    assert pool(image, 2)[0].tolist() == mean == F.avg_pool2d(image, 2)[0].tolist()
    assert pool(image, 2, "max")[0].tolist() == [[6, 2, 3], [3, 8, 2], [3, 2, 9]]


def test_a_ramp_filter_has_its_peaks_at_the_ramps_and_ignores_the_level():
    """Figure 4.1: 220 points of a trend and noise, with ramps of width 25 around 60 and 160."""
    generator = torch.Generator().manual_seed(0)
    signal = 0.002 * torch.arange(220.0) + 0.2 * torch.randn(220, generator=generator)
    for center in (60, 160):
        signal[center - 12 : center + 13] += 2 * ramp_pattern(25)
    detector = PatternFilter(ramp_pattern(25))
    scores = detector(signal[None])[0]
    assert scores.topk(2).indices.sort().values.tolist() == [60, 160]
    inside = slice(12, -12)  # without the zeros beyond the ends
    assert torch.allclose(detector(signal[None] + 5)[0, inside], scores[inside], atol=1e-5)
    raised = PatternFilter(3 * ramp_pattern(25) + 7)  # centered and scaled
    assert torch.allclose(raised.kernel, detector.kernel, atol=1e-6)
    window = detector.kernel  # of norm 1: no other window of norm 1 has a larger score
    assert detector(window[None])[0, 12].item() == pytest.approx(1)


def test_a_checkerboard_filter_finds_its_two_squares():
    """Figure 4.3: noise of 64 x 64 pixels with two checkerboards of 7 x 7."""
    generator = torch.Generator().manual_seed(0)
    image = 0.3 * torch.randn(64, 64, generator=generator)
    centers = [(15, 20), (45, 40)]
    for y, x in centers:
        image[y - 3 : y + 4, x - 3 : x + 4] += checkerboard_pattern(7)
    scores = PatternFilter(checkerboard_pattern(7))(image[None])[0]
    peaks = sorted(divmod(i, 64) for i in scores.flatten().topk(2).indices.tolist())
    assert peaks == centers


def test_a_linear_layer_mixes_all_coordinates_and_a_bias_moves_the_boundary():
    """ "Linear treats coordinates independently" is wrong; without a bias, x = 0 has no class."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 1, 1, 4, generator=generator)
    net = lecture_net((1, 1, 4), 2, variant="linear", head_bias=False)
    changed = x.clone()
    changed[..., 0] += 1
    assert (net(changed) != net(x)).all()  # each output depends on the first coordinate
    assert not net(torch.zeros(1, 1, 1, 4)).any()
    assert lecture_net((1, 1, 4), 2, variant="linear")(torch.zeros(1, 1, 1, 4)).any()


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda: PatternFilter(torch.arange(4.0)), r"shape \(4,\) has no center.*odd width"),
        (lambda: PatternFilter(torch.ones(5)), "a constant pattern has no kernel"),
        (lambda: count_positions(4, 7, padding=1), "7 does not fit a length of 4.*1 to 6"),
        (lambda: toeplitz_matrix(torch.ones(3), 5, stride=0), "stride=0 is too small"),
    ],
)
def test_a_pattern_or_a_kernel_that_does_not_fit_is_refused(function, message):
    with pytest.raises(UsageError, match=message):
        function()
