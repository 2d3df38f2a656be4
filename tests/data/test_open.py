"""Where a default cache goes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flashsae.data import open as open_module
from flashsae.data.language_model import LanguageModelConfig
from flashsae.data.open import ActivationsConfig, prepare_activations
from flashsae.errors import ConfigError


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


def test_several_hookpoints_need_a_place_for_their_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text.txt").write_text("\n\n".join(f"the cat {i} sat on the mat" for i in range(30)))
    config = ActivationsConfig(
        "minilm", str(tmp_path / "text.txt"), hookpoint="encoder.layer.[01]", context_length=16, held_out=0.3
    )
    monkeypatch.setattr(open_module, "LARGEST_DEFAULT_CACHE", 100)
    for stream, words in (
        (None, "above .* GB, so nothing is cached by default: give"),
        (True, "give, instead of --stream"),
    ):
        with pytest.raises(ConfigError, match=f"encoder.layer.1. .*{words}.* --activations FOLDER") as caught:
            prepare_activations(replace(config, stream=stream), tokens=100, folder=tmp_path, device="cpu")
        assert ("--stream" in str(caught.value)) == (stream is True)
