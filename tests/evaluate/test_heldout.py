from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

import flashsae
from flashsae import SAE, SAEConfig, TrainConfig, evaluate, fit, ops, register
from flashsae.architecture import AUTOENCODER, RECONSTRUCTION, Architecture
from flashsae.data.sources import ArraySource, Chunk
from flashsae.errors import ConfigError, DataError, DtypeError
from flashsae.evaluate import held_out_batches, latent_geometry


def test_figures_are_those_of_the_whole_set(generator: torch.Generator) -> None:
    sae, x = SAE(SAEConfig(6, 20, 3)), torch.randn(101, 6, generator=generator)
    result = evaluate(sae, x.split(17), batch_tokens=10)
    acts = sae.encode(x).to_dense()
    x_hat = acts @ sae.W_dec + sae.b_dec
    assert result.fvu == pytest.approx(((x - x_hat).square().sum() / (x - x.mean(0)).square().sum()).item(), rel=1e-5)
    assert result.l0 == pytest.approx((acts > 0).sum(1).double().mean().item())
    torch.testing.assert_close(result.latent_density, (acts > 0).double().mean(0))
    assert result.tokens == 101
    assert "latent_density" not in repr(result)


@pytest.mark.parametrize("max_tokens", [0, 1, 4000, 5000, 10**6])
def test_held_out_batches_are_spread_over_all_that_is_held_out(max_tokens: int) -> None:
    source = ArraySource(torch.arange(60_000.0)[:, None], held_out=0.2)
    rows = source.split_rows("held_out")
    batches = [batch["x"][:, 0].long() for batch in held_out_batches(source, max_tokens)]
    found = torch.cat([torch.zeros(0, dtype=torch.int64), *batches])
    assert len(found) == min(max_tokens, len(rows)) == len(found.unique())
    assert bool(torch.isin(found, rows).all())
    again = [batch["x"][:, 0].long() for batch in held_out_batches(source, max_tokens)]
    assert all(map(torch.equal, batches, again))
    if max_tokens >= 4000:
        assert len(batches) == -(-len(found) // 8192)
        for batch in batches:
            quarters = torch.histc(batch.float(), 4, 0, 60_000) / len(batch)
            assert quarters.tolist() == pytest.approx([0.25] * 4, abs=0.02)


def test_a_stream_gives_its_first_held_out_tokens() -> None:
    class Stream:
        name, widths = "a stream", {"h": 1}

        def chunks(self, split: str, cursor: object = None) -> object:
            assert split == "held_out"
            for start in range(0, 100, 10):
                yield Chunk({"h": torch.arange(start, start + 10.0)[:, None]}, torch.arange(10)), {}

    found = torch.cat([batch["h"] for batch in held_out_batches(Stream(), 25)])  # type: ignore[arg-type]
    assert found[:, 0].tolist() == list(range(25))


def _kinds(x: torch.Tensor) -> dict[str, Any]:
    """Return everything that holds x and that `fit` takes."""
    parts = list(x.split(17))
    return {
        "array": x.numpy(),
        "list": parts,
        "generator": (part for part in parts),
        "tuples": [(part,) for part in parts],
        "lists": [[part] for part in parts],
        "dicts": [{"acts": part} for part in parts],
        "arrays": [part.numpy() for part in parts],
        "loader": torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), batch_size=17),
    }


@pytest.mark.parametrize("kind", _kinds(torch.zeros(1, 6)))
def test_whatever_fit_takes_is_measured(kind: str, generator: torch.Generator) -> None:
    sae, x = SAE(SAEConfig(6, 20, 3)), torch.randn(101, 6, generator=generator)
    result, expected = evaluate(sae, _kinds(x)[kind], batch_tokens=10), evaluate(sae, x)
    assert result.fvu == pytest.approx(expected.fvu, rel=1e-9)
    assert (result.tokens, result.l0) == (101, expected.l0)
    config = TrainConfig(batch_tokens=17, tokens=34, shuffle_tokens=64)
    assert fit(_kinds(x)[kind], d_sae=20, k=3, config=config, progress=False).config.d_in == 6


