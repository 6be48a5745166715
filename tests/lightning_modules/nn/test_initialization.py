"""Initializations keep the scale that their formula states, on every layout of processes."""

import math
from functools import partial
from typing import get_args

import pytest
import torch
from torch import Tensor, nn

from ravine.errors import UsageError
from ravine.lightning_modules import Diffusion, ImageClassifier, LanguageModel
from ravine.lightning_modules.nn.initial_values import InitialValues
from ravine.lightning_modules.nn.initialization import Initialization, initialize
from ravine.lightning_modules.nn.moe import Experts
from ravine.lightning_modules.nn.transformer import Transformer
from ravine.lightning_modules.nn.unet import UNet

NAMES = get_args(Initialization)


def rms(x: Tensor) -> float:
    return float(x.detach().square().mean().sqrt())


def test_a_product_with_normal_weights_grows_as_the_root_of_the_width_and_scaled_ones_keep_it():
    """CS336: x @ w with d = 16,384 has std 128; w / sqrt(d) brings it to 1."""
    d = 16_384
    x, layer = torch.randn(8, d), nn.Linear(d, 32, bias=False)
    assert rms(x @ torch.randn(d, 32)) == pytest.approx(128, rel=0.15)
    initialize(layer, "truncated_normal")
    assert rms(layer(x)) == pytest.approx(1, rel=0.15)


@pytest.mark.parametrize(
    ("initialization", "gain", "activation", "expected"),
    [
        ("xavier", 1.0, False, 1.0),
        ("xavier", 0.5, False, 2.0**-20),
        ("orthogonal", 1.0, False, 1.0),
        ("xavier", 1.0, True, 2.0**-10),
        ("he", 1.0, True, 1.0),
    ],
)
def test_twenty_layers_multiply_the_scale_twenty_times(initialization, gain, activation, expected):
    """Half the gain leaves 2^-20; relu halves the mean square, which leaves 2^-10."""
    chain = nn.Sequential(*(nn.Linear(256, 256) for _ in range(20)))
    initialize(chain, initialization)
    x = torch.randn(512, 256)
    for layer in chain:
        x = gain * layer(x)
        x = x.relu() if activation else x
    # of the activations, which relu makes zero in half of the places
    scale = rms(x) * (math.sqrt(2) if activation else 1.0)
    assert scale == pytest.approx(expected, rel=0.35 if activation else 0.15)


def test_a_truncation_is_at_three_standard_deviations_and_not_at_three():
    layer = nn.Linear(16_384, 32)
    sigma = 1 / 128
    nn.init.trunc_normal_(layer.weight, std=sigma, a=-3, b=3)  # as written in the lecture
    absolute = layer.weight.detach().abs() / sigma
    assert layer.weight.numel() == 524_288
    assert float(absolute.max()) > 4.3
    assert int((absolute > 3).sum()) == pytest.approx(524_288 * 0.0027, rel=0.1)
    initialize(layer, "truncated_normal")
    weight = layer.weight.detach()
    absolute = weight.abs() / sigma
    assert 2.99 < float(absolute.max()) <= 3.0001
    assert float(weight.std()) / sigma == pytest.approx(0.98658, abs=0.003)
    assert float(layer.bias.detach().abs().max()) == 0


LAYERS = {
    "linear": (lambda: nn.Linear(256, 128), (64, 256), slice(None)),
    "conv": (lambda: nn.Conv2d(32, 64, 3, padding=1), (4, 32, 16, 16), slice(1, -1)),
    "grouped": (lambda: nn.Conv2d(64, 64, 3, padding=1, groups=2), (4, 64, 16, 16), slice(1, -1)),
    "transposed": (
        lambda: nn.ConvTranspose2d(64, 32, 4, stride=2, padding=1),
        (4, 64, 16, 16),
        slice(2, -2),
    ),
}


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize(("initialization", "gain"), [("he", math.sqrt(2)), ("mup", 1.0)])
def test_the_fans_of_every_kind_of_layer_keep_the_scale(kind, initialization, gain):
    make, shape, inner = LAYERS[kind]
    layer = make()
    initialize(layer, initialization)
    output = layer(torch.randn(shape))
    output = output if output.ndim == 2 else output[..., inner, inner]  # without the padding
    assert rms(output) == pytest.approx(gain, rel=0.06)


