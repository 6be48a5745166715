"""A checkpoint of any layout resumes on any other; incomplete folders are recognized.

The run: Muon and AdamW as one optimizer, an average of the weights, a schedule, mid-epoch.
"""

import os
import pickle
import re
import resource
import shutil
from functools import partial
from pathlib import Path

import lightning as L
import pytest
import torch
import torch.distributed as dist
from ranks import furthest, whole
from torch.optim import AdamW

from ravine.callbacks import EMA, ExactResume, LRSchedule, Muon
from ravine.cli.main import main
from ravine.datamodules import TextDataModule
from ravine.datamodules.text import python_docs_text
from ravine.lightning_modules import LanguageModel
from ravine.strategies import AtomicCheckpointIO, CheckpointError, MeshStrategy
from ravine.strategies.checkpoint import sharded_index
from ravine.strategies.checkpoint.atomic_io import latest_valid_checkpoint

# a validation loss that was reduced already is logged by each rank
pytestmark = pytest.mark.filterwarnings("ignore:It is recommended to use .self.log")

PAGE = Path(__file__).resolve().parents[3] / "docs" / "parallelism.md"
TINY = {
    "num_layers": 2,
    "d_model": 16,
    "num_heads": 4,
    "zero_init_residual": False,
    "activation": "gelu",
}


def mesh(**how):
    return lambda: MeshStrategy(save_distributed_checkpoint=True, **how)


LAYOUTS = {
    "single": (1, lambda: "auto"),
    "ddp 2": (2, lambda: "ddp"),
    "zero1 2": (2, mesh(zero_stage=1)),
    "zero3 2": (2, mesh()),
    "zero3 4": (4, mesh()),
    "tp 2": (2, mesh(dp_shard=1, tp=-1)),
    "zero3 x tp 2x2": (4, mesh(tp=2)),
    "pp 2": (2, mesh(dp_shard=1, pp=2)),
}


class Save(L.Callback):
    def __init__(self, path):
        self.path = path

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 2:
            trainer.save_checkpoint(self.path)


