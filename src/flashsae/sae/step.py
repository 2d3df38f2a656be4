"""What the terms of a loss are computed of: everything that is known of one step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from flashsae.architecture import NESTED, RECONSTRUCTION, Architecture
from flashsae.architecture.sites import shown_by_site
from flashsae.errors import ConfigError, ShapeError
from flashsae.ops import DecodeLoss, SparseCode, decode_loss
from flashsae.profiling import part
from flashsae.sae.config import SAEConfig
from flashsae.sae.dead import DeadRows, auxk_loss
from flashsae.sae.module import SAE
from flashsae.settings.training import AuxK


@dataclass
class Step:
    """One step of a training, up to its loss.

    Args:
        sae: the SAE.
        x: [B, d_in].
        target: [B, d_out], what is to be reconstructed; x itself for an autoencoder.
        code: of x.
        token_weights: [B], from `flashsae.sae.fvu_weights`.
        dead: the dead latents, where a term needs them and there may be any, else None.
        k_aux: dead latents that the auxiliary loss uses for each token.
        auxk: whose formula of it.
    """

    sae: SAE
    x: Tensor
    target: Tensor
    code: SparseCode
    token_weights: Tensor
    dead: DeadRows | None = None
    k_aux: int = 0
    auxk: AuxK = "gao"

    @cached_property
    def decoded(self) -> DecodeLoss:
        """The reconstruction, its residual, and its error relative to the variance; computed once."""
        return self.sae.decode_loss(self.code, self._to_decode, token_weights=self.token_weights)

    @cached_property
    def _to_decode(self) -> Tensor:
        """The target, less what is added to the reconstruction beside the code."""
        direct = self.sae.architecture.direct
        return self.target if direct is None else self.target - direct(self.sae, self.x)

    @property
    def _of_main_part(self) -> DecodeLoss:
        """What `decoded` is of the part of the code that inference would give."""
        code = self.sae.main_part(self.code)
        if code is self.code:
            return self.decoded
        with torch.no_grad():
            target, b_dec = self._to_decode, self.sae.b_dec
            return decode_loss(
                code, self.sae.W_dec, b_dec, target, token_weights=self.token_weights, precision=self.sae.precision
            )

    def auxk_loss(self) -> Tensor | None:
        """Return `flashsae.sae.auxk_loss`, None where no latent can be dead."""
        if self.dead is None:
            return None
        of_step = self.sae, self.x, self._of_main_part, self.token_weights, self.dead, self.k_aux
        return auxk_loss(*of_step, form=self.auxk, target=self.target)

    def total(self, *settings: object) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss, the weighted sum of the terms of the architecture, and each term by name.

        Of nested reconstructions also the FVU of the last one.

        Args:
            settings: where weights are found that are settings, beside those of the architecture.
        """
        first, *others = self.sae.architecture.terms
        weights = {term.name: term.weight_in(self.sae.config.arch, *settings) for term in (first, *others)}
        values = {first.name: first.compute(self)} if weights[first.name] else {}
        for term in others:
            if weights[term.name]:
                with part(f"loss: {term.name}"):
                    values[term.name] = term.compute(self)
        there = {name: value for name, value in values.items() if value is not None}
        for name, value in there.items():
            if not isinstance(value, Tensor) or value.dim():
                got = list(value.shape) if isinstance(value, Tensor) else repr(value)
                raise ShapeError(f"term {name}: expected a scalar tensor, or None, got {got}.")
        weighted = [value if weights[name] == 1.0 else weights[name] * value for name, value in there.items()]
        if not weighted:
            raise ConfigError(f"loss: no term of {self.sae.architecture.title} gave anything at this step.")
        loss = weighted[0]
        for value in weighted[1:]:
            loss = loss + value
        found = {name: value.detach() for name, value in there.items()}
        if first is NESTED:  # that of all latents, for the log
            found = {RECONSTRUCTION.name: self.decoded.level_losses[-1], **found}
        return loss, found


def join_sites(architecture: Architecture, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return what an architecture reads of a batch, and what it reconstructs: its sites beside each other.

    Args:
        architecture: whose `reads` and `writes` name the sites in the order in which a batch holds them.
        batch: {site: [B, d]}.
    Returns:
        [B, d_in] and [B, d_out]; the same tensor for an autoencoder, and no copy where it is one site.
    Raises:
        ConfigError: the batch has another number of sites.
    """
    reads, writes = architecture.sites_of(batch)
    x = _beside([batch[site] for site in reads])
    return x, x if writes == reads else _beside([batch[site] for site in writes])


def in_order(config: SAEConfig, batch: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return a batch as an SAE of several sites was trained on them: in their order, where it has the same names.

    Raises:
        ShapeError: the sites have other widths.
    """
    wanted = _widths(config)
    if not wanted or len(batch) < 2:
        return batch
    if set(wanted) == set(batch):
        batch = {site: batch[site] for site in wanted}
    got = {site: int(acts.shape[-1]) for site, acts in batch.items()}
    if list(got.values()) != list(wanted.values()):
        told = (", ".join(f"{site} of {width}" for site, width in each.items()) for each in (wanted, got))
        raise ShapeError(
            "x: expected the sites {}, got {}. Give them by these names, or in this order: {}.".format(
                *told, shown_by_site(list(wanted))
            )
        )
    return batch


def _widths(config: SAEConfig) -> dict[str, int]:
    """Return the widths of the sites of an SAE that has several, by name, where they are known."""
    reads, writes = config.architecture.reads, config.architecture.writes
    if config.columns:
        return dict(zip(config.columns, config.arch.widths))
    return (
        {reads[0]: config.d_in, writes[0]: config.d_out} if len(reads) == len(writes) == 1 and reads != writes else {}
    )


def _beside(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim=1)
