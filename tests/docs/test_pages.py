"""Pages say what is so: their code runs, their links lead somewhere, and the modules and names in them exist."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from helpers.pages import PAGES, ROOT, anchors, code_blocks, links

README, QUICKSTART = ROOT / "README.md", ROOT / "docs" / "quickstart.md"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_within_the_project_lead_somewhere(page: Path) -> None:
    for link in links(page):
        if re.match(r"https?:", link):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_docstrings_lead_to_headings_that_exist() -> None:
    for file in sorted((ROOT / "src").rglob("*.py")):
        for page, anchor in re.findall(r"(docs/[\w-]+\.md)(?:#([\w-]+))?", file.read_text("utf-8")):
            assert (ROOT / page).exists(), f"{file}: {page}"
            assert not anchor or anchor in anchors(ROOT / page), f"{file}: {page}#{anchor}"


def test_the_files_that_a_newcomer_is_sent_to_exist_and_are_read_from_the_top() -> None:
    """No file of the reading order imports one that stands in a later row."""
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    rows = [re.findall(r"`([\w/]+\.py)`", row) for row in re.findall(r"^\| \d .*$", text, re.MULTILINE)]
    assert len(rows) >= 6
    for number, row in enumerate(rows):
        later = {path.removesuffix(".py").replace("/", ".") for row in rows[number + 1 :] for path in row}
        for path in row:
            code = (ROOT / "src" / "flashsae" / path).read_text("utf-8")
            imported = set(re.findall(r"^from flashsae\.([\w.]+) import", code, re.MULTILINE))
            assert not imported & later, f"{path} imports {imported & later}, which are read later"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_modules_and_names_that_pages_mention_exist(page: Path) -> None:
    for dotted in sorted(set(re.findall(r"\bflashsae(?:\.\w+)+", page.read_text("utf-8")))):
        if (ROOT / dotted).suffix in (".json", ".safetensors") or dotted == "flashsae.sae":
            continue  # files
        parts = dotted.split(".")
        found: Any = importlib.import_module("flashsae")
        for number, part in enumerate(parts[1:], 2):
            if not hasattr(found, part):
                importlib.import_module(".".join(parts[:number]))
            found = getattr(found, part)


@pytest.fixture
def arrays() -> dict[str, Any]:
    """What a reader of a page brings: activations, a part of them to test with, and parameters."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1200, 8, generator=generator)
    W_dec = torch.nn.functional.normalize(torch.randn(64, 8, generator=generator), dim=1)
    parameters = {"W_enc_T": W_dec.clone(), "W_dec": W_dec, "b_enc": torch.zeros(64), "b_dec": torch.zeros(8)}
    return {"x": x, "x_test": x[1100:], "k": 4, **{name: p.requires_grad_() for name, p in parameters.items()}}


def smaller(code: str, **sizes: tuple[str, str]) -> str:
    """Return code at sizes that a test has time for; each must stand in it once."""
    for before, after in sizes.values():
        assert code.count(before) == 1, before
        code = code.replace(before, after)
    return code


@pytest.mark.parametrize("page", [README, QUICKSTART], ids=lambda page: page.stem)
def test_arrays_of_yours(page: Path, arrays: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (code,) = [block for block in code_blocks(page) if "flashsae.fit(x, d_sae" in block]
    short = "d_sae=64, k=4, config=flashsae.TrainConfig(tokens=4096, batch_tokens=256)"
    exec(smaller(code, sizes=("d_sae=4096, k=32", short)), arrays)
    assert (tmp_path / "my-sae" / "flashsae.json").exists()


def test_other_architectures_by_name(arrays: dict[str, Any]) -> None:
    (code,) = [block for block in code_blocks(README) if "jump_relu" in block]
    arrays |= {"flashsae": importlib.import_module("flashsae"), "y": arrays["x"][:, :6] ** 2}
    code = code.replace("d_sae=4096", "d_sae=64, tokens=4096, batch_tokens=256, progress=False").replace("k=32", "k=4")
    exec(code.replace("target_l0=20", "target_l0=4"), arrays)
    assert arrays["transcoder"](arrays["x"]).shape == (1200, 6)
    assert arrays["sae"](arrays["x"]).shape == (1200, 8)


def test_a_model_of_yours(tiny: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = [block for block in code_blocks(README) if "flashsae.activations" in block]
    given = {"model": tiny.gpt2(), "tokenizer": tiny.word_tokenizer(), "texts": tiny.DOCUMENTS}
    short = "d_sae=64, k=4, batch_tokens=64, shuffle_tokens=256, tokens=4096, progress=False"
    code = smaller(
        code,
        layer=('h.6", held_out=0.05', 'h.1", held_out=0.3, context_length=16'),
        sizes=("d_sae=16384, k=32, tokens=10_000_000", short),
    )
    exec(code, {"flashsae": importlib.import_module("flashsae"), **given})
    assert 0 < float(capsys.readouterr().out) < 1


def test_a_training_loop_of_yours(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = [block for block in code_blocks(README) if "FactoredAdam" in block]
    exec(smaller(code, sizes=("512, 16384, 32", "16, 128, 4"), tokens=("torch.randn(2048,", "torch.randn(64,")), {})
    assert 0 < float(capsys.readouterr().out) < 1


def test_a_loop_with_all_its_pieces(arrays: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = [block for block in code_blocks(QUICKSTART) if "DeadLatents" in block]
    code = code.replace("4096", "64").replace("k=32", "k=4").replace("100_000", "600")
    exec(smaller(code, steps=("1000, 1024,", "60, 64,"), k_aux=("k_aux=256", "k_aux=4")), arrays)
    loss, n_dead, l0 = capsys.readouterr().out.split()
    assert 0 < float(loss) < 1
    assert int(n_dead) < 64
    assert 2 < float(l0) < 6


def test_the_operations_alone(arrays: dict[str, Any]) -> None:
    (code,) = [block for block in code_blocks(QUICKSTART) if "ops.encode_topk" in block]
    exec(code, arrays)
    for name in ("W_enc_T", "W_dec", "b_enc", "b_dec"):
        assert arrays[name].grad.abs().sum() > 0
