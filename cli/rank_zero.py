"""Rank 0 resolves `--ckpt_path=auto` for all ranks of a launcher, through a TCPStore.

torchrun, srun and scripts start every rank with the same command, before there is a process group.
`--ckpt_path=auto` reads whole files, so only rank 0 does it, and puts the path into a TCPStore. The
store is torchrun's own, or one that rank 0 opens on another port of the same host.
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

WORLD_SIZE_VARIABLES = {"RANK": "WORLD_SIZE", "SLURM_PROCID": "SLURM_NTASKS"}
POLL_INTERVAL_S = 0.1  # seconds between two reads of the store: Ctrl-C can interrupt between them
CONNECT_TIMEOUT_S = 1800.0  # seconds until rank 0 has imported torch and opened the store
CLOSE_TIMEOUT_S = 60.0  # seconds that rank 0 keeps its store open for the other ranks
PORT_OFFSET = 10_000  # difference between the store's port and the job's
_open_stores: list[Any] = []  # open until the process ends
_num_calls = 0  # calls of `call_on_rank_zero` in this process so far


def is_launched(environment: Mapping[str, str] = os.environ) -> bool:
    """Return whether this process is one of several ranks that read the same checkpoint."""
    if environment.get("LOCAL_RANK", "0") != "0":
        return True
    return any(
        rank_variable in environment and environment.get(size_variable, "1") != "1"
        for rank_variable, size_variable in WORLD_SIZE_VARIABLES.items()
    )


class LauncherJob(NamedTuple):
    """The address of a job, its number of ranks, and the rank of this process."""

    rank: int
    world_size: int
    address: str
    port: int
    has_store: bool  # whether the launcher has a store there


def detect_job(environment: Mapping[str, str] = os.environ) -> LauncherJob | None:
    """Return the job that a launcher has started this process for; None if there is none."""
    if "RANK" in environment and environment.get("WORLD_SIZE", "1") != "1":
        rank, size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
        shared = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        address, port = environment.get("MASTER_ADDR"), environment.get("MASTER_PORT")
        return LauncherJob(rank, size, address, int(port), shared) if address and port else None
    if environment.get("SLURM_NTASKS", "1") != "1" and "SLURM_PROCID" in environment:
        from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

        if SLURMEnvironment.detect():
            cluster = SLURMEnvironment()
            rank, size = int(environment["SLURM_PROCID"]), int(environment["SLURM_NTASKS"])
            return LauncherJob(rank, size, cluster.main_address, cluster.main_port, False)
    return None


def call_on_rank_zero(find_path: Callable[[], str | None] | None) -> str | None:
    """Call `find_path` on rank 0 and return its result on all ranks; without a job, call it here.

    The other ranks wait without a time limit. If `find_path` raises an error on rank 0, they raise
    the same error.

    Args:
        find_path: finds the path; None if the command of this rank needs no path. Rank 0 then sends
            this to ranks that wait for a path.

    Raises:
        UsageError: as on rank 0, or if the command of rank 0 needs no path.
    """
    global _num_calls
    launcher_job = detect_job()
    if launcher_job is None:
        return find_path() if find_path else None
    _num_calls += 1
    # torchrun keeps its store over restarts; without that store, restart counts of nodes may differ
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if launcher_job.has_store else ""
    key = f"ravine/checkpoint/{attempt}/{_num_calls}"
    if launcher_job.rank == 0:
        return _call_and_publish(find_path, launcher_job, key)
    if find_path is None:
        return None
    message = json.loads(_wait_for_value(_open_store(launcher_job), key))
    if "mistake" in message:
        raise UsageError(**message["mistake"])
    if message.get("interrupted"):
        raise KeyboardInterrupt
    if not message.get("asked"):
        raise UsageError(
            f"rank {launcher_job.rank} has --ckpt_path=auto or last, but rank 0 has not",
            "the same --ckpt_path on every rank",
            flag="the same command on every rank",
        )
    return message["answer"]


def _call_and_publish(
    find_path: Callable[[], str | None] | None, launcher_job: LauncherJob, key: str
) -> str | None:
    if find_path is None:
        with suppress(RuntimeError, UsageError):  # maybe no rank waits, so a used port is no error
            _open_store(launcher_job).set(key, json.dumps({"asked": False}))
        return None
    store = _open_store(launcher_job)
    message: dict[str, Any] = {"mistake": {"problem": "rank 0 could not find the checkpoint"}}
    try:
        message = {"asked": True, "answer": find_path()}
        return message["answer"]
    except KeyboardInterrupt:
        message = {"interrupted": True}
        raise
    except Exception as error:
        message = {"mistake": usage_error_parts(error)}
        raise
    finally:
        store.set(key, json.dumps(message))
        end = time.monotonic() + CLOSE_TIMEOUT_S
        while (
            not launcher_job.has_store and time.monotonic() < end
        ):  # the store ends with this process
            if store.add(f"{key}/read", 0) == launcher_job.world_size - 1:
                break
            time.sleep(POLL_INTERVAL_S)


def usage_error_parts(error: Exception) -> dict[str, Any]:
    """Return the arguments that rebuild a UsageError on another rank; for other errors the text."""
    if not isinstance(error, UsageError | RunError):
        return {"problem": str(error)}
    return {name: getattr(error, name) for name in ("problem", "allowed", "hint", "flag", "label")}


def _open_store(launcher_job: LauncherJob) -> Any:
    """Return the store of the job; rank 0 opens it if the launcher has none."""
    if _open_stores:
        return _open_stores[0]
    from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

    port = launcher_job.port
    if not launcher_job.has_store:
        port += PORT_OFFSET if port + PORT_OFFSET < 2**16 else -PORT_OFFSET
    is_server = launcher_job.rank == 0 and not launcher_job.has_store
    try:
        if not is_server:
            _wait_until_open(launcher_job.address, port)
        limit = timedelta(seconds=60)
        store = TCPStore(launcher_job.address, port, None, is_server, limit, wait_for_workers=False)
    except (OSError, RuntimeError) as error:
        raise UsageError(
            f"the ranks cannot connect to {launcher_job.address}:{port} to agree on a checkpoint:"
            f" {' '.join(str(error).split())[:100]}",
            "a port of this address that every rank can reach",
            flag="--ckpt_path=FILE",
        ) from error
    _open_stores.append(store)
    return store


def _wait_until_open(address: str, port: int) -> None:
    """Wait until rank 0 has opened its store; torch would print each attempt and block Ctrl-C."""
    end = time.monotonic() + CONNECT_TIMEOUT_S
    while True:
        try:
            socket.create_connection((address, port), timeout=5).close()
            return
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(POLL_INTERVAL_S)


def _wait_for_value(store: Any, key: str) -> str:
    """Wait for the value of a key and return it."""
    try:
        while not store.check([key]):
            time.sleep(POLL_INTERVAL_S)
        value = store.get(key).decode()
        store.add(f"{key}/read", 1)
        return value
    except RuntimeError as error:
        raise RunError(
            "rank 0 ended before it found the checkpoint for --ckpt_path=auto or last",
            hint="read the error in the output of rank 0",
        ) from error
