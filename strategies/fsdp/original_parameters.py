"""Replace references to the parameters from before sharding by the sharded parameters.

fully_shard replaces each parameter of a module by another tensor. An optimizer that was built in
`__init__`, or a list of weights in the module, would keep the old tensors, which are not trained.
Tensors are matched by identity, never by shape or order.
"""

import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from ravine.errors import UsageError

MAX_CONTAINER_DEPTH = 3  # levels of nested lists and dicts


class OriginalParameters:
    """Finds the parameters of a module by identity, by weak references.

    For example:

        originals = OriginalParameters(module)      # before fully_shard
        originals.update_references()               # after it
        originals.update_optimizer(optimizer)
    """

    def __init__(self, module: nn.Module) -> None:
        """Record the name, hooks and attributes of each parameter before sharding.

        Raises:
            UsageError: a parameter has a post-accumulate hook, or a tensor is a view of one.
        """
        self.module = module
        # of the original parameters; weak, so that their memory is freed
        self._names_by_id: dict[int, str] = {}
        self._refs_by_id: dict[int, weakref.ref[Tensor]] = {}
        self.hooks_by_name: dict[str, Any] = {}  # of Tensor.register_hook
        self.attributes_by_name: dict[str, dict[str, Any]] = {}  # set by the module's code
        # tensors that are views of a whole parameter, with its name
        self._aliases_by_id: dict[int, tuple[weakref.ref[Tensor], str]] = {}
        self._sharded_params: dict[str, Tensor] = {}  # by name; set after sharding
        for name, parameter in module.named_parameters():
            if isinstance(parameter, DTensor):  # sharded by an earlier fit: it is not replaced
                continue
            self._names_by_id[id(parameter)] = name
            self._refs_by_id[id(parameter)] = weakref.ref(parameter)
            if parameter._backward_hooks:
                self.hooks_by_name[name] = parameter._backward_hooks
            if vars(parameter):
                self.attributes_by_name[name] = dict(vars(parameter))
            if getattr(parameter, "_post_accumulate_grad_hooks", None):
                raise UsageError(
                    f"{type(module).__name__}: {name} has a hook of "
                    "register_post_accumulate_grad_hook, and gradients of sharded parameters are "
                    "accumulated in gathered copies",
                    ["Tensor.register_hook", "on_after_backward"],
                    'use Trainer(strategy="ddp")',
                    flag="--trainer.strategy=ddp",
                )
        # attributes that share memory with a parameter: path, tensor, name of the parameter
        for alias_path, tensor, name in find_param_views(module):
            parameter = dict(module.named_parameters())[name]
            if tensor.shape != parameter.shape or tensor.stride() != parameter.stride():
                raise UsageError(
                    f"{type(module).__name__}: {alias_path} is a view of the parameter {name}, "
                    "which sharding replaces",
                    ["views that are created when they are used"],
                    f'create the view of {name} where it is used, or use Trainer(strategy="ddp")',
                    flag="--trainer.strategy=ddp",
                )
            self._aliases_by_id[id(tensor)] = weakref.ref(tensor), name

    def find_replacement(self, tensor: Any) -> Tensor | None:
        """Return the sharded parameter for a parameter from before sharding, else None."""
        alias, name = self._aliases_by_id.get(id(tensor), (None, ""))
        if alias is not None and alias() is tensor:
            from .sharded_parameter import as_sharded_parameter  # here: avoids a circular import

            return as_sharded_parameter(self._sharded_params[name].detach())
        original_ref = self._refs_by_id.get(id(tensor))
        if original_ref is None or original_ref() is not tensor:
            return None
        sharded = self._sharded_params.get(self._names_by_id[id(tensor)])
        return None if sharded is tensor else sharded

    def update_references(self) -> None:
        """Replace original parameters by the sharded ones in attributes of the modules.

        Lists, tuples and dicts in attributes are searched as well. Called after sharding.
        """
        self._sharded_params = dict(self.module.named_parameters())
        # _names_by_id and _refs_by_id: names of the original parameters, and weak references
        # drop those of kept parameters: torch does not move a tensor that has a weak reference
        for parameter in self._sharded_params.values():
            if self._names_by_id.pop(id(parameter), None) is not None:
                del self._refs_by_id[id(parameter)]
        for module in self.module.modules():
            for name, value in list(vars(module).items()):
                if name in ("_parameters", "_modules", "_buffers") or isinstance(value, nn.Module):
                    continue
                if isinstance(value, Tensor):
                    # the sharded parameter for an original one or its alias, else None
                    if (sharded := self.find_replacement(value)) is not None:
                        vars(module)[name] = sharded
                elif isinstance(value, list | tuple | dict):
                    vars(module)[name] = self._replace_in_container(value, MAX_CONTAINER_DEPTH)

    def copy_attributes(self) -> None:
        """Copy the Python attributes of the original parameters to the sharded ones."""
        sharded_params = dict(self.module.named_parameters()) if self.attributes_by_name else {}
        for name, attributes in self.attributes_by_name.items():
            if name in sharded_params:  # a pipeline stage has only some of the parameters
                vars(sharded_params[name]).update(attributes)

    def find_module_optimizers(self) -> Iterator[Optimizer]:
        """Yield optimizers that the module stores, even if Lightning does not know them."""
        for submodule in self.module.modules():
            for value in vars(submodule).values():
                for optimizer in _iter_optimizers(value, MAX_CONTAINER_DEPTH):
                    optimizer_params = [
                        p for group in optimizer.param_groups for p in group["params"]
                    ]
                    if any(self.find_replacement(p) is not None for p in optimizer_params):
                        yield optimizer

    def _replace_in_container(self, container: Any, depth: int) -> Any:
        """Replace original parameters in a list, tuple or dict, and return it.

        A list or dict is changed in place, and a tuple is built anew. `depth` is how many levels of
        nested containers are searched.
        """
        if depth == 0:
            return container
        is_dict = isinstance(container, dict)
        pairs = list(container.items() if is_dict else enumerate(container))
        new_items = {}  # by key or index
        for key, item in pairs:
            if isinstance(item, Tensor):
                # the sharded parameter, or None if `item` is no original parameter
                sharded = self.find_replacement(item)
                if sharded is not None:
                    new_items[key] = sharded
            elif type(item) in (list, tuple, dict):
                new_item = self._replace_in_container(item, depth - 1)
                if new_item is not item:
                    new_items[key] = new_item
        # new_items: replaced tensors, and tuples that were built anew
        if not new_items:
            return container
        if isinstance(container, list | dict):
            for key, new_item in new_items.items():
                container[key] = new_item
            return container
        rebuilt = [new_items.get(index, item) for index, item in pairs]
        build = getattr(container, "_make", type(container))  # `_make` of a NamedTuple
        return build(rebuilt)

    def update_optimizer(self, optimizer: Optimizer) -> None:
        """Replace an optimizer's original parameters by the sharded ones, in groups and state.

        Raises:
            UsageError: the optimizer has a tensor that is no parameter of the module.
        """
        self._sharded_params = dict(self.module.named_parameters())
        param_ids = {id(p) for p in self._sharded_params.values()}
        # the optimizer itself, and optimizers that it wraps
        for nested in iter_nested_optimizers(optimizer):
            for group in nested.param_groups:
                # updated already, e.g. as the group of an optimizer that this one wraps
                if all(id(p) in param_ids for p in group["params"]):
                    continue
                group["params"] = [
                    # the sharded parameter in place of an original one; raises for any other tensor
                    self._require_module_param(optimizer, p, param_ids)
                    for p in group["params"]
                ]
            # state that a constructor has created is sharded like its parameter
            self._move_state(nested)

    def _require_module_param(
        self, optimizer: Optimizer, tensor: Tensor, param_ids: set[int]
    ) -> Tensor:
        sharded = tensor if id(tensor) in param_ids else self.find_replacement(tensor)
        if sharded is None:
            raise UsageError(
                f"{type(optimizer).__name__} has a tensor of shape {tuple(tensor.shape)} that is "
                f"not a parameter of {type(self.module).__name__}, so it would not be sharded",
                ["parameters of the module, in the optimizers of configure_optimizers"],
                "register the tensor as an nn.Parameter of the module",
            )
        return sharded

    def _move_state(self, optimizer: Optimizer) -> None:
        """Shard state that a constructor created (torch's Adagrad) like its parameter."""
        state = optimizer.state
        for old in [key for key in state if isinstance(key, Tensor)]:
            sharded = self.find_replacement(old)
            if sharded is None:
                continue
            values = state.pop(old)
            for key, value in values.items():
                if isinstance(value, Tensor) and value.shape == sharded.shape:
                    values[key] = distribute_like(value, sharded)
            state[sharded] = values


