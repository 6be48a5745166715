"""What is refused before the first step: choices that make no policy gradient, and prompts.

Of each mistake: what was given, what is allowed, what to type.
"""

from typing import Any

from ravine.datamodules.tokenizers import Tokenizer
from ravine.errors import UsageError

from ..generation.sampling import Sampling
from .kl import KL


def check_together(
    new: int,
    group_size: int,
    sampling: Sampling,
    kl: KL,
    reference: str,
    stop: str | None = None,
) -> None:
    """Refuse choices that make no policy gradient, alone or together."""
    for name, value in (("new", new), ("group_size", group_size)):
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
            "type --model.reference=copy, or --model.kl.beta=0"
        )


def check_fits(what: str, prompt: str, size: int, new: int, context: int) -> None:
    """Refuse a prompt of `size` tokens that leaves no place for the new ones."""
    if size + new - 1 > context:
        fits = context - size + 1
        fewer = f"type --model.new={fits} or less, or " if fits > 0 else ""
        shorter = f" (snippets: --data.length={context - new + 1})" if new <= context else ""
        raise UsageError(
            f"{what} has {size} tokens, and with {new} new ones it does not fit into the {context} "
            f"that the model sees: {prompt[:40]!r}; {fewer}give shorter prompts{shorter}"
        )


def check_known(characters: str, tokenizer: Tokenizer, resolved: dict[str, Any]) -> None:
    """Refuse prompts with a character that the base never saw: before training, on every rank."""
    try:
        tokenizer.encode(characters)
    except ValueError:
        pass
    else:
        return
    where = resolved.get("file") or "the text of the prompts"
    unknown = [c for c in characters if not _encodes(tokenizer, c)]
    shown = ", ".join(f"{c!r} (U+{ord(c):04X})" for c in unknown[:5])
    more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
    raise UsageError(
        f"{where} has prompts with {shown}{more}, which the base model does not know; allowed are "
        "the characters of the text it was trained on; type --data.path=FILE without them, or "
        "--model.base=FILE of a model trained on such a text"
    )


def _encodes(tokenizer: Tokenizer, character: str) -> bool:
    try:
        tokenizer.encode(character)
    except ValueError:
        return False
    return True
