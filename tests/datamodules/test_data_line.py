"""The line `data:` states how many examples or tokens a run trains and validates on."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from ravine.datamodules import (
    ImageDataModule,
    InstructionDataModule,
    PromptDataModule,
    RegressionDataModule,
    SpamDataModule,
    TextDataModule,
)


def json_file(folder: Path, count: int) -> Path:
    rows = [json.dumps({"prompt": f"What is {i}? ", "answer": str(i)}) for i in range(count)]
    path = folder / "rows.jsonl"
    path.write_text("\n".join(rows))
    return path


def text_file(folder: Path, count: int) -> Path:
    path = folder / "text.txt"
    path.write_text(("to be or not to be " * count)[:count])
    return path


def prompts_of_text(path: Path) -> PromptDataModule:
    return PromptDataModule(path, prompt_length=10, val_fraction=0.1)


@pytest.mark.parametrize(
    ("make", "train", "val"),
    [
        (lambda at: TextDataModule(text_file(at, 1000), val_fraction=0.1), 900, 100),
        (lambda at: InstructionDataModule(json_file(at, 20), tokenizer="bytes"), 18, 2),
        (lambda at: PromptDataModule(json_file(at, 20), val_fraction=0.25), 15, 5),
        # start positions: none of the training snippets reaches into the last tenth
        (lambda at: prompts_of_text(text_file(at, 1000)), 890, 91),
        (lambda at: RegressionDataModule(num_samples=30, num_val_samples=7), 30, 7),
        (lambda at: RegressionDataModule(num_samples=30), 30, 0),
        (lambda at: ImageDataModule(val_fraction=0), 1438, 0),
        (lambda at: SpamDataModule(source="embedded"), None, None),
    ],
)
def test_the_line_states_the_sizes_of_training_and_validation(
    make: Any, train: int | None, val: int | None, tmp_path: Path, capsys: Any
) -> None:
    data = make(tmp_path)
    data.prepare_data()
    data.setup("fit")
    (line,) = [text for text in capsys.readouterr().out.splitlines() if text.startswith("data: ")]
    found = re.search(r"; ([\d,]+) train, ([\d,]+) val", line)
    assert found, line
    sizes = [int(number.replace(",", "")) for number in found.groups()]
    if train is None:
        assert sizes == [len(data.splits["train"]), len(data.splits["val"])]
    else:
        assert sizes == [train, val]
