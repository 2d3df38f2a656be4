"""Which images stand for a latent, how their patches are shaded, and that a report stays small."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from flashsae.data.image_files import ImageFolder
from flashsae.data.images import Pictures
from flashsae.errors import CheckpointError
from flashsae.report.cards import card, sample_text
from flashsae.report.pictures import Illustrator
from flashsae.report.shades import example, shades, stylesheet
from flashsae.report.snippet_file import LatentSnippets, Picture, Shaded, Snippets, read_snippets, write_snippets


class Drawn(Pictures):
    """Images of noise, without files."""

    def __init__(self, files: list[str], grid: list[int] | None, side: int = 8) -> None:
        super().__init__(ImageFolder("x", Path(), tuple(files)), None, {"a": None, "b": grid})
        self.side = side

    def view(self, number: int) -> Any:
        if self.images.files[number] == "gone.png":
            return None
        noise = np.random.default_rng(number).integers(0, 256, (self.side, 2 * self.side, 3), dtype=np.uint8)
        return Image.fromarray(noise)


def opened(text: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(text)))


def test_images_are_shaded_by_patch_and_come_once() -> None:
    group = np.repeat([2, 0, 1], 5)
    position = np.tile(np.arange(5), 3)
    drawer = Illustrator(Drawn(["a/0.png", "a/1.png", "b/2.png"], [1, 2, 2]), group, position, 5)
    rows, acts = np.array([1, 4, 7, 12]), np.array([1.0, 2.0, 5.0, 9.0], dtype=np.float32)
    first, second = drawer.shaded(rows, acts, 2)
    assert (first.picture, first.acts, first.peak, first.split) == (0, [0.0, 9.0, 0.0, 0.0], 1, "train")
    assert (second.picture, second.acts, second.peak, second.split) == (1, [1.0, 0.0, 0.0, 2.0], 3, "held_out")
    assert drawer.labels(rows, acts) == ["a", "b"]
    pictures = drawer.drawn()
    assert [picture.name for picture in pictures] == ["a/1.png", "b/2.png"]
    assert (pictures[0].rows, pictures[0].width, pictures[0].height) == (2, 16, 8)
    assert opened(pictures[0].jpeg).size == (16, 8)


def test_images_without_patches_are_whole_and_those_of_one_folder_have_no_labels() -> None:
    drawer = Illustrator(Drawn(["0.png", "gone.png"], None), np.array([0, 1]), np.array([0, 0]), 0)
    shown = drawer.shaded(np.array([0, 1]), np.array([-3.0, 2.0], dtype=np.float32), 8)
    assert [(each.acts, each.peak) for each in shown] == [([-3.0], 0), ([2.0], 0)]
    assert drawer.labels(np.array([0]), np.array([1.0], dtype=np.float32)) == []
    whole, gone = drawer.drawn()
    assert not gone.jpeg
    assert example(shown[0], whole, 3.0)["shades"] == ""
    assert example(shown[1], gone, 3.0)["is_gone"]


def test_pictures_of_a_report_are_small_however_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flashsae.report.pictures._MOST_BYTES", 60_000)
    n = 20
    drawer = Illustrator(Drawn([f"{i}.png" for i in range(n)], [0, 1, 1], 128), np.arange(n), np.zeros(n, int), n)
    drawer.shaded(np.arange(n), np.ones(n, dtype=np.float32), n)
    pictures = drawer.drawn()
    assert sum(len(picture.jpeg) for picture in pictures) <= 60_000
    assert len({opened(picture.jpeg).size for picture in pictures}) == 1


def test_shades_are_a_pixel_a_patch() -> None:
    image = opened(shades([0.0, 2.0, -1.0, 0.0, 0.0, 0.5], 3, 2.0))
    assert image.size == (3, 2)
    pixels = np.asarray(image)
    assert pixels[..., 3].tolist() == [[0, 199, 122], [0, 0, 84]]
    assert pixels[0, 1].tolist()[:3] == [249, 115, 22]
    assert pixels[0, 2].tolist()[:3] == [37, 99, 235]
    assert opened(shades([1.0], 1, float("nan"))).size == (1, 1)


def snippets() -> Snippets:
    pictures = [Picture("<b>.png", 1, 2, 8, 8, "AAAA"), Picture("gone.png", 1, 2, 1, 1, "")]
    images = [Shaded(0, [0.0, 1.0], 1, "held_out"), Shaded(1, [2.0, 0.0], 0, "train")]
    return Snippets(4, [LatentSnippets(3, 0.5, 2.0, 1.5, [], [1], [], images=images)], 2, pictures)


def test_the_file_keeps_images_and_refuses_damaged_ones(tmp_path: Path) -> None:
    path = tmp_path / "snippets.json"
    write_snippets(path, snippets())
    assert read_snippets(path) == snippets()
    for change in ({"picture": 5}, {"peak": 2}, {"acts": [1.0]}):
        (latent,) = snippets().latents
        latent.images[0] = Shaded(**{**latent.images[0].__dict__, **change})
        write_snippets(path, Snippets(4, [latent], 2, snippets().pictures))
        with pytest.raises(CheckpointError, match="is damaged"):
            read_snippets(path)
    write_snippets(path, Snippets(4, snippets().latents, 2, [Picture("x", 1, 2, 8, 8, 'A)}</style><p id="')] * 2))
    with pytest.raises(CheckpointError, match="base64"):
        read_snippets(path)


def test_cards_and_words_are_of_images() -> None:
    held = snippets()
    assert held.unit == "patches"
    assert Snippets(4, [], 2).unit == "tokens"
    assert Snippets(4, [], 2, [Picture("a.png", 0, 0, 8, 8, "")]).unit == "images"
    shown = card(held.latents[0], held.pictures)["images"]
    assert [image["told"] for image in shown] == [
        "<b>.png: 1 at the patch in row 1, column 2",
        "gone.png: 2 at the patch in row 1, column 1",
    ]
    assert shown[0]["spot"] == "left:50.00%;top:0.00%;width:50.00%;height:100.00%"
    assert stylesheet(held) == ".photo-0{background-image:url(data:image/jpeg;base64,AAAA)}\n"
    assert "1 of the 2 images below are ones that training never saw" in sample_text(held)