def train(name, text, save=None, resume=None, **shape):
    L.seed_everything(0, verbose=False)
    muon = Muon(
        0.02, partial(AdamW, lr=0.003), iteration_dtype="float32", schedule=LRSchedule("linear")
    )
    ema = EMA(0.5)
    trainer = L.Trainer(
        max_steps=4,
        accelerator="cpu",
        devices=LAYOUTS[name][0],
        strategy=LAYOUTS[name][1](),
        logger=False,
        plugins=[AtomicCheckpointIO()],
        callbacks=[muon, ema, ExactResume(), *([Save(save)] if save else [])],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    module = LanguageModel(**TINY | shape)
    trainer.fit(module, TextDataModule(text, context_length=16, batch_size=8), ckpt_path=resume)
    average = {name: p.detach().clone() for name, p in whole(module).items()}
    ema._swap(module, use_average=False)  # now the raw weights
    return average, whole(module)


def write(name, text, folder):
    return train(name, text, save=folder / f"{name}.ckpt")


def resume_each(name, text, folder, sources):
    return [train(name, text, resume=folder / f"{source}.ckpt") for source in sources]


def off(result, straight):
    """The largest difference; a rank of a pipeline has some of the names."""
    pairs = zip(result, straight, strict=True)
    return max(
        furthest(actual, {name: expected[name] for name in actual}) for actual, expected in pairs
    )


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "topics.txt"
    path.write_text("".join(python_docs_text())[:3000])
    return path


@pytest.fixture(scope="module")
def written(text, tmp_path_factory):
    """A checkpoint of each layout after two steps, and what four steps come to."""
    from ranks import run_ranks

    folder = tmp_path_factory.mktemp("written")
    straight = train("single", text, save=folder / "single.ckpt")
    torch.save(straight, folder / "straight.pt")
    for name, (world, _) in LAYOUTS.items():
        if world > 1:
            for result in run_ranks(write, world, name, text, folder):
                assert off(result, straight) < 2e-6, name
    return folder, straight


def square(ranks, text, folder, name, sources):
    """How far each run that `name` continues is from one that was not cut."""
    straight, world = torch.load(folder / "straight.pt"), LAYOUTS[name][0]
    alone = [resume_each(name, text, folder, sources)] if world == 1 else None
    found = alone or ranks(resume_each, world, name, text, folder, sources)
    return {s: max(off(each[i], straight) for each in found) for i, s in enumerate(sources)}


NAMES = list(LAYOUTS)
SPANNING = {  # each layout continues its own, and those of two others
    name: [NAMES[(i + step) % len(NAMES)] for step in (0, 1, 3)] for i, name in enumerate(NAMES)
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_resumes_checkpoints_of_other_layouts(ranks, text, written, name):
    far = square(ranks, text, written[0], name, SPANNING[name])
    assert max(far.values()) < 2e-6, far


def as_table(far):
    """Rows: who wrote; columns: who went on."""
    lines = [["saved on", *LAYOUTS], ["---"] * (len(LAYOUTS) + 1)]
    lines += [[s, *(f"{far[name][s]:.0e}" for name in LAYOUTS)] for s in LAYOUTS]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


@pytest.mark.square
def test_any_layout_resumes_a_checkpoint_of_any_other(ranks, text, written):
    far = {name: square(ranks, text, written[0], name, NAMES) for name in LAYOUTS}
    page = PAGE.read_text()
    before, after = page.index("<!-- square -->"), page.index("<!-- /square -->")
    PAGE.write_text(f"{page[:before]}<!-- square -->\n{as_table(far)}\n{page[after:]}")
    assert max(far[name][s] for name in LAYOUTS for s in LAYOUTS) < 2e-6, far


def test_the_page_has_a_figure_for_each_pair():
    block = PAGE.read_text().partition("<!-- square -->")[2].partition("<!-- /square -->")[0]
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in block.split("\n")]
    header, _, *rows = [line for line in lines if len(line) > 1]
    assert header[1:] == [row[0] for row in rows] == NAMES
    assert max(float(cell) for row in rows for cell in row[1:]) < 2e-6


def test_a_folder_becomes_one_file_that_torch_reads(written, tmp_path, capsys):
    folder, _ = written
    target = tmp_path / "one.ckpt"
    words = ["export", f"--ckpt_path={folder / 'zero3 x tp 2x2.ckpt'}", f"--consolidate={target}"]
    assert main(words) == 0
    assert capsys.readouterr().out == f"written: {target}\n"
    actual = torch.load(target, weights_only=True)
    expected = torch.load(folder / "single.ckpt", weights_only=True)
    assert furthest(actual["state_dict"], expected["state_dict"]) < 2e-6
    assert furthest(actual["ema"]["raw"], expected["ema"]["raw"]) < 2e-6
    assert (
        actual["optimizer_states"][0]["state"].keys()
        == expected["optimizer_states"][0]["state"].keys()
    )
    assert main(words) == 2  # nothing is written over
    assert f"{target} already exists" in capsys.readouterr().err
    assert len(LanguageModel.load_from_checkpoint(target).generate("T", max_new_tokens=3)) == 4


def cut(name):
    return lambda folder: os.truncate(folder / name, 9)


def gone(name):
    return lambda folder: (folder / name).unlink()


def long_manifest(folder):
    (folder / "manifest.json").write_text("[" * 2**20)


DAMAGES = {
    "a part is missing": (gone("__1_0.distcp"), "its file __1_0.distcp is missing"),
    "a part is cut": (cut("__0_0.distcp"), "__0_0.distcp does not match its checksum"),
    "no manifest": (gone("manifest.json"), "it is incomplete: a folder without manifest.json"),
    "half a manifest": (cut("manifest.json"), "its manifest.json is damaged"),
    "a manifest without end": (long_manifest, "its manifest.json is longer than"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_an_incomplete_folder_is_refused_and_skipped(written, tmp_path, name):
    do, words = DAMAGES[name]
    shutil.copytree(written[0] / "zero3 2.ckpt", tmp_path / "step=1.ckpt")
    shutil.copytree(written[0] / "zero3 2.ckpt", tmp_path / "step=2.ckpt")
    os.utime(tmp_path / "step=1.ckpt", (0, 0))
    do(tmp_path / "step=2.ckpt")
    newest, damaged_paths = latest_valid_checkpoint(tmp_path)
    assert newest == tmp_path / "step=1.ckpt"
    assert words in damaged_paths[0][1]
    with pytest.raises(CheckpointError, match=words):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "step=2.ckpt")


def other_shapes(name, text, path, shape):
    with pytest.raises(CheckpointError) as refusal:
        train(name, text, resume=path, **shape)
    return str(refusal.value)


@pytest.mark.parametrize("source", ["zero3 4", "single"])
@pytest.mark.parametrize("name", ["zero3 2", "pp 2"])
def test_weights_of_another_architecture_are_refused_by_name(ranks, text, written, name, source):
    path = written[0] / f"{source}.ckpt"
    for said in ranks(other_shapes, 2, name, text, path, {"d_model": 32}):
        assert (
            "do not fit this LanguageModel: net.blocks.0.attention.key.weight is (32, 32)" in said
        )
        assert "in the module and (16, 16) in the checkpoint" in said
    for said in ranks(other_shapes, 2, name, text, path, {"num_layers": 3}):
        assert "net.blocks.2.attention.key.weight is only in the module" in said


@pytest.mark.parametrize("name", ["zero3 2", "pp 2"])
def test_blocks_that_only_the_checkpoint_has_are_not_ignored(ranks, text, tmp_path, name):
    train("single", text, save=tmp_path / "deep.ckpt", num_layers=3)
    for said in ranks(other_shapes, 2, name, text, tmp_path / "deep.ckpt", {}):
        assert "net.blocks.2.attention.key.weight is only in the checkpoint" in said


WORDS = [
    *(
        "fit",
        "--model=LanguageModel",
        "--model.num_layers=2",
        "--model.d_model=16",
        "--model.num_heads=4",
    ),
    *("--data=TextDataModule", "--data.context_length=16", "--trainer.accelerator=cpu"),
    *("--trainer.limit_val_batches=0", "--trainer.logger=false", "--trainer.max_steps=2"),
]


def command(folder, words):
    os.chdir(folder)
    return main(words)


def test_the_command_line_continues_a_file_on_stages(ranks, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [*WORDS, f"--data.path={text}", "--data.batch_size=8"]
    assert main(words) == 0
    words += ["--trainer.max_steps=4", "--ckpt_path=auto", "--trainer.devices=2"]
    assert ranks(command, 2, tmp_path, [*words, "--trainer.strategy=pp"]) == [0, 0]
    (path,) = tmp_path.rglob("step=000004.ckpt")
    assert torch.load(path, weights_only=True)["global_step"] == 4


def test_one_process_refuses_shards_of_another_architecture(written, text, capsys, tmp_path):
    path = written[0] / "zero3 2.ckpt"
    words = [*WORDS, f"--data.path={text}", f"--ckpt_path={path}", "--model.d_model=32"]
    assert command(tmp_path, words) == 2
    said = capsys.readouterr().err
    assert f"the weights in {path} do not fit this LanguageModel: " in said
    assert "  type: --ckpt_path=ANOTHER\n" in said


def test_an_index_that_would_run_a_program_is_not_read(written, tmp_path):
    shutil.copytree(written[0] / "zero3 2.ckpt", path := tmp_path / "evil.ckpt")
    (path / ".metadata").write_bytes(pickle.dumps(os.getcwd))
    with pytest.raises(CheckpointError, match=r"refers to posix.getcwd"):
        list(sharded_index.iter_tensor_entries(path))


def write_more_than_fits(path, num_weights):
    dist.init_process_group("gloo")
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))  # as on a full disk
    strategy = MeshStrategy(save_distributed_checkpoint=True)
    strategy.broadcast = lambda path: path
    checkpoint = {"state_dict": {"w": torch.ones(num_weights)}, "text": "x" * 100_000}
    with pytest.raises(CheckpointError) as caught:
        strategy.save_checkpoint(checkpoint, path)
    return str(caught.value), Path(path).exists()


@pytest.mark.parametrize("num_weights", [100_000, 10], ids=["shards", "meta.pt of rank 0"])
def test_a_folder_that_cannot_be_written_is_one_line_on_all_ranks(ranks, tmp_path, num_weights):
    path = str(tmp_path / "step=1.ckpt")
    for text, exists in ranks(write_more_than_fits, 2, path, num_weights):
        assert re.search(
            r"cannot be written \((no space left, or|File too large).*free space in", text
        )
        assert not exists
