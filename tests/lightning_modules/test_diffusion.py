"""Diffusion as a task: the training step, metrics, samples and refused input."""

import errno
import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from ranks import furthest, whole
from torch.nn import functional as F

from ravine.callbacks import EMA, GenerateSamples, SaveFigures
from ravine.cli.main import main
from ravine.cli.trainer import Trainer
from ravine.datamodules import ImageDataModule
from ravine.datamodules.images import to_uint8
from ravine.lightning_modules import Diffusion, LanguageModel
from ravine.lightning_modules.diffusion_core.counter_rng import derive_key, normals, uniforms
from ravine.lightning_modules.diffusion_core.denoiser import Denoiser
from ravine.lightning_modules.diffusion_core.image_grid import ImageGrid
from ravine.lightning_modules.diffusion_core.noise_schedules import NoiseSchedule, compute_alpha_bar
from ravine.lightning_modules.diffusion_core.samplers import ddim
from ravine.lightning_modules.nn.unet import timestep_embedding
from ravine.lightning_modules.plots import diffusion as diffusion_plots

# as in tests/docs/test_support_tables.py: it is logged on each rank after the ranks have summed it
pytestmark = pytest.mark.filterwarnings("ignore:It is recommended to use .self.log")

MAX_MARGIN = 40  # pixels beside a grid, in which one digit names each row
TINY: dict[str, Any] = {"base_channels": 8, "time_embed_dim": 16}


class Steps(Diffusion):
    """With plain SGD, under which a wrong scale of a gradient is seen."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def data(batch_size: int = 32) -> ImageDataModule:
    return ImageDataModule("digits", batch_size=batch_size, seed=0)


def fit(module: L.LightningModule, steps: int = 3, **more: Any) -> L.Trainer:
    L.seed_everything(0, verbose=False)
    trainer = L.Trainer(
        max_steps=steps, accelerator="cpu", enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        **({"limit_val_batches": 0, "logger": False} | more),
    )  # fmt: skip
    trainer.fit(module, data())
    return trainer


def built(**arguments: Any) -> Diffusion:
    """A net that has learned nothing, for gray images of 8x8 with ten labels."""
    torch.manual_seed(0)
    model = Diffusion(**(TINY | {"class_conditional": True, "num_steps": 4} | arguments))
    images = data()
    images.setup("fit")
    model.configure_from_data(images)
    model.configure_model()
    return model.eval()


def test_a_training_step_equals_the_loop_of_the_lecture() -> None:
    """x_t from a draw of t and noise, and the mean squared error of the net's x0."""
    model = built(class_conditional=False)
    images = data()
    images.setup("fit")
    x0, y = next(iter(images.train_dataloader()))
    model.log = lambda *a, **k: None  # type: ignore[method-assign]
    loss = model.training_step((x0, y), 0)
    places = torch.arange(32)
    draw = uniforms(derive_key(0, "training", 0, "times"), places)
    t = (1000 * (places + draw) / 32).floor() + 1  # evenly over 1..1000
    noise = normals(derive_key(0, "training", 0, "noise"), places, (1, 8, 8))
    kept = compute_alpha_bar("linear")[t.long()].float()[:, None, None, None]
    x = kept.sqrt() * x0 + (1 - kept).sqrt() * noise
    torch.testing.assert_close(loss, F.mse_loss(model.net(x, t), x0))


@pytest.mark.parametrize("prediction", ["eps", "v", "velocity"])
def test_an_unweighted_loss_is_the_error_of_the_predicted_quantity(prediction: Any) -> None:
    model = built(prediction_type=prediction)
    x0, eps, t = torch.randn(5, 1, 8, 8), torch.randn(5, 1, 8, 8), torch.full((5,), 400.0)
    error, x, answer = model.denoiser.training_loss(model, x0, t, None, eps)
    a, s = (level[0] for level in model.denoiser.noise_schedule.alpha_sigma(t))
    right = {"eps": eps, "v": a * eps - s * x0, "velocity": eps - x0}[prediction]
    torch.testing.assert_close(error, (answer - right).square().mean((1, 2, 3)))
    torch.testing.assert_close(model.denoise(x, t), model.denoiser.to_x0(answer, x, t))


def test_accumulated_batches_train_as_one() -> None:
    one, other = (Steps(class_conditional=True, **TINY) for _ in range(2))
    fit(one)
    fit(other, accumulate_grad_batches=4)
    assert furthest(whole(one), whole(other)) < 2e-6


