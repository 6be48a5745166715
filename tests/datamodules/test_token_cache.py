"""A corpus is tokenized by one process of a machine; the others wait for it and map its file."""

import json
import os
import pickle
import resource
import signal
import time
from datetime import timedelta

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from ranks import started

from ravine.datamodules import InstructionDataModule, TextDataModule
from ravine.datamodules.tokenizers import ByteTokenizer, CharTokenizer
from ravine.lightning_modules import LanguageModel
from ravine.strategies import MeshStrategy

TEXT = "".join(f"{n} swallows carry {n * n} coconuts.\n" for n in range(4000))


def ready(cache, act=None):
    """Use a cache folder; count the tokenizers' calls; `act(calls)` is done in each of rank 0."""
    os.environ["XDG_CACHE_HOME"] = str(cache)
    calls = []
    for kind in (ByteTokenizer, CharTokenizer):
        plain = kind.encode_array

        def numbers(self, text, plain=plain):
            calls.append(len(text))
            if act is not None and os.environ.get("RANK", "0") == "0":
                act(calls)
            return plain(self, text)

        kind.encode_array = numbers
    return calls


@pytest.fixture(autouse=True)
def this_process_stays_as_it_is(monkeypatch, tmp_path):
    """`ready` is called in this process too, for one process without ranks."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for kind in (ByteTokenizer, CharTokenizer):
        monkeypatch.setattr(kind, "encode_array", kind.encode_array)


def fit(data, strategy, ranks):
    trainer = L.Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy=strategy,
        max_steps=1,
        limit_val_batches=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(LanguageModel(num_layers=1, d_model=8, num_heads=2), datamodule=data)


def text_data(path, **options):
    return TextDataModule(path, context_length=8, batch_size=4, **options)


def wait_longer_than_the_group(calls):
    if len(calls) == 1:
        time.sleep(4)


def tokens_of(path, cache, options, slow, ranks, strategy="ddp"):
    """Calls of the tokenizer on this rank, the tokens, and what is said of the text."""
    act = wait_longer_than_the_group if slow else None
    calls = ready(cache, act)
    if ranks > 1:
        limit = timedelta(seconds=2)
        strategy = DDPStrategy(timeout=limit) if strategy == "ddp" else MeshStrategy()
    data = text_data(path, **options)
    fit(data, strategy, ranks)
    corpus = data.corpus
    said = corpus.tokens.dtype, corpus.is_memmap, data.provenance, corpus.tokenizer.state_dict()
    return sum(calls), corpus.tokens.long(), *said


@pytest.fixture
def path(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path / "text.txt"


@pytest.mark.parametrize(
    ("options", "strategy"),
    [
        ({}, "ddp"), ({"max_chars_in_memory": 1000}, "mesh"), ({"tokenizer": "bytes"}, "ddp"),
        ({"tokenizer": "bytes", "start_token": 7}, "mesh"),
    ],
)  # fmt: skip
def test_one_rank_tokenizes_and_all_ranks_have_its_tokens(ranks, path, options, strategy):
    slow = options == {}
    many = path, path.parent / "many", options, slow, 2, strategy
    first, second = ranks(tokens_of, 2, *many)
    alone = tokens_of(path, path.parent / "one", options, False, 1, "auto")
    assert (first[0], second[0]) == (len(TEXT), 0)
    for rank in (first, second):
        assert torch.equal(rank[1], alone[1])
        assert rank[2:] == alone[2:]
    files = sorted(each.name for each in (path.parent / "many").rglob("*") if each.is_file())
    assert len(files) == 1
    # one process writes a file only where the text is too long for memory
    assert (path.parent / "one").exists() == ("max_chars_in_memory" in options)


def failing(path, cache, options, what):
    """What this rank says where local rank 0 cannot tokenize."""

    def act(calls):
        if what == "interrupt":
            raise KeyboardInterrupt
        if what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)

    if what == "full":
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
    calls = ready(cache, act)
    data = text_data(path, **options)
    try:
        fit(data, "ddp", 2)
    except SystemExit as error:
        return "SystemExit", str(error), sum(calls)
    except Exception as error:
        return type(error).__name__, str(error), sum(calls)
    return "done", "", sum(calls)


def test_an_error_of_local_rank_0_ends_all_ranks_with_its_text(ranks, path):
    path.write_bytes(TEXT.encode() + b"\xff")
    first, second = ranks(failing, 2, path, path.parent / "cache", {}, "error")
    assert (first[0], second[0]) == ("UsageError", "InvalidDataError")
    assert first[1] == second[1]
    assert "is not UTF-8" in first[1]
    missing = path.with_name("missing.txt")
    first, second = ranks(failing, 2, missing, path.parent / "cache", {}, "error")
    assert first[1] == second[1]
    assert "does not exist" in first[1]


def test_ctrl_c_while_local_rank_0_tokenizes_ends_all_ranks(ranks, path):
    said = ranks(failing, 2, path, path.parent / "cache", {}, "interrupt")
    assert [each[:2] for each in said] == [("SystemExit", "1")] * 2
    assert not list((path.parent / "cache").rglob(".tmp-*"))


def test_a_full_or_unwritable_cache_is_not_used_or_is_an_error(ranks, path):
    (path.parent / "file").write_text("no folder")
    for cache, what in ((path.parent / "file", ""), (path.parent / "cache", "full")):
        said = ranks(failing, 2, path, cache, {}, what)
        assert [each[0] for each in said] == ["done", "done"]
        assert said[1][2] == len(TEXT)  # each makes its own
        first, second = ranks(failing, 2, path, cache, {"max_chars_in_memory": 1000}, what)
        assert (first[0], second[0]) == ("TokenCacheError", "PreparationError")
        assert "the tokens cannot be written to" in first[1]
        assert "set the environment variable XDG_CACHE_HOME" in first[1]
        assert first[1] in second[1]


def test_the_exit_of_local_rank_0_ends_the_other_ranks(path):
    with started(failing, 2, path, path.parent / "cache", {}, "kill") as (_, pipes, _logs):
        assert pipes[1].poll(60)
        good, said = pickle.loads(pipes[1].recv_bytes())
    assert good
    assert said[0] != "done"
    assert said[2] == 0


def test_a_cached_text_with_special_tokens_is_refused_if_they_are_errors(path, monkeypatch):
    """A file of tokens that was made where they were read as plain words is another one."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(path.parent / "cache"))
    path.write_text(TEXT + "<|endoftext|>" + TEXT)
    text_data(path, tokenizer="gpt2", max_chars_in_memory=10).setup("fit")
    with pytest.raises(ValueError, match="endoftext"):
        text_data(path, tokenizer="gpt2", max_chars_in_memory=10, special_tokens="error").setup(
            "fit"
        )


def answers_of(path, cache, ranks):
    """Characters that this rank tokenizes, its rows, and what is said of the file."""
    calls = ready(cache)
    data = InstructionDataModule(path, tokenizer="bytes", context_length=40, batch_size=4)
    fit(data, "ddp" if ranks > 1 else "auto", ranks)
    return sum(calls), data.rows, data.provenance


def test_answers_are_tokenized_by_one_rank(ranks, path):
    rows = [{"prompt": f"{n} plus {n} is ", "answer": f"{2 * n}" * (n % 5 + 1)} for n in range(50)]
    path = path.with_suffix(".jsonl")
    path.write_text("\n".join(map(json.dumps, rows)))
    first, second = ranks(answers_of, 2, path, path.parent / "many", 2)
    alone = answers_of(path, path.parent / "one", 1)
    assert first[0] == sum(len(row["prompt"] + row["answer"]) for row in rows)
    assert second[0] == 0
    (path.parent / "file").write_text("no folder")
    for rank in (first, second, *ranks(answers_of, 2, path, path.parent / "file", 2)):
        assert rank[2] == alone[2]
        for tokens, other in zip(rank[1], alone[1], strict=True):
            assert tokens[1] == other[1]
            assert torch.equal(tokens[0], other[0])
