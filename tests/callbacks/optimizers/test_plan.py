"""OptimizerPlan: the module trains with the chosen optimizer, or the plan is refused."""

from functools import partial

import lightning as L
import pytest
import torch
from jsonargparse import ArgumentParser
from torch import nn
from torch.optim import SGD, AdamW
from torch.utils.data import DataLoader, TensorDataset

from ravine.callbacks import (
    AdaGradOptimizer,
    ExactResume,
    LRSchedule,
    OptimizerPlan,
    ParamRule,
    SignSGD,
    SignSGDOptimizer,
    UpdateMonitor,
)
from ravine.callbacks.optimizers.composite import CompositeOptimizer
from ravine.callbacks.optimizers.parameter_rules import assign_params, classify_params
from ravine.errors import UsageError
from ravine.lightning_modules.task_module import TaskModule
from ravine.strategies import AtomicCheckpointIO

QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
}


class Net(L.LightningModule):
    """A foreign module whose net appears only in configure_model, with its own optimizer."""

    def __init__(self):
        super().__init__()
        self.net = None
        self.rates = []

    def configure_model(self):
        if self.net is None:
            torch.manual_seed(1)
            self.net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))

    def training_step(self, batch, index):
        return (self.net(batch[0]) - batch[1]).square().mean()

    def on_before_optimizer_step(self, optimizer):
        self.rates.append([group["lr"] for group in optimizer.param_groups])

    def configure_optimizers(self):
        return SGD(self.parameters(), lr=1000.0)


def data(batch_size=4):
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(24, 3, generator=generator), torch.randn(24, 2, generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size)


