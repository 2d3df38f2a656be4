"""A training that goes on from a saved SAE."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from flashsae.architecture import Architecture, Parameter, architecture_named, architecture_of, settings_of
from flashsae.errors import CheckpointError, ConfigError
from flashsae.formats.native import FORMAT as OURS
from flashsae.places.finding import find, only
from flashsae.sae.b_dec import architecture_with
from flashsae.sae.config import SAEConfig
from flashsae.sae.module import SAE
from flashsae.sae.stored import config_from, read_config
from flashsae.settings.kinds import declared_types, expand
from flashsae.settings.left_open import fill
from flashsae.settings.normalization import BY_TOKEN
from flashsae.train.config import TrainConfig
from flashsae.train.sample import Sample
from flashsae.train.scaling import Scaling

_UNIT = 0.01
"""How far the norms of rows that keep norm 1 may be from it: bfloat16 rounds by less."""


def holds_sae(path: Path) -> bool:
    """Tell whether a place is that of one SAE, of any format, or of a run that made one."""
    try:
        return len(find(path)) == 1
    except CheckpointError:
        return False


def config_of_start(path: Path) -> SAEConfig:
    """Return what the SAE at a place is.

    Raises:
        CheckpointError: there is none, or several, or it is damaged.
    """
    found = find(path)
    form, place = next(iter(found.values()))
    if len(found) == 1 and form is OURS:
        return read_config(place)  # without its weights
    return config_from(*only(found, path))


def settings_of_start(start: object, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a training that goes on from an SAE, by name: what is left open is as it is there.

    Args:
        start: an SAE, or the place of one, of any format.
        given: settings that somebody asks for, by name; None is the same as leaving one out.
    Returns:
        with d_sae, whether tokens are normalised, and the settings of the architecture; where another one is asked for,
        those that it has too, such as k.
    Raises:
        ConfigError: it is neither, or the architecture has no such setting.
        CheckpointError: there is none in the folder.
    """
    saved = start.config if isinstance(start, SAE) else config_of_start(expand(cast(Any, start), "init_from"))
    of_training = declared_types(TrainConfig)
    asked = {name: value for name, value in given.items() if value is not None}
    settings = {"d_sae": saved.d_sae, **asked}
    if saved.normalize_activations in BY_TOKEN:
        settings = {"normalize_activations": saved.normalize_activations, **settings}
    arch = asked.get("arch", saved.architecture.name)
    if isinstance(arch, str):
        known = {each.name for each in fields(architecture_named(arch).settings)}
        own = {name: settings.pop(name) for name in asked if name not in of_training}
        was = {name: value for name, value in asdict(saved.arch).items() if name in known}
        settings["arch"] = settings_of(arch, **{**was, **own})
    base = architecture_named(arch) if isinstance(arch, str) else architecture_of(arch)
    if base.subtracts_b_dec and not saved.apply_b_dec_to_input:
        settings = {"apply_b_dec_to_input": False, **settings}
    return settings


def check_saved_start(config: TrainConfig) -> None:
    """Raise what `check_start` does, of the SAE that settings name, before anything is done."""
    if config.init_from is None or len(find(config.init_from)) > 1:
        return  # of a run over several hookpoints there is one for each
    check_start(config, config_of_start(config.init_from))


def check_start(config: TrainConfig, saved: SAEConfig) -> None:
    """Raise ConfigError unless a training with these settings can go on from an SAE; names all that is in the way.

    Args:
        config: settings, which need not be resolved.
        saved: of the SAE.
    """
    base = architecture_of(config.arch)
    d_in, d_out = config.d_in or saved.d_in, config.d_out or saved.d_out
    config = fill(replace(config, d_in=d_in, d_out=d_out), before=base.defaults)
    applied = config.apply_b_dec_to_input
    asked = architecture_with(base, base.subtracts_b_dec if applied is None else applied)
    differences = [
        f"{name} {there_is}, and not {getattr(config, name)}"
        for name, there_is in saved.sizes.items()
        if getattr(config, name) != there_is
    ]
    differences += _unlike(saved.architecture, asked)
    was, now = (
        each if each in BY_TOKEN else "" for each in (saved.normalize_activations, config.normalize_activations)
    )
    if was != now:
        differences.append(f"normalize_activations {was or f'other than {now}'}")
    if differences:
        raise ConfigError(
            f"init_from: expected an SAE like the one that is asked for, {asked.title}, but it is one of "
            f"{saved.architecture.name} with {'; '.join(differences)}. Ask for such a one, or start anew."
        )


