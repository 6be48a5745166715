"""Reading: what a net says next after texts of different lengths, with a cache or without.

A net sees at most `context` tokens. When they are full, it forgets the older half at once: so a
cache is rebuilt every context/2 tokens, and not for each. Rows do so at their own times, which the
host can count: it never asks the device.

Axes: b batch, t time, v vocabulary.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from ravine.errors import UsageError

from ..nn.moe import MixtureOfExperts
from .kv_cache import Cache

Window = Literal["slide", "refuse"]


class Page:
    """The texts so far, right-padded in one tensor (b t), and what of them the net sees."""

    def __init__(
        self,
        prompts: Sequence[Tensor],
        new: int,
        context: int,
        window: Window,
        device: torch.device,
    ) -> None:
        """Write the prompts down."""
        self.lengths = [len(prompt) for prompt in prompts]  # the host's count of `length`
        check(self.lengths, new, context, window)
        self.context, self.new = context, new
        self.starts = [max(0, n - context) for n in self.lengths]  # first token the net sees
        first: dict[tuple[int, ...], int] = {}
        rows = enumerate(tuple(prompt.tolist()) for prompt in prompts)
        self.twins = [first.setdefault(prompt, row) for row, prompt in rows]  # with equal prompts
        text = torch.zeros(len(prompts), max(self.lengths) + new, dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            text[row, : len(prompt)] = prompt
        self.text = text.to(device)
        self.rows = torch.arange(len(prompts), device=device)
        self.length = torch.tensor(self.lengths, device=device)

    def group(self) -> int:
        """How many rows each prompt stands in, side by side and for good; else 1."""
        rows, size = len(self.twins), len(self.twins) // len(set(self.twins))
        grouped = self.twins == [row // size * size for row in range(rows)]
        return size if grouped and max(self.lengths) + self.new - 1 <= self.context else 1

    def append(self, token: Tensor) -> None:
        """Write one token (b) at the end of each row."""
        self.text[self.rows, self.length] = token
        self.length += 1

    def count(self) -> list[int]:
        """Keep the host's books after `append`; the rows that forget their older half."""
        self.lengths = [n + 1 for n in self.lengths]
        full = [
            row
            for row, (start, n) in enumerate(zip(self.starts, self.lengths, strict=True))
            if n - start > self.context
        ]
        for row in full:
            self.starts[row] = self.lengths[row] - max(1, self.context // 2)
        return full

    def seen(self, rows: Sequence[int], but_last: int = 0) -> tuple[Tensor, Tensor]:
        """What the net sees of some rows, right-padded (b t), and how many tokens that is (b)."""
        starts = torch.tensor([self.starts[row] for row in rows])
        sizes = torch.tensor([self.lengths[row] for row in rows]) - but_last - starts
        columns = starts[:, None] + torch.arange(int(sizes.max()))  # (b t)
        columns = columns.clamp(max=self.text.shape[1] - 1).to(self.text.device)
        picked = self.text[torch.tensor(list(rows), device=self.text.device)]
        return picked.gather(1, columns), sizes.to(self.text.device)


class Reader:
    """Logits (b v) after every row, the whole text read again each time: slow, and the measure."""

    def __init__(self, net: Callable[..., Tensor], page: Page) -> None:
        """Read with any net from tokens (b t) to logits (b t v)."""
        self.net, self.page = net, page

    def prompt(self) -> Tensor:
        """After the prompts."""
        return self.newest()

    def turn(self, full: list[int]) -> int:
        """What the host has to do before a token: a number that is the same for equal work."""
        return 0

    def newest(self) -> Tensor:
        """After the last token."""
        window, sizes = self.page.seen(range(len(self.page.lengths)))
        return self.net(window)[self.page.rows, sizes - 1]


class CachedReader(Reader):
    """The same logits, each token read once."""

    def __init__(self, net: nn.Module, page: Page, bucket: int = 1) -> None:
        """Read with a net that takes a cache."""
        super().__init__(net, page)
        blocks: Iterable[str] = net.blocks  # type: ignore[assignment]
        layers = 1 + max(map(int, blocks))  # a stage of a pipeline has the last ones
        experts = any(isinstance(m, MixtureOfExperts) for m in net.modules())  # look at whole rows
        self.size = 1 if experts else page.group()
        self.base = page.lengths if self.size > 1 else [0] * len(page.lengths)
        rows, slots = len(page.lengths) // self.size, page.new if self.size > 1 else page.context
        self.cache = Cache(layers, rows, slots, page.text.device, bucket, self.size)

    def prompt(self) -> Tensor:
        """Fill the cache; a prompt that stands in several rows is read once."""
        rows, places = torch.tensor(self.page.twins).unique(return_inverse=True)
        window, sizes = self.page.seen(rows.tolist())
        if self.size > 1:
            self.cache.share(sizes, window.shape[1])
        else:
            self.cache.read(sizes, rows.to(sizes.device))
        logits = self.net(window, self.cache)[:, 0]
        if self.size == 1 and len(rows) < len(places):
            self.cache.spread(rows[places].to(sizes.device))
        return logits[places.to(sizes.device)]

    def turn(self, full: list[int]) -> int:
        """Rows that have forgotten their older half read the younger again, but its last token."""
        page = self.page
        if full:
            window, sizes = page.seen(full, but_last=1)
            self.cache.read(sizes, torch.tensor(full, device=page.text.device))
            if window.shape[1]:
                self.net(window, self.cache)
        seen = [n - start for n, start in zip(page.lengths, page.starts, strict=True)]
        slots = [n - base for n, base in zip(seen, self.base, strict=True)]
        return self.cache.widen(max(slots), even=min(seen) == max(seen))

    def newest(self) -> Tensor:
        """Read the last token of each row; nothing here is new to a device that did it before."""
        self.cache.tick()
        page = self.page
        tokens = page.text.gather(1, page.length[:, None] - 1)  # (b 1)
        return self.net(tokens.view(-1, self.size), self.cache).flatten(0, 1)  # (b v)


def check(lengths: list[int], new: int, context: int, window: Window) -> None:
    """Refuse what cannot be written."""
    if new < 1:
        raise UsageError(f"max_new_tokens is {new}; allowed: 1 or more; type --max_new_tokens=200")
    if not lengths or min(lengths) < 1:
        raise UsageError("a prompt is empty; allowed: any text; type --prompt='ROMEO:'")
    longest = max(lengths)
    if window == "refuse" and longest + new - 1 > context:
        fits = context - longest + 1
        out = f"type --max_new_tokens={fits} or less" if fits > 0 else "give a shorter prompt"
        raise UsageError(
            f"a prompt of {longest} tokens and {new} new ones do not fit into the {context} tokens "
            f"the model sees; {out}, or --window=slide to forget the older half when they are full"
        )
