"""Gather FSDP2 units whose parameters are used outside of the forward pass of the unit.

`GatherOnUse` keeps such a unit gathered until the end of the backward pass, and then reduces the
gradients of all uses. It installs the rules of `ShardedParameter` (sharded_parameter.py) on the
parameters of a module, and copies writes into gathered parameters to the shards
(gathered_writes.py).
"""

from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._C._functorch import peek_interpreter_stack
from torch.distributed.fsdp import FSDPModule

from ravine.errors import UsageError

from ..parallel_module import fsdp_units
from .escaping_parameters import find_escaping_groups, record_output_nodes
from .gathered_writes import write_back_group
from .sharded_parameter import (
    GatherInfo,
    ShardedParameter,
    as_sharded_parameter,
    attach_hooks,
)
from .torch_attributes import fsdp_param_groups

# backward passes between searches for lost `p.data` writes (half precision)
CHECK_WRITES_EVERY = 50


class GatherOnUse:
    """Gathers FSDP units whose parameters are used outside of their forward.

    For example:

        gather = GatherOnUse(module)
        gather.install()  # after fully_shard, when the parameters are on their device
        loss = gather.wrap_step(module.training_step)(batch, batch_idx)
        gather.begin_backward(); loss.backward(); gather.end_backward()
    """

    def __init__(self, module: nn.Module) -> None:
        """Store the module; `install` finds its units."""
        self.module = module
        self.is_in_step = False
        self.is_in_backward = False
        self.held_groups: dict[Any, None] = {}  # param groups that this object has gathered
        self.param_groups: list[Any] = []
        self._num_backward_passes = 0
        self.output_nodes: dict[Any, set[Any]] = {}  # autograd nodes of outputs, by param group
        # param groups on which the loss depends other than through the outputs of their unit
        self.escaping_groups: dict[Any, None] = {}

    def install(self) -> None:
        """Apply the rules of ShardedParameter to the sharded parameters of all units.

        It replaces methods of FSDP2's objects; a second call, in a later fit, does so only once.

        A ShardedParameter is a DTensor that is gathered when it is used outside of its unit.
        A param group is FSDP2's object for the parameters of a unit, which are gathered together.
        """
        states: list[Any] = [unit._get_fsdp_state() for unit in fsdp_units(self.module)]
        inner_states = [
            submodule._get_fsdp_state()
            for unit in fsdp_units(self.module)
            for submodule in cast(nn.Module, unit).modules()
            if submodule is not unit and isinstance(submodule, FSDPModule)
        ]
        for state in states:
            # _lazy_init makes the outermost unit FSDP2's root
            if not any(state is inner_state for inner_state in inner_states):
                state._lazy_init()  # otherwise the first unit that runs would become the root
        self.param_groups = [group for state in states for group in fsdp_param_groups(state)]
        for group in self.param_groups:
            for fsdp_param in group.fsdp_params:
                # FSDP2 calls it to put a sharded or gathered parameter into its module
                if "_setattr_on_modules" not in vars(fsdp_param):
                    fsdp_param._setattr_on_modules = partial(_set_on_modules, fsdp_param)
                sharded = fsdp_param.sharded_param
                # as_sharded_parameter: changes the class of the DTensor in place
                if isinstance(as_sharded_parameter(sharded), ShardedParameter):
                    # the parameter then gathers its group when an operation uses it
                    sharded._gather_info = GatherInfo(self, group, fsdp_param)
            if "post_forward" not in vars(group):
                # FSDP2 calls it after the forward of a unit, to reshard the group
                group.post_forward = partial(self._post_forward, group, group.post_forward)
        for state in states:
            is_first_install = not hasattr(state, "_gather_on_use")
            state._gather_on_use = self  # read by the replaced methods
            if is_first_install:
                state._register_pre_backward_hook = partial(
                    # record_output_nodes: also records the autograd nodes of the unit's outputs
                    record_output_nodes,
                    state,
                    state._register_pre_backward_hook,
                )
                # a step with its own backward pass (a gradient penalty) uses the parameters again
                state._root_post_backward_final_callback = _keep_gathered_in_step(state)

    def attach_original_attributes(
        self, hooks: dict[str, Any], attributes: dict[str, dict[str, Any]]
    ) -> None:
        """Attach hooks and attributes of the parameters from before sharding, by name."""
        for name, parameter in self.module.named_parameters():
            param_attributes = attributes.get(name, {})
            gather_info: GatherInfo | None = getattr(parameter, "_gather_info", None)
            if gather_info is None or (name not in hooks and not param_attributes):
                continue
            original_attributes = attach_hooks(
                gather_info.fsdp_param, hooks.get(name, OrderedDict())
            )
            original_attributes.attributes.update(param_attributes)

    def hold_group(self, group: Any) -> None:
        """Gather a group until the end of the backward pass, and do not reduce its gradients."""
        if not group.is_unsharded:
            group.unshard()
            group.wait_for_unshard()
        group.reduce_grads = group.reshard_after_backward = False
        self.held_groups[group] = None

    def wrap_step(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """Return a step that also releases gathered groups and writes back changed parameters.

        Before the step, groups that earlier steps have gathered are released. After it, writes into
        gathered parameters are copied to the shards.

        Raises:
            UsageError: some gradients would not be reduced, or some writes would be lost.
        """

        def run_step(*args: Any) -> Any:
            """Run `step`, and then copy writes into gathered parameters to the shards."""
            # within a backward pass the gathered groups are still needed
            if not self.is_in_backward:
                self.release_groups()  # of earlier steps
                self.output_nodes.clear()  # which the units record in their forward
            was_in_step = self.is_in_step  # true if a step calls another one
            self.is_in_step = True
            try:
                result = step(*args)
                # _check_reduced: raises if the step has called backward() without the strategy
                self._check_reduced()
                self.write_back()
                return result
            finally:
                self.is_in_step = was_in_step
                # with gradients enabled the backward pass needs the gathered groups
                if not torch.is_grad_enabled():
                    self.release_groups()

        return run_step

    def release_groups(self) -> None:
        """Reshard the held groups."""
        for group in self.held_groups:
            _release_group(group)
        self.held_groups.clear()

    def _check_reduced(self) -> None:
        """Check that no backward pass was started without the strategy.

        Raises:
            UsageError: there are gradients that would not be reduced.
        """
        parameters = [p for group in self.held_groups for p in group.fsdp_params]
        copies = [getattr(p, "_unsharded_param", None) for p in parameters]
        if any(copy is not None and copy.grad is not None for copy in copies):
            raise UsageError(
                f"{type(self.module).__name__}: loss.backward() was called for weights that are "
                "used outside of their layer's forward",
                ["backward passes that the strategy starts"],
                "use self.manual_backward(loss)",
            )

    @property
    def should_search_graph(self) -> bool:
        """Whether `_find_escaping` searches the graph of the next backward pass.

        It does in the passes 0 to 4, 8, 16, ...
        """
        passes = self._num_backward_passes
        return passes < 4 or passes & (passes - 1) == 0

    def begin_backward(self, loss: Tensor | None = None) -> None:
        """Gather the held groups before a backward pass, and do not reduce their gradients yet."""
        if self.should_search_graph and loss is not None:
            self._find_escaping(loss)
        self.is_in_backward = True
        self._num_backward_passes += 1
        for group in [*self.held_groups, *self.escaping_groups]:
            self.hold_group(group)  # a later forward may have resharded it

    def _find_escaping(self, loss: Tensor) -> None:
        """Find units on which the loss depends other than through their outputs.

        FSDP2 gathers a unit when the gradient of an output arrives. The backward of a term that a
        layer stored in an attribute or a list, such as a penalty, would read freed memory. Ranks
        run the same operations on parameters, so they find the same units.
        """
        groups = find_escaping_groups(loss, self.param_groups, self.output_nodes)
        self.escaping_groups |= dict.fromkeys(
            group for group in self.param_groups if group in groups
        )

    def write_back(self) -> None:
        """Copy the writes of a step into gathered parameters to the shards.

        Raises:
            UsageError: the gathered parameters have half precision, so the write would be lost.
        """
        for group in self.param_groups:
            if group.is_unsharded:
                write_back_group(group, self._refuse_lost_write, self._should_compare_values)

    @property
    def _should_compare_values(self) -> bool:
        return self._num_backward_passes % CHECK_WRITES_EVERY in (0, 1)

    def _post_forward(self, group: Any, post_forward: Callable[..., Any], *args: Any) -> Any:
        """Copy writes of a unit's forward to its shards before FSDP2 frees the gathered copy."""
        is_transformed = peek_interpreter_stack() is not None  # by vmap, grad
        if group.is_unsharded and not self.is_in_backward and not is_transformed:
            write_back_group(group, self._refuse_lost_write, self._should_compare_values)
        return post_forward(*args)

    def _refuse_lost_write(self, parameter: Any) -> None:
        owner, attribute = parameter._module_info.module, parameter._module_info.param_name
        names = (name for name, module in self.module.named_modules() if module is owner)
        name = f"{next(names, '')}.{attribute}".lstrip(".")
        raise UsageError(
            f"{type(self.module).__name__}: {name} was changed within a step, where it is a "
            "gathered copy in half precision",
            ["changes before or after the step"],
            "change it in on_train_batch_end",
        )

    def end_backward(self) -> None:
        """Reduce the gradients of the held groups after a backward pass, and reshard them."""
        self.is_in_backward = False
        for group in self.held_groups:
            group.reduce_grads = group.reshard_after_backward = True
            group._training_state = type(group._training_state).IDLE
            group.post_backward()
            group.finalize_backward()
            group._training_state = type(group._training_state).IDLE
            _release_group(group)
        self.held_groups.clear()


def _set_on_modules(parameter: Any, new: nn.Parameter) -> None:
    """Set a sharded or gathered parameter on its modules, except during a functional call.

    `torch.func.functional_call` replaces parameters by other tensors while it runs.
    """
    info = parameter._module_info
    both_forms = (parameter.sharded_param, vars(parameter).get("_unsharded_param"))
    set_module_parameter(info.module, info.param_name, new, both_forms)
    for module, name in zip(info.shared_modules, info.shared_param_names, strict=True):
        set_module_parameter(module, name, new, both_forms)


def set_module_parameter(
    module: nn.Module, name: str, new: nn.Parameter, both_forms: tuple[Any, ...]
) -> None:
    """Set a parameter on a module if the module holds its sharded or gathered form."""
    current = module._parameters.get(name)
    if current is not both_forms[0] and current is not both_forms[1]:
        return
    if type(module).__setattr__ is nn.Module.__setattr__:
        module._parameters[name] = new
    else:  # a recurrent layer keeps a list of its parameters
        setattr(module, name, new)


def _release_group(group: Any) -> None:
    """Reset a group to FSDP2's defaults (reduce, reshard), and reshard it."""
    group.reduce_grads = group.reshard_after_backward = True
    if group.is_unsharded:
        group._to_sharded()


def _have_gradients(groups: list[Any]) -> bool:
    """Whether any parameter has a gradient, e.g. after loss.backward() in manual optimization."""
    return any(p.sharded_param.grad is not None for group in groups for p in group.fsdp_params)


def _keep_gathered_in_step(state: Any) -> Callable[[], None]:
    """Return a callback that keeps units gathered after a backward pass within a step.

    The step (e.g. with a gradient penalty) may use the parameters again after that backward pass.
    The callback replaces the one that FSDP2 calls at the end of each backward pass.

    Args:
        state: the FSDP2 state of a unit.
    """
    original_callback = state._root_post_backward_final_callback

    def final_callback() -> None:
        original_callback()
        # _gather_on_use: the GatherOnUse of the module, which `install` has set
        gather = state._gather_on_use
        if gather.is_in_step and not gather.is_in_backward:
            groups = [
                group
                for other_state in state._state_ctx.all_states
                for group in fsdp_param_groups(other_state)
            ]
            # with manual optimization, gradients show that the step has called loss.backward()
            if gather.module.automatic_optimization or not _have_gradients(groups):
                for group in groups:
                    # hold_group: keeps it gathered until the end of the next backward pass
                    gather.hold_group(group)

    return final_callback
