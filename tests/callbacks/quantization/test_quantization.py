"""NF4 and int8: error and size in theory, values of bitsandbytes, and no dense weight kept."""

import os
import subprocess
import sys
from importlib.util import find_spec

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ravine.callbacks import Quantization
from ravine.callbacks.lora import inject_lora, merge_lora
from ravine.callbacks.quantization import bitsandbytes_kernels, int8, nf4, quantize_module
from ravine.callbacks.quantization.layers import QuantizedLinear
from ravine.strategies.activation_checkpointing import apply_activation_checkpointing

FLOAT = torch.float32


def bits(parts, weight):
    return 8 * sum(p.numel() * p.itemsize for p in parts.values()) / weight.numel()


def error(weight, scheme, *args):
    parts = scheme.quantize(weight, *args)
    back = scheme.dequantize(weight.shape, FLOAT, *parts.values())
    return (back - weight).square().mean().sqrt() / weight.square().mean().sqrt()


def test_the_levels_are_quantiles_of_the_normal_distribution():
    level = nf4.levels()
    assert len(level) == 16
    assert (level[0], level[7], level[15]) == (-1.0, 0.0, 1.0)
    assert list(level) == sorted(level)
    # the paper's appendix E, to its digits
    assert level[8:11] == pytest.approx([0.0795802995, 0.1609302014, 0.2461123019], abs=2e-7)


@pytest.mark.parametrize("double", [True, False])
def test_the_error_on_normal_weights_equals_the_theoretical_error(double):
    weight = torch.randn(1024, 1024) * 0.02
    assert error(weight, nf4, double) == pytest.approx(0.0920, rel=0.005)


def test_bits_a_parameter_are_4_127_and_without_double_quantization_4_5():
    weight = torch.randn(1024, 1024)
    assert bits(nf4.quantize(weight), weight) == pytest.approx(4.127, abs=0.0005)
    assert bits(nf4.quantize(weight, double_quant=False), weight) == 4.5
    assert bits(int8.quantize(weight), weight) == 8 + 32 / 1024


def test_no_weight_is_off_by_more_than_half_the_widest_gap():
    weight = torch.randn(64, 256)
    parts = nf4.quantize(weight, double_quant=False)
    back = nf4.dequantize(weight.shape, FLOAT, *parts.values())
    level = torch.tensor(nf4.levels())
    off = (back - weight).abs().view(-1, 64) / parts["scales"][:, None]
    assert off.max() <= level.diff().max() / 2 + 1e-6


def test_a_doubly_quantized_scale_is_off_by_half_a_step_at_most():
    weight = torch.randn(256, 256)
    double, single = nf4.quantize(weight), nf4.quantize(weight, double_quant=False)["scales"]
    found = nf4.block_scales(double["scales"], double["outer"], double["mean"])
    step = (double["outer"] / 127).repeat_interleave(nf4.SCALE_GROUP_SIZE)[: len(single)]
    assert ((found - single).abs() <= 0.501 * step).all()


def test_values_on_the_levels_are_kept_exactly():
    weight = torch.tensor(nf4.levels()).repeat(8).view(2, 64)
    parts = nf4.quantize(weight, double_quant=False)
    assert torch.equal(nf4.dequantize(weight.shape, FLOAT, *parts.values()), weight)


@pytest.mark.parametrize("shape", [(3, 5), (1, 64), (7, 100), (300, 77)])
@pytest.mark.parametrize("double", [True, False])
def test_any_shape_comes_back_and_zeros_stay_zeros(shape, double):
    weight = torch.randn(shape)
    parts = nf4.quantize(weight, double)
    assert nf4.dequantize(weight.shape, FLOAT, *parts.values()).shape == shape
    assert error(weight, nf4, double) < 0.15
    zeros = torch.zeros(shape)
    assert torch.equal(nf4.dequantize(zeros.shape, FLOAT, *nf4.quantize(zeros).values()), zeros)


