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
# Transformer's names to those of Hugging Face; of several names the first one is written
HF_ACTIVATION_NAMES = {own_name: hf_name for hf_name, own_name in reversed(HF_ACTIVATIONS.items())}
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
    """Convert tensors from Hugging Face's names and layout to those of `Transformer`.

    Matrices are transposed, and the stacked query, key and value are separated. The names are such
    as transformer.h.0.attn.c_attn.weight there, and blocks.0.attention.query.weight here.
    """
    tensors = {}
    for name, tensor in hf_tensors.items():
        module_name, _, param_name = name.removeprefix(HF_PREFIX).rpartition(".")
        if module_name.endswith(".attn"):  # a buffer, the causal mask
            continue
        if module_name == "lm_head":  # a copy of the embedding, or a separate head
            tensors["head.weight"] = tensor
            continue
        if module_name in TOP_LEVEL_NAMES:  # embeddings and the last norm
            tensors[f"{TOP_LEVEL_NAMES[module_name]}.{param_name}"] = tensor
            continue
        _, layer, inner = module_name.split(".", 2)  # such as h.0.attn.c_attn
        tensor = tensor.mT if tensor.ndim == 2 else tensor  # (out in)
        if inner == "attn.c_attn":  # its first axis has query, key and value
            for projection, chunk in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                tensors[f"blocks.{layer}.attention.{projection}.{param_name}"] = chunk
        else:
            tensors[f"blocks.{layer}.{BLOCK_NAMES[inner]}.{param_name}"] = tensor
    return tensors


def to_hf(
    tensors: dict[str, Tensor], vocab_size: int, tie_embeddings: bool = True
) -> dict[str, Tensor]:
    """Convert tensors of a `Transformer` to Hugging Face's names and layout, without padding.

    Args:
        tensors: tensors by name; the embedding and the head may have padded rows.
        vocab_size: rows of embedding and head that are kept.
        tie_embeddings: whether the head is the embedding, and so is not written.
    """
    top_level_names = {own_name: hf_name for hf_name, own_name in TOP_LEVEL_NAMES.items()}
    block_names = {own_name: hf_name for hf_name, own_name in BLOCK_NAMES.items()}
    hf_tensors = {}
    for name, tensor in tensors.items():
        module_name, _, param_name = name.rpartition(".")
        if module_name == "head":
            if not tie_embeddings:
                hf_tensors["lm_head.weight"] = tensor[:vocab_size].contiguous()
            continue
        if module_name.endswith((".key", ".value")):  # written with the query
            continue
        if module_name in top_level_names:
            rows = vocab_size if module_name == "embed" else len(tensor)
            hf_name = f"{HF_PREFIX}{top_level_names[module_name]}.{param_name}"
            hf_tensors[hf_name] = tensor[:rows].contiguous()
            continue
        _, layer, inner = module_name.split(".", 2)  # such as blocks.0.attention.query
        if inner == "attention.query":  # c_attn has query, key and value in one matrix
            hf_inner = "attn.c_attn"
            qkv_names = [name.replace("query", other) for other in ("query", "key", "value")]
            tensor = torch.cat([tensors[qkv_name] for qkv_name in qkv_names])
        else:
            hf_inner = block_names[inner]
        tensor = tensor.mT if tensor.ndim == 2 else tensor  # (in out)
        hf_tensors[f"{HF_PREFIX}h.{layer}.{hf_inner}.{param_name}"] = tensor.contiguous()
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
            "download model.safetensors and config.json of GPT-2, and use Pretrained(FOLDER)",
            flag="hf download gpt2 model.safetensors config.json --local-dir gpt2, then "
            "--trainer.callbacks.Pretrained.path=gpt2",
        )
    try:
        hf_tensors = load_file(file)
        sizes = infer_sizes(hf_tensors)  # arguments of Transformer: vocab_size, d_model, ...
        weights = from_hf(hf_tensors)
    except (SafetensorError, ValueError, LookupError) as error:
        raise UsageError(
            f"load_hf: {file} does not contain GPT-2 weights: {error!r}",
            ["a model.safetensors in Hugging Face's layout of GPT-2"],
            "use another file",
        ) from error
    config_file = file.parent / "config.json"
    config = read_config(config_file)
    if config is None:
        config = {}
        # the number of heads, which tensors do not show, is assumed to be that of the net
        expected = _expected_without_config(net, sizes, file)
    else:
        expected = expected_net_kwargs(config, sizes, str(config_file))
    check_net_kwargs(expected, net, str(file))
    is_head_tied = config.get("tie_word_embeddings", True) or "lm_head.weight" not in hf_tensors
    if net.head.weight is net.embed.weight:  # the net lists the embedding only
        weights.pop("head.weight", None)
    elif is_head_tied:  # a separate head gets a copy of the embedding
        weights["head.weight"] = weights["embed.weight"]
    copy_weights(net, weights, str(file))


