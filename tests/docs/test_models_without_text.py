"""Each command of the page on models that read no text runs, with a tiny random model in place of the one it names."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from flashsae.cli import main
from flashsae.data.cache import ActivationCache
from helpers.pages import ROOT, code_blocks
from helpers.tiny_vision import write_model, write_photos

PAGE = ROOT / "docs" / "models.md"
LINES = re.findall(
    r"^\| [^|]+ \| `(flashsae cache [^`]+)` \|$",
    PAGE.read_text("utf-8").partition("## Models that read no text")[2],
    re.MULTILINE,
)
SIZES: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
STAGES: dict[str, Any] = {"embedding_size": 16, "hidden_sizes": [16], "depths": [1], "layer_type": "basic"}
TINY: dict[str, tuple[str, dict[str, Any]]] = {
    "google/vit-base-patch16-224": ("ViT", {}),
    "facebook/dinov2-with-registers-base": (
        "Dinov2WithRegisters",
        {**SIZES, "image_size": 8, "patch_size": 4, "num_register_tokens": 2},
    ),
    "microsoft/resnet-50": ("ResNet", STAGES),
}
LETTERS = ["<cls>", "<pad>", "<eos>", "<unk>", *"LAGVSERTIDPKQNFYMHWCXBUZO.-", "<mask>"]


def make(name: str, tiny: Any) -> None:
    from transformers import EsmConfig, EsmModel, EsmTokenizer

    folder = Path("model")
    if name.startswith("facebook/esm2"):
        Path("vocab.txt").write_text("\n".join(LETTERS), "utf-8")
        EsmTokenizer("vocab.txt").save_pretrained(folder)
        EsmModel(EsmConfig(vocab_size=len(LETTERS), pad_token_id=1, mask_token_id=31, **SIZES)).save_pretrained(folder)
        return
    family, settings = TINY.get(name, ("ViT", {}))
    write_model(folder, family, **settings)
    if name.startswith("openai/clip"):
        tiny.MORE_FAMILIES["clip"]().save_pretrained(folder)


def test_the_table_is_found() -> None:
    assert len(LINES) == 6


@pytest.mark.parametrize("line", LINES, ids=lambda line: " ".join(shlex.split(line)[2:6]))
def test_the_line_runs(line: str, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    words = shlex.split(line)[1:]
    write_photos(Path("photos"), 16)
    Path("proteins.txt").write_text("\n\n".join("MKTAYIAKQR" * (n % 3 + 1) for n in range(12)))
    make(words[1], tiny)
    command = [words[0], "model", *words[2:], "--max-tokens", "12", "--device", "cpu"]
    command = [word.replace("vision_model.encoder.layers.1", "vision_model.encoder.layers.0") for word in command]
    command += ["--context-length", "16"] if "proteins.txt" in words else []
    with pytest.raises(SystemExit) as ended:
        main(command)
    told = capsys.readouterr()
    assert ended.value.code == 0, told.err
    cache = ActivationCache("acts")
    assert (cache.n_rows, cache.d_in) == (12, 16)
    assert ("images" in told.out) == ("photos" in line)


def test_the_example_in_python_runs() -> None:
    (block,) = [code for code in code_blocks(PAGE, "python") if "def batches" in code]
    scope: dict[str, Any] = {}
    exec(block.replace("20_000", "5_120"), scope)
    assert scope["sae"].W_dec.shape == (64, 32)
