"""Spam: both classes in every split, copies in one split, and each message once."""

import csv
import io
import os
from collections import Counter
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from ravine.datamodules import DataParallelInfo, SpamDataModule
from ravine.datamodules.spam import EMBEDDED_FILE, Message, grouped_stratified_split, parse_messages

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
    return {
        k: [data.messages[i].text.strip().casefold() for i in v] for k, v in data.splits.items()
    }


@pytest.mark.parametrize("seed", range(5))
def test_each_split_has_its_fraction_of_each_class_and_its_own_messages(seed: int) -> None:
    data = spam_data(written(), seed=seed, test_fraction=0.2, val_fraction=0.25)
    classes = {k: Counter(data.messages[i].label for i in part) for k, part in data.splits.items()}
    assert classes == {"train": {0: 48, 1: 12}, "val": {0: 16, 1: 4}, "test": {0: 16, 1: 4}}
    places = [i for part in data.splits.values() for i in part]
    assert sorted(places) == list(range(100))
    train, val, test = map(set, sides(data).values())
    assert not train & val | train & test | val & test
    assert data.provenance["duplicates"] == 8
    assert data.train_messages == [data.messages[i].text for i in data.splits["train"]]


def test_seeds_split_differently_and_a_seed_always_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = written()
    parts = [spam_data(path, seed=seed).splits for seed in (0, 0, 1)]
    assert parts[0] == parts[1] != parts[2]
    monkeypatch.setenv("PL_GLOBAL_SEED", "5")  # a later test with another seed_everything
    assert spam_data(path, seed=0).splits == parts[0]


def test_a_group_of_copies_too_large_for_a_split_stays_in_the_training_data() -> None:
    messages = [Message("again", 1)] * 9 + [Message("once", 1), Message("hi", 0), Message("ho", 0)]
    for seed in range(5):
        val_ids = grouped_stratified_split(
            messages, list(range(12)), 0.2, torch.Generator().manual_seed(seed)
        )
        assert not val_ids & set(range(9))


def test_a_text_with_both_labels_is_one_group(tmp_path: Path) -> None:
    messages = [Message("Same", 0), Message("same ", 1)] * 3
    messages += [Message(f"{i}", i % 2) for i in range(30)]
    for seed in range(5):
        g = torch.Generator().manual_seed(seed)
        val_ids = grouped_stratified_split(messages, list(range(36)), 0.4, g)
        assert len(val_ids & set(range(6))) in (0, 6)


def test_an_epoch_yields_messages_with_their_labels_and_positions() -> None:
    data = spam_data(written(), batch_size=8, val_fraction=0.0)
    batches = list(data.train_dataloader())
    assert len(batches) == 80 // 8
    for batch in batches:
        assert batch["label"].dtype == batch["index"].dtype == torch.int64
        for text, label, index in zip(*batch.values(), strict=True):
            assert data.messages[index][:2] == (text, label)
    assert sorted(int(i) for b in batches for i in b["index"]) == data.splits["train"]


@pytest.mark.parametrize("batch_size", ["all", 1000])
def test_the_full_batch_is_one_step(batch_size: Any) -> None:
    data = spam_data(written(), batch_size=batch_size, val_fraction=0.0)
    (batch,) = data.train_dataloader()
    assert sorted(batch["index"].tolist()) == data.splits["train"]


def test_the_test_set_is_covered_once_on_any_number_of_ranks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = spam_data(written(), batch_size=6)
    for size in (1, 2, 3):
        seen = []
        for rank in range(size):
            monkeypatch.setattr(
                DataParallelInfo,
                "from_trainer",
                lambda trainer, r=rank, n=size: DataParallelInfo(r, n),
            )
            seen += [int(i) for batch in data.test_dataloader() for i in batch["index"]]
        assert sorted(seen) == data.splits["test"]


