"""ExactResume: resume from a checkpoint bit for bit, as if the run had not been interrupted.

Lightning restores weights, optimizers and counters. This callback restores six more things:

    dropout      the generators are seeded by (seed, micro-batch, rank) at each micro-batch
    optimizers   the generators are seeded by (seed, step) at each step, equally on all ranks
    data         each batch is fetched under a seed of (seed, epoch, batch, rank): batch_seeds.py
    counters     those of every file are brought to one of the forms of `normalize_progress`
    validation   one that was due or incomplete is run; one that was complete is not
    order        a DataLoader's sampler draws its indices again, and no data are read for it;
                 an iterable data set is read again up to its position;
                 a loader with `state_dict` restores its own position
"""

import os
import warnings
from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any, Literal

import lightning as L
import torch
from lightning.fabric.utilities.data import sized_len
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.precision import DoublePrecision
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.distributed.checkpoint.stateful import Stateful
from torch.optim import Optimizer
from torch.utils.data import DataLoader, IterableDataset

from ravine.checkpoint_format import check_format, record_format
from ravine.errors import UsageError, sort_by_similarity
from ravine.lightning_compat import (
    after_resuming_at_epoch_end,
    after_resuming_within_epoch,
    collected_metrics,
    combined_iterator,
    combined_loader,
    data_fetcher,
    is_prefetching,
    replace_method,
    restore_before_fetch,
    restore_loader_states,
    restore_method,
    saves_sharded,
    set_before_fetch,
    set_sampler_epoch,
    should_accumulate,
    skip_next_validation,
    validation_loaders,
)
from ravine.strategies.checkpoint.checkpoint_error import CheckpointError
from ravine.strategies.checkpoint.saving import (
    defer_saving_hooks,
    first_non_finite,
    restore_saving_hooks,
)
from ravine.strategies.checkpoint.validation import (
    dtype_kind_mismatches,
    find_changed_kinds,
    find_damaged_states,
    find_malformed_resume_record,
    find_nan_entry,
    optimizer_state_kinds,
    optimizer_state_shapes,
)
from ravine.strategies.data_parallel import DataParallelInfo

from ..checks.run_checks import add_run_checks
from .batch_seeds import BatchSeeder, hash_seed, seed_default_generators, snapshot_generators
from .ema import use_raw_weights
from .run_comparison import (
    collect_run_properties,
    compare_callbacks,
    compare_data,
    compare_optimizers,
    compare_ranks_and_accumulation,
    has_callback,
    print_rank_zero,
)

# First key of `hash_seed`, by the use of the seed; -4 and below are not used.
VALIDATION_STREAM, FETCH_STREAM, STEP_STREAM = -1, -2, -3
ACCEPTABLE_DIFFERENCES = ("EMA", "data", "optimizer")
OTHER_FILE_HINT = "pass another ckpt_path, or load only its weights with Pretrained(path)"
OTHER_FILE_FLAG = (
    "--ckpt_path=FILE, or --trainer.callbacks+=Pretrained --trainer.callbacks.path=FILE"
)
ResumePoint = Literal["start", "epoch end", "step end", "before validation", "after validation"]


