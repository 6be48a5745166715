"""`import ravine` gives the public names, each imported at its first use."""

import subprocess
import sys
from pathlib import Path

import pytest

import ravine
from ravine.errors import MissingFileError, RunError, UsageError, UsageTypeError, suggest_names


def test_the_package_is_imported_with_the_standard_library_alone() -> None:
    code = (
        "import sys; before = set(sys.modules); import ravine, ravine.errors; "
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}; "
        "print(sorted(new - set(sys.stdlib_module_names)))"
    )
    run = [sys.executable, "-c", code]
    assert subprocess.run(run, capture_output=True, text=True, check=True).stdout == "['ravine']\n"


def test_every_public_name_is_found_and_a_wrong_one_is_an_attribute_error() -> None:
    from ravine.cli.trained import load
    from ravine.cli.trainer import Trainer

    assert ravine.Trainer is Trainer
    assert ravine.load_model is load
    assert ravine.UsageError is UsageError
    assert ravine.__version__.count(".") == 2
    assert set(ravine.__all__) <= set(dir(ravine))
    with pytest.raises(AttributeError, match=r"no attribute 'Trainor'.*Trainer"):
        _ = ravine.Trainor


def test_each_file_of_optimizers_adds_its_names_to_the_callbacks(tmp_path: Path) -> None:
    """A new file is enough; its class is a bare name on the command line, too."""
    (tmp_path / "newest.py").write_text(
        "from ravine.callbacks import OptimizerPlan\n__all__ = ['Newest']\n"
        "class Newest(OptimizerPlan):\n    pass\n"
    )
    code = (
        f"import ravine.callbacks.optimizers as o; o.__path__.append({str(tmp_path)!r})\n"
        "import importlib, ravine.callbacks as c; importlib.reload(c)\n"
        "from ravine.callbacks import *\n"
        "print(Newest, 'Newest' in c.__all__, Lion, LionOptimizer)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "newest.Newest'> True" in run.stdout
    with pytest.raises(ImportError, match="cannot import name 'Lyon'"):
        from ravine.callbacks import Lyon  # noqa: F401


def test_an_error_holds_its_parts_and_shows_those_that_are_there() -> None:
    error = UsageError("num_heads=5 does not divide d_model=128", [4, 8], "use 4 or 8")
    assert str(error) == "num_heads=5 does not divide d_model=128; allowed: 4, 8; use 4 or 8"
    assert error.allowed == ["4", "8"]
    assert str(UsageError("no", label="nearest", allowed=["a"])) == "no; nearest: a"
    assert str(UsageError("no", hint="set x=1", flag="--x=1")) == "no; set x=1"


def test_errors_are_caught_as_the_builtin_exceptions_that_they_refine() -> None:
    for cls, base in (
        (UsageError, ValueError),
        (UsageTypeError, TypeError),
        (MissingFileError, FileNotFoundError),
    ):
        with pytest.raises(base):
            raise cls("no")
        assert cls("no").exit_status == 2
    assert issubclass(RunError, RuntimeError)
    assert RunError("no").exit_status == 1


def test_the_most_similar_name_comes_first_and_upper_case_is_ignored() -> None:
    assert suggest_names("adamw", ["SGD", "AdamW", "Adam", "RAdam"])[0] == "AdamW"
    assert suggest_names("zzz", ["SGD", "AdamW"]) == []
