from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest
import torch

import flashsae
from flashsae import TrainConfig
from flashsae.data.synthetic import SuperpositionModel

SMALL = TrainConfig(batch_tokens=64, tokens=64 * 5, shuffle_tokens=256, dead_after_tokens=64)
X = SuperpositionModel(8, 16, active=2.0).sample(640, seed=1)


def _settings() -> dict[str, AbstractContextManager[object]]:
    @contextmanager
    def set_back(change: Callable[[], object], back: Callable[[], object]) -> Iterator[None]:
        change()
        try:
            yield
        finally:
            back()

    products = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    return {
        "autocast": torch.autocast("cpu", torch.bfloat16),
        "default dtype": set_back(
            lambda: torch.set_default_dtype(torch.float64), lambda: torch.set_default_dtype(torch.float32)
        ),
        "default device": torch.device("meta"),
        "inference mode": torch.inference_mode(),
        "no_grad": torch.no_grad(),
        "deterministic mode": set_back(
            lambda: torch.use_deterministic_algorithms(True), lambda: torch.use_deterministic_algorithms(False)
        ),
        "older matmul precision": set_back(
            lambda: torch.set_float32_matmul_precision("medium"), lambda: torch.set_float32_matmul_precision("highest")
        ),
        "newer matmul precision": set_back(
            lambda: setattr(products, "fp32_precision", "bf16"), lambda: setattr(products, "fp32_precision", "none")
        ),
        "seed": set_back(lambda: torch.manual_seed(123), lambda: None),
    }


@pytest.mark.parametrize("setting", _settings())
@pytest.mark.parametrize("kind", ["array", "list"])
def test_what_the_caller_has_set_for_all_of_pytorch_changes_no_byte(setting: str, kind: str) -> None:
    x = X if kind == "array" else list(X.split(64))
    expected = flashsae.fit(x, d_sae=16, k=3, config=SMALL, progress=False)
    fvu = flashsae.evaluate(expected, X).fvu
    with _settings()[setting]:
        sae = flashsae.fit(x, d_sae=16, k=3, config=SMALL, progress=False)
        assert flashsae.evaluate(sae, X).fvu == fvu
        before = _global_state()
    assert all(torch.equal(p, q) for p, q in zip(sae.parameters(), expected.parameters()))
    with _settings()[setting]:
        assert _global_state() == before


def _global_state() -> tuple[object, ...]:
    return (
        torch.is_autocast_enabled("cpu"),
        torch.get_default_dtype(),
        torch.get_default_device(),
        torch.is_inference_mode_enabled(),
        torch.is_grad_enabled(),
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.mkldnn.matmul.fp32_precision,  # type: ignore[attr-defined]
        torch.backends.cuda.matmul.fp32_precision,
    )
