"""Activations of a vision model as it reads a folder of images: a row is a patch."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flashsae.backend import cores, resolve_device
from flashsae.data.examples import Examples
from flashsae.data.image_files import ImageFolder
from flashsae.data.inputs import InputSource
from flashsae.data.language_model import dtype_of_model
from flashsae.data.sources import Cursor
from flashsae.errors import CheckpointError, ConfigError, DataError
from flashsae.files.fingerprint import text_digest
from flashsae.lm.hookpoints import patterns_in
from flashsae.lm.loading import Loading, load_image_model
from flashsae.lm.options import LoadOptions, quantized_warning
from flashsae.lm.place import quiet_transformers
from flashsae.lm.room import moved
from flashsae.lm.weights import check_loaded, model_fingerprint
from flashsae.settings.reading import ReadingConfig

IMAGES = "images"
"""What `reads` of a cache says where its model read images."""
PICTURES_FILE = "images.json"
_THREADS = 8
_PATCH_PIXELS = 256
"""Pixels that count as a token in the size of a forward where an image has fewer positions."""


class ImageExamples:
    """An `ExampleReader` of the images in a folder, put through the image processor of a model.

    Args:
        images: to read.
        processor: of the model.
        order: the numbers of the images, in the order of reading.
    """

    unit = "images"

    def __init__(self, images: ImageFolder, processor: Any, order: list[int]) -> None:
        self.name = images.name
        self._images, self._processor, self._order = images, processor, order
        self.at_once = 2
        """Images in a forward."""

    @property
    def fingerprint(self) -> str:
        """Digits that stand for the images."""
        return self._images.fingerprint

    def read(self, wanted: Callable[[int], bool], place: Cursor) -> Iterator[Examples]:
        """Yield the images whose numbers are wanted, in order; threads decode the next ones meanwhile.

        Raises:
            DataError: an image cannot be read, or is not what the processor takes.
        """
        start = place.get("example", 0)
        chosen = ((behind, n) for behind, n in enumerate(self._order[start:], start + 1) if wanted(n))
        with ThreadPoolExecutor(min(_THREADS, cores()), "flashsae-images") as pool:
            ahead: tuple[list[tuple[int, int]], list[Future[Any]]] | None = None
            try:
                while True:
                    group = list(islice(chosen, self.at_once))
                    begun = (group, [pool.submit(self._images.read, n) for _, n in group])
                    if ahead is not None:
                        yield self._examples(*ahead)
                    if not group:
                        return
                    ahead = begun
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def _examples(self, group: list[tuple[int, int]], images: list[Future[Any]]) -> Examples:
        numbers = [number for _, number in group]
        inputs = processed(self._processor, [image.result() for image in images])
        if any(len(value) != len(numbers) for value in inputs.values()):
            told = ", ".join(f"{len(value)} in {name}" for name, value in inputs.items())
            raise ConfigError(f"model: its image processor makes {told} of {len(numbers)} images; name another model.")
        behind = {"example": group[-1][0]}
        return Examples(inputs, torch.tensor(numbers, dtype=torch.int64, device="cpu"), None, behind)


def processed(processor: Any, images: Sequence[Any]) -> dict[str, Tensor]:
    """Return what the image processor of a model makes of images of PIL.

    Raises:
        DataError: it takes none of these.
    """
    try:
        made = processor(images=list(images), return_tensors="pt")
    except Exception as error:  # whatever a processor makes of an image of a pixel
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]
        sizes = ", ".join(sorted({f"{image.width} x {image.height}" for image in images})[:3])
        raise DataError(f"the image processor of the model takes no images of {sizes} pixels ({reason}).") from error
    return {name: value for name, value in made.items() if isinstance(value, Tensor)}


def _loaded(config: ReadingConfig, device: str) -> tuple[nn.Module, Any, Loading]:
    """Load the model of settings with its image processor."""
    options = LoadOptions.of(config)
    model, processor, loading = load_image_model(config.model, dtype_of_model(config, device), options)
    if options.device_map is None and options.quantize is None:  # else it lies where it was loaded
        model = moved(config.model, model, resolve_device(device))
    return model, processor, loading


class ImageSource(InputSource):
    """A `StreamSource` of the activations of a vision model as it reads images; CLS and registers make no rows.

    Args:
        config: what to read from which model, and where in it. Filled.
        images: to read.
        held_out: fraction of the images that training never sees.
        device: of the model; "auto" is the GPU where there is one.
        loaded: a model and its image processor to use instead of loading `config.model`; the model stays as it is.
    Raises:
        ConfigError: no such model or hookpoint, or the model reads no images.
        DataError: an image cannot be read.
        MissingExtraError: transformers or Pillow is not installed.
    """

    def __init__(
        self,
        config: ReadingConfig,
        images: ImageFolder,
        *,
        held_out: float,
        device: str = "auto",
        loaded: tuple[nn.Module, Any] | None = None,
    ) -> None:
        self.config, self.text, self._is_given = config, images, loaded is not None
        model, processor, loading = _loaded(config, device) if loaded is None else (*loaded, Loading())
        self.warnings = quantized_warning(config.model, model)
        seed = config.document_seed if config.shuffle_documents else None
        examples = ImageExamples(images, processor, images.order(seed, config.max_documents))
        self._patch = _patch_of(model)
        super().__init__(
            model,
            examples,
            patterns_in(config.hookpoint),
            held_out=held_out,
            skip_first=config.skip_first,
            max_norm_ratio=config.max_norm_ratio,
            name=config.model,
        )
        check_loaded(config.model, loading, self._trace, self.hookpoints)
        height, width = self._shapes.get("pixel_values", (0, 0, 0))[-2:]
        tokens = max(self.n_positions, height * width // _PATCH_PIXELS, 1)
        examples.at_once = max(1, config.forward_tokens // tokens)
        self.tokenizer = Pictures(images, processor, {name: self._grid(name) for name in self.hookpoints})

    def _grid(self, hookpoint: str) -> list[int] | None:
        """Return how the patches of an image lie: [first position, rows, columns]; None where it has none."""
        grid, n = self.positions[hookpoint].grid, self.n_positions
        height, width = self._shapes.get("pixel_values", (0, 0, 0))[-2:]
        if len(grid) == 2:
            return [0, *grid]
        if n == 1 or not height:
            return None
        if self._patch is not None:
            rows, columns = height // self._patch[0], width // self._patch[1]
            behind = getattr(getattr(self._model, "config", None), "num_detection_tokens", 0)
            first = n - rows * columns - behind
            if 0 <= first <= rows * columns:
                return [first, rows, columns]
        for first in (0, 1, 2):  # stages that merge patches, and models that tell no size of theirs
            rows = math.isqrt((n - first) * height // width)
            if rows and (n - first) % rows == 0 and (n - first) // rows * height == rows * width:
                return [first, rows, (n - first) // rows]
        return None

    def _left_out(self, n_positions: int) -> Tensor:
        left_out = super()._left_out(n_positions)
        grid = self._grid(self.hookpoints[0]) if self.config.mask_special else None
        if grid is not None:
            first, rows, columns = grid
            left_out = left_out.clone()
            left_out[:first] = left_out[first + rows * columns :] = True
        return left_out

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What decides the activations, by name, as JSON: fingerprints of images and model, and the settings."""
        return {
            "reads": IMAGES,
            "text": self.text.fingerprint,
            "model": self._fingerprint_of_model(),
            **self.config.of_tokens(),
            "hookpoints": list(self.hookpoints),
            "dtype": str(self.dtype).removeprefix("torch."),
            "held_out": self._held_out,
        }

    def _fingerprint_of_model(self) -> str:
        if self._is_given:
            return text_digest([super()._fingerprint_of_model(), self.tokenizer.processor.to_json_string()])
        return model_fingerprint(self.config.model, LoadOptions.of(self.config))

    def inputs_in_words(self) -> str:
        """Say what the model reads, and which positions of it make rows."""
        shape = " x ".join(map(str, self._shapes.get("pixel_values", ())[-2:]))
        kept = self.n_positions - int(self._left_out(self.n_positions).sum())
        grids = {tuple(grid[1:]) for grid in self.tokenizer.grids.values() if grid is not None}
        lie = f", {' x '.join(map(str, grids.pop()))} patches" if len(grids) == 1 else ""
        special = self.n_positions - kept
        told = f"{len(self.text.files):,} images of {shape} pixels{lie}: {kept} rows of each"
        return told + (
            f", {special} position{'s' * (special > 1)} left out as special ones or by skip_first" if special else ""
        )