def weights_on(strategy: str, devices: int, width: int) -> dict[str, torch.Tensor]:
    model = Steps(class_conditional=True, base_channels=width, time_embed_dim=16)
    fit(model, strategy=strategy, devices=devices)
    return whole(model)


def test_ranks_train_as_one_process_under_plain_sgd(ranks: Any) -> None:
    single = weights_on("auto", 1, 8)
    for found in ranks(weights_on, 2, "ddp", 2, 8):
        assert furthest(found, single) < 2e-6


def validate_on(strategy: str, devices: int) -> dict[str, float]:
    model = Steps(class_conditional=True, noise_schedule="cosine", prediction_type="v", **TINY)
    trainer = fit(model, 2, strategy=strategy, devices=devices, limit_val_batches=1.0,
                  check_val_every_n_epoch=1, limit_train_batches=2)  # fmt: skip
    return {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")}


def test_validation_is_the_same_on_any_number_of_ranks(ranks: Any) -> None:
    single = validate_on("auto", 1)
    assert {"val/loss", "val/x0_mse", "val/x0_mse_t051", "val/x0_mse_t951"} <= single.keys()
    assert len(single) == 12
    levels = [v for k, v in single.items() if k.startswith("val/x0_mse_t")]
    assert single["val/x0_mse"] == pytest.approx(sum(levels) / 10, rel=1e-5)
    for found in ranks(validate_on, 2, "ddp", 2):
        assert found == pytest.approx(single, rel=1e-4)


def test_validation_of_the_same_weights_gives_the_same_numbers() -> None:
    model = built()
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    first, second = (trainer.validate(model, data(size), verbose=False) for size in (16, 16))
    assert len(first[0]) == 12
    assert first == second
    assert trainer.validate(model, data(7), verbose=False)[0] == pytest.approx(first[0], rel=1e-5)
    tested = trainer.test(model, data(), verbose=False)[0]
    assert tested.keys() == {name.replace("val/", "test/") for name in first[0]}


def test_validations_differ_by_the_weights_alone() -> None:
    class Still(Diffusion):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0)

    kept = Kept()
    fit(
        Still(class_conditional=True, **TINY),
        2,
        logger=kept,
        limit_val_batches=1.0,
        val_check_interval=1,
        check_val_every_n_epoch=None,
    )
    first, second = ({k: v for k, v in row.items() if k.startswith("val/")}
                     for row in kept.numbers if "val/loss" in row)  # fmt: skip
    assert len(first) == 12
    assert first == second


def test_the_first_attempt_learns_the_mean_of_all_images() -> None:
    """From noise that says nothing of the image, the best answer is one blurry blob."""
    model = Diffusion("one_step", **TINY)
    model.lr = 3e-3
    fit(model, 150)
    made = model.generate(num_samples=50).images.float() / 127.5 - 1
    images = data()
    images.setup("fit")
    mean = images.get_split("train")[0].float().mean(0) / 127.5 - 1
    assert (made - mean).square().mean() < 0.03  # images are 0.42 apart from their mean
    assert made.var(0).mean() < 0.02


def test_the_third_attempt_learns_each_digit() -> None:
    """In six seconds a digit is nearest to the mean of its own class more often than not."""
    torch.manual_seed(0)
    model = Diffusion(
        "time",
        noise_schedule="cosine",
        class_conditional=True,
        base_channels=16,
        time_embed_dim=32,
        num_steps=10,
    )
    model.lr = 4e-3
    fit(model, 250)
    made = model.generate(num_samples=20).images.flatten(1).float()
    images = data()
    images.setup("fit")
    real, labels = images.get_split("train")
    means = torch.stack([real[labels == k].flatten(1).float().mean(0) for k in range(10)])
    requested = torch.arange(10).repeat_interleave(20)
    read = torch.cdist(made, means).argmin(1)
    assert (read == requested).float().mean() > 0.7  # of real images 0.9, of chance 0.1
    variances = [part.var(0).mean() for part in made.view(10, 20, -1)]
    assert min(variances) > 500  # of real images 1,000 to 3,000, of blobs 0


