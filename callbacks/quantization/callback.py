"""Quantization callback: quantize and freeze Linear layers of any module, in 4 or 8 bits.

Lightning's bitsandbytes plugin needs CUDA and sets the precision of the whole run. This callback
quantizes single layers, runs on every device of torch and works with any `trainer.precision`.
"""

from functools import partial
from importlib.util import find_spec
from typing import Any, Literal

import lightning as L
from rich.console import Console
from rich.table import Table
from torch import nn

from ravine.errors import UsageError
from ravine.strategies.materialize import deferred_values

from ..transforms.base import Transform
from ..transforms.layer_mixins import check_not_sharded, check_plain_layer
from ..transforms.layer_selection import (
    Patterns,
    as_list,
    closest_names,
    find_frozen_copies,
    find_hidden_layers,
    is_submodule_of,
    matches_pattern,
    select_names,
)
from .layers import DeferredQuantization, QuantizedLinear, check_finite_weight, quantize_layer

MAX_LISTED = 5  # most layers in the table of errors


class Quantization(Transform):
    """Quantize and freeze the selected Linear layers; other parameters may be trained.

        lightning fit --config gpt2/lora --trainer.callbacks+=Quantization

    With `LoRA`, in any order, this is QLoRA: quantized weights and adapters in float32. To measure
    the quantization loss: `lightning validate --ckpt_path=FILE --trainer.callbacks+=Quantization`.

    Args:
        scheme: nf4 has 4.127 bits per weight. int8 has a scale for each output; its error is 0.7 %
            of the RMS of the weights instead of 9 %.
        targets: globs of layer names, each of which must match; by default all hidden matrices
            without embeddings and head.
        exclude: layers of `targets` that are not quantized.
        double_quant: also quantize the scales of NF4: 4.127 bits instead of 4.5, without visible
            loss.
        backend: bitsandbytes has faster NF4 kernels for CUDA; the bits are the same.
        allow_frozen_copies: quantize even if the module holds a frozen copy of the same net. Set it
            for a fixed reference; code of a momentum teacher pairs parameters, which codes would
            break.
    """

    phase = "quantize"
    accepts_meta_params = True

    def __init__(
        self,
        scheme: Literal["nf4", "int8"] = "nf4",
        targets: Patterns | None = None,
        exclude: Patterns = (),
        double_quant: bool = True,
        backend: Literal["torch", "bitsandbytes"] = "torch",
        allow_frozen_copies: bool = False,
    ) -> None:
        """Check and store the arguments.

        Args:
            scheme: nf4 or int8.
            targets: globs of layer names; None for all hidden matrices.
            exclude: layers of `targets` that are not quantized.
            double_quant: also quantize the scales of NF4.
            backend: bitsandbytes has faster NF4 kernels for CUDA.
            allow_frozen_copies: quantize even if the module holds a frozen copy of the same net.
        """
        if scheme not in ("nf4", "int8"):
            raise UsageError(
                f"Quantization: scheme={scheme!r} does not exist",
                ["nf4", "int8"],
                hint="use scheme='nf4'",
                flag="--trainer.callbacks.Quantization.scheme=nf4",
            )
        if backend not in ("torch", "bitsandbytes"):
            raise UsageError(
                f"Quantization: backend={backend!r} does not exist",
                ["torch", "bitsandbytes"],
                hint="use backend='torch'",
                flag="--trainer.callbacks.Quantization.backend=torch",
            )
        if backend == "bitsandbytes" and scheme != "nf4":
            raise UsageError(
                f"Quantization: backend='bitsandbytes' does not support scheme={scheme!r}",
                ["nf4"],
                hint="use backend='torch'",
                flag="--trainer.callbacks.Quantization.backend=torch",
            )
        self.arguments: dict[str, Any] = {
            "scheme": scheme,
            "targets": None if targets is None else as_list(targets),
            "exclude": as_list(exclude),
            "double_quant": double_quant,
        }
        self.backend, self.allow_frozen_copies = backend, allow_frozen_copies
        self.errors: dict[str, float] = {}  # RMS error / RMS weight, by layer

    def config_key(self) -> dict[str, Any]:
        """Return the arguments that determine the bits, without the backend."""
        return self.arguments

    def to_config(self) -> dict[str, Any]:
        """Return the arguments that a checkpoint records."""
        return self.arguments

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Register the transform; raise UsageError if the backend cannot run here."""
        device = trainer.strategy.root_device.type
        if self.backend == "bitsandbytes" and device != "cuda":
            raise UsageError(
                f"Quantization: backend='bitsandbytes' needs CUDA, and this run is on {device}",
                ["backend='torch', which computes the same codes"],
                hint="use backend='torch'",
                flag="--trainer.callbacks.Quantization.backend=torch",
            )
        if self.backend == "bitsandbytes" and find_spec("bitsandbytes") is None:
            raise UsageError(
                "Quantization: the package bitsandbytes is not installed",
                hint="install ravine[quant], or use backend='torch'",
                flag="pip install 'ravine[quant]', or "
                "--trainer.callbacks.Quantization.backend=torch",
            )
        pl_module.strict_loading = False  # a float checkpoint has weights instead of codes
        super().setup(trainer, pl_module, stage)  # registers `transform` for `configure_model`

    def transform(self, module: nn.Module) -> None:
        """Quantize the layers and store their errors."""
        options = {"backend": self.backend, "allow_frozen_copies": self.allow_frozen_copies}
        self.errors = quantize_module(module, **self.arguments, **options)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print the largest errors; raise UsageError if no parameter is trainable."""
        super().on_fit_start(trainer, pl_module)
        if not any(parameter.requires_grad for parameter in pl_module.parameters()):
            raise UsageError(
                f"Quantization: {type(pl_module).__name__} has no trainable parameter left",
                hint="add LoRA() to Trainer(callbacks=...)",
                flag="--trainer.callbacks+=LoRA",
            )
        if trainer.is_global_zero and self.errors:
            Console().print(make_error_table(self.errors, self.arguments["scheme"]))

    def check_checkpoint(self, module: nn.Module, checkpoint: dict[str, Any]) -> None:
        """Raise UsageError if the checkpoint lacks weights of the module; loading is not strict.

        The base class calls it when a checkpoint is loaded. The file may have the codes of a
        weight, or the float weight, which is quantized on loading.
        """
        state = checkpoint.get("state_dict", {})
        # a quantized layer has `weight_codes` (and scales) in place of `weight`
        expected_names = {name.replace(".weight_codes", ".weight") for name in module.state_dict()}
        missing = [
            name
            for name in expected_names
            if "lora_" not in name
            and ".weight_" not in name  # scales, which a file with float weights lacks
            and name not in state
            and f"{name}_codes" not in state
        ]
        # a file of LoRA without the frozen weights, to which the quantized weights belong
        has_adapters_only = not checkpoint.get("lora", {"frozen": True})["frozen"]
        if state and missing and not has_adapters_only:
            raise UsageError(
                f"Quantization: the checkpoint lacks {', '.join(sorted(missing)[:3])}",
                ["a checkpoint of this model"],
                hint="pass another ckpt_path",
                flag="--ckpt_path=FILE",
            )


