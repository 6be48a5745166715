"""Text: windows are slices of it, validation predicts each character once, bad input is named."""

import hashlib
import os
import pickle
import re
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch import Tensor

from ravine.datamodules import (
    CharTokenizer,
    ResumableLoader,
    TextDataModule,
    text_files,
    token_cache,
)
from ravine.datamodules.text import python_docs_text
from ravine.errors import MissingFileError

DATA_ROOT = os.environ.get("DATA_ROOT")
POEM = "".join(f"{i}: the quick brown fox jumps over the lazy dog\n" for i in range(60))


@pytest.fixture(autouse=True)
def empty_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DATA_ROOT", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def poem(tmp_path: Path) -> Path:
    path = tmp_path / "poem.txt"
    path.write_text(POEM, encoding="utf-8")
    return path


def text_data(path: Path | None, **options: Any) -> TextDataModule:
    data = TextDataModule(path, **{"context_length": 16, "batch_size": 4, **options})
    data.setup("fit")
    return data


def batches(loader: ResumableLoader, epochs: int = 2) -> list[Tensor]:
    seen = []
    for epoch in range(epochs):
        loader.set_epoch(epoch)
        seen += [torch.cat(batch, 1) for batch in loader]
    return seen


def test_training_windows_are_slices_of_the_training_split(poem: Path) -> None:
    data = text_data(poem)
    train = POEM[: int(len(POEM) * 0.9)]
    loader = data.train_dataloader()
    assert len(loader) == len(train) // (4 * 16)
    for inputs, targets in loader:
        assert inputs.dtype == targets.dtype == torch.int64
        assert inputs.shape == targets.shape == (4, 16)
        for x, y in zip(inputs, targets, strict=True):
            window = data.tokenizer.decode(x) + data.tokenizer.decode(y)[-1]
            assert window in train
            assert data.tokenizer.decode(y) == window[1:]


def test_every_start_is_drawn_and_about_equally_often(tmp_path: Path) -> None:
    path = tmp_path / "abc.txt"
    path.write_text("abcdefghijklmnopqr" + "yz")
    loader = text_data(path, context_length=3, batch_size=1).train_dataloader()
    counts = torch.cat([b[:, 0] for b in batches(loader, 2500)]).bincount(minlength=20)
    # 1,000 draws of each of the 15 starts, standard deviation 31
    assert (counts[:15] - 1000).abs().max() < 125
    assert counts[15:].sum() == 0  # no window leaves the training part