class Kept(DummyLogger):
    """A logger that keeps what it is given, images as Weights & Biases takes them."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers: list[dict[str, float]] = []
        self.pictures: list[tuple[str, int, Any]] = []

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.numbers.append(dict(metrics))

    def log_image(self, key: str, images: list[Any], step: int) -> None:
        self.pictures += [(key, step, image.size) for image in images]


def test_the_loss_is_logged_at_each_level_while_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the time itself as error: ten means, each over its tenth, since the last log."""
    times: list[torch.Tensor] = []

    def errors(self: Any, net: Any, x0: Any, t: torch.Tensor, y: Any, eps: Any) -> Any:
        times.append(t)
        return t + 0 * sum(p.sum() for p in net.parameters()), x0, x0

    monkeypatch.setattr(Denoiser, "training_loss", errors)
    kept = Kept()
    fit(Steps(**TINY), 8, logger=kept, log_every_n_steps=4)
    assert not torch.equal(times[0], times[1])  # each step draws its own
    logged = [row for row in kept.numbers if "train/loss" in row]
    for row, steps in zip(logged, (times[:4], times[4:]), strict=True):
        seen = torch.cat(steps)
        for k in range(10):
            inside = seen[(seen > 100 * k) & (seen <= 100 * k + 100)]
            assert row[f"train/loss_t{100 * k + 51:03}"] == pytest.approx(float(inside.mean()))


def test_images_are_logged_to_loggers_that_accept_images() -> None:
    kept = Kept()
    fit(Diffusion(class_conditional=True, num_steps=2, **TINY), 2, logger=kept, limit_val_batches=1,
        limit_train_batches=2, check_val_every_n_epoch=1,
        callbacks=[GenerateSamples({"num_samples": 2})])  # fmt: skip
    ((name, num_images, (width, height)),) = kept.pictures
    assert (name, num_images, height) == ("samples", 2, 10 * 58 + 2)
    assert 2 * 58 + 2 < width < 2 * 58 + 2 + MAX_MARGIN


def test_the_second_attempt_has_no_time_input() -> None:
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([1.0, 900.0])
    for conditioning, depends in (("none", False), ("time", True)):
        model = built(time_conditioning=conditioning)
        answers = [model.denoise(x, t), model.denoise(x, t.flip(0))]
        assert (not torch.allclose(*answers, atol=1e-6)) == depends


def test_an_interrupted_run_resumes_bit_for_bit(tmp_path: Path) -> None:
    def run(steps: int, path: str | None = None) -> Diffusion:
        L.seed_everything(0, verbose=False)
        model = Diffusion(class_conditional=True, **TINY)
        trainer = Trainer(
            max_steps=steps, default_root_dir=tmp_path, accelerator="cpu", callbacks=[EMA()],
            enable_progress_bar=False, logger=False, limit_val_batches=0,
        )  # fmt: skip
        trainer.fit(model, data(), ckpt_path=path)
        trainer.save_checkpoint(tmp_path / f"{steps}.ckpt")
        return model

    through = run(5)
    run(3)
    assert furthest(whole(run(5, str(tmp_path / "3.ckpt"))), whole(through)) == 0


def test_a_seed_and_number_give_the_same_image() -> None:
    model = built(guidance_scale=0.5, class_dropout_prob=0.1)
    images = model.generate_images(torch.arange(30))
    assert images.dtype == torch.uint8
    assert images.shape == (30, 1, 8, 8)
    some = torch.tensor([17, 4])
    again = model.generate_images(some, some % 10)
    assert (again.int() - images[some].int()).abs().max() <= 1  # a sum in another order
    assert (model.generate_images(some, (some + 1) % 10).int() - again.int()).abs().max() > 1


def test_images_use_the_guided_estimate_clamped_to_the_range_of_pixels() -> None:
    model = built()
    with torch.no_grad():
        model.net.blocks["out_conv"].weight.mul_(20)  # beyond what a pixel can be
    path = model.denoiser.noise_schedule.timesteps(4)
    start = normals(derive_key(0, "start"), torch.arange(2), (1, 8, 8)) * path.sigma[0].item()

    @torch.no_grad()
    def by_hand(w: float, most: float) -> torch.Tensor:
        def denoise(x: torch.Tensor, t: float) -> torch.Tensor:
            times = x.new_full((2,), t)
            cond, uncond = (model.denoise(x, times, torch.tensor([y, y])) for y in (3, 10))
            return (cond + w * (cond - uncond)).clamp(-most, most)

        return to_uint8(ddim(denoise, start, path, diffusion_plots.no_noise)).int()

    made = model.generate(labels="3", num_samples=2, guidance_scale=1.5).images.int()
    assert (made - by_hand(1.5, 1)).abs().max() <= 1
    for other in (by_hand(0, 1), by_hand(1.5, 9)):
        assert (made - other).abs().max() > 20


