"""Config validation for policy gradients: sampling, KL, group size, prompt lengths, characters.

Each error contains the given value, the allowed values and what to do.
"""

from typing import Any

from ravine.datamodules.tokenizers import Tokenizer
from ravine.errors import UsageError, check_at_least_one

from ..generation.sampling import DecodingConfig
from .kl import KL


def validate_config(
    max_new_tokens: int,
    group_size: int,
    sampling: DecodingConfig,
    kl: KL,
    reference: str,
    stop: str | None = None,
) -> None:
    """Raise UsageError for invalid settings of `Reinforce`, alone or in combination.

    The constructor calls it, before the base model is loaded.

    Args:
        max_new_tokens: maximum number of tokens to generate.
        group_size: number of texts for each prompt.
        sampling: sampling settings.
        kl: settings of the KL penalty.
        reference: "frozen_copy", "lora" or "none".
        stop: stop string of a generated text.
    """
    sizes = {"max_new_tokens": max_new_tokens, "group_size": group_size}
    check_at_least_one("Reinforce", flag_prefix="--model.", **sizes)
    if stop == "":
        raise UsageError(
            "Reinforce: stop='' would end every text at its start",
            ["a text of one character or more", "None"],
            "remove stop, or use stop='.'",
            flag="--model.stop='.'",
        )
    if sampling.temperature == 0:
        raise UsageError(
            "Reinforce: temperature=0 does not sample, so that there is no distribution to learn",
            ["above 0"],
            "use sampling=DecodingConfig(temperature=0.8)",
            flag="--model.sampling.temperature=0.8",
        )
    if kl.beta and reference == "none":
        raise UsageError(
            f"Reinforce: kl.beta={kl.beta} needs a reference, but reference='none'",
            ["frozen_copy", "lora"],
            "use reference='frozen_copy', or kl=KL(beta=0)",
            flag="--model.reference=frozen_copy, or --model.kl.beta=0",
        )


def check_prompt_length(
    description: str, prompt: str, num_tokens: int, max_new_tokens: int, context_length: int
) -> None:
    """Raise UsageError if a prompt of `num_tokens` tokens and the new tokens exceed the context.

    The message names the settings that solve it: shorter prompts (`prompt_length` of the data), or
    fewer new tokens.

    Args:
        description: name of the prompt in the message.
        prompt: its text, for the message.
        num_tokens: its number of tokens.
        max_new_tokens: maximum number of tokens to generate.
        context_length: maximum number of tokens that the net sees.
    """
    if num_tokens + max_new_tokens - 1 > context_length:  # - 1: the net does not see the last token
        flag_prefixes = {"max_new_tokens": "--model.", "prompt_length": "--data."}
        sizes = {
            "max_new_tokens": context_length - num_tokens + 1,
            "prompt_length": context_length - max_new_tokens + 1,
        }
        # the settings that can be lowered far enough, each alone
        fitting = {name: size for name, size in sizes.items() if size > 0}
        flags = [f"{flag_prefixes[name]}{name}={size}" for name, size in fitting.items()]
        raise UsageError(
            f"Reinforce: {description} has {num_tokens} tokens, which with {max_new_tokens} new "
            f"tokens exceed the context of {context_length} tokens: {prompt[:40]!r}",
            [f"{name} up to {size}" for name, size in fitting.items()],
            ", or ".join(["use shorter prompts", *(f"{n}={size}" for n, size in fitting.items())]),
            flag=", or ".join(flags),
        )


def check_prompt_characters(
    characters: str, tokenizer: Tokenizer, provenance: dict[str, Any]
) -> None:
    """Raise UsageError for characters that the base model's tokenizer lacks.

    It runs before training, on every rank.

    Args:
        characters: all different characters of the prompts.
        tokenizer: tokenizer of the base model.
        provenance: origin of the prompts; "file" is named in the message.
    """
    try:  # all at once; only after a failure are they tried one by one
        tokenizer.encode(characters)
    except ValueError:
        pass
    else:
        return
    origin = provenance.get("file") or "the text of the prompts"
    unknown = [c for c in characters if not _can_encode(tokenizer, c)]
    # such as 'é' (U+00E9)
    examples = ", ".join(f"{c!r} (U+{ord(c):04X})" for c in unknown[:5])
    remainder = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
    raise UsageError(
        f"Reinforce: {origin} has prompts with {examples}{remainder}, which the tokenizer of the "
        "base model does not contain",
        ["the characters of the text that the base model was trained on"],
        "remove them from the prompts, or use a base model that was trained on such a text",
        flag="--data.path=FILE, or --model.base_checkpoint=FILE",
    )


def _can_encode(tokenizer: Tokenizer, character: str) -> bool:
    try:
        tokenizer.encode(character)
    except ValueError:
        return False
    return True
