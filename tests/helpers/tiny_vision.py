"""Tiny random vision models in folders, and folders of images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image


def write_model(folder: Path, family: str = "ViT", **settings: Any) -> Path:
    """A model of 8 x 8 pixels with its image processor."""
    import transformers

    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "image_size": 8, "patch_size": 4}
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**(settings or sizes))
    getattr(transformers, f"{family}Model")(config).save_pretrained(folder)
    kind = getattr(transformers, "ViTImageProcessorPil", None) or transformers.ViTImageProcessor
    kind(size={"height": 8, "width": 8}).save_pretrained(folder)
    return folder


def write_photos(folder: Path, n: int = 40, size: tuple[int, int] = (12, 9)) -> Path:
    """Noise in two folders."""
    random = np.random.default_rng(0)
    for number in range(n):
        path = folder / ("cats", "dogs")[number % 2] / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(path)
    return folder
