"""Guessed flags: the argument that a user means by `--lr`, `--epochs` or `--model.layers`.

The table GUESSES holds the names that other programs use (nanoGPT, Hugging Face, torchtune,
accelerate, Lightning), and where Ravine has that argument. A name that is in no table may still be
an argument of another part of the command, such as `max_steps` of the trainer. A flag is suggested
only if the parser accepts its value.
"""

import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import Callback

from ravine.callbacks import LRSchedule, OptimizerPlan
from ravine.errors import UsageError, suggest_names

from . import presets, typehints
from .callback_arguments import (
    CallbackSpec,
    argument_paths,
    class_name,
    find_argument,
    is_plan,
    load_class,
    optimizers_of,
)
from .values import ConfigValue, from_argv

if TYPE_CHECKING:
    from .errors import ConfigErrorFinder

PRECISIONS = {
    **dict.fromkeys(("bf16", "bfloat16", "mixed"), "bf16-mixed"),
    **dict.fromkeys(("16", "fp16", "float16", "half", "amp"), "16-mixed"),
    **dict.fromkeys(("32", "fp32", "float32", "float", "single", "no", "tf32"), "32-true"),
    **dict.fromkeys(("64", "fp64", "float64", "double"), "64-true"),
}
# Short forms that Lightning accepts with a warning; they are not suggested.
DISCOURAGED_PRECISIONS = ("64", "32", "16", "bf16")
STRATEGIES = {
    **dict.fromkeys(("fsdp2", "deepspeed", "full_shard", "true"), "zero3"),
    **dict.fromkeys(("dp", "multi_gpu", "distributed"), "ddp"),
    "1": "zero1",
    "2": "zero2",
    "3": "zero3",
}
SCHEDULES = {
    "cosine_with_restarts": "cosine_restarts",
    **dict.fromkeys(("cosineannealing", "cosineannealinglr"), "cosine"),
    **dict.fromkeys(("constant_with_warmup", "none", "no", "false"), "constant"),
    **dict.fromkeys(("steplr", "multistep"), "step"),
    **dict.fromkeys(("warmup_stable_decay", "trapezoidal"), "wsd"),
}
SOURCES = {"tinyshakespeare": "shakespeare", "tiny_shakespeare": "shakespeare"}
LOGGERS = {"tb": "tensorboard", "none": "false"}
CHECKPOINTS = {**dict.fromkeys(("true", "1", "latest", "resume"), "auto"), "scratch": "null"}
ON = ("", "true", "1", "yes", "on")  # values of a flag that switches something on
# Flags of `generate`, which the commands of the trainer do not have.
GENERATE_FLAGS = (
    *("prompt", "temperature", "top_k", "top_p", "min_p", "max_new_tokens", "num_samples"),
    *("labels", "guidance_scale", "sampler"),
)
OFF = ("false", "0", "no", "off", "none")
MAX_SUGGESTIONS = 3


class Guess(NamedTuple):
    """What a guessed name means.

    Args:
        keys: the arguments, the best first. `optimizer.X` and `schedule.X` are arguments of the
            run's optimizer callback; `EMA.decay` is one of a callback; `EMA` is the callback.
        value: the value of a flag without one, or with a value that only switches it on.
        values: other words for values.
    """

    keys: tuple[str, ...]
    value: str = ""
    values: Mapping[str, str] = MappingProxyType({})


def _guesses(rows: Iterable[tuple[str, Guess]]) -> dict[str, Guess]:
    return {name: guess for names, guess in rows for name in names.split()}


