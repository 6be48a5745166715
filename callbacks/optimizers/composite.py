"""CompositeOptimizer: several optimizers as one torch Optimizer for Lightning, AMP and checkpoints.

composite.param_groups = [group of A, group of A, group of B]      the same dicts, not copies
composite.state        = the states of A and B, each in its own dict
composite.state_dict() : flat and standard, as sharded loading requires; all other entries in the
                         state_dict of A and B are stored apart, for their own load_state_dict

The members of a composite are its optimizers. A param group added later (`add_param_group`) is last
in the list and belongs to one member. The plan's rules choose the member (`router`); without a plan
it is the last member.
"""

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
        """Join optimizers without common parameters; `labels` has one log label for each group."""
        # Optimizer.__init__ would create groups and states, but the members have them
        super().__setstate__({"defaults": _common_defaults(optimizers)})
        self._warned_capturable_if_run_uncaptured = True
        self.optimizers = list(optimizers)
        # Lightning's wrapper calls these methods with itself as `self`, so lists change in place
        self._group_owners = [
            m for m, optimizer in enumerate(self.optimizers) for _ in optimizer.param_groups
        ]
        self._returned_groups: list[ParamGroup] = []  # the list that `param_groups` returns
        # a copy of that list; a difference shows that a caller changed it
        self._last_groups: list[ParamGroup] = []
        self.labels = list(labels) or [f"group {i}" for i in range(len(self._group_owners))]
        self.router: GroupRouter | None = None
        # groups from one `add_param_group`; a new lr of the last group applies to all
        self._joint_groups: list[list[ParamGroup]] = []
        self._last_lrs: dict[int, Any] = {}  # lr of those groups by id, after the last step
        self._stateless: list[Tensor] = []  # parameters without a gradient so far
        self.schedule_free: list[Optimizer] = []  # schedule-free members (two sets of weights)
        self._state_checked = False  # whether the states were checked to be serializable
        self._track_stateless(self.param_groups)

    @property
    def param_groups(self) -> list[ParamGroup]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The param groups of all members: the initial groups by member, then groups added later.

        A caller may change or assign the list, as in torch. A group then goes to the member that
        has its parameters, or with new parameters to the member that `add_param_group` chooses.
        """
        if not _is_same_list(self._returned_groups, self._last_groups):  # a caller changed the list
            self._assign_groups(list(self._returned_groups))
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
        raw_params = param_group["params"]
        if isinstance(raw_params, set):
            raise UsageTypeError(
                "add_param_group: param_group['params'] is a set, which has no order",
                ["a list of tensors"],
                hint="pass a list",
            )
        raw_params = [raw_params] if isinstance(raw_params, Tensor) else list(raw_params)
        parameters = [p[1] if isinstance(p, tuple) else p for p in raw_params]
        if non_tensors := [type(p).__name__ for p in parameters if not isinstance(p, Tensor)]:
            raise UsageTypeError(
                f"add_param_group: param_group['params'] contains a {non_tensors[0]}",
                ["tensors"],
                hint="pass a list of tensors",
            )
        grouped_ids = {id(p) for group in self.param_groups for p in group["params"]}
        if any(id(p) in grouped_ids for p in parameters):
            raise UsageError(
                "add_param_group: some parameters appear in more than one parameter group",
                hint="remove the parameters that are trained already",
            )
        settings = {k: v for k, v in param_group.items() if k not in ("params", "param_names")}
        first = len(self._group_owners)
        for routed in self._route_params(parameters, settings):
            if not any(routed.optimizer is member for member in self.optimizers):
                self.optimizers.append(routed.optimizer)
            for group in routed.groups:
                routed.optimizer.add_param_group(group)
            self._register_groups(routed.label)
        added = self.param_groups[first:]
        self._track_stateless(added)
        if len(added) > 1:
            self._joint_groups.append(added)
            self._last_lrs |= {id(group): group.get("lr") for group in added}
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
        """Assign each group to the member that has its parameters."""
        self._returned_groups[:] = self._last_groups
        owner_of = {
            id(p): (number, label)
            for number, label, group in zip(
                self._group_owners, self.labels, self._last_groups or self.param_groups, strict=True
            )
            for p in group["params"]
        }
        kept = [g for g in groups if any(id(p) in owner_of for p in g["params"])]
        destinations = [
            next(owner_of[id(p)] for p in g["params"] if id(p) in owner_of) for g in kept
        ]
        for number, member in enumerate(self.optimizers):
            member.param_groups[:] = [
                g for g, (owner, _) in zip(kept, destinations, strict=True) if owner == number
            ]
        self._group_owners[:] = [owner for owner, _ in destinations]
        self.labels[:] = [label for _, label in destinations]
        self._joint_groups.clear()
        self._returned_groups.clear()
        self._last_groups.clear()
        for group in groups:
            if group["params"] and not any(group is other for other in kept):
                self.add_param_group({**group})
        self._stateless.clear()
        self._track_stateless(self.param_groups)

    def _track_stateless(self, groups: list[ParamGroup]) -> None:
        self._stateless += [p for group in groups for p in group["params"]]

    def drop_remote_params(self) -> None:
        """Drop parameters of other pipeline ranks and keep the group structure."""
        for group in self.param_groups:
            remote = [p for p in group["params"] if getattr(p, "is_remote", False)]
            group["params"] = [p for p in group["params"] if not getattr(p, "is_remote", False)]
            for p in remote:
                self.state.pop(p, None)
        self._stateless[:] = [p for p in self._stateless if not getattr(p, "is_remote", False)]

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
        for hook in self._optimizer_state_dict_pre_hooks.values():
            hook(self)
        groups = self.param_groups
        packed = []
        for member in self.optimizers:
            with wrap_optimizer_errors(member, "when its state was saved"):
                packed.append(pack_state(member))
        queues = [iter(packed_state.groups) for packed_state in packed]
        numbers: list[list[int]] = [[] for _ in self.optimizers]  # flat numbers of its parameters
        flat: list[ParamGroup] = []
        count = 0
        for owner in self._group_owners:
            group = next(queues[owner])
            size = len(group["params"])
            group["params"] = list(range(count, count + size))
            numbers[owner] += group["params"]
            count += size
            flat.append(group)
        state: dict[int, Any] = {}
        for number, packed_state in zip(numbers, packed, strict=True):
            # a member numbers its parameters in the order of its own groups
            state |= {number[i]: values for i, values in packed_state.state.items()}
        stateless = {id(p) for p in self._stateless}
        standard_owners = {
            m for m, packed_state in enumerate(packed) if "whole" not in packed_state.extra
        }
        for owner, saved, group in zip(self._group_owners, flat, groups, strict=True):
            if owner in standard_owners:
                shards = vars(self.optimizers[owner]).get(
                    "_shards"
                )  # another rank may have the state
                for i, p in zip(saved["params"], group["params"], strict=True):
                    is_local = shards is None or shards.keeps_state_of(p)
                    if i not in state and id(p) not in stateless and is_local:
                        state[i] = _empty_state()
        result: dict[str, Any] = {"state": state, "param_groups": flat}
        if any(packed_state.extra for packed_state in packed):
            result["members"] = [packed_state.extra for packed_state in packed]
        for hook in self._optimizer_state_dict_post_hooks.values():
            changed = hook(self, result)
            result = result if changed is None else changed
        return result

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
        self._check_groups(state_dict["param_groups"])
        extras = state_dict.get("members") or [{} for _ in self.optimizers]
        groups: list[list[ParamGroup]] = [[] for _ in self.optimizers]
        state: list[dict[int, Any]] = [{} for _ in self.optimizers]
        counts = [0 for _ in self.optimizers]
        for owner, saved in zip(self._group_owners, state_dict["param_groups"], strict=True):
            first = counts[owner]
            counts[owner] += len(saved["params"])
            for number, key in enumerate(saved["params"], first):
                values = state_dict["state"].get(key)
                if values and not _is_empty_state(values):
                    state[owner][number] = values
            groups[owner].append({**saved, "params": list(range(first, counts[owner]))})
        per_optimizer = zip(self.optimizers, groups, state, extras, strict=True)
        for member, own_groups, own_state, extra in per_optimizer:
            try:
                with wrap_optimizer_errors(member, "when its state was loaded"):
                    unpack_state(member, PackedState(own_groups, own_state, extra))
            except LookupError as error:
                name = type(member).__name__
                raise CheckpointError(
                    f"the checkpoint lacks state of {name} ({type(error).__name__}: {error}); "
                    "another version or another optimizer wrote it",
                    hint="resume with the optimizer of that run, or start a new run from the "
                    "weights with Pretrained(path)",
                ) from error
        self._last_groups.clear()
        self._returned_groups.clear()
        self._last_lrs |= {id(g): g.get("lr") for groups in self._joint_groups for g in groups}
        for hook in self._optimizer_load_state_dict_post_hooks.values():
            hook(self)

    def _check_groups(self, saved: list[ParamGroup]) -> None:
        current_sizes = [len(group["params"]) for group in self.param_groups]
        saved_sizes = [len(group["params"]) for group in saved]
        if current_sizes != saved_sizes:
            more = len(saved_sizes) > len(current_sizes)
            reason = (
                "; parameters that were added during that run are missing in this run"
                if more
                else ""
            )
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
        self._sync_lrs()
        if closure is not None and len(self.optimizers) == 1 and takes_closure(self.optimizers[0]):
            loss = self._step_single(closure, groups)
        else:
            loss = None
            if closure is not None:
                with torch.enable_grad():
                    loss = closure()
            if _has_gradient(groups):
                again = None if closure is None else LossOnlyClosure(loss, groups)
                for member in self.optimizers:
                    with wrap_optimizer_errors(member):
                        if again is not None and takes_closure(member):
                            member.step(closure=again.for_optimizer(member))
                        else:
                            member.step()
        if self._stateless:
            self._stateless[:] = [p for p in self._stateless if p.grad is None]
        if not self._state_checked:
            self._check_serializable_state()
        return loss

    def _step_single(self, closure: Callable[[], Any], groups: list[ParamGroup]) -> Any:
        (member,) = self.optimizers
        needed, raised, loss = needs_closure(member), [], [None]

        def counting_closure() -> Any:
            try:
                with torch.enable_grad():
                    loss[0] = closure()
            except BaseException as error:
                raised.append(error)
                raise
            if not needed and not _has_gradient(groups):
                raise _NoGradient
            return loss[0]

        try:
            return member.step(closure=counting_closure)
        except _NoGradient:
            return loss[0]
        except Exception as error:
            if any(error is raised_error for raised_error in raised):
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

    def _sync_lrs(self) -> None:
        """Apply a new lr of the last group from one `add_param_group` to the other groups of it."""
        for groups in self._joint_groups:
            lead = groups[-1]
            old, new = self._last_lrs[id(lead)], lead.get("lr")
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
    return len(left) == len(right) and all(a is b for a, b in zip(left, right, strict=True))


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
    """Return a placeholder, as torch.distributed.checkpoint refuses parameters without state.

    Plain SGD has no state.
    """
    return {"step": torch.zeros(())}


def _is_empty_state(values: dict[str, Any]) -> bool:
    step = values.get("step") if len(values) == 1 else None
    return isinstance(step, Tensor) and step.ndim == 0 and step.item() == 0
