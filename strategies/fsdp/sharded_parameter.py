"""FSDP2 parameters that work outside of the forward pass of their unit.

fully_shard gathers the parameters of a unit around its `forward`. Elsewhere a parameter is a
DTensor, and an operation on it and a plain tensor raises "got mixed torch.Tensor and DTensor". A
`ShardedParameter` is that DTensor with these rules for operations outside of `forward`:

    F.linear(h, self.emb.weight)      gradients are recorded: its unit is gathered, until the end of
    self.net.encode(x)                the backward pass, which reduces the gradients of all uses
    under no_grad                     computed on shards, or on a gathered copy if that fails
    p.mul_(0.9), p.copy_(plain)       in place, on this rank's shard
    p.data = new                      copied into this rank's shard
    p[:3].zero_(), p.renorm_(...)     on a gathered copy, whose rows are copied into the shards
    p.normal_(), randn_like(p)        drawn for the whole tensor, the same numbers on all ranks
    p.register_hook(hook)             called with the gradient of the gathered parameter
    p.norm(), p.grad.norm()           of all shards: a plain scalar

All ranks must run the same operations on parameters; code under `if rank == 0` never returns.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import (
    Tensor,
    _foreach_copy_,  # pyright: ignore[reportPrivateImportUsage]
    nn,
)
from torch.autograd import grad_mode
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.utils._pytree import tree_any_only, tree_flatten, tree_map_only
from torch.utils.hooks import RemovableHandle

from ravine.errors import UsageError

from ..dtensor import local_part
from ..parallel_module import units
from .torch_attributes import groups_of

CHECK_EVERY = 50  # backward passes between two searches for `p.data.mul_(2)` in half precision

_unmodified = torch._C.DisableTorchFunctionSubclass
_DATA: Any = torch.Tensor.data  # properties
_GRAD: Any = torch.Tensor.grad
_GET_DATA, _SET_DATA = _DATA.__get__, _DATA.__set__
_GET_GRAD, _SET_GRAD = _GRAD.__get__, _GRAD.__set__
# what FSDP2 and optimizers use of each parameter in each step, tried before all else
_READ_ONLY = {
    torch.Tensor.requires_grad.__get__,  # pyright: ignore[reportAttributeAccessIssue]
    torch.Tensor.requires_grad.__set__,  # pyright: ignore[reportAttributeAccessIssue]
    torch.Tensor.device.__get__,  # pyright: ignore[reportAttributeAccessIssue]
    torch.Tensor.shape.__get__,  # pyright: ignore[reportAttributeAccessIssue]
    torch.Tensor.dtype.__get__,  # pyright: ignore[reportAttributeAccessIssue]
    _SET_GRAD,
}
# attributes that are computed from the values, and methods that are not
_COMPUTED = {getattr(Tensor, name).__get__ for name in ("T", "mT", "H", "mH", "real", "imag")}
_VIEWS = {  # functions whose result may share the memory of their argument
    *("__getitem__", "narrow", "select", "chunk", "split", "tensor_split", "hsplit", "vsplit"),
    *("dsplit", "unbind", "view", "view_as", "reshape", "reshape_as", "flatten", "ravel"),
    *("unflatten", "squeeze", "unsqueeze", "t", "transpose", "swapaxes", "swapdims", "permute"),
    *("movedim", "moveaxis", "expand", "expand_as", "diagonal", "unfold", "as_strided"),
    *("view_as_real", "view_as_complex", "contiguous", "__get__"),
}
_ELEMENTWISE = {  # in-place operations that torch applies to shards as they are
    *("add", "sub", "subtract", "mul", "multiply", "div", "divide", "true_divide", "copy", "zero"),
    *("fill", "clamp", "clip", "clamp_min", "clamp_max", "lerp", "addcmul", "addcdiv", "sign"),
    *("abs", "neg", "exp", "sqrt", "rsqrt", "pow", "square", "reciprocal", "tanh", "sigmoid"),
    *("relu", "round", "floor", "ceil", "trunc", "nan_to_num", "masked_fill", "detach", "log"),
}
_OPERATORS = {"__iadd__", "__isub__", "__imul__", "__itruediv__", "__ipow__"}
_RANDOM = {  # functions that draw numbers
    *("normal_", "uniform_", "random_", "bernoulli_", "exponential_", "log_normal_", "cauchy_"),
    *("geometric_", "rand_like", "randn_like", "randint_like", "bernoulli", "normal", "poisson"),
    *("binomial", "multinomial", "dropout", "dropout_", "dropout1d", "dropout2d", "dropout3d"),
    *("alpha_dropout", "alpha_dropout_", "feature_dropout", "feature_dropout_"),
    *("feature_alpha_dropout", "feature_alpha_dropout_", "native_dropout", "rrelu", "rrelu_"),
    *("gumbel_softmax", "svd_lowrank", "pca_lowrank"),
}
_METADATA = {
    getattr(Tensor, name)
    for name in (
        "size", "dim", "numel", "nelement", "element_size", "stride", "storage_offset",
        "is_contiguous", "is_floating_point", "is_complex", "is_signed", "data_ptr", "get_device",
        "requires_grad_", "untyped_storage", "retain_grad", "__len__", "__hash__", "__repr__",
        "__format__", "__deepcopy__", "__reduce_ex__", "is_pinned", "ndimension",
    )
    if hasattr(Tensor, name)
}  # fmt: skip


class ShardedParameter(DTensor):
    """A DTensor whose operations follow the rules above; the class of FSDP2's parameters."""

    __slots__ = ()

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Apply a torch function or property to arguments, some of which are of this class."""
        with _unmodified():
            if func in _READ_ONLY:
                if type(args[-1]) is Tensor and func == _SET_GRAD and isinstance(args[0], DTensor):
                    args = (args[0], _shard(args[1], args[0]))
                return func(*args)
            kwargs = kwargs or {}
            name = getattr(func, "__name__", "")
            if func is _SET_DATA or (name == "__set__" and func == _SET_DATA):
                return _assign(args[0], args[1])
            if name in ("__get__", "__set__", "__delete__") and func not in _COMPUTED:
                value = func(*args, **kwargs)
                return marked(value) if func in (_GET_DATA, _GET_GRAD) else value
            if func in _METADATA:
                return func(*args, **kwargs)
            if func in _REGISTER and hasattr(args[0], "_gather"):
                return _REGISTER[func](*args, **kwargs)
            return _compute(func, name, args, kwargs)


def marked(value: Any) -> Any:
    """The same tensor as a ShardedParameter: gradients follow the rules too."""
    if type(value) is DTensor:
        value.__class__ = ShardedParameter
    return value


def _shard(whole: Tensor, like: DTensor) -> Tensor:
    """A plain tensor, the same on all ranks, sharded as `like` is."""
    if whole.shape != like.shape or whole.layout != torch.strided:
        return whole  # torch refuses it
    mesh, placements = like.device_mesh, like.placements
    return marked(distribute_tensor(whole.detach(), mesh, placements, src_data_rank=None))


def _assign(parameter: Tensor, value: Tensor) -> None:
    """`parameter.data = value`: FSDP2 would keep its own storage, so the values are copied."""
    local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    if isinstance(parameter, DTensor) and value.shape == parameter.shape:
        mesh, placements = parameter.device_mesh, parameter.placements
        if not isinstance(value, DTensor):
            value = distribute_tensor(value.detach(), mesh, placements, src_data_rank=None)
        elif tuple(value.placements) != tuple(placements):
            value = value.redistribute(mesh, placements)
        with torch.no_grad():
            local.copy_(value.to_local())
        return
    raise UsageError(
        f"`p.data = new` with a tensor of shape {tuple(value.shape)} for a sharded parameter of "
        f"shape {tuple(parameter.shape)}; allowed: its own shape; type --trainer.strategy ddp"
    )


def _compute(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The result of an operation by the rules of this file."""
    if name == "__iter__":
        return iter(_compute(Tensor.unbind, "unbind", args, kwargs))
    args, kwargs = tree_map_only(CopyView, CopyView.now, (args, kwargs))
    written = _in_place(name, args, kwargs)
    target = _target(args, kwargs)
    if written and not isinstance(target, DTensor):
        args, kwargs = tree_map_only(DTensor, lambda t: t.full_tensor(), (args, kwargs))
        return func(*args, **kwargs)
    mixed = not written and _mixed((args, kwargs))
    recorded = not written and torch.is_grad_enabled()
    if recorded and (mixed or _in_step((args, kwargs))) and _trains((args, kwargs)):
        args, kwargs = tree_map_only(DTensor, _gather, (args, kwargs))
        return func(*args, **kwargs)
    if getattr(func, "__module__", "") == "torch.nn.init":
        return _on_copies(func, args, kwargs, random=True)
    if name in _RANDOM and not written:
        return _on_copies(func, args, kwargs, random=True)
    refused = written and torch.is_grad_enabled() and target.requires_grad  # as by a plain tensor
    by_torch = not written or name in _OPERATORS or name.strip("_") in _ELEMENTWISE
    if mixed or not (by_torch or name.startswith("_foreach") or refused):
        return _on_copies(func, args, kwargs, random=name in _RANDOM)
    try:
        if written and not name.startswith("_foreach"):
            own = _replicated((args, kwargs), target.device_mesh)
            return func(*own[0], **own[1])
        result = func(*args, **kwargs)
    except (NotImplementedError, RuntimeError):  # torch has no rule for shards
        if refused:
            raise
        return _on_copies(func, args, kwargs)
    if name in _VIEWS and not _share_memory(result, args[0]):
        return _on_copies(func, args, kwargs)
    return result if written else tree_map_only(DTensor, _usable, result)


