"""ExactResume: a run that goes on from a checkpoint is the run that was never cut, bit for bit.

Lightning restores weights, optimizers and counters. Six things are left:

    dropout      the generators are a function of (seed, micro-batch, rank), set at each micro-batch
    optimizers   what a step draws is a function of (seed, step), equal on all ranks
    data         each batch is fetched under a seed of (seed, epoch, batch, rank): batch_seeds.py
    counters     every file is brought to one of the forms of `rewind`, whenever it was written
    validation   one that was due or under way at the cut runs; one that was complete does not
    order        a DataLoader's sampler draws anew what it drew, and no data are read for it;
                 an iterable data set is read again up to its place; a loader with `state_dict`
                 goes on by itself
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

from ravine.errors import UsageError
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
from ravine.strategies.checkpoint.saving import non_finite, save_as_usual, save_last
from ravine.strategies.checkpoint.validation import (
    changed_kinds,
    damaged_states,
    kind_mismatches,
    kinds,
    nan_entry,
    odd_record,
    shapes,
)
from ravine.strategies.share import Share

from ..checks.run_checks import before_training
from .batch_seeds import BatchSeeds, keep_generators, seed_of, set_generators
from .ema import use_raw_weights
from .run_comparison import (
    compare_callbacks,
    compare_data,
    compare_optimizers,
    compare_ranks_and_accumulation,
    has,
    run_properties,
    say,
)

VALIDATION, FETCH, STEP = -1, -2, -3  # what a seed is for; -4 and below are not used
ACCEPTED = ("EMA", "data", "optimizer")
Place = Literal["start", "epoch end", "step end", "before validation", "after validation"]


class ExactResume(Callback):
    """Make `fit(..., ckpt_path=...)` exact, on the same layout of processes.

    Works with any module, a stock Trainer and any checkpoint callback, and with DataLoaders as
    they are: random data sets, samplers and batch samplers, workers, persistent or not. Iterable
    data sets and plain iterables are read again up to their place; a line says so. Not covered:
    a data set or sampler that changes itself as it is read (other than by its random generators);
    an iterator, which a line at the start names; a file written between the micro-batches of one
    optimizer step, which lacks their gradients. Example: `Trainer(callbacks=[ExactResume()])`.

    A run that goes on with other data, without EMA or with other optimizers is refused: see
    comparing.py.

    Args:
        accept: differences from the checkpoint's run to permit: "EMA" (resume from the raw
            weights), "data", "optimizer" (with a new state).
    """

    takes_partial_gradients = True  # with ZeRO-1 a rank has the gradients that it owns

    def __init__(self, accept: list[str] | str | None = None) -> None:
        """The seed is that of `seed_everything`."""
        self.accept = [accept] if isinstance(accept, str) else list(accept or ())
        if unknown := [word for word in self.accept if word not in ACCEPTED]:
            raise UsageError(
                f"ExactResume: accept={unknown[0]!r}; allowed: {', '.join(ACCEPTED)}; "
                f"type --trainer.callbacks.accept=[{ACCEPTED[0]}]"
            )
        self._there: dict[str, Any] = {}  # what the checkpoint stores of its run
        self._raw: dict[
            str, Tensor
        ] = {}  # raw weights of a checkpoint with EMA, resumed without EMA
        self._seed, self._rank = 0, 0
        self._place: Place = "start"
        self._metrics: dict[str, Tensor] = {}
        self._max_steps: int | None = None
        self._plateau_due = False  # the file was written before its epoch's plateau schedules
        self._seeded: list[BatchSeeds] = []

    @property
    def state_key(self) -> str:
        """There is one a run."""
        return "ExactResume"

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Find the seed, and which share of the data this is: ranks that split one model agree."""
        before_training(trainer, pl_module, stage)
        if stage == "fit" and isinstance(trainer.precision_plugin, DoublePrecision):
            # Lightning loads the file's weights first and converts the net afterwards
            trainer.precision_plugin.convert_module(pl_module)
        self._place, self._max_steps, self._metrics = "start", None, {}
        self._plateau_due, self._there, self._raw = False, {}, {}
        self._seed = int(os.environ.get("PL_GLOBAL_SEED", torch.initial_seed()))
        self._rank = Share.of(trainer).rank
        for callback in trainer.checkpoint_callbacks if stage == "fit" else ():
            save_last(trainer, pl_module, callback)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Set the loop and the loaders to the position of the checkpoint."""
        fit = trainer.fit_loop
        self._compare_loaders(trainer)
        use_raw_weights(pl_module, self._raw)
        collected_metrics(trainer).update(self._metrics)  # schedulers read them
        restore_loader_states(trainer)
        within = self._place in ("step end", "before validation", "after validation")
        if within:
            finish = self._finish_iteration(trainer, self._place)
            replace_method(fit.epoch_loop, "advance", finish)
        elif self._place == "epoch end":
            after_resuming_at_epoch_end(trainer)
            if self._plateau_due:
                epochs = fit.epoch_progress.current
                epochs.completed -= 1  # as it is when Lightning steps them
                fit.epoch_loop.update_lr_schedulers("epoch", update_plateau_schedulers=True)
                epochs.completed += 1
        self._seed_other_loaders(trainer)
        self._seed_validation(trainer)
        self._wind(trainer, within)
        self._place = "start"

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Shuffle by (seed, epoch)."""
        self._shuffle(trainer)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Set the default generators, 7 us: what ran before this micro-batch leaves no trace."""
        reseed(self._seed, trainer.fit_loop.total_batch_idx, self._rank, pl_module.device)

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer
    ) -> None:
        """Set the default generators alike on all ranks: optimizers that draw keep equal weights.

        Where a module steps by itself, what its forward draws next goes on as before.
        """
        if not pl_module.automatic_optimization:
            after_step(optimizer, keep_generators(pl_module.device))
        number = seed_of(STEP, self._seed, trainer.global_step)
        set_generators(number, pl_module.device)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Restore the loops and loaders."""
        restore_before_fetch(trainer)
        restore_method(trainer.fit_loop.epoch_loop.val_loop, "run")
        for seeds in self._seeded:
            seeds.remove()
        self._seeded = []

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Restore the loops and loaders."""
        self.on_train_end(trainer, pl_module)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Restore the hooks."""
        for callback in trainer.checkpoint_callbacks:
            save_as_usual(pl_module, callback)

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Number the optimizers' parameters as `named_parameters()` does; keep seed and metrics."""
        if should_accumulate(trainer):
            rank_zero_warn(
                f"the checkpoint at step {trainer.global_step} is written between two micro-batches"
                " of one optimizer step and lacks their gradients: going on from it is not exact;"
                " make val_check_interval a multiple of accumulate_grad_batches"
            )
        states = checkpoint.get("optimizer_states", [])
        numbered = getattr(trainer.strategy, "numbered", False)  # MeshStrategy does it itself
        for optimizer, state in () if numbered else zip(trainer.optimizers, states, strict=True):
            number_by_place(list(pl_module.parameters()), optimizer, state)
        metrics = collected_metrics(trainer)
        parts = saves_sharded(trainer.strategy)
        checkpoint["exact_resume"] = run_properties(trainer) | {
            "seed": self._seed,
            "optimizer_shapes": None if parts else shapes(states),  # parts have an index of theirs
            "optimizer_kinds": None if parts else kinds(states),
            "metrics": {name: value.detach().cpu() for name, value in metrics.items()},
        }

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Bring the counters of the file, however it was written, to a known form."""
        if trainer.state.fn != "fit":
            return
        self._refuse_damaged(trainer, pl_module, checkpoint)
        epochs = checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]
        self._plateau_due = epochs["processed"] != epochs["completed"]
        self._place = rewind(checkpoint["loops"]["fit_loop"])
        kept = checkpoint.get("exact_resume", {})
        self._seed, self._metrics = kept.get("seed", self._seed), kept.get("metrics", {})
        self._there = kept
        compare_callbacks(trainer, checkpoint, self.accept)
        self._compare_optimizers(trainer, checkpoint)
        if "ema" in checkpoint and "EMA" in self.accept and not has(trainer, "EMA"):
            self._raw = checkpoint["ema"]["raw"]
        loop = trainer.fit_loop.epoch_loop
        if self._place == "before validation" and loop.max_steps == checkpoint["global_step"]:
            self._max_steps = loop.max_steps  # or Lightning would return before that validation
            loop.max_steps += 1

    def _refuse_damaged(
        self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Refuse a checkpoint from which training cannot resume, before any step."""
        states, names = checkpoint.get("optimizer_states"), list(dict(module.named_parameters()))
        kept = checkpoint.get("exact_resume", {})
        if wrong := odd_record(kept):
            raise CheckpointError(
                f"no training can go on from this checkpoint: {wrong}; choose another one:"
                " --ckpt_path FILE, or use its weights alone: Pretrained(path)"
            )
        wrong = kind_mismatches(module.state_dict(), checkpoint.get("state_dict", {}))
        if states is not None and not wrong:  # parts are checked by their reader
            steps = checkpoint.get("global_step", 0)
            wrong = damaged_states(states, kept.get("optimizer_shapes"), steps, names)
            wrong = wrong or changed_kinds(states, kept.get("optimizer_kinds"), names)
        bad = non_finite(module.named_parameters()) or nan_entry(states or [], names)
        bad = bad or _not_finite_raw(checkpoint.get("ema"))
        if not trainer.strategy.reduce_boolean_decision(bad is None) and not wrong:
            wrong = f"{bad or 'a tensor of another rank'} is not finite"
        if wrong:
            raise CheckpointError(
                f"no training can go on from this checkpoint: {wrong}; choose an earlier one:"
                " --ckpt_path FILE, or begin anew without --ckpt_path"
            )
        try:
            counts = deepcopy(checkpoint["loops"]["fit_loop"])
            rewind(counts)
            if not isinstance(counts.get("state_dict", {}).get("combined_loader", []), list):
                raise TypeError("the places of the loaders are no list")
        except (LookupError, TypeError, AttributeError) as error:
            raise CheckpointError(
                "no training can go on from this checkpoint: its loops, which count epochs and"
                f" batches, are incomplete ({type(error).__name__}: {error}); choose another one:"
                " --ckpt_path FILE, or use its weights alone: Pretrained(path)"
            ) from error

    def _compare_optimizers(self, trainer: L.Trainer, checkpoint: dict[str, Any]) -> None:
        """Compare when they exist, before their states are loaded."""
        there, strategy = self._there.get("optimizers"), trainer.strategy
        if there is None or checkpoint.get("optimizer_plan"):  # whose plan compares its members
            return
        load = type(strategy).load_optimizer_state_dict

        def compare_and_load(checkpoint: Any) -> None:
            restore_method(strategy, "load_optimizer_state_dict")
            here = [type(optimizer).__name__ for optimizer in strategy.optimizers]
            if compare_optimizers(here, there, self.accept):
                load(strategy, checkpoint)

        replace_method(strategy, "load_optimizer_state_dict", compare_and_load)

    def _compare_loaders(self, trainer: L.Trainer) -> None:
        if not self._there:
            return
        compare_data(trainer, self._there.get("data", {}), self.accept)
        loader = combined_loader(trainer)
        parts = loader.flattened if loader is not None else []
        if world := self._there.get("world"):
            compare_ranks_and_accumulation(
                trainer, world, all(isinstance(part, Stateful) for part in parts)
            )
        self._there = {}

    def _finish_iteration(self, trainer: L.Trainer, place: Place) -> Any:
        """The loop's first `advance`: what follows the micro-batch that was the file's last."""
        loop = trainer.fit_loop.epoch_loop

        def advance(fetcher: Any) -> None:
            restore_method(loop, "advance")
            after_resuming_within_epoch(trainer)
            if self._max_steps is not None:
                loop.max_steps = self._max_steps
            if place == "step end":
                loop.advance(fetcher)
            skip_next_validation(trainer, place == "after validation")

        return advance

    def _wind(self, trainer: L.Trainer, within: bool) -> None:
        """Seed the loaders by (seed, epoch) and skip to the position of the checkpoint."""
        fit, fetcher = trainer.fit_loop, data_fetcher(trainer)
        loader = combined_loader(trainer)  # whose truth is its length, which it need not have
        if fetcher is None or loader is None:
            return
        parts = loader.flattened
        progress = fit.epoch_loop.batch_progress
        done = progress.current.ready if within and not progress.is_last_batch else 0
        # an iterator can be iterated once: reading from it here would lose its first batch
        kept = [isinstance(part, Stateful | Iterator) for part in parts]
        for part in parts:
            if isinstance(part, Iterator) and not isinstance(part, Stateful):
                say(
                    f"the training data are an iterator ({type(part).__name__}): a resumed run "
                    "takes whatever it yields next, and is not exact; hand over an iterable"
                )
        if not any(kept):
            skips = is_prefetching(fetcher) and fetcher.length is not None
            skips = skips and all(can_skip(part, done) for part in parts)
            self._shuffle(trainer, done if skips else 0)
            self._seed_fetch(trainer, 0)
            iter(fetcher)
            if done and not skips:
                self._read_again(trainer, done)
        elif not all(kept) and combined_iterator(loader) is not None:
            self._shuffle(trainer, done)
            for number, part in enumerate(parts):
                if not kept[number]:
                    each = iter(part)
                    for _ in range(0 if can_skip(part, done) else done):
                        next(each, None)
                    combined_iterator(loader).iterators[number] = each
        else:
            return
        if within:  # it can be resumed from here on; Lightning assumes that it cannot
            warnings.filterwarnings("ignore", ".*your dataloader is not resumable")

    def _read_again(self, trainer: L.Trainer, done: int) -> None:
        fetcher = data_fetcher(trainer)
        assert fetcher is not None
        say(f"the data cannot be skipped: {done} batches are read again to reach their place")
        for batch in range(done):
            self._seed_fetch(trainer, batch + 1 if fetcher.length is None else batch)
            next(fetcher, None)
        fetcher.fetched -= done  # Lightning adds them

    def _shuffle(self, trainer: L.Trainer, skip: int = 0) -> None:
        epoch = trainer.fit_loop.epoch_progress.current.processed  # type: ignore[attr-defined]
        reseed(self._seed, epoch, -1, trainer.lightning_module.device)
        loader = combined_loader(trainer)
        for number, part in enumerate(loader.flattened if loader is not None else []):
            set_sampler_epoch(part, epoch)
            self._begin(part, 2 * number, epoch, skip if can_skip(part, skip) else 0)

    def _begin(self, part: Any, kind: int, epoch: int, skip: int = 0) -> None:
        """Announce an iteration to a loader of torch; others have no seeds of their own."""
        if isinstance(part, DataLoader) and not isinstance(part, Stateful):
            seeds = BatchSeeds.of(part)
            seeds.begin(kind, self._seed, self._rank, epoch, skip)
            if seeds not in self._seeded:
                self._seeded.append(seeds)

    def _seed_validation(self, trainer: L.Trainer) -> None:
        """Let a validation be a function of its place, whatever ran before it."""
        loop = trainer.fit_loop.epoch_loop.val_loop
        run = type(loop).run

        def run_seeded() -> Any:
            with validation_loaders(trainer) as parts:
                place = trainer.fit_loop.total_batch_idx
                number = seed_of(VALIDATION, self._seed, self._rank, place)
                set_generators(number, trainer.lightning_module.device)
                for each, part in enumerate(parts):
                    self._begin(part, 2 * each + 1, place)
            return run(loop)

        replace_method(loop, "run", run_seeded)

    def _seed_other_loaders(self, trainer: L.Trainer) -> None:
        """Seed before each batch of loaders that are not torch's, but those that draw nothing."""
        loader = combined_loader(trainer)
        parts = loader.flattened if loader is not None else []
        torchs = [isinstance(part, DataLoader) and not isinstance(part, Stateful) for part in parts]
        silent = [getattr(part, "draws_nothing", False) for part in parts]
        if all(a or b for a, b in zip(torchs, silent, strict=True)):
            return

        def before_fetch() -> None:
            self._seed_fetch(trainer, data_fetcher(trainer).fetched)

        set_before_fetch(trainer, before_fetch)

    def _seed_fetch(self, trainer: L.Trainer, batch: int) -> None:
        epoch = trainer.fit_loop.epoch_progress.current.processed  # type: ignore[attr-defined]
        number = seed_of(FETCH, self._seed, self._rank, epoch, batch)
        set_generators(number, trainer.lightning_module.device)


