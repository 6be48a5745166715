"""Prefill and decode: next-token logits of prompts of different lengths, with or without KV cache.

A net sees at most `context_length` tokens. When the context is full, the older half is dropped in
one step. So a cache is rebuilt every context_length/2 tokens instead of at each token. Rows
overflow at different times. The host computes these times from the lengths and never reads from the
device.

Axes: b batch, t time, v vocabulary.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from ravine.errors import UsageError

from ..nn.moe import MixtureOfExperts
from .kv_cache import KVCache

ContextOverflow = Literal["slide", "error"]


class TokenBuffer:
    """Token ids of all rows, right-padded in one tensor (b t), and each row's visible window."""

    def __init__(
        self,
        prompts: Sequence[Tensor],
        max_new_tokens: int,
        context_length: int,
        context_overflow: ContextOverflow,
        device: torch.device,
    ) -> None:
        """Copy the prompts into the buffer."""
        self.lengths = [len(prompt) for prompt in prompts]  # the host's copy of `device_lengths`
        check_prompt_lengths(self.lengths, max_new_tokens, context_length, context_overflow)
        self.context_length, self.max_new_tokens = context_length, max_new_tokens
        self.window_starts = [
            max(0, n - context_length) for n in self.lengths
        ]  # first visible token of each row
        first_rows: dict[tuple[int, ...], int] = {}
        rows = enumerate(tuple(prompt.tolist()) for prompt in prompts)
        self.first_row_with_same_prompt = [
            first_rows.setdefault(prompt, row) for row, prompt in rows
        ]  # row indices
        tokens = torch.zeros(len(prompts), max(self.lengths) + max_new_tokens, dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            tokens[row, : len(prompt)] = prompt
        self.tokens = tokens.to(device)
        self.row_indices = torch.arange(len(prompts), device=device)
        self.device_lengths = torch.tensor(self.lengths, device=device)

    def shared_prefix_group_size(self) -> int:
        """Return the number of adjacent rows for each prompt, or 1 if rows cannot share a prefix.

        Rows share a prefix if equal prompts are adjacent, in groups of equal size, and no row
        overflows the context.
        """
        rows, group_size = (
            len(self.first_row_with_same_prompt),
            len(self.first_row_with_same_prompt) // len(set(self.first_row_with_same_prompt)),
        )
        is_grouped = self.first_row_with_same_prompt == [
            row // group_size * group_size for row in range(rows)
        ]
        return (
            group_size
            if is_grouped and max(self.lengths) + self.max_new_tokens - 1 <= self.context_length
            else 1
        )

    def append_token(self, token: Tensor) -> None:
        """Append one token (b) to each row."""
        self.tokens[self.row_indices, self.device_lengths] = token
        self.device_lengths += 1

    def advance_lengths(self) -> list[int]:
        """Update the host's lengths after `append_token`; return the rows whose window overflowed.

        The window of an overflowed row drops its older half.
        """
        self.lengths = [n + 1 for n in self.lengths]
        overflowed = [
            row
            for row, (start, n) in enumerate(zip(self.window_starts, self.lengths, strict=True))
            if n - start > self.context_length
        ]
        for row in overflowed:
            self.window_starts[row] = self.lengths[row] - max(1, self.context_length // 2)
        return overflowed

    def visible_window(self, rows: Sequence[int], num_omitted: int = 0) -> tuple[Tensor, Tensor]:
        """Return the visible tokens of some rows, right-padded (b t), and the number of each (b).

        The last `num_omitted` tokens of each row are left out.
        """
        starts = torch.tensor([self.window_starts[row] for row in rows])
        lengths = torch.tensor([self.lengths[row] for row in rows]) - num_omitted - starts
        columns = starts[:, None] + torch.arange(int(lengths.max()))  # (b t)
        columns = columns.clamp(max=self.tokens.shape[1] - 1).to(self.tokens.device)
        selected = self.tokens[torch.tensor(list(rows), device=self.tokens.device)]
        return selected.gather(1, columns), lengths.to(self.tokens.device)


class Decoder:
    """Decode without a KV cache: recompute the full sequence at each step, logits (b v).

    This is the slow reference implementation.
    """

    def __init__(self, net: Callable[..., Tensor], token_buffer: TokenBuffer) -> None:
        """Store a net from tokens (b t) to logits (b t v), and the token buffer."""
        self.net, self.token_buffer = net, token_buffer

    def prefill(self) -> Tensor:
        """Return the logits (b v) after the prompts."""
        return self.decode_step()

    def prepare_step(self, overflowed_rows: list[int]) -> int:
        """Do the host's work before a step; return a number that is equal for equal shapes."""
        return 0

    def decode_step(self) -> Tensor:
        """Return the logits (b v) after the last token of each row."""
        visible, visible_lengths = self.token_buffer.visible_window(
            range(len(self.token_buffer.lengths))
        )
        return self.net(visible)[self.token_buffer.row_indices, visible_lengths - 1]


class CachedDecoder(Decoder):
    """Decode with a KV cache: the logits of `Decoder`, with one forward pass for each token."""

    def __init__(self, net: nn.Module, token_buffer: TokenBuffer, bucket_size: int = 1) -> None:
        """Allocate a KV cache for the net, which takes it as its second argument."""
        super().__init__(net, token_buffer)
        blocks: Iterable[str] = net.blocks  # type: ignore[assignment]
        num_layers = 1 + max(map(int, blocks))  # a pipeline stage can hold the last blocks only
        has_experts = any(
            isinstance(m, MixtureOfExperts) for m in net.modules()
        )  # the experts' capacity depends on the whole row
        self.group_size = 1 if has_experts else token_buffer.shared_prefix_group_size()
        self.prefix_lengths = (
            token_buffer.lengths if self.group_size > 1 else [0] * len(token_buffer.lengths)
        )
        num_rows, num_slots = (
            len(token_buffer.lengths) // self.group_size,
            token_buffer.max_new_tokens if self.group_size > 1 else token_buffer.context_length,
        )
        self.cache = KVCache(
            num_layers,
            num_rows,
            num_slots,
            token_buffer.tokens.device,
            bucket_size,
            self.group_size,
        )

    def prefill(self) -> Tensor:
        """Fill the cache and return the logits (b v); a prompt of several rows is computed once."""
        rows, inverse_indices = torch.tensor(self.token_buffer.first_row_with_same_prompt).unique(
            return_inverse=True
        )
        visible, visible_lengths = self.token_buffer.visible_window(rows.tolist())
        if self.group_size > 1:
            self.cache.begin_shared_prefill(visible_lengths, visible.shape[1])
        else:
            self.cache.begin_prefill(visible_lengths, rows.to(visible_lengths.device))
        logits = self.net(visible, self.cache)[:, 0]
        if self.group_size == 1 and len(rows) < len(inverse_indices):
            self.cache.copy_rows(rows[inverse_indices].to(visible_lengths.device))
        return logits[inverse_indices.to(visible_lengths.device)]

    def prepare_step(self, overflowed_rows: list[int]) -> int:
        """Prefill the overflowed rows, without the last token; return the length of the cache."""
        token_buffer = self.token_buffer
        if overflowed_rows:
            visible, visible_lengths = token_buffer.visible_window(overflowed_rows, num_omitted=1)
            self.cache.begin_prefill(
                visible_lengths, torch.tensor(overflowed_rows, device=token_buffer.tokens.device)
            )
            if visible.shape[1]:
                self.net(visible, self.cache)
        visible_lengths_per_row = [
            n - start
            for n, start in zip(token_buffer.lengths, token_buffer.window_starts, strict=True)
        ]
        slots = [
            n - base for n, base in zip(visible_lengths_per_row, self.prefix_lengths, strict=True)
        ]
        return self.cache.reserve(
            max(slots), is_uniform=min(visible_lengths_per_row) == max(visible_lengths_per_row)
        )

    def decode_step(self) -> Tensor:
        """Run the net on the last token of each row and return the logits (b v).

        The step has static shapes and can be replayed as a CUDA graph.
        """
        self.cache.advance()
        token_buffer = self.token_buffer
        tokens = token_buffer.tokens.gather(1, token_buffer.device_lengths[:, None] - 1)  # (b 1)
        return self.net(tokens.view(-1, self.group_size), self.cache).flatten(0, 1)  # (b v)


def check_prompt_lengths(
    lengths: list[int], max_new_tokens: int, context_length: int, context_overflow: ContextOverflow
) -> None:
    """Raise UsageError for an empty prompt, too few new tokens, or a text that exceeds the context.

    Exceeding the context is an error only if `context_overflow` is "error".
    """
    if max_new_tokens < 1:
        raise UsageError(
            f"generate: max_new_tokens={max_new_tokens} is too small",
            ["1 or more"],
            "use max_new_tokens=200",
            flag="--max_new_tokens=200",
        )
    if not lengths or min(lengths) < 1:
        raise UsageError(
            "generate: a prompt is empty",
            ["a text of one character or more"],
            "use prompt='ROMEO:'",
            flag="--prompt='ROMEO:'",
        )
    longest = max(lengths)
    if context_overflow == "error" and longest + max_new_tokens - 1 > context_length:
        max_fitting = context_length - longest + 1
        if max_fitting > 0:
            allowed = f"max_new_tokens up to {max_fitting}"
            fix, flag = f"use max_new_tokens={max_fitting}", f"--max_new_tokens={max_fitting}, or "
        else:
            allowed = f"prompts of up to {context_length} tokens"
            fix, flag = "shorten the prompt", ""
        raise UsageError(
            f"generate: a prompt of {longest} tokens and {max_new_tokens} new tokens exceed the "
            f"context of {context_length} tokens",
            [allowed],
            f"{fix}, or use context_overflow='slide', which drops the older half of a full context",
            flag=f"{flag}--context_overflow=slide",
        )
