"""The images that activate a latent most: which, how strongly at each patch, and small pictures of them."""

from __future__ import annotations

import base64
import io
from pathlib import PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashsae.data.images import Pictures
from flashsae.report.snippet_file import Picture, Shaded

_SIDES = (112, 88, 64, 48, 32)
"""Pixels of the longer side of a picture: the first with which all of a report are small enough."""
_MOST_BYTES = 3 * 2**20
_QUALITY = 75
_TOP_LABELS = 8


class Illustrator:
    """Chooses images for latents, and draws each once, however many latents it is shown for.

    Args:
        pictures: the images that were read.
        group: [n], the number of the image of each row.
        position: [n], the place of each row in its image.
        n_held_out: the rows before this one are of held-out images.
    """

    def __init__(
        self, pictures: Pictures, group: NDArray[np.int64], position: NDArray[np.int64], n_held_out: int
    ) -> None:
        self._pictures = pictures
        self._group, self._position, self._n_held_out = group, position, n_held_out
        self._grid = next((grid for grid in pictures.grids.values() if grid is not None), None)
        self._shown: dict[int, int] = {}

    def shaded(self, rows: NDArray[np.int64], acts: NDArray[np.float32], per_latent: int) -> list[Shaded]:
        """Return the images with the highest peaks, each once, held-out ones first, by descending peak.

        Args:
            rows: on which a latent is active, ascending.
            acts: its values there.
            per_latent: how many images at most.
        """
        by_act = rows[np.argsort(-np.abs(acts), kind="stable")]
        by_act = by_act[np.argsort(by_act >= self._n_held_out, kind="stable")]
        first = np.sort(np.unique(self._group[by_act], return_index=True)[1])[:per_latent]
        value = dict(zip(rows.tolist(), acts.tolist()))
        peaks = sorted(by_act[first].tolist(), key=lambda row: -abs(value[row]))
        return [self._of(peak, rows, acts) for peak in peaks]

    def _of(self, peak: int, rows: NDArray[np.int64], acts: NDArray[np.float32]) -> Shaded:
        image = int(self._group[peak])
        number = self._shown.setdefault(image, len(self._shown))
        own = self._group[rows] == image
        places, values = self._position[rows[own]], acts[own]
        first, n_rows, n_columns = self._grid or (0, 0, 0)
        patches = np.zeros(n_rows * n_columns or 1, dtype=np.float32)
        if self._grid is None:
            patches[0] = values[np.abs(values).argmax()]
            at = 0
        else:
            inside = (places >= first) & (places < first + len(patches))
            patches[places[inside] - first] = values[inside]
            at = int(np.clip(self._position[peak] - first, 0, len(patches) - 1))
        split: Any = "held_out" if peak < self._n_held_out else "train"
        return Shaded(number, [float(f"{act:.4g}") for act in patches.tolist()], at, split)

    def labels(self, rows: NDArray[np.int64], acts: NDArray[np.float32]) -> list[str]:
        """Return the folders of the images with the largest total activation; none where all lie in one."""
        files = self._pictures.images.files
        if len({PurePosixPath(name).parent for name in files}) < 2:
            return []
        total: dict[str, float] = {}
        for image, act in zip(self._group[rows].tolist(), np.abs(acts).tolist()):
            label = str(PurePosixPath(files[image]).parent)
            total[label] = total.get(label, 0.0) + act
        return sorted(total, key=lambda label: (-total[label], label))[:_TOP_LABELS]

    def drawn(self) -> list[Picture]:
        """Return pictures of all images that were chosen, in the order of their numbers."""
        views = {image: self._pictures.view(image) for image in self._shown}
        for side in _SIDES:
            jpegs = {image: _jpeg(view, side) for image, view in views.items()}
            if sum(map(len, jpegs.values())) <= _MOST_BYTES:
                break
        _, n_rows, n_columns = self._grid or (0, 0, 0)
        files = self._pictures.images.files
        sizes = {image: (1, 1) if view is None else view.size for image, view in views.items()}
        return [
            Picture(files[image], n_rows, n_columns, width, height, jpegs[image])
            for image, (width, height) in sizes.items()
        ]


def _jpeg(view: Any, side: int) -> str:
    """Return an image as JPEG in base64; "" of one that is gone."""
    if view is None:
        return ""
    small = view.copy()
    small.thumbnail((side, side))
    file = io.BytesIO()
    small.save(file, "JPEG", quality=_QUALITY)
    return base64.b64encode(file.getvalue()).decode()
