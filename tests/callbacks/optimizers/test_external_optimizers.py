"""Optimizers of other packages, by kind: each steps, saves and resumes under a plan as alone."""

import dis
import enum
import inspect
import io
import re
import threading
from collections import defaultdict, deque
from functools import partial
from pathlib import Path
from types import FunctionType

import lightning as L
import numpy
import pytest
import torch
from jsonargparse import ArgumentParser
from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.utils.data import DataLoader, TensorDataset

from ravine.callbacks import ExactResume, GradientClipping, LRSchedule, OptimizerPlan, ParamRule
from ravine.callbacks.optimizers.closures import takes_closure
from ravine.callbacks.optimizers.composite import CompositeOptimizer
from ravine.callbacks.optimizers.optimizer_errors import OptimizerError
from ravine.callbacks.optimizers.param_groups import RuleParams, build_optimizer
from ravine.cli import error_report
from ravine.strategies import AtomicCheckpointIO
from ravine.strategies.checkpoint.atomic_io import CheckpointError, check_serializable


class Base(Optimizer):
    """w <- w - lr * move(gradient): a subclass defines move and its state."""

    def __init__(self, params, lr=0.1, **settings):
        super().__init__(params, {"lr": lr, **settings})

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.begin()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p -= group["lr"] * self.move(p.grad, self.state[p], group)
        return loss

    def begin(self):
        pass

    def move(self, gradient, state, group):
        return gradient


class Counter(Base):
    """A counter that is an attribute, saved by its own state_dict; loading takes it out."""

    t = 0

    def begin(self):
        self.t += 1

    def move(self, gradient, state, group):
        return gradient / self.t

    def state_dict(self):
        return {**super().state_dict(), "t": self.t}

    def load_state_dict(self, state):
        self.t = state.pop("t")
        super().load_state_dict(state)


class Arrays(Counter):
    """The same counter, an array of numpy."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, lr)
        self.t = numpy.zeros(2)

    def move(self, gradient, state, group):
        return gradient / float(self.t.sum())


class Hooked(Base):
    """The same by hooks."""

    t = 0

    def __init__(self, params, lr=0.1):
        super().__init__(params, lr)
        self.register_state_dict_post_hook(lambda self, state: {**state, "t": self.t})
        self.register_load_state_dict_pre_hook(lambda self, state: setattr(self, "t", state["t"]))

    begin, move = Counter.begin, Counter.move


class Typed(Base):
    """Momentum in bfloat16, counts in uint8, places in int64: its loader keeps the types."""

    def move(self, gradient, state, group):
        if not state:
            state["m"] = torch.zeros_like(gradient, dtype=torch.bfloat16)
            state["n"] = torch.zeros_like(gradient, dtype=torch.uint8)
            state["i"] = torch.zeros(1, dtype=torch.int64)
        state["m"].mul_(0.9).add_(gradient.to(torch.bfloat16))
        state["n"].add_(gradient > 0)
        state["i"].add_(1)
        row = gradient.flatten()[state["i"] % gradient.numel()]
        return state["m"].float() * (1 + state["n"].float()) + row

    def load_state_dict(self, state):
        super().load_state_dict(state)
        parameters = [p for group in self.param_groups for p in group["params"]]
        for i, values in state["state"].items():
            self.state[parameters[i]] = {k: v.clone() for k, v in values.items()}


class InSetstate(Typed):
    """The same in __setstate__, which torch's loader ends with."""

    load_state_dict = Optimizer.load_state_dict

    def __setstate__(self, state):
        super().__setstate__(state)
        for values in self.state.values():
            if "m" in values:
                values["m"] = values["m"].to(torch.bfloat16)
                values["n"] = values["n"].to(torch.uint8)
                values["i"] = values["i"].to(torch.int64)


class Wrapper(Optimizer):
    """Another optimizer within, whose groups and state are read-only properties."""

    def __init__(self, inner):
        self.inner = inner
        self.defaults = inner.defaults

    @property
    def param_groups(self):
        return self.inner.param_groups

    @property
    def state(self):
        return self.inner.state

    def state_dict(self):
        return {"inner": self.inner.state_dict()}

    def load_state_dict(self, state):
        self.inner.load_state_dict(state["inner"])

    def add_param_group(self, group):
        self.inner.add_param_group(group)

    def zero_grad(self, set_to_none=True):
        self.inner.zero_grad(set_to_none)

    @torch.no_grad()
    def step(self, closure=None):
        return self.inner.step(closure)


