"""Headers of presets, and their values as `lightning show` resolves them without torch."""

import io
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import yaml

from ravine.cli.config import presets
from ravine.cli.discovery import config_pages
from ravine.cli.main import main


def test_a_header_gives_command_machine_time_and_expected_result() -> None:
    header = config_pages.read_header(
        "# lightning fit --config a/b\n# Machine: one CPU core. Time: about 4.5 minutes\n"
        "# (estimated from steps). More.\n# Expect: val/loss 2.48, as published\n# by others. No\n"
        "model: X # Time: no\n"
    )
    assert header.command == "lightning fit --config a/b"
    assert header.machine == "one CPU core"
    assert header.time == "about 4.5 minutes (estimated from steps)"
    assert header.expected == "val/loss 2.48, as published by others"
    assert config_pages.read_header("model: X\n") == config_pages.ConfigHeader()


@pytest.mark.parametrize("config", config_pages.list_configs(), ids=lambda config: config.name)
def test_every_preset_says_its_command_machine_and_result(config: Any) -> None:
    header = config.header
    assert f"--config {config.name}" in header.command + header.text.splitlines()[1]
    assert header.machine
    assert header.expected
    assert header.time or "as for the config before it" in header.machine


def test_an_overlay_is_a_preset_without_a_model() -> None:
    for config in config_pages.list_configs():
        model = yaml.safe_load(config.path.read_text()).get("model")
        has_class = isinstance(model, str) or "class_path" in (model or {})
        assert config.is_overlay == (not has_class), config.name


def output(words: list[str]) -> str:
    """What a command prints; it must succeed."""
    with redirect_stdout(io.StringIO()) as stream:
        assert main(words) == 0, words
    return stream.getvalue()


def differences(shown: Any, parsed: Any, path: str = "") -> list[str]:
    """Values that `show` and the parser resolve differently; of trainer only those of `show`."""
    if isinstance(shown, dict) and isinstance(parsed, dict):
        keys = shown if path in ("", ".trainer") else shown.keys() | parsed.keys()
        return [
            line
            for key in keys
            for line in differences(shown.get(key, "?"), parsed.get(key, "?"), f"{path}.{key}")
        ]
    if isinstance(shown, list) and isinstance(parsed, list) and len(shown) == len(parsed):
        pairs = enumerate(zip(shown, parsed, strict=True))
        return [line for i, (a, b) in pairs for line in differences(a, b, f"{path}.{i}")]
    if path.endswith(".class_path"):
        parsed = str(parsed).rpartition(".")[2]
    return [] if shown == parsed and type(shown) is type(parsed) else [f"{path}: {shown} {parsed}"]


@pytest.mark.parametrize(
    "names",
    [
        ["diffusion/mnist_quick"],
        ["reinforce/quick", "reinforce/kl"],
        ["gpt2/124m", "strategy/zero3"],
        ["shakespeare/quick", "debug/profiler"],
    ],
    ids="+".join,
)
def test_resolved_values_equal_those_of_the_parser(
    names: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shown = output(["show", *names])
    configs = [word for name in names for word in ("--config", name)]
    parsed = yaml.safe_load(output(["fit", *configs, "--print_config"]))
    assert differences(yaml.safe_load(shown), parsed) == []


def test_what_is_shown_can_be_used_as_a_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("copy.yaml").write_text(output(["show", "diffusion/digits", "diffusion/attempt1"]))
    names = ["--config", "diffusion/digits", "--config", "diffusion/attempt1"]
    texts = [output(["fit", *c, "--print_config"]) for c in (names, ["--config", "copy.yaml"])]
    values = [yaml.safe_load(text) for text in texts]
    for config in values:
        del config["trainer"]["name"]
    assert values[0] == values[1]


def merged(*texts: str) -> Any:
    """The plain values of configs in order."""
    nodes = []
    for i, text in enumerate(texts):
        Path(f"{i}.yaml").write_text(text)
        nodes.append(config_pages.load_config(f"{i}.yaml"))
    return config_pages.plain_value(config_pages.merge_configs(nodes))


def test_a_later_config_replaces_values_and_adds_callbacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    base = (
        "model: {class_path: Diffusion, init_args: {num_steps: 5, eta: 1}}\n"
        "trainer: {callbacks: [{class_path: EMA}]}"
    )
    assert merged(base, "model: {init_args: {eta: 0}}")["model"]["init_args"] == {
        "num_steps": 5,
        "eta": 0,
    }
    added = merged(base, "trainer: {callbacks+: NaNGuard}")["trainer"]["callbacks"]
    assert [spec["class_path"] for spec in added] == ["EMA", "NaNGuard"]
    replaced = merged(base, "trainer: {callbacks: [LoRA]}")["trainer"]["callbacks"]
    assert [spec["class_path"] for spec in replaced] == ["LoRA"]
    other = merged(base, "model: {class_path: LanguageModel}")["model"]
    assert other == {"class_path": "LanguageModel", "init_args": {}}  # no argument fits


def test_comments_stay_with_their_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.yaml").write_text("trainer: # of the run\n  max_steps: 3 # few\n  x: {a: 1} # flow\n")
    text = config_pages.to_yaml(config_pages.load_config("a.yaml"))
    assert text.splitlines() == [
        "trainer:  # of the run",
        "  max_steps: 3  # few",
        "  x:  # flow",
        "    a: 1",
    ]


@pytest.mark.parametrize("value", [1e-5, 0.1, float("inf"), 3, True, None, "a: b", [1, 2], {}])
def test_a_value_is_written_as_yaml_reads_it(value: Any) -> None:
    assert yaml.safe_load(config_pages.scalar(value)) == value


def test_every_preset_can_be_shown() -> None:
    for name in presets.list_presets():
        nodes = [config_pages.load_config(presets.find_config(name))]
        merged_node = config_pages.add_defaults(config_pages.merge_configs(nodes))
        shown = yaml.safe_load(config_pages.to_yaml(merged_node))
        assert shown == config_pages.plain_value(merged_node), name
