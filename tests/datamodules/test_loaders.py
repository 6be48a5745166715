"""The stream of samples does not know how it is cut: into ranks, micro-batches or two runs."""

import itertools
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from ravine.datamodules.loaders import DataParallelInfo, EvalLoader, ResumableLoader
from ravine.datamodules.samplers import EpochSampler

LAYOUTS = [(1, 1), (2, 1), (1, 2), (4, 1), (2, 2), (3, 4)]  # ranks, accumulation


ONE_PROCESS = DataParallelInfo()


def loader(
    share: DataParallelInfo = ONE_PROCESS, replace: bool = True, **options: Any
) -> ResumableLoader:
    order = EpochSampler(7, 100, replacement=replace)
    return ResumableLoader(order, lambda i: i.tolist(), 62, 12, share, **options)


def world(size: int, accumulate: int) -> list[ResumableLoader]:
    return [loader(DataParallelInfo(rank, size, accumulate)) for rank in range(size)]


def stream(loaders: list[ResumableLoader], first: int = 0, steps: int | None = None) -> list[int]:
    """The samples of the whole world, from turn `first` to the third, in the order of the steps."""
    seen = []
    micro = None if steps is None else steps * loaders[0].data_parallel.accumulate
    for turn in range(first, 3):
        for one in loaders:
            one.set_epoch(turn)
        for parts in zip(*loaders, strict=True):
            seen += itertools.chain(*parts)
            if micro is not None and not (micro := micro - 1):
                return seen
    return seen


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_global_batches_are_the_same_on_any_layout(layout: tuple[int, int]) -> None:
    assert stream(world(*layout)) == stream([loader()])


def test_a_step_of_any_batch_size_takes_the_next_samples() -> None:
    order = EpochSampler(7, 100, replacement=True)
    by_three = ResumableLoader(order, lambda i: i.tolist(), 60, 3)
    assert list(itertools.chain(*by_three)) == list(itertools.chain(*loader()))


@pytest.mark.parametrize("before", LAYOUTS[:5])
@pytest.mark.parametrize("after", LAYOUTS[:5])
def test_every_layout_continues_the_order_of_another(
    before: tuple[int, int], after: tuple[int, int]
) -> None:
    whole = stream([loader()])
    for steps in range(1, 15):  # five an epoch
        cut, resumed = world(*before), world(*after)
        seen = stream(cut, steps=steps)
        states = [one.state_dict() for one in cut]
        assert all(state == states[0] for state in states)  # no rank has its own
        for one in resumed:
            one.load_state_dict(states[0])
        assert seen + stream(resumed, first=states[0]["trainer_epoch"]) == whole


def test_a_position_is_used_once() -> None:
    one = loader()
    one.load_state_dict({"epoch": 0, "num_consumed": 36, "trainer_epoch": 0})
    assert [len(list(one)) for _ in range(2)] == [2, 5]


def test_a_position_loaded_after_the_iterator_was_made_counts() -> None:
    one = loader()
    iterator = iter(one)  # as Lightning does when the number of steps is asked for early
    one.load_state_dict({"epoch": 0, "num_consumed": 48, "trainer_epoch": 0})
    assert len(list(iterator)) == 1


def test_a_position_inside_a_batch_of_this_run_is_refused() -> None:
    one = loader(DataParallelInfo(0, 1, 1))
    one.load_state_dict({"epoch": 0, "num_consumed": 18, "trainer_epoch": 0})
    with pytest.raises(
        ValueError, match=r"after 18 samples .* accumulate_grad_batches of the checkpoint$"
    ):
        next(iter(one))


def test_repeat_first_epoch_gives_the_first_epoch_again() -> None:
    one = loader(repeat_first_epoch=True)
    assert not hasattr(one, "sampler")
    assert list(one) == list(one) == list(loader())


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("batch", [1, 3, 8, 64])
def test_evaluation_covers_every_sample_once_with_equal_batches(size: int, batch: int) -> None:
    for samples in (size, size + 1, 2 * size - 1, 17, 64, 65):
        if samples < size:
            continue
        ranks = [
            EvalLoader(Tensor.tolist, samples, batch, DataParallelInfo(r, size))
            for r in range(size)
        ]
        assert len({len(rank) for rank in ranks}) == 1
        batches = [list(rank) for rank in ranks]
        assert all(len(b) == len(r) and all(b) for b, r in zip(batches, ranks, strict=True))
        assert sorted(itertools.chain(*itertools.chain(*batches))) == list(range(samples))
        if batch >= 2 * size:  # otherwise a batch may hold one sample more
            assert max(map(len, itertools.chain(*batches))) <= batch // size
        assert [list(rank) for rank in ranks] == batches  # again the same: no state
        assert not hasattr(ranks[0], "state_dict")


