"""`estimate`: parameters, FLOPs, memory, communication and time of a run, before it starts.

lightning estimate --config shakespeare/quick
lightning estimate --config gpt2/124m --data.path=FOLDER --gpu h200 --devices 8
"""

import copy
import json
import sys
from dataclasses import dataclass, fields
from typing import Any, cast

import torch
from rich.console import Console

from ravine.callbacks.estimates.devices import Device, find_device
from ravine.callbacks.estimates.estimate import Choice, Estimate
from ravine.callbacks.estimates.fake_parameters import parameters_on_meta
from ravine.callbacks.estimates.step_time import Cost
from ravine.callbacks.monitoring.memory_limit import peak_process_bytes
from ravine.errors import UsageError

from .. import resume_path
from ..command import RavineCLI, configure_parser, expand_strategy_preset
from ..error_report import program_name
from ..estimation import (
    Level,
    RunToEstimate,
    make_strategy,
    resolve_ranks,
    simulation_trainer,
    target_precision,
)

OUTPUT_WIDTH = 120  # columns of the tables in a file or a pipe
SWITCHES = ("quick", "full", "measure", "json")


@dataclass
class EstimateFlags:
    """The flags of `estimate` that `fit` does not have."""

    gpu: str | None = None
    gpu_memory: float | None = None
    gpu_tflops: float | None = None
    link: str | None = None
    devices: int | None = None
    num_nodes: int | None = None
    price_per_hour: float | None = None
    watts: float | None = None
    quick: bool = False
    full: bool = False
    measure: bool = False
    json: bool = False

    @property
    def level(self) -> Level:
        """Return how the numbers are found."""
        return "quick" if self.quick else "measure" if self.measure else "simulate"

    @property
    def device(self) -> Device | None:
        """Return the device of the flags."""
        return find_device(self.gpu, self.gpu_memory, self.gpu_tflops)

    @property
    def cost(self) -> Cost:
        """Return price and power of a device."""
        return Cost(self.price_per_hour, self.watts)


def split_flags(argv: list[str]) -> tuple[EstimateFlags, list[str]]:
    """Return the flags of `estimate`, and the arguments that are those of `fit`.

    Raises:
        UsageError: a flag has no value, or one of another type.
    """
    flags, others = EstimateFlags(), []
    names = {field.name: field.type for field in fields(EstimateFlags)}
    words = iter(argv)
    for word in words:
        name, equals, value = word.partition("=")
        name = name.removeprefix("--")
        if not word.startswith("--") or name not in names:
            others.append(word)
            continue
        if name in SWITCHES:
            if equals:
                raise UsageError(f"--{name} takes no value", flag=f"--{name}")
            setattr(flags, name, True)
            continue
        value = value if equals else next(words, "")
        setattr(flags, name, _convert(name, value, str(names[name])))
    if flags.quick and flags.measure:
        raise UsageError(
            "--quick computes by formula, and --measure runs real steps",
            ["one of the two"],
            flag="--measure",
        )
    return flags, others


def _convert(name: str, text: str, type_text: str) -> Any:
    kind: Any = int if "int" in type_text else float if "float" in type_text else str
    try:
        if not text:
            raise ValueError
        return kind(text)
    except ValueError:
        word = "number" if kind is float else "whole number" if kind is int else "name"
        example = {"gpu": "h200", "link": "nvlink"}.get(name, "8")
        raise UsageError(
            f"--{name}={text} is not a {word}", [f"a {word}"], flag=f"--{name}={example}"
        ) from None


class EstimateCLI(RavineCLI):
    """Parses the arguments of `fit`, and estimates in place of training."""

    def __init__(self, argv: list[str], checkpoint: Any, flags: EstimateFlags) -> None:
        """Parse the arguments, build model and data without memory for parameters, estimate."""
        self.flags = flags
        self.result: Estimate | None = None
        super().__init__(argv, checkpoint)

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """Build the trainer of the simulation in place of that of the run."""
        self.save_config_callback = None  # nothing is saved
        original, self.trainer_class = self.trainer_class, cast(Any, self.build_trainer)
        try:
            return super().instantiate_trainer(**kwargs)
        finally:
            self.trainer_class = original

    def build_trainer(self, **arguments: Any) -> Any:
        """Return the trainer of the simulation, with the arguments and callbacks of the run."""
        flags, self.configured = self.flags, arguments.pop("strategy", "auto")
        devices = flags.devices or _as_count(arguments.get("devices", 1))
        num_nodes = flags.num_nodes or arguments.get("num_nodes", 1)
        self.ranks = resolve_ranks(devices, num_nodes, flags.link)
        arguments["precision"] = target_precision(arguments.get("precision"), flags.device)
        self.arguments = copy.deepcopy(arguments)
        strategy = make_strategy(self.ranks, flags.device, flags.level)
        return simulation_trainer(strategy, **arguments)

    def instantiate_classes(self) -> None:
        """Build the model without memory for its parameters, unless real steps are run."""
        if self.flags.level == "measure":
            return super().instantiate_classes()
        with parameters_on_meta():
            super().instantiate_classes()

    def run_subcommand(self, subcommand: str) -> None:
        """Estimate in place of `fit`."""
        run = RunToEstimate(
            self.model,
            {"datamodule": self.datamodule},
            self.arguments,
            self.ranks,
            self.flags.device,
            self.configured,
            self.flags.level,
            self.flags.full,
        )
        self.result = run.estimate(self.flags.cost)