def trained(plan, steps=6, module=None, loader=None, ckpt_path=None, **arguments):
    module = module or Net()
    trainer = L.Trainer(**{**QUIET, "callbacks": [plan], "max_steps": steps, **arguments})
    loader = loader or data()
    trainer.fit(module, loader, ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
    return trainer, module


def by_hand(optimizer, steps, factor=lambda step: 1.0):
    module = Net()
    module.configure_model()
    made = optimizer(module.parameters())
    lr = made.param_groups[0]["lr"]
    batches = list(data())
    for step in range(steps):
        made.param_groups[0]["lr"] = lr * factor(step)
        made.zero_grad()
        module.training_step(batches[step % len(batches)], 0).backward()
        made.step()
    return module


def same(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


FACTORIES = [
    partial(AdamW, lr=0.1),
    partial(SGD, lr=0.1),
    lambda parameters: SGD(parameters, lr=0.1, momentum=0.9, nesterov=True),
    torch.optim.RMSprop,
    torch.optim.Adafactor,
]


@pytest.mark.parametrize("factory", FACTORIES)
def test_the_plan_trains_exactly_like_its_optimizer_in_a_bare_loop(factory):
    _, module = trained(OptimizerPlan(factory, decay="all"))
    assert same(module, by_hand(factory, 6))


def test_the_schedule_advances_once_an_optimizer_step_under_accumulation():
    plan = OptimizerPlan(partial(SGD, lr=2.0), schedule=LRSchedule("linear", warmup=2))
    _, module = trained(plan, steps=4, accumulate_grad_batches=2)
    assert [rates[0] for rates in module.rates] == [1.0, 2.0, 2.0, 1.0]
    assert all(len(set(rates)) == 1 for rates in module.rates)


def test_without_max_steps_the_length_comes_from_the_loaders():
    plan = OptimizerPlan(partial(SGD, lr=1.0), schedule=LRSchedule("linear"))
    _, module = trained(plan, steps=-1, max_epochs=2, accumulate_grad_batches=3)
    assert [rates[0] for rates in module.rates] == [1.0, 0.75, 0.5, 0.25]


def test_of_epochs_and_steps_the_shorter_is_the_length():
    plan = OptimizerPlan(partial(SGD, lr=1.0), schedule=LRSchedule("linear"))
    _, module = trained(plan, steps=100, max_epochs=1)
    assert [rates[0] for rates in module.rates] == pytest.approx(
        [1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]
    )


def test_a_run_without_end_has_no_schedule_that_needs_one():
    plan = OptimizerPlan(partial(SGD, lr=1.0), schedule=LRSchedule("linear"))
    with pytest.raises(ValueError, match=r"pass max_steps=1000 to Trainer"):
        trained(plan, steps=-1, max_epochs=-1)


def test_a_scheduled_run_equals_the_closed_form_in_a_bare_loop():
    schedule = LRSchedule("cosine", warmup=2, final_fraction=0.1)
    _, module = trained(OptimizerPlan(partial(AdamW, lr=0.1), "all", schedule), steps=9)
    assert same(module, by_hand(partial(AdamW, lr=0.1), 9, lambda k: schedule.factor(k, 9)))


def test_a_schedule_that_does_not_fit_is_refused_before_the_first_step():
    plan = OptimizerPlan(partial(SGD, lr=1.0), schedule=LRSchedule("step", period=50))
    module = Net()
    with pytest.raises(ValueError, match="period=50 does not occur in the 6 optimizer steps"):
        trained(plan, module=module)
    assert not module.rates


@pytest.mark.parametrize(
    ("warmup", "said"), [(50, "warmup=50 does not fit into the run of 20"), (0.1, "")]
)
@pytest.mark.parametrize("length", [{"steps": 20}, {"steps": -1, "max_epochs": 2}])
def test_a_long_warmup_and_a_fraction_take_a_tenth_of_the_run(capsys, warmup, said, length):
    """In epochs the length is known after the scheduler was built."""
    if "max_epochs" in length:
        length = length | {"limit_train_batches": 10}
    plan = OptimizerPlan(partial(SGD, lr=1.0), schedule=LRSchedule("linear", warmup=warmup))
    _, module = trained(plan, loader=data(2), **length)
    assert [rates[0] for rates in module.rates] == pytest.approx(
        [0.5, 1.0, *((20 - k) / 18 for k in range(2, 20))]
    )
    lines = [line for line in capsys.readouterr().out.splitlines() if "warmup" in line]
    assert len(lines) == bool(said)
    assert all(said in line for line in lines)


@pytest.mark.parametrize("warmup", [0.5, 50])
def test_a_resume_within_a_shortened_warmup_is_bitwise_the_uninterrupted_run(tmp_path, warmup):
    class Cut(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 1:
                trainer.save_checkpoint(tmp_path / "cut.ckpt")

    def run(*callbacks, ckpt_path=None):
        schedule = LRSchedule("cosine", warmup=warmup)
        plan = OptimizerPlan(partial(AdamW, lr=0.1), schedule=schedule)
        length = {"steps": -1, "max_epochs": 5, "limit_train_batches": 4}  # a tenth: 2 steps
        callbacks = [plan, ExactResume(), *callbacks]
        return trained(None, callbacks=callbacks, ckpt_path=ckpt_path, **length)[1]

    whole, resumed = run(Cut()), run(ckpt_path=tmp_path / "cut.ckpt")
    assert same(whole, resumed)
    assert whole.rates[1:] == resumed.rates
    assert whole.rates[0][0] == pytest.approx(0.1 / (10 if warmup == 0.5 else 2))


@pytest.mark.parametrize(("length", "said"), [(8, False), (16, True)])
def test_a_resume_with_another_length_prints_the_old_and_the_new_length(
    tmp_path, capsys, length, said
):
    def plan():
        return OptimizerPlan(partial(SGD, lr=0.1), schedule=LRSchedule("linear"))

    class Cut(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 4:
                trainer.save_checkpoint(tmp_path / "cut.ckpt")

    trained(None, 8, callbacks=[plan(), Cut(), ExactResume()])
    capsys.readouterr()
    callbacks = [plan(), ExactResume()]
    _, module = trained(None, length, ckpt_path=tmp_path / "cut.ckpt", callbacks=callbacks)
    line = "has 8 optimizer steps, and this run has 16; at step 4 the learning rate changes"
    assert (f"{line} from 0.5 to 0.75 of its peak" in capsys.readouterr().out) == said
    assert len(module.rates) == length - 4
    # (b - k) / b of the peak at step k of b, from the first step on
    for index, rates in enumerate(module.rates):
        assert rates == pytest.approx([0.1 * (length - 4 - index) / length] * len(rates))


def test_a_fast_dev_run_accepts_a_warmup_longer_than_the_run():
    plan = OptimizerPlan(partial(SGD, lr=1.0), schedule=LRSchedule("linear", warmup=50))
    _, module = trained(plan, fast_dev_run=True)
    assert module.rates == [[1.0]]


@pytest.mark.parametrize(
    ("decay", "expected"),
    [("none", {0.0: 4}), ("matrices", {0.5: 2, 0.0: 2}), ("all", {0.5: 4})],
)
def test_decay_goes_to_the_tensors_that_were_named(decay, expected):
    trainer, _ = trained(OptimizerPlan(partial(AdamW, weight_decay=0.5), decay), steps=1)
    found = {g["weight_decay"]: len(g["params"]) for g in trainer.optimizers[0].param_groups}
    assert found == expected


def test_frozen_parameters_never_reach_the_optimizer():
    module = Net()
    module.configure_model()
    module.net[0].requires_grad_(False)
    trainer, _ = trained(OptimizerPlan(AdamW), module=module)
    assert sum(len(g["params"]) for g in trainer.optimizers[0].param_groups) == 2


@pytest.mark.parametrize("factory", FACTORIES)
def test_resume_is_bitwise(factory, tmp_path):
    def plan():
        return OptimizerPlan(factory, schedule=LRSchedule("inverse_sqrt", warmup=2))

    rows = data(batch_size=24)  # whole batches: the order of data is another test's concern
    _, whole = trained(plan(), 12, loader=rows)
    trainer, _ = trained(plan(), 6, loader=rows)
    trainer.save_checkpoint(tmp_path / "cut.ckpt")
    _, module = trained(plan(), 12, loader=rows, ckpt_path=tmp_path / "cut.ckpt")
    assert module.rates == whole.rates[6:]
    assert same(module, whole)


def test_resume_with_another_optimizer_is_refused_with_both_names(tmp_path):
    trainer, _ = trained(OptimizerPlan(AdamW))
    trainer.save_checkpoint(tmp_path / "cut.ckpt")
    with pytest.raises(
        ValueError, match=r"has the optimizers AdamW of 4 tensors, and this run has SGD of 4"
    ):
        trained(OptimizerPlan(SGD), steps=12, ckpt_path=tmp_path / "cut.ckpt")


def test_the_module_has_its_own_optimizer_again_after_fit():
    _, module = trained(OptimizerPlan(AdamW))
    assert "configure_optimizers" not in vars(module)


def test_a_second_fit_and_a_fit_after_a_crash_start_clean():
    class Crash(Net):
        broken = True

        def training_step(self, batch, index):
            if self.broken:
                raise RuntimeError("broken")
            return super().training_step(batch, index)

    module = Crash()
    with pytest.raises(RuntimeError, match="broken"):
        trained(OptimizerPlan(AdamW), module=module)
    module.broken = False
    trained(OptimizerPlan(SGD), module=module)
    trained(OptimizerPlan(SGD), module=module)


def test_of_two_plans_the_last_one_is_used_with_a_line(capsys, tmp_path):
    first = OptimizerPlan(AdamW, schedule=LRSchedule("linear", warmup=10**6))
    trainer, module = trained(None, callbacks=[first, SignSGD(lr=0.5)])
    assert module.rates == [[0.5]] * 6
    assert (
        "OptimizerPlan(AdamW) is not used, because SignSGD(SignSGDOptimizer) comes after it. Not "
        "used: AdamW(lr=0.001), LRSchedule(kind='linear', warmup=1000000). Used: "
        "SignSGDOptimizer(lr=0.5), no schedule"
    ) in capsys.readouterr().out
    trainer.save_checkpoint(tmp_path / "cut.ckpt")
    trained(None, 12, ckpt_path=tmp_path / "cut.ckpt", callbacks=[first, SignSGD(lr=0.5)])


def test_an_unknown_argument_names_the_nearest():
    with pytest.raises(ValueError, match=r"AdamW has no argument 'lrr'; nearest: lr; use lr="):
        trained(OptimizerPlan(partial(AdamW, lrr=1.0)))


def test_a_value_that_the_optimizer_refuses_is_named():
    with pytest.raises(ValueError, match=r"AdamW refuses lr=-1.0: Invalid learning rate: -1.0"):
        trained(OptimizerPlan(partial(AdamW, lr=-1.0)))


@pytest.mark.parametrize("lr", ["0,03", float("nan"), float("inf"), -0.1])
def test_an_invalid_rate_that_the_optimizer_does_not_check_is_refused(lr):
    class Trusting(torch.optim.Optimizer):
        def __init__(self, params, lr=1e-3):
            super().__init__(params, {"lr": lr})

    with pytest.raises(
        ValueError, match=r"Trusting: lr=.* is not a learning rate; allowed: a finite number"
    ):
        trained(OptimizerPlan(partial(Trusting, lr=lr)))


class ReadsItsScheduler(Net):
    """Logs the rate of its own scheduler, as tutorials do."""

    def __init__(self, use=lambda scheduler: scheduler.get_last_lr()[0]):
        super().__init__()
        self.use, self.read = use, []

    def training_step(self, batch, index):
        self.read.append(self.use(self.lr_schedulers()))
        return super().training_step(batch, index)

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 2)]


def test_the_scheduler_of_a_module_under_a_plan_returns_the_rate_of_the_plan():
    factory = partial(SGD, lr=0.1)
    _, module = trained(OptimizerPlan(factory), module=ReadsItsScheduler())
    assert module.read == pytest.approx([0.1] * 6)
    assert same(module, by_hand(factory, 6))
    schedule = LRSchedule("linear")
    _, module = trained(OptimizerPlan(factory, schedule=schedule), module=ReadsItsScheduler())
    assert module.read == pytest.approx([0.1 * schedule.factor(k, 6) for k in range(6)])
    assert "lr_schedulers" not in vars(module)  # its own again


USES = {
    ".step": lambda scheduler: scheduler.step(),
    r"\[0\]": lambda scheduler: scheduler[0],
    " in a loop": lambda scheduler: list(scheduler),
}


@pytest.mark.parametrize("use", USES)
def test_another_use_of_a_scheduler_that_the_plan_replaced_names_the_plan(use):
    words = rf"ReadsItsScheduler uses self\.lr_schedulers\(\){use}, and OptimizerPlan replaces"
    with pytest.raises((AttributeError, TypeError), match=words) as error:
        trained(OptimizerPlan(partial(SGD, lr=0.1)), module=ReadsItsScheduler(USES[use]))
    assert "\n" not in str(error.value)


def test_an_eps_that_float16_rounds_to_zero_is_refused_before_the_first_step():
    for factory in (AdamW, torch.optim.RMSprop, partial(AdamW, eps=2e-8), AdaGradOptimizer):
        words = r"eps=\de-\d+ is 0 in float16.*allowed: 6e-8 or more; use eps=1e-4, or"
        with pytest.raises(ValueError, match=words):
            trained(OptimizerPlan(factory), precision="16-true")
    for factory in (partial(AdamW, eps=1e-4), partial(SGD, lr=0.01)):
        _, module = trained(OptimizerPlan(factory), precision="16-true")
        assert all(p.isfinite().all() for p in module.parameters())


def test_a_task_in_float16_without_a_plan_is_refused_with_a_hint():
    class Task(TaskModule):
        def build_net(self):
            return nn.Linear(3, 2)

        def training_step(self, batch, index):
            return (self.net(batch[0]) - batch[1]).square().mean()

    trainer = L.Trainer(**QUIET, max_steps=2, precision="16-true")
    message = r"0 in float16.*; use Trainer\(precision='16-mixed'\), or OptimizerPlan"
    with pytest.raises(UsageError, match=message) as error:
        trainer.fit(Task(), data())
    assert error.value.flag == "--trainer.precision=16-mixed"


def test_a_model_with_nothing_to_train_is_refused():
    module = Net()
    module.configure_model()
    module.requires_grad_(False)
    with pytest.raises(ValueError, match="Net has no trainable parameter"):
        trained(OptimizerPlan(AdamW), module=module)


def test_manual_optimization_is_refused_in_words():
    module = Net()
    module.automatic_optimization = False
    with pytest.raises(ValueError, match="steps its own optimizers"):
        trained(OptimizerPlan(AdamW), module=module)


def test_a_closure_optimizer_trains_alone():
    _, module = trained(OptimizerPlan(partial(torch.optim.LBFGS, lr=0.1, max_iter=3)))
    assert not same(module, by_hand(SGD, 0))


def test_a_closure_optimizer_is_refused_under_accumulation():
    with pytest.raises(ValueError, match="LBFGS computes the loss several times in a step"):
        trained(OptimizerPlan(torch.optim.LBFGS), accumulate_grad_batches=2)


class Naive(torch.optim.Optimizer):
    """What a student writes: no closure, no state, no no_grad."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})

    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                p -= group["lr"] * p.grad


def test_an_optimizer_of_five_lines_works():
    _, module = trained(OptimizerPlan(Naive))
    for p, q in zip(
        module.parameters(), by_hand(partial(SGD, lr=0.1), 6).parameters(), strict=True
    ):
        torch.testing.assert_close(p, q)


def test_groups_and_states_of_a_composite_are_its_members_also_after_loading():
    matrix, bias = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))

    def composite():
        return CompositeOptimizer([SGD([matrix], lr=0.1, momentum=0.9), AdamW([bias], lr=0.2)])

    def step(optimizer):
        matrix.grad, bias.grad = torch.ones(2, 2), torch.ones(2)
        optimizer.step()

    first = composite()
    step(first)
    second = composite()
    second.load_state_dict(first.state_dict())
    second.param_groups[1]["lr"] = 0.0
    for member, group in zip(second.optimizers, second.param_groups, strict=True):
        assert member.param_groups[0] is group
        (parameter,) = group["params"]
        assert second.state[parameter] is member.state[parameter]
    before = bias.detach().clone()
    step(second)
    assert torch.equal(bias, before)
    torch.testing.assert_close(second.state[matrix]["momentum_buffer"], torch.full((2, 2), 1.9))


def test_every_parameter_that_was_stepped_has_state_in_what_is_saved():
    matrix, unused = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))
    optimizer = CompositeOptimizer([SGD([matrix, unused], lr=0.1)])
    matrix.grad = torch.ones(2, 2)
    optimizer.step()
    assert list(optimizer.state_dict()["state"]) == [0]
    assert optimizer.state_dict()["state"][0]["step"].shape == ()
    again = CompositeOptimizer([SGD([matrix, unused], lr=0.1)])
    again.load_state_dict(optimizer.state_dict())
    assert not again.state


class Everything(L.LightningModule):
    """One parameter of each kind, and one that no module type explains."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.mix = nn.Conv1d(4, 4, 1, bias=False)
        self.up = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 5, bias=False)
        self.gain = nn.Parameter(torch.ones(()))
        self.table = nn.Parameter(torch.zeros(2, 2))

    def training_step(self, batch, index):
        return sum(p.square().sum() for p in self.parameters())

    def configure_optimizers(self):
        return SGD(self.parameters(), lr=1000.0)


def test_the_kind_of_a_parameter_follows_from_its_module_not_from_its_number_of_axes():
    assert classify_params(Everything()) == {
        "gain": "scalar",
        "table": "other",
        "embed.weight": "embedding",
        "mix.weight": "convolution",
        "up.weight": "hidden_matrix",
        "up.bias": "bias",
        "norm.weight": "norm",
        "norm.bias": "norm",
        "head.weight": "head",
    }


def test_without_a_module_called_head_the_last_linear_layer_is_the_head():
    found = classify_params(nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2)))
    assert found["0.weight"] == "hidden_matrix"
    assert found["1.weight"] == "head"


