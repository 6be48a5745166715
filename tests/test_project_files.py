"""The changelog, the workflow and the version are as CONTRIBUTING.md describes them."""

import re
import subprocess
import tomllib
from importlib.metadata import version
from pathlib import Path

import yaml

import ravine

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
VERSION = PROJECT["project"]["version"]
CHANGES = ("Added", "Changed", "Deprecated", "Removed", "Fixed", "Security")
# Versions of other packages, rows of measurements, and the releases themselves.
NOT_SEARCHED = ("benchmarks/rows/", "benchmarks/other_optimizers.txt", "CHANGELOG.md")


def files_with(text: str, root: Path = ROOT) -> list[str]:
    """The tracked files in which a version number stands by itself."""
    alone = re.compile(rf"(?<![\d.])(?<!download/v){re.escape(text)}(?![\d.])")
    listed = subprocess.run(["git", "ls-files"], cwd=root, capture_output=True, text=True)
    names = [n for n in listed.stdout.splitlines() if not n.startswith(NOT_SEARCHED)]
    names = [n for n in names if (root / n).is_file()]  # not a link to a folder
    return [n for n in names if alone.search((root / n).read_bytes().decode(errors="replace"))]


def test_the_version_is_stated_in_pyproject_alone() -> None:
    assert files_with(VERSION) == ["pyproject.toml"]
    assert "version" not in PROJECT["project"].get("dynamic", [])
    assert ravine.__version__ == version("ravine")
    assert "__version__" not in vars(ravine)  # read at each use, from the installed metadata


def test_the_changelog_has_the_form_of_keep_a_changelog() -> None:
    text = (ROOT / "CHANGELOG.md").read_text()
    assert text.startswith("# Changelog\n")
    releases = re.findall(r"^## (.*)", text, re.MULTILINE)
    assert releases[0] == "[Unreleased]"
    release_heading = re.compile(r"\[\d+\.\d+\.\d+\] - \d{4}-\d{2}-\d{2}")
    assert [title for title in releases[1:] if not release_heading.fullmatch(title)] == []
    for release in re.split(r"^## .*\n", text, flags=re.MULTILINE)[1:]:
        kinds = re.findall(r"^### (.*)", release, re.MULTILINE)
        assert kinds == [kind for kind in CHANGES if kind in kinds]
        for part in re.split(r"^### .*\n", release, flags=re.MULTILINE)[1:]:
            lines = [line for line in part.splitlines() if line]
            assert lines
            assert [line for line in lines if not line.startswith("- ")] == []


def test_the_workflow_runs_the_same_script_on_both_ends() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    job = workflow["jobs"]["run"]
    python = PROJECT["tool"]["ravine"]["python"]
    runs = [(row["python"], row["arguments"]) for row in job["strategy"]["matrix"]["include"]]
    assert runs == [(python["lowest"], "--lowest"), (python["highest"], "")]
    assert PROJECT["project"]["requires-python"] == f">={python['lowest']}"
    said = f"`--lowest` on Python {python['lowest']}, the other on {python['highest']}"
    assert said in (ROOT / "CONTRIBUTING.md").read_text()
    assert [step["run"] for step in job["steps"] if "run" in step] == [
        ".ci/run ${{ matrix.arguments }}"
    ]


def test_the_templates_have_at_most_ten_lines() -> None:
    templates = [*(ROOT / ".github").rglob("ISSUE_TEMPLATE/*.md")]
    templates += [ROOT / ".github" / "PULL_REQUEST_TEMPLATE.md"]
    assert len(templates) == 3
    assert [t for t in templates if len(t.read_text().splitlines()) > 12] == []
