"""Command line of fit, validate, test and predict: LightningCLI with Ravine's Trainer."""

import enum
import inspect
import shlex
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, cast, get_args

import yaml
from jsonargparse import (
    _parameter_resolvers,
    _signatures,
    _typehints,
    get_loader,
    set_loader,
    set_parsing_settings,
)
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import ArgsType, LightningArgumentParser
from lightning.pytorch.strategies import StrategyRegistry
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.model_helpers import is_overridden

import ravine.callbacks
import ravine.datamodules
import ravine.lightning_modules
import ravine.strategies  # only imported classes are found by a bare name
from ravine.callbacks.base import find_callbacks
from ravine.callbacks.checkpointing.exact_resume import ExactResume
from ravine.callbacks.checks.missing_validation import interval_notice
from ravine.callbacks.checks.run_checks import RunChecks
from ravine.errors import UsageError
from ravine.lightning_compat.command_line import CommandLine
from ravine.lightning_modules import TaskModule
from ravine.strategies.rank_agreement import flatten_config

from . import resume_command, resume_path
from .config import callback_flags, presets, saved_config, trust
from .config import errors as config_errors
from .config.config_changes import changed_arguments, report_changes
from .config.saved_config import ConfigSaver
from .config.trust import packages_to_trust
from .error_report import is_raised_by_parser, program_name, unwrap_error
from .micro_batch_search import resolve_accumulation
from .module_commands import check_command
from .resume_path import iter_values
from .run_dir import check_run_links, raise_if_run_dir_removed, remove_empty_run_dir
from .run_folders import record
from .trainer import Trainer

STRATEGY_KEY_PREFIX = "trainer.strategy."  # prefix of the strategy's arguments


def prefer_ravine_classes(find: Callable[..., list[str]]) -> Callable[..., list[str]]:
    """Wrap the class lookup: of two classes with the same name it returns Ravine's.

    Without this, `Checkpoint` is ambiguous and the parser accepts neither class.
    """

    def filter_paths(*args: Any, **kwargs: Any) -> list[str]:
        paths = find(*args, **kwargs)
        ravine_names = {path.rpartition(".")[2] for path in paths if path.startswith("ravine.")}
        return [
            p for p in paths if p.startswith("ravine.") or p.rpartition(".")[2] not in ravine_names
        ]

    return filter_paths


load_yaml = get_loader("yaml")


