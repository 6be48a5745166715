"""Decoder-only transformer (GPT): embedding, attention and MLP blocks, next-token logits.

    x = embed(tokens);   x += attention(norm(x));   x += mlp(norm(x));   logits = head(norm(x))

Without MLP and residual connections it is one of the single attention layers of lecture 5. With
`attention_variant="identity"` it is a bigram table.

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

from ravine.errors import UsageError, check_at_least_one

from ..generation.kv_cache import KVCache, LayerKVCache
from ..generation.shared_prefix import SharedPrefixBatch, SharedPrefixLayer
from .attention import PROJECTIONS, ROPE_BASE, AttentionVariant, CausalAttention, RotaryEmbedding
from .cross_entropy import check_ids, chunked_cross_entropy, cross_entropy
from .initialization import Initialization, check_initialization, initialize
from .moe import MixtureOfExperts
from .norm import RMSNorm

PositionalEncoding = Literal["rope", "learned", "sinusoidal", "none"]
Norm = Literal["rmsnorm", "layernorm", "none"]
Activation = Literal["relu2", "gelu", "gelu_tanh", "swiglu", "relu"]
Biases = Literal["none", "mlp", "all"]

DEFAULT_NORM_EPS = {
    "rmsnorm": None,
    "layernorm": 1e-5,
}  # None: the machine epsilon of fp32
ACTIVATIONS = {
    "relu2": lambda x: F.relu(x).square(),
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),  # GPT-2's
    "swiglu": F.silu,
    "relu": F.relu,
}


def make_norm(norm: Norm, d_model: int, eps: float | None = None) -> nn.Module:
    """Create a norm over `d_model` channels; `eps` is by default that of `DEFAULT_NORM_EPS`."""
    if norm == "none":
        return nn.Identity()
    eps = DEFAULT_NORM_EPS[norm] if eps is None else eps
    return RMSNorm(d_model, eps) if norm == "rmsnorm" else nn.LayerNorm(d_model, eps)


def resolve_d_ff(d_model: int, activation: str, d_ff: int | None = None) -> int:
    """Hidden channels of an MLP: `d_ff`, by default 4d, or for SwiGLU 8d/3 rounded up to eights.

    For example:

        resolve_d_ff(384, "swiglu")  # 1024
    """
    return d_ff or (8 * math.ceil(d_model / 3) if activation == "swiglu" else 4 * d_model)


def sinusoid_table(context_length: int, d_model: int) -> Tensor:
    """Sinusoidal positions (Vaswani, 2017), (t d) in float64.

    The value is sin(t / 10000^(2i/d)) in channel 2i and cos of the same in channel 2i + 1.
    """
    frequency = 10_000.0 ** (-torch.arange(0, d_model, 2, dtype=torch.float64) / d_model)
    angles = torch.outer(torch.arange(context_length, dtype=torch.float64), frequency)
    return torch.stack((angles.sin(), angles.cos()), -1).flatten(1)[:, :d_model]  # (t d)


class SinusoidalEncoding(nn.Module):
    """Fixed sinusoidal position embeddings, one row for each position."""

    table: Tensor  # (t d)

    def __init__(self, context_length: int, d_model: int) -> None:
        """Compute the table."""
        super().__init__()
        self.register_buffer(
            "table", sinusoid_table(context_length, d_model).float(), persistent=False
        )

    def forward(self, position_ids: Tensor) -> Tensor:
        """Return the rows (t d) of the table for integer positions (t)."""
        return self.table[position_ids]


class MLP(nn.Module):
    """Two linear layers around a nonlinearity, (b t d) -> (b t d), by default 8 d² weights.

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
        """Create `up` and `down`, and for SwiGLU `gate`."""
        super().__init__()
        hidden_size = resolve_d_ff(d_model, activation, d_ff)
        self.activation = activation
        self.up = nn.Linear(d_model, hidden_size, bias)
        self.gate = nn.Linear(d_model, hidden_size, bias) if activation == "swiglu" else None
        self.down = nn.Linear(hidden_size, d_model, bias)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the MLP to each position of x (b t d)."""
        act = ACTIVATIONS[self.activation]
        return self.down(act(self.up(x)) if self.gate is None else act(self.gate(x)) * self.up(x))


def make_pos_embed(
    positional_encoding: PositionalEncoding, context_length: int, d_model: int
) -> nn.Module | None:
    """Create the position embeddings, or None for encodings that add none to the tokens."""
    if positional_encoding == "learned":
        return nn.Embedding(context_length, d_model)
    if positional_encoding == "sinusoidal":
        return SinusoidalEncoding(context_length, d_model)
    return None


def make_mlp(
    d_model: int,
    activation: Activation | Literal["none"],
    bias: bool,
    d_ff: int | None,
    num_experts: int,
) -> nn.Module | None:
    """Create the MLP of a block: a mixture of experts if there are any, or None without MLP."""
    mlp = None if activation == "none" else MLP(d_model, activation, bias, d_ff)
    return MixtureOfExperts(d_model, num_experts, d_ff=d_ff) if num_experts else mlp


class TransformerBlock(nn.Module):
    """Pre-norm transformer block: attention and an optional MLP, with residual connections."""

    def __init__(
        self,
        attention: CausalAttention,
        mlp: nn.Module | None,
        norm: Callable[[], nn.Module],
        dropout: float,
        residual: bool = True,
    ) -> None:
        """Create the norms around the given attention and MLP."""
        super().__init__()
        self.attention_norm, self.attention = norm(), attention
        self.mlp_norm, self.mlp = (None, None) if mlp is None else (norm(), mlp)
        self.dropout, self.residual = nn.Dropout(dropout), residual

    def forward(
        self, x: Tensor, layer_cache: LayerKVCache | SharedPrefixLayer | None = None
    ) -> Tensor:
        """Add the attention and MLP outputs to x (b t d).

        Without `residual` the attention output replaces x. `layer_cache` has the keys and values of
        earlier tokens. The last layer of a shared-prefix batch, which packs prompts and completions
        into one row, returns the completions only.
        """
        attention_output = self.dropout(self.attention(self.attention_norm(x), layer_cache))
        if layer_cache is not None:
            # all positions, or those of the completions
            x = layer_cache.select_positions(x)
            attention_output = layer_cache.select_positions(attention_output)
        x = x + attention_output if self.residual else attention_output
        if self.mlp is None or self.mlp_norm is None:
            return x
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


class Transformer(nn.Module):
    """Decoder-only transformer: tokens (b t) to logits (b t v).

    Args:
        vocab_size: number of different tokens.
        context_length: longest sequence, in tokens.
        num_layers: number of blocks.
        d_model: channels d of the residual stream.
        num_heads: attention heads; must divide d_model.
        positional_encoding: positional encoding.
        norm: norm before each attention and MLP, and before the head.
        qk_norm: normalize queries and keys to unit RMS, which bounds the attention scores.
        activation: activation of the MLP, or none for blocks of attention alone.
        dropout: on the embedding, the attention weights and both outputs of a block.
        tie_embeddings: use the embedding as the head.
        attn_implementation: implementation: torch's kernel, the formula, or the faster of the two.
        zero_init_residual: initialize residual branches and head to zero (uniform predictions, loss
            ln v exactly) and the embeddings to small values; without it torch's initial values are
            kept.
        attention_variant: attention variant of the lecture.
        residual: add the attention output to the residual stream instead of replacing it.
        out_proj: whether the attention has an output projection.
        bias: which linear layers of the blocks have a bias.
        num_experts: number of experts of the MoE layer in place of each MLP; 0 for none.
        d_ff: hidden channels of each MLP; by default 4d, and 8d/3 rounded up to eights for swiglu.
        rope_base: RoPE rotates the channel pair i of k by t · rope_base^(-2i/k).
        norm_eps: added under the root of each norm, qk_norm included; by default 1e-5 for
            layernorm, and 1.19e-7, the machine epsilon of fp32, for rmsnorm and qk_norm.
        initialization: distribution of the weights of linear layers (initialization.py), except
            those that zero_init_residual sets to zero.
    """

    position_ids_override: Tensor | None = (
        None  # (t): positions of the tokens, if they are a part of a sequence
    )

    def __init__(
        self,
        vocab_size: int,
        context_length: int,
        num_layers: int = 4,
        d_model: int = 128,
        num_heads: int = 4,
        positional_encoding: PositionalEncoding = "rope",
        norm: Norm = "rmsnorm",
        qk_norm: bool = True,
        activation: Activation | Literal["none"] = "relu2",
        dropout: float = 0.0,
        tie_embeddings: bool = False,  # use the embedding as the head
        attn_implementation: Literal["auto", "sdpa", "eager"] = "auto",
        zero_init_residual: bool = True,  # residual branches and head start at zero
        attention_variant: AttentionVariant = "qkv",  # which projections are learned
        residual: bool = True,  # add the attention output; False: it replaces the input
        out_proj: bool = True,  # output projection of the attention
        bias: Biases = "none",  # of the linear layers: none, mlp or all
        num_experts: int = 0,  # experts in place of each MLP; 0 for none
        d_ff: int | None = None,  # hidden channels of an MLP
        rope_base: float = ROPE_BASE,
        norm_eps: float | None = None,
        initialization: Initialization = "default",
    ) -> None:
        """Check the sizes, then build the layers; the class docstring has all arguments."""
        super().__init__()
        check_initialization("Transformer", initialization)
        sizes = {"vocab_size": vocab_size, "context_length": context_length}
        sizes |= {"num_layers": num_layers, "d_model": d_model, "num_heads": num_heads}
        check_sizes(positional_encoding, dropout, **sizes)  # these raise UsageError
        check_options(
            positional_encoding,
            activation="experts" if num_experts else activation,
            has_norm=norm != "none" or qk_norm,
            d_ff=d_ff,
            rope_base=rope_base,
            norm_eps=norm_eps,
        )
        self.context_length, self.vocab_size = context_length, vocab_size
        # a large vocabulary is rounded up to a multiple of 64; the further rows are not used
        self.embed = nn.Embedding(padded_vocab_size(vocab_size), d_model)
        # maps positions to (t d), or None if positions are not added to the embeddings
        self.pos_embed = make_pos_embed(positional_encoding, context_length, d_model)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleDict()  # a dict keeps the names when a pipeline stage drops blocks
        new_norm = partial(make_norm, norm, d_model, norm_eps)  # creates a norm at each call
        # tables of RoPE, which all layers share
        rotary = (
            RotaryEmbedding(context_length, d_model // num_heads, rope_base)
            if positional_encoding == "rope"
            else None
        )
        for layer in range(num_layers):
            attention = CausalAttention(
                d_model,
                num_heads,
                context_length,
                rope=positional_encoding == "rope",
                qk_norm=qk_norm,
                dropout=dropout,
                attn_implementation=attn_implementation,
                variant=attention_variant,
                out_proj=out_proj,
                bias=bias == "all",
                rope_base=rope_base,
                norm_eps=norm_eps,
                rotary=rotary,
            )
            # an MLP, a mixture of experts, or None
            mlp = make_mlp(d_model, activation, bias != "none", d_ff, num_experts)
            self.blocks[str(layer)] = TransformerBlock(attention, mlp, new_norm, dropout, residual)
        self.norm = new_norm()
        self.head = nn.Linear(d_model, padded_vocab_size(vocab_size), bias=False)
        if tie_embeddings:
            self.head.weight = self.embed.weight
        initialize(self, initialization, output_layer="head")
        self._initialize(tie_embeddings, zero_init_residual)

    def _initialize(self, tie_embeddings: bool, zero_init_residual: bool) -> None:
        """Change torch's default initial values; the lecture keeps the defaults."""
        if tie_embeddings or zero_init_residual:
            # Adam moves every weight by lr: embeddings of N(0, 1), torch's default, stay random for
            # a whole quick run (0.04 nats lost); as a tied head their first logits would be large
            for embedding in (self.embed, self.pos_embed):
                if isinstance(embedding, nn.Embedding):
                    nn.init.normal_(embedding.weight, std=0.02 if tie_embeddings else 0.1)
        for name, parameter in self.named_parameters():  # a tied head is listed as the embedding
            zeroed_suffixes = ("out_proj.weight", "down.weight", "head.weight", "experts.down")
            if zero_init_residual and (name.endswith(zeroed_suffixes) or name.endswith(".bias")):
                nn.init.zeros_(parameter)

    def forward(
        self,
        tokens: Tensor,
        cache: KVCache | SharedPrefixBatch | None = None,
        targets: Tensor | None = None,
    ) -> Tensor:
        """Compute the logits (b t v) of the token after each of tokens (b t).

        With a KV cache the logits are those of the newest tokens only, (b 1 v). With a
        SharedPrefixBatch they are those of the completions, (b n v). With targets (b t) the summed
        cross-entropy is returned, and the logits are not stored as a whole.
        """
        return self.compute_logits(
            self.run_blocks(self.embed_tokens(tokens, cache), None, cache), cache, targets
        )

    def embed_tokens(
        self, tokens: Tensor, cache: KVCache | SharedPrefixBatch | None = None
    ) -> Tensor:
        """Embed tokens (b t) and their positions: the residual stream (b t d) for the first block.

        A `cache` has the positions of the tokens; token ids are then not checked.

        Raises:
            UsageError: a token id or the length is out of range.
        """
        if cache is None:
            self._check_tokens(tokens)
        x = self.embed(tokens)
        if self.pos_embed is not None:
            # context parallelism sets it: the positions of the part of the text on this rank
            position_ids = self.position_ids_override
            if position_ids is None:
                position_ids = torch.arange(tokens.shape[1], device=tokens.device)
            if cache is not None:  # in a decode step the cache has the positions of the new tokens
                position_ids = cache.position_ids(position_ids)
            x = x + self.pos_embed(position_ids)
        return self.dropout(x)

    def _check_tokens(self, tokens: Tensor) -> None:
        length = (
            tokens.shape[1] if self.position_ids_override is None else 0
        )  # a part of a sequence
        if length > self.context_length:
            raise UsageError(
                f"Transformer: the input has {length} tokens, more than "
                f"context_length={self.context_length}",
                [f"{self.context_length} tokens or fewer"],
                f"shorten the input, or build the model with context_length={length}",
            )
        if tokens.is_cuda and self.embed.num_embeddings > self.vocab_size:
            is_in_vocab = (tokens < self.vocab_size).all()  # a padding row is no token
            torch._assert_async(is_in_vocab, "a token is outside the vocabulary")  # pyright: ignore
        check_ids("token", tokens, self.vocab_size)

    def run_blocks(
        self,
        x: Tensor,
        block_names: Sequence[str] | None = None,
        cache: KVCache | SharedPrefixBatch | None = None,
    ) -> Tensor:
        """Run the blocks with these names, by default all, on the residual stream (b t d)."""
        for name in self.blocks if block_names is None else block_names:
            block = self.blocks[name]
            x = block(x) if cache is None else block(x, cache.layers[int(name)])
        return x

    def compute_logits(
        self,
        x: Tensor,
        cache: KVCache | SharedPrefixBatch | None = None,
        targets: Tensor | None = None,
    ) -> Tensor:
        """Compute the output of `forward` from the residual stream (b t d) after the last block.

        It is the logits (b t v), or with targets (b t) the summed cross-entropy. A `cache` selects
        the tokens whose logits are needed.
        """
        x = self.norm(x)
        if cache is not None:
            x = cache.select_outputs(x)
        if targets is None:
            return self.head(x)[..., : self.vocab_size]  # rows beyond the vocabulary are padding
        if type(self.head) is nn.Linear:
            # computes the logits of one chunk of positions at a time, to save memory
            return chunked_cross_entropy(x, self.head.weight, targets, self.vocab_size)
        # a head with adapters is not given by one matrix, which the chunked version needs
        return cross_entropy(self.head(x)[..., : self.vocab_size], targets, "sum")

    def stage_modules(self) -> tuple[list[str], list[str]]:
        """Names of the modules that `embed_tokens` and `compute_logits` need."""
        return ["embed", "pos_embed"], ["norm", "head"]

    def tensor_parallel_plan(self) -> dict[str, str]:
        """Return how to split each module, by its name with `*` for a number: a style.

        strategies/tensor_parallel.py reads the plan. "colwise" and "rowwise" split a matrix by
        heads or hidden channels; "shared" marks a module whose input several such matrices read.
        The others count only if the sequence is split, too: "scatter" splits it, a module marked
        "sequence" runs on a part of it, and "gather" joins the module's input.

        Embedding and head are not split: they may share their storage. An attention is split if
        query, key, value and output are learned. In the other variants a projection that is not
        learned has all heads on each rank, so the whole attention stays on each rank.
        """
        # all blocks are alike; PROJECTIONS are query, key and value
        first = cast(TransformerBlock, next(iter(self.blocks.values())))
        styles = {"attention_norm": "sequence", "mlp_norm": "sequence"}
        if first.attention.is_fully_learned:
            qkv_projections = (f"attention.{name}" for name in PROJECTIONS)
            styles |= {"attention": "shared", **dict.fromkeys(qkv_projections, "colwise")}
            styles["attention.out_proj"] = "rowwise"
        if isinstance(first.mlp, MLP):
            # an MLP without SwiGLU has no `gate`, and the strategy skips names that do not exist
            styles |= {"mlp": "shared", "mlp.up": "colwise", "mlp.gate": "colwise"}
            styles["mlp.down"] = "rowwise"
        plan = {f"blocks.*.{name}": style for name, style in styles.items()}
        if "blocks.*.attention" not in plan or "blocks.*.mlp" not in plan:
            return plan  # a module that is not split needs the whole sequence
        return {"dropout": "scatter", **plan, "norm": "gather"}


