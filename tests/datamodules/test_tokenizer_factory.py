"""A tokenizer is rebuilt from the state in a checkpoint, or the damaged state is refused."""

from typing import Any

import pytest
from token_pieces import from_merges

from ravine.datamodules.tokenizer_factory import tokenizer_from_state_dict

STATES: list[tuple[dict[str, Any], str]] = [
    ({"tokenizer_type": "gpt2"}, "tokenizer 'gpt2' is damaged: KeyError"),
    (
        {"tokenizer_type": "gpt2", "ranked_tokens": "YQ== YQ=="},
        "2 tokens were given, 1 of them different",
    ),
    ({"tokenizer_type": "gpt2", "ranked_tokens": "!"}, "damaged: .*Only base64 data is allowed"),
    (
        {"tokenizer_type": "gpt2", "ranked_tokens": "YQ\u00e9=="},
        "damaged: .*Only base64 data is allowed",
    ),
    ({"tokenizer_type": "gpt2", "ranked_tokens": 3}, "tokenizer 'gpt2' is damaged: AttributeError"),
    (
        {"tokenizer_type": "gpt2", "ranked_tokens": " ".join(["YQ=="] * 300)},
        "300 tokens were given, 1 of them different",
    ),
    ({"tokenizer_type": "characters"}, "tokenizer 'characters' is damaged: KeyError"),
    (
        {"tokenizer_type": "characters", "characters": 7},
        "tokenizer 'characters' is damaged: TypeError",
    ),
    (
        {"tokenizer_type": "numbers", "vocab_size": 2**40},
        "vocab_size=1099511627776 is not a vocabulary size; allowed: 1 to",
    ),
    (
        {"tokenizer_type": "numbers", "vocab_size": "many"},
        "tokenizer 'numbers' is damaged: TypeError",
    ),
    (
        {"tokenizer_type": "file", "json_text": "{}", "eos_token": ""},
        "not a file of the tokenizers library",
    ),
    (
        {"tokenizer_type": "file", "json_text": 5, "eos_token": ""},
        "not a file of the tokenizers library",
    ),
    (
        {"tokenizer_type": "file", "json_text": from_merges().json_text, "eos_token": ["a"]},
        "eos_token is of type list; allowed: the token as a str",
    ),
    (
        {"tokenizer_type": "file", "json_text": "[" * 10**5, "eos_token": ""},
        "not a file of the tokenizers library",
    ),
    (
        {"tokenizer_type": ["gpt2"]},
        r"tokenizer_type=\['gpt2'\] is not known; allowed: characters, bytes",
    ),
]


@pytest.mark.parametrize(("state", "words"), STATES, ids=range(len(STATES)))
def test_a_damaged_state_is_refused(state: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        tokenizer_from_state_dict(state)
