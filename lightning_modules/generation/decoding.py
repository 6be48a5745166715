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
        """Copy the prompts into a buffer with room for `max_new_tokens` more tokens in each row.

        Args:
            prompts: token ids, one vector for each row; the lengths may differ.
            max_new_tokens: maximum number of tokens to append.
            context_length: maximum number of tokens that the net sees.
            context_overflow: "error" raises UsageError if a text would exceed the context.
            device: device of the buffer.
        """
        self.lengths = [len(prompt) for prompt in prompts]  # the host's copy of `device_lengths`
        check_prompt_lengths(self.lengths, max_new_tokens, context_length, context_overflow)
        self.context_length, self.max_new_tokens = context_length, max_new_tokens
        # first token of each row that the net sees; of a long prompt it sees the end only
        self.window_starts = [max(0, n - context_length) for n in self.lengths]
        # rows of equal prompts: the net computes a prompt once for all of them
        first_rows: dict[tuple[int, ...], int] = {}  # by prompt
        rows = enumerate(tuple(prompt.tolist()) for prompt in prompts)
        self.first_row_with_same_prompt = [
            first_rows.setdefault(prompt, row) for row, prompt in rows
        ]  # an index for each row
        num_columns = max(self.lengths) + max_new_tokens
        tokens = torch.zeros(len(prompts), num_columns, dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            tokens[row, : len(prompt)] = prompt
        self.tokens = tokens.to(device)
        # `tokens[row_indices, device_lengths]` is where the next token of each row is written
        self.row_indices = torch.arange(len(prompts), device=device)
        self.device_lengths = torch.tensor(self.lengths, device=device)

    def shared_prefix_group_size(self) -> int:
        """Return the number of adjacent rows for each prompt, or 1 if rows cannot share a prefix.

        Rows share a prefix if equal prompts are adjacent, in groups of equal size, and no row
        overflows the context.
        """
        num_rows = len(self.first_row_with_same_prompt)
        num_prompts = len(set(self.first_row_with_same_prompt))
        group_size = num_rows // num_prompts
        first_row_of_group = [row // group_size * group_size for row in range(num_rows)]
        is_grouped = self.first_row_with_same_prompt == first_row_of_group
        # - 1: the net does not see the last new token
        fits_context = max(self.lengths) + self.max_new_tokens - 1 <= self.context_length
        return group_size if is_grouped and fits_context else 1

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
        """Allocate a KV cache for the net.

        Args:
            net: maps tokens (b t) and a KV cache to logits; `blocks` has the layers by their index.
            token_buffer: tokens of all rows.
            bucket_size: the attended length of the cache is rounded up to a multiple of it.
        """
        super().__init__(net, token_buffer)
        block_names: Iterable[str] = net.blocks  # type: ignore[assignment]
        # the largest index: a pipeline stage can hold the last blocks only
        num_layers = 1 + max(map(int, block_names))
        has_experts = any(isinstance(m, MixtureOfExperts) for m in net.modules())
        # texts of one prompt form a group, if the rows allow it; otherwise each is its own group.
        # The capacity of experts depends on the whole row: such rows cannot share a prefix
        self.group_size = 1 if has_experts else token_buffer.shared_prefix_group_size()
        num_texts = len(token_buffer.lengths)
        if self.group_size > 1:  # prompts are stored once, slots are for the new tokens only
            self.prefix_lengths = token_buffer.lengths
            num_slots = token_buffer.max_new_tokens
        else:
            self.prefix_lengths = [0] * num_texts
            # a row whose context is full drops its older half and starts again at slot 0
            num_slots = token_buffer.context_length
        self.cache = KVCache(
            num_layers,
            num_rows=num_texts // self.group_size,
            num_slots=num_slots,
            device=token_buffer.tokens.device,
            bucket_size=bucket_size,
            group_size=self.group_size,
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
        """Prepare the next `decode_step` on the host; return the attended length of the cache.

        The cache of rows whose window has dropped its older half is filled anew. It gets all tokens
        but the last one, which the decode step computes for all rows. Steps of an equal length have
        equal shapes.

        Args:
            overflowed_rows: rows that have dropped their older half; they belong to no group, as
                only texts that fit into the context share a prefix.
        """
        token_buffer = self.token_buffer
        if overflowed_rows:
            visible, visible_lengths = token_buffer.visible_window(overflowed_rows, num_omitted=1)
            self.cache.begin_prefill(
                visible_lengths, torch.tensor(overflowed_rows, device=token_buffer.tokens.device)
            )
            if visible.shape[1]:
                self.net(visible, self.cache)  # writes the cache; the logits are not needed
        visible_lengths_per_row = [
            n - start
            for n, start in zip(token_buffer.lengths, token_buffer.window_starts, strict=True)
        ]
        # tokens of a shared prefix are stored apart and need no slots
        slots_per_row = [
            n - prefix
            for n, prefix in zip(visible_lengths_per_row, self.prefix_lengths, strict=True)
        ]
        # if all texts fill the same slots, the attention needs no mask
        is_uniform = min(visible_lengths_per_row) == max(visible_lengths_per_row)
        # `reserve` rounds the number of slots up to a bucket: the attended length of the step
        return self.cache.reserve(max(slots_per_row), is_uniform=is_uniform)

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

    Args:
        lengths: tokens of each prompt.
        max_new_tokens: maximum number of tokens to generate.
        context_length: maximum number of tokens that the net sees.
        context_overflow: "slide" or "error".
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
    # - 1: the net does not see the last new token
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
