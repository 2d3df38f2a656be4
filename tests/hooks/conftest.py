"""A tiny model, a text and an SAE, and that nothing stays in the model."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from flashsae import SAE
from helpers.hooked import hooks_of, sae_of


@pytest.fixture(scope="package")
def model(tiny: ModuleType) -> nn.Module:
    made: nn.Module = tiny.gpt2().eval()
    made.generation_config.eos_token_id = None  # type: ignore[union-attr]
    made.generation_config.pad_token_id = 0  # type: ignore[union-attr]
    return made


@pytest.fixture(scope="package")
def ids() -> Tensor:
    return torch.randint(3, 60, (2, 7), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="package")
def sae() -> SAE:
    return sae_of()


@pytest.fixture(autouse=True)
def _nothing_stays(request: pytest.FixtureRequest) -> Iterator[None]:
    """Hold that a test leaves no hook and no mode behind in the model."""
    if "model" not in request.fixturenames:
        yield
        return
    model = request.getfixturevalue("model")
    before = hooks_of(model), [module.training for module in model.modules()]
    yield
    model.zero_grad()
    assert (hooks_of(model), [module.training for module in model.modules()]) == before
