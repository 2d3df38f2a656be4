"""Files as SAELens writes them, and what it makes of tokens by its definitions."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from flashsae.formats import sae_lens
from flashsae.formats.content import Content
from flashsae.sae.saved import sae_of
from flashsae.testing import assert_as_accurate

D, F, K = 7, 37, 5


def theirs(config: dict[str, Any], w: dict[str, Tensor]) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """Return what SAELens makes of x by its definitions: its code and its reconstruction."""

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.to(w["W_dec"].dtype)
        tokens, undo = x, lambda x_hat: x_hat
        if config["normalize_activations"] == "constant_norm_rescale":
            factor = config["d_in"] ** 0.5 / x.norm(dim=-1, keepdim=True)
            tokens, undo = x * factor, lambda x_hat: x_hat / factor
        centred = tokens - w["b_dec"] if config["apply_b_dec_to_input"] else tokens
        z = centred @ w["W_enc"] + w.get("b_enc", torch.zeros(()))
        if config.get("rescale_acts_by_decoder_norm"):
            z = z * w["W_dec"].norm(dim=1)
        code = z.relu()
        if config["architecture"] in ("topk", "abstopk"):
            is_signed = config["architecture"] == "abstopk"
            chosen = (z.abs() if is_signed else z).topk(config["k"]).indices
            code = torch.zeros_like(z).scatter(-1, chosen, (z if is_signed else z.relu()).gather(-1, chosen))
        if "threshold" in w:
            code = code * (z > w["threshold"])
        if config["architecture"] == "gated":
            code = (z * w["r_mag"].exp() + w["b_mag"]).relu() * (z + w["b_gate"] > 0)
        f = code / w["W_dec"].norm(dim=1) if config.get("rescale_acts_by_decoder_norm") else code
        x_hat = undo(f @ w["W_dec"] + w["b_dec"])
        return code, x_hat + x @ w["W_skip"].T if "W_skip" in w else x_hat

    return forward


def ours(content: Content) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    sae = sae_of(content)

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            return sae.encode(x).to_dense(), sae(x)

    return forward


def check_equal(content: Content, config: dict[str, Any], w: dict[str, Tensor]) -> None:
    """Check that both make the same of tokens, as accurately as SAELens's definitions in this dtype."""
    x = torch.randn(40, D, generator=torch.Generator().manual_seed(1), dtype=content.dtype)
    exact = theirs(config, {name: tensor.double() for name, tensor in w.items()})
    for of_ours, of_theirs, of_exact in zip(ours(content)(x), theirs(config, w)(x), exact(x.double())):
        assert_as_accurate(of_ours, of_theirs, of_exact)


def foreign(folder: Path, architecture: Any, tensors: dict[str, Tensor] | None = None, **config: Any) -> Path:
    """Write a folder as SAELens does; a tensor of None or setting of ... is left out."""
    g = torch.Generator().manual_seed(3)
    w = {"W_enc": torch.randn(D, F, generator=g), "W_dec": torch.randn(F, D, generator=g) * 0.3}
    w |= {"b_enc": torch.randn(F, generator=g), "b_dec": torch.randn(D, generator=g)}
    w |= tensors or {}
    folder.mkdir(exist_ok=True)
    save_file({name: tensor for name, tensor in w.items() if tensor is not None}, folder / "sae_weights.safetensors")
    content = {
        "architecture": architecture, "d_in": D, "d_sae": F, "dtype": "float32", "device": "cpu",
        "apply_b_dec_to_input": True, "normalize_activations": "none", "reshape_activations": "none",
        "metadata": {"sae_lens_version": "6.54.12", "model_name": "gpt2-small"}, **config,
    }  # fmt: skip
    (folder / "cfg.json").write_text(json.dumps({name: value for name, value in content.items() if value is not ...}))
    return folder


def check_read(folder: Path, **as_if: Any) -> Content:
    """Read a folder and check that it does what SAELens makes of it; return it."""
    content = sae_lens.read(folder)
    config = {**json.loads((folder / "cfg.json").read_text("utf-8")), **as_if}
    check_equal(content, config, load_file(folder / "sae_weights.safetensors"))
    return content


def written(folder: Path, content: Content, *, lossy: bool = False) -> tuple[dict[str, Any], dict[str, Tensor]]:
    folder.mkdir(exist_ok=True)
    sae_lens.write(folder, content, lossy)
    return json.loads((folder / "cfg.json").read_text("utf-8")), load_file(folder / "sae_weights.safetensors")
