"""LoRA layer by layer: equal to peft, to the merged dense layer, and to the base at the start."""

import copy
import math

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ravine.callbacks.lora import inject_lora, lora_disabled, lora_layers, merge_lora
from ravine.callbacks.lora.callback import default_lora_targets
from ravine.callbacks.transforms.layer_selection import find_frozen_copies

DOUBLE = torch.float64


def randomized(module):
    """Adapters as after training: B is not zero."""
    for name, parameter in module.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.5)
    return module


def conv(**how):
    return nn.Sequential(nn.Conv2d(4, 6, 3, **how))


# name: layer, input, how to adapt it
LAYERS = {
    "linear": (lambda: nn.Sequential(nn.Linear(6, 8)), (5, 3, 6), {}),
    "linear without batch": (lambda: nn.Sequential(nn.Linear(6, 8, bias=False)), (6,), {}),
    "fused": (lambda: nn.Sequential(nn.Linear(6, 12)), (5, 6), {"num_blocks": {"0": 3}}),
    "embedding": (lambda: nn.Sequential(nn.Embedding(9, 6, padding_idx=2)), None, {}),
    "conv": (conv, (2, 4, 7, 7), {}),
    "reflect": (lambda: conv(padding=2, padding_mode="reflect", stride=2), (2, 4, 7, 7), {}),
    "circular": (lambda: conv(padding=1, padding_mode="circular"), (2, 4, 7, 7), {}),
    "replicate": (lambda: conv(padding="same", padding_mode="replicate"), (2, 4, 7, 7), {}),
    "dilation": (lambda: conv(padding=2, dilation=2), (2, 4, 7, 7), {}),
    "same": (lambda: conv(padding="same", dilation=(1, 2)), (2, 4, 7, 7), {}),
    "groups": (lambda: conv(groups=2, padding=1), (2, 4, 7, 7), {}),
}


def made(name, dtype=DOUBLE, rank=2):
    make, shape, how = LAYERS[name]
    net = make().to(dtype)
    x = torch.randint(9, (5, 3)) if shape is None else torch.randn(shape, dtype=dtype)
    before = net(x)
    inject_lora(net, "0", rank=rank, **how)
    return net, x, before


@pytest.mark.parametrize("name", LAYERS)
def test_training_starts_at_outputs_bit_equal_to_the_base(name):
    for dtype in (DOUBLE, torch.float32, torch.bfloat16):
        net, x, before = made(name, dtype)
        assert torch.equal(net(x), before)


@pytest.mark.parametrize("name", LAYERS)
def test_merged_equals_unmerged_and_class_and_keys_are_as_before(name):
    make, _, _ = LAYERS[name]
    for dtype, limit in ((DOUBLE, 1e-12), (torch.float32, 1e-5)):
        net, x, before = made(name, dtype)
        adapted = randomized(net)(x)
        assert (adapted - before).abs().max() > 0.01
        assert merge_lora(net) == ["0"]
        assert (net(x) - adapted).abs().max() <= limit * max(1, adapted.abs().max())
        plain = make().to(dtype)
        assert type(net[0]) is type(plain[0])
        assert list(net.state_dict()) == list(plain.state_dict())
        plain.load_state_dict(net.state_dict())
        assert torch.equal(plain(x), net(x))


def peft_layer(actual, layer, rank, alpha, rslora=False):
    """peft's layer with the same three matrices."""
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=["0"], use_rslora=rslora)
    net = peft.inject_adapter_in_model(config, nn.Sequential(layer)).double()
    parts = dict(net.named_parameters())
    a = next(p for n, p in parts.items() if "_A" in n)
    b = next(p for n, p in parts.items() if "_B" in n)
    with torch.no_grad():
        a.copy_(actual[0].lora_a)
        b.copy_(actual[0].lora_b)
    return net, a, b


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("name", ["linear", "linear without batch", "embedding", "conv"])
def test_forward_and_adapter_gradients_equal_pefts(name, rslora):
    make, shape, _ = LAYERS[name]
    layer = make().double()
    layer_copy = make().double()
    layer_copy.load_state_dict(layer.state_dict())
    inject_lora(layer, "0", rank=2, alpha=5.0, rank_stabilized=rslora)
    other, a, b = peft_layer(randomized(layer), layer_copy[0], 2, 5, rslora)
    x = torch.randint(9, (5, 3)) if shape is None else torch.randn(shape, dtype=DOUBLE)
    actual, peftly = layer(x), other(x)
    assert (actual - peftly).abs().max() <= 1e-12
    weight = torch.randn_like(actual)
    (actual * weight).sum().backward()
    (peftly * weight).sum().backward()
    for parameter, peft_parameter in ((layer[0].lora_a, a), (layer[0].lora_b, b)):
        assert parameter.grad.abs().max() > 0.01
        assert (parameter.grad - peft_parameter.grad).abs().max() <= 1e-12


