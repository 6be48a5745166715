"""Initialization of linear layers and convolutions by their fans (CS336, lecture 2).

    y = W x + b,  W (fan_out, fan_in)

    default             torch's: uniform in ±1 / sqrt(fan_in), std 1 / sqrt(3 fan_in)
    xavier              normal, std sqrt(2 / (fan_in + fan_out)); keeps the scale without activation
    he                  normal, std sqrt(2 / fan_in); keeps the scale behind relu
    truncated_normal    normal, std 1 / sqrt(fan_in), without values beyond 3 std
    orthogonal          W'W = I or W W' = I; keeps the norm of every vector if W is square
    mup                 normal, std 1 / sqrt(fan_in), and 1 / fan_in in the output layer

A cut at 3 std leaves a std of 0.98658. `torch.nn.init.trunc_normal_(w, std=std, a=-3, b=3)` cuts at
the values -3 and 3, which for std 1 / 128 are 384 std: it cuts nothing. `mup` is the initialization
of muP (Yang et al., 2022); its learning rates by layer are set by rules of OptimizerPlan.

Biases become zero. Embeddings, norms and weights that a network starts at zero are unchanged.
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal, get_args

from torch import Tensor, nn

from ravine.errors import UsageError, suggest_names

from .initial_values import Distribution, set_distribution

Initialization = Literal["default", "xavier", "he", "truncated_normal", "orthogonal", "mup"]

STD: dict[str, Callable[[float, float], float]] = {  # of fan_in and fan_out
    "xavier": lambda fan_in, fan_out: math.sqrt(2 / (fan_in + fan_out)),
    "he": lambda fan_in, fan_out: math.sqrt(2 / fan_in),
    "truncated_normal": lambda fan_in, fan_out: 1 / math.sqrt(fan_in),
    "mup": lambda fan_in, fan_out: 1 / math.sqrt(fan_in),
}
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def check_initialization(owner: str, initialization: str) -> None:
    """Raise UsageError for an unknown name; `owner` is the class that has the argument."""
    names = get_args(Initialization)
    if initialization not in names:
        nearest = (suggest_names(initialization, names) or ["xavier"])[0]
        raise UsageError(
            f"{owner}: initialization={initialization!r} does not exist",
            names,
            f"use initialization={nearest!r}",
            flag=f"--model.initialization={nearest}",
        )


def initialize(
    net: nn.Module,
    initialization: Initialization,
    output_layer: str = "head",
    unchanged: Sequence[str] = (),
) -> None:
    """Give new values to the linear layers and convolutions of a network.

    With "default" nothing is changed, and no random number is drawn. On the meta device the
    distributions are recorded (initial_values.py), so that each layout draws equal values.

    Args:
        net: the network. A module with stacked matrices (k, fan_in, fan_out) names them in its
            attribute `stacked_matrices`.
        initialization: the distribution of the weights.
        output_layer: name of the last layer, which muP starts smaller.
        unchanged: ends of the names of layers that keep their values.
    """
    if initialization == "default":
        return
    # a head that is tied to the embedding is an embedding
    kept = {id(m.weight) for m in net.modules() if isinstance(m, nn.Embedding)}
    for name, layer in net.named_modules():
        if name.endswith(tuple(unchanged)):
            continue
        for weight, fan_in, fan_out, is_stacked in list_weights(layer):
            if id(weight) in kept:
                continue
            if initialization == "orthogonal":
                distribution = Distribution("orthogonal", 1.0, float(is_stacked))
            else:
                std = STD[initialization](fan_in, fan_out)
                if initialization == "mup" and name == output_layer:
                    std = 1 / fan_in
                is_cut = initialization == "truncated_normal"
                distribution = Distribution("truncated_normal" if is_cut else "normal", 0.0, std)
            set_distribution(weight, distribution)
            if isinstance(bias := getattr(layer, "bias", None), Tensor):
                set_distribution(bias, Distribution("constant"))


def list_weights(layer: nn.Module) -> list[tuple[Tensor, float, float, bool]]:
    """Return weight, fan_in, fan_out and whether it is a stack of matrices, of one layer.

    The fans of a convolution count the inputs of an output, and the outputs of an input with
    stride 1. A transposed convolution with stride s has k² / s² inputs of each channel.
    """
    if isinstance(layer, nn.Linear):
        return [(layer.weight, layer.in_features, layer.out_features, False)]
    if isinstance(layer, CONVOLUTIONS):
        kernel = math.prod(layer.kernel_size)
        fans = layer.in_channels * kernel, layer.out_channels * kernel
        return [(layer.weight, fans[0] / layer.groups, fans[1] / layer.groups, False)]
    if isinstance(layer, TRANSPOSED):
        kernel, stride = math.prod(layer.kernel_size), math.prod(layer.stride)
        fans = layer.in_channels * kernel / stride, layer.out_channels * kernel
        return [(layer.weight, fans[0] / layer.groups, fans[1] / layer.groups, False)]
    matrices = [getattr(layer, name) for name in getattr(layer, "stacked_matrices", ())]
    return [(matrix, matrix.shape[1], matrix.shape[2], True) for matrix in matrices]
