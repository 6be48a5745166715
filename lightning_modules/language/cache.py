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

BUCKET = 64  # `limit` grows in such steps where shapes are recorded, and should seldom change


class Clock:
    """Where each row stands; shared by all layers of a cache."""

    def __init__(self, rows: int, device: torch.device) -> None:
        """Stand at the beginning."""
        self.all = torch.arange(rows, device=device)  # (b)
        self.rows = self.all  # those a prompt is being read for
        self.time = torch.zeros_like(self.all)  # (b) position of the newest token of each row
        self.reading = True
        self.limit = 0  # slots to look at, at least the largest time + 1
        self.ahead: Tensor | None = None  # (b 1 1 limit) 0, and -inf after the row's time


class Past:
    """What one layer remembers: keys (b h k T), as a product takes them, and values (b h T k).

    Of keys (b h T k) a processor would make a copy in bf16, for each token.
    """

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
            self.keys = key.new_zeros(len(clock.all), h, k, self.slots)
            self.values = key.new_zeros(len(clock.all), h, self.slots, k)
        if clock.reading:
            self.keys[clock.rows, :, :, : key.shape[2]] = key.mT
            self.values[clock.rows, :, : key.shape[2]] = value
        else:
            self.keys[clock.all, :, :, clock.time] = key[:, :, 0]  # (b h k)
            self.values[clock.all, :, clock.time] = value[:, :, 0]
        return not clock.reading

    def spread(self, twins: Tensor) -> None:
        """Give each row what row `twins` (b) remembers."""
        if self.keys is not None and self.values is not None:
            self.keys, self.values = self.keys[twins], self.values[twins]


def over_past(query: Tensor, past: Past) -> Tensor:
    """Attention of one query a row (b h 1 k) over all that is remembered: (b h 1 k)."""
    clock = past.clock
    if past.keys is None or past.values is None or clock.ahead is None:
        raise RuntimeError("nothing is remembered yet: read a prompt first, then tick")
    keys, values = past.keys[..., : clock.limit], past.values[:, :, : clock.limit]
    scores = query / math.sqrt(query.shape[-1]) @ keys + clock.ahead.to(query)  # (b h 1 T)
    return scores.softmax(-1) @ values


class Cache:
    """The memory of a whole net for `rows` texts of at most `slots` tokens.

    cache = Cache(layers=4, rows=2, slots=64, device=tokens.device)
    cache.read(lengths=torch.tensor([5, 3]))
    logits = net(prompts, cache)         # prompts (2 5), the second padded: (b 1 v)
    cache.widen(6)                       # the longest row will have six tokens
    cache.tick()                         # every row is one token further
    logits = net(chosen[:, None], cache)
    """

    def __init__(
        self, layers: int, rows: int, slots: int, device: torch.device, bucket: int = 1
    ) -> None:
        """Prepare one memory a layer; how far it looks grows by `bucket`."""
        self.clock, self.slots, self.bucket = Clock(rows, device), slots, bucket
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
        clock = self.clock
        clock.reading = False
        clock.limit = min(-(-most // self.bucket) * self.bucket, self.slots)
        return clock.limit

    def tick(self) -> None:
        """Every row is one token further."""
        clock = self.clock
        clock.time += 1
        later = torch.arange(clock.limit, device=clock.time.device) > clock.time[:, None]  # (b T)
        ahead = torch.zeros(later.shape, device=later.device).masked_fill(later, -math.inf)
        clock.ahead = ahead[:, None, None]

    def spread(self, twins: Tensor) -> None:
        """Rows whose prompt was not read take over that of their twin: twins (b)."""
        self.clock.time = self.clock.time[twins]
        for layer in self.layers:
            layer.spread(twins)
