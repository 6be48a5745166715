"""Ranks that load one checkpoint divide its checksums, refuse it alike, and copy their shard."""

import json
import os
import shutil
import struct
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from tensor_bytes import tensor_bytes
from torch import nn
from torch.distributed.tensor import DTensor

from ravine.cli import resume_path
from ravine.cli.trainer import Trainer
from ravine.strategies import AtomicCheckpointIO, CheckpointError, MeshStrategy
from ravine.strategies.checkpoint import (
    atomic_io,
    sharded_index,
    zip_archive,
)
from ravine.strategies.checkpoint.atomic_io import collective_loading, find_damage

WIDTH, LAYERS = 256, 6
MIB = 2**20


class Task(L.LightningModule):
    """Several matrices, one of which two layers share, and AdamW."""

    def __init__(self, tied=True):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))
        self.table = nn.Embedding(2 * WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, 2 * WIDTH, bias=False)
        if tied:
            self.head.weight = self.table.weight

    def training_step(self, batch, *_):
        x = self.table(batch).mean(1)
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x).square().mean()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)

    def train_dataloader(self):
        data: Any = torch.arange(64).view(16, 4)
        return torch.utils.data.DataLoader(data, batch_size=4)


def trainer(strategy, **options):
    return L.Trainer(
        accelerator="cpu",
        devices=options.pop("devices", 1),
        strategy=strategy,
        logger=False,
        max_steps=options.pop("max_steps", 2),
        plugins=[AtomicCheckpointIO()],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        **options,
    )


def mesh(folder=False, **degrees):
    return MeshStrategy(save_distributed_checkpoint=folder, **degrees)


def saved(path, strategy: Any = "auto", devices=1):
    L.seed_everything(0, verbose=False)
    run = trainer(strategy, devices=devices)
    run.fit(Task())
    with tensor_bytes() as found:
        run.save_checkpoint(path)
    return found.peak


def save_on(path, folder):
    return saved(path, mesh(folder), 2)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The same run as one file of one process, and as a file and a folder of two ranks."""
    from ranks import run_ranks

    folder = tmp_path_factory.mktemp("files")
    saved(folder / "single.ckpt")
    peaks = {
        "zero3.ckpt": run_ranks(save_on, 2, folder / "zero3.ckpt", False),
        "parts.ckpt": run_ranks(save_on, 2, folder / "parts.ckpt", True),
    }
    (folder / "peaks.json").write_text(json.dumps(peaks))
    return folder


class Resumed(Exception):
    pass


class Stop(L.Callback):
    def on_train_start(self, trainer, module):
        raise Resumed


def load_counted(path, strategy, degrees):
    """Load a checkpoint; the records that this rank compared, and the bytes of its tensors."""
    compared = []
    broken, different_checksum = (
        zip_archive.find_corrupt_record,
        sharded_index.find_checksum_mismatch,
    )

    def counted(table, names):
        compared.extend(name for name in names if "/data/" in name)
        return broken(table, names)

    def counted_parts(folder, names=None):
        compared.extend(sharded_index.tensor_file_sizes(folder) if names is None else names)
        return different_checksum(folder, names)

    zip_archive.find_corrupt_record, sharded_index.find_checksum_mismatch = counted, counted_parts
    if strategy == "mesh":
        run = trainer(mesh(**degrees), devices=2, callbacks=[Stop()], max_steps=4)
    else:
        os.chdir(path.parent)
        quiet: dict[str, Any] = {"enable_model_summary": False, "logger": False}
        run = Trainer(
            accelerator="cpu",
            devices=2,
            strategy=strategy,
            callbacks=[Stop()],
            max_steps=4,
            **quiet,
        )
    module, peaks = Task(), []
    load = run.strategy.load_checkpoint

    def measured(*args, **options):
        with tensor_bytes() as found:
            checkpoint = load(*args, **options)
        peaks.append((found.peak, found.rest))
        return checkpoint

    run.strategy.load_checkpoint = measured
    with suppress(Resumed):
        run.fit(module, ckpt_path=path)
    own = [p.to_local() if isinstance(p, DTensor) else p for p in module.parameters()]
    share = 4 * sum(p.numel() for p in own)
    maps = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(path) in line]
    return compared, peaks[0], share, maps


def tensor_sizes(path):
    """Bytes of each record of tensor data in a file."""
    with zipfile.ZipFile(path) as table:
        return {e.filename: e.file_size for e in table.infolist() if "/data/" in e.filename}


def divided(compared, sizes):
    """Each part is compared by one rank; ranks differ by one part at most."""
    assert sorted(each for rank in compared for each in rank) == sorted(sizes)
    bytes_of = [sum(sizes[each] for each in rank) for rank in compared]
    assert max(bytes_of) - min(bytes_of) <= max(sizes.values())


@pytest.mark.parametrize("name", ["single.ckpt", "zero3.ckpt", "parts.ckpt"])
def test_each_record_is_verified_by_one_rank_which_keeps_only_its_shard(ranks, files, name):
    found = ranks(load_counted, 2, files / name, "mesh", {})
    if name == "parts.ckpt":
        every = sharded_index.tensor_file_sizes(files / name)
        assert all(each.endswith(".distcp") for each in every)
        compared = [[each for each in rank[0] if each in every] for rank in found]
    else:
        every, compared = tensor_sizes(files / name), [rank[0] for rank in found]
    divided(compared, every)
    for _, (peak, rest), share, maps in found:
        # two moments of AdamW; the weights were there
        assert 1.9 * share < rest < 2.1 * share + MIB // 4
        assert peak < 1.3 * 2 * share + MIB // 4
        assert maps == []


def test_ranks_of_ddp_divide_the_checksums_and_copy_their_tensors(ranks, files):
    """The weights are copied out of the file's pages, and the states are read."""
    found = ranks(load_counted, 2, files / "single.ckpt", "ddp", {})
    divided([rank[0] for rank in found], tensor_sizes(files / "single.ckpt"))
    for _, (peak, rest), share, maps in found:
        assert 1.9 * share < rest <= peak < 2.1 * share + MIB // 4
        assert maps == []