@pytest.mark.parametrize(
    ("batch", "share", "text"),
    [
        (10, DataParallelInfo(0, 4, 1), "4 ranks x 1 accumulated batches = 4 equal parts; "
                             "nearest: 8, 12; use batch_size=8"),
        (2, DataParallelInfo(0, 2, 2), "nearest: 4; use batch_size=4"),
        (101, DataParallelInfo(), "batch_size=101 is more than the 100 training samples; "
                       "allowed: at most 100; use batch_size=100"),
        (0, DataParallelInfo(), "batch_size=0 is not a positive integer; allowed: 1, 2, 3, ...; "
                       "use batch_size=32"),
        (-3, DataParallelInfo(), "batch_size=-3 is not a positive integer; allowed"),
    ],
)  # fmt: skip
def test_a_batch_that_cannot_be_divided_among_ranks_is_refused(
    batch: int, share: DataParallelInfo, text: str
) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the text follows
        ResumableLoader(EpochSampler(0, 100), lambda i: i, 100, batch, share)
    assert text in str(error.value)


def test_fewer_samples_than_ranks_are_refused() -> None:
    with pytest.raises(ValueError, match=r"2 samples .* 3 ranks.*; use Trainer\(devices=2\)$"):
        EvalLoader(lambda i: i, 2, 4, DataParallelInfo(0, 3))


def test_data_parallel_info_comes_from_the_strategy() -> None:
    mesh = SimpleNamespace(distributed_sampler_kwargs={"num_replicas": 2, "rank": 1})
    trainer = SimpleNamespace(strategy=mesh, accumulate_grad_batches=3, world_size=8, global_rank=5)
    assert DataParallelInfo.from_trainer(trainer) == DataParallelInfo(1, 2, 3)
    assert DataParallelInfo.from_trainer(None) == DataParallelInfo(0, 1, 1)
    assert DataParallelInfo.from_trainer(
        L.Trainer(accelerator="cpu", logger=False)
    ) == DataParallelInfo(0, 1, 1)


class Watcher(L.LightningModule):
    """Learns nothing and remembers which samples it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Linear(1, 1)
        self.seen: list[list[int]] = []

    def training_step(self, batch: list[int], index: int) -> Tensor:
        self.seen.append(batch)
        return self.weight(torch.ones(1, 1)).sum()

    def validation_step(self, batch: list[int], index: int) -> None: ...

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Data(L.LightningDataModule):
    def train_dataloader(self) -> ResumableLoader:
        order = EpochSampler(0, 22)
        return ResumableLoader(
            order, Tensor.tolist, 22, 4, DataParallelInfo.from_trainer(self.trainer)
        )

    def val_dataloader(self) -> EvalLoader:
        return EvalLoader(Tensor.tolist, 3, 2, DataParallelInfo.from_trainer(self.trainer))


class Saver(L.Callback):
    """Writes a file at every occasion there is; `files` says after how many micro-batches."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[Path, int] = {}

    def save(self, trainer: L.Trainer, module: Any, occasion: str) -> None:
        path = self.folder / f"{len(module.seen)}-{occasion}.ckpt"
        self.files[path] = len(module.seen)
        trainer.save_checkpoint(path)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
        self.save(trainer, pl_module, "batch")

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.save(trainer, pl_module, "validation")

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.save(trainer, pl_module, "epoch")


def fit(path: Path | None = None, *callbacks: L.Callback, **options: Any) -> list[list[int]]:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    trainer = L.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, callbacks=list(callbacks), **options,
    )  # fmt: skip
    module = Watcher()
    trainer.fit(module, datamodule=Data(), ckpt_path=path)
    return module.seen


@pytest.mark.parametrize(
    "options",
    [
        {"max_steps": 12},
        {"max_epochs": 3},
        {"max_steps": 6, "accumulate_grad_batches": 2},
        {"max_steps": 7, "limit_train_batches": 3},
    ],
    ids=str,
)
def test_a_stock_trainer_resumes_the_stream_wherever_it_was_cut(
    options: dict[str, int], tmp_path: Path
) -> None:
    saver = Saver(tmp_path)
    whole = fit(None, saver, **options)
    assert len(saver.files) > len(whole)
    for path, done in saver.files.items():
        if done < len(whole):
            assert (path.name, fit(path, **options)) == (path.name, whole[done:])


def test_new_loaders_in_every_epoch_continue_the_order() -> None:
    whole = fit(max_epochs=3)
    assert fit(max_epochs=3, reload_dataloaders_every_n_epochs=1) == whole


@pytest.mark.parametrize("state", [3, {}, {"epoch": 0, "num_consumed": "x", "trainer_epoch": 0}])
def test_a_position_of_another_form_is_refused(state):
    loader = ResumableLoader(EpochSampler(0, 8), lambda items: items, num_samples=8, batch_size=4)
    with pytest.raises(ValueError, match="the saved position in the data is"):
        loader.load_state_dict(state)