def test_a_fused_qkv_is_three_layers_side_by_side():
    fused = nn.Sequential(nn.Linear(6, 12)).double()
    inject_lora(fused, "0", rank=2, num_blocks={"0": 3})
    randomized(fused)
    parts = []
    for i in range(3):
        part = nn.Sequential(nn.Linear(6, 4)).double()
        part[0].weight.data = fused[0].weight.data[4 * i : 4 * i + 4]
        part[0].bias.data = fused[0].bias.data[4 * i : 4 * i + 4]
        inject_lora(part, "0", rank=2)
        part[0].lora_a.data = fused[0].lora_a.data[2 * i : 2 * i + 2]
        part[0].lora_b.data = fused[0].lora_b.data[4 * i : 4 * i + 4]
        parts.append(part)
    x = torch.randn(5, 6, dtype=DOUBLE)
    together = torch.cat([part(x) for part in parts], -1)
    assert (fused(x) - together).abs().max() <= 1e-12


def trained(module):
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def test_trainable_parameters_are_the_sum_of_r_times_inputs_plus_outputs():
    net = nn.Sequential(nn.Linear(6, 8), nn.Conv2d(4, 6, 3), nn.Embedding(9, 5))
    inject_lora(net, "*", rank=2, ranks={"1": 3})
    assert trained(net) == 2 * (6 + 8) + 3 * (4 * 9 + 6) + 2 * (9 + 5)


def test_the_matrix_of_16_8_million_parameters_of_the_lecture_trains_131_thousand():
    layer = nn.Sequential(nn.Linear(4096, 4096, bias=False))
    assert trained(layer) == 16_777_216
    inject_lora(layer, "0", rank=16)
    assert trained(layer) == 131_072


def test_initial_adapters_depend_on_their_names_and_use_no_global_generator():
    nets = [nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 8)) for _ in range(2)]
    for net in nets:
        state = torch.get_rng_state()
        inject_lora(net, "*", rank=2)
        assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(nets[0][0].lora_a, nets[1][0].lora_a)
    assert nets[0][0].lora_a.abs().max() <= 1 / math.sqrt(6)
    assert not torch.equal(nets[0][1].lora_a[:, :6], nets[0][0].lora_a)


def test_lora_disabled_is_the_base_and_comes_back():
    net, x, before = made("linear")
    after = randomized(net)(x)
    with lora_disabled(net):
        assert torch.equal(net(x), before)
        with lora_disabled(net):
            pass
        assert torch.equal(net(x), before)
    assert torch.equal(net(x), after)


def test_any_code_can_switch_adapters_off_by_a_plain_attribute():
    net, x, before = made("conv")
    randomized(net)
    for layer in net.modules():
        if hasattr(layer, "lora_enabled"):
            layer.lora_enabled = False
    assert torch.equal(net(x), before)


def test_the_padding_row_of_an_embedding_does_not_change():
    net, _, _ = made("embedding")
    nn.init.normal_(net[0].lora_b)
    padding = torch.tensor([2])
    assert torch.equal(net(padding), net[0].weight[padding])
    net(torch.tensor([2, 2])).sum().backward()
    assert net[0].lora_a.grad.abs().max() == 0


def test_adapters_are_stored_in_float32_in_a_bfloat16_net_and_stay_so_when_it_is_cast():
    net = nn.Sequential(nn.Linear(6, 8)).bfloat16()
    inject_lora(net, "0", rank=2)
    values = net[0].lora_a.clone()
    net.to(torch.bfloat16)
    assert net[0].lora_a.dtype == net[0].lora_b.dtype == torch.float32
    assert torch.equal(net[0].lora_a, values)
    assert net(torch.randn(3, 6, dtype=torch.bfloat16)).dtype == torch.bfloat16
    net.to(torch.float64)
    assert net[0].lora_a.dtype == torch.float32


