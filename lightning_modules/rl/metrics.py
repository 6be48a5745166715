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

from ..generation.generate_text import Generated
from .kl import KL, estimate
from .rewards.base import Facts, Reward
from .text_similarity import distances, mean_pairwise, to_nearest


def of_texts(texts: Sequence[str], corpus: Facts | None) -> dict[str, float]:
    """The measures of the texts themselves."""
    apart = distances(texts)
    words = [word for text in texts for word in text.split()]
    found = {
        "distinct": len(set(texts)) / len(texts),
        "jaccard": mean_pairwise(apart),
        "nearest_jaccard": float(to_nearest(apart).mean()),
        "distinct_words": float(len(set(words))),
    }
    if corpus is not None:
        known = sum(word in corpus.words for word in words)
        found["vocabulary"] = known / max(len(words), 1)
    return found


def of_rewards(terms: Sequence[Reward], answers: Tensor, rewards: Tensor) -> dict[str, float]:
    """Mean and spread of each term (terms, b), and of the sum (b); NaN counts nowhere."""
    found = {}
    for name, row in [("reward", rewards), *zip((t.name for t in terms), answers, strict=True)]:
        scored = row[~row.isnan()]
        if len(scored):
            found[name] = scored.mean().item()
            found[f"{name}_spread"] = scored.std(correction=0).item()
    return found


def measure(written: Generated, warm: Tensor | None, kl: KL, length: int) -> Tensor:
    """Sums over each sample's tokens, float64 (b 5): k1, k3, -log p, tokens; last KL's penalty."""
    log_p, mask = written.log_probabilities.double(), written.mask
    ref = log_p if warm is None else warm.double()
    rows = [estimate("k1", log_p, ref), estimate("k3", log_p, ref), -log_p, torch.ones_like(log_p)]
    sums = [row.where(mask, 0.0).sum(1) for row in rows]
    return torch.stack([*sums, kl.penalty(log_p, ref, mask, length)], 1)


def of_tokens(measured: Tensor, reference: bool) -> dict[str, float]:
    """Means a token of what `measure` has summed (b 5)."""
    k1, k3, entropy, tokens, _ = measured.sum(0).tolist()
    found = {"entropy": entropy / tokens, "tokens": tokens}
    return found | ({"kl": k1 / tokens, "kl_k3": k3 / tokens} if reference else {})
