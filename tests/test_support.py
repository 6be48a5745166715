"""README's tables of what works are what is measured here: trained alike on every strategy.

A cell is ticked if two steps leave the weights that one process has, on every rank. It is blank if
the combination is refused by an error of ours, in one line; anything else fails this file.
"""

import os
import re
from functools import partial
from pathlib import Path

import lightning as L
import pytest
import torch
from foreign.net_in_init import NetInInit
from ranks import furthest, whole

import ravine.callbacks
from ravine.callbacks import (
    CollapseAlarm,
    Compile,
    FrechetDistance,
    GradientClipping,
    LoRA,
    Muon,
    OptimizerPlan,
    Pretrained,
    Samples,
)
from ravine.datamodules import ImageDataModule, PromptDataModule, SpamDataModule, TextDataModule
from ravine.datamodules.text import documentation
from ravine.lightning_modules import (
    BatchDistance,
    CharacterFraction,
    Diffusion,
    ImageClassifier,
    LanguageModel,
    Reinforce,
    SpamClassifier,
)

pytestmark = [
    # it is logged on each rank after the ranks have summed it
    pytest.mark.filterwarnings("ignore:It is recommended to use .self.log"),
    # dynamo looks there when it traces what a sharded block has gathered
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]

README = Path(__file__).resolve().parent.parent / "README.md"
STRATEGIES = {"one process": "auto", "ddp": "ddp", "zero3": "zero3", "tp": "tp"}
CALLBACKS = sorted(
    name
    for name, kind in vars(ravine.callbacks).items()
    if isinstance(kind, type) and issubclass(kind, L.Callback) and not name.startswith("_")
)
ARGUMENTS = {
    "CollapseAlarm": lambda: CollapseAlarm({"train/loss": 0.0}),
    "Compile": lambda: Compile(backend="eager"),
    "FrechetDistance": lambda: FrechetDistance(Pixels(), n=8, batch_size=4),
    "GradientClipping": lambda: GradientClipping(1.0),
    "LoRA": lambda: LoRA(rank=2),
    # in bf16 a last bit of a gradient becomes a last bit of bf16: its own tests have that
    "Muon": lambda: Muon(iteration_dtype="float32", rest=partial(torch.optim.SGD, lr=0.1)),
    "OptimizerPlan": lambda: OptimizerPlan(partial(torch.optim.SGD, lr=0.1, momentum=0.9)),
    "Pretrained": lambda: Pretrained("weights.pt"),
    "Samples": lambda: Samples({"prompt": "T", "max_new_tokens": 4}),
}


class Pixels(torch.nn.Module):
    """A measure of images: their pixels."""

    def forward(self, images):
        return images.flatten(1).double()


