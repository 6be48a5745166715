"""LoRA and Quantization as callbacks of a stock Trainer, on external modules."""

import copy
from functools import partial

import lightning as L
import pytest
import torch
from external_modules.net_in_configure_model import NetInConfigureModel
from external_modules.net_in_init import NetInInit
from external_modules.two_optimizers import TwoOptimizers
from lightning.pytorch.demos.boring_classes import BoringModel
from ranks import furthest, whole
from torch import nn

import ravine.strategies  # noqa: F401  the name zero3
from ravine.callbacks import (
    EMA,
    ExactResume,
    GradientClipping,
    LoRA,
    MemoryMonitor,
    OptimizerPlan,
    Pretrained,
    Quantization,
)
from ravine.callbacks.lora import lora_layers, merge_lora
from ravine.callbacks.quantization.layers import QuantizedLinear
from ravine.callbacks.transforms.base import apply_saved_transforms
from ravine.strategies import MeshStrategy

pytestmark = [
    pytest.mark.filterwarnings("ignore:It is recommended to use .self.log"),
    pytest.mark.filterwarnings("ignore:.weights_only. was not set"),
]
TARGETS = {NetInInit: ["net.0", "net.2"], NetInConfigureModel: ["layers.*", "head"]}


class SaveAt(L.Callback):
    def __init__(self, path, step):
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def fit(kind, *callbacks, strategy="auto", devices=1, steps=8, resume=None, validate=1, **how):
    L.seed_everything(0, verbose=False)
    module = kind(batch_size=32 // devices)
    trainer = L.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        callbacks=list(callbacks),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=validate,
        strategy=strategy,
        devices=devices,
        **how,
    )
    trainer.fit(module, ckpt_path=resume)
    return module, trainer


def recipe(kind, quantized=True, save="adapter", rank=1):
    """Everything at once; LoRA before Quantization, as their order does not matter."""
    lora = LoRA(TARGETS[kind], rank=rank, save=save)
    plan = OptimizerPlan(partial(torch.optim.AdamW, lr=0.05))
    rest = [plan, GradientClipping(1.0), EMA(0.9), ExactResume()]
    return [lora, *([Quantization(targets=TARGETS[kind])] if quantized else []), *rest]


def run(kind, quantized, strategy="auto", devices=1, save=None, step=None, resume=None):
    saver = [SaveAt(save, step)] if save else []
    callbacks = [*recipe(kind, quantized), *saver]
    module, _ = fit(kind, *callbacks, strategy=strategy, devices=devices, resume=resume)
    return whole(module)


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("kind", TARGETS)
def test_one_process_ddp_and_zero3_end_with_the_same_weights(ranks, kind, quantized):
    single = run(kind, quantized)
    assert max(v.abs().max() for n, v in single.items() if "lora_b" in n) > 0.01
    for strategy in ("ddp", "zero3"):
        for weights in ranks(run, 2, kind, quantized, strategy, 2):
            floats = {n for n, v in weights.items() if v.is_floating_point()}
            assert furthest({n: weights[n] for n in floats}, {n: single[n] for n in floats}) < 1e-6
            assert all(torch.equal(weights[n], single[n]) for n in weights.keys() - floats)


def cut_and_continued(kind, quantized, strategy, folder, step, devices=2):
    file = folder / f"{strategy}.ckpt"
    straight = run(kind, quantized, strategy, devices, save=file, step=step)
    return straight, run(kind, quantized, strategy, devices, resume=file)


@pytest.mark.parametrize("step", [3, 4], ids=["within an epoch", "at its end"])
@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("kind", TARGETS)
def test_adapters_saved_alone_resume_bit_for_bit(tmp_path, kind, quantized, step):
    straight, resumed = cut_and_continued(kind, quantized, "auto", tmp_path, step, 1)
    assert furthest(straight, resumed) == 0
    state = torch.load(tmp_path / "auto.ckpt", weights_only=True)["state_dict"]
    assert state
    assert all("lora_" in name for name in state)