def test_a_tenth_of_the_labels_is_dropped_in_training() -> None:
    seen = []
    model = built(class_dropout_prob=0.1)
    model.log = lambda *a, **k: None  # type: ignore[method-assign]
    model.net.register_forward_pre_hook(lambda net, inputs: seen.append(inputs[2]))
    model.training_step((torch.zeros(2000, 1, 8, 8), torch.full((2000,), 3)), 0)
    assert set(seen[0].tolist()) == {3, 10}
    assert abs((seen[0] == 10).float().mean() - 0.1) < 0.03


def saved(model: Diffusion, path: Path) -> str:
    checkpoint: dict[str, Any] = {
        "state_dict": model.state_dict(),
        "hyper_parameters": dict(model.hparams),
    }
    model.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, path)
    return str(path)


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    return saved(built(), tmp_path / "model.ckpt")


def read(path: str | Path) -> torch.Tensor:
    import numpy
    from PIL import Image

    return torch.from_numpy(numpy.array(Image.open(path)))


def without_row_names(grid: torch.Tensor, columns: int) -> torch.Tensor:
    """Cut off the margin of a grid (y x), after a check that something is drawn in it."""
    margin = grid.shape[1] - (columns * 58 + 2)
    assert 0 < margin < MAX_MARGIN
    assert grid[:, :margin].min() < 128
    return grid[:, margin:]