def _not_finite_raw(saved: Any) -> str | None:
    raw = saved.get("raw") if isinstance(saved, dict) else None
    if not isinstance(raw, dict):
        return None
    name = non_finite((n, value) for n, value in raw.items() if isinstance(value, Tensor))
    return f"the raw weight {name} beside the average" if name else None


def can_skip(loader: Any, batches: int) -> bool:
    """Whether the loader can begin after that many batches of its epoch without reading them."""
    if not isinstance(loader, DataLoader) or isinstance(loader, Stateful):
        return False
    length = sized_len(loader)
    map_style = not isinstance(loader.dataset, IterableDataset)
    return map_style and length is not None and batches < length


def after_step(optimizer: Optimizer, action: Callable[[], None]) -> None:
    """Do it once, after the optimizer's next step; nothing for one without torch's hooks."""
    register = getattr(optimizer, "register_step_post_hook", None)
    if register is None or not hasattr(optimizer, "_optimizer_step_post_hooks"):
        return

    def once(*_: Any) -> None:
        handle.remove()
        action()

    handle = register(once)


def reseed(seed: int, index: int, rank: int, device: torch.device) -> int:
    """Set the default generators of torch, Python and NumPy by a hash of (seed, index, rank).

    Of one rank no two indices collide.
    """
    number = seed_of(seed, rank, index)
    set_generators(number, device)
    return number