GUESSES = _guesses(
    [
        # length of the run
        (
            "steps num_steps n_steps max_iters max_iterations iterations iters num_iterations "
            "total_steps max_train_steps max_steps_per_epoch train_steps num_train_steps",
            Guess(("trainer.max_steps",)),
        ),
        (
            "epochs epoch num_epochs n_epochs num_train_epochs train_epochs max_epoch",
            Guess(("trainer.max_epochs",)),
        ),
        ("time max_hours time_limit", Guess(("trainer.max_time",))),
        # optimizer
        (
            "lr learning_rate max_lr base_lr peak_lr init_lr rate alpha_lr",
            Guess(("optimizer.lr", "model.lr", "model.learning_rate")),
        ),
        ("weight_decay wd l2", Guess(("optimizer.weight_decay",))),
        ("momentum", Guess(("optimizer.momentum",))),
        ("betas adam_betas", Guess(("optimizer.betas",))),
        ("eps epsilon adam_epsilon", Guess(("optimizer.eps",))),
        ("optimizer optim optimiser optimizer_name opt", Guess(("optimizer",))),
        # schedule
        (
            "lr_scheduler lr_scheduler_type scheduler lr_schedule schedule sched lr_decay "
            "lr_policy",
            Guess(("schedule.kind",), "cosine", SCHEDULES),
        ),
        (
            "warmup warmup_steps warmup_iters num_warmup_steps lr_warmup_steps warmup_ratio "
            "warmup_updates",
            Guess(("schedule.warmup",)),
        ),
        ("min_lr_ratio final_lr_fraction", Guess(("schedule.final_fraction",))),
        # batches
        (
            "batch_size batchsize bs batch train_batch_size per_device_train_batch_size "
            "per_device_batch_size micro_batch_size mini_batch_size per_device_eval_batch_size "
            "eval_batch_size val_batch_size device_batch_size",
            Guess(("data.batch_size",)),
        ),
        (
            "gradient_accumulation_steps grad_accum grad_accum_steps accumulate_grad accum_iter "
            "gradient_accumulation accumulation_steps",
            Guess(("trainer.accumulate_grad_batches",)),
        ),
        (
            "grad_clip gradient_clip max_grad_norm clip_grad_norm clip_grad clip_norm grad_norm "
            "gradient_clip_val gradient_clipping clip",
            Guess(("GradientClipping.max_norm",), "1.0"),
        ),
        (
            "num_workers workers dataloader_num_workers n_workers",
            Guess(("data.num_workers",)),
        ),
        # reproducibility, machine
        (
            "seed random_seed manual_seed rng_seed random_state global_seed",
            Guess(("seed_everything",)),
        ),
        (
            "gpus num_gpus n_gpus ngpus gpu num_devices n_gpu nproc_per_node num_processes nproc",
            Guess(("trainer.devices",)),
        ),
        ("devices", Guess(("trainer.devices",))),
        ("nodes nnodes num_machines n_nodes", Guess(("trainer.num_nodes",))),
        ("device accelerator backend", Guess(("trainer.accelerator",))),
        ("cpu no_cuda use_cpu", Guess(("trainer.accelerator",), "cpu")),
        (
            "precision dtype mixed_precision torch_dtype compute_dtype",
            Guess(("trainer.precision",), "auto", PRECISIONS),
        ),
        ("bf16 bfloat16", Guess(("trainer.precision",), "bf16-mixed")),
        ("fp16 float16 half amp use_amp", Guess(("trainer.precision",), "16-mixed")),
        ("fp32 float32 tf32", Guess(("trainer.precision",), "32-true")),
        (
            "strategy fsdp deepspeed parallel distributed_strategy distributed_type use_fsdp "
            "zero zero_stage",
            Guess(("trainer.strategy",), "zero3", STRATEGIES),
        ),
        ("ddp multi_gpu distributed use_ddp", Guess(("trainer.strategy",), "ddp")),
        # memory and speed
        ("compile torch_compile use_compile", Guess(("Compile",))),
        (
            "gradient_checkpointing activation_checkpointing checkpoint_activations grad_ckpt "
            "enable_activation_checkpointing",
            Guess(("ActivationCheckpointing",)),
        ),
        # adapters, averages
        ("lora use_lora peft use_peft", Guess(("LoRA",))),
        ("lora_rank lora_r r", Guess(("LoRA.rank",))),
        ("lora_alpha", Guess(("LoRA.alpha",))),
        ("lora_dropout", Guess(("LoRA.dropout",))),
        ("ema use_ema", Guess(("EMA",))),
        ("ema_decay ema_rate", Guess(("EMA.decay",))),
        ("load_in_4bit quantize qlora", Guess(("Quantization",))),
        # validation, files, logs
        (
            "eval_interval eval_steps eval_every val_every val_interval validate_every "
            "eval_freq val_check",
            Guess(("trainer.val_check_interval",)),
        ),
        (
            "eval_iters eval_batches val_batches max_eval_batches limit_val",
            Guess(("trainer.limit_val_batches",)),
        ),
        ("limit_train train_batches", Guess(("trainer.limit_train_batches",))),
        (
            "log_interval logging_steps log_every log_freq print_freq log_every_n",
            Guess(("trainer.log_every_n_steps",)),
        ),
        (
            "save_steps save_every save_interval checkpoint_interval ckpt_interval save_freq",
            Guess(("Checkpoint.every_n_train_steps",)),
        ),
        (
            "save_total_limit save_top_k keep_checkpoints",
            Guess(("Checkpoint.save_top_k",)),
        ),
        (
            "monitor metric_for_best_model best_metric",
            Guess(("Checkpoint.monitor",), "val/loss"),
        ),
        ("early_stopping early_stop", Guess(("EarlyStopping.monitor",), "val/loss")),
        ("patience early_stopping_patience", Guess(("EarlyStopping.patience",))),
        (
            "output_dir out_dir outdir output save_dir log_dir logdir logging_dir run_dir runs "
            "default_root_dir root_dir exp_dir experiment_dir ckpt_dir checkpoint_dir",
            Guess(("trainer.default_root_dir",)),
        ),
        (
            "run_name exp_name experiment experiment_name wandb_run_name job_name project",
            Guess(("trainer.name",)),
        ),
        ("name", Guess(("trainer.name",))),
        (
            "wandb wandb_log use_wandb with_wandb wandb_project wandb_entity",
            Guess(("trainer.logger",), "wandb"),
        ),
        ("tensorboard use_tensorboard", Guess(("trainer.logger",), "tensorboard")),
        ("mlflow", Guess(("trainer.logger",), "mlflow")),
        ("report_to log_with logger loggers", Guess(("trainer.logger",), "true", LOGGERS)),
        (
            "resume resume_from resume_from_checkpoint resume_path continue restore init_from "
            "checkpoint checkpoint_path ckpt load load_checkpoint load_from weights "
            "model_path ckpt_path",
            Guess(("ckpt_path",), "auto", CHECKPOINTS),
        ),
        (
            "dry_run debug_run smoke_test sanity_check fast_dev test_run",
            Guess(("trainer.fast_dev_run",), "true"),
        ),
        ("overfit overfit_batch", Guess(("trainer.overfit_batches",), "1")),
        ("progress progress_bar disable_tqdm", Guess(("trainer.enable_progress_bar",), "true")),
        ("benchmark profile profiling", Guess(("trainer.profiler",), "simple")),
        # data
        ("dataset dataset_name data_name task", Guess(("data.source",), "", SOURCES)),
        (
            "data_dir data_path dataset_dir dataset_path train_file train_data data_root input "
            "file text text_file",
            Guess(("data.path", "data.source", "data.root")),
        ),
        ("val_split validation_split val_ratio", Guess(("data.val_fraction",))),
        (
            "block_size seq_len seq_length sequence_length max_seq_len max_seq_length "
            "context context_size context_len max_length n_ctx ctx_len",
            Guess(("data.context_length",)),
        ),
        ("tokenizer_name tokenizer_path", Guess(("data.tokenizer",))),
        # sizes of the model
        (
            "layers n_layer n_layers num_hidden_layers depth num_blocks n_blocks",
            Guess(("model.num_layers",)),
        ),
        (
            "heads n_head n_heads num_attention_heads nhead",
            Guess(("model.num_heads",)),
        ),
        (
            "width n_embd d_embed hidden_size hidden_dim embed_dim embedding_dim dim dmodel "
            "emb_dim",
            Guess(("model.d_model", "model.base_channels")),
        ),
        ("intermediate_size ffn_dim mlp_dim d_mlp", Guess(("model.d_ff",))),
        ("n_kv_heads num_key_value_heads", Guess(("model.num_kv_heads",))),
        ("channels base_dim", Guess(("model.base_channels",))),
        ("beta kl_penalty", Guess(("model.kl_coef",))),
        ("model_name_or_path model_name pretrained", Guess(("Pretrained.path",))),
    ]
)


