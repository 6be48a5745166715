"""The decoder-only transformer: embed, add what attention and an MLP say, predict the next token.

    x = embed(tokens);   x += attention(norm(x));   x += mlp(norm(x));   logits = head(norm(x))

Axes: b batch, t time, d model, h heads, k head width, v vocabulary.
"""

import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import CausalAttention

Positions = Literal["rope", "learned", "sinusoidal", "none"]
Norm = Literal["rmsnorm", "layernorm", "none"]
Activation = Literal["relu2", "gelu", "swiglu", "relu"]

NORMS = {"rmsnorm": nn.RMSNorm, "layernorm": nn.LayerNorm, "none": lambda width: nn.Identity()}
ACTIVATIONS = {
    "relu2": lambda x: F.relu(x).square(),
    "gelu": F.gelu,
    "swiglu": F.silu,
    "relu": F.relu,
}


class SinusoidalPositions(nn.Module):
    """Fixed waves: sin(t / 10000^(2i/d)) in even channels, cos in odd ones (Vaswani, 2017)."""

    table: Tensor  # (t d)

    def __init__(self, context: int, width: int) -> None:
        """Tabulate them."""
        super().__init__()
        frequency = 10_000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
        angles = torch.outer(torch.arange(context, dtype=torch.float64), frequency)
        table = torch.stack((angles.sin(), angles.cos()), -1).flatten(1)[:, :width]  # (t, d)
        self.register_buffer("table", table.float(), persistent=False)

    def forward(self, time: Tensor) -> Tensor:
        """Rows of the table for integer times (t): (t d)."""
        return self.table[time]


class MLP(nn.Module):
    """Two matrices around a nonlinearity, (b t d) -> (b t d), 8 d² weights in each variant.

    SwiGLU has three matrices, so its hidden width is 8d/3 instead of 4d, rounded up to eights.
    """

    def __init__(self, width: int, activation: Activation = "relu2") -> None:
        """Make `up` and `down`, and SwiGLU's `gate`."""
        super().__init__()
        hidden = 8 * math.ceil(width / 3) if activation == "swiglu" else 4 * width
        self.activation = activation
        self.up = nn.Linear(width, hidden, bias=False)
        self.gate = nn.Linear(width, hidden, bias=False) if activation == "swiglu" else None
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Transform each position of x (b t d) by itself."""
        act = ACTIVATIONS[self.activation]
        return self.down(act(self.up(x)) if self.gate is None else act(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """Attention and an MLP, each behind a norm, each added to the stream (b t d)."""

    def __init__(
        self,
        attention: CausalAttention,
        mlp: MLP,
        norm: Callable[[int], nn.Module],
        width: int,
        dropout: float,
    ) -> None:
        """Put the parts together."""
        super().__init__()
        self.attention_norm, self.attention = norm(width), attention
        self.mlp_norm, self.mlp = norm(width), mlp
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Add both answers to x (b t d)."""
        x = x + self.dropout(self.attention(self.attention_norm(x)))
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
        mlp: the nonlinearity.
        dropout: on the embedding, the attention weights and both answers of a block.
        tied: use the embedding as the head.
        attention: how to compute it: torch's kernel, the formula, or the faster of the two.
        zero_init: start with silent blocks and uniform predictions (loss ln v exactly).
    """

    def __init__(
        self,
        vocabulary: int,
        context: int,
        layers: int = 4,
        width: int = 128,
        heads: int = 4,
        positions: Positions = "rope",
        norm: Norm = "rmsnorm",
        qk_norm: bool = True,
        mlp: Activation = "relu2",
        dropout: float = 0.0,
        tied: bool = False,
        attention: Literal["auto", "sdpa", "explicit"] = "auto",
        zero_init: bool = True,
    ) -> None:
        """Check the sizes, then build."""
        super().__init__()
        sizes = {"vocabulary": vocabulary, "context": context, "layers": layers}
        check(positions, dropout, **sizes, width=width, heads=heads)
        self.context = context
        self.embed = nn.Embedding(vocabulary, width)
        self.place = nn.Embedding(context, width) if positions == "learned" else None
        if positions == "sinusoidal":
            self.place = SinusoidalPositions(context, width)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleDict()  # a dict: names survive when a pipeline takes blocks away
        for layer in range(layers):
            rope = positions == "rope"
            attend = CausalAttention(width, heads, context, rope, qk_norm, dropout, attention)
            self.blocks[str(layer)] = Block(attend, MLP(width, mlp), NORMS[norm], width, dropout)
        self.norm = NORMS[norm](width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.head.weight = self.embed.weight
            nn.init.normal_(self.embed.weight, std=0.02)  # N(0, 1) would start at certainty
        if zero_init:  # a tied head is listed as the embedding and keeps its values
            for name, weight in self.named_parameters():
                if name.endswith(("out.weight", "down.weight", "head.weight")):
                    nn.init.zeros_(weight)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (b t v) of the token after each of tokens (b t)."""
        x = self.embed(tokens)
        if self.place is not None:
            x = x + self.place(torch.arange(tokens.shape[1], device=tokens.device))
        x = self.dropout(x)
        for block in self.blocks.values():
            x = block(x)
        return self.head(self.norm(x))

    def tp_plan(self) -> dict[str, str]:
        """How matrices split over tensor-parallel ranks: by heads and hidden channels.

        Embedding and head stay whole: they may share their storage.
        """
        columns = ("attention.query", "attention.key", "attention.value", "mlp.up", "mlp.gate")
        plan = {f"blocks.*.{name}": "colwise" for name in columns}
        return plan | {f"blocks.*.{name}": "rowwise" for name in ("attention.out", "mlp.down")}


def check(positions: str, dropout: float, **sizes: int) -> None:
    """Refuse sizes that make no net, in the words of a command line."""
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} is {size}; allowed: 1 or more; type --model.{name}=...")
    width, heads = sizes["width"], sizes["heads"]
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout is {dropout}; allowed: 0 to below 1; type --model.dropout=0.1")
    step = 2 if positions == "rope" else 1  # rotary positions turn pairs of channels
    fitting = [h for h in range(1, width + 1) if width % (h * step) == 0]
    fitting.sort(key=lambda h: abs(h - heads))
    if heads not in fitting:
        what = "equal and even parts (rope turns pairs)" if step == 2 else "equal parts"
        raise ValueError(
            f"heads {heads} does not split width {width} into {what}; allowed: "
            f"{', '.join(map(str, fitting[:5])) or 'none'}; "
            + (f"type --model.heads={fitting[0]}" if fitting else "type --model.width=128")
        )