def test_a_weight_shared_with_an_embedding_is_an_embedding_and_the_head():
    net = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 5))
    net[2].weight = net[0].weight
    found = classify_params(net)
    assert (found["0.weight"], found["1.weight"]) == ("embedding", "hidden_matrix")


def test_the_first_rule_that_matches_takes_the_parameter():
    rules = [
        ParamRule("norm", "*.bias"),
        ParamRule("norm"),
        ParamRule("rest", "[gt]*"),
        ParamRule(),
    ]
    assignment = assign_params(Everything(), rules)
    assert [[name for name, _ in share] for share in assignment] == [
        ["norm.bias"],
        ["norm.weight"],
        ["gain", "table"],
        ["embed.weight", "mix.weight", "up.weight", "up.bias", "head.weight"],
    ]


def test_each_rule_has_its_optimizer_rate_and_decay_and_all_share_the_schedule():
    rules = [
        ParamRule("hidden_matrix", optimizer=partial(SGD, lr=1.0, weight_decay=0.5), decay="none"),
        ParamRule("embedding", optimizer=partial(AdamW, lr=0.1), lr_scale=2.0),
        ParamRule(optimizer=partial(AdamW, lr=0.1, weight_decay=0.3), decay="matrices"),
    ]
    plan = OptimizerPlan(rules=rules, schedule=LRSchedule("exponential", decay_factor=0.5))
    trainer, _ = trained(plan, steps=1, module=Everything())
    assert [type(member) for member in trainer.optimizers[0].optimizers] == [SGD, AdamW, AdamW]
    assert trainer.optimizers[0].labels == ["hidden_matrix", "embedding", "rest", "rest"]
    rows = [(g["lr"], g["weight_decay"]) for g in trainer.optimizers[0].param_groups]
    assert rows == [(0.5, 0.0), (0.1, 0.01), (0.05, 0.3), (0.05, 0.0)]