def find_quantizable_layers(module: nn.Module) -> dict[str, nn.Linear]:
    """Return the Linear layers by name, without those inside nn.MultiheadAttention.

    torch's attention reads the weight of its output layer instead of calling the layer.
    """
    inner = {m.out_proj for m in module.modules() if isinstance(m, nn.MultiheadAttention)}
    return {
        name: layer
        for name, layer in module.named_modules()
        if name and isinstance(layer, nn.Linear) and layer not in inner
    }


def quantize_module(
    module: nn.Module,
    scheme: str = "nf4",
    targets: Patterns | None = None,
    exclude: Patterns = (),
    double_quant: bool = True,
    backend: str = "torch",
    allow_frozen_copies: bool = True,
) -> dict[str, float]:
    """Quantize the selected layers in place; return RMS error / RMS weight of each layer.

    A weight on the meta device has deferred values: they are computed after sharding. It is
    quantized then, and its error is added to the result.

    Args:
        module: any module; it is changed, and its selected layers are frozen.
        scheme: nf4 or int8.
        targets: globs of layer names, each of which must match; None for all hidden matrices.
        exclude: layers of `targets` that are not quantized.
        double_quant: also quantize the scales of NF4.
        backend: torch or bitsandbytes.
        allow_frozen_copies: whether the module may hold a frozen copy of a net that is quantized. A
            momentum teacher may not: its update pairs its parameters with those of the net.

    Raises:
        UsageError: a pattern matches nothing, or a layer cannot be quantized.
    """
    check_not_sharded(module, "Quantization")  # raises for parameters that are DTensors
    layers = find_quantizable_layers(module)
    names = _select_layers(module, targets, exclude, layers)
    for name in names:
        _check_layer(module, name, layers[name])
    if not allow_frozen_copies:
        _check_no_frozen_copies(module, names)
    errors: dict[str, float] = {}
    # Layer quantized last, and its tensors. The codes and the scales of a deferred layer are asked
    # for one after another, so that a cache of one layer is enough.
    latest: list[Any] = []
    for name in names:
        layer, deferred = layers[name], None
        if deferred_values(layer.weight) is not None:  # on the meta device
            report_error = partial(errors.__setitem__, name)
            # computes codes and scales when the values exist, then calls `report_error(error)`
            deferred = DeferredQuantization(
                name, layer.weight, scheme, double_quant, latest, report_error
            )
        error = quantize_layer(layer, scheme, double_quant, backend, deferred)
        if error is not None:  # known now
            errors[name] = error
    return errors


