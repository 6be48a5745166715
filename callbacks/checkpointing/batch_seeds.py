"""Seed the random generators for each batch of a torch DataLoader by (seed, epoch, batch index).

    main process    batch b:  seed generators, draw indices b, seed again, data[indices], collate
    worker          batch b:  the indices arrive with their seed; seed generators, data[indices]

The random numbers that a data set draws for a batch then depend on the batch alone. They do not
depend on the worker, on earlier batches or on the training steps between. A map-style loader can
therefore start an epoch at any batch: the sampler draws the indices of the skipped batches, and no
data are read.
"""

import copy
import itertools
import random
import struct
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy
import torch
from torch.utils.data import DataLoader, IterableDataset
from torch.utils.data._utils import fetch

DATA_ATTRIBUTES = (
    "dataset",
    "datasets",
    "sampler",
    "_sampler",
    "batch_sampler",
    "transform",
    "transforms",
)

GENERATOR_TYPES = (torch.Generator, random.Random, numpy.random.Generator, numpy.random.RandomState)


def hash_seed(*keys: int) -> int:
    """Hash integers to 32 bits, because torch's CPU generator keeps no more bits of a seed."""
    return zlib.crc32(struct.pack(f"<{len(keys)}Q", *(n % 2**64 for n in keys)))


def seed_default_generators(seed: int, device: torch.device | None = None) -> None:
    """Seed the default generators of torch, Python and NumPy.

    They are seeded directly, in 1 us: `torch.manual_seed` calls every backend and takes 124 us.
    """
    torch.default_generator.manual_seed(seed)
    if device is not None and device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(seed)
    random.seed(seed)
    numpy.random.seed(seed)


def snapshot_generators(device: torch.device) -> Callable[[], None]:
    """Save the states of the default generators; return a function that restores them."""
    states = torch.default_generator.get_state(), random.getstate(), numpy.random.get_state()
    cuda = torch.cuda.default_generators[device.index or 0] if device.type == "cuda" else None
    cuda_state = cuda.get_state() if cuda is not None else None

    def restore() -> None:
        torch.default_generator.set_state(states[0])
        random.setstate(states[1])
        numpy.random.set_state(states[2])
        if cuda is not None and cuda_state is not None:
            cuda.set_state(cuda_state)

    return restore


class SeededIndices(NamedTuple):
    """The indices of a batch, the seed of the batch and the seed of its epoch."""

    indices: Any
    seed: int
    epoch_seed: int


