"""ModuleTraits: what decides which strategies a module supports, and how they divide it."""

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from ravine.strategies.expert_parallel import find_experts
from ravine.strategies.parallel_module import find_unit_names
from ravine.strategies.pipeline_stages import PIPELINE_ATTRS
from ravine.strategies.tensor_parallel import ParameterSplit, find_splits


@dataclass
class ModuleTraits:
    """What decides which strategies a module supports, and how they divide it.

    Attributes:
        name: class of the module.
        units: names of the parameters of each FSDP unit.
        splits: by name of a parameter, how tensor parallelism splits it.
        has_plan: whether a network has a plan for tensor parallelism.
        can_split_sequence: whether the plan marks where sequences are split.
        block_of: by name of a parameter, the index of its pipeline block.
        num_blocks: blocks of a network that can be split into pipeline stages; 0 without one.
        first: names of the parameters that the first pipeline stage needs, beside its blocks.
        last: names of those that the last stage needs.
        num_experts: experts of a mixture; 0 without one.
        experts: names of the parameters of experts.
        supports_context: whether attention and positions can be set for context parallelism.
        has_dropout: whether a module draws random numbers.
        unsupported: axes that the module rejects.
    """

    name: str = "module"
    units: list[tuple[str, ...]] = field(default_factory=list)
    splits: dict[str, ParameterSplit] = field(default_factory=dict)
    has_plan: bool = False
    can_split_sequence: bool = False
    block_of: dict[str, int] = field(default_factory=dict)
    num_blocks: int = 0
    first: frozenset[str] = frozenset()
    last: frozenset[str] = frozenset()
    num_experts: int = 0
    experts: frozenset[str] = frozenset()
    supports_context: bool = False
    has_dropout: bool = False
    unsupported: tuple[str, ...] = ()

    def reason_against(self, degrees: dict[str, int], is_sequence_parallel: bool) -> str:
        """Return why the module cannot be divided like this; "" if it can.

        Args:
            degrees: the size of each axis.
            is_sequence_parallel: whether activations are split along the sequence.
        """
        for axis in self.unsupported:
            if degrees[axis] > 1:
                return f"{self.name} does not support {axis}"
        reasons = (
            self._against_tp(degrees["tp"], is_sequence_parallel),
            self._against_cp(degrees["cp"]),
            self._against_pp(degrees["pp"]),
            self._against_ep(degrees["ep"]),
        )
        return next(filter(None, reasons), "")

    def _against_tp(self, size: int, is_sequence_parallel: bool) -> str:
        if size == 1:
            return ""
        if not self.has_plan:
            return f"{self.name} has no tensor_parallel_plan()"
        if not self.splits:
            return "the tensor_parallel_plan() splits no matrix"
        for name, split in self.splits.items():
            if split.num_pieces % size:
                return f"tp={size} does not divide the {split.num_pieces} parts of {name}"
        if is_sequence_parallel and not self.can_split_sequence:
            return "the tensor_parallel_plan() does not mark where sequences are split"
        return ""

    def _against_cp(self, size: int) -> str:
        if size == 1:
            return ""
        if not self.supports_context:
            return "no modules with the attributes attention_fn and position_ids_override"
        if self.num_experts:
            return "experts need whole sequences"
        return "dropout" if self.has_dropout else ""

    def _against_pp(self, size: int) -> str:
        if size == 1:
            return ""
        if not self.num_blocks:
            return f"{self.name} has no network that can be split into stages"
        if self.num_blocks < size:
            return f"{self.num_blocks} blocks are fewer than {size} stages"
        return ""

    def _against_ep(self, size: int) -> str:
        if size == 1:
            return ""
        if not self.num_experts:
            return f"{self.name} has no mixture of experts"
        if self.num_experts % size:
            return f"ep={size} does not divide the {self.num_experts} experts"
        return ""


def describe_module(module: nn.Module) -> ModuleTraits:
    """Return how strategies can divide a module, with real, meta or fake parameters."""
    splits, can_split_sequence = find_splits(module)
    experts = find_experts(module)
    modules = list(module.modules())
    traits = ModuleTraits(
        name=type(module).__name__,
        units=find_unit_names(module),
        splits=splits,
        has_plan=any(callable(getattr(m, "tensor_parallel_plan", None)) for m in modules),
        can_split_sequence=can_split_sequence,
        num_experts=min((next(e.parameters()).shape[0] for e in experts), default=0),
        experts=_names_of(module, experts),
        supports_context=all(
            any(hasattr(m, name) for m in modules)
            for name in ("attention_fn", "position_ids_override")
        ),
        has_dropout=any(
            (isinstance(m, _DropoutNd) and m.p > 0) or _attention_dropout(m) for m in modules
        ),
        unsupported=tuple(getattr(module, "unsupported_parallelism", ())),
    )
    net: Any = next((m for m in modules if all(hasattr(m, n) for n in PIPELINE_ATTRS)), None)
    if net is not None:
        blocks = list(net.blocks.values())
        traits.num_blocks = len(blocks)
        for index, block in enumerate(blocks):
            traits.block_of |= dict.fromkeys(_names_of(module, [block]), index)
        first, last = net.stage_modules()
        traits.first = _names_of(module, [getattr(net, name) for name in first])
        traits.last = _names_of(module, [getattr(net, name) for name in last])
    return traits


def _names_of(module: nn.Module, submodules: Collection[nn.Module | None]) -> frozenset[str]:
    """Return the names, in `module`, of all parameters of some of its submodules."""
    ids = {
        id(p) for submodule in submodules if submodule is not None for p in submodule.parameters()
    }
    return frozenset(name for name, p in module.named_parameters() if id(p) in ids)


def _attention_dropout(module: nn.Module) -> bool:
    dropout = getattr(module, "dropout", 0)
    return hasattr(module, "attention_fn") and isinstance(dropout, float) and dropout > 0
