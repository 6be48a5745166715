"""A right answer or none: what each estimator ascends, measured from its own expected steps.

python benchmarks/binary_rewards.py        draws docs/figures/binary_rewards.png

A policy of one number: it answers right with probability t = sigmoid(θ). All batches of B answers
are enumerated, so the expected step is exact; divided by dt/dθ it is the slope φ'(t) of what the
estimator ascends, and φ is its integral. Analytic: t, (2/π) arcsin √t (GRPO, whose slope is π times
that), 1 + log t. One raw row for each estimator and B in rows/binary_rewards.jsonl.
"""

import math
from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from record import append, machine
from torch import Tensor

from ravine.lightning_modules.rl.advantages import AdvantageEstimator, AdvantageMethod

PHI = {
    "rloo": ("t", lambda t: t),
    "grpo": ("(2/π) arcsin √t", lambda t: 2 / math.pi * t.sqrt().arcsin()),
    "rejection": ("1 + log t", lambda t: 1 + t.log()),
}
T = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)


def slopes(kind: AdvantageMethod, size: int) -> Tensor:
    """Expected step over dt/dθ at each t: Σ_k Binomial(k) · mean_i w_i ∂log p(y_i)/∂t."""
    total = torch.zeros_like(T)
    for k in range(size + 1):  # k right answers; their order does not matter
        rewards = torch.tensor([1.0] * k + [0.0] * (size - k), dtype=torch.float64)
        w = AdvantageEstimator(kind).advantages(rewards)
        ways = math.lgamma(size + 1) - math.lgamma(k + 1) - math.lgamma(size - k + 1)
        likely = (ways + k * T.log() + (size - k) * (1 - T).log()).exp()
        right, wrong = w[:k].sum(), w[k:].sum()
        total += likely * (right / T - wrong / (1 - T)) / size
    return total


def main() -> None:
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    for place, (kind, (name, phi)) in enumerate(PHI.items(), 1):
        axes = figure.add_subplot(1, 3, place, title=f"{kind}: {name}", xlabel="t = P(right)")
        exact = phi(T)
        axes.plot(T, exact, "k--", lw=1, label=name, zorder=3)  # above what it hides
        for size in (2, 8, 64, 512):
            slope = slopes(kind, size) / (math.pi if kind == "grpo" else 1)
            # φ itself by the trapezoid rule, from the middle, where it is set to the exact value
            climbed = torch.cat((torch.zeros(1), torch.cumulative_trapezoid(slope, T)))
            measured = climbed - climbed[len(T) // 2] + exact[len(T) // 2]
            axes.plot(T, measured, lw=1, label=f"B = {size}")
            inner = (T > 0.1) & (T < 0.9)
            furthest = (measured - exact)[inner].abs().max().item()
            row = {"kind": kind, "B": size, "furthest": round(furthest, 5)}
            append("binary_rewards", machine() | row)
        axes.legend(fontsize=7)
        axes.grid(alpha=0.3)
    folder = Path(__file__).parent.parent / "docs" / "figures"
    FigureCanvasAgg(figure).print_png(folder / "binary_rewards.png")


if __name__ == "__main__":
    main()
