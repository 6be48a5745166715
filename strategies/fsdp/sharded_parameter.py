"""FSDP2 parameters that can be used outside of the forward pass of their FSDP unit.

fully_shard gathers the parameters of a unit around its `forward`. Elsewhere a parameter is a
DTensor, and an operation with a plain tensor raises "got mixed torch.Tensor and DTensor". A
`ShardedParameter` is this DTensor with rules for operations outside of `forward`:

    F.linear(h, self.emb.weight)      with autograd: its unit stays gathered until the end of the
    self.net.encode(x)                backward pass, which reduces the gradients of all uses
    under no_grad                     computed on shards, or on a gathered copy if that fails
    p.mul_(0.9), p.copy_(plain)       in place, on this rank's shard
    p.data = new                      copied into this rank's shard
    p[:3].zero_(), p.renorm_(...)     on a gathered copy, whose rows are copied into the shards
    p.normal_(), randn_like(p)        drawn for the full tensor, the same values on all ranks
    p.register_hook(hook)             called with the gradient of the gathered parameter
    p.norm(), p.grad.norm()           over all shards: a plain scalar

All ranks must run the same operations on parameters: code under `if rank == 0` waits forever.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.utils._pytree import tree_any_only, tree_flatten, tree_map_only
from torch.utils.hooks import RemovableHandle

from ravine.errors import UsageError

from ..dtensor import local_shard

_without_torch_function = torch._C.DisableTorchFunctionSubclass
_DATA: Any = torch.Tensor.data  # properties
_GRAD: Any = torch.Tensor.grad
_GET_DATA, _SET_DATA = _DATA.__get__, _DATA.__set__
_GET_GRAD, _SET_GRAD = _GRAD.__get__, _GRAD.__set__
# functions that FSDP2 and optimizers call for each parameter in each step; checked first
_FAST_PATH = {
    torch.Tensor.requires_grad.__get__,  # pyright: ignore[reportAttributeAccessIssue]
    torch.Tensor.requires_grad.__set__,  # pyright: ignore[reportAttributeAccessIssue]
    torch.Tensor.device.__get__,  # pyright: ignore[reportAttributeAccessIssue]
    torch.Tensor.shape.__get__,  # pyright: ignore[reportAttributeAccessIssue]
    torch.Tensor.dtype.__get__,  # pyright: ignore[reportAttributeAccessIssue]
    _SET_GRAD,
}
# attributes that are computed from the values, unlike shape or dtype
_COMPUTED_ATTRS = {getattr(Tensor, name).__get__ for name in ("T", "mT", "H", "mH", "real", "imag")}
_VIEW_FUNCTIONS = {  # functions whose result may be a view of their argument
    *("__getitem__", "narrow", "select", "chunk", "split", "tensor_split", "hsplit", "vsplit"),
    *("dsplit", "unbind", "view", "view_as", "reshape", "reshape_as", "flatten", "ravel"),
    *("unflatten", "squeeze", "unsqueeze", "t", "transpose", "swapaxes", "swapdims", "permute"),
    *("movedim", "moveaxis", "expand", "expand_as", "diagonal", "unfold", "as_strided"),
    *("view_as_real", "view_as_complex", "contiguous", "__get__"),
}
_ELEMENTWISE_FUNCTIONS = {  # in-place operations that torch applies to shards directly
    *("add", "sub", "subtract", "mul", "multiply", "div", "divide", "true_divide", "copy", "zero"),
    *("fill", "clamp", "clip", "clamp_min", "clamp_max", "lerp", "addcmul", "addcdiv", "sign"),
    *("abs", "neg", "exp", "sqrt", "rsqrt", "pow", "square", "reciprocal", "tanh", "sigmoid"),
    *("relu", "round", "floor", "ceil", "trunc", "nan_to_num", "masked_fill", "detach", "log"),
}
_INPLACE_OPERATORS = {"__iadd__", "__isub__", "__imul__", "__itruediv__", "__ipow__"}
_RANDOM_FUNCTIONS = {  # functions that draw random numbers
    *("normal_", "uniform_", "random_", "bernoulli_", "exponential_", "log_normal_", "cauchy_"),
    *("geometric_", "rand_like", "randn_like", "randint_like", "bernoulli", "normal", "poisson"),
    *("binomial", "multinomial", "dropout", "dropout_", "dropout1d", "dropout2d", "dropout3d"),
    *("alpha_dropout", "alpha_dropout_", "feature_dropout", "feature_dropout_"),
    *("feature_alpha_dropout", "feature_alpha_dropout_", "native_dropout", "rrelu", "rrelu_"),
    *("gumbel_softmax", "svd_lowrank", "pca_lowrank"),
}
_METADATA_METHODS = {
    getattr(Tensor, name)
    for name in (
        "size", "dim", "numel", "nelement", "element_size", "stride", "storage_offset",
        "is_contiguous", "is_floating_point", "is_complex", "is_signed", "data_ptr", "get_device",
        "requires_grad_", "untyped_storage", "retain_grad", "__len__", "__hash__", "__repr__",
        "__format__", "__deepcopy__", "__reduce_ex__", "is_pinned", "ndimension",
    )
    if hasattr(Tensor, name)
}  # fmt: skip


class GatherInfo(NamedTuple):
    """What gathers a sharded parameter; the attribute `_gather_info` of the parameter.

    Args:
        gatherer: the GatherOnUse of the module (gather_on_use.py).
        group: FSDP2's param group, which is gathered as a whole.
        fsdp_param: FSDP2's object of this parameter.
    """

    gatherer: Any
    group: Any
    fsdp_param: Any


class ShardedParameter(DTensor):
    """A DTensor with the rules of this file; the class of FSDP2's sharded parameters."""

    __slots__ = ()

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Apply a torch function or property to arguments of which some are of this class.

        torch calls it in place of each function. Attributes and metadata are those of a DTensor;
        for other functions see `_apply_operation`.
        """
        # within this context torch does not call this method again
        with _without_torch_function():
            # _FAST_PATH: getters and setters that are called often, e.g. of requires_grad and grad
            if func in _FAST_PATH:
                # `p.grad = plain`: the gradient of a sharded parameter must be a DTensor
                if type(args[-1]) is Tensor and func == _SET_GRAD and isinstance(args[0], DTensor):
                    args = (args[0], _distribute_like(args[1], args[0]))
                return func(*args)
            kwargs = kwargs or {}
            name = getattr(func, "__name__", "")
            # not only `is`, because each access of `__set__` makes a new object
            if func is _SET_DATA or (name == "__set__" and func == _SET_DATA):
                return _assign_data(args[0], args[1])
            # _COMPUTED_ATTRS: attributes with values, e.g. T and real; they are operations
            if name in ("__get__", "__set__", "__delete__") and func not in _COMPUTED_ATTRS:
                value = func(*args, **kwargs)
                return as_sharded_parameter(value) if func in (_GET_DATA, _GET_GRAD) else value
            # _METADATA_METHODS: e.g. size and stride, which need no values
            if func in _METADATA_METHODS:
                return func(*args, **kwargs)
            # _HOOK_REGISTRATION: functions that replace those that register gradient hooks
            if func in _HOOK_REGISTRATION and hasattr(args[0], "_gather_info"):
                return _HOOK_REGISTRATION[func](*args, **kwargs)
            return _apply_operation(func, name, args, kwargs)


def as_sharded_parameter(value: Any) -> Any:
    """Set the class of a DTensor to ShardedParameter; also used for gradients."""
    if type(value) is DTensor:
        value.__class__ = ShardedParameter
    return value


def _distribute_like(full: Tensor, like: DTensor) -> Tensor:
    """Shard a plain tensor, which is the same on all ranks, with the placements of `like`."""
    if full.shape != like.shape or full.layout != torch.strided:
        return full  # torch raises an error for it
    mesh, placements = like.device_mesh, like.placements
    return as_sharded_parameter(
        distribute_tensor(full.detach(), mesh, placements, src_data_rank=None)
    )


def _assign_data(parameter: Tensor, value: Tensor) -> None:
    """Do `parameter.data = value` by a copy into the shard, because FSDP2 keeps its own storage.

    Args:
        parameter: a sharded parameter.
        value: a full tensor, the same on all ranks, or a DTensor.

    Raises:
        UsageError: the shapes differ.
    """
    local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    if isinstance(parameter, DTensor) and value.shape == parameter.shape:
        mesh, placements = parameter.device_mesh, parameter.placements
        if not isinstance(value, DTensor):
            # src_data_rank=None: each rank takes its rows of its own value; nothing is sent
            value = distribute_tensor(value.detach(), mesh, placements, src_data_rank=None)
        elif tuple(value.placements) != tuple(placements):
            value = value.redistribute(mesh, placements)
        with torch.no_grad():
            local.copy_(value.to_local())
        return
    raise UsageError(
        f"`p.data = new` assigns a tensor of shape {tuple(value.shape)} to a sharded parameter of "
        f"shape {tuple(parameter.shape)}",
        ["tensors of the shape of the parameter"],
        'use Trainer(strategy="ddp")',
        flag="--trainer.strategy=ddp",
    )


def _apply_operation(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Apply an operation with sharded arguments by the first rule that fits.

    1. In place, into a plain tensor: with gathered arguments.
    2. Recorded by autograd, with a trainable parameter: with gathered parameters, whose gradients
       FSDP2 reduces; only within a step, or if other arguments are plain tensors.
    3. Random: on gathered copies, with the values of rank 0.
    4. On the shards, if torch has a rule for it; else on gathered copies.

    Args:
        func: the torch function.
        name: its name; a trailing underscore marks an in-place operation.
        args: its arguments.
        kwargs: its keyword arguments.
    """
    if name == "__iter__":
        return iter(_apply_operation(Tensor.unbind, "unbind", args, kwargs))
    # GatheredView: a view of a gathered copy; its plain tensor is used here
    args, kwargs = tree_map_only(GatheredView, GatheredView.to_plain, (args, kwargs))
    is_in_place = _is_in_place(name, args, kwargs)  # also true with the argument `out`
    target = _find_target(args, kwargs)  # into which an in-place operation writes
    if is_in_place and not isinstance(target, DTensor):
        args, kwargs = tree_map_only(DTensor, lambda t: t.full_tensor(), (args, kwargs))
        return func(*args, **kwargs)
    # plain tensors that are scalars do not count
    has_plain_tensors = not is_in_place and _has_plain_tensors((args, kwargs))
    is_recorded = not is_in_place and torch.is_grad_enabled()
    if (
        is_recorded
        # _is_in_step: a step of the module is running
        and (has_plain_tensors or _is_in_step((args, kwargs)))
        and _has_trained_param((args, kwargs))
    ):
        # _gather_tensor: a full tensor; of a trained parameter the one that FSDP2 reduces
        args, kwargs = tree_map_only(DTensor, _gather_tensor, (args, kwargs))
        return func(*args, **kwargs)
    if getattr(func, "__module__", "") == "torch.nn.init":
        # _apply_on_copies: gathers full copies, and copies writes back to the shards
        return _apply_on_copies(func, args, kwargs, is_random=True)
    if name in _RANDOM_FUNCTIONS and not is_in_place:
        return _apply_on_copies(func, args, kwargs, is_random=True)
    # torch rejects it for a plain leaf tensor, too
    is_refused = is_in_place and torch.is_grad_enabled() and target.requires_grad
    # _INPLACE_OPERATORS: e.g. `__iadd__`; _ELEMENTWISE_FUNCTIONS: e.g. `mul`, without underscore
    has_torch_rule = (
        not is_in_place or name in _INPLACE_OPERATORS or name.strip("_") in _ELEMENTWISE_FUNCTIONS
    )
    # _foreach functions do an elementwise operation on lists of tensors
    if has_plain_tensors or not (has_torch_rule or name.startswith("_foreach") or is_refused):
        return _apply_on_copies(func, args, kwargs, is_random=name in _RANDOM_FUNCTIONS)
    try:
        if is_in_place and not name.startswith("_foreach"):
            # plain tensors become DTensors with the full value on each rank
            new_args, new_kwargs = _replicate_tensors((args, kwargs), target.device_mesh)
            return func(*new_args, **new_kwargs)
        result = func(*args, **kwargs)
    except (NotImplementedError, RuntimeError):  # torch has no rule for shards
        if is_refused:
            raise
        return _apply_on_copies(func, args, kwargs)
    # a view must share the memory of the shards, or writes to it would be lost
    if name in _VIEW_FUNCTIONS and not _results_share_memory(result, args[0]):
        return _apply_on_copies(func, args, kwargs)
    # scalars and partial sums become plain tensors, other results ShardedParameters
    return result if is_in_place else tree_map_only(DTensor, _to_usable_result, result)


