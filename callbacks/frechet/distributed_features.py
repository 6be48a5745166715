"""Distributed feature extraction: ranks compute blocks of features, and each adds up all blocks.

    block     0    1    2    3    4    5      batch_size images each, on any number of ranks
    rank      0    1    0    1    0    1      with 2 ranks
    turn      0    0    1    1    2    2      after each turn an all-gather of the blocks

Every rank computes the same number of blocks, because a sharded net needs all ranks in each forward
pass. Every rank adds all blocks in the order of their indices. The sums are therefore equal bit for
bit on any number of ranks.
"""

from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ravine.errors import UsageError
from ravine.strategies.checkpoint.fingerprint import compute_fingerprint
from ravine.strategies.data_parallel import DataParallelInfo

from .statistics import Moments


class FeatureExtractorPool:
    """Runs a feature extractor on all ranks of a trainer.

    For example:

        pool = FeatureExtractorPool(trainer, extractor, batch_size=128, device=module.device)
        moments, features = pool.compute_moments(lambda index: images[index], count=1000)
    """

    def __init__(
        self, trainer: L.Trainer, extractor: nn.Module, batch_size: int, device: torch.device
    ) -> None:
        """Find the data-parallel rank and size; ranks that split one model count as one."""
        self.dp_rank, self.dp_size, _ = DataParallelInfo.from_trainer(trainer)
        self.trainer, self.extractor = trainer, extractor
        self.batch_size, self.device = batch_size, device
        # some accelerators have no float64
        self.float64_device = device if device.type == "cuda" else torch.device("cpu")

    def compute_moments(
        self,
        images: Callable[[Tensor], Tensor],
        count: int,
        pivot: Tensor | None = None,
        keep: int = 0,
    ) -> tuple[Moments, Tensor]:
        """Return sums over the features of images 0..count-1, and the first `keep` features (n d).

        All ranks must call it, and all get the same result.

        Args:
            images: returns the uint8 images (n c y x) of the indices (n).
            count: number of images.
            pivot: (d), subtracted from the features in the sums, against cancellation. By default
                the mean of the first block.
            keep: number of features to return.
        """
        # in the order of the images and equal on all ranks, so that the sums are equal bit for bit
        blocks = (block.to(self.float64_device) for block in self._iter_blocks(images, count))
        first_block = next(blocks)
        # `Moments`: count, sum (d) and sum of outer products (d d) of features minus pivot
        sums = Moments(first_block.double().mean(0) if pivot is None else pivot)
        kept_blocks = []
        for block in chain((first_block,), blocks):
            num_missing = keep - sums.count  # `sums.count`: features so far
            if num_missing > 0:
                is_whole = num_missing >= len(block)
                # a slice would keep the memory of the whole block
                kept_blocks.append(block if is_whole else block[:num_missing].clone())
            sums.add(block)
        if not sums.outer_sum.isfinite().all():
            raise UsageError(
                f"FrechetDistance: {type(self.extractor).__name__} returns features that are not "
                "finite",
                ["finite features"],
                hint="use another extractor, or weights that are finite",
            )
        return sums, torch.cat(kept_blocks) if kept_blocks else first_block[:0].clone()

    def _iter_blocks(self, images: Callable[[Tensor], Tensor], count: int) -> Iterator[Tensor]:
        """Yield the features (b d) of all blocks of images, in the order of their indices.

        In each turn every data-parallel rank computes one block, and all ranks gather them. The
        last turn may have fewer blocks than ranks: its surplus blocks are computed and discarded.

        Args:
            images: returns the uint8 images (n c y x) of the indices (n).
            count: number of images.
        """
        num_blocks = -(-count // self.batch_size)  # rounded up
        # data-parallel rank; ranks that split one model have the same
        own_dp_rank = torch.tensor([self.dp_rank], device=self.device)
        dp_ranks = self._all_gather(own_dp_rank).flatten().tolist()  # of each rank
        for first_block in range(0, num_blocks, self.dp_size):
            # a rank without a block computes the last one again, because all ranks must take part
            own_block = min(first_block + self.dp_rank, num_blocks - 1)
            first_image = own_block * self.batch_size
            index = torch.arange(first_image, min(count, first_image + self.batch_size))
            features = self.extractor(images(index).to(self.device))  # (b d)
            if features.dim() != 2 or len(features) != len(index):
                raise UsageError(
                    f"FrechetDistance: {type(self.extractor).__name__} returns features of shape "
                    f"{tuple(features.shape)} for {len(index)} images",
                    [f"the shape ({len(index)}, number of features)"],
                    hint="use an extractor that returns one vector for each image",
                )
            # an all-gather needs equal shapes
            num_missing = self.batch_size - len(index)
            padded = nn.functional.pad(features, (0, 0, 0, num_missing)).contiguous()
            gathered = self._all_gather(padded)  # (world b d)
            for block in range(first_block, min(first_block + self.dp_size, num_blocks)):
                size = min(count - block * self.batch_size, self.batch_size)
                # ranks that split one model have equal blocks: take that of the first
                rank = dp_ranks.index(block - first_block)
                yield gathered[rank][:size]

    def _all_gather(self, value: Tensor) -> Tensor:
        """Stack a tensor of all ranks along a new first axis, in the order of the ranks."""
        if self.trainer.world_size == 1:
            return value[None]
        outputs = [torch.empty_like(value) for _ in range(self.trainer.world_size)]
        dist.all_gather(outputs, value)
        return torch.stack(outputs)


def random_subset(count: int, n: int | None = None) -> Tensor:
    """Return at most n indices below `count` in a random order that is equal in every run.

    The order is random because the first images of a set may be of one class or of few writers.
    """
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))[:n]


def select_images(images: Tensor, chosen: Tensor) -> Callable[[Tensor], Tensor]:
    """Return a function from indices into `chosen` to the chosen images (n c y x)."""
    return lambda index: images[chosen[index]]


def proportional_labels(labels: Tensor, n: int) -> Tensor:
    """Return n labels in the proportions of `labels`, the same at each call, on the CPU."""
    indices = (torch.arange(n) * 2 + 1) * len(labels) // (2 * n)
    return labels.cpu().sort().values[indices]


def validate_images(images: Any, n: int, module_name: str) -> Tensor:
    """Return the images; raise UsageError if they are not n uint8 images (n c y x).

    `module_name` is the class whose `generate_images` returned them, for the message.
    """
    shape = tuple(getattr(images, "shape", ()))
    if not isinstance(images, Tensor) or images.dtype != torch.uint8 or len(shape) != 4:
        description = f"{images.dtype} of shape {shape}" if shape else type(images).__name__
        raise UsageError(
            f"FrechetDistance: {module_name}.generate_images returns {description}",
            ["uint8 images (n c y x)"],
            hint="round the images with ravine.datamodules.images.to_uint8",
        )
    if len(images) != n:
        raise UsageError(
            f"FrechetDistance: {module_name}.generate_images returns {len(images)} images for {n} "
            "indices",
            hint="return one image for each index",
        )
    return images


def fingerprint_tensors(*tensors: Tensor) -> str:
    """Return the SHA-256 of shapes, dtypes and values of tensors."""
    return compute_fingerprint(
        item for tensor in tensors for item in (f"{tensor.dtype}{tuple(tensor.shape)}", tensor)
    )
