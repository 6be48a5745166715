"""The decoder-only transformer: embed, add what attention and an MLP say, predict the next token.

    x = embed(tokens);   x += attention(norm(x));   x += mlp(norm(x));   logits = head(norm(x))

Without MLP and without `+=` it is one of the lecture's single attentions; with the rung `last` it
is a table of bigrams.

Axes: b batch, t time, d model, h heads, k head width, v vocabulary.
"""

import inspect
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ravine.errors import UsageError

from ..generation.kv_cache import KVCache, LayerKVCache
from ..generation.shared_prefix import SharedPrefixBatch, SharedPrefixLayer
from .attention import PROJECTIONS, ROPE_BASE, AttentionVariant, CausalAttention, RotaryEmbedding
from .cross_entropy import check_ids, chunked_cross_entropy, cross_entropy
from .moe import MixtureOfExperts
from .norm import RMSNorm

PositionalEncoding = Literal["rope", "learned", "sinusoidal", "none"]
Norm = Literal["rmsnorm", "layernorm", "none"]
Activation = Literal["relu2", "gelu", "gelu_tanh", "swiglu", "relu"]
Biases = Literal["none", "mlp", "all"]

DEFAULT_NORM_EPS = {
    "rmsnorm": None,
    "layernorm": 1e-5,
}  # by default; None: the machine epsilon of fp32
ACTIVATIONS = {
    "relu2": lambda x: F.relu(x).square(),
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),  # GPT-2's
    "swiglu": F.silu,
    "relu": F.relu,
}


def make_norm(norm: Norm, d_model: int, eps: float | None = None) -> nn.Module:
    """A norm over `d_model` channels, with `eps` under its root (the default is in `EPS`)."""
    if norm == "none":
        return nn.Identity()
    eps = DEFAULT_NORM_EPS[norm] if eps is None else eps
    return RMSNorm(d_model, eps) if norm == "rmsnorm" else nn.LayerNorm(d_model, eps)


def resolve_d_ff(d_model: int, activation: str, d_ff: int | None = None) -> int:
    """Hidden channels of an MLP: `d_ff`, by default 4d, and with SwiGLU 8d/3 rounded up to eights.

    mlp_width(384, "swiglu")  # 1024
    """
    return d_ff or (8 * math.ceil(d_model / 3) if activation == "swiglu" else 4 * d_model)


def sinusoid_table(context_length: int, d_model: int) -> Tensor:
    """sin(t / 10000^(2i/d)) in channel 2i, cos in 2i + 1 (Vaswani, 2017): (t d) in float64."""
    frequency = 10_000.0 ** (-torch.arange(0, d_model, 2, dtype=torch.float64) / d_model)
    angles = torch.outer(torch.arange(context_length, dtype=torch.float64), frequency)
    return torch.stack((angles.sin(), angles.cos()), -1).flatten(1)[:, :d_model]  # (t d)


class SinusoidalEncoding(nn.Module):
    """Fixed waves, one row for each time."""

    table: Tensor  # (t d)

    def __init__(self, context_length: int, d_model: int) -> None:
        """Tabulate them."""
        super().__init__()
        self.register_buffer(
            "table", sinusoid_table(context_length, d_model).float(), persistent=False
        )

    def forward(self, position_ids: Tensor) -> Tensor:
        """Rows of the table for integer times (t): (t d)."""
        return self.table[position_ids]


class MLP(nn.Module):
    """Two matrices around a nonlinearity, (b t d) -> (b t d), by default 8 d² weights.

    SwiGLU has three matrices, so its default width is 8d/3 instead of 4d, rounded up to eights.

    Args:
        d_model: channels d.
        activation: the nonlinearity.
        bias: whether the matrices have biases.
        d_ff: hidden channels.
    """

    def __init__(
        self,
        d_model: int,
        activation: Activation = "relu2",
        bias: bool = False,
        d_ff: int | None = None,
    ) -> None:
        """Make `up` and `down`, and SwiGLU's `gate`."""
        super().__init__()
        hidden_size = resolve_d_ff(d_model, activation, d_ff)
        self.activation = activation
        self.up = nn.Linear(d_model, hidden_size, bias)
        self.gate = nn.Linear(d_model, hidden_size, bias) if activation == "swiglu" else None
        self.down = nn.Linear(hidden_size, d_model, bias)

    def forward(self, x: Tensor) -> Tensor:
        """Transform each position of x (b t d) by itself."""
        act = ACTIVATIONS[self.activation]
        return self.down(act(self.up(x)) if self.gate is None else act(self.gate(x)) * self.up(x))


