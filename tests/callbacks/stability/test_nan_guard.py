"""A non-finite step is named and skipped, without an effect on weights and optimizer state."""

import os
import warnings
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ravine.callbacks.stability.gradient_clipping import GradientClipping
from ravine.callbacks.stability.nan_guard import NaNGuard, NonFiniteError

NAN, INF = float("nan"), float("inf")


class Net(L.LightningModule):
    """A loss or a gradient is spoiled at chosen micro-batches, counted from 0."""

    def __init__(
        self, losses: dict[int, float] | None = None, gradients: dict[int, float] | None = None
    ) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1))
        self.losses, self.gradients = losses or {}, gradients or {}
        self.count = -1
        self.history: list[list[Tensor]] = []
        self.optimizer: Any = torch.optim.AdamW
        self.net[2].weight.register_hook(lambda g: g * self.gradients.get(self.count, 1.0))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.count += 1
        loss = self.net(batch).square().mean()
        if self.count in self.losses:  # the gradient stays as it is
            loss = loss - loss.detach() + self.losses[self.count]
        return loss

    def on_train_batch_end(self, *_: Any) -> None:
        state = self.trainer.optimizers[0].state
        moments = [v.clone() for p in self.parameters() for v in state[p].values()]
        self.history.append([p.detach().clone() for p in self.parameters()] + moments)

    def configure_optimizers(self) -> Any:
        return self.optimizer(self.parameters(), lr=0.1, weight_decay=0.1)


def fit(net: Any, *callbacks: L.Callback, **settings: Any) -> L.Trainer:
    torch.manual_seed(0)
    for p in net.parameters():
        nn.init.normal_(p)
    run = L.Trainer(
        accelerator="cpu",
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **({"max_steps": 6, "devices": 1} | settings),
    )
    x = torch.randn(48, 4, generator=torch.Generator().manual_seed(1))
    run.fit(net, DataLoader(x, 4))
    return run


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(map(torch.equal, a, b))


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.RMSprop])
def test_a_skipped_step_does_not_change_weights_or_optimizer(
    value: float, clip: bool, optimizer: Any
) -> None:
    net = Net(gradients={2: value})
    net.optimizer = optimizer
    text = r"the gradient of net\.2\.weight is not finite at step 2: step skipped \(1 of 3\)"
    guard = NaNGuard(max_skips=3)
    with pytest.warns(UserWarning, match=text):
        run = fit(net, guard, *[GradientClipping()] * clip)
    before, at, behind = net.history[1:4]
    assert equal(before, at)
    assert not equal(at, behind)
    assert all(tensor.isfinite().all() for tensor in net.history[-1])
    assert run.global_step == 6
    assert guard.state_dict() == {"num_skipped": 1}


def test_a_non_finite_loss_is_named_before_its_gradients() -> None:
    net = Net(losses={1: INF}, gradients={1: NAN})
    with pytest.warns(UserWarning, match=r"^the loss is not finite at step 1: step skipped"):
        fit(net, NaNGuard())
    assert equal(net.history[0], net.history[1])


def test_a_finite_run_is_not_changed() -> None:
    plain, guarded = Net(), Net()
    fit(plain)
    fit(guarded, NaNGuard(max_skips=0))
    assert equal(plain.history[-1], guarded.history[-1])


def test_after_k_skipped_steps_the_run_stops_with_one_error() -> None:
    net = Net(losses={1: NAN, 3: NAN, 4: NAN})
    with pytest.warns(UserWarning, match="skipped"), pytest.raises(NonFiniteError) as stopped:
        fit(net, NaNGuard(max_skips=2))
    assert str(stopped.value) == (
        "the loss is not finite at step 4, after 2 skipped steps; the weights are those before "
        "this step; use a lower learning rate, or add GradientClipping() to Trainer(callbacks=...)"
    )
    assert stopped.value.exit_status == 1
    weights = [p.detach() for p in net.parameters()]
    assert all(map(torch.equal, weights, net.history[-1]))


def test_one_bad_micro_batch_skips_the_step_it_is_part_of() -> None:
    net = Net(losses={2: NAN})  # the first half of the second step
    with pytest.warns(UserWarning, match="the loss is not finite at step 1"):
        run = fit(net, NaNGuard(), accumulate_grad_batches=2, max_steps=4)
    assert equal(net.history[1], net.history[3])
    assert not equal(net.history[3], net.history[5])
    assert run.global_step == 4


