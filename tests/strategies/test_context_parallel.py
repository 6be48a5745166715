"""Context parallelism: a rank holds, computes and sends its fraction of attention, exactly.

Blocks of keys joined by their log-sum-exp are the attention over all of them; on a ring this is
one process's attention, in its outputs and gradients, within 1e-12 in fp64 and 2e-6 in fp32.
"""

import copy
from contextlib import contextmanager, nullcontext
from functools import cache, partial
from types import SimpleNamespace
from unittest import mock

import lightning as L
import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from tensor_bytes import tensor_bytes
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from ravine.cli.trainer import Trainer
from ravine.datamodules import TextDataModule
from ravine.datamodules.text import python_docs_text
from ravine.lightning_modules import LanguageModel
from ravine.lightning_modules.model_stats import count_collectives
from ravine.lightning_modules.nn.transformer import Transformer
from ravine.strategies import block_attention, context_parallel
from ravine.strategies.activation_checkpointing import apply_activation_checkpointing
from ravine.strategies.block_attention import attention_with_lse, attention_with_lse_backward
from ravine.strategies.context_parallel import (
    _RingAttention,
    num_visible_keys,
    ring_slices,
    visible_queries,
    zigzag_positions,
)

B, H, T, K = 1, 8, 2048, 32  # of the measurements of memory
BOUNDS = {2: 0.65, 4: 0.40}  # of one process's peak
FAR = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2}


def draw(dtype, length, heads=H, k=K):
    """Query, key, value and the gradient of out, the same on all ranks."""
    generator = torch.Generator().manual_seed(0)
    shape = (B, heads, length, k)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in "qkvd"]


def run(function, tensors, d_out):
    """Out and the gradients of query, key and value."""
    leaves = [each.detach().clone().requires_grad_() for each in tensors]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, d_out)]


def causal(query, key, value):
    return F.scaled_dot_product_attention(query, key, value, is_causal=True)


def distance(found, expected):
    """The largest difference of any of these tensors over the largest number in it."""
    pairs = zip(found, expected, strict=True)
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)


@contextmanager
def kernel(name, scores=2**20):
    with (
        mock.patch.object(block_attention, "_select_kernel", return_value=name),
        mock.patch.object(block_attention, "MAX_SCORES", scores),
    ):
        yield


@pytest.mark.parametrize("dtype", FAR)
@pytest.mark.parametrize("name", ["cpu", "chunks"])
def test_blocks_of_keys_joined_by_their_log_sum_exp_are_attention_over_all(name, dtype):
    query, key, value, d_out = draw(dtype, 48, heads=2, k=8)
    with kernel(name, scores=2 * 7 * 24):  # pieces of 7 queries, the last of fewer
        early, late = slice(24), slice(24, None)
        out, lse = attention_with_lse(query[:, :, late], key[:, :, late], value[:, :, late], True)
        now = attention_with_lse(query[:, :, late], key[:, :, early], value[:, :, early], False)
        out, lse = out.clone(), lse.clone()
        context_parallel._merge_blocks(out, lse, *now)
        both = [
            attention_with_lse_backward(d_out[:, :, late], query[:, :, late], key[:, :, some],
                               value[:, :, some], out.to(dtype), lse, some == late)
            for some in (early, late)
        ]  # fmt: skip
    expected = run(causal, (query, key, value), d_out * (torch.arange(48) >= 24)[:, None])
    found = [
        out,
        both[0][0].double() + both[1][0],
        *(
            torch.cat((first, second), 2)
            for first, second in zip(both[0][1:], both[1][1:], strict=True)
        ),
    ]
    whole = [expected[0][:, :, late], expected[1][:, :, late], *expected[2:]]
    assert distance([f.double() for f in found], [w.double() for w in whole]) < FAR[dtype]
    assert lse.dtype == torch.promote_types(dtype, torch.float32)


def test_chunks_of_queries_bound_the_memory_of_the_scores():
    query, key, value, d_out = draw(torch.float64, 1024, heads=2, k=8)
    with kernel("chunks", scores=2**16), tensor_bytes() as some:  # 32 queries at a time
        out, lse = attention_with_lse(query, key, value, True)
        attention_with_lse_backward(d_out, query, key, value, out, lse, True)
    num_bytes = 4 * out.nbytes + lse.nbytes
    assert some.peak < num_bytes + 4 * 8 * 2**16 < 8 * 1024**2  # one (t t)


