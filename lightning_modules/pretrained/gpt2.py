"""GPT-2's weights, in and out, under the names and in the layout of Hugging Face's safetensors.

    theirs                       ours                                     (layer i)
    wte, wpe, ln_f               embed, place, norm
    h.i.ln_1, h.i.ln_2           blocks.i.attention_norm, mlp_norm
    h.i.attn.c_attn  (d 3d)      attention.query, key, value  (d d) each
    h.i.attn.c_proj, mlp.c_fc    attention.out, mlp.up, ...   theirs transposed: x W, ours x Wᵀ

The head is the embedding, and is written only where it is not (`tie_word_embeddings` false).
What tensors do not show (heads, activation, epsilon) stands in the config.json beside them.
"""

import json
import math
import reprlib
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ravine.datamodules.downloads import announce
from ravine.errors import MissingFileError, UsageError

from ..nn.transformer import MLP, Block, Transformer, complete

SHAPE = {  # what makes a Transformer a GPT-2
    "positions": "learned",
    "norm": "layernorm",
    "qk_norm": False,
    "mlp": "gelu_tanh",
    "tied": True,
    "rung": "qkv",
    "residual": True,
    "output": True,
    "bias": "all",
}
TABLES = {"wte": "embed", "wpe": "place", "ln_f": "norm"}
PARTS = {
    "ln_1": "attention_norm",
    "attn.c_proj": "attention.out",
    "ln_2": "mlp_norm",
    "mlp.c_fc": "mlp.up",
    "mlp.c_proj": "mlp.down",
}
ACTIVATIONS = {  # of Hugging Face, and here
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "relu": "relu",
    "relu2": "relu2",
}
FIXED = {  # options of the format, and the only value that a Transformer can compute
    "model_type": "gpt2",
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
    "pruned_heads": {},
    "quantization_config": None,
}  # reorder_and_upcast_attn changes the rounding only
OTHER_NAMES = {
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_positions": "max_position_embeddings",
}
LONGEST = 1 << 20  # bytes of a config.json
PIECE = 1 << 20  # numbers that are looked at together
PREFIX = "transformer."  # of a model with a head; the published file has none


