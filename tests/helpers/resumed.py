"""A training that is stopped at some step and resumed, beside the same one in one go."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import flashsae
from flashsae.train import loop


def same_after_a_kill(
    folder: Path, monkeypatch: pytest.MonkeyPatch, *, x: Tensor, after: int = 24, **settings: Any
) -> flashsae.SAE:
    """Assert that a training stopped after so many steps resumes to the bytes of one in one go; return the SAE."""
    whole = flashsae.fit(x, run=folder / "whole", progress=False, **settings)
    steps, step = [], loop.train_step

    def stops(*args: Any) -> Any:
        if len(steps) == after:
            raise KeyboardInterrupt
        steps.append(1)
        return step(*args)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", stops)
        with pytest.raises(KeyboardInterrupt):
            flashsae.fit(x, run=folder / "cut", progress=False, **settings)
    resumed = flashsae.fit(x, run=folder / "cut", resume=True, progress=False, **settings)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
    return resumed