def test_int8_is_off_by_half_a_step_at_most():
    weight = torch.randn(64, 256)
    parts = int8.quantize(weight)
    back = int8.dequantize(weight.shape, FLOAT, *parts.values())
    assert ((back - weight).abs() <= 0.5001 * parts["scales"][:, None]).all()
    assert error(weight, int8) < 0.01


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_are_the_rounded_float32(dtype):
    weight = torch.randn(64, 256)
    for scheme in (nf4, int8):
        parts = list(scheme.quantize(weight).values())
        exact = scheme.dequantize(weight.shape, FLOAT, *parts)
        other = scheme.dequantize(weight.shape, dtype, *parts)
        assert other.dtype == dtype
        assert (other.float() - exact).abs().max() <= 2.5 * torch.finfo(
            dtype
        ).eps * exact.abs().max()


bitsandbytes = pytest.mark.skipif(
    find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)


def test_codes_and_scales_equal_those_of_bitsandbytes():
    """Its 0.50.2, quantize_4bit(weight, blocksize=64, quant_type="nf4")."""
    large_small = torch.tensor([1.0, 0.03]).repeat_interleave(64)
    parts = nf4.quantize((torch.arange(128) * 0.37).sin() * large_small, double_quant=False)
    assert bytes(parts["codes"].flatten().tolist()).hex() == (
        "7befffed9521000137befffed9521000137befffed9521000137befffed95210"
        "00147befffec9521000147cefffec9521000148cefffec9521000148cefffec9"
    )
    assert parts["scales"].tolist() == [0.9975263476371765, 0.029972150921821594]


@bitsandbytes
@pytest.mark.filterwarnings("ignore")
def test_without_double_quantization_the_weights_equal_those_of_bitsandbytes():
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    weight = torch.randn(512, 512) * 0.02
    codes, state = quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=False)
    actual = nf4.quantize(weight, double_quant=False)
    back = nf4.dequantize(weight.shape, FLOAT, *actual.values())
    assert (back - dequantize_4bit(codes, state)).abs().max() <= 1e-6
    assert (actual["codes"].flatten() != codes.flatten()).float().mean() < 1e-4


@bitsandbytes
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("double", [True, False])
def test_the_library_backend_reads_the_same_bits(double):
    weight = torch.randn(512, 512) * 0.02
    parts = list(nf4.quantize(weight, double).values())
    expected = bitsandbytes_kernels.dequantize(weight.shape, FLOAT, *parts)
    assert (expected - nf4.dequantize(weight.shape, FLOAT, *parts)).abs().max() <= 1e-6


def net(bias=True):
    return nn.Sequential(
        nn.Linear(64, 96, bias), nn.Tanh(), nn.Linear(96, 64, bias), nn.Linear(64, 3)
    )


@pytest.mark.parametrize("scheme", ["nf4", "int8"])
@pytest.mark.parametrize("bias", [True, False])
def test_outputs_and_gradients_are_those_of_the_rounded_dense_layer(scheme, bias):
    actual, x = net(bias), torch.randn(5, 2, 64, requires_grad=True)
    twin_x = x.detach().clone().requires_grad_()
    quantize_module(actual, scheme)
    reference = net(bias)
    reference.load_state_dict(
        {name: actual.get_submodule(name.rpartition(".")[0]).weight if "weight" in name else value
         for name, value in reference.state_dict().items()} | {
            name: value for name, value in actual.state_dict().items() if name.endswith("bias")}
    )  # fmt: skip
    assert torch.equal(actual(x), reference(twin_x))
    actual(x).square().sum().backward()
    reference(twin_x).square().sum().backward()
    assert (x.grad - twin_x.grad).abs().max() < 1e-6
    if bias:
        assert (actual[0].bias.grad - reference[0].bias.grad).abs().max() < 1e-6


def kept_for_backward(module, x):
    """Bytes of floating numbers that autograd keeps, by shape."""
    kept = []

    def pack(tensor):
        if tensor.is_floating_point():
            kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        module(x).sum()
    return kept


