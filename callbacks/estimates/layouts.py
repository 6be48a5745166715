"""Memory and communication of one rank under each strategy, from the simulation of one process.

    P parameters   G gradients   S optimizer state   A activations   n data-parallel ranks

    ddp     P + G + S + A                              2 G
    zero1   P + (G + S) / n + A                        2 P
    zero2   P + (P + G + S) / n + A + buffers          P + G in each micro-batch
    zero3   (P + G + S) / n + two units + A + buffers  2 P + G in each micro-batch
    hsdp    zero3 over n / 2 ranks                     and 2 G / (n / 2) once a step
    tp, sp  split matrices / n                         8 A of a block

The bytes sent are for n large; a ring sends (n - 1) / n of them. A is that of each moment of the
simulated step, so that the result is the peak of the sum. A shard of a parameter has
ceil(rows / n) rows, as in FSDP2.
"""

import math
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ravine.strategies.device_mesh import MESH_AXES, resolve_degrees
from ravine.strategies.parallel_module import find_unit_names
from ravine.strategies.pipeline_stages import count_pipeline_blocks
from ravine.strategies.presets import STRATEGY_PRESETS
from ravine.strategies.tensor_parallel import ParameterSplit, find_splits
from ravine.strategies.work_partition import assign_balanced

from .simulation import ParameterInfo, Simulation
from .tensor_tracker import CLASSES, Moment

BUCKET_BYTES = 25 * 2**20  # of gradients in DDP and ZeRO-1
# fractions of a block's activations that tensor parallelism does not divide: inputs of norms and
# residuals, 10 of 34 bytes a number (Korthikanti et al., 2022, arXiv 2205.05198)
REPLICATED_FRACTION = 10 / 34


@dataclass(frozen=True)
class Ranks:
    """The ranks of a run: devices of a node, nodes, and the bytes/s that a rank sends."""

    devices: int = 1
    num_nodes: int = 1
    bandwidth: float = 450e9
    link: str = "nvlink"

    @property
    def size(self) -> int:
        """Return the number of ranks."""
        return self.devices * self.num_nodes


@dataclass
class ModuleTraits:
    """What decides which strategies a module supports, and how they divide it.

    Attributes:
        units: names of the parameters of each FSDP unit.
        splits: by name of a parameter, how tensor parallelism splits it.
        num_blocks: blocks of a network that can be split into pipeline stages; 0 without one.
        unsupported: axes that the module rejects.
        can_split_sequence: whether the plan for tp marks where sequences are split.
    """

    units: list[tuple[str, ...]] = field(default_factory=list)
    splits: dict[str, ParameterSplit] = field(default_factory=dict)
    num_blocks: int = 0
    unsupported: tuple[str, ...] = ()
    can_split_sequence: bool = False


@dataclass
class Layout:
    """One row of the table: a strategy on the ranks of a run.

    Attributes:
        name: name of the strategy.
        classes: bytes per rank at the peak, by class.
        sent_bytes: bytes that a rank sends in an optimizer step.
        collectives: number of collectives of an optimizer step, by kind.
        overlaps: whether they run during the backward pass.
        is_exact: whether shards are computed parameter by parameter; else activations are scaled.
        dp_size: data-parallel ranks, each with a batch of its own.
        compute_fraction: part of the FLOPs of a micro-batch that a rank computes.
    """

    name: str
    classes: dict[str, float]
    sent_bytes: float = 0.0
    collectives: dict[str, int] = field(default_factory=dict)
    overlaps: bool = True
    is_exact: bool = True
    dp_size: int = 1
    compute_fraction: float = 1.0

    @property
    def peak_bytes(self) -> float:
        """Return the bytes of all classes at the peak."""
        return sum(self.classes.values())


def shard_bytes(parameter: ParameterInfo, num_ranks: int, num_bytes: int | None = None) -> int:
    """Return the bytes of the largest shard of a parameter, with ceil(rows / n) rows.

    Args:
        parameter: the whole parameter.
        num_ranks: the ranks over which it is divided along its first axis.
        num_bytes: bytes of a tensor of the same shape, such as a state; by default its own.
    """
    size = parameter.num_bytes if num_bytes is None else num_bytes
    if num_ranks == 1 or not parameter.shape or not parameter.numel:
        return size
    rows = parameter.shape[0]
    return size // rows * math.ceil(rows / num_ranks)


def state_shard_bytes(parameter: ParameterInfo, num_ranks: int) -> int:
    """Return the bytes of the state of a shard; states of another shape stay whole."""
    return sum(
        shard_bytes(parameter, num_ranks, num_bytes) if shape == parameter.shape else num_bytes
        for shape, num_bytes in parameter.state
    )


