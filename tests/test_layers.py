"""A file imports only from files above it. This list is the architecture: a new file takes its place in it."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src" / "flashsae"

ORDER = """
errors files shapes backend
ops.validate ops.index
ops.latent_rows.reference ops.latent_rows.op
ops.decode_sparse.reference ops.decode_sparse.op
ops.encode_topk.reference ops.encode_topk.op
metrics
nn.losses nn.sae
optim
data.sources data.synthetic data.shuffle
data.python_docs data.text
data.models data.windows data.language_model
data.cache data.cache_writer data.open
io.checkpoint
train.config train.plan train.dead train.callbacks train.loop train.fit
settings
evaluate.heldout
report.tokens report.snippets report.plots report.render
run cli testing
""".split()  # noqa: SIM905 - reads as the layers that it lists


def imports(path: Path) -> set[str]:
    """Return the modules of flashsae that a file names, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.removeprefix("flashsae.") for name in found if name.startswith("flashsae.")}


def below(importer: str, imported: str) -> bool:
    """Tell whether `imported` (a module or a package) stands above `importer` in the list."""
    place = ORDER.index(importer)
    members = [i for i, name in enumerate(ORDER) if name == imported or name.startswith(imported + ".")]
    return not members or max(i for i in members if ORDER[i] != importer) < place


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(SRC).with_suffix("").parts)


FILES = sorted(path for path in SRC.rglob("*.py") if path.name != "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_a_file_imports_only_from_above(path: Path) -> None:
    name = module_of(path)
    assert name in ORDER, f"give {name} its place in the list"
    wrong = [other for other in sorted(imports(path)) if not below(name, other)]
    assert not wrong, f"{name} imports {wrong}, which stand below it"


def test_the_list_names_no_file_that_is_gone() -> None:
    assert set(ORDER) == {module_of(path) for path in FILES}


def test_the_order_can_be_broken() -> None:
    assert below("nn.sae", "ops.index")
    assert below("nn.sae", "ops")
    assert not below("ops.index", "nn.sae")
    assert not below("ops.index", "ops.encode_topk")


HEAVY = ("transformers", "datasets", "triton", "matplotlib", "jinja2", "wandb", "tensorboard", "pandas")


def test_import_is_light() -> None:
    code = (
        "import sys, time, torch, numpy\n"
        "start = time.perf_counter(); import flashsae; seconds = time.perf_counter() - start\n"
        f"heavy = [name for name in {HEAVY!r} if name in sys.modules]\n"
        "print(seconds, heavy)"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.endswith("[]\n"), output


def test_only_backend_reads_environment_variables() -> None:
    readers = {module_of(path) for path in FILES if "os.environ" in path.read_text() or "getenv" in path.read_text()}
    assert readers == {"backend"}