def test_no_dense_weight_is_kept_for_the_backward():
    module, x = net(), torch.randn(5, 64)
    weights = {(64, 96), (96, 64)}
    quantize_module(module)
    inject_lora(module, ["0", "2"], rank=4)
    assert not weights & set(kept_for_backward(module, x))
    plain = net()  # the same look sees those of plain layers
    inject_lora(plain, ["0", "2"], rank=4)
    assert weights & set(kept_for_backward(plain, x))


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_a_quantized_layer_can_be_recomputed(mode):
    gradients = []
    for how in ("none", mode):
        torch.manual_seed(0)
        module = net()
        quantize_module(module)
        inject_lora(module, ["0", "2"], rank=4)
        apply_activation_checkpointing(module, how)
        module(torch.ones(5, 64)).square().sum().backward()
        gradients.append([p.grad for p in module.parameters() if p.requires_grad])
    assert all(map(torch.equal, *gradients))


PEAK = """
import sys, torch
import torch.nn.functional as F
from torch import nn
from ravine.callbacks.lora import inject_lora
from ravine.callbacks.quantization import quantize_module
torch.set_num_threads(1)
class Naive(torch.nn.Module):  # dequantises under autograd, which keeps the dense weight
    def __init__(self, layer):
        super().__init__()
        self.layer = layer
    def forward(self, x):
        return x + F.linear(x, self.layer.weight)
layers = []
for _ in range(16):
    layer = nn.Sequential(nn.Linear(2048, 2048, bias=False))
    quantize_module(layer, targets="0")
    inject_lora(layer, "0", rank=4)
    layers.append(Naive(layer[0]) if sys.argv[1] == "naive" else layer)
net, x = nn.Sequential(*layers), torch.randn(4, 2048)
def peak():  # of this process alone: ru_maxrss also has its parent in it
    lines = open("/proc/self/status").read().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew
before = peak()
net(x.requires_grad_()).sum().backward()
print((peak() - before) / 1024)
"""


def test_a_fresh_process_peaks_far_below_one_that_keeps_dense_weights():
    grown = {}
    for way in ("ours", "naive"):
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", PEAK, way],
            env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "131072"},  # what is freed is given back
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        grown[way] = float(done.stdout)
    dense = 16 * 2048 * 2048 * 4 / 2**20  # 256 MiB
    assert grown["naive"] > 0.9 * dense
    assert grown["ours"] < 0.2 * dense  # one layer's matrix at a time, and the way to it


def test_codes_do_not_train_and_scales_stay_float32_when_the_module_is_cast():
    module = net()
    errors = quantize_module(module)
    assert list(errors) == ["0", "2"]  # not the head
    assert {n for n, p in module.named_parameters() if p.requires_grad} == {
        "0.bias", "2.bias", "3.weight", "3.bias",
    }  # fmt: skip
    scales = module[0].weight_outer.clone()
    module.to(torch.bfloat16)
    assert module[0].weight_outer.dtype == module[0].weight_mean.dtype == torch.float32
    assert torch.equal(module[0].weight_outer, scales)
    assert module[0].bias.dtype == torch.bfloat16
    assert module(torch.randn(2, 64, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_autocast_multiplies_in_bfloat16():
    module, x = net(), torch.randn(5, 64)
    quantize_module(module)
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x)
    assert y.dtype == torch.bfloat16
    assert (y - module(x)).abs().max() < 0.03


@pytest.mark.parametrize("scheme", ["nf4", "int8"])
def test_merging_over_a_quantized_base_makes_plain_layers(scheme):
    module, x = net().double(), torch.randn(5, 64, dtype=torch.float64)
    keys = list(module.state_dict())
    quantize_module(module, scheme)
    inject_lora(module, ["0", "2"], rank=4)
    for name, parameter in module.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.2)
    y = module(x)
    merge_lora(module)
    assert (module(x) - y).abs().max() <= 1e-12
    assert {type(layer) for layer in module} == {nn.Linear, nn.Tanh}
    assert list(module.state_dict()) == keys


def test_a_checkpoint_of_the_unquantized_net_is_rounded_when_loaded():
    module, reference = net(), net()
    weights = reference.state_dict()
    quantize_module(module)
    quantize_module(reference)
    module.load_state_dict(weights)
    assert all(
        torch.equal(p, q) for p, q in zip(module.parameters(), reference.parameters(), strict=True)
    )


