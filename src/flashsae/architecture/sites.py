"""Which sites of a batch an architecture reads and writes, and in what words people are told how to give them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from flashsae.errors import ConfigError

if TYPE_CHECKING:
    from flashsae.architecture.description import Architecture

_EXAMPLES = ("layer 3", "layer 6")
"""Names of sites, for architectures that take any."""
_ARRAYS = "xyzuvw"
_MANY = 6


def shown_by_site(sites: Sequence[str]) -> str:
    """Return how activations of some sites are written in Python: {"in": x, "out": y}; of none, those of any sites."""
    named = [f'"{site}": {_ARRAYS[place % len(_ARRAYS)]}' for place, site in enumerate(sites or _EXAMPLES)]
    return f"{{{', '.join(named)}}}"


def width_told(widths: Sequence[float]) -> str:
    """Return widths of sites for people: 384 + 384 + 256, or 12 x 384 where many are equal; "" of none."""
    if len(widths) > _MANY and len(set(widths)) == 1:
        return f"{len(widths)} x {widths[0]:,.0f}"
    return " + ".join(f"{width:,.0f}" for width in widths)


def read_and_written(
    architecture: Architecture, batch: Iterable[str], call: str = "", names: Sequence[str] = ()
) -> tuple[list[str], list[str]]:
    """Do `Architecture.sites_of`.

    Args:
        architecture: any.
        batch: names of the sites of a batch.
        call: how the activations are given where {} stands, for messages; of a training by default.
        names: of the sites of an SAE that takes any, for messages.
    """
    named, sites = list(batch), architecture.sites
    fits = len(named) == len(sites) if sites else len(named) >= 2
    if not fits:
        wanted = f"{len(sites)} ({', '.join(sites)})" if sites else "two sites or more"
        wanted = "one site" if len(sites) == 1 else wanted
        raise ConfigError(
            f"{architecture.title} takes the activations of {wanted}, got those of {len(named)} "
            f"({', '.join(map(str, named)) or 'none'}). {_advice(architecture, named, call, names)}"
        )
    if not sites:
        return named, named
    place = dict(zip(sites, sites if set(named) == set(sites) else named))
    return [place[site] for site in architecture.reads], [place[site] for site in architecture.writes]


def _advice(architecture: Architecture, named: Sequence[str], call: str, names: Sequence[str]) -> str:
    sites, is_training = architecture.sites, not call
    call = call or f'fit({{}}, arch="{architecture.name}")'
    if len(sites) == 1:
        one = f'x["{named[0]}"]' if named else "x"
        return f"Give one: {call.format(one)}; or take an architecture of several, such as crosscoder."
    if not is_training:
        return f"Give them by name: {call.format(shown_by_site(sites or names))}."
    options = "--hookpoint h.3.mlp:in --hookpoint h.3.mlp" if len(sites) == 2 else "--hookpoint h.3 --hookpoint h.6"
    options += " ..." if len(sites) > 2 else ""
    return f"Give them by name: {call.format(shown_by_site(sites))}; on the command line {options}."
