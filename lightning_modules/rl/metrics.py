"""What to watch while a reward is climbed: rewards are gamed, and texts die, in known ways.

    distinct          share of texts that are different           one text for every prompt: 1/b
    jaccard           mean distance of pairs, word 4-grams        near 0: all alike
    nearest_jaccard   mean distance to the nearest other text     the same, seen earlier
    vocabulary        share of all words that the corpus has      gibberish: near 0
    distinct_words    different words in the batch                a narrow language
    kl, kl_k3         nats a token away from the reference
    entropy           nats a token that the policy still leaves open
    zero_advantages   share of samples whose reward teaches nothing

All of it is of the batch over all ranks.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..generation.generate_text import GenerationOutput
from .kl import KL, estimate_kl
from .rewards.base import Facts, Reward
from .text_similarity import mean_pairwise_distance, nearest_distance, pairwise_jaccard_distance


def text_metrics(texts: Sequence[str], corpus_stats: Facts | None) -> dict[str, float]:
    """The measures of the texts themselves."""
    distance = pairwise_jaccard_distance(texts)
    words = [word for text in texts for word in text.split()]
    metrics = {
        "distinct": len(set(texts)) / len(texts),
        "jaccard": mean_pairwise_distance(distance),
        "nearest_jaccard": float(nearest_distance(distance).mean()),
        "distinct_words": float(len(set(words))),
    }
    if corpus_stats is not None:
        num_known = sum(word in corpus_stats.words for word in words)
        metrics["vocabulary"] = num_known / max(len(words), 1)
    return metrics


def reward_metrics(
    reward_fns: Sequence[Reward], values: Tensor, rewards: Tensor
) -> dict[str, float]:
    """Mean and spread of each term (terms, b), and of the sum (b); NaN counts nowhere."""
    metrics = {}
    for name, row in [("reward", rewards), *zip((t.name for t in reward_fns), values, strict=True)]:
        scored = row[~row.isnan()]
        if len(scored):
            metrics[name] = scored.mean().item()
            metrics[f"{name}_spread"] = scored.std(correction=0).item()
    return metrics


def token_statistics(
    generated: GenerationOutput, ref_logprobs: Tensor | None, kl: KL, max_new_tokens: int
) -> Tensor:
    """Sums over each sample's tokens, float64 (b 5): k1, k3, -log p, tokens; last KL's penalty."""
    logprobs, mask = generated.log_probabilities.double(), generated.mask
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
    """Means a token of what `token_statistics` has summed (b 5)."""
    k1, k3, entropy, tokens, _ = statistics.sum(0).tolist()
    metrics = {"entropy": entropy / tokens, "tokens": tokens}
    return metrics | ({"kl": k1 / tokens, "kl_k3": k3 / tokens} if has_reference else {})
