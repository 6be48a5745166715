"""The transformer equals its formula: each layer against loops, and the net by invariances."""

import math
import re
from copy import deepcopy
from fnmatch import fnmatch

import pytest
import torch
import torch.nn.functional as F

from ravine.errors import UsageError
from ravine.lightning_modules.model_stats import count_parameters
from ravine.lightning_modules.nn.attention import (
    ATTENTION_FNS,
    CausalAttention,
    apply_rope,
    rope_tables,
)
from ravine.lightning_modules.nn.transformer import (
    MLP,
    SinusoidalEncoding,
    Transformer,
    resolve_d_ff,
)

V, T = 11, 8
EVERYTHING = {
    "defaults": {},
    "learned, layernorm, gelu": {
        "positional_encoding": "learned",
        "norm": "layernorm",
        "activation": "gelu",
    },
    "sinusoidal, swiglu, eager": {
        "positional_encoding": "sinusoidal",
        "activation": "swiglu",
        "attn_implementation": "eager",
    },
    "nothing, no norm, relu": {
        "positional_encoding": "none",
        "norm": "none",
        "activation": "relu",
        "qk_norm": False,
    },
    "tied": {"tie_embeddings": True},
}
every_kind = pytest.mark.parametrize("kind", EVERYTHING.values(), ids=EVERYTHING)


def small(**kwargs) -> Transformer:
    """Two layers in float64 whose every weight is at work."""
    torch.manual_seed(0)
    shape = {"num_layers": 2, "d_model": 16, "num_heads": 2, "zero_init_residual": False} | kwargs
    return Transformer(V, T, **shape).double()


def tokens(rows: int = 3) -> torch.Tensor:
    return torch.randint(V, (rows, T), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("attend", ATTENTION_FNS.values(), ids=ATTENTION_FNS)
def test_attention_is_the_formula_written_in_loops(attend):
    g = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 2, T, 4, dtype=torch.float64, generator=g)
    expected = torch.zeros_like(v)
    for b in range(2):
        for h in range(2):
            for t in range(T):
                scores = [float(q[b, h, t] @ k[b, h, s]) / math.sqrt(4) for s in range(t + 1)]
                total = sum(math.exp(score) for score in scores)
                for s, score in enumerate(scores):
                    expected[b, h, t] += math.exp(score) / total * v[b, h, s]
    torch.testing.assert_close(attend(q, k, v, 0.0), expected, rtol=0, atol=1e-12)


def test_auto_attention_in_bf16_on_a_cpu_is_the_formula_to_the_bit():
    q = torch.randn(1, 2, T, 4, dtype=torch.bfloat16)
    assert ATTENTION_FNS["auto"](q, q, q, 0.0).equal(ATTENTION_FNS["eager"](q, q, q, 0.0))


