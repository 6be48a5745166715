"""TaskModule: LightningModule base class that builds its net once, when the sizes are known.

The net is built late because callbacks and strategies act between `__init__` and the first step.
The data determine the net's sizes (`configure_from_data`), transforms modify the net, and the
strategy shards it. A task contains no code for transforms or sharding.
"""

import inspect
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Self, cast

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ravine.checkpoint_format import check_format, record_format
from ravine.datamodules.image_set import describe_classes
from ravine.errors import RunError, UsageError, UsageTypeError, suggest_names
from ravine.lightning_compat import attached_trainer, averaging_callbacks

from .nn.initial_values import InitialValues

PLAIN = (bool, int, float, str, tuple)  # types of class attributes that are settings, such as lr
FUSED_ADAMW_DEVICES = (
    "cpu",
    "cuda",
)  # devices with a fused AdamW kernel in every supported torch


class _NetSizeLimit(TorchDispatchMode):
    """Builds on the meta device, and raises if a net becomes far larger than its weights.

    The sizes come from a checkpoint, which may contain a width of 10**9 and four numbers.
    """

    def __init__(self, state: dict[str, Any]) -> None:
        super().__init__()
        self.is_exceeded = False
        sizes = [value.numel() for value in state.values() if isinstance(value, Tensor)]
        self.tensor_budget, self.element_budget = 100 * len(sizes) + 10_000, 16 * sum(sizes) + 2**24
        self.device = torch.device("meta")

    def __enter__(self) -> Self:
        self.device.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.device.__exit__(*error)

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        self.tensor_budget -= 1
        if isinstance(result, Tensor) and not result._is_view():
            self.element_budget -= result.numel()
        self.is_exceeded |= self.tensor_budget < 0 or self.element_budget < 0
        self.raise_if_exceeded()
        return result

    def raise_if_exceeded(self) -> None:
        """Raise UsageError if the net exceeds the limit."""
        if self.is_exceeded:
            raise UsageError(
                "the hyperparameters of the checkpoint describe a net far larger than its "
                "weights, so the file was changed or is damaged",
                ["a checkpoint that a trainer has written"],
                "choose another checkpoint",
                flag="--ckpt_path=FILE",
            )


def check_no_early_copies(callbacks: list[L.Callback]) -> None:
    """Raise UsageError for a callback that copied the module before its net was built."""
    for callback in callbacks:
        if isinstance(callback, averaging_callbacks()):
            name = type(callback).__name__
            raise UsageError(
                f"{name} copies the network in setup, before it is built, so that it would "
                "average nothing",
                ["ravine.callbacks.EMA"],
                f"replace {name} by EMA() in Trainer(callbacks=...)",
            )


class _ClassOnly(classmethod):
    """A classmethod that raises TypeError when called on an instance, as in Lightning."""

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        if instance is None:
            return super().__get__(None, owner)
        name = f"{type(instance).__name__}.{self.__func__.__name__}"

        def refuse(*_: Any, **__: Any) -> None:
            raise UsageTypeError(
                f"The classmethod `{name}` cannot be called on an instance, because it creates a "
                "new model",
                ["a call on the class"],
                f"use model = {name}(path)",
            )

        return refuse


_class_only = classmethod if TYPE_CHECKING else _ClassOnly


def _format_field(value: Any) -> str:
    is_names = isinstance(value, list | tuple) and all(isinstance(name, str) for name in value)
    return describe_classes(value) if value and is_names else str(value)


def imported_subclasses(kind: type) -> list[type]:
    """Return all imported subclasses, including indirect ones."""
    return [c for below in kind.__subclasses__() for c in (below, *imported_subclasses(below))]


def _is_defined_in_ravine(method: Any) -> bool:
    """Whether this package defines a method; other code may compute with parameter values."""
    return method.__module__.partition(".")[0] == __name__.partition(".")[0]