def _expected_without_config(net: Transformer, sizes: dict[str, int], file: Path) -> dict[str, Any]:
    """Return the arguments of the Transformer that weights without a config.json need.

    Options that tensors do not show are assumed to be those of `net`, with a warning.
    """
    net_kwargs = get_net_kwargs(net)
    unchecked = {name: net_kwargs[name] for name in ("num_heads", "activation", "norm_eps")}
    description = ", ".join(f"{name}={value}" for name, value in unchecked.items())
    log_once(
        f"there is no config.json beside {file}, so it is not known whether its weights were "
        f"trained with {description}; add config.json to check it",
        is_warning=True,
    )
    return sizes | GPT2_KWARGS | unchecked | {"tie_embeddings": net_kwargs["tie_embeddings"]}


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
    """Read config.json; return None if there is none.

    Raises:
        UsageError: the file is too large, is not JSON, or is not a JSON object.
    """
    if not file.is_file():
        return None
    try:
        if file.stat().st_size > MAX_CONFIG_BYTES:  # the ValueError becomes the reason below
            # a UsageError is a ValueError, too
            raise UsageError(f"it has more than {MAX_CONFIG_BYTES:,} bytes")
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

    Raises:
        UsageError: an option is not supported or invalid, or a size differs from the tensors.
    """
    # raises for options with a value that no Transformer has, such as scale_attn_weights=False
    _check_required_options(config, name)
    activation = config.get("activation_function", "gelu_new")
    if not isinstance(activation, str) or activation not in HF_ACTIVATIONS:
        raise UsageError(
            f"load_hf: {name} has activation_function={_shorten(activation)}, which Transformer "
            "does not have",
            HF_ACTIVATIONS,
            "use a GPT-2 with one of these activations",
        )
    # by its name or its alias (num_attention_heads); None if missing
    num_heads = _read_option(config, "n_head")
    num_heads = 12 if num_heads is None else num_heads
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
    _check_config_sizes(config, sizes, name)
    options = {
        "num_heads": num_heads,
        "activation": HF_ACTIVATIONS[activation],
        "norm_eps": float(eps),
        "tie_embeddings": bool(config.get("tie_word_embeddings", True)),
    }
    # the arguments of the published GPT-2, replaced by what this file says
    return GPT2_KWARGS | sizes | options


def _read_option(config: dict[str, Any], option: str) -> Any:
    """Return an option of config.json by its name or its alias; None if it is missing."""
    return config.get(option, config.get(OPTION_ALIASES.get(option, option)))


def _check_required_options(config: dict[str, Any], name: str) -> None:
    """Raise UsageError for an option whose value Transformer does not support."""
    for option, allowed in REQUIRED_OPTIONS.items():
        value = config.get(option, allowed)
        is_unset = value is None and option != "model_type"
        if value != allowed and not is_unset:
            raise UsageError(
                f"load_hf: {name} has {option}={str(value)[:40]}, which Transformer does not "
                "support",
                [allowed],
                "use a GPT-2 without this option",
            )


def _check_config_sizes(config: dict[str, Any], sizes: dict[str, int], name: str) -> None:
    """Raise UsageError if a size in config.json differs from that of the tensors.

    Args:
        config: content of config.json; a missing size is not compared.
        sizes: sizes of the tensors, as arguments of `Transformer`.
        name: name of the file, for messages.
    """
    tensor_sizes = {
        "n_embd": sizes["d_model"],
        "n_layer": sizes["num_layers"],
        "n_positions": sizes["context_length"],
        "vocab_size": sizes["vocab_size"],
        "n_inner": sizes["d_ff"],
    }
    for option, tensor_size in tensor_sizes.items():
        config_size = _read_option(config, option)
        if config_size not in (None, tensor_size):
            raise UsageError(
                f"load_hf: {name} has {option}={_shorten(config_size)}, but the tensors have "
                f"{tensor_size}: the two files do not belong together",
                hint="download both files again",
            )
    default_d_ff = 4 * sizes["d_model"]
    if _read_option(config, "n_inner") is None and sizes["d_ff"] != default_d_ff:
        raise UsageError(
            f"load_hf: {name} has no n_inner, which means {default_d_ff}, but the tensors have "
            f"{sizes['d_ff']}: the two files do not belong together",
            hint="download both files again",
        )


def get_net_kwargs(net: Transformer) -> dict[str, Any]:
    """Return the arguments of a built net, as far as a GPT-2 determines them.

    They are read from the first block, because all blocks are alike.
    """
    block = cast(TransformerBlock, next(iter(net.blocks.values())))
    attention, mlp, d_model = block.attention, block.mlp, net.embed.embedding_dim
    norm = type(net.norm).__name__.lower()  # layernorm, rmsnorm, identity
    if isinstance(net.norm, nn.LayerNorm):  # or a subclass of another name
        norm = "layernorm"
    positional_encoding = "learned" if isinstance(net.pos_embed, nn.Embedding) else "sinusoidal"
    if net.pos_embed is None:
        positional_encoding = "rope" if attention.rope else "none"
    is_plain_mlp = isinstance(mlp, MLP)
    bias = "mlp" if is_plain_mlp and mlp.up.bias is not None else "none"
    if isinstance(attention.query, nn.Linear) and attention.query.bias is not None:
        bias = "all"
    activation = "none" if mlp is None else "experts"
    if is_plain_mlp:
        activation = mlp.activation
    return {
        "vocab_size": net.vocab_size,
        "context_length": net.context_length,
        "num_layers": len(net.blocks),
        "d_model": d_model,
        "num_heads": d_model // attention.head_dim,
        "d_ff": mlp.up.out_features if is_plain_mlp else None,
        "activation": activation,
        "norm_eps": getattr(net.norm, "eps", None),
        "tie_embeddings": net.head.weight is net.embed.weight,
        "positional_encoding": positional_encoding,
        "norm": {"identity": "none"}.get(norm, norm),  # nn.Identity stands for no norm
        "qk_norm": attention.qk_norm,
        "attention_variant": attention.variant,
        "residual": block.residual,
        "out_proj": isinstance(attention.out_proj, nn.Linear),
        "bias": bias,
    }


def check_net_kwargs(expected: dict[str, Any], net: Transformer, name: str) -> None:
    """Raise UsageError if a net's arguments differ from the expected ones.

    Args:
        expected: arguments of `Transformer` that the weights need.
        net: the net that is to hold the weights.
        name: name of the weights' file, for the message.
    """
    actual = get_net_kwargs(net)  # read from the modules of the built net
    required = {key: value for key, value in expected.items() if actual[key] != value}
    if required.get("context_length", 0) >= net.context_length:
        del required["context_length"]  # a net's context may be shorter than that of the weights
    if required.get("tie_embeddings") is True:
        del required["tie_embeddings"]  # a separate head can hold a copy of the embedding
    if not required:
        return
    from_data = {"vocab_size", "context_length"}  # the datamodule determines them
    model_kwargs = {key: value for key, value in required.items() if key not in from_data}
    data_kwargs = {key: required[key] for key in ("context_length",) if key in required}
    if "vocab_size" in required:
        data_kwargs["tokenizer"] = "gpt2" if required["vocab_size"] == GPT2_VOCAB_SIZE else "FILE"
    # the hint names the classes to which the user passes these arguments
    kwargs_by_class = {"LanguageModel": model_kwargs, "TextDataModule": data_kwargs}
    hints = [f"{c}({format_arguments(kwargs)})" for c, kwargs in kwargs_by_class.items() if kwargs]
    flags = [format_flags("--model.", model_kwargs), format_flags("--data.", data_kwargs)]
    mismatches = {key: actual[key] for key in required}
    raise UsageError(
        f"load_hf: the weights in {name} are a GPT-2 with {format_arguments(required)}, but the "
        f"model has {format_arguments(mismatches)}",
        [format_arguments(required)],
        f"use {' and '.join(hints)}",
        flag=" ".join(filter(None, flags)),
    )


def _shorten(value: Any) -> str:
    return reprlib.repr(value)[:80]


@torch.no_grad()
def copy_weights(net: Transformer, weights: dict[str, Tensor], name: str) -> None:
    """Copy tensors into a net, whose context may be shorter and whose vocabulary may be padded.

    Parameters on the meta device (initial_values.py) read the rows of the tensors later.

    Args:
        net: the net.
        weights: tensors by the names of the net's parameters.
        name: name of the file, for messages.

    Raises:
        UsageError: a name, shape or dtype differs, or a value is not finite.
    """
    parameters = dict(net.named_parameters())
    mismatches = _find_weight_mismatches(net, parameters, weights)
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
        tensor = weights[key][: len(parameter)]  # the net's context may be shorter
        # a parameter on the meta device: it has no memory before a strategy shards the net
        values = getattr(parameter, "initial_values", None)
        if values is not None:
            values.set_source(tensor)
        else:
            parameter.zero_()[: len(tensor)].copy_(tensor)  # the padding stays zero


def _find_weight_mismatches(
    net: Transformer, parameters: dict[str, nn.Parameter], weights: dict[str, Tensor]
) -> list[str]:
    """Describe each difference in names, shapes and dtypes, and each tensor that is not finite."""
    mismatches = [f"{n} is only in the file" for n in weights.keys() - parameters.keys()]
    mismatches += [f"{n} is only in the model" for n in parameters.keys() - weights.keys()]
    for key in parameters.keys() & weights.keys():
        tensor, shape = weights[key], list(parameters[key].shape)
        if key in ("embed.weight", "head.weight"):
            shape[0] = net.vocab_size  # further rows of the model are padding
        elif key == "pos_embed.weight":
            shape[0] = net.context_length
            tensor = tensor[: net.context_length]  # the model's context may be shorter
        if list(tensor.shape) != shape:
            mismatches.append(f"{key} is {shape} in the model and {list(tensor.shape)} in the file")
        elif not tensor.dtype.is_floating_point:
            mismatches.append(f"{key} is of {tensor.dtype} in the file")
        elif not all(chunk.isfinite().all() for chunk in _split_chunks(tensor)):
            mismatches.append(f"{key} holds NaN or infinity in the file")
    return mismatches


def _split_chunks(tensor: Tensor) -> tuple[Tensor, ...]:
    """Split a tensor into chunks of at most a million numbers."""
    return tensor.split(max(1, ELEMENTS_PER_CHUNK // max(1, tensor[:1].numel())))


def save_hf(
    net: Transformer, net_kwargs: dict[str, Any], folder: str | Path, eos_id: int | None
) -> None:
    """Write model.safetensors and config.json for Hugging Face's GPT2LMHeadModel.

        GPT2LMHeadModel.from_pretrained(folder)

    Args:
        net: the net.
        net_kwargs: the arguments of `Transformer` that it was built with.
        folder: output folder.
        eos_id: id of the end-of-text token, if the tokenizer has one.

    Raises:
        UsageError: the net does not have GPT-2's architecture.
    """
    from safetensors.torch import save_file

    full_kwargs = with_defaults(net_kwargs)  # all arguments of Transformer
    _check_is_gpt2(full_kwargs)
    out_dir = Path(folder)
    out_dir.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.detach().cpu() for name, tensor in net.state_dict().items()}
    # Hugging Face's names and layout, without the padding of the vocabulary
    hf_tensors = to_hf(weights, net.vocab_size, full_kwargs["tie_embeddings"])
    save_file(hf_tensors, out_dir / "model.safetensors", metadata={"format": "pt"})
    config = {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "activation_function": HF_ACTIVATION_NAMES[full_kwargs["activation"]],
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


def _check_is_gpt2(net_kwargs: dict[str, Any]) -> None:
    """Raise UsageError if a net with all these arguments does not have GPT-2's architecture."""
    free_options = ("activation", "tie_embeddings")  # config.json has options for them
    mismatches = [
        f"{key}={net_kwargs[key]}, not {value}"
        for key, value in GPT2_KWARGS.items()
        if key not in free_options and net_kwargs[key] != value
    ]
    # a net with experts has no other MLP; "experts" is in no GPT-2
    activation = "experts" if net_kwargs["num_experts"] else net_kwargs["activation"]
    if activation not in HF_ACTIVATION_NAMES:
        mismatches.append(f"activation={activation}, not {GPT2_KWARGS['activation']}")
    if mismatches:
        raise UsageError(
            f"save_hf: the model is not a GPT-2, because it has {', '.join(mismatches)}",
            ["models of the shape in configs/gpt2/124m.yaml"],
            "train a model with the arguments GPT2_KWARGS",
            flag="--config gpt2/124m",
        )
