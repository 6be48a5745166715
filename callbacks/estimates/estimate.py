"""Estimate: the result of an estimate, as tables, as JSON and as attributes."""

import io
import json
import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from rich.console import Console, Group
from rich.table import Table

from ravine.strategies.presets import STRATEGY_PRESETS

from ..monitoring.progress import format_duration
from .devices import GIB, Device
from .layouts import SCALED_CLASSES, Layout, LayoutCalculator, MeshPlan, Ranks
from .module_traits import ModuleTraits
from .simulation import Simulation
from .step_time import NO_COST, Cost, StepTime, list_assumptions, step_time
from .tensor_tracker import CLASSES

MIB = 2**20
# memory of a GPU beside the tensors of a run
RESERVED = {
    "CUDA context and kernels": 0.5 * GIB,
    "cuBLAS workspace": 32 * MIB,
}
NCCL_BYTES = 0.25 * GIB  # buffers of NCCL, with several ranks
FRAGMENTATION = 0.05  # of activations and temporary tensors, in the allocator
MIN_SHOWN = 5e-4  # GiB or MiB in a table
COLUMNS = {  # of the table of layouts, with the classes of each
    "params": ("parameters", "gathered", "weight casts"),
    "grads": ("gradients",),
    "states": ("optimizer state",),
    "act": ("activations",),
    "temp": ("temporary", "communication"),
    "other": ("buffers", "copies", "batch", "data"),
}
# without a plan for the module: tried first, without and with activation checkpointing
SHARDING = ("single", "ddp", "zero1", "zero2", "zero3")


@dataclass
class Row:
    """A layout with what follows from the device: whether it fits, time, largest micro-batch.

    Attributes:
        layout: memory and communication of a rank.
        reserved: bytes beside the tensors, by what takes them.
        fits: whether the device has this memory; None without a device.
        largest_micro_batch: samples of the largest micro-batch that fits.
        time: of a step and of the run.
        alternative: the same with activation checkpointing, or without it if the run has it.
    """

    layout: Layout
    reserved: dict[str, float]
    fits: bool | None = None
    largest_micro_batch: int | None = None
    time: StepTime | None = None
    alternative: "Row | None" = None

    @property
    def name(self) -> str:
        """Return the name of the strategy."""
        return self.layout.name

    @property
    def total_bytes(self) -> float:
        """Return the bytes of a rank, with those that the libraries reserve."""
        return self.layout.peak_bytes + sum(self.reserved.values())


@dataclass(frozen=True)
class Choice:
    """What to run: a layout, and changes of the run that it needs.

    Attributes:
        row: the layout.
        recomputes: whether to add activation checkpointing.
        accumulate: micro-batches of a step; None: those of the run.
    """

    row: Row
    recomputes: bool = False
    accumulate: int | None = None

    def arguments(self) -> dict[str, Any]:
        """Return arguments of a Trainer: `strategy`, options of the strategy, and others."""
        if self.row.name == "single":
            values: dict[str, Any] = {}
        else:
            plan = self.row.layout.plan
            values = {"strategy": plan.preset if plan is not None else self.row.name}
            if plan is not None:
                values |= {f"strategy.{name}": value for name, value in plan.overrides.items()}
        if self.recomputes:
            values["callbacks"] = "ActivationCheckpointing"
        if self.accumulate is not None:
            values["accumulate_grad_batches"] = self.accumulate
        return values


