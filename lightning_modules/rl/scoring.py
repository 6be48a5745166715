"""Rollout scoring: from generated tokens of all ranks to rewards, advantages and metrics.

    tokens of all ranks -> texts -> terms on this rank -> terms of all ranks -> rewards
    -> advantages

Ranks exchange tokens and numbers only by `all_gather`; on one process it returns its argument.

Axes: b samples of this rank, B of all ranks, n new tokens.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from ravine.datamodules.tokenizers import Tokenizer

from ..generation.generate_text import GenerationOutput, truncate_at_stop
from .advantages import RELATIVE_TIE_TOLERANCE, AdvantageEstimator
from .kl import KL
from .metrics import reward_metrics, text_metrics, token_metrics, token_statistics
from .rewards.base import (
    CorpusStats,
    Reward,
    RewardError,
    RewardInputs,
    check_scored,
    score_all,
    weighted_sum,
)


class ScoredRollout(NamedTuple):
    """Advantages, metrics and sample rows of a scored rollout."""

    advantages: Tensor  # (b)
    tokens_per_rank: Tensor  # () mean over ranks of the number of tokens
    metrics: dict[str, float]  # over all ranks
    rows: list[dict[str, Any]]  # prompt, text, reward and terms of this rank's samples


@dataclass
class RolloutScorer:
    """Score texts by the reward terms and compute advantages by the estimator."""

    reward_fns: Sequence[Reward]
    estimator: AdvantageEstimator
    kl: KL
    max_new_tokens: int  # maximum number of tokens of a completion
    group_size: int
    tokenizer: Tokenizer
    stop: str | None
    corpus_stats: CorpusStats | None
    all_gather: Callable[[Tensor], Tensor]  # rows (b ...) -> rows of all ranks (B ...), on the CPU
    dp_rank: int

    def __call__(
        self,
        prompts: Sequence[str],
        columns: dict[str, list[Any]],
        generated: GenerationOutput,
        ref_logprobs: Tensor | None,
        ref_logprobs_t1: Tensor | None,
    ) -> ScoredRollout:
        """Score the completions of prompts (one prompt for each group).

        Axes: b samples of this rank, B samples of all ranks, n new tokens. `all_gather` returns the
        rows of all ranks, on the CPU; with one process it returns its argument.

        Args:
            prompts: b / group_size prompts.
            columns: columns of the data, with a value for each prompt.
            generated: tokens, logprobs and mask, all (b n).
            ref_logprobs: the reference's logprobs (b n) at the sampling temperature.
            ref_logprobs_t1: the reference's logprobs (b n) at temperature 1.
        """
        # -1 after the end of a text: `decode` skips it
        local_tokens = generated.tokens.masked_fill(~generated.mask, -1)  # (b n)
        all_texts = self.decode(self.all_gather(local_tokens))  # B texts
        b, group_size = len(local_tokens), self.group_size
        rank_offset = self.dp_rank * b  # index of this rank's first text in the batch
        inputs = RewardInputs(
            prompts=[text for text in prompts for _ in range(group_size)],
            texts=all_texts[rank_offset : rank_offset + b],
            tokens=generated.tokens.cpu(),
            mask=generated.mask.cpu(),
            logprobs=generated.logprobs.cpu(),
            ref_logprobs=None if ref_logprobs_t1 is None else ref_logprobs_t1.cpu(),
            columns={
                k: [v for v in column for _ in range(group_size)] for k, column in columns.items()
            },
            corpus_stats=self.corpus_stats,
            all_texts=all_texts,
            rank_offset=rank_offset,
        )
        local_statistics = token_statistics(generated, ref_logprobs, self.kl, self.max_new_tokens)
        # (b terms); it raises on all ranks if a reward fails on one of them
        local_values = self._score_on_all_ranks(inputs).to(local_statistics)
        # values and statistics of all ranks, by one all-gather: (B terms+5). The five statistics
        # are sums over the tokens of a sample
        gathered = self.all_gather(torch.cat((local_values, local_statistics), 1))
        num_terms = len(self.reward_fns)
        # (terms B), and (B 5)
        values, statistics = gathered[:, :num_terms].T, gathered[:, num_terms:]
        _k1, _k3, _entropy, num_tokens, kl_penalty = statistics.unbind(1)  # each (B)
        # raises if a term has scored no sample; a single None is NaN, and gets advantage 0
        check_scored(self.reward_fns, values)
        rewards = weighted_sum(self.reward_fns, values)  # (B)
        # of all ranks, as a baseline can be the mean of the whole batch; a rank keeps its own part
        reward_advantages = self.estimator.advantages(rewards, group_size)  # (B)
        # _kl_advantages (B): 0 unless the KL penalty is in the reward
        advantages = reward_advantages - self._kl_advantages(kl_penalty, rewards)
        metrics = reward_metrics(self.reward_fns, values, rewards)
        metrics |= text_metrics(all_texts, self.corpus_stats)
        metrics |= token_metrics(statistics, has_reference=ref_logprobs is not None)
        # advantages within rounding of 0 count as 0 in the metric
        rounding = RELATIVE_TIE_TOLERANCE * reward_advantages.abs().max()
        is_zero = reward_advantages.abs() <= rounding
        metrics["frac_zero_advantage"] = is_zero.double().mean().item()
        if not reward_advantages.any():
            effect = "only the KL term contributes" if self.kl.beta else "no term contributes"
            rank_zero_warn(
                f"all {len(advantages)} advantages are 0, because the rewards are equal "
                f"({rewards.nanmean():.4g}); {effect} to this step"
            )
        num_ranks = len(advantages) // b  # all ranks have b samples
        local_advantages = advantages[rank_offset : rank_offset + b]
        rows = self._sample_rows(inputs, rewards, values)
        return ScoredRollout(local_advantages, num_tokens.sum() / num_ranks, metrics, rows)

    def decode(self, tokens: Tensor) -> list[str]:
        """Decode tokens (B n) to texts, up to the stop string; -1 is no token."""
        skipped_ids, stops = (-1, self.tokenizer.eos_id), [] if self.stop is None else [self.stop]
        rows = ([n for n in row if n not in skipped_ids] for row in tokens.tolist())
        return [truncate_at_stop(self.tokenizer.decode(row), stops) for row in rows]

    def _kl_advantages(self, penalty: Tensor, rewards: Tensor) -> Tensor:
        """Advantages (B) of the KL penalty, to be subtracted; 0 if `kl.placement` is "loss"."""
        if not self.kl.beta or self.kl.placement == "loss":
            return torch.zeros_like(rewards)
        scored_penalty = penalty.where(~rewards.isnan(), math.nan)
        return self.kl.beta * self.estimator.for_kl().advantages(scored_penalty, self.group_size)

    def _score_on_all_ranks(self, inputs: RewardInputs) -> Tensor:
        """Values of the terms (b terms); if a term fails on one rank, all ranks raise."""
        error: RewardError | None = None
        values = torch.zeros(len(self.reward_fns), len(inputs.texts), dtype=torch.float64)
        try:
            values = score_all(self.reward_fns, inputs)
        except RewardError as problem:
            error = problem
        if self.all_gather(torch.tensor([float(error is not None)])).any():
            raise error or RewardError("a reward failed on another rank, which prints the reason")
        return values.T

    def _sample_rows(
        self, inputs: RewardInputs, rewards: Tensor, values: Tensor
    ) -> list[dict[str, Any]]:
        names = [term.name for term in self.reward_fns]
        rows = []
        for i, (prompt, text) in enumerate(zip(inputs.prompts, inputs.texts, strict=True)):
            index = inputs.rank_offset + i
            reward_values = dict(zip(names, values[:, index].tolist(), strict=True))
            rows.append(
                {"prompt": prompt, "text": text, "reward": rewards[index].item()} | reward_values
            )
        return rows
