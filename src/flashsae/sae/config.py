"""What defines an SAE besides its weights."""

from __future__ import annotations

from dataclasses import dataclass, fields
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Literal

from flashsae.architecture import Architecture, architecture_of, settings_of
from flashsae.errors import ConfigError
from flashsae.ops.validate import as_int
from flashsae.sae.b_dec import architecture_with
from flashsae.settings.kinds import check, declared_types
from flashsae.settings.left_open import check_bounds
from flashsae.settings.normalization import check_b_dec, check_normalization

if TYPE_CHECKING:
    from flashsae.settings.training import TrainConfig

_APPLIED = "apply_b_dec_to_input"


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
            deviation before it is encoded, and undo that of the reconstruction; "token_norm" lets it divide each token
            by the root mean square of its coordinates, and undo that; "none".
        apply_b_dec_to_input: whether the encoder sees x − b_dec. None: what the architecture does. False for one that
            does is an SAE of another library, or one to be trained so.
    Raises:
        ConfigError: a size is not positive, or fewer than the latents that a token selects; or tokens cannot be
            normalised so, or the architecture has no place for a b_dec in its encoder.
        DtypeError: it is no integer; those of NumPy are.
    """

    d_in: int
    d_sae: int
    arch: Any
    d_out: int
    normalize_activations: Literal["none", "layer_norm", "token_norm"]
    apply_b_dec_to_input: bool

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        k: int | None = None,
        *,
        arch: object = None,
        d_out: int | None = None,
        normalize_activations: str = "none",
        apply_b_dec_to_input: bool | None = None,
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
        applied = check("apply_b_dec_to_input", apply_b_dec_to_input, bool | None)
        check_b_dec(architecture_of(settings), applied)
        applied = architecture_of(settings).subtracts_b_dec if applied is None else applied
        object.__setattr__(self, "apply_b_dec_to_input", applied)
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
        """What the settings are those of, with b_dec in its encoder or without."""
        return architecture_with(architecture_of(self.arch), self.apply_b_dec_to_input)

    @property
    def is_unlike(self) -> bool:
        """Whether its encoder does not see x − b_dec, and that of the architecture does."""
        return self.apply_b_dec_to_input != architecture_of(self.arch).subtracts_b_dec

    def __repr__(self) -> str:
        """Return how it is made; of whether b_dec is subtracted only where that is not as the architecture has it."""
        names = [each.name for each in fields(self) if each.name != _APPLIED or self.is_unlike]
        return f"SAEConfig({', '.join(f'{name}={getattr(self, name)!r}' for name in names)})"

    @classmethod
    def of(cls, config: TrainConfig) -> SAEConfig:
        """Return that of the SAE in a training, which sees activations as they are scaled or normalised for it.

        Args:
            config: resolved settings.
        """
        return cls(
            config.d_in,
            config.d_sae,
            arch=config.arch,
            d_out=config.d_out,
            apply_b_dec_to_input=config.apply_b_dec_to_input,
        )

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
