# ruff: noqa: RUF001 - texts of several languages
"""A tokenizer.json, or GPT-2's older files, give the tokens that their merges define."""

import json
import random
from itertools import pairwise
from pathlib import Path

import pytest
import regex
from token_pieces import ALPHABET, END, JOINED, from_merges, merges, pieces

from ravine.datamodules import BPETokenizer, FileTokenizer


def by_hand(text: str) -> list[int]:
    """Of each word the first pair of the list is joined, until none is left."""
    ranks = {pair: n for n, pair in enumerate(merges())}
    found = []
    for word in regex.findall(BPETokenizer.split_pattern, text):
        parts = [bytes([n]) for n in word.encode()]
        while pairs := [pair for pair in pairwise(parts) if pair in ranks]:
            best, joined = min(pairs, key=ranks.__getitem__), []
            while parts:
                size = 2 if tuple(parts[:2]) == best else 1
                joined.append(b"".join(parts[:size]))
                parts = parts[size:]
            parts = joined
        found += [pieces().index(part) for part in parts]
    return found


def test_merges_are_applied_in_their_order_within_words() -> None:
    tokenizer, rng = from_merges(special_tokens="as_text"), random.Random(1)
    for _ in range(20):
        text = "".join(rng.choices([*ALPHABET, *JOINED], k=60))
        assert tokenizer.encode(text).tolist() == by_hand(text)
    assert tokenizer.token_bytes.equal(BPETokenizer(pieces()).token_bytes)


def test_token_ids_may_be_in_any_order() -> None:
    shuffled = list(range(len(pieces()) + 1))
    random.Random(0).shuffle(shuffled)
    end, *numbers = shuffled
    vocabulary = dict(zip(numbers, pieces(), strict=True)) | {end: END.encode()}
    tokenizer = FileTokenizer.from_merges(vocabulary, merges(), [END])
    ranked = BPETokenizer(pieces(), "allow")
    text = f"the hello 12's{END}天地，日"
    assert tokenizer.encode(text).tolist() == [
        [*numbers, end][n] for n in ranked.encode(text).tolist()
    ]
    assert tokenizer.eos_id == end


def test_files_of_the_library_and_older_ones_are_read(tmp_path: Path) -> None:
    tokenizer = from_merges()
    (tmp_path / "new").mkdir()
    content = json.loads(tokenizer.json_text)
    content["truncation"] = {  # would cut a text off without a word
        "direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0,
    }  # fmt: skip
    (tmp_path / "new/tokenizer.json").write_text(json.dumps(content))
    (tmp_path / "old").mkdir()
    table = content["model"]["vocab"]
    (tmp_path / "old/vocab.json").write_text(json.dumps(table), encoding="utf-8")
    lines = [" ".join(pair) for pair in content["model"]["merges"]]
    (tmp_path / "old/merges.txt").write_text("#version: 0.2\n" + "\n".join(lines))
    text = f"the hello{END} 天地"
    for name in ([], 7, {"content": ["a"]}):  # of the end of a text: what is no text is left out
        (tmp_path / "new/tokenizer_config.json").write_text(json.dumps({"eos_token": name}))
        assert FileTokenizer.from_file(tmp_path / "new").eos_id == tokenizer.eos_id
    for path in ("new", "new/tokenizer.json", "old"):
        again = FileTokenizer.from_file(tmp_path / path, "allow")
        assert again.encode(text).equal(tokenizer.encode(text)), path
        assert again.eos_id == tokenizer.eos_id
    for bad, message in {
        "{}": "not a file of the tokenizers",
        "[" * 10**5: "not a file of",
    }.items():
        (tmp_path / "bad.json").write_text(bad)
        with pytest.raises(ValueError, match=message):
            FileTokenizer.from_file(tmp_path / "bad.json")
    with pytest.raises(
        FileNotFoundError, match=r"there is no tokenizer at .*; allowed: characters, bytes"
    ):
        FileTokenizer.from_file(tmp_path / "nowhere")


def test_a_vocabulary_that_lacks_bytes_does_not_drop_them() -> None:
    vocabulary = {n: bytes([n]) for n in range(128)}
    tokenizer = FileTokenizer.from_merges(vocabulary, [], special_tokens="as_text")
    with pytest.raises(ValueError, match="2 of the 3 bytes of a text are in no token"):
        tokenizer.encode("aé")
    with pytest.raises(ValueError, match="2 of the 15 bytes of a text are in no token"):
        FileTokenizer.from_merges(vocabulary, [], [END]).encode(f"é{END}")
    with pytest.raises(
        ValueError, match="special_tokens='allow' has no effect: the tokenizer 'file' has no"
    ):
        FileTokenizer(tokenizer.json_text, None, "allow")
