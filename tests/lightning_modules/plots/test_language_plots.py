"""Figures show the values of the net: the drawn numbers are read back."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ravine.callbacks import SaveFigures
from ravine.lightning_modules import LanguageModel
from ravine.lightning_modules.nn import Transformer
from ravine.lightning_modules.plots import language

NAMES = list("ab \n")


def make_net(**shape: Any) -> Transformer:
    torch.manual_seed(0)
    shape = {"num_layers": 2, "d_model": 8, "num_heads": 2, "zero_init_residual": False} | shape
    return Transformer(len(NAMES), 6, **shape)


def test_bars_are_the_probabilities_at_five_temperatures() -> None:
    net, tokens = make_net(), torch.tensor([0, 1, 2])
    figure = language.plot_temperatures(net, tokens, NAMES, "ab ")
    logits = net(tokens[None])[0, -1].sort(descending=True)
    for axis, temperature in zip(figure.axes, (0.2, 0.5, 0.8, 1.0, 1.5), strict=True):
        heights = torch.tensor([float(bar.get_height()) for bar in axis.patches])
        torch.testing.assert_close(heights, (logits.values / temperature).softmax(-1))
        words = [text.get_text() for text in axis.get_xticklabels()]
        assert words == [language.printable_token(NAMES[i]) for i in logits.indices.tolist()]
    assert language.printable_token(" \n") == "␣↵"


def test_the_bigram_match_of_a_net_that_knows_the_bigrams_is_complete() -> None:
    text = torch.tensor([0, 1, 2, 0, 1, 3] * 200, dtype=torch.uint8)
    net = make_net(
        attention_variant="identity",
        residual=False,
        activation="none",
        num_layers=1,
        norm="none",
        out_proj=False,
    )
    counts = torch.zeros(4, 4)
    counts.index_put_((text[:-1].long(), text[1:].long()), torch.ones(1), accumulate=True)
    with torch.no_grad():
        net.embed.weight.copy_(torch.eye(4, 8))
        net.head.weight.zero_()[:, :4] = (counts / counts.sum(1, True)).clamp(min=1e-9).log().T
    figure = language.plot_bigrams(net, text, NAMES)
    assert figure.axes[2].get_title() == "most frequent successor right: 100%\nmass misplaced: 0.0%"
    a, b = (axis.images[0].get_array() for axis in figure.axes[:2])
    assert abs(a - b).max() < 1e-3
    with torch.no_grad():
        net.head.weight.zero_()
    assert "mass misplaced: 0.0%" not in language.plot_bigrams(net, text, NAMES).axes[2].get_title()


def test_a_heat_map_is_drawn_for_each_layer_and_head() -> None:
    net, tokens = make_net(), torch.tensor([0, 1, 2, 3, 0])
    figure = language.plot_attention(net, tokens, NAMES)
    maps = torch.stack([torch.tensor(axis.images[0].get_array().tolist()) for axis in figure.axes])
    assert maps.shape == (4, 5, 5)
    torch.testing.assert_close(maps.sum(-1), torch.ones(4, 5))
    x = net.blocks["0"].attention_norm(net.embed(tokens)[None])
    torch.testing.assert_close(maps[:2], net.blocks["0"].attention.compute_weights(x)[0].detach())


def test_files_are_named_after_their_config(tmp_path: Path) -> None:
    from ravine.datamodules import TextDataModule

    (tmp_path / "text.txt").write_text("to be or not to be " * 20)
    data = TextDataModule(tmp_path / "text.txt", context_length=8)
    data.setup("fit")
    model = LanguageModel(num_layers=1, d_model=8, num_heads=1, attention_variant="identity")
    model.configure_from_data(data)
    model.configure_model()
    folder = tmp_path / "bigram" / "version_0"
    folder.mkdir(parents=True)
    trainer: Any = SimpleNamespace(
        log_dir=str(folder), datamodule=data, is_global_zero=True, loggers=[]
    )
    SaveFigures().on_train_end(trainer, model)
    assert sorted(path.name for path in folder.iterdir()) == [
        "bigram_attention.png",
        "bigram_bigrams.png",
        "bigram_temperatures.png",
    ]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in folder.iterdir())


def test_a_module_without_figures_is_refused() -> None:
    import lightning as L

    class Foreign(L.LightningModule):
        pass

    with pytest.raises(
        ValueError, match=r"Foreign has no method make_figures; .*remove SaveFigures\(\) from"
    ):
        SaveFigures().setup(L.Trainer(logger=False), Foreign(), "fit")
