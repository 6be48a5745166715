"""Shared-prefix batches: pack texts with a common prompt so that each prompt is computed once.

    two prompts, two texts after each         one packed row in place of four
    p p p a a   p p p b b                     p p p | q q q | a a | b b | c c | d d
    q q q c c   q q q d d                     prefixes        completions

A completion attends to its prefix and to itself. Embeddings, norms and linear maps act on each
token separately and need no change; only positions and attention depend on the packing. The keys
and values of a prefix accumulate gradients from all of its completions: up to rounding, logits and
gradients equal those of unpacked texts. Logits are not needed for prefix tokens, so the last block
and the head skip them.

Axes: g prompts, s texts of each, b = g s, p prefix, n completion; t = g p + b n, T = p + n;
h heads, k head width, d model, v vocabulary.
"""

from collections.abc import Callable, Sequence

import torch
from einops import rearrange, repeat
from torch import Tensor, nn


class SharedPrefixBatch:
    """Prompts and completions packed into one row; it takes the place of the KV cache.

        batch = SharedPrefixBatch([tokenizer.encode("ROMEO:")], completions, num_layers=4)
        logits = net(batch.tokens, batch)          # (b n v): they predict `completions` (b n)

    The packed completion begins with the last token of its prompt and omits its own last token.

    Args:
        prompts: g prompts of any lengths, each the prompt of s texts.
        completions: tokens (b n) after the prompts; completions of one prompt are adjacent.
        num_layers: blocks of the net.
    """

    def __init__(self, prompts: Sequence[Tensor], completions: Tensor, num_layers: int) -> None:
        """Compute the packed tokens, their positions and the attention mask.

        All prefixes, then all completions, form one row of t tokens. So the net computes a prompt
        once, and not s times.

        Axes: g prompts, s texts of each, b = g s; p tokens of the longest prefix, n tokens of a
        completion; t = g p + b n tokens of the packed row; T = p + n tokens that a completion sees.

        Args:
            prompts: token ids of g prompts of any lengths.
            completions: tokens (b n), adjacent for texts of one prompt.
            num_layers: blocks of the net; each gets a `SharedPrefixLayer`.
        """
        (b, n), g, device = completions.shape, len(prompts), completions.device
        s = b // g  # texts of each prompt
        # a prefix is a prompt without its last token, whose logits predict the first new token.
        # Prefixes, positions and mask are built on the CPU, and each is copied to the device once
        prefix_lengths = torch.tensor([len(prompt) - 1 for prompt in prompts])  # (g)
        prefixes = nn.utils.rnn.pad_sequence(
            [prompt[:-1].cpu() for prompt in prompts], batch_first=True
        )  # (g p)
        last_prompt_tokens = torch.stack([prompt[-1] for prompt in prompts])  # (g)
        last_prompt_tokens = repeat(last_prompt_tokens, "g -> (g s) 1", s=s).to(device)
        completion_inputs = torch.cat((last_prompt_tokens, completions[:, :-1]), 1)  # (b n)
        packed = torch.cat((prefixes.to(device).flatten(), completion_inputs.flatten()))
        self.tokens = packed[None]  # (1 t)
        self.segment_lengths = [prefixes.numel(), completion_inputs.numel()]  # their sum is t
        self.num_prompts, self.group_size, self.completion_length = g, s, n
        # the first token of a completion, the last of its prompt, is at position prefix_length
        prefix_positions, completion_offsets = torch.arange(prefixes.shape[1]), torch.arange(n)
        completion_positions = repeat(
            prefix_lengths[:, None] + completion_offsets, "g n -> (g s n)", s=s
        )
        positions = torch.cat((prefix_positions.repeat(g), completion_positions))
        self.positions = positions.to(device)  # (t)
        is_token = prefix_positions < prefix_lengths[:, None]  # (g p), false for padding
        # true where a token (n) attends to a key (T); the axis of size 1 is for all heads.
        # The prefixes need no mask: their attention is causal, and their padding is on the right
        sees_prefix = repeat(is_token, "g p -> (g s) 1 n p", s=s, n=n)
        sees_completion = (completion_offsets <= completion_offsets[:, None]).expand(b, 1, n, n)
        attn_mask = torch.cat((sees_prefix, sees_completion), -1)  # (b 1 n T)
        is_uniform = bool((prefix_lengths == prefix_lengths[0]).all())
        # texts after prefixes of one length have equal masks: (n T), else (b 1 n T)
        self.attn_mask = (attn_mask[0, 0] if is_uniform else attn_mask).to(device)
        # the last layer returns the completions only: no logits are computed for the prefixes
        self.layers = [
            SharedPrefixLayer(self, is_last=layer == num_layers - 1) for layer in range(num_layers)
        ]

    def position_ids(self, prompt_positions: Tensor) -> Tensor:
        """Return the positions (t) of the packed tokens."""
        return self.positions

    def select_completions(self, x: Tensor) -> Tensor:
        """Select the features (1 (b n) d) of the completions from (1 t d).

        If x holds the completions only, x is returned.
        """
        return x[:, -self.segment_lengths[1] :]

    def select_outputs(self, x: Tensor) -> Tensor:
        """Select the features (b n d) of the tokens that have logits."""
        return rearrange(self.select_completions(x), "1 (b n) d -> b n d", n=self.completion_length)


class SharedPrefixLayer:
    """Attention of one layer over a shared-prefix batch."""

    def __init__(self, batch: SharedPrefixBatch, is_last: bool) -> None:
        """Store the batch and whether the layer is the last one."""
        self.batch, self.is_last = batch, is_last

    def positions_of(self, length: int) -> Tensor:
        """Index (t) into a table of positions (t k)."""
        return self.batch.positions

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_fn: Callable[..., Tensor],
        dropout: float,
    ) -> Tensor:
        """Attend within prefixes, and from each completion to its prefix and itself; (1 h t k).

        Args:
            query: queries of the packed tokens, (1 h t k).
            key: their keys, (1 h t k).
            value: their values, (1 h t k).
            attention_fn: causal attention of (query, key, value, dropout, attn_mask).
            dropout: dropout probability of the attention weights.
        """
        batch = self.batch
        prefixes, completions = [], []  # query, key and value of each
        for projected in (query, key, value):
            prefix, completion = projected.split(batch.segment_lengths, 2)
            prefixes.append(rearrange(prefix, "1 h (g p) k -> g h p k", g=batch.num_prompts))
            completions.append(
                rearrange(completion, "1 h (b n) k -> b h n k", n=batch.completion_length)
            )
        # each completion attends to its prefix and to itself: T = p + n keys
        keys, values = (
            torch.cat((repeat(prefix, "g h p k -> (g s) h p k", s=batch.group_size), completion), 2)
            for prefix, completion in zip(prefixes[1:], completions[1:], strict=True)
        )  # (b h T k)
        completion_query = completions[0]
        outputs = (
            attention_fn(*prefixes, dropout),  # causal
            attention_fn(completion_query, keys, values, dropout, batch.attn_mask),
        )
        # the first output is (g h p k), the second (b h n k); both become rows of tokens
        flat = [rearrange(output, "b h n k -> (b n) h k") for output in outputs]
        return rearrange(torch.cat(flat), "t h k -> 1 h t k")

    def select_positions(self, x: Tensor) -> Tensor:
        """Return the features (1 t d); in the last layer those of the completions only."""
        return self.batch.select_completions(x) if self.is_last else x
