"""A key-value cache: what was attended to once is not computed again.

    reading a prompt     tokens (b t)   keys and values of slots 0 .. t-1 are written
    one token more       tokens (b 1)   one slot is written, at each row's own time

Memory is taken once and written in place, and a slot is a position, so rows may differ in length:
what lies after a row's time (padding, or a longer life before) is masked. Times are tensors and
`limit`, how far to look, is a number known without asking the device: nothing waits for it.

Texts with one prompt may be a group of s, and go on as one row: tokens (g s), each the newest of
its own text. What they share is kept once, as a trunk, and their queries make one product with it;
slots are for what comes after the trunk.

Axes: b batch of rows, or g of groups; s texts of a row, t time, T slots, p trunk, h heads,
k head width. Where nothing is shared, s is 1 and p is 0.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

BUCKET = 64  # `limit` grows in such steps where shapes are recorded, and should seldom change


class Clock:
    """Where each text stands; shared by all layers of a cache."""

    def __init__(self, rows: int, size: int, device: torch.device) -> None:
        """Stand at the beginning."""
        self.all = torch.arange(rows, device=device)  # (b)
        self.rows = self.all  # those a prompt is being read for
        self.time = torch.zeros(rows, size, dtype=torch.int64, device=device)  # (b s) of the newest
        self.base = torch.zeros_like(self.all)[:, None]  # (b 1) position that the first slot is for
        texts = torch.arange(size, device=device)
        self.places = (self.all[:, None].expand(-1, size), texts.expand(rows, -1))  # each (b s)
        self.slot = self.time
        self.trunk: Tensor | None = None  # (b s p) 0, and -inf where a group's prompt has ended
        self.reading = True
        self.limit = 0  # slots to look at, at least the largest slot + 1
        self.even = False  # all texts fill these slots: nothing is masked
        self.ahead: Tensor | None = None  # (b 1 s p+limit) 0, and -inf after the text's time


class Past:
    """What one layer remembers: keys (b h s k T), as a product takes them, and values (b h s T k).

    Of keys (b h s T k) a processor would make a copy in bf16, for each token.
    """

    def __init__(self, clock: Clock, slots: int) -> None:
        """Take no memory yet: the first keys know their heads, type and device."""
        self.clock, self.slots = clock, slots
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.trunk: tuple[Tensor, Tensor] | None = None  # keys (b h k p), values (b h p k)

    def time_of(self, length: int) -> Tensor | slice:
        """Index into a table of positions (t k): of a prompt, or of the newest tokens (b 1 s)."""
        return slice(length) if self.clock.reading else self.clock.time[:, None]

    def remember(self, key: Tensor, value: Tensor) -> bool:
        """Write keys and values (b h t k); true if there is more to attend to than these."""
        clock = self.clock
        if clock.reading and clock.trunk is not None:
            self.trunk = key.mT.contiguous(), value.contiguous()
            return False
        if self.keys is None or self.values is None:
            (b, s), (_, h, _, k) = clock.time.shape, key.shape
            self.keys = key.new_zeros(b, h, s, k, self.slots)
            self.values = key.new_zeros(b, h, s, self.slots, k)
        if clock.reading:
            self.keys[clock.rows, :, 0, :, : key.shape[2]] = key.mT
            self.values[clock.rows, :, 0, : key.shape[2]] = value
        elif clock.even:
            self.keys[..., clock.limit - 1] = key
            self.values[..., clock.limit - 1, :] = value
        else:
            rows, texts = clock.places
            self.keys[rows, :, texts, :, clock.slot] = key.transpose(1, 2)  # (b s h k)
            self.values[rows, :, texts, clock.slot] = value.transpose(1, 2)  # (b s h k)
        return not clock.reading

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        within: Callable[..., Tensor],
        dropout: float,
    ) -> Tensor:
        """A prompt within itself, a later token over all that is remembered; all (b h t k)."""
        if self.remember(key, value):
            return over_past(query, self)
        return within(query, key, value, dropout)

    def needed(self, x: Tensor) -> Tensor:
        """All of the features (b t d)."""
        return x

    def spread(self, twins: Tensor) -> None:
        """Give each row what row `twins` (b) remembers."""
        if self.keys is not None and self.values is not None:
            self.keys, self.values = self.keys[twins], self.values[twins]


def over_past(query: Tensor, past: Past) -> Tensor:
    """Attention of one query a text (b h s k) over all that is remembered: (b h s k)."""
    clock = past.clock
    if past.keys is None or past.values is None:
        raise RuntimeError("nothing is remembered yet: read a prompt first, then tick")
    keys, values = past.keys[..., : clock.limit], past.values[..., : clock.limit, :]
    query = (query * query.shape[-1] ** -0.5).contiguous()
    scores = (query[..., None, :] @ keys)[..., 0, :]  # (b h s T)
    if past.trunk is not None:
        scores = torch.cat((query @ past.trunk[0], scores), -1)  # (b h s p+T)
    if clock.ahead is not None:
        scores = scores + clock.ahead.to(query)
    weights = scores.softmax(-1)
    answer = (weights[..., None, -clock.limit :] @ values)[..., 0, :]  # (b h s k)
    if past.trunk is None:
        return answer
    return answer + weights[..., : -clock.limit] @ past.trunk[1]


class Cache:
    """The memory of a whole net for `rows` rows of `size` texts of at most `slots` tokens.

    cache = Cache(layers=4, rows=2, slots=64, device=tokens.device)
    cache.read(lengths=torch.tensor([5, 3]))
    logits = net(prompts, cache)         # prompts (2 5), the second padded: (b 1 v)
    cache.widen(6)                       # the longest row will have six tokens
    cache.tick()                         # every row is one token further
    logits = net(chosen[:, None], cache)
    """

    def __init__(
        self,
        layers: int,
        rows: int,
        slots: int,
        device: torch.device,
        bucket: int = 1,
        size: int = 1,
    ) -> None:
        """Prepare one memory a layer; how far it looks grows by `bucket`."""
        self.clock, self.slots, self.bucket = Clock(rows, size, device), slots, bucket
        self.layers = [Past(self.clock, slots) for _ in range(layers)]

    def read(self, lengths: Tensor, rows: Tensor | None = None) -> None:
        """Announce prompts of `lengths` (b) for all rows, or for some that start anew."""
        clock = self.clock
        clock.rows, clock.reading = clock.all if rows is None else rows, True
        clock.time[clock.rows] = lengths[:, None] - 1

    def share(self, lengths: Tensor, longest: int) -> None:
        """Announce prompts of `lengths` (b), from which the texts of each row go on for good."""
        clock, s = self.clock, self.clock.time.shape[1]
        self.read(lengths)
        clock.base = lengths[:, None]
        ended = torch.arange(longest, device=lengths.device) >= clock.base  # (b p)
        trunk = torch.zeros(ended.shape, device=ended.device).masked_fill(ended, -math.inf)
        clock.trunk = trunk[:, None].expand(-1, s, -1)

    def times(self, here: Tensor) -> Tensor:
        """Positions of the tokens of this call: (t) of a prompt's columns `here`, else (b s)."""
        return here if self.clock.reading else self.clock.time

    def newest(self, x: Tensor) -> Tensor:
        """Of features (b t d) those of each row's newest tokens: (b 1 d), later on (b s d)."""
        clock = self.clock
        if not clock.reading:
            return x
        return x[torch.arange(len(x), device=x.device), clock.time[clock.rows, 0]][:, None]

    def widen(self, most: int, even: bool = False) -> int:
        """Announce one token more in each text; the longest will fill `most` slots. The limit.

        `even` promises that all will, after prompts of one length: then nothing needs a mask. Apart
        from these numbers all is done on the device, where the same steps can be replayed.
        """
        clock = self.clock
        clock.reading = False
        clock.limit = min(-(-most // self.bucket) * self.bucket, self.slots)
        clock.even = even and self.bucket == 1  # what is recorded has to hold for a whole bucket
        return clock.limit

    def tick(self) -> None:
        """Every text is one token further."""
        clock = self.clock
        clock.time += 1
        clock.ahead = None
        if clock.even:
            return
        clock.slot = clock.time - clock.base
        later = torch.arange(clock.limit, device=clock.time.device) > clock.slot[..., None]
        ahead = torch.zeros(later.shape, device=later.device).masked_fill(later, -math.inf)
        if clock.trunk is not None:
            ahead = torch.cat((clock.trunk, ahead), -1)
        clock.ahead = ahead[:, None]  # (b 1 s p+T)

    def spread(self, twins: Tensor) -> None:
        """Rows whose prompt was not read take over that of their twin: twins (b)."""
        self.clock.time = self.clock.time[twins]
        for layer in self.layers:
            layer.spread(twins)
