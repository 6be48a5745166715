"""Ranks that a launcher has started: torchrun, srun, or Lightning for its further processes."""

import os
from collections.abc import Mapping

COUNTS = {"RANK": "WORLD_SIZE", "SLURM_PROCID": "SLURM_NTASKS"}


def is_launched(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this process is one of several ranks that read the same checkpoint at the start."""
    if environment.get("LOCAL_RANK", "0") != "0":
        return True
    return any(
        place in environment and environment.get(count, "1") != "1"
        for place, count in COUNTS.items()
    )