def test_rules_with_the_same_optimizer_are_groups_of_one_optimizer():
    rules = [
        ParamRule("norm", optimizer=partial(AdamW, lr=0.1), lr_scale=2.0),
        ParamRule("embedding", optimizer=SGD),
        ParamRule("rest", "up.*", optimizer=partial(AdamW, lr=0.1), decay="all"),
        ParamRule(optimizer=partial(AdamW, lr=0.1)),
    ]
    trainer, _ = trained(OptimizerPlan(rules=rules), steps=1, module=Everything())
    optimizer = trainer.optimizers[0]
    assert [type(member) for member in optimizer.optimizers] == [AdamW, SGD]
    assert optimizer.labels == ["norm", "up.*", "rest", "rest", "embedding"]
    rows = [(g["lr"], g["weight_decay"], len(g["params"])) for g in optimizer.param_groups]
    assert rows == [(0.2, 0.0, 2), (0.1, 0.01, 2), (0.1, 0.01, 3), (0.1, 0.0, 1), (1e-3, 0, 1)]


def test_several_optimizers_step_exactly_as_each_alone():
    rules = [
        ParamRule("rest", "*.weight", partial(SGD, lr=0.1, momentum=0.9)),
        ParamRule("bias", optimizer=partial(AdamW, lr=0.01)),
    ]
    _, module = trained(OptimizerPlan(rules=rules, decay="all"))
    alone = Net()
    alone.configure_model()
    matrices = SGD([alone.net[0].weight, alone.net[2].weight], lr=0.1, momentum=0.9)
    biases = AdamW([alone.net[0].bias, alone.net[2].bias], lr=0.01)
    for batch in data():
        alone.zero_grad()
        alone.training_step(batch, 0).backward()
        matrices.step()
        biases.step()
    assert same(module, alone)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (
            [ParamRule("bias"), ParamRule("bias"), ParamRule()],
            r"rule 2 \(bias\) matches no trainable parameter .*; kinds in this module: ",
        ),
        (
            [ParamRule(pattern="up.wieght"), ParamRule()],
            r"rule 1 \(up.wieght\).*nearest names: up.weight",
        ),
        (
            [ParamRule("norm"), ParamRule("bias")],
            r"no rule matches gain \(scalar\), table \(other\), embed",
        ),
        (
            [ParamRule("head", optimizer=torch.optim.Muon), ParamRule()],
            r"assigns head.weight \(head\) to Muon",
        ),
        (
            [ParamRule(optimizer=torch.optim.Muon, allow_embeddings=True)],
            r"assigns gain \(scalar\), table \(oth",
        ),
    ],
)
def test_rules_that_do_not_fit_the_model_are_refused_by_name(rules, message):
    with pytest.raises(ValueError, match=message):
        trained(OptimizerPlan(SGD, rules=rules), module=Everything())