def translated(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our names and layout for tensors under theirs."""
    ours = {}
    for name, tensor in theirs.items():
        part, _, kind = name.removeprefix(PREFIX).rpartition(".")
        if part.endswith(".attn"):  # causal masks
            continue
        if part == "lm_head":  # the embedding again, or a head of its own
            ours["head.weight"] = tensor
            continue
        if part in TABLES:
            ours[f"{TABLES[part]}.{kind}"] = tensor
            continue
        _, layer, inner = part.split(".", 2)
        tensor = tensor.mT if tensor.ndim == 2 else tensor  # (out in)
        if inner == "attn.c_attn":
            for each, piece in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                ours[f"blocks.{layer}.attention.{each}.{kind}"] = piece
        else:
            ours[f"blocks.{layer}.{PARTS[inner]}.{kind}"] = tensor
    return ours


def untranslated(ours: dict[str, Tensor], vocabulary: int, tied: bool = True) -> dict[str, Tensor]:
    """Their names and layout for the tensors of a Transformer, without its padding."""
    tables = {our: their for their, our in TABLES.items()}
    parts = {our: their for their, our in PARTS.items()}
    theirs = {}
    for name, tensor in ours.items():
        part, _, kind = name.rpartition(".")
        if part == "head" and not tied:
            theirs["lm_head.weight"] = tensor[:vocabulary].contiguous()
        if part == "head" or part.endswith((".key", ".value")):  # the embedding; with its query
            continue
        if part in tables:
            rows = vocabulary if part == "embed" else len(tensor)
            theirs[f"{PREFIX}{tables[part]}.{kind}"] = tensor[:rows].contiguous()
            continue
        _, layer, inner = part.split(".", 2)
        if inner == "attention.query":
            group = [name.replace("query", each) for each in ("query", "key", "value")]
            tensor = torch.cat([ours[each] for each in group])
        tensor = tensor.mT if tensor.ndim == 2 else tensor  # (in out)
        inner = "attn.c_attn" if inner == "attention.query" else parts[inner]
        theirs[f"{PREFIX}h.{layer}.{inner}.{kind}"] = tensor.contiguous()
    return theirs


def read(path: str | Path, net: Transformer) -> None:
    """Give a net the weights of a file model.safetensors, or of a folder that holds one.

    The config.json beside the file must describe this net: what differs is refused with the
    arguments of `Transformer` that would fit, and an option that no Transformer has by its name.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = Path(path).expanduser()
    file = file / "model.safetensors" if file.is_dir() else file
    if not file.is_file():
        raise MissingFileError(
            f"no weights at {file}; allowed: a model.safetensors in Hugging Face's GPT-2 layout, "
            "or its folder; type --trainer.callbacks.path=FOLDER"
        )
    try:
        theirs = load_file(file)
        sizes = sizes_of(theirs)
        weights = translated(theirs)
    except (SafetensorError, ValueError, LookupError) as error:
        raise UsageError(f"{file} does not hold GPT-2 weights: {error!r}") from error
    config = config_of(file.parent / "config.json")
    if config is None:
        kept = {name: shape_of(net)[name] for name in ("heads", "mlp", "norm_eps")}
        said = ", ".join(f"{name}={value}" for name, value in kept.items())
        announce(
            f"no config.json beside {file}: that its weights were trained with {said} is not "
            "known; put it there to have it checked",
            loud=True,
        )
        config = {}
        expected = sizes | SHAPE | {name: shape_of(net)[name] for name in (*kept, "tied")}
    else:
        expected = expected_of(config, sizes, str(file.parent / "config.json"))
    refuse_other(expected, net, str(file))
    if net.head.weight is not net.embed.weight:
        tied = config.get("tie_word_embeddings", True) or "lm_head.weight" not in theirs
        weights["head.weight"] = weights["embed.weight" if tied else "head.weight"]
    else:
        weights.pop("head.weight", None)
    fill(net, weights, str(file))


def sizes_of(theirs: dict[str, Tensor]) -> dict[str, int]:
    """What the tensors of a file show, as arguments of `Transformer`."""
    tensors = {name.removeprefix(PREFIX): tensor for name, tensor in theirs.items()}
    layers = {int(name.split(".")[1]) for name in tensors if name.startswith("h.")}
    vocabulary, width = tensors["wte.weight"].shape
    return {
        "vocabulary": vocabulary,
        "context": len(tensors["wpe.weight"]),
        "layers": 1 + max(layers),
        "width": width,
        "d_ff": tensors["h.0.mlp.c_fc.weight"].shape[1],
    }


def config_of(file: Path) -> dict[str, Any] | None:
    """The content of config.json; None if there is none."""
    if not file.is_file():
        return None
    try:
        if file.stat().st_size > LONGEST:
            raise UsageError(f"it has more than {LONGEST:,} bytes")
        said = json.loads(file.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UsageError(
            f"{file} is no JSON: {str(error)[:200]}; allowed: the config.json of a GPT-2; fetch it "
            "again"
        ) from None
    if not isinstance(said, dict):
        raise UsageError(f"{file} holds no object; allowed: the config.json of a GPT-2")
    return said


def expected_of(config: dict[str, Any], sizes: dict[str, int], name: str) -> dict[str, Any]:
    """The arguments of the Transformer that a config.json describes.

    Args:
        config: what it says; what it leaves out is as in Hugging Face's GPT2Config.
        sizes: what the tensors show, which must agree.
        name: of the file.
    """
    given = {key: config.get(key, config.get(other)) for key, other in OTHER_NAMES.items()}
    for option, allowed in FIXED.items():
        value = config.get(option, allowed)
        if value != allowed and not (value is None and option != "model_type"):
            raise UsageError(
                f"{name} says {option}={str(value)[:40]}, which Transformer cannot compute; "
                f"allowed: {allowed}; use a GPT-2 without this option"
            )
    activation = config.get("activation_function", "gelu_new")
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise UsageError(
            f"{name} says activation_function={_short(activation)}, which Transformer does "
            f"not have; allowed: {', '.join(ACTIVATIONS)}; use a GPT-2 with one of these"
        )
    heads = 12 if given["n_head"] is None else given["n_head"]
    eps = config.get("layer_norm_epsilon", 1e-5)
    width = sizes["width"]
    if type(heads) is not int or heads < 1 or width % heads:
        raise UsageError(
            f"{name} says n_head={_short(heads)} for a width of {width}; allowed: a divisor "
            f"of {width}; fetch the file again"
        )
    if not isinstance(eps, int | float) or not 0 <= eps < math.inf:
        raise UsageError(
            f"{name} says layer_norm_epsilon={_short(eps)}; allowed: a number from 0 on; "
            "fetch the file again"
        )
    shown = {
        "n_embd": width,
        "n_layer": sizes["layers"],
        "n_positions": sizes["context"],
        "vocab_size": sizes["vocabulary"],
        "n_inner": sizes["d_ff"],
    }
    said = given | {key: config.get(key) for key in ("vocab_size", "n_inner")}
    for key, value in shown.items():
        if said[key] not in (None, value):
            raise UsageError(
                f"{name} says {key}={_short(said[key])}, and the tensors have {value}; the "
                "two files do not belong together: fetch both again"
            )
    if said["n_inner"] is None and sizes["d_ff"] != 4 * width:
        raise UsageError(
            f"{name} leaves n_inner out, which means {4 * width}, and the tensors have "
            f"{sizes['d_ff']}; the two files do not belong together: fetch both again"
        )
    tied = bool(config.get("tie_word_embeddings", True))
    found = {"heads": heads, "mlp": ACTIVATIONS[activation], "norm_eps": float(eps)}
    # an untied net can hold a tied head, as a copy
    return SHAPE | sizes | found | {"tied": True if tied else None}


def shape_of(net: Transformer) -> dict[str, Any]:
    """The arguments that a built net has, as far as a GPT-2 decides them."""
    block = cast(Block, next(iter(net.blocks.values())))
    attention, mlp, width = block.attention, block.mlp, net.embed.embedding_dim
    norm = "layernorm" if isinstance(net.norm, nn.LayerNorm) else type(net.norm).__name__.lower()
    positions = "learned" if isinstance(net.place, nn.Embedding) else "sinusoidal"
    if net.place is None:
        positions = "rope" if attention.rope else "none"
    plain = isinstance(mlp, MLP)
    bias = isinstance(attention.query, nn.Linear) and attention.query.bias is not None
    found = {
        "vocabulary": net.vocabulary,
        "context": net.context,
        "layers": len(net.blocks),
        "width": width,
        "heads": width // attention.head_width,
        "d_ff": mlp.up.out_features if plain else None,
        "mlp": mlp.activation if plain else "none" if mlp is None else "experts",
        "norm_eps": getattr(net.norm, "eps", None),
        "tied": net.head.weight is net.embed.weight,
        "positions": positions,
        "norm": {"identity": "none"}.get(norm, norm),
        "qk_norm": attention.qk_norm,
        "rung": attention.rung,
        "residual": block.residual,
        "output": isinstance(attention.out, nn.Linear),
        "bias": "all" if bias else "mlp" if plain and mlp.up.bias is not None else "none",
    }
    return found


def refuse_other(expected: dict[str, Any], net: Transformer, name: str) -> None:
    """Refuse a net whose arguments are not the expected ones, with those to type."""
    ours = shape_of(net)
    other = {key: value for key, value in expected.items() if ours[key] != value}
    if other.get("context", 0) >= net.context:  # a net may see less than its weights have learned
        del other["context"]
    if expected.get("tied") is True:
        other.pop("tied", None)
    elif "tied" in other:  # None: a head of its own, which a tied net has no place for
        other["tied"] = False
        if not ours["tied"]:
            del other["tied"]
    if not other:
        return
    flags = [f"--model.{key}={_typed(value)}" for key, value in other.items()]
    if "vocabulary" in other:
        size = other["vocabulary"]
        kind = "gpt2" if size == 50_257 else "FILE"
        flags[list(other).index("vocabulary")] = f"--data.tokenizer={kind}"
    if "context" in other:
        flags[list(other).index("context")] = f"--data.context={other['context']}"
    theirs = ", ".join(f"{key}={value}" for key, value in other.items())
    mine = ", ".join(f"{key}={ours[key]}" for key in other)
    raise UsageError(
        f"the weights in {name} do not fit the model: they are a GPT-2 with {theirs}, and the "
        f"model has {mine}; type {' '.join(flags)}"
    )


def _short(value: Any) -> str:
    return reprlib.repr(value)[:80]


def _typed(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


@torch.no_grad()
def fill(net: Transformer, weights: dict[str, Tensor], name: str) -> None:
    """Copy tensors into a net; it may see less than they do, and have a padded vocabulary.

    Parameters on the meta device (initial_values.py) read the tensors' rows later.
    """
    ours = dict(net.named_parameters())
    odd = [f"{n} is only in the file" for n in weights.keys() - ours.keys()]
    odd += [f"{n} is only in the model" for n in ours.keys() - weights.keys()]
    padded = {"embed.weight": net.vocabulary, "head.weight": net.vocabulary}
    for key in ours.keys() & weights.keys():
        rows = (padded | {"place.weight": net.context}).get(key)
        theirs, shape = weights[key], list(ours[key].shape)
        if rows is not None:
            shape[0] = rows
            theirs = theirs[:rows] if key == "place.weight" else theirs
        if list(theirs.shape) != shape:
            odd.append(f"{key} is {shape} in the model and {list(theirs.shape)} in the file")
        elif not theirs.dtype.is_floating_point:
            odd.append(f"{key} is of {theirs.dtype} in the file")
        elif not all(piece.isfinite().all() for piece in _pieces(theirs)):
            odd.append(f"{key} holds NaN or infinity in the file")
    if odd:
        more = f"; and {len(odd) - 4} more" if len(odd) > 4 else ""
        raise UsageError(
            f"the weights in {name} do not fit the model: {'; '.join(sorted(odd)[:4])}{more}; "
            "allowed: the shape of its config.json; type --config gpt2/finetune"
        )
    for key, parameter in ours.items():
        theirs = weights[key][: len(parameter)]
        values = getattr(parameter, "initial_values", None)  # its values are made later
        if values is not None:
            values.read_from(theirs)
        else:
            parameter.zero_()[: len(theirs)].copy_(theirs)  # the padding stays zero


def _pieces(tensor: Tensor) -> tuple[Tensor, ...]:
    """Pieces of at most a million numbers."""
    return tensor.split(max(1, PIECE // max(1, tensor[:1].numel())))


def write(net: Transformer, shape: dict[str, Any], folder: str | Path, end: int | None) -> None:
    """Write model.safetensors and config.json, from which `transformers` makes a GPT-2.

    GPT2LMHeadModel.from_pretrained(folder)
    """
    from safetensors.torch import save_file

    given = complete(shape)
    free = ("mlp", "tied")  # the format has a word for them
    fixed = {key: value for key, value in SHAPE.items() if key not in free}
    wrong = [
        f"{key}={given[key]}, not {value}" for key, value in fixed.items() if given[key] != value
    ]
    names = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
    if given["mlp"] not in names or given["experts"]:
        wrong.append(f"mlp={'experts' if given['experts'] else given['mlp']}, not {SHAPE['mlp']}")
    if wrong:
        raise UsageError(
            f"this model is no GPT-2: {', '.join(wrong)}; allowed: models of --config gpt2/124m; "
            "train one of those to export it"
        )
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.detach().cpu() for name, tensor in net.state_dict().items()}
    theirs = untranslated(weights, net.vocabulary, given["tied"])
    save_file(theirs, place / "model.safetensors", metadata={"format": "pt"})
    config = {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "activation_function": names[given["mlp"]],
        "layer_norm_epsilon": shape_of(net)["norm_eps"],
        "tie_word_embeddings": given["tied"],
        "vocab_size": net.vocabulary,
        "n_positions": net.context,
        "n_embd": net.embed.embedding_dim,
        "n_layer": len(net.blocks),
        "n_head": given["heads"],
        "n_inner": given["d_ff"],
        "bos_token_id": end,
        "eos_token_id": end,
    }
    (place / "config.json").write_text(json.dumps(config, indent=2) + "\n")
