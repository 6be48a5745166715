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

DATA = ("dataset", "datasets", "sampler", "_sampler", "batch_sampler", "transform", "transforms")

GENERATORS = (torch.Generator, random.Random, numpy.random.Generator, numpy.random.RandomState)


def seed_of(*numbers: int) -> int:
    """A hash of integers in 32 bits, because torch's CPU generator keeps no more."""
    return zlib.crc32(struct.pack(f"<{len(numbers)}Q", *(n % 2**64 for n in numbers)))


def set_generators(number: int, device: torch.device | None = None) -> None:
    """Seed the default generators of torch, Python and NumPy.

    They are set directly: `torch.manual_seed` calls every backend and takes 124 us instead of 1.
    """
    torch.default_generator.manual_seed(number)
    if device is not None and device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(number)
    random.seed(number)
    numpy.random.seed(number)


def keep_generators(device: torch.device) -> Callable[[], None]:
    """Remember the default generators; the function returned puts them back."""
    states = torch.default_generator.get_state(), random.getstate(), numpy.random.get_state()
    cuda = torch.cuda.default_generators[device.index or 0] if device.type == "cuda" else None
    there = cuda.get_state() if cuda is not None else None

    def restore() -> None:
        torch.default_generator.set_state(states[0])
        random.setstate(states[1])
        numpy.random.set_state(states[2])
        if cuda is not None and there is not None:
            cuda.set_state(there)

    return restore


class Seeded(NamedTuple):
    """The indices of a batch, the seed of the batch and the seed of its epoch."""

    indices: Any
    number: int
    epoch: int


class BatchSeeds:
    """Gives a DataLoader's iterators the seeds; its data set stays as it is.

    `seeds = BatchSeeds.of(loader)`, then `seeds.begin(...)` before each iteration. An iteration
    without `begin` continues the count of batches: a shorter loader starts again within an epoch
    of a longer one.
    """

    def __init__(self, loader: DataLoader) -> None:
        """Replace the method by which the loader makes its iterators, until `remove`."""
        self.loader = loader
        self.seed, self.rank, self.epoch, self.first = 0, 0, 0, 0
        self.kind, self.skip = 0, 0
        self.map_style = not isinstance(loader.dataset, IterableDataset)
        _end_workers(loader)  # of an iterator made without seeds
        loader.__dict__["_get_iterator"] = self._iterator
        loader.__dict__["_batch_seeds"] = self

    @classmethod
    def of(cls, loader: DataLoader) -> "BatchSeeds":
        """Those of the loader, made if it has none."""
        present = loader.__dict__.get("_batch_seeds")
        # a copy of a loader has the dictionary of the first one
        return present if present is not None and present.loader is loader else cls(loader)

    def begin(self, kind: int, seed: int, rank: int, epoch: int, skip: int = 0) -> None:
        """Set the key of the next iteration, and how many batches to skip at its start."""
        self.kind, self.seed, self.rank, self.epoch, self.skip = kind, seed, rank, epoch, skip
        self.first = 0

    def remove(self) -> None:
        """Restore the loader's own method."""
        _end_workers(self.loader)
        for name in ("_get_iterator", "_batch_seeds"):
            self.loader.__dict__.pop(name, None)

    def _iterator(self) -> Any:
        loader = copy.copy(self.loader)
        attributes = loader.__dict__  # DataLoader forbids some assignments
        for name in ("_get_iterator", "_batch_seeds"):
            attributes.pop(name)
        batched = "sampler" if loader.batch_sampler is None else "batch_sampler"
        attributes[batched] = _Indices(self, attributes[batched])
        number = seed_of(self.kind, self.seed, self.rank, self.epoch, self.first)
        attributes["generator"] = torch.Generator().manual_seed(number)
        if loader.num_workers:
            attributes["worker_init_fn"] = _SeedWorker(loader.worker_init_fn)
        seed_all(number, _generators(loader.dataset))
        iterator: Any = type(loader)._get_iterator(loader)
        if hasattr(iterator, "_dataset_fetcher"):
            iterator._dataset_fetcher = _SeededFetcher(iterator._dataset_fetcher)
        return iterator


