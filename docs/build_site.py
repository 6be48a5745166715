"""Build the documentation site in `site/`: `pip install -e '.[docs]' && python docs/build_site.py`.

1. Copy docs/ to build/docs. A link to a file outside of docs/ becomes a link to the repository
   that `[project.urls]` of pyproject.toml names, or, if it names none, to a page with the file.
2. Write the pages that are made of other files: the API reference, one page for each package, and
   results, supported combinations, contributing and changelog.
3. Run Zensical on build/docs in strict mode: a broken link ends the build with an error. Nothing is
   read from the network.
"""

import ast
import importlib
import inspect
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STAGED = ROOT / "build" / "docs"
SITE = ROOT / "site"
API_PACKAGES = ("callbacks", "strategies", "datamodules", "lightning_modules")
# Markdown files outside of docs/, and their pages. Of README, two sections become a page each.
PROJECT_PAGES = {
    "README.md": "results.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
README_PAGES = {"results.md": "Results", "support.md": "Supported combinations"}
# Names that a script imports from a module inside of a package.
MODULE_NAMES = {
    "ravine": ("errors.MissingFileError", "errors.RunError", "errors.UsageTypeError"),
    "ravine.callbacks": (
        "base.OptimizerStepCallback",
        "optimizers.elementwise.ElementwiseOptimizer",
        "transforms.base.Transform",
    ),
    "ravine.lightning_modules": (
        "diffusion_core.noise_schedules.NoiseSchedule",
        "generation.generate_text.generate",
        "generation.generate_text.sequence_logprobs",
        "generation.sampling.DecodingConfig",
        "nn.pattern_filters.PatternFilter",
        "nn.pattern_filters.ramp_pattern",
        "nn.transformer.Transformer",
        "nn.unet.UNet",
    ),
}
LANGUAGES = {".py": "python", ".sh": "bash", ".yaml": "yaml", ".jsonl": "json"}
FILE_LABEL = re.compile(r"\[(?:docs/)?[\w/]+\.md\]\(([^)#\s]+\.md)([^)]*)\)")
PREVIEW = 200  # lines of a file of rows, such as .jsonl
COMMANDS = re.compile(r"(?<=^```bash\n).*?(?=^```)", re.DOTALL | re.MULTILINE)
COMMAND_WIDTH = 76  # characters of a line of a command
CODE = re.compile(r"(```.*?```|`[^`\n]*`)", re.DOTALL)
REMOTE = re.compile(r"""<(?:script|img|iframe)[^>]*src=["']?https?:|<link[^>]*href=["']?https?:""")
LINK = re.compile(r"\]\((?!https?:|mailto:|#)([^)#\s]+)(#[^)\s]*)?\)")


def repository_url() -> str | None:
    """Return the URL of the repository in pyproject.toml, or None."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return project.get("urls", {}).get("Repository")


def rewrite_links(text: str, source: Path, page: str, repository: str | None) -> str:
    """Rewrite the relative links of the file `source`, whose text becomes the page `page`."""

    def rewrite(link: re.Match[str]) -> str:
        target = (source.parent / link[1]).resolve().relative_to(ROOT).as_posix()
        anchor = link[2] or ""
        if target.startswith("docs/") and not target.endswith(".py"):
            new = target.removeprefix("docs/")
        elif target == "README.md" and anchor == "#supported-combinations":
            new, anchor = "support.md", ""
        elif target in PROJECT_PAGES:
            new = PROJECT_PAGES[target]
        elif repository:
            return f"]({repository}/blob/main/{target}{anchor})"
        else:
            new = f"source/{target}.md"
        return f"]({os.path.relpath(new, Path(page).parent)}{anchor})"

    parts = CODE.split(text)  # code stands at the odd places
    return "".join(p if i % 2 else LINK.sub(rewrite, p) for i, p in enumerate(parts))


def name_links(text: str, page: str, titles: dict[str, str]) -> str:
    """Replace the text of a link that is the name of a file by the title of the page."""

    def rename(link: re.Match[str]) -> str:
        title = titles.get(os.path.normpath(Path(page).parent / link[1]))
        return f"[{title}]({link[1]}{link[2]})" if title else link[0]

    return FILE_LABEL.sub(rename, text)


def wrap_commands(text: str) -> str:
    """Continue a long command of a bash block on the next line, before a flag."""

    def wrap(line: str) -> str:
        lines = [""]
        for words in re.split(r"(?= --)", line):
            if lines[-1] and len(lines[-1] + words) > COMMAND_WIDTH:
                lines[-1] += " \\"
                lines.append("   " + words)
            else:
                lines[-1] += words
        return "\n".join(lines)

    return COMMANDS.sub(lambda block: "\n".join(map(wrap, block[0].split("\n"))), text)


def readme_page(title: str) -> str:
    """Return the text of the page that is made of a section of README."""
    text = (ROOT / "README.md").read_text()
    sections = dict(re.findall(r"^## ([^\n]*)\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE))
    return f"# {title}\n{sections[title]}"


def source_page(path: str) -> str:
    """Return a page with the text of a source file, or with the names in a folder."""
    file = ROOT / path
    if file.is_dir():
        names = sorted(p.relative_to(file).as_posix() for p in file.rglob("*") if p.is_file())
        lines = [name for name in names if "__pycache__" not in name]
    else:
        lines = file.read_text().splitlines()
    if file.suffix == ".jsonl" and len(lines) > PREVIEW:
        lines = [*lines[:PREVIEW], f"... {len(lines) - PREVIEW} more lines"]
    head = "---\nsearch:\n  exclude: true\n---\n"
    text = "\n".join(lines)
    return f"{head}# {path}\n\n````{LANGUAGES.get(file.suffix, 'text')}\n{text}\n````\n"


def api_page(package: str) -> str:
    """Return the API page of a package: public names by mkdocstrings, then all other classes."""
    module = importlib.import_module(f"ravine.{package}")
    first = inspect.cleandoc(module.__doc__ or "").split("\n\n")[0]
    names = sorted(module.__all__)
    lines = [f"# ravine.{package}", first, f"`from ravine.{package} import NAME`"]
    for name in names:
        lines.append(api_entry(name, getattr(module, name), module.__name__))
    lines += module_entries(module.__name__)
    lines += ["## All other classes", class_table(package)]
    return "\n\n".join(lines) + "\n"


def api_entry(name: str, named: object, package: str) -> str:
    """Return the mkdocstrings block of a public name, which may be defined in another file."""
    home = named.__module__ if inspect.isclass(named) or inspect.isroutine(named) else package
    hooks_only = package.endswith((".callbacks", ".strategies"))  # for Lightning, not for users
    members = "\n      members: false" if hooks_only else ""
    return (
        f"::: {home}.{name}\n    options:\n      heading: {name}\n      toc_label: {name}\n"
        f"      heading_level: 2{members}"
    )


def module_entries(package: str) -> list[str]:
    """Return the blocks of the names that are imported from a module inside of the package."""
    blocks = []
    for path in MODULE_NAMES.get(package, ()):
        home, _, name = path.rpartition(".")
        module = importlib.import_module(f"{package}.{home}")
        blocks.append(api_entry(name, getattr(module, name), module.__name__))
        blocks.append(f"`from {module.__name__} import {name}`")
    return blocks


def class_table(package: str) -> str:
    """Return a table of the public classes in the files of a package, with their modules.

    The classes that have an entry on the page are left out.
    """
    exported = importlib.import_module(f"ravine.{package}").__all__
    documented = {f"ravine.{package}.{path}" for path in MODULE_NAMES.get(f"ravine.{package}", ())}
    rows = ["| class | module | what it is |", "|---|---|---|"]
    for file in sorted((ROOT / package).rglob("*.py")):
        module = ".".join(("ravine", *file.relative_to(ROOT).with_suffix("").parts))
        for node in ast.parse(file.read_text()).body:
            if not isinstance(node, ast.ClassDef) or node.name[0] == "_" or node.name in exported:
                continue
            if f"{module}.{node.name}" not in documented:
                paragraph = (ast.get_docstring(node) or "").split("\n\n")[0]
                text = " ".join(paragraph.split()).replace("|", "\\|")
                rows.append(f"| `{node.name}` | `{module}` | {text} |")
    return "\n".join(rows)


def script_api_page() -> str:
    """Return the API page of the names that `import ravine` gives."""
    module = importlib.import_module("ravine")
    names = [name for name in module.__all__ if not name.startswith("_")]
    lines = [
        "# ravine",
        "The names for Python scripts: `from ravine import NAME`. `ravine.__version__` is the "
        "installed version.",
    ]
    for name in names:
        lines.append(api_entry(name, getattr(module, name), module.__name__))
    lines += module_entries("ravine")
    return "\n\n".join(lines) + "\n"


API_PAGES: dict[str, Callable[[], str]] = {
    "api/ravine.md": script_api_page,
    **{f"api/{package}.md": lambda p=package: api_page(p) for package in API_PACKAGES},
}


def stage(folder: Path, repository: str | None = None) -> None:
    """Write all pages of the site to an empty or missing folder, as Markdown."""
    docs = ROOT / "docs"
    shutil.copytree(docs, folder, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    sources = {page.relative_to(docs).as_posix(): page for page in docs.rglob("*.md")}
    texts = {name: page.read_text() for name, page in sources.items()}
    for source, name in PROJECT_PAGES.items():
        sources[name], texts[name] = ROOT / source, (ROOT / source).read_text()
    for name, title in README_PAGES.items():
        sources[name], texts[name] = ROOT / "README.md", readme_page(title)
    for name, text in texts.items():
        texts[name] = wrap_commands(rewrite_links(text, sources[name], name, repository))
    titles = {name: text.partition("\n")[0].removeprefix("# ") for name, text in texts.items()}
    texts = {name: name_links(text, name, titles) for name, text in texts.items()}
    texts |= {name: write() for name, write in API_PAGES.items()}
    for name, text in texts.copy().items():
        for target, _ in LINK.findall(CODE.sub("", text)):
            page = os.path.normpath(Path(name).parent / target)
            if page.startswith("source/"):
                texts[page] = source_page(page.removeprefix("source/").removesuffix(".md"))
    for name, text in texts.items():
        page = folder / name
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(text)


def main() -> int:
    """Write the pages and run Zensical; return its exit status."""
    shutil.rmtree(STAGED, ignore_errors=True)
    stage(STAGED, repository_url())
    build = [sys.executable, "-m", "zensical", "build", "--clean", "--strict"]
    status = subprocess.run(build, cwd=ROOT, check=False).returncode
    remote = [page for page in SITE.rglob("*.html") if REMOTE.search(page.read_text())]
    for page in remote:
        print(f"{page.relative_to(ROOT)} reads a script, style or image from the network")
    return status or bool(remote)


if __name__ == "__main__":
    sys.exit(main())
