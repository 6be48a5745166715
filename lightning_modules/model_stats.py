"""What a transformer costs: parameters and FLOPs as formulas, to compare with what is counted.

    parameters   2|V|d + 11Ld² + 5Ld             the lecture's: no norms, no output matrix
    training     6N + 12LdT FLOPs a token        2 forward and 4 backward for each of N weights that
                                                 multiply; scores and answers of attention over T
    MFU          FLOPs a token * tokens/s / peak

The attention term counts all T x T pairs, although half of them are masked (nanoGPT, PaLM).
"""

from types import SimpleNamespace
from typing import Any

from .nn.attention import LEARNED
from .nn.transformer import padded_vocab_size, resolve_d_ff, with_defaults


def parameters(vocab_size: int, context_length: int, **net_kwargs: Any) -> dict[str, int]:
    """Parameters of `Transformer` with these arguments, term by term of the lecture's formula.

    sum(parameters(65, 128, layers=4, width=256, ...).values())  # 2,922,240 in the lecture
    """
    vocab_size, s = padded_vocab_size(vocab_size), SimpleNamespace(**with_defaults(net_kwargs))
    num_square_matrices = len(LEARNED[s.rung]) + s.output  # matrices d x d of an attention
    gains = {"rmsnorm": 1, "layernorm": 2, "none": 0}[s.norm]
    mlp = "experts" if s.experts else s.mlp  # they and their router stand in the place of the MLP
    hidden = resolve_d_ff(s.width, mlp, s.d_ff)
    is_4d = hidden == 4 * s.width and mlp not in ("none", "swiglu")  # a term of Ld², not of Ldh
    matrices = {"none": 0, "swiglu": 3, "experts": 2 * s.experts}.get(mlp, 2)  # d x h
    biased = s.bias != "none" and mlp not in ("none", "experts")
    num_square_terms = num_square_matrices + (4 * matrices if is_4d else 0)
    num_d_vectors = gains * (1 if mlp == "none" else 2) + (
        num_square_matrices if s.bias == "all" else 0
    )
    num_d_vectors += 5 if biased and is_4d else 0
    num_d_vectors += s.experts
    num_inward, name = (
        (2, "L(2h + d)") if mlp == "swiglu" else (1, "L(h + d)")
    )  # biased matrices d x h
    terms = [
        (1 if s.tied else 2, "|V|d", vocab_size * s.width),
        (s.positions == "learned", "Td", context_length * s.width),
        (num_square_terms, "Ld²", s.layers * s.width**2),
        (0 if is_4d else matrices, "Ldh", s.layers * s.width * hidden),
        (biased and not is_4d, name, s.layers * (num_inward * hidden + s.width)),
        (num_d_vectors, "Ld", s.layers * s.width),
        (gains, "d", s.width),
    ]
    return {f"{n}{term}" if n > 1 else term: n * size for n, term, size in terms if n}


def count_training_flops(vocab_size: int, context_length: int, **net_kwargs: Any) -> int:
    """FLOPs of one training step for each token: 6N + 12LdT.

    N leaves out the tables that are looked up (embedding, learned positions) but not the head, and
    of a mixture all experts but two.
    """
    terms, s = (
        parameters(vocab_size, context_length, **net_kwargs),
        SimpleNamespace(**with_defaults(net_kwargs)),
    )
    looked_up = terms.get("Td", 0) + (0 if s.tied else padded_vocab_size(vocab_size) * s.width)
    hidden = resolve_d_ff(s.width, "experts", s.d_ff)
    inactive = 2 * s.layers * s.width * hidden * max(0, s.experts - 2)
    has_attention = s.rung != "last"
    return (
        6 * (sum(terms.values()) - looked_up - inactive)
        + 12 * s.layers * s.width * context_length * has_attention
    )


def kv_cache_bytes(
    num_rows: int, num_slots: int, num_layers: int, d_model: int, bytes_per_element: int = 4
) -> int:
    """Bytes of the keys and values of `num_rows` texts, each with room for `num_slots` tokens."""
    return 2 * num_layers * num_rows * num_slots * d_model * bytes_per_element


def collectives(
    num_layers: int,
    num_shards: int = 1,
    num_replicas: int = 1,
    zero_stage: int = 3,
    tp: int = 1,
    is_sequence_parallel: bool = False,
    ep: int = 1,
    cp: int = 1,
    num_stages: int = 1,
    num_microbatches: int = 4,
    num_head_chunks: int = 1,
    num_buckets: int = 1,
) -> dict[str, int]:
    """Messages of one training step of a transformer, one micro-batch, all ranks alike.

    Sends from one rank to another are those of all ranks together: a pipeline's ends have fewer.

    A block of 1 MiB or more is one unit of sharding, and the rest of the net another. With ZeRO-3 a
    unit is gathered forward and backward, with ZeRO-2 once. Its gradients are scattered, and
    summed over the copies.
    With ZeRO-1 each rank sends, for each of `num_buckets`, a message of gradients and one of
    parameters to each other rank (gloo; a parameter of 1 MiB or more is sent apart, in pieces of 8
    MiB). Tensor parallelism sums twice a block in each direction, which `is_sequence_parallel`
    does in two halves. A mixture sends tokens there and back, in each direction. In a ring a rank
    sends keys and values to n - 1 others, forward and backward, and sends gradients back to them;
    backward for each of the `num_head_chunks` of heads, forward for two at most
    (strategies/context_parallel.py). Each boundary of `num_stages` is crossed by each micro-batch
    both ways, and the last stage sends the loss. (Not for a ring and stages.)

    collectives(12, shards=8)["all_gather"]  # 26
    """
    num_units, counts = num_layers + 1, {"all_gather": 0, "reduce_scatter": 0, "all_reduce": 0}
    num_replicated_groups = num_shards * num_replicas * tp  # rings, or pipelines
    num_shards *= cp  # parameters are shared out over both
    dp_size = num_shards * num_replicas
    if zero_stage > 1 and dp_size > 1:
        counts["all_gather"] += num_units * (2 if zero_stage == 3 else 1)
        counts["reduce_scatter"] += num_units
        counts["all_reduce"] += num_units if num_replicas > 1 else 0
    if tp > 1 and is_sequence_parallel:
        counts["all_gather"] += (
            4 * num_layers + 2
        )  # and where the sequence is put together, and back
        counts["reduce_scatter"] += 4 * num_layers
        counts["all_reduce"] += 1  # gradients of the norms
    elif tp > 1:
        counts["all_reduce"] += 4 * num_layers
    counts["all_to_all"] = 4 * num_layers if ep > 1 else 0
    counts["broadcast"] = int(num_stages > 1)
    ring = num_layers * cp * (cp - 1) * (min(num_head_chunks, 2) + 2 * num_head_chunks)
    counts["send"] = num_replicated_groups * (ring + 2 * num_microbatches * (num_stages - 1))
    counts["send"] += 2 * num_buckets * dp_size * (dp_size - 1) * tp if zero_stage == 1 else 0
    return counts
