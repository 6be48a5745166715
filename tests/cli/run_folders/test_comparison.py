"""Two runs side by side: what differs in their configurations, metrics and curves that join."""

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from ravine.cli.main import main
from ravine.cli.run_folders import comparison, index, record

CONFIG = """
model: {{class_path: ravine.X, init_args: {{d_model: 16, dropout: {dropout}}}}}
trainer:
  callbacks:
  - class_path: ravine.callbacks.EMA
    init_args: {{decay: {decay}}}
"""


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["ravine"])


def make_run(name: str, rows: dict[int, float], config: str = "", **values: Any) -> Path:
    folder = Path("runs", *name.split("/"))
    folder.mkdir(parents=True)
    known = record.new_record("fit", name, "LanguageModel")
    record.write_record(folder, known | {"status": "done", "started": 1e9} | values)
    lines = [f"{step},{value}\n" for step, value in rows.items()]
    (folder / "metrics.csv").write_text("step,val/loss\n" + "".join(lines))
    (folder / "config.yaml").write_text(config)
    return folder


def test_the_table_has_what_differs_and_not_what_is_the_same(
    capsys: pytest.CaptureFixture[str],
) -> None:
    make_run("a/version_0", {1: 2.0, 2: 1.5}, CONFIG.format(dropout=0.1, decay=0.99))
    make_run("a/version_1", {1: 2.5, 2: 1.25}, CONFIG.format(dropout=0.2, decay=0.99))
    assert main(["runs", "compare", "a/0", "a/1"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"model\.dropout +0\.1 +0\.2\n", said)
    assert re.search(r"val/loss +1\.5 at step 2 +1\.25 at step 2\n", said)
    assert "that all have" not in said
    assert "decay" not in said
    assert "d_model" not in said
    page = Path("runs/comparison/comparison.html").read_text()
    assert "model.dropout" in page
    assert Path("runs/comparison/curves.png").read_bytes()[:4] == b"\x89PNG"
    assert [run.name for run in index.list_runs(Path("runs"))] == ["a/0", "a/1"]


def test_runs_of_different_lengths_are_compared_at_the_last_step_that_both_have(
    capsys: pytest.CaptureFixture[str],
) -> None:
    make_run("a/version_0", {10: 2.0, 20: 1.5, 30: 1.0}, metrics={"val/loss": 1.0, "hp": 7.0})
    make_run("a/version_1", {10: 2.5, 20: 1.25})
    assert main(["runs", "compare", "a/0", "a/1"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"^val/loss +1 at step 30 +1\.25 at step 20$", said, re.MULTILINE)
    assert re.search(r"^val/loss at step 20 +1\.5 +1\.25$", said, re.MULTILINE)
    assert re.search(r"^hp +7 +-$", said, re.MULTILINE)  # in the record only, which has no step
    page = Path("runs/comparison/comparison.html").read_text()
    assert "<th>val/loss at step 20</th><td>1.5</td><td>1.25</td>" in page


def test_values_of_a_plan_that_does_not_train_are_marked(
    capsys: pytest.CaptureFixture[str],
) -> None:
    plan = "- class_path: ravine.callbacks.{}\n    init_args: {{{}}}\n"
    first = plan.format("OptimizerPlan", "optimizer: {class_path: SGD, init_args: {lr: 0.5}}")
    one = f"trainer:\n  callbacks:\n  {first}"
    make_run("a/version_0", {1: 2.0}, one)
    make_run("a/version_1", {1: 2.0}, one + "  " + plan.format("Muon", "lr: 0.25"))
    assert main(["runs", "compare", "a/0", "a/1"]) == 0
    said = capsys.readouterr().out
    key = r"^trainer\.callbacks\.OptimizerPlan\.optimizer\.lr"
    assert re.search(rf"{key} +0\.5 +0\.5 \(does not train\)$", said, re.MULTILINE)
    assert re.search(r"^trainer\.callbacks\.Muon\.lr +- +0\.25$", said, re.MULTILINE)


class PageParser(HTMLParser):
    """Tags of a page, and every address in it."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.addresses += [str(v) for k, v in attrs if k in ("src", "href", "action", "data")]


def test_the_page_needs_no_other_file_and_shows_a_malicious_run_as_text() -> None:
    evil = "</code><script>alert(1)</script><img src=http://example.org/x onerror=alert(2)>$"
    config = f"model: {{dropout: '{evil}'}}\n'{evil}': 1\n"
    make_run("a/version_0", {1: 2.0}, config, command=["fit", evil], task=evil)
    make_run("a/<b>$x_", {1: 2.0, 2: float("nan")}, metrics={evil: 1.0}, git={"commit": evil})
    assert main(["runs", "compare", "a/0", "a/<b>$x_"]) == 0
    text = Path("runs/comparison/comparison.html").read_text()
    page = PageParser()
    page.feed(text)
    assert page.tags <= {
        *("html", "head", "meta", "title", "style", "body", "h1", "h2", "div", "table", "tr"),
        *("th", "td", "p", "img", "ul", "li", "code"),
    }
    assert [address[:22] for address in page.addresses] == ["data:image/png;base64,"]
    assert "default-src 'none'" in text


def test_curves_join_through_the_parents_of_a_resumed_run() -> None:
    make_run("a/version_0", {1: 9.0, 2: 8.0, 3: 7.0, 4: 6.0})
    make_run("a/version_1", {4: 5.5, 5: 5.0, 6: 4.0}, parent={"run": "a/version_0", "step": 4})
    last = make_run("a/version_2", {6: 3.5}, parent={"run": "a/version_1", "step": 6})
    run = index.summarize(last, Path("runs"))
    points = [(1, 9), (2, 8), (3, 7), (4, 5.5), (5, 5), (6, 3.5)]
    assert index.joined_curves(run, Path("runs"))["val/loss"] == points


@pytest.mark.parametrize("parent", ["a/version_0", "../outside", "/etc", "", "\0", "a", "a/link"])
def test_a_parent_that_is_the_run_itself_or_lies_elsewhere_is_not_read(
    parent: str, tmp_path: Path
) -> None:
    make_run("../outside", {1: 9.0})
    folder = make_run("a/version_0", {2: 8.0}, parent={"run": parent, "step": 5})
    Path("runs/a/link").symlink_to(tmp_path / "outside")
    run = index.summarize(folder, Path("runs"))
    assert index.joined_curves(run, Path("runs")) == {"val/loss": [(2.0, 8.0)]}


@pytest.mark.parametrize(
    "text",
    [
        "!!python/object/apply:os.system ['touch it_ran']",
        "a: &a [*a]",
        "[1, 2",
        "- 1",
        "\x00",
        "&a [x]\n" + "\n".join(f"b{i}: {{c: [{i}]}}" for i in range(50)),
        "{? [1, 2] : 3}",
    ],
)
def test_a_malformed_configuration_is_left_out_and_nothing_in_it_is_run(text: str) -> None:
    path = make_run("a/version_0", {1: 1.0}, text) / "config.yaml"
    values = comparison.flatten(comparison.read_config(path))
    texts = [f"{key} {value}" for key, value in values]
    assert not Path("it_ran").exists()
    assert not [text for text in texts if "touch" in text]


def test_requested_metrics_are_drawn_or_refused_by_name(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for i in range(2):
        make_run(f"a/version_{i}", {1: 1.0})
    words = ["runs", "compare", "a/0", "a/1"]
    assert main([*words, "--metrics=val/lss"]) == 2
    assert "type: --metrics=val/loss" in capsys.readouterr().err
    assert main([*words, "--metrics=val/loss", "--folder=mine"]) == 0
    assert {p.name for p in Path("mine").iterdir()} == {"curves.png", "comparison.html"}
    assert main([*words[:3], "a/0"]) == 2
    assert "the same run was given twice" in capsys.readouterr().err
