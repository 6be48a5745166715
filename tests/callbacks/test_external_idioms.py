"""Fifteen idioms of common modules under the callbacks of Ravine: each works or is refused by name.

What works is shown by an equivalence: a plan with the module's optimizer is plain Lightning,
adapters leave frozen weights as they were, and a cut run goes on bitwise.
`benchmarks/other_modules.py` tries more callbacks, and modules of packages.
"""

from functools import partial

import lightning as L
import pytest
import torch
from external_modules.common_idioms import GAN, IDIOMS, Teacher, TransformerClassifier
from torch.utils.data import DataLoader

from ravine.callbacks import (
    EMA,
    ExactResume,
    GradientClipping,
    LoRA,
    NaNGuard,
    OptimizerPlan,
    Quantization,
)
from ravine.callbacks.transforms.layer_selection import find_frozen_copies, is_submodule_of

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*training_step.* returned .None"),
    pytest.mark.filterwarnings("ignore:.*torch.nn.utils.parametrizations.weight_norm"),
    pytest.mark.filterwarnings("ignore:The .*train_dataloader. does not have many workers"),
]
every = pytest.mark.parametrize("kind", IDIOMS, ids=[kind.__name__ for kind in IDIOMS])
STEPS, CUT = 4, 2


def fit(kind, *callbacks, save=None, resume=None, **how):
    """Four optimizer steps; `save` writes a checkpoint after the second, behind all hooks."""
    L.seed_everything(0, verbose=False)
    module = kind()
    if save is not None:
        own = module.on_train_batch_end

        def on_train_batch_end(*args):
            own(*args)
            if module.trainer.global_step == CUT:
                module.trainer.save_checkpoint(save)

        module.on_train_batch_end = on_train_batch_end
    trainer = L.Trainer(
        max_steps=STEPS,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        **how,
    )
    loader = DataLoader(kind.samples(), batch_size=8)
    trainer.fit(module, loader, ckpt_path=resume, weights_only=True if resume else None)
    return module


def weights(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@every
def test_a_plan_with_the_optimizer_of_the_module_equals_the_module_alone(kind):
    plan = OptimizerPlan(kind.optimizer, decay="all")
    if kind is GAN:
        with pytest.raises(ValueError, match="GAN steps its own optimizers") as error:
            fit(kind, plan)
        assert "\n" not in str(error.value)
        return

    class Plain(kind):
        def configure_optimizers(self):
            made = self.optimizer([p for p in self.parameters() if p.requires_grad])
            return [made], [torch.optim.lr_scheduler.LambdaLR(made, lambda _: 1.0)]

    assert same(weights(fit(kind, plan)), weights(fit(Plain)))


ADAPTED = {
    "Quantization": lambda: [Quantization(), LoRA()],
    "LoRA": lambda: [LoRA()],
}
REFUSED = {  # no linear layer to quantize, or a teacher whose parameters are paired
    ("LSTM", "LoRA"): "LSTM has no hidden matrix",
    ("LSTM", "Quantization"): "LSTM has no hidden matrix",
    ("ConvBN", "Quantization"): "ConvBN has no hidden matrix",
    ("WeightNorm", "LoRA"): "WeightNorm has no hidden matrix",
    ("WeightNorm", "Quantization"): "WeightNorm has no hidden matrix",
    ("Teacher", "Quantization"): "teacher is a frozen copy of student",
}


@every
@pytest.mark.parametrize("how", ADAPTED)
def test_by_default_adapters_train_and_frozen_weights_do_not(kind, how):
    callbacks = ADAPTED[how]()
    if (said := REFUSED.get((kind.__name__, how))) is not None:
        with pytest.raises(ValueError, match=said) as error:
            fit(kind, *callbacks)
        assert "\n" not in str(error.value)
        return
    start = {}

    class Start(L.Callback):
        def on_train_start(self, trainer, pl_module):
            start.update({n: p.detach().clone() for n, p in pl_module.named_parameters()})

    module = fit(kind, *callbacks, Start())
    moved = {n for n, p in module.named_parameters() if not torch.equal(p, start[n])}
    assert any("lora_b" in name for name in moved)
    free = {n for n, p in module.named_parameters() if p.requires_grad}
    copies = find_frozen_copies(kind())
    assert all(
        name in free or any(is_submodule_of(name, copy) for copy in copies) for name in moved
    )
    if kind.__name__ == "Transfer":
        assert "classifier.weight" in moved
    if kind is Teacher:
        assert "teacher.0.lora_b" in moved


@every
def test_a_run_with_many_callbacks_resumes_bitwise(kind, tmp_path):
    adam = [] if kind is GAN else [OptimizerPlan(partial(torch.optim.Adam, lr=0.01))]
    clipping = [] if kind is GAN else [GradientClipping(0.1)]

    def callbacks():
        return [*adam, *clipping, EMA(0.9), NaNGuard(), ExactResume()]

    file = tmp_path / "cut.ckpt"
    straight = weights(fit(kind, *callbacks(), save=file))
    assert same(straight, weights(fit(kind, *callbacks(), resume=file)))


def test_dropout_makes_the_transformer_depend_on_its_generator():
    """Otherwise the bitwise comparisons above could not fail because of dropout."""
    first, second = fit(TransformerClassifier), fit(TransformerClassifier, ExactResume())
    assert not same(weights(first), weights(second))