def test_an_optimizer_for_matrices_alone_is_refused_for_everything():
    with pytest.raises(ValueError, match=r"assigns gain .* to Muon; allowed: hidden matrices"):
        trained(OptimizerPlan(torch.optim.Muon), module=Everything())


def test_an_embedding_goes_to_an_optimizer_for_matrices_if_a_rule_says_so():
    rules = [ParamRule("embedding", optimizer=torch.optim.Muon, allow_embeddings=True), ParamRule()]
    trainer, module = trained(OptimizerPlan(SGD, rules=rules), module=Everything())
    taken = [o for o in trainer.optimizers[0].optimizers if isinstance(o, torch.optim.Muon)]
    assert [p is module.embed.weight for o in taken for p in o.param_groups[0]["params"]] == [True]


@pytest.mark.parametrize("arguments", [{}, {"rules": [ParamRule("bias")]}])
def test_a_plan_without_an_optimizer_is_refused(arguments):
    with pytest.raises(ValueError, match="optimizer"):
        OptimizerPlan(**arguments)


def test_the_table_at_the_start_shows_the_optimizer_of_each_parameter(capsys):
    rules = [
        ParamRule("hidden_matrix", optimizer=partial(SGD, lr=0.25)),
        ParamRule(optimizer=AdamW),
    ]
    trained(OptimizerPlan(rules=rules, print_groups=True), steps=1, module=Everything())
    lines = [line.replace("│", " ").split() for line in capsys.readouterr().out.splitlines()]
    assert ["hidden_matrix", "1", "16", "0.25", "0", "SGD"] in lines
    assert ["rest", "4", "60", "0.001", "0.01", "AdamW"] in lines
    assert ["rest", "4", "13", "0.001", "0", "AdamW"] in lines
    assert ["up.weight"] in lines
    reason = "because OptimizerPlan(SGD, AdamW) replaces it"
    assert f"Everything.configure_optimizers is not called, {reason}".split() in lines