def test_three_lines_of_python_give_the_images_of_the_command(
    checkpoint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Diffusion.load_from_checkpoint(checkpoint)
    pictures = model.generate(
        labels="1-2,7", num_samples=3, guidance_scale=0.5, num_steps=3, seed=5
    )
    pictures.save("mine.png")
    words = [
        "--labels=1-2,7",
        "--num_samples=3",
        "--guidance_scale=0.5",
        "--num_steps=3",
        "--seed=5",
    ]
    for name in ("samples.png", "samples_1.png"):  # nothing is overwritten unasked
        assert main(["generate", "--ckpt_path", checkpoint, *words, "--folder", name[:-4]]) == 0
        assert capsys.readouterr().out == f"written: {name}, 9 files in {name[:-4]}\n"
        assert torch.equal(read(name), read("mine.png"))
    singles = [read(path) for path in sorted(Path("samples").iterdir())]
    assert torch.equal(torch.stack(singles), pictures.images[:, 0])
    grid = without_row_names(read("mine.png"), columns=3)
    assert grid.shape == (3 * 58 + 2, 3 * 58 + 2)  # eight pixels are drawn as 56
    assert torch.equal(grid[2:58:7, 60:116:7], pictures.images[1, 0])


LABELS = "\n  allowed: 0 to 9\n  type: --labels=0-9\n"
REFUSED = {
    "--labels=10": "labels='10' is not in the classes" + LABELS,
    "--labels=3,5-3": "labels='3,5-3' is not in the classes" + LABELS,
    "--labels=0-99999999999": "labels='0-99999999999' is not in the classes" + LABELS,
    "--labels=seven": "'seven' is not a class" + LABELS,
    "--guidance_scale=-1": "SamplerConfig: guidance_scale=-1.0 is out of range\n"
    "  allowed: 0 (none) or more\n  type: --guidance_scale=0.5, or --model.guidance_scale=0.5\n",
    "--num_steps=0": "SamplerConfig: num_steps=0 is out of range\n  allowed: 1 or more\n"
    "  type: --num_steps=50, or",
    "--num_steps=2000": "NoiseSchedule('linear'): num_steps=2000 is out of range\n"
    "  allowed: 1 to 1000\n  type: --num_steps=1000, or",
    "--num_steps=ten": "--num_steps cannot be 'ten'\n  allowed: a whole number",
    "--sampler=dim": "--sampler cannot be 'dim'\n  nearest: ddim",
    "--num_samples=0": "generate: num_samples=0 is too small\n  allowed: 1 or more\n"
    "  type: --num_samples=1\n",
    "--prompt=hello": "generate has no flag --prompt",
    "--file=": "'' does not end in the suffix of an image format",
    "--file=samples.txt": "'samples.txt' does not end in the suffix of an image format\n"
    "  allowed: .png, .jpg, .jpeg\n  type: --file=samples.png\n",
    "--file=model.ckpt/a.png": "cannot be written: {here}/model.ckpt is not a folder",
    "--file=taken.png": "cannot be written: {here}/taken.png is a folder",
    "--folder=model.ckpt": "cannot be written: {here}/model.ckpt is not a folder",
    "--folder=.": "the folder . is not empty",
}


@pytest.mark.parametrize("words", REFUSED)
def test_a_user_error_is_one_message_and_writes_nothing(
    words: str, checkpoint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("taken.png").mkdir()
    before = sorted(Path().rglob("*"))
    assert main(["generate", "--ckpt_path", checkpoint, words]) == 2
    assert REFUSED[words].format(here=Path.cwd()) in capsys.readouterr().err
    assert sorted(Path().rglob("*")) == before


def test_an_unwritable_path_is_refused_before_any_sampling(
    checkpoint: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Diffusion, "_sample_batches", None)
    monkeypatch.setattr("os.access", lambda path, mode: "locked" not in str(path))
    Path("locked").mkdir()
    for what, words in (("generate", "--file=locked/new/a.png"),
                        ("generate", "--folder=locked/singles"), ("export", "--folder=locked/out"),
                        ("export", "--consolidate=locked/one.ckpt")):  # fmt: skip
        assert main([what, "--ckpt_path", checkpoint, words]) == 2
        said = capsys.readouterr().err
        assert f"cannot be written: {Path.cwd()}/locked is not writable" in said
        assert f"type: {words.split('=')[0]}=ANOTHER/" in said
    monkeypatch.chdir("locked")
    assert main(["generate", "--ckpt_path", checkpoint]) == 2
    assert "samples.png cannot be written" in capsys.readouterr().err


def test_a_full_disk_does_not_remove_an_older_image(
    checkpoint: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Any, file: Any, form: str = "") -> None:
        Path(file).write_bytes(b"half a picture")
        raise OSError(errno.ENOSPC, "No space left on device")

    Path("samples.png").write_bytes(b"an older one")
    before = sorted(Path().rglob("*"))
    monkeypatch.setattr("PIL.Image.Image.save", full)
    assert main(["generate", "--ckpt_path", checkpoint, "--file=samples.png", "--num_steps=1"]) == 1
    assert "free disk space, then run the same command again\n" in capsys.readouterr().err
    assert sorted(Path().rglob("*")) == before
    assert Path("samples.png").read_bytes() == b"an older one"
    pictures = Diffusion.load_from_checkpoint(checkpoint).generate(
        labels="3", num_samples=2, num_steps=1
    )
    with pytest.raises(OSError, match="No space left"):
        pictures.save_each("singles")
    assert not list(Path("singles").iterdir())


def test_text_and_image_models_have_their_own_options() -> None:
    from ravine.cli.commands import method_flags

    words, pictures = (
        set(method_flags.method_flags(task.generate)) for task in (LanguageModel, Diffusion)
    )
    assert {"labels", "guidance_scale", "num_steps", "sampler", "eta"} <= pictures - words
    assert words & pictures == {"num_samples", "seed", "batch_size"}


def test_weights_that_are_not_finite_end_in_one_line(
    checkpoint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Diffusion.load_from_checkpoint(checkpoint)
    with torch.no_grad():
        model.net.blocks["out_conv"].weight.fill_(torch.nan)
    assert main(["generate", "--ckpt_path", saved(model, Path("nan.ckpt"))]) == 2
    assert "100.00% of the pixels are not finite" in capsys.readouterr().err
    assert not Path("samples.png").exists()


def test_export_writes_the_weights_of_the_checkpoint(
    checkpoint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import load_file

    assert main(["export", "--ckpt_path", checkpoint, "--folder=out"]) == 0
    assert capsys.readouterr().out == "written: out/model.safetensors, config.json\n"
    there = load_file("out/model.safetensors")
    restored_state = Diffusion.load_from_checkpoint(checkpoint).net.state_dict()
    assert there.keys() == restored_state.keys()
    assert all(torch.equal(there[name], restored_state[name]) for name in restored_state)
    config = json.loads(Path("out/config.json").read_text())
    assert config.pop("net")["num_classes"] == 10
    assert config == {
        "noise_schedule": "linear",
        "prediction_type": "x0",
        "time_conditioning": "time",
    }


def test_images_are_saved_at_each_validation(tmp_path: Path) -> None:
    L.seed_everything(0, verbose=False)
    model = Diffusion(class_conditional=True, num_steps=2, **TINY)
    trainer = Trainer(
        max_steps=2, default_root_dir=tmp_path, name="digits", accelerator="cpu",
        val_check_interval=1, check_val_every_n_epoch=None, enable_progress_bar=False,
        callbacks=[GenerateSamples({"num_samples": 2}), SaveFigures()],
    )  # fmt: skip
    trainer.fit(model, data())
    run = tmp_path / "digits" / "version_0"
    file_names = sorted(path.name for path in (run / "samples").iterdir())
    assert file_names == ["000001.png", "000002.png"]
    grid = without_row_names(read(run / "samples" / "000002.png"), columns=2)
    assert grid.shape == (10 * 58 + 2, 2 * 58 + 2)
    assert torch.equal(grid[2:58:7, 2:58:7], model.generate(num_samples=2).images[0, 0])
    for name in ("reverse", "estimates", "interpolation"):
        assert read(run / f"digits_{name}.png").ndim == 3
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run)).Reload()
    assert set(events.Tags()["images"]) == {"samples", "reverse", "estimates", "interpolation"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            {"class_dropout_prob": 1.0},
            "class_dropout_prob=1.0 is out of range; allowed: 0 to below 1",
        ),
        (
            {"guidance_scale": 0.5},
            r"is trained without class dropout; allowed: 0; use guidance_scale=0",
        ),
        (
            {"guidance_scale": 1, "class_conditional": True, "class_dropout_prob": 0},
            "class dropout",
        ),
        ({"prediction_type": "eps", "noise_schedule": "flow"}, "allowed: x0, v, velocity"),
        ({"num_steps": 1500}, "num_steps=1500 is out of range; allowed: 1 to 1000"),
        ({"base_channels": 10}, "allowed: base_channels: a multiple of 8"),
    ],
)
def test_invalid_diffusion_arguments_are_refused(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Diffusion(**arguments)


def test_a_model_without_labels_and_one_without_data_are_refused() -> None:
    model = built(class_conditional=False)
    with pytest.raises(
        ValueError, match=r"labels='3' cannot be used, .* trained without labels; remove labels"
    ):
        model.generate(labels="3")
    made = model.generate(num_samples=10)
    assert (len(made.images), made.columns) == (10, 4)  # nearly a square
    assert torch.equal(
        model.generate_images(torch.arange(3), torch.arange(3)),
        model.generate_images(torch.arange(3)),
    )
    with pytest.raises(
        ValueError, match=r"no datamodule .*ImageDataModule, a checkpoint of Diffusion"
    ):
        Diffusion().configure_model()
    other = data()
    other.setup("fit")
    other.channels = 3
    said = r"Diffusion: the datamodule has channels 3, but the model has channels 1"
    with pytest.raises(ValueError, match=said):
        model.configure_from_data(other)
    checkpoint: dict[str, Any] = {}
    model.on_save_checkpoint(checkpoint)
    new = Diffusion(**TINY)
    new.configure_from_data(other)
    with pytest.raises(ValueError, match=said):
        new.on_load_checkpoint(checkpoint)
    other.num_classes = 0
    with pytest.raises(
        ValueError, match=r"needs labels, but the data contain none; .*class_conditional=False"
    ):
        Diffusion(class_conditional=True).configure_from_data(other)


def test_a_label_out_of_range_is_not_used_as_the_dropped_label() -> None:
    images = data()
    images.setup("fit")
    images.get_split("train")[1][7] = 10
    with pytest.raises(ValueError, match=r"the label of image 7 is 10; allowed: 0 to 9"):
        Diffusion(class_conditional=True, **TINY).configure_from_data(images)
    Diffusion(**TINY).configure_from_data(images)  # it looks at no labels


def test_a_one_step_model_refuses_more_steps() -> None:
    model = built(time_conditioning="one_step", num_steps=20)
    assert len(model.generate(num_samples=1, num_steps=1).images) == 10
    said = r"num_steps=20 .* time_conditioning='one_step' .*; allowed: 1; use num_steps=1"
    with pytest.raises(ValueError, match=said):
        model.generate(num_steps=20)


def test_bf16_weights_get_the_same_time_embedding() -> None:
    model = Diffusion(class_conditional=True, num_steps=2, **TINY)
    trainer = fit(model, 2, precision="bf16-true", limit_val_batches=1, check_val_every_n_epoch=1,
                  limit_train_batches=2)  # fmt: skip
    assert next(model.parameters()).dtype == torch.bfloat16
    assert {"val/x0_mse_t051", "val/x0_mse_t951"} <= trainer.callback_metrics.keys()
    assert model.generate(num_samples=1).images.float().std() > 0
    t = torch.tensor([999.0])
    with trainer.precision_plugin.forward_context():
        inside = timestep_embedding(t, 16)
    assert torch.equal(inside, timestep_embedding(t, 16))


def tiles(figure: Any, columns: int) -> torch.Tensor:
    """The images of a sheet, (rows columns y x), without the line around each."""
    sheet = torch.from_numpy(figure.axes[0].images[0].get_array().data)
    size = sheet.shape[1] // columns
    parts = sheet.unfold(0, size, size).unfold(1, size, size)
    return parts[..., 1:-1, 1:-1].to(torch.uint8)


def test_a_grid_names_the_rows_of_classes_and_a_sheet_names_axes_and_rows() -> None:
    black = torch.zeros(6, 1, 8, 8, dtype=torch.uint8)
    plain, named = ImageGrid(black, 3).grid(), ImageGrid(black, 3, ("0", "a longer name")).grid()
    margin = named.width - plain.width
    assert margin > 0
    assert named.height == plain.height
    assert named.crop((margin, 0, named.width, named.height)).tobytes() == plain.tobytes()
    for top in (0, named.height // 2):  # each row has a name in dark pixels
        assert named.crop((0, top, margin, top + named.height // 2)).getextrema()[0] < 128
    one, other = torch.randn(2, 3, 1, 4, 4)
    steps = NoiseSchedule("flow").timesteps(3)
    for names, expected in (((), "pair 1"), (("class 0", "class 1", "class 2"), "class 0")):
        figure = diffusion_plots.plot_interpolation(lambda x, t: x, steps, one, other, names)
        axes = figure.axes[0]
        assert axes.get_yticklabels()[0].get_text() == expected
        assert "interpolation" in axes.get_title()
        assert "noise" in axes.get_xlabel()


def test_the_figures_show_noise_images_and_intermediate_steps() -> None:
    """Of a model that takes a share of what it sees for the image, the larger the more noise."""
    schedule = NoiseSchedule("flow")
    path = schedule.timesteps(5)

    def share(x: torch.Tensor, t: float) -> torch.Tensor:
        return x * (0.2 + t / 2000)

    def made(x: torch.Tensor) -> torch.Tensor:
        return ddim(share, x, path, diffusion_plots.no_noise)

    one, other, image = (0.3 * torch.randn(2, 1, 4, 4) for _ in range(3))
    shown = tiles(diffusion_plots.plot_interpolation(share, path, one, other), 11)
    between = [made(one.lerp(other, w) / (w**2 + (1 - w) ** 2) ** 0.5) for w in (0.0, 0.5, 1.0)]
    for place, images in zip((0, 5, 10), between, strict=True):
        assert torch.equal(shown[:, place], to_uint8(images[:, 0]))
    shown = tiles(diffusion_plots.plot_reverse_process(share, path, one), 11)
    for row, images in ((0, one), (1, share(one, 1000))):
        assert torch.equal(shown[row::2, 0], to_uint8(images[:, 0]))
    assert torch.equal(shown[0::2, 10], to_uint8(made(one)[:, 0]))
    shown = tiles(diffusion_plots.plot_x0_estimates(share, schedule, image, one), 11)
    for place, w in ((0, 0.0), (3, 0.3), (10, 1.0)):
        noisy = image.lerp(one, w)
        assert torch.equal(shown[0::2, place], to_uint8(noisy[:, 0]))
        if place:
            assert torch.equal(shown[1::2, place], to_uint8(share(noisy[:, 0], 1000 * w)))


def test_a_run_without_validation_has_its_figures(tmp_path: Path) -> None:
    images = ImageDataModule("digits", batch_size=32, seed=0, val_fraction=0)
    trainer = Trainer(
        max_steps=1, default_root_dir=tmp_path, name="digits", accelerator="cpu", logger=True,
        enable_progress_bar=False, callbacks=[SaveFigures()],
    )  # fmt: skip
    trainer.fit(Diffusion(num_steps=2, **TINY), images)
    assert len(list(tmp_path.rglob("digits_*.png"))) == 3


def test_a_sampled_byte_survives_the_conversion_to_float() -> None:
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(every.float() / 127.5 - 1), every)
