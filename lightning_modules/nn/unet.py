"""U-Net for diffusion models: two downsampling and two upsampling levels with skip connections.

    x -> down1 ----------------------------------------- up2 -> out_conv      w    full size
           \\ downsample1 -> down2 ----------- up1 / upsample2                2w    half size
                               \\ downsample2 -> down3 -> mid / upsample1     4w    quarter size

Each block adds the time embedding, and the label embedding if there are labels, to every pixel. At
64 base channels w the net has 4,165,953 parameters on grayscale images.

Axes: b batch, c y x images, d embedding.
"""

import json
import math
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from safetensors.torch import save_file
from torch import Tensor, nn

from ravine.errors import UsageError
from ravine.files import atomic_write

from .initialization import Initialization, check_initialization, initialize

NUM_GROUPS = 8  # of GroupNorm, whose statistics do not depend on the batch


class ResidualBlock(nn.Module):
    """Residual block: two convolutions and a shortcut, with the embedding (d) added in between."""

    def __init__(self, in_channels: int, out_channels: int, embed_dim: int) -> None:
        """Create the layers from `in_channels` to `out_channels` channels."""
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm1 = nn.GroupNorm(NUM_GROUPS, out_channels)
        self.time_proj = nn.Linear(embed_dim, out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(NUM_GROUPS, out_channels)
        self.shortcut = (
            nn.Conv2d(in_channels, out_channels, 1)
            if in_channels != out_channels
            else nn.Identity()
        )

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Map images (b c y x) and embeddings (b d) to images (b c' y x)."""
        h = F.silu(self.norm1(self.conv1(x)))
        h = h + rearrange(self.time_proj(embedding), "b c -> b c 1 1")
        h = F.silu(self.norm2(self.conv2(h)))
        return h + self.shortcut(x)


class SpatialSelfAttention(nn.Module):
    """Self-attention over all pixels of an image; initialized to the identity."""

    def __init__(self, channels: int) -> None:
        """Create heads of 32 channels."""
        super().__init__()
        self.num_heads = max(1, channels // 32)
        self.norm = nn.GroupNorm(NUM_GROUPS, channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out_proj = nn.Conv2d(channels, channels, 1)
        nn.init.zeros_(self.out_proj.weight)
        nn.init.zeros_(cast(Tensor, self.out_proj.bias))

    def forward(self, x: Tensor) -> Tensor:
        """Map images (b c y x) to images of the same shape."""
        q, k, v = rearrange(
            self.qkv(self.norm(x)),
            "b (three h k) y x -> three b h (y x) k",
            three=3,
            h=self.num_heads,
        )
        mixed = F.scaled_dot_product_attention(q, k, v)
        return x + self.out_proj(
            rearrange(mixed, "b h (y x) k -> b (h k) y x", y=x.shape[-2], x=x.shape[-1])
        )


def timestep_embedding(t: Tensor, embed_dim: int) -> Tensor:
    """Sinusoidal time embedding of t (b), wavelengths from 2π to 20000π: (b d)."""
    half = embed_dim // 2
    frequencies = torch.exp(-math.log(1e4) / half * torch.arange(half, device=t.device).float())
    angles = t.float()[:, None] * frequencies  # (b d/2); fp32: bf16 cannot tell 999 from 1000
    return torch.cat((angles.sin(), angles.cos()), 1)  # (b d)


class UNet(nn.Module):
    """U-Net from noisy images and times to images; any height and width, padded internally.

        UNet(channels=1, base_channels=64)(torch.randn(2, 1, 28, 28), torch.tensor([1, 999]))

    Args:
        channels: channels of the images.
        base_channels: channels at full size; a multiple of 8.
        time_embed_dim: channels of the time embedding.
        num_classes: number of labels; 0 for none. The label `num_classes` is the null class.
        patch_size: squares of this many pixels become one pixel with more channels.
        has_attention: whether a self-attention layer is added at a quarter of the size.
        initialization: distribution of the weights of linear layers and convolutions
            (initialization.py); the output projection of the attention starts at zero.
    """

    def __init__(
        self,
        channels: int = 1,  # of the images
        base_channels: int = 64,  # of the net at full size
        time_embed_dim: int = 256,
        num_classes: int = 0,  # 0 for images without labels
        patch_size: int = 1,  # squares of this many pixels become one pixel
        has_attention: bool = False,  # at a quarter of the size
        initialization: Initialization = "default",
    ) -> None:
        """Check the sizes, then build the layers."""
        super().__init__()
        check_initialization("UNet", initialization)
        if (
            base_channels < NUM_GROUPS
            or base_channels % NUM_GROUPS
            or time_embed_dim < 2
            or time_embed_dim % 2
            or patch_size < 1
        ):
            raise UsageError(
                f"UNet: base_channels={base_channels}, time_embed_dim={time_embed_dim} and "
                f"patch_size={patch_size} are not all valid",
                [
                    f"base_channels: a multiple of {NUM_GROUPS}",
                    "time_embed_dim: an even number",
                    "patch_size: 1 or more",
                ],
                "use base_channels=64, time_embed_dim=256, patch_size=1",
                flag="--model.base_channels=64 --model.time_embed_dim=256 --model.patch_size=1",
            )
        self.init_kwargs = {
            "channels": channels,
            "base_channels": base_channels,
            "time_embed_dim": time_embed_dim,
            "num_classes": num_classes,
            "patch_size": patch_size,
            "has_attention": has_attention,
        }
        # w channels at full size, 2w at half and 4w at a quarter; d channels of the embedded time.
        # up1 and up2 also take the features of down2 and down1, so their inputs have twice as many
        w, d = base_channels, time_embed_dim
        inner_channels = channels * patch_size**2  # a patch becomes one pixel
        self.num_classes, self.patch_size = num_classes, patch_size
        self.time_embed_dim = time_embed_dim
        self.time_mlp = nn.Sequential(nn.Linear(d, d), nn.SiLU(), nn.Linear(d, d))
        # + 1: the null class
        self.class_embed = nn.Embedding(num_classes + 1, d) if num_classes else None
        self.blocks = nn.ModuleDict(
            {
                "down1": ResidualBlock(inner_channels, w, d),
                "downsample1": nn.Conv2d(w, w, 3, stride=2, padding=1),
                "down2": ResidualBlock(w, 2 * w, d),
                "downsample2": nn.Conv2d(2 * w, 2 * w, 3, stride=2, padding=1),
                "down3": ResidualBlock(2 * w, 4 * w, d),
                "mid": ResidualBlock(4 * w, 4 * w, d),
                "mid_attention": SpatialSelfAttention(4 * w) if has_attention else nn.Identity(),
                "upsample1": nn.ConvTranspose2d(4 * w, 2 * w, 4, stride=2, padding=1),
                "up1": ResidualBlock(4 * w, 2 * w, d),
                "upsample2": nn.ConvTranspose2d(2 * w, w, 4, stride=2, padding=1),
                "up2": ResidualBlock(2 * w, w, d),
                "out_conv": nn.Conv2d(w, inner_channels, 1),
            }
        )
        initialize(
            self,
            initialization,
            output_layer="blocks.out_conv",
            unchanged=["mid_attention.out_proj"],  # zero
        )

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """Map images (b c y x), times (b) in [0, 1000] and labels (b) to images (b c y x).

        Without labels a class-conditional net uses the null class.
        """
        # (b d) sines and cosines of t, then an MLP; each residual block gets the result
        embedding = self.time_mlp(timestep_embedding(t, self.time_embed_dim).to(x.dtype))
        if self.class_embed is not None:
            y = torch.full_like(t, self.num_classes, dtype=torch.int64) if y is None else y
            embedding = embedding + self.class_embed(y)
        height, width = x.shape[-2:]
        # pad both sizes to multiples of 4 patches, as the blocks halve them twice
        multiple = 4 * self.patch_size
        padding_y, padding_x = -height % multiple, -width % multiple
        pad_top, pad_left = padding_y // 2, padding_x // 2
        pad_bottom, pad_right = padding_y - pad_top, padding_x - pad_left
        x = F.pad(x, (pad_left, pad_right, pad_top, pad_bottom))  # (b c Y X)
        x = F.pixel_unshuffle(x, self.patch_size)  # (b c*patch² Y/patch X/patch)
        x = F.pixel_shuffle(self._run_blocks(x, embedding), self.patch_size)  # (b c Y X)
        return x[..., pad_top : pad_top + height, pad_left : pad_left + width]

    def _run_blocks(self, x: Tensor, embedding: Tensor) -> Tensor:
        b = self.blocks
        full = b["down1"](x, embedding)
        half = b["down2"](b["downsample1"](full), embedding)
        h = b["down3"](b["downsample2"](half), embedding)
        h = b["mid_attention"](b["mid"](h, embedding))
        h = b["up1"](torch.cat((b["upsample1"](h), half), 1), embedding)
        h = b["up2"](torch.cat((b["upsample2"](h), full), 1), embedding)
        return b["out_conv"](h)


def save_pretrained(net: UNet, folder: str, extra_config: dict[str, Any]) -> str:
    """Write the net's weights and config.json into a folder; return the names of the files.

        config = json.load(open("config.json"))
        net = UNet(**config["net"])
        net.load_state_dict(safetensors.torch.load_file("model.safetensors"))

    The other keys of config.json define the net's output: noise_schedule, prediction_type,
    time_conditioning.
    """
    weights = {name: w.contiguous() for name, w in net.state_dict().items()}
    # atomic_write writes to a temporary file in the folder, and renames it at the end
    with atomic_write(Path(folder, "model.safetensors")) as file:
        save_file(weights, file.name)
    with atomic_write(Path(folder, "config.json")) as file:
        file.write(json.dumps({"net": net.init_kwargs, **extra_config}, indent=1).encode())
    return f"{folder}/model.safetensors, config.json"
