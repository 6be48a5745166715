"""Generation: read the prompts once, then draw token after token, each from all before it.

    prompts of different lengths -> tokens, log-probabilities, mask; all (b n), on the net's device

Sampling a text and rolling out a policy are this one function. The host never waits for a token:
what is drawn, where a row stands and whether it has stopped live on the device, and the host looks
every 32 steps. What it must know without looking (lengths) it can count itself.

Axes: b batch, n new tokens, v vocabulary.
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ravine.errors import RunError

from .cuda_graphs import CaptureFn, GraphedCallable
from .decoding import CachedDecoder, Decoder, TokenBuffer, Window
from .kv_cache import BUCKET_SIZE
from .sampling import Sampling, row_uniforms

SYNC_EVERY = 32  # steps between two looks of the host


class GenerationOutput(NamedTuple):
    """What was written after each prompt; all (b n)."""

    tokens: Tensor  # 0 after the end
    log_probabilities: Tensor  # in fp32, of the distribution that was drawn from; 0 after the end
    mask: Tensor  # true up to the end, the stop itself included


class SamplerState:
    """Draws tokens and keeps the record; every buffer lives on the device."""

    def __init__(
        self,
        token_buffer: TokenBuffer,
        sampling: Sampling,
        stops: Sequence[Sequence[int]],
        uniform: Tensor,
    ) -> None:
        """Start with nothing written; uniform (b n) decides every draw."""
        device = token_buffer.tokens.device
        self.token_buffer, self.sampling = token_buffer, sampling
        self.uniform = uniform.to(device, torch.float32 if device.type == "mps" else None)
        self.stops = [torch.tensor(list(stop), device=device) for stop in stops]
        self.step_index = torch.zeros(1, dtype=torch.int64, device=device)
        self.active = torch.ones(len(token_buffer.lengths), dtype=torch.bool, device=device)
        self.tokens = torch.zeros_like(uniform, dtype=torch.int64, device=device)
        self.logprobs = torch.zeros_like(uniform, dtype=torch.float32, device=device)
        self.mask = torch.zeros_like(uniform, dtype=torch.bool, device=device)

    def sample_next(self, logits: Tensor) -> None:
        """Choose one token a row from logits (b v)."""
        logprobs = self.sampling.log_probabilities(logits)
        token = self.sampling.sample(logprobs, self.uniform.index_select(1, self.step_index)[:, 0])
        logprob = logprobs.gather(1, token[:, None])[:, 0]
        token, logprob = token * self.active, logprob.where(self.active, 0.0).float()
        for buffer, value in (
            (self.tokens, token),
            (self.logprobs, logprob),
            (self.mask, self.active),
        ):
            buffer.index_copy_(1, self.step_index, value[:, None])
        self.token_buffer.append_token(token)
        self.step_index += 1
        for stop in self.stops:
            offsets = torch.arange(len(stop), 0, -1, device=stop.device)
            positions = (self.token_buffer.device_lengths[:, None] - offsets).clamp(
                min=0
            )  # (b, len(stop))
            tail = self.token_buffer.tokens.gather(1, positions)
            self.active &= ~((tail == stop).all(-1) & (self.step_index >= len(stop)))

    def slice_columns(self, first: int, last: int) -> GenerationOutput:
        """Columns first .. last-1."""
        return GenerationOutput(
            *(x[:, first:last] for x in (self.tokens, self.logprobs, self.mask))
        )


@torch.no_grad()
def generate_stream(
    net: nn.Module,
    prompts: Sequence[Tensor],
    max_new_tokens: int,
    context_length: int,
    sampling: Sampling | None = None,
    stops: Sequence[Sequence[int]] = (),
    seed: int = 0,
    row_keys: Sequence[Hashable] | None = None,
    context_overflow: Window = "slide",
    use_cache: bool = True,
    sync_every: int = SYNC_EVERY,
    capture: CaptureFn | None = None,
) -> Iterator[GenerationOutput]:
    """Hand out what `generate` writes as the host looks at it, every `sync_every` tokens."""
    sampling = sampling or Sampling()
    device = next(net.parameters()).device
    token_buffer = TokenBuffer(prompts, max_new_tokens, context_length, context_overflow, device)
    uniform = row_uniforms(seed, row_keys or range(len(prompts)), max_new_tokens)
    state = SamplerState(token_buffer, sampling, stops, uniform)
    bucket_size = BUCKET_SIZE if capture else 1
    decoder = (
        CachedDecoder(net, token_buffer, bucket_size) if use_cache else Decoder(net, token_buffer)
    )
    num_yielded = 0
    run_step = GraphedCallable(
        lambda: state.sample_next(decoder.decode_step()), capture if use_cache else None
    )
    with eval_mode(net):
        for step in range(max_new_tokens):
            if step:
                run_step(decoder.prepare_step(token_buffer.advance_lengths()))
            else:
                logits = decoder.prefill()
                sampling.check_vocab_size(logits.shape[-1])
                state.sample_next(logits)
            if (step + 1) % sync_every == 0 or step + 1 == max_new_tokens:
                _check_finite(state)
                yield state.slice_columns(num_yielded, step + 1)
                num_yielded = step + 1
                if not bool(state.active.any()):
                    return


def generate(
    net: nn.Module,
    prompts: Sequence[Tensor],
    max_new_tokens: int,
    context_length: int,
    sampling: Sampling | None = None,
    stops: Sequence[Sequence[int]] = (),
    seed: int = 0,
    row_keys: Sequence[Hashable] | None = None,
    context_overflow: Window = "slide",
    use_cache: bool = True,
    sync_every: int = SYNC_EVERY,
    capture: CaptureFn | None = None,
) -> GenerationOutput:
    """Write up to `max_new_tokens` tokens after each prompt (a vector of tokens; lengths may
    differ).

    written = generate(net, [tokenizer.encode("ROMEO:")], new=100, context=64)

    Args:
        net: logits (b t v) of tokens (b t); with a cache as its second argument unless not cached.
        prompts: the beginnings, one a row.
        max_new_tokens: most tokens to write.
        context_length: most tokens the net sees.
        sampling: how to draw; by default from the net's own distribution.
        stops: token sequences that end a text.
        seed: with the key of a text it decides the text.
        row_keys: keys of the rows, such as their numbers in a data set; by default 0, 1, 2, ...
        context_overflow: slide when the context is full, or refuse beforehand.
        use_cache: read each token once.
        sync_every: steps between two looks whether all have stopped.
        capture: how to record a step, sampling included, to replay it: `replay.capture_cuda_graph`.
    """
    options = (sampling, stops, seed, row_keys, context_overflow, use_cache, sync_every, capture)
    chunks = list(generate_stream(net, prompts, max_new_tokens, context_length, *options))
    num_missing = max_new_tokens - sum(chunk.tokens.shape[1] for chunk in chunks)
    columns = (torch.cat(column, 1) for column in zip(*chunks, strict=True))
    return GenerationOutput(*(nn.functional.pad(x, (0, num_missing)) for x in columns))


def pad_sequences_for_scoring(prompts: Sequence[Tensor], tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Whole texts (b t), right-padded, and the places (b n) whose logits are for new tokens (b n).

    The last new token is left out: nothing is predicted after it.
    """
    prompt_lengths = torch.tensor([len(prompt) for prompt in prompts])
    text = nn.utils.rnn.pad_sequence([prompt.cpu() for prompt in prompts], True)  # (b p)
    text = nn.functional.pad(text, (0, tokens.shape[1])).to(tokens)
    columns = (prompt_lengths[:, None] + torch.arange(tokens.shape[1])).to(tokens.device)  # (b n)
    return text.scatter(1, columns, tokens)[:, :-1], columns - 1


