"""What an SAE architecture is: a value made of small ones, found by its name. No torch here: help texts need it too.

The training loop, the optimiser, the plan, checkpoints, evaluation and report read this description and never learn a
name. Ours stand in `flashsae/architectures`, one file each; yours is registered from wherever it stands, or found by an
entry point "flashsae.architectures" of a package (docs/adding-an-architecture.md).
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any

from flashsae.architecture.check import check_architecture
from flashsae.architecture.parts import Parameter, Progress, Term
from flashsae.architecture.sites import read_and_written
from flashsae.errors import ConfigError
from flashsae.natural import did_you_mean

if TYPE_CHECKING:
    from torch import Tensor

    from flashsae.ops.code import SparseCode
    from flashsae.sae.config import SAEConfig
    from flashsae.sae.module import SAE


@dataclass(frozen=True)
class Architecture:
    """A kind of SAE.

    Args:
        name: of the option --arch, and in files.
        title: for people.
        settings: a frozen dataclass of its own settings, each field with a default, a type and range of
            `flashsae.settings.kinds`, and a line under "Args:" of its docstring, which is the help text.
        parameters: the table. W_enc_T, b_enc, W_dec and b_dec are in it.
        encode: from x ([B, d_in], sites beside each other) to a code: the selection and what follows it. Reads
            `sae.training` where training and inference differ.
        terms: of the loss. The first is the reconstruction, relative to the variance.
        l0: expected number of active latents a token, of the settings; for the plan.
        most: latents that are selected for each token at most, of the settings; None where there is no such number, as
            over a batch or above a threshold, which are never screened in 8 bits.
        reads: sites that go in, in this order; () for all sites of a batch, two or more, which are written too. Its
            settings then have `sites` and `widths`, which training fills in with their names and widths.
        writes: sites that are reconstructed. An autoencoder writes what it reads.
        subtracts_b_dec: whether the encoder sees x - b_dec.
        selects_by: what pre-activations are multiplied by where latents are selected, and there alone: of an SAE,
            [d_sae], not negative. encode finds it in `sae.selection_scale`.
        scales: whether encode heeds `sae.selection_scale`, so that a crosscoder can be made of this architecture.
        weighs: names of terms that grow with the values of latents: a crosscoder weights these by the norms of sites.
        initialize: sets the parameters from a sample, before the first step. None: as `flashsae.sae.initialize`.
        after_step: updates what is not trained, of the SAE and the code of a step; waits for nothing.
        recenter: of an SAE and a vector [d_in], float64: changes its biases so that it computes the same where its
            encoder sees x less this. None: b_enc takes all over. For what does not subtract b_dec.
        verdict: of an SAE at the end of its training, a sentence for the user where it is not what was asked for.
        finish: makes of a trained SAE one for inference, in place, such as by folding norms into weights.
        direct: what is added to the reconstruction beside the code, of x: [B, d_in] -> [B, d_out], differentiable.
        levels: of an SAE and a code, what `flashsae.ops.decode_loss` needs to know of nested reconstructions: prefixes
            or budgets, and level_weights. The first term is then `NESTED`.
        level_count: how many levels these are at most, of the settings; for the plan. None: one.
        main_part: of an SAE and a code in training, the part that inference would give, where the loss is of more: what
            is logged and counted, and what the reconstruction is of outside the loss.
        schedule: numbers that change from step to step, or lists of as many numbers each time; encode and terms find
            them in `sae.now`, on the device. The numbers of `Progress.end()` are those of inference.
        width: latents of a token that a code with a fixed number of them has room for at a step, as `sae.width`. On a
            GPU a step is captured anew whenever it changes: round it up coarsely.
        varies: whether encode makes codes above a threshold, with room for `sae.capacity` entries. Training sees to it
            that they have room for all.
        each_by_itself: whether a latent is active by its own pre-activation, biases and threshold alone, so that it can
            be scaled against its row of W_dec.
        signed: whether latents have values of either sign, so that what is selected is the largest by magnitude.
        defaults: for settings of the training that are left open, such as lr: values, or functions of the settings,
            whose docstring says in the help what they give.
        source: of the definition.
    """

    name: str
    title: str
    settings: type
    parameters: tuple[Parameter, ...]
    encode: Callable[[SAE, Tensor], SparseCode]
    terms: tuple[Term, ...]
    l0: Callable[[Any], float]
    most: Callable[[Any], int] | None = None
    reads: tuple[str, ...] = ("x",)
    writes: tuple[str, ...] = ("x",)
    subtracts_b_dec: bool = True
    selects_by: Callable[[SAE], Tensor] | None = None
    scales: bool = False
    weighs: tuple[str, ...] = ()
    initialize: Callable[[SAE, Tensor, Tensor], None] | None = None
    after_step: Callable[[SAE, SparseCode], None] | None = None
    recenter: Callable[[SAE, Tensor], None] | None = None
    verdict: Callable[[SAE], str | None] | None = None
    finish: Callable[[SAE], None] | None = None
    direct: Callable[[SAE, Tensor], Tensor] | None = None
    levels: Callable[[SAE, SparseCode], Mapping[str, Any]] | None = None
    level_count: Callable[[Any], int] | None = None
    main_part: Callable[[SAE, SparseCode], SparseCode] | None = None
    schedule: Callable[[SAEConfig, Progress], Mapping[str, float | Sequence[float]]] | None = None
    width: Callable[[Any, Progress], int] | None = None
    varies: bool = False
    each_by_itself: bool = False
    signed: bool = False
    defaults: Mapping[str, Any] = field(default_factory=dict)
    source: str = ""

    def __reduce__(self) -> tuple[Callable[[str], Architecture], tuple[str]]:
        """Copy and pickle as a name: functions without one cannot be pickled, and what is registered is there once."""
        return architecture_named, (self.name,)

    def __deepcopy__(self, memo: object) -> Architecture:
        """Return itself: nothing in it can change, and another may have its name by now."""
        return self

    @property
    def sites(self) -> tuple[str, ...]:
        """Every site once, those that are read first."""
        return tuple(dict.fromkeys((*self.reads, *self.writes)))

    def sites_of(self, batch: Iterable[str]) -> tuple[list[str], list[str]]:
        """Return which sites of a batch are read and which are written.

        Args:
            batch: names of its sites: those of `sites` in any order, or others in that order.
        Raises:
            ConfigError: there are more or fewer.
        """
        return read_and_written(self, batch)


OURS = _ENTRY_POINTS = "flashsae.architectures"
_REGISTERED: dict[str, Architecture] = {}
_COMPOSED: dict[tuple[str, int], tuple[Architecture, Architecture]] = {}
"""What was made of which architecture, so that there is one class of settings of each."""


def register(architecture: Architecture) -> Architecture:
    """Make an architecture known by its name, and by the class of its settings; return it.

    A name is registered again by the same class of settings, or by the same lines run once more, as a notebook does.

    Raises:
        ConfigError: it is not what an `Architecture` has to be, or its name or settings belong to another one.
    """
    check_architecture(architecture)
    name, settings = architecture.name, architecture.settings
    if name in _ours() and name not in _REGISTERED:
        _REGISTERED[name] = _own(name)
    for other in _REGISTERED.values():
        has_name = other.name == name and _defined(other.settings) != _defined(settings)
        if has_name or (other.name != name and other.settings is settings):
            raise ConfigError(
                f"{name}: expected a name and settings of its own, but {other.title} has "
                f"{'this name' if has_name else 'these settings'}."
            )
    _REGISTERED[architecture.name] = architecture
    return architecture


def _defined(settings: type) -> tuple[str, str]:
    """Return where a class is defined."""
    return settings.__module__, settings.__qualname__


def architecture_names(*, installed: bool = True) -> list[str]:
    """Return the names of all architectures: ours, those registered so far, and those of installed packages.

    Args:
        installed: False leaves the last ones out, whose search takes longer than a help text may.
    """
    ours = _ours()
    registered = (
        name for name in _REGISTERED if name.partition(":")[0] not in ours
    )  # those are made of ours on demand
    return sorted({*registered, *ours, *(_installed() if installed else ())})


def _own(name: str, base: str | None = None) -> Architecture:
    """Return one of ours: what its file defines, or composes of another architecture."""
    module = import_module(f"{OURS}.{name}")
    compose = getattr(module, "compose", None)
    if compose is None:
        if base is not None:
            raise ConfigError(f"arch: {name} is not made of another architecture; leave out :{base}.")
        return module.ARCHITECTURE  # type: ignore[no-any-return]
    inner = architecture_named(module.BASE if base is None else base)
    if (name, id(inner)) not in _COMPOSED:
        _COMPOSED[name, id(inner)] = inner, compose(inner)
    return _COMPOSED[name, id(inner)][1]


def _ours() -> list[str]:
    return [module.name for module in pkgutil.iter_modules(import_module(OURS).__path__)]


def _installed(package: str = "") -> dict[str, EntryPoint]:
    """Return where installed packages, or one, have architectures, by name; reads metadata and imports nothing."""
    found = entry_points(group=_ENTRY_POINTS)
    return {entry.name: entry for entry in found if package in ("", entry.value.partition(":")[0].partition(".")[0])}


def architecture_named(name: str) -> Architecture:
    """Return an architecture by name.

    Raises:
        ConfigError: there is none of this name.
    """
    if name in _REGISTERED:
        return _REGISTERED[name]
    outer, is_composed, inner = name.partition(":")
    if outer in _ours():
        made = _own(outer, inner if is_composed else None)
        return _REGISTERED[made.name] if made.name in _REGISTERED else register(made)
    entry = _installed().get(name)
    if entry is None:
        raise ConfigError(
            f"arch: expected one of {', '.join(architecture_names())}, got {name!r}."
            f"{did_you_mean(name, architecture_names())} One of your own has to be registered first: import the module "
            f"that calls flashsae.register, or install it with an entry point {_ENTRY_POINTS}."
        )
    found = _load(entry)
    if not isinstance(found, Architecture) or found.name != name:
        raise ConfigError(f"arch: expected {entry.value} to be an Architecture named {name!r}, got {found!r:.60}.")
    return register(found)


def _load(entry: EntryPoint) -> object:
    try:
        return entry.load()
    except Exception as error:  # whatever the code of others raises
        raise ConfigError(
            f"arch: {entry.name!r} cannot be loaded from {entry.value} ({type(error).__name__}: {error}). Repair or "
            "remove the package that it is installed with."
        ) from error


def architecture_of(settings: object) -> Architecture:
    """Return the architecture that settings belong to.

    Raises:
        ConfigError: they are those of none.
    """
    package, composed = type(settings).__module__.partition(".")[0], getattr(type(settings), "composed_name", None)
    for names in (
        lambda: list(_REGISTERED),
        _ours,
        lambda: [composed] if composed else [],
        lambda: _installed(package),
    ):
        for name in names():
            if type(settings) is architecture_named(name).settings:
                return architecture_named(name)
    advice = "The class has to be registered: flashsae.register(Architecture(settings=...))."
    if isinstance(settings, type | Architecture):
        advice = "Give an instance of its settings: arch=...Settings()."
    raise ConfigError(
        f"arch: expected settings of an architecture, such as TopKSettings(k=32), got {settings!r:.80}. {advice}"
    )


def settings_of(arch: object, /, **given: Any) -> Any:
    """Return the settings that somebody asks for.

    Args:
        arch: the name of an architecture, or its settings.
        given: settings by name, for an architecture given by name.
    Raises:
        ConfigError: no such architecture or setting, or both settings and single ones are given.
    """
    if not isinstance(arch, str):
        architecture_of(arch)
        if given:
            raise ConfigError(f"{next(iter(given))}: expected it in arch={type(arch).__name__}(...), not beside it.")
        return arch
    settings = architecture_named(arch).settings
    known = [field.name for field in fields(settings)]
    for name in given:
        if name not in known:
            raise ConfigError(f"{name}: {arch} has no such setting; it has {', '.join(known) or 'none'}.")
    return settings(**given)