def with_defaults(net_kwargs: dict[str, Any]) -> dict[str, Any]:
    """Complete the arguments of a `Transformer` with the defaults of its signature.

    For example:

        with_defaults({"d_model": 64})["num_layers"]  # 4
    """
    signature_params = inspect.signature(Transformer).parameters
    return {
        k: p.default for k, p in signature_params.items() if p.default is not p.empty
    } | net_kwargs


LARGE_VOCAB = 4096  # tokens; larger vocabularies are padded and use chunked cross-entropy


def padded_vocab_size(vocab_size: int) -> int:
    """Rows of embedding and head: a large vocabulary is rounded up to a multiple of 64.

    Tensor cores are faster with such sizes.
    """
    return vocab_size if vocab_size <= LARGE_VOCAB else -(-vocab_size // 64) * 64


def check_sizes(positional_encoding: str, dropout: float, **sizes: int) -> None:
    """Raise UsageError for a size below 1, and for heads that do not divide the channels.

    The message names the nearest valid number of heads.

    Args:
        positional_encoding: "rope" needs heads of an even width.
        dropout: dropout probability.
        sizes: sizes of the net by the name of the argument; d_model and num_heads among them.
    """
    check_at_least_one("Transformer", flag_prefix="--model.", **sizes)
    d_model, num_heads = sizes["d_model"], sizes["num_heads"]
    if not 0 <= dropout < 1:
        raise UsageError(
            f"Transformer: dropout={dropout} is out of range",
            ["0 to below 1"],
            "use dropout=0.1",
            flag="--model.dropout=0.1",
        )
    # the width of a head, d_model / num_heads, is a multiple of it
    step = 2 if positional_encoding == "rope" else 1  # RoPE rotates pairs of channels
    if d_model % (num_heads * step):
        # bounded, so that a huge d_model gives its message at once
        divisors = (h for h in range(1, min(d_model, 2**16) + 1) if d_model % (h * step) == 0)
        valid_num_heads = sorted(divisors, key=lambda h: abs(h - num_heads))  # nearest first
        mismatch = f"num_heads={num_heads} does not divide d_model={d_model}"
        if d_model % num_heads == 0:
            width = d_model // num_heads
            mismatch = f"RoPE needs heads of an even width, but d_model={d_model} and num_heads="
            mismatch += f"{num_heads} give a width of {width}"
        fix = f"num_heads={valid_num_heads[0]}" if valid_num_heads else "d_model=128"
        raise UsageError(
            f"Transformer: {mismatch}",
            valid_num_heads[:5],
            f"use {fix}",
            flag=f"--model.{fix}",
        )


def check_options(
    positional_encoding: str,
    activation: str,
    has_norm: bool,
    d_ff: int | None,
    rope_base: float,
    norm_eps: float | None,
) -> None:
    """Raise UsageError for options out of range, and for options of a layer that the net lacks.

    The constructor calls it before it builds any layer.

    Args:
        positional_encoding: positional encoding of the net.
        activation: activation of the MLP, "experts" for a mixture of experts, "none" without MLP.
        has_norm: whether the net has any norm, qk_norm included.
        d_ff: hidden channels of an MLP; None is the default.
        rope_base: base of RoPE's frequencies.
        norm_eps: epsilon of the norms; None is the default.
    """
    if d_ff is not None and d_ff < 1:
        raise UsageError(
            f"Transformer: d_ff={d_ff} is too small",
            ["1 or more"],
            "use d_ff=512",
            flag="--model.d_ff=512",
        )
    if d_ff is not None and activation == "none":
        raise UsageError(
            f"Transformer: d_ff={d_ff} has no effect with activation='none', which has no MLP",
            ["d_ff=None"],
            "remove d_ff, or use activation='relu2'",
            flag="--model.activation=relu2",
        )
    if not 1 < rope_base < math.inf:
        raise UsageError(
            f"Transformer: rope_base={rope_base} is out of range",
            ["above 1"],
            "use rope_base=10000",
            flag="--model.rope_base=10000",
        )
    if rope_base != ROPE_BASE and positional_encoding != "rope":
        raise UsageError(
            f"Transformer: rope_base={rope_base:g} has no effect with "
            f"positional_encoding={positional_encoding!r}",
            ["positional_encoding='rope'"],
            "remove rope_base, or use positional_encoding='rope'",
            flag="--model.positional_encoding=rope",
        )
    if norm_eps is not None and not 0 <= norm_eps < math.inf:
        raise UsageError(
            f"Transformer: norm_eps={norm_eps} is out of range",
            ["0 or more"],
            "use norm_eps=1e-5",
            flag="--model.norm_eps=1e-5",
        )
    if norm_eps is not None and not has_norm:
        raise UsageError(
            f"Transformer: norm_eps={norm_eps:g} has no effect with norm='none' and qk_norm=False",
            ["norm='rmsnorm'", "norm='layernorm'", "qk_norm=True"],
            "remove norm_eps, or use norm='rmsnorm'",
            flag="--model.norm=rmsnorm",
        )
