"""Extrapolate a simulated step from two and three equal blocks to all L of them.

    level(i, L) = level(1, 3) + (i - 1) * P + (L - 3) * B

    P = level(2, 3) - level(1, 3)     what a block before this one adds, such as its activations
    B = level(1, 3) - level(1, 2)     what any block adds, such as its parameters

`level(i, k)` are the bytes of a class at the start of the forward pass of block i, of k blocks; i
counts from 0. The backward pass has the same form, in the other order. All other moments, and all
sums over operations, are linear in k.

Blocks are equal if their submodules have the same classes, plain attributes and shapes.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .simulation import ParameterInfo, Simulation
from .tensor_tracker import CLASSES, Moment, TensorTracker

MIN_BLOCKS = 6  # simulating 2 and then 3 blocks costs as much as 5
SIMULATED_BLOCKS = (3, 2)
POSITION_WORDS = ("idx", "index", "layer_id", "layer_number")  # in names of attributes


@dataclass
class EqualBlocks:
    """The members of a list or dict of equal modules.

    Attributes:
        container: the module that holds the blocks.
        prefix: the name of the container, with a dot at its end.
        names: names of the blocks in the container, in order.
    """

    container: nn.Module
    prefix: str
    names: list[str]

    def keep(self, count: int) -> None:
        """Remove all blocks after the first `count`, in place."""
        for name in self.names[count:]:
            del self.container._modules[name]

    def blocks(self) -> list[nn.Module]:
        """Return the blocks that are not removed."""
        return list(self.container.children())

    def template(self, name: str) -> str:
        """Return the name of the parameter, in the first 3 blocks, that stands for `name`."""
        inside = name.removeprefix(self.prefix)
        block, _, remainder = inside.partition(".")
        if inside == name or block not in self.names:
            return name
        position = self.names.index(block)
        if position > 1:  # the last of 3 stands for the last one, and the second for all between
            position = 2 if position == len(self.names) - 1 else 1
        return f"{self.prefix}{self.names[position]}.{remainder}"


def find_equal_blocks(module: nn.Module) -> EqualBlocks | None:
    """Return the only list or dict of at least MIN_BLOCKS equal blocks; None without one."""
    results: list[EqualBlocks] = []

    def visit(parent: nn.Module, prefix: str) -> None:
        for name, child in parent.named_children():
            members = dict(child.named_children())
            is_list = isinstance(child, nn.ModuleList | nn.ModuleDict | nn.Sequential)
            if is_list and len(members) >= MIN_BLOCKS and _are_equal(list(members.values())):
                results.append(EqualBlocks(child, f"{prefix}{name}.", list(members)))
            else:
                visit(child, f"{prefix}{name}.")

    visit(module, "")
    return results[0] if len(results) == 1 else None


def _are_equal(blocks: list[nn.Module]) -> bool:
    first, *others = blocks
    expected = _signature(first)
    has_parameters = any(True for _ in first.parameters())
    return has_parameters and all(_signature(block) == expected for block in others)


def _signature(block: nn.Module) -> list[Any]:
    """Return what decides the operations of a block: classes, plain attributes and shapes."""
    signature: list[Any] = []
    for name, module in block.named_modules():
        attributes = sorted(
            (key, repr(value))
            for key, value in vars(module).items()
            if isinstance(value, int | float | str | tuple | type(None))
            and not any(word in key for word in POSITION_WORDS)
            and not key.startswith("_")
        )
        tensors = [
            (key, tuple(t.shape), t.dtype, t.requires_grad)
            for held in (module._parameters, module._buffers)
            for key, t in held.items()
            if t is not None
        ]
        signature.append((name, type(module), attributes, tensors))
    return signature


def watch_blocks(blocks: list[nn.Module], tracker: TensorTracker) -> None:
    """Mark the passes through blocks in the tracker.

    Tensor hooks mark the backward pass of a block: the gradient of its output is known then.
    """
    last = len(blocks) - 1

    def mark_gradient(values: Any, kind: str, index: int) -> None:
        for leaf in tree_leaves(values):
            if isinstance(leaf, Tensor) and leaf.requires_grad and not leaf.is_leaf:
                leaf.register_hook(lambda _: tracker.mark(kind, index))
                return

    def watch(block: nn.Module, index: int) -> None:
        def before(_: nn.Module, args: Any, kwargs: Any) -> None:
            if tracker.phase != "forward":
                return
            if index == 0:
                mark_gradient((args, kwargs), "backward end", 0)
            tracker.mark("forward", index)
            tracker.is_in_block = True

        def after(_: nn.Module, args: Any, output: Any) -> None:
            if tracker.phase != "forward":
                return
            tracker.is_in_block = tracker.is_split = False
            mark_gradient(output, "backward", index)
            if index == last:
                tracker.mark("end", index)

        block.register_forward_pre_hook(before, with_kwargs=True)
        block.register_forward_hook(after)

    for index, block in enumerate(blocks):
        watch(block, index)


def watch_splits(module: nn.Module, axes: dict[str, int], tracker: TensorTracker) -> None:
    """Note in the tracker what lies between matrices that tensor parallelism splits.

    Args:
        module: contains the matrices.
        axes: by name of a weight, the axis that is split: 0 ("colwise") begins, 1 ends.
        tracker: gets `is_split`.
    """
    for name, axis in axes.items():
        owner = name.removesuffix(".weight")
        if owner != name:
            module.get_submodule(owner).register_forward_pre_hook(_set_split(tracker, axis == 0))


def _set_split(tracker: TensorTracker, value: bool) -> Any:
    def before(*_: Any) -> None:
        tracker.is_split = value

    return before


def extrapolate(
    three: Simulation, two: Simulation, blocks: EqualBlocks, parameters: list[ParameterInfo]
) -> Simulation | None:
    """Return the simulation of all blocks; None if the two simulations have other passes.

    Args:
        three: with 3 blocks.
        two: with 2 blocks.
        blocks: with the names of all blocks.
        parameters: of the whole module, without states.
    """
    count = len(blocks.names)
    moments = _extrapolate_moments(three, two, count)
    if moments is None:
        return None
    states = {p.name: p.state for p in three.parameters}
    everything = [replace(p, state=states[blocks.template(p.name)]) for p in parameters]
    # states that belong to no parameter
    shared = [s.state_bytes - sum(p.state_bytes for p in s.parameters) for s in (three, two)]
    alternative = None
    if three.alternative is not None and two.alternative is not None:
        alternative = extrapolate(three.alternative, two.alternative, blocks, parameters)
    return replace(
        three,
        parameters=everything,
        state_bytes=sum(p.state_bytes for p in everything)
        + shared[0]
        + (count - 3) * (shared[0] - shared[1]),
        moments=moments,
        operations=[
            *(o._replace(count=count - 2) for o in three.operations),
            *(o._replace(count=3 - count) for o in two.operations),
        ],
        num_equal_blocks=count,
        alternative=alternative,
    )


Vector = tuple[int, ...]
Segment = tuple[str, int, list[Moment]]  # kind and block of the mark, and the moments after it


def _segments(simulation: Simulation) -> list[Segment]:
    marks = simulation.marks
    ends = [*(mark.moment for mark in marks[1:]), len(simulation.moments)]
    start = marks[0].moment if marks else len(simulation.moments)
    return [
        ("start", 0, simulation.moments[:start]),
        *(
            (mark.kind, mark.block, simulation.moments[mark.moment : end])
            for mark, end in zip(marks, ends, strict=True)
        ),
    ]


def _extrapolate_moments(three: Simulation, two: Simulation, count: int) -> list[Moment] | None:
    pairs = _pair(_segments(three), _segments(two))
    if pairs is None:
        return None
    moments: list[Moment] = []
    more = count - 3
    for index, (segment, partner) in enumerate(pairs):
        kind, block, results = segment
        if partner is not None:
            moments += _outside(results, partner[2], more)
            continue
        # the second of three blocks: the pass through the next one follows in either direction
        if index + 1 == len(pairs) or pairs[index + 1][0][0] != kind:
            return None
        (_, next_block, next_found), next_partner = pairs[index + 1]
        if next_partner is None or next_block == block:
            return None
        level, other_level = _vector(results[0]), _vector(next_found[0])
        if kind == "forward":
            by_position = _difference(other_level, level)
            by_block = _difference(level, _vector(next_partner[2][0]))
            order = range(1, count - 1)
        else:
            by_position = _difference(level, other_level)
            by_block = _difference(other_level, _vector(next_partner[2][0]))
            order = range(count - 2, 0, -1)
        for position in order:
            shift = [
                (position - 1) * p + more * b for p, b in zip(by_position, by_block, strict=True)
            ]
            moments += [_shifted(moment, shift) for moment in results]
    return moments


def _pair(three: list[Segment], two: list[Segment]) -> list[tuple[Segment, Segment | None]] | None:
    """Pair the segments of both simulations; those of the second of 3 blocks have no partner."""
    pairs: list[tuple[Segment, Segment | None]] = []
    partners = iter(two)
    has_blocks = False
    for segment in three:
        kind, block, _ = segment
        if block == 1:
            has_blocks = True
            pairs.append((segment, None))
            continue
        partner = next(partners, None)
        if partner is None or partner[:2] != (kind, min(block, 1)):
            return None
        pairs.append((segment, partner))
    return pairs if has_blocks and next(partners, None) is None else None


def _outside(three: list[Moment], two: list[Moment], more: int) -> Iterator[Moment]:
    """Yield the moments of a segment outside of the second block, with `more` blocks than 3."""
    if len(three) == len(two):
        for moment, other in zip(three, two, strict=True):
            shift = _difference(_vector(moment), _vector(other))
            yield _shifted(moment, [more * d for d in shift])
        return
    # a segment with other moments, such as optimizer steps one by one, moves as a whole
    shift = _difference(_vector(three[0]), _vector(two[0]))
    # an optimizer that joins the matrices of all blocks has more temporary tensors with each
    index = CLASSES.index("temporary")
    largest = max(moment.num_bytes[index] for moment in three)
    growth = max(0, largest - max(moment.num_bytes[index] for moment in two))
    for moment in three:
        added = [more * d for d in shift]
        if moment.phase == "step" and moment.num_bytes[index] == largest:
            added[index] += more * growth
        yield _shifted(moment, added)


def _vector(moment: Moment) -> Vector:
    return (*moment.num_bytes, moment.in_blocks, moment.split)


def _difference(a: Vector, b: Vector) -> Vector:
    return tuple(x - y for x, y in zip(a, b, strict=True))


def _shifted(moment: Moment, shift: list[int]) -> Moment:
    *num_bytes, in_blocks, split = (
        max(0, x + d) for x, d in zip(_vector(moment), shift, strict=True)
    )
    return Moment(moment.phase, tuple(num_bytes), in_blocks, split)
