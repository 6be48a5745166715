"""`lightning new task|optimizer|callback|reward NAME`: write a working file to start from."""

import builtins
import keyword
import re
import sys
from pathlib import Path

from ravine.errors import UsageError

from ..discovery import source_index
from ..error_report import program_name, unknown_name_error

TEMPLATES_FOLDER = Path(__file__).resolve().parents[1] / "templates"
EXAMPLE_NAMES = {
    "task": "Planets",
    "optimizer": "SignDescent",
    "callback": "WeightNorm",
    "reward": "ShortLines",
}


def run_argv(argv: list[str]) -> int:
    """Write the file and print the command that runs it.

    Args:
        argv: "new", a kind (task, optimizer, callback or reward) and a name.
    """
    words = argv[1:]
    program = program_name()
    if flag := next((word for word in words if word.startswith("-")), None):
        raise UsageError(f"new has no flag {flag}", flag=f"{program} new task Planets")
    if not words or words[0] not in EXAMPLE_NAMES:
        kind_word = words[0] if words else ""
        # EXAMPLE_NAMES: by kind, a class name for examples. The error suggests the nearest kind.
        raise unknown_name_error(
            f"new cannot create a {kind_word!r}" if kind_word else "new needs a kind and a name",
            kind_word,
            EXAMPLE_NAMES,
            lambda kind: " ".join([program, "new", kind, *(words[1:] or [EXAMPLE_NAMES[kind]])]),
            "task",
        )
    kind = words[0]
    if len(words) != 2:
        raise UsageError(
            f"new {kind} needs one name, but {len(words) - 1} were given",
            flag=f"{program} new {kind} {EXAMPLE_NAMES[kind]}",
        )
    file_name, class_name = parse_name(words[1], kind)
    # the template of the kind, with the names of the new file and class put in
    text = render_template(kind, file_name, class_name)
    path = Path(f"{file_name}.py")
    try:
        with path.open("x", encoding="utf-8") as file:  # fails if the file exists
            file.write(text)
    except FileExistsError as error:
        raise UsageError(
            f"{path} already exists, and new does not replace a file",
            flag=f"{program} new {kind} {file_name}_2.{class_name}",
        ) from error
    except OSError as error:
        reason = f"{path} cannot be written: {error.strerror}"
        raise UsageError(reason, flag="cd FOLDER") from error
    # the commands in the docstring of the new file, which run it
    commands = [f"  {line.strip()}" for line in read_commands(text)]
    print(
        f"wrote {path}: the {kind} {class_name}, which works as it is. Next:", *commands, sep="\n"
    )
    return 0


def parse_name(name: str, kind: str) -> tuple[str, str]:
    """Return the names of the file and the class: `SignDescent`, `sign_descent`, `mine.Sign`.

    The kind (task, optimizer, callback or reward) is used for the suggestion in an error.

    Raises:
        UsageError: Python could not import a file of this name, or would import another one.
    """
    file_name, dot, class_name = name.removesuffix(".py").rpartition(".")
    if not dot:
        # an underscore before each word: SignDescent becomes Sign_Descent, GPTNet GPT_Net
        words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", class_name)
        file_name = words.lower()
        if class_name == class_name.lower():
            # sign_descent becomes SignDescent
            class_name = "".join(word[:1].upper() + word[1:] for word in class_name.split("_"))
    # the name to suggest in an error
    valid_name = re.sub(r"\W+", "_", name).strip("_0123456789") or EXAMPLE_NAMES[kind]
    valid_name = EXAMPLE_NAMES[kind] if keyword.iskeyword(valid_name) else valid_name
    for name_part in (file_name, class_name):
        if (
            not name_part.isidentifier()
            or keyword.iskeyword(name_part)
            or name_part in dir(builtins)
        ):
            raise UsageError(
                f"{name!r} gives the name {name_part!r}, which no Python file or class can have",
                ["letters, digits and _, and a dot between file and class"],
                flag=f"{program_name()} new {kind} {valid_name}",
            )
    # the file that `import file_name` would read now, found without an import
    path = source_index.find_module_file(file_name)
    # a file of this folder is replaced by nothing: the caller refuses to overwrite it
    is_own = path is not None and path.resolve().parent == Path.cwd().resolve()
    if file_name in sys.stdlib_module_names or (
        source_index.is_installed(file_name) and not is_own
    ):
        raise UsageError(
            f"a file {file_name}.py would replace the package {file_name}, which is installed",
            ["another name"],
            flag=f"{program_name()} new {kind} my_{file_name}.{class_name}",
        )
    return file_name, class_name


def render_template(kind: str, file_name: str, class_name: str) -> str:
    """Return the text of a template with the names of the new file and class."""
    text = (TEMPLATES_FOLDER / f"new_{kind}.py").read_text(encoding="utf-8")
    text = text.replace(f"new_{kind}", file_name).replace(f"New{kind.capitalize()}", class_name)
    return re.sub(r"^lightning ", f"{program_name()} ", text, flags=re.MULTILINE)


def read_commands(text: str) -> list[str]:
    """Return the commands at the top of a template, those of several lines as one."""
    head = text.split('"""')[1].replace("\\\n", " ")
    lines = [re.sub(r"\s{2,}", " ", line) for line in head.splitlines()]
    return [line for line in lines if line.startswith(f"{program_name()} ")]
