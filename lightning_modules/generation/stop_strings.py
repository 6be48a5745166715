"""Text generation with stop strings and streaming: prompts in, text out.

A stop string is matched twice. On the device it is matched as tokens, which ends the sampling. On
the host it is matched in the text, because word-piece tokens can spell the same characters in more
than one way.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from ravine.errors import UsageError

from .generate_text import SYNC_EVERY, generate_stream


def generate_text(
    net: nn.Module,
    tokenizer: Any,
    prompts: Sequence[str],
    stops: Sequence[str] = (),
    on_text: Callable[[str], None] | None = None,
    **kwargs: Any,
) -> list[str]:
    """Return the text after each prompt, up to a stop string; `kwargs` are those of `generate`.

    sizes = {"max_new_tokens": 200, "context_length": 64}
    generate_text(net, tokenizer, ["ROMEO:"], stops=["\n\n"], on_text=print, **sizes)

    With `on_text`, the first text is streamed: each piece is passed on as soon as it is final.
    """
    if "" in stops:
        raise UsageError("a stop is empty; allowed: any text; type --stop='\\n\\n', or omit --stop")
    stop_sequences = [tokenizer.encode(stop).tolist() for stop in stops]
    if tokenizer.eos_id is not None:  # the end token ends a text, too
        stop_sequences.append([tokenizer.eos_id])
    prompt_tokens = [tokenizer.encode(prompt) for prompt in prompts]
    tokens = torch.empty(len(prompts), 0, dtype=torch.int64)
    texts, num_emitted = [""] * len(prompts), 0
    for chunk in generate_stream(
        net, prompt_tokens, stops=stop_sequences, sync_every=1 if on_text else SYNC_EVERY, **kwargs
    ):
        new_tokens = chunk.tokens.masked_fill(~chunk.mask, -1).cpu()
        tokens = torch.cat((tokens, new_tokens), 1)
        full_texts = [
            tokenizer.decode([n for n in row if n not in (-1, tokenizer.eos_id)])
            for row in tokens.tolist()
        ]
        texts = [truncate_at_stop(text, stops) for text in full_texts]
        if on_text:
            stable = stable_prefix(texts[0], stops) if texts[0] == full_texts[0] else texts[0]
            on_text(stable[num_emitted:])
            num_emitted = max(num_emitted, len(stable))
        if all(len(text) < len(full) for text, full in zip(texts, full_texts, strict=True)):
            break
    if on_text:
        on_text(texts[0][num_emitted:])
    return texts


def truncate_at_stop(text: str, stops: Sequence[str]) -> str:
    """Return the text before the first stop string."""
    return text[: min((index for stop in stops if (index := text.find(stop)) >= 0), default=None)]


def stable_prefix(text: str, stops: Sequence[str]) -> str:
    """Return the text without an end that the next token can change.

    Such an end is an incomplete character or the beginning of a stop string.
    """
    text = text.rstrip("\ufffd")  # the replacement character: bytes of an incomplete character
    partial_stops = [stop[:size] for stop in stops for size in range(1, len(stop))]
    return text[
        : len(text)
        - max(
            (len(partial_stop) for partial_stop in partial_stops if text.endswith(partial_stop)),
            default=0,
        )
    ]
