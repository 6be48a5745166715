"""LoRA callback: fine-tune any LightningModule through adapters, and save only the adapters.

A checkpoint then holds the trained tensors and identifies the base weights. It records their file
and a hash of their names and values, which are compared on loading.
"""

import os
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_warn
from rich.console import Console
from torch import Tensor, nn

from ravine.errors import RunError, UsageError
from ravine.strategies.checkpoint.fingerprint import compute_fingerprint
from ravine.strategies.materialize import deferred_values, iter_value_blocks
from ravine.strategies.zero1 import has_gradient

from ..base import find_callbacks
from ..transforms.base import Transform, frozen_names
from ..transforms.layer_selection import (
    Patterns,
    as_list,
    find_frozen_copies,
    find_hidden_layers,
    is_submodule_of,
    is_trainable,
)
from ..transforms.pretrained import Pretrained
from .inject import (
    DEFAULT_RANK,
    MAX_LISTED,
    check_alpha_and_dropout,
    find_adaptable_layers,
    inject_lora,
    lora_layers,
)

DTYPE_NAMES = ("float64", "float32", "bfloat16", "float16")
CHECK_AFTER_BATCHES = 10  # every adapter must be called within these micro-batches


class LoRA(Transform):
    """Freeze the module and train low-rank adapters (LoRA) of the selected layers.

        lightning fit --config gpt2/finetune --trainer.callbacks+=LoRA --trainer.callbacks.rank=8

    In a script: `LoRA(["attention.*", "mlp.*"], rank=8)`. `Pretrained` reads the base weights from
    a file. With `Quantization` the frozen weights take 4 or 8 bits (QLoRA).

    A module that freezes some of its layers itself (transfer learning) is a frozen base with new
    layers. By default its frozen layers are adapted, and its trainable parameters stay trainable.
    Layers without a gradient, under `torch.no_grad()`, raise an error in the first batch.

    Args:
        targets: globs of layer names, each of which must match. By default all hidden matrices and
            convolutions without embeddings and head, or only the frozen ones if there are any.
        rank: r; by default 8, or the smaller side of a layer if that is less.
        alpha: the adapter's output is scaled by alpha / r.
        exclude: layers of `targets` that get no adapter.
        ranks: ranks of some layers by pattern; the first match applies.
        num_blocks: number of maps stacked in a layer's outputs by pattern, such as {qkv: 3}; each
            map has its own A and B.
        dropout: dropout probability of the adapters' inputs.
        rank_stabilized: scale by alpha / √r (Kalajdzievski, 2023).
        train_also: layers or parameters that are trained without an adapter, such as a new head.
        dtype: dtype of the adapters' matmuls; by default that of their layer. Adapters and their
            optimizer state are stored in float32.
        save: `adapter` saves the adapters and all other changing tensors. `all` also saves the
            frozen weights. `auto` is `adapter` if `Pretrained` names the file of the base weights,
            else `all`.
    """

    phase = "adapt"
    accepts_meta_params = True

    takes_partial_gradients = True  # under ZeRO-1 a rank has only the gradients that it owns

    def __init__(
        self,
        targets: Patterns | None = None,
        rank: int | None = None,
        alpha: float = 16.0,
        exclude: Patterns = (),
        ranks: Mapping[str, int] | None = None,
        num_blocks: Mapping[str, int] | None = None,
        dropout: float = 0.0,
        rank_stabilized: bool = False,
        train_also: Patterns = (),
        dtype: Literal["float64", "float32", "bfloat16", "float16"] | None = None,
        save: Literal["auto", "adapter", "all"] = "auto",
    ) -> None:
        """Check the arguments that do not depend on the net.

        Args:
            targets: globs of layer names; None for the default layers.
            rank: None for 8, or the smaller side of a layer if that is less.
            alpha: the adapter's output is scaled by alpha / rank.
            exclude: layers of `targets` that get no adapter.
            ranks: ranks of some layers by pattern.
            num_blocks: number of maps stacked in one weight by pattern, such as {"qkv": 3}.
            dropout: dropout probability of the adapters' inputs.
            rank_stabilized: scale by alpha / √rank instead.
            train_also: layers or parameters that are trained without an adapter.
            dtype: dtype of the adapters' matmuls; None for that of the layer.
            save: what a checkpoint contains: the adapters, or all weights.
        """
        check_alpha_and_dropout(alpha, dropout)  # raises for values out of range
        if dtype is not None and dtype not in DTYPE_NAMES:
            raise UsageError(
                f"LoRA: dtype={dtype!r} is not supported",
                DTYPE_NAMES,
                hint="use dtype='float32'",
                flag=f"--trainer.callbacks.{type(self).__name__}.dtype=float32",
            )
        self.arguments: dict[str, Any] = {
            "targets": None if targets is None else as_list(targets),
            "rank": rank,
            "alpha": alpha,
            "exclude": as_list(exclude),
            "ranks": dict(ranks or {}),
            "num_blocks": dict(num_blocks or {}),
            "dropout": dropout,
            "rank_stabilized": rank_stabilized,
            "train_also": as_list(train_also),
            "dtype": dtype,
        }
        self.save = save
        # identifies the base weights: file of Pretrained, and hash of the weights
        self.base: dict[str, Any] = {"file": None, "sha256": None}
        self._messages: list[str] = []  # lines printed at the start of a fit
        # state_dict names of the frozen weights of all pipeline stages
        self._frozen_names: set[str] = set()
        # state of the check in the first batches that each adapter is called and gets a gradient
        self._num_checked_batches = 0  # number of batches with a backward pass
        self._had_backward = False  # whether this batch had a backward pass
        self._is_whole_epoch = False  # whether this epoch ran from its first batch
        self._adapters_with_gradient: set[str] = set()  # names of adapters that had a gradient

    def config_key(self) -> dict[str, Any]:
        """Return the arguments that determine the adapters, without `save`."""
        return self.arguments

    def to_config(self) -> dict[str, Any]:
        """Return the arguments that a checkpoint records."""
        return self.arguments

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Register the phase and find the file of the base weights."""
        pretrained = find_callbacks(trainer, Pretrained)
        self.base["file"] = pretrained[0].weights_path if pretrained else None
        # frozen weights may be missing; `check_checkpoint` checks the rest
        pl_module.strict_loading = False
        super().setup(trainer, pl_module, stage)

    @property
    def _saves_adapters(self) -> bool:
        return self.save == "adapter" or (self.save == "auto" and self.base["file"] is not None)

    def transform(self, module: nn.Module) -> None:
        """Freeze the module and add the adapters; the base class calls it before training.

        It also sets `base["sha256"]`, the hash of the base weights that a checkpoint records.
        """
        self.base["sha256"] = fingerprint_weights(module)
        targets = self.arguments["targets"]
        if targets is None:
            targets = default_lora_targets(module)
        if not targets:
            names = list(find_adaptable_layers(module))
            raise UsageError(
                f"LoRA: {type(module).__name__} has no hidden matrix",
                names[:MAX_LISTED],
                hint=f"use targets=[{names[0]!r}]"
                if names
                else "remove LoRA() from Trainer(callbacks=...)",
                flag=f"--trainer.callbacks.{type(self).__name__}.targets={names[0]}"
                if names
                else "",
                label="layers that can be adapted",
            )
        dtype_name = self.arguments["dtype"]
        kwargs = {
            **self.arguments,
            "targets": targets,
            "seed": int(os.environ.get("PL_GLOBAL_SEED", 0)),  # Lightning's seed_everything sets it
            "dtype": getattr(torch, dtype_name) if dtype_name else None,
        }
        names = inject_lora(module, **kwargs)  # freezes the module; names of the adapted layers
        self._frozen_names = frozen_names(module)
        self._messages = _rank_messages(module, names) if self.arguments["rank"] is None else []
        # still trainable besides the adapters, whose parameters are named lora_...
        trained = [n for n, p in module.named_parameters() if p.requires_grad and "lora_" not in n]
        if trained and not self.arguments["train_also"]:
            more = f" and {len(trained) - 4} more" if len(trained) > 4 else ""
            self._messages.append(
                f"LoRA: {', '.join(trained[:4])}{more} stay trainable without an adapter, because "
                "other layers were frozen before"
            )

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Compare the base of the checkpoint with that of rank 0, which all ranks use."""
        self.base = trainer.strategy.broadcast(self.base)
        super().on_load_checkpoint(trainer, pl_module, checkpoint)

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Remove the frozen weights from the checkpoint if only adapters are saved."""
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        checkpoint["lora"] = {"base": dict(self.base), "frozen": not self._saves_adapters}
        if self._saves_adapters:
            state = checkpoint["state_dict"]
            for name in self._frozen_names | frozen_names(pl_module):
                state.pop(name, None)

    def check_checkpoint(self, module: nn.Module, checkpoint: dict[str, Any]) -> None:
        """Raise UsageError for a checkpoint without adapters, or with another base.

        The base class calls it when a checkpoint is loaded. `checkpoint["lora"]` has `base`, which
        identifies the base weights, and `frozen`: whether the file has the frozen weights.
        """
        if (saved := checkpoint.get("lora")) is None:
            raise UsageError(
                "LoRA: the checkpoint has no adapters, because it was not trained with LoRA",
                hint="to start from its weights, add Pretrained(path) to Trainer(callbacks=...) "
                "instead of ckpt_path",
                flag="--trainer.callbacks+=Pretrained --trainer.callbacks.path=FILE, without "
                "--ckpt_path",
            )
        state = checkpoint.get("state_dict", {})
        # a file with adapters only lacks the frozen weights
        optional_names = set() if saved["frozen"] else frozen_names(module)
        missing = module.state_dict().keys() - state.keys() - optional_names
        if state and missing:
            raise UsageError(
                f"LoRA: the checkpoint lacks {', '.join(sorted(missing)[:3])}, which this run "
                "trains",
                hint="use the callbacks of the run that wrote the checkpoint",
            )
        if not saved["frozen"] and saved["base"]["sha256"] != self.base["sha256"]:
            raise UsageError(
                f"LoRA: the adapters of the checkpoint belong to {_describe_base(saved['base'])}, "
                f"and this run has {_describe_base(self.base)}",
                hint=f"add Pretrained({saved['base']['file']!r}) to Trainer(callbacks=...)"
                if saved["base"]["file"]
                else "use the base weights with which the adapters were trained",
                flag="--trainer.callbacks+=Pretrained "
                f"--trainer.callbacks.path={saved['base']['file']}"
                if saved["base"]["file"]
                else "",
            )

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print which ranks are below the default, and which parameters have no adapter."""
        super().on_fit_start(trainer, pl_module)
        if trainer.is_global_zero:
            for line in self._messages:
                Console().print(line, soft_wrap=True, highlight=False)
        self._messages = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Raise UsageError if no optimizer holds an adapter, as when built before the adapters."""
        if trainer.world_size > 1 and not isinstance(trainer.strategy, DDPStrategy):
            return  # a rank may hold only some parameters
        # parameters are compared by identity: an optimizer of earlier parameters trains nothing
        groups = (group for optimizer in trainer.optimizers for group in optimizer.param_groups)
        optimized_ids = {id(p) for group in groups for p in group["params"]}
        adapter_params = [
            getattr(layer, key)
            for layer in lora_layers(pl_module).values()
            if not layer.lora_is_copy  # adapters of a frozen copy (a teacher) are not trained
            for key in layer.lora_param_names
        ]
        if optimized_ids and not any(id(p) in optimized_ids for p in adapter_params):
            name = type(pl_module).__name__
            raise UsageError(
                f"LoRA: no optimizer of {name} has the parameters of an adapter; it was created "
                "in __init__, before the adapters, or has other parameters",
                hint="pass self.parameters() to the optimizer in configure_optimizers, or add "
                "OptimizerPlan(AdamW) to Trainer(callbacks=...)",
                flag="--optimizer=AdamW",
            )

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Reset the record of called adapters before the first batch."""
        self._is_whole_epoch |= batch_idx == 0
        self._had_backward = False
        if self._num_checked_batches == 0:
            self._reset_called(pl_module)

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Record which adapters get a gradient; raise RunError if all run under no_grad.

        Only the first batches of a fit are checked. An adapted layer notes itself whether it was
        called, and whether autograd was enabled then.
        """
        self._had_backward = True
        if self._num_checked_batches > CHECK_AFTER_BATCHES:
            return
        layers = lora_layers(pl_module)  # adapted layers by name
        for name, layer in layers.items():
            # `has_gradient` also knows gradients that ZeRO-1 has sent to another rank
            if any(has_gradient(trainer, getattr(layer, key)) for key in layer.lora_param_names):
                self._adapters_with_gradient.add(name)
        called = [layer for layer in layers.values() if layer.lora_was_called]
        has_autograd = any(layer.lora_called_with_grad for layer in called)
        if (
            called
            and not has_autograd
            and not self._adapters_with_gradient
            and pl_module.automatic_optimization
        ):
            self._check_gradients(pl_module, "in the first training batch")

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any
    ) -> None:
        """Raise RunError after some batches if an adapter is not called or gets no gradient."""
        # a batch without backward gives no information
        if not self._had_backward or self._num_checked_batches > CHECK_AFTER_BATCHES:
            return
        self._num_checked_batches += 1
        if self._num_checked_batches == CHECK_AFTER_BATCHES:
            self._check_adapters(pl_module, f"in {CHECK_AFTER_BATCHES} training batches")

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check the adapters after a shorter epoch, unless a resume started inside it."""
        if 0 < self._num_checked_batches <= CHECK_AFTER_BATCHES and self._is_whole_epoch:
            self._check_adapters(pl_module, "in a training epoch")
        self._is_whole_epoch = False

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Record calls in validation separately, because fast paths of torch skip layers there."""
        self._called_in_training = {
            name for name, layer in lora_layers(pl_module).items() if layer.lora_was_called
        }
        self._reset_called(pl_module)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Raise RunError if validation did not call an adapter.

        For a child net without any call, such as a critic used only in training, it warns instead.
        Afterwards the record of calls is again that of training.
        """
        layers = lora_layers(pl_module)
        child_of = {name: name.partition(".")[0] for name in layers}  # the module's direct child
        called_children = {child_of[n] for n, layer in layers.items() if layer.lora_was_called}
        idle_children = set(child_of.values()) - called_children
        if called_children and idle_children:
            names = ", ".join(sorted(idle_children))
            rank_zero_warn(f"LoRA: no adapter of {names} is used in validation")
            for name, layer in layers.items():
                # counts as called, so that the check below ignores it
                layer.lora_was_called |= child_of[name] in idle_children
        self._check_all_called(pl_module, "in the validation")
        # `_called_in_training`: names that were called before the validation reset the record
        for name, layer in layers.items():
            layer.lora_was_called = name in self._called_in_training

    def _reset_called(self, module: nn.Module) -> None:
        for layer in lora_layers(module).values():
            layer.lora_was_called = layer.lora_called_with_grad = False

    def _check_adapters(self, module: nn.Module, when: str) -> None:
        self._num_checked_batches = CHECK_AFTER_BATCHES + 1  # the check is done
        self._check_all_called(module, when)
        self._check_gradients(module, when)

    def _check_gradients(self, module: nn.Module, when: str) -> None:
        """Raise RunError if an adapter had no gradient, except those of frozen copies."""
        idle = [
            name
            for name, layer in lora_layers(module).items()
            if name not in self._adapters_with_gradient and not layer.lora_is_copy
        ]
        if idle:
            more = f" and {len(idle) - 3} more" if len(idle) > 3 else ""
            names = ",".join(idle[:6])
            raise RunError(
                f"LoRA: the adapter of {', '.join(idle[:3])}{more} gets no gradient {when}; its "
                "layer runs under torch.no_grad(), or its output is detached",
                hint=f"remove torch.no_grad() and detach(), or use exclude={idle[:6]}",
                flag=f"--trainer.callbacks.{type(self).__name__}.exclude=[{names}]",
            )

    def _check_all_called(self, module: nn.Module, when: str) -> None:
        uncalled = [
            name for name, layer in lora_layers(module).items() if not layer.lora_was_called
        ]
        if uncalled:
            more = f" and {len(uncalled) - 3} more" if len(uncalled) > 3 else ""
            raise RunError(
                f"LoRA: the adapter of {', '.join(uncalled[:3])}{more} was never called {when}; "
                "the module reads the layer's weight instead of calling the layer, or skips it",
                hint=f"use exclude=[{uncalled[0]!r}]",
                flag=f"--trainer.callbacks.{type(self).__name__}.exclude={uncalled[0]}",
            )


