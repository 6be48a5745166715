"""Texts that begin alike are read as one: what they share once, then each for itself.

    two prompts, two texts after each         one row, in the place of four
    p p p a a   p p p b b                     p p p | q q q | a a | b b | c c | d d
    q q q c c   q q q d d                     trunks          branches

A branch attends to its trunk and to itself. Embeddings, norms and linear maps treat each token by
itself and see a row like any other; positions and attention alone know of it. A trunk's keys and
values collect gradients from all of its branches: up to rounding, logits and gradients are those of
whole texts. Nobody asks what comes next within a trunk: the last block and the head leave it out.

Axes: g prompts, s texts of each, b = g s, p trunk, n branch, t = g p + b n, T = p + n,
h heads, k head width, d model, v vocabulary.
"""

from collections.abc import Callable, Sequence

import torch
from einops import rearrange, repeat
from torch import Tensor, nn


class Branches:
    """Prompts and what was written after each, in the place of tokens and of a cache.

    branches = Branches([tokenizer.encode("ROMEO:")], written, layers=4)
    logits = net(branches.tokens, branches)          # (b n v): those that drew `written` (b n)

    A branch begins with the last token of its prompt, and lacks the last one written.

    Args:
        prompts: g of them, each the beginning of as many texts; their lengths may differ.
        written: tokens (b n) after the prompts, those of one prompt side by side.
        layers: blocks of the net.
    """

    def __init__(self, prompts: Sequence[Tensor], written: Tensor, layers: int) -> None:
        """Lay out the row, its positions, and what a branch sees."""
        (b, n), g, device = written.shape, len(prompts), written.device
        starts = torch.tensor([len(prompt) - 1 for prompt in prompts])  # (g)
        trunks = nn.utils.rnn.pad_sequence([prompt[:-1].cpu() for prompt in prompts], True)  # (g p)
        last = repeat(torch.stack([prompt[-1] for prompt in prompts]), "g -> (g s) 1", s=b // g)
        own = torch.cat((last.to(device), written[:, :-1]), 1)  # (b n)
        self.tokens = torch.cat((trunks.to(device).flatten(), own.flatten()))[None]  # (1 t)
        self.prompts, self.parts = g, [trunks.numel(), own.numel()]  # of t
        self.length, self.size = n, b // g
        here, there = torch.arange(trunks.shape[1]), torch.arange(n)
        after = repeat(starts[:, None] + there, "g n -> (g s n)", s=b // g)
        self.time = torch.cat((here.repeat(g), after)).to(device)  # (t)
        before = repeat(here < starts[:, None], "g p -> (g s) 1 n p", s=b // g, n=n)  # no padding
        within = (there <= there[:, None]).expand(b, 1, n, n)
        seen = torch.cat((before, within), -1)
        alike = bool((starts == starts[0]).all())
        self.seen = (seen[0, 0] if alike else seen).to(device)  # (n T) or (b 1 n T)
        self.layers = [Fork(self, layer == layers - 1) for layer in range(layers)]

    def times(self, here: Tensor) -> Tensor:
        """Positions of the tokens: (t)."""
        return self.time

    def outer(self, x: Tensor) -> Tensor:
        """Of features (1 t d) those of the branches, (1 (b n) d): the second time all of them."""
        return x[:, -self.parts[1] :]

    def newest(self, x: Tensor) -> Tensor:
        """Features (b n d) of whatever has logits."""
        return rearrange(self.outer(x), "1 (b n) d -> b n d", n=self.length)


class Fork:
    """What one layer does with branches."""

    def __init__(self, branches: Branches, last: bool) -> None:
        """Know the row, and whether a layer comes after this one."""
        self.branches, self.last = branches, last

    def time_of(self, length: int) -> Tensor:
        """Index into a table of positions (t k): (t)."""
        return self.branches.time

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        within: Callable[..., Tensor],
        dropout: float,
    ) -> Tensor:
        """Trunks within themselves, each branch over its trunk and itself; all (1 h t k)."""
        row = self.branches
        trunks, own = [], []
        for part in (query, key, value):
            trunk, branch = part.split(row.parts, 2)
            trunks.append(rearrange(trunk, "1 h (g p) k -> g h p k", g=row.prompts))
            own.append(rearrange(branch, "1 h (b n) k -> b h n k", n=row.length))
        keys, values = (
            torch.cat((repeat(trunk, "g h p k -> (g s) h p k", s=row.size), branch), 2)
            for trunk, branch in zip(trunks[1:], own[1:], strict=True)
        )  # (b h T k)
        answers = within(*trunks, dropout), within(own[0], keys, values, dropout, row.seen)
        flat = [rearrange(answer, "b h n k -> (b n) h k") for answer in answers]
        return rearrange(torch.cat(flat), "t h k -> 1 h t k")

    def needed(self, x: Tensor) -> Tensor:
        """Features (1 t d), in the last layer those of the branches alone."""
        return self.branches.outer(x) if self.last else x