@pytest.mark.parametrize("context", [1, 7, 16, 200, 1500])
@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_validation_predicts_each_character_once(poem: Path, context: int, batch_size: int) -> None:
    data = text_data(poem, context_length=context, batch_size=batch_size, val_fraction=0.4)
    part = data.corpus.tokens[int(len(POEM) * 0.6) :].long()
    inputs, targets = (torch.cat(parts) for parts in zip(*data.val_dataloader(), strict=True))
    counted = targets != -100
    assert targets[counted].tolist() == part[1:].tolist()  # in order, so each once
    assert inputs[counted].tolist() == part[:-1].tolist()
    assert counted[:-1].all()  # only the last window may be ragged
    assert inputs.shape == (-(-(len(part) - 1) // context), context)


def test_the_same_seed_gives_the_same_windows_and_another_seed_other_windows(poem: Path) -> None:
    one, same, other = (batches(text_data(poem, seed=s).train_dataloader()) for s in (3, 3, 4))
    assert all(map(torch.equal, one, same))
    assert not any(map(torch.equal, one, other))


def test_seed_everything_is_used_if_no_seed_is_given(
    poem: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = batches(text_data(poem, seed=3).train_dataloader())
    monkeypatch.setenv("PL_GLOBAL_SEED", "3")
    assert all(map(torch.equal, given, batches(text_data(poem).train_dataloader())))


def test_a_memory_mapped_file_gives_the_same_batches(poem: Path, tmp_path: Path) -> None:
    in_memory, memory_mapped = text_data(poem), text_data(poem, max_chars_in_memory=100)
    assert in_memory.corpus.tokens.dtype == torch.uint8
    assert memory_mapped.corpus.tokens.dtype == torch.uint16
    assert (in_memory.corpus.is_memmap, memory_mapped.corpus.is_memmap) == (False, True)
    for name in ("train_dataloader", "val_dataloader"):
        for a, b in zip(getattr(in_memory, name)(), getattr(memory_mapped, name)(), strict=True):
            assert torch.equal(torch.cat(a), torch.cat(b))
    files = [p.name for p in (tmp_path / "cache/ravine/tokens").iterdir()]
    assert files == [f"{hashlib.sha256(POEM.encode()).hexdigest()}-characters.uint16"]


def test_a_memory_mapped_file_is_built_once_and_complete(
    poem: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(token_cache, "encode_parallel", interrupt)
        with pytest.raises(KeyboardInterrupt):
            text_data(poem, max_chars_in_memory=100)
    folder = tmp_path / "cache/ravine/tokens"
    assert list(folder.iterdir()) == []
    text_data(poem, max_chars_in_memory=100)
    monkeypatch.setattr(token_cache, "encode_parallel", interrupt)
    text_data(poem, max_chars_in_memory=100)  # found, not built
    poem.write_text(POEM + "!")
    with pytest.raises(KeyboardInterrupt):  # another content, another file
        text_data(poem, max_chars_in_memory=100)


def test_many_characters_take_two_bytes_each(tmp_path: Path) -> None:
    path = tmp_path / "wide.txt"
    text = "".join(chr(0x4E00 + i % 700) for i in range(2000))
    path.write_text(text, encoding="utf-8")
    data = text_data(path)
    assert data.corpus.tokens.dtype == torch.uint16
    assert data.tokenizer.decode(data.corpus.tokens.long()) == text


def test_chunks_do_not_cut_characters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "accents.txt"
    text = "naïve Größe 😀\n" * 30
    path.write_text(text, encoding="utf-8")
    whole = text_data(path).corpus.tokens
    for size in (1, 2, 3, 5, 64):
        monkeypatch.setattr(text_files, "CHUNK_BYTES", size)
        assert torch.equal(text_data(path).corpus.tokens, whole)


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path: Path) -> None:
    folder = tmp_path / "books"
    (folder / "b").mkdir(parents=True)
    (folder / "c.txt").write_text("third " * 20)
    (folder / "a.txt").write_text("first " * 20)
    (folder / "b/z.md").write_text("second " * 20)
    (folder / ".hidden").write_bytes(b"\x00\xff")
    data = text_data(folder)
    text = data.tokenizer.decode(data.corpus.tokens)
    assert text == "\n".join(word * 20 for word in ("first ", "second ", "third "))


def test_without_files_and_network_the_embedded_text_is_used_with_a_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ravine.datamodules.downloads._make_https_opener", no_network)
    data = TextDataModule(context_length=16, batch_size=4)
    data.prepare_data()
    data.setup("fit")
    said = capsys.readouterr().out
    # the topics of Python 3.13 are longer than those of 3.11
    size = len("".join(python_docs_text()))
    assert f"the EMBEDDED text (help topics of CPython), {size:,} characters" in said
    assert "'shakespeare' was not found" in said
    assert "OSError: no network" in said
    assert data.provenance["source"] == "embedded"
    assert len(data.corpus.tokens) > 400_000
    named = TextDataModule(source="shakespeare")
    named.prepare_data()
    with pytest.raises(FileNotFoundError, match="OSError: no network"):
        named.setup("fit")


def no_network() -> None:
    raise OSError("no network")


@pytest.mark.skipif(not DATA_ROOT, reason="the real sets are not on this machine")
def test_tiny_shakespeare_is_split_as_in_nanogpt(capsys: pytest.CaptureFixture[str]) -> None:
    data = TextDataModule(root=DATA_ROOT, context_length=64, batch_size=32)
    data.prepare_data()
    data.setup("fit")
    assert data.tokenizer.vocab_size == 65
    assert sum(int((y != -100).sum()) for _, y in data.val_dataloader()) == 111_540 - 1
    assert len(data.train_dataloader()) == 1_003_854 // (64 * 32)
    assert data.provenance["source"] == "shakespeare"
    assert "1,115,394 characters, 65 different" in capsys.readouterr().out


def test_accumulation_divides_the_batch_and_overfit_batches_repeats_the_first(poem: Path) -> None:
    data = text_data(poem)
    whole = batches(data.train_dataloader(), 1)
    data.trainer = L.Trainer(accelerator="cpu", logger=False, accumulate_grad_batches=2)
    halves = batches(data.train_dataloader(), 1)
    assert all(map(torch.equal, whole, map(torch.cat, zip(halves[::2], halves[1::2], strict=True))))
    data.trainer = L.Trainer(accelerator="cpu", logger=False, overfit_batches=1)
    first = [batches(data.train_dataloader(), epoch)[:1] for epoch in (1, 2)]
    assert torch.equal(first[0][0], whole[0])
    assert torch.equal(first[1][0], whole[0])


def test_a_byte_order_mark_is_not_a_character(tmp_path: Path) -> None:
    path = tmp_path / "marked.txt"
    path.write_text(POEM, encoding="utf-8-sig")
    assert text_data(path).tokenizer.decode(text_data(path).corpus.tokens) == POEM


def test_predict_on_a_text_is_refused_with_generate_as_the_hint(poem: Path) -> None:
    with pytest.raises(ValueError, match=r"a text has no labels; .*; use LanguageModel\.generate"):
        text_data(poem).predict_dataloader()


GOOD = b"a text long enough for a window or two, and then some more of it. " * 4
BAD = [
    (b"", {}, "bad.txt is empty; allowed: a text of at least one window; use path='FILE'"),
    (
        b"caf\xe9",
        {},
        "bad.txt is not UTF-8: byte 0xe9 at position 3; allowed: UTF-8; if the file is Latin-1, "
        "convert it: iconv -f latin1 -t utf-8 'bad.txt' > text.txt; then use path='text.txt'",
    ),
    (GOOD + "é".encode()[:1], {}, f"byte 0xc3 at position {len(GOOD)}"),
    (b"GIF89a\x00\x01", {}, "bad.txt is not a text: it is a GIF image"),
    (b"GIF\x00\x01", {}, "bad.txt is not a text: byte 0x00"),
    ("text".encode("utf-16"), {}, "if the file is UTF-16, convert it: iconv -f utf-16"),
    (
        b"too short at all",
        {},
        "bad.txt has 16 characters, 14 of them for training, which is less than one "
        "window of context_length + 1 = 17; allowed: a context_length of at most 13; "
        "use context_length=13, or a longer text",
    ),
    (
        b"xyz",
        {"val_fraction": 0.9},
        "less than one window of context_length + 1 = 17; allowed: a longer text; use path=",
    ),
    (
        GOOD,
        {"val_fraction": 0.001},
        "val_fraction=0.001 of the 264 characters of bad.txt is less than two; allowed: two or "
        "more characters for validation; use val_fraction=0.1, or a longer text",
    ),
    (
        GOOD,
        {"context_length": 0},
        "context_length=0 is not a positive integer; allowed: 1, 2, 3, ...; use context_length=32",
    ),
    (GOOD, {"batch_size": -1}, "batch_size=-1 is not a positive integer; allowed: "),
    (
        GOOD,
        {"val_fraction": 1.0},
        "val_fraction=1.0 is not a fraction of the data; allowed: a number between 0 and 1; use",
    ),
]


@pytest.mark.parametrize(("content", "options", "message"), BAD)
def test_bad_input_is_refused_before_the_first_step_in_one_message(
    content: bytes, options: dict[str, Any], message: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    path = Path("bad.txt")
    path.write_bytes(content)
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the text follows
        text_data(path, **options)
    assert message in str(error.value)
    assert path.read_bytes() == content


def test_a_missing_path_names_its_neighbours(poem: Path, tmp_path: Path) -> None:
    nearest = re.escape(f"nearest: poem.txt; use path={str(poem)!r}")
    with pytest.raises(FileNotFoundError, match=f"{nearest}$"):
        text_data(tmp_path / "peom.txt")
    # no name is similar: the hint names none
    with pytest.raises(FileNotFoundError, match=r"nearest: poem\.txt; use path='FILE'$"):
        text_data(tmp_path / "nowhere.jsonl")
    poem.rename(tmp_path / "my poem.txt")
    with pytest.raises(MissingFileError) as error:
        text_data(tmp_path / "my peom.txt")
    assert error.value.flag == f"'--data.path={tmp_path}/my poem.txt'"  # quoted for a shell
    with pytest.raises(
        FileNotFoundError, match="does not exist; allowed: a path in a folder that exists"
    ):
        text_data(tmp_path / "no/poem.txt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no files"):
        text_data(tmp_path / "empty")


@pytest.mark.parametrize("kind", ["characters", "bytes"])
def test_every_kind_of_token_splits_and_predicts_the_same_text(poem: Path, kind: Any) -> None:
    data = text_data(poem, tokenizer=kind)
    assert data.tokenizer.tokenizer_type == kind
    assert data.tokenizer.decode(data.corpus.tokens.long()) == POEM
    targets = torch.cat([y[y >= 0] for _, y in data.val_dataloader()])
    assert POEM.endswith(data.tokenizer.decode(targets))


def nanogpt(folder: Path, meta: object | None) -> Path:
    """A folder as nanoGPT's prepare.py leaves it."""
    tokens = CharTokenizer(POEM).encode(POEM).numpy().astype(np.uint16)
    split = int(0.9 * len(tokens))
    folder.mkdir()
    tokens[:split].tofile(folder / "train.bin")
    tokens[split:].tofile(folder / "val.bin")
    if meta is not None:
        (folder / "meta.pkl").write_bytes(pickle.dumps(meta))
    return folder


def test_nanogpt_s_files_are_read_as_they_are(poem: Path, tmp_path: Path) -> None:
    letters = sorted(set(POEM))
    itos = dict(enumerate(letters))
    meta = {"vocab_size": len(letters), "itos": itos, "stoi": {c: n for n, c in itos.items()}}
    from_bins, from_text = text_data(nanogpt(tmp_path / "bins", meta)), text_data(poem)
    assert from_bins.corpus.is_memmap
    assert from_bins.tokenizer.state_dict() == from_text.tokenizer.state_dict()
    for name in ("train_dataloader", "val_dataloader"):
        for a, b in zip(getattr(from_bins, name)(), getattr(from_text, name)(), strict=True):
            assert torch.equal(torch.cat(a), torch.cat(b))


class Harm:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("exit 1",)


@pytest.mark.parametrize(
    ("meta", "message"),
    [(Harm(), "it refers to posix.system"), ({}, "'itos'"), ({"itos": {0: "b", 1: "a"}}, "sort")],
)
def test_a_pickle_with_more_than_plain_values_is_refused(
    tmp_path: Path, meta: object, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        text_data(nanogpt(tmp_path / "bins", meta))


def test_a_truncated_token_file_is_refused(tmp_path: Path) -> None:
    folder = nanogpt(tmp_path / "bins", {"itos": dict(enumerate(sorted(set(POEM))))})
    with (folder / "train.bin").open("ab") as file:
        file.write(b"!")
    with pytest.raises(
        ValueError, match=r"train.bin has \d+ bytes, which is not a whole number of tokens"
    ):
        text_data(folder)


@pytest.mark.parametrize("context", [7, 100])
def test_an_epoch_reads_each_token_once_from_an_offset_of_its_own(
    tmp_path: Path, context: int
) -> None:
    path = tmp_path / "text.txt"
    path.write_text("".join(chr(0x4E00 + i) for i in range(200)))  # a token is its own place
    loader = text_data(
        path, window_sampling="sequential", context_length=context, batch_size=1
    ).train_dataloader()
    epochs = []
    for epoch in range(6):
        loader.set_epoch(epoch)
        inputs = torch.cat([x[0] for x, _ in loader])
        first = int(inputs.min())
        assert inputs.sort().values.tolist() == list(range(first, first + len(inputs)))
        assert len(inputs) >= 180 - 2 * context  # less than a window is left over at each end
        epochs.append(inputs.tolist())
    assert len({epoch[0] for epoch in epochs}) > 1
    assert len({min(epoch) for epoch in epochs}) > 1


def test_a_slice_of_a_text_has_its_tokens_and_the_vocabulary_of_the_full_text(tmp_path):
    (tmp_path / "text.txt").write_text("abc" * 100 + "xyz" * 100)
    whole = TextDataModule(tmp_path / "text.txt", context_length=4)
    part = TextDataModule(tmp_path / "text.txt", context_length=4, start_token=300, stop_token=500)
    for data in (whole, part):
        data.setup("fit")
    assert torch.equal(part.corpus.tokens, whole.corpus.tokens[300:500])
    assert part.tokenizer.state_dict() == whole.tokenizer.state_dict()
    with pytest.raises(
        ValueError, match=r"start_token=9 and stop_token=601 are not a part of the 600 characters"
    ):
        TextDataModule(
            tmp_path / "text.txt", context_length=4, start_token=9, stop_token=601
        ).setup("fit")
