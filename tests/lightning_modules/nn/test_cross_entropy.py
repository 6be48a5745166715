"""The chunked loss and its gradients equal those of the full loss."""

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ravine.datamodules.text import IGNORE_INDEX
from ravine.lightning_modules import LanguageModel
from ravine.lightning_modules.nn import Transformer
from ravine.lightning_modules.nn import cross_entropy as cross_entropy_module
from ravine.lightning_modules.nn.cross_entropy import (
    chunked_cross_entropy,
    cross_entropy,
)

V, PADDED, D = 11, 16, 8


def features(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(3, 5, D, dtype=dtype, requires_grad=True)
    weight = torch.randn(PADDED, D, dtype=dtype, requires_grad=True)
    targets = torch.randint(V, (3, 5))
    targets[1, 2:] = IGNORE_INDEX
    return x, weight, targets


def whole(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy((x @ weight.mT)[..., :V].double(), targets, "sum")


@pytest.mark.parametrize("rows", [1, 4, 15, 100])
def test_chunks_of_any_size_give_the_loss_and_its_gradients(rows: int) -> None:
    x, weight, targets = features()
    expected = whole(x, weight, targets)
    found = chunked_cross_entropy(x, weight, targets, V, rows)
    torch.testing.assert_close(found, expected.double(), rtol=0, atol=1e-5)  # nats() is fp32
    for a, b in zip(
        torch.autograd.grad(found / 7, (x, weight)),
        torch.autograd.grad(expected / 7, (x, weight)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    assert torch.autograd.gradcheck(
        lambda *xw: chunked_cross_entropy(*xw, targets, V, rows), (x, weight)
    )


def test_padding_rows_of_the_head_have_probability_zero() -> None:
    x, weight, targets = features()
    with torch.no_grad():
        before = chunked_cross_entropy(x, weight, targets, V)
        weight[V:] = 1e6
        assert chunked_cross_entropy(x, weight, targets, V).equal(before)
    gradient = torch.autograd.grad(chunked_cross_entropy(x, weight, targets, V), weight)[0]
    assert (gradient[V:] == 0).all()


@pytest.mark.parametrize("frozen", [0, 1])
def test_frozen_parameters_get_no_gradient(frozen: int) -> None:
    parts = list(features())
    parts[frozen].requires_grad_(False)
    chunked_cross_entropy(*parts, V, 4).backward()
    assert parts[frozen].grad is None
    assert parts[1 - frozen].grad is not None


def test_bf16_keeps_the_loss_in_fp32() -> None:
    x, weight, targets = features(torch.float32)
    exact = whole(x, weight, targets)
    with torch.autocast("cpu", torch.bfloat16):
        found = chunked_cross_entropy(x, weight, targets, V, 4)
    assert found.dtype == torch.float32
    assert abs(found - exact) / exact < 0.01
    found.backward()
    assert x.grad.dtype == torch.float32


def test_a_large_vocabulary_trains_like_a_small_one(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    net = Transformer(5000, 8, num_layers=1, d_model=16, num_heads=2, zero_init_residual=False)
    assert net.head.weight.shape == (5056, 16)
    tokens, targets = torch.randint(5000, (2, 2, 8))
    assert net(tokens).shape == (2, 8, 5000)
    expected = cross_entropy(net(tokens), targets)
    model = LanguageModel(5000, 8, num_layers=1, d_model=16, num_heads=2)
    model.net = net
    monkeypatch.setattr(model, "log", lambda *_: None)
    found = model.training_step((tokens, targets), 0)
    torch.testing.assert_close(found, expected)
    for a, b in zip(
        torch.autograd.grad(found, list(net.parameters())),
        torch.autograd.grad(expected, list(net.parameters())),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_the_largest_thing_kept_is_the_gradient_of_the_head() -> None:
    """1,000 positions of 20,000 tokens: their logits would take 80 MB."""
    x = torch.randn(1, 1000, 8, requires_grad=True)
    weight = torch.randn(20_000, 8, requires_grad=True)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tensor.numel()) or tensor, lambda tensor: tensor
    ):
        chunked_cross_entropy(x, weight, torch.randint(20_000, (1, 1000)), 20_000, 64)
    assert max(kept) == weight.numel()


class Names(TorchDispatchMode):
    """Operations whose result has a number of elements."""

    def __init__(self, numel: int) -> None:
        super().__init__()
        self.numel, self.found = numel, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.numel() == self.numel:
            self.found.append(function.overloadpacket.__name__)
        return result


def test_the_backward_pass_makes_no_second_copy_of_the_gradient_of_the_head() -> None:
    x, weight, targets = features(torch.float32)
    mean = chunked_cross_entropy(x, weight, targets, V, 4) / 7
    with Names(weight.numel()) as names:
        mean.backward()
    assert set(names.found) <= {"mul_", "detach"}


def test_a_retained_graph_gives_the_same_gradients_again() -> None:
    x, weight, targets = features()
    mean = chunked_cross_entropy(x, weight, targets, V, 4) / 7
    once = torch.autograd.grad(mean, (x, weight), retain_graph=True)
    before = [gradient.clone() for gradient in once]
    again = torch.autograd.grad(mean, (x, weight), retain_graph=True)
    last = torch.autograd.grad(mean, (x, weight))
    for a, b, c, d in zip(before, once, again, last, strict=True):
        assert a.equal(b)
        assert a.equal(c)
        assert a.equal(d)


@pytest.mark.parametrize("wrong", [-1, -2, -99, V, V + 2, PADDED])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_target_outside_the_vocabulary_is_refused_on_every_path(wrong: int, frozen: bool) -> None:
    x, weight, targets = features()
    targets[2, 3] = wrong
    message = (
        rf"target {wrong} at index \[2, 3\] of shape \[3, 5\] is out of range; "
        rf"allowed: 0 to {V - 1}, -100 for a position without loss"
    )
    with torch.set_grad_enabled(not frozen):
        with pytest.raises(ValueError, match=message):
            chunked_cross_entropy(x, weight, targets, V)
        with pytest.raises(ValueError, match=message):
            whole(x, weight, targets)


@pytest.mark.parametrize("vocabulary", [100, 5000])
def test_an_ignore_index_of_minus_1_is_refused(vocabulary: int) -> None:
    model = LanguageModel(vocabulary, 8, num_layers=1, d_model=16, num_heads=2)
    model.configure_model()
    inputs = torch.randint(vocabulary, (2, 8))
    targets = inputs.roll(-1, 1)
    targets[:, :6] = -1
    for step in (model.training_step, model.validation_step):
        with pytest.raises(ValueError, match=r"target -1 .*targets == -1, -100\)"):
            step((inputs, targets), 0)


def test_the_kernel_of_the_chunks_refuses_a_negative_target_by_itself(monkeypatch) -> None:
    """What an accelerator does, where the ids are not looked at."""
    monkeypatch.setattr(cross_entropy_module, "check_ids", lambda *_: None)
    x, weight, targets = features()
    targets[0, 0] = -1
    with pytest.raises(RuntimeError, match="out of bounds"):
        chunked_cross_entropy(x, weight, targets, V)