def number_by_place(parameters: list[Tensor], optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Rename parameter ids in a saved optimizer state to places in the list of all parameters.

    Any grouping of any optimizer then has the ids that a sharded strategy expects. Ids that are
    names (a sharded folder) or absent (another rank's business) stay.
    """
    place = {parameter: i for i, parameter in enumerate(parameters)}
    ids: dict[int, int] = {}
    for ours, saved in zip(optimizer.param_groups, state.get("param_groups", []), strict=False):
        for parameter, old in zip(ours["params"], saved["params"], strict=True):
            if not isinstance(old, int):
                return
            ids[old] = place.setdefault(parameter, len(place))  # one outside the module: after all
    for saved in state.get("param_groups", []):
        saved["params"] = [ids[old] for old in saved["params"]]
    if ids:
        state["state"] = {ids.get(old, old): values for old, values in state["state"].items()}


def rewind(loops: dict[str, Any]) -> Place:
    """Bring the fit loop's saved counters to a form that goes on exactly; say where it stands.

    Lightning counts ready, started, processed, completed of epochs and of micro-batches:

        written in                          epochs r s p c   batches r s p c
        on_train_batch_end                  1 1 0 0          4 4 4 3   before validation
        a validation, or a stop in it       1 1 0 0          4 4 4 4   before validation
        on_validation_end                   1 1 0 0          4 4 4 4   after validation
        on_train_epoch_end, and later       1 1 1 0/1        6 6 6 6   epoch end
        the same, stopped by max_steps      1 1 1 0/1        4 4 4 4   step end: not complete at all
    """
    epochs, batches = loops["epoch_progress"], loops["epoch_loop.batch_progress"]
    epoch, batch = epochs["current"], batches["current"]
    if batch["processed"] == 0 or batch["processed"] != batch["ready"]:
        return "start"  # nothing trained yet, or written within a step: Lightning does what it can
    if epoch["ready"] != epoch["started"]:  # written in on_train_epoch_start, which runs again
        _set(epochs, "ready", "started")
    if epoch["processed"] == epoch["ready"]:
        if batches["is_last_batch"]:
            _set(epochs, "completed", "processed")
            return "epoch end"
        for counts in epochs.values():
            counts["processed"] = counts["completed"] = counts["ready"] - 1
        place = "step end"
    else:
        validation = loops["epoch_loop.val_loop.batch_progress"]
        complete = validation["is_last_batch"] and (
            validation["current"]["completed"] == validation["current"]["ready"]
        )
        within = batch["completed"] == batch["processed"]  # else the validation is an earlier one
        place = "after validation" if within and complete else "before validation"
    for key in ("started", "processed", "completed"):
        _set(batches, key, "ready")
    return place


def _set(progress: dict[str, Any], key: str, other: str) -> None:
    for counts in (progress["current"], progress["total"]):
        counts[key] = counts[other]
