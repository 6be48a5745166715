"""Step sharded parameters with optimizers that are not written for DTensors.

    elementwise    step(shards)                    each rank its own rows, as plain tensors
    per tensor     gather -> step(whole) -> scatter      each tensor on one rank, its owner
    coupled        refused, in one line

Outside of the optimizer's own methods, its groups hold the module's parameters. Within them they
hold plain tensors: this rank's rows, which share the parameters' memory, or whole tensors.
State tensors with the shape of those rows are sharded in a checkpoint, like the parameter. State of
whole tensors is on their owner alone. Which of the three holds is measured (optimizer_probe.py).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils._pytree import keystr, tree_map_only, tree_map_with_path

from ravine.errors import UsageError

from ..checkpoint.checkpoint_error import CheckpointError
from ..work_partition import spread_evenly
from .optimizer_probe import Shaped, Verdict, measure
from .original_parameters import nested_optimizers, shard_like

State = dict[Any, Any]
ORDER = ("elementwise", "per tensor", "coupled")


def members_of(optimizer: Optimizer) -> list[Optimizer]:
    """The optimizers behind a composite one, or the optimizer itself."""
    return list(getattr(optimizer, "members", None) or [optimizer])


def supports_dtensor(optimizer: Optimizer) -> bool:
    """Whether an optimizer steps DTensors by itself: its class says so."""
    names = ("supports_dtensor", "gathers")
    return any(getattr(optimizer, name, False) for name in names)


def agreed_verdict(optimizer: Optimizer) -> Verdict:
    """The verdict of all ranks on an optimizer; where they differ, the most restrictive one."""
    verdicts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(verdicts, tuple(measure(optimizer)))
    return Verdict(*max(verdicts, key=lambda each: ORDER.index(each[0])))


def refuse_coupled(optimizer: Optimizer, verdict: Verdict) -> None:
    """Refuse an optimizer whose steps cannot be divided among ranks.

    Raises:
        ValueError: the optimizer is coupled.
    """
    if verdict.kind == "coupled":
        raise UsageError(
            f"{type(optimizer).__name__} {verdict.reason}, so that ranks cannot share its "
            "parameters; allowed: optimizers that step each parameter by itself, such as AdamW; "
            "type --trainer.strategy ddp"
        )


def refuse_coupled_members(optimizer: Optimizer) -> None:
    """Refuse coupled optimizers where each rank steps some of the parameters (ZeRO-1).

    Raises:
        ValueError: see `refuse_coupled`.
    """
    for member in members_of(optimizer):
        if "_measured" not in vars(member) and not supports_dtensor(member):
            refuse_coupled(member, agreed_verdict(member))
            vars(member)["_measured"] = True


def shard_steps(optimizer: Optimizer) -> None:
    """Let an optimizer, or each member of a composite one, step sharded parameters.

    Raises:
        ValueError: for a coupled optimizer.
    """
    for member in members_of(optimizer):
        if "_shards" in vars(member) or supports_dtensor(member):
            continue
        sharded = [p for group in member.param_groups for p in group["params"]]
        sharded = [p for p in sharded if isinstance(p, DTensor)]
        verdict = Verdict("elementwise")
        if any(p.device_mesh.size() > 1 for p in sharded):
            verdict = agreed_verdict(member)
            refuse_coupled(member, verdict)
        if verdict.kind == "per tensor":
            _check_rows(member, sharded)
            Owned(member).replace_methods()
        elif sharded:
            Local(member, verdict.shaped).replace_methods()
        else:
            vars(member)["_shards"] = None


def share_methods(optimizer: Optimizer, wrapper: Any) -> None:
    """Give Lightning's wrapper the replaced methods: it calls those of the class with itself."""
    for name, value in vars(optimizer).items():
        if name != "step" and isinstance(getattr(value, "__self__", None), Optimizer):
            vars(wrapper).setdefault(name, value)


def owns(optimizers: list[Optimizer], parameter: Tensor) -> bool | None:
    """Whether this rank keeps the whole state of a parameter; None where each has its shard."""
    for optimizer in optimizers:
        for member in members_of(optimizer):
            found = vars(member).get("_shards")
            if isinstance(found, Owned) and id(parameter) in found.owner:
                return found.owner[id(parameter)] == found.rank_of(parameter)
    return None


