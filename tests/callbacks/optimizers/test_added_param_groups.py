"""Parameters added during a run: `add_param_group` passes them to an optimizer of the plan."""

import copy
from functools import partial

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import BackboneFinetuning
from torch import nn
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, TensorDataset

from ravine.callbacks import LRSchedule, MuonOptimizer, OptimizerPlan, ParamRule
from ravine.callbacks.optimizers.composite import CompositeOptimizer

QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


class Transfer(L.LightningModule):
    """A backbone and a head; its own optimizer has what is trainable at the start."""

    def __init__(self, factory=SGD, schedule=None):
        super().__init__()
        torch.manual_seed(0)
        self.factory, self.schedule = factory, schedule
        self.backbone = nn.Linear(4, 8)
        self.head = nn.Linear(8, 1)
        self.seen = []

    def training_step(self, batch, index):
        return (self.head(self.backbone(batch[0])) - 1).square().mean()

    def on_before_optimizer_step(self, optimizer):
        self.seen.append([group["lr"] for group in optimizer.param_groups])

    def configure_optimizers(self):
        optimizer = self.factory([p for p in self.parameters() if p.requires_grad])
        if self.schedule is None:
            return optimizer
        scheduler = LambdaLR(optimizer, self.schedule)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler}}

    def train_dataloader(self):
        x = torch.randn(16, 4, generator=torch.Generator().manual_seed(1))
        return DataLoader(TensorDataset(x), 8)


class Unfreeze(L.Callback):
    """Train the backbone from the second epoch on."""

    def __init__(self, **settings):
        self.settings = settings

    def setup(self, trainer, module, stage):
        module.backbone.requires_grad_(False)

    def on_train_epoch_start(self, trainer, module):
        if trainer.current_epoch == 1:
            module.backbone.requires_grad_(True)
            group = {"params": list(module.backbone.parameters()), **self.settings}
            trainer.optimizers[0].add_param_group(group)


def fitted(*callbacks, module=None, epochs=4):
    module = module or Transfer()
    trainer = L.Trainer(max_epochs=epochs, callbacks=list(callbacks), **QUIET)
    trainer.fit(module)
    return trainer, module


def same(one, other):
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


finetuning = partial(
    BackboneFinetuning, unfreeze_backbone_at_epoch=1, backbone_initial_lr=0.02, verbose=False
)


@pytest.mark.parametrize("callback", [finetuning, partial(Unfreeze, lr=0.05)])
@pytest.mark.parametrize(
    "factory", [partial(SGD, lr=0.1, momentum=0.9), partial(AdamW, lr=0.1, weight_decay=0.0)]
)
def test_a_layer_unfrozen_later_trains_as_with_the_modules_own_optimizer(callback, factory):
    _, own = fitted(callback(), module=Transfer(factory))
    _, planned = fitted(OptimizerPlan(factory), callback())
    assert same(own, planned)
    assert not torch.equal(planned.backbone.weight, Transfer().backbone.weight)


def test_settings_that_a_new_group_lacks_are_those_of_the_plan():
    plan = OptimizerPlan(
        rules=[
            ParamRule("bias", optimizer=partial(SGD, lr=0.5)),
            ParamRule(optimizer=partial(AdamW, lr=0.1, weight_decay=0.3), lr_scale=0.2),
        ]
    )
    trainer, _ = fitted(plan, Unfreeze())
    optimizer = trainer.optimizers[0]
    rows = {
        label: [g["lr"] for g in groups]
        for label, (_, groups) in optimizer.groups_by_label().items()
    }
    assert rows == {"bias": [0.5, 0.5], "rest": [pytest.approx(0.02)] * 2}
    assert [type(member) for member in optimizer.optimizers] == [SGD, AdamW]
    assert optimizer.param_groups[-1]["weight_decay"] == 0.3


def test_added_groups_have_the_decay_of_the_plan_unless_they_set_their_own():
    factory = partial(AdamW, lr=0.1, weight_decay=0.3)
    for settings, expected in (({}, [0.0, 0.3]), ({"weight_decay": 0.7}, [0.7])):
        trainer, module = fitted(OptimizerPlan(factory), Unfreeze(**settings))
        new = trainer.optimizers[0].param_groups[2:]
        assert [g["weight_decay"] for g in new] == expected
        ids = {id(p) for g in new for p in g["params"]}
        assert ids == {id(p) for p in module.backbone.parameters()}


