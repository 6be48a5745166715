"""Config validation for policy gradients: sampling, KL, group size, prompt lengths, characters.

Each error message contains the given value, the allowed values and the flag to type.
"""

from typing import Any

from ravine.datamodules.tokenizers import Tokenizer
from ravine.errors import UsageError

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
    """Raise UsageError for invalid settings, alone or in combination."""
    for name, value in (("max_new_tokens", max_new_tokens), ("group_size", group_size)):
        if value < 1:
            raise UsageError(f"{name} is {value}; allowed: 1 or more; type --model.{name}=1")
    if stop == "":
        raise UsageError(
            "stop is '', which stands in every text; allowed: one character or more, or null for "
            "no stop; type --model.stop='.', or leave it out"
        )
    if sampling.temperature == 0:
        raise UsageError(
            "at temperature 0 nothing is drawn, and there is no policy to improve; allowed: above "
            "0; type --model.sampling.temperature=0.8"
        )
    if kl.beta and reference == "none":
        raise UsageError(
            f"kl.beta is {kl.beta}, and there is no reference to stay near; "
            "type --model.reference=frozen_copy, or --model.kl.beta=0"
        )


def check_prompt_length(
    description: str, prompt: str, num_tokens: int, max_new_tokens: int, context_length: int
) -> None:
    """Raise UsageError if `num_tokens` tokens and the new tokens exceed the context."""
    if num_tokens + max_new_tokens - 1 > context_length:
        max_fitting = context_length - num_tokens + 1
        fewer_hint = (
            f"type --model.max_new_tokens={max_fitting} or less, or " if max_fitting > 0 else ""
        )
        shorter_hint = (
            f" (snippets: --data.prompt_length={context_length - max_new_tokens + 1})"
            if max_new_tokens <= context_length
            else ""
        )
        raise UsageError(
            f"{description} has {num_tokens} tokens, and with {max_new_tokens} new ones it does "
            f"not fit into the {context_length} "
            f"that the model sees: {prompt[:40]!r}; {fewer_hint}give shorter prompts{shorter_hint}"
        )


def check_prompt_characters(
    characters: str, tokenizer: Tokenizer, provenance: dict[str, Any]
) -> None:
    """Raise UsageError for characters that the base model's tokenizer lacks.

    It runs before training, on every rank.
    """
    try:
        tokenizer.encode(characters)
    except ValueError:
        pass
    else:
        return
    origin = provenance.get("file") or "the text of the prompts"
    unknown = [c for c in characters if not _can_encode(tokenizer, c)]
    examples = ", ".join(f"{c!r} (U+{ord(c):04X})" for c in unknown[:5])
    remainder = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
    raise UsageError(
        f"{origin} has prompts with {examples}{remainder}, which the base model does not know; "
        "allowed are "
        "the characters of the text it was trained on; type --data.path=FILE without them, or "
        "--model.base_checkpoint=FILE of a model trained on such a text"
    )


def _can_encode(tokenizer: Tokenizer, character: str) -> bool:
    try:
        tokenizer.encode(character)
    except ValueError:
        return False
    return True
