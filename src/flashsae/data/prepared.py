"""Activations before and behind the long work of computing them, and what is asked of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from flashsae.data.acts import X
from flashsae.data.arrangement import arrange, spread
from flashsae.data.sources import Source
from flashsae.lm.hookpoints import patterns_in
from flashsae.settings.reading import ActivationsConfig


@dataclass(frozen=True)
class Activations:
    """Activations that are ready to be read.

    Args:
        sources: by the name of the SAEs that read them: their hookpoint, or several, each a site.
        tokenizer: that of the model, or its `Pictures`; called, because loading it takes a moment.
        joint: returns the activations of some hookpoints in one reading.
        warnings: sentences on what may spoil the result.
    """

    sources: dict[str, Source]
    tokenizer: Callable[[], Any]
    joint: Callable[[Sequence[str]], Source]
    warnings: tuple[str, ...] = ()

    def of(self, names: Sequence[str]) -> Source:
        """Return what some SAEs read, by their names, in one reading: each token once, with all of their sites."""
        if len(set(names)) == 1:
            return self.sources[names[0]]
        return self.joint(list(dict.fromkeys(site for name in names for site in self.sources[name].widths)))


Progress = Callable[[int], None]


@dataclass(frozen=True)
class AskedSites:
    """What SAEs of one kind are to read.

    Args:
        hookpoint: patterns; None is the default, or all that a cache holds.
        sites: of such an SAE; none where it takes all that there are.
    """

    hookpoint: str | None = None
    sites: Sequence[str] = (X,)

    def spread(self) -> AskedSites:
        """Return it with a hookpoint, or a pattern, for each site."""
        return self if self.hookpoint is None else replace(self, hookpoint=spread(self.hookpoint, self.sites))

    def filled(self, config: ActivationsConfig) -> AskedSites:
        """Return it with the hookpoint that is meant where none is named."""
        if self.hookpoint is not None:
            return self
        return replace(self, hookpoint=with_hookpoint(config, None).filled(len(self.sites)).hookpoint)


@dataclass(frozen=True)
class Prepared:
    """Activations of which everything is known and checked, before the long work of computing them.

    Args:
        widths: of the activations by site, of all SAEs by their names, which are those of their hookpoints.
        asked: what was asked for, with the hookpoints that are meant.
        names: those of the SAEs of each request, in its order.
        config: the settings that led here, filled in.
        source: where they come from, in words.
        inputs: says what the model reads, or has read, and what becomes of it.
        compute: does the long work: called with a function that hears of the rows cached so far.
        cache_bytes: size of the cache, at most; 0 for a stream.
        row_bytes: of the activations of a token in the shuffle buffer of a stream; a cache needs no buffer.
        model_bytes: of the language model, if it stays in memory beside the training.
        ready: the activations, where no long work is left.
        of_images: whether the model reads images, so that a token is a patch.
    """

    widths: Mapping[str, Mapping[str, int]]
    asked: Sequence[AskedSites]
    names: Sequence[Sequence[str]]
    config: ActivationsConfig
    source: str
    inputs: Callable[[], str]
    compute: Callable[[Progress], Activations]
    cache_bytes: int = 0
    row_bytes: int = 0
    model_bytes: int = 0
    ready: Activations | None = None
    of_images: bool = False

    @property
    def is_streamed(self) -> bool:
        """Whether a model reads the text beside the training, once."""
        return self.row_bytes > 0


def with_hookpoint(config: ActivationsConfig, hookpoint: str | None) -> ActivationsConfig:
    """Return settings with another hookpoint, or with none, which leaves it open."""
    return replace(config, hookpoint=hookpoint)  # type: ignore[arg-type]  # left open


def asking(config: ActivationsConfig, asked: Sequence[AskedSites]) -> ActivationsConfig:
    """Return settings with all hookpoints that are asked for, each once; as they are where one is left open."""
    hookpoints = [each.hookpoint for each in asked]
    named = [name for name in hookpoints if name is not None]
    if len(named) < len(hookpoints):
        return with_hookpoint(config, None)
    patterns = dict.fromkeys(pattern for name in named for pattern in patterns_in(name))
    return replace(config, hookpoint=", ".join(patterns))


def arranged(asked: Sequence[AskedSites], held: Sequence[str]) -> tuple[dict[str, tuple[str, ...]], list[list[str]]]:
    """Return the hookpoints of all SAEs by name, and the names of those of each request."""
    found = [arrange(each.hookpoint, held, each.sites) for each in asked]
    return {name: group for groups in found for name, group in groups.items()}, [list(groups) for groups in found]