class Slow(Wrapper):
    """Looks ahead: every second step the weights go halfway back to a slow copy."""

    def __init__(self, inner):
        super().__init__(inner)
        self.count, self.slow = 0, [p.detach().clone() for p in self._all()]

    def _all(self):
        return [p for group in self.param_groups for p in group["params"]]

    @torch.no_grad()
    def step(self, closure=None):
        loss = self.inner.step(closure)
        self.count += 1
        if self.count % 2 == 0:
            for p, slow in zip(self._all(), self.slow, strict=True):
                p.copy_(slow.lerp_(p, 0.5))
        return loss

    def state_dict(self):
        return {"fast": self.inner.state_dict(), "slow": self.slow, "count": self.count}

    def load_state_dict(self, state):
        self.inner.load_state_dict(state["fast"])
        self.slow, self.count = state["slow"], state["count"]


class Mode(enum.Enum):
    UP = 1
    DOWN = -1


class Precondition:
    """An object of the optimizer's own, with tensors."""

    def __init__(self, like):
        self.sum, self.calls = torch.zeros_like(like), [0]

    def __call__(self, gradient):
        self.sum += gradient**2
        self.calls[0] += 1
        return gradient / (self.sum.sqrt() + 0.1 * self.calls[0])


def remembering(name, make, use, **settings):
    """A class that keeps one object in its state and moves by it."""

    def move(self, gradient, state, group):
        if "it" not in state:
            state["it"] = make(gradient)
        return use(gradient, state)

    kind = type(name, (Base,), {"move": move, "__module__": __name__})
    return partial(kind, **settings) if settings else kind


def queue(gradient, state):
    state["it"].append(gradient.clone())
    if len(state["it"]) > 2:
        state["it"].popleft()
    return sum(state["it"])


def swing(gradient, state):
    state["it"] = Mode.DOWN if state["it"] is Mode.UP else Mode.UP
    return gradient * state["it"].value


def random_update(gradient, state):
    return gradient + torch.randn(gradient.shape, generator=state["it"])


def spelled(gradient, state):
    state["it"]["seen"].append(1)
    assert state["it"]["signs"] == ("ab", ["c"])
    return gradient * len(state["it"]["seen"])


def scaled(gradient, state):
    state["it"] = numpy.float64(state["it"] * 0.5)
    return gradient * float(state["it"])


def deep(gradient, state):
    state["it"]["m"][0].mul_(0.9).add_(gradient)
    state["it"]["m"][1] += 1
    return state["it"]["m"][0] / state["it"]["m"][1]


def tallied(gradient, state):
    state["it"]["n"] += 1
    return gradient / state["it"]["n"]


class GlobalState(Base):
    """A state under a name, not under a parameter."""

    def begin(self):
        self.state["all"] = {"t": self.state["all"].get("t", 0) + 1}

    def move(self, gradient, state, group):
        return gradient / self.state["all"]["t"]


class InGroups(Base):
    """Counters and what is no value stand in the groups."""

    def __init__(self, params, lr=0.1, mode=Mode.UP):
        settings = {"t": 0, "mode": mode, "__class__": InGroups, "nothing": object()}
        super().__init__(params, lr, **settings, map=lambda x: 2 * x, inner=partial(SGD, lr=1.0))

    def move(self, gradient, state, group):
        group["t"] += 1
        assert group["__class__"] is InGroups
        assert isinstance(group["map"], FunctionType)
        group["mode"] = Mode.DOWN if group["t"] > 5 else Mode.UP
        return group["map"](gradient) / group["t"] * group["mode"].value


class NeedsClosure(Base):
    """The closure has a default value, but is required."""

    def step(self, closure=None):
        if closure is None:
            raise RuntimeError("a closure is needed")
        return super().step(closure)


class ByLoss(Base):
    """The step is proportional to the loss."""

    @torch.no_grad()
    def step(self, closure=None):
        with torch.enable_grad():
            loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                p -= group["lr"] * loss.detach() * p.grad
        return loss