class TaskModule(L.LightningModule):
    """LightningModule whose net is created by `build_net()`, once, when the sizes are known.

    A subclass needs `build_net` and `training_step`:

        class Line(TaskModule):
            def build_net(self): return nn.Linear(1, 1)
            def training_step(self, batch, index): return F.mse_loss(self(batch[0]), batch[1])
    """

    unit: str = "samples"  # unit of `count_units` and of throughput
    progress_metrics: tuple[str, ...] = ()  # metrics of the progress bar, in place of the loss
    lr: float = 1e-3  # of the default optimizer only; OptimizerPlan sets its own
    # for messages: the datamodule that determines the net's sizes, and the flag for other data
    _datamodule_name, _data_flag = "LightningDataModule", ""

    def __init__(self) -> None:
        """Start without a net."""
        super().__init__()
        self.net: nn.Module | None = None  # not a class attribute, which would hide the submodule

    def build_net(self) -> nn.Module:
        """Create the net for a single device."""
        raise NotImplementedError(
            f"{type(self).__name__} has no method build_net(), which returns the net; define it"
        )

    def configure_from_data(self, datamodule: Any) -> None:
        """Read the net's sizes (vocabulary size, classes) from the data, before `build_net`."""

    def missing_data_error(self, description: str) -> UsageError:
        """Return the error for a net that is built before its sizes are known from the data."""
        name = type(self).__name__
        return UsageError(
            f"{name}: {description} must come from the data, but no datamodule is given",
            [self._datamodule_name, f"a checkpoint of {name}"],
            f"pass datamodule={self._datamodule_name}(...) to trainer.fit",
            flag=f"--data={self._datamodule_name}",
        )

    def check_data_fields(
        self, origin: str, values: Mapping[str, Any], known: Mapping[str, Any]
    ) -> None:
        """Raise UsageError for data, or a checkpoint, that does not fit the model.

        Args:
            origin: what has these values: "the datamodule" or "the checkpoint".
            values: sizes and names that come from the data, by name.
            known: those that the model already has; their values must be equal.
        """
        # `_format_field` shortens long lists; `_data_flag` is the flag of the data, for the message
        for name, value in known.items():
            if values[name] != value:
                raise UsageError(
                    f"{type(self).__name__}: {origin} has {name} {_format_field(values[name])}, "
                    f"but the model has {name} {_format_field(value)}",
                    [f"{name} {_format_field(value)}"],
                    "use the data that the model was trained on",
                    flag=self._data_flag,
                )

    def saved_data_fields(
        self, checkpoint: dict[str, Any], section: str, names: Collection[str]
    ) -> dict[str, Any]:
        """Return the section of a checkpoint that contains what the model took from the data.

        A task writes the section in `on_save_checkpoint`, and reads it in `on_load_checkpoint`.

        Args:
            checkpoint: content of the checkpoint.
            section: key of the section, such as "images" or "language".
            names: keys that the section must have.

        Raises:
            UsageError: the checkpoint has no such section, or a name is missing.
        """
        saved = checkpoint.get(section)
        if not isinstance(saved, dict) or not set(names) <= saved.keys():
            task = type(self).__name__
            raise UsageError(
                f"{task}: the checkpoint does not contain {' and '.join(names)} of a {task}",
                [f"a checkpoint that was saved during training of a {task}"],
                "choose another checkpoint",
                flag="--ckpt_path=FILE",
            )
        return saved

    def setup(self, stage: str) -> None:
        """Configure the model from the datamodule, which is already set up."""
        if self.net is None:
            check_no_early_copies(self.trainer.callbacks)  # type: ignore[attr-defined]
        datamodule = getattr(self.trainer, "datamodule", None)
        if datamodule is not None:
            self.configure_from_data(datamodule)

    def configure_model(self) -> None:
        """Build the net unless it exists; callbacks and strategies modify it from outside.

        Lightning calls this hook after `setup`. The initial values depend on the seed and the
        parameter's name only, if the constructor can be recorded. A sharding strategy draws them
        later, each rank its own part.
        """
        if self.net is not None:
            return
        device = torch.get_default_device()
        # recorded: parameters are created without memory, and their random distributions are kept;
        # a constructor of other code may compute with values, which cannot be recorded
        is_recordable = _is_defined_in_ravine(type(self).build_net) and device.type != "meta"
        # the net without memory, and how each parameter is drawn; None if the constructor cannot be
        # recorded after all
        initial_values = InitialValues.record(self.build_net) if is_recordable else None
        if initial_values is None:
            self.net = self.build_net()
        elif self._can_defer_init():
            self.net = initial_values.net  # on the meta device
            # the strategy draws them after sharding; in `__dict__`: not a part of the module
            self.__dict__["initial_values"] = initial_values
        else:
            self.net = initial_values.materialize(device)  # draws all values

    def _can_defer_init(self) -> bool:
        """Whether no code of the task needs parameter values before the strategy is set up.

        A callback that needs the values draws them before it changes the net.
        """
        return bool(self.__dict__.get("strategy_draws_values")) and _is_defined_in_ravine(
            type(self).configure_model
        )

    def forward(self, *args: Any) -> Any:
        """Apply the net."""
        if self.net is None:
            raise RunError(
                f"{type(self).__name__} has no net yet", hint="call configure_model() first"
            )
        return self.net(*args)

    def configure_optimizers(self) -> Any:
        """Create the default optimizer: AdamW on all trainable parameters.

        It is used if no optimizer callback is attached. The fused kernel allocates no temporary
        tensors: a step of torch's loop over parameters has two of the size of the largest
        parameter. Values may differ in the last bit. The fused kernel is not used for
        half-precision parameters, which it rounds differently. With a gradient scaler it is not
        used either, as Lightning could not clip.
        """
        parameters = [p for p in self.parameters() if p.requires_grad]
        if any(p.dtype == torch.float16 for p in parameters):
            raise UsageError(
                "AdamW: eps=1e-8 is 0 in float16, so that weights become NaN (0 / 0)",
                ["16-mixed", "bf16-mixed", "bf16-true", "32-true"],
                "use Trainer(precision='16-mixed'), or OptimizerPlan(partial(AdamW, eps=1e-4))",
                flag="--trainer.precision=16-mixed",
            )
        trainer = attached_trainer(self)  # None without a trainer
        has_full_precision = all(p.dtype in (torch.float32, torch.float64) for p in parameters)
        has_kernel = all(p.device.type in FUSED_ADAMW_DEVICES for p in parameters)
        scaler = getattr(trainer.precision_plugin, "scaler", None) if trainer else None
        fused = has_full_precision and has_kernel and scaler is None
        return torch.optim.AdamW(parameters, lr=self.lr, fused=fused or None)  # None: torch chooses

    def count_units(self, batch: Any) -> int:
        """Number of units in a batch: here the rows of its first tensor."""
        return next(len(leaf) for leaf in tree_leaves(batch) if isinstance(leaf, Tensor))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Record the task class and the transforms in the checkpoint."""
        checkpoint["task"] = type(self).__name__
        record_format(checkpoint)
        if (transforms := self.__dict__.get("_transforms")) is not None:
            transforms.add_records(checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Raise UsageError for another task or format, before tensors are compared."""
        check_format(checkpoint)
        if not self._may_have_written(checkpoint):
            task = checkpoint.get("task", "another program")
            hint = f"use model={task}(...)"
            raise self._of_another_task(checkpoint, hint, flag=f"--model={task}")
        if self.net is not None:  # the net is built, so all transforms are applied
            self._check_transforms(checkpoint, "add them to Trainer(callbacks=...)")

    def _check_transforms(self, checkpoint: dict[str, Any], hint: str) -> None:
        applied = getattr(self.__dict__.get("_transforms"), "applied", {})
        phases = {"quantize", "adapt"} & checkpoint.get("transforms", {}).keys() - applied.keys()
        if phases:
            names = [checkpoint["transforms"][phase]["class"] for phase in sorted(phases)]
            raise UsageError(
                f"the net of the checkpoint was changed by {' and '.join(names)}, but this net "
                "was not",
                [f"a model with the transforms {' and '.join(names)}"],
                hint,
                flag=f"--trainer.callbacks+={names[0]}",
            )

    @classmethod
    def _of_another_task(cls, checkpoint: dict[str, Any], hint: str, flag: str = "") -> UsageError:
        task = checkpoint.get("task", "another program")
        problem = f"the checkpoint was written by {task}, but the model is a {cls.__name__}"
        return UsageError(problem, [f"a checkpoint of {cls.__name__}"], hint, flag=flag)

    @classmethod
    def _may_have_written(cls, checkpoint: dict[str, Any]) -> bool:
        """Whether the checkpoint names this class or one of its base classes.

        A class that overrides `on_save_checkpoint` without `super()` records no name.
        """
        if "task" not in checkpoint:
            return not _is_defined_in_ravine(cls.on_save_checkpoint)
        return str(checkpoint["task"]) in [c.__name__ for c in cls.__mro__]

    @classmethod
    def _class_of(cls, checkpoint: dict[str, Any]) -> type[Self]:
        """Return this class, or the imported subclass named in the checkpoint.

        Raises:
            UsageError: the checkpoint is of another task.
        """
        if cls._may_have_written(checkpoint):
            return cls
        writers = [c for c in imported_subclasses(cls) if c.__name__ == str(checkpoint.get("task"))]
        if len(writers) != 1:
            hint = "use ravine.load_model(path), which finds the class"
            raise cls._of_another_task(checkpoint, hint)
        return writers[0]

    @_class_only
    def load_from_checkpoint(
        cls,
        checkpoint_path: str | Path | IO[bytes],
        map_location: Any = None,
        hparams_file: str | Path | None = None,
        strict: bool | None = None,
        weights_only: bool | None = None,
        **kwargs: Any,
    ) -> Self:
        """Load a trained task from its checkpoint, including adapters and quantized weights.

            model = LanguageModel.load_from_checkpoint("runs/mine/version_0/checkpoints/last.ckpt")
            print(model.generate("ROMEO:", max_new_tokens=200))

        Lightning's own method builds the net before it reads the sizes that came from the data.
        The model is in evaluation mode: call `model.train()` before further training.

        Args:
            checkpoint_path: a file, a sharded folder, a URL, or an open file.
            map_location: device of the tensors, as in `torch.load`; by default the saved device, or
                the CPU if this machine lacks that device. The model is moved to its first tensor's
                device.
            hparams_file: .yaml or .csv with hyperparameters that replace the checkpoint's.
            strict: whether the names of weights must be equal; by default the model's
                `strict_loading`.
            weights_only: False allows any pickled object; use it only for trusted files.
            kwargs: arguments of the class, or settings such as `lr`, that replace the saved ones.

        Raises:
            UsageError: the checkpoint is not one of this class, or an argument does not fit.
            CheckpointError: the file is missing or damaged.
        """
        from ravine import load_model  # here, because ravine imports this module

        model = load_model(
            checkpoint_path,
            task=cast(Any, cls),
            map_location=map_location,
            hparams_file=hparams_file,
            strict=strict,
            weights_only=weights_only,
            overrides=kwargs,
        )
        return cast(Self, model)

    @classmethod
    def from_checkpoint_dict(
        cls,
        checkpoint: dict[str, Any],
        apply_transforms: Callable[[Self, dict[str, Any]], None] | None = None,
        strict: bool | None = None,
        overrides: Mapping[str, Any] | None = None,
    ) -> Self:
        """Create the model from a loaded checkpoint, in evaluation mode.

        Args:
            checkpoint: content of the checkpoint.
            apply_transforms: applies the transforms of the checkpoint to the built net;
                `ravine.callbacks.transforms.base.apply_saved_transforms` does so for adapters and
                quantized weights.
            strict: whether the names of weights must be equal; by default the model's
                `strict_loading`.
            overrides: arguments, and settings such as `lr`, that replace the saved ones.

        Raises:
            UsageError: the hyperparameters or the weights do not fit this class.
        """
        if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("state_dict"), dict):
            raise UsageError(
                f"the file is not a checkpoint of {cls.__name__}, because it has no state_dict",
                ["a file that a trainer has written"],
                "choose another file",
            )
        check_format(checkpoint)  # raises if this version does not read the format of the file
        # the class that wrote the file may be a subclass of this one
        task_class, overrides = cls._class_of(checkpoint), dict(overrides or {})
        try:
            # arguments of `__init__`, and class attributes such as `lr`; "hyper_parameters" is the
            # key of the arguments in a checkpoint of Lightning
            arguments, settings = task_class._split_arguments(checkpoint, overrides)
            hparams_key = task_class.CHECKPOINT_HYPER_PARAMS_KEY
            checkpoint = checkpoint | {hparams_key: checkpoint.get(hparams_key, {}) | overrides}
            # a trial without memory, which only finds nets that are too large; any other error is
            # raised again when the model is built below
            with suppress(Exception), _NetSizeLimit(checkpoint["state_dict"]) as size_limit:
                task_class._build_from_checkpoint(arguments, checkpoint)
            size_limit.raise_if_exceeded()
            model = task_class._build_from_checkpoint(arguments, checkpoint)
            for name, value in settings.items():
                setattr(model, name, value)
            if apply_transforms is not None:
                apply_transforms(model, checkpoint)
            # raises for adapters or quantized weights that have not been applied
            model._check_transforms(checkpoint, "use ravine.load_model(path)")
            model._load_saved_weights(checkpoint["state_dict"], strict)
        except (FileNotFoundError, ValueError):  # a UsageError, or another readable message
            raise
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError) as error:
            raise task_class._does_not_fit_error(error, overrides) from error
        return model.eval()

    @classmethod
    def _does_not_fit_error(cls, error: Exception, overrides: dict[str, Any]) -> UsageError:
        """Return the error for a checkpoint, or overrides of its arguments, that do not fit.

        Args:
            error: the error that building the model or loading its weights has raised.
            overrides: arguments of the user that replace those of the checkpoint.
        """
        text = " ".join(str(error).split())[:160] or type(error).__name__
        overrides_text = ""
        allowed, hint = "a file that this version has written", "choose another checkpoint"
        if overrides:
            values = [f"{name}={value!r:.40}" for name, value in overrides.items()]
            overrides_text = f" with {', '.join(values)}"
            allowed, hint = "arguments that fit the weights", f"remove {', '.join(overrides)}"
        return UsageError(
            f"the checkpoint{overrides_text} does not fit {cls.__name__}: "
            f"{type(error).__name__}: {text}",
            [allowed],
            hint,
        )

    @classmethod
    def _split_arguments(
        cls, checkpoint: dict[str, Any], overrides: dict[str, Any]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the arguments of `__init__`, and the class attributes to set, both by name.

        The arguments are the saved hyperparameters, replaced by `overrides`. Overrides may also
        name settings, which are class attributes such as `lr`.

        As in Lightning, saved hyperparameters that are not arguments of `__init__` are dropped. A
        class created from one dict of hyperparameters gets the dict under its name.

        Raises:
            UsageTypeError: an override is neither an argument nor a setting.
        """
        parameters = inspect.signature(cls).parameters.values()
        arg_names = {
            p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
        }
        accepts_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
        setting_names = cls._setting_names() - arg_names
        settings = {name: value for name, value in overrides.items() if name in setting_names}
        init_overrides = {
            name: value for name, value in overrides.items() if name not in setting_names
        }
        # these keys are Lightning's, such as "hyper_parameters"
        saved = checkpoint.get(cls.CHECKPOINT_HYPER_PARAMS_KEY, {})
        saved = {name: value for name, value in saved.items() if not name.startswith("_")}
        # name of the argument that takes all hyperparameters as one dict, if the class has one
        dict_name = checkpoint.get(cls.CHECKPOINT_HYPER_PARAMS_NAME)
        if dict_name in arg_names:
            inside_dict = {n: value for n, value in init_overrides.items() if n not in arg_names}
            init_overrides = {n: value for n, value in init_overrides.items() if n in arg_names}
            saved = {dict_name: saved | inside_dict}
        if not accepts_all:
            saved = {name: value for name, value in saved.items() if name in arg_names}
            for name in init_overrides.keys() - arg_names:
                allowed = arg_names | setting_names
                similar_names = suggest_names(name, allowed)
                raise UsageTypeError(
                    f"{cls.__name__} has no argument {name!r}",
                    similar_names or sorted(allowed),
                    f"use {similar_names[0]}=..." if similar_names else f"remove {name}",
                )
        return saved | init_overrides, settings

    @classmethod
    def _setting_names(cls) -> set[str]:
        """Return the names of public class attributes with plain values, such as `lr`."""
        task_classes = [c for c in cls.__mro__ if issubclass(c, TaskModule)]
        values = {name: value for c in task_classes for name, value in vars(c).items()}
        return {n for n, value in values.items() if n[0] != "_" and isinstance(value, PLAIN)}

    def _load_saved_weights(self, state: dict[str, Tensor], strict: bool | None) -> None:
        """Load the weights; warn of names that are in the model or the checkpoint only."""
        if strict and not self.strict_loading:
            raise UsageError(
                f"strict=True contradicts {type(self).__name__}.strict_loading=False",
                ["equal values"],
                "remove strict",
            )
        keys = self.load_state_dict(state, self.strict_loading if strict is None else strict)
        for names, where in ((keys.missing_keys, "model"), (keys.unexpected_keys, "checkpoint")):
            if names:
                other = "checkpoint" if where == "model" else "model"
                rank_zero_warn(
                    f"found weights that are in the {where} but not in the {other}: {names}"
                )

    @classmethod
    def _build_from_checkpoint(cls, arguments: dict[str, Any], checkpoint: dict[str, Any]) -> Self:
        model = cls(**arguments)
        model.on_load_checkpoint(checkpoint)
        model.configure_model()
        return model