def find_param_views(module: nn.Module) -> Iterator[tuple[str, Tensor, str]]:
    """Yield the buffers and attributes of modules that share memory with a parameter.

    Yields:
        the path of the attribute, its tensor, and the name of the parameter.
    """
    # _memory_extent: storage address, first and last byte; None without plain memory
    named_params = [(name, p) for name, p in module.named_parameters() if _memory_extent(p)]
    storage_addresses = {p.untyped_storage().data_ptr() for _, p in named_params}
    for prefix, submodule in module.named_modules():
        own_param_ids = {id(p) for p in submodule._parameters.values()}
        attributes = {**vars(submodule), **submodule._buffers}
        for key, value in attributes.items():
            if key in ("_parameters", "_modules", "_buffers") or isinstance(value, nn.Module):
                continue
            # _iter_tensors: tensors other than parameters, also those in nested containers
            for tensor in _iter_tensors(value, MAX_CONTAINER_DEPTH):
                extent = None if id(tensor) in own_param_ids else _memory_extent(tensor)
                if extent is None or tensor.untyped_storage().data_ptr() not in storage_addresses:
                    continue
                for name, p in named_params:
                    if tensor is not p and extents_overlap(extent, _memory_extent(p)):
                        yield f"{prefix}.{key}".lstrip("."), tensor, name


