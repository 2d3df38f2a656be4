"""The table of metrics: what each is called, means and is computed as, wherever it is logged, stored, printed or drawn.

The keys of metrics.jsonl and evaluation.json are its names, and so are the scalars of TensorBoard and wandb. Terms of
the loss that only an architecture knows join it in `table`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from flashsae.architecture import Term
from flashsae.errors import ConfigError
from flashsae.metrics.numbers import written

HELD_OUT = "held_out_"
"""How the log names what is measured on held-out tokens beside the same of training. evaluation.json is of held-out
tokens throughout, and names it without."""

OUTLIER_NORM_RATIO = 10.0
"""A token is an outlier if its norm exceeds so many times the median norm."""


@dataclass(frozen=True)
class Metric:
    """A row of the table.

    Args:
        name: in files and logs.
        label: a word or two, for a line in the terminal.
        title: of its figure.
        caption: a sentence that says what it is.
        formula: in the words of design and docs; "" where the caption says it all.
        unit: what it counts or is a part of.
        direction: which is better, "lower" or "higher"; None where neither is.
        format: of Python, for its numbers.
        axis: of its curve in the report, "linear" or "log"; None where it has none.
    """

    name: str
    label: str
    title: str
    caption: str
    formula: str = ""
    unit: str = ""
    direction: Literal["lower", "higher"] | None = None
    format: str = ",.0f"
    axis: Literal["linear", "log"] | None = None

    def show(self, value: Any) -> str:
        """Write a value of it."""
        return written(value, self.format)


_FVU = Metric(
    "fvu",
    "FVU",
    "Unexplained variance (FVU)",
    "Fraction of the variance that the SAE does not explain.",
    "Σ‖x − x_hat‖² / Σ‖x − mean x‖²",
    "fraction of the variance",
    "lower",
    ".4f",
    "log",
)
_FVU_WITHOUT_OUTLIERS = Metric(
    "fvu_without_outliers",
    "FVU without outliers",
    "Unexplained variance without outliers",
    "The FVU of the tokens that are no outliers, about their own mean.",
    f"Σ‖x − x_hat‖² / Σ‖x − mean x‖², over tokens with ‖x‖ ≤ {OUTLIER_NORM_RATIO:g} · median ‖x‖",
    "fraction of the variance",
    "lower",
    ".4f",
)
_ROWS = (
    Metric("step", "step", "Step", "Steps done when the line was written.", unit="steps"),
    Metric("tokens", "tokens", "Tokens", "Tokens trained on so far, repeats counted.", "step · batch_tokens", "tokens"),
    Metric(
        "loss",
        "loss",
        "Loss",
        "What training minimises: the terms of the architecture, each times its weight.",
        "Σ weight · term",
        direction="lower",
        format=".4f",
    ),
    _FVU,
    _FVU_WITHOUT_OUTLIERS,
    replace(
        _FVU,
        name=f"{HELD_OUT}fvu",
        label="held-out FVU",
        title="Unexplained variance of held-out tokens",
        caption="Fraction of the variance of tokens that training never saw that the SAE does not explain.",
        axis=None,
    ),
    replace(
        _FVU_WITHOUT_OUTLIERS,
        name=f"{HELD_OUT}fvu_without_outliers",
        label="without outliers",
        title="Unexplained variance of held-out tokens without outliers",
        caption="The held-out FVU of the tokens that are no outliers, about their own mean.",
    ),
    replace(
        _FVU,
        name="site_fvu",
        label="FVU of a site",
        title="Unexplained variance of each site",
        caption="Fraction of the variance of one of several sites that the SAE does not explain.",
        axis=None,
    ),
    Metric(
        "outliers",
        "outliers",
        "Outliers",
        f"Held-out tokens whose norm exceeds {OUTLIER_NORM_RATIO:g} times the median.",
        f"#{{tokens: ‖x‖ > {OUTLIER_NORM_RATIO:g} · median ‖x‖}}",
        "tokens",
    ),
    Metric(
        "l0",
        "L0",
        "Active latents per token (L0)",
        "Mean number of latents of a token whose value is not 0.",
        "#{(token, latent): value ≠ 0} / tokens",
        "active latents per token",
        format=".1f",
        axis="linear",
    ),
    Metric(
        "dead_latents",
        "dead latents",
        "Dead latents",
        "Latents that were active on none of the last dead_after_tokens tokens of training.",
        "#{latents: tokens since it was active ≥ dead_after_tokens}",
        "latents",
        "lower",
        axis="linear",
    ),
    Metric(
        "left_out",
        "left out",
        "Entries left out",
        "Entries of the code of a step that found no place, where the architecture gives it a capacity.",
        "max(0, wanted − capacity)",
        "entries",
        "lower",
        axis="linear",
    ),
    Metric("lr", "lr", "Learning rate", "Step size of Adam.", format=".3g", axis="linear"),
    Metric(
        "grad_norm",
        "gradient norm",
        "Gradient norm",
        "Norm of the gradient of all parameters together, before it is clipped.",
        "√Σ gradient²",
        format=".4g",
    ),
    Metric(
        "tokens_per_second",
        "tokens/s",
        "Tokens per second",
        "Tokens trained on in a second of training alone, without measurements and checkpoints.",
        unit="tokens per second",
        direction="higher",
    ),
    Metric(
        "train_seconds", "training time", "Training time", "Seconds of training alone.", unit="seconds", format=",.1f"
    ),
    Metric("train_tokens", "tokens seen", "Tokens seen", "Tokens of the training, repeats counted.", unit="tokens"),
    Metric("steps", "steps", "Steps", "Steps of the training.", unit="steps"),
    Metric(
        "held_out_tokens",
        "held-out tokens",
        "Held-out tokens",
        "Tokens that training never saw, on which the final figures are measured.",
        unit="tokens",
    ),
    Metric("d_in", "d_in", "Width of the activations", "Numbers in an activation.", unit="numbers"),
    Metric("d_sae", "d_sae", "Latents", "Latents of the SAE.", unit="latents"),
    Metric(
        "latent_density",
        "density",
        "Latent density",
        "Fraction of the tokens of the sample on which each latent is active.",
        "#{tokens: value ≠ 0} / tokens",
        "fraction of tokens",
        format=".2g",
    ),
    Metric(
        "is_dead", "dead", "Dead", "Whether a latent was dead at the end of training.", "see dead_latents", format=".0f"
    ),
    Metric(
        "decoder_norm",
        "norm",
        "Decoder norm",
        "Length of each decoder row.",
        "‖W_dec[latent]‖",
        "norm",
        format=".4g",
    ),
    Metric(
        "encoder_decoder_cosine",
        "alignment",
        "Encoder and decoder agreement",
        "Cosine between what a latent reads and what it writes.",
        "cos(W_enc_T[latent], W_dec[latent])",
        "cosine",
        format=".3g",
    ),
    Metric(
        "nearest_decoder_cosine",
        "nearest",
        "Nearest decoder neighbour",
        "Largest cosine with any other decoder row; 1 is a duplicate.",
        "max over others of cos(W_dec[latent], W_dec[other])",
        "cosine",
        format=".3g",
    ),
)
METRICS: Mapping[str, Metric] = {row.name: row for row in _ROWS}
"""Every metric that FlashSAE itself knows, by name."""


def table(terms: Iterable[Term] = ()) -> dict[str, Metric]:
    """Return METRICS with the terms of a loss, each of which is drawn. The reconstruction has the row of the FVU.

    Args:
        terms: of an architecture.
    Raises:
        ConfigError: a term has the name of another metric.
    """
    rows = dict(METRICS)
    for term in terms:
        if term.name == _FVU.name:
            rows[term.name] = replace(_FVU, formula=term.formula)
        elif term.name in METRICS:
            raise ConfigError(f"term {term.name}: expected a name that no metric has. Give it one of its own.")
        else:
            caption = f"{term.caption} Its weight in the loss is {getattr(term.weight, '__name__', term.weight)}."
            rows[term.name] = replace(bare(term.name), title=_spoken(term.name), caption=caption, formula=term.formula)
    return rows


_CAPITALS = {"auxk": "AuxK", "fvu": "FVU", "l0": "L0"}


def _spoken(name: str) -> str:
    """Return a name as a title: auxk_loss is AuxK loss."""
    words = " ".join(_CAPITALS.get(word, word) for word in name.split("_"))
    return words[:1].upper() + words[1:]


def bare(name: str) -> Metric:
    """Return the row of something that was logged and that nobody knows more of than its name."""
    return Metric(name, name, name, "", format=".4g", axis="linear")


def of_evaluation(name: str) -> Metric:
    """Return the row of a figure in evaluation.json: that of held-out tokens, where training has one of its own.

    Raises:
        KeyError: there is none.
    """
    return METRICS.get(f"{HELD_OUT}{name}") or METRICS[name]