def _unlike(saved: Architecture, asked: Architecture) -> list[str]:
    """Return what parameters of one architecture would not mean in another."""
    tables = [{row.name: row.shape for row in each.parameters if row.trained} for each in (saved, asked)]
    names = sorted({*tables[0], *tables[1]})
    differences = [
        f"{name} of its own" for name in names if name in tables[0] and tables[0][name] != tables[1].get(name)
    ]
    differences += [f"no {name}" for name in names if name not in tables[0]]
    if (saved.reads, saved.writes) != (asked.reads, asked.writes):
        differences.append("other sites")
    if saved.subtracts_b_dec != asked.subtracts_b_dec:
        differences.append(f"{'a' if saved.subtracts_b_dec else 'no'} b_dec that is subtracted from its input")
    if (saved.direct is None) != (asked.direct is None):
        differences.append("another way from its input to its output")
    return differences


@torch.no_grad()
def start_from(sae: SAE, saved: SAE, scaling: Scaling) -> None:
    """Let an SAE begin as a saved one, in the units of a training: it computes the same, up to rounding.

    Parameters that the other one has not, and that are not trained, such as a running threshold, stay as they are.

    Args:
        sae: changed in place.
        saved: of an architecture that `check_start` lets pass.
        scaling: of the training.
    Raises:
        ConfigError: rows that keep norm 1 in training have others, and to make them so would change a selection.
    """
    values = scaling.unfolded(saved.float() if saved.W_dec.dtype.itemsize < 4 else saved).state_dict()
    table = sae.architecture.parameters
    for norms in [
        _norms_to_fold(sae, row.name, values[row.name]) for row in table if row.unit_norm and row.name in values
    ]:
        if norms is not None:
            values = {row.name: _folded(row, values[row.name], norms) for row in table if row.name in values}
    for row in table:
        if row.name in values:
            getattr(sae, row.name).copy_(values[row.name])


def measure_unknown(sae: SAE, saved: SAE, sample: Sample) -> None:
    """Let what a start knows nothing of be measured: that of another library has no unit of thresholds, for one.

    Args:
        sae: begun as `saved`; changed in place.
        saved: the start. What it does not know is as it is where nothing was trained.
        sample: of the training.
    """
    values = saved.saved_state()
    rows = [row for row in sae.architecture.parameters if row.saved and isinstance(row.initial, float | int)]
    rows = [row for row in rows if not row.trained and row.name in values]
    unknown = [row for row in rows if torch.all(torch.eq(values[row.name], float(row.initial)))]
    if unknown and sae.architecture.initialize is not None:
        fresh = SAE(sae.config, device=sae.W_dec.device)
        fresh.initialize_from(sample.x, sample.target)
        for row in unknown:
            measured = getattr(fresh, row.name)
            if torch.any(torch.ne(measured, float(row.initial))):
                getattr(sae, row.name).copy_(measured)


def _norms_to_fold(sae: SAE, name: str, rows: Tensor) -> Tensor | None:
    """Return by what to divide rows so that they have norm 1, [d_sae] or one number, if that changes no selection.

    It does not where all norms are one number, where latents are selected by their values times these norms, or each
    by itself.
    """
    norms: Tensor = torch.linalg.vector_norm(rows.double(), dim=1)
    least, most = norms.min().item(), norms.max().item()
    if max(1 - least, most - 1) < _UNIT:
        return None
    if least > 0 and most / least < 1 + _UNIT:
        near = 2.0 ** round(math.log2(most))  # what is a power of two rounds nothing
        return norms.new_tensor(near if abs(most / near - 1) < _UNIT else (least + most) / 2)
    if least > 0 and (sae.architecture.selects_by is not None or sae.architecture.each_by_itself):
        return norms
    raise ConfigError(
        f"init_from: expected rows of {name} of norm 1, which training keeps, and they have norms from {least:.3g} to "
        f"{most:.3g}. Divide them by these, and multiply what gives the values of their latents, where that does not "
        "change which are chosen."
    )


def _folded(row: Parameter, value: Tensor, norms: Tensor) -> Tensor:
    """Return a parameter of the SAE whose latents have values that are `norms` times as large."""
    if not row.per_latent:
        return value * norms.to(value) ** row.power if norms.dim() == 0 and not row.shape else value
    power = row.power + {"d_in": 1, "d_out": -1}.get(row.shape[-1], 0)
    factors = norms.to(value) ** power
    return value * (factors[:, None] if factors.dim() and value.dim() == 2 else factors)


def digest_of(sae: SAE) -> str:
    """Return a fingerprint of the parameters of an SAE and what it is."""
    digest = hashlib.sha256(repr(sae.config).encode())
    for name, tensor in sorted(sae.saved_state().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