def test_stacked_experts_are_matrices_of_their_own():
    experts = Experts(64, 4, 256)
    initialize(experts, "mup")
    assert rms(torch.randn(4, 100, 64) @ experts.up) == pytest.approx(1, rel=0.06)
    initialize(experts, "orthogonal")
    product = experts.up @ experts.up.mT  # (E d d)
    torch.testing.assert_close(product, torch.eye(64).expand(4, -1, -1), atol=1e-5, rtol=0)


def test_mup_makes_the_logits_smaller_as_the_width_grows():
    def logits_scale(width: int) -> float:
        net = Transformer(
            50, 8, 2, width, 4, zero_init_residual=False, initialization="mup", norm="rmsnorm"
        )
        return rms(net(torch.randint(50, (16, 8))))

    narrow, wide = logits_scale(32), logits_scale(512)
    assert narrow / wide == pytest.approx(math.sqrt(512 / 32), rel=0.2)


NETS = {
    "transformer": partial(Transformer, 30, 8, 2, 16, 2, tie_embeddings=True, bias="all"),
    "mixture": partial(Transformer, 30, 8, 1, 16, 2, num_experts=2, zero_init_residual=False),
    "unet": partial(UNet, 1, 8, 16, num_classes=3, has_attention=True),
}


@pytest.mark.parametrize("name", NETS)
def test_the_default_is_that_of_torch_bitwise(name):
    torch.manual_seed(0)
    plain, state = NETS[name]().state_dict(), torch.get_rng_state()
    torch.manual_seed(0)
    default = NETS[name](initialization="default").state_dict()
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(plain[key], default[key]) for key in plain)


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("initialization", NAMES[1:])
def test_deferred_values_have_the_distribution_and_are_drawn_by_rows(name, initialization):
    """A rank draws its own rows, equal to those of one process."""
    values = InitialValues.record(partial(NETS[name], initialization=initialization))
    assert values is not None
    families = {values.distributions[f"net.{n}"].family for n, _ in values.net.named_parameters()}
    expected = {"truncated_normal", "orthogonal"} & {initialization} or {"normal"}
    assert expected <= families
    shapes = {n: p.shape for n, p in values.net.named_parameters()}
    net = values.materialize()
    for n, parameter in net.named_parameters():
        middle = len(parameter) // 2
        rows = values.sample_rows(f"net.{n}", shapes[n], middle, len(parameter), parameter.dtype)
        assert torch.equal(rows, parameter[middle:].detach())
    ends = ".query", ".conv1"
    matrix = next(m.weight for n, m in net.named_modules() if n.endswith(ends)).detach().flatten(1)
    if initialization == "orthogonal":
        small = matrix @ matrix.T if len(matrix) < matrix.shape[1] else matrix.T @ matrix
        torch.testing.assert_close(small, torch.eye(len(small)), atol=1e-5, rtol=0)
    if initialization == "truncated_normal":
        assert float(matrix.abs().max()) <= 3.0001 / math.sqrt(matrix.shape[1])


def test_zero_starts_and_tied_embeddings_are_kept():
    net = NETS["transformer"](initialization="orthogonal")
    assert float(net.blocks["0"].mlp.down.weight.detach().abs().max()) == 0
    assert rms(net.head.weight) == pytest.approx(0.02, rel=0.2)
    net = NETS["unet"](initialization="he")
    assert float(net.blocks["mid_attention"].out_proj.weight.detach().abs().max()) == 0


@pytest.mark.parametrize(
    "make",
    [
        partial(LanguageModel, 10, 8),
        Diffusion,
        partial(ImageClassifier, "mlp"),
    ],
)
def test_an_unknown_initialization_is_refused_in_one_line(make):
    with pytest.raises(UsageError, match=r"initialization='xaver' does not exist.*'xavier'"):
        make(initialization="xaver")