def _check_rows(member: Optimizer, parameters: list[DTensor]) -> None:
    for p in parameters:
        split = [place for place in p.placements if not place.is_replicate()]
        if len(split) > 1 or not all(place.is_shard(0) for place in split):
            raise UsageError(
                f"{type(member).__name__} needs whole tensors, and here they are split over more "
                "than the data ranks; allowed: elementwise optimizers such as AdamW; type "
                "--trainer.strategy zero3"
            )


class _Plain:
    """Replaces the methods of an optimizer by ones that work on plain tensors."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.depth = 0
        self.plain: dict[int, nn.Parameter] = {}  # by the id of the parameter
        self._outside: list[tuple[dict[str, Any], list[Any]]] = []
        self._both: list[tuple[Any, nn.Parameter]] = []  # parameters and plain tensors

    def replace_methods(self) -> None:
        """Replace step, state_dict, load_state_dict, and what the class has beyond torch's."""
        optimizer = self.optimizer
        vars(optimizer)["_shards"] = self
        for each in nested_optimizers(optimizer):  # state from the constructor (torch's Adagrad)
            for p in [p for p in each.state if isinstance(p, DTensor)]:
                values = self.to_plain(each.state[p], p)
                if self.keeps(p):
                    each.state[p] = values
                else:
                    del each.state[p]
        names = {"step", "state_dict", "load_state_dict"}
        for kind in type(optimizer).__mro__:
            if kind is Optimizer:
                break
            names |= {k for k, v in vars(kind).items() if callable(v) and not k.startswith("_")}
        names -= {"zero_grad", "add_param_group", "profile_hook_step"}
        names -= {
            n
            for n in names
            if n.startswith("register_") or isinstance(getattr(type(optimizer), n, None), type)
        }
        special = {"step": self._step, "state_dict": self._save, "load_state_dict": self._load}
        for name in names:
            own = getattr(optimizer, name)
            setattr(optimizer, name, self._replaced(name, own, special.get(name, self._call)))

    def _replaced(self, name: str, own: Callable[..., Any], how: Callable[..., Any]) -> Any:
        def method(optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
            return how(own, *args, **kwargs) if self.depth == 0 else own(*args, **kwargs)

        method.__name__ = name
        if hasattr(own, "_wrapped_by_lr_sched"):  # else a schedule would warn of this method
            method.__dict__["_wrapped_by_lr_sched"] = True
        return MethodType(method, self.optimizer)

    def _call(self, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Any other method, such as train() and eval() of schedule-free optimizers."""
        with self.inside():
            return own(*args, **kwargs)

    def _step(self, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        closure = kwargs.pop("closure", args[0] if args else None)
        loss, first = None, [True]
        if closure is not None:
            with torch.enable_grad():
                loss = closure()

        def again() -> Any:
            if first and first.pop():
                return loss  # computed already, outside
            with self.outside(), torch.enable_grad():
                return closure()  # pyright: ignore[reportOptionalCall]

        with self.inside(step=True) as any_here:
            if not any_here:
                return loss
            found = own(**kwargs) if closure is None else own(again, **kwargs)
            return loss if found is None else found

    def _save(self, own: Callable[..., Any]) -> State:
        with self.inside(placeholders=True):
            return self.to_checkpoint(own())

    def _load(self, own: Callable[..., Any], state_dict: State) -> None:
        with self.inside(placeholders=True):
            own(self.from_checkpoint(state_dict))

    @contextmanager
    def outside(self) -> Iterator[None]:
        """Within a step: the module's parameters again, for a closure that runs the module."""
        self.leave()
        self.depth = 0
        try:
            yield
        finally:
            self.depth = 1
            self.enter(step=True, placeholders=False)

    @contextmanager
    def inside(self, step: bool = False, placeholders: bool = False) -> Iterator[bool]:
        """Plain tensors in the groups and the state; yields whether there are any."""
        self.depth += 1
        any_here = self.enter(step, placeholders)
        try:
            yield any_here
        finally:
            self.leave()
            self.depth -= 1

    def keeps(self, parameter: Tensor) -> bool:
        """Whether this rank keeps the state of a parameter, or of its shard."""
        return True

    def enter(self, step: bool, placeholders: bool) -> bool:
        """Put plain tensors in place of DTensors."""
        raise NotImplementedError

    def leave(self) -> None:
        """Put the module's parameters back."""
        raise NotImplementedError

    def to_plain(self, state: Any, parameter: DTensor) -> Any:
        """The state of one parameter in plain tensors; every rank calls it."""
        return tree_map_only(DTensor, lambda value: value.full_tensor(), state)

    def to_checkpoint(self, saved: State) -> State:
        """What is saved, with DTensors for shards."""
        return saved

    def from_checkpoint(self, saved: State) -> State:
        """What was saved, with plain tensors."""
        return saved

    def _parameters(self) -> Iterator[DTensor]:
        seen = set()
        for each in nested_optimizers(self.optimizer):
            for group in each.param_groups:
                for p in group["params"]:
                    if isinstance(p, DTensor) and id(p) not in seen:
                        seen.add(id(p))
                        yield p

    def _replace(self, keep: Callable[[Any], bool]) -> bool:
        """Replace parameters in groups and states; those that `keep` denies are left out."""
        self._outside = []
        any_here = False
        known: set[int] = set()
        for each in nested_optimizers(self.optimizer):
            for group in each.param_groups:
                if id(group) in known:
                    continue
                known.add(id(group))
                self._outside.append((group, group["params"]))
                group["params"] = [self.plain.get(id(p), p) for p in group["params"] if keep(p)]
                any_here |= bool(group["params"])
            if id(each.state) not in known:
                known.add(id(each.state))
                self._rename(each.state, {id(p): q for p, q in self._both})
        return any_here

    def _restore(self) -> None:
        for group, parameters in self._outside:
            group["params"] = parameters
        known: set[int] = set()
        restored = {id(parameters) for _, parameters in self._outside}
        before: dict[int, Any] = {id(q): p for p, q in self._both}
        for each in nested_optimizers(self.optimizer):
            for group in each.param_groups:  # load_state_dict makes new ones
                new = id(group["params"]) not in restored
                if new and any(id(q) in before for q in group["params"]):
                    group["params"] = [before.get(id(q), q) for q in group["params"]]
            if id(each.state) not in known:
                known.add(id(each.state))
                self._rename(each.state, before)
        for _, plain in self._both:
            plain.grad = None

    @staticmethod
    def _rename(state: Any, new: dict[int, Any]) -> None:
        """Replace keys of a state, which are parameters, by those that `new` has for their ids."""
        renamed = {new.get(id(key), key): value for key, value in state.items()}
        state.clear()
        state.update(renamed)

    def _numbered(self, saved: State) -> dict[Any, Any]:
        """The parameter behind each number of a state_dict; empty for another form."""
        groups = saved.get("param_groups") if isinstance(saved, dict) else None
        live = [parameters for _, parameters in self._outside]
        if not isinstance(groups, list) or not isinstance(saved.get("state"), dict):
            return {}
        numbered = {}
        for group, parameters in zip(groups, live, strict=False):
            if isinstance(group, dict) and isinstance(group.get("params"), list):
                numbered |= dict(zip(group["params"], parameters, strict=False))
        return numbered


class Local(_Plain):
    """An elementwise optimizer, which steps this rank's rows."""

    def __init__(self, optimizer: Optimizer, shaped: Shaped) -> None:
        """Keep which entries of the state have the shape of the parameter."""
        super().__init__(optimizer)
        self.shaped = shaped

    def enter(self, step: bool, placeholders: bool) -> bool:
        """Rows in place of parameters, which share their memory."""
        self._both = []
        with torch._C.DisableTorchFunctionSubclass():  # attributes of sharded parameters are slow
            for p in self._parameters():
                rows, trained = p._local_tensor, p.requires_grad
                plain = self.plain.get(id(p))
                if (
                    plain is None
                    or plain.data_ptr() != rows.data_ptr()
                    or plain.shape != rows.shape
                ):
                    plain = self.plain[id(p)] = nn.Parameter(rows.detach(), trained)
                elif plain.requires_grad != trained:
                    plain.requires_grad = trained
                if step and (gradient := p.grad) is not None:
                    plain.grad = _rows_of_gradient(p, gradient)
                self._both.append((p, plain))
        self._replace(lambda p: True)
        return True

    def leave(self) -> None:
        """The module's parameters again."""
        self._restore()

    def to_checkpoint(self, saved: State) -> State:
        """State tensors with the shape of the rows as DTensors, sharded like the parameter.

        Raises:
            CheckpointError: a tensor that the trial of the optimizer did not have.
        """
        return self._mapped(saved, self._as_shard, known=bool(self.shaped))

    def from_checkpoint(self, saved: State) -> State:
        """This rank's rows of state tensors with the shape of the parameter."""
        return self._mapped(saved, self._rows_of)

    def _mapped(
        self, saved: State, change: Callable[[Tensor, DTensor, bool], Tensor], known: bool = False
    ) -> State:
        numbered = self._numbered(saved)
        state = dict(saved["state"]) if numbered else {}
        for number, values in state.items():
            p = numbered.get(number)
            if isinstance(p, DTensor):
                state[number] = self._changed(values, p, change, known)
        return {**saved, "state": state} if numbered else saved

    def to_plain(self, state: Any, parameter: DTensor) -> Any:
        """This rank's rows."""
        return self._changed(state, parameter, self._rows_of)

    def _changed(
        self, state: Any, parameter: DTensor, change: Callable[..., Tensor], known: bool = False
    ) -> Any:
        axes = parameter.ndim

        def changed(path: Any, leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            shaped = self.shaped.get((axes, keystr(path)))
            if shaped is None and known and leaf.ndim == axes:  # so on all ranks, or on none
                raise CheckpointError(
                    f"{type(self.optimizer).__name__} keeps{keystr(path)} in its state, which a "
                    "trial of three steps did not, so that its shards cannot be joined; allowed: "
                    "entries that the first steps make; type --trainer.strategy ddp",
                    exit_status=1,
                )
            return change(leaf, parameter, bool(shaped) if shaped is not None else True)

        return tree_map_with_path(changed, state)

    @staticmethod
    def _as_shard(value: Tensor, parameter: DTensor, shaped: bool) -> Tensor:
        rows = parameter._local_tensor
        if isinstance(value, DTensor) or not shaped or value.shape != rows.shape:
            return value
        mesh, placements = parameter.device_mesh, parameter.placements
        size = {"shape": parameter.shape, "stride": parameter.stride()}
        return DTensor.from_local(value, mesh, placements, run_check=False, **size)

    @staticmethod
    def _rows_of(value: Tensor, parameter: DTensor, shaped: bool) -> Tensor:
        if isinstance(value, DTensor):
            return value._local_tensor if shaped else value.full_tensor()
        if not shaped or value.shape != parameter.shape:
            return value
        shard = shard_like(value.to(parameter.device), parameter)
        return shard._local_tensor if isinstance(shard, DTensor) else shard


class Owned(_Plain):
    """An optimizer that needs whole tensors: each is stepped on one rank, its owner."""

    def __init__(self, optimizer: Optimizer) -> None:
        """Choose the owners."""
        super().__init__(optimizer)
        self.owner: dict[int, int] = {}  # rank of the shards' group, by the id of the parameter
        self._moved = False  # whether the values are here, too
        self._assign()

    def _assign(self) -> None:
        """Give the smallest of each group to rank 0, and spread the others evenly.

        A checkpoint has the settings of the groups from rank 0, whose counters must be current.
        """
        load: dict[int, list[int]] = {}
        for group in self.optimizer.param_groups:
            new: dict[int, list[DTensor]] = {}  # by the number of ranks
            for p in group["params"]:
                if isinstance(p, DTensor) and id(p) not in self.owner:
                    ranks = dist.get_world_size(_group_of(p)) if _split(p) is not None else 1
                    new.setdefault(ranks, []).append(p)
            for ranks, parameters in new.items():
                loads = load.setdefault(ranks, [0] * ranks)
                first, *others = sorted(parameters, key=lambda p: p.numel())
                loads[0] += first.numel()
                places = spread_evenly([p.numel() for p in others], loads)
                for p, rank in zip([first, *others], [0, *places], strict=True):
                    self.owner[id(p)] = rank

    def rank_of(self, parameter: Any) -> int:
        """This rank in the group that has the shards of a parameter."""
        return dist.get_rank(_group_of(parameter)) if _split(parameter) is not None else 0

    def keeps(self, parameter: Any) -> bool:
        """Whether this rank owns a parameter."""
        if not isinstance(parameter, DTensor):
            return True  # not sharded: every rank steps it, in the same way
        return self.owner[id(parameter)] == self.rank_of(parameter)

    def enter(self, step: bool, placeholders: bool) -> bool:
        """Whole tensors on their owners; elsewhere none, or empty ones for the numbering."""
        self._assign()
        self._both = []
        parameters = list(self._parameters())
        values: dict[int, Tensor] = {}
        grads: dict[int, Tensor] = {}
        if not placeholders:
            wanted = [(p, p._local_tensor) for p in parameters]
            with_grad = [(p, p.grad) for p in parameters if step and p.grad is not None]
            wanted += [(p, _rows_of_gradient(p, gradient)) for p, gradient in with_grad]
            found = _gather_to_owners(wanted, self.owner)
            values = dict(zip(map(id, parameters), found, strict=False))
            own = (id(p) for p, _ in with_grad)
            grads = dict(zip(own, found[len(parameters) :], strict=True))
        for p in parameters:
            whole = self.plain.get(id(p))
            if whole is None:
                whole = self.plain[id(p)] = nn.Parameter(p._local_tensor.new_empty(0), False)
            if self.keeps(p):
                if not placeholders:
                    whole.data = values[id(p)]
                    if id(p) in grads:
                        whole.grad = grads[id(p)]
                else:
                    whole.data = p._local_tensor.new_empty(p.shape)
            whole.requires_grad = p.requires_grad
            self._both.append((p, whole))
        self._moved = not placeholders
        return self._replace(lambda p: placeholders or self.keeps(p))

    def leave(self) -> None:
        """Copy the rows of each rank from the whole tensors of the owners."""
        self._restore()
        pairs = self._both
        if self._moved:
            _scatter_from_owners([(p, whole.data) for p, whole in pairs], self.owner)
        for _, whole in pairs:
            whole.data = whole.data.new_empty(0)

    def from_checkpoint(self, saved: State) -> State:
        """The whole state of the parameters that this rank owns."""
        numbered = self._numbered(saved)
        state = {
            number: values
            for number, values in (saved["state"].items() if numbered else ())
            if self.keeps(numbered.get(number))
        }
        return {**saved, "state": state} if numbered else saved


def _split(parameter: Any) -> int | None:
    """The axis of the mesh over which a parameter is sharded; None if it is whole."""
    for axis, placement in enumerate(parameter.placements):
        if not placement.is_replicate() and parameter.device_mesh.size(axis) > 1:
            return axis
    return None


def _group_of(parameter: Any) -> ProcessGroup:
    axis = _split(parameter)
    assert axis is not None
    return parameter.device_mesh.get_group(axis)


def _same_memory(one: Tensor, other: Tensor) -> bool:
    return one.data_ptr() == other.data_ptr() and one.shape == other.shape


def _rows_of_gradient(parameter: Any, gradient: Tensor) -> Tensor:
    """The gradient of this rank's rows; under tp a gradient may be laid out in another way."""
    if not isinstance(gradient, DTensor):
        return gradient
    ours, theirs = parameter._spec, gradient._spec
    if ours is not theirs and tuple(ours.placements) != tuple(theirs.placements):
        gradient = gradient.redistribute(parameter.device_mesh, parameter.placements)
    return gradient._local_tensor


def _bundles(pairs: list[tuple[Any, Tensor]]) -> Iterator[tuple[ProcessGroup | None, list[int]]]:
    """Indices of the tensors that can be sent in one message."""
    bundles: dict[Any, tuple[ProcessGroup | None, list[int]]] = {}
    for place, (p, tensor) in enumerate(pairs):
        group = _group_of(p) if _split(p) is not None else None
        bundles.setdefault((group, tensor.dtype), (group, []))[1].append(place)
    yield from bundles.values()


def _rows(parameter: Any, ranks: int, rank: int) -> int:
    """How many rows of a parameter a rank has."""
    chunk = -(-parameter.shape[0] // ranks)
    return min(max(parameter.shape[0] - rank * chunk, 0), chunk)


def _sizes(
    pairs: list[tuple[Any, Tensor]], places: list[int], owner: dict[int, int], ranks: int
) -> list[list[list[int]]]:
    """[owner][holder]: numbers of each tensor, in order."""
    sizes: list[list[list[int]]] = [[[] for _ in range(ranks)] for _ in range(ranks)]
    for place in places:
        p = pairs[place][0]
        inner = p.shape[1:].numel()
        for holder in range(ranks):
            sizes[owner[id(p)]][holder].append(_rows(p, ranks, holder) * inner)
    return sizes


@torch.no_grad()
def _gather_to_owners(pairs: list[tuple[Any, Tensor]], owner: dict[int, int]) -> list[Any]:
    """Whole tensors on the owners of their parameters, in the order given; None elsewhere.

    One all-to-all for each dtype: a rank sends its rows of the tensors that another owns.
    """
    found: list[Any] = [None] * len(pairs)
    for group, places in _bundles(pairs):
        if group is None:
            for place in places:
                found[place] = pairs[place][1].clone()
            continue
        ranks, rank = dist.get_world_size(group), dist.get_rank(group)
        sizes = _sizes(pairs, places, owner, ranks)
        by_owner = [[i for i in places if owner[id(pairs[i][0])] == r] for r in range(ranks)]
        send = torch.cat([pairs[i][1].reshape(-1) for own in by_owner for i in own])
        sent = [sum(sizes[r][rank]) for r in range(ranks)]
        got = [sum(sizes[rank][r]) for r in range(ranks)]
        received = send.new_empty(sum(got))
        dist.all_to_all_single(received, send, got, sent, group=group)
        parts = [
            piece.split(sizes[rank][r]) if by_owner[rank] else []
            for r, piece in enumerate(received.split(got))
        ]
        for number, i in enumerate(by_owner[rank]):
            whole = torch.cat([part[number] for part in parts])
            found[i] = whole.view(pairs[i][0].shape)
    return found


@torch.no_grad()
def _scatter_from_owners(pairs: list[tuple[Any, Tensor]], owner: dict[int, int]) -> None:
    """Write this rank's rows of the owners' tensors into the shards of the parameters."""
    for group, places in _bundles(pairs):
        if group is None:
            for place in places:
                pairs[place][0]._local_tensor.copy_(pairs[place][1])
            continue
        ranks, rank = dist.get_world_size(group), dist.get_rank(group)
        sizes = _sizes(pairs, places, owner, ranks)
        by_owner = [[i for i in places if owner[id(pairs[i][0])] == r] for r in range(ranks)]
        pieces = []
        for holder in range(ranks):
            for i in by_owner[rank]:
                p, whole = pairs[i]
                chunk = -(-p.shape[0] // ranks)
                rows = whole[holder * chunk : holder * chunk + _rows(p, ranks, holder)]
                pieces.append(rows.reshape(-1))
        empty = pairs[places[0]][0]._local_tensor.new_empty(0)
        send = torch.cat(pieces) if pieces else empty
        sent = [sum(sizes[rank][r]) for r in range(ranks)]
        got = [sum(sizes[r][rank]) for r in range(ranks)]
        received = send.new_empty(sum(got))
        dist.all_to_all_single(received, send, got, sent, group=group)
        for r, piece in enumerate(received.split(got)):
            for i, rows in zip(by_owner[r], piece.split(sizes[r][rank]), strict=True):
                local = pairs[i][0]._local_tensor
                local.copy_(rows.view(local.shape))
