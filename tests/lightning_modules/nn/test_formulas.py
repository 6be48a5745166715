"""The layers of a transformer against loops written from the papers' formulas, in float64.

Attention and RoPE are in test_transformer.py and test_attention_variants.py; here are positions,
norms, MLPs, and a whole net, one number at a time.
"""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from ravine.lightning_modules.nn import Transformer
from ravine.lightning_modules.nn.attention import reference_attention, rope_tables
from ravine.lightning_modules.nn.transformer import MLP, make_norm, sinusoid_table

V, T, D, H = 7, 5, 8, 2
EPS = {"rmsnorm": torch.finfo(torch.float64).eps, "layernorm": 1e-5}


def norm_of(x: list[float], kind: str, gain: Tensor | None, shift: Tensor | None) -> list[float]:
    """Root mean square (Zhang, 2019), or mean and variance (Ba, 2016), of one position."""
    if kind == "none":
        return x
    mean = sum(x) / len(x) if kind == "layernorm" else 0.0
    size = math.sqrt(sum((a - mean) ** 2 for a in x) / len(x) + EPS[kind])
    return [
        (a - mean) / size * (1.0 if gain is None else float(gain[i]))
        + (0.0 if shift is None else float(shift[i]))
        for i, a in enumerate(x)
    ]


def line(module: Any, x: list[float]) -> list[float]:
    """W x + b."""
    bias = module.bias if module.bias is not None else torch.zeros(len(module.weight))
    return [
        sum(float(w) * a for w, a in zip(row, x, strict=True)) + float(b)
        for row, b in zip(module.weight, bias, strict=True)
    ]


ACTIVATIONS = {
    "relu": lambda a: max(a, 0.0),
    "relu2": lambda a: max(a, 0.0) ** 2,
    "gelu": lambda a: a * 0.5 * (1 + math.erf(a / math.sqrt(2))),
    "gelu_tanh": lambda a: (
        0.5 * a * (1 + math.tanh(math.sqrt(2 / math.pi) * (a + 0.044715 * a**3)))
    ),
    "swiglu": lambda a: a / (1 + math.exp(-a)),
}


def mlp_of(mlp: Any, x: list[float], kind: str) -> list[float]:
    hidden = line(mlp.up, x)
    act = ACTIVATIONS[kind]
    if kind == "swiglu":
        hidden = [act(g) * h for g, h in zip(line(mlp.gate, x), hidden, strict=True)]
    else:
        hidden = [act(h) for h in hidden]
    return line(mlp.down, hidden)


