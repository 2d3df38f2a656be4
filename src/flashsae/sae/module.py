"""The TopK sparse autoencoder as a module built from `flashsae.ops`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flashsae import ops
from flashsae.backend import resolve_device
from flashsae.errors import ConfigError, DtypeError, ShapeError
from flashsae.formats.native import read_sae, write_sae
from flashsae.ops.register import isolated
from flashsae.ops.validate import FLOATS, Precision, as_int, check_float, check_k, check_ordinary, check_shape
from flashsae.settings.kinds import check, expand


@dataclass(frozen=True)
class SAEConfig:
    """What defines a TopK SAE besides its weights.

    Args:
        d_in: width of the activations.
        d_sae: number of latents.
        k: latents kept for each token.
    Raises:
        ConfigError: a size is not positive, or k > d_sae.
        DtypeError: it is no integer; those of NumPy are.
    """

    d_in: int
    d_sae: int
    k: int

    def __post_init__(self) -> None:
        sizes = {name: as_int(name, getattr(self, name)) for name in ("d_in", "d_sae")}
        for name, size in sizes.items():
            if size < 1:
                raise ConfigError(f"{name}: expected a positive int, got {size}.")
        for name, value in {**sizes, "k": check_k(self.k, sizes["d_sae"])}.items():
            object.__setattr__(self, name, value)


class SAE(nn.Module):
    """TopK sparse autoencoder.

        top_acts = relu(the k largest of (x − b_dec) @ W_enc + b_enc)
        x_hat = Σ top_acts · their rows of W_dec + b_dec

    The rows of W_dec start as random unit vectors and W_enc as its transpose; both biases start at 0. Leading
    dimensions of x are free: [..., d_in].

    Args:
        config: sizes.
        seed: of the initial weights; None leaves W_enc_T and W_dec without values, to be loaded.
        dtype: of the parameters.
        device: of the parameters, whatever the default device is. Initial weights are the same on every device.
    Source: Gao et al. 2024, section 2.3 and appendix A.1.
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
        if dtype not in FLOATS:
            raise DtypeError(f"dtype: expected one of {', '.join(map(str, FLOATS))}, got {dtype!r}.")
        try:
            torch.empty(0, dtype=dtype, device=device)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(f"device: expected one that exists here, got {str(device)!r} ({reason}).") from error
        self.config = config
        self.precision: Precision | None = None
        """Of products, as in `flashsae.ops.encode`; not saved. None: what fits the dtype of the weights."""
        if seed is None:
            rows = torch.empty(config.d_sae, config.d_in, dtype=dtype, device=device)
        else:
            rows = _unit_rows(config.d_sae, config.d_in, as_int("seed", seed), dtype).to(device)
        self.W_enc_T = nn.Parameter(rows.clone())
        self.b_enc = nn.Parameter(torch.zeros(config.d_sae, dtype=dtype, device=device))
        self.W_dec = nn.Parameter(rows)
        self.b_dec = nn.Parameter(torch.zeros(config.d_in, dtype=dtype, device=device))

    @property
    def W_enc(self) -> Tensor:
        """The encoder as the field writes it: [d_in, d_sae], a view of W_enc_T."""
        return self.W_enc_T.T

    def extra_repr(self) -> str:
        """Return what stands between the brackets of repr(sae)."""
        config, weights = self.config, self.W_dec
        dtype = str(weights.dtype).removeprefix("torch.")
        return f"TopK, d_in={config.d_in}, d_sae={config.d_sae}, k={config.k}, {dtype}, {weights.device}"

    def encode(self, x: Tensor) -> ops.SparseCode:
        """Return the code of some tokens.

        Args:
            x: [..., d_in], float; converted to the dtype of the parameters.
        Returns:
            a code of shape [..., k].
        Raises:
            ShapeError, DtypeError: x does not fit.
        """
        code = ops.encode_topk(
            self._flat(x), self.W_enc_T, self.b_enc, self.config.k, b_dec=self.b_dec, precision=self.precision
        )
        return ops.SparseCode(code.pattern, code.acts.relu(), tuple(x.shape[:-1]))

    def decode(self, code: ops.SparseCode, *, bias: bool = True) -> Tensor:
        """Return the reconstruction [..., d_in] of a code of shape [..., k]; without b_dec if `bias` is False."""
        x_hat = ops.decode(code, self.W_dec, self.b_dec if bias else None, precision=self.precision)
        return x_hat.view(*code.shape, self.config.d_in)

    def decode_loss(
        self, code: ops.SparseCode, target: Tensor, *, token_weights: Tensor | None = None
    ) -> ops.DecodeLoss:
        """Return the squared error of the reconstruction: `flashsae.ops.decode_loss` of a code of shape [B, k].

        Args:
            code: of B tokens.
            target: [B, d_in], float; x itself.
            token_weights: [B], as from `flashsae.sae.fvu_weights`.
        """
        return ops.decode_loss(
            code, self.W_dec, self.b_dec, target, token_weights=token_weights, precision=self.precision
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the reconstruction of x: [..., d_in] -> [..., d_in]."""
        return self.decode(self.encode(x))

    def _flat(self, x: Tensor) -> Tensor:
        if not isinstance(x, Tensor):
            raise DtypeError(f"x: expected a tensor, got {type(x).__name__}. Convert it: torch.as_tensor(x).")
        check_ordinary("x", x)
        if x.dim() == 0 or x.shape[-1] != self.config.d_in:
            raise ShapeError(f"x: expected the shape [..., {self.config.d_in}], got {list(x.shape)}.")
        check_float("x", x)
        is_fit = x.dtype == self.W_enc_T.dtype  # half-width tokens may meet half-width weights and whole biases
        return x.reshape(-1, self.config.d_in).to(x.dtype if is_fit else self.b_enc.dtype)

    @isolated
    @torch.no_grad()
    def initialize_from(self, x: Tensor) -> None:
        """Set b_dec to the mean of some activations, and scale the encoder so that x_hat has the length that fits best.

        With random directions the first reconstruction points the right way but may be far too long or too short;
        one number, the least-squares fit over these tokens, puts that right.

        Args:
            x: [tokens, d_in], float; some thousands of training tokens.
        Raises:
            ShapeError, DtypeError: x does not fit, or holds no token.
        """
        check_shape("x", x, ("tokens", self.config.d_in))
        check_float("x", x)
        if len(x) == 0:
            raise ShapeError("x: expected at least one token, got none.")
        self.b_dec.copy_(x.mean(0, dtype=torch.float64))
        x_hat = self.decode(self.encode(x), bias=False).double()
        centered = x.double() - self.b_dec.double()
        scale = (centered * x_hat).sum() / x_hat.square().sum().clamp_min(1e-300)
        if scale > 0:
            self.W_enc_T.mul_(scale.to(self.W_enc_T.dtype))

    @torch.no_grad()
    def rescaled(self, factor: float) -> SAE:
        """Return the SAE that does to x what this one does to factor · x: rescaled(x) = self(factor · x) / factor.

        Selection and directions stay; biases and values of latents are divided by `factor`. Shares W_enc_T and W_dec.

        Args:
            factor: a positive number.
        Raises:
            ConfigError: it is none.
        """
        if not isinstance(factor, int | float) or not 0 < factor < math.inf:
            raise ConfigError(f"factor: expected a positive number, got {factor!r}.")
        other = SAE(self.config, seed=None, dtype=self.W_dec.dtype, device="meta")
        other.load_state_dict(
            {"W_enc_T": self.W_enc_T, "b_enc": self.b_enc / factor, "W_dec": self.W_dec, "b_dec": self.b_dec / factor},
            assign=True,
        )
        other.precision = self.precision
        return other

    @isolated
    @torch.no_grad()
    def project_decoder_grad(self) -> None:
        """Remove from the gradient of each decoder row the part along the row, which only changes its norm."""
        grad = self.W_dec.grad
        if grad is not None:
            grad.addcmul_((grad * self.W_dec).sum(1, keepdim=True), self.W_dec, value=-1)

    @isolated
    @torch.no_grad()
    def normalize_decoder(self) -> None:
        """Scale each row of W_dec to unit norm."""
        self.W_dec.div_(torch.linalg.vector_norm(self.W_dec, dim=1, keepdim=True).clamp_min(1e-30))

    def save(
        self, directory: str | Path, *, metadata: Mapping[str, Any] | None = None, overwrite: bool = False
    ) -> None:
        """Write the SAE to a folder, all or nothing: flashsae.json and flashsae.safetensors.

        Args:
            directory: must not exist, unless `overwrite`.
            metadata: anything JSON can hold: model, hookpoint, data set, metrics; a path is written as text.
            overwrite: replace the folder, if it holds an SAE and nothing else; behind a link, the folder it leads to.
        Raises:
            ConfigError: metadata hold what JSON cannot, such as NaN, overwrite is no bool, or directory is no path.
            StorageError: the folder exists, holds other files too, or cannot be written.
        """
        check("overwrite", overwrite, bool)
        content = {
            "architecture": "topk",
            "dtype": str(self.W_dec.dtype).removeprefix("torch."),
            **asdict(self.config),
            "metadata": metadata or {},
        }
        write_sae(expand(directory, "directory"), self.state_dict(), content, overwrite=overwrite)

    @classmethod
    def load(cls, directory: str | Path, *, device: torch.device | str = "cpu") -> SAE:
        """Read an SAE that `save` wrote.

        Raises:
            CheckpointError: the folder holds no FlashSAE SAE, a damaged one, or one of a newer format.
            ConfigError: no such device here, or directory is no path.
        """
        target = resolve_device(str(device))
        description, tensors = read_sae(expand(directory, "directory"))
        config = SAEConfig(description.d_in, description.d_sae, description.k)
        sae = cls(config, seed=None, dtype=getattr(torch, description.dtype), device="meta")
        sae.load_state_dict(tensors, assign=True)
        return sae.to(target)


@isolated
def _unit_rows(d_sae: int, d_in: int, seed: int, dtype: torch.dtype) -> Tensor:
    rows = torch.empty(d_sae, d_in, dtype=dtype, device="cpu")
    rows.normal_(generator=torch.Generator("cpu").manual_seed(seed))
    return F.normalize(rows, dim=1)
