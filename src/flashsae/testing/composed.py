"""Dense oracles of architectures that are made of another one: of several sites, or nested."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flashsae.errors import ConfigError
from flashsae.testing.oracles import ORACLES, DenseStep, Oracle, Params, TopK, dense_prefixes, stable_topk


def _transcoder(base: Oracle) -> Oracle:
    """Subtract nothing from what is read."""
    return replace(base, params=tuple(name for name in base.params if name != "b_dec"))


def _skip_transcoder(base: Oracle) -> Oracle:
    """Leave to the terms of a transcoder what W_skip x does not give; that of gates has it frozen, as the decoder."""

    def beside(name: str, term: Callable[[DenseStep], Tensor | None]) -> Callable[[DenseStep], Tensor | None]:
        def compute(step: DenseStep) -> Tensor | None:
            W_skip = step.params["W_skip"]
            skip = F.linear(step.x, W_skip.detach() if name == "gate_fvu" else W_skip)
            return term(replace(step, target=step.target - skip))

        return compute

    made = _transcoder(base)
    return replace(made, terms={name: beside(name, term) for name, term in made.terms.items()})


def _matryoshka(base: Oracle) -> Oracle:
    """Have nested reconstructions in place of the one, and of those of other nested entries."""
    others = {name: term for name, term in base.terms.items() if name not in ("fvu", "multi_topk_loss")}
    return replace(base, terms={"nested_fvu": dense_prefixes, **others})


@dataclass(frozen=True)
class _Crosscoder(Oracle):
    """Selects by values times Σ over sites of the norms of their decoders; `widths` is a setting."""

    def __call__(self, x: Tensor, params: Params, *, topk: TopK = stable_topk, **settings: Any) -> Tensor:
        """As of `Oracle`."""
        norms = _norms(params["W_dec"].detach(), settings["widths"])

        def by_norm(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
            places = topk((values.view(len(x), -1) * norms).view_as(values), k)[1]
            return values.gather(-1, places), places

        return super().__call__(x, params, topk=by_norm, **settings)

    def losses(self, x: Tensor, params: Params, variance: float, **given: Any) -> dict[str, Tensor]:
        """As of `Oracle`; terms that choose among latents find the norms as `key_scale`."""
        return super().losses(x, params, variance, key_scale=_norms(params["W_dec"].detach(), given["widths"]), **given)


def _norms(W_dec: Tensor, widths: Sequence[int]) -> Tensor:
    """Return Σ over sites of the norms of their decoders, [d_sae]."""
    return torch.stack([of_site.norm(dim=1) for of_site in torch.split(W_dec, list(widths), dim=1)]).sum(0)


def _crosscoder(base: Oracle) -> Oracle:
    """Select by values times norms of all sites, or weight penalties of values by these."""

    def weighted(term: Callable[[DenseStep], Tensor | None]) -> Callable[[DenseStep], Tensor | None]:
        def compute(step: DenseStep) -> Tensor | None:
            norms = _norms(step.params["W_dec"], step.settings.widths)
            unit = {**step.params, "W_dec": F.normalize(step.params["W_dec"].detach(), dim=1)}  # no norms but these
            return term(replace(step, params=unit, latent_acts=step.latent_acts * norms))

        return compute

    made = _transcoder(base)
    terms = {
        name: weighted(term) if name in ("sparsity", "tanh_penalty") else term for name, term in made.terms.items()
    }
    return _Crosscoder(**{**vars(made), "terms": terms})


COMPOSED = {
    "matryoshka": (_matryoshka, "batch_topk"),
    "transcoder": (_transcoder, "topk"),
    "skip_transcoder": (_skip_transcoder, "topk"),
    "crosscoder": (_crosscoder, "batch_topk"),
}
"""What makes the oracle of an architecture of that of another one, and which that is by default."""


def oracle(architecture: str) -> Oracle:
    """Return the dense oracle of an architecture: `oracle("topk")(x, params, k=32)`.

    Raises:
        ConfigError: there is none.
    """
    outer, _, inner = architecture.partition(":")
    if architecture not in ORACLES and outer in COMPOSED:
        compose, default = COMPOSED[outer]
        return compose(oracle(inner or default))
    if architecture not in ORACLES:
        raise ConfigError(f"architecture: expected one of {', '.join((*ORACLES, *COMPOSED))}, got {architecture!r}.")
    return ORACLES[architecture]