def default_lora_targets(module: nn.Module) -> list[str]:
    """Return the hidden layers to adapt by default: only the frozen ones if there are any.

    In a net and its frozen copy, such as a momentum teacher, the same layers are selected.
    """
    layers = find_adaptable_layers(module)
    copies = find_frozen_copies(module)  # name of each frozen copy: name of the net it copies
    # matrices and convolutions, without embeddings and head
    hidden = [name for name in find_hidden_layers(module) if name in layers]
    frozen = [
        name
        for name in hidden
        if not is_trainable(layers[name])
        and not any(is_submodule_of(name, copy) for copy in copies)
    ]
    selected = set(frozen or hidden)
    # a layer that is selected in a net or in its copy is selected in both
    for copy, original in copies.items():
        for source, target in ((copy, original), (original, copy)):
            selected |= {
                target + name.removeprefix(source)
                for name in selected
                if is_submodule_of(name, source)
            }
    return [name for name in layers if name in selected]


def _rank_messages(module: nn.Module, names: list[str]) -> list[str]:
    """Return one line about the layers whose rank is below the default, or none."""
    layers = lora_layers(module)
    reduced = [
        f"{layers[n].lora_rank} for {n}" for n in names if layers[n].lora_rank < DEFAULT_RANK
    ]
    if not reduced:
        return []
    more = f" and {len(reduced) - 6} more" if len(reduced) > 6 else ""
    return [
        f"LoRA: rank {DEFAULT_RANK}, but {', '.join(reduced[:6])}{more}, the smaller side of the "
        "layer"
    ]


def fingerprint_weights(module: nn.Module) -> str:
    """Return the SHA-256 of the parameters' names, dtypes, shapes and bytes."""

    def iter_content() -> Iterator[str | Tensor]:
        for name, parameter in module.named_parameters():
            if parameter.is_meta and deferred_values(parameter) is None:
                raise UsageError(
                    f"LoRA: {name} has no values yet, because it is on the meta device",
                    hint="create the module on a device with values",
                )
            yield f"{name} {parameter.dtype} {tuple(parameter.shape)}"
            yield from iter_value_blocks(parameter)

    return compute_fingerprint(iter_content())


def _describe_base(base: dict[str, Any]) -> str:
    return f"{base['file'] or 'weights from no file'} (sha256 {str(base['sha256'])[:12]})"
