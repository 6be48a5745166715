"""OutOfMemoryReport: explain an out-of-memory error, and a process that was killed for its memory.

The report has the phase and the step, the bytes by class (measured beside estimated), and the three
changes that save most. On a CPU the kernel kills a process without an exception, so a summary is
written to the heartbeat file at the start of training. The next run that finds it prints the
report.
"""

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ravine.strategies.activation_checkpointing import (
    find_blocks,
    find_sequentials,
    uses_activation_checkpointing,
)

from ..base import find_callbacks
from ..estimates.memory_report import Change, MemoryReport
from ..lora.callback import LoRA
from ..monitoring.heartbeat import (
    FOLDER,
    PHASES,
    Heartbeat,
    HeartbeatRecord,
    process_state,
    read_heartbeats,
)
from ..monitoring.memory import measure_memory
from ..monitoring.memory_limit import count_oom_kills, find_memory_limit, peak_process_bytes

REPORT_WIDTH = 110
NEAR_LIMIT = 0.8  # part of the limit that a killed process must have used
MAX_ESTIMATE_S = 20.0  # further estimates are left out if the first took longer than a third
SNAPSHOT_ENTRIES = 100_000  # events of the allocator
MEMORY_TEXTS = ("can't allocate memory", "not enough memory", "std::bad_alloc", "out of memory")
GENERATION_FOLDER = "lightning_modules/generation"
STEP = "the micro-batch"  # class of activations, temporary tensors and the batch


@dataclass
class MemorySummary:
    """The facts of a run that decide which changes are possible and what they save.

    Attributes:
        parameters: bytes on this rank.
        trainable: bytes of the trainable ones, and so of gradients.
        states: bytes of optimizer state, allocated or expected.
        buffers: bytes of buffers.
        base: bytes of the process before the first step; 0 on a GPU.
        accumulate: micro-batches of a step.
        samples: samples of a micro-batch; 0 if unknown.
        divides_batch: whether a larger `accumulate` makes micro-batches smaller.
        ranks: number of ranks.
        is_replicated: whether each rank has all states (ddp).
        blocks: blocks that could recompute activations; 0 without any.
        is_recomputed: whether they do.
        is_half: whether matrix products use 16 bits.
        has_lora: whether adapters are trained.
        num_matrices: linear layers, which LoRA can adapt.
        context_length: tokens of a sample, if the data have this argument; else 0.
        batch_size: of the data, if they have this argument; else 0.
    """

    parameters: int = 0
    trainable: int = 0
    states: int = 0
    buffers: int = 0
    base: int = 0
    accumulate: int = 1
    samples: int = 0
    divides_batch: bool = False
    ranks: int = 1
    is_replicated: bool = False
    blocks: int = 0
    is_recomputed: bool = False
    is_half: bool = False
    has_lora: bool = False
    num_matrices: int = 0
    context_length: int = 0
    batch_size: int = 0


