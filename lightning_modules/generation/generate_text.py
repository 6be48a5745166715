"""Autoregressive generation: prefill the prompts once, then sample one token after the other.

    prompts of different lengths -> tokens, logprobs, mask; all (b n), on the net's device

Text generation and policy rollouts both use `generate`. The sampled tokens, the lengths and the
stop flags are device tensors, so the host does not wait for each token. The host reads them every
32 steps (`SYNC_EVERY`). It computes the lengths that it needs in between by itself.

A stop string is matched twice. On the device it is matched as tokens, which ends the sampling. On
the host it is matched in the text, because word-piece tokens can spell the same characters in more
than one way.

Axes: b batch, n new tokens, v vocabulary.
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ravine.errors import RunError, UsageError

from .cuda_graphs import CaptureFn, GraphedCallable
from .decoding import CachedDecoder, ContextOverflow, Decoder, TokenBuffer
from .kv_cache import BUCKET_SIZE
from .sampling import DecodingConfig, row_uniforms

SYNC_EVERY = 32  # steps between two reads by the host


class GenerationOutput(NamedTuple):
    """Generated tokens, their logprobs and their mask; all (b n)."""

    tokens: Tensor  # 0 after the end
    logprobs: Tensor  # fp32, under the sampling distribution; 0 after the end
    mask: Tensor  # true up to the end, including the stop tokens


class SamplerState:
    """Sample tokens and record them with their logprobs; every buffer is on the device."""

    def __init__(
        self,
        token_buffer: TokenBuffer,
        sampling: DecodingConfig,
        stops: Sequence[Sequence[int]],
        uniform: Tensor,
    ) -> None:
        """Allocate the output buffers (b n) and the flags of the rows that have not ended (b).

        Args:
            token_buffer: holds the prompts; each sampled token is appended to it.
            sampling: sampling settings.
            stops: token sequences that end a row.
            uniform: numbers (b n) in (0, 1]; one number selects one token.
        """
        device = token_buffer.tokens.device
        self.token_buffer, self.sampling = token_buffer, sampling
        # the numbers are float64, which Apple's GPUs (mps) lack
        self.uniform = uniform.to(device, torch.float32 if device.type == "mps" else None)
        self.stops = [torch.tensor(list(stop), device=device) for stop in stops]
        # a tensor (1), so that a CUDA graph of a step can be replayed for the next step
        self.step_index = torch.zeros(1, dtype=torch.int64, device=device)
        self.active = torch.ones(len(token_buffer.lengths), dtype=torch.bool, device=device)
        self.tokens = torch.zeros_like(uniform, dtype=torch.int64, device=device)
        self.logprobs = torch.zeros_like(uniform, dtype=torch.float32, device=device)
        self.mask = torch.zeros_like(uniform, dtype=torch.bool, device=device)

    def sample_next(self, logits: Tensor) -> None:
        """Sample one token for each row from logits (b v); deactivate rows at a stop sequence.

        All indices are tensors and all buffers are written in place. So a CUDA graph of one step
        can be replayed for the following steps.
        """
        logprobs = self.sampling.compute_logprobs(logits)  # (b v)
        uniform = self.uniform.index_select(1, self.step_index)[:, 0]  # (b)
        token = self.sampling.sample(logprobs, uniform)  # (b)
        logprob = logprobs.gather(1, token[:, None])[:, 0]
        token = token * self.active  # 0 in a row that has ended
        logprob = logprob.where(self.active, 0.0).float()
        # the mask is true also for the token that ends a row, as `active` changes below
        for buffer, value in (
            (self.tokens, token),
            (self.logprobs, logprob),
            (self.mask, self.active),
        ):
            buffer.index_copy_(1, self.step_index, value[:, None])
        self.token_buffer.append_token(token)  # its lengths now include the token
        self.step_index += 1
        for stop in self.stops:
            self.active &= ~self._ends_with(stop)

    def _ends_with(self, stop: Tensor) -> Tensor:
        """Return whether the new tokens of each row end with the sequence `stop` (k): (b)."""
        lengths = self.token_buffer.device_lengths  # (b), including the newest token
        offsets = torch.arange(len(stop), 0, -1, device=stop.device)
        positions = (lengths[:, None] - offsets).clamp(min=0)  # (b k)
        is_equal = (self.token_buffer.tokens.gather(1, positions) == stop).all(-1)
        return is_equal & (self.step_index >= len(stop))  # tokens of the prompt do not count

    def slice_columns(self, first: int, last: int) -> GenerationOutput:
        """Return columns first .. last-1 of the output."""
        return GenerationOutput(
            *(x[:, first:last] for x in (self.tokens, self.logprobs, self.mask))
        )


@torch.no_grad()
def generate_stream(
    net: nn.Module,
    prompts: Sequence[Tensor],
    max_new_tokens: int,
    context_length: int,
    sampling: DecodingConfig | None = None,
    stops: Sequence[Sequence[int]] = (),
    seed: int = 0,
    row_keys: Sequence[Hashable] | None = None,
    context_overflow: ContextOverflow = "slide",
    use_cache: bool = True,
    sync_every: int = SYNC_EVERY,
    capture: CaptureFn | None = None,
) -> Iterator[GenerationOutput]:
    """Yield the output of `generate` in chunks of `sync_every` tokens; it ends when all rows have.

    Args:
        net: maps tokens (b t) to logits (b t v); with `use_cache` it takes a KV cache as its second
            argument.
        prompts: token ids, one vector for each row.
        max_new_tokens: maximum number of tokens to generate.
        context_length: maximum number of tokens that the net sees.
        sampling: sampling settings; by default the net's own distribution.
        stops: token sequences that end a row.
        seed: random seed; the seed and a row's key determine its tokens.
        row_keys: keys of the rows; by default 0, 1, 2, ...
        context_overflow: "slide" drops the older half of a full context, "error" raises UsageError.
        use_cache: use a KV cache; without it each step computes the whole text again.
        sync_every: steps between two reads of the device by the host.
        capture: records a function without arguments as a CUDA graph and returns its replay; None
            runs each step eagerly.
    """
    sampling = sampling or DecodingConfig()
    device = next(net.parameters()).device
    token_buffer = TokenBuffer(prompts, max_new_tokens, context_length, context_overflow, device)
    # (b max_new_tokens) random numbers; each selects one token
    uniform = row_uniforms(seed, row_keys or range(len(prompts)), max_new_tokens)
    # samples tokens and stores them with their logprobs and the mask, all on the device
    state = SamplerState(token_buffer, sampling, stops, uniform)
    # each length of the cache needs its own CUDA graph, so lengths are rounded up to a bucket
    bucket_size = BUCKET_SIZE if capture else 1
    decoder = (
        CachedDecoder(net, token_buffer, bucket_size) if use_cache else Decoder(net, token_buffer)
    )

    def decode_and_sample() -> None:
        state.sample_next(decoder.decode_step())

    # calls the function, and from its second call in a bucket on replays its CUDA graph
    run_step = GraphedCallable(decode_and_sample, capture if use_cache else None)
    num_yielded = 0
    with eval_mode(net):
        for num_steps in range(1, max_new_tokens + 1):  # including the current step
            if num_steps == 1:
                logits = decoder.prefill()
                sampling.check_vocab_size(logits.shape[-1])
                state.sample_next(logits)
            else:
                overflowed_rows = token_buffer.advance_lengths()  # the host's copy of the lengths
                bucket = decoder.prepare_step(overflowed_rows)  # equal for steps of equal shapes
                run_step(bucket)
            if num_steps % sync_every == 0 or num_steps == max_new_tokens:
                # waits for the device; raises RunError for NaN
                _check_finite(state)
                yield state.slice_columns(num_yielded, num_steps)
                num_yielded = num_steps
                if not bool(state.active.any()):  # every row has reached a stop sequence
                    return


def generate(
    net: nn.Module,
    prompts: Sequence[Tensor],
    max_new_tokens: int,
    context_length: int,
    sampling: DecodingConfig | None = None,
    stops: Sequence[Sequence[int]] = (),
    seed: int = 0,
    row_keys: Sequence[Hashable] | None = None,
    context_overflow: ContextOverflow = "slide",
    use_cache: bool = True,
    sync_every: int = SYNC_EVERY,
    capture: CaptureFn | None = None,
) -> GenerationOutput:
    """Generate up to `max_new_tokens` tokens after each prompt (token ids; the lengths may differ).

        output = generate(net, [tokenizer.encode("ROMEO:")], max_new_tokens=100, context_length=64)

    Args:
        net: maps tokens (b t) to logits (b t v); with `use_cache` it takes a KV cache as its second
            argument.
        prompts: token ids, one vector for each row.
        max_new_tokens: maximum number of tokens to generate.
        context_length: maximum number of tokens that the net sees.
        sampling: sampling settings; by default the net's own distribution.
        stops: token sequences that end a row.
        seed: random seed; the seed and a row's key determine its tokens.
        row_keys: keys of the rows, such as their indices in a data set; by default 0, 1, 2, ...
        context_overflow: "slide" drops the older half when the context is full; "error" raises
            UsageError for texts that would not fit.
        use_cache: use a KV cache.
        sync_every: steps between two checks whether all rows have ended.
        capture: records a step, sampling included, for replay: `cuda_graphs.capture_cuda_graph`;
            None runs each step eagerly.
    """
    chunks = list(
        generate_stream(
            net,
            prompts,
            max_new_tokens,
            context_length,
            sampling=sampling,
            stops=stops,
            seed=seed,
            row_keys=row_keys,
            context_overflow=context_overflow,
            use_cache=use_cache,
            sync_every=sync_every,
            capture=capture,
        )
    )
    # the stream ends early if all rows have ended: pad to (b max_new_tokens)
    num_missing = max_new_tokens - sum(chunk.tokens.shape[1] for chunk in chunks)
    # tokens, logprobs and mask of all chunks
    fields = (torch.cat(tensors, 1) for tensors in zip(*chunks, strict=True))
    return GenerationOutput(*(nn.functional.pad(x, (0, num_missing)) for x in fields))


def generate_text(
    net: nn.Module,
    tokenizer: Any,
    prompts: Sequence[str],
    stops: Sequence[str] = (),
    on_text: Callable[[str], None] | None = None,
    **kwargs: Any,
) -> list[str]:
    """Return the text that the net generates after each prompt, up to a stop string.

        sizes = {"max_new_tokens": 200, "context_length": 64}
        generate_text(net, tokenizer, ["ROMEO:"], stops=["\n\n"], on_text=print, **sizes)

    With `on_text`, the first text is streamed: each piece is passed on as soon as it is final.

    Args:
        net: maps tokens (b t) and a KV cache to logits (b t v).
        tokenizer: has `encode`, `decode` and `eos_id`, the id of the end token or None.
        prompts: beginnings of the texts.
        stops: stop strings; a text ends before the first one.
        on_text: called with each new piece of the first text.
        kwargs: max_new_tokens, context_length and further arguments of `generate`.
    """
    if "" in stops:
        raise UsageError(
            "generate: a stop string is empty",
            ["a text of one character or more"],
            "remove stop, or use stop='\\n\\n'",
            flag="--stop='\\n\\n'",
        )
    stop_sequences = [tokenizer.encode(stop).tolist() for stop in stops]
    if tokenizer.eos_id is not None:  # the end token ends a text, too
        stop_sequences.append([tokenizer.eos_id])
    prompt_tokens = [tokenizer.encode(prompt) for prompt in prompts]
    tokens = torch.empty(len(prompts), 0, dtype=torch.int64)
    texts, num_emitted = [""] * len(prompts), 0
    # a chunk has tokens and mask (b c) of the next c steps; all steps so far are decoded anew
    for chunk in generate_stream(
        net, prompt_tokens, stops=stop_sequences, sync_every=1 if on_text else SYNC_EVERY, **kwargs
    ):
        new_tokens = chunk.tokens.masked_fill(~chunk.mask, -1).cpu()  # -1 after the end
        tokens = torch.cat((tokens, new_tokens), 1)
        full_texts = [
            tokenizer.decode([n for n in row if n not in (-1, tokenizer.eos_id)])
            for row in tokens.tolist()
        ]
        texts = [truncate_at_stop(text, stops) for text in full_texts]
        has_stopped = [len(text) < len(full) for text, full in zip(texts, full_texts, strict=True)]
        if on_text:  # emit only characters that the next token cannot change
            # stable_prefix leaves out a partial character and the beginning of a stop string
            final_part = texts[0] if has_stopped[0] else stable_prefix(texts[0], stops)
            on_text(final_part[num_emitted:])
            num_emitted = max(num_emitted, len(final_part))
        if all(has_stopped):
            break
    if on_text:  # the rest, if the text has ended without a stop string
        on_text(texts[0][num_emitted:])
    return texts


def truncate_at_stop(text: str, stops: Sequence[str]) -> str:
    """Return the text before the first stop string."""
    return text[: min((index for stop in stops if (index := text.find(stop)) >= 0), default=None)]


def stable_prefix(text: str, stops: Sequence[str]) -> str:
    """Return the text without an end that the next token can change.

    Such an end is an incomplete character or the beginning of a stop string.
    """
    text = text.rstrip("\ufffd")  # the replacement character: bytes of an incomplete character
    partial_stops = [stop[:size] for stop in stops for size in range(1, len(stop))]
    return text[
        : len(text)
        - max(
            (len(partial_stop) for partial_stop in partial_stops if text.endswith(partial_stop)),
            default=0,
        )
    ]


def pad_sequences_for_scoring(prompts: Sequence[Tensor], tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Return right-padded texts (b t) of prompts and new tokens, and the logit positions (b n).

    The logits at these positions predict the new tokens (b n). The last new token is left out of
    the
    text: no prediction follows it.
    """
    prompt_lengths = torch.tensor([len(prompt) for prompt in prompts])
    text = nn.utils.rnn.pad_sequence([prompt.cpu() for prompt in prompts], True)  # (b p)
    text = nn.functional.pad(text, (0, tokens.shape[1])).to(tokens)
    columns = (prompt_lengths[:, None] + torch.arange(tokens.shape[1])).to(tokens.device)  # (b n)
    return text.scatter(1, columns, tokens)[:, :-1], columns - 1


