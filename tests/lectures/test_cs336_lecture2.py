"""Claims of CS336's lecture 2 on resources: float types, FLOPs, AdaGrad, a loop, memory maps."""

from functools import partial
from pathlib import Path

import numpy
import pytest
import torch
from torch import nn
from torch.optim import SGD
from torch.utils.flop_counter import FlopCounterMode

from ravine.callbacks import AdaGradOptimizer


def test_the_estimates_on_the_back_of_a_napkin():
    flops_per_day = 1024 * 989.5e12 * 0.5 * 86400
    assert 6 * 70e9 * 15e12 / flops_per_day == pytest.approx(143.9266, abs=1e-4)
    assert 8 * 80e9 / 16 == 4e10  # parameters at 16 bytes: weight, gradient, two moments in fp32
    assert 12288 * 49152 * 4 / 2**20 == 2304  # MiB, which is 2.42 GB and not 2.3
    assert pytest.approx(9.575e21, rel=1e-3) == 8 * 989.5e12 * 14 * 86400  # two weeks, not one


def test_the_ranges_of_float_types():
    finfo = torch.finfo
    assert finfo(torch.float16).max == 65504
    assert finfo(torch.bfloat16).max == pytest.approx(3.3895e38, rel=1e-4)
    assert finfo(torch.float8_e4m3fn).max == 448
    assert finfo(torch.float8_e5m2).max == 57344
    assert torch.tensor(1e-8).half().item() == 0
    assert torch.tensor(1e-8).bfloat16().item() == pytest.approx(1.0011718e-8, rel=1e-6)


def test_backward_of_a_first_layer_needs_no_gradient_of_its_input():
    """The lecture counts 335,544,320; the gradient of the input, 134,217,728, is not computed."""
    net = nn.Sequential(nn.Linear(256, 256, bias=False), nn.Linear(256, 64, bias=False))
    x = torch.zeros(1024, 256)
    with FlopCounterMode(display=False) as forward:
        loss = net(x).sum()
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    assert forward.get_total_flops() == 2 * 1024 * (256 * 256 + 256 * 64) == 167_772_160
    assert backward.get_total_flops() == 201_326_592 == 335_544_320 - 2 * 1024 * 256 * 256
    parameters = sum(p.numel() for p in net.parameters())
    assert 6 * 1024 * parameters / (167_772_160 + 201_326_592) == pytest.approx(1.36, abs=0.01)


@pytest.mark.parametrize("eps_in_root", [True, False])
def test_the_first_step_of_adagrad_is_the_rate_times_the_sign(eps_in_root: bool) -> None:
    p = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    optimizer = AdaGradOptimizer([p], lr=0.01, eps=1e-5, eps_in_root=eps_in_root)
    p.grad = torch.tensor([3.0, -7.0], dtype=torch.float64)
    optimizer.step()
    assert p.tolist() == pytest.approx([-0.01, 0.01], rel=1e-5)


def test_a_training_loop_that_honours_its_rate_contracts_the_error():
    """|w - w*|^2 is multiplied by 1 - 4 lr + 4 lr^2 (1 + 17 / B) a step: 1240 to 843 and 151."""
    true_weights = torch.arange(16.0)
    for lr, theory in ((0.01, 843), (0.1, 151)):
        assert 1240 * (1 - 4 * lr + 4 * lr**2 * (1 + 17 / 4)) ** 10 == pytest.approx(theory, abs=1)
        errors = []
        for seed in range(50):
            generator = torch.Generator().manual_seed(seed)
            w = nn.Parameter(torch.zeros(16))
            optimizer = partial(SGD, lr=lr)([w])
            for _ in range(10):
                x = torch.randn(4, 16, generator=generator)
                ((x @ w - x @ true_weights) ** 2).mean().backward()
                optimizer.step()
                optimizer.zero_grad()
            errors.append(((w - true_weights) ** 2).sum().item())
        assert sum(errors) / len(errors) == pytest.approx(theory, rel=0.2)


def test_the_memory_of_the_tiny_model():
    width, batch, layers = 4, 2, 2
    net = nn.Sequential(*[nn.Linear(width, width, bias=False) for _ in range(layers)])
    parameters = sum(p.numel() for p in net.parameters()) + width  # and the head's
    activations = batch * width * layers
    assert (parameters, activations) == (36, 16)
    assert 4 * (parameters + activations + parameters + parameters) == 496  # AdaGrad: one state
    assert 6 * batch * parameters == 432


def test_a_raw_file_of_tokens_is_mapped_and_not_loaded(tmp_path: Path) -> None:
    """The last start is never drawn: randint(len - L) gives 0 to 5, and 6 is possible too."""
    path = tmp_path / "data.npy"
    tokens = numpy.arange(10, dtype=numpy.int32)
    tokens.tofile(path)
    assert (numpy.memmap(path, dtype=numpy.int32, mode="r") == tokens).all()
    with pytest.raises(ValueError, match=r"pickle|magic"):
        numpy.load(path)
    generator = torch.Generator().manual_seed(0)
    starts = {int(torch.randint(10 - 4, (), generator=generator)) for _ in range(200)}
    assert starts == set(range(6))
    assert len(tokens[6:10]) == 4


def depth_scale(gain: float, activation: nn.Module) -> float:
    """The scale of activations after 20 layers of width 256, from unit scale."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(512, 256, generator=generator)
    for _ in range(20):
        weights = torch.randn(256, 256, generator=generator) * gain / 16
        x = activation(x @ weights)
    return x.square().mean().sqrt().item()


def test_initial_weights_of_variance_one_over_width_keep_the_scale():
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(s, generator=generator) for s in ((8, 16384), (16384, 32)))
    assert (x @ w).std().item() == pytest.approx(128, rel=0.15)
    assert (x @ w / 128).std().item() == pytest.approx(1, rel=0.15)
    linear, relu = nn.Identity(), nn.ReLU()
    assert depth_scale(1.0, linear) == pytest.approx(1, rel=0.3)
    assert depth_scale(0.5, linear) == pytest.approx(2**-20 * depth_scale(1.0, linear), rel=1e-3)
    assert depth_scale(2**0.5, relu) == pytest.approx(2**10 * depth_scale(1.0, relu), rel=1e-3)
    assert 0.3 < depth_scale(2**0.5, relu) < 3


def test_the_bounds_of_a_truncated_normal_are_absolute():
    """a=-3, b=3 at sigma 1/128 are 384 sigma and truncate nothing."""
    sigma, torch_seed = 1 / 128, 0
    torch.manual_seed(torch_seed)
    w = nn.init.trunc_normal_(torch.empty(524_288), std=sigma, a=-3, b=3) / sigma
    assert w.abs().max() > 4.5
    assert int((w.abs() > 3).sum()) == pytest.approx(1_415, rel=0.1)  # 2.7e-3 of all
    w = nn.init.trunc_normal_(torch.empty(524_288), std=sigma, a=-3 * sigma, b=3 * sigma) / sigma
    assert w.abs().max().item() == pytest.approx(2.9996, abs=1e-3)
    assert w.std().item() == pytest.approx(0.98658, abs=3e-3)