def _target(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What an in-place operation writes into; of a list the first tensor."""
    if kwargs.get("out") is not None:
        found = kwargs["out"]
    else:
        found = args[0] if args else next(iter(kwargs.values()), None)
    return next(iter(found), None) if isinstance(found, list | tuple) else found


def _usable(result: DTensor) -> Tensor:
    """A result that follows the rules too; a plain tensor for sums that are not complete."""
    partial = any(placement.is_partial() for placement in result.placements)
    return result.full_tensor() if result.ndim == 0 or partial else marked(result)


def _share_memory(result: Any, source: Any) -> bool:
    """Whether the shards of a result are views of those of its argument."""
    found = [each for each in tree_flatten(result)[0] if isinstance(each, Tensor)]
    if not isinstance(source, DTensor) or not all(isinstance(each, DTensor) for each in found):
        return not isinstance(source, DTensor)
    locals_: list[Any] = [cast(Any, each)._local_tensor for each in found]
    return all(_memory(each) == _memory(source._local_tensor) for each in locals_)


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class _Copy:
    """A gathered copy of a sharded tensor, which is made current before each use."""

    def __init__(self, sharded: DTensor) -> None:
        self.sharded = sharded
        with torch.inference_mode(False), torch.no_grad():
            whole = cast(DTensor, sharded.detach()).full_tensor()
            self.whole = whole.clone() if whole.is_inference() else whole
        self.version = self.whole._version

    @torch.no_grad()
    def update(self) -> None:
        """Gather again: the shards may have changed. All ranks call it."""
        self.whole.copy_(cast(DTensor, self.sharded.detach()).full_tensor())
        self.version = self.whole._version

    @property
    def written(self) -> bool:
        """Whether the copy has been written to since."""
        return self.whole._version != self.version

    @torch.no_grad()
    def write(self) -> None:
        """Copy this rank's rows to its shard if the copy has been written to."""
        if self.written:
            self.sharded._local_tensor.copy_(local_part(self.whole, self.sharded))
            self.version = self.whole._version


class CopyView(Tensor):
    """A view of a gathered copy of a sharded tensor: what is written to it goes to the shards."""

    @classmethod
    def of(cls, tensor: Tensor, copies: Iterable[_Copy]) -> Tensor:
        """Make it from a tensor that shares the memory of one of the copies; else the tensor."""
        if isinstance(tensor, DTensor):
            return tensor
        for copy in copies:
            if _memory(tensor) == _memory(copy.whole):
                view = tensor.detach().as_subclass(cls)
                vars(view)["_copy"] = copy
                return view
        return tensor

    def now(self) -> Tensor:
        """The same memory as a plain tensor, with the present values of the shards."""
        vars(self)["_copy"].update()
        return self.as_subclass(Tensor)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Apply a function to plain tensors in the place of views, and copy what it writes."""
        with _unmodified():
            kwargs = {} if kwargs is None else kwargs
            leaves = tree_flatten((args, kwargs))[0]
            views = [vars(leaf)["_copy"] for leaf in leaves if isinstance(leaf, CopyView)]
            copies = list(dict.fromkeys(views))
            plain: Any = tree_map_only(CopyView, CopyView.now, (args, kwargs))
            args, kwargs = plain[0], dict(plain[1])
            if any(isinstance(leaf, ShardedParameter) for leaf in leaves):
                result = _compute(func, getattr(func, "__name__", ""), args, kwargs)
            else:
                result = func(*args, **kwargs)
            for copy in copies:
                copy.write()
            return tree_map_only(Tensor, lambda tensor: CopyView.of(tensor, copies), result)


def _on_copies(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], random: bool = False
) -> Any:
    """Apply a function to gathered copies of shards, and copy what it writes into the shards."""
    copies: dict[int, _Copy] = {}

    def copied(tensor: DTensor) -> Tensor:
        if torch.is_grad_enabled() and tensor.grad_fn is not None:
            return tensor.full_tensor()  # part of a graph
        if id(tensor) not in copies:
            copies[id(tensor)] = _Copy(tensor)
        return copies[id(tensor)].whole

    leaves = tree_flatten((args, kwargs))[0]
    args, kwargs = tree_map_only(DTensor, copied, (args, kwargs))
    result = func(*args, **kwargs)
    written = [copy for copy in copies.values() if copy.written]
    if random:
        drawn = [leaf for leaf in tree_flatten(result)[0] if isinstance(leaf, Tensor)]
        _broadcast([*(copy.whole for copy in written), *([] if written else drawn)])
    for copy in copies.values():
        copy.write()
    for leaf in leaves:  # an in-place operation returns its argument
        if id(leaf) in copies and result is copies[id(leaf)].whole:
            return leaf
    return tree_map_only(Tensor, lambda each: CopyView.of(each, copies.values()), result)


@torch.no_grad()
def _broadcast(tensors: list[Tensor]) -> None:
    """Give all ranks the numbers of rank 0, whose generators may be elsewhere by now."""
    for tensor in tensors:
        numbers = tensor.detach().contiguous()
        if numbers.numel():
            dist.broadcast(numbers.view(-1).view(torch.uint8), 0)
            tensor.copy_(numbers)


def _in_place(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether an operation writes into its first argument, or into `out`."""
    if "out" in kwargs or name in ("__setitem__", "_foreach_mul_", "_foreach_add_"):
        return True
    if name.startswith("__i") and name.endswith("__"):
        return name not in ("__invert__", "__int__", "__index__")
    return name.endswith("_") and not name.endswith("__")


def _mixed(tree: Any) -> bool:
    """Whether there are plain tensors with axes among the arguments."""
    return tree_any_only(Tensor, lambda t: not isinstance(t, DTensor) and t.ndim > 0, tree)


def _in_step(tree: Any) -> bool:
    return any(gather.in_step for gather in _gatherers(tree))


def _trains(tree: Any) -> bool:
    """Whether a parameter that is trained is among the arguments."""
    return any(
        isinstance(leaf, ShardedParameter) and leaf.requires_grad and hasattr(leaf, "_gather")
        for leaf in tree_flatten(tree)[0]
    )


def _gatherers(tree: Any) -> Iterator[GatherOnUse]:
    for leaf in tree_flatten(tree)[0]:
        if isinstance(leaf, ShardedParameter) and hasattr(leaf, "_gather"):
            yield leaf._gather[0]  # pyright: ignore[reportAttributeAccessIssue]


def _gather(tensor: DTensor) -> Tensor:
    """The whole tensor; of a trained parameter the one whose gradients the unit reduces."""
    if isinstance(tensor, ShardedParameter) and tensor.requires_grad and hasattr(tensor, "_gather"):
        gather, group, parameter = tensor._gather  # pyright: ignore[reportAttributeAccessIssue]
        gather.hold(group)
        return parameter._unsharded_param
    return tensor.full_tensor()


def _replicated(tree: Any, mesh: DeviceMesh) -> Any:
    """Plain tensors with axes as DTensors, the same on all ranks: an operand for shards."""

    def replicated(tensor: Tensor) -> Tensor:
        if isinstance(tensor, DTensor) or tensor.ndim == 0:
            return tensor
        return DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)

    return tree_map_only(Tensor, replicated, tree)


