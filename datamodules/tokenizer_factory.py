"""Tokenizer factory: build a tokenizer from its name or path, or from the state in a checkpoint."""

import base64
import binascii
from collections.abc import Callable, Iterable
from typing import Any

from ravine.errors import UsageError

from .tokenizer_json import FileTokenizer
from .tokenizers import (
    BPETokenizer,
    ByteTokenizer,
    CharTokenizer,
    NumberTokenizer,
    SpecialTokenMode,
    Tokenizer,
    load_gpt2_tokenizer,
)


def make_tokenizer(
    name: str, characters: Iterable[str] = (), special_tokens: SpecialTokenMode = "as_text"
) -> Tokenizer:
    """Build the tokenizer of a name: characters, bytes, gpt2, or the path of a file.

    Args:
        name: characters, bytes, gpt2, or a path for `FileTokenizer.from_file`.
        characters: the characters of the text, for `characters`.
        special_tokens: how special tokens in a text are read.
    """
    factories: dict[str, Callable[[], Tokenizer]] = {
        "characters": lambda: CharTokenizer(characters),
        "bytes": ByteTokenizer,
        "gpt2": lambda: load_gpt2_tokenizer(special_tokens),
    }
    if name not in factories:
        return FileTokenizer.from_file(name, special_tokens)
    tokenizer = factories[name]()
    # the mode is a part of the GPT-2 tokenizer already
    if special_tokens != tokenizer.special_tokens:
        # raises an error: characters and bytes have no special tokens
        tokenizer.set_special_tokens(tokenizer.special_ids, special_tokens)
    return tokenizer


def tokenizer_from_state_dict(state: dict[str, Any]) -> Tokenizer:
    """Rebuild a tokenizer from the result of its `state_dict()`, as saved in a checkpoint.

    Raises:
        UsageError: the type is not known, or the state is damaged.
    """
    special_tokens = state.get("special_tokens", "as_text")
    try:
        # each class has its name in `tokenizer_type`
        match state.get("tokenizer_type"):
            case CharTokenizer.tokenizer_type:
                return CharTokenizer(state["characters"])
            case ByteTokenizer.tokenizer_type:
                return ByteTokenizer()
            case BPETokenizer.tokenizer_type:
                # the bytes of each token in base64, in order of their ids
                ranked_tokens = [
                    base64.b64decode(piece.encode(), validate=True)
                    for piece in state["ranked_tokens"].split(" ")
                ]
                return BPETokenizer(ranked_tokens, special_tokens)
            case NumberTokenizer.tokenizer_type:
                return NumberTokenizer(state["vocab_size"])
            case FileTokenizer.tokenizer_type:
                return FileTokenizer(state["json_text"], state["eos_token"] or None, special_tokens)
    except (LookupError, TypeError, AttributeError, binascii.Error) as error:
        raise UsageError(
            f"the state of the tokenizer {state.get('tokenizer_type')!r} is damaged: {error!r}",
            ["the result of state_dict()"],
            "use another checkpoint",
        ) from None
    raise UsageError(
        f"tokenizer_type={state.get('tokenizer_type')!r} is not known",
        ["characters", "bytes", "gpt2", "file", "numbers"],
        "use the version of Ravine that wrote the checkpoint",
    )