@pytest.mark.parametrize("strategy", ["ddp", "zero3"])
def test_adapters_saved_alone_resume_bit_for_bit_on_ranks(ranks, tmp_path, strategy):
    for straight, resumed in ranks(
        cut_and_continued, 2, NetInConfigureModel, True, strategy, tmp_path, 3
    ):
        assert furthest(straight, resumed) == 0


def test_adapters_go_from_zero3_to_one_process_and_back(ranks, tmp_path):
    kind = NetInInit
    straight = run(kind, True, save=tmp_path / "single.ckpt", step=3)
    ranks(run, 2, kind, True, "zero3", 2, tmp_path / "zero3.ckpt", 3)
    assert furthest(run(kind, True, resume=tmp_path / "zero3.ckpt"), straight) < 1e-6
    for weights in ranks(run, 2, kind, True, "zero3", 2, None, None, tmp_path / "single.ckpt"):
        assert furthest(weights, straight) < 1e-6


def shards(folder, resume=None):
    strategy = MeshStrategy(save_distributed_checkpoint=True)
    callbacks = [*recipe(NetInInit, save="all"), *([] if resume else [SaveAt(folder, 3)])]
    return whole(fit(NetInInit, *callbacks, strategy=strategy, devices=2, resume=resume)[0])


def test_a_folder_of_shards_resumes_with_all_its_state(ranks, tmp_path):
    straight = ranks(shards, 2, tmp_path / "all.ckpt")[0]
    for weights in ranks(shards, 2, None, tmp_path / "all.ckpt"):
        assert furthest(weights, straight) == 0


@pytest.mark.parametrize("kind", TARGETS)
def test_a_foreign_module_trains_resumes_and_is_exported_plain(tmp_path, kind):
    module, trainer = fit(kind, *recipe(kind), SaveAt(tmp_path / "cut.ckpt", 5))
    first = trainer.callback_metrics["train_loss"]
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    reader = kind()
    reader.configure_model()
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    L.seed_everything(0, verbose=False)
    reader = kind()  # the same base
    reader.configure_model()
    apply_saved_transforms(reader, checkpoint)
    reader.load_state_dict(checkpoint["state_dict"])
    batch = next(iter(module.loader()))[0]
    net = (lambda m: m.net(batch)) if kind is NetInInit else (lambda m: m(batch))
    expected = net(module)
    assert torch.equal(net(reader), expected)
    merge_lora(reader)
    plain = kind()
    plain.configure_model()
    plain.load_state_dict(reader.state_dict())
    assert (net(plain) - expected).abs().max() < 1e-5
    assert torch.isfinite(first)


def test_the_base_is_frozen_and_only_adapters_have_optimizer_state():
    module, trainer = fit(NetInInit, LoRA("net.0", rank=2), steps=4)
    state = trainer.optimizers[0].state
    trained = {n for n, p in module.named_parameters() if state.get(p)}
    assert trained == {"net.0.lora_a", "net.0.lora_b"}
    assert all(v.dtype == torch.float32 for s in state.values() for v in s.values())


def test_a_module_with_manual_optimization_trains_its_adapters():
    with pytest.warns(UserWarning, match="no adapter of critic is used in validation"):
        module, _ = fit(TwoOptimizers, LoRA(["predictor.2", "critic.2"], rank=1), steps=4)
    for layer in lora_layers(module).values():
        assert layer.lora_b.abs().max() > 0


def test_a_frozen_base_does_not_change_by_a_bit():
    L.seed_everything(0, verbose=False)
    before = whole(NetInInit())
    module, _ = fit(NetInInit, LoRA("net.0", rank=2))
    after = {n: p for n, p in whole(module).items() if "lora_" not in n}
    assert furthest(before, after) == 0


# a file of the base, and what belongs to it


@pytest.fixture
def base(tmp_path):
    _, trainer = fit(NetInInit, steps=4)
    trainer.save_checkpoint(tmp_path / "base.ckpt")
    return tmp_path / "base.ckpt"


def tuned(base, save=None, resume=None, rank=1, steps=8):
    callbacks = [Pretrained(str(base)), LoRA(["net.0", "net.2"], rank=rank), ExactResume()]
    saver = [SaveAt(save, 3)] if save else []
    return fit(NetInInit, *callbacks, *saver, resume=resume, steps=steps)


