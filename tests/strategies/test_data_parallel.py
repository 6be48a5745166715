"""ddp keeps gradients once, and sends only the buffers that training changes."""

from contextlib import ExitStack

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from tensor_bytes import tensor_bytes
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

from ravine.datamodules import TextDataModule
from ravine.datamodules.text import python_docs_text
from ravine.lightning_modules import LanguageModel
from ravine.strategies import DataParallelStrategy
from ravine.strategies.buffer_sync import buffer_fingerprint
from ravine.strategies.data_parallel import (
    check_gradients_in_buckets,
    check_no_gradient_in_state,
)


class Broadcasts(TorchDispatchMode):
    """Counts broadcasts; torch 2.11's CommDebugMode fails within DDP."""

    def __init__(self):
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.number += str(function).startswith("c10d.broadcast")
        return function(*args, **(kwargs or {}))


class Peak(L.Callback):
    """Bytes of tensors over those at the start of training: the buckets are there by then."""

    def on_train_start(self, *_):
        self.stack = ExitStack()
        self.found = self.stack.enter_context(tensor_bytes())

    def on_train_end(self, *_):
        self.stack.close()


class Messages(L.Callback):
    """Count broadcasts of each batch, and see whether gradients are views of one another's."""

    def __init__(self):
        self.broadcasts, self.memories = [], set()

    def on_train_batch_start(self, *_):
        self.mode = Broadcasts()
        self.mode.__enter__()

    def on_before_optimizer_step(self, trainer, module, optimizer):
        grads = [p.grad for p in module.parameters() if p.grad is not None]
        self.memories = {g.untyped_storage().data_ptr() for g in grads}

    def on_train_batch_end(self, *_):
        self.mode.__exit__(None, None, None)
        self.broadcasts.append(self.mode.number)


def fit(module, strategy, steps, data=None, batches=1.0):
    messages, peak = Messages(), Peak()
    trainer = L.Trainer(
        max_steps=steps,
        accelerator="cpu",
        devices=2,
        strategy=strategy,
        logger=False,
        callbacks=[messages, peak],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        limit_train_batches=batches,
    )
    trainer.fit(module, data)
    kind = type(trainer.strategy).__name__
    return messages.broadcasts, len(messages.memories), peak.found.peak, kind


class Net(L.LightningModule):
    """A linear map, a constant, and a counter that begins to count after two steps, or others."""

    def __init__(self, norm=False, width=64, begins=2):
        super().__init__()
        self.net = nn.Sequential(*(nn.Linear(width, width) for _ in range(4)))
        self.unused = nn.Linear(2, 2)
        self.norm = nn.BatchNorm1d(width) if norm else nn.Identity()
        self.register_buffer("constant", torch.randn(width))
        self.register_buffer("counter", torch.zeros(()))
        self.seen, self.begins = [], begins

    def training_step(self, batch, batch_idx):
        self.seen.append(float(self.counter))
        if self.global_step >= self.begins:
            self.counter += 1 + self.global_rank
        return self.norm(self.net(batch[0]) + self.constant).square().mean()

    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.randn(64, self.net[0].in_features)), batch_size=2)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Keeps(Net):
    """Its optimizer keeps a gradient from one step to the next."""

    def configure_optimizers(self):
        class KeepsGradients(torch.optim.SGD):
            def step(self, closure=None):
                super().step(closure)
                for p in self.param_groups[0]["params"]:
                    self.state[p]["last"] = p.grad

        return KeepsGradients(self.net.parameters(), lr=0.1)


UNUSED = "ddp_find_unused_parameters_true"


def refused():
    """The error of a default strategy; with gradients of their own the steps are taken."""
    own = DataParallelStrategy(gradient_as_bucket_view=False, find_unused_parameters=True)
    fit(Keeps(), own, 2)
    with pytest.raises(ValueError, match="keeps a gradient") as kept:
        fit(Keeps(), UNUSED, 2)
    with pytest.raises(ValueError, match="does not depend") as unused:
        fit(Net(), "ddp", 2)
    return str(kept.value), str(unused.value)


def several(path):
    shape = {"num_layers": 2, "d_model": 16, "num_heads": 4}
    data = TextDataModule(path, context_length=16, batch_size=8)
    text = fit(LanguageModel(**shape), "ddp", 3, data)
    torch.manual_seed(torch.distributed.get_rank())
    normed = fit(norm := Net(norm=True), UNUSED, 3)
    late = fit(counter := Net(), UNUSED, 8)
    epochs = fit(Net(begins=4), UNUSED, 8, batches=5)
    actual = fit(Net(width=512), UNUSED, 2)
    stock = fit(Net(width=512), DDPStrategy(find_unused_parameters=True), 2)
    return {
        "text": text,
        "normed": (normed, norm.constant, norm.norm.running_mean),
        "late": (late, counter.seen),
        "epochs": epochs,
        "refused": refused(),
        "ours": actual,
        "stock": stock,
    }


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    from ranks import run_ranks

    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(python_docs_text())[:3000])
    return run_ranks(several, 2, path)


