"""Several ranks on one machine: run a test's function in forked processes that form one gloo job.

    from ranks import furthest, whole                # tests/ is on the path
    def test_zero3_equals_one_process(ranks):        # the fixture is `run_ranks`
        assert furthest(ranks(train, 2, "zero3")[0], train("auto")) < 2e-6

A server process imports everything heavy once; a rank is a fork of it, so two ranks start in a
fraction of a second. The parent hosts the rendezvous store, hence no port can be taken twice.
"""

import faulthandler
import gc
import importlib.util
import math
import multiprocessing
import os
import pickle
import random
import sys
import tempfile
import time
import traceback
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import numpy
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

PRELOAD = (
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "torch._dynamo",
    "pytest",
    "lightning",
    "matplotlib.backends.backend_agg",
    "torchmetrics",
    "ravine.callbacks",
    "ravine.datamodules",
    "ravine.lightning_modules",
    "ravine.strategies",
    "ravine.cli.command",
)
GRACE = 1.0  # seconds the other ranks have to say what happened to them once one has failed


def whole(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A copy of all parameters by name, put together from the ranks; every rank calls it."""
    return {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for name, p in module.named_parameters()
    }


def furthest(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The largest difference of two such copies."""
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)


class RankError(AssertionError):
    """A rank failed, died or hung; the text names it and shows what it said."""


def run_ranks(function: Callable[..., Any], world: int, *args: Any, timeout: float = 90) -> list:
    """Call ``function(*args)`` in ``world`` ranks and return their results in the order of ranks.

    The function stands at module level of a test file; arguments and results are pickled. Inside,
    a stock ``Trainer(devices=world, ...)`` joins the job, and the warning filters are the caller's.
    """
    with started(function, world, *args, timeout=timeout) as (processes, pipes, logs):
        answers = _collect(pipes, timeout)
        for process in processes if len(answers) == world else ():
            process.join(5)
        for process in processes:
            process.kill()
            process.join()
        return _results(answers, logs, [process.exitcode for process in processes], timeout)


@contextmanager
def started(
    function: Callable[..., Any], world: int, *args: Any, timeout: float = 90
) -> Iterator[tuple[list[Any], list[Connection], list[Path]]]:
    """Processes that call the function, the pipes of their answers, and what they write.

    At the end whoever still lives is killed.
    """
    if "<" in function.__qualname__:
        raise TypeError(f"{function.__qualname__} must stand at module level to run in ranks")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOAD))
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    source = (function.__module__, function.__code__.co_filename, function.__qualname__)
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        logs = [Path(folder, f"rank{rank}.log") for rank in range(world)]
        job = (source, pickle.dumps(args), list(warnings.filters), timeout)
        processes, pipes = [], []
        for rank, log in enumerate(logs):
            receiver, sender = context.Pipe(duplex=False)
            environment = _environment(rank, world, store.port)
            process = context.Process(target=_serve, args=(environment, str(log), sender, *job))
            process.start()
            sender.close()
            processes.append(process)
            pipes.append(receiver)
        try:
            yield processes, pipes, logs
        finally:
            for process in processes:
                process.kill()
                process.join()


def _environment(rank: int, world: int, port: int) -> dict[str, str]:
    """The caller's variables, and those torchrun gives a rank; Lightning recognises them.

    The server that the ranks are forked from has the variables of its own first caller.
    """
    return dict(os.environ) | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "ranks",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "OMP_NUM_THREADS": "1",
    }


def _serve(
    environment: dict[str, str],
    log: str,
    sender: Connection,
    source: tuple[str, str, str],
    args: bytes,
    filters: list[tuple],
    timeout: float,
) -> None:
    """Be one rank: load the test file by its path, call the function, send what came of it."""
    gc.freeze()  # a collection of what the server imported takes 0.4 s, and copies its pages
    os.environ.clear()
    os.environ.update(environment)
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    faulthandler.enable(sys.__stderr__)  # where it dies
    faulthandler.dump_traceback_later(timeout * 0.95, file=sys.__stderr__)  # where it hangs
    warnings.resetwarnings()
    warnings.filters.extend(filters)  # type: ignore[attr-defined]
    torch.set_num_threads(1)
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)
    name, path, qualname = source
    try:
        if name not in sys.modules:
            spec = importlib.util.spec_from_file_location(name, path)
            assert spec is not None
            assert spec.loader is not None
            for i in range(1, name.count(".") + 1):  # packages, as pytest makes them
                package = types.ModuleType(name.rsplit(".", i)[0])
                package.__path__ = []
                sys.modules.setdefault(package.__name__, package)
            sys.modules[name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(sys.modules[name])
        function = getattr(sys.modules[name], qualname)
        # nets of tests are tiny: block by block, as large nets are
        sys.modules["ravine.strategies.parallel_module"].DEFAULT_MIN_UNIT_BYTES = 0
        answer = pickle.dumps((True, function(*pickle.loads(args))))
    except BaseException:
        answer = pickle.dumps((False, traceback.format_exc()))
    faulthandler.cancel_dump_traceback_later()
    sender.send_bytes(answer)
    if dist.is_initialized() and pickle.loads(answer)[0]:
        dist.destroy_process_group()


def _collect(pipes: list[Connection], timeout: float) -> dict[int, tuple[bool, Any]]:
    """Answers by rank, until all are in, the time is over, or ``GRACE`` after a first failure."""
    answers: dict[int, tuple[bool, Any]] = {}
    waiting = dict(zip(pipes, range(len(pipes)), strict=True))
    deadline = time.monotonic() + timeout
    while waiting and (left := deadline - time.monotonic()) > 0:
        for pipe in wait(list(waiting), left):
            rank = waiting.pop(pipe)  # type: ignore[arg-type]
            try:
                answers[rank] = pickle.loads(pipe.recv_bytes())  # type: ignore[union-attr]
            except EOFError:
                answers[rank] = (False, "died without a word")
            if not answers[rank][0]:
                deadline = min(deadline, time.monotonic() + GRACE)
    return answers


def _results(
    answers: dict[int, tuple[bool, Any]],
    logs: list[Path],
    codes: list[int | None],
    timeout: float,
) -> list:
    """The results in order, or one error that begins with the rank that failed first."""
    failed = [rank for rank, (good, _) in answers.items() if not good]
    silent = [rank for rank in range(len(logs)) if rank not in answers]
    if not failed and not silent:
        return [answers[rank][1] for rank in range(len(logs))]
    parts = [f"rank {rank} failed (exit {codes[rank]}):\n{answers[rank][1]}" for rank in failed]
    why = "killed because another failed" if failed else f"hung: killed after {timeout:g} s"
    parts += [f"rank {rank} {why}" for rank in silent]
    for rank in [*failed, *silent]:
        said = logs[rank].read_text(errors="replace")[-4000:]
        parts += [f"--- rank {rank} wrote:\n{said}"] if said else []
    raise RankError("\n".join(parts))


def fewest_ranks(arguments: dict[str, Any]) -> int:
    """The fewest ranks of a mesh on which an axis without a fixed size has two or more.

    Where another axis has a fixed size above 1, four ranks are enough: the first may have one.

    Args:
        arguments: those of MeshStrategy; an axis of -1 takes the ranks that are left.
    """
    axes = {"pp": 1, "dp_replicate": 1, "dp_shard": -1, "cp": 1, "tp": 1}
    sizes = [arguments.get(axis, default) for axis, default in axes.items()]
    fixed = math.prod(size for size in sizes if size > 0)
    if -1 not in sizes:
        return fixed
    return 2 if fixed == 1 else max(4, fixed)
