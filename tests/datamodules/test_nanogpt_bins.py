"""Files of tokens: type and vocabulary come from a file or a flag, and every token is checked."""

import json
import pickle
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch

from ravine.cli.main import main
from ravine.datamodules import FileTokenizer, TextDataModule, nanogpt_bins, token_cache
from ravine.datamodules import text as text_module
from ravine.lightning_modules import LanguageModel

QUIET = dict.fromkeys(
    ("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def tokens(largest: int, count: int) -> np.ndarray:
    return np.r_[np.random.default_rng(0).integers(0, largest, count - 1), largest]


def folder(
    place: Path, largest: int = 9_999, kind: str = "uint16", meta: dict[str, Any] | None = None
) -> Path:
    """A folder of token files, as a program of the user writes it."""
    place.mkdir()
    for name, count in (("train.bin", 4_001), ("val.bin", 401)):
        tokens(largest, count).astype(kind).tofile(place / name)
    if meta is not None:
        (place / "meta.pkl").write_bytes(pickle.dumps(meta))
    return place


def data_of(place: Path, **how: Any) -> TextDataModule:
    data = TextDataModule(place, **{"context_length": 8, "batch_size": 4, **how})
    data.setup("fit")
    return data


KINDS = {"uint16": 60_000, "int32": 100_000, "uint32": 9_999, "int64": 9_999, "uint8": 200}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("said", ["by flags", "by meta.pkl", "by meta.json"])
def test_type_and_vocabulary_are_those_of_flags_or_meta_file(
    kind: str, said: str, tmp_path: Path
) -> None:
    largest = KINDS[kind]
    meta = {"vocab_size": largest + 1, "dtype": kind}
    place = folder(tmp_path / "bins", largest, kind, meta if said == "by meta.pkl" else None)
    if said == "by meta.json":
        (place / "meta.json").write_text(json.dumps(meta))
    how = {"vocab_size": largest + 1, "dtype": kind} if said == "by flags" else {}
    data = data_of(place, **how)
    assert data.tokenizer.vocab_size == largest + 1
    assert data.corpus.tokens.tolist() == tokens(largest, 4_001).tolist()
    assert data.corpus.val_tokens is not None
    assert data.corpus.val_tokens.tolist() == tokens(largest, 401).tolist()
    inputs, targets = next(iter(data.train_dataloader()))
    assert inputs.dtype == torch.int64
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    assert data.provenance["sha256"]


REFUSED: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({}, {}, "is not known; the largest token is 9,999; allowed: a meta.pkl or meta.json with "
     "vocab_size, a tokenizer.json, tokenizer, vocab_size; use tokenizer='gpt2' for GPT-2's "
     "tokens, or vocab_size=10000 or more"),
    ({}, {"vocab_size": 9_999}, "train.bin holds the token 9,999 at position 4,000, which is not "
     "in the vocabulary of 9,999 tokens; allowed: 0 to 9,998; use vocab_size=10000 or more"),
    ({"meta": {"vocab_size": 50}}, {}, "holds the token 9,999"),
    ({"kind": "int32"}, {"vocab_size": 10_000}, "every second number of"),
    ({"kind": "int64"}, {"vocab_size": 10_000}, "allowed: int64; use dtype='int64'"),
    ({"kind": "int32", "meta": {"vocab_size": 9, "dtype": "int8"}}, {}, "states dtype='int8'; "),
    ({"largest": -1, "kind": "int32"}, {"vocab_size": 10, "dtype": "int32"},
     "holds the token -1 at"),
    ({"meta": {"vocab_size": "ten"}}, {}, "states vocab_size='ten'; allowed: an integer"),
    ({"meta": {"names": 1}}, {}, "it has neither 'itos' nor 'vocab_size' nor 'dtype'"),
    ({"meta": {"itos": {0: "ab", 1: "c"}}}, {}, "or vocab_size=2"),
    ({}, {"vocab_size": 0}, "vocab_size=0 is not a vocabulary size; allowed: 1 to"),
    ({}, {"vocab_size": 10_000, "dtype": "uint32"}, "8002 bytes, which is not a whole"),
    ({"kind": "uint32", "largest": 100_000}, {"vocab_size": 100_001}, "read as uint16, which "
     "cannot hold the 100,001 tokens of the vocabulary"),
    ({"kind": "uint32", "largest": 100_000, "meta": {"vocab_size": 100_001}}, {}, "as uint16"),
    ({"kind": "int64"}, {"vocab_size": 10_000, "dtype": "uint32"}, "; use dtype='int64'"),
    ({"kind": "uint16", "largest": 200}, {"vocab_size": 201, "dtype": "uint8"}, "dtype='uint16'"),
    ({"kind": "uint8", "largest": 9}, {"vocab_size": 10}, "whole number of tokens of uint16"),
]  # fmt: skip


@pytest.mark.parametrize(("made", "how", "message"), REFUSED)
def test_an_unknown_or_inconsistent_vocabulary_is_refused(
    made: dict[str, Any], how: dict[str, Any], message: str, tmp_path: Path
) -> None:
    if made.get("largest") == -1:
        place = folder(tmp_path / "bins", 9, "int32")
        np.array([1, -1, 2], np.int32).tofile(place / "val.bin")
    else:
        place = folder(tmp_path / "bins", **made)
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the text follows
        data_of(place, **how)
    assert message in str(error.value)


def test_damaged_meta_files_and_numpy_files_are_refused(tmp_path: Path) -> None:
    place = folder(tmp_path / "bins")
    for content in (b"", b"\x80", b"cos\nsystem\n.", pickle.dumps([1]), b"(" * 10_000, b"I9" * 9):
        (place / "meta.pkl").write_bytes(content)
        with pytest.raises(ValueError, match="does not describe tokens in nanoGPT's format"):
            data_of(place)
    (place / "meta.pkl").unlink()
    for text in ("[", "[" * 100_000, "7", '{"vocab_size": 1e400}'):
        (place / "meta.json").write_text(text)
        with pytest.raises(ValueError, match=r"meta.json"):
            data_of(place)
    (place / "meta.json").unlink()
    with (place / "val.bin").open("wb") as file:
        np.save(file, tokens(9, 40).astype(np.uint16))
    with pytest.raises(ValueError, match=r"val.bin is a .npy file"):
        data_of(place, vocab_size=10_000)


def test_values_that_expand_to_millions_are_not_printed(tmp_path: Path) -> None:
    bomb: Any = [1]
    for _ in range(7):
        bomb = [bomb] * 9
    place = folder(tmp_path / "bins")
    for key in ("dtype", "vocab_size", "itos"):
        (place / "meta.pkl").write_bytes(pickle.dumps({key: bomb}))
        with pytest.raises(ValueError, match=r"meta.pkl") as error:
            data_of(place)
        assert len(str(error.value)) < 2_000


def test_a_meta_file_may_name_numpy_s_type_itself(tmp_path: Path) -> None:
    place = folder(tmp_path / "bins", kind="int32", meta={"vocab_size": 10_000, "dtype": np.int32})
    assert data_of(place).corpus.tokens.tolist() == tokens(9_999, 4_001).tolist()


def test_options_without_effect_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("a text of some length " * 9)
    for how in ({"vocab_size": 50}, {"dtype": "int32"}):
        with pytest.raises(
            ValueError, match=r"has no effect: .* is a text, not a folder of tokens"
        ):
            data_of(tmp_path / "text.txt", **how)
    with pytest.raises(ValueError, match="special_tokens='allow' has no effect"):
        data_of(folder(tmp_path / "bins"), vocab_size=10_000, special_tokens="allow")


def test_a_tokenizer_in_the_folder_or_by_name_decodes_the_tokens(tmp_path: Path) -> None:
    tokenizer = FileTokenizer.from_merges(
        {n: bytes([n]) for n in range(256)}, [], ["<|endoftext|>"]
    )
    place = folder(tmp_path / "bins", 256)
    (tmp_path / "tokenizer.json").write_text(tokenizer.json_text)
    named = data_of(place, tokenizer=str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer.json").rename(place / "tokenizer.json")
    beside = data_of(place)
    for data in (named, beside):
        assert data.tokenizer.vocab_size == 257
        assert data.tokenizer.is_equivalent(tokenizer)
    assert (
        data_of(place, vocab_size=300).tokenizer.tokenizer_type == "numbers"
    )  # what is typed comes first


def test_a_line_warns_of_tokens_that_cannot_be_those_of_gpt2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from token_pieces import pieces

    from ravine.datamodules import BPETokenizer

    many = [*pieces(), *(f" {n}".encode() for n in range(1000, 40_000))]
    known = BPETokenizer(many)
    monkeypatch.setattr(nanogpt_bins, "make_tokenizer", lambda name: known)
    data_of(folder(tmp_path / "ten"), tokenizer="gpt2")
    said = " ".join(capsys.readouterr().out.split())
    assert "no token is above 9,999 of GPT-2's" in said
    data_of(folder(tmp_path / "all", 39_000), tokenizer="gpt2")
    assert "no token is above" not in capsys.readouterr().out


def test_a_long_file_is_scanned_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = folder(tmp_path / "bins")
    monkeypatch.setattr(nanogpt_bins, "MIN_BYTES_TO_CACHE", 100)
    monkeypatch.setattr(token_cache, "SCAN_CHUNK", 7)
    data_of(place, vocab_size=10_000)
    with monkeypatch.context() as patch:
        patch.setattr(nanogpt_bins, "compute_token_range", None)  # not called again
        data_of(place, vocab_size=10_000)
    tokens(20_000, 4_001).astype(np.uint16).tofile(place / "train.bin")
    with pytest.raises(ValueError, match="holds the token 20,000"):  # another content
        data_of(place, vocab_size=10_000)


@pytest.mark.parametrize("kind", ["uint16", "int32", "uint32", "int64", torch.int32])
def test_an_array_is_a_corpus(kind: Any, tmp_path: Path) -> None:
    numbers = tokens(9_999, 2_000)
    array = (
        torch.tensor(numbers).to(kind) if isinstance(kind, torch.dtype) else numbers.astype(kind)
    )
    data = TextDataModule.from_tokens(array, 10_000, context_length=8, batch_size=4)
    data.setup("fit")
    assert data.corpus.tokens.tolist() == numbers.tolist()
    model = LanguageModel(num_layers=1, d_model=8, num_heads=1)
    trainer = L.Trainer(accelerator="cpu", max_steps=1, val_check_interval=1, **QUIET)
    trainer.fit(model, datamodule=data)
    assert "val/bits_per_byte" not in trainer.callback_metrics  # the bytes are not known
    assert "val/perplexity" in trainer.callback_metrics
    text = model.generate("17 4", max_new_tokens=3)
    assert len(str(text).split()) == 5
    with pytest.raises(ValueError, match="tokens holds the token 9,999"):
        TextDataModule.from_tokens(array, 9_999, context_length=8)
    with pytest.raises(
        ValueError, match=r"of type float64 and shape \(3,\) .*; allowed: .* integers"
    ):
        TextDataModule.from_tokens(np.ones(3), 9, context_length=8)


def test_options_of_an_array_are_used_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_module, "download_if_missing", None)  # nothing is downloaded
    numbers = tokens(9, 1_000)
    size = np.int64(numbers.max() + 1)
    part = {"start_token": 100, "stop_token": 200, "context_length": 8}
    data = TextDataModule.from_tokens(numbers, size, **part)
    data.prepare_data()
    data.setup("fit")
    assert data.corpus.tokens.tolist() == numbers[100:200].tolist()
    with pytest.raises(ValueError, match=r"dtype, path has no effect on tokens; allowed: .*seed"):
        TextDataModule.from_tokens(numbers, 10, path="my.txt", dtype="uint16")


def test_characters_of_a_meta_json_are_a_list_or_a_dictionary(tmp_path: Path) -> None:
    for number, itos in enumerate((["a", "b", "c"], {0: "a", 1: "b", 2: "c"})):
        place = folder(tmp_path / f"bins{number}", 2, "uint16")
        (place / "meta.json").write_text(json.dumps({"vocab_size": 3, "itos": itos}))
        assert data_of(place).tokenizer.decode([2, 0, 1]) == "cab"


def test_a_folder_of_token_files_is_trained_on_or_refused_by_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    folder(tmp_path / "ten")
    small = ["num_layers=1", "d_model=16", "num_heads=2"]
    words = [
        "fit", "--config", "shakespeare/quick_adamw", "--data.path=ten", "--data.context_length=16",
        "--data.batch_size=4", "--trainer.max_steps=51", "--trainer.val_check_interval=51",
        "--trainer.limit_val_batches=2", "--trainer.precision=32-true",
        *(f"--model.{part}" for part in small),
    ]  # fmt: skip
    assert main(words) == 2
    error = capsys.readouterr().err
    assert "type: --data.tokenizer=gpt2, or --data.vocab_size=10000\n" in error
    assert "Traceback" not in error
    assert main([*words, "--data.vocab_size=10000"]) == 0
    assert "4,402 tokens, 10,000 different; 4,001 train, 401 val" in capsys.readouterr().out
