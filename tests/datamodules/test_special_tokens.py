# ruff: noqa: RUF001 - texts of several languages
"""Special tokens, and borders at which a text is cut without changing tokens."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiktoken
import torch
from token_pieces import ALPHABET, END, from_merges, merges, pieces

from ravine.datamodules import BPETokenizer, FileTokenizer, InstructionDataModule, TextDataModule
from ravine.datamodules.token_cache import encode_parallel, split_at_word_boundaries
from ravine.datamodules.tokenizer_factory import tokenizer_from_state_dict
from ravine.datamodules.tokenizers import ByteTokenizer, CharTokenizer, NumberTokenizer
from ravine.lightning_modules import LanguageModel

KINDS = {
    "characters": lambda text: CharTokenizer(text),
    "bytes": lambda text: ByteTokenizer(),
    "gpt2": lambda text: BPETokenizer(pieces()),
    "file": lambda text: from_merges(special_tokens="as_text"),
    "gpt2, allow": lambda text: BPETokenizer(pieces(), "allow"),
    "file, allow": lambda text: from_merges(),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


@every_kind
def test_a_cut_at_any_boundary_changes_no_token(kind: str) -> None:
    rng = random.Random(0)
    cuts = 0
    for _ in range(150):
        text = "".join(rng.choices(ALPHABET, k=40))
        tokenizer = KINDS[kind](text)
        whole = tokenizer.encode_array(text).tolist()
        for size in (2, 9, 30):
            step = rng.randint(1, 20)
            parts = list(
                split_at_word_boundaries(
                    (text[n : n + step] for n in range(0, len(text), step)), tokenizer, size
                )
            )
            assert "".join(parts) == text
            assert [n for part in parts for n in tokenizer.encode_array(part).tolist()] == whole
            cuts += len(parts) - 1
    assert cuts > 1000


@pytest.mark.parametrize("line", ["Съешь ещё этих мягких булок.\n", "天地玄黄，宇宙洪荒。", "ab "])
@pytest.mark.parametrize("kind", ["characters", "bytes", "gpt2", "file"])
def test_texts_of_every_language_are_cut_into_short_pieces(kind: str, line: str) -> None:
    tokenizer = KINDS[kind](line)
    sizes = [len(p) for p in split_at_word_boundaries([line * 40] * 5, tokenizer, 100)]
    assert sum(sizes) == 200 * len(line)
    assert max(sizes) <= 100
    assert min(sizes[:-1]) >= 50


def test_a_text_without_a_boundary_is_searched_and_copied_once() -> None:
    class Watched(CharTokenizer):
        num_chars_searched = 0

        def next_boundary(self, text: str, start: int) -> int | None:
            self.num_chars_searched += len(text)
            return None

    tokenizer = Watched("a")
    assert ["".join(split_at_word_boundaries(["a" * 100] * 50, tokenizer, 10))] == ["a" * 5000]
    assert tokenizer.num_chars_searched < 2 * 5000  # not 100 + 200 + 300 + ...


def test_special_tokens_are_read_as_chosen() -> None:
    text = f"One.{END}Two{END}{END} the"
    for made in (
        lambda how: BPETokenizer(pieces(), how),
        lambda how: from_merges(special_tokens=how),
    ):
        plain, allowed = made("as_text"), made("allow")
        assert plain.eos_id == allowed.eos_id == len(pieces())
        assert plain.eos_id not in plain.encode(text)
        assert plain.decode(plain.encode(text)) == text == allowed.decode(allowed.encode(text))
        parts = text.split(END)
        expected = [n for p in parts for n in [*plain.encode(p).tolist(), plain.eos_id]][:-1]
        assert allowed.encode(text).tolist() == expected
        assert int(allowed.token_bytes[allowed.encode(text)].sum()) == len("".join(parts).encode())
        refused = made("error")
        assert refused.encode("<|endof").equal(plain.encode("<|endof"))
        with pytest.raises(ValueError, match=r"holds the special token '<\|endoftext\|>', here"):
            refused.encode(text)
        again = tokenizer_from_state_dict(
            json.loads(json.dumps(allowed.state_dict()))
        )  # plain types
        assert again.encode(text).equal(allowed.encode(text))
        assert again.is_equivalent(plain)
        assert plain.state_dict() != allowed.state_dict()


def test_of_overlapping_special_tokens_the_longest_is_read() -> None:
    double = END + END
    tokenizer = FileTokenizer.from_merges(dict(enumerate(pieces())), merges(), [END, double])
    one, two = tokenizer.special_ids[END], tokenizer.special_ids[double]
    found = [n for n in tokenizer.encode(f"a{double}b{END}c{double}{END}").tolist() if n >= one]
    assert found == [two, one, two, one]
    for size in (3, 14, 40):
        parts = split_at_word_boundaries([f"a {double} b"] * 9, tokenizer, size)
        tokens = np.concatenate([tokenizer.encode_array(part) for part in parts])
        assert tokens.tolist() == tokenizer.encode_array(f"a {double} b" * 9).tolist()


def test_a_run_of_a_million_spaces_is_one_word_and_a_space() -> None:
    tokenizer = BPETokenizer(pieces())
    for run, after in ((" " * 1_000_001, "the"), (" \n" * 60_000, "\n"), ("\u3000" * 100_000, "")):
        whole = tokenizer.encode_array(f"he{run}{after}")
        assert tokenizer.decode(whole.tolist()) == f"he{run}{after}"
    short = tokenizer.encode_array("he" + " " * 1001 + "the").tolist()  # the pattern's own way
    long = tokenizer.encode_array("he" + " " * 1_000_001 + "the").tolist()
    assert long[:2] == short[:2]
    assert long[-2:] == short[-2:]
    assert len(long) - len(short) == (1_000_001 - 1001) // 4


def test_the_data_module_and_the_checkpoint_carry_the_choice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "t").mkdir()
    (tmp_path / "t/tokenizer.json").write_text(from_merges().json_text)
    (tmp_path / "text.txt").write_text(f"the hello, one story.{END}" * 40)
    made = {}
    for how in ("as_text", "allow"):
        for limit in (1, 10**9):  # a mapped file, and memory
            data = TextDataModule(
                tmp_path / "text.txt",
                context_length=8,
                tokenizer=str(tmp_path / "t"),
                special_tokens=how,
                max_chars_in_memory=limit,
            )
            data.setup("fit")
            made[how, limit] = data.corpus.tokens
        assert made[how, 1].tolist() == made[how, 10**9].tolist()
        model = LanguageModel(num_layers=1, d_model=8, num_heads=1)
        model.configure_from_data(data)
        checkpoint: dict[str, Any] = {}
        model.on_save_checkpoint(checkpoint)
        loaded = LanguageModel(num_layers=1, d_model=8, num_heads=1)
        loaded.on_load_checkpoint(checkpoint)
        assert loaded.tokenizer is not None
        assert loaded.tokenizer.special_tokens == how
    end = from_merges().eos_id
    assert int((made["allow", 1] == end).sum()) == 40
    assert int((made["as_text", 1] == end).sum()) == 0
    with pytest.raises(ValueError, match="the special token"):
        TextDataModule(
            tmp_path / "text.txt", tokenizer=str(tmp_path / "t"), special_tokens="error"
        ).setup("fit")
    with pytest.raises(ValueError, match="'characters' has no special tokens; allowed: as_text"):
        TextDataModule(tmp_path / "text.txt", special_tokens="allow").setup("fit")
    rows = json.dumps({"prompt": f"a{END}", "answer": "b"})
    (tmp_path / "rows.jsonl").write_text(f"{rows}\n" * 3)
    answers = InstructionDataModule(
        tmp_path / "rows.jsonl", tokenizer=str(tmp_path / "t"), special_tokens="allow"
    )
    answers.setup("fit")
    assert answers.rows[0][0].tolist() == [97, end, 98, end]


def test_the_choice_of_special_tokens_does_not_change_the_vocabulary() -> None:
    model = LanguageModel(context_length=8, num_layers=1, d_model=8, num_heads=1)
    model._set_tokenizer(BPETokenizer(pieces(), "allow"), "the data's")
    model._set_tokenizer(BPETokenizer(pieces()), "the checkpoint's")
    assert model.tokenizer is not None
    assert model.tokenizer.special_tokens == "allow"
    with pytest.raises(ValueError, match="they come from different texts"):
        model._set_tokenizer(BPETokenizer(pieces()[:-1]), "the checkpoint's")


def test_unusual_characters_and_token_ids_are_encoded_or_named() -> None:
    for tokenizer in (ByteTokenizer(), BPETokenizer(pieces()), from_merges()):
        assert tokenizer.decode(tokenizer.encode("a\ud800b"))[0::2] == "ab"
    assert CharTokenizer("ab\ud800").decode([0, 2, 1, -1]) == "a\ufffdb\ufffd"
    numbers = NumberTokenizer(50)
    assert numbers.encode(" 7 49\n0").tolist() == [7, 49, 0]
    assert numbers.decode([7, 49]) == " 7 49"
    assert numbers.encode("\n").tolist() == [0]  # the default prompt
    assert tokenizer_from_state_dict(numbers.state_dict()).state_dict() == numbers.state_dict()
    for word in ("50", "-1", "a", "1.5", "²", "9" * 99):
        with pytest.raises(ValueError, match="allowed: "):
            numbers.encode(word)


def test_text_of_a_large_vocabulary_takes_four_bytes_a_token(tmp_path: Path) -> None:
    text = "".join(map(chr, [*range(0x100, 0xD800), *range(0xE000, 0x14000)]))
    assert len(set(text)) > 1 << 16
    (tmp_path / "wide.txt").write_text(text, encoding="utf-8")
    data = TextDataModule(tmp_path / "wide.txt", context_length=8, batch_size=2)
    data.setup("fit")
    assert data.corpus.tokens.dtype == torch.int32
    assert data.tokenizer.decode(data.corpus.tokens) == text
    inputs, targets = next(iter(data.train_dataloader()))
    assert torch.equal(inputs[:, 1:], targets[:, :-1])


def test_the_special_token_of_gpt2_equals_that_of_tiktoken(monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        expected = tiktoken.get_encoding("gpt2")
    except Exception:  # no network and no cache
        pytest.skip("GPT-2's pieces are not on this machine")
    ranks = [expected.decode_single_token_bytes(n) for n in range(expected.eot_token)]
    actual = BPETokenizer(ranks, "allow")
    text = f"One story.{END}Another.{END}"
    assert actual.encode(text).tolist() == expected.encode(text, allowed_special="all")
    prose = "Съешь ещё этих булок! " * 9 + "天地玄黄，宇宙洪荒。" * 40 + "It's 'a'  test.\n\n" * 9
    tokens = np.concatenate(list(encode_parallel(actual, [prose])))
    assert tokens.tolist() == expected.encode(prose)
    parts = list(split_at_word_boundaries([prose], actual, 60))
    assert len(parts) > 5
    assert [n for p in parts for n in actual.encode_array(p).tolist()] == expected.encode(prose)