def test_an_optimizer_without_weight_decay_has_none_in_the_table(capsys):
    trained(OptimizerPlan(torch.optim.Rprop), steps=1, module=Everything())
    lines = [line.replace("│", " ").split() for line in capsys.readouterr().out.splitlines()]
    assert ["rest", "9", "89", "0.01", "none", "Rprop"] in lines


def test_the_size_of_each_rules_updates_is_logged():
    rules = [
        ParamRule("hidden_matrix", optimizer=partial(SignSGDOptimizer, lr=0.25)),
        ParamRule(optimizer=partial(SGD, lr=0.0)),
    ]
    module = Net()
    module.configure_model()
    size = module.net[0].weight.detach().norm()
    trainer, _ = trained(
        OptimizerPlan(rules=rules),
        steps=1,
        module=module,
        callbacks=[OptimizerPlan(rules=rules), UpdateMonitor()],
        log_every_n_steps=1,
    )
    logged = trainer.callback_metrics
    assert logged["update/rms/hidden_matrix"] == 0.25
    assert logged["update/ratio/hidden_matrix"] == pytest.approx(0.25 * 12**0.5 / size.item())
    assert logged["lr/hidden_matrix"] == 0.25
    assert logged["update/ratio/rest"] == logged["lr/rest"] == 0