def _find_target(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return the tensor into which an in-place operation writes; of a list the first one."""
    if kwargs.get("out") is not None:
        target = kwargs["out"]
    else:
        target = args[0] if args else next(iter(kwargs.values()), None)
    return next(iter(target), None) if isinstance(target, list | tuple) else target


def _to_usable_result(result: DTensor) -> Tensor:
    """Return a result as a ShardedParameter; scalars and partial sums as plain tensors."""
    is_partial = any(placement.is_partial() for placement in result.placements)
    return result.full_tensor() if result.ndim == 0 or is_partial else as_sharded_parameter(result)


def _results_share_memory(result: Any, source: Any) -> bool:
    """Whether the shards of a result are views of the shards of its argument."""
    result_tensors = [tensor for tensor in tree_flatten(result)[0] if isinstance(tensor, Tensor)]
    if not isinstance(source, DTensor) or not all(
        isinstance(tensor, DTensor) for tensor in result_tensors
    ):
        return not isinstance(source, DTensor)
    local_tensors: list[Any] = [cast(Any, tensor)._local_tensor for tensor in result_tensors]
    return all(_storage_id(tensor) == _storage_id(source._local_tensor) for tensor in local_tensors)


def _storage_id(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class _GatheredCopy:
    """A gathered copy of a sharded tensor, updated before each use."""

    def __init__(self, sharded: DTensor) -> None:
        self.sharded = sharded
        with torch.inference_mode(False), torch.no_grad():
            gathered = cast(DTensor, sharded.detach()).full_tensor()
            self.full = gathered.clone() if gathered.is_inference() else gathered
        self.version = self.full._version

    @torch.no_grad()
    def update(self) -> None:
        """Gather again, because the shards may have changed; all ranks call it."""
        self.full.copy_(cast(DTensor, self.sharded.detach()).full_tensor())
        self.version = self.full._version

    @property
    def is_written(self) -> bool:
        """Whether the copy was written to since it was last gathered."""
        return self.full._version != self.version

    @torch.no_grad()
    def write_back(self) -> None:
        """Copy this rank's rows to its shard if the copy was written to."""
        if self.is_written:
            self.sharded._local_tensor.copy_(local_shard(self.full, self.sharded))
            self.version = self.full._version


class GatheredView(Tensor):
    """A view of a gathered copy of a sharded tensor; writes to it are copied to the shards."""

    @classmethod
    def from_copies(cls, tensor: Tensor, copies: Iterable[_GatheredCopy]) -> Tensor:
        """Return a GatheredView if a tensor shares the memory of a copy, else the tensor."""
        if isinstance(tensor, DTensor):
            return tensor
        for copy in copies:
            if _storage_id(tensor) == _storage_id(copy.full):
                view = tensor.detach().as_subclass(cls)
                vars(view)["_gathered_copy"] = copy
                return view
        return tensor

    def to_plain(self) -> Tensor:
        """Return the view as a plain tensor, updated from the shards."""
        vars(self)["_gathered_copy"].update()
        return self.as_subclass(Tensor)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Apply a function with plain tensors instead of views, and copy writes to the shards.

        torch calls it in place of each function with an argument of this class.
        """
        with _without_torch_function():
            leaves, _ = tree_flatten((args, kwargs))
            views = [leaf for leaf in leaves if isinstance(leaf, GatheredView)]
            # _gathered_copy: the full copy of a sharded tensor, of which the argument is a view
            copies = list(dict.fromkeys(vars(view)["_gathered_copy"] for view in views))
            plain: Any = tree_map_only(GatheredView, GatheredView.to_plain, (args, kwargs or {}))
            plain_args, plain_kwargs = plain
            # with sharded arguments the rules of sharded parameters apply
            if any(isinstance(leaf, ShardedParameter) for leaf in leaves):
                name = getattr(func, "__name__", "")
                result = _apply_operation(func, name, plain_args, plain_kwargs)
            else:
                result = func(*plain_args, **plain_kwargs)
            # a write into a view changes the copy; write_back copies it to the shard
            for copy in copies:
                copy.write_back()
            return tree_map_only(
                # from_copies: a GatheredView if it shares memory with a copy, else the tensor
                Tensor,
                lambda tensor: GatheredView.from_copies(tensor, copies),
                result,
            )


def _apply_on_copies(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], is_random: bool = False
) -> Any:
    """Apply a function to gathered copies of its sharded arguments, and copy writes to the shards.

    Args:
        func: the torch function.
        args: its arguments.
        kwargs: its keyword arguments.
        is_random: whether all ranks get the result, or the writes, of rank 0.
    """
    copies: dict[int, _GatheredCopy] = {}  # by the id of the sharded tensor

    def gathered_copy(tensor: DTensor) -> Tensor:
        if torch.is_grad_enabled() and tensor.grad_fn is not None:
            return tensor.full_tensor()  # part of an autograd graph
        if id(tensor) not in copies:
            copies[id(tensor)] = _GatheredCopy(tensor)
        return copies[id(tensor)].full

    leaves = tree_flatten((args, kwargs))[0]
    args, kwargs = tree_map_only(DTensor, gathered_copy, (args, kwargs))
    result = func(*args, **kwargs)
    # is_written: by the version counter of the copy
    written_copies = [copy for copy in copies.values() if copy.is_written]
    if is_random and written_copies:
        # the random generators of the ranks may differ
        _broadcast_from_rank_zero([copy.full for copy in written_copies])
    elif is_random:
        results = [leaf for leaf in tree_flatten(result)[0] if isinstance(leaf, Tensor)]
        _broadcast_from_rank_zero(results)
    for copy in copies.values():
        # copies this rank's rows to its shard, if the copy was written to
        copy.write_back()
    for leaf in leaves:  # an in-place operation returns its argument
        if id(leaf) in copies and result is copies[id(leaf)].full:
            return leaf
    return tree_map_only(
        Tensor,
        # from_copies: a GatheredView if the result shares memory with a copy, else the tensor
        lambda view: GatheredView.from_copies(view, copies.values()),
        result,
    )


@torch.no_grad()
def _broadcast_from_rank_zero(tensors: list[Tensor]) -> None:
    """Broadcast rank 0's values: the random generators of the ranks may differ."""
    for tensor in tensors:
        values = tensor.detach().contiguous()
        if values.numel():
            dist.broadcast(values.view(-1).view(torch.uint8), 0)
            tensor.copy_(values)


def _is_in_place(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether an operation writes into its first argument, or into `out`."""
    if "out" in kwargs or name in ("__setitem__", "_foreach_mul_", "_foreach_add_"):
        return True
    if name.startswith("__i") and name.endswith("__"):
        return name not in ("__invert__", "__int__", "__index__")
    return name.endswith("_") and not name.endswith("__")


def _has_plain_tensors(tree: Any) -> bool:
    """Whether the arguments contain plain tensors that are not scalars."""
    return tree_any_only(Tensor, lambda t: not isinstance(t, DTensor) and t.ndim > 0, tree)


def _is_in_step(tree: Any) -> bool:
    return any(gather.is_in_step for gather in _iter_gatherers(tree))


def _has_trained_param(tree: Any) -> bool:
    """Whether the arguments contain a trainable sharded parameter."""
    return any(
        isinstance(leaf, ShardedParameter) and leaf.requires_grad and hasattr(leaf, "_gather_info")
        for leaf in tree_flatten(tree)[0]
    )


def _iter_gatherers(tree: Any) -> Iterator[Any]:
    """Yield the GatherOnUse objects (gather_on_use.py) of the sharded parameters."""
    for leaf in tree_flatten(tree)[0]:
        if isinstance(leaf, ShardedParameter) and hasattr(leaf, "_gather_info"):
            yield cast(Any, leaf)._gather_info.gatherer


def _gather_tensor(tensor: DTensor) -> Tensor:
    """Return the full tensor; for a trainable parameter the one whose gradient FSDP2 reduces."""
    info = getattr(tensor, "_gather_info", None) if isinstance(tensor, ShardedParameter) else None
    if info is not None and tensor.requires_grad:
        info.gatherer.hold_group(info.group)
        return info.fsdp_param._unsharded_param
    return tensor.full_tensor()


def _replicate_tensors(tree: Any, mesh: DeviceMesh) -> Any:
    """Wrap plain non-scalar tensors as replicated DTensors, to use them with shards."""

    def replicate(tensor: Tensor) -> Tensor:
        if isinstance(tensor, DTensor) or tensor.ndim == 0:
            return tensor
        return DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)

    return tree_map_only(Tensor, replicate, tree)


def _register_gradient_hook(sharded: Any, hook: Callable[[Tensor], Any]) -> RemovableHandle:
    """Do `Tensor.register_hook` on the gathered parameter: the hook gets full gradients."""
    hooks = attach_hooks(sharded._gather_info.fsdp_param, OrderedDict()).hooks
    handle = RemovableHandle(hooks)
    hooks[handle.id] = hook
    return handle


def _refuse_post_accumulate_hook(sharded: Any, hook: Callable[[Tensor], Any]) -> None:
    raise UsageError(
        "register_post_accumulate_grad_hook is not supported for a sharded parameter: gradients "
        "are accumulated in gathered copies",
        ["Tensor.register_hook", "on_after_backward"],
        'use Trainer(strategy="ddp")',
        flag="--trainer.strategy=ddp",
    )


_HOOK_REGISTRATION: dict[Any, Callable[..., Any]] = {
    Tensor.register_hook: _register_gradient_hook,
    Tensor.register_post_accumulate_grad_hook: _refuse_post_accumulate_hook,
}


class _OriginalAttributes:
    """Hooks and attributes of a parameter from before sharding, for the gathered parameter."""

    def __init__(self, hooks: OrderedDict[int, Any]) -> None:
        self.hooks = hooks
        self.attributes: dict[str, Any] = {}
        self.is_registered = False

    def __call__(self, to_unsharded: Callable[[], None], parameter: Any) -> None:
        to_unsharded()
        gathered = parameter._unsharded_param
        vars(gathered).update(self.attributes)
        if not self.is_registered and gathered.requires_grad:
            self.is_registered = True
            gathered.register_hook(self._apply_hooks)

    def _apply_hooks(self, gradient: Tensor) -> Tensor:
        for hook in list(self.hooks.values()):
            hook_result = hook(gradient)
            gradient = gradient if hook_result is None else hook_result.to(gradient.dtype)
        return gradient


def attach_hooks(parameter: Any, hooks: OrderedDict[int, Any]) -> _OriginalAttributes:
    """Register hooks on an FSDP2 parameter for whenever it is gathered."""
    original_attributes = vars(parameter).get("_original_attributes")
    if original_attributes is None:
        original_attributes = parameter._original_attributes = _OriginalAttributes(hooks)
        parameter.to_unsharded = partial(original_attributes, parameter.to_unsharded, parameter)
        if parameter.sharded_state.name == "UNSHARDED":
            original_attributes(lambda: None, parameter)
    return original_attributes


def has_sharded_parameter_class(module: nn.Module) -> bool:
    """Whether a module has parameters of the class ShardedParameter."""
    return any(isinstance(p, ShardedParameter) for p in module.parameters())