class OutOfMemoryReport(Callback):
    """Prints where the memory is and what to change, if a run has too little memory.

    Ravine's Trainer adds it. Example: `Trainer(callbacks=[OutOfMemoryReport(snapshot=True)])`.

    Args:
        snapshot: on a GPU, record the allocator, and write `memory_snapshot_<rank>.pickle` to the
            run folder at an out-of-memory error, for https://pytorch.org/memory_viz.
    """

    def __init__(self, snapshot: bool = False) -> None:
        """Create the callback.

        Args:
            snapshot: record the allocator of a GPU, and write a file at an error.
        """
        self.snapshot = snapshot
        self.uses_flags = False  # whether changes are written as flags; the command line sets it
        self._base_bytes = 0
        self._sample_count = 0

    @property
    def state_key(self) -> str:
        """Return a constant key: a run has one OutOfMemoryReport."""
        return "OutOfMemoryReport"

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start to record the allocator, if a snapshot is requested."""
        if self.snapshot and trainer.strategy.root_device.type == "cuda":
            torch.cuda.memory._record_memory_history(max_entries=SNAPSHOT_ENTRIES)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the summary to the heartbeat file, for the case that the process is killed."""
        is_gpu = trainer.strategy.root_device.type == "cuda"
        self._base_bytes = 0 if is_gpu else peak_process_bytes()
        for heartbeat in find_callbacks(trainer, Heartbeat):
            summary = summarize(trainer, pl_module, self._base_bytes)
            heartbeat.write_summary(json.dumps(asdict(summary)))

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Print the report of an out-of-memory error."""
        if not is_memory_error(exception):
            return
        report = explain_error(trainer, pl_module, exception, self._base_bytes)
        if self.snapshot and trainer.strategy.root_device.type == "cuda":
            folder = getattr(trainer, "run_dir", None) or trainer.default_root_dir
            path = os.path.join(folder, f"memory_snapshot_{trainer.global_rank}.pickle")
            torch.cuda.memory._dump_snapshot(path)
            report.notes.append(f"memory snapshot: {path}")
        Console(file=sys.stderr, width=REPORT_WIDTH).print(report.render(self.uses_flags))
        # for the command line, whose error names what to type
        exception.__dict__["memory_report"] = report


def is_memory_error(error: BaseException) -> bool:
    """Return whether the device or the machine had too little memory."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in MEMORY_TEXTS)


def explain_error(
    trainer: Any, module: L.LightningModule, error: BaseException, base_bytes: int
) -> MemoryReport:
    """Return the report of an out-of-memory error.

    Args:
        trainer: the trainer of the run.
        module: its module.
        error: the error, with its traceback.
        base_bytes: of the process before the first step; 0 on a GPU.
    """
    # imported here, because it imports the simulation, which few runs need
    from ..estimates.estimate import format_bytes

    batch = find_batch(error.__traceback__)
    summary = summarize(trainer, module, base_bytes, batch)
    phase, is_training = find_phase(trainer, error)
    device = trainer.strategy.root_device
    measured: dict[str, int | None] = {
        "parameters": summary.parameters,
        "gradients": sum(_num_bytes(p.grad) for p in module.parameters() if p.grad is not None),
        "optimizer state": _state_bytes(trainer.optimizers),
        "buffers": summary.buffers,
    }
    counted = sum(size or 0 for size in measured.values())
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        limit = f"{format_bytes(_gpu_bytes(device))} ({torch.cuda.get_device_name(device)})"
        measured[STEP] = max(0, peak - counted)
    else:
        peak = peak_process_bytes()
        host_limit = find_memory_limit()
        limit = ""
        if host_limit is not None:
            limit = f"{format_bytes(host_limit.num_bytes)} ({host_limit.source})"
        measured[STEP] = max(0, peak - base_bytes - counted + summary.parameters)
        measured["process before the first step"] = base_bytes
    measured["peak"] = peak
    estimated: dict[str, int | None] = {
        "parameters": summary.parameters,
        "gradients": summary.trainable if is_training else 0,
        "optimizer state": summary.states if is_training else 0,
        "buffers": summary.buffers,
    }
    # bytes of a micro-batch, and with half of the samples or activation checkpointing
    step_bytes, half_bytes, recomputed_bytes = _simulate(trainer, module, batch, summary)
    estimated[STEP] = step_bytes if is_training else None
    text = " ".join(str(error).split())[:160]
    where = f"in the {phase}" if not phase.startswith("after") else phase
    report = MemoryReport(
        f"out of memory {where}, step {trainer.global_step + 1}: {text}", measured, estimated
    )
    if limit:
        report.notes.append(f"memory limit: {limit}")
    needed = step_bytes or measured[STEP] or 0
    report.changes = list_changes(summary, needed, phase, is_training, half_bytes, recomputed_bytes)
    return report


