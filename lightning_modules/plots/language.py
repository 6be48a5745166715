"""What a language model has learned, drawn: probabilities, bigrams, attention (lecture 5).

Each function takes a net on any device and returns a matplotlib figure.

Axes: b batch, t time, d model, h heads, v vocabulary.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..generation.generate_text import evaluating
from ..nn.transformer import Transformer

if TYPE_CHECKING:  # matplotlib takes half a second, and few runs draw
    from matplotlib.figure import Figure

TEMPERATURES = (0.2, 0.5, 0.8, 1.0, 1.5)  # the lecture's
SHOWN = 20  # tokens of a distribution
INK, ACCENT = "#1f4e79", "#c55a11"


def _figure(rows: int, columns: int, width: float, height: float) -> Any:
    from matplotlib.figure import Figure  # not pyplot: no window, no global state

    figure = Figure(figsize=(width, height), layout="constrained", dpi=120)
    return figure, figure.subplots(rows, columns, squeeze=False)


def label(token: str) -> str:
    """A token as one can read it: spaces and line breaks become visible."""
    return token.replace(" ", "␣").replace("\n", "↵").replace("\t", "⇥") or "∅"


@torch.no_grad()
def temperatures(net: Transformer, tokens: Tensor, names: Sequence[str], prompt: str) -> "Figure":
    """Probabilities of the next token after tokens (t), at the lecture's five temperatures."""
    with evaluating(net):
        logits = net(tokens[None])[0, -1].float()  # (v)
    best = logits.topk(min(SHOWN, len(logits))).indices
    figure, axes = _figure(len(TEMPERATURES), 1, 8, 9)
    for axis, temperature in zip(axes[:, 0], TEMPERATURES, strict=True):
        probabilities = (logits / temperature).softmax(-1)[best]
        axis.bar(range(len(best)), probabilities.cpu().numpy(), color=INK, width=0.7)
        axis.set_ylim(0, 1)
        axis.set_ylabel(f"T = {temperature}")
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_xticks(range(len(best)), [label(names[int(i)]) for i in best], family="monospace")
    figure.suptitle(f"the next token after {prompt!r}")
    return figure


@torch.no_grad()
def bigrams(net: Transformer, text: Tensor, names: Sequence[str]) -> "Figure":
    """What follows each token: as the net says, and as counted in a text (n)."""
    v = net.vocabulary
    counts = torch.zeros(v, v, dtype=torch.float64)
    text = text.long().cpu()
    counts.index_put_((text[:-1], text[1:]), torch.ones(1, dtype=torch.float64), True)
    often = counts.sum(1)
    counted = counts / often.clamp(min=1)[:, None]
    with evaluating(net):
        device = next(net.parameters()).device
        alone = torch.arange(v, device=device)[:, None]  # (b 1)
        learned = net(alone)[:, 0].softmax(-1).double().cpu()  # (v v)
    figure, axes = _figure(1, 3, 15, 5)
    for axis, table, title in zip(
        axes[0], (counted, learned), ("counted", "learned"), strict=False
    ):
        axis.imshow(table.clamp(min=1e-4).log10().numpy(), cmap="viridis", vmin=-4, vmax=0)
        axis.set_title(f"log10 p(next | last), {title}")
        axis.set_xticks(range(v), map(label, names), fontsize=4)
        axis.set_yticks(range(v), map(label, names), fontsize=4)
    seen = often > 100
    axis = axes[0, 2]
    axis.plot([0, 1], [0, 1], color=ACCENT, linewidth=1)
    axis.scatter(counted[seen].numpy(), learned[seen].numpy(), s=4, color=INK)
    axis.set(xlabel="share counted in the text", ylabel="probability learned")
    right = (counted.argmax(1) == learned.argmax(1))[seen].double().mean()
    off = ((counted - learned).abs().sum(1) * often).sum() / often.sum() / 2
    axis.set_title(f"most frequent successor right: {right:.0%}\nmass misplaced: {off:.1%}")
    axis.spines[["top", "right"]].set_visible(False)
    return figure


@torch.no_grad()
def attention(net: Transformer, tokens: Tensor, names: Sequence[str]) -> "Figure":
    """What each of tokens (t) takes from which, for every layer and at most four heads."""
    seen: list[Tensor] = []
    blocks: dict[str, Any] = dict(net.blocks.items())  # a stage of a pipeline has some
    hooks = [
        block.attention.register_forward_pre_hook(
            lambda module, inputs: seen.append(module.weights(inputs[0])[0].float().cpu())
        )
        for block in blocks.values()
    ]
    try:
        with evaluating(net):
            net(tokens[None])
    finally:
        for hook in hooks:
            hook.remove()
    heads = min(4, len(seen[0]))
    figure, axes = _figure(len(seen), heads, 4.5 * heads + 1, 4.5 * len(seen))
    words = [label(names[int(token)]) for token in tokens]
    for row, (layer, weights) in enumerate(zip(blocks, seen, strict=True)):
        for head in range(heads):
            axis = axes[row, head]
            axis.imshow(
                weights[head].numpy(), cmap="magma", vmin=0, vmax=float(weights[head].max())
            )
            axis.set_title(f"layer {layer}, head {head}", fontsize=9)
            axis.set_xticks(range(len(words)), words, fontsize=7, family="monospace")
            axis.set_yticks(range(len(words)), words, fontsize=7, family="monospace")
    figure.supxlabel("is listened to")
    figure.supylabel("listens")
    return figure
