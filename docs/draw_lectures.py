"""Draw the figures of docs/lectures.md: `python docs/draw_lectures.py [NAME ...]`.

Each figure is the plot of a run, `lightning fit --config lectures/NAME`. Without names, all configs
run in 143 s on two cores, but not 2_4_schedules, which takes 7 minutes. Two processes draw at a
time. A picture is written to docs/figures/lectures/NAME.png, or to NAME_PLOT.png if a run draws
several.
"""

import contextlib
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

from ravine.cli.main import main

ROOT = Path(__file__).resolve().parent.parent
FIGURES = ROOT / "docs" / "figures" / "lectures"
PLOTS = ("convergence", "steps_to_target", "trajectory", "curves", "curvature")
LONG = ("2_4_schedules",)
NUM_PROCESSES = 2


def list_names() -> list[str]:
    """Return the names of the configs that run without being named."""
    names = sorted(path.stem for path in (ROOT / "configs" / "lectures").glob("*.yaml"))
    return [name for name in names if name not in LONG]


def draw(name: str, folder: Path) -> list[Path]:
    """Run a config in a folder, and copy its pictures; return their paths."""
    words = ["fit", "--config", f"lectures/{name}"]
    with contextlib.chdir(folder):  # titles may have the path of the run in the current folder
        status = main([*words, "--trainer.logger=csv", "--trainer.enable_progress_bar=false"])
    if status != 0:
        raise SystemExit(f"lectures/{name} ended with status {status}")
    (run,) = (folder / "runs" / "lectures" / name).glob("version_*")
    plots = [run / f"{plot}.png" for plot in PLOTS if (run / f"{plot}.png").exists()]
    FIGURES.mkdir(parents=True, exist_ok=True)
    targets = [
        FIGURES / (f"{name}.png" if len(plots) == 1 else f"{name}_{plot.stem}.png")
        for plot in plots
    ]
    for plot, target in zip(plots, targets, strict=True):
        shutil.copy(plot, target)
    return targets


def draw_timed(name: str, folder: str) -> str:
    """Draw a config, and return a line with its pictures and seconds."""
    start, cpu_start = time.perf_counter(), time.process_time()
    targets = draw(name, Path(folder))
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    pictures = ", ".join(target.name for target in targets)
    return f"{name}: {pictures} in {seconds:.1f} s, {cpu_seconds:.1f} s of a processor"


def draw_all(names: list[str]) -> None:
    """Draw the figures of these configs, two at a time, and print the seconds of each."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # a process for each core
    context = multiprocessing.get_context("spawn")
    start = time.perf_counter()
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(NUM_PROCESSES, mp_context=context) as pool,
    ):
        futures = [pool.submit(draw_timed, name, folder) for name in names]
        for future in as_completed(futures):
            print(future.result(), flush=True)
    print(f"{len(names)} configs in {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    draw_all(sys.argv[1:] or list_names())