def _simulate(
    trainer: Any, module: L.LightningModule, batch: Any, summary: MemorySummary
) -> tuple[int | None, int | None, int | None]:
    """Return the bytes of a micro-batch: as it is, of half the samples, and recomputed."""
    from ..estimates.micro_batch import estimate_micro_batch

    precision = str(trainer.precision)
    if batch is None:
        return None, None, None
    first = estimate_micro_batch(module, trainer, batch, precision)
    if first is None or first.seconds > MAX_ESTIMATE_S / 3:
        return (None if first is None else first.num_bytes), None, None
    half = estimate_micro_batch(module, trainer, batch, precision, fraction=0.5)
    recomputed = None
    if summary.blocks and not summary.is_recomputed:
        recomputed = estimate_micro_batch(module, trainer, batch, precision, recomputes=True)
    results = (first, half, recomputed)
    sizes = [None if result is None else result.num_bytes for result in results]
    return sizes[0], sizes[1], sizes[2]


def list_changes(
    summary: MemorySummary,
    step_bytes: int,
    phase: str,
    is_training: bool = True,
    half_bytes: int | None = None,
    recomputed_bytes: int | None = None,
) -> list[Change]:
    """Return the changes that the module allows and that are not made yet, with their savings.

    Args:
        summary: of the run.
        step_bytes: bytes of a micro-batch beside parameters, gradients and states.
        phase: where memory ran out.
        is_training: whether a training step ran.
        half_bytes: bytes of a micro-batch of half the samples, if simulated.
        recomputed_bytes: bytes with activation checkpointing, if simulated.
    """
    changes: list[Change] = []
    half_saving = step_bytes // 2 if half_bytes is None else max(0, step_bytes - half_bytes)
    if is_training and summary.divides_batch and summary.samples > 1:
        count = 2 * summary.accumulate
        changes.append(
            Change(
                f"micro-batches of {summary.samples // 2} samples, the same step",
                half_saving,
                hint=f"accumulate_grad_batches={count}",
                flag=f"--trainer.accumulate_grad_batches={count}",
            )
        )
    elif summary.batch_size > 1:
        size = summary.batch_size // 2
        changes.append(
            Change(
                f"batches of {size} samples",
                half_saving,
                hint=f"batch_size={size}",
                flag=f"--data.batch_size={size}",
            )
        )
    if is_training and summary.blocks > 1 and not summary.is_recomputed:
        saving = step_bytes - step_bytes // summary.blocks
        if recomputed_bytes is not None:
            saving = max(0, step_bytes - recomputed_bytes)
        changes.append(
            Change(
                "activation checkpointing, a third more compute",
                saving,
                hint="callbacks=[ActivationCheckpointing()]",
                flag="--trainer.callbacks+=ActivationCheckpointing",
            )
        )
    if is_training and summary.ranks > 1 and summary.is_replicated:
        divided_bytes = summary.parameters + summary.trainable + summary.states
        changes.append(
            Change(
                f"parameters and states sharded over {summary.ranks} ranks",
                divided_bytes * (summary.ranks - 1) // summary.ranks,
                hint="strategy='zero3'",
                flag="--trainer.strategy=zero3",
            )
        )
    if is_training and summary.num_matrices and not summary.has_lora:
        changes.append(
            Change(
                "train adapters instead of all weights",
                int(0.95 * (summary.trainable + summary.states)),
                hint="callbacks=[LoRA()]",
                flag="--trainer.callbacks+=LoRA",
            )
        )
    if not summary.is_half:
        changes.append(
            Change(
                "matrix products in 16 bits",
                step_bytes // 2,
                hint="precision='bf16-mixed'",
                flag="--trainer.precision=bf16-mixed",
            )
        )
    if summary.context_length > 1 and phase != "generation":
        length = summary.context_length // 2
        changes.append(
            Change(
                f"{length} tokens a sample",
                step_bytes // 2,
                hint=f"context_length={length}",
                flag=f"--data.context_length={length}",
            )
        )
    return changes