def test_adapters_multiply_in_the_dtype_asked_for():
    net = nn.Sequential(nn.Linear(6, 8))
    inject_lora(net, "0", rank=2, dtype=torch.bfloat16)
    randomized(net)
    x = torch.randn(3, 6)
    with lora_disabled(net):
        base = net(x)
    a, b = net[0].lora_a.bfloat16(), net[0].lora_b.bfloat16()
    change = 8.0 * F.linear(F.linear(x.bfloat16(), a), b)
    assert torch.equal(net(x), base + change.float())
    (net(x).sum()).backward()
    assert net[0].lora_a.grad.dtype == torch.float32


def test_autocast_multiplies_adapters_as_it_does_their_layer():
    net, x, _ = made("linear", torch.float32)
    randomized(net)
    with torch.autocast("cpu", torch.bfloat16):
        y = net(x)
    assert y.dtype == torch.bfloat16
    assert (y - net(x)).abs().max() < 0.05 * net(x).abs().max()


def test_dropout_acts_on_the_adapter_alone_and_in_training_alone():
    net = nn.Sequential(nn.Linear(6, 8))
    inject_lora(net, "0", rank=2, dropout=0.999999)
    randomized(net)
    x = torch.randn(3, 6)
    with lora_disabled(net):
        base = net(x)
    assert torch.equal(net(x), base)
    assert not torch.equal(net.eval()(x), base)


@pytest.mark.parametrize("which", ["embed", "head", "both"])
def test_merging_one_of_two_tied_layers_does_not_change_the_other(which):
    net = nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 9, bias=False)).double()
    net[1].weight = net[0].weight
    targets = {"embed": "0", "head": "1", "both": "*"}[which]
    inject_lora(net, targets, rank=2)
    ids = torch.arange(9)
    expected = randomized(net)(ids)
    merge_lora(net)
    assert (net(ids) - expected).abs().max() <= 1e-12
    assert net[1].weight is not net[0].weight


def attention(**how):
    net = nn.ModuleDict({"attend": nn.MultiheadAttention(8, 2, batch_first=True, **how)})
    return net.double()


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("how", [{}, {"bias": False}, {"add_bias_kv": True}])
def test_torch_attention_with_adapters_equals_its_merged_form_in_train_and_eval(how, train):
    net = attention(**how).train(train)
    x = torch.randn(2, 5, 8, dtype=DOUBLE)
    before, _ = net["attend"](x, x, x)
    inject_lora(net, "attend", rank=2)
    assert trained(net) == 2 * (3 * (8 + 8) + (8 + 8))
    assert torch.equal(net["attend"](x, x, x)[0], before)
    randomized(net)
    y, _ = net["attend"](x, x, x)
    y.sum().backward()
    assert all(p.grad.abs().max() > 0 for n, p in net.named_parameters() if "lora_" in n)
    with torch.no_grad():
        fast, _ = net["attend"](x, x, x, need_weights=False)
    merge_lora(net)
    dense, _ = net["attend"](x, x, x)
    assert (y - before).abs().max() > 0.01
    assert (y - dense).abs().max() <= 1e-12
    assert (fast - dense).abs().max() <= 1e-12
    assert type(net["attend"]) is nn.MultiheadAttention
    assert list(net.state_dict()) == list(attention(**how).state_dict())


def test_gradients_of_an_attention_equal_those_through_its_dense_weights():
    net = attention()
    inject_lora(net, "attend", rank=2, alpha=3.0)
    randomized(net)
    x, layer = torch.randn(2, 5, 8, dtype=DOUBLE), net["attend"]
    layer(x, x, x)[0].square().sum().backward()
    layer_copy = attention()
    changes = layer.lora_delta_weights()
    layer_copy["attend"].load_state_dict(
        {k: v for k, v in layer.state_dict().items() if "lora_" not in k}
    )
    with torch.no_grad():
        layer_copy["attend"].in_proj_weight += changes["in_proj_weight"]
        layer_copy["attend"].out_proj.weight += changes["out_proj.weight"]
    layer_copy["attend"](x, x, x)[0].square().sum().backward()
    dense = layer_copy["attend"].out_proj.weight.grad
    expected = 1.5 * layer.lora_out_b.mT @ dense
    assert (layer.lora_out_a.grad - expected).abs().max() <= 1e-12
    dense = layer_copy["attend"].in_proj_weight.grad[8:16]  # of the keys
    expected = 1.5 * layer.lora_in_b[8:16].mT @ dense
    assert (layer.lora_in_a.grad[2:4] - expected).abs().max() <= 1e-12


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.stack = nn.TransformerEncoder(layer, 2)

    def forward(self, x, padding=None):
        return self.stack(x, src_key_padding_mask=padding)


