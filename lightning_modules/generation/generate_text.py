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

from .cuda_graphs import Capture, Replay
from .decoding import CachedReader, Page, Reader, Window
from .kv_cache import BUCKET
from .sampling import Sampling, uniforms

LOOK = 32  # steps between two looks of the host


class Generated(NamedTuple):
    """What was written after each prompt; all (b n)."""

    tokens: Tensor  # 0 after the end
    log_probabilities: Tensor  # in fp32, of the distribution that was drawn from; 0 after the end
    mask: Tensor  # true up to the end, the stop itself included


class Pen:
    """Draws tokens and keeps the record; every buffer lives on the device."""

    def __init__(
        self, page: Page, sampling: Sampling, stops: Sequence[Sequence[int]], uniform: Tensor
    ) -> None:
        """Start with nothing written; uniform (b n) decides every draw."""
        device = page.text.device
        self.page, self.sampling = page, sampling
        self.uniform = uniform.to(device, torch.float32 if device.type == "mps" else None)
        self.stops = [torch.tensor(list(stop), device=device) for stop in stops]
        self.column = torch.zeros(1, dtype=torch.int64, device=device)
        self.live = torch.ones(len(page.lengths), dtype=torch.bool, device=device)
        self.tokens = torch.zeros_like(uniform, dtype=torch.int64, device=device)
        self.scores = torch.zeros_like(uniform, dtype=torch.float32, device=device)
        self.mask = torch.zeros_like(uniform, dtype=torch.bool, device=device)

    def draw(self, logits: Tensor) -> None:
        """Choose one token a row from logits (b v)."""
        scores = self.sampling.log_probabilities(logits)
        token = self.sampling.choose(scores, self.uniform.index_select(1, self.column)[:, 0])
        score = scores.gather(1, token[:, None])[:, 0]
        token, score = token * self.live, score.where(self.live, 0.0).float()
        for buffer, value in ((self.tokens, token), (self.scores, score), (self.mask, self.live)):
            buffer.index_copy_(1, self.column, value[:, None])
        self.page.append(token)
        self.column += 1
        for stop in self.stops:
            back = torch.arange(len(stop), 0, -1, device=stop.device)
            places = (self.page.length[:, None] - back).clamp(min=0)  # (b, len(stop))
            tail = self.page.text.gather(1, places)
            self.live &= ~((tail == stop).all(-1) & (self.column >= len(stop)))

    def record(self, first: int, last: int) -> Generated:
        """Columns first .. last-1."""
        return Generated(*(x[:, first:last] for x in (self.tokens, self.scores, self.mask)))


@torch.no_grad()
def stream(
    net: nn.Module,
    prompts: Sequence[Tensor],
    new: int,
    context: int,
    sampling: Sampling | None = None,
    stops: Sequence[Sequence[int]] = (),
    seed: int = 0,
    texts: Sequence[Hashable] | None = None,
    window: Window = "slide",
    cached: bool = True,
    look: int = LOOK,
    capture: Capture | None = None,
) -> Iterator[Generated]:
    """Hand out what `generate` writes as the host looks at it, every `look` tokens."""
    sampling = sampling or Sampling()
    device = next(net.parameters()).device
    page = Page(prompts, new, context, window, device)
    uniform = uniforms(seed, texts or range(len(prompts)), new)
    pen = Pen(page, sampling, stops, uniform)
    bucket = BUCKET if capture else 1
    reader = CachedReader(net, page, bucket) if cached else Reader(net, page)
    shown = 0
    advance = Replay(lambda: pen.draw(reader.newest()), capture if cached else None)
    with evaluating(net):
        for step in range(new):
            if step:
                advance(reader.turn(page.count()))
            else:
                logits = reader.prompt()
                sampling.check(logits.shape[-1])
                pen.draw(logits)
            if (step + 1) % look == 0 or step + 1 == new:
                _sound(pen)
                yield pen.record(shown, step + 1)
                shown = step + 1
                if not bool(pen.live.any()):
                    return


