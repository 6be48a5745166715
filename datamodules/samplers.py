"""Samplers: the item of each sample as a pure function of (seed, epoch, sample index).

Their random draws use generators that are seeded by a key, not the global generator.
"""

import hashlib
import os

import torch
from torch import Tensor

DRAWS_PER_BLOCK = 4096  # draws per block; a change of this number changes the data of every run


def seeded_generator(seed: int, *key: int | str) -> torch.Generator:
    """Return a CPU generator seeded by (seed, key) alone, the same in every process and version.

    seeded_generator(seed, "noise", epoch, sample) needs no stored state: another call with the same
    arguments starts the same stream.
    """
    # four bytes: torch's CPU generator uses only 32 bits of a seed
    digest = hashlib.blake2b(repr((seed, *key)).encode(), digest_size=4).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


def resolve_seed(seed: int | None) -> int:
    """Return the seed, or for None the seed of `seed_everything`, or 0 if there is none."""
    return int(os.environ.get("PL_GLOBAL_SEED", 0)) if seed is None else seed


class EpochSampler:
    """Epoch sampler: `sampler(epoch, first, last)` returns the items of samples first..last-1.

    Each epoch is a random permutation of the items, repeated with other permutations if it is
    longer. With `replacement` the items are drawn independently.
    """

    def __init__(
        self,
        seed: int,
        num_items: int,
        replacement: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        """Store the options; items are drawn on the CPU, so that they do not depend on `device`."""
        self.seed, self.num_items, self.device = seed, num_items, device
        self.block_size = DRAWS_PER_BLOCK if replacement else num_items
        self.replacement = replacement
        self._key: tuple[int, int] | None = None
        self._block = torch.empty(0, dtype=torch.int64)

    def __call__(self, epoch: int, first: int, last: int) -> Tensor:
        """Return item indices, int64 of shape (last - first,)."""
        blocks = []
        while first < last:
            block, start = divmod(first, self.block_size)
            stop = min(self.block_size, start + last - first)
            blocks.append(self._get_block(epoch, block)[start:stop])
            first += stop - start
        return blocks[0] if len(blocks) == 1 else torch.cat(blocks)

    def _get_block(self, epoch: int, block: int) -> Tensor:
        if self._key != (epoch, block):
            g = seeded_generator(self.seed, epoch, block)
            block_items = (
                torch.randint(self.num_items, (self.block_size,), generator=g)
                if self.replacement
                else torch.randperm(self.num_items, generator=g)
            )
            self._key, self._block = (epoch, block), block_items.to(self.device)
        return self._block


class StridedWindowSampler(EpochSampler):
    """Samples window starts at a fixed stride, with a new random offset each epoch.

    An epoch covers nearly every token once.
    """

    def __init__(
        self, seed: int, num_starts: int, stride: int, device: torch.device | str = "cpu"
    ) -> None:
        """Sample every stride-th of `num_starts` possible window starts."""
        super().__init__(seed, max(1, num_starts // stride), device=device)
        self.stride, self.num_offsets = stride, min(stride, num_starts)

    def _get_block(self, epoch: int, block: int) -> Tensor:
        window_indices = super()._get_block(epoch, block)
        g = seeded_generator(self.seed, epoch, "offset")
        return window_indices * self.stride + torch.randint(self.num_offsets, (), generator=g).to(
            window_indices.device
        )


class IndexedSampler:
    """Wraps an EpochSampler and adds the position of each item: int64 (epoch, sample, item)."""

    def __init__(self, sampler: EpochSampler) -> None:
        """Store the wrapped sampler."""
        self.sampler = sampler

    def __call__(self, epoch: int, first: int, last: int) -> Tensor:
        """Return samples first..last-1 as int64 of shape (last - first, 3)."""
        items = self.sampler(epoch, first, last).cpu()
        sample_indices = torch.arange(first, last)
        return torch.stack((torch.full_like(sample_indices, epoch), sample_indices, items), 1)
