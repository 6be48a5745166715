"""Rollout metrics that reveal reward hacking and mode collapse during policy-gradient training.

    frac_unique_texts          fraction of distinct texts               1/b if all texts are equal
    jaccard_distance_mean      mean pairwise distance, word 4-grams     near 0 if texts are similar
    jaccard_distance_nearest   mean distance to the nearest other text  falls earlier than the mean
    frac_in_vocab              fraction of words found in the corpus    near 0 for gibberish
    num_unique_words           different words in the batch             falls in a narrow language
    kl, kl_k3                  KL divergence from the reference, in nats per token
    entropy                    entropy of the policy, in nats per token
    frac_zero_advantage        fraction of samples with advantage 0

All metrics are of the batch over all ranks.

A stopwatch measures the wall-clock seconds of each phase of a step (`time/rollout_s`, ...), without
device synchronization. A rollout ends with a read of its tokens, and a reward with Python numbers.
So their times include the device's time. The time of an update on a GPU is only the time to launch
its kernels, and to wait for space in the queue.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from ..generation.generate_text import GenerationOutput
from .kl import KL, estimate_kl
from .rewards.base import CorpusStats, Reward
from .text_similarity import mean_pairwise_distance, nearest_distance, pairwise_jaccard_distance


def text_metrics(texts: Sequence[str], corpus_stats: CorpusStats | None) -> dict[str, float]:
    """Compute the metrics of the texts themselves."""
    distance = pairwise_jaccard_distance(texts)
    words = [word for text in texts for word in text.split()]
    metrics = {
        "frac_unique_texts": len(set(texts)) / len(texts),
        "jaccard_distance_mean": mean_pairwise_distance(distance),
        "jaccard_distance_nearest": float(nearest_distance(distance).mean()),
        "num_unique_words": float(len(set(words))),
    }
    if corpus_stats is not None:
        num_known = sum(word in corpus_stats.words for word in words)
        metrics["frac_in_vocab"] = num_known / max(len(words), 1)
    return metrics


def reward_metrics(
    reward_fns: Sequence[Reward], values: Tensor, rewards: Tensor
) -> dict[str, float]:
    """Mean and standard deviation of each reward (terms, b) and of the sum (b); NaN is ignored."""
    metrics = {}
    for name, row in [("reward", rewards), *zip((t.name for t in reward_fns), values, strict=True)]:
        scored = row[~row.isnan()]
        if len(scored):
            metrics[name] = scored.mean().item()
            metrics[f"{name}_std"] = scored.std(correction=0).item()
    return metrics


def token_statistics(
    generated: GenerationOutput, ref_logprobs: Tensor | None, kl: KL, max_new_tokens: int
) -> Tensor:
    """Sums over each sample's tokens, float64 (b 5): k1, k3, -log p, tokens, KL penalty."""
    logprobs, mask = generated.logprobs.double(), generated.mask
    reference = logprobs if ref_logprobs is None else ref_logprobs.double()
    rows = [
        estimate_kl("k1", logprobs, reference),
        estimate_kl("k3", logprobs, reference),
        -logprobs,
        torch.ones_like(logprobs),
    ]
    sums = [row.where(mask, 0.0).sum(1) for row in rows]
    return torch.stack([*sums, kl.kl_penalty(logprobs, reference, mask, max_new_tokens)], 1)


def token_metrics(statistics: Tensor, has_reference: bool) -> dict[str, float]:
    """Means per token from the sums (b 5) of `token_statistics`."""
    k1, k3, entropy, tokens, _ = statistics.sum(0).tolist()
    metrics = {"entropy": entropy / tokens, "num_tokens": tokens}
    return metrics | ({"kl": k1 / tokens, "kl_k3": k3 / tokens} if has_reference else {})


class Stopwatch:
    """Seconds of named phases: `with stopwatch("reward"): ...`, or `start` and `stop`."""

    def __init__(self) -> None:
        """Start without any phase."""
        self.durations_s: dict[str, float] = {}
        self._start_times: dict[str, float] = {}

    def start(self, name: str) -> None:
        """Start a phase."""
        self._start_times[name] = time.perf_counter()

    def stop(self, name: str) -> None:
        """Stop a phase and store its duration in seconds."""
        self.durations_s[f"{name}_s"] = time.perf_counter() - self._start_times[name]

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Measure the duration of a `with` block."""
        self.start(name)
        yield
        self.stop(name)