class BatchSeeder:
    """Gives seeds to the iterators of a DataLoader; the data set is not changed.

    Call `seeder = BatchSeeder.for_loader(loader)`, then `seeder.set_epoch(...)` before each
    iteration. An iteration without `set_epoch` continues the count of batches, because a shorter
    loader starts again within an epoch of a longer one.
    """

    def __init__(self, loader: DataLoader) -> None:
        """Replace `_get_iterator`, which creates the loader's iterators, until `remove`."""
        self.loader = loader
        self.seed, self.rank, self.epoch, self.first_batch = 0, 0, 0, 0
        self.stream_id, self.num_skip = 0, 0
        self.map_style = not isinstance(loader.dataset, IterableDataset)
        _shutdown_workers(loader)  # of an iterator created without seeds
        loader.__dict__["_get_iterator"] = self._make_iterator
        loader.__dict__["_batch_seeds"] = self

    @classmethod
    def for_loader(cls, loader: DataLoader) -> "BatchSeeder":
        """Return the BatchSeeder of the loader; create it if there is none."""
        existing = loader.__dict__.get("_batch_seeds")
        # a copy of a loader has a copy of this entry, which refers to the original loader
        return existing if existing is not None and existing.loader is loader else cls(loader)

    def set_epoch(
        self, stream_id: int, seed: int, rank: int, epoch: int, num_skip: int = 0
    ) -> None:
        """Set the key of the next iteration, and the number of batches to skip at its start."""
        self.stream_id, self.seed, self.rank, self.epoch, self.num_skip = (
            stream_id,
            seed,
            rank,
            epoch,
            num_skip,
        )
        self.first_batch = 0

    def remove(self) -> None:
        """Restore the loader's own `_get_iterator`."""
        _shutdown_workers(self.loader)
        for name in ("_get_iterator", "_batch_seeds"):
            self.loader.__dict__.pop(name, None)

    def _make_iterator(self) -> Any:
        """Return an iterator with seeds; torch's `DataLoader.__iter__` calls it in our loader.

        The iterator belongs to a copy of the loader, whose sampler and generator are replaced.
        """
        loader = copy.copy(self.loader)
        attributes = loader.__dict__  # assigned here, because DataLoader.__setattr__ forbids some
        for name in ("_get_iterator", "_batch_seeds"):  # set by `__init__` for the original
            attributes.pop(name)
        sampler_attribute = "sampler" if loader.batch_sampler is None else "batch_sampler"
        attributes[sampler_attribute] = _SeededSampler(self, attributes[sampler_attribute])
        seed = hash_seed(self.stream_id, self.seed, self.rank, self.epoch, self.first_batch)
        attributes["generator"] = torch.Generator().manual_seed(seed)  # torch seeds workers by it
        if loader.num_workers:
            attributes["worker_init_fn"] = _SeededWorkerInit(loader.worker_init_fn)
        # for a data set that draws numbers when its iterator is created
        seed_generators(seed, find_generators(loader.dataset))
        # torch's own method of the class, because the copy lacks the replacement
        iterator: Any = type(loader)._get_iterator(loader)
        if hasattr(iterator, "_dataset_fetcher"):  # without workers: the main process reads
            iterator._dataset_fetcher = _SeededFetcher(iterator._dataset_fetcher)
        return iterator


def _shutdown_workers(loader: Any) -> None:
    if loader._iterator is not None:  # persistent workers
        loader._iterator._shutdown_workers()
        loader._iterator = None


class _SeededSampler:
    """Wraps a sampler or batch sampler; seeds the generators of each batch and yields the seed."""

    def __init__(self, seeder: BatchSeeder, sampler: Any) -> None:
        self.seeder, self.sampler = seeder, sampler

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[SeededIndices]:
        """Start with the current settings; with persistent workers this is called once an epoch."""
        seeder = self.seeder
        return self._iter_batches(
            (seeder.stream_id, seeder.seed, seeder.epoch), seeder.rank, seeder.first_batch
        )

    def _iter_batches(
        self, key: tuple[int, ...], rank: int, first_batch: int
    ) -> Iterator[SeededIndices]:
        """Draw the indices of all batches and yield those after the batches to skip.

        Each item has the indices, the seed for reading them, and the seed of the epoch. The process
        that reads the data, main process or worker, uses both seeds.

        Args:
            key: what all ranks have in common: number of the loader, seed, epoch.
            rank: data-parallel rank; a part of the seeds of data, not of those of the order.
            first_batch: index of the first batch within the epoch. It is 0, or larger if a short
                loader starts again within the epoch of a longer one.
        """
        # `self.seeder` (BatchSeeder) has the settings of the loader. `num_skip`: batches to skip.
        # It is read at the first draw: an iterator with workers creates two of these generators
        # and draws from the second only.
        num_skip = self.seeder.num_skip
        self.seeder.num_skip = 0  # a further iteration skips nothing
        # A worker hashes it with its own number, and seeds an iterable data set by the result. So
        # it may be equal to a seed of the sampler below, as it is for rank 1.
        epoch_seed = hash_seed(*key, first_batch, rank)
        generators = find_generators(self.sampler)
        # the key has no rank: the sampler draws the same order on all ranks
        seed_generators(hash_seed(*key, first_batch), generators)
        sampler_iterator = iter(self.sampler)
        for batch in itertools.count(first_batch):
            seed_generators(hash_seed(*key, batch, 1), generators)  # 1: seeds of sampler draws
            try:
                batch_indices = next(sampler_iterator)
            except StopIteration:
                return
            # `set_epoch` sets it to 0 at the start of each epoch. A short loader that starts again
            # within the epoch continues from here.
            self.seeder.first_batch = batch + 1
            seed = hash_seed(*key, batch, 2, rank)  # 2: seeds of data
            seed_default_generators(seed)  # of the main process, for code that reads them there
            if batch - first_batch >= num_skip:
                yield SeededIndices(batch_indices, seed, epoch_seed)


