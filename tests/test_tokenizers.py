"""What a tokenizer encodes it decodes again, and what it has never seen it names."""

import pytest
import torch

from ravine.datamodules.tokenizers import CharTokenizer, from_state

TEXTS = ["hello\nworld", "Größe — naïve", "日本語の文", "a😀b", "tab\tand\r\nreturn\x00"]


@pytest.mark.parametrize("text", TEXTS)
def test_decoding_undoes_encoding(text: str) -> None:
    tokenizer = CharTokenizer(text)
    tokens = tokenizer.encode(text)
    assert tokens.dtype == torch.int64
    assert tokenizer.decode(tokens) == text == tokenizer.decode(tokens.tolist())


@pytest.mark.parametrize("text", TEXTS)
def test_tokens_are_places_in_the_sorted_vocabulary(text: str) -> None:
    tokenizer = CharTokenizer(text)
    expected = [sorted(set(text)).index(c) for c in text]  # nanoGPT's table
    assert tokenizer.encode(text).tolist() == expected
    assert tokenizer.vocabulary == len(set(text))


@pytest.mark.parametrize("text", TEXTS)
def test_token_bytes_add_up_to_the_utf8_text(text: str) -> None:
    tokenizer = CharTokenizer(text)
    assert int(tokenizer.token_bytes[tokenizer.encode(text)].sum()) == len(text.encode())


@pytest.mark.parametrize("text", TEXTS)
def test_a_tokenizer_survives_a_checkpoint(text: str, tmp_path) -> None:
    tokenizer = CharTokenizer(text)
    torch.save(tokenizer.state(), tmp_path / "state")
    again = from_state(torch.load(tmp_path / "state", weights_only=True))
    assert again.encode(text).equal(tokenizer.encode(text))


def test_an_empty_text_has_no_tokens() -> None:
    assert CharTokenizer("ab").encode("").tolist() == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Hold", "character 'd' (U+0064) at position 3 of the text is not among the 5 characters "
                 "known from training, '!Helo'; leave it out, or train on a text that has it"),
        ("h", "training, '!Helo'; 'H' is; leave it out"),
        ("He\udcff", r"character '\udcff' (U+DCFF) at position 2"),
        ("\U0010ffff", "(U+10FFFF) at position 0"),
    ],
)  # fmt: skip
def test_an_unknown_character_is_named_with_its_place(text: str, message: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the text follows
        CharTokenizer("Hello!").encode(text)
    assert message in str(error.value)


def test_a_tokenizer_of_nothing_and_an_unknown_kind_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one character"):
        CharTokenizer("")
    with pytest.raises(ValueError, match="unknown kind of tokenizer 'bytes'; known are characters"):
        from_state({"kind": "bytes"})