def test_a_checkpoint_of_a_pretrained_module_holds_adapters_and_the_identity_of_its_base(
    base, tmp_path
):
    straight, _ = tuned(base, save=tmp_path / "cut.ckpt")
    checkpoint = torch.load(tmp_path / "cut.ckpt", weights_only=True)
    assert {n.rpartition(".")[2] for n in checkpoint["state_dict"]} == {"lora_a", "lora_b"}
    assert checkpoint["lora"]["base"]["file"] == str(base)
    assert len(checkpoint["lora"]["base"]["sha256"]) == 64
    weights = torch.load(base, weights_only=True)["state_dict"]
    state = dict(straight.named_parameters())
    assert all(torch.equal(state[name], value) for name, value in weights.items())
    resumed, _ = tuned(base, resume=tmp_path / "cut.ckpt")
    assert furthest(whole(straight), whole(resumed)) == 0
    reader = NetInInit()
    apply_saved_transforms(reader, checkpoint)  # from the base's file
    reader.load_state_dict(checkpoint["state_dict"])
    assert all(torch.equal(reader.state_dict()[name], value) for name, value in weights.items())


def test_the_adapter_file_is_as_small_as_its_share(tmp_path):
    sizes = {}
    for save in ("adapter", "all"):
        module, trainer = fit(
            partial(NetInInit, width=4096), LoRA("net.2", rank=1, save=save), steps=1, validate=0
        )
        trainer.save_checkpoint(tmp_path / f"{save}.ckpt")
        state = torch.load(tmp_path / f"{save}.ckpt", weights_only=True)["state_dict"]
        sizes[save] = sum(v.numel() * v.itemsize for v in state.values())
    count = sum(p.numel() for p in module.parameters())
    share = sum(p.numel() for p in module.parameters() if p.requires_grad) / count
    assert sizes["adapter"] <= 1.1 * share * sizes["all"]


def test_resuming_with_another_base_is_refused_and_writes_nothing(base, tmp_path):
    tuned(base, save=tmp_path / "cut.ckpt")
    _, trainer = fit(NetInInit, steps=2)
    trainer.save_checkpoint(tmp_path / "other.ckpt")
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(
        ValueError, match=r"of the checkpoint belong to .*base\.ckpt \(sha256 .*other"
    ):
        tuned(tmp_path / "other.ckpt", resume=tmp_path / "cut.ckpt")
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_resuming_when_the_bases_file_is_gone_names_it(base, tmp_path):
    tuned(base, save=tmp_path / "cut.ckpt")
    base.unlink()
    with pytest.raises(
        FileNotFoundError, match=r"in .*base\.ckpt, and this file does not exist in /"
    ):
        apply_saved_transforms(NetInInit(), torch.load(tmp_path / "cut.ckpt", weights_only=True))
    with pytest.raises(ValueError, match=r"of the checkpoint belong to .*base\.ckpt"):
        tuned(base, resume=tmp_path / "cut.ckpt")
    with pytest.raises(FileNotFoundError, match=r"the checkpoint .*base\.ckpt does not exist"):
        tuned(base)


def test_resuming_with_another_rank_is_refused(base, tmp_path):
    tuned(base, save=tmp_path / "cut.ckpt")
    with pytest.raises(
        ValueError,
        match=r"net\.0 has the shape \(1, 4\) in the checkpoint and \(2, 4\) in this run",
    ):
        fit(
            NetInInit,
            Pretrained(str(base)),
            LoRA(["net.0", "net.2"], ranks={"net.0": 2}, rank=1),
            resume=tmp_path / "cut.ckpt",
        )


def test_resuming_with_another_scale_is_refused(tmp_path):
    fit(NetInInit, LoRA("net.0", rank=1), SaveAt(tmp_path / "cut.ckpt", 3))
    with pytest.raises(
        ValueError,
        match=r"with alpha=16\.0, and this run has alpha=8\.0; use LoRA\(alpha=16\.0\)",
    ):
        fit(NetInInit, LoRA("net.0", rank=1, alpha=8.0), resume=tmp_path / "cut.ckpt")


