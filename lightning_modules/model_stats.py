"""Model statistics of a transformer: parameters, training FLOPs, KV cache bytes and collectives.

    parameters   2|V|d + 11Ld² + 5Ld             as in the lecture: no norms, no output matrix
    training     6N + 12LdT FLOPs a token        2 forward and 4 backward for each of N weights in
                                                 a matrix product; attention over T tokens
    MFU          FLOPs a token * tokens/s / peak

The attention term counts all T x T pairs, although half of them are masked (nanoGPT, PaLM).
"""

from types import SimpleNamespace
from typing import Any

from .nn.attention import LEARNED_PROJECTIONS
from .nn.transformer import padded_vocab_size, resolve_d_ff, with_defaults


def count_parameters(vocab_size: int, context_length: int, **net_kwargs: Any) -> dict[str, int]:
    """Parameters of a `Transformer` with these arguments, by terms of the lecture's formula.

    # 2,922,240 in the lecture
    sum(count_parameters(65, 128, num_layers=4, d_model=256, ...).values())
    """
    vocab_size, s = padded_vocab_size(vocab_size), SimpleNamespace(**with_defaults(net_kwargs))
    num_square_matrices = (
        len(LEARNED_PROJECTIONS[s.attention_variant]) + s.out_proj
    )  # d x d matrices of an attention
    gains = {"rmsnorm": 1, "layernorm": 2, "none": 0}[s.norm]
    mlp = "experts" if s.num_experts else s.activation  # the experts and the router replace the MLP
    hidden = resolve_d_ff(s.d_model, mlp, s.d_ff)
    is_4d = hidden == 4 * s.d_model and mlp not in (
        "none",
        "swiglu",
    )  # counted in Ld² instead of Ldh
    matrices = {"none": 0, "swiglu": 3, "experts": 2 * s.num_experts}.get(mlp, 2)  # d x h
    biased = s.bias != "none" and mlp not in ("none", "experts")
    num_square_terms = num_square_matrices + (4 * matrices if is_4d else 0)
    num_d_vectors = gains * (1 if mlp == "none" else 2) + (
        num_square_matrices if s.bias == "all" else 0
    )
    num_d_vectors += 5 if biased and is_4d else 0
    num_d_vectors += s.num_experts
    num_inward, name = (
        (2, "L(2h + d)") if mlp == "swiglu" else (1, "L(h + d)")
    )  # biased matrices d x h
    terms = [
        (1 if s.tie_embeddings else 2, "|V|d", vocab_size * s.d_model),
        (s.positional_encoding == "learned", "Td", context_length * s.d_model),
        (num_square_terms, "Ld²", s.num_layers * s.d_model**2),
        (0 if is_4d else matrices, "Ldh", s.num_layers * s.d_model * hidden),
        (biased and not is_4d, name, s.num_layers * (num_inward * hidden + s.d_model)),
        (num_d_vectors, "Ld", s.num_layers * s.d_model),
        (gains, "d", s.d_model),
    ]
    return {f"{n}{term}" if n > 1 else term: n * size for n, term, size in terms if n}


def count_training_flops(vocab_size: int, context_length: int, **net_kwargs: Any) -> int:
    """FLOPs of a training step for each token: 6N + 12LdT.

    N does not count lookup tables (embedding, learned positions), but counts the head. Of a mixture
    of experts it counts two experts.
    """
    terms, s = (
        count_parameters(vocab_size, context_length, **net_kwargs),
        SimpleNamespace(**with_defaults(net_kwargs)),
    )
    looked_up = terms.get("Td", 0) + (
        0 if s.tie_embeddings else padded_vocab_size(vocab_size) * s.d_model
    )
    hidden = resolve_d_ff(s.d_model, "experts", s.d_ff)
    inactive = 2 * s.num_layers * s.d_model * hidden * max(0, s.num_experts - 2)
    has_attention = s.attention_variant != "identity"
    return (
        6 * (sum(terms.values()) - looked_up - inactive)
        + 12 * s.num_layers * s.d_model * context_length * has_attention
    )


def kv_cache_bytes(
    num_rows: int, num_slots: int, num_layers: int, d_model: int, bytes_per_element: int = 4
) -> int:
    """Bytes of a KV cache for `num_rows` texts with `num_slots` tokens each."""
    return 2 * num_layers * num_rows * num_slots * d_model * bytes_per_element


def count_collectives(
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
    """Count the collectives of one training step of a transformer, with one micro-batch, on a rank.

    `send` counts the messages from one rank to another, summed over all ranks: the first and last
    stage of a pipeline send fewer. A ring (`cp`) together with pipeline stages is not supported.

    Each block of 1 MiB or more is one FSDP unit, and the rest of the net is another one. ZeRO-3
    gathers a unit in forward and backward, ZeRO-2 once. The gradients of a unit are
    reduce-scattered and then all-reduced over the replicas.

    With ZeRO-1 each rank sends two messages for each of `num_buckets` to each other rank: one of
    gradients, one of parameters. This holds for gloo; a parameter of 1 MiB or more is sent
    separately, in pieces of 8 MiB.

    Tensor parallelism all-reduces twice a block in each direction; `is_sequence_parallel` splits
    each into a reduce-scatter and an all-gather. A mixture of experts exchanges tokens twice in
    each direction.

    In a ring a rank sends keys and values to n - 1 other ranks, forward and backward, and sends
    gradients back to them. Backward sends them for each of the `num_head_chunks` of heads, forward
    for at most two (strategies/context_parallel.py).

    Each boundary of `num_stages` is crossed by each micro-batch in both directions. The last stage
    broadcasts the loss.

    collectives(12, num_shards=8)["all_gather"]  # 26
    """
    num_units, counts = num_layers + 1, {"all_gather": 0, "reduce_scatter": 0, "all_reduce": 0}
    num_replicated_groups = num_shards * num_replicas * tp  # number of rings or pipelines
    num_shards *= cp  # parameters are sharded over both
    dp_size = num_shards * num_replicas
    if zero_stage > 1 and dp_size > 1:
        counts["all_gather"] += num_units * (2 if zero_stage == 3 else 1)
        counts["reduce_scatter"] += num_units
        counts["all_reduce"] += num_units if num_replicas > 1 else 0
    if tp > 1 and is_sequence_parallel:
        counts["all_gather"] += (
            4 * num_layers + 2
        )  # + 2: gather the full sequence, forward and backward
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