def drop_unwritable_params(find: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
    """Wrap the signature lookup: drop arguments whose default cannot be written to a config.

    The class keeps its default. To set such an argument, the user passes a function that builds the
    object.
    """

    def filter_params(*args: Any, **kwargs: Any) -> list[Any]:
        return [p for p in find(*args, **kwargs) if is_writable_default(p.default, p.annotation)]

    return filter_params


def is_writable_default(default: Any, hint: Any) -> bool:
    """Return whether a config can hold a default: no sentinel, no enum without its type hint."""
    if isinstance(default, enum.Enum):
        return type(default) in (hint, *get_args(hint))
    return type(default) is not object


def prefer_constructor_errors(fail: Callable[..., NoReturn]) -> Callable[..., NoReturn]:
    """Wrap the union error: put errors raised by a constructor before type errors of the parser.

    The parser keeps only the first error as the cause: for `str | Strategy` that of `str`.
    """

    def raise_sorted(subtypes: Any, value: Any, errors: list[Exception]) -> NoReturn:
        fail(subtypes, value, sorted(errors, key=lambda e: is_raised_by_parser(unwrap_error(e))))

    return raise_sorted


_typehints.raise_union_unexpected_value = prefer_constructor_errors(
    _typehints.raise_union_unexpected_value
)
_typehints.get_all_subclass_paths = prefer_ravine_classes(_typehints.get_all_subclass_paths)
cast(Any, _signatures).get_signature_parameters = drop_unwritable_params(
    _parameter_resolvers.get_signature_parameters
)


class RavineCLI(CommandLine):
    """The commands fit, validate, test and predict."""

    def __init__(self, argv: list[str], checkpoint_path: Path | None) -> None:
        """Parse the arguments and run the command: all in the constructor of LightningCLI.

        Args:
            argv: the command (fit, ...) and its arguments.
            checkpoint_path: the checkpoint of `--ckpt_path`, whose saved arguments precede `argv`;
                None without one.
        """
        self.checkpoint_path = checkpoint_path
        self.command = argv[0]
        # without --trust, and the packages that it names: their classes may be imported
        argv, self.trusted_packages = trust.split_trust_flags(argv)
        # without `--trainer.callbacks.Muon.lr` and `--optimizer.lr`: the parser lacks such flags
        argv, self.callback_flags = callback_flags.split_flags(argv)
        self.changed_keys: list[str] = []  # config keys that differ from the checkpoint
        self.saved_config_values: saved_config.Config = {}  # of the checkpoint
        super().__init__(
            trainer_class=Trainer,
            save_config_callback=ConfigSaver,  # type: ignore
            # the list itself, which `parse_arguments` fills before the callback is built
            save_config_kwargs={"changed_keys": self.changed_keys},
            seed_everything_default=0,
            # raise errors instead of an exit, and read variables such as PL_FIT__SEED_EVERYTHING
            parser_kwargs={"exit_on_error": False, "default_env": True},
            auto_configure_optimizers=False,  # the optimizer must be built after the net
            args=argv,
        )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]  a static method there
        """Return the subcommand that runs; parsers of the other three would take 0.2 s."""
        return {self.command: super().subcommands()[self.command]}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add `--print_groups`, and to `fit` `--allow_changed_data`."""
        text = "list the parameters of each rule of the optimizer plan"
        parser.add_argument("--print_groups", action="store_true", help=text)
        if self.command == "fit":
            text = "resume although the data or the tokenizer are not those of the checkpoint"
            parser.add_argument("--allow_changed_data", action="store_true", help=text)

    def instantiate_classes(self) -> None:
        """Build trainer, model and data; the ranks first compare their configurations."""
        super().instantiate_classes()
        for callback in cast(Any, self.trainer).callbacks:
            if isinstance(callback, RunChecks):
                callback.format_notice = format_notice  # with flags, which a script does not have
        for report in find_callbacks(self.trainer, ravine.callbacks.OutOfMemoryReport):
            report.uses_flags = True
        config = self._resolved_config(self.subcommand or "fit")
        if self.saved_config_values:
            cast(Trainer, self.trainer).changed_arguments = changed_arguments(
                self.saved_config_values, config
            )
        cast(Trainer, self.trainer).resume_command = partial(resume_command.make_command, config)
        cast(Trainer, self.trainer).check_same_config_on_ranks(flatten_config(config))

    def before_fit(self) -> None:
        """Pass `--allow_changed_data` and `--print_groups` on; LightningCLI calls this."""
        if self.config_value("allow_changed_data"):
            for callback in find_callbacks(self.trainer, ExactResume):
                callback.accept.append("data")
        # --print_groups lists the parameters of each rule of the optimizer plan
        if not self.config_value("print_groups"):
            return
        # OptimizerPlan and its subclasses, such as Muon, have this attribute
        plans = [
            callback
            for callback in cast(Any, self.trainer).callbacks
            if hasattr(callback, "print_groups")
        ]
        if not plans:
            raise UsageError(
                "--print_groups needs OptimizerPlan, and the model builds its own optimizer",
                flag="--optimizer=AdamW",
            )
        for plan in plans:
            plan.print_groups = True

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse the checkpoint's arguments, then the user's, which take precedence.

        The constructor of LightningCLI calls this; it sets `config`, the parsed arguments.
        `--print_config` prints them and ends the program.

        Args:
            parser: the parser of all commands.
            args: the command and the user's arguments.
        """
        argv: list[str] = args  # type: ignore
        print_words = [word for word in argv if word.startswith("--print_config")]
        # without a checkpoint and flags of one callback, the first parse has all values
        if not print_words or not (self.checkpoint_path or self.callback_flags):
            self._parse(parser, argv)
            return
        # The first parse lacks the checkpoint's callbacks. Its lines are not part of the config.
        with redirect_stdout(sys.stderr):
            argv = self._parse(parser, [word for word in argv if word not in print_words])
        extra_argv = callback_flags.to_argv(self.config[argv[0]])
        config_errors.parse_argv(parser, [*argv, *extra_argv, *print_words])

    def _parse(self, parser: LightningArgumentParser, argv: list[str]) -> list[str]:
        """Set `config` to the arguments of the checkpoint and the user.

        Args:
            parser: the parser of all commands.
            argv: the command and the user's arguments.

        Returns:
            The command and all arguments, except the flags that address one callback.
        """
        # the user's values, each with its key, from flags and from configs
        values = list(iter_values(argv))
        if self.checkpoint_path:
            self.saved_config_values = saved_config.load_saved_config(self.checkpoint_path)
        has_model = any(value.key.startswith("model") for value in values)
        if self.checkpoint_path and not self.saved_config_values and not has_model:
            raise UsageError(
                f"{self.checkpoint_path} was not written by a command, so it does not name its "
                "model",
                flag=f"{program_name()} {argv[0]} --ckpt_path={self.checkpoint_path} --model=NAME "
                "--data=NAME",
            )
        # Classes that the user names are trusted. Of others, the checkpoint may name those of
        # Ravine, torch.nn, torch.optim and Lightning's callbacks.
        flag_values = [flag.as_value() for flag in self.callback_flags]
        trust_policy = trust.TrustPolicy(
            self.trusted_packages, trust.find_dotted_names([*values, *flag_values])
        )
        config, source = self.saved_config_values, str(self.checkpoint_path)
        # raises an error for a config or --model of another task, before its values are compared
        config_errors.check_model_of_checkpoint(config, values, source, argv[0])
        is_fit = argv[0] == "fit"
        # for a fit, `callbacks_argv` checks the callbacks, of which it may need none
        trust_policy.check_config(config, source, with_callbacks=not is_fit)
        saved_argv: list[str] = []
        if config:
            # model, data, seed and others as flags. Later flags win, so the user's follow.
            saved_argv = saved_config.to_argv(config, values, argv[0], source)
        if config and is_fit:
            saved_argv += saved_config.callbacks_argv(config, values, trust_policy, source)
        argv = [argv[0], *saved_argv, *argv[1:]]
        try:
            self.config = config_errors.parse_argv(parser, argv)
        except UsageError:
            # raises another error if the checkpoint's own values are wrong
            saved_config.check_parsed_alone(parser, [argv[0], *saved_argv], source)
            raise
        if config:
            argv = self._add_missing_parts(parser, argv, trust_policy)
        # flags such as `--trainer.callbacks.Muon.lr=0.01` change the parsed callbacks
        callback_flags.apply_flags(parser, argv[0], self.config[argv[0]], self.callback_flags)
        if config:
            self._report_changes(argv[0], is_named=any(v.key == "trainer.name" for v in values))
        if is_fit:
            model = self.config[argv[0]]["model"]
            class_path = model["class_path"] if "class_path" in model else str(model)
            for note in callback_flags.replacement_notes(values, class_path):
                rank_zero_only(print)(note)
        return argv

    def _add_missing_parts(
        self, parser: LightningArgumentParser, argv: list[str], trust_policy: trust.TrustPolicy
    ) -> list[str]:
        """Parse again if the user's configs lack a transform or the data source of the checkpoint.

        Args:
            parser: the parser of all commands.
            argv: the command, the checkpoint's arguments, and the user's.
            trust_policy: decides which callbacks of the checkpoint may be imported.

        Returns:
            All arguments, with those that were added.
        """
        # `_resolved_config`: the parsed arguments as plain values, with all defaults
        parsed, source = self._resolved_config(argv[0]), str(self.checkpoint_path)
        extra_argv = saved_config.extra_argv(self.saved_config_values, parsed, trust_policy, source)
        if extra_argv:
            argv = [*argv, *extra_argv]
            self.config = config_errors.parse_argv(parser, argv)
        return argv

    def _report_changes(self, command: str, is_named: bool) -> None:
        """Print the differences from the checkpoint's configuration; check the run's folder.

        Args:
            command: the command.
            is_named: whether the user gives the name of the run; else it is the checkpoint's.
        """
        resolved = self._resolved_config(command)
        if not is_named:
            root = resolved["trainer"]["default_root_dir"] or "."
            # raises an error if a link in the run's path would lead out of the folder of runs
            check_run_links(resolved["trainer"]["name"], root)
        self.changed_keys += report_changes(
            self.saved_config_values, resolved, str(self.checkpoint_path), command
        )

    def after_fit(self) -> None:
        """Print the run directory and the next command; LightningCLI calls this after `fit`."""
        paths = [
            callback.last_model_path or callback.best_model_path
            for callback in self.trainer.checkpoint_callbacks
            if isinstance(callback, ModelCheckpoint)
        ]
        saved_paths = [path for path in paths if path]  # "" if nothing was saved
        if not saved_paths or not self.trainer.is_global_zero:
            return
        folder, step = str(self.trainer.log_dir), self.trainer.global_step
        config = self._resolved_config("fit")
        command = resume_command.make_command(
            config, saved_paths[0], resume_command.longer_run_flags(self.trainer)
        )
        record.write_command(folder, command)
        callbacks: list[Any] = self.trainer.callbacks  # type: ignore
        # None if training did not start.
        # ConfigSaver: the callback that saves the configuration, and notes the step at which
        # training starts
        start_step = next(
            (callback.start_step for callback in callbacks if isinstance(callback, ConfigSaver)), 0
        )
        # the resumed checkpoint was already at max_steps
        if start_step is None or step <= start_step:
            print(
                f"no step was trained: {saved_paths[0]} is at step {step}, the last step of the run"
            )
            print(resume_command.resume_line(command))
            return
        # a message if the fit ended without any validation, else None
        if unvalidated := missing_validation_message(self.trainer):
            print(unvalidated)
        print(f"done: {folder}")
        print(resume_command.resume_line(command))
        # None for a model without a further command
        if (subcommand := next_command(self.model, self.datamodule)) is not None:
            # packages of the user whose classes the checkpoint names
            packages = packages_to_trust(resume_command.saved_form(config))
            trusted = f" {trust.TRUST_FLAG}={','.join(packages)}" if packages else ""
            path = shlex.quote(saved_paths[0])
            print(f"next: {program_name()} {subcommand}{trusted} --ckpt_path {path}")

    def run_subcommand(self, subcommand: str) -> None:
        """Run the subcommand; an error gets the newest checkpoint as an attribute."""
        # raises an error if the module lacks the method that the command needs
        check_command(subcommand, self.model, self.checkpoint_path)
        try:
            super().run_subcommand(subcommand)
        except BaseException as error:
            trainer = cast(Trainer, self.trainer)
            # GracefulStop has written a file that no checkpoint callback knows
            last_path = getattr(error, "checkpoint", None) or find_last_checkpoint(trainer)
            error.checkpoint = last_path or self.checkpoint_path  # type: ignore
            if subcommand == "fit" and last_path and trainer.is_global_zero and trainer.run_dir:
                config = self._resolved_config(subcommand)
                record.write_command(
                    trainer.run_dir, resume_command.make_command(config, str(last_path))
                )
            remove_empty_run_dir(trainer)
            raise_if_run_dir_removed(trainer, error)
            raise

    def _resolved_config(self, command: str) -> saved_config.Config:
        return saved_config.resolve_config(self.subcommand_parser(command), self.config[command])


