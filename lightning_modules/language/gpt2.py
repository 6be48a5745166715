"""GPT-2's weights, in and out, under the names and in the layout of Hugging Face's safetensors.

    theirs                       ours                                     (layer i)
    wte, wpe, ln_f               embed, place, norm
    h.i.ln_1, h.i.ln_2           blocks.i.attention_norm, mlp_norm
    h.i.attn.c_attn  (d 3d)      attention.query, key, value  (d d) each
    h.i.attn.c_proj, mlp.c_fc    attention.out, mlp.up, ...   theirs transposed: x W, ours x Wᵀ

The head is the embedding, so neither layout writes it twice.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .transformer import Transformer, complete

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
PREFIX = "transformer."  # of a model with a head; the published file has none


def translated(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our names and layout for tensors under theirs."""
    ours = {}
    for name, tensor in theirs.items():
        part, _, kind = name.removeprefix(PREFIX).rpartition(".")
        if part == "lm_head" or part.endswith(".attn"):  # the embedding again; causal masks
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


def untranslated(ours: dict[str, Tensor], vocabulary: int) -> dict[str, Tensor]:
    """Their names and layout for the tensors of a Transformer, without its padding."""
    tables = {our: their for their, our in TABLES.items()}
    parts = {our: their for their, our in PARTS.items()}
    theirs = {}
    for name, tensor in ours.items():
        part, _, kind = name.rpartition(".")
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
    """Give a net the weights of a file model.safetensors, or of a folder that holds one."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = Path(path).expanduser()
    file = file / "model.safetensors" if file.is_dir() else file
    if not file.is_file():
        raise FileNotFoundError(
            f"no weights at {file}; allowed: a model.safetensors in Hugging Face's GPT-2 layout, "
            "or its folder; type --trainer.callbacks.path=FOLDER"
        )
    try:
        weights = translated(load_file(file))
    except (SafetensorError, ValueError, LookupError) as error:
        raise ValueError(f"{file} does not hold GPT-2 weights: {error!r}") from error
    fill(net, weights, str(file))


@torch.no_grad()
def fill(net: Transformer, weights: dict[str, Tensor], name: str) -> None:
    """Copy tensors into a net; it may see less than they do, and have a padded vocabulary."""
    ours = {n: p for n, p in net.named_parameters() if n != "head.weight"}
    odd = [f"{n} is only in the file" for n in weights.keys() - ours.keys()]
    odd += [f"{n} is only in the model" for n in ours.keys() - weights.keys()]
    for key in ours.keys() & weights.keys():
        rows = {"embed.weight": net.vocabulary, "place.weight": net.context}.get(key)
        theirs, shape = weights[key], list(ours[key].shape)
        if rows is not None:
            shape[0] = rows
            theirs = theirs[:rows] if key == "place.weight" else theirs
        if list(theirs.shape) != shape:
            odd.append(f"{key} is {shape} in the model and {list(theirs.shape)} in the file")
        else:
            ours[key].zero_()[: len(theirs)].copy_(theirs)  # the padding stays zero
    if odd:
        more = f"; and {len(odd) - 4} more" if len(odd) > 4 else ""
        raise ValueError(
            f"the weights in {name} do not fit the model: {'; '.join(sorted(odd)[:4])}{more}; "
            "allowed: the shape of its config.json; type --config gpt2/finetune"
        )


def write(net: Transformer, shape: dict[str, Any], folder: str | Path, end: int | None) -> None:
    """Write model.safetensors and config.json, from which `transformers` makes a GPT-2.

    GPT2LMHeadModel.from_pretrained(folder)
    """
    from safetensors.torch import save_file

    given = complete(shape)
    wrong = [
        f"{key}={given[key]}, not {value}" for key, value in SHAPE.items() if given[key] != value
    ]
    if wrong:
        raise ValueError(
            f"this model is no GPT-2: {', '.join(wrong)}; allowed: models of --config gpt2/124m; "
            "train one of those to export it"
        )
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.detach().cpu() for name, tensor in net.state_dict().items()}
    theirs = untranslated(weights, net.vocabulary)
    save_file(theirs, place / "model.safetensors", metadata={"format": "pt"})
    config = {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
        "vocab_size": net.vocabulary,
        "n_positions": net.context,
        "n_embd": net.embed.embedding_dim,
        "n_layer": len(net.blocks),
        "n_head": given["heads"],
        "bos_token_id": end,
        "eos_token_id": end,
    }
    (place / "config.json").write_text(json.dumps(config, indent=2) + "\n")
