"""The pictures of lecture 8 from real runs of the optimizers here: python benchmarks/lecture8.py

Two objectives of two numbers, both with their minimum at zero: the ravine x^2 + y^4, flat along y
near the minimum and steep far from it, and the coupled one (x - y)^2 + (x + y)^4, whose ravine no
coordinate follows. Writes docs/figures/lecture8.png and prints how near each run came.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import matplotlib
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, RMSprop

from ravine.callbacks import AdaGradOptimizer, LRSchedule, NewtonOptimizer, SignSGDOptimizer
from ravine.callbacks.monitoring.plots import set_plain_ticks
from ravine.callbacks.optimizers.composite import CompositeOptimizer

matplotlib.use("Agg")
import matplotlib.pyplot as plt

FIGURE = Path(__file__).parent.parent / "docs" / "figures" / "lecture8.png"
CONSTANT = LRSchedule("constant")
Factory = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


def ravine(w: Tensor) -> Tensor:
    """x^2 + y^4."""
    return w[0] ** 2 + w[1] ** 4


def coupled(w: Tensor) -> Tensor:
    """(x - y)^2 + (x + y)^4."""
    return (w[0] - w[1]) ** 2 + (w[0] + w[1]) ** 4


def path(
    objective: Callable[[Tensor], Tensor],
    start: tuple[float, float],
    factory: Factory,
    steps: int,
    schedule: LRSchedule = CONSTANT,
) -> Tensor:
    """Where the optimizer goes: (steps + 1, 2)."""
    w = nn.Parameter(torch.tensor(start, dtype=torch.float64))
    optimizer = CompositeOptimizer([factory([w])])
    peak = optimizer.param_groups[0]["lr"]
    points = [w.detach().clone()]

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = objective(w)
        loss.backward()
        return loss

    for step in range(steps):
        optimizer.param_groups[0]["lr"] = peak * schedule.factor(step, steps)
        optimizer.step(closure)
        points.append(w.detach().clone())
    return torch.stack(points)


sgd, adam, sign = partial(SGD, lr=0.01), partial(Adam, lr=0.1), partial(SignSGDOptimizer, lr=0.1)
RUNS: dict[str, dict[str, Tensor]] = {
    "ravine from (3, 2): momentum": {
        "gradient descent 0.01": path(ravine, (3, 2), sgd, 200),
        "momentum 0.9": path(ravine, (3, 2), partial(SGD, lr=0.01, momentum=0.9), 200),
    },
    "ravine from (3, 3): a step for each coordinate": {
        "gradient descent 0.01": path(ravine, (3, 3), sgd, 200),
        "AdaGrad 0.5": path(ravine, (3, 3), partial(AdaGradOptimizer, lr=0.5), 200),
        "RMSProp 0.05": path(ravine, (3, 3), partial(RMSprop, lr=0.05), 200),
        "Adam 0.1": path(ravine, (3, 3), adam, 200),
    },
    "ravine from (3, 2): SignSGD": {
        "constant 0.1": path(ravine, (3.03, 2.03), sign, 200),
        "0.1 x 0.98^k": path(
            ravine, (3.03, 2.03), sign, 200, LRSchedule("exponential", decay_factor=0.98)
        ),
    },
    "coupled ravine from (3, 1): Newton": {
        "gradient descent 0.003": path(coupled, (3, 1), partial(SGD, lr=0.003), 60),
        "Adam 0.1": path(coupled, (3, 1), adam, 60),
        "Newton": path(coupled, (3, 1), NewtonOptimizer, 60),
    },
    "coupled ravine from (3, 1): Adam and schedules": {
        kind: path(coupled, (3, 1), partial(Adam, lr=0.3), 200, LRSchedule(kind, warmup=10))
        for kind in ("constant", "linear", "cosine", "wsd")
    },
}
SCHEDULES = {
    "linear": LRSchedule("linear", warmup=20),
    "cosine to 0.1": LRSchedule("cosine", warmup=20, final_fraction=0.1),
    "wsd": LRSchedule("wsd", warmup=20, cooldown=0.3),
    "step": LRSchedule("step", period=60, decay_factor=0.5),
    "inverse_sqrt": LRSchedule("inverse_sqrt", warmup=20),
    "exponential": LRSchedule("exponential", decay_factor=0.98),
    "cosine_restarts": LRSchedule("cosine_restarts", period=50, warmup=20),
}


def main() -> None:
    """Draw distances from the minimum, and what the schedules look like."""
    figure, axes = plt.subplots(2, 3, figsize=(15, 8), layout="constrained")
    for axis, (title, runs) in zip(axes.flat, RUNS.items(), strict=False):
        print(title)
        for label, points in runs.items():
            distance = points.norm(dim=1)
            axis.semilogy(distance, label=label)
            print(f"  {label:24} {distance[-1]:.1e} after {len(points) - 1} steps")
        axis.set(title=title, xlabel="step", ylabel="distance from the minimum")
        values = torch.cat([points.norm(dim=1) for points in runs.values()])
        if values.max() < 1000 * values.min():  # few powers of ten: write the numbers out
            set_plain_ticks(axis, values.tolist())
        axis.legend()
    for label, schedule in SCHEDULES.items():
        axes.flat[-1].plot([schedule.factor(step, 200) for step in range(200)], label=label)
    axes.flat[-1].set(
        title="schedules", xlabel="step", ylabel="learning rate / peak", ylim=(0, 1.6)
    )
    axes.flat[-1].legend(ncols=2, loc="upper right")  # above the curves
    FIGURE.parent.mkdir(exist_ok=True)
    figure.savefig(FIGURE, dpi=80)
    print(FIGURE)


if __name__ == "__main__":
    main()