def summarize(
    trainer: Any, module: L.LightningModule, base_bytes: int, batch: Any = None
) -> MemorySummary:
    """Return the summary of a run on this rank.

    Args:
        trainer: the trainer of the run.
        module: its module.
        base_bytes: bytes of the process before the first step; 0 on a GPU.
        batch: the micro-batch that failed; None: its samples follow from the datamodule.
    """
    usage = measure_memory(module, trainer.optimizers)
    parameters = usage["frozen weights"].num_bytes + usage["trained weights"].num_bytes
    data = trainer.datamodule
    leaves = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.ndim]
    samples, batch_size = (len(leaves[0]) if leaves else 0), _count(data, "batch_size")
    accumulate = trainer.accumulate_grad_batches
    # the datamodules of Ravine divide the batch of a step by ranks and micro-batches
    divides_batch = type(data).__module__.startswith("ravine.")
    if not samples and divides_batch:
        samples = max(1, batch_size // (accumulate * trainer.world_size))
    strategy = type(trainer.strategy).__name__
    return MemorySummary(
        parameters=parameters,
        trainable=usage["trained weights"].num_bytes,
        states=max(usage["optimizer state"].num_bytes, expected_states(trainer.optimizers)),
        buffers=sum(_num_bytes(buffer) for buffer in module.buffers()),
        base=base_bytes,
        accumulate=accumulate,
        samples=samples,
        divides_batch=divides_batch,
        ranks=trainer.world_size,
        is_replicated=strategy in ("DDPStrategy", "DataParallelStrategy"),
        blocks=len(find_blocks(module) or find_sequentials(module)),
        is_recomputed=uses_activation_checkpointing(module),
        is_half="16" in str(trainer.precision),
        has_lora=bool(find_callbacks(trainer, LoRA)),
        num_matrices=sum(isinstance(layer, nn.Linear) for layer in module.modules()),
        context_length=_count(data, "context_length"),
        batch_size=batch_size,
    )


def _count(data: Any, name: str) -> int:
    value = getattr(data, name, 0)
    return value if isinstance(value, int) else 0


def expected_states(optimizers: list[Any]) -> int:
    """Return the bytes of the states that optimizers will have after their first step.

    Each optimizer takes a step with two small parameters, whose states of their shape are counted.
    """
    total = 0
    for optimizer in iter_optimizers(optimizers):
        for group in optimizer.param_groups:
            copies = count_state_copies(type(optimizer), group)
            total += round(copies * sum(p.numel() * 4 for p in group["params"] if p.requires_grad))
    return total


def iter_optimizers(optimizers: list[Any]) -> Iterator[Any]:
    """Yield optimizers, and the members of composite ones."""
    for optimizer in optimizers:
        members = getattr(optimizer, "optimizers", None)
        if members:
            yield from iter_optimizers(list(members))
        else:
            yield optimizer


def count_state_copies(optimizer_class: type, group: dict[str, Any]) -> float:
    """Return how many fp32 numbers an optimizer keeps for each number of a parameter; 0 if unknown.

    Args:
        optimizer_class: class of the optimizer.
        group: a group of parameters, whose settings are used.
    """
    shape = (8, 8) if any(p.ndim > 1 for p in group["params"]) else (64,)
    options = {name: value for name, value in group.items() if name != "params"}
    with contextlib.suppress(Exception):  # it needs other arguments, or a loss
        parameter = nn.Parameter(torch.zeros(shape))
        optimizer = optimizer_class([{"params": [parameter], **options}], lr=0.0)
        parameter.grad = torch.zeros(shape)
        optimizer.step()
        leaves = tree_leaves(dict(optimizer.state[parameter]))
        sizes = [_num_bytes(leaf) for leaf in leaves if isinstance(leaf, Tensor) and leaf.ndim]
        return sum(sizes) / (4 * parameter.numel())
    return 0.0


def _state_bytes(optimizers: list[Any]) -> int:
    leaves = [leaf for o in optimizers for s in o.state.values() for leaf in tree_leaves(dict(s))]
    return sum(_num_bytes(leaf) for leaf in leaves if isinstance(leaf, Tensor))


def _num_bytes(tensor: Any) -> int:
    local = getattr(tensor, "_local_tensor", tensor)
    return local.numel() * local.itemsize


def _gpu_bytes(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).total_memory


def find_batch(trace: TracebackType | None) -> Any:
    """Return the micro-batch of the step that failed: a local variable of the training loop."""
    batch = None
    while trace is not None:
        frame = trace.tb_frame
        if frame.f_code.co_name in ("advance", "training_step", "validation_step"):
            batch = frame.f_locals.get("batch", batch)
        trace = trace.tb_next
    return batch


def find_phase(trainer: Any, error: BaseException) -> tuple[str, bool]:
    """Return where memory ran out, and whether a training step ran there."""
    trace = error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        if GENERATION_FOLDER in code.co_filename or code.co_name == "generate":
            return "generation", False
        trace = trace.tb_next
    phase = next((PHASES[h.phase] for h in find_callbacks(trainer, Heartbeat)), "")
    if trainer.validating or trainer.sanity_checking:
        phase = "validation"
    if trainer.testing or trainer.predicting:
        phase = "test" if trainer.testing else "prediction"
    is_training = phase not in ("validation", "test", "prediction")
    return phase or "training step", is_training


def explain_killed_runs(folders: list[Path]) -> list[MemoryReport]:
    """Return reports of processes that were killed near their memory limit, and remove their files.

    Args:
        folders: run folders.
    """
    reports = []
    for folder in folders:
        if (folder / FOLDER).is_symlink():  # its files are outside of the run folder
            continue
        records = read_heartbeats(folder / FOLDER)
        for record in records.values():
            if process_state(record.process) not in ("X", "Z"):
                continue
            if (report := explain_killed_process(record, folder)) is not None:
                reports.append(report)
            with contextlib.suppress(OSError):
                (folder / FOLDER / f"rank_{record.process.rank}").unlink()
        with contextlib.suppress(OSError):
            (folder / FOLDER).rmdir()
    return reports


def explain_killed_process(record: HeartbeatRecord, folder: Path) -> MemoryReport | None:
    """Return the report of a killed process; None if memory was not the reason.

    Memory was the reason if the kernel has counted a kill for memory since the start of the
    process, or if its memory was near the limit.

    Args:
        record: content of its heartbeat file.
        folder: its run folder, for the title.
    """
    from ..estimates.estimate import format_bytes

    process = record.process
    kills = count_oom_kills() - process.oom_kills
    is_near = process.limit_bytes > 0 and record.peak_bytes > NEAR_LIMIT * process.limit_bytes
    if kills <= 0 and not is_near:
        return None
    try:
        summary = MemorySummary(**json.loads(record.summary))
        if not all(isinstance(v, int) and 0 <= v < 2**63 for v in vars(summary).values()):
            summary = MemorySummary()
    except (ValueError, TypeError, RecursionError):
        summary = MemorySummary()
    gradients = summary.trainable
    # without an optimizer step there are no states yet
    states = summary.states if record.step or record.phase == PHASES[3] else 0
    # the last reading is older than the kill, at which the process had reached the limit
    has_limit = kills > 0 and process.limit_source.startswith("control group")
    peak = max(record.peak_bytes, process.limit_bytes if has_limit else 0)
    step_bytes = max(0, peak - summary.base - gradients - states)
    limit = format_bytes(process.limit_bytes)
    report = MemoryReport(
        f"{folder}: rank {process.rank} was killed in the {record.phase} of step "
        f"{record.step + 1}; its memory was {format_bytes(record.peak_bytes)} or more, the limit "
        f"{limit} ({process.limit_source})",
        {
            "parameters": summary.parameters,
            "gradients": gradients,
            "optimizer state": states,
            STEP: step_bytes,
            "process before the first step": summary.base,
            "peak": peak,
        },
        {"gradients": summary.trainable, "optimizer state": summary.states},
    )
    if kills > 0:
        report.notes.append(f"kills for memory in the control group since its start: {kills}")
    report.changes = list_changes(summary, step_bytes, record.phase)
    return report
