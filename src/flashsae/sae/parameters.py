"""The parameters of an SAE: made from the table of its architecture, read as people write them, kept at norm 1."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from flashsae.architecture import Architecture
from flashsae.errors import ConfigError, DtypeError
from flashsae.ops.register import isolated
from flashsae.ops.validate import FLOATS
from flashsae.sae.config import SAEConfig
from flashsae.sae.initial import initial_values


class ParameterTable(nn.Module):
    """A module with the parameters that the table of an architecture has."""

    config: SAEConfig
    architecture: Architecture

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """Return a parameter of the table: which there are is known when an SAE is made."""

    def _register(self, seed: int | None, dtype: torch.dtype, device: torch.device | str) -> None:
        """Make the parameters; the last to be set, since none may have the name of another attribute."""
        if dtype not in FLOATS:
            raise DtypeError(f"dtype: expected one of {', '.join(map(str, FLOATS))}, got {dtype!r}.")
        try:
            torch.empty(0, dtype=dtype, device=device)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(f"device: expected one that exists here, got {str(device)!r} ({reason}).") from error
        table = self.architecture.parameters
        values = initial_values(table, self.config.sizes, seed, dtype, device)
        for row in table:
            if hasattr(self, row.name):
                raise ConfigError(f"parameter {row.name}: every SAE has an attribute of this name. Give it another.")
            if row.trained:
                self.register_parameter(row.name, nn.Parameter(values[row.name]))
            else:
                self.register_buffer(row.name, values[row.name])

    def W_dec_of(self, site: str | int) -> Tensor:
        """Return the decoder of one of several sites, by its name or place: [d_sae, d], a view of W_dec.

        Raises:
            ConfigError: there is no such site.
        """
        columns = self.config.columns
        name = list(columns)[site] if isinstance(site, int) and -len(columns) <= site < len(columns) else site
        if name not in columns:
            raise ConfigError(
                f"site: expected one of {', '.join(columns) or 'several, which are not here'}, got {site!r}."
            )
        W_dec: Tensor = self.W_dec[:, columns[str(name)]]
        return W_dec

    @property
    def W_enc(self) -> Tensor:
        """The encoder as the field writes it: [d_in, d_sae], a view of W_enc_T."""
        W_enc: Tensor = self.W_enc_T.T
        return W_enc

    @isolated
    @torch.no_grad()
    def project_decoder_grad(self) -> None:
        """Remove from the gradient of each decoder row the part along the row, which only changes its norm."""
        for weights in self._unit_norm_weights():
            grad = weights.grad
            if grad is not None:
                grad.addcmul_((grad * weights).sum(1, keepdim=True), weights, value=-1)

    @isolated
    @torch.no_grad()
    def normalize_decoder(self) -> None:
        """Scale each row of W_dec to unit norm."""
        for weights in self._unit_norm_weights():
            weights.div_(torch.linalg.vector_norm(weights, dim=1, keepdim=True).clamp_min(1e-30))

    def _unit_norm_weights(self) -> list[Tensor]:
        return [getattr(self, row.name) for row in self.architecture.parameters if row.unit_norm]
