"""JSON rows: every kind of file gives the same rows, and bad ones are named by file and line."""

import json
from pathlib import Path
from typing import Any

import pytest

from ravine.datamodules import InstructionDataModule, PromptDataModule
from ravine.datamodules.json_rows import holds_json_rows, read_json_rows

ROWS = [{"prompt": f"what is {n} + {n}? ", "answer": str(2 * n)} for n in range(30)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


def kinds(folder: Path) -> list[Path]:
    """The same rows under every suffix, encoding mark, line break and form."""
    for name in ("a.jsonl", "b.ndjson", "c.JSONL", "d.json"):
        (folder / name).write_text(LINES)
    (folder / "e.json").write_text(json.dumps(ROWS))
    (folder / "f.JSON").write_text(json.dumps(ROWS, indent=2), encoding="utf-8-sig")
    (folder / "g.jsonl").write_text(LINES, encoding="utf-8-sig", newline="\r\n")
    (folder / "h.jsonl").write_text(LINES, newline="\r")
    (folder / "i").mkdir()
    half = LINES.index("\n", len(LINES) // 2) + 1
    (folder / "i/1.jsonl").write_text(LINES[:half])
    (folder / "i/2.NDJSON").write_text(LINES[half:])
    return sorted(folder.iterdir())


def test_every_suffix_and_a_folder_give_the_same_rows(tmp_path: Path) -> None:
    paths = kinds(tmp_path)
    assert len(paths) == 9
    for path in paths:
        prompts = PromptDataModule(path, num_val_prompts=2)
        prompts.setup("fit")
        assert prompts.rows == ROWS, path
        answers = InstructionDataModule(path, tokenizer="bytes", context_length=64)
        answers.setup("fit")
        assert len(answers.rows) == len(ROWS), path
        assert [row.fields for row in read_json_rows(path, "{}")] == ROWS, path


def test_a_folder_of_json_and_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text(LINES)
    (tmp_path / "readme.txt").write_text("about the questions")
    with pytest.raises(
        ValueError, match=r"holds JSON files \(q.jsonl\) and other files \(readme.txt\)"
    ):
        PromptDataModule(tmp_path).setup("fit")
    assert not holds_json_rows(tmp_path / "readme.txt")


GOOD = '{"prompt": "p", "answer": "a"}'
BAD: dict[str, tuple[bytes, str]] = {
    "half of an emoji": (
        rb'{"prompt": "laugh ", "answer": "ha \ud83d"}',
        "line 3: the field 'answer' holds half of a character, U+D83D at position 3",
    ),
    "a second half": (
        rb'{"prompt": "\ude00", "answer": "a"}',
        "line 3: the field 'prompt' holds half",
    ),
    "NUL as an escape": (
        rb'{"prompt": "p", "answer": "a\u0000bcd"}',
        "line 3: the field 'answer' holds the character U+0000 at position 1",
    ),
    "NUL": (b'{"prompt": "p", "answer": "a\0b"}', "line 3: not a text: byte 0x00 at position 28"),
    "Latin-1": (
        '{"prompt": "café ", "answer": "a"}'.encode("latin1"),
        "line 3: not UTF-8: byte 0xe9 at position 15; allowed: UTF-8; "
        "if the file is latin1, convert it: iconv -f latin1",
    ),
    "deep": (
        b'{"prompt": ' + b"[" * 100_000,
        "line 3: not a row: the brackets are nested too deeply",
    ),
    "digits": (b'{"n": ' + b"9" * 5_000 + b"}", "line 3: not a row: Exceeds the limit"),
    "list": (b"[1, 2]", "line 3: a value of type list is not an object; allowed: an object like {"),
    "no JSON": (b'{"prompt": "a",', "line 3: not valid JSON: "),
}


@pytest.mark.parametrize(("line", "message"), BAD.values(), ids=BAD)
@pytest.mark.parametrize("suffix", ["jsonl", "json"])
def test_a_bad_row_is_named_by_file_and_line(
    line: bytes, message: str, suffix: str, tmp_path: Path
) -> None:
    path = tmp_path / f"rows.{suffix}"
    path.write_bytes(b"\n".join([GOOD.encode(), b"", line, GOOD.encode()]))
    for tokenizer in ("characters", "bytes"):
        data: Any = InstructionDataModule(path, tokenizer=tokenizer, context_length=64)
        with pytest.raises(ValueError) as error:  # noqa: PT011 - the text follows
            data.setup("fit")
        assert f"{path}, {message}" in str(error.value)
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the text follows
        PromptDataModule(path).setup("fit")
    assert f"{path}, line 3: " in str(error.value)


def test_a_bad_object_of_a_list_is_named_by_its_number_and_a_bad_byte_by_its_line(
    tmp_path: Path,
) -> None:
    path = tmp_path / "rows.json"
    for written, message in {
        f'[{GOOD}, {{"prompt": "\\ud83d", "answer": "a"}}]'.encode(): "object 2: the field",
        f"[{GOOD},\n 7]".encode(): "object 2: a value of type int is not an object",
        f'[{GOOD},\n {{"prompt": }}]'.encode(): "line 2: not valid JSON: Expecting value at",
        f'[{GOOD},\n {{"prompt": "é"}}]'.encode("latin1"): "line 2: not UTF-8: byte 0xe9",
        b"[" * 100_000: ": not a row: the brackets are nested",
        b'"text"': "object 1: a value of type str is not an object",
    }.items():
        path.write_bytes(written)
        with pytest.raises(ValueError) as error:  # noqa: PT011 - the text follows
            InstructionDataModule(path, tokenizer="bytes").setup("fit")
        assert message in str(error.value)


def test_pairs_of_escapes_and_all_other_characters_are_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "\\ud83d\\ude00 \u2028\u0085\\u000c", "answer": "\\ufffd"}\n' * 2)
    (_, first), _ = read_json_rows(path, "{}")
    assert first == {"prompt": "😀 \u2028\u0085\f", "answer": "\ufffd"}


def test_prompts_and_the_text_they_are_compared_with_have_a_checksum(tmp_path: Path) -> None:
    def checksum(answer: str, text: str) -> str:
        rows = [f'{{"prompt": "q{i}", "answer": "{answer}"}}' for i in range(4)]
        (tmp_path / "q.jsonl").write_text("\n".join(rows))
        (tmp_path / "t.txt").write_text(text)
        data = PromptDataModule(tmp_path / "q.jsonl", corpus_path=tmp_path / "t.txt")
        data.setup("fit")
        return data.provenance["sha256"]

    assert checksum("a", "play") == checksum("a", "play")
    assert len({checksum("a", "play"), checksum("b", "play"), checksum("a", "plan")}) == 3
