"""RegressionDataModule: finite sums for linear models, with the draws of SGD as in lecture 2.

    line            y = slope x + noise g, x uniform in [-1, 1], g standard normal (lecture 2)
    separable       x = -2, -1, 1, 2 with labels of the same signs: no minimizer (lecture 4)
    diabetes        442 patients, 10 features, a measure of progression
    breast_cancer   569 samples, 30 features, labels +1 (malignant) and -1
    wine            178 samples, 13 features, 3 classes

The last three ship inside scikit-learn. Members of a sweep may have different batch sizes, noises
and seeds. The draws of a member are one stream of its seed: step k has the draws k B to k B + B - 1
of it. So members with equal seeds draw the same samples.

Axes: s optimizer steps of a batch, m members, b samples, n samples of the data, d features.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ravine.errors import UsageError, check_at_least_one

from .base import BaseDataModule
from .downloads import log_once
from .loaders import EvalLoader, ResumableLoader

Source = Literal["line", "separable", "diabetes", "breast_cancer", "wine"]
NUM_DRAWS_AT_ONCE = 2**14  # draws by which a stream is extended
STEPS_PER_EPOCH = 100_000  # of a run without max_steps


class RegressionBatch(NamedTuple):
    """Samples of one batch: each member's draws of each optimizer step."""

    x: Tensor  # features (s m b d)
    y: Tensor  # labels (s m b)
    weights: Tensor | None  # 1 / batch size of each draw, 0 beyond it (s m b); None: equal sizes


class DrawStream:
    """An endless stream of sample indices that depends on its seed alone.

    With replacement it is that of `torch.randint` with a generator of this seed; calls of any
    lengths return consecutive pieces of it. Without replacement it is a sequence of permutations;
    of each one, the incomplete last batch is dropped.

    Args:
        seed: seed of the generator.
        num_items: number of samples, n.
        batch_size: draws of one step.
        replacement: whether a step may draw a sample twice.
    """

    def __init__(self, seed: int, num_items: int, batch_size: int, replacement: bool) -> None:
        """Start with an empty stream."""
        self.num_items, self.replacement = num_items, replacement
        self.num_kept = num_items // batch_size * batch_size  # of a permutation
        self.generator = torch.Generator().manual_seed(seed)
        self.draws = torch.empty(0, dtype=torch.int64)

    def get_range(self, first: int, last: int) -> Tensor:
        """Return the draws first to last - 1, int64 (last - first)."""
        pieces = [self.draws]
        count = len(self.draws)
        while count < last:
            piece = self._draw()
            pieces.append(piece)
            count += len(piece)
        if len(pieces) > 1:
            self.draws = torch.cat(pieces)
        return self.draws[first:last]

    def _draw(self) -> Tensor:
        if self.replacement:
            return torch.randint(self.num_items, (NUM_DRAWS_AT_ONCE,), generator=self.generator)
        return torch.randperm(self.num_items, generator=self.generator)[: self.num_kept]


def generate_line(num_samples: int, slope: float, noise: float, seed: int) -> tuple[Tensor, Tensor]:
    """Return x (n) and y (n) of lecture 2: `rand`, then `randn`, of one generator, in float64."""
    generator = torch.Generator().manual_seed(seed)
    x = 2 * torch.rand(num_samples, generator=generator, dtype=torch.float64) - 1
    normal = torch.randn(num_samples, generator=generator, dtype=torch.float64)
    return x, slope * x + noise * normal


def load_table(source: str, standardize: bool) -> tuple[Tensor, Tensor, int]:
    """Return features (n d) and labels (n) of a data set of scikit-learn, and its classes.

    The labels of two classes are +1 and -1, those of more classes 0, 1, 2, ...; a regression has 1
    class.

    Args:
        source: diabetes, breast_cancer or wine.
        standardize: give every feature the mean 0 and the standard deviation 1.
    """
    from sklearn import datasets  # takes half a second, and only these sources need it

    loaded: Any = getattr(datasets, f"load_{source}")()
    x = torch.from_numpy(loaded.data.astype("float64"))
    y = torch.from_numpy(loaded.target.astype("float64"))
    if standardize:
        x = (x - x.mean(0)) / x.std(0, correction=0)
    if source == "breast_cancer":
        return x, 1 - 2 * y, 2  # scikit-learn's 0 is malignant
    return x, y, 3 if source == "wine" else 1


def as_list(value: Any) -> list[Any]:
    """Return a list as it is, and one value as a list."""
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]


