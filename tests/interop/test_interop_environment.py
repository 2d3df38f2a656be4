"""The libraries are those that the extra `peers` names, and can be asked for numbers."""

from __future__ import annotations

import re
from importlib.metadata import requires, version

import torch
from packaging.requirements import Requirement
from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig

import flashsae


def test_the_libraries_are_of_the_versions_that_the_extra_asks_for() -> None:
    asked = [Requirement(line) for line in requires("flashsae") or () if re.search(r"extra == .peers.", line)]
    assert {each.name for each in asked} == {"sae-lens", "eai-sparsify", "dictionary-learning"}
    assert all(each.specifier.contains(version(each.name)) for each in asked)


def test_the_same_weights_give_the_same_numbers_in_sae_lens_and_here(generator: torch.Generator) -> None:
    ours = flashsae.SAE(flashsae.SAEConfig(12, 40, 5))
    theirs = TopKSAE(TopKSAEConfig(d_in=12, d_sae=40, k=5, dtype="float32", apply_b_dec_to_input=True))
    with torch.no_grad():
        for name in ("b_enc", "b_dec", "W_dec"):
            getattr(ours, name).normal_(generator=generator)
            getattr(theirs, name).copy_(getattr(ours, name))
        theirs.W_enc.copy_(ours.W_enc_T.T)
        x = torch.randn(33, 12, generator=generator)
        torch.testing.assert_close(ours.encode(x).to_dense(), theirs.encode(x))
        torch.testing.assert_close(ours(x), theirs(x))