def test_only_the_writing_rank_of_a_single_file_holds_all_tensors(files):
    peaks = json.loads((files / "peaks.json").read_text())
    whole = (files / "single.ckpt").stat().st_size
    assert max(peaks["parts.ckpt"]) < whole / 16
    first, second = peaks["zero3.ckpt"]
    assert second < whole / 16
    assert first < whole + 4 * 2 * WIDTH * WIDTH  # a message of the largest tensor beside it


@pytest.mark.parametrize("name", ["zero3.ckpt", "parts.ckpt"])
def test_tied_weights_are_stored_once(files, name):
    def size(path):
        parts = path.iterdir() if path.is_dir() else [path]
        return sum(each.stat().st_size for each in parts)

    one = size(files / "single.ckpt")
    tied = 4 * 2 * WIDTH * WIDTH
    assert abs(size(files / name) - one) < tied / 2  # an archive around each part of a folder
    state = AtomicCheckpointIO().load_checkpoint(files / name)["state_dict"]
    first, second = state["table.weight"], state["head.weight"]
    assert first.data_ptr() == second.data_ptr()
    alone = torch.load(files / "single.ckpt", weights_only=True)["state_dict"]
    assert all(torch.allclose(state[key], alone[key], atol=1e-6) for key in alone)


def refused(path):
    run = trainer(mesh(), devices=2)
    with pytest.raises(CheckpointError) as error:
        run.fit(Task(), ckpt_path=path)
    return str(error.value)


@pytest.mark.parametrize("name", ["zero3.ckpt", "parts.ckpt"])
def test_a_flipped_byte_in_any_record_is_refused_by_all_ranks_alike(ranks, files, tmp_path, name):
    said = ranks(refuse_each, 2, files / name, tmp_path)
    assert said[0] == said[1]
    assert all("does not match its checksum" in line for line in said[0])