@pytest.mark.parametrize(
    ("name", "dtype"), [("flash", torch.bfloat16), ("efficient", torch.float32)]
)
def test_the_kernels_of_a_gpu_accept_their_arguments(name, dtype):
    with kernel(name), FakeTensorMode():  # shapes and arguments without a GPU
        query = torch.empty(2, 4, 40, 16, dtype=dtype, device="cuda")
        key = torch.empty(2, 4, 80, 16, dtype=dtype, device="cuda")
        out, lse = attention_with_lse(query, key, key, False)
        found = attention_with_lse_backward(out, query, key, key, out, lse, False)
    assert (out.shape, lse.shape, lse.dtype) == (query.shape, (2, 4, 40), torch.float32)
    assert [each.shape for each in found] == [query.shape, key.shape, key.shape]


def test_chunks_cover_every_head_of_every_sequence_once():
    for batch, heads, parts in ((1, 8, 2), (1, 8, 4), (3, 2, 8), (2, 12, 8), (4, 1, 4), (1, 3, 8)):
        key = torch.zeros(batch, heads, 512, 64)
        count = torch.zeros(batch, heads)
        for piece in ring_slices(key, parts):
            count[piece] += 1
        assert (count == 1).all()
    assert len(ring_slices(torch.zeros(1, 8, 512, 64), 8)) == 8
    assert len(ring_slices(torch.zeros(4, 2, 512, 64), 8)) == 8
    assert len(ring_slices(torch.zeros(1, 8, 16, 4), 8)) == 1  # messages would be too short


def test_every_rank_has_the_same_work_and_all_the_pairs_of_a_causal_mask():
    n, length = 4, 8
    mask = torch.zeros(n * length, n * length)
    work = [0] * n
    for rank in range(n):
        times = zigzag_positions(n * length, rank, n)
        for source in range(n):
            local = times[visible_queries(rank, source, length)]
            source_positions = zigzag_positions(n * length, source, n)[
                : num_visible_keys(rank, source, length)
            ]
            mask[local[:, None], source_positions] += 1
            work[rank] += len(local) * len(source_positions)
    assert len(set(work)) == 1
    assert torch.equal(mask.tril(), torch.ones_like(mask).tril())
    above = mask.triu(1).nonzero()  # on the rank's own keys, which are masked
    assert all(any({*pair} <= {*zigzag_positions(32, r, n).tolist()} for r in range(n))
               for pair in above.tolist())  # fmt: skip


def swapped_merge():
    def merge(total, lse, found, now):
        total.lerp_(found, torch.sigmoid(lse - now)[..., None])
        torch.logaddexp(lse, now, out=lse)

    return mock.patch.object(context_parallel, "_merge_blocks", merge)


def forgotten_log_sum_exp():
    def merge(total, lse, found, now):
        total.lerp_(found, torch.sigmoid(now - lse)[..., None])

    return mock.patch.object(context_parallel, "_merge_blocks", merge)


def other_scale():
    def scaled(query, *rest, causal):
        return attention_with_lse(query * query.shape[-1] ** 0.5, *rest, causal=causal)

    return mock.patch.object(context_parallel, "attention_with_lse", scaled)


