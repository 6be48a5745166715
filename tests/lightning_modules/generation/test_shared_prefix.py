"""Shared prefixes: one row per prompt gives the logits and gradients of full texts."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ravine.lightning_modules.generation.generate_text import generate, pad_sequences_for_scoring
from ravine.lightning_modules.generation.kv_cache import KVCache
from ravine.lightning_modules.generation.sampling import DecodingConfig
from ravine.lightning_modules.generation.shared_prefix import SharedPrefixBatch
from ravine.lightning_modules.nn import Transformer
from ravine.lightning_modules.rl.rollout import compute_logits_at, make_shared_prefix_batch

V, T, LAYERS = 23, 32, 3
SHAPES: list[dict[str, Any]] = [
    {},
    {
        "positional_encoding": "learned",
        "norm": "layernorm",
        "activation": "gelu_tanh",
        "bias": "all",
        "tie_embeddings": True,
    },
    {
        "positional_encoding": "sinusoidal",
        "attention_variant": "mean",
        "attn_implementation": "eager",
    },
    {
        "positional_encoding": "none",
        "attention_variant": "qk",
        "residual": False,
        "activation": "none",
        "num_heads": 1,
    },
    {"attention_variant": "identity"},
    {"attention_variant": "shared_qk", "out_proj": False},
]
LENGTHS = {"equal": ([5, 5, 5], 2), "ragged": ([3, 7, 1, 4], 3), "one prompt": ([6], 4),
           "nothing shared": ([1, 1], 2)}  # fmt: skip


def lively(dtype: torch.dtype = torch.float64, **shape: Any) -> Transformer:
    torch.manual_seed(0)
    shape = {
        "num_layers": LAYERS,
        "d_model": 16,
        "num_heads": 2,
        "zero_init_residual": False,
    } | shape
    return Transformer(V, T, **shape).to(dtype).eval()


def texts(lengths: list[int], size: int, new: int = 6) -> tuple[list[Tensor], Tensor]:
    g = torch.Generator().manual_seed(1)
    prompts = [torch.randint(V, (length,), generator=g) for length in lengths]
    return prompts, torch.randint(V, (len(lengths) * size, new), generator=g)


def both(net: nn.Module, prompts: list[Tensor], written: Tensor) -> list[list[Tensor]]:
    """Logits and gradients of whole texts, and of branches."""
    rows = [prompt for prompt in prompts for _ in range(len(written) // len(prompts))]
    whole = compute_logits_at(net, *pad_sequences_for_scoring(rows, written))
    branches = SharedPrefixBatch(prompts, written, LAYERS)
    found = []
    for logits in (whole, net(branches.tokens, branches)):
        loss = (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits).sin()).sum()
        gradients = torch.autograd.grad(loss, list(net.parameters()), materialize_grads=True)
        found.append([logits.detach(), torch.cat([each.flatten() for each in gradients])])
    return found


def off(one: list[Tensor], other: list[Tensor]) -> float:
    """Relative error of the logits, or of the gradient."""
    return max(float((a - b).norm() / a.norm()) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("case", LENGTHS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_logits_and_gradients_equal_those_of_full_texts(shape: dict[str, Any], case: str) -> None:
    prompts, written = texts(*LENGTHS[case])
    whole, branches = both(lively(**shape), prompts, written)
    assert branches[0].shape == (*written.shape, V)
    assert off(whole, branches) < 1e-10
    assert off(*both(lively(torch.float32, **shape), prompts, written)) < 1e-6


def test_a_prompt_is_processed_once_and_the_last_block_only_where_logits_are_needed() -> None:
    prompts, written = texts([9, 9], 4)
    net, seen = lively(), []
    for block in net.blocks.values():
        block.mlp.register_forward_hook(
            lambda _, given, __: seen.append(given[0].shape[:2].numel())
        )  # type: ignore[union-attr]
    net.head.register_forward_hook(lambda _, given, __: seen.append(given[0].shape[:2].numel()))
    branches = SharedPrefixBatch(prompts, written, LAYERS)
    net(branches.tokens, branches)
    num_prefix_tokens, own = 2 * 8, 8 * 6
    assert seen == [num_prefix_tokens + own, num_prefix_tokens + own, own, own]


def test_a_completion_attends_to_its_prompt_and_itself_alone() -> None:
    prompts, written = texts([4, 6], 2)
    net = lively()

    def answers() -> Tensor:
        branches = SharedPrefixBatch(prompts, written, LAYERS)
        return net(branches.tokens, branches)

    before = answers()
    written[1, 2] = (written[1, 2] + 1) % V  # the fourth token that branch 1 reads
    changed = (answers() - before).abs().amax(-1) > 0  # (b n)
    assert changed.nonzero().tolist() == [[1, 3], [1, 4], [1, 5]]
    before = answers()
    prompts[1][0] = (prompts[1][0] + 1) % V
    changed = (answers() - before).abs().amax(-1) > 0
    assert changed.all(1).tolist() == changed.any(1).tolist() == [False, False, True, True]


def test_nets_that_need_full_texts_get_full_texts() -> None:
    prompts, written = texts([4, 4], 2)
    assert make_shared_prefix_batch(lively(), prompts, written) is not None
    assert (
        make_shared_prefix_batch(lively(), prompts, written[:2]) is None
    )  # nobody shares a prompt
    assert make_shared_prefix_batch(lively(num_experts=2), prompts, written) is None
    assert make_shared_prefix_batch(nn.Sequential(lively()), prompts, written) is None
    cut, stage = lively(), lively()
    cut.blocks["1"].attention.attention_fn = lambda query, key, value, dropout: value  # type: ignore
    stage.forward = lambda *args, **how: args[0]  # type: ignore[method-assign]
    assert make_shared_prefix_batch(cut, prompts, written) is None
    assert make_shared_prefix_batch(stage, prompts, written) is None


@pytest.mark.parametrize("case", ["equal", "ragged", "one prompt"])
@pytest.mark.parametrize("shape", [*SHAPES, {"num_experts": 2}], ids=str)
def test_texts_of_one_prompt_are_generated_from_one_row(shape: dict[str, Any], case: str) -> None:
    """The cache keeps a shared prompt once; the texts are those written without a cache."""
    lengths, size = LENGTHS[case]
    net = lively(torch.float32, **shape)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter *= 2
    rows = [prompt for prompt in texts(lengths, size)[0] for _ in range(size)]
    read: list[tuple[int, ...]] = []
    net.embed.register_forward_hook(lambda _, given, __: read.append(tuple(given[0].shape)))
    with_cache = generate(net, rows, 20, T, DecodingConfig(1.0), stops=[[3]], seed=4)
    groups = (len(rows), 1) if "num_experts" in shape else (len(lengths), size)
    assert read[:2] == [(len(lengths), max(lengths)), groups]
    if "num_experts" in shape:
        return  # what an expert leaves out depends on how much of a text it sees at once
    without = generate(net, rows, 20, T, DecodingConfig(1.0), stops=[[3]], seed=4, use_cache=False)
    assert with_cache.tokens.equal(without.tokens)
    torch.testing.assert_close(with_cache[1], without[1], rtol=0, atol=1e-5)


def test_texts_that_exceed_the_context_are_separate_rows() -> None:
    net, read = lively(torch.float32), list[tuple[int, ...]]()
    net.embed.register_forward_hook(lambda _, given, __: read.append(tuple(given[0].shape)))
    rows = [texts([6], 1)[0][0]] * 3
    generate(net, rows, T - 4, T, DecodingConfig(1.0))  # one token too many
    assert read[1] == (3, 1)
    read.clear()
    generate(net, rows, T - 5, T, DecodingConfig(1.0))
    assert read[1] == (1, 3)


def test_positions_in_a_captured_bucket_are_not_assumed_uniform() -> None:
    """A recording writes at a place that the device knows, in all steps of a bucket."""
    for bucket, even in ((64, False), (1, True)):
        cache = KVCache(
            num_layers=1, num_rows=2, num_slots=128, device=torch.device("cpu"), bucket_size=bucket
        )
        assert cache.reserve(64, is_uniform=True) == 64
        assert cache.positions.is_uniform is even
