"""The command line proper: LightningCLI with our Trainer, reached through the front door."""

import enum
import inspect
import shutil
import sys
from collections.abc import Callable
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
from lightning.pytorch.utilities.model_helpers import is_overridden

import ravine.callbacks
import ravine.datamodules
import ravine.lightning_modules
import ravine.strategies  # bare class names are found among what is imported
from ravine.errors import RunError, UsageError
from ravine.lightning_compat.command_line import CommandLine
from ravine.strategies.rank_agreement import flatten

from . import resume_path as newest
from .config import errors as diagnosis
from .config import presets, saved_config, trust
from .config.saved_config import SavedConfig
from .error_report import by_parser, original, program
from .resume_path import given
from .trainer import ELSEWHERE, Trainer, check_links

OF_STRATEGY = "trainer.strategy."  # before the name of an argument


def ours_first(find: Callable[..., list[str]]) -> Callable[..., list[str]]:
    """Let `Checkpoint` mean ours: of two classes with one name the parser would take neither."""

    def found(*args: Any, **kwargs: Any) -> list[str]:
        paths = find(*args, **kwargs)
        ours = {path.rpartition(".")[2] for path in paths if path.startswith("ravine.")}
        return [p for p in paths if p.startswith("ravine.") or p.rpartition(".")[2] not in ours]

    return found


load_yaml = get_loader("yaml")


