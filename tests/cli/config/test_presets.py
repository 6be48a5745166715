"""A config that is too large is refused before it is parsed."""

from pathlib import Path

import pytest

from ravine.cli.config import presets
from ravine.cli.main import main
from ravine.errors import UsageError

NINE = ["x"] * 9
LINES = [f"a0: &a0 [{', '.join(NINE)}]"]
LINES += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]


@pytest.mark.parametrize(
    "text",
    [
        "\n".join(LINES),
        "\n".join(LINES).replace("[", "{k: [", 1).replace("]", "]}", 1),
        "trainer: {logger: [" + ", ".join(["{a: 1}"] * 6000) + "]}",
        "a: " + "[" * 5000 + "]" * 5000,
        "a: " + "x" * 2**19,
    ],
    ids=["lists", "mapping", "values", "levels", "bytes"],
)
def test_a_config_that_is_too_large_is_one_error(
    tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "large.yaml"
    path.write_text(text)
    assert main(["fit", f"--config={path}"]) == 2
    err = capsys.readouterr().err
    assert " for a config\n  allowed: at most " in err
    assert len(err.splitlines()) == 3


def test_a_file_named_by_a_value_has_the_same_limits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "model.yaml"
    path.write_text("\n".join(LINES))
    assert main(["fit", f"--model={path}", "--data=TextDataModule"]) == 2
    err = capsys.readouterr().err
    assert " for a config\n  allowed: at most 10,000 values" in err
    assert len(err.splitlines()) == 3


def test_aliases_are_counted_in_full() -> None:
    few = "\n".join(LINES[:3])
    presets.check_yaml_size(few, "few")
    with pytest.raises(UsageError, match="aliases counted in full"):
        presets.check_yaml_size("\n".join(LINES[:5]), "many")


def test_every_installed_config_is_within_the_limits() -> None:
    for name in presets.list_presets():
        presets.check_config_file(presets.find_config(name))
