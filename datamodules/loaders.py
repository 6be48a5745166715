"""The order of the data: a pure function of (seed, epoch, global sample index), of nothing else.

    epoch e:  sample  0 1 2 3 | 4 5 6 7 | ...      batch_size 4 = one optimizer step, whole world
              micro   0 0 1 1 | 0 0 1 1 | ...      accumulate 2
              rank    0 1 0 1 | 0 1 0 1 | ...      size 2

Ranks and micro-batches take slices of one stream, so the global batch of a step is the same on any
number of ranks, and a position counted in samples can be continued on another.
"""

import hashlib
import os
import reprlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ravine.errors import UsageError
from ravine.strategies.share import Share

BLOCK = 4096  # draws made at once; a change would change the data of every run


def generator(seed: int, *key: int | str) -> torch.Generator:
    """A CPU generator that depends on (seed, key) alone, the same in every process and version.

    generator(seed, "noise", epoch, sample) needs no stored state: asked again, it starts again.
    """
    # four bytes: torch's CPU generator keeps no more of a seed
    digest = hashlib.blake2b(repr((seed, *key)).encode(), digest_size=4).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


def global_seed(seed: int | None) -> int:
    """The seed itself, or that of `seed_everything`, or 0."""
    return int(os.environ.get("PL_GLOBAL_SEED", 0)) if seed is None else seed


class Order:
    """`order(epoch, first, last)`: the items that are samples first..last-1 of that epoch.

    Each epoch is a permutation of the items (and then another), or, with `replace`, free draws.
    """

    def __init__(
        self, seed: int, items: int, replace: bool = False, device: torch.device | str = "cpu"
    ) -> None:
        """Draw on the CPU, so that every device sees the same stream; keep a block on `device`."""
        self.seed, self.items, self.device = seed, items, device
        self.size = BLOCK if replace else items
        self.replace = replace
        self._key: tuple[int, int] | None = None
        self._block = torch.empty(0, dtype=torch.int64)

    def __call__(self, epoch: int, first: int, last: int) -> Tensor:
        """Item numbers, int64 of shape (last - first,)."""
        parts = []
        while first < last:
            block, start = divmod(first, self.size)
            stop = min(self.size, start + last - first)
            parts.append(self._draw(epoch, block)[start:stop])
            first += stop - start
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _draw(self, epoch: int, block: int) -> Tensor:
        if self._key != (epoch, block):
            g = generator(self.seed, epoch, block)
            drawn = (
                torch.randint(self.items, (self.size,), generator=g)
                if self.replace
                else torch.randperm(self.items, generator=g)
            )
            self._key, self._block = (epoch, block), drawn.to(self.device)
        return self._block


