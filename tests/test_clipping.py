"""Clipping: the norm's closed form, and that it happens once a step at the right moment."""

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ravine.callbacks import GradientClipping
from ravine.callbacks.gradient_clipping import clip_by_norm, global_norm

QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


class Line(L.LightningModule):
    """A foreign module: its net in __init__, its own SGD."""

    def __init__(self, scale=1.0):
        super().__init__()
        self.net = nn.Linear(3, 2)
        self.scale = scale

    def training_step(self, batch, index):
        return self.scale * self.net(batch[0]).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)


def data(rows=8, batch_size=4):
    return DataLoader(TensorDataset(torch.randn(rows, 3)), batch_size=batch_size)


def test_the_norm_is_that_of_all_gradients_laid_end_to_end():
    gradients = [torch.randn(3, 4), torch.randn(5), torch.randn(2, 2, 2)]
    flat = torch.cat([g.flatten() for g in gradients])
    torch.testing.assert_close(global_norm(gradients), flat.norm())


def test_clipping_leaves_the_direction_and_the_largest_norm_allowed():
    gradients = [torch.randn(30, 4), torch.randn(5)]
    before = torch.cat([g.flatten() for g in gradients])
    norm = clip_by_norm(gradients, max_norm=0.5)
    after = torch.cat([g.flatten() for g in gradients])
    torch.testing.assert_close(norm, before.norm())
    torch.testing.assert_close(after, before * 0.5 / before.norm())


def test_clipping_twice_changes_nothing():
    gradients = [torch.randn(30, 4)]
    clip_by_norm(gradients, 0.5)
    once = gradients[0].clone()
    clip_by_norm(gradients, 0.5)
    torch.testing.assert_close(gradients[0], once)


def test_a_small_gradient_is_left_alone():
    gradients = [torch.full((4,), 0.1)]
    clip_by_norm(gradients, 0.5)
    assert torch.equal(gradients[0], torch.full((4,), 0.1))


def test_it_equals_torch():
    ours = [nn.Parameter(torch.zeros(4, 5)), nn.Parameter(torch.zeros(7))]
    for p in ours:
        p.grad = torch.randn_like(p)
    theirs = [p.grad.clone() for p in ours]
    norm = clip_by_norm(theirs, 1.0)
    assert torch.equal(norm, torch.nn.utils.clip_grad_norm_(ours, 1.0))
    assert all(torch.equal(p.grad, g) for p, g in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_clipped_step_moves_the_weights_by_lr_times_max_norm(accumulate):
    module = Line(scale=100.0)
    before = torch.cat([p.detach().flatten().clone() for p in module.parameters()])
    trainer = L.Trainer(
        **QUIET, max_steps=1, accumulate_grad_batches=accumulate, callbacks=[GradientClipping(0.25)]
    )
    trainer.fit(module, data())
    after = torch.cat([p.detach().flatten() for p in module.parameters()])
    torch.testing.assert_close((after - before).norm(), torch.tensor(0.25))


def test_the_norm_before_clipping_is_logged():
    module, clipping = Line(), GradientClipping(0.01)
    L.Trainer(**QUIET, max_steps=1, log_every_n_steps=1, callbacks=[clipping]).fit(module, data())
    assert module.trainer.callback_metrics["train/grad_norm"] > 0.01


def test_the_module_has_its_own_method_again_after_fit():
    module = Line()
    L.Trainer(**QUIET, max_steps=1, callbacks=[GradientClipping()]).fit(module, data())
    assert "configure_gradient_clipping" not in vars(module)


@pytest.mark.parametrize(
    ("trainer", "message"),
    [
        ({"gradient_clip_val": 1.0}, "clipped twice"),
        ({"callbacks": [GradientClipping(1.0), GradientClipping(2.0)]}, "GradientClipping"),
    ],
)
def test_two_owners_of_clipping_are_refused(trainer, message):
    arguments = {**QUIET, "max_steps": 1, "callbacks": [GradientClipping(1.0)], **trainer}
    with pytest.raises(Exception, match=message):
        L.Trainer(**arguments).fit(Line(), data())


def test_manual_optimization_is_refused_in_words():
    module = Line()
    module.automatic_optimization = False
    with pytest.raises(ValueError, match="steps its own optimizers"):
        L.Trainer(**QUIET, max_steps=1, callbacks=[GradientClipping()]).fit(module, data())


def test_a_norm_that_lets_nothing_through_is_refused():
    with pytest.raises(ValueError, match=r"max_norm=0 must be positive; set e\.g\. 1\.0"):
        GradientClipping(0)