def scaled(scale: float) -> MixedPrecision:
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale))


def test_an_overflow_under_a_gradient_scaler_is_not_counted() -> None:
    guard = NaNGuard(max_skips=0)
    net = Net(gradients={1: INF})
    plugin = scaled(1024.0)
    fit(net, guard, plugins=[plugin])
    assert plugin.scaler is not None
    assert plugin.scaler.get_scale() == 512
    assert equal(net.history[0], net.history[1])
    assert guard.num_skipped == 0


@pytest.mark.parametrize("spoiled", [{"losses": {2: NAN}}, {"gradients": {2: NAN}}])
def test_under_a_scaler_a_bad_loss_counts_and_a_gradient_counts_at_scale_one(
    spoiled: dict[str, Any],
) -> None:
    net = Net(**spoiled)
    with pytest.warns(UserWarning, match="is not finite at step 2"):
        fit(net, NaNGuard(), plugins=[scaled(1024.0 if "losses" in spoiled else 1.0)])
    assert equal(net.history[1], net.history[2])


class Adversaries(L.LightningModule):
    """Two optimizers, stepped by the module itself; the second one's gradient is spoiled once."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 1), nn.Linear(4, 1)
        self.automatic_optimization = False
        self.seen: list[tuple[Tensor, Tensor]] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        for part, optimizer in zip((self.first, self.second), self.optimizers(), strict=True):
            optimizer.zero_grad()
            self.manual_backward(part(batch).square().mean())
            if part is self.second and batch_idx == 1:
                part.weight.grad.fill_(NAN)
            optimizer.step()
        self.seen.append((self.first.weight.detach().clone(), self.second.weight.detach().clone()))

    def configure_optimizers(self) -> Any:
        return [torch.optim.Adam(p.parameters(), 0.1) for p in (self.first, self.second)]


def test_a_module_with_two_optimizers_skips_only_the_bad_step() -> None:
    net = Adversaries()
    with pytest.warns(UserWarning, match=r"the gradient of second\.weight is not finite"):
        fit(net, NaNGuard(), max_steps=6)
    (first, second), (first_at, second_at), (_, second_behind) = net.seen
    assert not torch.equal(first, first_at)
    assert torch.equal(second, second_at)
    assert not torch.equal(second_at, second_behind)


def test_the_count_of_skipped_steps_continues_after_a_resume() -> None:
    guard = NaNGuard(max_skips=2)
    guard.load_state_dict({"num_skipped": 2})
    with pytest.raises(NonFiniteError, match="step 0, after 2 skipped steps"):
        fit(Net(losses={0: NAN}), guard)


def test_a_negative_number_of_steps_is_refused() -> None:
    with pytest.raises(ValueError, match=r"max_skips=-1 is negative; .*; use max_skips=0"):
        NaNGuard(max_skips=-1)


def test_the_host_reads_one_value_per_step(monkeypatch: pytest.MonkeyPatch) -> None:
    reads = 0
    for name in ("__bool__", "__int__", "__float__", "item"):
        plain = getattr(Tensor, name)

        def counting(self: Tensor, plain: Any = plain) -> Any:
            nonlocal reads
            reads += 1
            return plain(self)

        monkeypatch.setattr(Tensor, name, counting)
    fit(Net(), accumulate_grad_batches=2)
    without, reads = reads, 0
    fit(Net(), NaNGuard(), accumulate_grad_batches=2)
    assert reads - without == 6


def spoil_one_rank() -> tuple[list, int, list[str]]:
    bad = {2: INF} if os.environ["RANK"] == "1" else {}
    net, guard = Net(losses=bad), NaNGuard()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(net, guard, devices=2, strategy="ddp")
    said = [str(w.message) for w in caught if "skipped" in str(w.message)]
    same = equal(net.history[1], net.history[2])
    return [p.tolist() for p in net.parameters()], guard.num_skipped + 10 * same, said


def test_a_bad_loss_on_one_rank_is_skipped_by_all(ranks: Any) -> None:
    (first, skipped, said), (second, skipped_too, _) = ranks(spoil_one_rank, 2)
    assert first == second
    assert skipped == skipped_too == 11
    assert said == ["the loss is not finite at step 2: step skipped (1 of 3)"]
