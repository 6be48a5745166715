"""Spam: both classes on every side, copies on one, and each message once."""

import os
from collections import Counter
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from ravine.datamodules import Share, SpamDataModule
from ravine.datamodules.spam import EMBEDDED, Message, hold_out, parse

DATA_ROOT = os.environ.get("DATA_ROOT")


@pytest.fixture(autouse=True)
def empty_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DATA_ROOT", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def written(copies: int = 6) -> Path:
    """A file of 80 ham and 20 spam, some messages several times in other guises."""
    ham = [f"see you at {i}" for i in range(80 - copies)] + ["  On my way "] * (copies // 2)
    ham += ["ON MY WAY"] * (copies - copies // 2)
    spam = [f"win prize {i}!" for i in range(16)] + ["Call now"] * 4
    lines = [f"ham\t{m}" for m in ham] + [f"spam\t{m}" for m in spam]
    path = Path("messages.tsv")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def spam_data(path: Path | None = None, stage: str = "fit", **options: Any) -> SpamDataModule:
    data = SpamDataModule(path, **options)
    data.setup(stage)
    return data


def sides(data: SpamDataModule) -> dict[str, list[str]]:
    return {k: [data.messages[i].text.strip().casefold() for i in v] for k, v in data.parts.items()}


@pytest.mark.parametrize("seed", range(5))
def test_each_side_has_its_share_of_each_class_and_its_own_messages(seed: int) -> None:
    data = spam_data(written(), seed=seed, test_fraction=0.2, val_fraction=0.25)
    classes = {k: Counter(data.messages[i].label for i in part) for k, part in data.parts.items()}
    assert classes == {"train": {0: 48, 1: 12}, "val": {0: 16, 1: 4}, "test": {0: 16, 1: 4}}
    places = [i for part in data.parts.values() for i in part]
    assert sorted(places) == list(range(100))
    train, val, test = map(set, sides(data).values())
    assert not train & val | train & test | val & test
    assert data.resolved["duplicates"] == 8
    assert data.train_messages == [data.messages[i].text for i in data.parts["train"]]


def test_seeds_split_differently_and_a_seed_always_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = written()
    parts = [spam_data(path, seed=seed).parts for seed in (0, 0, 1)]
    assert parts[0] == parts[1] != parts[2]
    monkeypatch.setenv("PL_GLOBAL_SEED", "5")  # a later test with another seed_everything
    assert spam_data(path, seed=0).parts == parts[0]


def test_a_group_of_copies_too_large_for_its_room_stays_to_train() -> None:
    messages = [Message("again", 1)] * 9 + [Message("once", 1), Message("hi", 0), Message("ho", 0)]
    for seed in range(5):
        drawn = hold_out(messages, list(range(12)), 0.2, torch.Generator().manual_seed(seed))
        assert not drawn & set(range(9))


def test_a_text_with_both_labels_is_one_group(tmp_path: Path) -> None:
    messages = [Message("Same", 0), Message("same ", 1)] * 3
    messages += [Message(f"{i}", i % 2) for i in range(30)]
    for seed in range(5):
        g = torch.Generator().manual_seed(seed)
        drawn = hold_out(messages, list(range(36)), 0.4, g)
        assert len(drawn & set(range(6))) in (0, 6)


def test_an_epoch_hands_out_messages_with_their_labels_and_places() -> None:
    data = spam_data(written(), batch_size=8, val_fraction=0.0)
    batches = list(data.train_dataloader())
    assert len(batches) == 80 // 8
    for batch in batches:
        assert batch["label"].dtype == batch["index"].dtype == torch.int64
        for text, label, index in zip(*batch.values(), strict=True):
            assert data.messages[index][:2] == (text, label)
    assert sorted(int(i) for b in batches for i in b["index"]) == data.parts["train"]


@pytest.mark.parametrize("batch_size", ["all", 1000])
def test_the_full_batch_is_one_step(batch_size: Any) -> None:
    data = spam_data(written(), batch_size=batch_size, val_fraction=0.0)
    (batch,) = data.train_dataloader()
    assert sorted(batch["index"].tolist()) == data.parts["train"]


def test_the_test_set_is_covered_once_on_any_number_of_ranks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = spam_data(written(), batch_size=6)
    for size in (1, 2, 3):
        seen = []
        for rank in range(size):
            monkeypatch.setattr(Share, "of", lambda trainer, r=rank, n=size: Share(r, n))
            seen += [int(i) for batch in data.test_dataloader() for i in batch["index"]]
        assert sorted(seen) == data.parts["test"]


def test_the_embedded_messages_are_those_of_lecture_0(capsys: pytest.CaptureFixture[str]) -> None:
    data = spam_data(source="embedded", batch_size="all", val_fraction=0.0)
    counts = {k: Counter(data.messages[i].label for i in part) for k, part in data.parts.items()}
    assert counts == {"train": {0: 15, 1: 15}, "val": {}, "test": {0: 5, 1: 5}}
    assert len(set(sides(data)["train"] + sides(data)["test"])) == 40
    test = [data.messages[i] for i in data.parts["test"]]
    ham, spam = ([m.text for m in test if m.label == k] for k in (0, 1))
    trigger = {"urgent", "buy", "money", "won", "free"}
    assert any("!" in m and sum(c.isupper() for c in m) > 5 for m in ham)
    assert any("www" in m for m in ham)
    assert any(not trigger & set(m.lower().split()) for m in spam)
    assert "the EMBEDDED messages" in capsys.readouterr().out
    assert data.resolved["source"] == "embedded"


def test_without_files_and_network_auto_takes_the_embedded_messages(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_network() -> None:
        raise OSError("no network")

    monkeypatch.setattr("ravine.datamodules.sources._opener", no_network)
    data = SpamDataModule()
    data.prepare_data()
    data.setup("fit")
    assert data.resolved["source"] == "embedded"
    assert "'sms' was not found" in capsys.readouterr().out
    assert len(data.train_dataloader()) == 1  # 27 messages: a batch of 64 takes all of them
    with pytest.raises(FileNotFoundError, match=r"--data\.source=embedded"):
        spam_data(source="sms")


@pytest.mark.skipif(not DATA_ROOT, reason="the real sets are not on this machine")
@pytest.mark.parametrize("seed", range(3))
def test_the_sms_collection_is_split_into_fifths(
    seed: int, capsys: pytest.CaptureFixture[str]
) -> None:
    data = spam_data(root=DATA_ROOT, seed=seed, val_fraction=0.0)
    assert (len(data.parts["train"]), len(data.parts["test"])) == (4_460, 1_114)
    assert sum(data.messages[i].label for i in data.parts["test"]) == 149  # a fifth of 747
    assert not set(sides(data)["train"]) & set(sides(data)["test"])
    assert data.resolved["duplicates"] == 415
    assert "4,827 ham, 747 spam, 415 copies kept on one side" in capsys.readouterr().out


def test_any_file_can_be_predicted_without_a_training_set() -> None:
    Path("new.txt").write_text("Hello\r\n\n  \nFREE £££!\nlast", encoding="utf-8")
    data = spam_data(stage="predict", predict_path="new.txt", batch_size=2)
    batches = list(data.predict_dataloader())
    assert [text for b in batches for text in b["message"]] == ["Hello", "FREE £££!", "last"]
    assert torch.cat([b["index"] for b in batches]).tolist() == [0, 3, 4]  # lines, from 0
    assert "label" not in batches[0]
    assert data.train_messages == []


def test_a_stock_trainer_fits_tests_and_predicts(tmp_path: Path) -> None:
    class Counting(L.LightningModule):
        """Counts what it is given."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))
            self.seen: Counter[str] = Counter()

        def training_step(self, batch: dict[str, Any], index: int) -> torch.Tensor:
            self.seen["train"] += len(batch["message"])
            return self.weight.sum()

        def validation_step(self, batch: dict[str, Any], index: int) -> None:
            self.seen["val"] += len(batch["message"])

        def test_step(self, batch: dict[str, Any], index: int) -> None:
            self.seen["test"] += len(batch["message"])

        def predict_step(self, batch: dict[str, Any], index: int) -> list[str]:
            return batch["message"]

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    Path("new.txt").write_text("one\ntwo\nthree\n")
    for val_fraction, expected in ((0.25, {"train": 120, "val": 40, "test": 20}),
                                   (0.0, {"train": 160, "test": 20})):  # fmt: skip
        data = SpamDataModule(
            written(), predict_path="new.txt", batch_size=20, val_fraction=val_fraction
        )
        trainer = L.Trainer(accelerator="cpu", max_epochs=2, logger=False, num_sanity_val_steps=0,
                            enable_checkpointing=False, enable_progress_bar=False,
                            enable_model_summary=False)  # fmt: skip
        module = Counting()
        trainer.fit(module, datamodule=data)
        trainer.test(module, datamodule=data, verbose=False)
        assert module.seen == expected
        assert trainer.predict(module, datamodule=data) == [["one", "two", "three"]]


BAD = [
    (b"", {}, "bad.tsv has 0 ham and 0 spam messages; both kinds are needed"),
    (b"ham\tyes\nham\tno\n", {}, "bad.tsv has 2 ham and 0 spam messages; both kinds are needed"),
    (b"ham\tyes\njunk\tno\n", {}, r"bad.tsv, line 2: 'junk\tno' is not label<TAB>text with the "
     "label ham or spam; write each line so, or type --data.source=embedded"),
    (b"ham yes\n", {}, "bad.tsv, line 1: 'ham yes' is not label<TAB>text"),
    (b"ham\tcaf\xe9\n", {}, "bad.tsv is not UTF-8: byte 0xe9 at position 7"),
    (b"ham\ta\nspam\tb\n", {}, "2 messages leave none for val and test: give more, or type"),
    (b"", {"batch_size": 0}, "batch_size is 0; allowed are"),
    (b"", {"batch_size": "some"}, "batch_size is 'some'; allowed are"),
    (b"", {"test_fraction": 0.0}, "test_fraction is 0.0 and val_fraction 0.1; allowed are"),
    (b"", {"val_fraction": -0.1}, "type --data.test_fraction=0.2 --data.val_fraction=0.1"),
    (b" \n\n", {"stage": "predict", "predict_path": "bad.tsv"}, "bad.tsv is empty: write one"),
    (b"", {"stage": "predict"}, "nothing to predict: type --data.predict_path=FILE"),
    (b"\xff", {"stage": "predict", "predict_path": "bad.tsv"}, "and --data.predict_path=text.txt"),
    (b"", {"stage": "predict", "predict_path": "."}, "is a folder; one file is read: type"),
]  # fmt: skip


@pytest.mark.parametrize(("content", "options", "message"), BAD)
def test_bad_input_ends_before_the_first_step_in_one_message(
    content: bytes, options: dict[str, Any], message: str
) -> None:
    path = Path("bad.tsv")
    path.write_bytes(content)
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the text follows
        spam_data(path, **options)
    assert message in str(error.value)
    assert path.read_bytes() == content


def test_a_missing_file_names_its_neighbours() -> None:
    written()
    with pytest.raises(FileNotFoundError, match=r"nearest there: messages\.tsv; type --data\.path"):
        spam_data(Path("mesages.tsv"))
    with pytest.raises(FileNotFoundError, match=r"type --data\.predict_path=FILE"):
        spam_data(stage="predict", predict_path="mesages.tsv")


def test_line_separators_inside_a_message_do_not_end_it() -> None:
    odd = "ham\tone\x85two\u2028three\x0bfour"
    assert parse([odd, "spam\tx"], "odd")[0].text == "one\x85two\u2028three\x0bfour"
    Path("odd.txt").write_text(odd, encoding="utf-8")
    data = spam_data(stage="predict", predict_path="odd.txt")
    assert len(data.lines) == 1


def test_the_embedded_file_is_shipped_beside_the_code() -> None:
    assert EMBEDDED.is_file()
