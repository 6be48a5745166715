"""GPT-2 weights: load and save them in Hugging Face's safetensors format.

    Hugging Face                 Transformer                              (layer i)
    wte, wpe, ln_f               embed, pos_embed, norm
    h.i.ln_1, h.i.ln_2           blocks.i.attention_norm, mlp_norm
    h.i.attn.c_attn  (d 3d)      attention.query, key, value  (d d) each
    h.i.attn.c_proj, mlp.c_fc    attention.out_proj, mlp.up, ...   transposed: x W there, x Wᵀ here

The head is the embedding; a separate head is written only if `tie_word_embeddings` is false. The
config.json in the same folder contains the options that tensors do not show (heads, activation,
epsilon).
"""

import json
import math
import reprlib
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ravine.datamodules.downloads import log_once
from ravine.errors import MissingFileError, UsageError, format_arguments, format_flags

from ..nn.transformer import MLP, Transformer, TransformerBlock, with_defaults

GPT2_KWARGS = {  # arguments of a Transformer with GPT-2's architecture
    "positional_encoding": "learned",
    "norm": "layernorm",
    "qk_norm": False,
    "activation": "gelu_tanh",
    "tie_embeddings": True,
    "attention_variant": "qkv",
    "residual": True,
    "out_proj": True,
    "bias": "all",
}
GPT2_VOCAB_SIZE = 50_257  # tokens of GPT-2's tokenizer
TOP_LEVEL_NAMES = {"wte": "embed", "wpe": "pos_embed", "ln_f": "norm"}
BLOCK_NAMES = {
    "ln_1": "attention_norm",
    "attn.c_proj": "attention.out_proj",
    "ln_2": "mlp_norm",
    "mlp.c_fc": "mlp.up",
    "mlp.c_proj": "mlp.down",
}
HF_ACTIVATIONS = {  # Hugging Face's names to those of Transformer
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "relu": "relu",
    "relu2": "relu2",
}
REQUIRED_OPTIONS = {  # options of the format, with the only value that a Transformer supports
    "model_type": "gpt2",
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
    "pruned_heads": {},
    "quantization_config": None,
}  # reorder_and_upcast_attn is allowed: it changes the rounding only
OPTION_ALIASES = {
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_positions": "max_position_embeddings",
}
MAX_CONFIG_BYTES = 1 << 20  # maximum size of a config.json
ELEMENTS_PER_CHUNK = 1 << 20  # numbers that are checked at once
HF_PREFIX = "transformer."  # prefix in a model with a head; the published file has none


