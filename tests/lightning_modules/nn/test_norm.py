"""The backward pass of the norm against torch and against finite differences."""

import pytest
import torch
import torch.nn.functional as F

from ravine.lightning_modules.nn.norm import RMSNorm, unit_rms


def numbers(*shape, dtype=torch.float64, scale=1.0):
    generator = torch.Generator().manual_seed(0)
    return (scale * torch.randn(*shape, dtype=dtype, generator=generator)).requires_grad_()


@pytest.mark.parametrize("scale", [1.0, 1e-8])  # the second is below ε's root
def test_both_derivatives_equal_finite_differences(scale):
    x = numbers(3, 2, 8, scale=scale)
    step = 1e-6 * scale
    assert torch.autograd.gradcheck(unit_rms, x, eps=step, atol=1e-5 / scale)
    assert torch.autograd.gradgradcheck(unit_rms, x, eps=step, atol=1e-5 / scale**2)


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float64, 1e-14), (torch.float32, 2e-6), (torch.bfloat16, 0.08)]
)
def test_the_norm_equals_that_of_torch_with_and_without_gain(dtype, bound):
    x, seed = numbers(2, 3, 5, 32, dtype=dtype), numbers(2, 3, 5, 32, dtype=dtype).detach()
    gain = torch.linspace(0.5, 2, 32, dtype=dtype)
    own_norm = RMSNorm(32).to(dtype)
    own_norm.weight.data = gain
    torch_norm = torch.nn.RMSNorm(32, dtype=dtype)
    torch_norm.weight.data = gain
    # as attention has it, not contiguous: (b t h k) seen as (b h t k)
    pairs = [(unit_rms, lambda x: F.rms_norm(x, (32,))), (own_norm, torch_norm)]
    for one, other in pairs:
        results = [f(x.transpose(1, 2)) for f in (one, other)]
        gradients = [torch.autograd.grad(y, x, seed.transpose(1, 2))[0] for y in results]
        assert (results[0] - results[1]).abs().max() <= bound
        assert (gradients[0] - gradients[1]).abs().max() <= bound
    assert torch.equal(own_norm.state_dict()["weight"], torch_norm.state_dict()["weight"])


@pytest.mark.parametrize("eps", [0.5, 1e-5, 0.0])
def test_eps_has_the_same_effect_with_and_without_gradients(eps):
    own_norm, later, x = RMSNorm(8, eps=eps), RMSNorm(8), torch.ones(1, 8) / 8
    later.eps = eps  # an attribute, as in torch's norm
    expected = x / (1 / 64 + eps) ** 0.5
    for norm in (own_norm, later):
        assert torch.allclose(norm(x), expected)
        with torch.no_grad():
            assert torch.allclose(norm(x), expected)


def test_zeros_stay_zeros_and_have_a_finite_gradient():
    x = torch.zeros(2, 8, requires_grad=True)
    y = unit_rms(x)
    y.sum().backward()
    assert y.count_nonzero() == 0
    assert x.grad is not None
    assert x.grad.isfinite().all()