def canonical(name: str) -> str:
    """Return a name in lower case, with underscores: Batch-Size is batch_size."""
    return re.sub(r"[-\s]+", "_", name.strip("-+ ")).lower()


class FlagGuesser:
    """Suggests flags for one command, from the arguments of its classes."""

    def __init__(
        self,
        parser: ArgumentParser,
        specs: Sequence[CallbackSpec],
        classes: dict[str, tuple[type, int]],
        new_finder: Callable[[], "ConfigErrorFinder"],
    ) -> None:
        """Store what the command chose.

        Args:
            parser: the parser of the command.
            specs: the callbacks of the run, in order.
            classes: by key, the class that the command chose and the number of supplied arguments.
            new_finder: makes a finder for which these classes are chosen.
        """
        self.parser, self.classes, self.new_finder = parser, classes, new_finder
        self.specs = {class_name(spec): spec for spec in specs}
        self.plans = [spec for spec in specs if is_plan(spec)]
        self.callback_classes = typehints.subclasses_by_name([Callback])

    def suggest(self, name: str, value: ConfigValue, exact: bool = False) -> list[tuple[str, str]]:
        """Return the arguments that a name may mean, each with the flags to type, the best first.

        Args:
            name: the name that the command or a class does not have.
            value: its value.
            exact: only names of the table and arguments that are called exactly so.
        """
        suggestions: dict[str, str] = {}
        for key, text in self._meanings(name, value, exact):
            for flags in self._spellings(key, text):
                label = flags.removeprefix("--trainer.callbacks+=")
                if " --" in label or label == flags:
                    label = flags.rpartition("--")[2].partition("=")[0]
                if label not in suggestions and self.is_accepted(flags):
                    suggestions[label] = flags
                    break
            if len(suggestions) == MAX_SUGGESTIONS:
                break
        return list(suggestions.items())

    def switches_off(self, name: str, value: ConfigValue) -> bool:
        """Return whether a flag such as `--compile=false` sets what is the default anyway."""
        guess = GUESSES.get(canonical(name))
        is_switch = guess is not None and (guess.value != "" or "." not in guess.keys[0])
        word = canonical(value.text)
        return bool(is_switch and guess and word in OFF and word not in guess.values)

    def corrected(self, flag: str) -> str:
        """Return a flag whose name is right; its value is replaced if it is not accepted.

        "" if nothing is accepted.
        """
        if self.is_accepted(flag):
            return flag
        finder = self.new_finder()
        try:
            for value in from_argv(shlex.split(flag)):
                self._check(finder, value)
        except UsageError as error:
            if error.flag.startswith("--") and self.is_accepted(error.flag):
                return error.flag
        example = self.example_flag(flag)
        return example if example and self.is_accepted(example) else ""

    def _meanings(self, name: str, value: ConfigValue, exact: bool) -> Iterator[tuple[str, str]]:
        """Yield keys that a name may mean, each with the value, the best first."""
        word = canonical(name)
        text = "" if value.is_missing else value.flag_text
        guess = GUESSES.get(word)
        if guess:
            typed = canonical(text).removeprefix("cuda:") if text else ""
            new_text = guess.values.get(typed, text)
            if guess.value and typed in ON and typed not in guess.values:
                new_text = guess.value
            for key in guess.keys:
                if key == "trainer.accelerator" and guess.value == "":
                    new_text = accelerator_value(text)
                if key == "trainer.precision":
                    new_text = usable_precision(new_text)
                yield key, new_text
                # a word for the value that is not a value here, such as wandb_project=NAME
                if guess.value and new_text != guess.value:
                    yield key, guess.value
        known_keys = list(self.known_keys())
        leaves: dict[str, list[str]] = {}
        for key in known_keys:
            leaves.setdefault(key.rpartition(".")[2], []).append(key)
        # the same name below another section
        for key in leaves.get(word, []):
            yield key, text
        if exact:
            return
        near = suggest_names(word, {*leaves, *GUESSES}, least=0.8)
        for leaf in near:
            for key in leaves.get(leaf, []):
                yield key, text
            if leaf in GUESSES and leaf not in leaves:
                for key in GUESSES[leaf].keys:
                    yield key, text or GUESSES[leaf].value

    def known_keys(self) -> Iterator[str]:
        """Yield the arguments of the trainer, of model and data, and of the callbacks."""
        for action in self.parser._actions:
            if action.dest.startswith("trainer.") or action.dest in ("seed_everything", "config"):
                yield action.dest
        for owner in ("data", "model"):
            if owner in self.classes:
                yield from (f"{owner}.{name}" for name in argument_names(*self.classes[owner]))
        for name, spec in self.specs.items():
            yield from (f"{name}.{path}" for path in argument_paths(spec))

    def _spellings(self, key: str, text: str) -> Iterator[str]:
        """Yield flags for a key of a Guess with a value; the first that is accepted is the best."""
        owner, _, argument = key.partition(".")
        if key == "optimizer":
            yield from self._optimizer_flags(text)
        elif owner in ("optimizer", "schedule"):
            yield from self._plan_flags(owner, argument, text)
        elif owner in ("trainer", "data", "model", "seed_everything", "ckpt_path", "config"):
            yield self._flag(key, text)
        elif owner in self.callback_classes:
            in_run = owner in self.specs
            prefix = f"--trainer.callbacks.{owner}" if in_run else "--trainer.callbacks"
            add = "" if in_run else f"--trainer.callbacks+={owner}"
            if not argument:
                yield add
                return
            required = [
                f"{prefix}.{name}={REQUIRED_VALUES[name]}"
                for name in required_arguments(self.callback_classes[owner])
                if not in_run and name != argument and name in REQUIRED_VALUES
            ]
            text = text or default_text(self.callback_classes[owner], argument)
            yield " ".join(filter(None, [add, *required, f"{prefix}.{argument}={text}"]))

    def _flag(self, key: str, text: str) -> str:
        """Return a flag; without a value it gets the default of the argument."""
        if text:
            return f"--{key}={text}"
        owner, _, argument = key.partition(".")
        if owner in self.classes:
            return f"--{key}={default_text(*self.classes[owner][:1], argument)}"
        action = next((a for a in self.parser._actions if a.dest == key), None)
        return f"--{key}={typehints.example_value(getattr(action, '_typehint', None))}"

    def _plan_flags(self, owner: str, argument: str, text: str) -> Iterator[str]:
        """Yield flags for an argument of the optimizer or the schedule."""
        if not text and owner == "schedule":
            text = str(getattr(LRSchedule(), argument, "10"))
        text = text or {"lr": "0.001", "weight_decay": "0.01"}.get(argument, "0.1")
        if self.plans:
            yield f"--{owner}.{argument}={text}"
        elif owner == "optimizer" and "model" in self.classes:
            for name in ("lr", "learning_rate") if argument == "lr" else (argument,):
                if name in argument_names(*self.classes["model"]):
                    yield f"--model.{name}={text}"
        if not self.plans:
            yield f"--optimizer=AdamW --{owner}.{argument}={text}"

    def _optimizer_flags(self, text: str) -> Iterator[str]:
        """Yield flags that choose an optimizer by name: a callback such as Muon, or a class."""
        optimizers = typehints.subclasses_by_name([torch.optim.Optimizer])
        plans = {
            name: plan_class
            for name, plan_class in self.callback_classes.items()
            if issubclass(plan_class, OptimizerPlan) and plan_class is not OptimizerPlan
        }
        word = canonical(text or "AdamW").partition("_")[0]
        named = {name.lower(): name for name in (*optimizers, *plans)}
        name = named.get(word) or next(iter(suggest_names(word, named.values())), "AdamW")
        yield f"--optimizer={name}"

    def is_accepted(self, flags: str) -> bool:
        """Return whether the parser of the command accepts these flags."""
        finder = self.new_finder()
        if not flags.lstrip("'").startswith("--"):
            return False  # another command
        if flags.startswith("--config="):
            return flags.partition("=")[2] in presets.list_presets()
        try:
            for value in from_argv(shlex.split(flags)):
                self._check(finder, value)
        except UsageError:
            return False
        return True

    def example_flag(self, flag: str) -> str:
        """Return a flag with an example of its value; "" for a name that does not exist."""
        finder, name = self.new_finder(), flag.strip("'").partition("=")[0]
        try:
            for value in from_argv([name]):
                self._check(finder, value)
        except UsageError as error:  # the value is missing: the error has an example
            return error.flag
        return ""

    def _check(self, finder: "ConfigErrorFinder", value: ConfigValue) -> None:
        """Raise UsageError if a flag of a suggestion has a wrong name or value."""
        owner, _, path = value.key.removeprefix("trainer.callbacks.").partition(".")
        if value.key == "optimizer":
            if finder.command != "fit":
                raise UsageError(f"{value.location}: {finder.command} trains nothing")
            finder.choose_class([(torch.optim.Optimizer, 1), (OptimizerPlan, 0)], owner, value)
            return
        if value.key.startswith(("optimizer.", "schedule.")) and "optimizer" in (
            chosen := finder.chosen_classes
        ):
            # of the optimizer that `--optimizer=NAME` has chosen before
            target = (LRSchedule, 0) if owner == "schedule" else chosen["optimizer"]
            finder.check_key(typehints.class_parser(*target), owner, path, value)
            return
        if owner in ("optimizer", "schedule") and value.key.startswith(owner) and self.plans:
            spec = self.plans[-1]
            key = path if owner == "optimizer" else f"schedule.{path}"
            # such a flag is refused if several arguments of the plan match
            paths = find_argument(spec, key)
            if len(paths) != 1:
                raise UsageError(f"{value.location}: not one argument")
            path = paths[0]
        elif owner in self.specs and value.key != owner:
            spec = self.specs[owner]
        else:
            finder.check_key(self.parser, "", value.key, value)
            return
        callback_class = load_class(str(spec["class_path"]))
        if callback_class is None:
            raise UsageError(f"{value.location}: no class")
        for optimizer_path, optimizer_class in optimizers_of(spec).items():
            # the parameters of an optimizer are supplied later
            finder.chosen_classes[f"trainer.callbacks.{optimizer_path}"] = optimizer_class, 1
        parser = typehints.class_parser(callback_class, 0)
        finder.check_key(parser, "trainer.callbacks", path, value)


