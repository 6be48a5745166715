"""Pictures: images side by side, as a file a person can look at.

Axes: n images, c y x; bytes 0..255, gray or RGB.
"""

from pathlib import Path

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from ravine.datamodules.downloads import whole
from ravine.errors import UsageError

GAP, PAPER = 2, 255  # pixels between images, and their color
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG"}


class Pictures:
    """Images, uint8 (n c y x), in rows of `columns`.

    model.generate(labels="0-9").save("digits.png")

    `rows` are the names of the rows, where each row is of one class.
    """

    def __init__(self, images: Tensor, columns: int, rows: tuple[str, ...] = ()) -> None:
        """Keep them on the CPU."""
        self.images, self.columns, self.rows = images.cpu(), columns, rows

    def grid(self) -> Image.Image:
        """All in one, enlarged where they are small."""
        _, c, y, x = self.images.shape
        missing = -len(self.images) % self.columns
        images = torch.cat((self.images, self.images.new_full((missing, c, y, x), PAPER)))
        scale = max(1, 56 // max(y, x))
        images = images.repeat_interleave(scale, 2).repeat_interleave(scale, 3)  # (n c Y X)
        images = torch.nn.functional.pad(images, (0, GAP, 0, GAP), value=PAPER)
        sheet = rearrange(images, "(r k) c y x -> c (r y) (k x)", k=self.columns)
        return picture(torch.nn.functional.pad(sheet, (GAP, 0, GAP, 0), value=PAPER))

    def save(self, path: str | Path) -> None:
        """Write the grid, whole or not at all; the name's end decides the format."""
        form = format_of(path)
        with whole(Path(path)) as part:
            self.grid().save(part, form)

    def save_each(self, folder: str | Path) -> None:
        """Write each image into a file of its own: 00000.png, 00001.png, ..."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        for number, image in enumerate(self.images):
            file = Path(folder, f"{number:05}.png")
            try:
                picture(image).save(file)
            except OSError:
                file.unlink(missing_ok=True)  # it is not whole
                raise


def format_of(path: str | Path) -> str:
    """What Pillow calls the format that a name's end says."""
    end = Path(path).suffix.lower()
    if end not in FORMATS:
        allowed = ", ".join(FORMATS)
        raise UsageError(
            f"{path} is no name of a picture; allowed: {allowed}; type --file=samples.png"
        )
    return FORMATS[end]


def picture(image: Tensor) -> Image.Image:
    """One image, uint8 (c y x), gray or RGB."""
    if image.shape[0] == 1:
        return Image.fromarray(image[0].numpy())
    return Image.fromarray(rearrange(image, "c y x -> y x c").contiguous().numpy())
