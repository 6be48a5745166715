"""Fetch each batch of a torch DataLoader under a seed of (seed, epoch, batch index).

    main process    batch b:  seed generators, draw indices b, seed again, data[indices], collate
    worker          batch b:  the indices arrive with their seed; seed generators, data[indices]

What a data set draws for a batch then depends on the batch alone: not on the worker that fetches
it, on the batches before it or on the training step between. So a map-style loader can begin an
epoch at any batch: the sampler draws the indices of the batches before it, and no data are read.
"""

import copy
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
    """A hash of integers in 32 bits, because torch's CPU generator keeps no more."""
    return zlib.crc32(struct.pack(f"<{len(keys)}Q", *(n % 2**64 for n in keys)))


def seed_default_generators(seed: int, device: torch.device | None = None) -> None:
    """Seed the default generators of torch, Python and NumPy.

    They are set directly: `torch.manual_seed` calls every backend and takes 124 us instead of 1.
    """
    torch.default_generator.manual_seed(seed)
    if device is not None and device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(seed)
    random.seed(seed)
    numpy.random.seed(seed)


def snapshot_generators(device: torch.device) -> Callable[[], None]:
    """Remember the default generators; the function returned puts them back."""
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


class BatchSeeds:
    """Gives a DataLoader's iterators the seeds; its data set stays as it is.

    `seeds = BatchSeeds.of(loader)`, then `seeder.set_epoch(...)` before each iteration. An
    iteration without `set_epoch` continues the count of batches: a shorter loader starts again
    within an epoch of a longer one.
    """

    def __init__(self, loader: DataLoader) -> None:
        """Replace the method by which the loader makes its iterators, until `remove`."""
        self.loader = loader
        self.seed, self.rank, self.epoch, self.first_batch = 0, 0, 0, 0
        self.stream_id, self.num_skip = 0, 0
        self.map_style = not isinstance(loader.dataset, IterableDataset)
        _shutdown_workers(loader)  # of an iterator made without seeds
        loader.__dict__["_get_iterator"] = self._make_iterator
        loader.__dict__["_batch_seeds"] = self

    @classmethod
    def for_loader(cls, loader: DataLoader) -> "BatchSeeds":
        """Those of the loader, made if it has none."""
        existing = loader.__dict__.get("_batch_seeds")
        # a copy of a loader has the dictionary of the first one
        return existing if existing is not None and existing.loader is loader else cls(loader)

    def set_epoch(
        self, stream_id: int, seed: int, rank: int, epoch: int, num_skip: int = 0
    ) -> None:
        """Set the key of the next iteration, and how many batches to skip at its start."""
        self.stream_id, self.seed, self.rank, self.epoch, self.num_skip = (
            stream_id,
            seed,
            rank,
            epoch,
            num_skip,
        )
        self.first_batch = 0

    def remove(self) -> None:
        """Restore the loader's own method."""
        _shutdown_workers(self.loader)
        for name in ("_get_iterator", "_batch_seeds"):
            self.loader.__dict__.pop(name, None)

    def _make_iterator(self) -> Any:
        loader = copy.copy(self.loader)
        attributes = loader.__dict__  # DataLoader forbids some assignments
        for name in ("_get_iterator", "_batch_seeds"):
            attributes.pop(name)
        sampler_attribute = "sampler" if loader.batch_sampler is None else "batch_sampler"
        attributes[sampler_attribute] = _SeededSampler(self, attributes[sampler_attribute])
        seed = hash_seed(self.stream_id, self.seed, self.rank, self.epoch, self.first_batch)
        attributes["generator"] = torch.Generator().manual_seed(seed)
        if loader.num_workers:
            attributes["worker_init_fn"] = _SeededWorkerInit(loader.worker_init_fn)
        seed_generators(seed, find_generators(loader.dataset))
        iterator: Any = type(loader)._get_iterator(loader)
        if hasattr(iterator, "_dataset_fetcher"):
            iterator._dataset_fetcher = _SeededFetcher(iterator._dataset_fetcher)
        return iterator


