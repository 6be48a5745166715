"""The attention variants of the lecture: visible tokens, parameters and loss of each."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor

from ravine.errors import UsageError
from ravine.lightning_modules import LanguageModel, model_stats
from ravine.lightning_modules.nn import Transformer
from ravine.lightning_modules.nn.attention import LEARNED_PROJECTIONS, CausalAttention

CONFIGS = Path(__file__).parents[3] / "configs" / "shakespeare"
PATTERNS = ("bigram", "running_mean", "attention_*", "transformer_*")
PRESETS = sorted(path.stem for name in PATTERNS for path in CONFIGS.glob(f"{name}.yaml"))
assert len(PRESETS) == 9
SHAPES = [
    {},
    {
        "positional_encoding": "learned",
        "norm": "layernorm",
        "activation": "gelu_tanh",
        "bias": "all",
        "tie_embeddings": True,
    },
    {
        "positional_encoding": "sinusoidal",
        "activation": "swiglu",
        "num_heads": 1,
        "bias": "mlp",
        "qk_norm": False,
    },
    {
        "positional_encoding": "none",
        "norm": "none",
        "activation": "none",
        "out_proj": False,
        "residual": False,
    },
]


def preset(name: str) -> dict[str, Any]:
    return yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())


def lecture(name: str, **other: Any) -> dict[str, Any]:
    return preset(name)["model"]["init_args"] | other


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: s.get("positional_encoding", "rope"))
@pytest.mark.parametrize("variant", LEARNED_PROJECTIONS)
def test_no_logit_depends_on_a_later_token(variant: str, shape: dict[str, Any]) -> None:
    """Exactly 0: gradients of each position's logits with respect to each token's embedding."""
    net = Transformer(
        7,
        6,
        num_layers=2,
        d_model=8,
        zero_init_residual=False,
        attention_variant=variant,
        **{"num_heads": 2} | shape,
    )
    for attention in ("eager", "sdpa"):
        for block in net.blocks.values():
            block.attention.attention_fn = CausalAttention(
                8, 2, 6, attn_implementation=attention
            ).attention_fn

        def logits(embedded: Tensor) -> Tensor:
            net.embed.forward = lambda tokens: embedded  # type: ignore[method-assign]
            return net(torch.zeros(1, 6, dtype=torch.long)).sum(-1)[0]  # (t)

        jacobian = torch.autograd.functional.jacobian(logits, torch.randn(1, 6, 8))  # (t 1 t d)
        reach = jacobian.abs().sum(-1)[:, 0]  # (t t)
        assert (reach.triu(1) == 0).all()
        assert (reach.diagonal() > 0).all()


@pytest.mark.parametrize("variant", LEARNED_PROJECTIONS)
def test_attention_weights_add_up_to_one(variant: str) -> None:
    attention, x = CausalAttention(8, 2, 6, variant=variant), torch.randn(3, 6, 8)
    weights = attention.compute_weights(x)
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, 2, 6))
    values = attention.project_qkv(x)[2]
    mixed = (weights @ values).transpose(1, 2).flatten(2)  # (b t d)
    torch.testing.assert_close(attention.out_proj(mixed), attention(x))


def test_an_unknown_variant_is_refused_with_the_known_names(monkeypatch: Any) -> None:
    names = ", ".join(LEARNED_PROJECTIONS)
    with pytest.raises(
        UsageError,
        match=f"attention_variant='qkvv' .*; allowed: {names}; use attention_variant='qkv'",
    ):
        Transformer(7, 6, d_model=8, num_heads=2, attention_variant="qkvv")
    monkeypatch.setitem(LEARNED_PROJECTIONS, "kv", ("keys", "value"))
    with pytest.raises(
        UsageError, match=r"'kv'\] has the unknown projection 'keys'; allowed: query"
    ):
        Transformer(7, 6, d_model=8, num_heads=2, attention_variant="kv")


def by_loops(x: Tensor, query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    """Attention as the paper writes it, one number at a time, of x (t d)."""
    t, d = x.shape
    k, out = d // heads, torch.zeros_like(x)
    for h in range(heads):
        for i in range(t):
            scores = [
                sum(float(query[i, h * k + c] * key[j, h * k + c]) for c in range(k)) / math.sqrt(k)
                for j in range(i + 1)
            ]
            total = sum(math.exp(s) for s in scores)
            for c in range(k):
                out[i, h * k + c] = sum(
                    math.exp(s) / total * float(value[j, h * k + c]) for j, s in enumerate(scores)
                )
    return out


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
@pytest.mark.parametrize("variant", LEARNED_PROJECTIONS)
def test_every_attention_variant_equals_its_formula(variant: str, kernel: str) -> None:
    attention = CausalAttention(
        8, 2, 5, False, False, attn_implementation=kernel, variant=variant
    ).double()
    x = torch.randn(5, 8, dtype=torch.float64)
    w = {name: getattr(attention, name).weight.detach() for name in LEARNED_PROJECTIONS[variant]}
    query = x @ w["query"].T if "query" in w else x
    key = query if variant == "shared_qk" else x @ w["key"].T if "key" in w else x
    value = x @ w["value"].T if "value" in w else x
    if variant == "mean":
        expected = torch.stack([x[: i + 1].mean(0) for i in range(5)])
    else:
        expected = x if variant == "identity" else by_loops(x, query, key, value, heads=2)
    found = attention(x[None])[0]
    assert (found - attention.out_proj(expected)).abs().max() < 1e-10


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_has_the_lecture_s_number_of_parameters(name: str) -> None:
    arguments = lecture(name)
    layers, d, v = arguments["num_layers"], 256, 50304 if name == "transformer_bpe" else 65
    expected = 2 * v * d + {
        "bigram": 0,
        "running_mean": 0,
        "attention_embedding": 0,
        "attention_shared_qk": d**2,
        "attention_qk": 2 * d**2,
        "attention_qkv": 3 * d**2,
        "attention_only": 3 * layers * d**2,
        "transformer_char": 11 * layers * d**2 + 5 * layers * d,
        "transformer_bpe": 11 * layers * d**2 + 5 * layers * d,
    }[name]  # fmt: skip
    model = LanguageModel(v, 128, **arguments)
    with torch.device("meta"):
        model.configure_model()
    assert sum(p.numel() for p in model.parameters()) == expected
    assert sum(model_stats.count_parameters(v, 128, **arguments).values()) == expected
    if name == "transformer_char":
        assert model.param_formula() == "2|V|d + 11Ld² + 5Ld"


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: s.get("positional_encoding", "rope"))
def test_the_number_of_parameters_equals_the_formula(shape: dict[str, Any]) -> None:
    for vocabulary in (65, 5000):  # the second is padded
        net = Transformer(vocabulary, 16, num_layers=3, d_model=24, **{"num_heads": 2} | shape)
        counted = sum(p.numel() for p in net.parameters())
        terms = model_stats.count_parameters(
            vocabulary, 16, num_layers=3, d_model=24, **{"num_heads": 2} | shape
        )
        assert sum(terms.values()) == counted


def test_the_formula_has_the_defaults_of_the_net() -> None:
    counted = sum(p.numel() for p in Transformer(65, 16).parameters())
    assert sum(model_stats.count_parameters(65, 16).values()) == counted


def test_presets_differ_only_in_attention_variant_and_depth() -> None:
    first = preset(PRESETS[0])
    ladder = {"num_layers", "attention_variant", "residual", "activation", "bias"}
    for name in set(PRESETS) - {"transformer_bpe"}:
        other = preset(name)
        assert (other["data"], other["trainer"]) == (first["data"], first["trainer"])
        differing = dict(other["model"]["init_args"].items() ^ first["model"]["init_args"].items())
        assert set(differing) <= ladder


@pytest.fixture(scope="module")
def shakespeare() -> tuple[Tensor, Tensor]:
    """Training and validation characters of the real text, or of the embedded one."""
    from ravine.datamodules import TextDataModule

    data = TextDataModule(source="auto")
    data.setup("fit")
    tokens = data.corpus.tokens.long()
    split = int(0.9 * len(tokens))
    return tokens[:split], tokens[split:]


def train(
    name: str, text: tuple[Tensor, Tensor], lr: float, steps: int, b: int, **how: Any
) -> float:
    """Validation nats of a preset at width 128, t 64, after some steps of Adam."""
    tokens, rest = text
    torch.manual_seed(0)
    net = Transformer(int(torch.cat(text).max()) + 1, 64, **lecture(name, d_model=128, **how))
    optimizer = torch.optim.Adam(net.parameters(), lr=lr, fused=True)
    for _ in range(steps):
        window = tokens[torch.randint(len(tokens) - 64, (b, 1)) + torch.arange(65)]
        loss = F.cross_entropy(net(window[:, :-1]).flatten(0, 1), window[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    size = (len(rest) - 1) // 64
    inputs, targets = rest[: size * 64].view(size, 64), rest[1 : size * 64 + 1].view(size, 64)
    with torch.no_grad():
        parts = [
            F.cross_entropy(net(x).flatten(0, 1), y.flatten(), reduction="sum")
            for x, y in zip(inputs.split(128), targets.split(128), strict=True)
        ]
    return float(sum(parts)) / size / 64


def test_each_stage_of_the_lecture_predicts_better_than_the_one_before(
    shakespeare: tuple[Tensor, Tensor],
) -> None:
    average, last, attention, blocks = (
        train(name, shakespeare, 3e-4, 250, 16, **how)
        for name, how in (
            ("running_mean", {}),
            ("bigram", {}),
            ("attention_only", {"num_layers": 2}),
            ("transformer_char", {"num_layers": 2}),
        )
    )
    assert average - 0.2 > last > attention + 0.1 > attention > blocks + 0.05


def test_the_last_embedding_learns_the_bigrams(shakespeare: tuple[Tensor, Tensor]) -> None:
    """Within 0.02 nats of counting them: nothing but the last token is used, and all of it."""
    tokens, rest = shakespeare
    v = int(torch.cat(shakespeare).max()) + 1
    counts = torch.ones(v, v, dtype=torch.float64)
    counts.index_put_((tokens[:-1], tokens[1:]), torch.ones(1, dtype=torch.float64), True)
    counted = -(counts / counts.sum(1, True)).log()[rest[:-1], rest[1:]].mean().item()
    learned = train("bigram", shakespeare, 3e-3, 1000, 32)
    assert abs(learned - counted) < 0.02
