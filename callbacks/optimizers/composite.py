"""CompositeOptimizer: several optimizers as one torch Optimizer for Lightning, AMP and checkpoints.

composite.param_groups = [group of A, group of A, group of B]      the same dicts, not copies
composite.state        = the states of A and B, each in its own dict
composite.state_dict() : flat and standard, as sharded loading requires; all other entries in the
                         state_dict of A and B are stored apart, for their own load_state_dict

The members of a composite are its optimizers. A param group added later (`add_param_group`) is last
in the list and belongs to one member. The plan's rules choose the member (`router`); without a plan
it is the last member.
"""

import operator
from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from ravine.errors import UsageError, UsageTypeError
from ravine.strategies.checkpoint.atomic_io import CheckpointError
from ravine.strategies.fsdp.optimizer_probe import needs_closure

from .closures import LossOnlyClosure, takes_closure
from .optimizer_errors import wrap_optimizer_errors
from .state_codec import PackedState, pack_state, unpack_state

ParamGroup = dict[str, Any]


class RuleGroups(NamedTuple):
    """The param groups that one rule takes of a group added later."""

    label: str  # label of the rule
    optimizer: Optimizer  # a new one, which has its groups, if the rule had none
    groups: list[ParamGroup]  # groups to add to an existing member


# Maps new parameters, and the settings passed with them, to the groups of each rule.
GroupRouter = Callable[[list[Tensor], ParamGroup], list[RuleGroups]]


class _NoGradient(BaseException):
    """Ends a member's step before any change if no parameter has a gradient."""


class CompositeState(MutableMapping[Any, Any]):
    """A mapping over the states of all members; each member keeps its own state."""

    def __init__(self, optimizers: list[Optimizer]) -> None:
        """Keep a reference to the list, because members may be added to it."""
        self._optimizers = optimizers

    def __getitem__(self, key: Any) -> Any:
        """Return the state of a parameter; create an empty one if absent, as torch does."""
        return self._state_of_owner(key)[key]

    def __setitem__(self, key: Any, value: Any) -> None:
        """Replace the state of a parameter."""
        self._state_of_owner(key)[key] = value

    def __delitem__(self, key: Any) -> None:
        """Delete the state of a parameter."""
        del self._state_of_owner(key)[key]

    def __contains__(self, key: object) -> bool:
        """Whether any member has a state for the parameter; create none."""
        return any(key in member.state for member in self._optimizers)

    def __iter__(self) -> Iterator[Any]:
        """Iterate over the keys, member by member."""
        for member in self._optimizers:
            yield from list(member.state)

    def __len__(self) -> int:
        """Return the number of states."""
        return sum(len(member.state) for member in self._optimizers)

    def get(self, key: Any, default: Any = None) -> Any:
        """Return the state of a parameter, or `default`; create none."""
        return next((m.state[key] for m in self._optimizers if key in m.state), default)

    def _state_of_owner(self, key: Any) -> Any:
        for member in self._optimizers:
            if key in member.state:
                return member.state
        for member in self._optimizers:
            if any(p is key for group in member.param_groups for p in group["params"]):
                return member.state
        raise KeyError(key)


