"""Search the autograd graph for FSDP2 units that a loss uses other than through their outputs.

FSDP2 gathers a unit for the backward pass when the gradient of an output of the unit arrives. A
loss may also depend on parameters of the unit directly, e.g. through a penalty that a layer stored
in an attribute. Such a unit must be gathered before the backward pass (gather_on_use.py).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from .torch_attributes import fsdp_param_groups


def record_output_nodes(state: Any, register_hook: Callable[[Any], Any], output: Any) -> Any:
    """Register FSDP2's pre-backward hook, and record the autograd nodes of a unit's outputs."""
    output = register_hook(output)
    gather = state._gather_on_use
    if gather.should_search_graph and torch.is_grad_enabled():
        leaves = [leaf for leaf in tree_flatten(output)[0] if isinstance(leaf, Tensor)]
        nodes = {leaf.grad_fn for leaf in leaves if leaf.grad_fn is not None}
        for group in fsdp_param_groups(state):
            gather.output_nodes.setdefault(group, set()).update(nodes)
    return output


def find_escaping_groups(
    loss: Tensor, groups: list[Any], output_nodes: dict[Any, set[Any]]
) -> set[Any]:
    """Return the groups whose parameters reach the loss without passing an output of their unit.

    Args:
        loss: the tensor at which the backward pass begins.
        groups: all FSDP2 param groups; a unit has one or more.
        output_nodes: the autograd nodes of the outputs of the unit of each group.
    """
    group_by_param_id = {
        # _unsharded_param: FSDP2's gathered copy, which the autograd graph refers to
        id(p._unsharded_param): group
        for group in groups
        for p in group.fsdp_params
        if hasattr(p, "_unsharded_param")
    }
    root = loss.grad_fn  # None if the loss needs no gradient
    # readers: for each node the nodes that use its output; leaves: the nodes of the parameters
    readers, leaves_by_group = _search_graph(root, group_by_param_id)
    escaping_groups: set[Any] = set()
    for group, leaves in leaves_by_group.items():
        # from all parameters of the group at once: a search for each would take quadratic time
        # FSDP2 gathers and reduces a group by hooks on the outputs of its unit
        if _reaches_root(leaves, root, readers, output_nodes.get(group, set())):
            escaping_groups.add(group)
    return escaping_groups


def _search_graph(
    root: Any, group_by_param_id: dict[int, Any]
) -> tuple[dict[Any, list[Any]], dict[Any, list[Any]]]:
    """Visit all nodes of an autograd graph.

    Args:
        root: the node of the loss.
        group_by_param_id: the FSDP2 param group of each gathered parameter, by its id.

    Returns:
        the nodes that read the output of each node, and the nodes of the parameters of each group.
    """
    readers: dict[Any, list[Any]] = {root: []}
    leaves_by_group: dict[Any, list[Any]] = {}
    stack = [root]
    while stack:
        node = stack.pop()
        # the node that accumulates the gradient of a parameter has it as `variable`
        group = group_by_param_id.get(id(getattr(node, "variable", None)))
        if group is not None:
            leaves_by_group.setdefault(group, []).append(node)
        for source, _ in node.next_functions if node is not None else ():
            if source is None:
                continue
            if source not in readers:
                readers[source] = []
                stack.append(source)
            readers[source].append(node)
    return readers, leaves_by_group


def _reaches_root(
    leaves: list[Any], root: Any, readers: dict[Any, list[Any]], excluded_nodes: set[Any]
) -> bool:
    """Whether a path leads from any of the leaves to the root without the excluded nodes.

    Args:
        leaves: autograd nodes of parameters.
        root: the node of the loss.
        readers: for each node the nodes that use its output.
        excluded_nodes: nodes of the outputs of the unit.
    """
    stack, visited = list(leaves), set(leaves)
    while stack:
        node = stack.pop()
        if node is root:
            return True
        unvisited = [
            reader
            for reader in readers[node]
            if reader not in visited and reader not in excluded_nodes
        ]
        visited.update(unvisited)
        stack += unvisited
    return False
