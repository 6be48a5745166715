"""InceptionV3 features of torch-fidelity: find or download the weights, verify and load them.

The weights are searched in this order: the given file; `inception/` in DATA_ROOT; torch's hub
folder, which torch-fidelity and torchmetrics also use; the URL where they were published. They are
loaded without executing pickle code.
"""

import io
import os
import pickle
from pathlib import Path
from typing import Any, Literal
from urllib.error import URLError

import lightning as L
import torch
from einops import repeat
from torch import Tensor, nn

from ravine.errors import MissingFileError, UsageError
from ravine.files import compute_sha256

WEIGHTS_FILE = "weights-inception-2015-12-05-6726825d.pth"
WEIGHTS_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
WEIGHTS_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{WEIGHTS_FILE}"
FeatureLayer = Literal[64, 192, 768, 2048]


def locate_inception_weights(
    weights_path: str | None = None, trainer: L.Trainer | None = None
) -> tuple[Path, str]:
    """Return the path of the weights and its SHA-256; download the file if it is missing.

    A file with another checksum is accepted only as `weights_path`. One rank of each machine
    downloads the file, and the other ranks wait.

    Args:
        weights_path: a file of the user; None for the published file.
        trainer: None if there is a single process.

    Raises:
        MissingFileError: the file does not exist, and cannot be downloaded.
    """
    if weights_path is not None:
        path = Path(weights_path).expanduser()
        if not path.is_file():
            raise MissingFileError(
                f"FrechetDistance: the file {path} does not exist",
                [f"weights of InceptionV3 in torch-fidelity's layout, such as {WEIGHTS_FILE}"],
                hint=f"download {WEIGHTS_URL}",
            )
        return path, compute_sha256(path)
    hub_path = Path(torch.hub.get_dir()) / "checkpoints" / WEIGHTS_FILE
    candidates = [hub_path]
    if data_root := os.environ.get("DATA_ROOT"):
        candidates.insert(0, Path(data_root).expanduser() / "inception" / WEIGHTS_FILE)
    download_error = ""
    verified_path = _find_verified(candidates)  # the first with the published checksum
    if verified_path is None:
        if trainer is None or trainer.local_rank == 0:
            download_error = _download(hub_path)  # empty if it succeeds
        else:
            download_error = "tried by the first rank of this machine"
    if trainer is not None:  # every rank waits here, also one that has the file
        trainer.strategy.barrier("weights of InceptionV3")
    verified_path = verified_path or _find_verified(candidates)
    if verified_path is None:
        raise MissingFileError(
            f"FrechetDistance: the weights of InceptionV3 do not exist locally, and the download "
            f"of {WEIGHTS_URL} failed ({download_error})",
            candidates,
            hint=f"copy {WEIGHTS_FILE} to {hub_path}, pass weights=FILE, or pass "
            "extractor=ClassifierFeatures(CHECKPOINT)",
            flag="--trainer.callbacks.FrechetDistance.weights=FILE, or "
            "--trainer.callbacks.FrechetDistance.extractor=ClassifierFeatures",
            label="searched",
        )
    return verified_path, WEIGHTS_SHA256


def _find_verified(candidates: list[Path]) -> Path | None:
    return next(
        (path for path in candidates if path.is_file() and compute_sha256(path) == WEIGHTS_SHA256),
        None,
    )


def _download(path: Path) -> str:
    """Download the file; return the error text, or "" on success."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(
            WEIGHTS_URL, str(path), hash_prefix=WEIGHTS_SHA256, progress=False
        )
    except (URLError, OSError, RuntimeError) as error:  # RuntimeError: a wrong checksum
        return str(error)
    return ""


class Inception(nn.Module):
    """Maps uint8 images (b c y x), gray or colour, to features (b d) of the layer with d features.

    Images are resized to 299 x 299 as in TensorFlow 1, to be comparable with published figures.
    """

    def __init__(self, path: Path, layer: FeatureLayer = 2048) -> None:
        """Load the weights of a file in torch-fidelity's layout.

        Args:
            path: the file.
            layer: number of features of the layer whose output is returned.

        Raises:
            UsageError: the file is not an InceptionV3 in this layout.
        """
        super().__init__()
        # imported here, because only this class needs the package
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        self.name = "inception" if layer == 2048 else f"inception_{layer}"
        try:
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
            # torch-fidelity unpickles what it reads, so it gets a buffer that has only tensors
            buffer = io.BytesIO()
            torch.save(state, buffer)
            buffer.seek(0)
            self.net = FeatureExtractorInceptionV3(
                "inception-v3-compat", [str(layer)], feature_extractor_weights_path=buffer
            )
        except (pickle.UnpicklingError, RuntimeError, EOFError, TypeError, AttributeError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UsageError(
                f"FrechetDistance: {path} is not an InceptionV3 in torch-fidelity's layout "
                f"({reason})",
                hint=f"download {WEIGHTS_URL}",
            ) from None

    def forward(self, images: Tensor) -> Tensor:
        """Return the features (b d) of uint8 images (b c y x)."""
        if images.shape[1] == 1:
            images = repeat(images, "b 1 y x -> b c y x", c=3)
        return self.net(images)[0]