class CompositeOptimizer(Optimizer):
    """Step the members in order; `zero_grad`, schedules, clipping and saving apply to all.

    Example: `CompositeOptimizer([Muon(matrices, lr=0.03), torch.optim.AdamW(rest, lr=5e-3)])`
    """

    is_composite = True  # strategies ask for it: they treat each member by itself

    def __init__(self, optimizers: Sequence[Optimizer], labels: Sequence[str] = ()) -> None:
        """Join optimizers without common parameters; `labels` has one log label for each group.

        The lists of this object are changed in place only: Lightning's wrapper of an optimizer
        shares them, and calls these methods with itself as `self`.
        """
        # Optimizer.__init__ would create groups and states, but the members have them
        super().__setstate__({"defaults": _common_defaults(optimizers)})
        # an attribute of torch's Optimizer that turns off a warning about CUDA graphs
        self._warned_capturable_if_run_uncaptured = True
        self.optimizers = list(optimizers)
        # index in `optimizers` for each group
        self._group_owners = [
            index for index, member in enumerate(self.optimizers) for _ in member.param_groups
        ]
        self._returned_groups: list[ParamGroup] = []  # the list that `param_groups` returns
        # a copy of that list; a difference shows that a caller changed it
        self._last_groups: list[ParamGroup] = []
        self.labels = list(labels) or [f"group {i}" for i in range(len(self._group_owners))]
        # assigns parameters of `add_param_group` to members, by the rules of a plan
        self.router: GroupRouter | None = None
        # groups from one `add_param_group`; a new lr of the last group applies to all
        self._joint_groups: list[list[ParamGroup]] = []
        self._last_lrs: dict[int, Any] = {}  # lr of those groups by id, after the last step
        # parameters without a gradient so far, for which members have created no state
        self._params_without_state: list[Tensor] = []
        self.schedule_free: list[Optimizer] = []  # schedule-free members (two sets of weights)
        self._state_checked = False  # whether the states were checked to be serializable
        self._add_params_without_state(self.param_groups)

    @property
    def param_groups(self) -> list[ParamGroup]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The param groups of all members: the initial groups by member, then groups added later.

        A caller may change or assign the list, as in torch. A group then goes to the member that
        has its parameters, or with new parameters to the member that `add_param_group` chooses.
        """
        if not _is_same_list(self._returned_groups, self._last_groups):  # a caller changed the list
            self._assign_groups(list(self._returned_groups))
        elif (
            self._last_groups
            and len(self.optimizers) == 1  # whose groups are in the order of this list
            and _is_same_list(self.optimizers[0].param_groups, self._last_groups)
        ):
            return self._returned_groups  # read several times in each training step
        self._register_groups()
        queues = [iter(member.param_groups) for member in self.optimizers]
        self._returned_groups[:] = [next(queues[owner]) for owner in self._group_owners]
        self._last_groups[:] = self._returned_groups
        return self._returned_groups

    @param_groups.setter
    def param_groups(self, groups: list[ParamGroup]) -> None:
        """Assign each group to a member."""
        self._assign_groups(list(groups))

    @property
    def state(self) -> MutableMapping[Any, Any]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The states of all members, by parameter."""
        return CompositeState(self.optimizers)

    @state.setter
    def state(self, value: MutableMapping[Any, Any]) -> None:
        """Assign each state to the member that has its parameter."""
        for member in self.optimizers:
            member.state.clear()
        for key, param_state in value.items():
            self.state[key] = param_state

    @property
    def needs_full_gradient(self) -> bool:
        """Whether every rank takes the full step, on parameters gathered for it."""
        return any(getattr(member, "needs_full_gradient", False) for member in self.optimizers)

    def groups_by_label(self) -> dict[str, tuple[Optimizer, list[ParamGroup]]]:
        """Return the member and the param groups of each label."""
        result: dict[str, tuple[Optimizer, list[ParamGroup]]] = {}
        for label, owner, group in zip(
            self.labels, self._group_owners, self.param_groups, strict=True
        ):
            result.setdefault(label, (self.optimizers[owner], []))[1].append(group)
        return result

    def add_param_group(self, param_group: ParamGroup) -> None:
        """Train more parameters, such as layers that are unfrozen during a run.

        The plan's rules assign each parameter as if it had been trainable from the start. Settings
        missing in the group (learning rate, weight decay, ...) come from the rule. A group whose
        parameters differ in rule or decay becomes several groups. A learning rate that is set later
        on the last of these groups applies to all of them.

        Raises:
            TypeError: the parameters are a set, or not tensors.
            ValueError: a parameter is already in another group, or no rule takes it.
        """
        if not isinstance(param_group, dict):
            raise UsageTypeError(
                f"add_param_group: param_group is a {type(param_group).__name__}",
                ["a dict"],
                hint="pass {'params': [...]}",
            )
        parameters = _list_params(param_group)
        grouped_ids = {id(p) for group in self.param_groups for p in group["params"]}
        if any(id(p) in grouped_ids for p in parameters):
            raise UsageError(
                "add_param_group: some parameters appear in more than one parameter group",
                hint="remove the parameters that are trained already",
            )
        settings = {k: v for k, v in param_group.items() if k not in ("params", "param_names")}
        num_groups_before = len(self._group_owners)
        for routed in self._route_params(parameters, settings):
            # `routed` is the part of one rule: label, optimizer, and groups to add to it. A new
            # optimizer already has its groups, so that `routed.groups` is empty.
            if not any(routed.optimizer is member for member in self.optimizers):
                self.optimizers.append(routed.optimizer)
            for group in routed.groups:
                routed.optimizer.add_param_group(group)
            self._register_groups(routed.label)  # updates `_group_owners` and `labels`
        added = self.param_groups[num_groups_before:]
        self._add_params_without_state(added)
        if len(added) > 1:
            self._joint_groups.append(added)
            self._last_lrs |= {id(group): group.get("lr") for group in added}
        # as in torch, the caller's dict gets the settings that apply
        param_group.clear()
        param_group |= added[-1] if added else {"params": []}

    def _route_params(self, parameters: list[Tensor], settings: ParamGroup) -> list[RuleGroups]:
        if self.router is not None:
            return self.router(parameters, settings)
        return [
            RuleGroups(self.labels[-1], self.optimizers[-1], [{**settings, "params": parameters}])
        ]

    def _register_groups(self, label: str | None = None) -> None:
        """Update owners and labels for groups that were added to or removed from members."""
        for number, member in enumerate(self.optimizers):
            more = len(member.param_groups) - self._group_owners.count(number)
            if more > 0:
                existing_label = dict(zip(self._group_owners, self.labels, strict=True)).get(number)
                self._group_owners += [number] * more
                self.labels += [label or existing_label or f"group {len(self.labels)}"] * more
            for _ in range(-more):
                last = len(self._group_owners) - 1 - self._group_owners[::-1].index(number)
                del self._group_owners[last], self.labels[last]

    def _assign_groups(self, groups: list[ParamGroup]) -> None:
        """Replace the param groups of all members by these, after a caller changed the list.

        A group goes to the member that has one of its parameters so far. A group with new
        parameters only is added by `add_param_group`.
        """
        # undo the caller's change, so that `param_groups` does not call this method again
        self._returned_groups[:] = self._last_groups
        previous_groups = self._last_groups or self.param_groups
        owner_and_label = {
            id(p): (owner, label)
            for owner, label, group in zip(
                self._group_owners, self.labels, previous_groups, strict=True
            )
            for p in group["params"]
        }
        known_groups: list[ParamGroup] = []
        owners: list[int] = []  # index of the member for each known group
        labels: list[str] = []
        for group in groups:
            known_ids = [id(p) for p in group["params"] if id(p) in owner_and_label]
            if known_ids:  # else only new parameters, added below
                owner, label = owner_and_label[known_ids[0]]
                known_groups.append(group)
                owners.append(owner)
                labels.append(label)
        for index, member in enumerate(self.optimizers):
            member.param_groups[:] = [
                group for group, owner in zip(known_groups, owners, strict=True) if owner == index
            ]
        self._group_owners[:] = owners
        self.labels[:] = labels
        self._joint_groups.clear()
        # `param_groups` fills these two again
        self._returned_groups.clear()
        self._last_groups.clear()
        for group in groups:
            if group["params"] and not any(group is known for known in known_groups):
                self.add_param_group({**group})
        self._params_without_state.clear()
        self._add_params_without_state(self.param_groups)

    def _add_params_without_state(self, groups: list[ParamGroup]) -> None:
        self._params_without_state += [p for group in groups for p in group["params"]]

    def drop_remote_params(self) -> None:
        """Drop parameters of other pipeline ranks and keep the group structure."""
        for group in self.param_groups:
            remote = [p for p in group["params"] if getattr(p, "is_remote", False)]
            group["params"] = [p for p in group["params"] if not getattr(p, "is_remote", False)]
            for p in remote:
                self.state.pop(p, None)
        self._params_without_state[:] = [
            p for p in self._params_without_state if not getattr(p, "is_remote", False)
        ]

    def __getstate__(self) -> dict[str, Any]:
        """Return the attributes for a copy, without `step` and `router`."""
        return {k: v for k, v in self.__dict__.items() if k not in ("step", "router")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore the attributes of a copy."""
        super().__setstate__({"defaults": {}, "router": None, **self.__dict__, **state})

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Call `zero_grad` of each member."""
        for member in self.optimizers:
            member.zero_grad() if set_to_none else member.zero_grad(False)

    def state_dict(self) -> dict[str, Any]:
        """Return states and settings of all members as plain values, parameters numbered by group.

        Each member's own `state_dict` and hooks determine the content. All that is neither state of
        a parameter nor setting of a group is under `members`, with one entry for each member.

        Raises:
            CheckpointError: a member keeps an object that no checkpoint can hold.
        """
        for hook in self._optimizer_state_dict_pre_hooks.values():  # registered through torch
            hook(self)
        groups = self.param_groups
        packed_states = []
        for member in self.optimizers:
            # names the optimizer in an error of another package
            with wrap_optimizer_errors(member, "when its state was saved"):
                packed_states.append(pack_state(member))
        state, saved_groups = self._number_params(packed_states)
        ids_without_state = {id(p) for p in self._params_without_state}
        for owner, saved_group, group in zip(self._group_owners, saved_groups, groups, strict=True):
            # `extra`: entries of the member's state_dict besides states and groups
            if "whole" in packed_states[owner].extra:
                continue  # the member's state is not by parameter
            shards = vars(self.optimizers[owner]).get("_shard_stepper")  # under ZeRO-1
            for number, p in zip(saved_group["params"], group["params"], strict=True):
                is_on_this_rank = shards is None or shards.keeps_state_of(p)
                if number not in state and id(p) not in ids_without_state and is_on_this_rank:
                    # The optimizer, such as plain SGD, keeps no state. A placeholder is saved,
                    # because torch.distributed.checkpoint refuses parameters without state.
                    state[number] = _empty_state()
        result: dict[str, Any] = {"state": state, "param_groups": saved_groups}
        if any(packed_state.extra for packed_state in packed_states):
            result["members"] = [packed_state.extra for packed_state in packed_states]
        for hook in self._optimizer_state_dict_post_hooks.values():
            changed = hook(self, result)
            result = result if changed is None else changed
        return result

    def _number_params(
        self, packed_states: list[PackedState]
    ) -> tuple[dict[int, Any], list[ParamGroup]]:
        """Join the members' states and groups, with parameters numbered over all groups.

        Args:
            packed_states: of each member, which numbers its parameters in the order of its groups.

        Returns:
            The states by the new numbers, and the groups, whose `params` are these numbers.
        """
        remaining_groups = [iter(packed_state.groups) for packed_state in packed_states]
        # for each member, the new number of a parameter by the member's own number
        new_numbers: list[list[int]] = [[] for _ in packed_states]
        groups: list[ParamGroup] = []
        num_params = 0
        for owner in self._group_owners:
            group = next(remaining_groups[owner])
            first, num_params = num_params, num_params + len(group["params"])
            group["params"] = list(range(first, num_params))
            new_numbers[owner] += group["params"]
            groups.append(group)
        state: dict[int, Any] = {}
        for numbers, packed_state in zip(new_numbers, packed_states, strict=True):
            state |= {numbers[i]: values for i, values in packed_state.state.items()}
        return state, groups

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load each member's part with its own `load_state_dict`.

        Raises:
            ValueError: the groups differ from those of the saved optimizer.
            CheckpointError: a member cannot read the saved state.
        """
        state_dict = dict(state_dict)
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            changed = hook(self, state_dict)
            state_dict = state_dict if changed is None else changed
        self._check_groups(state_dict["param_groups"])  # as many groups, of equal sizes
        packed_states = self._split_by_member(state_dict)
        for member, packed_state in zip(self.optimizers, packed_states, strict=True):
            try:
                with wrap_optimizer_errors(member, "when its state was loaded"):
                    unpack_state(member, packed_state)  # by the member's own load_state_dict
            except LookupError as error:
                name = type(member).__name__
                raise CheckpointError(
                    f"the checkpoint lacks state of {name} ({type(error).__name__}: {error}); "
                    "another version or another optimizer wrote it",
                    hint="resume with the optimizer of that run, or start a new run from the "
                    "weights with Pretrained(path)",
                ) from error
        self._params_without_state[:] = self._params_absent_from(state_dict)
        # the members have new dicts for their groups; `param_groups` fills these two again
        self._last_groups.clear()
        self._returned_groups.clear()
        # the rates that were loaded do not count as set by the user
        self._last_lrs |= {id(g): g.get("lr") for groups in self._joint_groups for g in groups}
        for hook in self._optimizer_load_state_dict_post_hooks.values():
            hook(self)

    def _params_absent_from(self, state_dict: dict[str, Any]) -> list[Tensor]:
        """Return the parameters that have no entry in a state_dict: none has got a gradient yet."""
        return [
            p
            for group, saved_group in zip(
                self.param_groups, state_dict["param_groups"], strict=True
            )
            for p, number in zip(group["params"], saved_group["params"], strict=True)
            if number not in state_dict["state"]
        ]

    def _split_by_member(self, state_dict: dict[str, Any]) -> list[PackedState]:
        """Return each member's part of a state_dict, with its parameters numbered from 0.

        The file has the groups of all members in one list, `param_groups`, with parameters numbered
        over all of them. Entries of a member in another format are under `members`.
        """
        extras = state_dict.get("members") or [{} for _ in self.optimizers]
        packed_states = [
            PackedState(groups=[], state={}, extra=extra)
            for _, extra in zip(self.optimizers, extras, strict=True)
        ]
        num_params = [0 for _ in self.optimizers]  # of each member so far
        # `_group_owners`: index of the member for each group
        for owner, saved_group in zip(self._group_owners, state_dict["param_groups"], strict=True):
            first = num_params[owner]
            num_params[owner] += len(saved_group["params"])
            own_numbers = list(range(first, num_params[owner]))
            packed_states[owner].groups.append({**saved_group, "params": own_numbers})
            for own_number, number in zip(own_numbers, saved_group["params"], strict=True):
                values = state_dict["state"].get(number)
                if values and not _is_empty_state(values):  # else a placeholder for no state
                    packed_states[owner].state[own_number] = values
        return packed_states

    def _check_groups(self, saved: list[ParamGroup]) -> None:
        """Raise UsageError if the groups have other numbers of parameters than the saved ones."""
        current_sizes = [len(group["params"]) for group in self.param_groups]
        saved_sizes = [len(group["params"]) for group in saved]
        if current_sizes != saved_sizes:
            reason = ""
            if len(saved_sizes) > len(current_sizes):
                reason = "; parameters that were added during that run are missing in this run"
            raise UsageError(
                f"the saved optimizer has groups of {saved_sizes} parameters, and this optimizer "
                f"has groups of {current_sizes}{reason}",
                hint="create the optimizer as in that run, or start a new run from the weights "
                "with Pretrained(path)",
            )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Step every member, unless no parameter has a gradient.

        A single member gets the closure itself and may call it several times. With several members
        the loss is computed once; members that take a closure get one that returns this loss.
        """
        groups = self.param_groups
        # of groups from one `add_param_group`, all get a rate that was set on the last
        self._copy_lrs_to_joint_groups()
        if closure is not None and len(self.optimizers) == 1 and takes_closure(self.optimizers[0]):
            loss = self._step_single_member(closure, groups)
        else:
            loss = self._step_members(closure, groups)
        if self._params_without_state:
            # a member has created state for those that have a gradient now
            self._params_without_state[:] = [
                p for p in self._params_without_state if p.grad is None
            ]
        if not self._state_checked:  # once, at the first step with a gradient
            self._check_serializable_state()
        return loss

    def _step_members(self, closure: Callable[[], Any] | None, groups: list[ParamGroup]) -> Any:
        """Compute the loss once, step every member if there is a gradient, return the loss."""
        loss = None
        loss_only_closure = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
            loss_only_closure = LossOnlyClosure(loss, groups)  # returns the loss, computes nothing
        # without any gradient no member steps, so that weight decay and momentum change nothing
        if _has_gradient(groups):
            for member in self.optimizers:
                with wrap_optimizer_errors(member):
                    if loss_only_closure is not None and takes_closure(member):
                        member.step(closure=loss_only_closure.for_optimizer(member))
                    else:
                        member.step()
        return loss

    def _step_single_member(self, closure: Callable[[], Any], groups: list[ParamGroup]) -> Any:
        """Step the only member, which calls the closure itself, and return the loss.

        If its first call gives no gradient, the step ends before it changes a weight. A member that
        cannot step without a closure steps in any case.
        """
        (member,) = self.optimizers
        must_step = needs_closure(member)  # its `step` requires a closure, as that of LBFGS
        closure_errors: list[BaseException] = []  # of the loss, to tell them from the optimizer's
        loss: Any = None

        def closure_for_member() -> Any:
            nonlocal loss
            try:
                with torch.enable_grad():
                    loss = closure()
            except BaseException as error:
                closure_errors.append(error)
                raise
            if not must_step and not _has_gradient(groups):
                raise _NoGradient
            return loss

        try:
            return member.step(closure=closure_for_member)
        except _NoGradient:
            return loss
        except Exception as error:
            if any(error is closure_error for closure_error in closure_errors):
                raise  # raised by the module or a callback, not by the optimizer
            with wrap_optimizer_errors(member):
                raise

    def _check_serializable_state(self) -> None:
        """Raise CheckpointError after the first step for a state that no checkpoint can hold."""
        if not any(_has_gradient([group]) for group in self.param_groups):
            return
        self._state_checked = True
        saved = self.state_dict()
        for member, extra in zip(self.optimizers, saved.get("members", []), strict=False):
            if any(isinstance(leaf, DTensor) for leaf in tree_leaves(extra)):
                raise CheckpointError(
                    f"{type(member).__name__} keeps tensors outside of its state; with sharded "
                    "parameters such a run cannot be resumed",
                    hint="use Trainer(strategy='ddp')",
                    flag="--trainer.strategy=ddp",
                    exit_status=1,
                )

    def _copy_lrs_to_joint_groups(self) -> None:
        """Apply a new lr of the last group from one `add_param_group` to the other groups of it.

        A group with another lr keeps its ratio to the last one. A group whose own lr was set since
        the last step keeps it.
        """
        for groups in self._joint_groups:
            last_group = groups[-1]
            old, new = self._last_lrs[id(last_group)], last_group.get("lr")
            for group in groups[:-1]:
                group_lr = group.get("lr")
                if type(new) is float and new != old and group_lr == self._last_lrs[id(group)]:
                    group["lr"] = new if group_lr == old or not old else group_lr * (new / old)
            self._last_lrs |= {id(group): group.get("lr") for group in groups}

    def train(self) -> None:
        """Switch schedule-free members to their training weights."""
        self._set_mode("train")

    def eval(self) -> None:
        """Switch schedule-free members to their averaged evaluation weights."""
        self._set_mode("eval")

    def _set_mode(self, name: str) -> None:
        for member in self.schedule_free:
            getattr(member, name)()


def _is_same_list(left: list[ParamGroup], right: list[ParamGroup]) -> bool:
    return len(left) == len(right) and all(map(operator.is_, left, right))


def _list_params(param_group: ParamGroup) -> list[Tensor]:
    """Return the tensors of `param_group["params"]`: a tensor, tensors or (name, tensor) pairs.

    Raises:
        UsageTypeError: they are a set, or not tensors.
    """
    raw_params = param_group["params"]
    if isinstance(raw_params, set):
        raise UsageTypeError(
            "add_param_group: param_group['params'] is a set, which has no order",
            ["a list of tensors"],
            hint="pass a list",
        )
    raw_params = [raw_params] if isinstance(raw_params, Tensor) else list(raw_params)
    parameters: list[Any] = [
        p[1] if isinstance(p, tuple) and len(p) == 2 else p for p in raw_params
    ]
    if non_tensors := [type(p).__name__ for p in parameters if not isinstance(p, Tensor)]:
        raise UsageTypeError(
            f"add_param_group: param_group['params'] contains a {non_tensors[0]}",
            ["tensors"],
            hint="pass a list of tensors",
        )
    return parameters


def _common_defaults(members: Sequence[Optimizer]) -> dict[str, Any]:
    """Return the defaults that all members have, which schedulers such as OneCycleLR read.

    The values are those of the first member.
    """
    all_defaults = [getattr(member, "defaults", {}) for member in members]
    return {
        key: all_defaults[0][key]
        for key in all_defaults[0]
        if all(key in other for other in all_defaults[1:])
    }


def _has_gradient(groups: Iterable[ParamGroup]) -> bool:
    return any(p.grad is not None for group in groups for p in group["params"])


def _empty_state() -> dict[str, Any]:
    """Return a placeholder for a parameter whose optimizer keeps no state, such as plain SGD.

    torch.distributed.checkpoint refuses parameters without state.
    """
    return {"step": torch.zeros(())}


def _is_empty_state(values: dict[str, Any]) -> bool:
    step = values.get("step") if len(values) == 1 else None
    return isinstance(step, Tensor) and step.ndim == 0 and step.item() == 0
