"""Rollouts for policy gradients: the generated batch, its logprobs and the policy loss.

    prompts -> generate -> tokens, mask -> rewards -> advantages    no gradient, before the step
    rollout -> logprobs again, with gradient -> loss                the training step

The second pass recomputes the logprobs with gradients, because generation uses a KV cache, CUDA
graphs or another precision. Both passes run the net in evaluation mode (dropout would make two
different policies) and use the same `DecodingConfig`. The second pass computes a prompt once for
all of its samples, if the net supports it (generation/shared_prefix.py).

Axes: g prompts, b samples, t positions, n new tokens, v vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from ravine.errors import UsageError

from ..generation.generate_text import gather_logprobs
from ..generation.sampling import DecodingConfig
from ..generation.shared_prefix import SharedPrefixBatch
from ..nn import Transformer
from ..nn.attention import ATTENTION_FNS
from ..nn.moe import MixtureOfExperts
from ..nn.transformer import TransformerBlock
from .advantages import AdvantageEstimator
from .kl import KL

NetFn = Callable[..., Tensor]


class Rollout(NamedTuple):
    """A batch of samples on the net's device."""

    input_ids: Tensor  # (b t) prompt and completion, right-padded, without the last token
    logit_positions: Tensor  # (b n) positions in the text whose logits predict the new tokens
    tokens: Tensor  # (b n)
    mask: Tensor  # (b n) true up to the end, including the stop tokens
    sampler_logprobs: Tensor  # (b n) logprobs at sampling time
    advantages: Tensor  # (b) computed from the rewards
    tokens_per_rank: Tensor  # () mean over ranks of the number of tokens
    ref_logprobs: Tensor | None = None  # (b n) logprobs under the reference
    shared_prefix: SharedPrefixBatch | None = None  # the same texts, with each prompt once


def make_shared_prefix_batch(
    net: nn.Module, prompts: Sequence[Tensor], tokens: Tensor
) -> SharedPrefixBatch | None:
    """Pack tokens (b n) and prompts (g < b) into a `SharedPrefixBatch`; None if not supported.

    It needs a Transformer without experts, whose capacity depends on the row. Pipeline stages,
    which replace `forward`, and context parallelism, which replaces the attention, do not support
    it.
    """
    # one text for each prompt: little would be saved, and torch's causal kernels could not be used
    is_ungrouped = len(prompts) == len(tokens)
    has_replaced_forward = "forward" in vars(net)  # an attribute of the instance, not of the class
    if is_ungrouped or not isinstance(net, Transformer) or has_replaced_forward:
        return None
    blocks = [cast(TransformerBlock, block) for block in net.blocks.values()]
    has_experts = any(isinstance(block.mlp, MixtureOfExperts) for block in blocks)
    # ATTENTION_FNS: the attention functions of this package
    has_replaced_attention = any(
        block.attention.attention_fn not in ATTENTION_FNS.values() for block in blocks
    )
    if has_experts or has_replaced_attention:
        return None
    return SharedPrefixBatch(prompts, tokens, num_layers=len(blocks))


def compute_logits_at(
    net: NetFn,
    input_ids: Tensor,
    logit_positions: Tensor,
    shared_prefix: SharedPrefixBatch | None = None,
) -> Tensor:
    """Compute the logits (b n v) at positions (b n) of texts (b t)."""
    if shared_prefix is not None:
        return net(shared_prefix.tokens, shared_prefix)
    return net(input_ids)[
        torch.arange(len(input_ids), device=input_ids.device)[:, None], logit_positions
    ]


def compute_rollout_logprobs(net: NetFn, rollout: Rollout, sampling: DecodingConfig) -> Tensor:
    """Compute the logprobs (b n) of the rollout's tokens, with gradient; 0 after the end."""
    logits = compute_logits_at(
        net, rollout.input_ids, rollout.logit_positions, rollout.shared_prefix
    )
    return gather_logprobs(logits, rollout.tokens, rollout.mask, sampling)


