"""A rollout: what the policy wrote and by which weight; and the loss that a rollout stands for.

    prompts -> generate -> tokens, mask -> rewards -> weights       no gradient, before the step
    rollout -> log-probabilities again, with gradient -> loss       the step

The second pass computes what the first one knew, because the first was cached, recorded, or in
another precision: the gradient is taken of the net as it trains. Both see the net in evaluation
mode (dropout would make them two policies) and through one `Sampling`. It reads a prompt once for
all of its samples, if the net can (`language/branches.py`).

Axes: g prompts, b samples, t positions, n new tokens, v vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from ravine.errors import UsageError

from ..generation.generate_text import chosen
from ..generation.sampling import Sampling
from ..generation.shared_prefix import Branches
from ..nn import Transformer
from ..nn.attention import ATTENTIONS
from ..nn.moe import MixtureOfExperts
from ..nn.transformer import Block
from .advantages import Estimator
from .kl import KL

Net = Callable[..., Tensor]


class Rollout(NamedTuple):
    """A batch of samples on the net's device."""

    text: Tensor  # (b t) prompt and continuation, right-padded, without the last token
    places: Tensor  # (b n) positions in the text whose logits drew the new tokens
    tokens: Tensor  # (b n)
    mask: Tensor  # (b n) true up to the end, the stop included
    sampled: Tensor  # (b n) log-probabilities when they were drawn
    weights: Tensor  # (b) from the rewards
    share: Tensor  # () tokens of a rank, the mean over ranks
    reference: Tensor | None = None  # (b n) the reference's log-probabilities
    branches: Branches | None = None  # text and places once more, each prompt once


def branches_for(net: nn.Module, prompts: Sequence[Tensor], tokens: Tensor) -> Branches | None:
    """Tokens (b n) behind prompts (g < b), if the net makes of `Branches` what it makes of texts.

    It does not if experts share out a row's tokens, nor where somebody answers in its place (a
    pipeline) or attends in its blocks' (a cut sequence).
    """
    alone = len(prompts) == len(tokens)  # little is saved, and torch's causal kernels are lost
    if alone or not isinstance(net, Transformer) or "forward" in vars(net):
        return None
    blocks = [cast(Block, block) for block in net.blocks.values()]
    whole = any(isinstance(block.mlp, MixtureOfExperts) for block in blocks)
    others = any(block.attention.attend not in ATTENTIONS.values() for block in blocks)
    return None if whole or others else Branches(prompts, tokens, len(blocks))


def read(net: Net, text: Tensor, places: Tensor, branches: Branches | None = None) -> Tensor:
    """Logits (b n v) at some places of texts (b t)."""
    if branches is not None:
        return net(branches.tokens, branches)
    return net(text)[torch.arange(len(text), device=text.device)[:, None], places]


def log_probabilities(net: Net, rollout: Rollout, sampling: Sampling) -> Tensor:
    """Of the tokens that were drawn, with gradient: (b n), 0 after the end."""
    logits = read(net, rollout.text, rollout.places, rollout.branches)
    return chosen(logits, rollout.tokens, rollout.mask, sampling)


def by_reference(
    net: Net,
    text: Tensor,
    places: Tensor,
    tokens: Tensor,
    mask: Tensor,
    sampling: Sampling,
    branches: Branches | None = None,
) -> tuple[Tensor, Tensor]:
    """The reference's log-probabilities (b n) at the sampling temperature, and at 1.

    Top-k and the like are left out: what the policy may draw need not be in the reference's k.
    """
    with torch.no_grad():
        logits = read(net, text, places, branches)
        warm, plain = Sampling(sampling.temperature), Sampling()
        return chosen(logits, tokens, mask, warm), chosen(logits, tokens, mask, plain)


def loss_of(rollout: Rollout, log_p: Tensor, estimator: Estimator, kl: KL, length: int) -> Tensor:
    """The policy-gradient loss of a rollout, and the divergence if it stands in the loss."""
    mask = rollout.mask
    loss = estimator.loss(log_p, mask, rollout.weights, length, rollout.share, rollout.sampled)
    if kl.beta and kl.where == "loss":
        if rollout.reference is None:
            raise UsageError("beta is above 0, and the rollout has no reference")
        loss = loss + kl.beta * kl.penalty(log_p, rollout.reference, mask, length).mean()
    return loss


def drift(log_p: Tensor, rollout: Rollout) -> Tensor:
    """Root mean square of log p now - log p when drawn, over tokens: rounding, or a mistake."""
    away = (log_p.detach() - rollout.sampled).where(rollout.mask, 0.0)
    return (away.square().sum() / rollout.mask.sum()).sqrt()


@contextmanager
def adapters_off(net: nn.Module) -> Iterator[None]:
    """The net without its low-rank adapters: what it was before they learned anything.

    An adapter is a module with a flag `lora_enabled`, as the LoRA callback makes them.
    """
    adapters: list[Any] = [m for m in net.modules() if hasattr(m, "lora_enabled")]
    if not adapters:
        raise UsageError(
            "reference: lora asks the net with its adapters switched off, and it has none; add "
            "the callback: --trainer.callbacks+=LoRA, or type --model.reference=copy"
        )
    others = [n for n, p in net.named_parameters() if p.requires_grad and "lora_" not in n]
    if others:
        raise UsageError(
            f"reference: lora is the net without its adapters, and {others[0]} learns beside them, "
            "so that it would not stay what it was; type --model.reference=copy, or leave "
            "train_also out"
        )
    before = [adapter.lora_enabled for adapter in adapters]
    for adapter in adapters:
        adapter.lora_enabled = False
    try:
        yield
    finally:
        for adapter, flag in zip(adapters, before, strict=True):
            adapter.lora_enabled = flag
