"""Ways beside each other: rounds in a drawn order, medians, a control, one kind of raw row.

A way called `ours again` (or `bare again`) is `ours` a second time: how far equal things differ on
this machine now. Where they differ by more than LIMIT, a ratio means nothing and none is written.
"""

import math
import random
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch
from record import append, machine

LIMIT = 0.03  # of the control
Times = dict[str, list[float]]


def rounds(
    ways: dict[str, Callable[[], Any]],
    count: int,
    repeat: int = 1,
    clock: Callable[[], float] = time.process_time,
    num_warmup: int = 1,
) -> Times:
    """Seconds of each way, `repeat` times a round, on average; the first `warm` rounds are lost.

    The order is drawn anew in each round, so that no way always follows the same one. By default
    seconds are of the processor: of one thread's work a busy machine takes no more of them.
    """
    times: Times = {name: [] for name in ways}
    order = random.Random(0)
    for number in range(count + num_warmup):
        for name in order.sample(list(ways), len(ways)):
            start_s = clock()
            for _ in range(repeat):
                ways[name]()
            if number >= num_warmup:
                times[name].append((clock() - start_s) / repeat)
    return times


def waited() -> float:
    """Seconds on the wall, with nothing left under way on a GPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def verdict(times: Times) -> dict[str, Any]:
    """The control, and the time of ours over that of each other package, of the medians.

    Of four ways `ours`, `ours again`, `ours, cold` and `torch`, only the last is another package.
    """
    median = {name: statistics.median(spent) for name, spent in times.items()}
    (again,) = (name for name in median if name.endswith(" again"))
    control = median[again] / median[again.removesuffix(" again")]
    others = [name for name in median if not name.startswith("ours") and name != again]
    steady = abs(control - 1) <= LIMIT
    ratios = {name: round(median["ours"] / median[name], 4) for name in others if steady}
    return {"ratios": ratios, "A/A": round(control, 4)}


def interval(own_s: list[float], other_s: list[float]) -> tuple[float, float]:
    """The 95 % interval of the median of the ratios of rounds, by order statistics.

    The k-th smallest and the k-th largest of n ratios enclose the median with the probability that
    a coin shows between k and n - k heads in n throws.
    """
    ratios = sorted(a / b for a, b in zip(own_s, other_s, strict=True))
    n, outside, k = len(ratios), 2 / 2 ** len(ratios), 0
    while k < n // 2 and outside <= 0.05:
        k += 1
        outside += 2 * math.comb(n, k) / 2**n
    return ratios[max(k - 1, 0)], ratios[n - max(k, 1)]


def compare(benchmark: str, what: str, times: Times, packages: list[str], **more: Any) -> None:
    """Append a row with the raw seconds, the verdict on them and the versions of the packages."""
    row = {"what": what} | machine() | {name: version(name) for name in packages} | more
    seconds = {name: [float(f"{s:.4g}") for s in spent] for name, spent in times.items()}
    append(benchmark, row | verdict(times) | {"seconds": seconds})
    if not verdict(times)["ratios"]:
        print(f"no ratio: the control is not within {LIMIT:.0%}; run again on a quiet machine")