class RegressionDataModule(BaseDataModule):
    """Data of `Regression`; every batch is a `RegressionBatch`.

        Trainer(max_steps=5000).fit(Regression(), datamodule=RegressionDataModule(batch_size=10))

    An argument with several values makes one member of a sweep for each of them.

    Args:
        source: the data set.
        num_samples: samples of the line.
        slope: slope of the line.
        noise: standard deviation of the line's noise.
        data_seed: seed of the line's training samples; the validation samples have the next one.
        num_val_samples: validation samples of the line; 0 for no validation.
        batch_size: draws of an optimizer step, or "all" for full gradients.
        sampling_seed: seed of a member's draws.
        replacement: whether a step may draw a sample twice.
        num_replicas: members with the same settings; replica r draws with the seed plus r.
        intercept: append a feature that is 1.
        standardize: give every feature of a table the mean 0 and the standard deviation 1.
        steps_per_batch: optimizer steps in one batch of the trainer.
    """

    def __init__(
        self,
        source: Source = "line",
        num_samples: int = 200,
        slope: float = 1.0,
        noise: float | list[float] = 0.2,
        data_seed: int = 0,
        num_val_samples: int = 0,
        batch_size: int | list[int] | Literal["all"] = 1,
        sampling_seed: int | list[int] = 0,
        replacement: bool = True,
        num_replicas: int = 1,
        intercept: bool = False,
        standardize: bool = True,
        steps_per_batch: int = 1,
    ) -> None:
        """Check the arguments; the data are made in `setup`."""
        super().__init__()
        check_at_least_one(
            "RegressionDataModule",
            flag_prefix="--data.",
            num_samples=num_samples,
            num_replicas=num_replicas,
            steps_per_batch=steps_per_batch,
        )
        self.source, self.num_samples, self.slope = source, num_samples, slope
        self.data_seed, self.num_val_samples = data_seed, num_val_samples
        self.replacement, self.intercept, self.standardize = replacement, intercept, standardize
        self.steps_per_batch, self.num_replicas = steps_per_batch, num_replicas
        self.batch_size = batch_size
        # lists with a value for each member
        settings = {"noise": noise, "batch_size": batch_size, "sampling_seed": sampling_seed}
        self.noises, self.batch_sizes, self.sampling_seeds = _broadcast(settings, num_replicas)
        self.x = torch.empty(0)  # features (n d), of all members
        self.y = torch.empty(0)  # labels (m n)
        self.val_data: tuple[Tensor, Tensor] | None = None  # features (v d), labels (m v)
        self.num_classes = 1  # 2 for labels +1 and -1, 1 for a regression
        # members with equal seeds and batch sizes share a stream of draws
        self._streams: list[DrawStream] = []
        self._stream_of_member = torch.empty(0, dtype=torch.int64)  # index of the stream (m)
        self._weights: Tensor | None = None  # of the draws in the mean (m b); None: equal ones

    @property
    def num_members(self) -> int:
        """The number of members, m."""
        return len(self.noises)

    def setup(self, stage: str) -> None:
        """Make or load the data; Lightning calls it before each stage.

        The lines of all members have the same features, and labels with the noise of the member.
        """
        if self.source == "line":
            pairs = [
                self._make_line(noise, self.data_seed, self.num_samples) for noise in self.noises
            ]
            self.x = pairs[0][0]
            self.y = torch.stack([y for _, y in pairs])
            if self.num_val_samples:
                pairs = [
                    self._make_line(noise, self.data_seed + 1, self.num_val_samples)
                    for noise in self.noises
                ]
                self.val_data = pairs[0][0], torch.stack([y for _, y in pairs])
        elif self.source == "separable":
            points = torch.tensor([-2.0, -1.0, 1.0, 2.0], dtype=torch.float64)
            self.x, self.num_classes = self._add_intercept(points[:, None]), 2
            self.y = points.sign().repeat(self.num_members, 1)
        else:
            x, y, self.num_classes = load_table(self.source, self.standardize)
            self.x, self.y = self._add_intercept(x), y.repeat(self.num_members, 1)
        self.provenance = {"source": self.source, "samples": len(self.x)}
        self._check_batch_sizes()
        if self.val_data is None:
            # only a line has further samples for validation
            arguments = {"num_val_samples": 100} if self.source == "line" else {}
            self.skip_validation(**arguments)
        num_val = 0 if self.val_data is None else len(self.val_data[0])
        # prints one line, on rank 0 only
        features = f"{self.x.shape[1]} features"
        log_once(f"data: {self.source}, {features}; {len(self.x):,} train, {num_val:,} val")

    def _make_line(self, noise: float, seed: int, num_samples: int) -> tuple[Tensor, Tensor]:
        x, y = generate_line(num_samples, self.slope, noise, seed)
        return self._add_intercept(x[:, None]), y

    def _add_intercept(self, x: Tensor) -> Tensor:
        return torch.cat((x, torch.ones_like(x[:, :1])), 1) if self.intercept else x  # (n d+1)

    def _check_batch_sizes(self) -> None:
        """Resolve "all", create the streams of draws, and refuse batches that cannot be drawn."""
        num_items = len(self.x)
        sizes = [num_items if size == "all" else size for size in self.batch_sizes]
        # with replacement a batch may have more draws than the data have samples
        maximum = float("inf") if self.replacement else num_items
        misfit = next((size for size in sizes if not 1 <= size <= maximum), None)
        if misfit is not None:
            raise UsageError(
                f"RegressionDataModule: batch_size={misfit} does not fit the {num_items} samples "
                f"of {self.source}"
                + ("" if self.replacement else ", which are drawn without replacement"),
                ["1 or more" if self.replacement else f"1 to {num_items}", "all"],
                "use batch_size=1",
                flag="--data.batch_size=1",
            )
        self.batch_sizes = sizes
        keys = list(zip(self.sampling_seeds, sizes, strict=True))
        unique_keys = list(dict.fromkeys(keys))
        self._streams = [
            DrawStream(seed, num_items, size, self.replacement) for seed, size in unique_keys
        ]
        self._stream_of_member = torch.tensor([unique_keys.index(key) for key in keys])
        if len(set(sizes)) > 1:
            # a batch has the draws of the largest size; a smaller member gives the rest weight 0
            positions = torch.arange(max(sizes))
            rows = torch.tensor(sizes)[:, None]  # (m 1)
            self._weights = (positions < rows).double() / rows  # (m b)

    def train_dataloader(self) -> ResumableLoader:
        """Return the loader; one of its samples is an optimizer step."""
        trainer: Any = self.trainer
        ranks = getattr(trainer, "world_size", 1)
        accumulate = getattr(trainer, "accumulate_grad_batches", 1)
        if ranks > 1 or accumulate > 1:
            raise UsageError(
                "RegressionDataModule draws the samples of an optimizer step in one process and "
                f"one batch, and this run has {ranks} ranks and {accumulate} batches in a step",
                ["1 rank, 1 batch"],
                "use batch_size for a larger batch, with Trainer(devices=1, "
                "accumulate_grad_batches=1)",
                flag="--trainer.devices=1 --trainer.accumulate_grad_batches=1",
            )
        max_steps = getattr(trainer, "max_steps", -1)
        # one epoch is the whole run, if the number of steps is known; else STEPS_PER_EPOCH steps
        num_steps = max_steps if max_steps > 0 else STEPS_PER_EPOCH
        num_batches = -(-num_steps // self.steps_per_batch)
        num_steps = num_batches * self.steps_per_batch

        def sampler(epoch: int, first: int, last: int) -> Tensor:
            return torch.arange(first, last) + epoch * num_steps  # numbers of optimizer steps

        return self.make_train_loader(
            sampler,  # pyright: ignore[reportArgumentType]
            self.make_batch,
            num_steps,
            self.steps_per_batch,
        )

    def val_dataloader(self) -> EvalLoader:
        """Return the validation samples as one batch."""
        assert self.val_data is not None
        x, y = self.val_data

        def make_batch(indices: Tensor) -> RegressionBatch:
            features = x[indices].expand(1, self.num_members, -1, -1)  # (1 m b d)
            return RegressionBatch(features, y[None, :, indices], None)

        return self.make_eval_loader(make_batch, len(x), len(x))

    def make_batch(self, steps: Tensor) -> RegressionBatch:
        """Return the draws of consecutive optimizer steps (s) for every member."""
        first, last = int(steps[0]), int(steps[-1]) + 1
        indices = self._draw_indices(first, last)  # (s m b)
        members = torch.arange(self.num_members)[:, None]  # (m 1)
        weights = None if self._weights is None else self._weights.expand(last - first, -1, -1)
        return RegressionBatch(self.x[indices], self.y[members, indices], weights)

    def _draw_indices(self, first: int, last: int) -> Tensor:
        """Return sample indices (s m b) of the steps first to last - 1; 0 beyond a batch."""
        sizes = dict(zip(self._stream_of_member.tolist(), self.batch_sizes, strict=True))
        rows = [
            stream.get_range(first * sizes[i], last * sizes[i]).view(last - first, sizes[i])
            for i, stream in enumerate(self._streams)
        ]  # of each stream (s b)
        longest = max(self.batch_sizes)
        padded = [torch.nn.functional.pad(row, (0, longest - row.shape[1])) for row in rows]
        return torch.stack(padded, 1)[:, self._stream_of_member]  # (s m b)


def _broadcast(settings: dict[str, Any], num_replicas: int) -> list[list[Any]]:
    """Return noise, batch size and seed of every member; replicas of a setting are neighbours.

    Raises:
        UsageError: two settings have different numbers of values above 1.
    """
    lists = {name: as_list(value) for name, value in settings.items()}
    lengths = {name: len(values) for name, values in lists.items() if len(values) != 1}
    if len(set(lengths.values())) > 1:
        counts = " and ".join(f"{name} has {count} values" for name, count in lengths.items())
        raise UsageError(
            f"RegressionDataModule: {counts}",
            ["one value, or as many values in each argument"],
            "use lists of equal lengths",
        )
    count = next(iter(lengths.values()), 1)
    # the same number of values for each setting, in the order of `settings`
    broadcast = [values * count if len(values) == 1 else values for values in lists.values()]
    noises, sizes, seeds = (
        [v for v in values for _ in range(num_replicas)] for values in broadcast
    )
    offsets = list(range(num_replicas)) * count
    return [noises, sizes, [seed + offset for seed, offset in zip(seeds, offsets, strict=True)]]