class _SeededFetcher:
    """Wraps torch's fetcher of a data set in the main process; seeds the generators per batch."""

    def __init__(self, fetcher: Any) -> None:
        self.fetcher = fetcher
        self.generators = find_generators(fetcher.dataset, fetcher.collate_fn)

    def fetch(self, batch: SeededIndices) -> Any:
        seed_generators(batch.seed, self.generators)
        return self.fetcher.fetch(batch.indices)


class _SeededWorkerInit:
    """A `worker_init_fn` that makes the fetchers of the worker accept SeededIndices."""

    def __init__(self, init_fn: Callable[[int], None] | None) -> None:
        self.init_fn = init_fn

    def __call__(self, worker_id: int) -> None:
        if self.init_fn is not None:
            self.init_fn(worker_id)
        for fetcher_class in (fetch._MapDatasetFetcher, fetch._IterableDatasetFetcher):
            _patch_fetcher(fetcher_class, worker_id)


def _patch_fetcher(fetcher_class: Any, worker_id: int) -> None:
    """Make torch's fetcher class take SeededIndices and seed the generators for each batch.

    Called in a worker process, which ends with its loader, so nothing is restored.
    """
    # returns the data of a batch, given its indices
    original_fetch = fetcher_class.fetch
    is_iterable = fetcher_class is fetch._IterableDatasetFetcher

    def fetch_seeded(self: Any, batch: SeededIndices) -> Any:
        generators = self.__dict__.get("generators")
        if generators is None:  # the first batch of this fetcher
            generators = self.generators = find_generators(self.dataset, self.collate_fn)
            if is_iterable:  # its seed is that of the epoch, which comes with the first batch
                seed_generators(hash_seed(batch.epoch_seed, worker_id), generators)
                self.dataset_iter = iter(self.dataset)
        seed_generators(batch.seed, generators)
        return original_fetch(self, batch.indices)

    # For an iterable data set: torch's own `__init__` would create the iterator, before the
    # generators are seeded. The arguments are those of torch.
    def init_without_iterator(
        self: Any, dataset: Any, auto_collation: bool, collate_fn: Any, drop_last: bool
    ) -> None:
        fetch._BaseDatasetFetcher.__init__(self, dataset, auto_collation, collate_fn, drop_last)
        self.ended = False  # as torch's own `__init__` sets it

    fetcher_class.fetch = fetch_seeded
    if is_iterable:
        fetcher_class.__init__ = init_without_iterator


def seed_generators(seed: int, generators: list[Any]) -> None:
    """Seed the default generators and the given generators of data sets or samplers."""
    seed_default_generators(seed)
    for generator in generators:
        _seed_generator(generator, seed)


def find_generators(*owners: Any) -> list[Any]:
    """Return the random generators of objects and of their data sets, samplers and transforms."""
    generators, pending, seen = [], list(owners), set()
    while pending:
        owner = pending.pop()
        if id(owner) in seen or not hasattr(owner, "__dict__"):
            continue
        seen.add(id(owner))
        for name, value in vars(owner).items():
            if isinstance(value, GENERATOR_TYPES):
                generators.append(value)
            elif name in DATA_ATTRIBUTES:
                pending += value if isinstance(value, list | tuple) else [value]
    return generators


def _seed_generator(generator: Any, seed: int) -> None:
    if isinstance(generator, torch.Generator):
        generator.manual_seed(seed)
    elif isinstance(generator, numpy.random.Generator):
        bits = generator.bit_generator
        bits.state = type(bits)(seed).state
    else:  # random.Random and numpy's RandomState
        generator.seed(seed)
