"""What an architecture is made of: parameters, terms of a loss. And how far a training is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flashsae.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from flashsae.sae.step import Step


@dataclass(frozen=True)
class Parameter:
    """A row of the table of parameters: all that initialising, rescaling, training, planning and saving must know.

    Args:
        name: attribute of the SAE, and name in files.
        shape: named sizes, of d_in, d_out and d_sae; () for one number.
        initial: "unit_rows" (random directions), a number to fill with, or the name of the parameter to start equal to.
        power: of the scale of the activations: an SAE for c · x has c**power times this. 0 for weights, 1 for biases
            and thresholds.
        factored: the gradient is left as factors, which the optimiser consumes in the latent pass: for weight matrices
            with a row a latent.
        unit_norm: rows keep norm 1.
        trained: has a gradient; False for what a step of training updates by itself, such as a running threshold.
        saved: False for what only a training needs, such as a running mean: checkpoints hold it, and an SAE that is
            finished or loaded has its initial value.
        meaning: one clause.
    """

    name: str
    shape: tuple[str, ...]
    meaning: str
    initial: str | float = 0.0
    power: int = 0
    factored: bool = False
    unit_norm: bool = False
    trained: bool = True
    saved: bool = True

    @property
    def per_latent(self) -> bool:
        """Whether it is a row or number a latent, and so is cut where latents are spread over devices."""
        return self.shape[:1] == ("d_sae",)

    def sizes(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Return its shape in numbers."""
        return tuple(sizes[name] for name in self.shape)


@dataclass(frozen=True)
class Term:
    """A part of the loss.

    Args:
        name: in the log.
        formula: in the words of the field.
        caption: a sentence for the report.
        compute: a scalar of a `Step`, or None where there is nothing to compute this time.
        weight: what it is multiplied by: a number, or the name of a setting of the architecture or of the training, or
            a function of the settings of the architecture, which the log calls by its name. 0 leaves it out.
        of_dead_latents: whether it needs `Step.dead`.
    """

    name: str
    formula: str
    caption: str
    compute: Callable[[Step], Tensor | None]
    weight: float | str | Callable[[Any], float] = 1.0
    of_dead_latents: bool = False

    def weight_in(self, *settings: object) -> float:
        """Return the weight, read from the first of these settings that has it; ConfigError where none has."""
        if callable(self.weight):
            return float(self.weight(settings[0]))
        if not isinstance(self.weight, str):
            return self.weight
        for each in settings:
            if hasattr(each, self.weight):
                value = getattr(each, self.weight)
                if value is None:
                    raise ConfigError(f"{self.weight}: it is left open here; config.resolve(d_in) gives its default.")
                return float(value)
        raise ConfigError(
            f"weight of {self.name}: expected a setting {self.weight!r} of the architecture or of a "
            "flashsae.TrainConfig, and there is none here."
        )


@dataclass(frozen=True)
class Progress:
    """How far a training is.

    Args:
        step: steps that are done.
        steps: of the whole training.
        seed: of the training, for what is drawn anew at each step.
    """

    step: int
    steps: int
    seed: int = 0

    @classmethod
    def end(cls) -> Progress:
        """Return that of an SAE which is trained."""
        return cls(1, 1)

    @property
    def fraction(self) -> float:
        """The share of the steps that are done: 0 at the first step, below 1 at the last, 1 behind it."""
        return self.step / self.steps


AUTOENCODER = (
    Parameter("W_enc_T", ("d_sae", "d_in"), "encoder, a row a latent", "W_dec", factored=True),
    Parameter("b_enc", ("d_sae",), "bias of the encoder", power=1),
    Parameter("W_dec", ("d_sae", "d_out"), "decoder, a row a latent", "unit_rows", factored=True, unit_norm=True),
    Parameter("b_dec", ("d_out",), "bias of the decoder", power=1),
)
"""The parameters that all autoencoders share."""

X_MEAN = Parameter(
    "x_mean", ("d_in",), "what is subtracted from x in training, and taken over by biases", power=1, trained=False,
    saved=False,
)  # fmt: skip
"""Of architectures that do not subtract b_dec: `flashsae.sae.centring`."""

RECONSTRUCTION = Term(
    "fvu",
    "Σ‖x − x_hat‖² / (tokens · variance of a token)",
    "Fraction of the variance that the reconstruction of a training batch leaves unexplained.",
    lambda step: step.decoded.loss,
)

NESTED = Term(
    "nested_fvu",
    "Σ over levels of weight · Σ‖x − x_hat_level‖² / (tokens · variance of a token)",
    "What the nested reconstructions of a training batch leave unexplained, weighted; the last of them is the FVU.",
    lambda step: step.decoded.loss,
)
"""In place of the reconstruction, where there are `Architecture.levels`. The FVU of all latents is logged beside it."""

AUXK = Term(
    "auxk_loss",
    "Σ‖residual − residual_hat‖² / Σ‖residual‖²",
    "How badly dead latents explain what the living ones left over (AuxK, Gao et al. 2024): 1 where they give nothing. "
    "The setting auxk may name the formula of another library.",
    lambda step: step.auxk_loss(),
    weight="auxk_alpha",
    of_dead_latents=True,
)