def wrong_half():
    def early(rank, source, length):
        return slice(length // 2) if source > rank else slice(length)

    return mock.patch.object(context_parallel, "visible_queries", early)


def lost_gradients():
    def dropped(returning, totals, results):
        returning.wait()

    return mock.patch.object(context_parallel, "_add_received_grads", dropped)


@contextmanager
def journal():
    """What a ring does, in order: ("post" or "wait", a message, its bytes) and ("block",)."""
    events = []
    begin, receive = context_parallel._RingSendRecv.__init__, context_parallel._RingSendRecv.wait

    def post(self, sent, *rest):
        events.append(("post", id(self), sent.nbytes))
        begin(self, sent, *rest)

    def wait(self):
        events.append(("wait", id(self), 0))
        return receive(self)

    def noted(function):
        def block(*args, **how):
            events.append(("block", 0, 0))
            return function(*args, **how)

        return block

    with (
        mock.patch.object(context_parallel._RingSendRecv, "__init__", post),
        mock.patch.object(context_parallel._RingSendRecv, "wait", wait),
        mock.patch.object(context_parallel, "attention_with_lse", noted(attention_with_lse)),
        mock.patch.object(
            context_parallel, "attention_with_lse_backward", noted(attention_with_lse_backward)
        ),
    ):
        yield events


def idle(events):
    """Messages that nothing is computed between their start and their end."""
    flying, found = {}, 0
    for kind, message, _ in events:
        if kind == "post":
            flying[message] = False
        elif kind == "block":
            flying = dict.fromkeys(flying, True)
        else:
            found += not flying.pop(message)
    assert not flying
    return found


FAULTS = (swapped_merge, forgotten_log_sum_exp, other_scale, wrong_half, lost_gradients)


def measure(lengths):
    """Per dtype: how far from one process; in fp32 also the peaks; per fault, how far."""
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    far, peaks = {}, {}

    def ring(*tensors):
        return _RingAttention.apply(*tensors, dist.group.WORLD)

    def compare(dtype, length, heads=H):
        tensors = draw(dtype, length, heads)
        here = zigzag_positions(length, rank, ranks)
        local = [each[:, :, here] for each in tensors]
        expected = run(causal, tensors[:3], tensors[3])
        found = run(ring, local[:3], local[3])
        return distance(found, [each[:, :, here] for each in expected])

    for dtype, length in lengths.items():
        far[str(dtype)] = compare(dtype, length)
    far["three heads"] = compare(torch.float64, 64, heads=3)
    tensors = draw(torch.float32, T)
    parts = [each[:, :, zigzag_positions(T, rank, ranks)].clone() for each in tensors]
    for name, function, given in (("one", causal, tensors), ("ring", ring, parts)):
        leaves = [each.requires_grad_() for each in given[:3]]
        with tensor_bytes() as found:
            function(*leaves).sum().backward()
        peaks[name] = found.peak
    shapes = []

    def noted(query, key, value, causal):
        shapes.append((query.shape[1], query.shape[2], key.shape[2], causal))
        return attention_with_lse(query, key, value, causal)

    with mock.patch.object(context_parallel, "attention_with_lse", noted):
        ring(*parts[:3])
    with journal() as events:
        out = ring(*parts[:3])
        forward = len(events)
        out.sum().backward()
    missed = {}
    for fault in FAULTS:
        with fault():
            missed[fault.__name__] = compare(torch.float64, 64)
    return far, peaks, shapes, (events[:forward], events[forward:]), missed


@pytest.mark.parametrize("world", BOUNDS)
def test_ring_attention_equals_that_of_one_process_with_a_fraction_of_its_memory(ranks, world):
    lengths = {torch.float64: 256, torch.float32: 512, torch.bfloat16: 256}
    everywhere = ranks(measure, world, lengths)
    for rank, (far, peaks, shapes, (forward, backward), _) in enumerate(everywhere):
        assert far.pop("three heads") < FAR[torch.float64]
        for dtype in lengths:
            assert far[str(dtype)] < FAR[dtype], (rank, far)
        assert peaks["ring"] <= BOUNDS[world] * peaks["one"], (rank, peaks)
        heads, t = {each[0] for each in shapes}, T // world
        assert sum(each[0] for each in shapes[::world]) == H
        assert len(heads) == 1
        earlier, later = (t, t // 2, False), (t // 2, t, False)  # halves that nobody sees: left out
        blocks = [(t, t, True), *[earlier] * rank, *[later] * (world - 1 - rank)]
        assert [each[1:] for each in shapes[:world]] == blocks
        assert (idle(forward), idle(backward)) == (0, 1)  # the last gradients have no block left
        steps = [sum(e[0] == "block" for e in part) // world for part in (forward, backward)]
        sends = [sum(e[0] == "post" for e in part) for part in (forward, backward)]
        assert sends == [steps[0] * (world - 1), 2 * steps[1] * (world - 1)]
        counted = count_collectives(1, cp=world, num_head_chunks=steps[1])["send"]
        assert sum(sends) * world == counted
    activation = B * H * T * K * 4
    sent = [
        sum(sum(e[2] for e in part) for part in parts)
        for parts in zip(*(each[3] for each in everywhere), strict=True)
    ]
    assert sent == [1.5 * activation * (world - 1), 3 * activation * (world - 1)]
    for fault in FAULTS:
        assert max(faults[fault.__name__] for *_, faults in everywhere) > 1e-3, fault.__name__


def test_layers_share_the_tables_of_rotary_positions_also_after_a_move():
    net = Transformer(5, 64, num_layers=3, d_model=16, num_heads=2).double()
    found = {id(b) for b in net.buffers()}
    assert len(found) == 2
    assert not [name for name in net.state_dict() if "rotary" in name]
    copied = copy.deepcopy(net)
    assert len({id(block.attention.rotary) for block in copied.blocks.values()}) == 1
    assert found.isdisjoint(id(b) for b in copied.buffers())


def test_a_shard_of_a_sequence_is_rotated_as_in_the_full_sequence():
    net = Transformer(5, 64, num_layers=1, d_model=16, num_heads=2)
    attention, x = net.blocks["0"].attention, torch.randn(1, 64, 16)
    query, key, _ = attention.project_qkv(x)
    attention.rotary.position_ids_override = times = zigzag_positions(64, 1, 2)
    some, others, _ = attention.project_qkv(x[:, times])
    assert torch.equal(some, query[:, :, times])
    assert torch.equal(others, key[:, :, times])
    rows = attention.rotary.get_rows(32)
    assert rows is attention.rotary.get_rows(32)  # every layer gets these
    attention.rotary.position_ids_override = None
    assert torch.equal(attention.project_qkv(x)[0], query)


def ways(mode):
    """Gradients of a block on a ring: plainly, recomputed or compiled, and calls of the ring."""
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    net = Transformer(
        5, 64, num_layers=1, d_model=16, num_heads=2, zero_init_residual=False
    ).double()
    block = net.blocks["0"]
    block.attention.rotary.position_ids_override = here = zigzag_positions(64, rank, ranks)
    ring = SimpleNamespace(group=dist.group.WORLD)
    block.attention.attention_fn = partial(context_parallel.ContextParallel.ring_attend, ring)
    x = torch.randn(1, 64, 16, dtype=torch.float64)[:, here]
    calls, found = [], []
    inner = context_parallel.attention_with_lse

    def counted(*args, **how):
        calls.append(1)
        return inner(*args, **how)

    with mock.patch.object(context_parallel, "attention_with_lse", counted):
        for changed in (False, True):
            calls.clear()
            if changed and mode == "compiled":
                block.compile(backend="aot_eager", fullgraph=True)
            elif changed:
                apply_activation_checkpointing(net, mode)
            x = x.detach().requires_grad_()
            found.append(torch.autograd.grad(block(x).square().sum(), (x, *block.parameters())))
    return distance(found[1], found[0]), len(calls)


@pytest.mark.parametrize(("mode", "times"), [("selective", 1), ("full", 2), ("compiled", 1)])
def test_ring_attention_can_be_recomputed_and_compiled(ranks, mode, times):
    for far, calls in ranks(ways, 2, mode):
        assert far < 1e-12
        assert calls == 2 * times  # of two blocks of keys


def autocast_and_twice():
    dist.init_process_group("gloo")
    ring = SimpleNamespace(group=dist.group.WORLD)
    leaf = torch.randn(1, 2, 16, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = context_parallel.ContextParallel.ring_attend(ring, leaf, leaf, leaf.bfloat16())
    (first,) = torch.autograd.grad(out.float().square().sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="ring_attention_backward"):
        first.sum().backward()
    return out.dtype


def test_ring_attention_uses_autocast_and_refuses_a_second_derivative(ranks):
    assert ranks(autocast_and_twice, 2) == [torch.bfloat16] * 2


class Watch(L.Callback):
    """Keeps the gradients of the first step, and the peak of the second up to its gradients."""

    def on_train_batch_start(self, trainer, module, batch, index):
        self.measure = tensor_bytes() if index else nullcontext()
        self.found = self.measure.__enter__()

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.measure.__exit__(None, None, None)
        if trainer.global_step == 0:
            grads = {n: p.grad for n, p in module.named_parameters()}
            self.gradients = {
                n: (g.full_tensor() if isinstance(g, DTensor) else g).clone()
                for n, g in grads.items()
            }


def steps(text, world, precision="32-true"):
    torch.manual_seed(0)
    module = LanguageModel(num_layers=2, d_model=128, num_heads=8, zero_init_residual=False)
    watch = Watch()
    trainer = Trainer(
        max_steps=2,
        accelerator="cpu",
        devices=world,
        strategy="auto" if world == 1 else "cp",
        precision=precision,
        default_root_dir=text.parent,
        logger=False,
        callbacks=[watch],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    trainer.fit(module, TextDataModule(text, context_length=T, batch_size=1))
    return watch.gradients, watch.found.peak


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "topics.txt"
    path.write_text("".join(python_docs_text())[:60_000])
    return path


@cache
def alone(text, precision):
    return run_ranks(steps, 1, text, 1, precision)[0]


@pytest.mark.parametrize("world", BOUNDS)
def test_a_net_with_ring_attention_holds_a_fraction_of_the_activations(ranks, text, world):
    expected, one = alone(text, "32-true")
    for gradients, peak in ranks(steps, world, text, world):
        assert peak <= BOUNDS[world] * one, (peak, one)
        assert distance(gradients.values(), expected.values()) < FAR[torch.float32]


def test_a_net_with_ring_attention_keeps_double_precision(ranks, text):
    expected, _ = alone(text, "64-true")
    for gradients, _ in ranks(steps, 2, text, 2, "64-true"):
        assert distance(gradients.values(), expected.values()) < FAR[torch.float64]
