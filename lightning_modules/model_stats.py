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
    """Count the parameters of a `Transformer` with these arguments, by terms of a formula.

    The symbols are V vocabulary, T context length, L layers, d `d_model` and h `d_ff`. The keys are
    the terms with their factors, such as 11Ld²; the values are numbers of parameters.

    # 2,922,240 in the lecture
    sum(count_parameters(65, 128, num_layers=4, d_model=256, ...).values())
    """
    vocab_size = padded_vocab_size(vocab_size)  # a large vocabulary has further rows
    net = SimpleNamespace(**with_defaults(net_kwargs))  # all arguments of Transformer
    d = net.d_model
    vectors_per_norm = {"rmsnorm": 1, "layernorm": 2, "none": 0}[net.norm]  # gain; gain and bias
    # d x d matrices of an attention
    attention_matrices = len(LEARNED_PROJECTIONS[net.attention_variant]) + net.out_proj
    mlp = "experts" if net.num_experts else net.activation  # experts and router replace the MLP
    h = resolve_d_ff(d, mlp, net.d_ff)  # the default is 4d, for swiglu 8d/3
    mlp_matrices = {"none": 0, "swiglu": 3, "experts": 2 * net.num_experts}.get(mlp, 2)  # d x h
    # a matrix d x 4d is counted as 4 Ld², not as Ldh
    is_4d = h == 4 * d and mlp not in ("none", "swiglu")
    has_mlp_bias = net.bias != "none" and mlp not in ("none", "experts")

    num_square_matrices = attention_matrices + (4 * mlp_matrices if is_4d else 0)
    num_d_vectors = vectors_per_norm * (1 if mlp == "none" else 2)
    num_d_vectors += attention_matrices if net.bias == "all" else 0  # a bias for each matrix
    num_d_vectors += 5 if has_mlp_bias and is_4d else 0  # 4d of `up` and d of `down`
    num_d_vectors += net.num_experts  # rows of the router
    # biases of the MLP: h for each matrix from d to h, and d for the one back
    num_h_biases, bias_term = (2, "L(2h + d)") if mlp == "swiglu" else (1, "L(h + d)")
    terms = [  # factor, term, size of the term
        (1 if net.tie_embeddings else 2, "|V|d", vocab_size * d),
        (net.positional_encoding == "learned", "Td", context_length * d),
        (num_square_matrices, "Ld²", net.num_layers * d**2),
        (0 if is_4d else mlp_matrices, "Ldh", net.num_layers * d * h),
        (has_mlp_bias and not is_4d, bias_term, net.num_layers * (num_h_biases * h + d)),
        (num_d_vectors, "Ld", net.num_layers * d),
        (vectors_per_norm, "d", d),
    ]
    return {
        f"{factor}{term}" if factor > 1 else term: factor * size
        for factor, term, size in terms
        if factor
    }


def count_training_flops(vocab_size: int, context_length: int, **net_kwargs: Any) -> int:
    """Count the FLOPs of a training step of a `Transformer` for each token: 6N + 12LdT.

    N does not count lookup tables (embedding, learned positions), but counts the head. Of a mixture
    of experts it counts two experts. L is the number of layers, d `d_model`, T the context length.
    """
    terms = count_parameters(vocab_size, context_length, **net_kwargs)  # parameters by term
    net = SimpleNamespace(**with_defaults(net_kwargs))  # all arguments of Transformer
    position_table = terms.get("Td", 0)
    # a tied embedding is the head, too, whose matrix product counts
    embedding_table = 0 if net.tie_embeddings else padded_vocab_size(vocab_size) * net.d_model
    # the default is 4d; an expert has two matrices
    d_ff = resolve_d_ff(net.d_model, "experts", net.d_ff)
    weights_per_expert = 2 * net.num_layers * net.d_model * d_ff
    inactive = weights_per_expert * max(0, net.num_experts - 2)
    num_active = sum(terms.values()) - position_table - embedding_table - inactive
    has_attention = net.attention_variant != "identity"
    attention_flops = 12 * net.num_layers * net.d_model * context_length * has_attention
    return 6 * num_active + attention_flops


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

        count_collectives(12, num_shards=8)["all_gather"]  # 26

    Args:
        num_layers: blocks of the transformer.
        num_shards: ranks over which the parameters are sharded.
        num_replicas: copies of each shard.
        zero_stage: 1, 2 or 3.
        tp: tensor-parallel ranks.
        is_sequence_parallel: whether tensor parallelism also splits the sequence.
        ep: expert-parallel ranks.
        cp: context-parallel ranks, which form a ring.
        num_stages: pipeline stages.
        num_microbatches: micro-batches of a pipeline.
        num_head_chunks: chunks of heads in a ring.
        num_buckets: buckets of parameters with ZeRO-1.
    """
    counts = {"all_gather": 0, "reduce_scatter": 0, "all_reduce": 0}
    num_units = num_layers + 1  # FSDP units
    # `num_shards` does not yet contain the ranks of a ring
    num_groups = num_shards * num_replicas * tp  # number of rings or pipelines
    num_shards *= cp  # parameters are sharded over both
    dp_size = num_shards * num_replicas
    if zero_stage > 1 and dp_size > 1:
        counts["all_gather"] += num_units * (2 if zero_stage == 3 else 1)
        counts["reduce_scatter"] += num_units
        counts["all_reduce"] += num_units if num_replicas > 1 else 0
    if tp > 1 and is_sequence_parallel:
        # + 2: gather the full sequence, forward and backward
        counts["all_gather"] += 4 * num_layers + 2
        counts["reduce_scatter"] += 4 * num_layers
        counts["all_reduce"] += 1  # gradients of the norms
    elif tp > 1:
        counts["all_reduce"] += 4 * num_layers
    counts["all_to_all"] = 4 * num_layers if ep > 1 else 0
    counts["broadcast"] = int(num_stages > 1)
    forward_sends, backward_sends = min(num_head_chunks, 2), 2 * num_head_chunks
    sends_per_ring = num_layers * cp * (cp - 1) * (forward_sends + backward_sends)
    sends_per_pipeline = 2 * num_microbatches * (num_stages - 1)
    counts["send"] = num_groups * (sends_per_ring + sends_per_pipeline)
    if zero_stage == 1:
        counts["send"] += 2 * num_buckets * dp_size * (dp_size - 1) * tp
    return counts