def next_command(model: Any, datamodule: Any) -> str | None:
    """Return a subcommand that works for a trained model, or None if there is none.

    That is generate, else test, validate or predict, whose step and loader must exist.
    """
    if isinstance(model, TaskModule) and callable(getattr(model, "generate", None)):
        return "generate"  # needs no data
    steps = (
        ("test", "test_step", "test_dataloader"),
        ("validate", "validation_step", "val_dataloader"),
        ("predict", "predict_step", "predict_dataloader"),
    )
    for subcommand, step, loader in steps:
        has_loader = datamodule is not None and is_overridden(loader, datamodule)
        if is_overridden(step, model) and (has_loader or is_overridden(loader, model)):
            return subcommand
    return None


def format_notice(notice: UsageError) -> str:
    """Return a notice in one line, with what to type."""
    fix = f"; type {notice.flag}" if notice.flag else f"; {notice.hint}" if notice.hint else ""
    return f"{notice.problem}{fix}"


def missing_validation_message(trainer: Any) -> str | None:
    """Return a message if a fit ended without any validation, else None.

    It is not repeated if it was printed at the start of the run.
    """
    loop = trainer.fit_loop.epoch_loop
    num_batches = loop.batch_progress.total.completed
    if not trainer.enable_validation or loop.val_loop.batch_progress.total.ready:
        return None
    if any(isinstance(c, RunChecks) and c.has_printed_notice for c in trainer.callbacks):
        return None
    problem = f"no validation ran in {num_batches} batches"
    return format_notice(interval_notice(problem, trainer, num_batches))


