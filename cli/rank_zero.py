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
    """Return the job for which torchrun or srun has started this process; None if there is none.

    Args:
        environment: the environment variables; tests pass their own.
    """
    if "RANK" in environment and environment.get("WORLD_SIZE", "1") != "1":
        rank, size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
        address, port = environment.get("MASTER_ADDR"), environment.get("MASTER_PORT")
        if not (address and port):
            return None
        # torchrun sets this variable if its own process serves a store at the job's address.
        has_store = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        # rank, number of ranks, address and port of rank 0, and whether the launcher serves a store
        return LauncherJob(rank, size, address, int(port), has_store)
    if environment.get("SLURM_NTASKS", "1") != "1" and "SLURM_PROCID" in environment:
        from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

        if SLURMEnvironment.detect():
            cluster = SLURMEnvironment()
            rank, size = int(environment["SLURM_PROCID"]), int(environment["SLURM_NTASKS"])
            address, port = cluster.main_address, cluster.main_port
            return LauncherJob(rank, size, address, port, has_store=False)
    return None


def call_on_rank_zero(find_path: Callable[[], str | None] | None) -> str | None:
    """Call `find_path` on rank 0 and return its result on all ranks; without a job, call it here.

    The other ranks wait without a time limit for a JSON object from rank 0: `{"asked": true,
    "answer": path}`, `{"asked": false}` if its command needs no path, `{"mistake": arguments of a
    UsageError}` after an error, or `{"interrupted": true}` after Ctrl-C.

    Args:
        find_path: finds the path; None if the command of this rank needs no path.

    Raises:
        UsageError: on the other ranks, with the text of the error of rank 0 (of any class), or if
            the command of rank 0 needs no path.
        KeyboardInterrupt: on all ranks, if Ctrl-C ended the search on rank 0.
    """
    global _num_calls
    launcher_job = detect_job()
    if launcher_job is None:
        return find_path() if find_path else None
    _num_calls += 1  # the same number on all ranks: they run the same command
    # the name of this call's message in the store
    key = _make_message_key(launcher_job, _num_calls)
    if launcher_job.rank == 0:
        # puts the result or the error into the store, for the other ranks
        return _call_and_publish(find_path, launcher_job, key)
    if find_path is None:
        return None
    # `_open_store`: the key-value store of torch that all ranks of the job connect to
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


def _make_message_key(launcher_job: LauncherJob, call_number: int) -> str:
    """Return the key of the store under which rank 0 puts the message of a call."""
    attempt = ""
    if launcher_job.has_store:
        # torchrun's store survives a restart, with the messages of earlier attempts.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    # Rank 0 opens its own store anew at each restart. There the count must not be in the key,
    # because nodes may count restarts differently.
    return f"ravine/checkpoint/{attempt}/{call_number}"


def _call_and_publish(
    find_path: Callable[[], str | None] | None, launcher_job: LauncherJob, key: str
) -> str | None:
    """On rank 0: return the result of `find_path`, and put it or its error into the store.

    Args:
        find_path: finds the path; None if the command of rank 0 needs no path.
        launcher_job: the job whose ranks wait for the message.
        key: the key of the message in the store.
    """
    if find_path is None:
        with suppress(RuntimeError, UsageError):  # maybe no rank waits, so a used port is no error
            _open_store(launcher_job).set(key, json.dumps({"asked": False}))
        return None
    # the key-value store of torch that all ranks of the job connect to
    store = _open_store(launcher_job)
    # The first message is sent if `find_path` ends by SystemExit.
    message: dict[str, Any] = {"mistake": {"problem": "rank 0 could not find the checkpoint"}}
    try:
        message = {"asked": True, "answer": find_path()}
        return message["answer"]
    except KeyboardInterrupt:
        message = {"interrupted": True}
        raise
    except Exception as error:
        # the texts of the error, from which the other ranks build it again
        message = {"mistake": usage_error_parts(error)}
        raise
    finally:
        store.set(key, json.dumps(message))
        if not launcher_job.has_store:  # the store ends with this process
            _wait_for_readers(store, key, num_readers=launcher_job.world_size - 1)


def _wait_for_readers(store: Any, key: str, num_readers: int) -> None:
    """Wait until `num_readers` ranks have read the message, at most CLOSE_TIMEOUT_S seconds."""
    end = time.monotonic() + CLOSE_TIMEOUT_S
    while time.monotonic() < end:
        # Each reader adds 1 to this count; adding 0 returns it.
        if store.add(f"{key}/read", 0) == num_readers:
            break
        time.sleep(POLL_INTERVAL_S)


def usage_error_parts(error: Exception) -> dict[str, Any]:
    """Return the arguments that rebuild a UsageError on another rank; for other errors the text."""
    if not isinstance(error, UsageError | RunError):
        return {"problem": str(error)}
    return {name: getattr(error, name) for name in ("problem", "allowed", "hint", "flag", "label")}


def _open_store(launcher_job: LauncherJob) -> Any:
    """Return the TCPStore of the job; rank 0 opens it if the launcher has none.

    The store is kept in `_open_stores` until the process ends; a second call returns it.

    Raises:
        UsageError: the store cannot be opened or reached.
    """
    if _open_stores:
        return _open_stores[0]
    from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

    # The process group needs the job's port itself, so a store of our own uses another one.
    # torchrun's store is at the job's port.
    port = launcher_job.port
    if not launcher_job.has_store:
        port += PORT_OFFSET if port + PORT_OFFSET < 2**16 else -PORT_OFFSET
    is_server = launcher_job.rank == 0 and not launcher_job.has_store
    try:
        if not is_server:
            # rank 0 may start later than this rank
            _wait_until_open(launcher_job.address, port)
        store = TCPStore(
            launcher_job.address,
            port,
            world_size=None,  # any number of ranks may connect
            is_master=is_server,
            timeout=timedelta(seconds=60),
            wait_for_workers=False,
        )
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
