"""Where a default cache goes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from flashsae.data import open as open_module
from flashsae.data.language_model import LanguageModelConfig
from flashsae.data.open import ActivationsConfig, prepare_activations


def interrupt(n_rows: int) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("change", ["nothing", "dtype", "batch"])
def test_a_default_cache_goes_on_only_with_a_model_that_gives_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    (tmp_path / "text.txt").write_text("\n\n".join(f"the cat {i} sat on the mat" for i in range(30)))
    config = ActivationsConfig(dataset=str(tmp_path / "text.txt"), context_length=16)
    folder = tmp_path / "activations"
    if change == "dtype":
        monkeypatch.setattr(LanguageModelConfig, "resolved_dtype", lambda self: torch.bfloat16)
    if change == "batch":
        monkeypatch.setattr(open_module, "MODEL_BATCH_TOKENS", 64)
    with pytest.raises(KeyboardInterrupt):
        prepare_activations(config, tokens=100, folder=folder, device="cpu").open(interrupt)
    monkeypatch.undo()
    for _ in range(2):
        opened = prepare_activations(config, tokens=100, folder=folder, device="cpu").open(lambda rows: None)
    assert opened.sources["encoder.layer.2"].d_in == 384
    assert len(list(folder.iterdir())) == (1 if change == "nothing" else 2)