def describe_module(module: nn.Module) -> ModuleTraits:
    """Return how strategies can divide a module, with real, meta or fake parameters."""
    splits, can_split_sequence = find_splits(module)
    return ModuleTraits(
        units=find_unit_names(module),
        splits=splits,
        num_blocks=count_pipeline_blocks(module),
        unsupported=tuple(getattr(module, "unsupported_parallelism", ())),
        can_split_sequence=can_split_sequence,
    )


class LayoutCalculator:
    """Computes the layouts of a run from its simulation in one process.

    Args:
        simulation: of one rank, whose micro-batch is that of data parallelism over all ranks.
        traits: of the module.
        ranks: the ranks of the run.
        is_half: whether matrix products use 16 bits (mixed precision).
        divides_batch: whether the datamodule divides a batch over the data-parallel ranks. So ranks
            that share one model get a larger micro-batch.
        is_on_gpu: whether the tensors of data sets are not on the device.
    """

    def __init__(
        self,
        simulation: Simulation,
        traits: ModuleTraits,
        ranks: Ranks,
        is_half: bool,
        divides_batch: bool,
        is_on_gpu: bool = False,
    ) -> None:
        """Sum up the parameters."""
        # data sets stay in the memory of the host
        self.moments = [_without_data(m) if is_on_gpu else m for m in simulation.moments]
        self.simulation, self.traits, self.ranks = simulation, traits, ranks
        self.is_half, self.divides_batch = is_half, divides_batch
        self.parameters = simulation.parameters
        self.trainable = [p for p in self.parameters if p.is_trainable]
        self.param_bytes = sum(p.num_bytes for p in self.parameters)
        self.gradient_bytes = sum(p.num_bytes for p in self.trainable)
        by_name = {p.name: p for p in self.parameters}
        self.unit_bytes = sorted(
            (
                sum(self._gathered_bytes(by_name[name]) for name in names if name in by_name)
                for names in traits.units
            ),
            reverse=True,
        )

    def _gathered_bytes(self, parameter: ParameterInfo) -> int:
        """Return the bytes of a gathered parameter: in half precision unless it is a vector."""
        is_cast = self.is_half and parameter.itemsize == 4 and len(parameter.shape) > 1
        return parameter.num_bytes // 2 if is_cast else parameter.num_bytes

    def all_layouts(self) -> list[Layout]:
        """Return the layouts that the module supports on these ranks, in the order to try them."""
        n = self.ranks.size
        if n == 1:
            return [self.single()]
        layouts = [self.ddp(), self.zero1(), self.zero2(n, 1), self.zero3(n, 1)]
        if n % 2 == 0 and n > 2:
            layouts.append(self.zero3(n // 2, 2))
        if self.traits.splits and "tp" not in self.traits.unsupported:
            size = self.ranks.devices
            if size > 1 and self._is_divisible_by(size):
                layouts.append(self.tensor_parallel(size))
                if self.traits.can_split_sequence:
                    layouts.append(self.tensor_parallel(size, sequence=True))
            if self.ranks.devices % 2 == 0 and n > 2 and self._is_divisible_by(2):
                layouts.append(self.tensor_parallel(2, shards=n // 2))
        if self.traits.num_blocks >= n and "pp" not in self.traits.unsupported:
            layouts.append(self.pipeline(n))
        return layouts

    def _is_divisible_by(self, size: int) -> bool:
        return all(split.num_pieces % size == 0 for split in self.traits.splits.values())

    def _peak(self, rescale: Any) -> dict[str, float]:
        """Return the classes of the highest moment, after `rescale(moment) -> {class: bytes}`."""
        return max((rescale(m) for m in self.moments), key=lambda c: sum(c.values()))

    def single(self) -> Layout:
        """One process, as simulated."""
        return Layout("single", self._peak(_classes_of))

    def ddp(self) -> Layout:
        """Every rank has everything, and gradients stay in the buckets that are all-reduced."""
        n = self.ranks.size

        def rescale(moment: Moment) -> dict[str, float]:
            return _classes_of(moment) | {"gradients": self.gradient_bytes}

        num_buckets = 1 + math.ceil(max(0, self.gradient_bytes - 2**20) / BUCKET_BYTES)
        sent_bytes = 2 * self.gradient_bytes * (n - 1) / n
        return Layout(
            "ddp",
            self._peak(rescale),
            sent_bytes,
            {"all_reduce": num_buckets},
            dp_size=n,
        )

    def zero1(self) -> Layout:
        """Each parameter has one owner, which alone keeps its gradient and optimizer state."""
        n = self.ranks.size
        owners = assign_balanced([p.numel for p in self.trainable], [0] * n)
        states, gradients = [0] * n, [0] * n
        for owner, parameter in zip(owners, self.trainable, strict=True):
            states[owner] += parameter.state_bytes
            gradients[owner] += parameter.num_bytes
        fraction = max(gradients) / max(1, self.gradient_bytes)
        accumulates = self.simulation.accumulate > 1

        def held_gradients(moment: Moment) -> float:
            """Return own gradients, those in buckets that are not full, and a message."""
            total = moment.of("gradients")
            if accumulates and moment.phase != "step":
                return total  # all gradients stay until the last micro-batch
            owned = total * fraction
            if moment.phase != "backward":
                return owned
            message = BUCKET_BYTES if total / n >= BUCKET_BYTES else 0
            return owned + min(total - owned, (n - 1) * BUCKET_BYTES) + message

        def rescale(moment: Moment) -> dict[str, float]:
            return _classes_of(moment) | {
                "gradients": held_gradients(moment),
                "optimizer state": max(states),
            }

        sent_bytes = 2 * self.gradient_bytes * (n - 1) / n
        num_messages = 2 * math.ceil(self.gradient_bytes / BUCKET_BYTES) * (n - 1)
        return Layout(
            "zero1",
            self._peak(rescale),
            sent_bytes,
            {"send": num_messages},
            dp_size=n,
        )

    def _sharded_classes(self, moment: Moment, num_shards: int) -> dict[str, float]:
        """Return the classes of a moment with parameters, gradients and states sharded."""
        gradients = sum(shard_bytes(p, num_shards) for p in self.trainable)
        parameters = sum(shard_bytes(p, num_shards) for p in self.parameters)
        states = sum(state_shard_bytes(p, num_shards) for p in self.trainable)
        fraction = gradients / max(1, self.gradient_bytes)
        return _classes_of(moment) | {
            "parameters": parameters,
            "gradients": moment.of("gradients") * fraction,
            "optimizer state": states,
            "copies": moment.of("copies") * parameters / max(1, self.param_bytes),
            "weight casts": 0.0,
        }

    def zero2(self, num_shards: int, num_replicas: int) -> Layout:
        """Gradients and states sharded; parameters are gathered until the backward pass."""
        gathered = sum(self.unit_bytes)
        buffers = 2 * (self.unit_bytes or [0])[0]

        def rescale(moment: Moment) -> dict[str, float]:
            in_pass = moment.phase in ("forward", "backward")
            return self._sharded_classes(moment, num_shards) | {
                "gathered": gathered * in_pass,
                "buffers": moment.of("buffers"),
                "communication": buffers * (moment.phase == "backward"),
            }

        n, accumulate = num_shards, self.simulation.accumulate
        sent_bytes = accumulate * (gathered + self.gradient_bytes) * (n - 1) / n
        count = len(self.unit_bytes) * accumulate
        return Layout(
            "zero2",
            self._peak(rescale),
            sent_bytes,
            {"all_gather": count, "reduce_scatter": count},
            dp_size=n * num_replicas,
        )

    def zero3(self, num_shards: int, num_replicas: int) -> Layout:
        """All sharded; two units are gathered at a time. With two replicas this is hsdp."""
        two_units = sum(self.unit_bytes[:2])
        buffers = 2 * (self.unit_bytes or [0])[0]

        def rescale(moment: Moment) -> dict[str, float]:
            in_pass = moment.phase in ("forward", "backward")
            return self._sharded_classes(moment, num_shards) | {
                "gathered": two_units * in_pass,
                "communication": buffers * (moment.phase == "backward"),
            }

        n, accumulate = num_shards, self.simulation.accumulate
        gathered = sum(self.unit_bytes)
        sent_bytes = accumulate * (2 * gathered + self.gradient_bytes) * (n - 1) / n
        count = len(self.unit_bytes)
        collectives = {"all_gather": 2 * count * accumulate, "reduce_scatter": count * accumulate}
        name = "zero3"
        if num_replicas > 1:
            name, collectives["all_reduce"] = "hsdp", count
            sent_bytes += 2 * self.gradient_bytes / n * (num_replicas - 1) / num_replicas
        return Layout(
            name,
            self._peak(rescale),
            sent_bytes,
            collectives,
            dp_size=n * num_replicas,
        )

    def tensor_parallel(self, size: int, sequence: bool = False, shards: int = 0) -> Layout:
        """Matrices of the plan split over `size` ranks, and ZeRO-3 over `shards` of these groups.

        Without `shards`, further groups of ranks are replicas (on several nodes).
        """
        num_groups = self.ranks.size // size
        num_shards = max(1, shards)
        kept = 1.0 if not sequence else 0.0  # what is not split of the activations of a block
        fraction = REPLICATED_FRACTION * kept + (1 - REPLICATED_FRACTION * kept) / size
        rows = size if self.divides_batch else 1  # the micro-batch of fewer data-parallel ranks

        def shard_size(parameter: ParameterInfo, num_bytes: int | None = None) -> float:
            divisor = size if parameter.name in self.traits.splits else 1
            return shard_bytes(parameter, num_shards, num_bytes) / divisor

        parameters = sum(map(shard_size, self.parameters))
        gradients = sum(map(shard_size, self.trainable))
        states = sum(
            shard_size(p, num_bytes) if shape == p.shape else num_bytes
            for p in self.trainable
            for shape, num_bytes in p.state
        )
        gathered = sum(self.unit_bytes[:2]) / size if shards else 0.0

        def rescale(moment: Moment) -> dict[str, float]:
            ratio = parameters / max(1, self.param_bytes)
            in_pass = moment.phase in ("forward", "backward")
            return _classes_of(moment) | {
                "parameters": parameters,
                "gradients": moment.of("gradients") * gradients / max(1, self.gradient_bytes),
                "optimizer state": states,
                "copies": moment.of("copies") * ratio,
                "weight casts": 0.0 if shards else moment.of("weight casts") * ratio,
                "activations": moment.of("activations") * fraction * rows,
                "temporary": moment.of("temporary") * rows,
                "batch": moment.of("batch") * rows,
                "gathered": gathered * in_pass,
            }

        name = "2d" if shards else "sp" if sequence else "tp"
        width = self._width()
        itemsize = 2 if self.is_half else 4
        message = self.simulation.units * rows * width * itemsize
        num_blocks = max(1, self.traits.num_blocks)
        accumulate = self.simulation.accumulate
        sent_bytes = 8 * num_blocks * message * (size - 1) / size * accumulate
        count = 4 * num_blocks * accumulate
        collectives = {"all_reduce": count}
        if sequence:
            collectives = {"all_gather": count + 2, "reduce_scatter": count}
        return Layout(
            name,
            self._peak(rescale),
            sent_bytes,
            collectives,
            overlaps=False,
            is_exact=False,
            dp_size=num_groups,
            compute_fraction=1 / size * rows,
        )

    def _width(self) -> int:
        """Return the width of the activations between split matrices."""
        shapes = {p.name: p.shape for p in self.parameters}
        matrices = [shapes[n] for n, split in self.traits.splits.items() if split.axis == 0]
        widths = [shape[1] for shape in matrices if len(shape) > 1]
        return widths[0] if widths else 1

    def pipeline(self, size: int, num_micro_batches: int = 4) -> Layout:
        """Blocks divided over `size` stages; a stage keeps some micro-batches in flight."""
        in_block = sum(
            p.num_bytes for p in self.parameters if ".blocks." in f".{p.name}"
        )  # the rest is at the first and last stage
        outside = self.param_bytes - in_block
        num_blocks = self.traits.num_blocks
        of_stage = in_block * math.ceil(num_blocks / size) / max(1, num_blocks) + outside
        fraction = of_stage / max(1, self.param_bytes)
        rows = size if self.divides_batch else 1
        in_flight = min(size, num_micro_batches) / num_micro_batches * rows / size

        def rescale(moment: Moment) -> dict[str, float]:
            classes = _classes_of(moment)
            for name in ("parameters", "gradients", "optimizer state", "copies", "weight casts"):
                classes[name] *= fraction
            classes["gradients"] = self.gradient_bytes * fraction
            classes["activations"] *= in_flight
            classes["temporary"] *= in_flight
            return classes

        accumulate = self.simulation.accumulate
        width = self._width()
        message = self.simulation.units * rows * width * (2 if self.is_half else 4)
        return Layout(
            "pp",
            self._peak(rescale),
            2 * message * accumulate,
            {"send": 2 * num_micro_batches * accumulate},
            overlaps=False,
            is_exact=False,
            dp_size=self.ranks.size // size,
            # a pipeline waits (p - 1) / m of the time
            compute_fraction=rows / size * (1 + (size - 1) / num_micro_batches),
        )


def _without_data(moment: Moment) -> Moment:
    index = CLASSES.index("data")
    return Moment(
        moment.phase, tuple(0 if i == index else n for i, n in enumerate(moment.num_bytes))
    )


def _classes_of(moment: Moment) -> dict[str, float]:
    return dict(zip(CLASSES, map(float, moment.num_bytes), strict=True))


def check_divisible(name: str, ranks: Ranks) -> None:
    """Raise UsageError if a preset's axes do not divide the ranks of the run."""
    if name in STRATEGY_PRESETS:
        _, arguments = STRATEGY_PRESETS[name]
        axes = {axis: size for axis, size in arguments.items() if axis in (*MESH_AXES, "ep")}
        resolve_degrees({"dp_shard": -1} | axes, ranks.size)
