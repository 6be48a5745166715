"""Decoding inverts encoding, and unknown characters are named."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from ravine.datamodules.token_cache import encode_parallel, split_at_word_boundaries
from ravine.datamodules.tokenizer_factory import tokenizer_from_state_dict
from ravine.datamodules.tokenizers import (
    BPETokenizer,
    ByteTokenizer,
    CharTokenizer,
    Tokenizer,
    load_gpt2_tokenizer,
)

PIECES = [bytes([n]) for n in range(256)] + [b" t", b"he", b" the", b"ll", b"o\n", "ü".encode()]
KINDS: dict[str, Callable[[str], Tokenizer]] = {
    "characters": CharTokenizer,
    "bytes": lambda text: ByteTokenizer(),
    "gpt2": lambda text: BPETokenizer(PIECES),
}
every_kind = pytest.mark.parametrize("made", KINDS.values(), ids=KINDS)
TEXTS = ["hello\nworld", "Größe — naïve", "日本語の文", "a😀b", "tab\tand\r\nreturn\x00"]


@every_kind
@pytest.mark.parametrize("text", TEXTS)
def test_decoding_inverts_encoding(text: str, made: Callable[[str], Tokenizer]) -> None:
    tokenizer = made(text)
    tokens = tokenizer.encode(text)
    assert tokens.dtype == torch.int64
    assert tokenizer.decode(tokens) == text == tokenizer.decode(tokens.tolist())


@pytest.mark.parametrize("text", TEXTS)
def test_token_ids_are_positions_in_the_sorted_vocabulary(text: str) -> None:
    tokenizer = CharTokenizer(text)
    expected = [sorted(set(text)).index(c) for c in text]  # nanoGPT's table
    assert tokenizer.encode(text).tolist() == expected
    assert tokenizer.vocab_size == len(set(text))


@every_kind
@pytest.mark.parametrize("text", TEXTS)
def test_token_bytes_add_up_to_the_utf8_text(text: str, made: Callable[[str], Tokenizer]) -> None:
    tokenizer = made(text)
    assert int(tokenizer.token_bytes[tokenizer.encode(text)].sum()) == len(text.encode())


@every_kind
@pytest.mark.parametrize("text", TEXTS)
def test_a_tokenizer_survives_a_checkpoint(
    text: str, made: Callable[[str], Tokenizer], tmp_path: Path
) -> None:
    tokenizer = made(text)
    torch.save(tokenizer.state_dict(), tmp_path / "state")
    again = tokenizer_from_state_dict(torch.load(tmp_path / "state", weights_only=True))
    assert again.encode(text).equal(tokenizer.encode(text))
    assert again.state_dict() == tokenizer.state_dict()


def test_an_empty_text_has_no_tokens() -> None:
    assert CharTokenizer("ab").encode("").tolist() == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Hold", "character 'd' (U+0064) at position 3 of the text is not in the vocabulary; "
                 "allowed: the 5 characters '!Helo'; remove it from the text, or train on a text"),
        ("h", "is not in the vocabulary; 'H' is; allowed: the 5 characters"),
        ("He\udcff", r"character '\udcff' (U+DCFF) at position 2"),
        ("\U0010ffff", "(U+10FFFF) at position 0"),
    ],
)  # fmt: skip
def test_an_unknown_character_is_named_with_its_position(text: str, message: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the text follows
        CharTokenizer("Hello!").encode(text)
    assert message in str(error.value)


def test_an_empty_vocabulary_and_an_unknown_tokenizer_are_refused() -> None:
    with pytest.raises(
        ValueError, match="CharTokenizer: there are no characters; allowed: one or more"
    ):
        CharTokenizer("")
    with pytest.raises(
        ValueError, match="tokenizer_type='runes' is not known; allowed: characters"
    ):
        tokenizer_from_state_dict({"tokenizer_type": "runes"})


def test_pieces_are_merged_in_the_order_of_their_ranks() -> None:
    tokenizer = BPETokenizer(PIECES)
    pieces = [PIECES[n] for n in tokenizer.encode("the the hello").tolist()]
    assert pieces == [b"t", b"he", b" the", b" ", b"he", b"ll", b"o"]
    assert tokenizer.eos_id == len(PIECES) == tokenizer.vocab_size - 1
    assert tokenizer.token_bytes[tokenizer.eos_id] == 0
    assert tokenizer.eos_id not in tokenizer.encode("a<|endoftext|>b")


def test_invalid_utf8_bytes_are_shown_as_replacement_characters() -> None:
    for tokenizer in (ByteTokenizer(), BPETokenizer(PIECES)):
        assert tokenizer.decode([0x41, 0xC3]) == "A\ufffd"
    assert ByteTokenizer().encode("A\udcff").tolist() == [0x41, 0xFF]


PROSE = "It's 12 o'clock;  the\n\n\tbells  ring 3 times,\nand-all is wéll.  \n" * 9 + "x" * 90


@every_kind
@pytest.mark.parametrize("size", [1, 7, 40, 10_000])
def test_a_text_tokenized_in_pieces_is_the_text_tokenized_at_once(
    size: int, made: Callable[[str], Tokenizer]
) -> None:
    tokenizer = made(PROSE)
    texts = (PROSE[n : n + 13] for n in range(0, len(PROSE), 13))
    parts = list(split_at_word_boundaries(texts, tokenizer, size))
    assert "".join(parts) == PROSE
    assert len(parts) > 1 or size > len(PROSE)
    assert np.concatenate(list(map(tokenizer.encode_array, parts))).tolist() == (
        tokenizer.encode_array(PROSE).tolist()
    )


def test_parallel_tokenization_keeps_the_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "ravine.datamodules.token_cache.split_at_word_boundaries",
        lambda text, tokenizer: iter(text),
    )
    words = [f"word {n} " for n in range(500)]
    tokens = np.concatenate(list(encode_parallel(ByteTokenizer(), words)))
    assert ByteTokenizer().decode(tokens.tolist()) == "".join(words)


FILES = Path(os.environ.get("DATA_ROOT", "nowhere"))


@pytest.mark.skipif(not (FILES / "tiktoken").is_dir(), reason="DATA_ROOT holds no GPT-2 pieces")
def test_gpt2_s_own_pieces_are_found_below_data_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TIKTOKEN_CACHE_DIR", raising=False)
    tokenizer = load_gpt2_tokenizer()
    assert tokenizer.vocab_size == 50_257
    assert tokenizer.encode("Hello world!").tolist() == [15496, 995, 0]
    shakespeare = (FILES / "shakespeare" / "input.txt").read_text()
    assert len(np.concatenate(list(encode_parallel(tokenizer, [shakespeare])))) == 338_025


def test_the_error_for_missing_merges_names_the_alternatives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(name: str) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr("tiktoken.get_encoding", offline)
    monkeypatch.setenv("DATA_ROOT", str(tmp_path))
    monkeypatch.delenv("TIKTOKEN_CACHE_DIR", raising=False)
    with pytest.raises(FileNotFoundError) as error:
        load_gpt2_tokenizer()
    for words in ("TIKTOKEN_CACHE_DIR", str(tmp_path / "tiktoken"), "use tokenizer='bytes'"):
        assert words in str(error.value)
