"""Each line of the tables of models runs, with a tiny random model of the same class in place of the one it names."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from torch import nn

from flashsae.cli import main
from flashsae.data.cache import ActivationCache
from helpers.kinds import KINDS
from helpers.pages import ROOT

PAGE = (ROOT / "docs" / "models.md").read_text().partition("## Models that read no text")[0]
LINES = re.findall(r"^\| [^|]+ \| `(flashsae cache [^`]+)` \|$", PAGE, re.MULTILINE)
TINY = {
    "openai-community/gpt2": "gpt2",
    "meta-llama/Llama-3.1-8B": "llama",
    "google-bert/bert-base-uncased": "bert",
    "answerdotai/ModernBERT-base": "modernbert",
    "xlnet/xlnet-base-cased": "xlnet",
    "google-t5/t5-small": "t5 encoder",
    "facebook/bart-base": "bart decoder",
    "state-spaces/mamba-130m-hf": "mamba",
    "ai21labs/AI21-Jamba-Mini-1.6": "jamba",
    "mistralai/Mixtral-8x7B-v0.1": "mixtral",
    "llava-hf/llava-1.5-7b-hf": "llava",
    "google/gemma-3-4b-it": "gemma3",
    "openai/clip-vit-base-patch32": "clip",
    "someone/their-model": "llama",
}
CODE = """
from transformers import LlamaConfig, LlamaModel
class C(LlamaConfig):
    model_type = "their"
class M(LlamaModel):
    config_class = C
"""


@pytest.fixture(autouse=True)
def _modules_stay_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    for module in (transformers.dynamic_module_utils, transformers.utils.hub):
        monkeypatch.setattr(module, "HF_MODULES_CACHE", str(tmp_path / "modules"))


def test_the_tables_are_found() -> None:
    assert len(LINES) == 18


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of peft, which is older than transformers
@pytest.mark.parametrize("line", LINES, ids=lambda line: " ".join(shlex.split(line)[2:]))
def test_the_line_runs(tiny: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str) -> None:
    monkeypatch.chdir(tmp_path)
    words = shlex.split(line)[1:]
    Path("my-text.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in tiny.DOCUMENTS[:6]))
    save(tiny, Path("model"), KINDS[TINY[words[1]]].make)
    if "--adapter" in words:
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        peft.get_peft_model(KINDS["llama"].make(), config).save_pretrained("my-lora")
    if "--device-map" in words:
        pytest.importorskip("accelerate")
    if "--trust-remote-code" in words:
        auto = {"AutoConfig": "own.C", "AutoModel": "own.M"}
        held = Path("model/config.json")
        held.write_text(json.dumps(json.loads(held.read_text()) | {"model_type": "their", "auto_map": auto}))
        Path("model/own.py").write_text(CODE)
    small = ["--context-length", "16", "--max-tokens", "50", "--device", "cpu"]
    with pytest.raises(SystemExit) as ended:
        main([words[0], "model", *words[2:], *small])
    assert not ended.value.code
    cache = ActivationCache("acts")
    assert (cache.n_rows, cache.d_in) == (50, 16)
    asked = words[words.index("--hookpoint") + 1]
    assert cache.hookpoints[0].endswith(asked)


def save(tiny: ModuleType, folder: Path, make: Callable[[], nn.Module]) -> None:
    make().save_pretrained(folder)  # type: ignore[operator]
    tiny.word_tokenizer().save_pretrained(folder)