def _shutdown_workers(loader: Any) -> None:
    if loader._iterator is not None:  # persistent workers
        loader._iterator._shutdown_workers()
        loader._iterator = None


class _SeededSampler:
    """A sampler or batch sampler that draws each batch under its seed and yields both."""

    def __init__(self, seeder: BatchSeeds, sampler: Any) -> None:
        self.seeder, self.sampler = seeder, sampler

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[SeededIndices]:
        """Begin with the present settings: persistent workers call this once an epoch."""
        seeder = self.seeder
        return self._iter_batches(
            (seeder.stream_id, seeder.seed, seeder.epoch), seeder.rank, seeder.first_batch
        )

    def _iter_batches(
        self, key: tuple[int, ...], rank: int, first_batch: int
    ) -> Iterator[SeededIndices]:
        # read here: an iterator with workers makes two of these and draws from the second only
        num_skip, self.seeder.num_skip = self.seeder.num_skip, 0
        epoch_seed = hash_seed(*key, first_batch, rank)
        generators = find_generators(self.sampler)
        seed_generators(
            hash_seed(*key, first_batch), generators
        )  # of all ranks: they share one order
        indices = iter(self.sampler)
        for batch in range(first_batch, 2**62):
            seed_generators(hash_seed(*key, batch, 1), generators)
            try:
                batch_indices = next(indices)
            except StopIteration:
                return
            self.seeder.first_batch = batch + 1
            seed = hash_seed(*key, batch, 2, rank)
            seed_default_generators(seed)
            if batch - first_batch >= num_skip:
                yield SeededIndices(batch_indices, seed, epoch_seed)


class _SeededFetcher:
    """torch's fetcher of a data set, in this process."""

    def __init__(self, fetcher: Any) -> None:
        self.fetcher = fetcher
        self.generators = find_generators(fetcher.dataset, fetcher.collate_fn)

    def fetch(self, batch: SeededIndices) -> Any:
        seed_generators(batch.seed, self.generators)
        return self.fetcher.fetch(batch.indices)


class _SeededWorkerInit:
    """A `worker_init_fn` that makes the worker's fetchers accept batches with their seed."""

    def __init__(self, init_fn: Callable[[int], None] | None) -> None:
        self.init_fn = init_fn

    def __call__(self, worker_id: int) -> None:
        if self.init_fn is not None:
            self.init_fn(worker_id)
        for fetcher_class in (fetch._MapDatasetFetcher, fetch._IterableDatasetFetcher):
            _patch_fetcher(fetcher_class, worker_id)


def _patch_fetcher(fetcher_class: Any, worker_id: int) -> None:
    """Change a fetcher class, in a worker process that ends with its loader."""
    original_fetch, is_iterable = (
        fetcher_class.fetch,
        fetcher_class is fetch._IterableDatasetFetcher,
    )

    def fetch_seeded(self: Any, batch: SeededIndices) -> Any:
        generators = self.__dict__.get("generators")
        if generators is None:
            generators = self.generators = find_generators(self.dataset, self.collate_fn)
            if is_iterable:  # now that the epoch is known
                seed_generators(hash_seed(batch.epoch_seed, worker_id), generators)
                self.dataset_iter = iter(self.dataset)
        seed_generators(batch.seed, generators)
        return original_fetch(self, batch.indices)

    def init_fetcher(
        self: Any, dataset: Any, auto_collation: bool, collate: Any, drop: bool
    ) -> None:
        fetch._BaseDatasetFetcher.__init__(self, dataset, auto_collation, collate, drop)
        self.ended = False

    fetcher_class.fetch = fetch_seeded
    if is_iterable:
        fetcher_class.__init__ = init_fetcher


def seed_generators(seed: int, generators: list[Any]) -> None:
    """Seed the default generators, and those that a data set or a sampler keeps."""
    seed_default_generators(seed)
    for generator in generators:
        _seed_generator(generator, seed)


def find_generators(*owners: Any) -> list[Any]:
    """Those of the objects, and of the data sets, samplers and transforms that they hold."""
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
