"""Step FSDP2's sharded parameters with optimizers that do not support DTensors.

    elementwise    step(shards)                    each rank steps its rows, as plain tensors
    per tensor     gather -> step(full) -> scatter       one rank (the owner) steps each tensor
    coupled        rejected with an error

Outside of the optimizer's methods, its param groups hold the module's parameters. Within them they
hold plain tensors: this rank's rows, which share the parameters' memory, or full tensors. In a
checkpoint, state tensors with the shape of the rows are sharded like the parameter. The state of a
full tensor is on its owner only. optimizer_probe.py measures which of the three kinds applies.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils._pytree import keystr, tree_map_only, tree_map_with_path

from ravine.errors import UsageError

from ..checkpoint.checkpoint_error import CheckpointError
from ..work_partition import assign_balanced
from .optimizer_probe import ProbeResult, StateShapeFlags, probe_optimizer
from .original_parameters import distribute_like, iter_nested_optimizers
from .owner_exchange import gather_to_owners, scatter_from_owners, shard_group, sharded_axis

StateDict = dict[Any, Any]
VERDICT_ORDER = ("elementwise", "per tensor", "coupled")


def member_optimizers(optimizer: Optimizer) -> list[Optimizer]:
    """Return the members of a composite optimizer, or the optimizer itself in a list."""
    is_composite = getattr(optimizer, "is_composite", False)
    return list(cast(Any, optimizer).optimizers) if is_composite else [optimizer]


def supports_dtensor(optimizer: Optimizer) -> bool:
    """Whether an optimizer steps DTensors itself, as its class declares."""
    flag_names = ("supports_dtensor", "needs_full_gradient")
    return any(getattr(optimizer, name, False) for name in flag_names)


def probe_on_all_ranks(optimizer: Optimizer) -> ProbeResult:
    """Probe an optimizer on all ranks, and return the most restrictive result."""
    results: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(results, tuple(probe_optimizer(optimizer)))
    return ProbeResult(*max(results, key=lambda result: VERDICT_ORDER.index(result[0])))


def check_not_coupled(optimizer: Optimizer, result: ProbeResult) -> None:
    """Check that the steps of an optimizer can be divided among ranks.

    Raises:
        UsageError: the optimizer is coupled.
    """
    if result.update_kind == "coupled":
        raise UsageError(
            f"{type(optimizer).__name__} {result.reason}, so its parameters cannot be divided "
            "among ranks",
            ["optimizers that step each parameter separately, such as AdamW"],
            'use Trainer(strategy="ddp")',
            flag="--trainer.strategy=ddp",
        )


def check_members_not_coupled(optimizer: Optimizer) -> None:
    """Check that no member is coupled, because each rank steps some parameters only (ZeRO-1).

    Raises:
        UsageError: see `check_not_coupled`.
    """
    for member in member_optimizers(optimizer):
        if "_is_probed" not in vars(member) and not supports_dtensor(member):
            check_not_coupled(member, probe_on_all_ranks(member))
            vars(member)["_is_probed"] = True


def shard_optimizer_steps(optimizer: Optimizer) -> None:
    """Make an optimizer, or each member of a composite one, step sharded parameters.

    Its methods are replaced: by those of LocalShardStepper if it is elementwise, of OwnerStepper if
    it steps each tensor separately. Every rank calls it.

    Raises:
        UsageError: for a coupled optimizer.
    """
    # the members of a composite optimizer, or the optimizer itself
    for member in member_optimizers(optimizer):
        # set by an earlier call
        if "_shard_stepper" in vars(member) or supports_dtensor(member):
            continue
        sharded_params = [
            p for group in member.param_groups for p in group["params"] if isinstance(p, DTensor)
        ]
        result = ProbeResult("elementwise")  # on one rank a shard is the full tensor
        if any(p.device_mesh.size() > 1 for p in sharded_params):
            # steps a copy on small tensors, to measure the kind of update
            result = probe_on_all_ranks(member)
            # coupled: the update of a parameter depends on other parameters
            check_not_coupled(member, result)
        if result.update_kind == "per tensor":
            # the exchange of full tensors below needs shards that are rows
            _check_row_sharded(member, sharded_params)
            OwnerStepper(member).replace_methods()
        elif sharded_params:
            LocalShardStepper(member, result.has_param_shape).replace_methods()
        else:
            # None: nothing is replaced, because no parameter is sharded
            vars(member)["_shard_stepper"] = None


def copy_methods_to_wrapper(optimizer: Optimizer, wrapper: Any) -> None:
    """Copy replaced methods to Lightning's wrapper, which calls the class's methods otherwise."""
    for name, value in vars(optimizer).items():
        if name != "step" and isinstance(getattr(value, "__self__", None), Optimizer):
            vars(wrapper).setdefault(name, value)


def owns_parameter(optimizers: list[Optimizer], parameter: Tensor) -> bool | None:
    """Whether this rank keeps the full state of a parameter; None if each rank has a shard."""
    for optimizer in optimizers:
        for member in member_optimizers(optimizer):
            stepper = vars(member).get("_shard_stepper")
            if isinstance(stepper, OwnerStepper) and id(parameter) in stepper.owner_by_id:
                return stepper.owner_by_id[id(parameter)] == stepper.rank_in_shard_group(parameter)
    return None


def _check_row_sharded(member: Optimizer, parameters: list[DTensor]) -> None:
    for p in parameters:
        shard_placements = [placement for placement in p.placements if not placement.is_replicate()]
        if len(shard_placements) > 1 or not all(
            placement.is_shard(0) for placement in shard_placements
        ):
            raise UsageError(
                f"{type(member).__name__} needs full tensors, and these are split over more than "
                "the data-parallel ranks",
                ["elementwise optimizers such as AdamW"],
                'use Trainer(strategy="zero3")',
                flag="--trainer.strategy=zero3",
            )


class _PlainTensorStepper:
    """Replaces the methods of an optimizer, so that they run on plain tensors.

    While a method runs, `plain_params` (by the id of a sharded parameter) take the place of the
    parameters in groups and state, and `_original_groups` has each group with its parameters.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.call_depth = 0
        self.plain_params: dict[int, nn.Parameter] = {}  # by the id of the parameter
        self._original_groups: list[tuple[dict[str, Any], list[Any]]] = []
        self._param_pairs: list[tuple[Any, nn.Parameter]] = []  # parameters and plain tensors

    def replace_methods(self) -> None:
        """Replace step, state_dict, load_state_dict and the optimizer's own public methods."""
        vars(self.optimizer)["_shard_stepper"] = self
        self._convert_initial_state()
        replacements = {
            "step": self._run_step,
            "state_dict": self._run_state_dict,
            "load_state_dict": self._run_load_state_dict,
        }
        for name in self._find_method_names() | replacements.keys():
            original = getattr(self.optimizer, name)
            replacement = replacements.get(name, self._run_method)
            setattr(self.optimizer, name, self._make_method(name, original, replacement))

    def _convert_initial_state(self) -> None:
        """Make plain tensors of the state that a constructor has created (torch's Adagrad)."""
        for nested in iter_nested_optimizers(self.optimizer):
            for p in [p for p in nested.state if isinstance(p, DTensor)]:
                values = self.state_to_plain(nested.state[p], p)  # every rank must call it
                if self.keeps_state_of(p):
                    nested.state[p] = values
                else:
                    del nested.state[p]

    def _find_method_names(self) -> set[str]:
        """Return the names of public methods that the optimizer's class defines, not torch's."""
        optimizer_class = type(self.optimizer)
        method_names = set()
        for base_class in optimizer_class.__mro__:
            # the classes after torch's Optimizer are its own bases
            if base_class is Optimizer:
                break
            method_names |= {
                k for k, v in vars(base_class).items() if callable(v) and not k.startswith("_")
            }
        # these do not use the values of parameters
        method_names -= {"zero_grad", "add_param_group", "profile_hook_step"}
        return {
            name
            for name in method_names
            if not name.startswith("register_")
            and not isinstance(getattr(optimizer_class, name, None), type)  # a nested class
        }

    def _make_method(
        self, name: str, original: Callable[..., Any], replacement: Callable[..., Any]
    ) -> Any:
        """Return a method that calls `replacement`; within another replaced method `original`.

        Args:
            name: name of the method.
            original: the optimizer's method, bound to the optimizer.
            replacement: called with `original` and the arguments of the call.
        """

        def method(optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
            # call_depth: number of replaced methods that are running
            return (
                replacement(original, *args, **kwargs)
                if self.call_depth == 0
                else original(*args, **kwargs)
            )

        method.__name__ = name
        if hasattr(original, "_wrapped_by_lr_sched"):  # or LR schedulers warn about a replaced step
            method.__dict__["_wrapped_by_lr_sched"] = True
        return MethodType(method, self.optimizer)

    def _run_method(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run any other method, such as train() and eval() of schedule-free optimizers."""
        with self.with_plain_params():
            return original(*args, **kwargs)

    def _run_step(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run the original `step` on plain tensors; the closure runs on the module's parameters."""
        closure = kwargs.pop("closure", args[0] if args else None)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                # The first call trains the module, which needs its own parameters. Here no swap to
                # plain tensors has to be undone for it; later calls undo it, see below.
                loss = closure()
        is_first_call = True

        # the closure that the original step gets: its first call returns the loss from above
        def reuse_first_loss() -> Any:
            nonlocal is_first_call
            if is_first_call:
                is_first_call = False
                return loss
            # groups and state have the module's parameters again while the closure runs
            with self.with_module_params(), torch.enable_grad():
                return closure()  # pyright: ignore[reportOptionalCall]

        # Within it groups and state have plain tensors in place of DTensors. `step=True`: their
        # gradients, too.
        with self.with_plain_params(step=True) as has_params:
            if not has_params:  # other ranks own all parameters
                return loss
            result = original(**kwargs) if closure is None else original(reuse_first_loss, **kwargs)
            return loss if result is None else result

    def _run_state_dict(self, original: Callable[..., Any]) -> StateDict:
        with self.with_plain_params(use_placeholders=True):
            return self.to_checkpoint(original())

    def _run_load_state_dict(self, original: Callable[..., Any], state_dict: StateDict) -> None:
        with self.with_plain_params(use_placeholders=True):
            original(self.from_checkpoint(state_dict))

    @contextmanager
    def with_module_params(self) -> Iterator[None]:
        """Restore the module's parameters within a step, for a closure that runs the module."""
        self.restore_module_params()
        self.call_depth = 0
        try:
            yield
        finally:
            self.call_depth = 1
            self.swap_in_plain(step=True, use_placeholders=False)

    @contextmanager
    def with_plain_params(
        self, step: bool = False, use_placeholders: bool = False
    ) -> Iterator[bool]:
        """Put plain tensors into groups and state; yield whether there are any."""
        self.call_depth += 1
        has_params = self.swap_in_plain(step, use_placeholders)
        try:
            yield has_params
        finally:
            self.restore_module_params()
            self.call_depth -= 1

    def keeps_state_of(self, parameter: Tensor) -> bool:
        """Whether this rank keeps the optimizer state of a parameter, or of its shard."""
        return True

    def swap_in_plain(self, step: bool, use_placeholders: bool) -> bool:
        """Replace DTensors by plain tensors in groups and state; return whether there are any.

        Args:
            step: whether the plain tensors also get gradients.
            use_placeholders: whether their values are not needed.
        """
        raise NotImplementedError

    def restore_module_params(self) -> None:
        """Restore the module's parameters in groups and state."""
        raise NotImplementedError

    def state_to_plain(self, state: Any, parameter: DTensor) -> Any:
        """Return the state of one parameter as plain tensors; every rank calls it."""
        return tree_map_only(DTensor, lambda value: value.full_tensor(), state)

    def to_checkpoint(self, state_dict: StateDict) -> StateDict:
        """Convert a state_dict for a checkpoint: shards become DTensors."""
        return state_dict

    def from_checkpoint(self, state_dict: StateDict) -> StateDict:
        """Convert a loaded state_dict to plain tensors."""
        return state_dict

    def _iter_sharded_params(self) -> Iterator[DTensor]:
        seen_ids = set()
        for nested in iter_nested_optimizers(self.optimizer):
            for group in nested.param_groups:
                for p in group["params"]:
                    if isinstance(p, DTensor) and id(p) not in seen_ids:
                        seen_ids.add(id(p))
                        yield p

    def _replace_params(self, should_keep: Callable[[Any], bool]) -> bool:
        """Replace parameters by plain tensors in groups and state; return whether any are left.

        Parameters for which `should_keep` is false are removed from their group.
        """
        self._original_groups = []
        has_params = False
        visited: set[int] = set()  # ids: a wrapper may share groups and state
        # the optimizer itself, and optimizers that it wraps
        for nested in iter_nested_optimizers(self.optimizer):
            for group in nested.param_groups:
                if id(group) in visited:
                    continue
                visited.add(id(group))
                self._original_groups.append((group, group["params"]))
                group["params"] = [
                    # plain_params: by the id of a sharded parameter its plain tensor
                    self.plain_params.get(id(p), p)
                    for p in group["params"]
                    if should_keep(p)
                ]
                has_params |= bool(group["params"])
            if id(nested.state) not in visited:
                visited.add(id(nested.state))
                # _param_pairs: sharded parameters, and the plain tensors that replace them
                plain_by_param_id = {id(p): plain for p, plain in self._param_pairs}
                # the state of an optimizer has parameters as keys
                self._replace_state_keys(nested.state, plain_by_param_id)
        return has_params

    def _restore_params(self) -> None:
        """Undo `_replace_params`: put the module's parameters into groups and state."""
        for group, parameters in self._original_groups:
            group["params"] = parameters
        restored_ids = {id(parameters) for _, parameters in self._original_groups}
        # _param_pairs: sharded parameters, and the plain tensors that replace them
        params_by_plain_id: dict[int, Any] = {id(plain): p for p, plain in self._param_pairs}
        visited: set[int] = set()
        for nested in iter_nested_optimizers(self.optimizer):
            for group in nested.param_groups:
                # load_state_dict creates new groups, with the plain tensors
                is_new = id(group["params"]) not in restored_ids
                if is_new and any(id(p) in params_by_plain_id for p in group["params"]):
                    group["params"] = [params_by_plain_id.get(id(p), p) for p in group["params"]]
            if id(nested.state) not in visited:
                visited.add(id(nested.state))
                # the state of an optimizer has parameters as keys
                self._replace_state_keys(nested.state, params_by_plain_id)
        for _, plain in self._param_pairs:
            plain.grad = None

    @staticmethod
    def _replace_state_keys(state: Any, new_keys: dict[int, Any]) -> None:
        """Replace the parameters that are keys of a state; `new_keys` maps an id to a new key."""
        renamed = {new_keys.get(id(key), key): value for key, value in state.items()}
        state.clear()
        state.update(renamed)

    def _params_by_index(self, state_dict: StateDict) -> dict[Any, Any]:
        """Map the indices of a state_dict to parameters; empty if it has another format."""
        groups = state_dict.get("param_groups") if isinstance(state_dict, dict) else None
        group_params = [parameters for _, parameters in self._original_groups]
        if not isinstance(groups, list) or not isinstance(state_dict.get("state"), dict):
            return {}
        numbered = {}
        for group, parameters in zip(groups, group_params, strict=False):
            if isinstance(group, dict) and isinstance(group.get("params"), list):
                numbered |= dict(zip(group["params"], parameters, strict=False))
        return numbered


class LocalShardStepper(_PlainTensorStepper):
    """Steps this rank's rows with an elementwise optimizer."""

    def __init__(self, optimizer: Optimizer, has_param_shape: StateShapeFlags) -> None:
        """Store which entries of the state have the shape of the parameter."""
        super().__init__(optimizer)
        self.has_param_shape = has_param_shape

    def swap_in_plain(self, step: bool, use_placeholders: bool) -> bool:
        """Replace parameters by their local rows, plain tensors that share memory.

        Args:
            step: whether the rows also get the local gradients.
            use_placeholders: not used, because local rows need no memory.

        Returns:
            true: no parameter is removed from its group.
        """
        self._param_pairs = []
        with torch._C.DisableTorchFunctionSubclass():  # attributes of sharded parameters are slow
            for p in self._iter_sharded_params():
                rows, requires_grad = p._local_tensor, p.requires_grad
                plain = self.plain_params.get(id(p))  # of an earlier call, which is used again
                if (
                    plain is None
                    or plain.data_ptr() != rows.data_ptr()  # the shard got other memory
                    or plain.shape != rows.shape
                ):
                    plain = nn.Parameter(rows.detach(), requires_grad)
                    self.plain_params[id(p)] = plain
                elif plain.requires_grad != requires_grad:
                    plain.requires_grad = requires_grad
                if step and (gradient := p.grad) is not None:
                    # _local_gradient: this rank's rows, with the placements of the parameter
                    plain.grad = _local_gradient(p, gradient)
                self._param_pairs.append((p, plain))
        self._replace_params(lambda p: True)
        return True

    def restore_module_params(self) -> None:
        """Restore the module's parameters in groups and state."""
        self._restore_params()

    def to_checkpoint(self, state_dict: StateDict) -> StateDict:
        """Convert state tensors with the shape of the rows to DTensors, sharded like the parameter.

        Raises:
            CheckpointError: the probe of the optimizer did not have this state tensor.
        """
        return self._map_state(
            state_dict, self._rows_to_dtensor, require_known=bool(self.has_param_shape)
        )

    def from_checkpoint(self, state_dict: StateDict) -> StateDict:
        """Take this rank's rows of state tensors with the shape of the parameter."""
        return self._map_state(state_dict, self._dtensor_to_rows)

    def _map_state(
        self,
        state_dict: StateDict,
        change: Callable[[Tensor, DTensor, bool], Tensor],
        require_known: bool = False,
    ) -> StateDict:
        params_by_index = self._params_by_index(state_dict)
        state = dict(state_dict["state"]) if params_by_index else {}
        for number, values in state.items():
            p = params_by_index.get(number)
            if isinstance(p, DTensor):
                state[number] = self._map_param_state(values, p, change, require_known)
        return {**state_dict, "state": state} if params_by_index else state_dict

    def state_to_plain(self, state: Any, parameter: DTensor) -> Any:
        """Take this rank's rows of the state of one parameter."""
        return self._map_param_state(state, parameter, self._dtensor_to_rows)

    def _map_param_state(
        self,
        state: Any,
        parameter: DTensor,
        change: Callable[[Tensor, DTensor, bool], Tensor],
        require_known: bool = False,
    ) -> Any:
        """Replace the tensors in the state of one parameter by `change(tensor, parameter, flag)`.

        Args:
            state: the state of the parameter: tensors and other values.
            parameter: the parameter.
            change: its third argument is whether the tensor has the shape of the parameter.
            require_known: whether each tensor must have occurred in the probe of the optimizer.

        Raises:
            CheckpointError: with `require_known`, a tensor did not occur.
        """
        num_axes = parameter.ndim

        def map_leaf(path: Any, leaf: Any) -> Any:
            """Change a tensor of the state; `path` is its path in the state."""
            if not isinstance(leaf, Tensor):
                return leaf
            # has_param_shape: flags that the probe of the optimizer has recorded
            is_param_shaped = self.has_param_shape.get((num_axes, keystr(path)))
            # a tensor with another number of axes has not the shape of the parameter; the numbers
            # of axes are the same on all ranks, so all or none raise
            if is_param_shaped is None and require_known and leaf.ndim == num_axes:
                raise CheckpointError(
                    f"{type(self.optimizer).__name__} keeps{keystr(path)} in its state, which it "
                    "did not in a trial of three steps, so its shards cannot be gathered",
                    ["entries that the first steps create"],
                    'use Trainer(strategy="ddp")',
                    flag="--trainer.strategy=ddp",
                    exit_status=1,
                )
            # without a flag the shapes decide
            return change(leaf, parameter, True if is_param_shaped is None else is_param_shaped)

        return tree_map_with_path(map_leaf, state)

    @staticmethod
    def _rows_to_dtensor(value: Tensor, parameter: DTensor, is_param_shaped: bool) -> Tensor:
        rows = parameter._local_tensor
        if isinstance(value, DTensor) or not is_param_shaped or value.shape != rows.shape:
            return value
        mesh, placements = parameter.device_mesh, parameter.placements
        size = {"shape": parameter.shape, "stride": parameter.stride()}
        return DTensor.from_local(value, mesh, placements, run_check=False, **size)

    @staticmethod
    def _dtensor_to_rows(value: Tensor, parameter: DTensor, is_param_shaped: bool) -> Tensor:
        if isinstance(value, DTensor):
            return value._local_tensor if is_param_shaped else value.full_tensor()
        if not is_param_shaped or value.shape != parameter.shape:
            return value
        shard = distribute_like(value.to(parameter.device), parameter)
        return shard._local_tensor if isinstance(shard, DTensor) else shard


class OwnerStepper(_PlainTensorStepper):
    """Steps full tensors with a per-tensor optimizer: each tensor on one rank, its owner.

    `owner_by_id` has the owner's rank in the shard group, by the id of the sharded parameter.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        """Assign the owners."""
        super().__init__(optimizer)
        self.owner_by_id: dict[int, int] = {}  # rank in the shard group, by id of the parameter
        self._has_values = False  # whether owners hold full values now
        self._assign_owners()

    def _assign_owners(self) -> None:
        """Assign the smallest parameter of each group to rank 0, and balance the other ones.

        A checkpoint has the param group settings of rank 0. Their step counters advance only if
        rank 0 steps a parameter of each group.
        """
        # elements on each rank, by the number of ranks of a shard group
        loads_by_num_ranks: dict[int, list[int]] = {}
        for group in self.optimizer.param_groups:
            params_by_num_ranks: dict[int, list[DTensor]] = {}  # by the size of the shard group
            for p in group["params"]:
                if not isinstance(p, DTensor) or id(p) in self.owner_by_id:
                    continue
                # sharded_axis: the mesh axis over which it is sharded; None: replicated
                is_sharded = sharded_axis(p) is not None
                num_ranks = dist.get_world_size(shard_group(p)) if is_sharded else 1
                params_by_num_ranks.setdefault(num_ranks, []).append(p)
            for num_ranks, parameters in params_by_num_ranks.items():
                loads = loads_by_num_ranks.setdefault(num_ranks, [0] * num_ranks)
                first, *others = sorted(parameters, key=lambda p: p.numel())
                loads[0] += first.numel()
                # a rank for each size; it adds the sizes to `loads`, which stay about equal
                assigned_ranks = assign_balanced([p.numel() for p in others], loads)
                for p, rank in zip([first, *others], [0, *assigned_ranks], strict=True):
                    self.owner_by_id[id(p)] = rank

    def rank_in_shard_group(self, parameter: Any) -> int:
        """Return this rank's index in the group over which a parameter is sharded."""
        return dist.get_rank(shard_group(parameter)) if sharded_axis(parameter) is not None else 0

    def keeps_state_of(self, parameter: Any) -> bool:
        """Whether this rank owns a parameter."""
        if not isinstance(parameter, DTensor):
            return True  # not sharded: every rank does the same step
        return self.owner_by_id[id(parameter)] == self.rank_in_shard_group(parameter)

    def swap_in_plain(self, step: bool, use_placeholders: bool) -> bool:
        """Put full tensors into the groups of their owners, and remove the parameters of others.

        Args:
            step: whether the full tensors also get their full gradients.
            use_placeholders: put tensors without values into the groups of all ranks, which keep
                the indices of parameters in a state_dict; nothing is sent.

        Returns:
            whether this rank has any tensor to step.
        """
        # an owner for each parameter that has none
        self._assign_owners()
        self._param_pairs = []
        parameters = list(self._iter_sharded_params())
        values: dict[int, Tensor] = {}  # by id of the parameter
        grads: dict[int, Tensor] = {}
        if not use_placeholders:
            local_values = [(p, p._local_tensor) for p in parameters]
            with_grad = [(p, p.grad) for p in parameters if step and p.grad is not None]
            local_grads = [(p, _local_gradient(p, gradient)) for p, gradient in with_grad]
            # together, to send fewer messages
            full_tensors = gather_to_owners(local_values + local_grads, self.owner_by_id)
            full_values = full_tensors[: len(parameters)]
            full_grads = full_tensors[len(parameters) :]
            values = {id(p): full for p, full in zip(parameters, full_values, strict=True)}
            grads = {id(p): full for (p, _), full in zip(with_grad, full_grads, strict=True)}
        for p in parameters:
            full_param = self.plain_params.get(id(p))
            if full_param is None:
                # without elements: only its owner sets the data below
                full_param = nn.Parameter(p._local_tensor.new_empty(0), False)
                self.plain_params[id(p)] = full_param
            # keeps_state_of: whether this rank is the owner
            if self.keeps_state_of(p) and use_placeholders:
                full_param.data = p._local_tensor.new_empty(p.shape)
            elif self.keeps_state_of(p):
                full_param.data = values[id(p)]
                if id(p) in grads:
                    full_param.grad = grads[id(p)]
            full_param.requires_grad = p.requires_grad
            self._param_pairs.append((p, full_param))
        self._has_values = not use_placeholders
        return self._replace_params(lambda p: use_placeholders or self.keeps_state_of(p))

    def restore_module_params(self) -> None:
        """Scatter the rows of the owners' full tensors to the ranks' shards."""
        self._restore_params()
        pairs = self._param_pairs
        if self._has_values:
            scatter_from_owners([(p, full_param.data) for p, full_param in pairs], self.owner_by_id)
        for _, full_param in pairs:
            full_param.data = full_param.data.new_empty(0)

    def from_checkpoint(self, state_dict: StateDict) -> StateDict:
        """Keep the full state of the parameters that this rank owns."""
        params_by_index = self._params_by_index(state_dict)
        state = {
            number: values
            for number, values in (state_dict["state"].items() if params_by_index else ())
            if self.keeps_state_of(params_by_index.get(number))
        }
        return {**state_dict, "state": state} if params_by_index else state_dict


def _local_gradient(parameter: Any, gradient: Tensor) -> Tensor:
    """Return the gradient of this rank's rows; under tp it may have other placements."""
    if not isinstance(gradient, DTensor):
        return gradient
    param_spec, grad_spec = parameter._spec, gradient._spec
    if param_spec is not grad_spec and tuple(param_spec.placements) != tuple(grad_spec.placements):
        gradient = gradient.redistribute(parameter.device_mesh, parameter.placements)
    return gradient._local_tensor
