"""A key-value cache: what was attended to once is not computed again.

    reading a prompt     tokens (b t)   keys and values of slots 0 .. t-1 are written
    one token more       tokens (b 1)   one slot is written, at each row's own time

Memory is taken once and written in place, and a slot is a position, so rows may differ in length:
what lies after a row's time (padding, or a longer life before) is masked. Times are tensors and
`length`, how far to look, is a number known without asking the device: nothing waits for it.

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

BUCKET_SIZE = 64  # `length` grows in such steps where shapes are recorded, and should seldom change


class CachePositions:
    """Where each text stands; shared by all layers of a cache."""

    def __init__(self, num_rows: int, group_size: int, device: torch.device) -> None:
        """Stand at the beginning."""
        self.all_rows = torch.arange(num_rows, device=device)  # (b)
        self.prefill_rows = self.all_rows  # those a prompt is being read for
        self.position_ids = torch.zeros(
            num_rows, group_size, dtype=torch.int64, device=device
        )  # (b s) of the newest
        self.prefix_length = torch.zeros_like(self.all_rows)[
            :, None
        ]  # (b 1) position that the first slot is for
        text_indices = torch.arange(group_size, device=device)
        self.row_text_indices = (
            self.all_rows[:, None].expand(-1, group_size),
            text_indices.expand(num_rows, -1),
        )  # each (b s)
        self.slots = self.position_ids
        self.prefix_mask: Tensor | None = (
            None  # (b s p) 0, and -inf where a group's prompt has ended
        )
        self.is_prefill = True
        self.length = 0  # slots to look at, at least the largest slot + 1
        self.is_uniform = False  # all texts fill these slots: nothing is masked
        self.attn_mask: Tensor | None = None  # (b 1 s p+limit) 0, and -inf after the text's time


class LayerKVCache:
    """What one layer remembers: keys (b h s k T), as a product takes them, and values (b h s T k).

    Of keys (b h s T k) a processor would make a copy in bf16, for each token.
    """

    def __init__(self, positions: CachePositions, num_slots: int) -> None:
        """Take no memory yet: the first keys know their heads, type and device."""
        self.positions, self.num_slots = positions, num_slots
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.prefix_kv: tuple[Tensor, Tensor] | None = None  # keys (b h k p), values (b h p k)

    def positions_of(self, length: int) -> Tensor | slice:
        """Index into a table of positions (t k): of a prompt, or of the newest tokens (b 1 s)."""
        return slice(length) if self.positions.is_prefill else self.positions.position_ids[:, None]

    def update(self, key: Tensor, value: Tensor) -> bool:
        """Write keys and values (b h t k); true if there is more to attend to than these."""
        positions = self.positions
        if positions.is_prefill and positions.prefix_mask is not None:
            self.prefix_kv = key.mT.contiguous(), value.contiguous()
            return False
        if self.keys is None or self.values is None:
            (b, s), (_, h, _, k) = positions.position_ids.shape, key.shape
            self.keys = key.new_zeros(b, h, s, k, self.num_slots)
            self.values = key.new_zeros(b, h, s, self.num_slots, k)
        if positions.is_prefill:
            self.keys[positions.prefill_rows, :, 0, :, : key.shape[2]] = key.mT
            self.values[positions.prefill_rows, :, 0, : key.shape[2]] = value
        elif positions.is_uniform:
            self.keys[..., positions.length - 1] = key
            self.values[..., positions.length - 1, :] = value
        else:
            rows, texts = positions.row_text_indices
            self.keys[rows, :, texts, :, positions.slots] = key.transpose(1, 2)  # (b s h k)
            self.values[rows, :, texts, positions.slots] = value.transpose(1, 2)  # (b s h k)
        return not positions.is_prefill

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_fn: Callable[..., Tensor],
        dropout: float,
    ) -> Tensor:
        """A prompt within itself, a later token over all that is remembered; all (b h t k)."""
        if self.update(key, value):
            return attend_cached(query, self)
        return attention_fn(query, key, value, dropout)

    def select_positions(self, x: Tensor) -> Tensor:
        """All of the features (b t d)."""
        return x

    def copy_rows(self, source_rows: Tensor) -> None:
        """Give each row what row `source_rows` (b) remembers."""
        if self.keys is not None and self.values is not None:
            self.keys, self.values = self.keys[source_rows], self.values[source_rows]


def attend_cached(query: Tensor, layer_cache: LayerKVCache) -> Tensor:
    """Attention of one query a text (b h s k) over all that is remembered: (b h s k)."""
    positions = layer_cache.positions
    if layer_cache.keys is None or layer_cache.values is None:
        raise RuntimeError("nothing is remembered yet: read a prompt first, then tick")
    keys, values = (
        layer_cache.keys[..., : positions.length],
        layer_cache.values[..., : positions.length, :],
    )
    query = (query * query.shape[-1] ** -0.5).contiguous()
    scores = (query[..., None, :] @ keys)[..., 0, :]  # (b h s T)
    if layer_cache.prefix_kv is not None:
        scores = torch.cat((query @ layer_cache.prefix_kv[0], scores), -1)  # (b h s p+T)
    if positions.attn_mask is not None:
        scores = scores + positions.attn_mask.to(query)
    weights = scores.softmax(-1)
    output = (weights[..., None, -positions.length :] @ values)[..., 0, :]  # (b h s k)
    if layer_cache.prefix_kv is None:
        return output
    return output + weights[..., : -positions.length] @ layer_cache.prefix_kv[1]


class KVCache:
    """The memory of a whole net for `num_rows` rows of `group_size` texts of at most `num_slots`
    tokens.

    cache = Cache(layers=4, rows=2, slots=64, device=tokens.device)
    cache.read(lengths=torch.tensor([5, 3]))
    logits = net(prompts, cache)         # prompts (2 5), the second padded: (b 1 v)
    cache.widen(6)                       # the longest row will have six tokens
    cache.tick()                         # every row is one token further
    logits = net(chosen[:, None], cache)
    """

    def __init__(
        self,
        num_layers: int,
        num_rows: int,
        num_slots: int,
        device: torch.device,
        bucket_size: int = 1,
        group_size: int = 1,
    ) -> None:
        """Prepare one memory a layer; how far it looks grows by `bucket_size`."""
        self.positions, self.num_slots, self.bucket_size = (
            CachePositions(num_rows, group_size, device),
            num_slots,
            bucket_size,
        )
        self.layers = [LayerKVCache(self.positions, num_slots) for _ in range(num_layers)]

    def begin_prefill(self, lengths: Tensor, rows: Tensor | None = None) -> None:
        """Announce prompts of `lengths` (b) for all rows, or for some that start anew."""
        positions = self.positions
        positions.prefill_rows, positions.is_prefill = (
            positions.all_rows if rows is None else rows,
            True,
        )
        positions.position_ids[positions.prefill_rows] = lengths[:, None] - 1

    def begin_shared_prefill(self, lengths: Tensor, max_length: int) -> None:
        """Announce prompts of `lengths` (b), from which the texts of each row go on for good."""
        positions, group_size = self.positions, self.positions.position_ids.shape[1]
        self.begin_prefill(lengths)
        positions.prefix_length = lengths[:, None]
        is_past_prefix = (
            torch.arange(max_length, device=lengths.device) >= positions.prefix_length
        )  # (b p)
        prefix_mask = torch.zeros(is_past_prefix.shape, device=is_past_prefix.device).masked_fill(
            is_past_prefix, -math.inf
        )
        positions.prefix_mask = prefix_mask[:, None].expand(-1, group_size, -1)

    def position_ids(self, prompt_positions: Tensor) -> Tensor:
        """Positions of the tokens of this call: (t) of a prompt's columns `prompt_positions`, else
        (b s).
        """
        return prompt_positions if self.positions.is_prefill else self.positions.position_ids

    def select_outputs(self, x: Tensor) -> Tensor:
        """Of features (b t d) those of each row's newest tokens: (b 1 d), later on (b s d)."""
        positions = self.positions
        if not positions.is_prefill:
            return x
        return x[
            torch.arange(len(x), device=x.device), positions.position_ids[positions.prefill_rows, 0]
        ][:, None]

    def reserve(self, max_slots: int, is_uniform: bool = False) -> int:
        """Announce one token more in each text; the longest will fill `max_slots` slots. The limit.

        `is_uniform` promises that all will, after prompts of one length: then nothing needs a
        mask. Apart from these numbers all is done on the device, where the same steps can be
        replayed.
        """
        positions = self.positions
        positions.is_prefill = False
        positions.length = min(-(-max_slots // self.bucket_size) * self.bucket_size, self.num_slots)
        positions.is_uniform = (
            is_uniform and self.bucket_size == 1
        )  # what is recorded has to hold for a whole bucket
        return positions.length

    def advance(self) -> None:
        """Every text is one token further."""
        positions = self.positions
        positions.position_ids += 1
        positions.attn_mask = None
        if positions.is_uniform:
            return
        positions.slots = positions.position_ids - positions.prefix_length
        is_future = (
            torch.arange(positions.length, device=positions.position_ids.device)
            > positions.slots[..., None]
        )
        attn_mask = torch.zeros(is_future.shape, device=is_future.device).masked_fill(
            is_future, -math.inf
        )
        if positions.prefix_mask is not None:
            attn_mask = torch.cat((positions.prefix_mask, attn_mask), -1)
        positions.attn_mask = attn_mask[:, None]  # (b 1 s p+T)

    def copy_rows(self, source_rows: Tensor) -> None:
        """Rows whose prompt was not read take over that of their twin: twins (b)."""
        self.positions.position_ids = self.positions.position_ids[source_rows]
        for layer in self.layers:
            layer.copy_rows(source_rows)
