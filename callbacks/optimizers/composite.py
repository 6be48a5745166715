"""Several optimizers as one: Lightning, AMP and checkpoints see a single torch Optimizer.

composite.param_groups = [group of A, group of A, group of B]      the same dicts, not copies
composite.state        = A.state = B.state                         one dict
composite.state_dict() : flat and standard, so that a sharded load finds its way
"""

import inspect
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

import torch
from torch.optim import Optimizer


def needs_closure(optimizer: Optimizer) -> bool:
    """Whether `step` cannot do without a function that computes the loss anew (LBFGS)."""
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    return closure is not None and closure.default is inspect.Parameter.empty


class Composite(Optimizer):
    """Steps its members in order; `zero_grad`, schedules, clipping and saving act on all of them.

    Example: `Composite([Muon(matrices, lr=0.03), torch.optim.AdamW(rest, lr=5e-3)])`
    """

    def __init__(self, members: Sequence[Optimizer], labels: Sequence[str] = ()) -> None:
        """Join optimizers that have no parameter in common; labels, one a group, are for logs."""
        self.members = list(members)
        self._sizes = [len(member.param_groups) for member in self.members]
        super().__init__([group for member in self.members for group in member.param_groups], {})
        self.labels = list(labels) or [f"group {i}" for i in range(len(self.param_groups))]
        self._link()

    @property
    def gathers(self) -> bool:
        """Whether every rank takes the whole step, of parameters that are gathered for it."""
        return any(getattr(member, "gathers", False) for member in self.members)

    def by_label(self) -> dict[str, tuple[Optimizer, list[dict[str, Any]]]]:
        """The member and the groups behind each label."""
        parts: dict[str, tuple[Optimizer, list[dict[str, Any]]]] = {}
        labelled = zip(self.labels, self.param_groups, strict=True)
        for member, size in zip(self.members, self._sizes, strict=True):
            for label, group in islice(labelled, size):
                parts.setdefault(label, (member, []))[1].append(group)
        return parts

    def _link(self) -> None:
        groups = iter(self.param_groups)
        for member, size in zip(self.members, self._sizes, strict=True):
            member.param_groups = [next(groups) for _ in range(size)]
            for parameter, state in member.state.items():
                self.state.setdefault(parameter, state)
            member.state = self.state
        self._unseen = [p for group in self.param_groups for p in group["params"]]

    def let_go(self) -> None:
        """Forget parameters that other ranks have (`elsewhere`); the groups are alike on all."""
        for group in self.param_groups:
            there = [p for p in group["params"] if getattr(p, "elsewhere", False)]
            group["params"] = [p for p in group["params"] if not getattr(p, "elsewhere", False)]
            for p in there:
                self.state.pop(p, None)
        self._unseen = [p for group in self.param_groups for p in group["params"]]

    def __setstate__(self, state: dict[str, Any]) -> None:
        """`load_state_dict` ends here, with new group dicts and a new state dict."""
        super().__setstate__(state)
        for member in self.members:
            member.state = self.state
        self._link()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step of every member, unless nobody has a gradient; the closure runs once."""
        if closure is not None and needs_closure(self.members[0]):
            loss = self.members[0].step(closure)  # alone then, and calls it as often as it likes
        else:
            loss = None
            if closure is not None:
                with torch.enable_grad():
                    loss = closure()
            if any(p.grad is not None for group in self.param_groups for p in group["params"]):
                for member in self.members:
                    member.step()
        if self._unseen:
            self._give_state()
        return loss

    def _give_state(self) -> None:
        """torch.distributed.checkpoint refuses a member without state (plain SGD) beside others."""
        for parameter in self._unseen:
            if parameter.grad is not None and not self.state.get(parameter):
                self.state[parameter] = {"step": torch.zeros(())}
        self._unseen = [p for p in self._unseen if p not in self.state]

    def train(self) -> None:
        """Tell members that keep two sets of weights (schedule-free) that training goes on."""
        self._mode("train")

    def eval(self) -> None:
        """Tell members that keep two sets of weights (schedule-free) to show the averaged ones."""
        self._mode("eval")

    def _mode(self, name: str) -> None:
        for member in self.members:
            if callable(switch := getattr(member, name, None)):
                switch()
