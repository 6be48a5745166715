"""A key-value cache: what was attended to once is not computed again.

    reading a prompt     tokens (b t)   keys and values of slots 0 .. t-1 are written
    one token more       tokens (b 1)   one slot is written, at each row's own time

Memory is taken once and written in place, and a slot is a position, so rows may differ in length:
what lies after a row's time (padding, or a longer life before) is masked. Times are tensors and
`limit`, how far to look, is a number known without asking the device: nothing waits for it.

Axes: b batch, t time, T slots, h heads, k head width.
"""

import math

import torch
from torch import Tensor

BUCKET = 64  # `limit` grows in such steps, so that shapes seldom change


class Clock:
    """Where each row stands; shared by all layers of a cache."""

    def __init__(self, rows: int, device: torch.device) -> None:
        """Stand at the beginning."""
        self.all = torch.arange(rows, device=device)  # (b)
        self.rows = self.all  # those a prompt is being read for
        self.time = torch.zeros_like(self.all)  # (b) position of the newest token of each row
        self.reading = True
        self.limit = 0  # slots to look at, at least the largest time + 1


class Past:
    """What one layer remembers: keys and values (b h T k)."""

    def __init__(self, clock: Clock, slots: int) -> None:
        """Take no memory yet: the first keys know their heads, type and device."""
        self.clock, self.slots = clock, slots
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def time_of(self, length: int) -> Tensor | slice:
        """Index into a table of positions (t k): of a prompt, or of one token in each row."""
        return slice(length) if self.clock.reading else self.clock.time[:, None, None]

    def remember(self, key: Tensor, value: Tensor) -> bool:
        """Write keys and values (b h t k); true if there is more to attend to than these."""
        clock = self.clock
        if self.keys is None or self.values is None:
            _, h, _, k = key.shape
            self.keys = key.new_zeros(len(clock.all), h, self.slots, k)
            self.values = torch.zeros_like(self.keys)
        if clock.reading:
            self.keys[clock.rows, :, : key.shape[2]] = key
            self.values[clock.rows, :, : key.shape[2]] = value
        else:
            self.keys[clock.all, :, clock.time] = key[:, :, 0]  # (b h k)
            self.values[clock.all, :, clock.time] = value[:, :, 0]
        return not clock.reading


def over_past(query: Tensor, past: Past) -> Tensor:
    """Attention of one query a row (b h 1 k) over all that is remembered: (b h 1 k)."""
    if past.keys is None or past.values is None:
        raise RuntimeError("nothing is remembered yet: read a prompt first")
    keys, values = past.keys[:, :, : past.clock.limit], past.values[:, :, : past.clock.limit]
    later = torch.arange(keys.shape[2], device=query.device) > past.clock.time[:, None]  # (b T)
    scores = query / math.sqrt(query.shape[-1]) @ keys.mT  # (b h 1 T)
    return scores.masked_fill(later[:, None, None], -math.inf).softmax(-1) @ values


class Cache:
    """The memory of a whole net for `rows` texts of at most `slots` tokens.

    cache = Cache(layers=4, rows=2, slots=64, device=tokens.device)
    cache.read(lengths=torch.tensor([5, 3]))
    logits = net(prompts, cache)         # prompts (2 5), the second padded: (b 1 v)
    cache.widen(6)                       # the longest row will have six tokens
    cache.tick()                         # every row is one token further
    logits = net(chosen[:, None], cache)
    """

    def __init__(self, layers: int, rows: int, slots: int, device: torch.device) -> None:
        """Prepare one memory a layer."""
        self.clock = Clock(rows, device)
        self.layers = [Past(self.clock, slots) for _ in range(layers)]

    def read(self, lengths: Tensor, rows: Tensor | None = None) -> None:
        """Announce prompts of `lengths` (b) for all rows, or for some that start anew."""
        clock = self.clock
        clock.rows, clock.reading = clock.all if rows is None else rows, True
        clock.time[clock.rows] = lengths - 1

    def times(self, here: Tensor) -> Tensor:
        """Positions of the tokens of this call: (t) of a prompt's columns `here`, else (b 1)."""
        return here if self.clock.reading else self.clock.time[:, None]

    def newest(self, x: Tensor) -> Tensor:
        """Of features (b t d) those of each row's newest token: (b 1 d)."""
        clock = self.clock
        if not clock.reading:
            return x
        return x[torch.arange(len(x), device=x.device), clock.time[clock.rows]][:, None]

    def widen(self, most: int) -> int:
        """Announce one token more in each row, of which the longest will have `most`; the limit.

        Apart from this number all is done on the device, where the same steps can be replayed.
        """
        self.clock.reading = False
        self.clock.limit = -(-most // BUCKET) * BUCKET
        return self.clock.limit

    def tick(self) -> None:
        """Every row is one token further."""
        self.clock.time += 1