def test_rope_multiplies_channel_pairs_by_a_unit_complex_number():
    k = 6
    x = torch.randn(1, 1, T, k, dtype=torch.float64)
    turned = apply_rope(x, *rope_tables(T, k))
    for t in range(T):
        for i in range(k // 2):
            angle = t * 10_000 ** (-2 * i / k)
            z = complex(x[0, 0, t, i], x[0, 0, t, i + k // 2])
            z *= complex(math.cos(angle), math.sin(angle))
            pair = complex(turned[0, 0, t, i], turned[0, 0, t, i + k // 2])
            assert abs(pair - z) < 1e-12


def test_rope_scores_depend_on_the_distance_alone():
    query, key = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64).expand(2, 1, 1, T, 8)
    tables = rope_tables(T, 8)
    scores = (apply_rope(query, *tables) @ apply_rope(key, *tables).mT)[0, 0]  # (t t)
    for distance in range(T):
        diagonal = scores.diagonal(-distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))
    assert scores[3, 0] != pytest.approx(scores[0, 0])


def test_sinusoidal_positions_equal_the_loop_of_the_paper():
    table = SinusoidalEncoding(T, 6)(torch.arange(T))
    for t in range(T):
        for i in range(3):
            angle = t / 10_000 ** (2 * i / 6)
            assert table[t, 2 * i].item() == pytest.approx(math.sin(angle), abs=1e-6)
            assert table[t, 2 * i + 1].item() == pytest.approx(math.cos(angle), abs=1e-6)


def test_each_mlp_is_its_formula():
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    for activation, formula in {
        "relu2": lambda m: m.down(m.up(x).clamp(min=0) ** 2),
        "relu": lambda m: m.down(m.up(x).clamp(min=0)),
        "gelu": lambda m: m.down(m.up(x) * (1 + (m.up(x) / math.sqrt(2)).erf()) / 2),
        "swiglu": lambda m: m.down(m.gate(x) * m.gate(x).sigmoid() * m.up(x)),
    }.items():
        mlp = MLP(6, activation).double()
        torch.testing.assert_close(mlp(x), formula(mlp), rtol=0, atol=1e-12)


def test_with_qk_norm_scores_do_not_depend_on_the_length_of_queries_and_keys():
    x = torch.randn(2, T, 16, dtype=torch.float64)
    for qk_norm in (True, False):
        attention = CausalAttention(16, 2, T, qk_norm=qk_norm).double()
        before = attention(x)
        with torch.no_grad():
            attention.query.weight *= 100
        assert torch.allclose(attention(x), before, atol=1e-6) is qk_norm


@every_kind
def test_logits_do_not_depend_on_later_tokens(kind):
    """The gradient of logits at time t with respect to later embeddings is exactly zero."""
    net = small(**kind)
    seen = {}
    net.embed.register_forward_hook(lambda module, args, out: seen.update(x=out))
    logits = net(tokens())
    for t in range(T):
        (gradient,) = torch.autograd.grad(logits[:, t].sum(), seen["x"], retain_graph=True)
        assert (gradient[:, t + 1 :] == 0).all()
        assert (gradient[:, : t + 1] != 0).any(-1).all()


@every_kind
def test_parameters_are_counted_by_the_formula(kind):
    d, layers = 24, 3
    net = small(num_layers=layers, d_model=d, **kind)
    hidden = 3 * d * (8 * d // 3) if kind.get("activation") == "swiglu" else 2 * d * 4 * d
    gains = {"rmsnorm": d, "layernorm": 2 * d, "none": 0}[kind.get("norm", "rmsnorm")]
    expected = layers * (4 * d * d + hidden + 2 * gains) + gains
    expected += V * d * (1 if kind.get("tie_embeddings") else 2)
    expected += T * d if kind.get("positional_encoding") == "learned" else 0
    assert sum(p.numel() for p in net.parameters()) == expected


@pytest.mark.parametrize("experts", [0, 3])
@pytest.mark.parametrize("bias", ["none", "all"])
@pytest.mark.parametrize("mlp", ["swiglu", "gelu"])
def test_d_ff_is_the_hidden_width_of_every_mlp_and_is_counted(mlp, bias, experts):
    shape = {"d_model": 16, "activation": mlp, "bias": bias, "num_experts": experts, "d_ff": 10}
    net = small(**shape)
    inner = net.blocks["1"].mlp.experts if experts else net.blocks["1"].mlp
    up, down = (getattr(part, "weight", part) for part in (inner.up, inner.down))
    assert 10 in up.shape
    assert 10 in down.shape
    counted = sum(p.numel() for p in net.parameters())
    assert sum(count_parameters(V, T, num_layers=2, num_heads=2, **shape).values()) == counted
    settings = {"num_layers": 2, "d_model": 16, "num_heads": 2, "activation": mlp}
    default = resolve_d_ff(16, mlp)
    assert count_parameters(V, T, **settings, d_ff=default) == count_parameters(V, T, **settings)


def test_rope_base_slows_the_rotation_of_the_later_pairs():
    actual, settings = small(rope_base=500.0), small()
    for block in settings.blocks.values():
        cosine, sine = rope_tables(T, 8, 500.0)
        block.attention.rotary.cosine, block.attention.rotary.sine = cosine, sine
    assert torch.allclose(actual(tokens()), settings(tokens()), atol=1e-6)
    assert not torch.allclose(actual(tokens()), small()(tokens()), atol=1e-3)


@pytest.mark.parametrize("norm", ["rmsnorm", "layernorm"])
def test_norm_eps_is_in_every_root_in_training_and_in_evaluation(norm):
    net = small(norm=norm, norm_eps=0.5)
    x = torch.randn(3, T, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    centred = x - x.mean(-1, keepdim=True) if norm == "layernorm" else x
    expected = centred / (centred.square().mean(-1, keepdim=True) + 0.5).sqrt()
    block = net.blocks["0"]
    query = block.attention.query(x).unflatten(-1, (2, 8)).transpose(1, 2)
    unit = query / (query.square().mean(-1, keepdim=True) + 0.5).sqrt()
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            for part in (net.norm, block.attention_norm, block.mlp_norm):
                assert torch.allclose(part(x), expected)
            turned, _, _ = block.attention.project_qkv(x)
            assert torch.allclose(turned.norm(dim=-1), unit.norm(dim=-1))


@pytest.mark.parametrize("kind", [k for k in EVERYTHING.values() if not k.get("tie_embeddings")])
def test_an_untrained_net_with_a_zero_head_guesses_uniformly(kind):
    net = small(zero_init_residual=True, **kind)
    loss = F.cross_entropy(net(tokens()).flatten(0, 1), tokens().flatten())
    assert loss.item() == pytest.approx(math.log(V), abs=1e-12)


def test_blocks_with_zero_projections_are_the_identity_and_have_gradients():
    net = small(zero_init_residual=True, tie_embeddings=True)
    x = torch.randn(2, T, 16, dtype=torch.float64)
    assert net.blocks["0"](x).equal(x)
    net.blocks["0"](x).square().sum().backward()
    assert net.blocks["0"].attention.out_proj.weight.grad.any()
    assert net.blocks["0"].mlp.down.weight.grad.any()


def test_a_tied_head_is_the_embedding_and_is_counted_once():
    net = small(tie_embeddings=True)
    assert net.head.weight is net.embed.weight
    assert "head.weight" not in dict(net.named_parameters())


def test_without_positions_a_shuffled_past_gives_the_same_logits_and_with_them_others():
    sequence = tokens(1)
    shuffled = torch.cat((sequence[:, :-1].flip(1), sequence[:, -1:]), 1)
    for positions in ("none", "rope", "learned", "sinusoidal"):
        net = small(positional_encoding=positions, num_layers=1)
        same = torch.allclose(net(sequence)[:, -1], net(shuffled)[:, -1], atol=1e-12)
        assert same is (positions == "none")


def test_dropout_acts_in_training_only():
    net = small(dropout=0.5)
    assert not net(tokens()).equal(net(tokens()))
    net.eval()
    assert net(tokens()).equal(net(tokens()))


def test_attn_implementation_can_be_any_callable():
    net = small()
    expected = net(tokens())
    calls = []
    for block in net.blocks.values():
        inner = block.attention.attention_fn
        block.attention.attention_fn = lambda *args, inner=inner: (calls.append(1), inner(*args))[1]
    assert net(tokens()).equal(expected)
    assert len(calls) == 2


def test_a_slice_of_the_heads_gives_its_part_of_the_sum():
    """What tensor parallelism does: columns of q, k, v and rows of the output projection."""
    whole = CausalAttention(16, 4, T).double()
    x = torch.randn(2, T, 16, dtype=torch.float64)
    parts = []
    for half in (slice(0, 8), slice(8, 16)):
        part = deepcopy(whole)
        for projection in (part.query, part.key, part.value):
            projection.weight = torch.nn.Parameter(projection.weight[half])
        part.out_proj.weight = torch.nn.Parameter(part.out_proj.weight[:, half])
        parts.append(part(x))
    torch.testing.assert_close(sum(parts), whole(x), rtol=0, atol=1e-12)


@every_kind
def test_the_tensor_parallel_plan_names_every_matrix_of_the_blocks_once(kind):
    net = small(**kind)
    plan = net.tensor_parallel_plan()
    for name, module in net.blocks.named_modules(prefix="blocks"):
        if isinstance(module, torch.nn.Linear):
            assert len([p for p in plan if fnmatch(name, p)]) == 1, name


@pytest.mark.parametrize("positions", ["rope", "learned", "sinusoidal", "none"])
def test_more_tokens_than_the_context_are_refused_in_one_line(positions):
    net = small(positional_encoding=positions)
    net(torch.zeros(1, T, dtype=torch.int64))
    with pytest.raises(
        ValueError, match=r"9 tokens, more than context_length=8; allowed: 8 tokens"
    ):
        net(torch.zeros(1, T + 1, dtype=torch.int64))
    with pytest.raises(ValueError, match="9 tokens"):
        net(torch.zeros(1, T + 1, dtype=torch.int64), None, torch.zeros(1, T + 1))


@pytest.mark.parametrize(("vocabulary", "wrong"), [(V, V), (V, -1), (5000, 5010), (5000, -2)])
def test_a_token_outside_the_vocabulary_is_refused_even_where_the_table_has_a_row(
    vocabulary, wrong
):
    net = Transformer(vocabulary, T, num_layers=1, d_model=8, num_heads=2)
    message = rf"token {wrong} at index \[0, 1\] of shape \[1, 3\] is out of range; allowed: 0 to"
    with pytest.raises(ValueError, match=message):
        net(torch.tensor([[0, wrong, 1]]))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            {"num_heads": 3},
            "num_heads=3 does not divide d_model=16; allowed: 2.*; type --model.num_heads=2$",
        ),
        ({"num_heads": 7, "d_model": 10**15}, "allowed: 8.*type --model.num_heads=8$"),
        ({"num_heads": 16}, "RoPE needs .* width of 1; allowed: 8.*type --model.num_heads=8$"),
        ({"d_model": 3, "num_heads": 1}, "use d_model=128; type --model.d_model=128$"),
        ({"num_layers": 0}, "num_layers=0 is too small; allowed: 1 or more; use num_layers=1"),
        ({"d_model": -16}, "d_model=-16 is too small; allowed: 1 or more"),
        ({"num_heads": 0}, "num_heads=0 is too small; allowed: 1 or more"),
        (
            {"dropout": 1.0},
            "dropout=1.0 is out of range; allowed: 0 to below 1; .*; type --model.dropout=0.1$",
        ),
        ({"d_ff": 0}, "d_ff=0 is too small; allowed: 1 or more"),
        ({"d_ff": 8, "activation": "none"}, "d_ff=8 has no effect with activation='none'"),
        ({"rope_base": 1.0}, "rope_base=1.0 is out of range; allowed: above 1"),
        (
            {"rope_base": 5e5, "positional_encoding": "none"},
            "rope_base=500000 has no effect with positional_encoding='none'",
        ),
        ({"norm_eps": -1e-5}, "norm_eps=-1e-05 is out of range; allowed: 0 or more"),
        (
            {"norm_eps": 1e-5, "norm": "none", "qk_norm": False},
            "norm_eps=1e-05 has no effect with norm='none'",
        ),
    ],
)
def test_invalid_net_sizes_are_refused(wrong, message):
    with pytest.raises(UsageError) as error:
        small(**wrong)
    assert re.search(f"^Transformer: .*{message}", f"{error.value}; type {error.value.flag}")
