"""What defines an SAE besides its weights."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal

from flashsae.architecture import Architecture, architecture_of, settings_of
from flashsae.errors import ConfigError
from flashsae.ops.validate import as_int
from flashsae.settings.kinds import check, declared_types
from flashsae.settings.left_open import check_bounds
from flashsae.settings.normalization import check_normalization


@dataclass(frozen=True, init=False)
class SAEConfig:
    """What defines an SAE besides its weights.

    Args:
        d_in: width of the activations that go in; of all sites together, where they are several.
        d_sae: number of latents.
        k: of a TopK SAE, for short: SAEConfig(768, 16384, 32). Nothing beside `arch`.
        arch: settings of its architecture, such as `flashsae.BatchTopKSettings(k=32)`.
        d_out: width of what is reconstructed; None is d_in.
        normalize_activations: "layer_norm" lets the SAE subtract from each token its mean and divide it by its
            deviation before it is encoded, and undo that of the reconstruction; "none".
    Raises:
        ConfigError: a size is not positive, or fewer than the latents that a token selects; or tokens cannot be
            normalised so.
        DtypeError: it is no integer; those of NumPy are.
    """

    d_in: int
    d_sae: int
    arch: Any
    d_out: int
    normalize_activations: Literal["none", "layer_norm"]

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        k: int | None = None,
        *,
        arch: object = None,
        d_out: int | None = None,
        normalize_activations: str = "none",
    ) -> None:
        if (k is None) == (arch is None):
            raise ConfigError("arch: expected either k, which makes a TopK SAE, or the settings of an architecture.")
        given = {"d_in": d_in, "d_sae": d_sae, "d_out": d_in if d_out is None else d_out}
        for name, value in given.items():
            size = as_int(name, value)
            if size < 1:
                raise ConfigError(f"{name}: expected a positive int, got {size}.")
            object.__setattr__(self, name, size)
        settings = settings_of("topk", k=as_int("k", k)) if arch is None else settings_of(arch)
        object.__setattr__(self, "arch", settings)
        check_bounds(settings, self)
        kinds = declared_types(SAEConfig)["normalize_activations"]
        chosen = check("normalize_activations", normalize_activations, kinds)
        object.__setattr__(self, "normalize_activations", chosen)
        widths = (self.arch.widths or ()) if not self.architecture.sites else (self.d_in,)
        if sum(widths) != self.d_in or (len(widths) < 2 and not self.architecture.sites):
            raise ConfigError(
                f"widths: expected those of two sites or more, which sum to d_in = {self.d_in}, got {list(widths)}."
            )
        check_normalization(self.architecture, chosen, min(widths))
        if self.d_out != self.d_in and self.architecture.writes == self.architecture.reads:
            raise ConfigError(f"d_out: {self.architecture.title} reconstructs what it reads: leave it out.")

    @property
    def architecture(self) -> Architecture:
        """What the settings are those of."""
        return architecture_of(self.arch)

    @property
    def columns(self) -> dict[str, slice]:
        """Where each of several sites stands in what is reconstructed, by its name; {} where there is one."""
        if self.architecture.sites:
            return {}
        ends = list(accumulate(self.arch.widths))
        names = self.arch.sites or [f"site {number}" for number in range(len(ends))]
        return {name: slice(end - width, end) for name, width, end in zip(names, self.arch.widths, ends)}

    @property
    def k(self) -> int:
        """The setting k of the architecture; AttributeError where it has none."""
        k: int = self.arch.k
        return k

    @property
    def sizes(self) -> dict[str, int]:
        """What the shapes of parameters are made of."""
        return {"d_in": self.d_in, "d_out": self.d_out, "d_sae": self.d_sae}
