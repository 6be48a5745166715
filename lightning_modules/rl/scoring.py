"""The judge: from what all ranks wrote to this rank's weights, and what there is to see of it.

    tokens of all ranks -> texts -> terms of ours -> answers of all ranks -> rewards -> weights

Ranks exchange tokens and numbers through one function, `gathered`; that is all the judge knows of
them, and on one process it gives back what it gets.

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

from ..generation.generate_text import Generated
from ..generation.stop_strings import cut
from .advantages import TIED, Estimator
from .kl import KL
from .metrics import measure, of_rewards, of_texts, of_tokens
from .rewards.base import Facts, Reward, RewardError, Samples, check_scored, combine, evaluate


class Judgement(NamedTuple):
    """What the judge says."""

    weights: Tensor  # (b)
    share: Tensor  # () tokens of a rank, the mean over ranks
    metrics: dict[str, float]  # of all ranks
    rows: list[dict[str, Any]]  # prompt, text, reward and terms of this rank's samples


@dataclass
class Judge:
    """Scores texts by the terms and weighs them by the estimator."""

    terms: Sequence[Reward]
    estimator: Estimator
    kl: KL
    length: int  # most tokens a text may have
    group_size: int
    tokenizer: Tokenizer
    stop: str | None
    corpus: Facts | None
    gathered: Callable[[Tensor], Tensor]  # rows (b ...) -> rows of all ranks (B ...), on the CPU
    rank: int

    def __call__(
        self,
        prompts: Sequence[str],
        columns: dict[str, list[Any]],
        written: Generated,
        warm: Tensor | None,
        plain: Tensor | None,
    ) -> Judgement:
        """Judge what was written after prompts (one a group).

        Args:
            prompts: b / group_size of them.
            columns: what the data say of each prompt.
            written: (b n).
            warm: the reference's log-probabilities (b n) at the sampling temperature.
            plain: at temperature 1.
        """
        own = written.tokens.masked_fill(~written.mask, -1)  # (b n)
        everyone = self.decode(self.gathered(own))  # texts (B)
        b, first, group = len(own), self.rank * len(own), self.group_size
        samples = Samples(
            prompts=[text for text in prompts for _ in range(group)],
            texts=everyone[first : first + b],
            tokens=written.tokens.cpu(),
            mask=written.mask.cpu(),
            log_probabilities=written.log_probabilities.cpu(),
            reference=None if plain is None else plain.cpu(),
            columns={k: [v for v in each for _ in range(group)] for k, each in columns.items()},
            corpus=self.corpus,
            everyone=everyone,
            first=first,
        )
        measured = measure(written, warm, self.kl, self.length)  # (b 5)
        answers = self._answers(samples).to(measured)  # (b terms)
        both = self.gathered(torch.cat((answers, measured), 1))  # (B terms+5)
        answers, measured = both[:, : len(self.terms)].T, both[:, len(self.terms) :]
        check_scored(self.terms, answers)
        rewards = combine(self.terms, answers)  # (B)
        earned = self.estimator.weights(rewards, group)  # (B)
        weights = earned - self._divergence(measured[:, 4], rewards)
        metrics = of_rewards(self.terms, answers, rewards) | of_texts(everyone, self.corpus)
        metrics |= of_tokens(measured, reference=warm is not None)
        idle = earned.abs() <= TIED * earned.abs().max()  # but for rounding
        metrics["zero_advantages"] = idle.double().mean().item()
        if not earned.any():
            kept = " but to stay near the reference" if self.kl.beta else ""
            rank_zero_warn(
                f"all {len(weights)} samples weigh 0, since their rewards are alike "
                f"({rewards.nanmean():.4g}): this step teaches nothing{kept}"
            )
        share = measured[:, 3].sum() * b / len(weights)
        rows = self._rows(samples, rewards, answers)
        return Judgement(weights[first : first + b], share, metrics, rows)

    def decode(self, tokens: Tensor) -> list[str]:
        """Texts of tokens (B n), up to the stop; -1 is none."""
        left_out, stops = (-1, self.tokenizer.end), [] if self.stop is None else [self.stop]
        rows = ([n for n in row if n not in left_out] for row in tokens.tolist())
        return [cut(self.tokenizer.decode(row), stops) for row in rows]

    def _divergence(self, penalty: Tensor, rewards: Tensor) -> Tensor:
        """What the divergence (B) takes from the weights, if it stands in the reward."""
        if not self.kl.beta or self.kl.where == "loss":
            return torch.zeros_like(rewards)
        scored = penalty.where(~rewards.isnan(), math.nan)
        return self.kl.beta * self.estimator.linear().weights(scored, self.group_size)

    def _answers(self, samples: Samples) -> Tensor:
        """The terms' answers (b terms); if they fail on one rank, all ranks end."""
        error: RewardError | None = None
        answers = torch.zeros(len(self.terms), len(samples.texts), dtype=torch.float64)
        try:
            answers = evaluate(self.terms, samples)
        except RewardError as problem:
            error = problem
        if self.gathered(torch.tensor([float(error is not None)])).any():
            raise error or RewardError("a reward failed on another rank, which says why")
        return answers.T

    def _rows(self, samples: Samples, rewards: Tensor, answers: Tensor) -> list[dict[str, Any]]:
        names = [term.name for term in self.terms]
        rows = []
        for i, (prompt, text) in enumerate(zip(samples.prompts, samples.texts, strict=True)):
            place = samples.first + i
            said = dict(zip(names, answers[:, place].tolist(), strict=True))
            rows.append({"prompt": prompt, "text": text, "reward": rewards[place].item()} | said)
        return rows