def test_resuming_without_the_callback_is_refused(tmp_path):
    fit(NetInInit, LoRA("net.0", rank=1), SaveAt(tmp_path / "cut.ckpt", 3))
    with pytest.raises(RuntimeError, match=r"Unexpected key.*net\.0\.lora_a"):
        fit(NetInInit, resume=tmp_path / "cut.ckpt")


def test_resuming_a_run_without_adapters_with_them_is_refused(tmp_path):
    fit(NetInInit, SaveAt(tmp_path / "cut.ckpt", 3))
    with pytest.raises(
        ValueError,
        match=r"has no adapters, because it was not trained with LoRA; .*Pretrained\(path\)",
    ):
        fit(NetInInit, LoRA("net.0", rank=1), resume=tmp_path / "cut.ckpt")


def test_another_quantization_scheme_is_refused(tmp_path):
    fit(NetInInit, Quantization(), SaveAt(tmp_path / "cut.ckpt", 3))
    with pytest.raises(
        ValueError,
        match=r"weight_codes is torch\.uint8 .* run \(scheme='int8', double.*use scheme='nf4'",
    ):
        fit(NetInInit, Quantization("int8"), resume=tmp_path / "cut.ckpt")
    with pytest.raises(
        ValueError, match=r"weight_scales is torch\.int8 .*double_quant=False\).*double_quant="
    ):
        fit(NetInInit, Quantization(double_quant=False), resume=tmp_path / "cut.ckpt")


def evaluated(file, *callbacks):
    L.seed_everything(0, verbose=False)
    how = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False}
    trainer = L.Trainer(callbacks=list(callbacks), enable_model_summary=False, **how)
    return trainer.validate(NetInInit(), ckpt_path=file, verbose=False)


ONE = partial(LoRA, "net.0", rank=1)
OTHERS = {
    "four bits under adapters to float weights": (
        [ONE()],
        [ONE(), Quantization()],
        r"weights that were not quantized; remove Quantization\(\) from",
    ),
    "float weights under adapters to four bits": (
        [ONE(), Quantization()],
        [ONE()],
        r"trained with Quantization, which is missing .*add Quantization\(scheme='nf4'",
    ),
    "no adapters": (
        [ONE()],
        [Quantization()],
        r"trained with LoRA, which is missing .*add LoRA\(targets=\['net.0'\], rank=1",
    ),
    "bits of another kind": (
        [ONE(), Quantization()],
        [ONE(), Quantization("int8")],
        "trained with scheme='nf4', and this run has scheme='int8'",
    ),
    "another scale": ([ONE()], [ONE(alpha=1.0)], r"alpha=16\.0, and this run has alpha=1\.0"),
}


@pytest.mark.parametrize("what", OTHERS)
def test_a_checkpoint_is_not_evaluated_as_another_net(base, tmp_path, what):
    before, now, words = OTHERS[what]
    _, trainer = fit(NetInInit, Pretrained(str(base)), *before, steps=2)
    trainer.save_checkpoint(tmp_path / "cut.ckpt")
    with pytest.raises(ValueError, match=words):
        evaluated(tmp_path / "cut.ckpt", Pretrained(str(base)), *now)
    assert evaluated(tmp_path / "cut.ckpt", Pretrained(str(base)), *before)


def test_weights_that_the_net_does_not_have_are_refused(tmp_path):
    _, trainer = fit(NetInInit, Quantization(targets="net.0"), steps=2)
    trainer.save_checkpoint(tmp_path / "cut.ckpt")
    checkpoint = torch.load(tmp_path / "cut.ckpt", weights_only=True)
    checkpoint["state_dict"]["net.4.weight"] = torch.zeros(1)
    torch.save(checkpoint, tmp_path / "cut.ckpt")
    with pytest.raises(ValueError, match=r"has net\.4\.weight, which this NetInInit does not have"):
        evaluated(tmp_path / "cut.ckpt", Quantization(targets="net.0"))


class Frozen(NetInInit):
    def __init__(self, **how):
        super().__init__(**how)
        self.requires_grad_(False)