def refuse_each(source, folder):
    """What this rank says of copies of a checkpoint, in each of which one record is changed."""
    if source.is_dir():
        places = dict.fromkeys(sharded_index.tensor_file_sizes(source), 0)
    else:
        with zipfile.ZipFile(source) as table:
            found = [each for each in table.infolist() if "/data/" in each.filename]
        content = source.read_bytes()
        places = {  # the middle of each record's numbers: 26 bytes into its header are two lengths
            each.filename: each.header_offset
            + 30
            + sum(struct.unpack_from("<HH", content, each.header_offset + 26))
            + each.file_size // 2
            for each in found
        }
    rank, said = int(os.environ["RANK"]), []
    for number, name in enumerate(list(places)[:: max(1, len(places) // 4)]):
        path = folder / f"{number}.ckpt"
        if rank == 0:
            if source.is_dir():
                shutil.copytree(source, path)
                flip(path / name, (path / name).stat().st_size // 2)
            else:
                shutil.copy(source, path)
                flip(path, places[name])
            (folder / f"{number}.ready").touch()
        while not (folder / f"{number}.ready").exists():
            pass
        said.append(refused(path))
    return said


def load_replaced(path, other, times):
    """Load a file that is another one whenever rank 1 opens it, so many times."""
    dist.init_process_group("gloo")
    opened, left = atomic_io._open_regular_file, [other] * times

    def replaced(calls):
        return opened(left.pop() if left and dist.get_rank() == 1 else calls)

    atomic_io._open_regular_file = replaced
    try:
        with collective_loading():
            return AtomicCheckpointIO().load_checkpoint(path)["epoch"]
    except CheckpointError as error:
        return str(error)


def test_a_file_that_is_replaced_while_ranks_open_it_is_opened_again(ranks, tmp_path):
    for name, epoch in (("a.ckpt", 1), ("b.ckpt", 2)):
        content = {"state_dict": {"w": torch.ones(epoch)}, "epoch": epoch}
        AtomicCheckpointIO().save_checkpoint(content, tmp_path / name)
    files = tmp_path / "a.ckpt", tmp_path / "b.ckpt"
    assert ranks(load_replaced, 2, *files, atomic_io.MAX_OPEN_ATTEMPTS - 1) == [1, 1]
    said = ranks(load_replaced, 2, *files, atomic_io.MAX_OPEN_ATTEMPTS)
    assert said[0] == said[1]
    assert "another program replaced it while the ranks opened it" in said[0]


def flip(path, place):
    with path.open("rb+") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 0xFF]))


def test_sections_that_are_mapped_cost_nothing_and_survive_a_replaced_file(files, tmp_path):
    path = tmp_path / "a.ckpt"
    shutil.copy(files / "single.ckpt", path)
    whole = AtomicCheckpointIO().load_checkpoint(path)
    with (
        tensor_bytes() as found,
        collective_loading(mapped_sections=("state_dict", "optimizer_states")),
    ):
        mapped = AtomicCheckpointIO().load_checkpoint(path)
    assert found.peak < MIB // 8
    AtomicCheckpointIO().save_checkpoint({"state_dict": {}}, path)
    path.unlink()
    for name, value in whole["state_dict"].items():
        assert torch.equal(mapped["state_dict"][name], value)
    mapped["state_dict"]["table.weight"].zero_()  # pages of its own: nothing else changes
    assert mapped["state_dict"]["head.weight"].abs().sum() == 0  # tied, as in the file


def test_a_loaded_checkpoint_may_be_written_over_its_file(files, tmp_path):
    path = tmp_path / "a.ckpt"
    shutil.copy(files / "single.ckpt", path)
    checkpoint = AtomicCheckpointIO().load_checkpoint(path)
    torch.save(checkpoint | {"epoch": 7}, path)
    assert find_damage(path) is None
    assert AtomicCheckpointIO().load_checkpoint(path)["epoch"] == 7


def settle_counted(folder, words, own_store, wrong):
    """What `--ckpt_path=auto` becomes on this rank, and the records that it has compared."""
    if own_store:  # as under srun: the launcher has no store
        os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"
        # a node that lost a rank counts a start more than the other
        os.environ["TORCHELASTIC_RESTART_COUNT"] = os.environ["RANK"]
    rank = int(os.environ["RANK"])
    if wrong is not None and rank == wrong:
        words = [*words, "--ckpt_path=null"]
    os.chdir(folder)
    compared, broken = [], zip_archive.find_corrupt_record

    def counted(table, names):
        compared.extend(name for name in names if "/data/" in name)
        return broken(table, names)

    zip_archive.find_corrupt_record = counted
    try:
        path = resume_path.resolve_argv(words)[1]
    except ValueError as error:
        return str(error), len(compared)
    return str(path), len(compared)


@pytest.mark.parametrize("own_store", [False, True])
def test_auto_reads_files_on_one_rank_and_all_ranks_use_its_choice(
    ranks, files, tmp_path, own_store
):
    folder = tmp_path / "runs" / "a" / "version_0" / "checkpoints"
    folder.mkdir(parents=True)
    shutil.copy(files / "single.ckpt", folder / "old.ckpt")
    shutil.copy(files / "single.ckpt", folder / "new.ckpt")
    os.utime(folder / "old.ckpt", (0, 0))
    content = bytearray((folder / "new.ckpt").read_bytes())
    content[len(content) // 2] ^= 0xFF
    (folder / "new.ckpt").write_bytes(content)
    words = ["fit", "--trainer.name=a", "--ckpt_path=auto"]
    first, *rest = ranks(settle_counted, 3, tmp_path, words, own_store, None)
    assert first[0] == "runs/a/version_0/checkpoints/old.ckpt"
    assert first[1] > 20  # both files
    assert rest == [(first[0], 0)] * 2
    words = ["test", "--trainer.name=b", "--ckpt_path=last"]
    said = ranks(settle_counted, 2, tmp_path, words, own_store, None)
    assert said[0] == said[1]
    assert "there is no checkpoint in runs/b" in said[0][0]
    if own_store:  # which ends with rank 0
        return
    said = ranks(settle_counted, 2, tmp_path, words, own_store, 0)
    assert said[1][0].startswith("rank 1 has --ckpt_path=auto or last, but rank 0 has not")