def plain_only(find: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
    """Leave out arguments whose default no config can hold (a sentinel object, an enum).

    The class keeps its default; to set such an argument takes a function of the user's own.
    """

    def found(*args: Any, **kwargs: Any) -> list[Any]:
        return [p for p in find(*args, **kwargs) if writable(p.default, p.annotation)]

    return found


def writable(default: Any, hint: Any) -> bool:
    """Whether a config can hold a default; the parser itself writes enums that it has hints of."""
    if isinstance(default, enum.Enum):
        return type(default) in (hint, *get_args(hint))
    return type(default) is not object


def constructors_first(fail: Callable[..., NoReturn]) -> Callable[..., NoReturn]:
    """Name as the cause what a constructor has raised, before what the parser says of other types.

    The parser keeps the first error alone: of `str | Strategy` the one of `str`.
    """

    def failed(subtypes: Any, value: Any, errors: list[Exception]) -> NoReturn:
        fail(subtypes, value, sorted(errors, key=lambda e: by_parser(original(e))))

    return failed


_typehints.raise_union_unexpected_value = constructors_first(
    _typehints.raise_union_unexpected_value
)
_typehints.get_all_subclass_paths = ours_first(_typehints.get_all_subclass_paths)
cast(Any, _signatures).get_signature_parameters = plain_only(
    _parameter_resolvers.get_signature_parameters
)


class Command(CommandLine):
    """fit, validate, test, predict."""

    def __init__(self, argv: list[str], checkpoint: Path | None) -> None:
        """Parse the words and run them; the checkpoint's own words come first."""
        self.checkpoint = checkpoint
        argv, self.trusted = trust.packages(argv)
        self.changed: list[str] = []  # keys that differ from the checkpoint
        super().__init__(
            trainer_class=Trainer,
            save_config_callback=SavedConfig,  # type: ignore
            save_config_kwargs={"changed": self.changed},
            seed_everything_default=0,
            parser_kwargs={"exit_on_error": False, "default_env": True},
            auto_configure_optimizers=False,  # it would be built before the net is
            args=argv,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """One flag for what is one question at any config: who trains which parameter?"""
        text = "list the parameters of each rule of the optimizer plan"
        parser.add_argument("--print_groups", action="store_true", help=text)

    def instantiate_classes(self) -> None:
        """Build trainer, model and data; the ranks compare the whole configuration first of all."""
        super().instantiate_classes()
        config = self._resolved(self.subcommand or "fit")
        cast(Trainer, self.trainer).compare_ranks(flatten(config))

    def before_fit(self) -> None:
        """Pass `--print_groups` on to the plan."""
        if not self.config_value("print_groups"):
            return
        plans = [c for c in cast(Any, self.trainer).callbacks if hasattr(c, "print_groups")]
        if not plans:
            raise UsageError(
                "--print_groups, and no callback plans the optimizers: the model has its own",
                flag="--trainer.callbacks+=OptimizerPlan --trainer.callbacks.optimizer=AdamW",
            )
        for plan in plans:
            plan.print_groups = True

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse what the checkpoint says, and then what the user says, who wins."""
        argv: list[str] = args  # type: ignore
        saved = saved_config.saved(self.checkpoint) if self.checkpoint else {}
        if self.checkpoint and not saved and not any(g.key[:5] == "model" for g in given(argv)):
            raise UsageError(
                f"{self.checkpoint} does not say which model it holds: no command has written it",
                flag=f"{program()} {argv[0]} --ckpt_path={self.checkpoint} --model=NAME "
                "--data=NAME",
            )
        admitted = trust.Trust(self.trusted, trust.named_in(given(argv)))
        typed = {each.key for each in given(argv)}
        typed |= {"config" for word in argv if word.partition("=")[0] == "--config"}
        admitted.check(saved, str(self.checkpoint), argv[0] != "fit" or "config" not in typed)
        argv = [argv[0], *saved_config.as_words(saved, argv[0], typed), *argv[1:]]
        self.config = diagnosis.parse(parser, argv)
        if saved:
            parsed, source = self._resolved(argv[0]), str(self.checkpoint)
            if more := saved_config.words_behind(saved, parsed, admitted, source, argv[0], typed):
                self.config = diagnosis.parse(parser, [*argv, *more])
            resolved = self._resolved(argv[0])
            if "trainer.name" not in typed:
                root = resolved["trainer"]["default_root_dir"] or "."
                check_links(resolved["trainer"]["name"], root)
            self.changed += saved_config.compare(saved, resolved, str(self.checkpoint), argv[0])

    def after_fit(self) -> None:
        """Say where everything is, and what to type next."""
        saved = [each.last_model_path or each.best_model_path
                 for each in self.trainer.checkpoint_callbacks if isinstance(each, ModelCheckpoint)
                 and (each.last_model_path or each.best_model_path)]  # fmt: skip
        if not saved or not self.trainer.is_global_zero:
            return
        folder, step = str(self.trainer.log_dir), self.trainer.global_step
        callbacks: list[Any] = self.trainer.callbacks  # type: ignore
        begun = next((each.begun for each in callbacks if isinstance(each, SavedConfig)), 0)
        if begun is None or step <= begun:
            print(f"nothing was trained: {saved[0]} is at step {step}, where the run was to end")
            print(f"next: the same words with --trainer.max_steps={2 * step}")
            return
        if unvalidated := without_validation(self.trainer):
            print(unvalidated)
        print(f"done: {folder}\nnext: {program()} {self._next_command()} --ckpt_path {saved[0]}")

    def _next_command(self) -> str:
        """What the model can do next, with the trust that its own classes need."""
        verb = "test" if is_overridden("test_step", self.model) else "validate"
        verb = "generate" if callable(getattr(self.model, "generate", None)) else verb
        owners = [type(each).__module__ for each in (self.model, self.datamodule) if each]
        packages = [name.partition(".")[0] for name in owners]
        foreign = sorted({name for name in packages if name not in ("ravine", "lightning")})
        return f"{verb} --trust={','.join(foreign)}" if foreign else verb

    def run_subcommand(self, subcommand: str) -> None:
        """Run the subcommand; an error carries the newest checkpoint."""
        try:
            super().run_subcommand(subcommand)
        except BaseException as error:
            trainer = cast(Trainer, self.trainer)
            error.checkpoint = last_checkpoint(trainer) or self.checkpoint  # type: ignore
            forget_unused(trainer)
            refuse_removed(trainer, error)
            raise

    def _resolved(self, command: str) -> saved_config.Config:
        return saved_config.resolved(self.subcommand_parser(command), self.config[command])


def without_validation(trainer: Any) -> str | None:
    """What to say of a fit whose validation was never due."""
    loop = trainer.fit_loop.epoch_loop
    trained = loop.batch_progress.total.completed
    if not trainer.enable_validation or loop.val_loop.batch_progress.total.ready:
        return None
    due, flags = f"val_check_interval={trainer.val_check_interval}", ""
    if (epochs := trainer.check_val_every_n_epoch) is not None:
        due += f", check_val_every_n_epoch={epochs}"
        flags = " --trainer.check_val_every_n_epoch=null"
    interval = max(1, trained // 2)
    return (
        f"no validation ran in {trained} batches: {due}; "
        f"type --trainer.val_check_interval={interval}{flags}"
    )


def last_checkpoint(trainer: Trainer) -> str | None:
    """The newest checkpoint that this run has written and that is there."""
    paths = [getattr(each, "last_model_path", None) for each in trainer.checkpoint_callbacks]
    paths = [path for path in paths if path and Path(path).exists()]
    return max(paths, key=lambda path: Path(path).stat().st_mtime_ns, default=None)


def refuse_removed(trainer: Trainer, error: BaseException) -> None:
    """Raise RunFolderRemoved if the run's folder was removed, instead of the error it caused."""
    folder, step = trainer._folder, trainer.global_step
    if folder and step and isinstance(error, Exception) and not Path(folder).is_dir():
        raise RunFolderRemoved(
            f"the run's folder {folder} was removed while the run wrote to it, at step {step}"
            f" ({type(error).__name__}); its checkpoints are gone with it; type the same again, and"
            " leave the folder until the run has ended"
        ) from error


class RunFolderRemoved(RunError):
    """The folder of a run was removed before its end."""


def forget_unused(trainer: Trainer) -> None:
    """Remove the folder of a run that failed before its first step, if nothing else is in it."""
    folder = trainer._folder
    if not folder or trainer.global_step or not trainer.is_global_zero:
        return
    names = [path.name for path in Path(folder).rglob("*") if path.is_file()]
    said = ("config.yaml", "hparams.yaml", ELSEWHERE)
    if all(name in said or name.startswith("events.out.") for name in names):
        shutil.rmtree(folder, ignore_errors=True)


def spelled_out(argv: list[str]) -> list[str]:
    """Replace the name of a strategy by its class where an argument of it is given as well.

    A name after the argument would otherwise take the argument back.

    spelled_out(["fit", "--trainer.strategy=pp", "--trainer.strategy.microbatches=8"])
    """
    values = list(given(argv))
    arguments = [each.key.split(".")[2] for each in values if each.key.startswith(OF_STRATEGY)]
    names = [str(each.value) for each in values if each.key == "trainer.strategy"]
    if not arguments or not names or names[-1] not in StrategyRegistry:
        return argv
    kind, how = (StrategyRegistry[names[-1]][key] for key in ("strategy", "init_params"))
    mesh, ddp = ravine.strategies.MeshStrategy, ravine.strategies.DataParallelStrategy
    for_mesh = bool({*arguments} & {*inspect.signature(mesh).parameters})
    if kind is not mesh and (kind is not ddp or for_mesh):
        return argv
    rest, words = [], iter(argv)
    for word in words:
        flag, equals, _ = word.partition("=")
        if flag != "--trainer.strategy":
            rest.append(word)
        elif not equals:
            next(words, None)  # its value
    at = next((i for i, word in enumerate(rest) if word.startswith(f"--{OF_STRATEGY}")), len(rest))
    chosen = [f"--trainer.strategy={kind.__name__}"]
    chosen += [f"--{OF_STRATEGY}{key}={value}" for key, value in how.items()]
    return [*rest[:at], *chosen, *rest[at:]]


def bounded(text: str) -> Any:
    """Read YAML as the parser does, also a file that a value names, after its size is checked."""
    if "*" in text or len(text) > 1000:
        presets.check_size(text, "a value")
    return load_yaml(text)


def run(argv: list[str]) -> int:
    """Run one command and return the exit status; errors are for the front door to word."""
    # A configuration names classes: those that run commands or delete files are denied.
    set_parsing_settings(import_path_denylist=[], config_read_mode_fsspec_enabled=False)
    set_loader("yaml", bounded, (yaml.YAMLError,))
    argv = spelled_out(argv)
    sys.argv[1:], checkpoint = newest.settle(argv)  # in place: the ranks repeat these words
    Command(sys.argv[1:], checkpoint)
    return 0