def test_x_is_measured_as_it_is_given_and_not_as_the_sae_reads_it(generator: torch.Generator) -> None:
    offset = 1e10
    x = torch.randn(300, 6, generator=generator, dtype=torch.float64)
    sae = SAE(SAEConfig(6, 20, 3))
    with torch.no_grad():
        sae.b_dec.fill_(offset)
    result = evaluate(sae, x + offset)
    x_hat = sae((x + offset).float()).double()
    expected = (x + offset - x_hat).square().sum() / (x - x.mean(0)).square().sum()
    assert result.fvu == pytest.approx(expected.item(), rel=1e-4)
    narrow = SAE(SAEConfig(6, 20, 3), dtype=torch.bfloat16)
    with torch.no_grad():
        narrow.b_dec.fill_(100.0)
    x = x.float() + 100  # bfloat16 has steps of a half there
    expected = (x.double() - narrow(x.bfloat16()).double()).square().sum() / (x - x.mean(0)).square().sum()
    assert evaluate(narrow, x).fvu == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("are_batches", [False, True])
def test_few_tokens_of_huge_norm_are_told_apart(are_batches: bool, generator: torch.Generator) -> None:
    """As the first tokens of texts are in many language models: 42 times the median norm."""
    sae, x = SAE(SAEConfig(16, 40, 3)), torch.randn(3000, 16, generator=generator)
    usual = torch.arange(3000) % 300 != 7
    x[~usual] = 42 * 4 * torch.nn.functional.normalize(sae.W_dec[:1].detach(), dim=1)
    result = evaluate(sae, x.split(64) if are_batches else x)
    assert result.outliers == 10
    assert result.fvu != pytest.approx(result.fvu_without_outliers, rel=0.1)
    assert result.fvu_without_outliers == pytest.approx(evaluate(sae, x[usual]).fvu, rel=1e-9)
    same = evaluate(sae, x[usual])
    assert (same.outliers, same.fvu_without_outliers) == (0, same.fvu)


def test_what_is_no_batch_is_named() -> None:
    sae = SAE(SAEConfig(2, 4, 1))
    with pytest.raises(DtypeError, match="a batch of x: expected one tensor, got a dict of a, b"):
        evaluate(sae, [{"a": torch.zeros(1, 2), "b": torch.zeros(1, 2)}])  # type: ignore[list-item]
    with pytest.raises(DtypeError, match="a batch of x: expected one tensor, got a tuple of 2"):
        evaluate(sae, [(torch.zeros(1, 2), torch.zeros(1, 2))])  # type: ignore[list-item]
    with pytest.raises(DtypeError, match="x: expected a tensor, a numpy array or an iterable of such, got int"):
        evaluate(sae, 3)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"x: 1 of 2 rows hold NaN or Inf \(first: row 1\)"):
        evaluate(sae, torch.tensor([[0.0, 1.0], [0.0, torch.nan]]))
    with pytest.raises(DataError, match="x: 1 of 1 rows hold numbers beyond float32"):
        evaluate(sae, torch.full((1, 2), 1e40, dtype=torch.float64))
    for batch_tokens in (0, True, 1.5, "8"):
        with pytest.raises(ConfigError, match="batch_tokens: expected a positive int"):
            evaluate(sae, torch.zeros(1, 2), batch_tokens=batch_tokens)  # type: ignore[arg-type]


def test_no_tokens_are_an_error() -> None:
    with pytest.raises(DataError, match="expected at least one token to evaluate on"):
        evaluate(SAE(SAEConfig(2, 4, 1)), [])


def test_geometry_on_rows_that_are_known() -> None:
    sae = SAE(SAEConfig(2, 3, 1))
    with torch.no_grad():
        sae.W_dec.copy_(torch.tensor([[2.0, 0.0], [1.0, 1.0], [0.0, -3.0]]))
        sae.W_enc_T.copy_(torch.tensor([[5.0, 0.0], [-1.0, -1.0], [1.0, 0.0]]))
    geometry = latent_geometry(sae)
    half = 0.5**0.5
    torch.testing.assert_close(geometry["decoder_norm"], torch.tensor([2.0, 2**0.5, 3.0]))
    torch.testing.assert_close(geometry["encoder_decoder_cosine"], torch.tensor([1.0, -1.0, 0.0]))
    torch.testing.assert_close(geometry["nearest_decoder_cosine"], torch.tensor([half, half, 0.0]))


