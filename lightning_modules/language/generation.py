"""Generation: draw the next token, append it, ask again.

Axes: b batch, t time, v vocabulary.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor


def draw(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """One token (b) for each row of logits (b v), from softmax(logits / temperature).

    `top_k` keeps the k most probable tokens; temperature 0 takes the most probable one.
    """
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if top_k is not None:
        least = logits.topk(top_k).values[:, -1:]  # (b 1)
        logits = logits.masked_fill(logits < least, -math.inf)
    return logits.softmax(-1).multinomial(1, generator=generator)[:, 0]  # (b)


@torch.no_grad()
def continue_tokens(
    net: Callable[[Tensor], Tensor],
    tokens: Tensor,
    new: int,
    context: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Append `new` tokens to tokens (b t); the net sees the last `context` of them at each step."""
    for _ in range(new):
        logits = net(tokens[:, -context:])[:, -1]  # (b v)
        token = draw(logits, temperature, top_k, generator)
        tokens = torch.cat((tokens, token[:, None]), 1)
    return tokens
