"""Prompts and answers: only the answer is trained on, up to its end."""

import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from ravine.datamodules import InstructionDataModule
from ravine.datamodules.instruction import IGNORE_INDEX
from ravine.lightning_modules import LanguageModel

SUMS = [(f"{a}+{b}=", str(a + b)) for a in range(4) for b in range(4)]


def written(path: Path, rows: list[Any]) -> Path:
    path.write_text("\n\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


@pytest.fixture
def sums(tmp_path: Path) -> Path:
    return written(tmp_path / "sums.jsonl", [{"prompt": p, "answer": a} for p, a in SUMS])


def data_of(path: Path, **how: Any) -> InstructionDataModule:
    how = {"tokenizer": "bytes", "context_length": 16, "batch_size": 4, "seed": 0} | how
    data = InstructionDataModule(path, **how)
    data.setup("fit")
    return data


def texts(data: InstructionDataModule, inputs: torch.Tensor, targets: torch.Tensor) -> list[Any]:
    assert data.tokenizer is not None
    rows = []
    for given, learned in zip(inputs, targets, strict=True):
        at = (learned != IGNORE_INDEX).nonzero()[:, 0]
        size = int(at[0]) + 1
        assert at.tolist() == list(range(size - 1, size - 1 + len(at)))  # one piece
        assert (given[size : size + len(at) - 1] == learned[at[:-1]]).all()  # it sees its answer
        assert not given[size + len(at) - 1 :].any()
        rows.append((data.tokenizer.decode(given[:size]), learned[at].tolist()))
    return rows


def test_every_answer_and_nothing_else_is_a_target(sums: Path) -> None:
    data = data_of(sums, batch_size=1)
    found = [row for batch in data.train_dataloader() for row in texts(data, *batch)]
    found += [row for batch in data.val_dataloader() for row in texts(data, *batch)]
    assert sorted(found) == sorted((p, [*a.encode(), 0]) for p, a in SUMS)


def test_two_epochs_have_other_orders_and_the_same_examples(sums: Path) -> None:
    data = data_of(sums, batch_size=2)
    loader = data.train_dataloader()
    epochs = []
    for epoch in range(2):
        loader.set_epoch(epoch)
        epochs.append([row for batch in loader for row in texts(data, *batch)])
    assert epochs[0] != epochs[1]
    assert sorted(epochs[0]) == sorted(epochs[1])
    assert len(epochs[0]) == 14  # 16, of which two are for validation


def test_an_example_longer_than_the_context_is_truncated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # with the end token ("abc", "de") has 6 tokens, which fit: targets are shifted by one
    rows = [("ab", "cdefgh"), ("a", "b"), ("abcdefg", "h"), ("a", "bc"), ("abc", "de")]
    path = written(tmp_path / "long.jsonl", [{"prompt": p, "answer": a} for p, a in rows])
    data = data_of(path, context_length=5, batch_size=1)
    found = [row for batch in data.train_dataloader() for row in texts(data, *batch)]
    found += [row for batch in data.val_dataloader() for row in texts(data, *batch)]
    assert sorted(found) == [
        ("a", [98, 0]),
        ("a", [98, 99, 0]),
        ("ab", [99, 100, 101, 102]),
        ("abc", [100, 101, 0]),
    ]
    assert "2 longer than the context are cut, 1 left out" in capsys.readouterr().out.replace(
        "\n", " "
    )


def test_prompt_tokens_do_not_change_the_loss(sums: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    data = data_of(sums)
    model = LanguageModel(256, 16, num_layers=1, d_model=16, num_heads=2, zero_init_residual=False)
    model.configure_model()
    inputs, targets = next(iter(data.train_dataloader()))
    monkeypatch.setattr(model, "log", lambda name, value: None)
    loss = model.training_step((inputs, targets), 0)
    logits = model(inputs)
    counted = targets != IGNORE_INDEX
    expected = -logits.log_softmax(-1)[counted].gather(1, targets[counted][:, None]).mean()
    torch.testing.assert_close(loss, expected)


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_a_tuned_model_answers_and_stops(sums: Path) -> None:
    L.seed_everything(0)
    model = LanguageModel(num_layers=2, d_model=64, num_heads=4)
    model.lr = 1e-2
    quiet = dict.fromkeys(
        ("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False
    )
    trainer = L.Trainer(accelerator="cpu", max_steps=200, limit_val_batches=0, **quiet)
    trainer.fit(model, data_of(sums, batch_size=14, val_fraction=0.13))
    known = [SUMS[i] for i in data_of(sums, val_fraction=0.13)._split_indices()[0].tolist()]
    answers = model.generate([p for p, _ in known], max_new_tokens=6, temperature=0)
    assert answers == [p + a for p, a in known]


BAD: list[tuple[list[Any], str]] = [
    (
        [{"prompt": "a"}],
        "line 1: no field 'answer'; the fields are prompt; allowed: an object with a text",
    ),
    (
        [{"prompt": "a", "answer": "b"}, {"prompt": "a", "completion": "b"}],
        "correct the line, or use answer_field='completion'",
    ),
    ([{"prompt": "", "answer": "b"}], "line 1: an empty field 'prompt'"),
    ([{"prompt": 3, "answer": "b"}], "line 1: no text in field 'prompt'"),
    (['{"prompt": "a",'], "line 1: not valid JSON: "),
    (["[1, 2]"], "line 1: a value of type list is not an object"),
    ([], "holds 0 examples; allowed: 2 or more"),
    (
        [{"prompt": "a" * 40, "answer": "b"}] * 3,
        "no room for an answer; allowed: a context that is longer than two",
    ),
]


@pytest.mark.parametrize(("rows", "message"), BAD)
def test_a_bad_line_is_named(rows: list[Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the text follows
        data_of(written(tmp_path / "bad.jsonl", rows))
    assert message in str(error.value)


def test_a_missing_file_is_named() -> None:
    with pytest.raises(
        FileNotFoundError,
        match=r"the file or folder nowhere\.jsonl does not exist; .*use path='FILE'",
    ):
        data_of(Path("nowhere.jsonl"))