class Passes(Order):
    """Starts of windows side by side, from another offset each epoch: nearly all is seen once."""

    def __init__(
        self, seed: int, starts: int, stride: int, device: torch.device | str = "cpu"
    ) -> None:
        """Of `starts` places where a window may start, take every stride-th."""
        super().__init__(seed, max(1, starts // stride), device=device)
        self.stride, self.offsets = stride, min(stride, starts)

    def _draw(self, epoch: int, block: int) -> Tensor:
        drawn = super()._draw(epoch, block)
        g = generator(self.seed, epoch, "offset")
        return drawn * self.stride + torch.randint(self.offsets, (), generator=g).to(drawn.device)


class TrainLoader:
    """Micro-batches of one epoch, resumable at any of them.

    `fetch(items)` makes a batch of item numbers. The trainer calls `set_epoch` through `sampler`,
    as it does for torch's DistributedSampler; `repeat` hands out the first epoch for ever, to
    overfit its first batches.
    """

    draws_nothing = True  # from the default generators: they need no seed for a batch

    def __init__(
        self,
        order: Order,
        fetch: Callable[[Tensor], Any],
        samples: int,
        batch_size: int,
        share: Share = Share(),  # noqa: B008 - immutable
        repeat: bool = False,
    ) -> None:
        """Cut `samples` an epoch into steps of `batch_size` over the world; a ragged end waits."""
        check_divisible(batch_size, samples, share)
        self.order, self.fetch, self.batch_size, self.share = order, fetch, batch_size, share
        self.samples = samples // batch_size * batch_size
        # Lightning's BatchSizeFinder doubles a batch as long as it is smaller than this length
        self.dataset = range(samples // 2 + 1)
        self.epoch, self.sample = 0, 0  # the position: samples of the epoch handed out so far
        self._turn, self._shift = 0, 0  # the trainer's number of the epoch, and ours minus it
        self._resume: dict[str, int] | None = None
        self.repeat = repeat
        # Lightning would warn of a `sampler` that it cannot stop from shuffling
        setattr(self, "batch_sampler" if repeat else "sampler", _Epochs(self))

    def __len__(self) -> int:
        """Micro-batches an epoch. (A length also keeps Lightning from fetching one ahead.)"""
        return self.samples // self.batch_size * self.share.accumulate

    def __iter__(self) -> Iterator[Any]:
        """Hand out this rank's micro-batches of the epoch, from a loaded position once.

        The position is looked up at the first batch, not before: Lightning makes the iterator
        early, and an order that was loaded between the two still counts.
        """
        self._find_start()
        rank, size, accumulate = self.share
        micro = self.batch_size // accumulate  # over all ranks
        if self.sample % micro:
            raise UsageError(
                f"the checkpoint was written after {self.sample} samples of epoch {self.epoch}, "
                f"inside a batch of {micro} samples of this run; "
                "resume with the batch_size and accumulate_grad_batches it was written with"
            )
        mine = micro // size
        while self.sample < self.samples:
            first = self.sample + rank * mine
            self.sample += micro  # before the yield: who holds the batch has consumed it
            yield self.fetch(self.order(self.epoch, first, first + mine))

    def _find_start(self) -> None:
        """Go on from the loaded position, or start the epoch after it.

        We count epochs ourselves: when a file was written at the end of an epoch, Lightning's own
        number (fit_loop.epoch_progress) is one too high after a resume with max_steps.
        """
        at, self._resume, self.sample = self._resume, None, 0
        if at is not None:
            same = at["turn"] == self._turn
            self.sample = at["sample"] if same else 0
            self._shift = at["epoch"] + (not same) - self._turn
        self.epoch = 0 if self.repeat else self._turn + self._shift

    @property
    def steps(self) -> int:
        """Optimizer steps of an epoch."""
        return self.samples // self.batch_size

    def set_accumulate(self, accumulate: int) -> None:
        """Cut the batch of a step into so many micro-batches, from the next epoch on."""
        share = self.share._replace(accumulate=accumulate)
        check_divisible(self.batch_size, self.samples, share)
        self.share = share

    def peek(self) -> Any:
        """This rank's first micro-batch of the epoch; the position stays as it is."""
        rank, size, accumulate = self.share
        mine = self.batch_size // accumulate // size
        return self.fetch(self.order(self.epoch, rank * mine, (rank + 1) * mine))

    def set_epoch(self, epoch: int) -> None:
        """Take the trainer's number of the epoch that the next iteration hands out."""
        self._turn = epoch

    def state_dict(self) -> dict[str, int]:
        """The position, in samples of the whole world, so that any other layout can go on."""
        return {"epoch": self.epoch, "sample": self.sample, "turn": self._turn}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Start the next iteration where the saved one stood."""
        keys = ("epoch", "sample", "turn")
        if not isinstance(state, dict) or any(type(state.get(key)) is not int for key in keys):
            raise UsageError(
                f"the place in the data that was saved is {reprlib.repr(state)}; allowed: whole "
                f"numbers of {', '.join(keys)}; choose another checkpoint: --ckpt_path FILE"
            )
        self.epoch, self.sample, self._turn = state["epoch"], state["sample"], state["turn"]
        self._resume = state


class _Epochs:
    """Has `set_epoch` where Lightning looks for it: in `sampler` or `batch_sampler.sampler`."""

    def __init__(self, loader: TrainLoader) -> None:
        self.sampler, self.set_epoch = self, loader.set_epoch


class EvalLoader:
    """Every sample exactly once over the ranks, and the same number of batches on each.

    Equal numbers, because sharded models communicate in every forward pass: ragged ends are spread
    over batches of sizes that differ by one. There is no state: each iteration is the same.
    """

    def __init__(
        self,
        fetch: Callable[[Tensor], Any],
        samples: int,
        batch_size: int,
        share: Share = Share(),  # noqa: B008 - immutable
    ) -> None:
        """Take `batch_size` samples at a time over the world (fewer where it must be)."""
        if samples < share.size:
            raise UsageError(
                f"{samples} samples cannot be evaluated on {share.size} ranks: each needs at "
                f"least one; type --trainer.devices={max(samples, 1)} or fewer"
            )
        check_positive("batch_size", batch_size)
        most = -(-samples // share.size)  # samples of the fullest rank, rounded up
        a_batch = max(1, batch_size // share.size)
        # one batch fewer where the emptiest rank would have nothing left for the last
        batches = min(-(-most // a_batch), samples // share.size)
        mine = torch.arange(share.rank, samples, share.size)
        self.batches = mine.tensor_split(batches)
        self.fetch = fetch

    def __len__(self) -> int:
        """Batches, the same on every rank."""
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        """Hand out this rank's samples in order."""
        return map(self.fetch, self.batches)


def check_positive(name: str, value: int) -> None:
    """Refuse sizes below one."""
    if not isinstance(value, int) or value < 1:
        raise UsageError(f"{name} is {value!r}; allowed are 1, 2, 3, ...: type --data.{name}=32")


def check_divisible(batch_size: int, samples: int, share: Share) -> None:
    """Refuse a global batch that the set cannot fill or the ranks cannot share equally."""
    check_positive("batch_size", batch_size)
    if batch_size > samples:
        raise UsageError(
            f"batch_size {batch_size} is more than the {samples} training samples: "
            f"type --data.batch_size={samples} or less"
        )
    parts = share.size * share.accumulate
    if batch_size % parts:
        lower = batch_size // parts * parts
        nearest = lower or parts
        both = f"{lower} and {lower + parts}" if lower else f"{parts}"
        raise UsageError(
            f"batch_size {batch_size} is one optimizer step of the whole world and cannot be "
            f"split into {share.size} ranks x {share.accumulate} accumulation steps = {parts} "
            f"equal parts; nearest that can: {both}; type --data.batch_size={nearest}"
        )