REQUIRED_VALUES = {"monitor": "val/loss"}  # of callbacks that a suggestion adds


def argument_names(target_class: type, num_supplied: int = 0) -> list[str]:
    """Return the names of the arguments of a class that a config can set."""
    actions = typehints.class_parser(target_class, num_supplied)._actions
    names = [action.dest.split(".")[0] for action in actions if not action.dest.endswith(".help")]
    return [name for name in dict.fromkeys(names) if name != "help"]


def required_arguments(target_class: type) -> list[str]:
    """Return the arguments of a class that have no default."""
    actions = typehints.class_parser(target_class, 0)._actions
    return [action.dest for action in actions if action.required]


def default_text(target_class: type, argument: str) -> str:
    """Return the default of an argument of a class as it is typed, or else an example."""
    if argument in REQUIRED_VALUES:
        return REQUIRED_VALUES[argument]
    for action in typehints.class_parser(target_class, 0)._actions:
        if action.dest == argument:
            return typehints.example_of(getattr(action, "_typehint", None), action.default)
    return "VALUE"


def accelerator_value(text: str) -> str:
    """Return the accelerator for a device of torch: gpu for cuda:1 if there is one, else auto."""
    word = canonical(text).partition(":")[0]
    if word in ("cuda", "gpu", "nvidia", "true", ""):
        return "gpu" if torch.cuda.is_available() else "auto"
    return word


def known_name(key: str, text: str) -> str | None:
    """Return Lightning's name for another word, such as fp16 for a precision; None if none."""
    word = canonical(text)
    if key == "trainer.accelerator" and word.partition(":")[0] in ("nvidia", "cuda"):
        return accelerator_value(text)
    if key == "trainer.precision" and word in PRECISIONS:
        return usable_precision(PRECISIONS[word])
    return STRATEGIES.get(word) if key == "trainer.strategy" else None


def usable_precision(name: str) -> str:
    """Return a precision that this machine has: without a GPU there is no 16-mixed."""
    return "bf16-mixed" if name == "16-mixed" and not torch.cuda.is_available() else name
