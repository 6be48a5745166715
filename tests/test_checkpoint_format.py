"""A checkpoint names its format; a file of an older format is refused in one line."""

from pathlib import Path

import lightning as L
import pytest
import torch

import ravine
from ravine.callbacks import ExactResume
from ravine.checkpoint_format import FORMAT_VERSION, READ_BY, check_format
from ravine.cli.main import main
from ravine.datamodules import TextDataModule
from ravine.errors import UsageError
from ravine.lightning_modules import LanguageModel

TINY = {"num_layers": 1, "d_model": 8, "num_heads": 1}


def model_and_data(folder):
    (folder / "text.txt").write_text("to be or not to be " * 40)
    data = TextDataModule(folder / "text.txt", context_length=8, batch_size=4)
    return LanguageModel(**TINY), data


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A checkpoint that a trainer has written, and the folder of its text."""
    folder = tmp_path_factory.mktemp("format")
    model, data = model_and_data(folder)
    trainer = L.Trainer(
        max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[ExactResume()],
    )  # fmt: skip
    trainer.fit(model, data)
    trainer.save_checkpoint(folder / "new.ckpt")
    return folder


def older(folder, change):
    """The same file with another format."""
    checkpoint = torch.load(folder / "new.ckpt", weights_only=True)
    change(checkpoint)
    torch.save(checkpoint, folder / "old.ckpt")
    return folder / "old.ckpt"


def drop(checkpoint):
    del checkpoint["ravine"]


def number_one(checkpoint):
    checkpoint["ravine"] = {"version": 1, "config": {}}


def next_number(checkpoint):
    checkpoint["ravine"]["format_version"] = FORMAT_VERSION + 1


def resume(path):
    model, data = model_and_data(path.parent)
    trainer = L.Trainer(
        max_steps=2, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(model, data, ckpt_path=path, weights_only=True)


def test_the_file_of_this_version_is_read(written):
    assert torch.load(written / "new.ckpt", weights_only=True)["ravine"] == {
        "format_version": FORMAT_VERSION
    }
    assert ravine.load_model(written / "new.ckpt").generate("to", max_new_tokens=1)
    resume(written / "new.ckpt")


@pytest.mark.parametrize("read", [ravine.load_model, LanguageModel.load_from_checkpoint, resume])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (drop, "has format 1; allowed: format 2; to read it, pip install ravine==0.1.0"),
        (number_one, "has format 1; allowed: format 2; to read it, pip install ravine==0.1.0"),
        (next_number, "has format 3; allowed: format 2; install a newer version of ravine"),
    ],
)
def test_a_file_of_another_format_is_refused_in_one_line(written, read, change, said):
    with pytest.raises(UsageError) as error:
        read(older(written, change))
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_the_command_line_names_the_path_of_a_file_of_another_format(written, capsys):
    path = older(written, number_one)
    assert main(["generate", f"--ckpt_path={path}"]) == 2
    assert f"the checkpoint {path} has format 1" in capsys.readouterr().err


def test_files_of_other_programs_have_no_format(tmp_path):
    check_format({"state_dict": {}, "epoch": 0})
    with pytest.raises(UsageError, match="has format 'two'"):
        check_format({"task": "Diffusion", "ravine": {"format_version": "two"}})


def test_the_version_of_the_package_is_newer_than_those_that_read_older_formats():
    def numbers(version):
        return tuple(map(int, version.split(".")))

    assert all(numbers(ravine.__version__) > numbers(reader) for reader in READ_BY.values())
    assert set(READ_BY) == set(range(1, FORMAT_VERSION))
    assert Path(ravine.__file__).with_name("checkpoint_format.py").exists()