class ExactResume(Callback):
    """Make `fit(..., ckpt_path=...)` resume bit for bit, on the same layout of processes.

    Works with any module, a stock Trainer and any checkpoint callback. DataLoaders need no change:
    random data sets, samplers, batch samplers and workers (persistent or not) are supported.
    Iterable data sets and plain iterables are read again up to their position, and a line is
    printed. Example: `Trainer(callbacks=[ExactResume()])`. Not supported are:

    - a data set or sampler that changes its state while it is read, other than its generators;
    - an iterator, for which a line is printed at the start;
    - a file written between the micro-batches of one optimizer step, without their gradients.

    A resume with other data, without EMA or with other optimizers is refused: see
    run_comparison.py.

    Args:
        accept: differences from the checkpoint's run to permit: "EMA" (resume from the raw
            weights), "data", "optimizer" (start with a new state).
    """

    takes_partial_gradients = True  # with ZeRO-1 a rank has only the gradients that it owns

    def __init__(self, accept: list[str] | str | None = None) -> None:
        """Set the permitted differences; the seed is that of `seed_everything`.

        Args:
            accept: any of "EMA", "data", "optimizer": differences from the checkpoint's run.
        """
        self.accept = [accept] if isinstance(accept, str) else list(accept or ())
        # ACCEPTABLE_DIFFERENCES: the three names above
        if unknown := [key for key in self.accept if key not in ACCEPTABLE_DIFFERENCES]:
            name = sort_by_similarity(str(unknown[0]), ACCEPTABLE_DIFFERENCES)[0]
            raise UsageError(
                f"ExactResume: accept={unknown[0]!r} is not a difference that can be accepted",
                ACCEPTABLE_DIFFERENCES,
                hint=f"use accept=[{name!r}]",
                flag=f"--trainer.callbacks.{type(self).__name__}.accept=[{name}]",
            )
        self._seed, self._rank = 0, 0  # data-parallel rank
        self._seeders: list[BatchSeeder] = []  # of the data loaders so far
        # what `on_load_checkpoint` finds in the file, used by `on_train_start`
        self._saved_run: dict[str, Any] = {}  # the run's properties in the checkpoint
        # of a checkpoint with EMA that is resumed without EMA
        self._raw_weights: dict[str, Tensor] = {}
        self._resume_point: ResumePoint = "start"
        self._saved_metrics: dict[str, Tensor] = {}
        # the trainer's `max_steps`, while it is raised by 1 for a validation after the last step
        self._max_steps: int | None = None
        self._plateau_due = False  # the file lacks the plateau scheduler step of its epoch

    @property
    def state_key(self) -> str:
        """Return a constant key: a run has one ExactResume."""
        return "ExactResume"

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Find the seed and the data-parallel rank, which is equal on ranks that split a model."""
        add_run_checks(trainer, pl_module, stage)
        if stage == "fit" and isinstance(trainer.precision_plugin, DoublePrecision):
            # Lightning would load the weights of the file before it converts the net
            trainer.precision_plugin.convert_module(pl_module)
        self._resume_point, self._max_steps, self._saved_metrics = "start", None, {}
        self._plateau_due, self._saved_run, self._raw_weights = False, {}, {}
        self._seed = int(os.environ.get("PL_GLOBAL_SEED", torch.initial_seed()))
        self._rank = DataParallelInfo.from_trainer(trainer).dp_rank
        if stage == "fit" and "data" in self.accept and hasattr(pl_module, "accepts_tokenizer"):
            # an attribute of LanguageModel
            vars(pl_module)["accepts_tokenizer"] = True
        for callback in trainer.checkpoint_callbacks if stage == "fit" else ():
            defer_saving_hooks(trainer, pl_module, callback)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Set the loop and the loaders to the position of the checkpoint.

        Lightning has restored the loop's counters; `self._resume_point` says where the file was
        written. Without a checkpoint it is "start", and only the loaders are seeded.
        """
        fit = trainer.fit_loop
        self._compare_loaders(trainer)
        # empty unless a run with EMA is resumed without it: the file's weights are the average
        use_raw_weights(pl_module, self._raw_weights)
        collected_metrics(trainer).update(self._saved_metrics)  # plateau schedulers read them
        restore_loader_states(trainer)  # of loaders with their own `state_dict`
        is_mid_epoch = self._resume_point in ("step end", "before validation", "after validation")
        if is_mid_epoch:
            # `advance` of Lightning's loop trains one micro-batch. The replacement, for its first
            # call only, continues after the last micro-batch that the file contains.
            first_advance = self._make_first_advance(trainer, self._resume_point)
            replace_method(fit.epoch_loop, "advance", first_advance)
        elif self._resume_point == "epoch end":
            after_resuming_at_epoch_end(trainer)  # makes the loop start a new epoch
            if self._plateau_due:
                epochs = fit.epoch_progress.current
                epochs.completed -= 1  # as when Lightning steps the plateau schedulers
                fit.epoch_loop.update_lr_schedulers("epoch", update_plateau_schedulers=True)
                epochs.completed += 1
        self._seed_other_loaders(trainer)  # training loaders of other classes than torch's
        self._seed_validation(trainer)
        self._fast_forward_loaders(trainer, is_mid_epoch=is_mid_epoch)
        self._resume_point = "start"

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Seed the loaders, and so the shuffling, by (seed, epoch)."""
        self._seed_epoch(trainer)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Seed the default generators (7 us), so that earlier random draws have no effect."""
        seed_all(self._seed, trainer.fit_loop.total_batch_idx, self._rank, pl_module.device)

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer
    ) -> None:
        """Seed the default generators equally on all ranks, for optimizers that draw numbers.

        With manual optimization their states are restored after the step, so that the next
        forward pass draws from them.
        """
        if not pl_module.automatic_optimization:
            run_after_step(optimizer, snapshot_generators(pl_module.device))
        seed = hash_seed(STEP_STREAM, self._seed, trainer.global_step)
        seed_default_generators(seed, pl_module.device)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Restore the loops and loaders."""
        restore_before_fetch(trainer)
        restore_method(trainer.fit_loop.epoch_loop.val_loop, "run")
        for seeder in self._seeders:
            seeder.remove()
        self._seeders = []

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Restore the loops and loaders."""
        self.on_train_end(trainer, pl_module)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Restore the hooks."""
        for callback in trainer.checkpoint_callbacks:
            restore_saving_hooks(pl_module, callback)

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Save the run's properties, seed and metrics under `exact_resume`.

        The optimizers' parameters are renumbered in the order of the module's parameters.
        """
        if should_accumulate(trainer):
            rank_zero_warn(
                f"the checkpoint at step {trainer.global_step} is written between two micro-batches"
                " of one optimizer step and lacks their gradients, so a resume is not exact; use a "
                "val_check_interval that is a multiple of accumulate_grad_batches"
            )
        states = checkpoint.get("optimizer_states", [])
        if not getattr(trainer.strategy, "renumbers_params", False):  # MeshStrategy does it itself
            for optimizer, state in zip(trainer.optimizers, states, strict=True):
                renumber_params(list(pl_module.parameters()), optimizer, state)
        metrics = collected_metrics(trainer)
        is_sharded = saves_sharded(trainer.strategy)
        record_format(checkpoint)  # version of the file format
        checkpoint["exact_resume"] = collect_run_properties(trainer) | {
            "seed": self._seed,
            # a sharded checkpoint has its own index of shapes
            # shapes and kinds of dtype of the states, with which a resume detects a damaged file
            "optimizer_shapes": None if is_sharded else optimizer_state_shapes(states),
            "optimizer_kinds": None if is_sharded else optimizer_state_kinds(states),
            "metrics": {name: value.detach().cpu() for name, value in metrics.items()},
        }

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Normalize the loop counters of the file, and compare its run with this one.

        Lightning restores its loops from the changed counters. `on_train_start` uses the rest.
        """
        if trainer.state.fn != "fit":
            return
        check_format(checkpoint)  # raises for a file of another format version
        self._check_not_damaged(trainer, pl_module, checkpoint)
        epochs = checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]
        # Lightning counts an epoch as completed after it has stepped the plateau schedulers
        self._plateau_due = epochs["processed"] != epochs["completed"]
        # changes the counters in place, and returns where in the epoch the file was written
        self._resume_point = normalize_progress(checkpoint["loops"]["fit_loop"])
        self._saved_run = checkpoint.get("exact_resume", {})
        self._seed = self._saved_run.get("seed", self._seed)
        self._saved_metrics = self._saved_run.get("metrics", {})
        # both raise for differences that would change training; `accept` permits some
        compare_callbacks(trainer, checkpoint, self.accept)
        self._compare_optimizers(trainer, checkpoint)
        if "ema" in checkpoint and "EMA" in self.accept and not has_callback(trainer, "EMA"):
            self._raw_weights = checkpoint["ema"]["raw"]
        loop = trainer.fit_loop.epoch_loop
        is_after_last_step = loop.max_steps == checkpoint["global_step"]
        if self._resume_point == "before validation" and is_after_last_step:
            # raised until the first `advance`: otherwise Lightning returns before that validation
            self._max_steps = loop.max_steps
            loop.max_steps += 1

    def _check_not_damaged(
        self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Raise CheckpointError for a file from which training cannot resume, before any step.

        It checks its record of the run, dtypes, optimizer states, NaN in weights or states, and
        the loop counters. Called on all ranks, after the weights are loaded into the module.
        """
        saved_run = checkpoint.get("exact_resume", {})
        if problem := find_malformed_resume_record(saved_run):
            raise CheckpointError(
                f"training cannot resume from this checkpoint: {problem}",
                hint=OTHER_FILE_HINT,
                flag=OTHER_FILE_FLAG,
            )
        names = list(dict(module.named_parameters()))
        states = checkpoint.get("optimizer_states")  # None in a sharded file, checked on reading
        # each of these functions returns the problem as text, or an empty text
        problem = dtype_kind_mismatches(module.state_dict(), checkpoint.get("state_dict", {}))
        if states is not None and not problem:
            steps = checkpoint.get("global_step", 0)
            problem = find_damaged_states(states, saved_run.get("optimizer_shapes"), steps, names)
            problem = problem or find_changed_kinds(states, saved_run.get("optimizer_kinds"), names)
        non_finite_name = (
            first_non_finite(module.named_parameters())
            or find_nan_entry(states or [], names)
            or _find_non_finite_raw(checkpoint.get("ema"))
        )
        # whether it is True on all ranks, so that each rank must call it
        is_finite = trainer.strategy.reduce_boolean_decision(non_finite_name is None)
        if not is_finite and not problem:
            problem = f"{non_finite_name or 'a tensor of another rank'} is not finite"
        if problem:
            raise CheckpointError(
                f"training cannot resume from this checkpoint: {problem}",
                hint="pass an earlier file as ckpt_path, or start a new run without ckpt_path",
                flag="--ckpt_path=FILE of an earlier step, or no --ckpt_path",
            )
        try:  # on a copy, because it changes the counters
            counts = deepcopy(checkpoint["loops"]["fit_loop"])
            normalize_progress(counts)
            if not isinstance(counts.get("state_dict", {}).get("combined_loader", []), list):
                raise TypeError("the states of the loaders are not a list")
        except (LookupError, TypeError, AttributeError) as error:
            raise CheckpointError(
                "training cannot resume from this checkpoint: its counts of epochs and batches are "
                f"incomplete ({type(error).__name__}: {error})",
                hint=OTHER_FILE_HINT,
                flag=OTHER_FILE_FLAG,
            ) from error

    def _compare_optimizers(self, trainer: L.Trainer, checkpoint: dict[str, Any]) -> None:
        """Compare the optimizers after they are created and before their states are loaded."""
        saved_names, strategy = self._saved_run.get("optimizers"), trainer.strategy
        # an OptimizerPlan compares its own optimizers
        if saved_names is None or checkpoint.get("optimizer_plan"):
            return
        original_load = type(strategy).load_optimizer_state_dict

        def compare_and_load(checkpoint: Any) -> None:
            restore_method(strategy, "load_optimizer_state_dict")
            current_names = [type(optimizer).__name__ for optimizer in strategy.optimizers]
            if compare_optimizers(current_names, saved_names, self.accept):
                original_load(strategy, checkpoint)

        replace_method(strategy, "load_optimizer_state_dict", compare_and_load)

    def _compare_loaders(self, trainer: L.Trainer) -> None:
        if not self._saved_run:
            return
        compare_data(trainer, self._saved_run, self.accept)
        loader = combined_loader(trainer)
        train_loaders = loader.flattened if loader is not None else []
        if world := self._saved_run.get("world"):
            is_resumable = all(isinstance(train_loader, Stateful) for train_loader in train_loaders)
            compare_ranks_and_accumulation(trainer, world, has_resumable_order=is_resumable)
        self._saved_run = {}

    def _make_first_advance(self, trainer: L.Trainer, resume_point: ResumePoint) -> Any:
        """Return the loop's first `advance`, which continues after the file's last micro-batch."""
        loop = trainer.fit_loop.epoch_loop

        def advance(fetcher: Any) -> None:
            restore_method(loop, "advance")
            after_resuming_within_epoch(trainer)
            if self._max_steps is not None:
                loop.max_steps = self._max_steps
            if resume_point == "step end":
                loop.advance(fetcher)
            skip_next_validation(trainer, resume_point == "after validation")

        return advance

    def _fast_forward_loaders(self, trainer: L.Trainer, is_mid_epoch: bool) -> None:
        """Seed the training loaders by (seed, epoch) and skip to the position of the checkpoint.

        Loaders with `state_dict` have restored their own position. An iterator is not read,
        because it can be read only once: reading from it here would lose its first batch.
        """
        # Lightning's objects: the fetcher reads batches from the combined loader, which has all
        # training loaders in the list `flattened`
        fetcher = data_fetcher(trainer)
        loader = combined_loader(trainer)
        if fetcher is None or loader is None:  # bool(loader) would need a length
            return
        progress = trainer.fit_loop.epoch_loop.batch_progress
        # micro-batches of the epoch before the checkpoint; none after the last one
        num_done = progress.current.ready if is_mid_epoch and not progress.is_last_batch else 0
        keeps_position = [
            isinstance(train_loader, Stateful | Iterator) for train_loader in loader.flattened
        ]
        _print_iterators(loader.flattened)  # a warning: a resume from an iterator is not exact
        if not any(keeps_position):
            self._start_all_loaders(trainer, num_done)
        elif not all(keeps_position) and combined_iterator(loader) is not None:
            # only the loaders that keep no position get a new iterator, at `num_done`
            self._seed_epoch(trainer, num_done)
            for index, train_loader in enumerate(loader.flattened):
                if not keeps_position[index]:
                    iterator = iter(train_loader)
                    # `_seed_epoch` set the start of loaders that can skip by their sampler;
                    # of any other loader the batches are read again
                    for _ in range(0 if can_skip(train_loader, num_done) else num_done):
                        next(iterator, None)
                    combined_iterator(loader).iterators[index] = iterator
        else:  # all loaders keep their position, or no iterator of them exists yet
            return
        if is_mid_epoch:  # the loader is at its position; Lightning assumes that it cannot be
            warnings.filterwarnings("ignore", ".*your dataloader is not resumable")

    def _start_all_loaders(self, trainer: L.Trainer, num_done: int) -> None:
        """Start the epoch's iterators after `num_done` batches; no loader keeps its own position.

        The batches are skipped without a read of the data, if all loaders can; else they are read
        again.
        """
        fetcher, loader = data_fetcher(trainer), combined_loader(trainer)
        assert fetcher is not None
        assert loader is not None
        # Lightning's default fetcher; another one passes its iterator to the user's step
        can_skip_all = is_prefetching(fetcher) and fetcher.length is not None
        can_skip_all = can_skip_all and all(
            can_skip(train_loader, num_done) for train_loader in loader.flattened
        )
        self._seed_epoch(trainer, num_done if can_skip_all else 0)
        self._seed_fetch(trainer, 0)  # the default generators, as before batch 0 of the epoch
        iter(fetcher)  # Lightning's fetcher stores its iterators
        if num_done and not can_skip_all:
            self._replay_batches(trainer, num_done)

    def _replay_batches(self, trainer: L.Trainer, num_done: int) -> None:
        fetcher = data_fetcher(trainer)
        assert fetcher is not None
        print_rank_zero(
            f"the data cannot be skipped: {num_done} batches are read again to reach the position"
        )
        for batch in range(num_done):
            self._seed_fetch(trainer, batch + 1 if fetcher.length is None else batch)
            next(fetcher, None)
        fetcher.fetched -= num_done  # Lightning adds the batches before the checkpoint

    def _seed_epoch(self, trainer: L.Trainer, num_skip: int = 0) -> None:
        epoch = trainer.fit_loop.epoch_progress.current.processed  # type: ignore[attr-defined]
        seed_all(self._seed, epoch, -1, trainer.lightning_module.device)
        loader = combined_loader(trainer)
        for number, train_loader in enumerate(loader.flattened if loader is not None else []):
            set_sampler_epoch(train_loader, epoch)
            self._seed_loader(
                train_loader, 2 * number, epoch, num_skip if can_skip(train_loader, num_skip) else 0
            )

    def _seed_loader(self, loader: Any, stream_id: int, epoch: int, num_skip: int = 0) -> None:
        """Set the seed of the next iteration of a torch DataLoader; ignore other loaders."""
        if isinstance(loader, DataLoader) and not isinstance(loader, Stateful):
            seeder = BatchSeeder.for_loader(loader)
            seeder.set_epoch(stream_id, self._seed, self._rank, epoch, num_skip)
            if seeder not in self._seeders:
                self._seeders.append(seeder)

    def _seed_validation(self, trainer: L.Trainer) -> None:
        """Seed each validation by its position in the run, independent of earlier draws."""
        loop = trainer.fit_loop.epoch_loop.val_loop
        run = type(loop).run

        def run_seeded() -> Any:
            with validation_loaders(trainer) as val_loaders:
                position = trainer.fit_loop.total_batch_idx
                seed = hash_seed(VALIDATION_STREAM, self._seed, self._rank, position)
                seed_default_generators(seed, trainer.lightning_module.device)
                for index, val_loader in enumerate(val_loaders):
                    self._seed_loader(val_loader, 2 * index + 1, position)
            return run(loop)

        replace_method(loop, "run", run_seeded)

    def _seed_other_loaders(self, trainer: L.Trainer) -> None:
        """Seed the generators before each batch, if a loader is not torch's and may draw numbers.

        A BatchSeeder seeds the DataLoaders of torch, except those with their own `state_dict`
        (Stateful). A loader with `is_rng_free` draws nothing.
        """

        def needs_seeds(train_loader: Any) -> bool:
            has_seeder = isinstance(train_loader, DataLoader) and not isinstance(
                train_loader, Stateful
            )
            return not has_seeder and not getattr(train_loader, "is_rng_free", False)

        def seed_next_fetch() -> None:
            # `fetched`: number of batches of this epoch that were read
            self._seed_fetch(trainer, data_fetcher(trainer).fetched)

        loader = combined_loader(trainer)
        if loader is not None and any(map(needs_seeds, loader.flattened)):
            set_before_fetch(trainer, seed_next_fetch)  # called before each batch is read

    def _seed_fetch(self, trainer: L.Trainer, batch: int) -> None:
        epoch = trainer.fit_loop.epoch_progress.current.processed  # type: ignore[attr-defined]
        seed = hash_seed(FETCH_STREAM, self._seed, self._rank, epoch, batch)
        seed_default_generators(seed, trainer.lightning_module.device)


