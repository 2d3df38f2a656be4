"""Which hookpoints make an SAE: one each, the sites of a transcoder in their order, or all sites of a crosscoder."""

from __future__ import annotations

from collections.abc import Sequence

from flashsae.data.existing import held_hookpoints
from flashsae.errors import ConfigError
from flashsae.lm.hookpoints import INPUT, is_input, module_of, patterns_in

_EACH = "Name each: --hookpoint A --hookpoint B ..."
_ADVICE = "Name a module, for its input and output, or both places: --hookpoint h.3.mlp:in --hookpoint h.3.mlp."


def spread(setting: str, sites: Sequence[str]) -> str:
    """Return a setting that names a hookpoint, or a pattern, for each site.

    Of two sites a module alone stands for what it is given and what it gives.

    Args:
        setting: patterns, with commas between them.
        sites: of an SAE; none where it takes all that there are.
    Raises:
        ConfigError: there are more or fewer than sites.
    """
    patterns = patterns_in(setting)
    if len(sites) == 2 and len(patterns) == 1 and ":" not in setting:
        patterns = [f"{setting.strip()}{INPUT}", setting.strip()]
    if len(sites) > 1 and len(patterns) != len(sites):
        raise ConfigError(
            f"hookpoint: expected {len(sites)}, of {' and '.join(sites)} in this order, got {len(patterns)} "
            f"({setting}).{' ' + (_ADVICE if len(sites) == 2 else _EACH)}"
        )
    return ", ".join(patterns)


def arrange(setting: str | None, held: Sequence[str], sites: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Return the hookpoints of each SAE that is to be trained, by its name: these, with commas between them.

    Of one site, each hookpoint makes an SAE. Of several, the first that each pattern stands for make the first SAE, the
    second ones the second. Where an SAE takes all that there are, they make one.

    Args:
        setting: what is asked for, as `spread` returns it; None is all that is held: of two sites, what modules are
            given and what they give.
        held: hookpoints whose activations are, or can be, there.
        sites: of an SAE; none where it takes all that there are.
    Raises:
        ConfigError: they do not make whole SAEs.
    """
    named = [held_hookpoints(pattern, held) for pattern in patterns_in(setting)] if setting else _all(held, sites)
    if len(sites) < 2:
        of_each = list(dict.fromkeys(name for names in named for name in names))
        groups = [(name,) for name in of_each] if sites else [tuple(of_each)]
    elif len({len(names) for names in named}) > 1:
        told = " and ".join(f"{len(names)} ({', '.join(names)})" for names in named)
        raise ConfigError(f"hookpoint: expected patterns that stand for equally many hookpoints, got {told}.")
    else:
        groups = list(zip(*named))
    for group in groups:
        if len(group) < max(len(sites), 1 if sites else 2) or len(set(group)) < len(group):
            raise ConfigError(
                f"hookpoint: expected {len(sites) or 'two or more'} different ones, got {', '.join(group) or 'none'}. "
                f"{_EACH}"
            )
    return {", ".join(group): group for group in groups}


def _all(held: Sequence[str], sites: Sequence[str]) -> list[list[str]]:
    """Return what stands for each site where nothing is asked for."""
    if len(sites) < 2:
        return [list(held)]
    modules = [module_of(name) for name in held if is_input(name) and module_of(name) in held]
    if len(sites) != 2 or not modules:
        raise ConfigError(
            f"hookpoint: expected {len(sites)}, of {' and '.join(sites)} in this order, and none of the held "
            f"{', '.join(held)} say which is which. Name them: --hookpoint A --hookpoint B."
        )
    return [[f"{module}{INPUT}" for module in modules], modules]