def test_quantization_without_trainable_parameters_is_refused():
    with pytest.raises(
        ValueError, match=r"Frozen has no trainable parameter left; add LoRA\(\) to"
    ):
        fit(Frozen, Quantization())
    module, _ = fit(Frozen, Quantization(), LoRA("net.0", rank=1), steps=2)
    assert module.net[0].lora_b.abs().max() > 0


def test_a_net_on_the_meta_device_is_refused():
    with pytest.raises(ValueError, match=r"LoRA: net\.0\.weight has no values yet"):
        LoRA("net.0", rank=1).transform(NetInInit().to("meta"))


class ShardsItself(NetInInit):
    def configure_model(self):
        from torch.distributed.fsdp import fully_shard

        fully_shard(self.net, mesh=self.device_mesh["data_parallel"])


def shard_itself():
    fit(ShardsItself, LoRA("net.0", rank=1), strategy="zero3", devices=2)


def test_a_module_that_is_sharded_already_is_refused(ranks):
    with pytest.raises(AssertionError, match=r"LoRA: ShardsItself shards its parameters"):
        ranks(shard_itself, 2)


class ReadsWeights(NetInInit):
    """Calls its layers in training only."""

    def validation_step(self, batch, batch_idx):
        x = nn.functional.linear(batch[0], self.net[0].weight)
        self.log("val_loss", x.mean())


class ReadsOneAlways(NetInInit):
    def training_step(self, batch, batch_idx):
        x = self.net[2](nn.functional.linear(batch[0], self.net[0].weight))
        return x.square().mean()


def test_an_adapter_that_is_never_called_in_validation_ends_the_run():
    with pytest.raises(RuntimeError, match=r"net\.0 was never called in the validation"):
        fit(ReadsWeights, LoRA("net.0", rank=1))


def test_an_adapter_that_is_never_called_in_training_ends_the_run():
    words = r"adapter of net\.0 was never called in a training epoch.*use exclude=\['net\.0'\]"
    with pytest.raises(RuntimeError, match=words):
        fit(ReadsOneAlways, LoRA(["net.0", "net.2"], rank=1), validate=0)


class Transfer(NetInInit):
    """A frozen base under no_grad or not, and a new classifier."""

    def __init__(self, no_grad=False, **how):
        super().__init__(**how)
        self.no_grad = no_grad
        self.net.requires_grad_(False)
        self.classifier = nn.Linear(1, 2)

    def training_step(self, batch, batch_idx):
        with torch.set_grad_enabled(not self.no_grad):
            features = self.net(batch[0])
        return self.classifier(features).square().mean()


def test_on_transfer_learning_the_base_is_adapted_and_the_new_head_trains(capsys):
    L.seed_everything(0, verbose=False)
    before = whole(Transfer())
    module, _ = fit(Transfer, LoRA(), ExactResume(), validate=0)
    now = whole(module)
    assert not torch.equal(now["classifier.weight"], before["classifier.weight"])
    assert all(layer.lora_b.abs().max() > 0 for layer in lora_layers(module).values())
    assert set(lora_layers(module)) == {"net.0", "net.2"}
    assert torch.equal(now["net.0.weight"], before["net.0.weight"])
    said = capsys.readouterr().out
    assert "LoRA: rank 8, but 4 for net.0, 1 for net.2, the smaller side of the layer" in said
    assert "LoRA: classifier.weight, classifier.bias stay trainable without an adapter" in said


def test_quantized_and_adapted_a_frozen_base_leaves_the_new_head_to_train():
    module, _ = fit(Transfer, Quantization("int8", targets="net.*"), LoRA(), validate=0, steps=2)
    assert set(lora_layers(module)) == {"net.0", "net.2"}
    assert module.classifier.weight.requires_grad


def test_layers_that_no_gradient_reaches_are_refused_before_the_first_step():
    words = r"adapter of net\.0, net\.2 gets no gradient in the first training batch.*no_grad"
    steps = []

    class Steps(L.Callback):
        def on_train_batch_end(self, trainer, *args):
            steps.append(trainer.global_step)

    with pytest.raises(RuntimeError, match=words) as error:
        fit(partial(Transfer, no_grad=True), LoRA(), Steps(), validate=0)
    assert steps == []
    assert "\n" not in str(error.value)