def _as_count(devices: Any) -> int:
    """Return the number of devices of the trainer's argument; 1 for auto."""
    if isinstance(devices, list):
        return len(devices)
    return int(devices) if str(devices).isdigit() else 1


def run_argv(argv: list[str]) -> int:
    """Estimate a run with the arguments of `fit`, and print the result.

    Args:
        argv: "estimate" and its flags.

    Returns:
        The exit status.
    """
    process_bytes = peak_process_bytes()  # of libraries alone
    flags, others = split_flags(argv[1:])
    _ = flags.device  # an unknown device is an error before anything is built
    flags.cost.check()
    configure_parser()
    fit_argv, checkpoint = resume_path.resolve_argv(expand_strategy_preset(["fit", *others]))
    sys.argv[1:] = fit_argv
    try:
        command = EstimateCLI(fit_argv, checkpoint, flags)
    except UsageError as error:  # of the parser, which suggests a command of `fit`
        fit, arguments = f"{program_name()} fit ", error.to_arguments()
        if not error.flag.startswith(fit):
            raise
        arguments["flag"] = error.flag.replace(fit, f"{program_name()} estimate ", 1)
        raise UsageError(**arguments) from error
    result = cast(Estimate, command.result)
    if flags.json:
        values = result.to_dict() | {"recommended_flags": recommended_flags(result)}
        values["run"] = describe_run(command, process_bytes)
        print(json.dumps(values, indent=2))
    else:
        console = Console()
        if not console.is_terminal:
            console.width = OUTPUT_WIDTH
        console.print(result.render(advice(result)), soft_wrap=not console.is_terminal)
    return 0


def describe_run(command: EstimateCLI, process_bytes: int) -> dict[str, Any]:
    """Return what a search for the largest micro-batch needs to know of the run.

    Args:
        command: the command, after the estimate.
        process_bytes: resident memory of a process before it builds anything.
    """
    result = cast(Estimate, command.result)
    is_cpu = command.arguments.get("accelerator") == "cpu" or not torch.cuda.is_available()
    sizes = {row.name: row.layout.dp_size for row in result.rows}
    return {
        "batch_size": getattr(command.datamodule, "batch_size", None),
        "divides_batch": result.divides_batch,
        "dp_size": sizes.get(result.configured, result.ranks.size),
        "strategy": result.configured,
        "gpu_bytes": None if is_cpu else torch.cuda.get_device_properties(0).total_memory,
        "process_bytes": process_bytes,
    }


def advice(result: Estimate) -> str:
    """Return what to type for the recommended layout, or what to change if none fits."""
    if result.device is None:
        return ""
    if result.best is None:
        return f"{result.shortage()}\n  type: {', or '.join(map(as_flag, result.remedies()))}"
    text = f"recommended: {result.best.name}  {recommended_flags(result)}".rstrip()
    if result.has_faster and result.fastest is not None:
        flags = as_flags(result, result.fastest)
        text += f"\nfastest that fits: {result.fastest.row.name}  {flags}".rstrip()
    return text


def recommended_flags(result: Estimate) -> str:
    """Return the flags of the recommended layout; "" for one process."""
    return "" if result.choice is None else as_flags(result, result.choice)


def as_flags(result: Estimate, choice: Choice) -> str:
    """Return the flags of a layout; "" for one process."""
    flags = []
    for name, value in choice.arguments().items():
        text = str(value).lower() if isinstance(value, bool) else str(value)
        flags.append(f"--trainer.{name}{'+=' if name == 'callbacks' else '='}{text}")
        if name == "strategy":
            flags.append(f"--trainer.devices={result.ranks.devices}")
            nodes = result.ranks.num_nodes
            flags += [f"--trainer.num_nodes={nodes}"] if nodes > 1 else []
    return " ".join(flags)


def as_flag(argument: str) -> str:
    """Return an argument of the trainer as a flag: a callback, or NAME=VALUE."""
    if argument.endswith("()"):
        return f"--trainer.callbacks+={argument[:-2]}"
    return (
        f"--devices={argument.partition('=')[2]}"
        if "devices" in argument
        else (f"--trainer.{argument}")
    )
