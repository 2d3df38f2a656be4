from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from flashsae.errors import ConfigError
from flashsae.formats import folds
from helpers.dense_content import codes, made, reconstructed, same


@pytest.mark.parametrize("architecture", ["topk", "batch_topk", "jump_relu", "relu", "gated", "abs_topk"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_b_dec_is_folded_either_way(architecture: str, dtype: torch.dtype) -> None:
    content, x = made(architecture, dtype=dtype), torch.randn(40, 7, dtype=torch.float64)
    there = folds.subtracting(content, False)
    back = folds.subtracting(there, True)
    assert (there.apply_b_dec_to_input, back.apply_b_dec_to_input) == (False, True)
    assert folds.subtracting(content, True) is content
    allowed = 1e-12 if dtype == torch.float64 else 1e-5
    for other in (there, back):
        torch.testing.assert_close(codes(other, x), codes(content, x), rtol=allowed, atol=allowed)
        torch.testing.assert_close(reconstructed(other, x), reconstructed(content, x), rtol=allowed, atol=allowed)
    for name, value in content.tensors.items():  # the way back is within two roundings of a bias
        gap = (back.tensors[name] - value).abs().max()
        assert gap <= 2 * torch.finfo(dtype).eps * max(1.0, float(there.tensors[name].abs().max()))


def test_b_dec_of_another_width_cannot_be_folded() -> None:
    content = made("transcoder")
    wide = replace(content, tensors={**content.tensors, "W_dec": torch.ones(37, 9), "b_dec": torch.ones(9)})
    with pytest.raises(ConfigError, match="b_dec: an SAE that reads 7 and writes 9 values cannot subtract it"):
        folds.subtracting(wide, True)


def test_many_rows_are_folded_as_few_are(monkeypatch: pytest.MonkeyPatch) -> None:
    content = made("gated", unit_rows=False)
    whole = folds.with_unit_rows(folds.subtracting(content, False))
    monkeypatch.setattr(folds, "_AT_A_TIME", 40)  # 5 rows
    part = folds.with_unit_rows(folds.subtracting(content, False))
    assert whole is not None
    assert part is not None
    torch.testing.assert_close(part.tensors, whole.tensors, rtol=1e-6, atol=1e-6)


def test_what_a_fold_makes_too_large_for_float16_is_float32() -> None:
    content = made("relu", dtype=torch.float16, unit_rows=False)
    large = {**content.tensors, "W_enc_T": content.tensors["W_enc_T"] * 10_000, "b_dec": content.tensors["b_dec"] * 10}
    wide = replace(content, tensors=large)
    for folded in (folds.subtracting(wide, False), folds.with_unit_rows(wide)):
        assert folded is not None
        assert {tensor.dtype for tensor in folded.tensors.values()} == {torch.float32}
        assert all(tensor.isfinite().all() for tensor in folded.tensors.values())
    assert folds.subtracting(content, False).dtype == torch.float16


def test_rows_of_norm_1_stay_bit_for_bit() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        content = made("relu", dtype=dtype)
        folded = folds.with_unit_rows(content)
        assert folded is not None
        assert same(folded, content)
