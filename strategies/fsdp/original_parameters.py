"""References to the parameters from before sharding, replaced by the sharded ones.

fully_shard replaces each parameter of a module by another tensor. An optimizer that was built in
`__init__`, or a list of weights that the module keeps, would still have the old tensors, which
nothing trains. The tensors are matched by identity, never by shape or order.
"""

import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from ravine.errors import UsageError

DEPTH = 3  # of lists and dicts within each other


class OriginalParameters:
    """The parameters of a module by identity, without keeping them alive.

    originals = OriginalParameters(module)      # before fully_shard
    originals.update_references()               # after it
    originals.update_optimizer(optimizer)
    """

    def __init__(self, module: nn.Module) -> None:
        """Remember the name of each parameter by its id."""
        self.module = module
        self._name: dict[int, str] = {}
        self._original: dict[int, weakref.ref[Tensor]] = {}
        self.hooks: dict[str, Any] = {}  # of Tensor.register_hook
        self.attributes: dict[str, dict[str, Any]] = {}  # set by the module's code
        self._alias: dict[int, tuple[weakref.ref[Tensor], str]] = {}
        for name, parameter in module.named_parameters():
            if isinstance(parameter, DTensor):  # of a fit before this one: nothing replaces it
                continue
            self._name[id(parameter)] = name
            self._original[id(parameter)] = weakref.ref(parameter)
            if parameter._backward_hooks:
                self.hooks[name] = parameter._backward_hooks
            if vars(parameter):
                self.attributes[name] = dict(vars(parameter))
            if getattr(parameter, "_post_accumulate_grad_hooks", None):
                raise UsageError(
                    f"{type(module).__name__}: {name} has a hook of "
                    "register_post_accumulate_grad_hook, and gradients of sharded parameters are "
                    "accumulated in gathered copies; allowed: Tensor.register_hook, "
                    "on_after_backward; type --trainer.strategy ddp"
                )
        self._now: dict[str, Tensor] = {}
        for place, tensor, name in views_of_parameters(module):
            parameter = dict(module.named_parameters())[name]
            if tensor.shape != parameter.shape or tensor.stride() != parameter.stride():
                raise UsageError(
                    f"{type(module).__name__}: {place} is a view of the parameter {name}, which "
                    "sharding replaces; allowed: a view that is taken when it is used; type "
                    f"{name} there, or --trainer.strategy ddp"
                )
            self._alias[id(tensor)] = weakref.ref(tensor), name

    def replacement(self, tensor: Any) -> Tensor | None:
        """The sharded parameter for one from before sharding; None for any other object."""
        alias, name = self._alias.get(id(tensor), (None, ""))
        if alias is not None and alias() is tensor:
            from .sharded_parameter import marked  # it imports what imports this file

            return marked(self._now[name].detach())
        known = self._original.get(id(tensor))
        if known is None or known() is not tensor:
            return None
        now = self._now.get(self._name[id(tensor)])
        return None if now is tensor else now

    def update_references(self) -> None:
        """Put sharded parameters into attributes, lists and dicts of the modules."""
        self._now = dict(self.module.named_parameters())
        for parameter in self._now.values():  # torch moves no tensor that has a weak reference
            if self._name.pop(id(parameter), None) is not None:
                del self._original[id(parameter)]
        for module in self.module.modules():
            for name, value in list(vars(module).items()):
                if name in ("_parameters", "_modules", "_buffers") or isinstance(value, nn.Module):
                    continue
                if isinstance(value, Tensor):
                    if (now := self.replacement(value)) is not None:
                        vars(module)[name] = now
                elif isinstance(value, list | tuple | dict):
                    vars(module)[name] = self._updated(value, DEPTH)

    def copy_attributes(self) -> None:
        """Set on sharded parameters what the module's code has set on those from before."""
        now = dict(self.module.named_parameters()) if self.attributes else {}
        for name, attributes in self.attributes.items():
            if name in now:  # a stage of a pipeline has some of them
                vars(now[name]).update(attributes)

    def kept_optimizers(self) -> Iterator[Optimizer]:
        """Optimizers of the module's parameters that it keeps; Lightning need not know them."""
        for part in self.module.modules():
            for value in vars(part).values():
                for optimizer in _optimizers(value, DEPTH):
                    kept = [p for group in optimizer.param_groups for p in group["params"]]
                    if any(self.replacement(p) is not None for p in kept):
                        yield optimizer

    def _updated(self, value: Any, depth: int) -> Any:
        if depth == 0:
            return value
        pairs = list(value.items() if isinstance(value, dict) else enumerate(value))
        changed = {}
        for key, each in pairs:
            if isinstance(each, Tensor):
                now = self.replacement(each)
                if now is not None:
                    changed[key] = now
            elif type(each) in (list, tuple, dict):
                new = self._updated(each, depth - 1)
                if new is not each:
                    changed[key] = new
        if not changed:
            return value
        if isinstance(value, list | dict):
            for key, new in changed.items():
                value[key] = new
            return value
        rebuilt = [changed.get(key, each) for key, each in pairs]
        made = getattr(value, "_make", type(value))  # of a NamedTuple
        return made(rebuilt)

    def update_optimizer(self, optimizer: Optimizer) -> None:
        """Give an optimizer the sharded parameters in the place of those it was built with.

        Raises:
            ValueError: it has a tensor that is no parameter of the module.
        """
        self._now = dict(self.module.named_parameters())
        own = {id(p) for p in self._now.values()}
        for each in nested_optimizers(optimizer):
            for group in each.param_groups:
                if all(id(p) in own for p in group["params"]):
                    continue
                group["params"] = [self._of_module(optimizer, p, own) for p in group["params"]]
            self._move_state(each)

    def _of_module(self, optimizer: Optimizer, tensor: Tensor, own: set[int]) -> Tensor:
        now = tensor if id(tensor) in own else self.replacement(tensor)
        if now is None:
            raise UsageError(
                f"{type(optimizer).__name__} has a tensor of shape {tuple(tensor.shape)} that is no"
                f" parameter of {type(self.module).__name__}, so that ranks would not share it; "
                "allowed: parameters of the module, in the optimizers of configure_optimizers; "
                "register it as an nn.Parameter of the module"
            )
        return now

    def _move_state(self, optimizer: Optimizer) -> None:
        """State that the constructor made (torch's Adagrad): shard it like its parameter."""
        state = optimizer.state
        for old in [key for key in state if isinstance(key, Tensor)]:
            now = self.replacement(old)
            if now is None:
                continue
            values = state.pop(old)
            for key, value in values.items():
                if isinstance(value, Tensor) and value.shape == now.shape:
                    values[key] = shard_like(value, now)
            state[now] = values


