"""Writing: text in, text out, around a net that knows only numbers.

A stop is looked for twice: as tokens on the device, which ends the drawing, and in the text, since
a vocabulary of word pieces can spell the same characters in more than one way.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from ravine.errors import UsageError

from .generate_text import LOOK, stream


def write(
    net: nn.Module,
    tokenizer: Any,
    prompts: Sequence[str],
    stops: Sequence[str] = (),
    show: Callable[[str], None] | None = None,
    **how: Any,
) -> list[str]:
    """What follows each prompt, up to a stop; `how` as in `generate`.

    write(net, tokenizer, ["ROMEO:"], stops=["\n\n"], new=200, context=64, show=print)

    With `show`, the first text is handed out piece by piece, as soon as it is certain.
    """
    if "" in stops:
        raise UsageError(
            "a stop is empty; allowed: any text; type --stop='\\n\\n', or leave it away"
        )
    ends = [tokenizer.encode(stop).tolist() for stop in stops]
    if tokenizer.end is not None:  # a text of its own kind ends there
        ends.append([tokenizer.end])
    starts = [tokenizer.encode(prompt) for prompt in prompts]
    tokens = torch.empty(len(prompts), 0, dtype=torch.int64)
    texts, shown = [""] * len(prompts), 0
    for part in stream(net, starts, stops=ends, look=1 if show else LOOK, **how):
        new = part.tokens.masked_fill(~part.mask, -1).cpu()
        tokens = torch.cat((tokens, new), 1)
        whole = [
            tokenizer.decode([n for n in row if n not in (-1, tokenizer.end)])
            for row in tokens.tolist()
        ]
        texts = [cut(text, stops) for text in whole]
        if show:
            sure = certain(texts[0], stops) if texts[0] == whole[0] else texts[0]
            show(sure[shown:])
            shown = max(shown, len(sure))
        if all(len(text) < len(full) for text, full in zip(texts, whole, strict=True)):
            break
    if show:
        show(texts[0][shown:])
    return texts


def cut(text: str, stops: Sequence[str]) -> str:
    """The text before the first of the stops."""
    return text[: min((place for stop in stops if (place := text.find(stop)) >= 0), default=None)]


def certain(text: str, stops: Sequence[str]) -> str:
    """The text without an end that the next token may change: half a character, half a stop."""
    text = text.rstrip("\ufffd")  # stands for bytes that are no character yet
    halves = [stop[:size] for stop in stops for size in range(1, len(stop))]
    return text[: len(text) - max((len(half) for half in halves if text.endswith(half)), default=0)]
