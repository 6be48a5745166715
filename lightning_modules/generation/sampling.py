"""Sampling: the distribution of the next token, used both to sample and to score tokens.

    temperature   p ∝ exp(logits / temperature); 0 takes the most probable token
    top_k         only the k most probable tokens
    min_p         only tokens at least min_p times as probable as the most probable token
    top_p         only the smallest set of most probable tokens with this total probability

One uniform number u selects a token: the first token whose cumulative probability reaches u. The
number depends on (seed, text, position) only. So a text does not depend on the other texts of the
batch, on the device, or on the cache.

Axes: b batch, t time, v vocabulary.
"""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ravine.datamodules.samplers import seeded_generator
from ravine.errors import UsageError


@dataclass(frozen=True)
class DecodingConfig:
    """Sampling settings; None disables a rule.

    For example:

        DecodingConfig(temperature=0.8, top_k=40).compute_logprobs(logits)
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None

    def __post_init__(self) -> None:
        """Raise UsageError for a value out of range."""
        # by field: whether the value is valid, and the allowed values
        rules = {
            "temperature": (
                0 <= self.temperature < math.inf,
                "0 (the most probable token) or more",
            ),
            "top_k": (self.top_k is None or self.top_k >= 1, "1 or more"),
            "top_p": (self.top_p is None or 0 < self.top_p <= 1, "above 0, up to 1"),
            "min_p": (self.min_p is None or 0 <= self.min_p < 1, "0 to below 1"),
        }
        typical = {"temperature": 0.8, "top_k": 40, "top_p": 0.9, "min_p": 0.05}
        for name, (is_valid, allowed) in rules.items():
            if not is_valid:
                raise UsageError(
                    f"DecodingConfig: {name}={getattr(self, name)} is out of range",
                    [allowed],
                    f"use {name}={typical[name]}",
                    flag=f"--{name}={typical[name]}, or --model.sampling.{name}={typical[name]}",
                )

    def check_vocab_size(self, vocab_size: int) -> None:
        """Raise UsageError if `top_k` exceeds the vocabulary size."""
        if self.top_k is not None and self.top_k > vocab_size:
            raise UsageError(
                f"DecodingConfig: top_k={self.top_k} exceeds the vocabulary of {vocab_size} tokens",
                [f"1 to {vocab_size}"],
                f"use top_k={min(40, vocab_size)}",
                flag=(
                    f"--top_k={min(40, vocab_size)}, or "
                    f"--model.sampling.top_k={min(40, vocab_size)}"
                ),
            )

    def compute_logprobs(self, logits: Tensor, never_mask: Tensor | None = None) -> Tensor:
        """Compute the logprobs (... v) of the sampling distribution; excluded tokens have -inf.

        At temperature 0 the logits are not scaled; top_k, min_p and top_p apply as usual. The dtype
        is at least fp32: bf16 keeps 3 digits, and probabilities would be off by a percent.

        Args:
            logits: output of the net (... v).
            never_mask: token ids (...) that are never excluded. They were sampled earlier, and only
                rounding can have moved them across a threshold since then.
        """
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.temperature > 0:
            logits = logits / self.temperature
        # before the filters, which change `logits`; written back at the end
        kept_logits = None if never_mask is None else logits.gather(-1, never_mask[..., None])
        if self.top_k is not None:
            threshold = logits.topk(self.top_k).values[..., -1:]  # the k-th largest logit
            logits = logits.masked_fill(logits < threshold, -math.inf)
        if self.min_p:
            threshold = logits.amax(-1, keepdim=True) + math.log(self.min_p)
            logits = logits.masked_fill(logits < threshold, -math.inf)
        if self.top_p is not None and self.top_p < 1:
            ordered, token_ids = logits.softmax(-1).sort(descending=True)
            cumulative_before = ordered.cumsum(-1) - ordered  # of the more probable tokens
            is_outside = torch.zeros_like(cumulative_before, dtype=torch.bool)
            # back from the order of probabilities to that of token ids
            is_outside = is_outside.scatter(-1, token_ids, cumulative_before >= self.top_p)
            logits = logits.masked_fill(is_outside, -math.inf)
        if never_mask is not None and kept_logits is not None:
            logits = logits.scatter(-1, never_mask[..., None], kept_logits)
        return logits.log_softmax(-1)

    def sample(self, logprobs: Tensor, uniform: Tensor) -> Tensor:
        """Sample tokens (b) from logprobs (b v) with numbers `uniform` (b) in (0, 1]."""
        if self.temperature == 0:
            return logprobs.argmax(-1)
        # fp32 would lose rare tokens of a vocabulary of 50,000
        cumulative = logprobs.double().exp().cumsum(-1)
        return (cumulative < uniform[:, None] * cumulative[:, -1:]).sum(-1)


def row_uniforms(seed: int, row_keys: Sequence[Hashable], num_draws: int) -> Tensor:
    """Uniform numbers in (0, 1], float64 (b n); a row depends on the seed and its own key only."""
    rows = [
        torch.rand(
            num_draws,
            generator=seeded_generator(seed, "sampling", *_as_tuple(row_key)),
            dtype=torch.float64,
        )
        for row_key in row_keys
    ]
    return 1 - torch.stack(rows)  # rand gives [0, 1), and 0 would select an excluded token


def _as_tuple(row_key: Hashable) -> tuple:
    return row_key if isinstance(row_key, tuple) else (row_key,)