def _patch_of(model: nn.Module) -> tuple[int, int] | None:
    """Return height and width of the patches that a model cuts images into; None where its config does not tell."""
    config = getattr(model, "config", None)
    for told in (getattr(config, "vision_config", None), config):
        size = getattr(told, "patch_size", None)
        if isinstance(size, int):
            return size, size
        if isinstance(size, list | tuple) and len(size) == 2:
            return size[0], size[1]
    return None


class Pictures:
    """Images as a model sees them, for those who look at its activations.

    Args:
        images: that it read.
        processor: of the model.
        grids: how the patches of an image lie, by hookpoint: [first position, rows, columns], or None.
    """

    def __init__(self, images: ImageFolder, processor: Any, grids: dict[str, list[int] | None]) -> None:
        self.images, self.processor, self.grids = images, processor, grids

    def view(self, number: int) -> Any:
        """Return an image of PIL by number, cut and scaled as the model sees it; None where its file is gone."""
        from PIL import Image

        try:
            pixels = processed(self.processor, [self.images.read(number)])["pixel_values"][0].float()
        except (DataError, KeyError):
            return None
        of = [getattr(self.processor, name, None) for name in ("image_std", "image_mean")]
        if getattr(self.processor, "do_normalize", True) and all(each is not None for each in of):
            std, mean = (torch.tensor(each, dtype=torch.float32, device="cpu").reshape(-1, 1, 1) for each in of)
            pixels = pixels * std + mean
        if pixels.dim() != 3 or len(pixels) != 3:
            return None
        scaled = (pixels * (255 if getattr(self.processor, "do_rescale", True) else 1)).clamp(0, 255).round()
        return Image.fromarray(scaled.to(torch.uint8).movedim(0, -1).contiguous().numpy())

    def save_pretrained(self, folder: Path) -> None:
        """Write it into a folder of a cache, as tokenizers do."""
        self.processor.save_pretrained(folder)
        told = {"folder": str(self.images.folder.resolve()), "files": self.images.files, "grids": self.grids}
        (Path(folder) / PICTURES_FILE).write_text(json.dumps(told), "utf-8")

    @staticmethod
    def load(folder: Path, name: str) -> Pictures:
        """Read what `save_pretrained` wrote.

        Raises:
            CheckpointError: it is damaged.
        """
        try:
            told = json.loads((folder / PICTURES_FILE).read_text("utf-8"))
            files, grids = tuple(map(str, told["files"])), dict(told["grids"])
            images = ImageFolder(name, Path(told["folder"]), files)
            with quiet_transformers() as transformers:
                processor = transformers.AutoImageProcessor.from_pretrained(folder)
        except Exception as error:
            raise CheckpointError(
                f"cannot read the image processor in {folder} ({str(error)[:200]}). Write the cache again."
            ) from error
        return Pictures(images, processor, grids)