def find_last_checkpoint(trainer: Trainer) -> str | None:
    """Return the newest existing checkpoint that this run has written."""
    paths = [
        getattr(callback, "last_model_path", None) for callback in trainer.checkpoint_callbacks
    ]
    paths = [path for path in paths if path and Path(path).exists()]
    return max(paths, key=lambda path: Path(path).stat().st_mtime_ns, default=None)


def expand_strategy_preset(argv: list[str]) -> list[str]:
    """Replace a strategy's name by its class and arguments if another argument of it is given.

    Otherwise a name that follows the argument would reset the argument. So

        --trainer.strategy=pp --trainer.strategy.num_microbatches=8

    becomes --trainer.strategy=MeshStrategy, the arguments of the preset pp, and the last flag.
    Returns `argv` unchanged for other strategies.
    """
    # the values of flags and configs, each with its key
    values = list(iter_values(argv))
    # STRATEGY_KEY_PREFIX is `trainer.strategy.`: an argument of the strategy
    arguments = [
        value.key.split(".")[2] for value in values if value.key.startswith(STRATEGY_KEY_PREFIX)
    ]
    names = [str(value.value) for value in values if value.key == "trainer.strategy"]
    if not arguments or not names or names[-1] not in StrategyRegistry:
        return argv
    # Lightning's table: a name gives a class and its arguments
    preset = StrategyRegistry[names[-1]]  # the last name is used
    strategy_class, init_args = preset["strategy"], preset["init_params"]
    mesh, ddp = ravine.strategies.MeshStrategy, ravine.strategies.DataParallelStrategy
    has_mesh_argument = bool({*arguments} & {*inspect.signature(mesh).parameters})
    # a DDP preset with an argument of MeshStrategy is left to the parser, which reports it
    if strategy_class is not mesh and (strategy_class is not ddp or has_mesh_argument):
        return argv
    other_words, remaining_words = [], iter(argv)
    for word in remaining_words:
        flag, equals, _ = word.partition("=")
        if flag != "--trainer.strategy":
            other_words.append(word)
        elif not equals:
            next(remaining_words, None)  # skip its value
    position = next(  # of the first argument; none if it comes from a config
        (i for i, word in enumerate(other_words) if word.startswith(f"--{STRATEGY_KEY_PREFIX}")),
        len(other_words),
    )
    class_flags = [f"--trainer.strategy={strategy_class.__name__}"]
    class_flags += [f"--{STRATEGY_KEY_PREFIX}{key}={value}" for key, value in init_args.items()]
    return [*other_words[:position], *class_flags, *other_words[position:]]


def load_bounded_yaml(text: str) -> Any:
    """Parse YAML for the parser after a check of its size; also for files that a value names."""
    if "*" in text or len(text) > 1000:
        presets.check_yaml_size(text, "a value")
    return load_yaml(text)


def configure_parser() -> None:
    """Restrict what a config may name and how large it may be, for all commands with configs."""
    # A config names classes: [] enforces jsonargparse's default denylist (commands, file deletion).
    set_parsing_settings(import_path_denylist=[], config_read_mode_fsspec_enabled=False)
    set_loader("yaml", load_bounded_yaml, (yaml.YAMLError,))


def run_argv(argv: list[str]) -> int:
    """Run one command and return the exit status; `main` prints the errors."""
    configure_parser()
    # tries steps in other processes, and replaces `auto` by the number of micro-batches
    argv = resolve_accumulation(argv)
    argv = expand_strategy_preset(argv)
    sys.argv[1:], checkpoint = resume_path.resolve_argv(
        argv
    )  # in place: other ranks run sys.argv again
    RavineCLI(sys.argv[1:], checkpoint)
    return 0