def _iter_tensors(value: Any, depth: int) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if type(value) is not nn.Parameter:
            yield value
    elif depth and type(value) in (list, tuple, dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _iter_tensors(item, depth - 1)


def _iter_optimizers(value: Any, depth: int) -> Iterator[Optimizer]:
    if isinstance(value, Optimizer):
        yield value
    elif depth and type(value) in (list, tuple, dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _iter_optimizers(item, depth - 1)


def check_no_shared_memory(module: nn.Module) -> None:
    """Check that no two parameters share memory: ranks would step them separately.

    Raises:
        UsageError: names two such parameters.
    """
    extents_by_address: dict[int, list[tuple[str, MemoryExtent]]] = {}  # with parameter names
    for name, parameter in module.named_parameters():
        extent = _memory_extent(parameter)  # address of the storage, first and last byte
        if extent is None:
            continue
        address, *_ = extent
        same_storage = extents_by_address.setdefault(address, [])
        for other, known_extent in same_storage:
            if extents_overlap(extent, known_extent):
                raise UsageError(
                    f"{type(module).__name__}: the parameters {other} and {name} have the same "
                    "memory, and their shards would be stepped separately",
                    ["one parameter with two names"],
                    f'assign the parameter {other} to {name}, or use Trainer(strategy="ddp")',
                    flag="--trainer.strategy=ddp",
                )
        same_storage.append((name, extent))


MemoryExtent = tuple[int, int, int]  # address of the memory, first and last byte


def _memory_extent(tensor: Tensor) -> MemoryExtent | None:
    """Return the memory range of a plain tensor; None for other tensors or without memory."""
    if isinstance(tensor, DTensor) or tensor.is_meta or tensor.layout != torch.strided:
        return None
    if isinstance(tensor, nn.UninitializedParameter) or not tensor.numel():
        return None
    last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    start, size = tensor.storage_offset(), tensor.element_size()
    return tensor.untyped_storage().data_ptr(), int(start * size), int((start + last) * size)


def extents_overlap(one: MemoryExtent | None, other: MemoryExtent | None) -> bool:
    """Whether two memory ranges overlap; columns of one matrix count as overlapping."""
    if one is None or other is None or one[0] != other[0]:
        return False
    return one[1] <= other[2] and other[1] <= one[2]


def distribute_like(value: Tensor, parameter: Tensor) -> Tensor:
    """Shard a full tensor, which is the same on all ranks, like a parameter."""
    if not isinstance(parameter, DTensor) or isinstance(value, DTensor):
        return value
    mesh, placements = parameter.device_mesh, parameter.placements
    with torch.no_grad():
        return distribute_tensor(value, mesh, placements, src_data_rank=None)


def iter_nested_optimizers(optimizer: Optimizer) -> Iterator[Optimizer]:
    """Return an optimizer and those in its attributes: members, or a wrapped optimizer."""
    seen: dict[int, Optimizer] = {}
    waiting: list[Any] = [optimizer]
    while waiting:
        current = waiting.pop()
        if id(current) in seen:
            continue
        seen[id(current)] = current
        for value in vars(current).values():
            inner = value if isinstance(value, list | tuple) else [value]
            waiting += [o for o in inner if isinstance(o, Optimizer)]
    return iter(seen.values())
