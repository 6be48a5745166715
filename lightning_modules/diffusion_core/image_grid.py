"""Image grid: save images as one PNG or JPEG file, or as one file each.

Axes: n images, c y x; bytes 0..255, grayscale or RGB.
"""

import math
from pathlib import Path

import torch
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ravine.errors import UsageError
from ravine.files import atomic_write

PADDING, BACKGROUND = 2, 255  # pixels between images, and their color
FONT_SIZE, MAX_NAME = 20, 24  # of row names: pixels, characters
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG"}


class ImageGrid:
    """Images, uint8 (n c y x), in rows of `columns` images.

        model.generate(labels="0-9").save("digits.png")

    `row_names` are the names of the rows, if each row is of one class; the grid shows them.
    """

    def __init__(self, images: Tensor, columns: int, row_names: tuple[str, ...] = ()) -> None:
        """Copy the images to the CPU."""
        self.images, self.columns, self.row_names = images.cpu(), columns, row_names

    def grid(self) -> Image.Image:
        """Arrange all images in one, enlarged if they are small, with the names of the rows."""
        _, c, y, x = self.images.shape
        num_missing = -len(self.images) % self.columns
        images = torch.cat((self.images, self.images.new_full((num_missing, c, y, x), BACKGROUND)))
        scale = max(1, 56 // max(y, x))
        images = images.repeat_interleave(scale, 2).repeat_interleave(scale, 3)  # (n c Y X)
        images = torch.nn.functional.pad(images, (0, PADDING, 0, PADDING), value=BACKGROUND)
        sheet = rearrange(images, "(r k) c y x -> c (r y) (k x)", k=self.columns)
        sheet = torch.nn.functional.pad(sheet, (PADDING, 0, PADDING, 0), value=BACKGROUND)
        return add_row_names(to_pil(sheet), self.row_names)

    def save(self, path: str | Path) -> None:
        """Write the grid to a file atomically; the suffix determines the format."""
        pillow_format = get_pillow_format(path)
        with atomic_write(Path(path)) as file:
            self.grid().save(file.name, pillow_format)

    def save_each(self, folder: str | Path) -> None:
        """Write each image to its own file: 00000.png, 00001.png, ..."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        for number, image in enumerate(self.images):
            file = Path(folder, f"{number:05}.png")
            try:
                to_pil(image).save(file)
            except OSError:
                file.unlink(missing_ok=True)  # incomplete
                raise


def get_pillow_format(path: str | Path) -> str:
    """Return Pillow's format name for the suffix of a path."""
    suffix = Path(path).suffix.lower()
    if suffix not in FORMATS:
        raise UsageError(
            f"{str(path)!r} does not end in the suffix of an image format",
            FORMATS,
            "use a name such as samples.png",
            flag="--file=samples.png",
        )
    return FORMATS[suffix]


def add_row_names(picture: Image.Image, names: tuple[str, ...]) -> Image.Image:
    """Return the picture with a white margin on the left that names rows of equal height."""
    if not names:
        return picture
    names = tuple(n if len(n) <= MAX_NAME else n[: MAX_NAME - 1] + "…" for n in names)
    font = ImageFont.load_default(FONT_SIZE)
    # two paddings on each side of the longest name
    margin = math.ceil(max(font.getlength(name) for name in names)) + 4 * PADDING
    labeled = Image.new(
        picture.mode,
        (picture.width + margin, picture.height),
        "white",
    )
    labeled.paste(picture, (margin, 0))
    # PADDING pixels lie between the rows, and above the first
    draw, row_height = ImageDraw.Draw(labeled), (picture.height - PADDING) / len(names)
    for row, name in enumerate(names):
        position = margin - 2 * PADDING, PADDING + (row + 0.5) * row_height
        draw.text(position, name, fill="black", font=font, anchor="rm")  # right, middle
    return labeled


def to_pil(image: Tensor) -> Image.Image:
    """Convert one image, uint8 (c y x), grayscale or RGB, to a Pillow image."""
    if image.shape[0] == 1:
        return Image.fromarray(image[0].numpy())
    return Image.fromarray(rearrange(image, "c y x -> y x c").contiguous().numpy())
