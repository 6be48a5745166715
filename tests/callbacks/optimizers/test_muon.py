"""Muon equals its formula and torch, to the last bit, however weights are sharded."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

from ravine.callbacks import MuonOptimizer
from ravine.callbacks.optimizers.muon import ITERATIONS, SCALES, orthogonalize

SHAPES = [(8, 8), (8, 8), (8, 24), (24, 8), (160, 130)]  # 160 x 130 is too large to be batched


def parameters(shapes, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(s, generator=generator, dtype=dtype)) for s in shapes]


def gradients(shapes, step, dtype=torch.float32):
    generator = torch.Generator().manual_seed(step + 1)
    return [torch.randn(s, generator=generator, dtype=dtype) for s in shapes]


def stepped(optimizer, weights, steps):
    for step in range(steps):
        for p, g in zip(weights, gradients([p.shape for p in weights], step), strict=True):
            p.grad = g.to(p.dtype)
        optimizer.step()
    return weights


def test_a_hundred_steps_equal_torch_to_the_last_bit():
    actual, expected = parameters(SHAPES), parameters(SHAPES)
    settings = {"coefficients": "newton_schulz", "iteration_dtype": "bfloat16"}
    stepped(MuonOptimizer(actual, lr=0.02, weight_decay=0.1, **settings), actual, 100)
    stepped(torch.optim.Muon(expected, lr=0.02, weight_decay=0.1), expected, 100)
    assert all(torch.equal(p, q) for p, q in zip(actual, expected, strict=True))


def formula(w, m, g, lr, mu, decay, scale, coefficients, nesterov):
    """One matrix at a time, by the docstring's formula; U V^T by the same polynomials."""
    m = m + (1 - mu) * (g - m)
    n = g + mu * (m - g) if nesterov else m
    safety, steps = ITERATIONS[coefficients]
    x = n / (safety * n.square().sum().sqrt())
    for a, b, c in steps:
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    rows, columns = w.shape
    factor = {
        "spectral": (rows / columns) ** 0.5,
        "spectral_clamped": max(1, rows / columns) ** 0.5,
        "rms": 0.2 * max(rows, columns) ** 0.5,
    }[scale]
    return (1 - lr * decay) * w - lr * factor * x, m


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("coefficients", ITERATIONS)
@pytest.mark.parametrize("nesterov", [True, False])
def test_a_hundred_float64_steps_equal_the_formula(scale, coefficients, nesterov):
    shapes = [(4, 4), (4, 4), (3, 7), (7, 3)]
    actual = parameters(shapes, torch.float64)
    by_hand = [(p.detach().clone(), torch.zeros_like(p)) for p in actual]
    settings = {"scale": scale, "coefficients": coefficients, "nesterov": nesterov}
    optimizer = MuonOptimizer(
        actual, lr=0.02, weight_decay=0.1, iteration_dtype="float64", **settings
    )
    stepped(optimizer, actual, 100)
    for step in range(100):
        for i, g in enumerate(gradients(shapes, step)):
            by_hand[i] = formula(*by_hand[i], g.double(), 0.02, 0.95, 0.1, *settings.values())
    for p, (w, _) in zip(actual, by_hand, strict=True):
        torch.testing.assert_close(p.data, w, rtol=0, atol=1e-12)


def polar_error(coefficients, dtype):
    matrix = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    u, _, v = torch.linalg.svd(matrix)
    made = orthogonalize(matrix.to(dtype), coefficients).float()
    return ((made - u @ v).norm() / (u @ v).norm()).item()


def test_polar_express_is_nearly_the_polar_factor_and_twice_as_near_as_newton_schulz():
    near = polar_error("polar_express", torch.bfloat16)
    assert near <= 0.11
    assert polar_error("newton_schulz", torch.bfloat16) > 1.8 * near


@pytest.mark.parametrize("coefficients", ITERATIONS)
@pytest.mark.parametrize("shape", [(4, 6), (3, 4, 6)])
def test_a_zero_matrix_stays_zero(coefficients, shape):
    assert torch.equal(orthogonalize(torch.zeros(shape), coefficients), torch.zeros(shape))


def test_a_convolution_kernel_steps_as_its_flattened_matrix():
    kernel, matrix = parameters([(6, 2, 3, 3)]), parameters([(6, 18)])
    stepped(MuonOptimizer(kernel), kernel, 3)
    optimizer = MuonOptimizer(matrix)
    for step in range(3):
        matrix[0].grad = gradients([(6, 2, 3, 3)], step)[0].reshape(6, 18)
        optimizer.step()
    assert torch.equal(kernel[0].reshape(6, 18), matrix[0])