@dataclass
class Estimate:
    """Memory, FLOPs, communication and time of a run; `print` shows them as tables.

    Attributes:
        simulation: of one process.
        rows: the layouts, in the order in which to try them.
        ranks: the ranks of the run.
        device: the GPU; None without one.
        precision: of the run.
        configured: the name of the strategy in the config.
        notes: further lines below the tables.
        reasons: by the name of a strategy that is not possible, why not.
        rejected: the strategies of these that `fit` rejects; the others have no row of their own.
        divides_batch: whether the datamodule keeps the batch of a step for any micro-batch.
        cost: price and power of a device.
    """

    simulation: Simulation
    rows: list[Row]
    ranks: Ranks
    device: Device | None
    precision: str
    configured: str = "auto"
    notes: list[str] = field(default_factory=list)
    reasons: dict[str, str] = field(default_factory=dict)
    rejected: frozenset[str] = frozenset()
    divides_batch: bool = False
    cost: Cost = NO_COST

    @property
    def peak_bytes(self) -> int:
        """Return the peak of the tensors in one process without a strategy."""
        return self.simulation.peak.total

    @property
    def num_parameters(self) -> int:
        """Return the number of parameters, trainable and frozen."""
        return sum(p.numel for p in self.simulation.parameters)

    @property
    def num_trainable(self) -> int:
        """Return the number of trainable parameters."""
        return sum(p.numel for p in self.simulation.parameters if p.is_trainable)

    @property
    def state_bytes(self) -> int:
        """Return the bytes of the state of all optimizers."""
        return self.simulation.state_bytes

    @property
    def flops_per_step(self) -> int:
        """Return the FLOPs of an optimizer step over all ranks, counted."""
        return self.simulation.flops * self.simulation.accumulate * self.ranks.size

    @property
    def choice(self) -> "Choice | None":
        """Return what to run, by the order of docs/parallelism.md; None if nothing fits.

        First the layouts of SHARDING without a change, then the same with activation
        checkpointing, then all others, each without and with it, and last smaller micro-batches in
        the same order. Without a device it is the configured layout.
        """
        if self.device is None:
            named = [row for row in self.rows if row.name == self.configured]
            return Choice((named or self.rows)[0])
        possible = self._variants()
        for choice in possible:
            if choice.row.fits:
                return replace(choice, accumulate=self._accumulate(choice.row))
        for choice in possible:
            accumulate = self._accumulate(choice.row)
            if accumulate is not None:
                return replace(choice, accumulate=accumulate)
        return None

    @property
    def fastest(self) -> "Choice | None":
        """Return the layout that fits with the shortest step; None without times."""
        timed = [
            (choice.row.time.seconds, index, choice)
            for index, choice in enumerate(self._variants())
            if choice.row.fits and choice.row.time is not None
        ]
        return min(timed)[2] if timed else None

    @property
    def has_faster(self) -> bool:
        """Return whether a layout that fits is faster than the recommended one, by over 5 %."""
        if self.choice is None or self.fastest is None or self.choice.row.time is None:
            return False
        assert self.fastest.row.time is not None
        return self.fastest.row.time.seconds < 0.95 * self.choice.row.time.seconds

    def _variants(self) -> "list[Choice]":
        """Return all layouts, without and with activation checkpointing, in the order to try."""
        variants = [(row, False) for row in self.rows if row.name in SHARDING]
        variants += [(row, True) for row in self.rows if row.name in SHARDING]
        others = [row for row in self.rows if row.name not in SHARDING]
        variants += [(row, changed) for row in others for changed in (False, True)]
        possible = []
        for row, changed in variants:
            used = row.alternative if changed else row
            # with checkpointing switched off a layout needs more
            if used is not None and not (changed and self.simulation.is_recomputed):
                possible.append(Choice(used, changed))
        return possible

    def _accumulate(self, row: Row) -> int | None:
        """Return the fewest micro-batches of a step that fit, if that changes the run."""
        largest, result = row.largest_micro_batch, self.simulation
        if not largest or not self.divides_batch:
            return None
        total = result.samples * result.accumulate * row.layout.rows  # of a rank in a step
        fitting = [k for k in range(1, total + 1) if total % k == 0 and total // k <= largest]
        return fitting[0] if fitting[0] != result.accumulate else None

    @property
    def best(self) -> Row | None:
        """Return the recommended layout; None if none fits."""
        return None if self.choice is None else self.choice.row

    def to_dict(self) -> dict[str, Any]:
        """Return all results as plain values."""
        result = self.simulation
        kinds = {
            kind: sum(p.numel for p in result.parameters if p.kind == kind)
            for kind in dict.fromkeys(p.kind for p in result.parameters)
        }
        return {
            "parameters": {
                "all": self.num_parameters,
                "trainable": self.num_trainable,
                "frozen": self.num_parameters - self.num_trainable,
                "by_kind": kinds,
            },
            "flops": {
                "per_unit": self._per_unit(result.flops),
                "per_unit_by_formula": result.flops_per_unit,
                "per_step": self.flops_per_step if result.is_stepped else None,
                "optimizers": result.optimizer_flops,
            },
            "batch": {
                "unit": result.unit,
                "samples": result.samples,
                "units": result.units,
                "accumulate": result.accumulate,
                "ranks": self.ranks.size,
            },
            "bytes": {
                "parameters": sum(p.num_bytes for p in result.parameters),
                "gradients": sum(p.num_bytes for p in result.parameters if p.is_trainable),
                "optimizer_state": result.state_bytes,
                "buffers": result.buffer_bytes,
                "peak": self.peak_bytes,
            },
            "precision": self.precision,
            "total_steps": result.total_steps,
            "device": None if self.device is None else asdict(self.device),
            "recomputed": result.is_recomputed,
            "layouts": [self._row_to_dict(row) for row in self.rows],
            "not_possible": self.reasons,
            "recommended": None if self.best is None else self.best.name,
            "recommended_arguments": None if self.choice is None else self.choice.arguments(),
            "assumptions": self.assumptions(),
        }

    def _row_to_dict(self, row: Row) -> dict[str, Any]:
        return {
            "name": row.name,
            "fits": row.fits,
            "bytes": {name: round(size) for name, size in row.layout.classes.items()},
            "peak": round(row.layout.peak_bytes),
            "reserved": {name: round(size) for name, size in row.reserved.items()},
            "sent_bytes": round(row.layout.sent_bytes),
            "collectives": row.layout.collectives,
            "is_exact": row.layout.is_exact,
            "largest_micro_batch": row.largest_micro_batch,
            "time": None if row.time is None else asdict(row.time),
            "alternative": None if row.alternative is None else self._row_to_dict(row.alternative),
        }

    def to_json(self) -> str:
        """Return all results as JSON."""
        return json.dumps(self.to_dict(), indent=2)

    def _per_unit(self, flops: int) -> float | None:
        is_known = self.simulation.is_stepped and self.simulation.units
        return flops / self.simulation.units if is_known else None

    def assumptions(self) -> list[str]:
        """Return the assumptions behind the numbers, one a line."""
        result = self.simulation
        lines = list(self.notes)
        if result.is_stepped:
            lines.append(
                f"a micro-batch of {result.samples} samples ({result.units:,} {result.unit}) on "
                f"a rank, {result.accumulate} of them in a step; precision {self.precision}"
            )
        if result.num_equal_blocks:
            lines.append(
                f"two and three blocks were simulated, and extrapolated to "
                f"{result.num_equal_blocks}"
            )
        if not result.is_stepped:
            lines.append("activations are not included: no forward pass was simulated")
        if result.has_values:
            lines.append("measured: real steps in this process, on the CPU")
        if self.device is None:
            return [*lines, "tensors only; name a GPU for libraries, times and what fits"]
        lines += list_assumptions(self.device, self.ranks, self.is_half)
        lines += self.cost.assumptions(self.ranks.size)
        names = ", ".join(
            f"{name} {size / GIB:.2f} GiB" for name, size in self.rows[0].reserved.items()
        )
        return [*lines, f"beside the tensors: {names}"]

    @property
    def is_half(self) -> bool:
        """Return whether matrix products use 16 bits."""
        return "16" in self.precision

    def __rich__(self) -> Group:
        """Return the tables, what to pass to Trainer, and the assumptions."""
        return self.render(self._advice())

    def render(self, advice: str) -> Group:
        """Return the tables with a line of advice, and the assumptions.

        Args:
            advice: what to pass or to type; "" for no line.
        """
        lines = [advice] if advice else []
        if any(not row.layout.is_exact for row in self.rows):
            lines.append("~ activations by formula, not simulated")
        lines += [f"not possible: {name}: {reason}" for name, reason in self.reasons.items()]
        lines += [f"- {line}" for line in self.assumptions()]
        tables = [self._model_table(), self._layout_table()]
        if self.device is not None:
            tables.append(self._run_table())
        return Group(*tables, *lines)

    def _advice(self) -> str:
        """Return the arguments of Trainer for the recommended layout, or what to change."""
        if self.device is None:
            return ""
        if self.best is None:
            return f"{self.shortage()}: use {'; or '.join(self.remedies())}"
        assert self.choice is not None
        text = f"recommended: {self.best.name}" + format_trainer_arguments(self.choice.arguments())
        if self.has_faster:
            assert self.fastest is not None
            faster = self.fastest
            text += f"\nfastest that fits: {faster.row.name}"
            text += format_trainer_arguments(faster.arguments())
        return text

    def shortage(self) -> str:
        """Return which class has the most bytes of the smallest layout, if none fits."""
        smallest, name = self._largest_class()
        size = smallest.layout.classes[name] / GIB
        return f"no layout fits; the smallest is {smallest.name}, with {size:.2f} GiB of {name}"

    def remedies(self) -> list[str]:
        """Return what makes the largest class smaller, as arguments of a Trainer."""
        if self._largest_class()[1] in SCALED_CLASSES:
            accumulate = 2 * self.simulation.accumulate
            return ["ActivationCheckpointing()", f"accumulate_grad_batches={accumulate}"]
        return [f"devices={2 * self.ranks.devices}", "LoRA()"]

    def _largest_class(self) -> tuple[Row, str]:
        smallest = min(self.rows, key=lambda row: row.total_bytes)
        classes = smallest.layout.classes
        return smallest, max(classes, key=lambda name: classes[name])

    def _model_table(self) -> Table:
        table = Table("", "", title="one process")
        result = self.simulation
        values = self.to_dict()
        frozen = values["parameters"]["frozen"]
        table.add_row("parameters", f"{self.num_parameters:,}")
        for kind, count in values["parameters"]["by_kind"].items():
            table.add_row(f"  {kind}", f"{count:,}")
        table.add_row("  trainable, frozen", f"{self.num_trainable:,}, {frozen:,}")
        if result.is_stepped:
            per_unit = values["flops"]["per_unit"]
            unit = result.unit.removesuffix("s")
            counted = "-" if per_unit is None else f"{per_unit:.4g}"
            table.add_row(f"FLOPs of a {unit}, counted", counted)
        if result.flops_per_unit is not None:
            table.add_row(
                f"FLOPs of a {result.unit.removesuffix('s')}, by formula",
                f"{result.flops_per_unit:.4g}",
            )
        if result.is_stepped:
            table.add_row("FLOPs of a step, all ranks", f"{self.flops_per_step:.4g}")
            if result.optimizer_flops:
                table.add_row("FLOPs of the optimizers", f"{result.optimizer_flops:.4g}")
        for name in ("parameters", "gradients", "optimizer_state", "buffers"):
            table.add_row(f"bytes of {name.replace('_', ' ')}", format_bytes(values["bytes"][name]))
        if result.is_stepped:
            peak = result.peak
            table.add_row("peak of a step", format_bytes(peak.total))
            for name, size in sorted(
                zip(CLASSES, peak.num_bytes, strict=True), key=lambda pair: -pair[1]
            ):
                if size:
                    table.add_row(f"  {name}", format_bytes(size))
        if result.total_steps is not None:
            table.add_row("optimizer steps of the run", f"{result.total_steps:,}")
        return table

    def _layout_table(self) -> Table:
        largest = max(row.total_bytes for row in self.rows)
        size, unit = (GIB, "GiB") if largest >= GIB else (MIB, "MiB")
        title = f"{self.ranks.size} ranks: {unit} of a rank at its peak"
        if self.ranks.size == 1:
            title = f"1 rank: {unit} at its peak"
        has_other = any(row.alternative is not None for row in self.rows)
        columns = [*COLUMNS, "peak"]
        columns += ["stored" if self.simulation.is_recomputed else "recomputed"] * has_other
        columns += ["sent", "messages"] if self.ranks.size > 1 else []
        table = Table("layout", *columns, title=title)
        for row in self.rows:
            classes, mark = row.layout.classes, "" if row.layout.is_exact else "~"
            cells = [row.name]
            for names in COLUMNS.values():
                value = sum(classes.get(name, 0.0) for name in names) / size
                cells.append(f"{value:,.4g}" if value >= MIN_SHOWN else "-")
            peaks = [row.layout.peak_bytes]
            peaks += [row.alternative.layout.peak_bytes] if row.alternative is not None else []
            cells += [f"{mark}{peak / size:,.4g}" for peak in peaks]
            if self.ranks.size > 1:
                messages = sum(row.layout.collectives.values())
                cells += [format_bytes(row.layout.sent_bytes), f"{messages:,}"]
            table.add_row(*cells)
        return table

    def _run_table(self) -> Table:
        table = Table(title="memory limit and time")
        columns = ["layout", "with libraries", "fits", "max batch"]
        has_time = any(row.time is not None for row in self.rows)
        if has_time:
            columns += ["step", f"{self.simulation.unit}/s", "MFU", "run"]
            columns += ["kWh"] if self.cost.watts is not None else []
            columns += ["price"] if self.cost.price_per_hour is not None else []
        for column in columns:
            table.add_column(column, no_wrap=True)
        for row in self.rows:
            cells = [row.name, format_bytes(row.total_bytes), self._fit_text(row)]
            cells.append(_batch_text(row))
            if row.time is not None:
                run = "-" if row.time.total_s is None else format_duration(row.time.total_s)
                cells += [f"{row.time.seconds:.3g} s", f"{row.time.units_per_s:,.0f}"]
                cells += [f"{row.time.mfu:.1%}", run]
                if self.cost.watts is not None:
                    cells.append(_number_text(row.time.energy_kwh))
                if self.cost.price_per_hour is not None:
                    cells.append(_number_text(row.time.price))
            table.add_row(*cells)
        return table

    def _fit_text(self, row: Row) -> str:
        """Return whether a layout fits, or would with the other mode of checkpointing."""
        if row.fits:
            return "yes"
        if row.alternative is not None and row.alternative.fits:
            return "stored" if self.simulation.is_recomputed else "recomputed"
        return "no"

    def __str__(self) -> str:
        """Return the tables as text."""
        console = Console(file=io.StringIO(), width=120)
        console.print(self)
        return str(console.file.getvalue())  # type: ignore[attr-defined]


def _batch_text(row: Row) -> str:
    """Return the largest micro-batch, as configured and with the other mode of checkpointing."""
    numbers = [row.largest_micro_batch]
    numbers += [] if row.alternative is None else [row.alternative.largest_micro_batch]
    return " / ".join("-" if number is None else f"{number:,}" for number in numbers)


def _number_text(value: float | None) -> str:
    return "-" if value is None else f"{value:,.4g}"


def format_trainer_arguments(arguments: dict[str, Any]) -> str:
    """Return arguments of a Trainer as Python code, each after a comma; "" for none."""
    values = dict(arguments)
    options = {n: values.pop(n) for n in list(values) if n.startswith("strategy.")}
    texts = []
    if options:  # arguments of the class, with the axes of its preset
        preset = dict(STRATEGY_PRESETS[values.pop("strategy")][1])
        preset |= {name.removeprefix("strategy."): value for name, value in options.items()}
        inside = ", ".join(f"{name}={value!r}" for name, value in preset.items())
        texts.append(f"strategy=MeshStrategy({inside})")
    for name, value in values.items():
        texts.append(f"callbacks=[{value}()]" if name == "callbacks" else f"{name}={value!r}")
    return "".join(f", {text}" for text in texts)


def format_bytes(size: float) -> str:
    """Return a size in bytes with a unit: 512 B, 1.5 KiB, 3.25 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            return f"{size:,.0f} B" if unit == "B" else f"{size:,.4g} {unit}"
        size /= 1024
    raise AssertionError("unreachable")


def make_estimate(
    simulation: Simulation,
    traits: ModuleTraits,
    ranks: Ranks,
    device: Device | None,
    configured: str,
    precision: str,
    divides_batch: bool = False,
    configured_axes: MeshPlan | None = None,
    cost: Cost = NO_COST,
) -> Estimate:
    """Compute layouts, times and what fits from a simulation.

    Args:
        simulation: of one rank.
        traits: what decides the layouts that the module supports.
        ranks: the ranks of the run.
        device: the GPU; None: no times.
        configured: the strategy of the config.
        precision: of the run.
        divides_batch: whether the datamodule divides its batch over the data-parallel ranks.
        configured_axes: those of the run, if its strategy is an object.
        cost: price and power of a device.
    """
    is_half = "16" in precision

    def make_rows(step: Simulation) -> tuple[list[Row], LayoutCalculator]:
        calculator = LayoutCalculator(
            step, traits, ranks, is_half, divides_batch, device is not None, configured_axes
        )
        rows = []
        for layout in calculator.all_layouts():
            reserved: dict[str, float] = {}
            row = Row(layout, reserved)
            if device is not None:
                reserved |= RESERVED | ({"NCCL buffers": NCCL_BYTES} if ranks.size > 1 else {})
                scaled = sum(layout.classes.get(name, 0.0) for name in SCALED_CLASSES)
                reserved["fragmentation"] = FRAGMENTATION * scaled
                row.fits = row.total_bytes <= device.memory_bytes
                row.time = step_time(step, layout, ranks, device, is_half, cost)
                row.largest_micro_batch = largest_micro_batch(step, row, device)
            rows.append(row)
        return rows, calculator

    rows, calculator = make_rows(simulation)
    if simulation.alternative is not None:
        for row, other in zip(rows, make_rows(simulation.alternative)[0], strict=True):
            row.alternative = other
    return Estimate(
        simulation,
        rows,
        ranks,
        device,
        precision,
        configured,
        reasons=calculator.reasons,
        rejected=frozenset(calculator.rejected),
        divides_batch=divides_batch,
        cost=cost,
    )


def largest_micro_batch(simulation: Simulation, row: Row, device: Device) -> int | None:
    """Return the largest number of samples of a micro-batch that fits; 0 if none does.

    Activations, temporary tensors and the batch are taken as proportional to the micro-batch.
    """
    if not simulation.samples or not math.isfinite(device.memory_bytes):
        return None
    reserved = sum(size for name, size in row.reserved.items() if name != "fragmentation")
    free = device.memory_bytes - reserved
    ratios = [
        (free - fixed) / (scaled * (1 + FRAGMENTATION))
        for fixed, scaled in row.layout.levels
        if scaled > 0
    ]
    if not ratios or any(fixed > free for fixed, _ in row.layout.levels):
        return 0 if row.layout.levels else None
    return max(0, math.floor(min(ratios) * simulation.samples * row.layout.rows))