def generate(
    net: nn.Module,
    prompts: Sequence[Tensor],
    new: int,
    context: int,
    sampling: Sampling | None = None,
    stops: Sequence[Sequence[int]] = (),
    seed: int = 0,
    texts: Sequence[Hashable] | None = None,
    window: Window = "slide",
    cached: bool = True,
    look: int = LOOK,
    capture: Capture | None = None,
) -> Generated:
    """Write up to `new` tokens after each prompt (a vector of tokens; lengths may differ).

    written = generate(net, [tokenizer.encode("ROMEO:")], new=100, context=64)

    Args:
        net: logits (b t v) of tokens (b t); with a cache as its second argument unless not cached.
        prompts: the beginnings, one a row.
        new: most tokens to write.
        context: most tokens the net sees.
        sampling: how to draw; by default from the net's own distribution.
        stops: token sequences that end a text.
        seed: with the key of a text it decides the text.
        texts: keys of the rows, such as their numbers in a data set; by default 0, 1, 2, ...
        window: slide when the context is full, or refuse beforehand.
        cached: read each token once.
        look: steps between two looks whether all have stopped.
        capture: how to record a step, sampling included, to replay it: `replay.cuda_graph`.
    """
    how = (sampling, stops, seed, texts, window, cached, look, capture)
    parts = list(stream(net, prompts, new, context, *how))
    missing = new - sum(part.tokens.shape[1] for part in parts)
    whole = (torch.cat(column, 1) for column in zip(*parts, strict=True))
    return Generated(*(nn.functional.pad(x, (0, missing)) for x in whole))


def lay_out(prompts: Sequence[Tensor], tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Whole texts (b t), right-padded, and the places (b n) whose logits are for new tokens (b n).

    The last new token is left out: nothing is predicted after it.
    """
    sizes = torch.tensor([len(prompt) for prompt in prompts])
    text = nn.utils.rnn.pad_sequence([prompt.cpu() for prompt in prompts], True)  # (b p)
    text = nn.functional.pad(text, (0, tokens.shape[1])).to(tokens)
    columns = (sizes[:, None] + torch.arange(tokens.shape[1])).to(tokens.device)  # (b n)
    return text.scatter(1, columns, tokens)[:, :-1], columns - 1


def score(
    net: Callable[[Tensor], Tensor],
    prompts: Sequence[Tensor],
    written: Generated,
    sampling: Sampling | None = None,
) -> Tensor:
    """Log-probabilities (b n) of what was written, in one pass over the texts, with gradients.

    For texts that fit the context: the same numbers as `generate` gave, up to rounding; 0 after
    the end.
    """
    text, places = lay_out(prompts, written.tokens)
    logits = net(text)[torch.arange(len(text), device=text.device)[:, None], places]  # (b n v)
    return chosen(logits, written.tokens, written.mask, sampling or Sampling())


def chosen(logits: Tensor, tokens: Tensor, mask: Tensor, sampling: Sampling) -> Tensor:
    """Log-probabilities of tokens (b n) where the mask is true, 0 elsewhere, of logits (b n v)."""
    scores = sampling.log_probabilities(logits, keep=tokens)  # (b n v)
    scores = scores.gather(-1, tokens[..., None])[..., 0]  # (b n)
    return scores.where(mask, 0.0)


@contextmanager
def evaluating(net: nn.Module) -> Iterator[None]:
    """Switch dropout off, and a compiled net to eager: a prompt of each length would recompile."""
    modes = [(module, module.training) for module in net.modules()]
    net.eval()
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def _sound(pen: Pen) -> None:
    broken = (~pen.scores.isfinite()).any(1).nonzero()[:, 0].tolist()
    if broken:
        raise RunError(
            f"the net gives NaN after text {broken[0]}: its weights or activations are damaged; "
            "take an earlier checkpoint, or train with the NaNGuard callback to see where it began"
        )
