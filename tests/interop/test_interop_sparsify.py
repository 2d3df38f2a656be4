"""sparsify loads what is written for it, and gives the same numbers; what it writes is loaded here, and does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from sparsify import SparseCoder, SparseCoderConfig
from torch import Tensor

import flashsae
from flashsae.formats import sparsify
from helpers.dense_content import codes, made

D, F, K = 7, 37, 5


def tokens(d_in: int = D) -> Tensor:
    """Return tokens of any size, some of them zero, and some twice."""
    x = torch.randn(60, d_in, generator=torch.Generator().manual_seed(1)) * torch.logspace(-2, 2, 60)[:, None]
    return torch.cat([x, torch.zeros(2, d_in), x[:1], torch.ones(1, d_in)])


def dense(coder: SparseCoder, x: Tensor) -> Tensor:
    """Return the latents that sparsify encodes tokens to, [B, d_sae]."""
    out = coder.encode(x)
    return torch.zeros_like(out.pre_acts).scatter(1, out.top_indices, out.top_acts)


def assert_same(coder: SparseCoder, sae: flashsae.SAE) -> None:
    """Check that both do the same to tokens."""
    x = tokens(sae.config.d_in).to(coder.dtype)
    of_16_bits = {torch.bfloat16: 3e-2, torch.float16: 4e-3}
    allowed = of_16_bits.get(coder.dtype, 1e-5)
    with torch.no_grad():
        encoded, theirs = coder.encode(x), dense(coder, x)
        ours = sae.encode(x).to_dense().to(theirs.dtype)
        torch.testing.assert_close(ours, theirs, rtol=allowed, atol=allowed * float(theirs.abs().max()))
        expected = coder.decode(encoded.top_acts, encoded.top_indices)
        expected = expected if coder.W_skip is None else expected + x @ coder.W_skip.T
        scale = allowed * float(expected.abs().max())
        torch.testing.assert_close(sae(x).to(theirs.dtype), expected, rtol=allowed, atol=scale)
        if not coder.cfg.multi_topk:  # with it theirs returns what 4 · k latents reconstruct
            torch.testing.assert_close(coder(x).sae_out, expected, rtol=allowed, atol=scale)


SETTINGS: list[dict[str, Any]] = [
    {},
    {"transcode": True},
    {"transcode": True, "skip_connection": True},
    {"skip_connection": True},
    {"multi_topk": True, "normalize_decoder": False},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize(("d_in", "d_sae", "k"), [(D, F, K), (D, F, 1), (D, F, F), (5, 3, 2), (16, 64, 8)])
def test_what_sparsify_saves_gives_the_same_numbers_here(
    settings: dict[str, Any], d_in: int, d_sae: int, k: int, tmp_path: Path
) -> None:
    coder = SparseCoder(d_in, SparseCoderConfig(num_latents=d_sae, k=k, **settings))
    with torch.no_grad():
        for parameter in coder.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(parameter.numel()))
    coder.save_to_disk(tmp_path / "h.3")
    sae = flashsae.load(tmp_path / "h.3")
    assert_same(coder, sae)
    sae.save(tmp_path / "again", format="sparsify")
    assert_same(SparseCoder.load_from_disk(tmp_path / "again"), sae)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype: torch.dtype, tmp_path: Path) -> None:
    coder = SparseCoder(D, SparseCoderConfig(num_latents=F, k=F), dtype=dtype)  # all, so that no rounding selects
    coder.save_to_disk(tmp_path / "theirs")
    sae = flashsae.load(tmp_path / "theirs")
    assert sae.W_dec.dtype == dtype
    assert_same(coder, sae)
    sae.save(tmp_path / "ours", format="sparsify")
    assert SparseCoder.load_from_disk(tmp_path / "ours").dtype == dtype
    for name, value in SparseCoder.load_from_disk(tmp_path / "ours").state_dict().items():
        assert torch.equal(value, coder.state_dict()[name])


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [
        ("topk", {"k": K}),
        ("topk", {"k": 1, "multi_topk": 0.125}),
        ("topk", {"k": F}),
        ("hierarchical_topk", {"k": K}),
        ("matryoshka:topk", {"k": K, "prefixes": (0.5, 1.0)}),
        ("relu", {}),
        ("transcoder", {"k": K}),
        ("transcoder:relu", {}),
        ("skip_transcoder", {"k": K}),
    ],
)
@pytest.mark.parametrize("subtracts", [True, False])
def test_sparsify_gives_the_same_numbers_as_what_is_written(
    architecture: str, settings: dict[str, Any], subtracts: bool, tmp_path: Path
) -> None:
    if subtracts and "transcoder" in architecture:
        subtracts = False  # which is none of ours
    sae = random_sae(architecture, settings, subtracts)
    sae.save(tmp_path / "sae", format="sparsify", metadata={"model": "gpt2", "hookpoint": "h.3"})
    assert_same(SparseCoder.load_from_disk(tmp_path / "sae"), sae)
    assert_same(SparseCoder.load_from_disk(tmp_path / "sae"), flashsae.load(tmp_path / "sae"))


def random_sae(architecture: str, settings: dict[str, Any], subtracts: bool = True) -> flashsae.SAE:
    arch = flashsae.architecture.settings_of(architecture, **settings)
    sae = flashsae.SAE(flashsae.SAEConfig(D, F, arch=arch, apply_b_dec_to_input=subtracts)).eval()
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(parameter.numel()))
    return sae


def test_what_is_given_up_is_topk_there(tmp_path: Path) -> None:
    sae = random_sae("batch_topk", {"k": K})
    (told,) = sae.save(tmp_path / "sae", format="sparsify", lossy=True)
    assert told.startswith("batch_topk is TopK with k = 5")
    coder = SparseCoder.load_from_disk(tmp_path / "sae")
    content = sparsify.read(tmp_path / "sae")
    assert coder.cfg.k == K
    torch.testing.assert_close(dense(coder, tokens()).double(), codes(content, tokens()), rtol=1e-5, atol=1e-3)


def test_a_root_of_several_is_loaded_at_once(tmp_path: Path) -> None:
    contents = {name: made("topk", k=k) for k, name in ((3, "h.10"), (4, "h.2"), (5, "h.2.mlp"))}
    sparsify.write_set(tmp_path, contents, False)
    coders = SparseCoder.load_many(str(tmp_path), local=True)
    assert {name: coder.cfg.k for name, coder in coders.items()} == {"h.2": 4, "h.2.mlp": 5, "h.10": 3}
    assert list(SparseCoder.load_many(str(tmp_path), local=True, layers=["h.2"])) == ["h.2"]
    for name, coder in coders.items():
        assert_same(coder, flashsae.load(tmp_path / name))


def test_sparsify_has_nothing_to_complain_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    random_sae("topk", {"k": K}).save(tmp_path / "sae", format="sparsify", metadata={"model": "gpt2"})
    capsys.readouterr()
    SparseCoder.load_from_disk(tmp_path / "sae")
    assert capsys.readouterr().out == ""
