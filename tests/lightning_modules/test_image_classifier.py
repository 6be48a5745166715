"""The models of lecture 4 learn digits, equally on any ranks, and serve as feature extractors."""

import os
import re
from pathlib import Path

import lightning as L
import pytest
import torch
from ranks import furthest, whole

from ravine.callbacks import ExactResume, FrechetDistance, OptimizerPlan
from ravine.cli.main import main
from ravine.datamodules import ImageDataModule
from ravine.datamodules.images import to_float
from ravine.errors import UsageError
from ravine.lightning_modules import ClassifierFeatures, Diffusion, ImageClassifier

PLAN = {"lr": 5e-3}


def trained(variant="convolutional", world=1, **arguments):
    """So many steps on digits; the module, its trainer and the data."""
    L.seed_everything(0, verbose=False)
    shift = arguments.pop("shift", 1)
    plan = OptimizerPlan(lambda p: torch.optim.AdamW(p, **PLAN))
    options = {"max_steps": 60, "logger": False, "enable_checkpointing": False} | arguments
    trainer = L.Trainer(
        accelerator="cpu", devices=world, strategy="ddp" if world > 1 else "auto",
        enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
        **{"callbacks": [plan]} | options,
    )  # fmt: skip
    module, data = ImageClassifier(variant, max_shift=shift), ImageDataModule(batch_size=64)
    trainer.fit(module, data)
    return module, trainer, data


def accuracy(module, trainer, data) -> float:
    return trainer.test(module, data, verbose=False)[0]["test/accuracy"]


@pytest.mark.parametrize(
    ("variant", "least"), [("linear", 0.9), ("mlp", 0.9), ("convolutional", 0.95)]
)
def test_each_model_of_the_lecture_learns_digits(variant: str, least: float) -> None:
    assert accuracy(*trained(variant, max_steps=150, shift=0)) > least  # chance is 0.10


def test_the_linear_model_is_softmax_regression() -> None:
    module, _, data = trained("linear", max_steps=1)
    images, labels = next(iter(data.val_dataloader()))
    weight, bias = module.net.head.weight, module.net.head.bias
    assert torch.equal(module(images), images.flatten(1) @ weight.T + bias)
    assert sum(p.numel() for p in module.parameters()) == 64 * 10 + 10
    assert len(labels) == len(images)


def test_features_do_not_depend_on_the_rest_of_the_batch() -> None:
    module, _, data = trained(max_steps=2)
    images = to_float(data.get_split("test")[0][:8]).double()
    body = module.net.double().backbone
    assert torch.allclose(body(images)[:3], body(images[:3]), rtol=1e-12)


def weights_on(world: int, shift: int) -> dict[str, torch.Tensor]:
    sgd = OptimizerPlan(lambda p: torch.optim.SGD(p, 0.1))
    return whole(trained(world=world, shift=shift, max_steps=3, callbacks=[sgd])[0])


def test_two_ranks_train_as_one_process_also_with_shifted_images(ranks) -> None:
    alone = weights_on(1, shift=2)
    assert furthest(alone, weights_on(1, shift=0)) > 1e-3
    for other in ranks(weights_on, 2, 2, 2):
        assert furthest(alone, other) < 2e-6


def test_an_interrupted_classifier_run_resumes_bit_for_bit(tmp_path: Path) -> None:
    def run(steps: int, **arguments):
        callbacks = [OptimizerPlan(lambda p: torch.optim.AdamW(p, **PLAN)), ExactResume()]
        return trained(max_steps=steps, shift=2, callbacks=callbacks, **arguments)

    uncut, _, _ = run(30)  # beyond the first epoch of 21 steps
    _, trainer, _ = run(23)
    trainer.save_checkpoint(tmp_path / "cut.ckpt")
    L.seed_everything(0, verbose=False)
    callbacks = [OptimizerPlan(lambda p: torch.optim.AdamW(p, **PLAN)), ExactResume()]
    again = L.Trainer(
        accelerator="cpu", max_steps=30, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
        callbacks=callbacks,
    )  # fmt: skip
    module = ImageClassifier(max_shift=2)
    again.fit(module, ImageDataModule(batch_size=64), ckpt_path=tmp_path / "cut.ckpt")
    assert furthest(whole(uncut), whole(module)) == 0


def test_any_image_size_and_number_of_channels_are_accepted() -> None:
    for channels, size in ((3, (5, 9)), (1, (1, 1)), (1, (28, 28))):
        module = ImageClassifier()
        module.image_info = {
            "channels": channels,
            "image_size": size,
            "class_names": "abc",
            "source": "x",
        }
        module.configure_model()
        assert module(torch.zeros(2, channels, *size)).shape == (2, 3)


def test_a_checkpoint_is_an_extractor_with_a_name_and_an_accuracy(tmp_path: Path) -> None:
    module, trainer, data = trained(max_steps=100)
    trainer.save_checkpoint(tmp_path / "digits.ckpt")
    extractor = ClassifierFeatures(str(tmp_path / "digits.ckpt"))
    assert extractor.name == "digits_cnn"
    images, labels = data.get_split("test")
    features = extractor(images)
    assert features.shape == (len(images), 64)
    assert torch.equal(extractor.compute_logits(features), module(to_float(images)))
    right = (extractor.compute_logits(features).argmax(1) == labels).float().mean()
    assert float(right) == pytest.approx(accuracy(module, trainer, data))
    with pytest.raises(
        ValueError,
        match=r"images of shape \(1, 28, 28\) .* digits_cnn, which was trained on \(1, 8, 8\)",
    ):
        extractor(torch.zeros(1, 1, 28, 28, dtype=torch.uint8))
    assert FrechetDistance(extractor).metric_name == "fd_digits_cnn"