def _print_iterators(train_loaders: list[Any]) -> None:
    """Print a line for each training loader that is an iterator, whose resume is not exact."""
    for train_loader in train_loaders:
        if isinstance(train_loader, Iterator) and not isinstance(train_loader, Stateful):
            print_rank_zero(
                f"the training data are an iterator ({type(train_loader).__name__}), which "
                "cannot be rewound, so a resume is not exact; use an iterable such as a list"
            )


def _find_non_finite_raw(saved: Any) -> str | None:
    raw = saved.get("raw") if isinstance(saved, dict) else None
    if not isinstance(raw, dict):
        return None
    name = first_non_finite((n, value) for n, value in raw.items() if isinstance(value, Tensor))
    return f"the raw weight {name} of EMA" if name else None


def can_skip(loader: Any, batches: int) -> bool:
    """Whether the loader can start after `batches` batches of its epoch without reading them."""
    if not isinstance(loader, DataLoader) or isinstance(loader, Stateful):
        return False
    length = sized_len(loader)
    map_style = not isinstance(loader.dataset, IterableDataset)
    return map_style and length is not None and batches < length


def run_after_step(optimizer: Optimizer, action: Callable[[], None]) -> None:
    """Call `action` once after the optimizer's next step; ignore one without torch's hooks."""
    register = getattr(optimizer, "register_step_post_hook", None)
    if register is None or not hasattr(optimizer, "_optimizer_step_post_hooks"):
        return

    def once(*_: Any) -> None:
        handle.remove()
        action()

    handle = register(once)