def test_a_rule_that_had_nothing_to_train_gets_its_own_optimizer():
    class OnlyMatrix(Transfer):
        def setup(self, stage):
            self.backbone.bias.requires_grad_(False)
            self.head.requires_grad_(False)

    class Late(L.Callback):
        def on_train_epoch_start(self, trainer, module):
            if trainer.current_epoch == 1:
                module.head.requires_grad_(True)
                trainer.optimizers[0].add_param_group({"params": module.head.parameters()})

    rules = [
        ParamRule("hidden_matrix", optimizer=partial(MuonOptimizer, lr=0.01)),
        ParamRule(optimizer=partial(AdamW, lr=0.1)),
    ]
    trainer, module = fitted(OptimizerPlan(rules=rules), Late(), module=OnlyMatrix())
    assert [type(m) for m in trainer.optimizers[0].optimizers] == [MuonOptimizer, AdamW]
    assert trainer.optimizers[0].labels == ["hidden_matrix", "rest", "rest"]
    assert not torch.equal(module.head.weight, Transfer().head.weight)


def test_a_learning_rate_set_in_the_last_group_holds_for_what_was_added_with_it():
    weight, bias, late, more = (nn.Parameter(torch.ones(n)) for n in ((2, 2), 2, (2, 2), 2))
    optimizer = CompositeOptimizer([SGD([weight, bias], lr=0.1)])
    member = optimizer.optimizers[0]

    def route(parameters, given):
        from ravine.callbacks.optimizers.composite import RuleGroups

        return [RuleGroups("group 0", member, [{**given, "params": [p]} for p in parameters])]

    optimizer.router = route
    optimizer.add_param_group({"params": [more, late], "lr": 0.01})
    optimizer.param_groups[-1]["lr"] = 0.04
    for p in (weight, bias, late, more):
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.04, 0.04]
    assert torch.allclose(more, torch.tensor(0.96))


def test_a_schedule_multiplies_the_rate_of_an_added_group_from_its_current_step():
    schedule = LRSchedule("exponential", decay_factor=0.5)
    _, module = fitted(OptimizerPlan(partial(SGD, lr=0.8), schedule=schedule), Unfreeze(lr=0.1))
    assert module.seen[1] == [0.4]
    assert module.seen[2:5] == [[0.2, 0.1], [0.1, 0.05], [0.05, 0.025]]
    _, module = fitted(OptimizerPlan(partial(SGD, lr=0.8), schedule=schedule), Unfreeze())
    assert module.seen[2:5] == [[0.2, 0.2], [0.1, 0.1], [0.05, 0.05]]


def test_a_rate_set_by_a_callback_in_an_added_group_stays_the_base_of_the_schedule():
    schedule = LRSchedule("exponential", decay_factor=0.5)
    callback = BackboneFinetuning(1, lambda epoch: 10.0, backbone_initial_lr=0.01, verbose=False)
    _, module = fitted(OptimizerPlan(partial(SGD, lr=64.0), schedule=schedule), callback, epochs=3)
    assert [rates[1] for rates in module.seen[2:]] == pytest.approx([0.01, 0.005, 0.1, 0.05])


def test_a_group_added_twice_or_without_tensors_is_refused():
    weight = nn.Parameter(torch.ones(2))
    optimizer = CompositeOptimizer([SGD([weight], lr=0.1)])
    for group, words in (
        ({"params": [weight]}, "in more than one parameter group"),
        ({"params": {nn.Parameter(torch.ones(1))}}, "has no order"),
        ({"params": ["weight"]}, "contains a str; allowed: tensors"),
    ):
        with pytest.raises((TypeError, ValueError), match=words):
            optimizer.add_param_group(group)
    assert len(optimizer.param_groups) == 1


def test_groups_can_be_assigned_and_changed_as_in_torch():
    first, second, third = (nn.Parameter(torch.ones(2)) for _ in range(3))
    optimizer = CompositeOptimizer([SGD([first], lr=0.1), AdamW([second], lr=0.2)])
    groups = [{**group} for group in optimizer.param_groups]
    optimizer.param_groups = [*groups, {**groups[1], "params": [third], "lr": 0.3}]
    assert [m.param_groups for m in optimizer.optimizers] == [
        optimizer.param_groups[:1],
        optimizer.param_groups[1:],
    ]
    assert optimizer.param_groups[0] is groups[0]
    optimizer.param_groups.pop()
    third.grad = torch.ones(2)
    optimizer.step()
    assert torch.equal(third, torch.ones(2))
    assert len(optimizer.optimizers[1].param_groups) == 1
    optimizer.optimizers[0].add_param_group({"params": [third]})
    assert [g["lr"] for g in optimizer.param_groups] == [0.1, 0.2, 0.1]


def test_a_copy_has_members_of_its_own():
    net = nn.Linear(2, 1)
    optimizer = CompositeOptimizer(
        [SGD([net.weight], lr=0.1, momentum=0.9), AdamW([net.bias], lr=0.2)]
    )
    both = copy.deepcopy((net, optimizer))
    for module, each in ((net, optimizer), both):
        for p in module.parameters():
            p.grad = torch.ones_like(p)
        each.step()
    assert same(net, both[0])
    assert both[1].optimizers[0] is not optimizer.optimizers[0]