def test_without_a_plan_the_groups_of_the_optimizer_are_monitored():
    module = Net()
    trainer = L.Trainer(**QUIET, max_steps=1, callbacks=[UpdateMonitor()], log_every_n_steps=1)
    trainer.fit(module, data())
    assert trainer.callback_metrics["lr/group 0"] == 1000
    assert trainer.callback_metrics["update/rms/group 0"] > 0


class Doubling(torch.optim.Optimizer):
    """Two sets of weights, told apart at sight: those to evaluate are three times the others."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.1, "training": False})

    def step(self):
        assert all(group["training"] for group in self.param_groups)
        for p in self._all():
            p -= 0.1 * p.grad
            self.state[p]["step"] = torch.ones(())

    def train(self):
        self._switch(True, 1 / 3)

    def eval(self):
        self._switch(False, 3.0)

    def _switch(self, training, factor):
        for p in self._all():
            if self.param_groups[0]["training"] != training and self.state.get(p):
                p *= factor
        for group in self.param_groups:
            group["training"] = training

    def _all(self):
        return [p for group in self.param_groups for p in group["params"]]


class Watched(Net):
    """Remembers the weights of each stage."""

    def __init__(self):
        super().__init__()
        self.trained, self.validated = [], []

    def flat(self):
        return torch.cat([p.detach().flatten().clone() for p in self.parameters()])

    def on_train_batch_end(self, *_):
        self.trained.append(self.flat())

    def validation_step(self, batch, index):
        self.validated.append(self.flat())

    def val_dataloader(self):
        return data(24)


class SaveAt(L.Callback):
    def __init__(self, path, validating):
        self.path, self.validating = path, validating

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 3 and not self.validating:
            trainer.save_checkpoint(self.path)

    def on_validation_batch_end(self, trainer, *_):
        if trainer.global_step == 3 and self.validating:
            trainer.save_checkpoint(self.path)


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended")
@pytest.mark.parametrize("validating", [False, True])
def test_an_optimizer_with_two_sets_of_weights_trains_one_and_saves_the_other(tmp_path, validating):
    rows, file = data(24), tmp_path / "cut.ckpt"
    every = {"val_check_interval": 3, "check_val_every_n_epoch": None}
    callbacks = [OptimizerPlan(Doubling), SaveAt(file, validating)]
    _, whole = trained(None, module=Watched(), loader=rows, callbacks=callbacks, **every)
    torch.testing.assert_close(whole.validated[0], 3 * whole.trained[2])
    torch.testing.assert_close(whole.flat(), 3 * whole.trained[-1])  # and left at the end
    saved = torch.load(file, weights_only=True)
    flat = torch.cat([value.flatten() for value in saved["state_dict"].values()])
    assert torch.equal(flat, whole.validated[0])
    callbacks = [OptimizerPlan(Doubling)]
    module = Watched()
    trained(None, module=module, loader=rows, callbacks=callbacks, ckpt_path=file, **every)
    assert torch.equal(module.trained[-1], whole.trained[-1])


def test_a_schedule_free_optimizer_by_its_class_path(tmp_path):
    schedulefree = pytest.importorskip("schedulefree")

    def plan():
        return OptimizerPlan(partial(schedulefree.AdamWScheduleFree, lr=0.1))

    rows = data(24)
    every = {"val_check_interval": 3, "check_val_every_n_epoch": None}
    _, quiet = trained(plan(), module=Watched(), loader=rows, limit_val_batches=0, **every)
    callbacks = [plan(), SaveAt(tmp_path / "cut.ckpt", False)]
    _, whole = trained(None, module=Watched(), loader=rows, callbacks=callbacks, **every)
    assert torch.equal(quiet.trained[-1], whole.trained[-1])  # validation leaves no trace
    assert not torch.equal(whole.validated[0], whole.trained[2])
    module = Watched()
    trained(plan(), module=module, loader=rows, ckpt_path=tmp_path / "cut.ckpt", **every)
    assert torch.equal(module.trained[-1], whole.trained[-1])


def test_an_eight_bit_optimizer_by_its_class_path_resumes_bitwise(tmp_path):
    eight = pytest.importorskip("torchao.optim", reason="pip install torchao, then this runs")

    class Wide(Watched):
        def __init__(self):
            super().__init__()
            self.wide = torch.nn.Parameter(torch.ones(64, 64))  # smaller ones keep 32 bits

        def training_step(self, batch, index):
            return super().training_step(batch, index) + (self.wide - 2).square().sum()

    def run(*callbacks, **options):
        callbacks = [OptimizerPlan(partial(eight.AdamW8bit, lr=0.1)), *callbacks]
        options["plugins"] = [AtomicCheckpointIO()]  # the stock reader cannot place 8-bit states
        return trained(None, module=Wide(), loader=data(24), callbacks=callbacks, **options)[1]

    with torch.compiler.set_stance("force_eager"):
        whole = run(SaveAt(tmp_path / "cut.ckpt", False))
        saved = torch.load(tmp_path / "cut.ckpt", weights_only=True)
        states = saved["optimizer_states"][0]["state"].values()
        assert "OptimState8bit" in {type(state["exp_avg"]).__name__ for state in states}
        rest = run(ckpt_path=tmp_path / "cut.ckpt")
    assert torch.equal(rest.trained[-1], whole.trained[-1])


USER_FILE = """
import torch
class MyOptimizer(torch.optim.Optimizer):
    def __init__(self, params, lr=1e-3):
        super().__init__(params, {"lr": lr})
    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                p -= group["lr"] * p.grad.sign()
