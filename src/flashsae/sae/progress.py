"""What an SAE is at a moment of its training beside its parameters. None of it is saved."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from flashsae.architecture import Progress
from flashsae.ops.validate import Precision
from flashsae.precision import has_screen
from flashsae.sae.parameters import ParameterTable


class InProgress(ParameterTable):
    """A module that knows how far its training is, and what goes by that."""

    precision: Precision | None
    progress: Progress

    def __init__(self) -> None:
        super().__init__()
        self.width: int | None = None
        """Latents of a token that codes of a fixed number have room for, where the architecture says so."""
        self.centres = False
        """Whether x_mean is subtracted from x: in the training of an architecture that does not subtract b_dec."""
        self._now: dict[str, Tensor] = {}
        self._noise: Tensor | None = None

    def set_progress(self, progress: Progress) -> None:
        """Let what changes from step to step be as it is at one: `now`, `width`, `noise`. No wait for the device."""
        self.progress = progress
        if self._noise is not None:
            self._noise.fill_(progress.step)  # a captured step reads it anew
        architecture, config = self.architecture, self.config
        if architecture.width is not None:
            self.width = architecture.width(config.arch, progress)
        if architecture.schedule is not None:
            for name, value in architecture.schedule(config, progress).items():
                number = torch.as_tensor(value, dtype=torch.float64, device="cpu")
                there = self._now.get(name)
                if there is None or there.shape != number.shape:
                    self._now[name] = number.to(self.W_dec.device)
                elif number.dim():
                    there.copy_(number, non_blocking=True)
                else:
                    there.fill_(number.item())

    @property
    def now(self) -> Mapping[str, Tensor]:
        """The numbers that the architecture has scheduled, float64, on the device of the parameters."""
        if any(number.device != self.W_dec.device for number in self._now.values()):
            self._now = {}
            self.set_progress(self.progress)
        return self._now

    @property
    def noise(self) -> Tensor | None:
        """Seed of the noise that an 8-bit screen rounds with: the step, scalar, int64, where the parameters are.

        None where `precision` has no screen. Neither a parameter nor saved: a resumed training has that of its step.
        """
        if not has_screen(self.precision):
            return None
        device = self.W_dec.device
        if self._noise is None or self._noise.device != device:
            if torch.compiler.is_compiling():
                return None  # nothing may be made there that stays
            with torch.inference_mode(False):
                made = torch.full((), self.progress.step, dtype=torch.int64, device=device)
            if type(made) is not Tensor:
                return made  # of who traces with tensors that hold no numbers, to be gone with them
            self._noise = made
        return self._noise

    @property
    def b_pre(self) -> Tensor | None:
        """What is subtracted from x before it is encoded: b_dec, or nothing, or in training its mean."""
        if self.architecture.subtracts_b_dec:
            b_dec: Tensor = self.b_dec
            return b_dec
        x_mean: Tensor | None = self.x_mean if self.centres else None
        return x_mean

    def load_state_dict(self, *args: Any, **settings: Any) -> Any:
        """Load parameters as any module does, and see whether there is a mean to be subtracted among them."""
        done = super().load_state_dict(*args, **settings)
        self.centres = hasattr(self, "x_mean") and bool(self.x_mean.any())
        return done