class Sharp(Base):
    """SAM: computes the gradient at weights moved up along the last gradient, then steps down."""

    @torch.no_grad()
    def step(self, closure=None):
        ups = [
            (p, 0.05 * p.grad) for g in self.param_groups for p in g["params"] if p.grad is not None
        ]
        for p, up in ups:
            p += up
        with torch.enable_grad():
            loss = closure()
        for p, up in ups:
            p -= up
        super().step()
        return loss


class NoClosure(Base):
    """A step without the argument."""

    def step(self):
        return super().step()


class AnyWords(SGD):
    def __init__(self, params, rho=0.05, **kwargs):
        super().__init__(params, **kwargs)
        assert rho == 0.05


class NoRate(Base):
    """A learning rate of None: the class computes its own."""

    def __init__(self, params, lr=None):
        super().__init__(params, lr)

    def begin(self):
        self.lr = 0.1

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["lr"] = 0.1
        loss = super().step(closure)
        for group in self.param_groups:
            group["lr"] = None
        return loss


class Lists(Base):
    """Settings that are lists."""

    def __init__(self, params, lr=0.1, weight_decay=(0.0, 0.1)):
        super().__init__(params, lr, weight_decay=list(weight_decay), steps=[0])

    def move(self, gradient, state, group):
        group["steps"][0] += 1
        return gradient + sum(group["weight_decay"]) / group["steps"][0]


class OwnZero(Base):
    """Keeps the gradients and takes half of them into the next step."""

    def zero_grad(self, set_to_none=True):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.grad.mul_(0.5)