def test_the_embedded_messages_are_those_of_lecture_0(capsys: pytest.CaptureFixture[str]) -> None:
    data = spam_data(source="embedded", batch_size="all", val_fraction=0.0)
    counts = {k: Counter(data.messages[i].label for i in part) for k, part in data.splits.items()}
    assert counts == {"train": {0: 15, 1: 15}, "val": {}, "test": {0: 5, 1: 5}}
    assert len(set(sides(data)["train"] + sides(data)["test"])) == 40
    test = [data.messages[i] for i in data.splits["test"]]
    ham, spam = ([m.text for m in test if m.label == k] for k in (0, 1))
    trigger = {"urgent", "buy", "money", "won", "free"}
    assert any("!" in m and sum(c.isupper() for c in m) > 5 for m in ham)
    assert any("www" in m for m in ham)
    assert any(not trigger & set(m.lower().split()) for m in spam)
    assert "the EMBEDDED messages" in capsys.readouterr().out
    assert data.provenance["source"] == "embedded"


def test_without_files_and_network_auto_uses_the_embedded_messages(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_network() -> None:
        raise OSError("no network")

    monkeypatch.setattr("ravine.datamodules.downloads._make_https_opener", no_network)
    data = SpamDataModule()
    data.prepare_data()
    data.setup("fit")
    assert data.provenance["source"] == "embedded"
    assert "'sms' was not found" in capsys.readouterr().out
    assert len(data.train_dataloader()) == 1  # 27 messages: a batch of 64 takes all of them
    with pytest.raises(FileNotFoundError, match=r"use source='embedded'$"):
        spam_data(source="sms")


@pytest.mark.skipif(not DATA_ROOT, reason="the real sets are not on this machine")
@pytest.mark.parametrize("seed", range(3))
def test_one_fifth_of_the_sms_collection_is_test_data(
    seed: int, capsys: pytest.CaptureFixture[str]
) -> None:
    data = spam_data(root=DATA_ROOT, seed=seed, val_fraction=0.0)
    assert (len(data.splits["train"]), len(data.splits["test"])) == (4_460, 1_114)
    assert sum(data.messages[i].label for i in data.splits["test"]) == 149  # a fifth of 747
    assert not set(sides(data)["train"]) & set(sides(data)["test"])
    assert data.provenance["duplicates"] == 415
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
    (b"", {}, "bad.tsv has 0 ham and 0 spam messages; allowed: at least one message of each"),
    (b"ham\tyes\nham\tno\n", {}, "bad.tsv has 2 ham and 0 spam messages; allowed: at least"),
    (b"ham\tyes\njunk\tno\n", {}, r"bad.tsv, line 2: 'junk\tno' is not label<TAB>text; allowed: "
     "the label ham or spam, a tab, and the text; correct the line; or use text_column='NAME'"),
    (b"ham yes\n", {}, "bad.tsv, line 1: 'ham yes' is not label<TAB>text"),
    (b"ham\tcaf\xe9\n", {}, "bad.tsv is not UTF-8: byte 0xe9 at position 7"),
    (b"ham\ta\nspam\tb\n", {}, "2 messages, 2 of them different, leave none for val and"),
    (b"ham\ta\nspam\tb\n" * 10, {}, "bad.tsv: 20 messages, 2 of them different, leave none"),
    (b"ham\ta\nham\tb\nspam\tc\nspam\td\n", {}, "leave none for val, because "
     "equal messages stay in one split"),
    (b"ham\ta\nham\tb\nspam\tc\nspam\td\n", {}, "add different messages, or use val_fraction=0"),
    (b"\x89PNG\r\n\x1a\n", {}, "bad.tsv is not a text: it is a PNG image; allowed: text files; "
     "use path='FILE'"),
    (b"ham\ta\0b\n", {}, "bad.tsv is not a text: byte 0x00 at position 5; allowed: text in the "
     "encoding utf-8; use encoding='utf-16' if"),
    (b"", {"encoding": "latin-9000"}, "encoding='latin-9000' is not a text encoding; allowed:"),
    (b"", {"encoding": "zip"}, "encoding='zip' is not a text encoding; allowed: utf-8, latin-1"),
    (b"", {"batch_size": 0}, "batch_size=0 is not a positive integer; allowed: 1"),
    (b"", {"batch_size": "some"}, "batch_size='some' is not a positive integer"),
    (b"", {"test_fraction": 0.0}, "test_fraction=0.0 is not a fraction of the data; "),
    (b"", {"val_fraction": -0.1}, "val_fraction=-0.1 is not a fraction of the data; "),
    (b" \n\n", {"stage": "predict", "predict_path": "bad.tsv"}, "bad.tsv has no message; "),
    (b"", {"stage": "predict"}, "predict needs a file, and predict_path is not given"),
    (b"\xff", {"stage": "predict", "predict_path": "bad.tsv"}, "0xff at position 0; allowed: "),
    (b"", {"stage": "predict", "predict_path": "."}, "is a folder; allowed: one file; use pr"),
]  # fmt: skip