# torch's own encoder packs the padding, once it is dense again
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
@pytest.mark.parametrize("targets", ["linear1", "self_attn", "layers.1.linear*"])
def test_an_encoder_layer_shows_its_adapters_when_evaluating_too(targets):
    net, x = Encoder().double(), torch.randn(2, 5, 8, dtype=DOUBLE)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    inject_lora(net, targets, rank=2)
    randomized(net)
    train = net(x)
    with torch.no_grad():
        evaluated, padded = net.eval()(x), net(x, padding)
    names = merge_lora(net)
    with torch.no_grad():
        dense, dense_padded = net(x), net(x, padding)
    assert names
    assert (train - dense).abs().max() <= 1e-12
    assert (evaluated - dense).abs().max() <= 1e-12
    seen = ~padding[..., None]
    assert ((padded - dense_padded) * seen).abs().max() <= 1e-12
    flags = {m.activation_relu_or_gelu for m in net.modules() if hasattr(m, "norm_first")}
    assert flags == {1}
    assert net.stack.use_nested_tensor


BAD = {
    "a target that matches nothing": (
        {"targets": ["querry"]},
        r"LoRA\.targets: 'querry' matches no layer; nearest: query.*; use 'query' in targets",
    ),
    "one good target and one that matches nothing": (
        {"targets": ["query", "values"]},
        r"'values' matches no layer; nearest: value",
    ),
    "an exclude that matches nothing": (
        {"targets": ["query"], "exclude": ["value"]},
        r"LoRA\.exclude: 'value' matches no layer",
    ),
    "an exclude that leaves nothing": (
        {"targets": ["query"], "exclude": ["*"]},
        r"exclude=\[.*\] excludes all layers of targets",
    ),
    "a rank larger than the layer": (
        {"targets": ["query"], "rank": 9},
        r"rank=9 for query \(6 to 8\); allowed: 1 to 6 for query; use ranks=\{'query': 6\}",
    ),
    "two ranks that are too large among one that fits": (
        {"targets": ["query", "attend"], "rank": 8, "ranks": {"attend": 9}},
        r"rank=8 for query .*, rank=9 for attend .*use ranks=\{'query': 6, 'attend': 8\}",
    ),
    "no rank": ({"targets": ["query"], "rank": 0}, r"rank=0 for query.*use ranks=\{'query': 1\}"),
    "a layer without weights of its own kind": (
        {"targets": ["norm"]},
        r"matches norm, a LayerNorm, which cannot have an adapter \(only Multihead",
    ),
    "the inside of torch's attention": (
        {"targets": ["out_proj"]},
        r"matches attend\.out_proj.*nearest: attend; use targets=\['attend'\]",
    ),
    "dropout before torch's attention": (
        {"targets": ["attend"], "dropout": 0.1},
        "dropout=0.1 and num_blocks=1 are not supported; .*use dropout=0",
    ),
    "parts that do not divide": (
        {"targets": ["query"], "num_blocks": {"query": 3}},
        r"num_blocks=3 does not divide the 8 outputs of query; allowed: 1, 2, 4, 8",
    ),
    "a rank for nothing": (
        {"targets": ["query"], "ranks": {"value": 2}},
        r"LoRA\.ranks: 'value' matches no layer; nearest: query; use 'query' in ranks",
    ),
    "something to train that is not there": (
        {"targets": ["query"], "train_also": ["nrm"]},
        r"LoRA\.train_also: 'nrm'.*nearest: norm",
    ),
    "an embedding that rescales its rows": ({"targets": ["scaled"], "rank": 2}, "max_norm"),
    "a rank that is no number": (
        {"targets": ["query"], "rank": 2.5},
        r"rank=2\.5 is not valid for query; allowed: integers from 1",
    ),
    "no parts": (
        {"targets": ["query"], "num_blocks": {"query": 0}},
        r"num_blocks=0 is not valid for query; allowed:",
    ),
    "a scale of nothing": (
        {"targets": ["query"], "alpha": 0.0},
        r"alpha=0\.0 is not a positive number",
    ),
    "a scale that is no number": ({"targets": ["query"], "alpha": math.nan}, "alpha=nan"),
    "dropout of everything": ({"targets": ["query"], "dropout": 1.0}, r"dropout=1\.0 is outside"),
    "no targets": (
        {"targets": []},
        "targets selects no layer; layers: query, value, attend, scaled; use targets=None",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_a_mistake_is_named_and_changes_nothing(what):
    net = nn.ModuleDict(
        {
            "query": nn.Linear(6, 8),
            "value": nn.Linear(6, 8),
            "norm": nn.LayerNorm(6),
            "attend": nn.MultiheadAttention(8, 2),
            "scaled": nn.Embedding(9, 8, max_norm=1.0),
        }
    )
    arguments, words = BAD[what]
    with pytest.raises(ValueError, match=words):
        inject_lora(net, **arguments)
    assert lora_layers(net) == {}
    assert all(p.requires_grad for p in net.parameters())


def test_the_default_rank_is_8_or_the_smaller_dimension_of_the_layer():
    net = nn.ModuleDict(
        {
            "wide": nn.Linear(16, 32),
            "thin": nn.Linear(16, 3),
            "depthwise": nn.Conv2d(12, 12, 3, groups=12),
            "grouped": nn.Conv2d(8, 8, 1, groups=2),
            "table": nn.Embedding(5, 16),
            "stacked": nn.Linear(16, 12),
        }
    )
    inject_lora(net, "*", num_blocks={"stacked": 3})
    ranks = {name: layer.lora_rank for name, layer in lora_layers(net).items()}
    expected = {"wide": 8, "thin": 3, "depthwise": 1, "grouped": 4, "table": 5, "stacked": 4}
    assert ranks == expected
    again = nn.ModuleDict({"wide": nn.Linear(16, 32), "thin": nn.Linear(16, 3)})
    with pytest.raises(
        ValueError,
        match=r"rank=8 for thin \(16 to 3\); allowed: 1 to 3 for thin; use ranks=\{'thin': 3\}",
    ) as error:
        inject_lora(again, "*", rank=8)
    assert "wide" not in str(error.value)


def learning(module):
    return {name for name, p in module.named_parameters() if p.requires_grad}


class Transfer(nn.Module):
    """A frozen base and a new head of two layers."""

    def __init__(self):
        super().__init__()
        self.base = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16))
        self.base.requires_grad_(False)
        self.norm = nn.LayerNorm(16)
        self.classifier = nn.Sequential(nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 2))