class Beside(L.LightningDataModule):
    """The module's own data, and pictures of 2x2 beside them."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def train_dataloader(self):
        return self.module.train_dataloader()

    def val_dataloader(self):
        return self.module.val_dataloader()

    def pictures(self, part):
        return Small.sample_images(None, torch.arange(16)), torch.arange(16) % 2


class Small(NetInInit):
    """97 numbers: few enough for Newton, quickly compiled; it reads weights and can be split."""

    def tp_plan(self):
        return {"net.0": "colwise", "net.2": "rowwise"}

    def samples(self):
        return [{"text": "one", "reward": 1.0}]

    def sample_images(self, index, labels=None):
        return (index[:, None] * torch.tensor([7, 13, 29, 31]) % 32).byte().reshape(-1, 1, 2, 2)

    def load_pretrained(self, path):
        assert path == "weights.pt"
        torch.nn.init.constant_(self.net[0].weight, 0.1)


def tasks(folder):
    """Name, module and data of each task; `folder` has a text."""
    text = TextDataModule(folder / "text.txt", context=8, batch_size=8)
    spam = SpamDataModule(source="embedded", batch_size=8)
    prompts = PromptDataModule(folder / "text.txt", length=4, batch_size=8, val_prompts=8)
    rewards = [CharacterFraction("abcdefghijklm", -1.0), BatchDistance(n=1)]
    return {
        "SpamClassifier": (SpamClassifier(buckets=256), spam),
        "ImageClassifier": (ImageClassifier(features=8, shift=1), ImageDataModule(batch_size=8)),
        "Diffusion": (
            # at width 8 a group is one channel, its norm cancels the bias, and Adam moves by noise
            Diffusion(labels=True, width=16, time_width=16),
            ImageDataModule(batch_size=8),
        ),
        "LanguageModel": (LanguageModel(layers=1, width=16, heads=2, zero_init=False), text),
        "Reinforce": (
            Reinforce(str(folder / "base.ckpt"), rewards, new=5, group_size=2),
            prompts,
        ),
    }


def write_base(folder):
    """A language model that nobody has trained, for a policy to start from."""
    L.seed_everything(0, verbose=False)
    model = LanguageModel(layers=1, width=16, heads=2, zero_init=False)
    trainer = L.Trainer(max_steps=0, accelerator="cpu", logger=False, enable_checkpointing=False,
                        enable_model_summary=False)  # fmt: skip
    trainer.fit(model, tasks(folder)["LanguageModel"][1])
    trainer.save_checkpoint(folder / "base.ckpt", weights_only=False)


def train(module, data, strategy, devices, folder, *callbacks):
    L.seed_everything(0, verbose=False)
    kinds = [type(callback).__name__ for callback in callbacks]
    trainer = L.Trainer(
        max_steps=2,
        accelerator="cpu",
        logger=False,
        callbacks=list(callbacks),
        default_root_dir=folder,
        enable_checkpointing="Checkpoint" in kinds,
        enable_progress_bar="ProgressBar" in kinds,
        enable_model_summary=False,
        val_check_interval=2,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        limit_val_batches=2,
        strategy=strategy,
        devices=devices,
    )
    trainer.fit(module, data)
    return whole(module)


def rows(strategy, devices, folder):
    """The weights after training, or the refusal, for each task and each callback."""
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    found = {}
    for name in [*tasks(folder), *CALLBACKS]:
        callbacks = []
        module, data = tasks(folder).get(name, tasks(folder)["LanguageModel"])
        if name in CALLBACKS:
            callbacks = [ARGUMENTS.get(name, getattr(ravine.callbacks, name))()]
        if name in ("Compile", "FrechetDistance", "Newton", "Pretrained", "RolloutTable"):
            module, data = Small(batch_size=32 if strategy == "tp" else 32 // devices), None
            data = Beside(module) if name == "FrechetDistance" else None
        if not any(isinstance(callback, OptimizerPlan) for callback in callbacks):
            # Adam would make a step of full size out of the last bits of a gradient near zero
            callbacks.append(OptimizerPlan(partial(torch.optim.SGD, lr=0.1)))
        try:
            found[name] = train(module, data, strategy, devices, folder, *callbacks)
        except ValueError as refusal:
            found[name] = str(refusal)
    return found


def table(title, names, ticks):
    head = [f"| {title} | {' | '.join(STRATEGIES)} |", "|---" * (len(STRATEGIES) + 1) + "|"]
    lines = [
        f"| `{n}` | {' | '.join('✓' if ticks[n, s] else ' ' for s in STRATEGIES)} |" for n in names
    ]
    return "\n".join(head + lines)


def test_readme_ticks_what_trains_alike_on_every_strategy(ranks, tmp_path):
    (tmp_path / "text.txt").write_text("".join(documentation())[:3000])
    write_base(tmp_path)
    single = rows("auto", 1, tmp_path)
    ticks = {(name, "one process"): True for name in single}
    assert not [refusal for refusal in single.values() if isinstance(refusal, str)]
    for strategy in list(STRATEGIES)[1:]:
        for found in ranks(rows, 2, strategy, 2, tmp_path, timeout=180):
            for name, weights in found.items():
                ticks[name, strategy] = not isinstance(weights, str)
                if ticks[name, strategy]:
                    assert furthest(weights, single[name]) < 2e-6, (name, strategy)
                else:
                    assert "\n" not in weights, (name, strategy, weights)
    measured = "\n\n".join(
        table(title, [n for n in single if (n in CALLBACKS) == (title == "callback")], ticks)
        for title in ("task", "callback")
    )
    print(measured)
    written = re.search(r"<!-- support -->\n(.*?)<!-- /support -->", README.read_text(), re.DOTALL)
    assert written is not None
    assert written[1].strip() == measured