def test_split_rows_step_as_separate_matrices():
    fused, per_block = parameters([(12, 4)]), parameters([(12, 4)])
    per_block = [nn.Parameter(block.detach().clone()) for block in per_block[0].chunk(3)]
    together, separate = MuonOptimizer(fused, num_blocks=3), MuonOptimizer(per_block)
    for step in range(3):
        fused[0].grad = gradients([(12, 4)], step)[0]
        for p, g in zip(per_block, fused[0].grad.chunk(3), strict=True):
            p.grad = g
        together.step()
        separate.step()
    assert torch.equal(fused[0], torch.cat(per_block))


def test_the_gradient_does_not_change():
    weights = parameters([(4, 4)])
    weights[0].grad = torch.ones(4, 4)
    MuonOptimizer(weights).step()
    assert torch.equal(weights[0].grad, torch.ones(4, 4))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scale": "moonlight"}, "allowed: spectral, spectral_clamped, rms"),
        ({"coefficients": "ns5"}, "allowed: newton_schulz, polar_express"),
        (
            {"num_blocks": 3},
            r"a parameter of shape \(4, 4\) with num_blocks=3; allowed: .*; use AdamW",
        ),
    ],
)
def test_invalid_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        MuonOptimizer(parameters([(4, 4)]), **arguments)


def test_a_vector_is_refused():
    with pytest.raises(ValueError, match="use AdamW for this parameter"):
        MuonOptimizer(parameters([(4,)]))


# Several ranks. Shapes: even, fewer rows than ranks, uneven shards, a kernel; 5 of one shape.
SPREAD = [(8, 6)] * 5 + [(3, 5), (7, 4), (7, 4), (6, 2, 3)]


class Holder(nn.Module):
    def __init__(self):
        super().__init__()
        self.weights = nn.ParameterList(parameters(SPREAD))


def spread_steps(layout, steps=3):
    """Every rank takes the same steps; returns whole weights and the collectives of the last."""
    holder, world = Holder(), dist.get_world_size()
    if layout == "fsdp":
        fully_shard(holder, mesh=init_device_mesh("cpu", (world,)))
    if layout == "tensor":  # rows over one axis of the mesh, columns over the other
        mesh = init_device_mesh("cpu", (2, 2))
        for name, p in list(holder.weights.named_parameters()):
            distributed = nn.Parameter(distribute_tensor(p.detach(), mesh, [Shard(0), Shard(1)]))
            holder.weights[int(name)] = distributed
    if layout == "fsdp x tensor":  # a shard of a shard
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
        for i, p in enumerate(list(holder.weights)):
            rows = distribute_tensor(p.detach(), mesh["tensor"], [Shard(i % 2)])
            holder.weights[i] = nn.Parameter(rows)
        fully_shard(holder, mesh=mesh["data"])
    weights = list(holder.weights)
    optimizer = MuonOptimizer(weights, lr=0.1, weight_decay=0.1)
    if layout == "ddp":
        optimizer.replica_group = dist.group.WORLD
    counts = {}
    for step in range(steps):
        for p, g in zip(weights, gradients(SPREAD, step), strict=True):
            p.grad = g
            if isinstance(p, DTensor):
                p.grad = distribute_tensor(g, p.device_mesh, p.placements, src_data_rank=None)
        with CommDebugMode() as counter:
            optimizer.step()
        counts = {str(k): v for k, v in counter.get_comm_counts().items()}
    whole = [p.full_tensor() if isinstance(p, DTensor) else p for p in weights]
    return [w.detach() for w in whole], counts


def in_ranks(layout):
    dist.init_process_group("gloo")
    return spread_steps(layout)


@pytest.mark.parametrize(
    ("layout", "world", "collectives"),
    # four shapes: two exchanges each when sharded, one gathering each when replicated
    [
        ("fsdp", 2, 8),
        ("fsdp", 4, 8),
        ("ddp", 2, 4),
        ("ddp", 4, 4),
        ("tensor", 4, None),
        ("fsdp x tensor", 4, None),
    ],
)
def test_sharded_weights_step_as_on_one_process(ranks, layout, world, collectives):
    alone = stepped(MuonOptimizer(w := parameters(SPREAD), lr=0.1, weight_decay=0.1), w, 3)
    for whole, counts in ranks(in_ranks, world, layout):
        assert all(torch.equal(p, q) for p, q in zip(alone, whole, strict=True))
        if collectives is not None:
            assert sum(counts.values()) == collectives