def _register_hook(sharded: Any, hook: Callable[[Tensor], Any]) -> RemovableHandle:
    """`Tensor.register_hook`: the hook gets gradients of the gathered parameter, as under ddp."""
    hooks = keep(sharded._gather[2], OrderedDict()).hooks
    handle = RemovableHandle(hooks)
    hooks[handle.id] = hook
    return handle


def _refuse_hook(sharded: Any, hook: Callable[[Tensor], Any]) -> None:
    raise UsageError(
        "register_post_accumulate_grad_hook on a sharded parameter: gradients are accumulated in "
        "gathered copies; allowed: Tensor.register_hook, on_after_backward; type "
        "--trainer.strategy ddp"
    )


_REGISTER: dict[Any, Callable[..., Any]] = {
    Tensor.register_hook: _register_hook,
    Tensor.register_post_accumulate_grad_hook: _refuse_hook,
}


class _Kept:
    """What a parameter had before it was sharded, for the gathered parameter."""

    def __init__(self, hooks: OrderedDict[int, Any]) -> None:
        self.hooks = hooks
        self.attributes: dict[str, Any] = {}
        self.registered = False

    def __call__(self, own: Callable[[], None], parameter: Any) -> None:
        own()
        gathered = parameter._unsharded_param
        vars(gathered).update(self.attributes)
        if not self.registered and gathered.requires_grad:
            self.registered = True
            gathered.register_hook(self._changed)

    def _changed(self, gradient: Tensor) -> Tensor:
        for hook in list(self.hooks.values()):
            new = hook(gradient)
            gradient = gradient if new is None else new.to(gradient.dtype)
        return gradient