@pytest.mark.parametrize("targets", [None, "base.*", ["base.0"]])
def test_trainable_parameters_beside_a_frozen_base_stay_trainable(targets):
    net = Transfer()
    inject_lora(net, targets or default_lora_targets(net))
    hit = {"base.0", "base.2"} if targets != ["base.0"] else {"base.0"}
    assert set(lora_layers(net)) == hit
    new = {name for name, _ in net.named_parameters() if not name.startswith("base")}
    assert learning(net) == new | {f"{name}.lora_{key}" for name in hit for key in "ab"}


def test_a_layer_named_outside_the_base_is_adapted_and_frozen_itself():
    net = Transfer()
    inject_lora(net, ["base.0", "classifier.0"])
    free = {"norm.weight", "norm.bias", "classifier.2.weight", "classifier.2.bias"}
    assert {name for name in learning(net) if "lora_" not in name} == free


class Taught(nn.Module):
    """A student, its head, and a teacher that follows the student."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8))
        self.teacher = copy.deepcopy(self.net).requires_grad_(False)


def test_a_net_and_its_frozen_copy_have_the_same_adapters_or_none():
    net = Taught()
    assert find_frozen_copies(net) == {"teacher": "net"}
    assert default_lora_targets(net) == ["net.0", "net.2", "teacher.0", "teacher.2"]
    inject_lora(net, default_lora_targets(net))
    shapes = [[p.shape for p in part.parameters()] for part in (net.net, net.teacher)]
    assert shapes[0] == shapes[1]
    assert [layer.lora_is_copy for layer in lora_layers(net).values()] == [False, False, True, True]
    for targets in ("net.*", "teacher.*", ["net.0", "teacher.2"]):
        with pytest.raises(
            ValueError, match=r"teacher is a frozen copy of net.*use targets=\['net\.\*', 'teacher"
        ):
            inject_lora(Taught(), targets)


def test_equal_shapes_alone_make_no_copy_of_one_layer():
    net = nn.ModuleDict({"base": nn.Linear(4, 4), "head": nn.Linear(4, 4)})
    net["base"].requires_grad_(False)
    assert find_frozen_copies(net) == {}
    net["base"].load_state_dict(net["head"].state_dict())
    assert find_frozen_copies(net) == {"base": "head"}


def test_a_layer_is_adapted_once():
    net = nn.Sequential(nn.Linear(6, 8))
    inject_lora(net, "0", rank=2)
    with pytest.raises(ValueError, match="0 already has an adapter"):
        inject_lora(net, "0", rank=2)


def test_train_also_names_layers_or_parameters_and_all_others_are_frozen():
    net = nn.ModuleDict({"a": nn.Linear(6, 8), "b": nn.Linear(8, 8), "c": nn.Linear(8, 8)})
    inject_lora(net, "a", rank=2, train_also=["b", "c.bias"])
    names = {name for name, p in net.named_parameters() if p.requires_grad}
    assert names == {"a.lora_a", "a.lora_b", "b.weight", "b.bias", "c.bias"}


class Doubled(nn.Linear):
    def forward(self, input):
        return 2 * super().forward(input)


class OwnAttention(nn.MultiheadAttention):
    def forward(self, *args, **kwargs):
        y, weights = super().forward(*args, **kwargs)
        return 2 * y, weights


def pruned(layer):
    nn.utils.prune.random_unstructured(layer, "weight", 0.5)
    return layer


UNLIKE = {
    "a class with a way of its own": (
        lambda: Doubled(6, 8),
        "a Doubled, which has its own forward",
    ),
    "an attention with a way of its own": (lambda: OwnAttention(8, 2), "an? OwnAttention, which"),
    "weight_norm": (
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(6, 8)),
        "computes its weight at each use",
    ),
    "weight_norm as it was": (
        lambda: nn.utils.weight_norm(nn.Conv2d(4, 6, 3)),
        "computes its weight at each use",
    ),
    "pruning": (lambda: pruned(nn.Linear(6, 8)), "computes its weight at each use"),
    "a lazy layer": (lambda: nn.LazyLinear(8), "no weight before its first input"),
    "a layer without numbers": (lambda: nn.Linear(6, 8, device="meta"), "on the meta device"),
}


@pytest.mark.parametrize("what", UNLIKE)
@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated")
@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_a_layer_whose_change_could_not_be_merged_is_refused(what):
    make, words = UNLIKE[what]
    net = nn.Sequential(make())
    with pytest.raises(ValueError, match=rf"LoRA: 0 .*{words}.*use exclude=\['0'\]"):
        inject_lora(net, "0", rank=2)
    assert lora_layers(net) == {}


def test_a_net_without_a_layer_for_adapters_is_refused():
    with pytest.raises(
        ValueError,
        match=r"a Conv1d, .*Embedding\); nearest: none: the module has no such layer; remove LoRA",
    ):
        inject_lora(nn.Sequential(nn.Conv1d(4, 4, 3)), "0", rank=2)


@pytest.mark.parametrize("name", ["linear", "embedding", "conv"])
def test_a_layer_is_called_by_torchs_name_of_its_input(name):
    net, x, before = made(name)
    assert torch.equal(net[0](input=x), before)


def test_a_layer_used_in_two_places_has_one_adapter():
    layer = nn.Linear(6, 6)
    net = nn.Sequential(layer, nn.Tanh(), layer).double()
    assert inject_lora(net, "*", rank=2) == ["0"]
    x = torch.randn(3, 6, dtype=DOUBLE)
    y = randomized(net)(x)
    merge_lora(net)
    assert (net(x) - y).abs().max() <= 1e-12
    assert net[0] is net[2]


@pytest.mark.parametrize("tied", [False, True])
def test_merged_weights_stay_frozen_or_trainable(tied):
    net = nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 9, bias=False))
    if tied:
        net[1].weight = net[0].weight
    inject_lora(net, "1", rank=2)
    merge_lora(net)
    assert not any(parameter.requires_grad for parameter in net.parameters())


def test_a_bfloat16_weight_is_merged_by_one_rounding():
    net = nn.Sequential(nn.Linear(64, 64)).bfloat16()
    inject_lora(net, "0", rank=2)
    exact = net[0].weight.double() + randomized(net)[0].lora_delta_weights()["weight"]
    merge_lora(net)
    assert torch.equal(net[0].weight, exact.bfloat16())