def test_an_extractor_that_is_not_a_classifier_is_refused_in_one_line(tmp_path: Path) -> None:
    model = Diffusion(base_channels=8, time_embed_dim=16)
    checkpoint: dict = {"state_dict": {}, "hyper_parameters": {}}
    model.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, tmp_path / "other.ckpt")
    (tmp_path / "junk.ckpt").write_bytes(b"junk")
    for name, why in (
        ("gone", "no checkpoint"),
        ("junk", "not a checkpoint"),
        ("other", "written by Diffusion"),
    ):
        said = rf"{name}.ckpt cannot be loaded as an ImageClassifier: .*{why}.*; train one"
        with pytest.raises(UsageError, match=said) as error:
            ClassifierFeatures(str(tmp_path / f"{name}.ckpt"))
        assert "\n" not in str(error.value)
        assert error.value.flag == "--trainer.callbacks.FrechetDistance.extractor.path=FILE"


def test_predictions_are_named_by_their_classes() -> None:
    module, trainer, data = trained(max_steps=100)
    rows = [row for batch in trainer.predict(module, data) for row in batch]
    assert len(rows) == len(data.get_split("test")[1])
    assert [file for file, *_ in rows] == [f"test {i}" for i in range(len(rows))]
    assert sum(said == truth for _, said, _, truth in rows) / len(rows) > 0.8
    assert all(0.1 <= p <= 1 for _, _, p, _ in rows)


@pytest.mark.parametrize("bad", [{"num_features": 0}, {"max_shift": -1}])
def test_invalid_sizes_are_refused(bad: dict[str, int]) -> None:
    with pytest.raises(
        ValueError, match="num_features: 1 or more, max_shift: 0 or more; use num_features=64"
    ):
        ImageClassifier(**bad)


def test_data_of_another_shape_are_refused() -> None:
    module, _, data = trained(max_steps=1)
    data.channels = 3
    with pytest.raises(
        ValueError, match="the datamodule has channels 3, but the model has channels 1"
    ):
        module.configure_from_data(data)
    with pytest.raises(ValueError, match=r"no datamodule .*; pass datamodule=ImageDataModule"):
        ImageClassifier().configure_model()


@pytest.mark.skipif(not os.environ.get("DATA_ROOT"), reason="MNIST is not on this machine")
def test_mnists_config_in_a_sixth_of_its_steps_is_right_on_97_of_100_twice_with_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In all 900 steps it reaches 0.993: benchmarks/mnist_classifier.py."""
    monkeypatch.chdir(tmp_path)
    words = ["--config=classifier/mnist", "--trainer.max_steps=150",
             "--trainer.callbacks.schedule.warmup=40"]  # fmt: skip
    assert main(["fit", *words, "--trainer.enable_progress_bar=false"]) == 0
    assert main(["test", "--ckpt_path=last"]) == 0
    right = re.findall(r"test/accuracy\D*(0\.\d+)", capsys.readouterr().out)
    assert float(right[-1]) > 0.97
    states = []
    for name in ("one", "other"):
        few = [*words[:1], "--trainer.max_steps=4", f"--trainer.name={name}",
               "--trainer.callbacks.schedule.warmup=0"]  # fmt: skip
        assert main(["fit", *few]) == 0
        (path,) = (tmp_path / "runs" / name / "version_0/checkpoints").glob("*.ckpt")
        states.append(torch.load(path, weights_only=True)["state_dict"])
    assert furthest(*states) == 0


def test_one_logit_and_two_logits_predict_alike(tmp_path: Path) -> None:
    """A logistic head is trained, saved, loaded and used as an extractor as a softmax is."""
    L.seed_everything(0, verbose=False)
    data = ImageDataModule(class_groups={"low": "0-4", "high": "5-9"})
    module = ImageClassifier("small_cnn", num_features=8, head="logistic", pixel_mean=0.3)
    trainer = L.Trainer(
        accelerator="cpu", max_steps=3, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(module, data)
    trainer.save_checkpoint(tmp_path / "groups.ckpt")
    extractor = ClassifierFeatures(str(tmp_path / "groups.ckpt"))
    assert extractor.name == "digits_small_cnn"
    images, _ = data.get_split("test")
    logits = module(to_float(images))
    assert torch.equal(extractor.compute_logits(extractor(images)), logits)
    assert not logits[:, 0].any()
    rows = [row for batch in trainer.predict(module, data) for row in batch]
    assert {truth for *_, truth in rows} == {"low", "high"}
    for (_, said, p, _), logit in zip(rows, logits[:, 1].tolist(), strict=True):
        assert said == ("high" if logit > 0 else "low")
        assert p == pytest.approx(torch.tensor(abs(logit)).sigmoid().item(), abs=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"variant": "small_cnn", "num_features": 1}, "small_cnn has half of num_features.*16"),
        ({"pixel_std": 0.0}, "pixel_std=0.0 do not normalize pixels.*pixel_mean=0.1307"),
        ({"pixel_mean": float("nan")}, "pixel_mean=nan"),
    ],
)
def test_invalid_arguments_of_a_model_are_refused(arguments, message) -> None:
    with pytest.raises(UsageError, match=message):
        ImageClassifier(**arguments)


def test_a_logistic_head_of_ten_classes_is_refused() -> None:
    data = ImageDataModule()
    data.setup("fit")
    with pytest.raises(UsageError, match=r"one logit for two classes.*digits has 10 classes"):
        ImageClassifier(head="logistic").configure_from_data(data)
