"""KV cache: keep the keys and values of earlier tokens for autoregressive decoding.

    prefill          tokens (b t)   writes the keys and values of slots 0 .. t-1
    decode step      tokens (b 1)   writes one slot of each row, at the row's own position

Memory is allocated once and written in place. A slot is a position, so rows may differ in length:
positions beyond a row's current length (padding or stale entries) are masked. Positions are
tensors. `length`, the number of slots to attend to, is a number on the host, so no step waits for
the device.

Texts with a common prompt can form a group of s texts in one row: tokens (g s) are the newest
token of each text. The keys and values of the shared prefix are stored once, and one matrix
product computes the scores of all s queries with them. The slots are for tokens after the prefix.

Axes: b batch of rows, or g of groups; s texts of a row, t time, T slots, p prefix, h heads,
k head width. Without a shared prefix, s is 1 and p is 0.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

BUCKET_SIZE = 64  # step of `length` with CUDA graphs; each new length needs a new graph


class CachePositions:
    """Position of each text in the cache; all layers share one instance."""

    def __init__(self, num_rows: int, group_size: int, device: torch.device) -> None:
        """Start all texts at position 0: `num_rows` rows (b) of `group_size` texts (s) each.

        Axes: b rows, s texts of a row, p tokens of a row's prompt that its texts share, T slots for
        further tokens. The prefill computes the prompts; each decode step computes one token.
        """
        self.all_rows = torch.arange(num_rows, device=device)  # (b)
        self.prefill_rows = self.all_rows  # rows of the current prefill
        # positions of the newest tokens (b s)
        self.position_ids = torch.zeros(num_rows, group_size, dtype=torch.int64, device=device)
        # (b 1) position of a row's first slot: the tokens of a shared prefix have no slots
        self.prefix_length = torch.zeros_like(self.all_rows)[:, None]
        text_indices = torch.arange(group_size, device=device)
        self.row_text_indices = (
            self.all_rows[:, None].expand(-1, group_size),
            text_indices.expand(num_rows, -1),
        )  # each (b s): indices of the first and the third axis of the keys
        # the same tensor: without a prefix a slot is a position
        self.slots = self.position_ids  # (b s) slots of the newest tokens
        # (b s p) 0, and -inf beyond the end of a group's prompt
        self.prefix_mask: Tensor | None = None
        self.is_prefill = True
        self.length = 0  # attended slots T, at least the largest slot + 1
        self.is_uniform = False  # all texts fill these slots: no mask is needed
        # (b 1 s p+T) 0, and -inf beyond the text's position
        self.attn_mask: Tensor | None = None


class LayerKVCache:
    """Cached keys (b h s k T) and values (b h s T k) of one layer.

    The axes of the keys are in the order that the matrix product needs. Keys of shape (b h s T k)
    would be copied for each token on a CPU in bf16.
    """

    def __init__(self, positions: CachePositions, num_slots: int) -> None:
        """Store the sizes; the first keys determine heads, dtype and device of the memory."""
        self.positions, self.num_slots = positions, num_slots
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.prefix_kv: tuple[Tensor, Tensor] | None = None  # keys (b h k p), values (b h p k)

    def positions_of(self, length: int) -> Tensor | slice:
        """Index into a table of positions (t k): of a prompt, or of the newest tokens (b 1 s)."""
        return slice(length) if self.positions.is_prefill else self.positions.position_ids[:, None]

    def update(self, key: Tensor, value: Tensor) -> bool:
        """Write keys and values (b h t k) of new tokens; return whether to attend to the cache.

        In prefill the query attends to the prompt's own keys, so the result is False. `positions`
        has the state of the step, which all layers share.

        Axes: b rows, s texts of a row (1 without a shared prefix), h heads, k head width,
        T slots for tokens.
        """
        positions = self.positions
        if positions.is_prefill and positions.prefix_mask is not None:  # a shared prefix
            self.prefix_kv = key.mT.contiguous(), value.contiguous()
            return False
        if self.keys is None or self.values is None:
            (b, s), (_, h, _, k) = positions.position_ids.shape, key.shape
            self.keys = key.new_zeros(b, h, s, k, self.num_slots)
            self.values = key.new_zeros(b, h, s, self.num_slots, k)
        if positions.is_prefill:  # the prompt fills slots 0 .. t-1 of the row's only text
            t = key.shape[2]
            self.keys[positions.prefill_rows, :, 0, :, :t] = key.mT
            self.values[positions.prefill_rows, :, 0, :t] = value
        elif positions.is_uniform:  # all texts write the same slot, so t = s tokens (b h s k)
            self.keys[..., positions.length - 1] = key
            self.values[..., positions.length - 1, :] = value
        else:  # each text writes its own slot
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
        """Attend within the prompt during prefill, else over all cached positions; (b h t k)."""
        if self.update(key, value):
            return attend_cached(query, self)
        return attention_fn(query, key, value, dropout)

    def select_positions(self, x: Tensor) -> Tensor:
        """Return the features (b t d) unchanged."""
        return x

    def copy_rows(self, source_rows: Tensor) -> None:
        """Copy the keys and values of row `source_rows[i]` to row i; source_rows (b)."""
        if self.keys is not None and self.values is not None:
            self.keys, self.values = self.keys[source_rows], self.values[source_rows]


def attend_cached(query: Tensor, layer_cache: LayerKVCache) -> Tensor:
    """Attention of one query for each text (b h s k) over the cached keys and values: (b h s k)."""
    positions = layer_cache.positions
    if layer_cache.keys is None or layer_cache.values is None:
        raise RuntimeError("the KV cache is empty: run the net after begin_prefill first")
    num_slots = positions.length  # T, the attended slots
    keys = layer_cache.keys[..., :num_slots]  # (b h s k T)
    values = layer_cache.values[..., :num_slots, :]  # (b h s T k)
    # scaled once here; the keys are stored with T last, as the product needs them
    query = (query * query.shape[-1] ** -0.5).contiguous()
    scores = (query[..., None, :] @ keys)[..., 0, :]  # (b h s T)
    if layer_cache.prefix_kv is not None:
        prefix_keys, _ = layer_cache.prefix_kv  # (b h k p): one product for all texts of a row
        scores = torch.cat((query @ prefix_keys, scores), -1)  # (b h s p+T)
    if positions.attn_mask is not None:  # -inf for slots that a text has not filled
        scores = scores + positions.attn_mask.to(query)
    weights = scores.softmax(-1)
    # the last T weights are of the slots, those before them of the shared prefix
    output = (weights[..., None, -num_slots:] @ values)[..., 0, :]  # (b h s k)
    if layer_cache.prefix_kv is None:
        return output
    _, prefix_values = layer_cache.prefix_kv  # (b h p k)
    return output + weights[..., :-num_slots] @ prefix_values


class KVCache:
    """Key-value cache of a net: `num_rows` rows of `group_size` texts, each with `num_slots` slots.

    For example:

        cache = KVCache(num_layers=4, num_rows=2, num_slots=64, device=tokens.device)
        cache.begin_prefill(lengths=torch.tensor([5, 3]))
        logits = net(prompts, cache)         # prompts (2 5), the second padded: (b 1 v)
        cache.reserve(6)                     # the longest row will have six tokens
        cache.advance()                      # every row is one token further
        logits = net(next_tokens[:, None], cache)
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
        """Create the cache of each layer.

        Args:
            num_layers: number of attention layers.
            num_rows: rows b of the batch.
            num_slots: tokens for which each text has memory.
            device: device of the positions; the keys determine that of the memory.
            bucket_size: the attended length is rounded up to a multiple of it, because each length
                needs its own CUDA graph.
            group_size: texts s of a row, which share the prefix of the row.
        """
        self.positions = CachePositions(num_rows, group_size, device)
        self.num_slots, self.bucket_size = num_slots, bucket_size
        self.layers = [LayerKVCache(self.positions, num_slots) for _ in range(num_layers)]

    def begin_prefill(self, lengths: Tensor, rows: Tensor | None = None) -> None:
        """Prepare the prefill of prompts of `lengths` (b), for all rows or for the given rows."""
        positions = self.positions
        positions.is_prefill = True
        positions.prefill_rows = positions.all_rows if rows is None else rows
        positions.position_ids[positions.prefill_rows] = lengths[:, None] - 1

    def begin_shared_prefill(self, lengths: Tensor, max_length: int) -> None:
        """Prepare the prefill of prompts of `lengths` (b), the common prefix of a row's texts."""
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
        """Return the positions of the tokens: `prompt_positions` (t) during prefill, else (b s)."""
        return prompt_positions if self.positions.is_prefill else self.positions.position_ids

    def select_outputs(self, x: Tensor) -> Tensor:
        """Select the features (b t d) of the newest tokens: (b 1 d) in prefill, else (b s d)."""
        positions = self.positions
        if not positions.is_prefill:
            return x
        return x[
            torch.arange(len(x), device=x.device), positions.position_ids[positions.prefill_rows, 0]
        ][:, None]

    def reserve(self, max_slots: int, is_uniform: bool = False) -> int:
        """Prepare a step that fills at most `max_slots` slots; return the attended length.

        `is_uniform` promises that all texts fill the same number of slots, after prompts of one
        length. Then no mask is needed. All other work of the step is done on the device and can be
        replayed.
        """
        positions = self.positions
        positions.is_prefill = False
        positions.length = min(-(-max_slots // self.bucket_size) * self.bucket_size, self.num_slots)
        # a recorded graph must be valid for all lengths of a bucket
        positions.is_uniform = is_uniform and self.bucket_size == 1
        return positions.length

    def advance(self) -> None:
        """Move every text one position further and compute the attention mask.

        It is called once before each decode step, after `reserve`, which sets `length` (T). It runs
        on the device only. Attributes of `positions` are by row and text (b s).
        """
        positions = self.positions
        positions.position_ids += 1  # in place: a CUDA graph keeps the address
        positions.attn_mask = None
        if positions.is_uniform:  # the attended slots are all filled: no mask
            return
        positions.slots = positions.position_ids - positions.prefix_length  # (b s)
        all_slots = torch.arange(positions.length, device=positions.position_ids.device)  # (T)
        is_future = all_slots > positions.slots[..., None]  # (b s T)
        attn_mask = torch.zeros(is_future.shape, device=is_future.device).masked_fill(
            is_future, -math.inf
        )
        if positions.prefix_mask is not None:
            attn_mask = torch.cat((positions.prefix_mask, attn_mask), -1)
        positions.attn_mask = attn_mask[:, None]  # (b 1 s p+T)

    def copy_rows(self, source_rows: Tensor) -> None:
        """Copy positions, keys and values of row `source_rows[i]` to row i; source_rows (b).

        It is used for rows whose prompt was computed in another row.
        """
        self.positions.position_ids = self.positions.position_ids[source_rows]
        for layer in self.layers:
            layer.copy_rows(source_rows)