class TransformerBlock(nn.Module):
    """Attention and perhaps an MLP, each behind a norm, each added to the stream (b t d)."""

    def __init__(
        self,
        attention: CausalAttention,
        mlp: nn.Module | None,
        norm: Callable[[], nn.Module],
        dropout: float,
        residual: bool = True,
    ) -> None:
        """Put the parts together."""
        super().__init__()
        self.attention_norm, self.attention = norm(), attention
        self.mlp_norm, self.mlp = (None, None) if mlp is None else (norm(), mlp)
        self.dropout, self.residual = nn.Dropout(dropout), residual

    def forward(
        self, x: Tensor, layer_cache: LayerKVCache | SharedPrefixLayer | None = None
    ) -> Tensor:
        """Add both answers to x (b t d); without residual the attention's replaces x."""
        attention_output = self.dropout(self.attention(self.attention_norm(x), layer_cache))
        if layer_cache is not None:
            x, attention_output = (
                layer_cache.select_positions(x),
                layer_cache.select_positions(attention_output),
            )
        x = x + attention_output if self.residual else attention_output
        if self.mlp is None or self.mlp_norm is None:
            return x
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


class Transformer(nn.Module):
    """Tokens (b t) to logits (b t v).

    Args:
        vocabulary: number of different tokens.
        context: longest sequence, in tokens.
        layers: number of blocks.
        width: channels d of the stream.
        heads: attention heads; must divide the width.
        positions: how a token knows its place.
        norm: before each part, and before the head.
        qk_norm: give queries and keys unit RMS: a high learning rate cannot blow up the scores.
        mlp: the nonlinearity, or none for blocks of attention alone.
        dropout: on the embedding, the attention weights and both answers of a block.
        tied: use the embedding as the head.
        attention: how to compute it: torch's kernel, the formula, or the faster of the two.
        zero_init: start with silent blocks, uniform predictions (loss ln v exactly) and small
            embeddings; without it every weight starts as torch has it.
        rung: which attention of the lecture's ladder.
        residual: add the attention's answer to the stream, instead of passing it on alone.
        output: a matrix mixes the heads' answers.
        bias: which linear maps of the blocks have one.
        experts: a mixture of so many MLPs in the place of each; 0 for none.
        d_ff: hidden channels of each MLP; by default 4d, and 8d/3 rounded up to eights for swiglu.
        rope_base: rotary positions turn the channel pair i of k by t · rope_base^(-2i/k).
        norm_eps: added under the root of each norm, qk_norm included; by default 1e-5 for
            layernorm, and 1.19e-7, the machine epsilon of fp32, for rmsnorm and qk_norm.
    """

    times: Tensor | None = None  # (t): positions of the tokens, where they are a part of a text

    def __init__(
        self,
        vocabulary: int,
        context: int,
        layers: int = 4,
        width: int = 128,
        heads: int = 4,
        positions: PositionalEncoding = "rope",
        norm: Norm = "rmsnorm",
        qk_norm: bool = True,
        mlp: Activation | Literal["none"] = "relu2",
        dropout: float = 0.0,
        tied: bool = False,
        attention: Literal["auto", "sdpa", "explicit"] = "auto",
        zero_init: bool = True,
        rung: AttentionVariant = "qkv",
        residual: bool = True,
        output: bool = True,
        bias: Biases = "none",
        experts: int = 0,
        d_ff: int | None = None,
        rope_base: float = ROPE_BASE,
        norm_eps: float | None = None,
    ) -> None:
        """Check the sizes, then build."""
        super().__init__()
        sizes = {"vocabulary": vocabulary, "context": context, "layers": layers}
        check_sizes(positions, dropout, **sizes, width=width, heads=heads)
        has_norm = norm != "none" or qk_norm
        check_options(
            positions, mlp if not experts else "experts", has_norm, d_ff, rope_base, norm_eps
        )
        self.context, self.vocabulary = context, vocabulary
        self.embed = nn.Embedding(padded_vocab_size(vocabulary), width)
        self.place = nn.Embedding(context, width) if positions == "learned" else None
        if positions == "sinusoidal":
            self.place = SinusoidalEncoding(context, width)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleDict()  # a dict: names survive when a pipeline takes blocks away
        new_norm = partial(make_norm, norm, width, norm_eps)
        rotary = (
            RotaryEmbedding(context, width // heads, rope_base) if positions == "rope" else None
        )
        for layer in range(layers):
            block_attention = CausalAttention(
                width,
                heads,
                context,
                rope=positions == "rope",
                qk_norm=qk_norm,
                dropout=dropout,
                attn_implementation=attention,
                variant=rung,
                out_proj=output,
                bias=bias == "all",
                rope_base=rope_base,
                norm_eps=norm_eps,
                rotary=rotary,
            )
            block_mlp = None if mlp == "none" else MLP(width, mlp, bias != "none", d_ff)
            block_mlp = MixtureOfExperts(width, experts, d_ff=d_ff) if experts else block_mlp
            self.blocks[str(layer)] = TransformerBlock(
                block_attention, block_mlp, new_norm, dropout, residual
            )
        self.norm = new_norm()
        self.head = nn.Linear(width, padded_vocab_size(vocabulary), bias=False)
        if tied:
            self.head.weight = self.embed.weight
        self._initialize(tied, zero_init)

    def _initialize(self, tie_embeddings: bool, zero_init_residual: bool) -> None:
        """Over torch's own values, which the lecture keeps."""
        if tie_embeddings or zero_init_residual:
            # Adam moves every weight by lr: from N(0, 1), torch's own, embeddings stay random for
            # a whole quick run (0.04 nats lost); as a head they would start at certainty
            for embedding in (self.embed, self.place):
                if isinstance(embedding, nn.Embedding):
                    nn.init.normal_(embedding.weight, std=0.02 if tie_embeddings else 0.1)
        for name, parameter in self.named_parameters():  # a tied head is listed as the embedding
            zeroed_suffixes = ("out.weight", "down.weight", "head.weight", "experts.down")
            if zero_init_residual and (name.endswith(zeroed_suffixes) or name.endswith(".bias")):
                nn.init.zeros_(parameter)

    def forward(
        self,
        tokens: Tensor,
        cache: KVCache | SharedPrefixBatch | None = None,
        targets: Tensor | None = None,
    ) -> Tensor:
        """Logits (b t v) of the token after each of tokens (b t).

        With a cache, which was told what comes, only those after the newest ones: (b 1 v); with
        branches, whose tokens they are, those of each: (b n v). With targets (b t), the sum of
        their nats in the place of logits too large to exist.
        """
        return self.leave(self.through(self.enter(tokens, cache), None, cache), cache, targets)

    def enter(self, tokens: Tensor, cache: KVCache | SharedPrefixBatch | None = None) -> Tensor:
        """The stream (b t d) before the first block; ValueError for ids or lengths out of range."""
        if cache is None:
            self._check_tokens(tokens)
        x = self.embed(tokens)
        if self.place is not None:
            position_ids = self.times
            if position_ids is None:
                position_ids = torch.arange(tokens.shape[1], device=tokens.device)
            x = x + self.place(position_ids if cache is None else cache.position_ids(position_ids))
        return self.dropout(x)

    def _check_tokens(self, tokens: Tensor) -> None:
        length = tokens.shape[1] if self.times is None else 0  # with times, a part of a sequence
        if length > self.context:
            raise UsageError(
                f"{length} tokens, and the model sees {self.context} (its context); allowed: "
                f"{self.context} or less; cut the input, or build the model with context={length}"
            )
        if tokens.is_cuda and self.embed.num_embeddings > self.vocabulary:
            is_in_vocab = (tokens < self.vocabulary).all()  # a row of padding is no token
            torch._assert_async(is_in_vocab, "a token is outside the vocabulary")  # pyright: ignore
        check_ids("token", tokens, self.vocabulary)

    def through(
        self,
        x: Tensor,
        block_names: Sequence[str] | None = None,
        cache: KVCache | SharedPrefixBatch | None = None,
    ) -> Tensor:
        """The stream (b t d) after the blocks of these names, by default all."""
        for name in self.blocks if block_names is None else block_names:
            block = self.blocks[name]
            x = block(x) if cache is None else block(x, cache.layers[int(name)])
        return x

    def leave(
        self,
        x: Tensor,
        cache: KVCache | SharedPrefixBatch | None = None,
        targets: Tensor | None = None,
    ) -> Tensor:
        """What forward answers, from the stream (b t d) after the last block."""
        x = self.norm(x)
        if cache is not None:
            x = cache.select_outputs(x)
        if targets is None:
            return self.head(x)[..., : self.vocabulary]
        if type(self.head) is nn.Linear:
            return chunked_cross_entropy(x, self.head.weight, targets, self.vocabulary)
        return cross_entropy(
            self.head(x)[..., : self.vocabulary], targets, "sum"
        )  # a head with adapters

    def ends(self) -> tuple[list[str], list[str]]:
        """The modules that `enter` and `leave` need."""
        return ["embed", "place"], ["norm", "head"]

    def tp_plan(self) -> dict[str, str]:
        """How matrices split over tensor-parallel ranks: by heads and hidden channels.

        Embedding and head stay whole: they may share their storage. An attention is split if it
        learns query, key, value and output. In any other variant all heads of a part that is not
        learned exist on each rank, so the whole attention stays on each rank.
        """
        first = cast(TransformerBlock, next(iter(self.blocks.values())))
        styles = {"attention_norm": "sequence", "mlp_norm": "sequence"}
        if first.attention.is_fully_learned:
            qkv_projections = (f"attention.{name}" for name in PROJECTIONS)
            styles |= {"attention": "shared", **dict.fromkeys(qkv_projections, "colwise")}
            styles["attention.out"] = "rowwise"
        if isinstance(first.mlp, MLP):
            styles |= {"mlp": "shared", "mlp.up": "colwise", "mlp.gate": "colwise"}
            styles["mlp.down"] = "rowwise"
        plan = {f"blocks.*.{name}": style for name, style in styles.items()}
        if "blocks.*.attention" not in plan or "blocks.*.mlp" not in plan:
            return plan  # a part that is not split needs the whole sequence
        return {"dropout": "scatter", **plan, "norm": "gather"}


def with_defaults(net_kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a `Transformer`, those not given as its signature has them.

    complete({"width": 64})["layers"]  # 4
    """
    signature_params = inspect.signature(Transformer).parameters
    return {
        k: p.default for k, p in signature_params.items() if p.default is not p.empty
    } | net_kwargs


LARGE_VOCAB = 4096  # tokens: a larger vocabulary is padded, and its logits are not all made at once


def padded_vocab_size(vocab_size: int) -> int:
    """Rows of embedding and head: of a large vocabulary a multiple of 64, for tensor cores."""
    return vocab_size if vocab_size <= LARGE_VOCAB else -(-vocab_size // 64) * 64


def check_sizes(positional_encoding: str, dropout: float, **sizes: int) -> None:
    """Refuse sizes that make no net, in the words of a command line."""
    for name, size in sizes.items():
        if size < 1:
            raise UsageError(f"{name} is {size}; allowed: 1 or more; type --model.{name}=1")
    d_model, num_heads = sizes["width"], sizes["heads"]
    if not 0 <= dropout < 1:
        raise UsageError(f"dropout is {dropout}; allowed: 0 to below 1; type --model.dropout=0.1")
    step = 2 if positional_encoding == "rope" else 1  # rotary positions turn pairs of channels
    if d_model % (num_heads * step):
        divisors = (h for h in range(1, min(d_model, 2**16) + 1) if d_model % (h * step) == 0)
        valid_num_heads = sorted(divisors, key=lambda h: abs(h - num_heads))
        requirement = "equal and even parts (rope turns pairs)" if step == 2 else "equal parts"
        raise UsageError(
            f"heads {num_heads} does not split width {d_model} into {requirement}; allowed: "
            f"{', '.join(map(str, valid_num_heads[:5])) or 'none'}; "
            + (
                f"type --model.heads={valid_num_heads[0]}"
                if valid_num_heads
                else "type --model.width=128"
            )
        )


def check_options(
    positional_encoding: str,
    activation: str,
    has_norm: bool,
    d_ff: int | None,
    rope_base: float,
    norm_eps: float | None,
) -> None:
    """Refuse settings out of range, and those of a part that the net does not have."""
    if d_ff is not None and d_ff < 1:
        raise UsageError(f"d_ff is {d_ff}; allowed: 1 or more; type --model.d_ff=512")
    if d_ff is not None and activation == "none":
        raise UsageError(
            f"d_ff is {d_ff}, and mlp is none: there is no MLP of that width; allowed: null; "
            "type --model.mlp=relu2, or leave d_ff out"
        )
    if not 1 < rope_base < math.inf:
        raise UsageError(
            f"rope_base is {rope_base}; allowed: above 1; type --model.rope_base=10000"
        )
    if rope_base != ROPE_BASE and positional_encoding != "rope":
        raise UsageError(
            f"rope_base is {rope_base:g}, and positions is {positional_encoding}, which turns "
            "nothing; "
            "type --model.positions=rope, or leave rope_base out"
        )
    if norm_eps is not None and not 0 <= norm_eps < math.inf:
        raise UsageError(f"norm_eps is {norm_eps}; allowed: 0 or more; type --model.norm_eps=1e-5")
    if norm_eps is not None and not has_norm:
        raise UsageError(
            f"norm_eps is {norm_eps:g}, and norm is none; type --model.norm=rmsnorm, or leave "
            "norm_eps out"
        )
