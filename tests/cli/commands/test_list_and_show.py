"""`lightning list` and `lightning show`: what they print, and answers to wrong names."""

import sys
from pathlib import Path

import pytest

from ravine.cli.discovery import class_pages, registry
from ravine.cli.main import main

Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder; the program is called lightning."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning"])
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("COLUMNS", "100")
    return tmp_path


def out(capsys: Capture, *words: str) -> str:
    """What a command prints; it must succeed and write no error."""
    assert main([*words]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def error(capsys: Capture, *words: str) -> list[str]:
    """The lines of a refused command."""
    assert main([*words]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err.splitlines()


def test_the_overview_names_every_kind(capsys: Capture) -> None:
    first_words = [line.split()[0] for line in out(capsys, "list").splitlines() if line]
    assert [word for word in first_words if word in registry.KINDS] == [*registry.KINDS]


def test_configs_are_listed_with_machine_time_and_result(capsys: Capture) -> None:
    text = out(capsys, "list", "configs")
    assert "machine: two CPU cores. time: 40 s\n" in text
    assert "expect: val/loss 1.58 nats per character" in text
    assert text.index("shakespeare/quick") < text.index("overlays") < text.index("strategy/zero3")


@pytest.mark.parametrize("kind", registry.KINDS)
def test_every_list_fits_into_the_width_and_holds_every_name(kind: str, capsys: Capture) -> None:
    lines = out(capsys, "list", kind).splitlines()
    assert max(map(len, lines)) <= 100
    names = {line.split()[0] for line in lines if line.startswith("  ") and line.strip()}
    assert {entry.name for entry in registry.entries_of(kind)} <= names


def test_a_word_selects_names_and_descriptions(capsys: Capture) -> None:
    text = out(capsys, "list", "callbacks", "adapters")
    assert "LoRA" in text
    assert "EMA" not in text
    text = out(capsys, "list", "configs", "LORA")
    assert "shakespeare/lora" in text
    assert "classifier/mnist" not in text


def test_a_word_alone_searches_the_names_of_all_kinds(capsys: Capture) -> None:
    text = out(capsys, "list", "muon")
    assert [line for line in text.splitlines() if line.endswith("=VALUE")] == [
        "optimizers: --trainer.callbacks+=NAME --trainer.callbacks.KEY=VALUE"
    ]
    assert text.count("Muon ") >= 3


def test_a_kind_may_be_in_the_singular(capsys: Capture) -> None:
    for word, kind in (("callback", "callbacks"), ("strategy", "strategies"), ("data", "data")):
        assert out(capsys, "list", word).startswith(f"{kind}: ")


def test_own_configs_and_classes_are_listed_and_shown(capsys: Capture) -> None:
    Path("small.yaml").write_text("# Machine: mine. Time: 1 s.\n# Expect: little.\nmodel: Mine\n")
    Path("mine.py").write_text(
        'import torch\n\nclass SignDescent(torch.optim.Optimizer):\n    """Signs only."""\n\n'
        "    def __init__(self, params, lr: float = 1e-3): ...\n"
    )
    assert "machine: mine. time: 1 s" in out(capsys, "list", "configs", "small")
    assert "mine.SignDescent" in out(capsys, "list", "optimizers")
    page = out(capsys, "show", "mine.SignDescent")
    assert page.startswith("mine.SignDescent: an optimizer, mine.SignDescent\n\nSigns only.\n")
    assert "lr=0.001  float" in page
    assert "--trainer.callbacks.optimizer=mine.SignDescent" in page
    assert "params" not in page
    assert "mine" not in sys.modules  # read, not imported


def test_a_class_without_a_signature_in_its_source_is_imported(capsys: Capture) -> None:
    Path("made_up.py").write_text(
        "import lightning as L\n\ndef make():\n    class Late(L.Callback):\n"
        '        """Made at run time."""\n\n        def __init__(self, n: int = 3): ...\n'
        "    return Late\n\nLate = make()\n"
    )
    page = out(capsys, "show", "made_up.Late")
    assert page.startswith("made_up.Late: a callback, made_up.Late\n\nMade at run time.\n")
    assert "n=3" in page


def test_a_config_is_shown_with_header_values_and_defaults(capsys: Capture) -> None:
    text = out(capsys, "show", "diffusion/digits")
    assert text.startswith("# lightning fit --config diffusion/digits\n# Machine: two CPU cores.")
    assert "\n    num_steps: 20\n" in text
    assert "\n    eta: 0.0  # default\n" in text
    assert "\n    channels_last: true  # a third less time in fp32 on a CPU\n" in text
    same = out(capsys, "show", "--config", "diffusion/digits")
    assert same == text


def test_several_configs_are_resolved_in_order(capsys: Capture) -> None:
    text = out(capsys, "show", "-c", "gpt2/124m", "--config=strategy/zero3")
    assert "# The values of lightning fit --config gpt2/124m --config strategy/zero3\n" in text
    assert "\n  strategy: zero3\n" in text


def test_a_page_has_docstring_arguments_and_a_command(capsys: Capture) -> None:
    page = out(capsys, "show", "Muon")
    assert page.startswith("Muon: an optimizer, ravine.callbacks.optimizers.muon.Muon\n\nTrain ")
    assert "  scale=spectral_clamped  " in page
    assert "spectral | spectral_clamped | rms. how the step depends on the shape." in page
    assert "  schedule.kind=constant  " in page
    assert "\nMuon: an optimizer, torch.optim" in page  # a rule may name torch's class
    assert ".. math::" not in page
    two = out(capsys, "show", "EMA", "NaNGuard")
    assert "EMA: a callback" in two
    assert "NaNGuard: a callback" in two


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("zero3", "The same in Python: MeshStrategy()"),
        ("cosine", "--model.noise_schedule=cosine"),
        ("heun", "lightning generate --ckpt_path=last --sampler=heun"),
        ("Trainer", "max_steps=-1"),
        ("LRSchedule", "warmup=0"),
        ("mnist", "--data.source=mnist"),
        ("torch.optim.Adam", "--trainer.callbacks.optimizer=torch.optim.Adam"),
    ],
)
def test_pages_of_other_names(name: str, text: str, capsys: Capture) -> None:
    assert text in out(capsys, "show", name)


