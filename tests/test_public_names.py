"""`import ravine` gives the public names, each imported at its first use."""

import subprocess
import sys
from pathlib import Path

import pytest

import ravine
from ravine.errors import (
    MissingFileError,
    RunError,
    UsageError,
    UsageTypeError,
    check_at_least_one,
    format_arguments,
    format_flags,
    sort_by_similarity,
    suggest_names,
)


def test_the_package_is_imported_with_the_standard_library_alone() -> None:
    code = (
        "import sys; before = set(sys.modules); import ravine, ravine.errors; "
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}; "
        "print(sorted(new - set(sys.stdlib_module_names)))"
    )
    run = [sys.executable, "-c", code]
    assert subprocess.run(run, capture_output=True, text=True, check=True).stdout == "['ravine']\n"


def test_every_public_name_is_found_and_a_wrong_one_is_an_attribute_error() -> None:
    from ravine.cli.loading import load_model
    from ravine.cli.trainer import Trainer

    assert ravine.Trainer is Trainer
    assert ravine.load_model is load_model
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


def test_an_error_has_its_parts_and_joins_those_that_are_not_empty() -> None:
    error = UsageError("num_heads=5 does not divide d_model=128", [4, 8], "use 4 or 8")
    assert str(error) == "num_heads=5 does not divide d_model=128; allowed: 4, 8; use 4 or 8"
    assert error.allowed == ["4", "8"]
    assert str(UsageError("no", label="nearest", allowed=["a"])) == "no; nearest: a"
    assert str(UsageError("no", hint="set x=1", flag="--x=1")) == "no; set x=1"


def test_errors_are_subclasses_of_the_matching_builtin_exceptions() -> None:
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


def test_names_are_suggested_down_to_a_similarity_and_a_count() -> None:
    names = ["step_size", "step_count", "momentum"]
    assert suggest_names("step_siz", names) == ["step_size"]
    assert suggest_names("q", names) == []
    assert suggest_names("mmm", names, 1, least=0) == ["momentum"]
    assert len(suggest_names("step", ["step_a", "step_b", "step_c"], 2)) == 2
    assert suggest_names("x", [], least=0) == []


def test_the_end_of_a_dotted_name_is_suggested_where_it_may_stand_for_the_whole() -> None:
    layers = ["net.blocks.0.attention.query", "net.blocks.0.mlp.up"]
    assert suggest_names("qurey", layers) == []
    assert suggest_names("qurey", layers, dotted=True) == layers[:1]


def test_sorting_by_similarity_keeps_every_name() -> None:
    assert sort_by_similarity("minst", ["cifar10", "MNIST"]) == ["MNIST", "cifar10"]


def test_a_size_below_one_is_refused_with_a_hint_and_a_flag() -> None:
    check_at_least_one("Net", "--model.", width=1, depth=2)
    with pytest.raises(UsageError) as error:
        check_at_least_one("Net", "--model.", width=1, depth=0)
    assert str(error.value) == "Net: depth=0 is too small; allowed: 1 or more; use depth=1"
    assert error.value.flag == "--model.depth=1"
    with pytest.raises(UsageError) as error:
        check_at_least_one("Net", width=-1)
    assert (error.value.hint, error.value.flag) == ("use width=1", "")


def test_arguments_are_written_as_python_and_as_flags() -> None:
    arguments = {"norm": "rmsnorm", "bias": True, "tied": False, "d_ff": None, "eps": 1e-5, "n": 1}
    assert format_arguments(arguments) == (
        "norm='rmsnorm', bias=True, tied=False, d_ff=None, eps=1e-05, n=1"
    )
    assert format_flags("--model.", arguments) == (
        "--model.norm=rmsnorm --model.bias=true --model.tied=false --model.d_ff=null "
        "--model.eps=1e-05 --model.n=1"
    )
    assert format_flags("--model.", {}) == ""
    assert (
        format_flags("--a.", {"of": ["x", "y"], "s": "a b"})
        == "--a.of='[\"x\", \"y\"]' --a.s='a b'"
    )
