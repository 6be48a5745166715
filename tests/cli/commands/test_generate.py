"""`lightning generate` gives the same samples as `generate` in Python."""

from pathlib import Path
from typing import Any

import pytest
import torch

from ravine.cli.commands import generate, method_flags
from ravine.cli.main import main
from ravine.datamodules import CharTokenizer
from ravine.lightning_modules import LanguageModel

LETTERS = "\n abcdefghijklmnopqrstuvwxyz:"


def model_of(tokenizer: CharTokenizer | None, context: int = 16) -> LanguageModel:
    torch.manual_seed(0)
    model = LanguageModel(
        len(LETTERS), context, num_layers=1, d_model=16, num_heads=2, zero_init_residual=False
    )
    model.configure_model()
    model.tokenizer = tokenizer
    return model.eval()


def saved(model: LanguageModel, path: Path) -> str:
    checkpoint: dict[str, Any] = {
        "state_dict": model.state_dict(),
        "hyper_parameters": dict(model.hparams),
    }
    model.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, path)
    return str(path)


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    return saved(model_of(CharTokenizer(LETTERS)), tmp_path / "model.ckpt")


def test_three_lines_of_python_give_the_text_of_the_command(
    checkpoint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = LanguageModel.load_from_checkpoint(checkpoint)
    text = model.generate("who: ", max_new_tokens=30, temperature=0.7, top_k=9, seed=3)
    flags = ["--max_new_tokens=30", "--temperature", "0.7", "--top_k=9", "--seed=3"]
    assert main(["generate", "--ckpt_path", checkpoint, "--prompt=who: ", *flags]) == 0
    assert capsys.readouterr().out == f"{text}\n"
    assert len(text) == 35


def test_several_prompts_and_samples_are_printed_in_order(
    checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("prompts.txt").write_text("one\n\ntwo\\nlines\n")
    words = ["--prompt_file=prompts.txt", "--num_samples=2", "--max_new_tokens=5", "--batch_size=3"]
    assert main(["generate", "--ckpt_path", checkpoint, "--prompt=zero", *words]) == 0
    out = capsys.readouterr().out
    texts = LanguageModel.load_from_checkpoint(checkpoint).generate(
        ["zero", "one", "two\nlines"], max_new_tokens=5, num_samples=2
    )
    assert out == "".join(f"--- {i} of 6 ---\n{text}\n" for i, text in enumerate(texts, 1))
    assert [text[:3] for text in texts] == ["zer", "zer", "one", "one", "two", "two"]
    assert len(set(texts)) == 6


def test_a_prompt_file_may_have_a_byte_order_mark_and_other_breaks_within_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    lines = ["one\f\v\x1ctwo", "a\u2028b\u0085c\u2029d", "é"]
    for mark, end in (("", "\n"), ("\ufeff", "\r\n")):
        Path("p.txt").write_bytes((mark + end.join([*lines, ""])).encode())
        assert generate.load_prompts(Path("p.txt"), None) == lines
    for content, message in {
        b"good\ncaf\xe9\n": "p.txt, line 2, is not UTF-8: byte 0xe9 at position 3; iconv",
        "text".encode("utf-16"): "p.txt, line 1, is not text: byte 0x00 at position 3",
        b"\xef\xbb\xbf\n\n": "p.txt contains no prompt",
    }.items():
        Path("p.txt").write_bytes(content)
        with pytest.raises(ValueError) as error:  # noqa: PT011 - the text follows
            generate.load_prompts(Path("p.txt"), None)
        assert message in str(error.value)
    with pytest.raises(ValueError, match="is a folder"):
        generate.load_prompts(tmp_path, None)


def test_a_text_ends_before_its_stop_string(checkpoint: str) -> None:
    model = LanguageModel.load_from_checkpoint(checkpoint)
    free = str(model.generate("a", max_new_tokens=60))[1:]
    stop = free[20:22]
    pieces: list[str] = []
    text = str(model.generate("a", max_new_tokens=60, stop=["zzzz", stop], on_text=pieces.append))
    assert text == "a" + free[: free.index(stop)]
    assert "".join(pieces) == text[1:]
    assert model.generate(["a"], max_new_tokens=60, stop=stop) == [text]


REFUSED = {
    "": "generate needs a trained model",
    "--ckpt_path=X --prompt=": (
        "generate: a prompt is empty\n  allowed: a text of one character or more\n"
        "  type: --prompt='ROMEO:'\n"
    ),
    "--ckpt_path=X --prompt=A": "character 'A' (U+0041) at position 0 of the text is not in",
    "--ckpt_path=X --temperature=-1": (
        "DecodingConfig: temperature=-1.0 is out of range\n  allowed: 0 (the most probable token) "
        "or more\n  type: --temperature=0.8, or --model.sampling.temperature=0.8\n"
    ),
    "--ckpt_path=X --temperature=warm": "--temperature cannot be 'warm'\n  allowed: a number",
    "--ckpt_path=X --top_k=40": (
        "DecodingConfig: top_k=40 exceeds the vocabulary of 29 tokens\n  allowed: 1 to 29\n"
        "  type: --top_k=29, or"
    ),
    "--ckpt_path=X --top_k=4.5": "--top_k cannot be '4.5'\n  allowed: a whole number",
    "--ckpt_path=X --temprature=1": "generate has no flag --temprature\n  nearest: temperature",
    "--ckpt_path=X --context_overflow=jump": (
        "allowed: error, slide\n  type: --context_overflow=slide"
    ),
    "--ckpt_path=X --device=gpu": "this machine has no device 'gpu'",
    "--ckpt_path=X --device=cuda:99": "this machine has no device 'cuda:99'",
    "--ckpt_path=X --context_overflow=error": (
        "generate: a prompt of 1 tokens and 200 new tokens exceed the context of 16 tokens\n"
        "  allowed: max_new_tokens up to 16\n"
        "  type: --max_new_tokens=16, or --context_overflow=slide\n"
    ),
    "--ckpt_path=X --stop=": (
        "generate: a stop string is empty\n  allowed: a text of one character or more\n"
        "  type: --stop='\\n\\n'\n"
    ),
    "--ckpt_path=X --num_samples=0": (
        "generate: num_samples=0 is too small\n  allowed: 1 or more\n  type: --num_samples=1\n"
    ),
    "--ckpt_path=X --prompt_file=no.txt": "the file no.txt does not exist",
    "--ckpt_path=X --prompt": "--prompt has no value",
    "--ckpt_path=X hello": "the value 'hello' has no flag\n  type: --prompt='hello'",
    "--ckpt_path=none.ckpt": "no checkpoint is called 'none.ckpt'",
}


@pytest.mark.parametrize("words", REFUSED)
def test_a_user_error_is_one_message(
    words: str, checkpoint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", *words.replace("X", checkpoint).split()]) == 2
    error = capsys.readouterr().err
    assert REFUSED[words] in error
    assert "Traceback" not in error


def test_generation_without_a_tokenizer_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = saved(model_of(None), tmp_path / "bare.ckpt")
    assert main(["generate", "--ckpt_path", path]) == 2
    assert "LanguageModel: generate needs a net and a tokenizer" in capsys.readouterr().err


def test_damaged_weights_end_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = model_of(CharTokenizer(LETTERS))
    with torch.no_grad():
        model.net.head.weight.fill_(torch.nan)
    assert main(["generate", "--ckpt_path", saved(model, tmp_path / "nan.ckpt")]) == 1
    assert "generate: the net returned NaN for text 0" in capsys.readouterr().err


def test_a_flipped_byte_is_detected_before_any_output(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path(saved(model_of(CharTokenizer(LETTERS)), tmp_path / "good.ckpt"))
    data = bytearray(path.read_bytes())
    at = data.find(b"data/0") + 400  # within the first weights
    data[at] ^= 1
    path.write_bytes(data)
    assert main(["generate", "--ckpt_path", str(path)]) == 2
    assert "it is damaged" in capsys.readouterr().err


def test_flags_are_the_arguments_of_the_method() -> None:
    known = method_flags.method_flags(LanguageModel.generate)
    assert set(known) == {
        "prompt", "max_new_tokens", "temperature", "top_k", "top_p", "min_p",
        "num_samples", "stop", "seed", "context_overflow", "batch_size",
    }  # fmt: skip
    assert known["top_k"].value_type is int
    assert known["top_p"].value_type is float
    assert known["prompt"].is_repeatable
    assert known["context_overflow"].choices == ("slide", "error")


def test_backslash_n_and_backslash_t_are_line_break_and_tab() -> None:
    assert method_flags.unescape_text(r"a\nb\tc\\n") == "a\nb\tc\\n"
