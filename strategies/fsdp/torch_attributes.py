"""Check that torch has the private attributes of FSDP2 that this package uses.

torch has no public API to gather a unit outside of its forward (gather_on_use.py), or to tell
whether a backward pass is running (parallel_module.py, step_unit.py). Without the check, a torch
version that renames such an attribute would fail in the middle of a training step.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.autograd import grad_mode

from ravine.errors import UsageError

from ..parallel_module import fsdp_units

TESTED_TORCH_VERSIONS = "2.11 to 2.14"  # the versions with which the tests run
REQUIRED_FUNCTIONS = {
    "torch._C": (torch._C, "_current_graph_task_id"),
    "torch.autograd.grad_mode": (grad_mode, "_unsafe_preserve_version_counter"),
}
FSDP_STATE_ATTRS = (
    *("_lazy_init", "_root_post_backward_final_callback", "_state_ctx"),
    "_register_pre_backward_hook",
)
PARAM_GROUP_ATTRS = (
    *("fsdp_params", "mesh_info", "is_unsharded", "unshard", "wait_for_unshard", "_to_sharded"),
    *("reduce_grads", "reshard_after_backward", "_training_state"),
    *("post_backward", "finalize_backward"),
)
PARAM_ATTRS = (
    *("sharded_param", "_unsharded_param", "all_gather_outputs", "fsdp_placement"),
    *("_orig_size", "_contiguous_orig_stride", "_module_info", "_setattr_on_modules"),
    *("to_unsharded", "sharded_state"),
)
MESH_INFO_ATTRS = ("shard_mesh_size", "shard_mesh_rank")
MODULE_INFO_ATTRS = ("module", "param_name", "shared_modules", "shared_param_names")


def fsdp_param_groups(state: Any) -> list[Any]:
    """Return the param groups of an FSDP2 unit; before torch 2.12 a unit has one."""
    groups = getattr(state, "_fsdp_param_groups", None)
    if groups is None:
        groups = [state._fsdp_param_group]
    return [group for group in groups if group is not None]


def check_fsdp_attributes(module: nn.Module) -> None:
    """Check that torch's FSDP2 has all attributes that this package uses.

    Args:
        module: a LightningModule after fully_shard.

    Raises:
        UsageError: names the first missing attribute.
    """
    missing = next(_find_missing_attrs(module), None)
    if missing is not None:
        raise UsageError(
            f"torch {torch.__version__} has no {missing}, which zero2 and zero3 use",
            [f"torch {TESTED_TORCH_VERSIONS}"],
            'use Trainer(strategy="ddp")',
            flag="--trainer.strategy=ddp",
        )


def _find_missing_attrs(module: nn.Module) -> Iterator[str]:
    """Yield the missing attributes of torch's functions, and of the objects of each FSDP unit."""
    # owner: name of the class or module in messages; holder: the object itself
    for owner, (holder, name) in REQUIRED_FUNCTIONS.items():
        if not hasattr(holder, name):
            yield f"{owner}.{name}"
    # _missing_attrs_of: yields the names of this list that the object lacks
    for unit in fsdp_units(module):
        yield from _missing_attrs_of(unit, ("_get_fsdp_state",), "FSDPModule")
        state: Any = unit._get_fsdp_state()
        yield from _missing_attrs_of(state, FSDP_STATE_ATTRS)
        yield from _missing_attrs_of(state._state_ctx, ("all_states",))
        if not hasattr(state, "_fsdp_param_groups"):  # torch 2.11 has one group
            yield from _missing_attrs_of(state, ("_fsdp_param_group",))
        for group in fsdp_param_groups(state):
            yield from _missing_attrs_of(group, PARAM_GROUP_ATTRS)
            yield from _missing_attrs_of(group.mesh_info, MESH_INFO_ATTRS)
            for parameter in group.fsdp_params:
                yield from _missing_attrs_of(parameter, PARAM_ATTRS)
                yield from _missing_attrs_of(parameter._module_info, MODULE_INFO_ATTRS)


def _missing_attrs_of(instance: Any, names: tuple[str, ...], label: str = "") -> Iterator[str]:
    """Yield the names that an object lacks; a declared attribute may be set later."""
    declared = getattr(type(instance), "__annotations__", {})
    for name in names:
        if not hasattr(instance, name) and name not in declared:
            yield f"{label or type(instance).__name__}.{name}"