def _select_layers(
    module: nn.Module, targets: Patterns | None, exclude: Patterns, layers: dict[str, nn.Linear]
) -> list[str]:
    """Return the names of the layers to quantize.

    Args:
        module: the module of the layers.
        targets: globs of layer names; None for all hidden matrices.
        exclude: globs of layers of `targets` that are left out.
        layers: the layers that can be quantized, by name.

    Raises:
        UsageError: a pattern matches nothing, or no layer remains.
    """
    if targets is None:
        hidden = find_hidden_layers(module)  # without embeddings and head
        names = [name for name in layers if name in hidden]
        if not names:
            raise UsageError(
                f"Quantization: {type(module).__name__} has no hidden matrix",
                list(layers)[:MAX_LISTED],
                hint=f"use targets=[{next(iter(layers))!r}]"
                if layers
                else "remove Quantization() from Trainer(callbacks=...)",
                flag=f"--trainer.callbacks.Quantization.targets={next(iter(layers))}"
                if layers
                else "",
                label="layers that can be quantized",
            )
    else:
        _check_target_types(module, targets, layers)
        names = select_names(targets, list(layers), "Quantization.targets")
    excluded = select_names(exclude, names, "Quantization.exclude")
    names = [name for name in names if name not in excluded]
    if not names:
        raise UsageError(
            f"Quantization: exclude={as_list(exclude)} excludes all layers of targets",
            list(layers)[:MAX_LISTED],
            hint="use fewer patterns in exclude",
            label="layers",
        )
    return names


def _check_target_types(module: nn.Module, targets: Patterns, layers: dict[str, nn.Linear]) -> None:
    """Raise UsageError if a pattern of `targets` matches only layers that cannot be quantized.

    `layers` has those that can, by name.
    """
    for pattern in as_list(targets):
        if any(matches_pattern(pattern, name) for name in layers):
            continue
        for name, layer in module.named_modules():
            if name and matches_pattern(pattern, name):
                near = closest_names(name, list(layers))
                raise UsageError(
                    f"Quantization: targets={pattern!r} matches {name}, a {type(layer).__name__}, "
                    "and only Linear layers that are called can be quantized",
                    near or ["none: the module has no such layer"],
                    hint=f"use targets=[{near[0]!r}]"
                    if near
                    else "remove Quantization() from Trainer(callbacks=...)",
                    flag=f"--trainer.callbacks.Quantization.targets={near[0]}" if near else "",
                    label="nearest",
                )


def _check_no_frozen_copies(module: nn.Module, names: list[str]) -> None:
    """Raise UsageError if a layer of `names` belongs to a net with a frozen copy, or to the copy.

    Such a copy may be a momentum teacher.
    """
    # names of a frozen submodule, and of the trainable one that it copies
    for copy, original in find_frozen_copies(module).items():
        affected = [
            module_name
            for module_name in (original, copy)
            if any(is_submodule_of(name, module_name) for name in names)
        ]
        if affected:
            patterns = [f"{name}*" for name in affected]
            raise UsageError(
                f"Quantization: {copy} is a frozen copy of {original}, and code that pairs their "
                "parameters (a momentum teacher) would read codes as weights",
                hint=f"use exclude={patterns}, or for a fixed reference allow_frozen_copies=True",
                flag=f"--trainer.callbacks.Quantization.exclude=[{','.join(patterns)}], or "
                "for a fixed reference --trainer.callbacks.Quantization.allow_frozen_copies=true",
            )


def _check_layer(module: nn.Module, name: str, layer: nn.Linear) -> None:
    """Raise UsageError if a layer of the module cannot be quantized.

    It may be quantized already, have an adapter, compute its weight, share it with another layer,
    or have NaN or infinity in it.
    """
    if isinstance(layer, QuantizedLinear):
        raise UsageError(f"Quantization: {name} is already quantized", hint="use a new module")
    if hasattr(layer, "lora_enabled"):  # an attribute of adapters
        raise UsageError(
            f"Quantization: {name} already has an adapter",
            hint="quantize first, then call inject_lora",
        )
    # it must compute like nn.Linear, from a weight that it stores
    check_plain_layer(name, layer, nn.Linear, "Quantization")
    if deferred_values(layer.weight) is None:  # deferred values are checked when they are quantized
        check_finite_weight(name, layer.weight)
    sharing = [
        f"{other}.{key}".lstrip(".")
        for other, submodule in module.named_modules()
        for key, parameter in submodule._parameters.items()
        if parameter is layer.weight and submodule is not layer
    ]
    if sharing:
        raise UsageError(
            f"Quantization: {name} shares its weight with {sharing[0]}, so quantizing it would "
            "save no memory",
            ["layers with their own weight"],
            hint=f"use exclude=[{name!r}]",
            flag=f"--trainer.callbacks.Quantization.exclude={name}",
        )


def make_error_table(errors: dict[str, float], scheme: str) -> Table:
    """Return a table of the layers with the largest quantization errors."""
    table = Table("layer", f"{scheme}: RMS error / RMS weight")
    for name in sorted(errors, key=lambda name: -errors[name])[:MAX_LISTED]:
        table.add_row(name, f"{errors[name]:.4f}")
    if len(errors) > MAX_LISTED:
        table.add_row(
            f"... of {len(errors)} layers, mean", f"{sum(errors.values()) / len(errors):.4f}"
        )
    return table