@pytest.mark.parametrize(("content", "options", "message"), BAD)
def test_bad_input_is_refused_before_the_first_step_in_one_message(
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
    with pytest.raises(
        FileNotFoundError, match=r"nearest: messages\.tsv; use path='messages\.tsv'$"
    ):
        spam_data(Path("mesages.tsv"))
    with pytest.raises(FileNotFoundError, match=r"use predict_path='messages\.tsv'$"):
        spam_data(stage="predict", predict_path="mesages.tsv")


def csv_data(content: str | bytes, name: str = "mail.csv", **options: Any) -> SpamDataModule:
    Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return spam_data(Path(name), **{"val_fraction": 0.0} | options)


def texts(data: SpamDataModule) -> list[tuple[str, int]]:
    return [(message.text, message.label) for message in data.messages]


KAGGLE = "v1,v2,,,\r\n" + "".join(
    f'ham,"see you, at {i}",,,\r\nspam,WIN \xa3{i}00 now,,,\r\n' for i in range(6)
)


def test_the_spam_csv_of_kaggle_is_read_by_its_columns(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match=r"not UTF-8: byte 0xa3 .* use encoding='latin-1' if"):
        csv_data(KAGGLE.encode("latin-1"), "spam.csv")
    data = csv_data(KAGGLE.encode("latin-1"), "spam.csv", encoding="latin-1")
    assert texts(data)[:2] == [("see you, at 0", 0), ("WIN \xa3000 now", 1)]
    assert len(data.messages) == 12
    assert "spam.csv, columns v2 and v1, 6 ham, 6 spam" in capsys.readouterr().out
    csv_data(KAGGLE.replace('at 3",', 'at 3","or later"'), "more.csv")
    assert "1 rows have text in columns without a name" in capsys.readouterr().out


ROWS = [("ham", f'hi {i}, a "b"; c|d') for i in range(4)] + [
    ("spam", f"win\n{i}") for i in range(4)
]


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("header", [("category", "message"), ("kind", "note"), None])
def test_any_table_is_read_by_columns(delimiter: str, header: Any) -> None:
    buffer = io.StringIO()
    table = csv.writer(buffer, delimiter=delimiter)
    table.writerows([(*header, "id")] if header else [])
    table.writerows([(*row, 7) for row in ROWS])
    options: dict[str, str] = {}
    if header is None:
        options = {"text_column": "1", "label_column": "0"}
    elif header[0] == "kind":
        options = {"text_column": "note", "label_column": "kind"}
    data = csv_data(buffer.getvalue(), **options)
    assert texts(data) == [(text, int(label == "spam")) for label, text in ROWS]


def test_other_labels_are_read_if_an_argument_names_the_spam_label() -> None:
    rows = "".join(f"ok,a{i}\njunk,b{i}\n" for i in range(4))
    content = "target,text\n" + rows
    with pytest.raises(ValueError, match=r"line 2: the label is 'ok'; .*; use spam_label="):
        csv_data(content)
    assert [label for _, label in texts(csv_data(content, spam_label="junk"))] == [0, 1] * 4
    with pytest.raises(ValueError, match=r"spam_label='x' .* 'junk', 'ok'; allowed: two"):
        csv_data(content, spam_label="x")
    digits = "spam,message\n" + "".join(f"{i % 2},text {i}\n" for i in range(8))
    assert [label for _, label in texts(csv_data(digits))] == [0, 1] * 4
    tabs = digits.replace(",", "\t")
    assert texts(csv_data(tabs, "mail.tsv")) == texts(csv_data(digits))


BAD_TABLES = [
    ("a,b\nham,x\n", {}, "no column with a known name for the texts; allowed: a, b; use text_col"),
    ("text,b\nx,ham\n", {}, "a known name for the labels; allowed: text, b; use label_column="),
    ("text,label\nx,ham\n", {"text_column": "txt"}, "no column 'txt'; allowed: text, label; use "
     "text_column='text'"),
    ("text,text,label\nx,y,ham\n", {}, "may hold the texts; allowed: 0, 1; use text_column='0'"),
    ("label,text\nham,x\nham\n", {}, "the row has 1 columns, but the column text is number 2"),
    ('label,text\nham,x\nham,"y\nspam,z\n', {}, "line 3: a quote is opened and never closed"),
    ("label,text\n,x\n", {}, "line 2: the label is ''; allowed: ham and spam, 0 and 1; use"),
    ("", {}, "mail.csv has no row; allowed: a header, and one message per row"),
    ("label,text\nham,x\n", {}, "mail.csv has 1 ham and 0 spam messages"),
]  # fmt: skip


@pytest.mark.parametrize(("content", "options", "message"), BAD_TABLES)
def test_a_table_that_cannot_be_read_is_refused_by_its_line(
    content: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the text follows
        csv_data(content, **options)
    assert message in str(error.value)


def test_a_cell_may_be_as_long_as_the_file() -> None:
    long = "x" * 200_000
    content = "label,text\n" + "".join(f"ham,{long}{i}\nspam,{i}\n" for i in range(3))
    before = csv.field_size_limit()
    assert csv_data(content).messages[0].text == f"{long}0"
    assert csv.field_size_limit() == before


def test_a_table_can_be_predicted_with_the_lines_of_its_rows() -> None:
    Path("new.csv").write_text('id,text\n1,"two\nlines"\n\n2,last\n')
    data = spam_data(stage="predict", predict_path="new.csv")
    assert data.predict_lines == [(1, "two\nlines"), (4, "last")]


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_a_rare_class_is_in_every_split_or_a_line_names_the_split(
    count: int, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [f"ham\tsee you at {i}" for i in range(40)] + [f"spam\tWIN {i}00" for i in range(count)]
    Path("rare.tsv").write_text("\n".join(rows) + "\n")
    for seed in range(5):
        data = spam_data(Path("rare.tsv"), seed=seed)
        spam = {k: sum(data.messages[i].label for i in v) for k, v in data.splits.items()}
        assert spam["train"] >= 1
        said = capsys.readouterr().out
        for side in ("val", "test"):
            assert (f"no spam in {side}, so scores" in said) == (spam[side] == 0)
        assert (spam["test"] >= 1) == (count > 1)
        assert (spam["val"] >= 1) == (count > 2)


def test_the_error_for_a_split_without_messages_has_a_hint() -> None:
    data = spam_data(written(), val_fraction=0.0)
    with pytest.raises(ValueError, match=r"no messages for val: .*; use val_fraction=0\.1"):
        data.val_dataloader()


def test_line_separators_inside_a_message_do_not_end_it() -> None:
    line = "ham\tone\x85two\u2028three\x0bfour"
    assert parse_messages([line, "spam\tx"], "odd")[0].text == "one\x85two\u2028three\x0bfour"
    Path("odd.txt").write_text(line, encoding="utf-8")
    data = spam_data(stage="predict", predict_path="odd.txt")
    assert len(data.predict_lines) == 1


def test_the_embedded_file_is_installed_with_the_code() -> None:
    assert EMBEDDED_FILE.is_file()
