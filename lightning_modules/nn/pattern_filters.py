"""Pattern filters of lecture 4: convolutions with a fixed kernel, Toeplitz matrices and pooling.

    r[n] = sum_t k[t] x[n s + t - p]     a score for each position: the kernel is not flipped
    R = X K'                             the same; the rows of K are shifted copies of k
    floor((L + 2 p - m) / s) + 1         positions of a kernel of width m, stride s, padding p

The kernel of a pattern is the pattern minus its mean, divided by its norm. So a constant has the
score 0, and among windows of one norm the pattern itself has the largest score.

Axes: b batch, l length, n positions, m width of a kernel; c, y, x images.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor, nn

from ravine.errors import UsageError, check_at_least_one


def count_positions(length: int, kernel_size: int, padding: int = 0, stride: int = 1) -> int:
    """Return the number of positions of a kernel along an axis: floor((L + 2p - m) / s) + 1.

        count_positions(32, 3, padding=1)  # 32

    Raises:
        UsageError: the kernel is longer than the padded axis, or an argument is out of range.
    """
    check_at_least_one("count_positions", length=length, kernel_size=kernel_size, stride=stride)
    if padding < 0 or kernel_size > length + 2 * padding:
        raise UsageError(
            f"count_positions: a kernel of {kernel_size} does not fit a length of {length} with "
            f"padding={padding}",
            [f"kernel_size from 1 to {length + 2 * max(padding, 0)}"],
            "use a shorter kernel or more padding",
        )
    return (length + 2 * padding - kernel_size) // stride + 1


def toeplitz_matrix(kernel: Tensor, length: int, padding: int = 0, stride: int = 1) -> Tensor:
    """Return the matrix K (n l) of a convolution: signals (b l) times K' are its scores (b n).

    Args:
        kernel: the weights (m).
        length: l, the length of the signals.
        padding: zeros at each end of a signal.
        stride: shift from a position to the next one.
    """
    num_positions = count_positions(length, len(kernel), padding, stride)
    matrix = kernel.new_zeros(num_positions, length + 2 * padding)
    for position in range(num_positions):
        matrix[position, position * stride : position * stride + len(kernel)] = kernel
    return matrix[:, padding : padding + length]  # (n l): the padding is 0


def center_and_scale(pattern: Tensor) -> Tensor:
    """Return a pattern of any shape with the mean 0 and the norm 1.

    Raises:
        UsageError: the pattern is constant, so that its kernel would be 0.
    """
    centered = pattern - pattern.mean()
    if not centered.any():
        raise UsageError(
            "center_and_scale: a constant pattern has no kernel",
            ["a pattern with different numbers"],
            "use ramp_pattern(25)",
        )
    return centered / centered.norm()


def ramp_pattern(width: int = 25) -> Tensor:
    """Return a ramp from -1 to 1 (m)."""
    return torch.linspace(-1, 1, width)


def checkerboard_pattern(width: int = 7) -> Tensor:
    """Return a checkerboard of +1 and -1 (m m); the corners are +1."""
    positions = torch.arange(width)
    return 1.0 - 2.0 * ((positions[:, None] + positions) % 2)


class PatternFilter(nn.Module):
    """Score how well a pattern fits at each position of signals (b l) or images (b y x).

        scores = PatternFilter(ramp_pattern(25))(signals)

    The scores have the shape of the input. A score belongs to the position of the pattern's center;
    beyond the borders the input is 0.

    Args:
        pattern: the pattern, (m) or (m m), with an odd width.
    """

    kernel: Tensor

    def __init__(self, pattern: Tensor) -> None:
        """Create the kernel."""
        super().__init__()
        if pattern.ndim not in (1, 2) or not all(size % 2 for size in pattern.shape):
            raise UsageError(
                f"PatternFilter: a pattern of shape {tuple(pattern.shape)} has no center",
                ["an odd width, or two odd widths"],
                "use ramp_pattern(25)",
            )
        self.register_buffer("kernel", center_and_scale(pattern))

    def forward(self, inputs: Tensor) -> Tensor:
        """Compute the scores (b l) or (b y x)."""
        convolve = F.conv1d if self.kernel.ndim == 1 else F.conv2d
        kernel = self.kernel[None, None]  # (1 1 m) or (1 1 m m): one channel in, one out
        channels = rearrange(inputs, "b ... -> b 1 ...")
        scores = convolve(channels, kernel, padding="same")
        return rearrange(scores, "b 1 ... -> b ...")


def pool(images: Tensor, size: int, kind: Literal["mean", "max"] = "mean") -> Tensor:
    """Reduce each window of size x size pixels to its mean or maximum: (... y x).

    Windows do not overlap; y and x must be multiples of the size.
    """
    return reduce(images, "... (y i) (x j) -> ... y x", kind, i=size, j=size)