def from_hf(hf_tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert tensors from Hugging Face's names and layout to those of `Transformer`."""
    tensors = {}
    for name, tensor in hf_tensors.items():
        module_name, _, param_name = name.removeprefix(HF_PREFIX).rpartition(".")
        if module_name.endswith(".attn"):  # causal masks
            continue
        if module_name == "lm_head":  # a copy of the embedding, or a separate head
            tensors["head.weight"] = tensor
            continue
        if module_name in TOP_LEVEL_NAMES:
            tensors[f"{TOP_LEVEL_NAMES[module_name]}.{param_name}"] = tensor
            continue
        _, layer, inner = module_name.split(".", 2)
        tensor = tensor.mT if tensor.ndim == 2 else tensor  # (out in)
        if inner == "attn.c_attn":
            for projection, chunk in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                tensors[f"blocks.{layer}.attention.{projection}.{param_name}"] = chunk
        else:
            tensors[f"blocks.{layer}.{BLOCK_NAMES[inner]}.{param_name}"] = tensor
    return tensors


def to_hf(
    tensors: dict[str, Tensor], vocab_size: int, tie_embeddings: bool = True
) -> dict[str, Tensor]:
    """Convert tensors of a `Transformer` to Hugging Face's names and layout, without padding."""
    top_level_names = {own_name: hf_name for hf_name, own_name in TOP_LEVEL_NAMES.items()}
    block_names = {own_name: hf_name for hf_name, own_name in BLOCK_NAMES.items()}
    hf_tensors = {}
    for name, tensor in tensors.items():
        module_name, _, param_name = name.rpartition(".")
        if module_name == "head" and not tie_embeddings:
            hf_tensors["lm_head.weight"] = tensor[:vocab_size].contiguous()
        if module_name == "head" or module_name.endswith(
            (".key", ".value")
        ):  # the head is the embedding; key and value are saved with the query
            continue
        if module_name in top_level_names:
            rows = vocab_size if module_name == "embed" else len(tensor)
            hf_tensors[f"{HF_PREFIX}{top_level_names[module_name]}.{param_name}"] = tensor[
                :rows
            ].contiguous()
            continue
        _, layer, inner = module_name.split(".", 2)
        if inner == "attention.query":
            group = [name.replace("query", projection) for projection in ("query", "key", "value")]
            tensor = torch.cat([tensors[projection] for projection in group])
        tensor = tensor.mT if tensor.ndim == 2 else tensor  # (in out)
        inner = "attn.c_attn" if inner == "attention.query" else block_names[inner]
        hf_tensors[f"{HF_PREFIX}h.{layer}.{inner}.{param_name}"] = tensor.contiguous()
    return hf_tensors


def load_hf(path: str | Path, net: Transformer) -> None:
    """Load the weights of a model.safetensors file, or of its folder, into a net.

    The config.json in the same folder must describe this net. A mismatch raises UsageError with the
    fitting arguments of `Transformer`. An option that no Transformer supports is named in the
    error.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = Path(path).expanduser()
    file = file / "model.safetensors" if file.is_dir() else file
    if not file.is_file():
        raise MissingFileError(
            f"load_hf: there are no weights at {file}",
            ["a model.safetensors in Hugging Face's layout of GPT-2", "its folder"],
            "use Pretrained(FOLDER)",
            flag="--trainer.callbacks.path=FOLDER",
        )
    try:
        hf_tensors = load_file(file)
        sizes = infer_sizes(hf_tensors)
        weights = from_hf(hf_tensors)
    except (SafetensorError, ValueError, LookupError) as error:
        raise UsageError(
            f"load_hf: {file} does not contain GPT-2 weights: {error!r}",
            ["a model.safetensors in Hugging Face's layout of GPT-2"],
            "use another file",
        ) from error
    config = read_config(file.parent / "config.json")
    if config is None:
        unchecked = {
            name: get_net_kwargs(net)[name] for name in ("num_heads", "activation", "norm_eps")
        }
        description = ", ".join(f"{name}={value}" for name, value in unchecked.items())
        log_once(
            f"there is no config.json beside {file}, so it is not known whether its weights were "
            f"trained with {description}; add config.json to check it",
            is_warning=True,
        )
        config = {}
        expected = (
            sizes
            | GPT2_KWARGS
            | {name: get_net_kwargs(net)[name] for name in (*unchecked, "tie_embeddings")}
        )
    else:
        expected = expected_net_kwargs(config, sizes, str(file.parent / "config.json"))
    check_net_kwargs(expected, net, str(file))
    if net.head.weight is not net.embed.weight:
        has_tied_head = (
            config.get("tie_word_embeddings", True) or "lm_head.weight" not in hf_tensors
        )
        weights["head.weight"] = weights["embed.weight" if has_tied_head else "head.weight"]
    else:
        weights.pop("head.weight", None)
    copy_weights(net, weights, str(file))


def infer_sizes(hf_tensors: dict[str, Tensor]) -> dict[str, int]:
    """Infer sizes from the tensors of a file, as arguments of `Transformer`."""
    tensors = {name.removeprefix(HF_PREFIX): tensor for name, tensor in hf_tensors.items()}
    layers = {int(name.split(".")[1]) for name in tensors if name.startswith("h.")}
    vocab_size, d_model = tensors["wte.weight"].shape
    return {
        "vocab_size": vocab_size,
        "context_length": len(tensors["wpe.weight"]),
        "num_layers": 1 + max(layers),
        "d_model": d_model,
        "d_ff": tensors["h.0.mlp.c_fc.weight"].shape[1],
    }


def read_config(file: Path) -> dict[str, Any] | None:
    """Read config.json; return None if there is none."""
    if not file.is_file():
        return None
    try:
        if file.stat().st_size > MAX_CONFIG_BYTES:
            raise UsageError(
                f"it has more than {MAX_CONFIG_BYTES:,} bytes",
            )
        config = json.loads(file.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UsageError(
            f"load_hf: {file} is not JSON: {str(error)[:200]}",
            ["the config.json of a GPT-2"],
            "download the file again",
        ) from None
    if not isinstance(config, dict):
        raise UsageError(
            f"load_hf: {file} is not a JSON object",
            ["the config.json of a GPT-2"],
            "download the file again",
        )
    return config


def expected_net_kwargs(config: dict[str, Any], sizes: dict[str, int], name: str) -> dict[str, Any]:
    """Return the arguments of the Transformer that a config.json describes.

    Args:
        config: content of config.json; missing options have the defaults of GPT2Config.
        sizes: sizes of the tensors, which must agree with the config.
        name: name of the file, for messages.
    """
    aliased = {key: config.get(key, config.get(other)) for key, other in OPTION_ALIASES.items()}
    for option, allowed in REQUIRED_OPTIONS.items():
        value = config.get(option, allowed)
        if value != allowed and not (value is None and option != "model_type"):
            raise UsageError(
                f"load_hf: {name} has {option}={str(value)[:40]}, which Transformer does not "
                "support",
                [allowed],
                "use a GPT-2 without this option",
            )
    activation = config.get("activation_function", "gelu_new")
    if not isinstance(activation, str) or activation not in HF_ACTIVATIONS:
        raise UsageError(
            f"load_hf: {name} has activation_function={_shorten(activation)}, which Transformer "
            "does not have",
            HF_ACTIVATIONS,
            "use a GPT-2 with one of these activations",
        )
    num_heads = 12 if aliased["n_head"] is None else aliased["n_head"]
    eps = config.get("layer_norm_epsilon", 1e-5)
    d_model = sizes["d_model"]
    if type(num_heads) is not int or num_heads < 1 or d_model % num_heads:
        raise UsageError(
            f"load_hf: {name} has n_head={_shorten(num_heads)}, which does not divide the width "
            f"{d_model}",
            [f"divisors of {d_model}"],
            "download the file again",
        )
    if not isinstance(eps, int | float) or not 0 <= eps < math.inf:
        raise UsageError(
            f"load_hf: {name} has layer_norm_epsilon={_shorten(eps)}",
            ["0 or more"],
            "download the file again",
        )
    tensor_sizes = {
        "n_embd": d_model,
        "n_layer": sizes["num_layers"],
        "n_positions": sizes["context_length"],
        "vocab_size": sizes["vocab_size"],
        "n_inner": sizes["d_ff"],
    }
    config_sizes = aliased | {key: config.get(key) for key in ("vocab_size", "n_inner")}
    for key, value in tensor_sizes.items():
        if config_sizes[key] not in (None, value):
            raise UsageError(
                f"load_hf: {name} has {key}={_shorten(config_sizes[key])}, but the tensors have "
                f"{value}: the two files do not belong together",
                hint="download both files again",
            )
    if config_sizes["n_inner"] is None and sizes["d_ff"] != 4 * d_model:
        raise UsageError(
            f"load_hf: {name} has no n_inner, which means {4 * d_model}, but the tensors have "
            f"{sizes['d_ff']}: the two files do not belong together",
            hint="download both files again",
        )
    has_tied_head = bool(config.get("tie_word_embeddings", True))
    derived = {
        "num_heads": num_heads,
        "activation": HF_ACTIVATIONS[activation],
        "norm_eps": float(eps),
    }
    # None: an untied net can also hold a tied head, as a copy
    return GPT2_KWARGS | sizes | derived | {"tie_embeddings": True if has_tied_head else None}


def get_net_kwargs(net: Transformer) -> dict[str, Any]:
    """Return the arguments of a built net, as far as a GPT-2 determines them."""
    block = cast(TransformerBlock, next(iter(net.blocks.values())))
    attention, mlp, d_model = block.attention, block.mlp, net.embed.embedding_dim
    norm = "layernorm" if isinstance(net.norm, nn.LayerNorm) else type(net.norm).__name__.lower()
    positional_encoding = "learned" if isinstance(net.pos_embed, nn.Embedding) else "sinusoidal"
    if net.pos_embed is None:
        positional_encoding = "rope" if attention.rope else "none"
    is_plain_mlp = isinstance(mlp, MLP)
    bias = isinstance(attention.query, nn.Linear) and attention.query.bias is not None
    net_kwargs = {
        "vocab_size": net.vocab_size,
        "context_length": net.context_length,
        "num_layers": len(net.blocks),
        "d_model": d_model,
        "num_heads": d_model // attention.head_dim,
        "d_ff": mlp.up.out_features if is_plain_mlp else None,
        "activation": mlp.activation if is_plain_mlp else "none" if mlp is None else "experts",
        "norm_eps": getattr(net.norm, "eps", None),
        "tie_embeddings": net.head.weight is net.embed.weight,
        "positional_encoding": positional_encoding,
        "norm": {"identity": "none"}.get(norm, norm),
        "qk_norm": attention.qk_norm,
        "attention_variant": attention.variant,
        "residual": block.residual,
        "out_proj": isinstance(attention.out_proj, nn.Linear),
        "bias": "all" if bias else "mlp" if is_plain_mlp and mlp.up.bias is not None else "none",
    }
    return net_kwargs


def check_net_kwargs(expected: dict[str, Any], net: Transformer, name: str) -> None:
    """Raise UsageError if a net's arguments differ from the expected."""
    actual = get_net_kwargs(net)
    mismatches = {key: value for key, value in expected.items() if actual[key] != value}
    if (
        mismatches.get("context_length", 0) >= net.context_length
    ):  # a net's context may be shorter than that of the weights
        del mismatches["context_length"]
    if expected.get("tie_embeddings") is True:
        mismatches.pop("tie_embeddings", None)
    elif "tie_embeddings" in mismatches:  # None: a separate head, which a tied net cannot hold
        mismatches["tie_embeddings"] = False
        if not actual["tie_embeddings"]:
            del mismatches["tie_embeddings"]
    if not mismatches:
        return
    from_data = {"vocab_size", "context_length"}
    model = {key: value for key, value in mismatches.items() if key not in from_data}
    data = {key: mismatches[key] for key in ("context_length",) if key in mismatches}
    if "vocab_size" in mismatches:
        data["tokenizer"] = "gpt2" if mismatches["vocab_size"] == GPT2_VOCAB_SIZE else "FILE"
    calls = {"LanguageModel": model, "TextDataModule": data}
    hints = [f"{name}({format_arguments(kwargs)})" for name, kwargs in calls.items() if kwargs]
    flags = [format_flags("--model.", model), format_flags("--data.", data)]
    actual = {key: actual[key] for key in mismatches}
    raise UsageError(
        f"load_hf: the weights in {name} are a GPT-2 with {format_arguments(mismatches)}, but the "
        f"model has {format_arguments(actual)}",
        [format_arguments(mismatches)],
        f"use {' and '.join(hints)}",
        flag=" ".join(filter(None, flags)),
    )


def _shorten(value: Any) -> str:
    return reprlib.repr(value)[:80]


@torch.no_grad()
def copy_weights(net: Transformer, weights: dict[str, Tensor], name: str) -> None:
    """Copy tensors into a net, whose context may be shorter and whose vocabulary may be padded.

    Parameters on the meta device (initial_values.py) read the rows of the tensors later.
    """
    parameters = dict(net.named_parameters())
    mismatches = [f"{n} is only in the file" for n in weights.keys() - parameters.keys()]
    mismatches += [f"{n} is only in the model" for n in parameters.keys() - weights.keys()]
    unpadded_rows = {"embed.weight": net.vocab_size, "head.weight": net.vocab_size}
    for key in parameters.keys() & weights.keys():
        rows = (unpadded_rows | {"pos_embed.weight": net.context_length}).get(key)
        tensor, shape = weights[key], list(parameters[key].shape)
        if rows is not None:
            shape[0] = rows
            tensor = tensor[:rows] if key == "pos_embed.weight" else tensor
        if list(tensor.shape) != shape:
            mismatches.append(f"{key} is {shape} in the model and {list(tensor.shape)} in the file")
        elif not tensor.dtype.is_floating_point:
            mismatches.append(f"{key} is of {tensor.dtype} in the file")
        elif not all(piece.isfinite().all() for piece in _split_chunks(tensor)):
            mismatches.append(f"{key} holds NaN or infinity in the file")
    if mismatches:
        remainder = f"; and {len(mismatches) - 4} more" if len(mismatches) > 4 else ""
        raise UsageError(
            f"load_hf: the weights in {name} do not fit the model: "
            f"{'; '.join(sorted(mismatches)[:4])}{remainder}",
            ["a model of the shape in its config.json"],
            "build the model with the sizes of the file",
            flag="--config gpt2/finetune",
        )
    for key, parameter in parameters.items():
        tensor = weights[key][: len(parameter)]
        values = getattr(parameter, "initial_values", None)  # the values are read later
        if values is not None:
            values.set_source(tensor)
        else:
            parameter.zero_()[: len(tensor)].copy_(tensor)  # the padding stays zero


def _split_chunks(tensor: Tensor) -> tuple[Tensor, ...]:
    """Split a tensor into chunks of at most a million numbers."""
    return tensor.split(max(1, ELEMENTS_PER_CHUNK // max(1, tensor[:1].numel())))


def save_hf(
    net: Transformer, net_kwargs: dict[str, Any], folder: str | Path, eos_id: int | None
) -> None:
    """Write model.safetensors and config.json for Hugging Face's GPT2LMHeadModel.

    GPT2LMHeadModel.from_pretrained(folder)
    """
    from safetensors.torch import save_file

    full_kwargs = with_defaults(net_kwargs)
    free_options = ("activation", "tie_embeddings")  # config.json has options for them
    fixed = {key: value for key, value in GPT2_KWARGS.items() if key not in free_options}
    mismatches = [
        f"{key}={full_kwargs[key]}, not {value}"
        for key, value in fixed.items()
        if full_kwargs[key] != value
    ]
    names = {own_name: hf_tensors for hf_tensors, own_name in reversed(HF_ACTIVATIONS.items())}
    if full_kwargs["activation"] not in names or full_kwargs["num_experts"]:
        mismatches.append(
            f"activation={'experts' if full_kwargs['num_experts'] else full_kwargs['activation']}"
            f", not {GPT2_KWARGS['activation']}"
        )
    if mismatches:
        raise UsageError(
            f"save_hf: the model is not a GPT-2, because it has {', '.join(mismatches)}",
            ["models of the shape in configs/gpt2/124m.yaml"],
            "train a model with the arguments GPT2_KWARGS",
            flag="--config gpt2/124m",
        )
    out_dir = Path(folder)
    out_dir.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.detach().cpu() for name, tensor in net.state_dict().items()}
    hf_tensors = to_hf(weights, net.vocab_size, full_kwargs["tie_embeddings"])
    save_file(hf_tensors, out_dir / "model.safetensors", metadata={"format": "pt"})
    config = {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "activation_function": names[full_kwargs["activation"]],
        "layer_norm_epsilon": get_net_kwargs(net)["norm_eps"],
        "tie_word_embeddings": full_kwargs["tie_embeddings"],
        "vocab_size": net.vocab_size,
        "n_positions": net.context_length,
        "n_embd": net.embed.embedding_dim,
        "n_layer": len(net.blocks),
        "n_head": full_kwargs["num_heads"],
        "n_inner": full_kwargs["d_ff"],
        "bos_token_id": eos_id,
        "eos_token_id": eos_id,
    }
    (out_dir / "config.json").write_text(json.dumps(config, indent=2) + "\n")
