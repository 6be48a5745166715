"""Files and commands of README and of the pages of docs/."""

import re
from pathlib import Path

README = Path(__file__).resolve().parent.parent / "README.md"
DOCS = Path(__file__).resolve().parent.parent / "docs"


def files(page: str) -> dict[str, str]:
    """The fenced blocks that begin with a comment naming a file."""
    blocks = re.findall(r"```\w+\n# (\S+\.\w+)\n(.*?)```", page, re.DOTALL)
    return {name: text for name, text in blocks}


def commands(page: str) -> list[list[str]]:
    """Each line of a bash block that calls the command line."""
    lines = "\n".join(re.findall(r"```bash\n(.*?)```", page, re.DOTALL)).splitlines()
    return [line.split()[1:] for line in lines if line.startswith(("lightning ", "ravine "))]


def shell_lines(page: str) -> list[str]:
    """The lines of the bash blocks, comments excluded; a continued line is one."""
    blocks = re.findall(r"```bash\n(.*?)```", page, re.DOTALL)
    text = "".join(blocks).replace("\\\n", " ")
    return [line for line in text.splitlines() if line.strip() and line[0] != "#"]
