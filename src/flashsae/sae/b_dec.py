"""SAEs whose encoder sees x as it comes, of architectures whose encoder sees x − b_dec: many public ones are such.

Nothing is folded: b_enc − W_enc_T b_dec would be the same in real arithmetic only. In training such an SAE has a mean
of x to subtract, as other architectures without a b_dec in their encoder do: `flashsae.sae.centring`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from flashsae.architecture import X_MEAN, Architecture
from flashsae.sae.centring import center
from flashsae.sae.initial import initialize

if TYPE_CHECKING:
    from torch import Tensor

_MADE: dict[int, tuple[Architecture, Architecture]] = {}
"""By the identity of what they are made of, which is kept with them, so that there is one of each."""


@dataclass(frozen=True)
class _Unsubtracted(Architecture):
    def __reduce__(self) -> Any:
        """Copy and pickle as what it is made of, which is known by its name."""
        base, _ = next(each for each in _MADE.values() if each[1] is self)
        return architecture_with, (base, False)


def architecture_with(architecture: Architecture, applied: bool) -> Architecture:
    """Return an architecture that subtracts b_dec from what it encodes, or not: itself where it does as it is.

    Args:
        architecture: of a name.
        applied: as `flashsae.settings.normalization.check_b_dec` lets pass.
    """
    if applied == architecture.subtracts_b_dec:
        return architecture
    if id(architecture) not in _MADE:

        def start(sae: Any, x: Tensor, target: Tensor) -> None:
            center(sae, x)
            (architecture.initialize or initialize)(sae, x, target)

        rows = {each.name: getattr(architecture, each.name) for each in fields(Architecture)}
        changed = {"parameters": (*architecture.parameters, X_MEAN), "subtracts_b_dec": False, "initialize": start}
        _MADE[id(architecture)] = architecture, _Unsubtracted(**{**rows, **changed})
    return _MADE[id(architecture)][1]
