"""The U-Net equals that of the lecture and accepts images of any size."""

import itertools
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from ravine.lightning_modules.nn.unet import (
    SpatialSelfAttention,
    UNet,
    save_pretrained,
    timestep_embedding,
)


def count(net: torch.nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def written_out(net: UNet, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The lecture's net, at a size that needs no padding, by its weights alone."""
    w = net.state_dict()

    def of(name: str) -> tuple[torch.Tensor, torch.Tensor]:
        return w[f"{name}.weight"], w[f"{name}.bias"]

    def part(name: str, x: torch.Tensor, number: int) -> torch.Tensor:
        h = F.conv2d(x, *of(f"{name}.conv{number}"), padding=1)
        return F.silu(F.group_norm(h, 8, *of(f"{name}.norm{number}")))

    def block(name: str, x: torch.Tensor) -> torch.Tensor:
        name = f"blocks.{name}"
        h = part(name, x, 1) + F.linear(embedding, *of(f"{name}.time_proj"))[:, :, None, None]
        other = f"{name}.shortcut" if f"{name}.shortcut.weight" in w else ""
        return part(name, h, 2) + (F.conv2d(x, *of(other)) if other else x)

    embedding = F.linear(timestep_embedding(t, net.time_embed_dim).to(x), *of("time_mlp.0"))
    embedding = F.linear(F.silu(embedding), *of("time_mlp.2")) + w["class_embed.weight"][y]
    full = block("down1", x)
    half = block("down2", F.conv2d(full, *of("blocks.downsample1"), stride=2, padding=1))
    h = block("down3", F.conv2d(half, *of("blocks.downsample2"), stride=2, padding=1))
    h = F.conv_transpose2d(block("mid", h), *of("blocks.upsample1"), stride=2, padding=1)
    h = block("up1", torch.cat((h, half), 1))
    h = F.conv_transpose2d(h, *of("blocks.upsample2"), stride=2, padding=1)
    return F.conv2d(block("up2", torch.cat((h, full), 1)), *of("blocks.out_conv"))


def test_the_unet_equals_that_of_the_lecture() -> None:
    torch.manual_seed(0)
    net = UNet(2, 16, 16, num_classes=3).double()
    for p in net.parameters():  # norms start as the identity
        torch.nn.init.normal_(p, std=0.2)
    x, t, y = torch.randn(3, 2, 8, 12).double(), torch.tensor([1, 500, 1000.0]), torch.arange(3)
    torch.testing.assert_close(net(x, t, y), written_out(net, x, t, y), rtol=1e-9, atol=1e-9)


def test_attention_is_the_mean_of_values_weighted_by_similarity() -> None:
    torch.manual_seed(0)
    layer = SpatialSelfAttention(64).double()  # two heads
    torch.nn.init.normal_(layer.out_proj.weight)
    x = torch.randn(2, 64, 2, 3).double()
    normed = F.group_norm(x, 8).flatten(2)  # (b c yx)
    qkv = layer.qkv.weight[:, :, 0, 0] @ normed + layer.qkv.bias[:, None]
    mixed = torch.zeros_like(normed)
    for b, head in itertools.product(range(2), range(2)):
        q, k, v = (qkv[b, 64 * i + 32 * head :][:32] for i in range(3))
        for here in range(6):
            share = torch.stack([q[:, here] @ k[:, there] / 32**0.5 for there in range(6)])
            mixed[b, 32 * head : 32 * head + 32, here] = v @ share.softmax(0)
    right = x + (layer.out_proj.weight[:, :, 0, 0] @ mixed).view_as(x)
    torch.testing.assert_close(layer(x), right, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("width", "parameters"), [(64, 4165953), (32, 1199521), (16, 428241)])
def test_the_unet_has_as_many_parameters_as_that_of_the_lecture(
    width: int, parameters: int
) -> None:
    with torch.device("meta"):
        assert count(UNet(base_channels=width)) == parameters
        assert parameters == 927 * width**2 + 3709 * width + 2 * 256 * 257 + 1


def test_a_label_costs_a_row_of_the_embedding() -> None:
    with torch.device("meta"):
        assert count(UNet(num_classes=10)) - count(UNet()) == 11 * 256
        assert count(UNet(1, 24, 128, num_classes=10, patch_size=2)) == 615_188


@pytest.mark.parametrize(("patch", "attention"), [(1, False), (2, True)])
@pytest.mark.parametrize("size", [(28, 28), (14, 14), (5, 9), (1, 1)])
def test_the_output_has_the_size_of_the_input(
    size: tuple[int, int], patch: int, attention: bool
) -> None:
    net = UNet(3, 8, 8, patch_size=patch, has_attention=attention)
    assert net(torch.randn(2, 3, *size), torch.tensor([1.0, 999.0])).shape == (2, 3, *size)


def test_padding_inside_equals_padding_outside() -> None:
    net = UNet(1, 8, 8).double()
    x, t = torch.randn(2, 1, 6, 7, dtype=torch.float64), torch.tensor([3.0, 400.0]).double()
    wide = torch.nn.functional.pad(x, (0, 1, 1, 1))
    torch.testing.assert_close(net(wide, t)[..., 1:7, :7], net(x, t))


def test_attention_starts_as_the_identity_and_then_mixes() -> None:
    torch.manual_seed(0)
    with_it = UNet(1, 8, 8, has_attention=True)
    without = UNet(1, 8, 8)
    without.load_state_dict(with_it.state_dict(), strict=False)
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([1.0, 2.0])
    torch.testing.assert_close(with_it(x, t), without(x, t))
    torch.nn.init.normal_(with_it.blocks["mid_attention"].out_proj.weight)
    assert (with_it(x, t) - without(x, t)).abs().max() > 1e-3


def test_times_and_labels_change_the_output() -> None:
    net = UNet(1, 8, 8, num_classes=3)
    x, t = torch.randn(1, 1, 8, 8).expand(5, -1, -1, -1), torch.tensor([1, 2, 1, 1, 1.0])
    made = net(x, t, torch.tensor([0, 0, 1, 3, 3]))
    for other in (1, 2, 3):
        assert (made[0] - made[other]).abs().max() > 1e-4
    torch.testing.assert_close(made[4:], net(x[4:], t[4:]))  # 3 of 3 labels: none is given
    wave = timestep_embedding(torch.tensor([0.0, 1.0]), 6)
    torch.testing.assert_close(wave[0], torch.tensor([0, 0, 0, 1, 1, 1.0]))
    torch.testing.assert_close(
        wave[1, :3], torch.tensor([1, 1e4 ** (-1 / 3), 1e4 ** (-2 / 3)]).sin()
    )


def test_exported_weights_build_the_same_net(tmp_path: Path) -> None:
    net = UNet(3, 8, 16, num_classes=2, patch_size=2).to(memory_format=torch.channels_last)  # pyright: ignore
    written = save_pretrained(net, str(tmp_path / "out"), {"prediction_type": "v"})
    assert written == f"{tmp_path}/out/model.safetensors, config.json"
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["prediction_type"] == "v"
    other = UNet(**config["net"])
    other.load_state_dict(load_file(tmp_path / "out" / "model.safetensors"))
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([1.0, 2.0])
    torch.testing.assert_close(other(x, t), net(x, t))


@pytest.mark.parametrize("wrong", [{"base_channels": 12}, {"time_embed_dim": 7}, {"patch_size": 0}])
def test_invalid_unet_sizes_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(
        ValueError, match=r"allowed: base_channels: a multiple of 8, time_embed_dim: an even"
    ):
        UNet(**wrong)  # pyright: ignore
