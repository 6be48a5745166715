"""One command starts all ranks, and every process ends cleanly."""

import os
import subprocess
import sys
from pathlib import Path


def test_the_command_line_starts_two_ranks_of_zero3_and_ends_them(tmp_path):
    words = [
        *("fit", "--model", "external_modules.net_in_init.NetInInit"),
        *("--trainer.strategy", "zero3", "--trainer.devices", "2", "--trainer.accelerator", "cpu"),
        *("--trainer.max_steps", "4", "--trainer.default_root_dir", str(tmp_path)),
    ]
    program = [sys.executable, "-m", "ravine.cli.main", *words]
    folder = Path(__file__).parents[1]  # where `external_modules` is found
    environment = {k: v for k, v in os.environ.items() if k not in ("LOCAL_RANK", "WORLD_SIZE")}
    run = subprocess.run(
        program, cwd=folder, env=environment, capture_output=True, text=True, timeout=170
    )
    assert run.returncode == 0, run.stderr
    assert "MEMBER: 2/2" in run.stderr
    assert "terminate called" not in run.stderr
    assert "Traceback" not in run.stderr
    assert list(tmp_path.glob("*/version_0/checkpoints/*.ckpt"))
