"""Under a launcher rank 0 finds the checkpoint of `--ckpt_path=auto`, for all ranks.

torchrun, srun and scripts start every rank with the same command, before there is a process group.
`--ckpt_path=auto` reads whole files, so rank 0 does it alone and puts the path into a TCPStore.
The store is torchrun's own, or one that rank 0 opens on another port of the same host.
"""

import json
import os
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import timedelta
from typing import Any, NamedTuple

from ravine.errors import RunError, UsageError

COUNTS = {"RANK": "WORLD_SIZE", "SLURM_PROCID": "SLURM_NTASKS"}
POLL = 0.1  # seconds between two reads of the store: Ctrl-C can interrupt between them
CONNECT = 1800.0  # seconds until rank 0 has imported torch and opened the store
FAREWELL = 60.0  # seconds that rank 0 keeps its store open for the other ranks
OTHER_PORT = 10_000  # difference between the store's port and the job's
_stores: list[Any] = []  # kept open until the process ends
_questions = 0  # calls of `from_first` in this process so far


def is_launched(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this process is one of several ranks that read the same checkpoint at the start."""
    if environment.get("LOCAL_RANK", "0") != "0":
        return True
    return any(
        place in environment and environment.get(count, "1") != "1"
        for place, count in COUNTS.items()
    )


class Job(NamedTuple):
    """The address of a job, its number of ranks, and the rank of this process."""

    rank: int
    size: int
    address: str
    port: int
    shared: bool  # whether the launcher has a store there


def job(environment: Mapping[str, str] = os.environ) -> Job | None:
    """The job that a launcher has started this process for; None if there is none."""
    if "RANK" in environment and environment.get("WORLD_SIZE", "1") != "1":
        rank, size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
        shared = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        address, port = environment.get("MASTER_ADDR"), environment.get("MASTER_PORT")
        return Job(rank, size, address, int(port), shared) if address and port else None
    if environment.get("SLURM_NTASKS", "1") != "1" and "SLURM_PROCID" in environment:
        from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

        if SLURMEnvironment.detect():
            cluster = SLURMEnvironment()
            rank, size = int(environment["SLURM_PROCID"]), int(environment["SLURM_NTASKS"])
            return Job(rank, size, cluster.main_address, cluster.main_port, False)
    return None


def from_first(ask: Callable[[], str | None] | None) -> str | None:
    """Return on all ranks of a job what `ask` returns on rank 0; without a job, call it here.

    The other ranks wait without a time limit. If `ask` raises on rank 0, they raise the same.

    Args:
        ask: finds the path; None if the command of this rank asks for none. Rank 0 then tells
            ranks that wait for a path.

    Raises:
        UsageError: as on rank 0, or if the command of rank 0 asks for no path.
    """
    global _questions
    here = job()
    if here is None:
        return ask() if ask else None
    _questions += 1
    # torchrun keeps its store over restarts; without it nodes may have counted other restarts
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if here.shared else ""
    key = f"ravine/checkpoint/{attempt}/{_questions}"
    if here.rank == 0:
        return _answer(ask, here, key)
    if ask is None:
        return None
    said = json.loads(_wait(_store(here), key))
    if "mistake" in said:
        raise UsageError(**said["mistake"])
    if said.get("interrupted"):
        raise KeyboardInterrupt
    if not said.get("asked"):
        raise UsageError(
            f"rank {here.rank} has --ckpt_path=auto or last, and rank 0 has not",
            flag="the same words on every rank",
        )
    return said["answer"]


def _answer(ask: Callable[[], str | None] | None, here: Job, key: str) -> str | None:
    if ask is None:
        with suppress(RuntimeError, UsageError):  # maybe no rank waits: a taken port is no error
            _store(here).set(key, json.dumps({"asked": False}))
        return None
    store = _store(here)
    said: dict[str, Any] = {"mistake": {"problem": "rank 0 could not find the checkpoint"}}
    try:
        said = {"asked": True, "answer": ask()}
        return said["answer"]
    except KeyboardInterrupt:
        said = {"interrupted": True}
        raise
    except Exception as error:
        said = {"mistake": parts(error)}
        raise
    finally:
        store.set(key, json.dumps(said))
        end = time.monotonic() + FAREWELL
        while not here.shared and time.monotonic() < end:  # the store ends with this process
            if store.add(f"{key}/read", 0) == here.size - 1:
                break
            time.sleep(POLL)


def parts(error: Exception) -> dict[str, Any]:
    """The arguments that make an equal UsageError on another rank; of other errors the text."""
    if not isinstance(error, UsageError):
        return {"problem": str(error)}
    return {name: getattr(error, name) for name in ("problem", "allowed", "hint", "flag", "label")}


def _store(here: Job) -> Any:
    """The store of the job; rank 0 opens it where the launcher has none."""
    if _stores:
        return _stores[0]
    from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

    port = here.port
    if not here.shared:
        port += OTHER_PORT if port + OTHER_PORT < 2**16 else -OTHER_PORT
    serves = here.rank == 0 and not here.shared
    try:
        if not serves:
            _until_open(here.address, port)
        limit = timedelta(seconds=60)
        store = TCPStore(here.address, port, None, serves, limit, wait_for_workers=False)
    except (OSError, RuntimeError) as error:
        raise UsageError(
            f"the ranks cannot meet at {here.address}:{port} to agree on a checkpoint:"
            f" {' '.join(str(error).split())[:100]}",
            ["a port of this address that every rank reaches"],
            flag="--ckpt_path=FILE",
        ) from error
    _stores.append(store)
    return store


def _until_open(address: str, port: int) -> None:
    """Wait until rank 0 has opened its store; torch would print each attempt and block Ctrl-C."""
    end = time.monotonic() + CONNECT
    while True:
        try:
            socket.create_connection((address, port), timeout=5).close()
            return
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(POLL)


def _wait(store: Any, key: str) -> str:
    """Wait for the value of a key and return it."""
    try:
        while not store.check([key]):
            time.sleep(POLL)
        value = store.get(key).decode()
        store.add(f"{key}/read", 1)
        return value
    except RuntimeError as error:
        raise RunError(
            "rank 0 has ended before it found the checkpoint that --ckpt_path=auto or last means;"
            " allowed: a job in which rank 0 finds it; see the output of rank 0 for the cause"
        ) from error