def attention_of(attention: Any, rows: list[list[float]], rope: bool, qk_norm: bool) -> list[Any]:
    k = D // H
    parts = [[line(m, x) for x in rows] for m in (attention.query, attention.key, attention.value)]
    for which in (0, 1):
        for t, x in enumerate(parts[which]):
            heads = [x[h * k : (h + 1) * k] for h in range(H)]
            if qk_norm:
                heads = [norm_of(head, "rmsnorm", None, None) for head in heads]
            if rope:
                for head in heads:
                    for i in range(k // 2):
                        angle = t * 10_000 ** (-2 * i / k)
                        a, b = head[i], head[i + k // 2]
                        head[i] = a * math.cos(angle) - b * math.sin(angle)
                        head[i + k // 2] = b * math.cos(angle) + a * math.sin(angle)
            parts[which][t] = [a for head in heads for a in head]
    answers = []
    for t in range(len(rows)):
        answer = []
        for h in range(H):
            at = slice(h * k, (h + 1) * k)
            scores = [
                sum(q * w for q, w in zip(parts[0][t][at], parts[1][s][at], strict=True))
                / math.sqrt(k)
                for s in range(t + 1)
            ]
            total = sum(map(math.exp, scores))
            for i in range(h * k, (h + 1) * k):
                answer.append(
                    sum(math.exp(z) / total * parts[2][s][i] for s, z in enumerate(scores))
                )
        answers.append(line(attention.out_proj, answer))
    return answers


def run_net(net: Any, tokens: list[int], shape: dict[str, Any]) -> list[list[float]]:
    def normed(module: Any, x: list[float]) -> list[float]:
        gain, shift = getattr(module, "weight", None), getattr(module, "bias", None)
        return norm_of(x, shape["norm"], gain, shift)

    rows = [[float(a) for a in net.embed.weight[token]] for token in tokens]
    for t, x in enumerate(rows):
        for i in range(D):
            if shape["positional_encoding"] == "learned":
                x[i] += float(net.pos_embed.weight[t, i])
            if shape["positional_encoding"] == "sinusoidal":
                angle = t / 10_000 ** (2 * (i // 2) / D)
                x[i] += math.cos(angle) if i % 2 else math.sin(angle)
    for block in net.blocks.values():
        inner = [normed(block.attention_norm, x) for x in rows]
        rope = shape["positional_encoding"] == "rope"
        for x, answer in zip(
            rows, attention_of(block.attention, inner, rope, shape["qk_norm"]), strict=True
        ):
            x[:] = [a + b for a, b in zip(x, answer, strict=True)]
            more = mlp_of(block.mlp, normed(block.mlp_norm, x), shape["activation"])
            x[:] = [a + b for a, b in zip(x, more, strict=True)]
    return [line(net.head, normed(net.norm, x)) for x in rows]


NAMES = ("positional_encoding", "norm", "activation", "qk_norm", "bias")
SHAPES: list[dict[str, Any]] = [
    dict(zip(NAMES, values, strict=True))
    for values in (
        ("rope", "rmsnorm", "relu2", True, "none"),
        ("learned", "layernorm", "gelu_tanh", False, "all"),  # GPT-2
        ("sinusoidal", "rmsnorm", "swiglu", False, "mlp"),
        ("none", "none", "relu", False, "mlp"),  # the lecture
        ("learned", "layernorm", "gelu", True, "none"),
    )
]


@pytest.mark.parametrize(
    "shape", SHAPES, ids=lambda s: f"{s['positional_encoding']}, {s['activation']}"
)
def test_a_full_net_equals_its_formula(shape: dict[str, Any]) -> None:
    torch.manual_seed(0)
    net: Any = Transformer(
        V, T, num_layers=2, d_model=D, num_heads=H, zero_init_residual=False, **shape
    ).double()
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.copy_(torch.randn_like(parameter))
        if shape["positional_encoding"] == "sinusoidal":  # tables are kept in fp32
            net.pos_embed.table = sinusoid_table(T, D)
        for block in net.blocks.values():
            if shape["positional_encoding"] == "rope":
                block.attention.rotary.cosine, block.attention.rotary.sine = rope_tables(T, D // H)
        tokens = torch.randint(V, (1, T))
        expected = torch.tensor(run_net(net, tokens[0].tolist(), shape), dtype=torch.float64)
        assert (net(tokens)[0] - expected).abs().max() < 1e-10


@pytest.mark.parametrize("kind", ["rmsnorm", "layernorm", "none"])
def test_each_norm_is_its_formula(kind: str) -> None:
    norm: Any = make_norm(kind, D).double()
    x = torch.randn(3, D, dtype=torch.float64) * 4 + 1
    expected = [norm_of(row.tolist(), kind, None, None) for row in x]
    assert (norm(x) - torch.tensor(expected, dtype=torch.float64)).abs().max() < 1e-10


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_each_mlp_is_its_formula(kind: Any) -> None:
    mlp = MLP(D, kind, bias=True).double()
    x = torch.randn(3, D, dtype=torch.float64)
    with torch.no_grad():
        expected = [mlp_of(mlp, row.tolist(), kind) for row in x]
    assert (mlp(x) - torch.tensor(expected, dtype=torch.float64)).abs().max() < 1e-10


def test_time_embeddings_are_sines_and_cosines_of_decreasing_frequency() -> None:
    table = sinusoid_table(50, 6)
    for t in range(50):
        for i in range(3):
            angle = t / 10_000 ** (2 * i / 6)
            assert abs(float(table[t, 2 * i]) - math.sin(angle)) < 1e-10
            assert abs(float(table[t, 2 * i + 1]) - math.cos(angle)) < 1e-10


def test_explicit_attention_drops_weights_and_keeps_their_sum_on_average():
    query, key = torch.randn(2, 1, 1, 400, 8)
    answer = reference_attention(query, key, torch.ones(1, 1, 400, 1), dropout=0.5)
    assert answer.std() > 0.05
    assert abs(answer.mean() - 1) < 0.1
