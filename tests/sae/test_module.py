from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from flashsae import SAE, SAEConfig, SparseCode, ops
from flashsae.errors import CheckpointError, ConfigError, DtypeError, ShapeError, StorageError
from flashsae.files.documents import sealed
from flashsae.ops.validate import Precision


@pytest.fixture
def sae() -> SAE:
    sae = SAE(SAEConfig(d_in=12, d_sae=40, k=5), seed=1)
    torch.nn.init.normal_(sae.b_enc, std=0.1)
    torch.nn.init.normal_(sae.b_dec, std=0.1)
    return sae


def test_forward_is_the_dense_formula(sae: SAE, generator: torch.Generator) -> None:
    x = torch.randn(30, 12, generator=generator)
    latent_acts = torch.relu((x - sae.b_dec) @ sae.W_enc + sae.b_enc)
    kept = torch.zeros_like(latent_acts).scatter(1, latent_acts.topk(5).indices, 1.0) * latent_acts
    torch.testing.assert_close(sae.encode(x).to_dense(), kept)
    torch.testing.assert_close(sae(x), kept @ sae.W_dec + sae.b_dec)


@pytest.mark.parametrize("shape", [(12,), (3, 12), (2, 3, 4, 12), (0, 12), (2, 0, 12)])
def test_leading_dimensions_are_free(sae: SAE, shape: tuple[int, ...], generator: torch.Generator) -> None:
    x = torch.randn(*shape, generator=generator)
    code = sae.encode(x)
    assert code.top_acts.shape == code.top_indices.shape == (*shape[:-1], 5)
    assert code.to_dense().shape == (*shape[:-1], 40)
    assert sae(x).shape == x.shape
    torch.testing.assert_close(sae(x).reshape(-1, 12), sae(x.reshape(-1, 12)))


def test_it_starts_tied_and_with_unit_rows() -> None:
    sae = SAE(SAEConfig(8, 20, 3), seed=4)
    assert torch.equal(sae.W_enc_T, sae.W_dec)
    assert sae.W_enc_T.data_ptr() != sae.W_dec.data_ptr()
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(20))
    assert torch.equal(SAE(SAEConfig(8, 20, 3), seed=4).W_dec, sae.W_dec)
    assert not torch.equal(SAE(SAEConfig(8, 20, 3), seed=5).W_dec, sae.W_dec)


def test_initialize_from_takes_the_mean_and_the_best_length(generator: torch.Generator) -> None:
    x = 100 + 7 * torch.randn(500, 12, generator=generator)
    sae = SAE(SAEConfig(12, 40, 10))
    sae.initialize_from(x)
    torch.testing.assert_close(sae.b_dec.detach(), x.mean(0))
    part = sae(x) - sae.b_dec
    residual = x - sae(x)
    assert abs((residual * part).sum() / part.square().sum()).item() < 1e-4  # no other length fits better
    assert (residual.square().sum() / (x - x.mean(0)).square().sum()).item() < 0.6


def test_rescaled_does_to_x_what_the_sae_does_to_a_multiple(sae: SAE, generator: torch.Generator) -> None:
    x = torch.randn(30, 12, generator=generator)
    other = sae.rescaled(8.0)  # a power of two, so that nothing rounds
    assert torch.equal(other.encode(x).top_indices, sae.encode(8 * x).top_indices)
    torch.testing.assert_close(other(x), sae(8 * x) / 8)
    assert other.W_dec.data_ptr() == sae.W_dec.data_ptr()


@pytest.mark.parametrize("precision", [None, "float32", "tf32", "bf16"])
def test_the_precision_reaches_every_product(
    sae: SAE, precision: Precision | None, monkeypatch: pytest.MonkeyPatch, generator: torch.Generator
) -> None:
    asked = {}

    def spied(name: str) -> Callable[..., Any]:
        original = getattr(ops, name)

        def spy(*args: Any, **settings: Any) -> Any:
            asked[name] = settings["precision"]
            return original(*args, **settings)

        return spy

    names = ("encode_topk", "decode", "decode_loss")
    for name in names:
        monkeypatch.setattr(ops, name, spied(name))
    sae.precision = precision
    x = torch.randn(5, 12, generator=generator)
    for model in (sae, sae.rescaled(2.0)):
        asked.clear()
        code = model.encode(x)
        model.decode(code)
        model.decode_loss(code, x)
        assert asked == dict.fromkeys(names, precision)