class Watches(Base):
    """Its step is replaced on the instance by a wrapper."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, lr)
        self.seen, inner = 0, self.step

        def step(closure=None):
            self.seen += 1
            return inner(closure)

        self.step = step

    def move(self, gradient, state, group):
        state["seen"] = state.get("seen", 0) + 1
        return gradient / state["seen"]


KINDS = {
    "a counter as an attribute": Counter,
    "hooks of its state_dict": Hooked,
    "states of other types, own loader": Typed,
    "states of other types, own __setstate__": InSetstate,
    "read-only groups and state": lambda ps: Wrapper(AdamW(ps, lr=0.1)),
    "a state_dict of another form": lambda ps: Slow(SGD(ps, lr=0.1, momentum=0.9)),
    "a wrapper of a wrapper": lambda ps: Slow(Wrapper(AdamW(ps, lr=0.1))),
    "a queue": remembering("Queues", lambda g: deque(), queue),
    "an enum in the state": remembering("Swings", lambda g: Mode.UP, swing),
    "an object of its package": remembering(
        "Objects", Precondition, lambda g, state: state["it"](g)
    ),
    "a random generator": remembering(
        "Draws", lambda g: torch.Generator().manual_seed(3), random_update
    ),
    "a number of numpy": remembering("Numbers", lambda g: numpy.float64(4.0), scaled),
    "an array of numpy": Arrays,
    "dicts and lists in the state": remembering(
        "Deep", lambda g: {"m": [torch.zeros_like(g), 0]}, deep
    ),
    "texts and queues in the state": remembering(
        "Spells", lambda g: {"signs": ("ab", ["c"]), "seen": deque(maxlen=2)}, spelled
    ),
    "a defaultdict": remembering("Tallies", lambda g: defaultdict(int), tallied),
    "a state by name": GlobalState,
    "classes, functions and enums in groups": InGroups,
    "a required closure": NeedsClosure,
    "a step proportional to the loss": ByLoss,
    "a loss at other weights": Sharp,
    "any keyword arguments": partial(AnyWords, lr=0.1, momentum=0.9),
    "no learning rate": NoRate,
    "lists in groups": Lists,
    "a zero_grad of its own": OwnZero,
    "no closure": NoClosure,
    "a step on the instance": Watches,
    "a learning rate that is a tensor": partial(SGD, lr=torch.tensor(0.1), momentum=0.9),
    "foreach": partial(AdamW, lr=0.1, foreach=True),
    "fused": partial(AdamW, lr=0.1, fused=True, amsgrad=True),
    "averages of weights": partial(torch.optim.ASGD, lr=0.1, t0=1.0),
    "states made at the start": partial(torch.optim.Adagrad, lr=0.1),
    "line search": partial(torch.optim.LBFGS, max_iter=2, line_search_fn="strong_wolfe"),
}


def problem():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    return net, torch.randn(8, 6, 3)


def descend(net, rows, optimizer, steps):
    """As Lightning steps: loss, zero_grad and backward are the closure."""
    for i in steps:

        def closure(x=rows[i]):
            loss = (net(x) - 1).square().mean()
            optimizer.zero_grad()
            loss.backward()
            return loss

        if takes_closure(optimizer):
            optimizer.step(closure=closure)
        else:
            closure()
            optimizer.step()


def planned(factory, net):
    named = list(net.named_parameters())
    return build_optimizer([RuleParams(ParamRule(optimizer=factory), "rest", named)], "all")


def through_a_file(state):
    check_serializable(state)
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def flat(net):
    return torch.cat([p.detach().flatten() for p in net.parameters()])


@pytest.mark.parametrize("kind", KINDS)
def test_an_optimizer_steps_under_a_plan_as_alone_and_resumes_bitwise(kind):
    factory = KINDS[kind]
    net, rows = problem()
    descend(net, rows, factory(list(net.parameters())), range(6))
    other, _ = problem()
    optimizer = planned(factory, other)
    descend(other, rows, optimizer, range(3))
    third, _ = problem()
    third.load_state_dict(other.state_dict())
    for p, q in zip(third.parameters(), other.parameters(), strict=True):
        p.grad = q.grad.clone()  # gradients of the last step: some classes start with them
    state = through_a_file(optimizer.state_dict())
    descend(other, rows, optimizer, range(3, 6))
    resumed = planned(factory, third)
    resumed.load_state_dict(state)
    descend(third, rows, resumed, range(3, 6))
    assert torch.equal(flat(net), flat(other))
    assert torch.equal(flat(third), flat(other))


@pytest.mark.parametrize("kind", ["a counter as an attribute", "a state_dict of another form"])
def test_two_members_each_load_their_own_state_and_share_no_state_by_name(kind):
    def made(net):
        matrices = [net[0].weight, net[2].weight]
        biases = [net[0].bias, net[2].bias]
        return CompositeOptimizer([KINDS[kind](matrices), GlobalState(biases, lr=0.05)])

    net, rows = problem()
    optimizer = made(net)
    descend(net, rows, optimizer, range(3))
    other, _ = problem()
    other.load_state_dict(net.state_dict())
    resumed = made(other)
    resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    assert [group["params"] for group in optimizer.state_dict()["param_groups"]] == [[0, 1], [2, 3]]
    descend(net, rows, optimizer, range(3, 6))
    descend(other, rows, resumed, range(3, 6))
    assert torch.equal(flat(net), flat(other))


class Net(L.LightningModule):
    def __init__(self, factory=None):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
        if factory is not None:
            self.configure_optimizers = lambda: factory(list(self.parameters()))

    def training_step(self, batch, index):
        return (self.net(batch[0]) - 1).square().mean()

    def train_dataloader(self):
        x = torch.randn(24, 3, generator=torch.Generator().manual_seed(1))
        return DataLoader(TensorDataset(x), 6)


class SaveAt(L.Callback):
    def __init__(self, path):
        self.path = path

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 3:
            trainer.save_checkpoint(self.path)


def fitted(*callbacks, module=None, steps=6, resume=None, **more):
    module = module or Net()
    trainer = L.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[ExactResume(), *callbacks],
        plugins=[AtomicCheckpointIO()],
        **more,
    )
    trainer.fit(module, ckpt_path=resume)
    return trainer, module


IN_LIGHTNING = [
    "a counter as an attribute", "a state_dict of another form", "an object of its package",
    "a loss at other weights", "classes, functions and enums in groups", "no learning rate",
]  # fmt: skip


@pytest.mark.parametrize("kind", IN_LIGHTNING)
def test_a_plan_trains_as_the_optimizer_of_the_module_and_resumes_bitwise(tmp_path, kind):
    factory, file = KINDS[kind], tmp_path / "cut.ckpt"
    _, own = fitted(module=Net(factory))
    _, planned = fitted(OptimizerPlan(factory), SaveAt(file))
    assert torch.equal(flat(own), flat(planned))
    if kind == "a loss at other weights":  # it begins with gradients, which no file holds
        return
    saved = torch.load(file, weights_only=True)["optimizer_states"][0]
    assert [i for group in saved["param_groups"] for i in group["params"]] == [0, 1, 2, 3]
    _, resumed = fitted(OptimizerPlan(factory), resume=file)
    assert torch.equal(flat(resumed), flat(planned))


def test_a_module_without_configure_optimizers_trains_with_a_plan_in_a_stock_trainer():
    trainer, module = fitted(OptimizerPlan(partial(SGD, lr=0.1)))
    assert trainer.global_step == 6
    assert not torch.equal(flat(module), flat(Net()))
    assert "configure_optimizers" not in vars(module)


def lock(gradient, state):
    return gradient


REFUSED = {
    "a lock": (
        lambda g: threading.Lock(),
        "keeps a _thread.lock in the state of parameter 0['it']",
    ),
    "a function": (lambda g: lambda x: x, "keeps a builtins.function"),
    "a net": (lambda g: nn.Linear(1, 1), "keeps a torch.nn.modules.linear.Linear"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_state_that_no_checkpoint_can_hold_is_refused_in_the_first_step(what):
    make, words = REFUSED[what]
    steps = []
    ends = L.pytorch.callbacks.LambdaCallback(on_train_batch_end=lambda *_: steps.append(1))
    with pytest.raises(CheckpointError) as caught:
        fitted(OptimizerPlan(remembering("Keeps", make, lock)), ends)
    assert steps == []
    assert words in str(caught.value)
    assert error_report.exit_status(caught.value) == 1


def test_a_checkpoint_builds_no_object_of_a_class_outside_the_package_of_the_optimizer():
    net, rows = problem()
    optimizer = planned(KINDS["an object of its package"], net)
    descend(net, rows, optimizer, range(1))
    state = optimizer.state_dict()
    for path in ("subprocess:Popen", "torch:Generator", f"{__name__}:Missing", "os:path.join"):
        state["state"][0]["it"]["type"] = path
        with pytest.raises(CheckpointError, match="not a class of the optimizer's package"):
            planned(KINDS["an object of its package"], net).load_state_dict(state)


class WantsModel(SGD):
    def __init__(self, model, lr=0.1):
        super().__init__([p for _, p in model.named_parameters()], lr=lr)


class WantsKeys(Base):
    def __init__(self, params, lr=0.1):
        super().__init__(params, lr)
        if not all(group["use_it"] for group in self.param_groups):
            raise AssertionError


@pytest.mark.parametrize(
    ("factory", "words"),
    [
        (WantsModel, r"WantsModel refuses its arguments: AttributeError: .*it needs the model"),
        (
            WantsKeys,
            r"WantsKeys refuses its arguments: KeyError: 'use_it' \(at test_external_optimizers.py",
        ),
        (partial(SGD, momentum="high"), r"SGD refuses momentum=high: TypeError"),
        (partial(SGD, lr=None), r"SGD refuses lr=None: TypeError"),
        (
            partial(SGD, momenta=0.9),
            r"SGD has no argument 'momenta'; nearest: momentum; use momentum=0\.9",
        ),
        (lambda params: nn.Linear(1, 1), r"Linear has no param_groups, so it is not an optimizer"),
    ],
)
def test_an_error_of_a_constructor_becomes_one_sentence(factory, words):
    with pytest.raises(ValueError, match=words):
        fitted(OptimizerPlan(factory))


def test_without_a_learning_rate_there_is_nothing_to_schedule():
    plan = OptimizerPlan(NoRate, schedule=LRSchedule("exponential"))
    with pytest.raises(ValueError, match="has no number 'lr'"):
        fitted(plan)


def test_rules_that_share_a_tensor_for_lr_have_each_their_own():
    factory = partial(torch.optim.Adam, lr=torch.tensor(1e-3), foreach=False)
    rules = [
        ParamRule("bias", optimizer=factory, lr_scale=2.0),
        ParamRule(optimizer=factory, lr_scale=3.0),
    ]
    trainer, _ = fitted(OptimizerPlan(rules=rules), steps=2)
    rates = [float(group["lr"]) for group in trainer.optimizers[0].param_groups]
    assert rates == pytest.approx([2e-3, 3e-3])
    schedule = LRSchedule("exponential", decay_factor=0.5)
    trainer, _ = fitted(OptimizerPlan(rules=rules, schedule=schedule), steps=2)
    rates = [float(group["lr"]) for group in trainer.optimizers[0].param_groups]
    assert rates == pytest.approx([5e-4, 7.5e-4])


def test_with_several_members_the_closure_only_returns_the_loss():
    rules = [
        ParamRule("bias", optimizer=partial(ByLoss, lr=0.1)),
        ParamRule(optimizer=partial(SGD, lr=0.1)),
    ]
    trainer, _ = fitted(OptimizerPlan(rules=rules), steps=2)
    assert trainer.global_step == 2
    rules = [
        ParamRule("bias", optimizer=partial(Sharp, lr=0.1)),
        ParamRule(optimizer=partial(SGD, lr=0.1)),
    ]
    with pytest.raises(ValueError, match="Sharp computes the loss several times"):
        fitted(OptimizerPlan(rules=rules))


class Failing(Base):
    def move(self, gradient, state, group):
        raise RuntimeError("no\nluck")


def test_an_error_of_a_package_is_one_line_and_an_error_of_user_code_keeps_its_traceback(
    monkeypatch,
):
    with pytest.raises(RuntimeError, match=r"^no\nluck$"):
        fitted(OptimizerPlan(Failing))
    from ravine.callbacks.optimizers import optimizer_errors

    monkeypatch.setattr(optimizer_errors, "is_user_file", lambda file: False)
    with pytest.raises(
        OptimizerError, match=r"^Failing failed in its step: RuntimeError: no luck;"
    ):
        fitted(OptimizerPlan(Failing))
    monkeypatch.setenv("RAVINE_TRACEBACK", "1")
    with pytest.raises(RuntimeError, match=r"^no\nluck$"):
        fitted(OptimizerPlan(Failing))


def test_an_attribute_does_not_make_an_error_of_a_package_one_of_ravine(monkeypatch):
    class OwnError(RuntimeError):
        exit_status = 0

    def move(self, gradient, state, group):
        raise OwnError("no luck")

    from ravine.callbacks.optimizers import optimizer_errors

    monkeypatch.setattr(Failing, "move", move)
    monkeypatch.setattr(optimizer_errors, "is_user_file", lambda file: False)
    with pytest.raises(OptimizerError, match="in its step: OwnError: no luck"):
        fitted(OptimizerPlan(Failing))


def test_an_error_of_the_module_in_a_closure_is_unchanged(monkeypatch):
    class Broken(Net):
        def training_step(self, batch, index):
            raise KeyError("mine")

    from ravine.callbacks.optimizers import optimizer_errors

    monkeypatch.setattr(optimizer_errors, "is_user_file", lambda file: False)
    with pytest.raises(KeyError, match="mine"):
        fitted(OptimizerPlan(SGD), module=Broken())


def test_user_files_are_those_outside_of_python_ravine_and_packages():
    from ravine.callbacks.optimizers.optimizer_errors import is_user_file

    assert is_user_file(__file__)
    assert not any(is_user_file(m.__file__) for m in (torch, threading))
    assert not is_user_file("<string>")


def test_a_state_without_the_values_that_the_optimizer_saves_is_refused():
    net, rows = problem()
    optimizer = planned(Counter, net)
    descend(net, rows, optimizer, range(2))
    state = optimizer.state_dict()
    del state["members"]
    with pytest.raises(CheckpointError, match=r"lacks state of Counter \(KeyError: 't'\)"):
        planned(Counter, net).load_state_dict(state)


NOTHING = object()


class OddDefaults(SGD):
    """Defaults that no config can hold."""

    def __init__(self, params, lr: float = 0.1, palm: bool = NOTHING, mode: int = Mode.UP):
        assert palm is NOTHING
        assert mode is Mode.UP
        super().__init__(params, lr)


def test_on_the_command_line_a_class_keeps_defaults_that_no_config_can_hold():
    from ravine.cli import command  # noqa: F401  it teaches the parser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(OptimizerPlan, "plan")
    name = f"{__name__}.OddDefaults"
    words = [f"--plan.optimizer={name}", "--plan.optimizer.lr=0.2"]
    config = parser.parse_args(words)
    assert "palm" not in parser.dump(config)
    made = parser.instantiate_classes(config).plan.rules[0].optimizer([nn.Parameter(torch.ones(1))])
    assert made.param_groups[0]["lr"] == 0.2


class Counted(SGD):
    """Steps only the groups of its constructor, as some classes do."""

    def __init__(self, params, lr=0.1, weight_decay=0.1):
        super().__init__(params, lr, weight_decay=weight_decay)
        self.rates = [group["lr"] for group in self.param_groups]

    def step(self, closure=None):
        every = self.param_groups
        self.param_groups = every[: len(self.rates)]
        loss = super().step(closure)
        self.param_groups = every
        return loss


def test_a_class_that_counts_its_groups_in_its_constructor_also_steps_those_without_decay():
    def two_groups(parameters):
        matrices = [p for p in parameters if p.ndim >= 2]
        others = [p for p in parameters if p.ndim < 2]
        return Counted([{"params": matrices}, {"params": others, "weight_decay": 0.0}])

    _, own = fitted(module=Net(two_groups))
    _, planned = fitted(OptimizerPlan(Counted))
    assert torch.equal(flat(own), flat(planned))


@pytest.mark.parametrize("clipping", [{"max_norm": 0.01}, {"max_value": 0.001}])
def test_sparse_gradients_are_clipped_as_dense_ones(clipping):
    class Rows(Net):
        def __init__(self, sparse):
            super().__init__()
            self.net = nn.Sequential(nn.Embedding(4, 3, sparse=sparse), nn.Linear(3, 2))

        def training_step(self, batch, index):
            return self.net((batch[0] > 0).long()).square().mean()

    rules = [ParamRule("embedding", optimizer=partial(SGD, lr=0.5)), ParamRule(optimizer=SGD)]
    weights = []
    for sparse in (True, False):
        module = Rows(sparse)
        fitted(OptimizerPlan(rules=rules), GradientClipping(**clipping), module=module, steps=3)
        weights.append(flat(module))
    torch.testing.assert_close(*weights)


def test_the_source_folders_name_no_package_of_the_trials():
    root = Path(__file__).resolve().parents[3]
    lines = (root / "benchmarks/other_optimizers.txt").read_text().splitlines()
    packages = {line.split("==")[0] for line in lines if line and line[0] != "#"}
    # the kernels of one are used by name, in one file; another has the name of an English word
    packages -= {"bitsandbytes", "tabulate", "colorama"}
    packages |= {"gluonts", "mlcolvar", "torch-uncertainty", "lightly"}
    names = {form for name in packages for form in (name, name.replace("-", "_"))}
    pattern = re.compile(rf"(?i)\b({'|'.join(map(re.escape, sorted(names)))})\b")
    folders = ("lightning_modules", "datamodules", "callbacks", "strategies", "cli")
    for file in (f for folder in folders for f in (root / folder).rglob("*.py")):
        assert not pattern.search(file.read_text()), file


def test_only_the_first_training_step_inspects_the_bytecode_of_an_optimizer(monkeypatch):
    class Uncached(SGD):  # no other test has used this class
        def step(self, closure=None):
            return super().step(closure)

    inspected, get_instructions = [], dis.get_instructions
    monkeypatch.setattr(
        "dis.get_instructions", lambda code: inspected.append(code) or get_instructions(code)
    )
    net, rows = problem()
    optimizer = planned(Uncached, net)
    descend(net, rows, optimizer, range(1))
    assert inspected.count(inspect.unwrap(Uncached.step).__code__) == 1
    num_inspected = len(inspected)
    descend(net, rows, optimizer, range(1, 3))
    assert len(inspected) == num_inspected


def test_hooks_of_the_composite_itself_run():
    net, rows = problem()
    optimizer, calls = planned(SGD, net), []
    optimizer.register_state_dict_pre_hook(lambda o: calls.append("before"))
    optimizer.register_state_dict_post_hook(lambda o, state: {**state, "more": 1})
    optimizer.register_load_state_dict_pre_hook(lambda o, state: calls.append(state["more"]))
    optimizer.register_load_state_dict_post_hook(lambda o: calls.append("loaded"))
    optimizer.register_step_post_hook(lambda o, args, kwargs: calls.append("stepped"))
    descend(net, rows, optimizer, range(1))
    optimizer.load_state_dict(optimizer.state_dict())
    assert calls == ["before", "stepped", "before", 1, "loaded"]