class Detaches(NetInInit):
    def training_step(self, batch, batch_idx):
        return self.net[2](self.net[0](batch[0]).detach()).square().mean()


def test_a_layer_whose_output_is_detached_is_refused_by_name():
    with pytest.raises(RuntimeError, match=r"adapter of net\.0 gets no gradient in a training ep"):
        fit(Detaches, LoRA("net.*"), validate=0)


class MadeEarly(NetInInit):
    """Its optimizer is made in __init__, as routines of other packages do."""

    def __init__(self, **how):
        super().__init__(**how)
        self.made = torch.optim.AdamW(self.parameters(), lr=0.01)

    def configure_optimizers(self):
        return self.made


def test_an_optimizer_built_before_the_adapters_is_refused_with_a_plan_as_the_hint():
    with pytest.raises(
        ValueError,
        match=r"no optimizer of MadeEarly has the parameters of an adapter.*add OptimizerPlan",
    ) as e:
        fit(MadeEarly, LoRA())
    assert "\n" not in str(e.value)
    plan = OptimizerPlan(partial(torch.optim.AdamW, lr=0.05))
    module, _ = fit(MadeEarly, LoRA("net.0"), plan, steps=2)
    assert module.net[0].lora_b.abs().max() > 0


class SkipsTheEnd(NetInInit):
    """The last two of four batches have no loss."""

    def __init__(self, batch_size):
        super().__init__(batch_size=batch_size // 4)

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) if batch_idx < 2 else None