def sequence_logprobs(
    net: Callable[[Tensor], Tensor],
    prompts: Sequence[Tensor],
    generated: GenerationOutput,
    sampling: DecodingConfig | None = None,
) -> Tensor:
    """Compute the logprobs (b n) of generated tokens in one forward pass, with gradients.

    For texts that fit into the context, the values equal those of `generate` up to rounding. They
    are 0 after the end.
    """
    text, positions = pad_sequences_for_scoring(prompts, generated.tokens)
    logits = net(text)[torch.arange(len(text), device=text.device)[:, None], positions]  # (b n v)
    return gather_logprobs(logits, generated.tokens, generated.mask, sampling or DecodingConfig())


def gather_logprobs(
    logits: Tensor, tokens: Tensor, mask: Tensor, sampling: DecodingConfig
) -> Tensor:
    """Select the logprobs of tokens (b n) from logits (b n v); 0 where the mask is false."""
    logprobs = sampling.compute_logprobs(logits, never_mask=tokens)  # (b n v)
    logprobs = logprobs.gather(-1, tokens[..., None])[..., 0]  # (b n)
    return logprobs.where(mask, 0.0)


@contextmanager
def eval_mode(net: nn.Module) -> Iterator[None]:
    """Disable dropout and run a compiled net eagerly: each new prompt length would recompile it."""
    modes = [(module, module.training) for module in net.modules()]
    net.eval()
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def _check_finite(state: SamplerState) -> None:
    broken_rows = (~state.logprobs.isfinite()).any(1).nonzero()[:, 0].tolist()
    if broken_rows:
        raise RunError(
            f"generate: the net returned NaN for text {broken_rows[0]}, because its weights or "
            "activations are not finite",
            ["finite weights"],
            "use an earlier checkpoint, or add NaNGuard() to Trainer(callbacks=...) to find the "
            "first such step",
        )
