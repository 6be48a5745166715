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
from .nn.transformer import complete, mlp_width, padded


def parameters(vocabulary: int, context: int, **shape: Any) -> dict[str, int]:
    """Parameters of `Transformer` with these arguments, term by term of the lecture's formula.

    sum(parameters(65, 128, layers=4, width=256, ...).values())  # 2,922,240 in the lecture
    """
    vocabulary, s = padded(vocabulary), SimpleNamespace(**complete(shape))
    maps = len(LEARNED[s.rung]) + s.output  # matrices d x d of an attention
    gains = {"rmsnorm": 1, "layernorm": 2, "none": 0}[s.norm]
    mlp = "experts" if s.experts else s.mlp  # they and their router stand in the place of the MLP
    hidden = mlp_width(s.width, mlp, s.d_ff)
    usual = hidden == 4 * s.width and mlp not in ("none", "swiglu")  # a term of Ld², not of Ldh
    matrices = {"none": 0, "swiglu": 3, "experts": 2 * s.experts}.get(mlp, 2)  # d x h
    biased = s.bias != "none" and mlp not in ("none", "experts")
    squares = maps + (4 * matrices if usual else 0)
    lines = gains * (1 if mlp == "none" else 2) + (maps if s.bias == "all" else 0)
    lines += 5 if biased and usual else 0
    lines += s.experts
    inward, name = (2, "L(2h + d)") if mlp == "swiglu" else (1, "L(h + d)")  # biased matrices d x h
    terms = [
        (1 if s.tied else 2, "|V|d", vocabulary * s.width),
        (s.positions == "learned", "Td", context * s.width),
        (squares, "Ld²", s.layers * s.width**2),
        (0 if usual else matrices, "Ldh", s.layers * s.width * hidden),
        (biased and not usual, name, s.layers * (inward * hidden + s.width)),
        (lines, "Ld", s.layers * s.width),
        (gains, "d", s.width),
    ]
    return {f"{n}{what}" if n > 1 else what: n * size for n, what, size in terms if n}


def training_flops(vocabulary: int, context: int, **shape: Any) -> int:
    """FLOPs of one training step for each token: 6N + 12LdT.

    N leaves out the tables that are looked up (embedding, learned positions) but not the head, and
    of a mixture all experts but two.
    """
    terms, s = parameters(vocabulary, context, **shape), SimpleNamespace(**complete(shape))
    looked_up = terms.get("Td", 0) + (0 if s.tied else padded(vocabulary) * s.width)
    hidden = mlp_width(s.width, "experts", s.d_ff)
    idle = 2 * s.layers * s.width * hidden * max(0, s.experts - 2)
    mixes = s.rung != "last"
    return 6 * (sum(terms.values()) - looked_up - idle) + 12 * s.layers * s.width * context * mixes


def cache_bytes(rows: int, slots: int, layers: int, width: int, item: int = 4) -> int:
    """Bytes of the keys and values of `rows` texts, each with room for `slots` tokens."""
    return 2 * layers * rows * slots * width * item


def collectives(
    layers: int,
    shards: int = 1,
    copies: int = 1,
    zero: int = 3,
    tp: int = 1,
    sequence: bool = False,
    ep: int = 1,
    cp: int = 1,
    stages: int = 1,
    microbatches: int = 4,
    pieces: int = 1,
    buckets: int = 1,
) -> dict[str, int]:
    """Messages of one training step of a transformer, one micro-batch, all ranks alike.

    Sends from one rank to another are those of all ranks together: a pipeline's ends have fewer.

    A block of 1 MiB or more is one unit of sharding, and the rest of the net another. With ZeRO-3 a
    unit is gathered forward and backward, with ZeRO-2 once. Its gradients are scattered, and
    summed over the copies.
    With ZeRO-1 each rank sends, for each of `buckets`, a message of gradients and one of parameters
    to each other rank (gloo; a parameter of 1 MiB or more is sent apart, in pieces of 8 MiB).
    Tensor parallelism sums twice a block in each direction, which `sequence` does in two halves.
    A mixture sends tokens there and back, in each direction. In a ring a rank sends keys and values
    to n - 1 others, forward and backward, and sends gradients back to them; backward for each
    of the `pieces` of heads, forward for two at most (strategies/context_parallel.py). Each
    boundary of `stages` is crossed by each micro-batch both ways, and the last stage sends the
    loss. (Not for a ring and stages.)

    collectives(12, shards=8)["all_gather"]  # 26
    """
    units, found = layers + 1, {"all_gather": 0, "reduce_scatter": 0, "all_reduce": 0}
    alike = shards * copies * tp  # rings, or pipelines
    shards *= cp  # parameters are shared out over both
    data = shards * copies
    if zero > 1 and data > 1:
        found["all_gather"] += units * (2 if zero == 3 else 1)
        found["reduce_scatter"] += units
        found["all_reduce"] += units if copies > 1 else 0
    if tp > 1 and sequence:
        found["all_gather"] += 4 * layers + 2  # and where the sequence is put together, and back
        found["reduce_scatter"] += 4 * layers
        found["all_reduce"] += 1  # gradients of the norms
    elif tp > 1:
        found["all_reduce"] += 4 * layers
    found["all_to_all"] = 4 * layers if ep > 1 else 0
    found["broadcast"] = int(stages > 1)
    ring = layers * cp * (cp - 1) * (min(pieces, 2) + 2 * pieces)
    found["send"] = alike * (ring + 2 * microbatches * (stages - 1))
    found["send"] += 2 * buckets * data * (data - 1) * tp if zero == 1 else 0
    return found
