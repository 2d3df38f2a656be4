"""The SAE as a module: parameters from the table of its architecture, codes from its selection."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flashsae import ops
from flashsae.architecture import Progress
from flashsae.backend import resolve_device
from flashsae.errors import ConfigError, DtypeError, ShapeError
from flashsae.formats.registry import format_named
from flashsae.ops.register import isolated
from flashsae.ops.validate import Precision, as_int, check_float, check_shape
from flashsae.sae.centring import recentered
from flashsae.sae.config import SAEConfig
from flashsae.sae.initial import initialize
from flashsae.sae.progress import InProgress
from flashsae.sae.stored import content_from, read, write
from flashsae.sae.tokens import check_tokens
from flashsae.sae.units import Factor, Units, as_they_come, normalized
from flashsae.settings.left_open import told
from flashsae.settings.normalization import BY_TOKEN


class SAE(InProgress):
    """A sparse autoencoder, or a relative of one: what its architecture says.

        code = architecture.encode(x)
        x_hat = Σ over active latents of activation · their rows of W_dec + b_dec

    Parameters stand in the table of the architecture. The rows of W_dec start as random unit vectors and W_enc as its
    transpose; biases start at 0. Leading dimensions of x are free: [..., d_in]. As for any module, `train()` and
    `eval()` tell training from inference, for architectures where they differ.

    Args:
        config: sizes and architecture.
        seed: of the initial weights; None leaves parameters without values, to be loaded.
        dtype: of the parameters.
        device: of the parameters, whatever the default device is. Initial weights are the same on every device.
    Source: Gao et al. 2024, section 2.3 and appendix A.1, for how an SAE starts.
    """

    def __init__(
        self,
        config: SAEConfig,
        *,
        seed: int | None = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        if not isinstance(config, SAEConfig):
            raise ConfigError(f"config: expected an SAEConfig(d_in, d_sae, k), got {type(config).__name__}.")
        self.config = config
        self.architecture = config.architecture
        self.precision: Precision | None = None
        """Of products, as in `flashsae.ops.encode_topk`; not saved. None: what fits the dtype of the weights."""
        self.capacity: ops.Capacity = "any" if self.architecture.varies else None
        """Of codes above a threshold, for `flashsae.ops.encode_above`. Set by a training on a GPU; not saved."""
        self.from_data = False
        """Whether rows of weights started from tokens, for an `initialize` that would choose directions itself."""
        self._selection_scale: Tensor | None = None
        self._register(None if seed is None else as_int("seed", seed), dtype, device)
        self.set_progress(Progress.end())

    @property
    def selection_scale(self) -> Tensor | None:
        """What pre-activations are multiplied by for the selection alone: [d_sae], without a gradient; None: 1 each.

        Computed once for each `encode`, and the same until the next.
        """
        if self._selection_scale is None and self.architecture.selects_by is not None:
            with torch.no_grad():
                made = self.architecture.selects_by(self)
            if torch.compiler.is_compiling() or type(made) is not Tensor:
                return made  # of who traces, to be gone with it
            self._selection_scale = made
        return self._selection_scale

    def extra_repr(self) -> str:
        """Return what stands between the brackets of repr(sae)."""
        config, weights = self.config, self.W_dec
        dtype = str(weights.dtype).removeprefix("torch.")
        width = f"d_in={config.d_in}" + (f", d_out={config.d_out}" if config.d_out != config.d_in else "")
        settings = "".join(f", {name}={value}" for name, value in told(config.arch).items())
        norm = f", {config.normalize_activations}" if config.normalize_activations in BY_TOKEN else ""
        norm += ", apply_b_dec_to_input=False" if config.is_unlike else ""
        return f"{self.architecture.title}, {width}, d_sae={config.d_sae}{settings}{norm}, {dtype}, {weights.device}"

    def encode(self, x: Tensor) -> ops.SparseCode:
        """Return the code of some tokens.

        Args:
            x: [..., d_in], float; converted to the dtype of the parameters.
        Returns:
            a code of the shape [...].
        Raises:
            ShapeError, DtypeError: x does not fit, or the architecture returns no code.
        """
        self._selection_scale = None
        code = self.architecture.encode(self, self.read(x))
        if not isinstance(code, ops.SparseCode):
            raise DtypeError(
                f"encode of {self.architecture.title}: expected a SparseCode, as ops.encode_topk returns it, got "
                f"{type(code).__name__}."
            )
        return replace(code, batch_shape=tuple(x.shape[:-1]))

    def memory(self, x: Tensor) -> dict[str, Any]:
        """Return what `flashsae.ops.encode_topk` and `encode_above` of x are given beside operands and precision.

        Bounds of memory, which are fewer in inference; and `noise`, where there is one.
        """
        bounds = {} if self.training else ops.inference_memory(x, self.W_enc_T)
        return bounds if self.noise is None else {**bounds, "noise": self.noise}

    def main_part(self, code: ops.SparseCode) -> ops.SparseCode:
        """Return of a code in training the part that inference would give; the code, where there is no more in it."""
        part = self.architecture.main_part
        return code if part is None else part(self, code)

    def decode(self, code: ops.SparseCode, *, bias: bool = True, like: Tensor | None = None) -> Tensor:
        """Return the reconstruction [..., d_out] of a code of the shape [...].

        Args:
            code: of this SAE.
            bias: False leaves b_dec out.
            like: [..., d_in], the tokens that the code is of. Of use where the SAE normalises tokens: with them the
                reconstruction has their mean and deviation; without, it is that of the normalised tokens. And where
                the architecture adds something beside the code, which is left out without them.
        Raises:
            ShapeError: `like` has another shape than the tokens of the code.
        """
        tokens = [*code.shape, self.config.d_in]
        if like is not None and list(like.shape) != tokens:
            raise ShapeError(f"like: expected the tokens of the code, {tokens}, got {list(like.shape)}.")
        x_hat = ops.decode(code, self.W_dec, self.b_dec if bias else None, precision=self.precision)
        if like is not None and self.architecture.direct is not None:
            x_hat = (x_hat + self.architecture.direct(self, self.read(like))).to(x_hat.dtype)
        return self._as_they_come(x_hat.view(*code.shape, self.config.d_out), like)

    def decode_loss(
        self, code: ops.SparseCode, target: Tensor, *, token_weights: Tensor | None = None
    ) -> ops.DecodeLoss:
        """Return the squared error of the reconstruction: `flashsae.ops.decode_loss` of the code of B tokens.

        Args:
            code: of B tokens.
            target: [B, d_out], float; x itself for an autoencoder, normalised where the SAE normalises tokens.
            token_weights: [B], as from `flashsae.sae.fvu_weights`.
        """
        levels = {} if self.architecture.levels is None else self.architecture.levels(self, code)
        return ops.decode_loss(
            code, self.W_dec, self.b_dec, target, token_weights=token_weights, precision=self.precision, **levels
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the reconstruction of x: [..., d_in] -> [..., d_out]."""
        return self.decode(self.main_part(self.encode(x)), like=x)

    def _as_they_come(self, x_hat: Tensor, like: Tensor | None) -> Tensor:
        """Undo what `read` does to tokens, of their reconstruction; nothing where `like` is None."""
        kind = self.config.normalize_activations
        return x_hat if like is None or kind not in BY_TOKEN else as_they_come(kind, x_hat, like, self._site_widths)

    def read(self, x: Tensor) -> Tensor:
        """Return tokens [..., d_in] as they are encoded: [B, d_in], in the dtype of the parameters, normalised."""
        check_tokens(x, self.config)
        is_fit = x.dtype == self.W_enc_T.dtype  # half-width tokens may meet half-width weights and whole biases
        dtype, tokens = x.dtype if is_fit else self.b_enc.dtype, x.reshape(-1, self.config.d_in)
        if self.config.normalize_activations in BY_TOKEN:
            return normalized(self.config.normalize_activations, tokens, dtype, self._site_widths)
        return tokens.to(dtype)

    @property
    def _site_widths(self) -> list[int]:
        """The widths of sites that are normalised each by itself."""
        return [columns.stop - columns.start for columns in self.config.columns.values()]

    @isolated
    @torch.no_grad()
    def initialize_from(self, x: Tensor, target: Tensor | None = None) -> None:
        """Set the parameters by some activations, as the architecture does it: by default as `flashsae.sae.initialize`.

        Args:
            x: [tokens, d_in], float; some thousands of training tokens.
            target: [tokens, d_out], what is to be reconstructed; None is x.
        Raises:
            ShapeError, DtypeError: x or target does not fit, or holds no token.
        """
        target = x if target is None else target
        for name, tokens, width in (("x", x, self.config.d_in), ("target", target, self.config.d_out)):
            check_shape(name, tokens, ("tokens", width))
            check_float(name, tokens)
            if len(tokens) == 0:
                raise ShapeError(f"{name}: expected at least one token, got none.")
        if self.config.normalize_activations in BY_TOKEN:
            x = target = normalized(self.config.normalize_activations, x, widths=self._site_widths)
            plain = self.normalizing("none")
            plain.initialize_from(x)
            self.centres = plain.centres
            return
        (self.architecture.initialize or initialize)(self, x, target)

    @torch.no_grad()
    def rescaled(self, factor: Factor, factor_out: Factor | None = None) -> SAE:
        """Return the SAE that does to x what this one does to factor · x: rescaled(x) = self(factor · x) / factor_out.

        The latents that are active stay, and so does W_dec where `factor_out` is one number. Shares what stays. How
        each parameter changes: `flashsae.sae.units.Units`.

        Args:
            factor: a positive number; or one for each coordinate of x, [d_in].
            factor_out: the same of what is reconstructed, [d_out]. None is `factor`.
        Raises:
            ConfigError: it is none, or the SAE normalises tokens, which takes away their unit; or `factor_out` is
                another one, and b_dec, which is of what is reconstructed, is subtracted from x.
            ShapeError: it is not one for each coordinate.
        """
        d_in, d_out = self.config.d_in, self.config.d_out
        units = Units.of(factor, factor if factor_out is None else factor_out, d_in, d_out)
        if self.architecture.subtracts_b_dec and not units.is_one:
            told = f", {units.reads:g}," if isinstance(units.reads, float) else ","
            raise ConfigError(f"factor_out: expected that of the input{told} where b_dec is subtracted from it.")
        return self.in_units(units)

    @torch.no_grad()
    def in_units(self, units: Units) -> SAE:
        """Return the SAE for activations that these units multiply; shares what stays. See `rescaled`."""
        if self.config.normalize_activations in BY_TOKEN:
            raise ConfigError("factor: an SAE that normalises each token has no unit that could be changed.")
        values, table = self.state_dict(), self.architecture.parameters
        return self._with(self.config, {row.name: units.fold(row, values[row.name]) for row in table})

    @torch.no_grad()
    def normalizing(self, normalize_activations: str) -> SAE:
        """Return the SAE with these parameters, which it shares, that normalises tokens itself, or does not any more.

        Args:
            normalize_activations: as of `SAEConfig`.
        """
        kind: Any = normalize_activations
        return self._with(replace(self.config, normalize_activations=kind), self.state_dict())

    def _with(self, config: SAEConfig, values: dict[str, Tensor]) -> SAE:
        """Return an SAE of the same kind that has these parameters."""
        other = SAE(config, seed=None, dtype=self.W_dec.dtype, device="meta")
        other.load_state_dict(values, assign=True)
        other.precision = self.precision
        other.set_progress(self.progress)
        return other.train(self.training)

    def save(
        self,
        directory: str | Path,
        *,
        metadata: Mapping[str, Any] | None = None,
        extras: Mapping[str, Tensor] | None = None,
        overwrite: bool = False,
        format: str = "flashsae",
        lossy: bool = False,
    ) -> list[str]:
        """Write the SAE to a folder, all or nothing: by default flashsae.json and flashsae.safetensors.

        Args:
            directory: must not exist, unless `overwrite`.
            metadata: anything JSON can hold: model, hookpoint, data set, metrics; a path is written as text.
            extras: [d_sae] each: what is known of every latent, such as latent_density; read again by
                `flashsae.sae.load_extras`.
            overwrite: replace the folder, if it holds an SAE of this format and nothing else; behind a link, the
                folder it leads to.
            format: flashsae, or the name of another library's: docs/interop.md.
            lossy: let the other format give up what it cannot hold, instead of refusing.
        Returns:
            a sentence for each thing that was given up; none without `lossy`.
        Raises:
            ConfigError: metadata hold what JSON cannot, such as NaN, overwrite is no bool, or directory is no path; or
                there is no such format, or it cannot hold this SAE.
            ShapeError: an extra is not [d_sae].
            DtypeError: parameters have different dtypes.
            StorageError: the folder exists, holds other files too, or cannot be written.
        """
        content = content_from(self.config, self.saved_state(), metadata or {}, extras or {})
        return write(content, directory, format_named(format, written=True), lossy=lossy, overwrite=overwrite)

    def saved_state(self) -> dict[str, Tensor]:
        """Return what a file holds of it, by name: all parameters but those that only a training needs."""
        values = (recentered(self, None) if self.centres else self).state_dict()
        return {row.name: values[row.name] for row in self.architecture.parameters if row.saved}

    @classmethod
    def load(cls, directory: str | Path, *, device: torch.device | str = "cpu") -> SAE:
        """Read an SAE that `save` wrote; it is in `eval()` mode.

        Raises:
            CheckpointError: the folder holds no FlashSAE SAE, a damaged one, one of a newer format, or one of an
                architecture that is not registered here.
            ConfigError: no such device here, or directory is no path.
        """
        target = resolve_device(str(device))
        config, tensors = read(directory)
        sae = cls(config, seed=None, dtype=tensors["W_dec"].dtype, device="meta")
        sae.load_state_dict(tensors, assign=True)
        return sae.to(target).eval()
