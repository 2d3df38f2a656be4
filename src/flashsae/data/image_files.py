"""Folders of images: which files, in which order, and what a file looks like once it is read."""

from __future__ import annotations

import functools
import glob
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from flashsae.errors import DataError, require
from flashsae.files.fingerprint import files_digest, text_digest
from flashsae.settings.kinds import expand

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp"})
_DEEP = 255
"""Largest value of a channel of 8 bits."""


@dataclass(frozen=True)
class ImageFolder:
    """Images that lie in a folder, or in folders in it. It is to images what a `TextDataset` is to texts.

    Args:
        name: as it was asked for.
        folder: that the names begin in.
        files: names in the folder, in order; the number of an image is its place among them.
    """

    name: str
    folder: Path
    files: tuple[str, ...]
    unit = "images"
    is_cut_at_blanks = False
    holds_chats = False

    @functools.cached_property
    def fingerprint(self) -> str:
        """Digits that stand for the files and their names, wherever the folder lies; reads every byte."""
        return text_digest([files_digest([self.folder / name for name in self.files], names=False), *self.files])

    def numbered(self, start: int = 0) -> Iterator[tuple[int, str]]:
        """Yield the number and the name of each image."""
        yield from enumerate(self.files[start:], start)

    def order(self, seed: int | None, most: int | None) -> list[int]:
        """Return the numbers of the images in the order of reading.

        Args:
            seed: of the order; None is that of the names.
            most: only so many, the first by name.
        """
        n = min(len(self.files), most or len(self.files))
        if seed is None:
            return list(range(n))
        generator = torch.Generator(device="cpu").manual_seed(seed)
        return torch.randperm(n, generator=generator, dtype=torch.int64, device="cpu").tolist()

    def read(self, number: int) -> Any:
        """Return an image by number, as `read_image` does."""
        return read_image(self.folder / self.files[number])


def find_images(dataset: str) -> tuple[ImageFolder | None, int]:
    """Find the images that a setting names: a folder, a folder of folders, a pattern such as photos/*.png, or a file.

    Returns:
        the images, or None where there are none; and how many other files are beside them.
    """
    try:
        return _found(dataset, expand(dataset))
    except (OSError, ValueError):  # a name that no file system has; who reads text says what is wrong with it
        return None, 0


def _found(dataset: str, place: Path) -> tuple[ImageFolder | None, int]:
    if glob.has_magic(dataset) and not place.exists():
        found = sorted(Path(path) for path in glob.glob(str(place), recursive=True))
        folder = Path(*_before_magic(place.parts))
    elif place.is_dir():
        folder, found = place, [path for path in place.rglob("*") if not path.is_dir()]
    else:
        folder, found = place.parent, [place] if place.is_file() else []
    named = sorted((path.relative_to(folder).as_posix(), path) for path in found)
    seen = [(name, path) for name, path in named if not any(part.startswith(".") for part in name.split("/"))]
    images = tuple(name for name, path in seen if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
    if not images:
        return None, 0
    return ImageFolder(dataset, folder, images), len(seen) - len(images)


def _before_magic(parts: tuple[str, ...]) -> list[str]:
    return list(parts[: next(i for i, part in enumerate(parts) if glob.has_magic(part))])


def read_image(path: Path) -> Any:
    """Return an image of PIL as RGB of 8 bits, turned as its EXIF says, on white where it is transparent.

    Raises:
        DataError: it is missing, damaged, or no image.
        MissingExtraError: Pillow is not installed.
    """
    pillow = require("PIL.Image", "vision")
    from PIL import ImageOps

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a large image, or of odd metadata
            with pillow.open(path) as opened:
                opened.load()
                return _as_rgb(ImageOps.exif_transpose(opened))
    except Exception as error:  # whatever the decoders of several formats raise
        reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
        raise DataError(
            f"cannot read the image {path} ({reason[0][:200]}). Repair it, or take it out of the folder."
        ) from error


def _as_rgb(image: Any) -> Any:
    """Convert any mode to RGB. PIL cuts 16 bits off instead of scaling them, and shows what is under transparency."""
    pillow = require("PIL.Image", "vision")
    if image.mode.startswith("I") or image.mode == "F":
        import numpy as np

        values = np.asarray(image).astype(np.float64)
        most = float(values.max(initial=0.0))
        is_deep = ";16" in image.mode or (image.mode == "I" and most > _DEEP)
        scale = _DEEP / 65535 if is_deep else _DEEP if image.mode == "F" and most <= 1 else 1.0
        return pillow.fromarray((values * scale).clip(0, _DEEP).round().astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = pillow.new("RGBA", image.size, (255, 255, 255, 255))
        return pillow.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")