"""


def test_arguments_of_the_command_line_build_the_same_plan(tmp_path, monkeypatch):
    (tmp_path / "my_file.py").write_text(USER_FILE)
    monkeypatch.syspath_prepend(tmp_path)
    parser = ArgumentParser()
    parser.add_class_arguments(L.Trainer, "trainer", fail_untyped=False, instantiate=False)

    def plan(*words):
        return parser.instantiate(parser.parse_args(list(words))).trainer.callbacks[0]

    flags = plan(
        "--trainer.callbacks+=OptimizerPlan",
        "--trainer.callbacks.optimizer=my_file.MyOptimizer",
        "--trainer.callbacks.optimizer.lr=0.5",
        "--trainer.callbacks.schedule.kind=linear",
    )
    trainer, _ = trained(flags, steps=1)
    assert type(trainer.optimizers[0].optimizers[0]).__name__ == "MyOptimizer"
    assert trainer.optimizers[0].param_groups[0]["initial_lr"] == 0.5
    assert flags.schedule == LRSchedule("linear")
    spec = "{class_path: my_file.MyOptimizer, init_args: {lr: 0.5}}"
    rules = f"[{{kind: hidden_matrix, optimizer: {spec}}}, {{optimizer: SGD, lr_scale: 2}}]"
    yaml = f"[{{class_path: OptimizerPlan, init_args: {{rules: {rules}}}}}]"
    trainer, _ = trained(plan(f"--trainer.callbacks={yaml}"), steps=1)
    names = [type(member).__name__ for member in trainer.optimizers[0].optimizers]
    assert names == ["MyOptimizer", "SGD"]