def compute_ref_logprobs(
    net: NetFn,
    input_ids: Tensor,
    logit_positions: Tensor,
    tokens: Tensor,
    mask: Tensor,
    sampling: DecodingConfig,
    shared_prefix: SharedPrefixBatch | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute the reference's logprobs (b n) at the sampling temperature, and at temperature 1.

    Top-k, top-p and min-p are not applied: a token of the policy need not be among the reference's
    k.

    Args:
        net: the reference.
        input_ids: texts (b t), right-padded.
        logit_positions: positions (b n) in the texts whose logits predict the tokens.
        tokens: generated tokens (b n).
        mask: true up to the end of a text (b n); the logprobs are 0 after it.
        sampling: sampling settings of the policy, of which the temperature is used.
        shared_prefix: the same texts with each prompt once, if the net supports it.
    """
    with torch.no_grad():
        logits = compute_logits_at(net, input_ids, logit_positions, shared_prefix)  # (b n v)
        # without top-k, top-p and min-p
        at_sampling_temperature = DecodingConfig(sampling.temperature)
        at_temperature_1 = DecodingConfig()
        return (
            gather_logprobs(logits, tokens, mask, at_sampling_temperature),
            gather_logprobs(logits, tokens, mask, at_temperature_1),
        )


def policy_loss(
    rollout: Rollout, logprobs: Tensor, estimator: AdvantageEstimator, kl: KL, max_new_tokens: int
) -> Tensor:
    """Compute the policy-gradient loss, plus the KL penalty if `kl.placement` is "loss".

    Args:
        rollout: generated tokens with their advantages.
        logprobs: the policy's logprobs (b n) of the tokens, with gradient.
        estimator: computes the loss from logprobs and advantages.
        kl: settings of the KL penalty.
        max_new_tokens: maximum number of tokens of a sample.
    """
    mask = rollout.mask
    # the mean number of tokens of a rank normalizes the loss: all ranks divide by the same number
    loss = estimator.loss(
        logprobs,
        mask,
        rollout.advantages,
        max_new_tokens,
        rollout.tokens_per_rank,
        rollout.sampler_logprobs,
    )
    if kl.beta and kl.placement == "loss":
        if rollout.ref_logprobs is None:
            raise UsageError(
                f"policy_loss: kl.beta={kl.beta} needs the logprobs of the reference, but the "
                "rollout has none",
                hint="use kl=KL(beta=0), or a rollout with ref_logprobs",
            )
        # with placement "reward" the advantages contain the penalty already
        penalty = kl.kl_penalty(logprobs, rollout.ref_logprobs, mask, max_new_tokens)  # (b)
        loss = loss + kl.beta * penalty.mean()
    return loss


def logprob_gap(logprobs: Tensor, rollout: Rollout) -> Tensor:
    """Root mean square difference of learner and sampler logprobs over tokens.

    The cause is rounding, or a mistake.
    """
    gap = (logprobs.detach() - rollout.sampler_logprobs).where(rollout.mask, 0.0)
    return (gap.square().sum() / rollout.mask.sum()).sqrt()


@contextmanager
def disable_adapters(net: nn.Module) -> Iterator[None]:
    """Disable the low-rank adapters of a net in a `with` block, so that it is the base model.

    With reference="lora" the base model is the reference policy of the KL penalty.

    An adapter is a module with a method `lora_disabled`, as the LoRA callback creates them.
    """
    adapters: list[Any] = [m for m in net.modules() if hasattr(m, "lora_disabled")]
    if not adapters:
        raise UsageError(
            "Reinforce: reference='lora' needs a net with adapters, but this net has none",
            ["lora with the LoRA callback", "frozen_copy", "none"],
            "add LoRA() to Trainer(callbacks=...), or use reference='frozen_copy'",
            flag="--trainer.callbacks+=LoRA, or --model.reference=frozen_copy",
        )
    # without adapters such a parameter would not have the value of the base model
    other_trainable = [n for n, p in net.named_parameters() if p.requires_grad and "lora_" not in n]
    if other_trainable:
        raise UsageError(
            "Reinforce: reference='lora' needs a net in which only adapters are trained, but "
            f"{other_trainable[0]} is trained, too",
            ["lora with trained adapters only", "frozen_copy", "none"],
            "remove train_also from LoRA, or use reference='frozen_copy'",
            flag="--model.reference=frozen_copy",
        )
    with ExitStack() as stack:  # enables the adapters again at its end
        for adapter in adapters:
            stack.enter_context(adapter.lora_disabled())
        yield
