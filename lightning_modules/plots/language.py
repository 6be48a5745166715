"""Figures of a language model: next-token probabilities, bigrams and attention weights (lecture 5).

Each function takes a net on any device and returns a matplotlib figure.

Axes: b batch, t time, d model, h heads, v vocabulary.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..generation.generate_text import eval_mode
from ..nn.transformer import Transformer

if TYPE_CHECKING:  # importing matplotlib takes half a second, and few runs plot
    from matplotlib.figure import Figure

TEMPERATURES = (0.2, 0.5, 0.8, 1.0, 1.5)  # those of the lecture
NUM_TOKENS_SHOWN = 20  # most probable tokens of a distribution
PRIMARY_COLOR, ACCENT_COLOR = "#1f4e79", "#c55a11"


def _make_figure(rows: int, columns: int, width: float, height: float) -> Any:
    from matplotlib.figure import Figure  # not pyplot: no window, no global state

    figure = Figure(figsize=(width, height), layout="constrained", dpi=120)
    return figure, figure.subplots(rows, columns, squeeze=False)


def printable_token(token: str) -> str:
    """Return a token with visible spaces and line breaks."""
    return token.replace(" ", "␣").replace("\n", "↵").replace("\t", "⇥") or "∅"


@torch.no_grad()
def plot_temperatures(
    net: Transformer, tokens: Tensor, token_names: Sequence[str], prompt: str
) -> "Figure":
    """Plot next-token probabilities after tokens (t), at the lecture's five temperatures.

    `token_names` has the text of each token of the vocabulary; `prompt` is the text of `tokens`.
    """
    with eval_mode(net):  # without dropout
        logits = net(tokens[None])[0, -1].float()  # (v)
    best = logits.topk(min(NUM_TOKENS_SHOWN, len(logits))).indices
    figure, axes = _make_figure(len(TEMPERATURES), 1, 8, 9)  # rows, columns, width, height
    for axis, temperature in zip(axes[:, 0], TEMPERATURES, strict=True):
        probabilities = (logits / temperature).softmax(-1)[best]
        axis.bar(range(len(best)), probabilities.cpu().numpy(), color=PRIMARY_COLOR, width=0.7)
        axis.set_ylim(0, 1)
        axis.set_ylabel(f"T = {temperature}")
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_xticks(
            range(len(best)),
            [printable_token(token_names[int(i)]) for i in best],
            family="monospace",
        )
    figure.suptitle(f"the next token after {prompt!r}")
    return figure


@torch.no_grad()
def plot_bigrams(net: Transformer, tokens: Tensor, token_names: Sequence[str]) -> "Figure":
    """Plot the probabilities of each token's successors: counted in a text, and those of a net.

    The third panel compares them for frequent tokens. `tokens` (n) is the text, `token_names` has
    the text of each token of the vocabulary.
    """
    vocab_size = net.vocab_size
    counts = torch.zeros(vocab_size, vocab_size, dtype=torch.float64)
    tokens = tokens.long().cpu()
    one = torch.ones(1, dtype=torch.float64)
    counts.index_put_((tokens[:-1], tokens[1:]), one, accumulate=True)
    token_counts = counts.sum(1)
    counted_probs = counts / token_counts.clamp(min=1)[:, None]
    with eval_mode(net):
        device = next(net.parameters()).device
        single_tokens = torch.arange(vocab_size, device=device)[:, None]  # (b 1)
        learned_probs = net(single_tokens)[:, 0].softmax(-1).double().cpu()  # (v v)
    figure, axes = _make_figure(1, 3, 15, 5)  # rows, columns, width, height
    panels = (counted_probs, "counted"), (learned_probs, "learned")
    for axis, (probs, title) in zip(axes[0, :2], panels, strict=True):
        # colors from 1e-4 to 1; log10 of 0 is not finite
        axis.imshow(probs.clamp(min=1e-4).log10().numpy(), cmap="viridis", vmin=-4, vmax=0)
        axis.set_title(f"log10 p(next | last), {title}")
        axis.set_xticks(range(vocab_size), map(printable_token, token_names), fontsize=4)
        axis.set_yticks(range(vocab_size), map(printable_token, token_names), fontsize=4)
    is_frequent = token_counts > 100  # the counted share of a rare token is noise
    axis = axes[0, 2]
    axis.plot([0, 1], [0, 1], color=ACCENT_COLOR, linewidth=1)
    axis.scatter(
        counted_probs[is_frequent].numpy(),
        learned_probs[is_frequent].numpy(),
        s=4,
        color=PRIMARY_COLOR,
    )
    axis.set(xlabel="share counted in the text", ylabel="probability learned")
    top1_agreement = (
        (counted_probs.argmax(1) == learned_probs.argmax(1))[is_frequent].double().mean()
    )
    # half the sum of absolute differences, weighted by how often a token occurs
    misplaced_mass = (
        ((counted_probs - learned_probs).abs().sum(1) * token_counts).sum() / token_counts.sum() / 2
    )
    axis.set_title(
        f"most frequent successor right: {top1_agreement:.0%}\nmass misplaced: {misplaced_mass:.1%}"
    )
    axis.spines[["top", "right"]].set_visible(False)
    return figure


@torch.no_grad()
def plot_attention(net: Transformer, tokens: Tensor, token_names: Sequence[str]) -> "Figure":
    """Plot the attention weights of tokens (t), for every layer and at most four heads.

    `token_names` has the text of each token of the vocabulary.
    """
    layer_weights: list[Tensor] = []  # (h t t) of each layer, filled by the hooks
    blocks: dict[str, Any] = dict(net.blocks.items())  # a pipeline stage has only some blocks
    # a hook gets the input (1 t d) of an attention; compute_weights returns (1 h t t)
    hooks = [
        block.attention.register_forward_pre_hook(
            lambda module, inputs: layer_weights.append(
                module.compute_weights(inputs[0])[0].float().cpu()
            )
        )
        for block in blocks.values()
    ]
    try:
        with eval_mode(net):
            net(tokens[None])
    finally:
        for hook in hooks:
            hook.remove()
    num_heads = min(4, len(layer_weights[0]))
    figure, axes = _make_figure(
        len(layer_weights), num_heads, 4.5 * num_heads + 1, 4.5 * len(layer_weights)
    )
    token_labels = [printable_token(token_names[int(token)]) for token in tokens]
    for row, (layer, weights) in enumerate(zip(blocks, layer_weights, strict=True)):
        for head in range(num_heads):
            axis = axes[row, head]
            axis.imshow(
                weights[head].numpy(), cmap="magma", vmin=0, vmax=float(weights[head].max())
            )
            axis.set_title(f"layer {layer}, head {head}", fontsize=9)
            axis.set_xticks(range(len(token_labels)), token_labels, fontsize=7, family="monospace")
            axis.set_yticks(range(len(token_labels)), token_labels, fontsize=7, family="monospace")
    figure.supxlabel("key position")
    figure.supylabel("query position")
    return figure
