"""Raw rows of a benchmark: what ran, where, and what came out; one JSON object a line."""

import csv
import hashlib
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from lightning.pytorch.callbacks import Callback

HERE = Path(__file__).parent
ROWS = HERE / "rows"


class Stopwatch(Callback):
    """Seconds of training, and of that spent validating and sampling, into stopwatch.json.

    `processor_seconds` are those of all threads of this process: on a machine that others use too,
    they over the number of threads are what the clock would have said without the others.
    """

    def __init__(self) -> None:
        self.validating = 0.0
        self.start_s = self.paused = self.worked = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.start_s, self.worked = time.perf_counter(), time.process_time()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.paused = time.perf_counter()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.validating += time.perf_counter() - self.paused

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        total = time.perf_counter() - self.start_s
        seconds = {"seconds": round(total, 2), "validating": round(self.validating, 2)}
        seconds["processor_seconds"] = round(time.process_time() - self.worked, 2)
        Path(str(trainer.log_dir), "stopwatch.json").write_text(json.dumps(seconds))


def processor() -> str:
    """The processor's name, as Linux knows it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def config_hash(config: str) -> str:
    """Twelve digits that change with any value of a shipped config, and with no comment."""
    values = yaml.safe_load((HERE.parent / "configs" / f"{config}.yaml").read_bytes())
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]


def circumstances(config: str) -> dict[str, Any]:
    """Return the machine, the versions and the config hash that a row is recorded with."""
    return {"config": config, "config_hash": config_hash(config)} | machine()


def machine() -> dict[str, Any]:
    """The code and the machine that a row comes from."""
    git = ["git", "-C", str(HERE.parent)]
    commit = subprocess.check_output([*git, "rev-parse", "--short", "HEAD"], text=True).strip()
    changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", ".", ":!benchmarks/rows"])
    if changed.returncode:
        commit += "-dirty"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return {
        "commit": commit,
        "machine": f"{processor()}, {os.cpu_count()} cores, {device}",
        "load": round(os.getloadavg()[0], 2),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


FOLDERS = re.compile(r"(?<![\w./:])/(?:[\w.@+=-]+/)+")  # of an absolute path in a message


def append(benchmark: str, row: dict[str, Any]) -> None:
    """Add a row to rows/<benchmark>.jsonl and show it; of absolute paths the name is kept."""
    ROWS.mkdir(exist_ok=True)
    line = FOLDERS.sub("", json.dumps(row))
    with (ROWS / f"{benchmark}.jsonl").open("a") as file:
        file.write(line + "\n")
    print(line, flush=True)


def train(config: str, seed: int, *words: str, test: bool = False) -> dict[str, Any]:
    """`ravine fit` (and `test`) on a shipped config, in a process and a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        where = [f"--trainer.default_root_dir={folder}", "--trainer.name=run"]
        ravine("fit", "--config", config, f"--seed_everything={seed}", *where, *words,
               "--trainer.callbacks+=benchmarks.record.Stopwatch")  # fmt: skip
        if test:
            ravine("test", "--ckpt_path=last", "--trust=benchmarks", *where, *words)
        versions = sorted(Path(folder, "run").iterdir(), key=lambda path: path.stat().st_mtime)
        watch = json.loads((versions[0] / "stopwatch.json").read_text())
        metrics = {k: v for path in versions for k, v in last_values(path / "metrics.csv").items()}
    return circumstances(config) | {"seed": seed, "words": list(words)} | watch | metrics


def ravine(*words: str) -> None:
    """Run the program in the repository's folder; its noise is shown only if it fails."""
    command = [sys.executable, "-m", "ravine.cli.main", *words]
    result = subprocess.run(command, cwd=HERE.parent, capture_output=True, text=True)
    if result.returncode:
        sys.exit(f"{' '.join(command)}\n{result.stdout}\n{result.stderr}")


def last_values(path: Path) -> dict[str, float]:
    """The last value of each metric in a metrics.csv."""
    values: dict[str, float] = {}
    with path.open() as file:
        for row in csv.DictReader(file):
            values |= {k: float(v) for k, v in row.items() if v and "/" in k}
    return values