def score(
    net: Callable[[Tensor], Tensor],
    prompts: Sequence[Tensor],
    generated: GenerationOutput,
    sampling: Sampling | None = None,
) -> Tensor:
    """Log-probabilities (b n) of what was written, in one pass over the texts, with gradients.

    For texts that fit the context: the same numbers as `generate` gave, up to rounding; 0 after
    the end.
    """
    text, positions = pad_sequences_for_scoring(prompts, generated.tokens)
    logits = net(text)[torch.arange(len(text), device=text.device)[:, None], positions]  # (b n v)
    return gather_logprobs(logits, generated.tokens, generated.mask, sampling or Sampling())


def gather_logprobs(logits: Tensor, tokens: Tensor, mask: Tensor, sampling: Sampling) -> Tensor:
    """Log-probabilities of tokens (b n) where the mask is true, 0 elsewhere, of logits (b n v)."""
    logprobs = sampling.log_probabilities(logits, never_mask=tokens)  # (b n v)
    logprobs = logprobs.gather(-1, tokens[..., None])[..., 0]  # (b n)
    return logprobs.where(mask, 0.0)


@contextmanager
def eval_mode(net: nn.Module) -> Iterator[None]:
    """Switch dropout off, and a compiled net to eager: a prompt of each length would recompile."""
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
            f"the net gives NaN after text {broken_rows[0]}: its weights or activations are "
            "damaged; "
            "take an earlier checkpoint, or train with the NaNGuard callback to see where it began"
        )
