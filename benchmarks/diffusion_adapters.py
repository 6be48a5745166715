"""Do adapters teach new digits? python benchmarks/diffusion_adapters.py BASE.ckpt ADAPTED.ckpt ...

BASE is of `diffusion/digits --data.classes=[0,1,2,3,4]`, each ADAPTED of `diffusion/lora` over it.
A support vector machine, fitted to the training images of all ten digits, reads 100 images of each
label: the share that it reads as the label asked for, of old labels and of new. Raw rows in
rows/diffusion_adapters.jsonl.
"""

import sys

import torch
from record import append, circumstances
from sklearn.svm import SVC

from ravine.callbacks.lora import lora_layers
from ravine.cli.loading import load_model
from ravine.datamodules import ImageDataModule
from ravine.lightning_modules import Diffusion

EACH, OLD, NEW = 100, range(5), range(5, 10)


def judge() -> tuple[SVC, float]:
    """The classifier, and the share of real test images that it reads right."""
    data = ImageDataModule("digits")
    data.setup("test")
    (train, labels), (test, truth) = data.get_split("train"), data.get_split("test")
    found = SVC(C=10.0).fit(train.flatten(1).numpy(), labels.numpy())
    return found, float(found.score(test.flatten(1).numpy(), truth.numpy()))


def read(model: Diffusion, reader: SVC, labels: range) -> float:
    """Share of images read as what was asked for."""
    images = model.generate(labels=list(labels), num_samples=EACH).images.flatten(1)
    requested = torch.arange(labels.start, labels.stop).repeat_interleave(EACH)
    return round(float(reader.score(images.numpy(), requested.numpy())), 4)


def main(paths: list[str]) -> None:
    """A row for each checkpoint; the base's is the control."""
    reader, real = judge()
    for path in paths:
        model = load_model(path)
        assert isinstance(model, Diffusion)
        size = {
            "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "parameters": sum(p.numel() for p in model.parameters()),
        }
        config = "diffusion/lora" if lora_layers(model) else "diffusion/digits"
        row = circumstances(config) | size | {"n_each": EACH, "judge_on_real": round(real, 4)}
        row |= {"old_digits": read(model, reader, OLD), "new_digits": read(model, reader, NEW)}
        append("diffusion_adapters", row)


if __name__ == "__main__":
    main(sys.argv[1:])