def test_the_error_of_each_layer_is_measured():
    module = net()
    before = module[0].weight.detach().clone()
    errors = quantize_module(module, exclude="2")
    expected = F.mse_loss(module[0].weight, before).sqrt() / before.square().mean().sqrt()
    assert errors == {"0": pytest.approx(expected.item())}


class Doubled(nn.Linear):
    def forward(self, input):
        return 2 * super().forward(input)


BAD = {
    "a target that matches nothing": ({"targets": "qurey"}, r"'qurey' matches .* nearest: query"),
    "a layer that is no Linear": (
        {"targets": "table"},
        "matches table, a Embedding, and only Linear",
    ),
    "the inside of torch's attention": ({"targets": "out_proj"}, r"matches attend\.out_proj"),
    "a shared weight": ({"targets": "head"}, r"head shares its weight with table\.weight"),
    "an exclude that matches nothing": ({"targets": "query", "exclude": "v"}, r"\.exclude: 'v'"),
    "an exclude that leaves nothing": (
        {"targets": "query", "exclude": "*"},
        r"exclude=\['\*'\] excludes all layers of targets",
    ),
    "a weight that is no number": ({"targets": "broken"}, "weight of broken is not finite"),
    "a layer with a way of its own": ({"targets": "doubled"}, "doubled is a Doubled, which"),
    "a weight that is made anew": ({"targets": "normed"}, "normed computes its weight at each use"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_mistake_is_named_and_changes_nothing(what):
    module = nn.ModuleDict(
        {
            "query": nn.Linear(8, 8),
            "table": nn.Embedding(9, 8),
            "attend": nn.MultiheadAttention(8, 2),
            "head": nn.Linear(8, 9, bias=False),
            "broken": nn.Linear(8, 8),
            "doubled": Doubled(8, 8),
            "normed": nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)),
        }
    )
    nn.init.constant_(module["broken"].bias, 0.0)
    nn.init.constant_(module["broken"].weight[0], torch.inf)
    module["head"].weight = module["table"].weight
    arguments, words = BAD[what]
    with pytest.raises(ValueError, match=words):
        quantize_module(module, **arguments)
    assert not [m for m in module.modules() if isinstance(m, QuantizedLinear)]


def test_layers_are_quantized_once_and_before_adapters():
    module = net()
    quantize_module(module, targets="0")
    with pytest.raises(ValueError, match="0 is already quantized; use a new module"):
        quantize_module(module, targets="0")
    inject_lora(module, "2", rank=2)
    with pytest.raises(ValueError, match="2 already has an adapter; quantize first"):
        quantize_module(module, targets="2")


def test_codes_cannot_be_trainable():
    module = net()
    quantize_module(module, targets="0")
    with pytest.raises(
        ValueError, match=r"train_also selects 0, which is quantized.*exclude=\['0'\]"
    ):
        inject_lora(module, "2", rank=2, train_also="0")


def test_a_layer_used_in_two_places_is_rounded_once():
    layer = nn.Linear(64, 64)
    module = nn.Sequential(layer, nn.Tanh(), layer)
    assert list(quantize_module(module, targets="*")) == ["0"]
    assert module[0] is module[2]
    assert module(input=torch.randn(2, 64)).shape == (2, 64)


def test_a_backend_that_the_device_cannot_run_is_refused():
    trainer = L.Trainer(accelerator="cpu", logger=False)
    with pytest.raises(
        ValueError, match=r"needs CUDA, and this run is on cpu.*use backend='torch'"
    ):
        Quantization(backend="bitsandbytes").setup(trainer, L.LightningModule(), "fit")
    with pytest.raises(
        ValueError, match=r"'bitsandbytes' does not support scheme='int8'; allowed: nf4"
    ):
        Quantization("int8", backend="bitsandbytes")
    with pytest.raises(ValueError, match=r"scheme='fp4' does not exist; allowed: nf4, int8"):
        Quantization("fp4")  # type: ignore