def test_position_tables_are_not_sent(found):
    for each in found:
        broadcasts, _, _, name = each["text"]
        assert name == "DataParallelStrategy"
        assert (broadcasts[0], broadcasts[2]) == (0, 0)  # in the second DDP orders its buckets


def test_statistics_of_normalization_are_sent_in_each_step(found):
    for each in found:
        assert min(each["normed"][0][0]) >= 1
    first, second = found
    assert torch.equal(first["normed"][1], second["normed"][1])  # constants are rank 0's


def test_a_buffer_is_sent_after_its_first_change(found):
    for each in found:
        assert each["late"][0][0] == [0, 0, 0, 0, 1, 1, 1, 1]
    (first, second) = (each["late"][1] for each in found)
    assert first[:5] == [0, 0, 0, 1, 2]
    assert second[:4] == [0, 0, 0, 2]
    assert second[4:] == first[4:]


def test_buffers_are_compared_at_the_start_of_an_epoch_too(found):
    for each in found:
        assert each["epochs"][0] == [0, 0, 0, 0, 0, 1, 1, 1]  # the sixth batch begins one


def test_an_optimizer_that_keeps_a_gradient_is_refused_after_its_first_step(found):
    for each in found:
        assert "KeepsGradients keeps a gradient as its state 'last', and ddp" in each["refused"][0]
        assert "allowed: " in each["refused"][0]
        assert "\n" not in each["refused"][0]


def test_parameters_that_no_loss_depends_on_are_named_in_one_line(found):
    for each in found:
        assert each["refused"][1] == (
            "Net: the loss does not depend on unused.weight, unused.bias, and ddp waits for all "
            "gradients; allowed: losses that depend on all trainable parameters; use "
            'Trainer(strategy="ddp_find_unused_parameters_true")'
        )


def test_gradients_are_kept_once(found):
    for each in found:
        (_, actual, peak, _), (_, stock, stock_peak, name) = each["ours"], each["stock"]
        assert name == "DDPStrategy"
        assert actual < stock == 8
        assert stock_peak - peak > 0.7 * 4 * 4 * 512 * 512  # one of four is on its way to a bucket


def test_an_optimizer_that_keeps_a_gradient_is_refused():
    parameter = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([parameter], lr=0.1, momentum=0.9)
    parameter.grad = torch.ones(3)
    optimizer.step()  # it copies
    check_no_gradient_in_state(optimizer)
    optimizer.state[parameter]["before"] = parameter.grad
    with pytest.raises(ValueError, match="SGD keeps a gradient as its state 'before', and ddp"):
        check_no_gradient_in_state(optimizer)


def test_a_gradient_outside_of_its_bucket_is_refused():
    parameter, bucket = nn.Parameter(torch.ones(3)), torch.zeros(6)
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    parameter.grad = bucket[:3]
    check_gradients_in_buckets(optimizer)
    parameter.grad.mul_(0.5)
    parameter.grad.data.mul_(0.5)
    check_gradients_in_buckets(optimizer)
    parameter.grad.data = parameter.grad.data * 0.5
    with pytest.raises(ValueError, match=r"`p.grad.data = new` for a parameter of shape \(3,\)"):
        check_gradients_in_buckets(optimizer)
    parameter.grad = torch.ones(3)
    check_gradients_in_buckets(optimizer)


@pytest.mark.parametrize(
    "buffer",
    [
        torch.ones(3),
        torch.tensor([1.0, float("nan")]),
        torch.ones(3, dtype=torch.bool),
        torch.ones(3, dtype=torch.complex64),
        torch.ones(3).to(torch.float8_e4m3fn),
        torch.ones(0),
        torch.ones(3).to_sparse(),
        torch.ones(3, device="meta"),
    ],
)
def test_any_buffer_has_a_fingerprint_that_a_change_in_place_changes(buffer):
    before = buffer_fingerprint(buffer)
    assert buffer_fingerprint(buffer) == before
    buffer.copy_(buffer.clone())
    assert buffer_fingerprint(buffer) != before or buffer.numel() == 0


def test_a_change_without_a_version_bump_is_detected_by_the_sum():
    buffer = torch.ones(3)
    before = buffer_fingerprint(buffer)
    with torch.autograd._unsafe_preserve_version_counter(buffer):
        buffer += 1
    assert buffer_fingerprint(buffer)[1] == before[1]
    assert buffer_fingerprint(buffer) != before


def test_a_user_strategy_keeps_its_arguments():
    strategy = DataParallelStrategy(static_graph=True, gradient_as_bucket_view=False)
    assert strategy._ddp_kwargs == {
        "static_graph": True,
        "gradient_as_bucket_view": False,
    }
