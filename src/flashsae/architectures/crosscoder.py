"""Crosscoders: one dictionary for several sites, such as layers of a model, or two models on the same tokens.

    code = selection of Σ_s W_enc[s] x[s] + b_enc
    x_hat[s] = W_dec[s] code + b_dec[s]
    loss = Σ_s ‖x[s] − x_hat[s]‖²

Sites stand beside each other: W_enc[s] and W_dec[s] are the columns of a site in W_enc_T and W_dec, b_dec[s] its part
of b_dec. Latents are selected by what they count for at all sites together,

    acts_i · Σ_s ‖W_dec[i, s]‖,

in BatchTopK over a batch, and in inference above a threshold of the same number; norms have no gradient there. Over
ReLU or JumpReLU latents are active as they are in these, and a penalty of their values is one of that product, with a
gradient of the norms, too. A latent and its row of W_dec can be scaled against each other
without changing anything, so the row as a whole has norm 1, and the sum is between 1 and the root of the number of
sites: it says over how many of them the latent is spread.

By default each site is scaled to a unit mean square for the training (about its mean where that is longer than what
tokens deviate by), so that none outweighs the others, and this is folded into what is saved. Columns of W_dec then
have other norms; `site_scale` has the factors, so that latents are selected as they were in training.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import flashsae
from flashsae.architecture import X_MEAN, Architecture, Parameter, Term, composed_name, composed_settings
from flashsae.errors import ConfigError
from flashsae.settings.kinds import PositiveInt

BASE = "batch_topk"
SETTINGS = """
sites: Names of the sites, in their order. May be repeated. Default: as they come.
widths: Widths that the activations of the sites must have, in their order. May be repeated. Default: as they come.
"""
SITE_SCALE = Parameter(
    "site_scale", ("d_out",), "what columns of W_dec count for in a selection", 1.0, power=-1, trained=False
)


def norms_of_sites(sae: Any) -> Any:
    """Return Σ_s ‖W_dec[i, s]‖ of each latent, [d_sae], as in training: each column of W_dec is read once."""
    norms = flashsae.ops.block_norms(sae.W_dec, sae.config.arch.widths)
    starts = [columns.start for columns in sae.config.columns.values()]
    return sum(norms[:, place] * sae.site_scale[start].to(norms.dtype) for place, start in enumerate(starts))


def weighted(term: Term) -> Term:
    """Return a term of values of latents as one of these times the norms of their decoders at all sites."""

    def compute(step: Any) -> Any:
        norms = flashsae.ops.per_latent(norms_of_sites(step.sae), step.code.pattern)
        return term.compute(replace(step, code=step.code.replace(step.code.acts * norms)))

    return replace(term, compute=compute)


def latents_of_widest_site(config: Any) -> int:
    """The next power of two from 8 x the width of the widest site."""
    return 1 << int(8 * max(config.arch.widths) - 1).bit_length()


def compose(base: Architecture) -> Architecture:
    """Return the crosscoder with the selection of another architecture.

    Raises:
        ConfigError: it neither selects by what `sae.selection_scale` says, nor has a penalty of values of latents.
    """
    if not (base.scales or base.weighs) or len(base.sites) != 1 or base.direct is not None:
        raise ConfigError(
            f"arch: a crosscoder goes by values of latents times the norms of their decoders, and {base.title} has no "
            "place for them; compose crosscoder of batch_topk, topk, abs_topk, matryoshka, relu or jump_relu."
        )
    name = composed_name("crosscoder", base, BASE)

    def initialize(sae: Any, x: Any, target: Any) -> None:
        flashsae.sae.center(sae, x)
        (base.initialize or flashsae.sae.initialize)(sae, x, target)

    # a threshold that is one number is one of values times norms, which have no unit
    rows = (replace(row, power=0) if (row.name, row.shape) == ("threshold", ()) else row for row in base.parameters)
    return replace(
        base,
        name=name,
        title="Crosscoder" if base.name == BASE else f"{base.title} crosscoder",
        settings=composed_settings(
            name,
            base.settings,
            SETTINGS,
            sites=(tuple[str, ...] | None, None),
            widths=(tuple[PositiveInt, ...] | None, None),
        ),
        parameters=(*rows, SITE_SCALE, X_MEAN),
        reads=(),
        writes=(),
        subtracts_b_dec=False,
        selects_by=norms_of_sites if base.scales else None,
        terms=tuple(weighted(term) if term.name in base.weighs else term for term in base.terms),
        initialize=initialize,
        defaults={
            **base.defaults,
            "d_sae": latents_of_widest_site,
            "normalize_activations": "mean_square",
        },
        source=f"Lindsey et al. 2024, Sparse crosscoders; the selection: Minder et al. 2025, section 3; {base.source}",
    )