@pytest.mark.filterwarnings("ignore:.*training_step.* returned .None")
def test_a_resume_into_batches_without_a_loss_reports_no_unused_adapter(tmp_path):
    class SaveInTheMiddle(L.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if trainer.current_epoch == 0 and batch_idx == 1:
                trainer.save_checkpoint(tmp_path / "cut.ckpt")

    how = {"validate": 0, "steps": 6}
    straight, _ = fit(SkipsTheEnd, LoRA("net.0"), ExactResume(), SaveInTheMiddle(), **how)
    callbacks = LoRA("net.0"), ExactResume()
    resumed, _ = fit(SkipsTheEnd, *callbacks, resume=tmp_path / "cut.ckpt", **how)
    assert furthest(whole(straight), whole(resumed)) == 0


class Follows(NetInInit):
    """A teacher follows its student, parameter by parameter."""

    def __init__(self, **how):
        super().__init__(**how)
        self.teacher = copy.deepcopy(self.net).requires_grad_(False)

    def training_step(self, batch, batch_idx):
        with torch.no_grad():
            target = self.teacher(batch[0])
        return (self.net(batch[0]) - target - 1).square().mean()

    @torch.no_grad()
    def on_train_batch_end(self, *_):
        for new, old in zip(self.net.parameters(), self.teacher.parameters(), strict=True):
            old.lerp_(new, 0.1)


def test_a_momentum_teacher_follows_the_adapters_of_its_student():
    module, _ = fit(Follows, LoRA(), validate=0, steps=12)
    assert module.net[0].lora_b.abs().max() > module.teacher[0].lora_b.abs().max() > 0
    for change in (LoRA("net.*"), Quantization(targets="net.*"), Quantization()):
        adapted = [LoRA()] if isinstance(change, Quantization) else []
        with pytest.raises(
            ValueError, match=r"teacher is a frozen copy of net.*; use (targets|exclude)="
        ) as e:
            fit(Follows, change, *adapted, validate=0)
        assert "\n" not in str(e.value)


def test_a_fixed_reference_is_quantized_with_the_argument_for_it():
    class Fixed(Follows):
        def on_train_batch_end(self, *_):
            pass

    fixed = Quantization("int8", targets=["net.*", "teacher.*"], allow_frozen_copies=True)
    module, _ = fit(Fixed, fixed, LoRA(["net.*", "teacher.*"]), validate=0, steps=2)
    assert isinstance(module.teacher[0], QuantizedLinear)


def test_by_default_hidden_matrices_are_adapted_and_not_the_head():
    module, _ = fit(NetInConfigureModel, LoRA(rank=2), steps=1)
    assert list(lora_layers(module)) == ["layers.0", "layers.1"]
    with pytest.raises(ValueError, match="BoringModel has no hidden matrix"):
        LoRA().transform(BoringModel())


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_bf16_leaves_scales_adapters_and_optimizer_state_in_float32(precision):
    callbacks = [LoRA(rank=2), Quantization()]
    module, trainer = fit(NetInConfigureModel, *callbacks, steps=2, precision=precision)
    layer = module.layers[0]
    assert isinstance(layer, QuantizedLinear)
    assert layer.weight_outer.dtype == layer.lora_a.dtype == torch.float32
    state = trainer.optimizers[0].state[layer.lora_a]
    assert state["momentum_buffer"].dtype == torch.float32
    assert layer.lora_b.abs().max() > 0


def test_rounding_is_measured_by_validating_a_file_of_plain_weights(base):
    options = {"logger": False, "enable_progress_bar": False, "accelerator": "cpu"}
    losses = []
    for callbacks in ([], [Quantization()], [Quantization("int8")]):
        L.seed_everything(1, verbose=False)
        trainer = L.Trainer(**options, callbacks=callbacks, enable_model_summary=False)
        (found,) = trainer.validate(NetInInit(), ckpt_path=base, verbose=False)
        losses.append(found["val_loss"])
    plain, four, eight = losses
    assert 0 < abs(eight - plain) < abs(four - plain) < 0.1


def test_a_wrong_dropout_dtype_or_scheme_is_refused_at_once():
    with pytest.raises(ValueError, match=r"dropout=1\.5 is outside \[0, 1\)"):
        LoRA(dropout=1.5)
    with pytest.raises(ValueError, match="dtype='float8' is not supported; allowed: float64"):
        LoRA(dtype="float8")  # type: ignore


def counted(strategy="auto", devices=1):
    table = MemoryMonitor()
    fit(
        partial(NetInConfigureModel, width=64),
        *[LoRA(rank=2), Quantization(), table, OptimizerPlan(partial(torch.optim.AdamW, lr=0.05))],
        strategy=strategy,
        devices=devices,
        steps=1,
    )
    return {name: tuple(row) for name, row in table.usage.items()}


def test_the_table_of_bytes_equals_the_stored_bytes_and_a_shard_is_half(ranks, capsys):
    rows = counted()
    printed = capsys.readouterr().out
    bits = 2 * (64 * 64 // 2 + 64 + 4 + 4)  # codes, scales, one outer scale and the mean, 2 layers
    rest = 2 * 64 + 2 * 64 + 64 * 3 + 3  # biases, norm, head
    adapters = 2 * 2 * (64 + 64)
    assert rows["frozen weights"][1] == bits + 4 * rest
    assert rows["trained weights"] == rows["gradients"] == (adapters, 4 * adapters)
    assert rows["optimizer state"][1] == 8 * adapters + 4 * 4  # and a step count a tensor
    dense = 2 * 64 * 64 + rest
    assert f"{16 * dense:,}" in printed
    assert "peak memory: " in printed
    for shard in ranks(counted, 2, "zero3", 2):
        assert shard["trained weights"][1] * 2 == 4 * adapters
        assert shard["frozen weights"][1] < 0.6 * rows["frozen weights"][1]


class Mixed(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.attend = nn.MultiheadAttention(8, 2)
        self.up = nn.ConvTranspose2d(4, 4, 2)
        self.mix = nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)


def test_by_default_layers_without_adapter_support_are_unchanged():
    module = Mixed()
    LoRA(rank=2).transform(module)
    assert list(lora_layers(module)) == ["attend", "mix"]


def test_a_pipeline_rank_ignores_parameters_that_are_frozen_on_other_ranks(tmp_path):
    lora, module = LoRA(["net.0", "net.2"], rank=1, save="adapter"), NetInInit()
    lora.transform(module)
    checkpoint = {"state_dict": module.state_dict()}
    module.net[2] = nn.Identity()  # on another rank
    lora.on_save_checkpoint(L.Trainer(logger=False, accelerator="cpu"), module, checkpoint)
    assert len(checkpoint["state_dict"]) == 4
    assert all("lora_" in name for name in checkpoint["state_dict"])