def keep(parameter: Any, hooks: OrderedDict[int, Any]) -> _Kept:
    """Let hooks be called with the gradients of a parameter of FSDP2 whenever it is gathered."""
    kept = vars(parameter).get("_kept")
    if kept is None:
        kept = parameter._kept = _Kept(hooks)
        parameter.to_unsharded = partial(kept, parameter.to_unsharded, parameter)
        if parameter.sharded_state.name == "UNSHARDED":
            kept(lambda: None, parameter)
    return kept


class GatherOnUse:
    """Gathers the units of a module whose parameters are used outside of their forward.

    gather = GatherOnUse(module)
    gather.mark()                    # after fully_shard, when the parameters are on their device
    loss = gather.around(module.training_step)(batch, batch_idx)
    gather.begin_backward(); loss.backward(); gather.end_backward()
    """

    def __init__(self, module: nn.Module) -> None:
        """Remember the module; `mark` looks for its units."""
        self.module = module
        self.in_step = False
        self.in_backward = False
        self.held: dict[Any, None] = {}  # groups that this object has gathered
        self.groups: list[Any] = []
        self._backward_passes = 0
        self.outputs: dict[Any, set[Any]] = {}  # nodes of a unit's outputs, by its groups
        self.escaping: dict[Any, None] = {}  # groups that results beside the outputs depend on

    def mark(self) -> None:
        """Let the sharded parameters of all units follow the rules of this file."""
        found: list[Any] = [unit._get_fsdp_state() for unit in units(self.module)]
        inner = [
            part._get_fsdp_state()
            for unit in units(self.module)
            for part in cast(nn.Module, unit).modules()
            if part is not unit and isinstance(part, FSDPModule)
        ]
        for state in found:
            if not any(state is each for each in inner):
                state._lazy_init()  # or the first unit that runs would be a root
        self.groups = [group for state in found for group in groups_of(state)]
        for group in self.groups:
            for parameter in group.fsdp_params:
                if "_setattr_on_modules" not in vars(parameter):
                    parameter._setattr_on_modules = partial(_set_on_modules, parameter)
                sharded = parameter.sharded_param
                if isinstance(marked(sharded), ShardedParameter):
                    sharded._gather = (self, group, parameter)
        for state in found:
            watched = hasattr(state, "_gather")
            state._gather = self
            if not watched:
                state._register_pre_backward_hook = partial(
                    _note_outputs, state, state._register_pre_backward_hook
                )
            if not watched:
                state._root_post_backward_final_callback = _watched(state)

    def keep(self, hooks: dict[str, Any], attributes: dict[str, dict[str, Any]]) -> None:
        """Take over hooks and attributes of the parameters from before sharding, by name."""
        for name, parameter in self.module.named_parameters():
            own = attributes.get(name, {})
            if not hasattr(parameter, "_gather") or (name not in hooks and not own):
                continue
            gathered: Any = parameter._gather  # pyright: ignore[reportAttributeAccessIssue]
            keep(gathered[2], hooks.get(name, OrderedDict())).attributes.update(own)

    def hold(self, group: Any) -> None:
        """Gather a group until the end of the backward pass, and keep its gradients whole."""
        if not group.is_unsharded:
            group.unshard()
            group.wait_for_unshard()
        group.reduce_grads = group.reshard_after_backward = False
        self.held[group] = None

    def around(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a step of the module in these rules; release what an earlier step holds.

        Raises:
            ValueError: some gradients would not be reduced, or some writes would be lost.
        """

        def gathered(*args: Any) -> Any:
            if not self.in_backward:
                self.release()
                self.outputs.clear()
            before, self.in_step = self.in_step, True
            try:
                result = step(*args)
                self._check_reduced()
                self.write_back()
                return result
            finally:
                self.in_step = before
                if not torch.is_grad_enabled():
                    self.release()

        return gathered

    def release(self) -> None:
        """Reshard what is held."""
        for group in self.held:
            _let_go(group)
        self.held.clear()

    def _check_reduced(self) -> None:
        """Refuse a backward pass that was started without the strategy.

        Raises:
            ValueError: it left gradients that would not be reduced.
        """
        parameters = [p for group in self.held for p in group.fsdp_params]
        copies = [getattr(p, "_unsharded_param", None) for p in parameters]
        if any(copy is not None and copy.grad is not None for copy in copies):
            raise UsageError(
                f"{type(self.module).__name__}: loss.backward() was called on weights that are used"
                " outside of a layer's forward; allowed: backward passes that the strategy starts;"
                " type self.manual_backward(loss)"
            )

    @property
    def looks(self) -> bool:
        """Whether the graph of the next backward pass is searched for results beside outputs."""
        passes = self._backward_passes
        return passes < 4 or passes & (passes - 1) == 0

    def begin_backward(self, loss: Tensor | None = None) -> None:
        """Before a backward pass: gather again what is held, and keep its gradients whole."""
        if self.looks and loss is not None:
            self._find_escaping(loss)
        self.in_backward = True
        self._backward_passes += 1
        for group in [*self.held, *self.escaping]:
            self.hold(group)  # it may have been resharded by a forward since

    def _find_escaping(self, loss: Tensor) -> None:
        """Find units that the loss depends on beside their outputs.

        FSDP2 gathers a unit when the gradient of an output arrives. A term that a layer has left in
        an attribute or a list, such as a penalty, would read memory that is freed. Ranks run
        the same operations on parameters, so they find the same units.
        """
        found = escaping(loss, self.groups, self.outputs)
        self.escaping |= dict.fromkeys(group for group in self.groups if group in found)

    def write_back(self) -> None:
        """Copy what a step has written into gathered parameters to the shards.

        Raises:
            ValueError: it cannot be copied, since the gathered parameters have half precision.
        """
        for group in self.groups:
            if group.is_unsharded:
                _write_back(group, self._refuse, self._backward_passes % CHECK_EVERY in (0, 1))

    def _refuse(self, parameter: Any) -> None:
        owner, attribute = parameter._module_info.module, parameter._module_info.param_name
        names = (name for name, module in self.module.named_modules() if module is owner)
        name = f"{next(names, '')}.{attribute}".lstrip(".")
        raise UsageError(
            f"{type(self.module).__name__}: {name} was changed within a step, where it is a "
            "gathered copy in half precision; allowed: changes before or after the step; move it "
            "to on_train_batch_end"
        )

    def end_backward(self) -> None:
        """After a backward pass: reduce the gradients of what is held, and reshard."""
        self.in_backward = False
        for group in self.held:
            group.reduce_grads = group.reshard_after_backward = True
            group._training_state = type(group._training_state).IDLE
            group.post_backward()
            group.finalize_backward()
            group._training_state = type(group._training_state).IDLE
            _let_go(group)
        self.held.clear()


class _Rows:
    """The rows of a group's gathered parameters that this rank's shards hold."""

    def __init__(self, group: Any) -> None:
        ranks, rank = group.mesh_info.shard_mesh_size, group.mesh_info.shard_mesh_rank
        self.parameters = [
            p
            for p in group.fsdp_params
            if not isinstance(p._unsharded_param, DTensor)
            and p.fsdp_placement.dim == 0
            and p.sharded_param.to_local().numel()
        ]
        self.copies, self.shards = [], []
        for p in self.parameters:
            shard = p.sharded_param.to_local().detach()
            first = -(-p._unsharded_param.shape[0] // ranks) * rank
            self.copies.append(_gathered(p).narrow(0, first, shard.shape[0]))
            self.shards.append(shard)
        self.alike = all(c.dtype == s.dtype for c, s in zip(self.copies, self.shards, strict=True))
        self.versions: list[int] = []
        self.have_changed()

    def have_changed(self) -> bool:
        """Whether an operation has written into a gathered parameter since the last call.

        Autograd counts such operations, but not those on `p.data`, which has a count of its own.
        """
        before = self.versions
        self.versions = [p._unsharded_param._version for p in self.parameters]
        return before != self.versions

    def are_old(self) -> bool:
        """Whether the shards have been moved since."""
        pairs = zip(self.shards[:1], self.parameters, strict=False)
        return any(s.data_ptr() != p.sharded_param.to_local().data_ptr() for s, p in pairs)


def _gathered(parameter: Any) -> Tensor:
    """FSDP2's memory of a gathered parameter, without its padding."""
    flat, strides = parameter.all_gather_outputs[0], parameter._contiguous_orig_stride
    return flat.as_strided(parameter._orig_size, strides, 0)


@torch.no_grad()
def _write_back(group: Any, refuse: Callable[[Any], None], look: bool) -> None:
    """Copy the gathered parameters of one group to the shards, where they have been written."""
    rows: Any = vars(group).get("_written_rows")
    if rows is None or rows.are_old():
        rows = group._written_rows = _Rows(group)
    for p in rows.parameters:
        copy = p._unsharded_param
        if copy.data_ptr() != p.all_gather_outputs[0].data_ptr():  # p.data = new
            if not rows.alike or copy.shape != p._orig_size:
                refuse(p)
            own = _gathered(p)
            # `p.data = new` is no change for autograd in one process, so it is none here
            with grad_mode._unsafe_preserve_version_counter(p.all_gather_outputs[0]):
                own.copy_(copy)
            copy.data = own
    if not rows.parameters:  # all of them are frozen
        return
    if rows.alike:
        _foreach_copy_(rows.shards, rows.copies)
    elif rows.have_changed() or look:
        for p, copy, shard in zip(rows.parameters, rows.copies, rows.shards, strict=True):
            if not torch.equal(copy, shard.to(copy.dtype)):
                refuse(p)


def _set_on_modules(parameter: Any, new: nn.Parameter) -> None:
    """Set a sharded or gathered parameter on its modules, but for those of a functional call.

    `torch.func.functional_call` puts other tensors in the place of parameters while it runs.
    """
    info = parameter._module_info
    own = (parameter.sharded_param, vars(parameter).get("_unsharded_param"))
    set_on(info.module, info.param_name, new, own)
    for module, name in zip(info.shared_modules, info.shared_param_names, strict=True):
        set_on(module, name, new, own)


def set_on(module: nn.Module, name: str, new: nn.Parameter, own: tuple[Any, ...]) -> None:
    """Set a parameter in the place of one of its two forms."""
    now = module._parameters.get(name)
    if now is not own[0] and now is not own[1]:
        return
    if type(module).__setattr__ is nn.Module.__setattr__:
        module._parameters[name] = new
    else:  # a recurrent layer keeps a list of them
        setattr(module, name, new)


def is_marked(module: nn.Module) -> bool:
    """Whether a module has parameters that follow the rules of this file."""
    return any(isinstance(p, ShardedParameter) for p in module.parameters())


def _note_outputs(state: Any, own: Callable[[Any], Any], output: Any) -> Any:
    """Keep the nodes of a unit's outputs, where gradients enter the unit."""
    output = own(output)
    gather = state._gather
    if gather.looks and torch.is_grad_enabled():
        leaves = [leaf for leaf in tree_flatten(output)[0] if isinstance(leaf, Tensor)]
        nodes = {leaf.grad_fn for leaf in leaves if leaf.grad_fn is not None}
        for group in groups_of(state):
            gather.outputs.setdefault(group, set()).update(nodes)
    return output


def escaping(loss: Tensor, groups: list[Any], outputs: dict[Any, set[Any]]) -> set[Any]:
    """The groups with a parameter from which a path leads to the loss, but through no output.

    Args:
        loss: where the backward pass begins.
        groups: all groups of parameters of FSDP2.
        outputs: of each group the nodes of its unit's outputs.
    """
    owner = {
        id(p._unsharded_param): group
        for group in groups
        for p in group.fsdp_params
        if hasattr(p, "_unsharded_param")
    }
    root = loss.grad_fn
    leaves: dict[Any, list[Any]] = {}  # nodes of parameters, by their group
    readers: dict[Any, list[Any]] = {root: []}
    waiting = [root]
    while waiting:
        node = waiting.pop()
        if (group := owner.get(id(getattr(node, "variable", None)))) is not None:
            leaves.setdefault(group, []).append(node)
        for source, _ in node.next_functions if node is not None else ():
            if source is None:
                continue
            if source not in readers:
                readers[source] = []
                waiting.append(source)
            readers[source].append(node)
    found: set[Any] = set()
    for group, waiting in leaves.items():  # one walk a group: from each leaf it would be quadratic
        inside, seen = outputs.get(group, set()), set(waiting)
        while waiting:
            node = waiting.pop()
            if node is root:
                found.add(group)
                break
            new = [each for each in readers[node] if each not in seen and each not in inside]
            seen.update(new)
            waiting += new
    return found


def _let_go(group: Any) -> None:
    """Let a group gather and reduce as FSDP2 does."""
    group.reduce_grads = group.reshard_after_backward = True
    if group.is_unsharded:
        group._to_sharded()


def _have_gradients(groups: list[Any]) -> bool:
    """Whether a backward pass reached parameters: loss.backward() in manual optimization."""
    return any(p.sharded_param.grad is not None for group in groups for p in group.fsdp_params)


def _watched(state: Any) -> Callable[[], None]:
    """Keep units gathered after a backward pass within a step (a gradient penalty)."""
    own = state._root_post_backward_final_callback

    def final_callback() -> None:
        own()
        gather = state._gather
        if gather.in_step and not gather.in_backward:
            groups = [g for each in state._state_ctx.all_states for g in groups_of(each)]
            if gather.module.automatic_optimization or not _have_gradients(groups):
                for group in groups:
                    gather.hold(group)

    return final_callback