def test_latents_that_write_elsewhere_than_they_read_have_no_cosine_between_the_two() -> None:
    sae = SAE(SAEConfig(2, 3, 1))
    sae.W_enc_T = torch.nn.Parameter(torch.ones(3, 5))
    assert latent_geometry(sae).keys() == {"decoder_norm", "nearest_decoder_cosine"}


@pytest.mark.parametrize("is_training", [True, False])
@pytest.mark.parametrize("fails", [True, False])
def test_an_sae_is_measured_as_it_is_in_inference(is_training: bool, fails: bool) -> None:
    modes = []

    class Watched(SAE):
        def encode(self, x: torch.Tensor) -> Any:
            modes.append(self.training)
            if fails:
                raise DataError("of this batch")
            return super().encode(x)

    sae = Watched(SAEConfig(6, 20, 3)).train(is_training)
    with pytest.raises(DataError, match="of this batch") if fails else nullcontext():
        evaluate(sae, torch.randn(8, 6))
    assert modes == [False]
    assert sae.training == is_training


@pytest.mark.parametrize("sae", [None, "runs/run/sae", torch.zeros(2)])
def test_what_is_no_sae_is_told_in_a_sentence(sae: Any) -> None:
    with pytest.raises(DtypeError, match=r"^sae: expected a flashsae\.SAE, got \w+\.$"):
        evaluate(sae, torch.zeros(2, 2))
    with pytest.raises(DtypeError, match=r"^sae: expected a flashsae\.SAE, got \w+\.$"):
        latent_geometry(sae)


@dataclass(frozen=True)
class TranscoderSettings:
    """Settings of a TopK transcoder, for a test.

    Args:
        k: Latents of each token.
    """

    k: int = 3


TRANSCODER = Architecture(
    name="transcoder_of_a_test",
    title="Transcoder of a test",
    settings=TranscoderSettings,
    parameters=(replace(AUTOENCODER[0], initial="unit_rows"), *AUTOENCODER[1:]),
    encode=lambda sae, x: ops.encode_topk(x, sae.W_enc_T, sae.b_enc, sae.config.arch.k),
    terms=(RECONSTRUCTION,),
    l0=lambda settings: settings.k,
    reads=("before",),
    writes=("after",),
    subtracts_b_dec=False,
)


def test_an_sae_that_writes_elsewhere_is_measured_on_what_it_writes(
    generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flashsae.architecture.description, "_REGISTERED", {})
    register(TRANSCODER)
    sae = SAE(SAEConfig(6, 20, arch=TranscoderSettings(), d_out=4))
    before, after = torch.randn(101, 6, generator=generator), torch.randn(101, 4, generator=generator)
    after[7] *= 100.0
    acts = sae.encode(before).to_dense()
    error = (after - acts @ sae.W_dec - sae.b_dec).square().sum()
    whole = {"before": before, "after": after}
    batches = [{"before": a, "after": b} for a, b in zip(before.split(17), after.split(17))]
    for x in (whole, batches, iter(batches)):
        result = evaluate(sae, x, batch_tokens=10)
        assert result.fvu == pytest.approx((error / (after - after.mean(0)).square().sum()).item(), rel=1e-5)
        assert (result.tokens, result.outliers) == (101, 1)
        torch.testing.assert_close(result.latent_density, (acts != 0).double().mean(0))
    with pytest.raises(DataError, match="x: 1 of 101 rows hold NaN"):
        evaluate(sae, {"before": before, "after": torch.where(torch.arange(101)[:, None] == 3, torch.nan, after)})
    with pytest.raises(ConfigError, match=r"\(before, after\), got .*1 \(x\)"):
        evaluate(sae, before)
