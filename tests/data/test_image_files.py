"""Image files: which are found, in which order, and that every mode becomes what people see."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from flashsae.data.image_files import find_images, read_image
from flashsae.errors import DataError


def paint(path: Path, color: Any = (200, 30, 60), mode: str = "RGB", size: tuple[int, int] = (6, 4)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, color).save(path)
    return path


def test_files_of_a_folder_of_folders_in_order_of_names(tmp_path: Path) -> None:
    for name in ("b/2.png", "a/3.JPG", "a/1.webp", "4.bmp", ".hidden/5.png", "a/._6.png"):
        paint(tmp_path / name)
    images, others = find_images(str(tmp_path))
    assert images is not None
    assert images.files == ("4.bmp", "a/1.webp", "a/3.JPG", "b/2.png")
    assert others == 0
    (tmp_path / "labels.csv").write_text("x")
    assert find_images(str(tmp_path))[1] == 1
    globbed, _ = find_images(str(tmp_path / "a" / "*"))
    assert globbed is not None
    assert globbed.files == ("1.webp", "3.JPG")
    alone, _ = find_images(str(tmp_path / "4.bmp"))
    assert alone is not None
    assert alone.files == ("4.bmp",)
    for nothing in (str(tmp_path / "none"), "python-docs", str(tmp_path / "labels.csv"), "a@0.5, b@0.5"):
        assert find_images(nothing) == (None, 0)


def test_the_order_is_mixed_by_a_seed_and_the_fingerprint_is_of_contents_and_names(tmp_path: Path) -> None:
    for number in range(20):
        paint(tmp_path / "one" / f"{number:02d}.png", (number, 0, 0))
    images, _ = find_images(str(tmp_path / "one"))
    assert images is not None
    assert images.order(None, 5) == [0, 1, 2, 3, 4]
    mixed = images.order(1, None)
    assert mixed == images.order(1, None) != images.order(2, None)
    assert sorted(mixed) == list(range(20))
    (tmp_path / "one").rename(tmp_path / "two")
    moved, _ = find_images(str(tmp_path / "two"))
    assert moved is not None
    before = moved.fingerprint
    paint(tmp_path / "two" / "07.png", (99, 0, 0))
    changed, _ = find_images(str(tmp_path / "two"))
    assert changed is not None
    after = changed.fingerprint
    (tmp_path / "two" / "08.png").rename(tmp_path / "two" / "081.png")
    renamed, _ = find_images(str(tmp_path / "two"))
    assert renamed is not None
    assert len({before, after, renamed.fingerprint}) == 3


@pytest.mark.parametrize(
    ("mode", "color", "suffix", "expected"),
    [
        ("RGB", (200, 30, 60), "png", (200, 30, 60)),
        ("L", 77, "png", (77, 77, 77)),
        ("1", 1, "png", (255, 255, 255)),
        ("RGBA", (10, 20, 30, 0), "png", (255, 255, 255)),
        ("RGBA", (0, 0, 0, 128), "webp", (127, 127, 127)),
        ("LA", (40, 255), "png", (40, 40, 40)),
        ("CMYK", (0, 255, 255, 0), "jpg", (255, 0, 0)),
        ("I;16", 257 * 100, "png", (100, 100, 100)),
        ("I;16", 200, "png", (1, 1, 1)),
    ],
)
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str, color: Any, suffix: str, expected: tuple[int, ...]) -> None:
    image = read_image(paint(tmp_path / f"x.{suffix}", color, mode))
    assert image.mode == "RGB"
    assert np.abs(np.asarray(image).astype(int) - expected).max() <= (3 if suffix != "png" else 0)


def test_palettes_with_transparency_and_rotation(tmp_path: Path) -> None:
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([9, 9, 9, 50, 60, 70])
    palette.save(tmp_path / "plain.png")
    palette.save(tmp_path / "clear.png", transparency=1)
    assert read_image(tmp_path / "plain.png").getpixel((0, 0)) == (50, 60, 70)
    assert read_image(tmp_path / "clear.png").getpixel((0, 0)) == (255, 255, 255)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (8, 4)).save(tmp_path / "turned.jpg", exif=exif)
    assert read_image(tmp_path / "turned.jpg").size == (4, 8)


def test_damaged_files_are_named(tmp_path: Path) -> None:
    whole = paint(tmp_path / "whole.png", size=(64, 64)).read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "page.jpg").write_text("<html>")
    for name in ("cut.png", "empty.jpg", "page.jpg", "gone.png"):
        with pytest.raises(DataError, match=rf"cannot read the image .*{name} .*Repair it, or take it out"):
            read_image(tmp_path / name)
