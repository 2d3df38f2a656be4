"""What an SAE architecture is: a value made of small ones, found by its name. No torch here: help texts need it too.

The training loop, the optimiser, the plan, checkpoints, evaluation and report read this description and never learn a
name. Ours stand in `flashsae/architectures`, one file each; yours is registered from wherever it stands, or found by an
entry point "flashsae.architectures" of a package (docs/adding-an-architecture.md).
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any

from flashsae.architecture_check import check_architecture
from flashsae.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from flashsae.ops.code import SparseCode
    from flashsae.sae.module import SAE
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
        weight: what it is multiplied by: a number, or the name of a setting of the architecture or of the training. 0
            leaves it out.
        of_dead_latents: whether it needs `Step.dead`.
    """

    name: str
    formula: str
    caption: str
    compute: Callable[[Step], Tensor | None]
    weight: float | str = 1.0
    of_dead_latents: bool = False

    def weight_in(self, *settings: object) -> float:
        """Return the weight, read from the first of these settings that has it; ConfigError where none has."""
        if not isinstance(self.weight, str):
            return self.weight
        for each in settings:
            if hasattr(each, self.weight):
                return float(getattr(each, self.weight))
        raise ConfigError(
            f"weight of {self.name}: expected a setting {self.weight!r} of the architecture or of a "
            "flashsae.TrainConfig, and there is none here."
        )


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
        most: latents that are selected for each token at most, of the settings; None where there is no such number.
        reads: sites that go in, in this order.
        writes: sites that are reconstructed. An autoencoder writes what it reads.
        subtracts_b_dec: whether the encoder sees x - b_dec.
        initialize: sets the parameters from a sample, before the first step. None: as `flashsae.sae.initialize`.
        after_step: updates what is not trained, of the SAE and the code of a step; waits for nothing.
        finish: makes of a trained SAE one for inference, in place, such as by folding norms into weights.
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
    initialize: Callable[[SAE, Tensor, Tensor], None] | None = None
    after_step: Callable[[SAE, SparseCode], None] | None = None
    finish: Callable[[SAE], None] | None = None
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
        named = list(batch)
        if len(named) != len(self.sites):
            raise ConfigError(
                f"{self.title} takes the activations of {len(self.sites)} ({', '.join(self.sites)}), got those of "
                f"{len(named)} ({', '.join(named)})."
            )
        names = dict(zip(self.sites, self.sites if set(named) == set(self.sites) else named))
        return [names[site] for site in self.reads], [names[site] for site in self.writes]


AUTOENCODER = (
    Parameter("W_enc_T", ("d_sae", "d_in"), "encoder, a row a latent", "W_dec", factored=True),
    Parameter("b_enc", ("d_sae",), "bias of the encoder", power=1),
    Parameter("W_dec", ("d_sae", "d_out"), "decoder, a row a latent", "unit_rows", factored=True, unit_norm=True),
    Parameter("b_dec", ("d_out",), "bias of the decoder", power=1),
)
"""The parameters that all autoencoders share."""

RECONSTRUCTION = Term(
    "fvu",
    "Σ‖x − x_hat‖² / (tokens · variance of a token)",
    "Fraction of the variance that the reconstruction of a training batch leaves unexplained.",
    lambda step: step.decoded.loss,
)

AUXK = Term(
    "auxk_loss",
    "Σ‖residual − residual_hat‖² / Σ‖residual‖²",
    "How badly dead latents explain what the living ones left over (AuxK, Gao et al. 2024): 1 where they give nothing.",
    lambda step: step.auxk_loss(),
    weight="auxk_alpha",
    of_dead_latents=True,
)

_OURS = _ENTRY_POINTS = "flashsae.architectures"
_REGISTERED: dict[str, Architecture] = {}


def register(architecture: Architecture) -> Architecture:
    """Make an architecture known by its name, and by the class of its settings; return it.

    A name is registered again by the same class of settings, or by the same lines run once more, as a notebook does.

    Raises:
        ConfigError: it is not what an `Architecture` has to be, or its name or settings belong to another one.
    """
    check_architecture(architecture)
    name, settings = architecture.name, architecture.settings
    if name in _ours() and name not in _REGISTERED:
        _REGISTERED[name] = import_module(f"{_OURS}.{name}").ARCHITECTURE
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
    return sorted({*_REGISTERED, *_ours(), *(_installed() if installed else ())})


def _ours() -> list[str]:
    return [module.name for module in pkgutil.iter_modules(import_module(_OURS).__path__)]


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
    if name in _ours():
        return register(import_module(f"{_OURS}.{name}").ARCHITECTURE)
    entry = _installed().get(name)
    if entry is None:
        raise ConfigError(
            f"arch: expected one of {', '.join(architecture_names())}, got {name!r}. One of your own has to be "
            f"registered first: import the module that calls flashsae.register, or install it with an entry point "
            f"{_ENTRY_POINTS}."
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
    package = type(settings).__module__.partition(".")[0]
    for names in (lambda: list(_REGISTERED), _ours, lambda: _installed(package)):
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
