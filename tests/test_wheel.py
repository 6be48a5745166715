"""The wheel is complete: installed in an empty environment, it trains from any folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = (
    "ravine",
    "lightning_modules",
    "datamodules",
    "callbacks",
    "strategies",
    "cli",
    "configs",
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: setuptools leaves a build/ folder that would feed the next wheel."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for folder in FOLDERS:
        shutil.copytree(
            ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__")
        )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, "-w", str(out), str(source)], check=True)
    return next(out.glob("ravine-*.whl"))


def test_the_wheel_holds_every_module_and_every_config(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in {".py", ".yaml", ".tsv"}:
                name = path.relative_to(ROOT)
                assert str(name if folder == "ravine" else f"ravine/{name}") in names
    stated = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert wheel.name.split("-")[1] == stated
    unexpected = {n.split("/")[0] for n in names if ".dist-info" not in n}
    assert unexpected == {"ravine"}, "nothing but the namespace may be installed"


def test_the_wheel_in_the_root_of_a_checkout_uses_the_files_of_the_checkout(
    wheel: Path, tmp_path: Path
) -> None:
    """`ravine/` of a checkout hides an installed package where the current folder comes first."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    code = (
        "import ravine.errors, ravine.cli.config.environment as e; "
        "print(ravine.__file__, e.__file__)"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    for folder, root in ((ROOT, ROOT), (tmp_path, tmp_path / "site" / "ravine")):
        run = [sys.executable, "-S", "-c", f"import sys; sys.path.insert(0, ''); {code}"]
        found = subprocess.run(run, cwd=folder, env=environment, capture_output=True, text=True)
        front = root / "ravine" if root == ROOT else root
        expected = f"{front / '__init__.py'} {root / 'cli' / 'config' / 'environment.py'}\n"
        assert found.stdout == expected, found.stderr


def test_the_wheel_trains_from_a_folder_that_has_its_own_callbacks(
    wheel: Path, tmp_path: Path
) -> None:
    """A folder of the user's named like one of ours must not break the run."""
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv" / "bin" / "python"
    site = next((tmp_path / "venv" / "lib").glob("python*/site-packages"))
    # The dependencies (6 GB) are borrowed; .pth files in a borrowed folder are not read, so an
    # editable install of this checkout stays out of sight.
    (site / "borrowed.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet"]
    subprocess.run([*install, "--no-deps", "--no-index", str(wheel)], check=True)

    here = tmp_path / "anywhere"
    (here / "callbacks").mkdir(parents=True)
    (here / "callbacks" / "__init__.py").write_text("raise ImportError('the user\\'s own folder')")
    environment = {k: v for k, v in os.environ.items() if k not in ("DATA_ROOT", "PYTHONPATH")}
    environment |= {"OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(tmp_path)}
    command = [str(tmp_path / "venv" / "bin" / "lightning"), "fit", "--config", "spam/lecture0"]
    command += ["--trainer.max_steps=2"]
    run = subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    run_folder = here / "runs" / "spam" / "lecture0" / "version_0"
    assert (run_folder / "config.yaml").exists()
    assert any((run_folder / "checkpoints").iterdir())