def seed_all(seed: int, index: int, rank: int, device: torch.device) -> int:
    """Seed the default generators of torch, Python and NumPy by a hash of (seed, index, rank).

    The hashes of different indices of one rank do not collide.
    """
    hashed_seed = hash_seed(seed, rank, index)
    seed_default_generators(hashed_seed, device)
    return hashed_seed


def renumber_params(parameters: list[Tensor], optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Renumber parameter ids of a saved optimizer state by their index in all parameters.

    Any param groups of any optimizer then have the ids that a sharded strategy expects. Ids that
    are names (in a sharded checkpoint) or that this rank does not have are kept.

    Args:
        parameters: all parameters of the module, in the order of `named_parameters()`.
        optimizer: its groups have the parameters in the order of the saved ids.
        state: the optimizer's `state_dict()`, which is changed.
    """
    indices = {parameter: index for index, parameter in enumerate(parameters)}
    new_ids: dict[int, int] = {}  # by the saved id
    saved_groups = state.get("param_groups", [])
    # not strict, because a state_dict in another format than torch's may have no groups
    for group, saved_group in zip(optimizer.param_groups, saved_groups, strict=False):
        for parameter, old_id in zip(group["params"], saved_group["params"], strict=True):
            if not isinstance(old_id, int):
                return
            # a parameter outside the module is numbered after all others
            new_ids[old_id] = indices.setdefault(parameter, len(indices))
    for saved_group in saved_groups:
        saved_group["params"] = [new_ids[old_id] for old_id in saved_group["params"]]
    if new_ids:
        state["state"] = {
            new_ids.get(old_id, old_id): values for old_id, values in state["state"].items()
        }


def normalize_progress(loops: dict[str, Any]) -> ResumePoint:
    """Normalize the saved counters of the fit loop; return the position of the checkpoint.

    Lightning counts ready, started, processed and completed (r s p c) epochs and micro-batches:

        written in                          epochs r s p c   batches r s p c
        on_train_batch_end                  1 1 0 0          4 4 4 3   before validation
        a validation, or a stop in it       1 1 0 0          4 4 4 4   before validation
        on_validation_end                   1 1 0 0          4 4 4 4   after validation
        on_train_epoch_end, and later       1 1 1 0/1        6 6 6 6   epoch end
        the same, stopped by max_steps      1 1 1 0/1        4 4 4 4   step end: epoch not complete
    """
    # each has two sets of counters: `current` and `total`
    epochs, batches = loops["epoch_progress"], loops["epoch_loop.batch_progress"]
    epoch_counts, batch_counts = epochs["current"], batches["current"]
    if batch_counts["processed"] == 0 or batch_counts["processed"] != batch_counts["ready"]:
        return "start"  # nothing trained yet, or written within a step: Lightning's own resume
    if epoch_counts["ready"] != epoch_counts["started"]:
        # written in on_train_epoch_start, which runs again
        # in both sets of counters
        _copy_counts(epochs, source="started", target="ready")
    if epoch_counts["processed"] == epoch_counts["ready"]:
        if batches["is_last_batch"]:
            _copy_counts(epochs, source="processed", target="completed")
            return "epoch end"
        for counts in epochs.values():  # max_steps stopped the epoch, which is not complete
            counts["processed"] = counts["completed"] = counts["ready"] - 1
        resume_point = "step end"
    else:
        validation = loops["epoch_loop.val_loop.batch_progress"]
        is_validation_complete = validation["is_last_batch"] and (
            validation["current"]["completed"] == validation["current"]["ready"]
        )
        # otherwise the counters are of an earlier validation
        is_validation_of_batch = batch_counts["completed"] == batch_counts["processed"]
        has_validated = is_validation_of_batch and is_validation_complete
        resume_point = "after validation" if has_validated else "before validation"
    # Lightning's loop then finds no micro-batch that was begun and not completed
    for key in ("started", "processed", "completed"):
        _copy_counts(batches, source="ready", target=key)
    return resume_point


def _copy_counts(progress: dict[str, Any], source: str, target: str) -> None:
    for counts in (progress["current"], progress["total"]):
        counts[target] = counts[source]