def test_decode_loss_is_the_squared_error_of_the_reconstruction(sae: SAE, generator: torch.Generator) -> None:
    x, weights = torch.randn(30, 12, generator=generator), torch.rand(30, generator=generator)
    code = sae.encode(x)
    loss, x_hat, residual = sae.decode_loss(code, x, token_weights=weights)
    torch.testing.assert_close(x_hat, sae.decode(code).detach())
    torch.testing.assert_close(residual, x - x_hat)
    torch.testing.assert_close(loss, (weights * residual.square().sum(1)).sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_half_width_weights_may_have_whole_biases(sae: SAE, dtype: torch.dtype, generator: torch.Generator) -> None:
    x = torch.randn(30, 12, generator=generator).to(dtype)
    for name in ("W_enc_T", "W_dec"):
        weights = getattr(sae, name)
        weights.data = weights.data.bfloat16()
    whole = SAE(sae.config)
    whole.load_state_dict(sae.state_dict())
    code, expected = sae.encode(x), whole.encode(x)
    assert torch.equal(code.top_indices, expected.top_indices)
    torch.testing.assert_close(code.top_acts, expected.top_acts)
    assert sae(x).dtype == torch.bfloat16
    torch.testing.assert_close(sae(x).float(), whole(x), rtol=2**-7, atol=2**-7)
    sae(x).square().sum().backward()
    assert sae.W_dec.grad is not None
    assert sae.b_enc.grad is not None
    assert (sae.W_dec.grad.dtype, sae.b_enc.grad.dtype) == (torch.bfloat16, torch.float32)


def test_decoder_gradient_is_projected_and_rows_stay_unit(sae: SAE, generator: torch.Generator) -> None:
    sae(torch.randn(64, 12, generator=generator)).square().sum().backward()
    assert sae.W_dec.grad is not None
    before = sae.W_dec.grad.clone()
    sae.project_decoder_grad()
    along = (sae.W_dec.grad * sae.W_dec).sum(1)
    assert along.abs().max() < 1e-4 * before.abs().max()
    removed = before - sae.W_dec.grad
    torch.testing.assert_close(removed, (before * sae.W_dec).sum(1, keepdim=True) * sae.W_dec, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        sae.W_dec.mul_(3)
    sae.normalize_decoder()
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(40))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_save_and_load_give_the_same_bits(dtype: torch.dtype, tmp_path: Path, generator: torch.Generator) -> None:
    sae = SAE(SAEConfig(12, 40, 5), dtype=dtype)
    sae.save(tmp_path / "sae", metadata={"hookpoint": "layers.3"})
    loaded = SAE.load(tmp_path / "sae")
    assert loaded.config == sae.config
    for name, tensor in sae.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
        assert loaded.state_dict()[name].dtype == dtype
    x = torch.randn(9, 12, generator=generator)
    assert torch.equal(loaded(x), sae(x))
    assert loaded.W_dec.requires_grad
    description = json.loads((tmp_path / "sae" / "flashsae.json").read_text())
    assert description["architecture"] == "topk"
    assert description["metadata"] == {"hookpoint": "layers.3"}


def test_saving_overwrites_only_when_asked(sae: SAE, tmp_path: Path) -> None:
    sae.save(tmp_path / "sae")
    with pytest.raises(StorageError, match="exists already and is not overwritten; give overwrite=True"):
        sae.save(tmp_path / "sae")
    sae.save(tmp_path / "sae", overwrite=True)
    (tmp_path / "precious").mkdir()
    (tmp_path / "file").write_text("x")
    for name in ("precious", "file"):
        with pytest.raises(StorageError, match="holds no FlashSAE SAE and is not replaced"):
            sae.save(tmp_path / name, overwrite=True)
    assert (tmp_path / "file").read_text() == "x"


def _edit(folder: Path, **changes: object) -> None:
    path = folder / "flashsae.json"
    description = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps(sealed({k: v for k, v in description.items() if v is not None})))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "other"}, "is something else: expected the format 'flashsae.sae'"),
        ({"format_version": 99}, "has format version 99, this FlashSAE reads 2"),
        ({"architecture": "unknown"}, "cannot be read here: arch: expected one of .*, got 'unknown'"),
        ({"settings": None}, "is damaged: settings: expected a value, got nothing"),
        ({"d_in": "x", "k": 1.5}, "is damaged: d_in: expected a whole number, got 'x'"),
        ({"dtype": "floa|32"}, r"is damaged: dtype: expected one of float32, .* got 'floa\|32'"),
        ({"sha256": "0"}, "flashsae.safetensors is damaged: its checksum"),
        ({"d_sae": 41}, r"does not fit flashsae.json: expected tensors .*W_dec float32 \[41, 12\]"),
    ],
)
def test_a_foreign_or_damaged_folder_is_refused(
    sae: SAE, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    sae.save(tmp_path / "sae")
    _edit(tmp_path / "sae", **changes)
    with pytest.raises(CheckpointError, match=message):
        SAE.load(tmp_path / "sae")


def test_truncated_weights_and_other_folders_are_refused(sae: SAE, tmp_path: Path) -> None:
    sae.save(tmp_path / "sae")
    weights = tmp_path / "sae" / "flashsae.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=r"flashsae\.safetensors is damaged: its checksum"):
        SAE.load(tmp_path / "sae")
    with pytest.raises(CheckpointError, match=r"expected flashsae\.json in it, found sae"):
        SAE.load(tmp_path)
    with pytest.raises(CheckpointError, match="no such folder"):
        SAE.load(tmp_path / "none")


def test_bad_input_is_named(sae: SAE) -> None:
    with pytest.raises(ShapeError, match=r"x: expected the shape \[\.\.\., 12\], got \[3, 11\]"):
        sae(torch.zeros(3, 11))
    with pytest.raises(DtypeError, match=r"x: expected a float tensor, got torch\.int64"):
        sae(torch.zeros(3, 12, dtype=torch.int64))
    with pytest.raises(ConfigError, match="k: expected k <= d_sae = 4, got 5"):
        SAEConfig(d_in=3, d_sae=4, k=5)
    with pytest.raises(ConfigError, match="d_in: expected a positive int, got 0"):
        SAEConfig(d_in=0, d_sae=4, k=2)


def test_code_to_dense_adds_repeats() -> None:
    code = SparseCode.topk(torch.tensor([[1.0, 2.0]]), torch.tensor([[1, 1]]), 3)
    assert code.to_dense().tolist() == [[0.0, 3.0, 0.0]]


def _gradients(sae: SAE, x: torch.Tensor, code: SparseCode) -> list[torch.Tensor]:
    total = sae.decode(code).square().sum() + sae.decode_loss(code, x).loss
    return list(torch.autograd.grad(total, [sae.W_dec, sae.b_dec]))


@pytest.mark.parametrize("way", ["replaced", "in place"])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_code_of_other_indices_has_their_gradients(
    sae: SAE, way: str, compiled: bool, generator: torch.Generator
) -> None:
    x = torch.randn(9, 12, generator=generator)

    def change(x: torch.Tensor) -> tuple[torch.Tensor, SparseCode]:
        code = sae.encode(x)
        other = (code.top_indices + 7) % 40
        if way == "replaced":
            code = SparseCode.topk(code.top_acts, other, 40)
        else:
            code.top_indices.copy_(other)
        return other, code

    run = torch.compile(change, backend="eager", fullgraph=True) if compiled else change
    with torch.no_grad():
        other, code = run(x)
    assert torch.equal(code.top_indices, other)
    plain = SparseCode.topk(code.top_acts.clone(), other.clone(), 40)
    for ours, expected in zip(_gradients(sae, x, code), _gradients(sae, x, plain)):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("setting", ["meta", "autocast", "float64"])
def test_initial_weights_do_not_depend_on_global_state(setting: str) -> None:
    expected = SAE(SAEConfig(8, 20, 3), seed=4, dtype=torch.bfloat16)
    default = torch.get_default_dtype()
    try:
        if setting == "float64":
            torch.set_default_dtype(torch.float64)
        with torch.autocast("cpu", enabled=setting == "autocast"), torch.device("meta" if setting == "meta" else "cpu"):
            sae = SAE(SAEConfig(8, 20, 3), seed=4, dtype=torch.bfloat16)
            sae.normalize_decoder()
    finally:
        torch.set_default_dtype(default)
    expected.normalize_decoder()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(sae.state_dict()[name], tensor)
        assert sae.state_dict()[name].dtype == torch.bfloat16
    assert SAE(SAEConfig(8, 20, 3), device="meta").W_dec.is_meta


def test_repr_tells_what_it_is() -> None:
    assert repr(SAE(SAEConfig(6, 20, 3), dtype=torch.bfloat16)) == "SAE(TopK, d_in=6, d_sae=20, k=3, bfloat16, cpu)"


def test_tokens_that_are_not_those_of_the_code_are_refused() -> None:
    sae = SAE(SAEConfig(6, 20, 3))
    code = sae.encode(torch.ones(5, 6))
    assert torch.equal(sae.decode(code, like=torch.ones(5, 6)), sae.decode(code))
    for shape in ((4, 6), (5, 7), (6,)):
        with pytest.raises(ShapeError, match=r"like: expected the tokens of the code, \[5, 6\], got"):
            sae.decode(code, like=torch.ones(shape))