def views_of_parameters(module: nn.Module) -> Iterator[tuple[str, Tensor, str]]:
    """Buffers and attributes that have memory in common with a parameter, and its name."""
    owners = [(name, p) for name, p in module.named_parameters() if _extent(p)]
    places = {p.untyped_storage().data_ptr() for _, p in owners}
    for prefix, part in module.named_modules():
        own = {id(p) for p in part._parameters.values()}
        values = {**vars(part), **part._buffers}
        for key, value in values.items():
            if key in ("_parameters", "_modules", "_buffers") or isinstance(value, nn.Module):
                continue
            for tensor in _tensors(value, DEPTH):
                extent = None if id(tensor) in own else _extent(tensor)
                if extent is None or tensor.untyped_storage().data_ptr() not in places:
                    continue
                for name, p in owners:
                    if tensor is not p and overlap(extent, _extent(p)):
                        yield f"{prefix}.{key}".lstrip("."), tensor, name


def _tensors(value: Any, depth: int) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if type(value) is not nn.Parameter:
            yield value
    elif depth and type(value) in (list, tuple, dict):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _tensors(each, depth - 1)


def _optimizers(value: Any, depth: int) -> Iterator[Optimizer]:
    if isinstance(value, Optimizer):
        yield value
    elif depth and type(value) in (list, tuple, dict):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _optimizers(each, depth - 1)


def refuse_common_memory(module: nn.Module) -> None:
    """Refuse parameters that are views of one tensor: ranks would step them apart.

    Raises:
        ValueError: names two of them.
    """
    found: dict[int, list[tuple[str, tuple[int, int, int]]]] = {}
    for name, parameter in module.named_parameters():
        extent = _extent(parameter)
        if extent is None:
            continue
        others = found.setdefault(extent[0], [])
        for other, known in others:
            if overlap(extent, known):
                raise UsageError(
                    f"{type(module).__name__}: {other} and {name} are two parameters in the same "
                    "memory, and ranks would step them apart; allowed: one parameter with two "
                    f"names ({name.rpartition('.')[0] or 'self'}.{name.rpartition('.')[2]} = the "
                    "other parameter); or type --trainer.strategy ddp"
                )
        others.append((name, extent))


Extent = tuple[int, int, int]  # address of the memory, first and last byte


def _extent(tensor: Tensor) -> Extent | None:
    """Which memory a plain tensor uses; None for others, and for tensors without memory."""
    if isinstance(tensor, DTensor) or tensor.is_meta or tensor.layout != torch.strided:
        return None
    if isinstance(tensor, nn.UninitializedParameter) or not tensor.numel():
        return None
    last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    start, size = tensor.storage_offset(), tensor.element_size()
    return tensor.untyped_storage().data_ptr(), int(start * size), int((start + last) * size)


def overlap(one: Extent | None, other: Extent | None) -> bool:
    """Whether two tensors have bytes in common; columns of one matrix count as such."""
    if one is None or other is None or one[0] != other[0]:
        return False
    return one[1] <= other[2] and other[1] <= one[2]


def shard_like(value: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor, the same on all ranks, sharded as a parameter is."""
    if not isinstance(parameter, DTensor) or isinstance(value, DTensor):
        return value
    mesh, placements = parameter.device_mesh, parameter.placements
    with torch.no_grad():
        return distribute_tensor(value, mesh, placements, src_data_rank=None)


def nested_optimizers(optimizer: Optimizer) -> Iterator[Optimizer]:
    """An optimizer, and those that it keeps in attributes: members, or a wrapped one."""
    seen: dict[int, Optimizer] = {}
    waiting: list[Any] = [optimizer]
    while waiting:
        each = waiting.pop()
        if id(each) in seen:
            continue
        seen[id(each)] = each
        for value in vars(each).values():
            inner = value if isinstance(value, list | tuple) else [value]
            waiting += [o for o in inner if isinstance(o, Optimizer)]
    return iter(seen.values())