@pytest.mark.parametrize(
    ("words", "lines"),
    [
        ("show Mouon", ["  nearest: Muon", "  type: lightning show Muon"]),
        ("show shakespere/quik", ["  nearest: shakespeare/quick"]),
        ("show ema", ["  nearest: EMA"]),
        ("show mine.Nothing", ["  nearest: mine.Mine", "  type: lightning show mine.Mine"]),
        ("show mine.py", ["  allowed: mine.Mine", "  type: lightning show mine.Mine"]),
        ("show nowhere.Nothing", ["  type: lightning list"]),
        ("show mine", ["  allowed: mine.Mine", "  type: lightning show mine.Mine"]),
        ("show ends.Nothing", ["ends cannot be imported: SystemExit: 3"]),
        ("show torch.optim", ["  nearest: torch.optim."]),
        ("show broken.yaml", ["no config and no class"]),
        ("show broken.Nothing", ['  type: python -c "import broken"']),
        ("show", ["  type: lightning show shakespeare/quick"]),
        (
            "show --model=X",
            ["  type: lightning fit --config shakespeare/quick --model=X --print_config"],
        ),
        (
            "show spam --data.seed=1",
            ["  type: lightning fit --config spam --data.seed=1 --print_config"],
        ),
        ("show --all", ["  type: lightning show --help"]),
        ("list callbaks", ["  nearest: callbacks", "  type: lightning list callbacks"]),
        ("list callbaks lora", ["  nearest: callbacks"]),
        ("list callbacks EAM", ["  nearest: EMA", "  type: lightning list callbacks EMA"]),
        ("list configs quik", ["quick"]),
        ("list a b c", ["  type: lightning list a b"]),
        ("list --all", ["  type: lightning list configs quick"]),
        ("lsit", ["  nearest: list", "  type: lightning list"]),
        ("shwo EMA", ["  nearest: show", "  type: lightning show EMA"]),
    ],
)
def test_a_wrong_name_is_answered_with_the_nearest(
    words: str, lines: list[str], capsys: Capture
) -> None:
    Path("mine.py").write_text("import lightning as L\n\nclass Mine(L.Callback): ...\n")
    Path("broken.py").write_text("class Broken(:\n")
    Path("ends.py").write_text("import sys\nsys.exit(3)\n")
    Path("broken.yaml").symlink_to("nowhere")
    Path("dir.py").mkdir()
    shown = error(capsys, *words.split())
    assert shown[0].startswith("lightning: error: ")
    for line in lines:
        assert any(line in text for text in shown), shown


# One name of each kind and group, whose example command is parsed.
EXAMPLES = ("FrechetDistance", "MetricAlert", "LionOptimizer", "Newton", "MeshStrategy", "sp")
EXAMPLES += ("ImageClassifier", "PromptDataModule", "CharacterFraction", "wsd", "edm", "cifar10")


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_command_of_a_page_is_accepted_by_the_parser(name: str, capsys: Capture) -> None:
    import shlex

    (entry, *_) = registry.find_entries(name)
    program, *words = shlex.split(class_pages.example_command(entry, "lightning"))
    assert program == "lightning"
    assert main([*words, "--print_config"]) == 0
    assert capsys.readouterr().out.startswith("# lightning.pytorch")


def test_every_page_can_be_made() -> None:
    for kind in registry.KINDS:
        for entry in registry.installed_entries(kind):
            page = class_pages.class_page(entry, "lightning")
            assert page.startswith(f"{entry.name}: ")
            assert "\nExample:\n  lightning " in page
            assert "{}" not in class_pages.example_command(entry, "")