def _end_workers(loader: Any) -> None:
    if loader._iterator is not None:  # persistent workers
        loader._iterator._shutdown_workers()
        loader._iterator = None


class _Indices:
    """A sampler or batch sampler that draws each batch under its seed and yields both."""

    def __init__(self, seeds: BatchSeeds, inner: Any) -> None:
        self.seeds, self.inner = seeds, inner

    def __len__(self) -> int:
        return len(self.inner)

    def __iter__(self) -> Iterator[Seeded]:
        """Begin with the present settings: persistent workers call this once an epoch."""
        seeds = self.seeds
        return self._draw((seeds.kind, seeds.seed, seeds.epoch), seeds.rank, seeds.first)

    def _draw(self, key: tuple[int, ...], rank: int, first: int) -> Iterator[Seeded]:
        # read here: an iterator with workers makes two of these and draws from the second only
        skip, self.seeds.skip = self.seeds.skip, 0
        epoch = seed_of(*key, first, rank)
        generators = _generators(self.inner)
        seed_all(seed_of(*key, first), generators)  # of all ranks: they share one order
        indices = iter(self.inner)
        for batch in range(first, 2**62):
            seed_all(seed_of(*key, batch, 1), generators)
            try:
                drawn = next(indices)
            except StopIteration:
                return
            self.seeds.first = batch + 1
            number = seed_of(*key, batch, 2, rank)
            set_generators(number)
            if batch - first >= skip:
                yield Seeded(drawn, number, epoch)


class _SeededFetcher:
    """torch's fetcher of a data set, in this process."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.generators = _generators(inner.dataset, inner.collate_fn)

    def fetch(self, batch: Seeded) -> Any:
        seed_all(batch.number, self.generators)
        return self.inner.fetch(batch.indices)


class _SeedWorker:
    """A `worker_init_fn` that makes the worker's fetchers accept batches with their seed."""

    def __init__(self, inner: Callable[[int], None] | None) -> None:
        self.inner = inner

    def __call__(self, worker: int) -> None:
        if self.inner is not None:
            self.inner(worker)
        for kind in (fetch._MapDatasetFetcher, fetch._IterableDatasetFetcher):
            _patch_fetcher(kind, worker)


def _patch_fetcher(kind: Any, worker: int) -> None:
    """Change a fetcher class, in a worker process that ends with its loader."""
    plain, iterable = kind.fetch, kind is fetch._IterableDatasetFetcher

    def fetch_seeded(self: Any, batch: Seeded) -> Any:
        generators = self.__dict__.get("generators")
        if generators is None:
            generators = self.generators = _generators(self.dataset, self.collate_fn)
            if iterable:  # now that the epoch is known
                seed_all(seed_of(batch.epoch, worker), generators)
                self.dataset_iter = iter(self.dataset)
        seed_all(batch.number, generators)
        return plain(self, batch.indices)

    def begin(self: Any, dataset: Any, auto_collation: bool, collate: Any, drop: bool) -> None:
        fetch._BaseDatasetFetcher.__init__(self, dataset, auto_collation, collate, drop)
        self.ended = False

    kind.fetch = fetch_seeded
    if iterable:
        kind.__init__ = begin


def seed_all(number: int, generators: list[Any]) -> None:
    """Seed the default generators, and those that a data set or a sampler keeps."""
    set_generators(number)
    for generator in generators:
        _reseed(generator, number)


def _generators(*owners: Any) -> list[Any]:
    """Those of the objects, and of the data sets, samplers and transforms that they hold."""
    found, waiting, seen = [], list(owners), set()
    while waiting:
        owner = waiting.pop()
        if id(owner) in seen or not hasattr(owner, "__dict__"):
            continue
        seen.add(id(owner))
        for name, value in vars(owner).items():
            if isinstance(value, GENERATORS):
                found.append(value)
            elif name in DATA:
                waiting += value if isinstance(value, list | tuple) else [value]
    return found


def _reseed(generator: Any, number: int) -> None:
    if isinstance(generator, torch.Generator):
        generator.manual_seed(number)
    elif isinstance(generator, numpy.random.Generator):
        bits = generator.bit_generator
        bits.state = type(bits)(number).state
    else:  # random.Random and numpy's RandomState
        generator.seed(number)
