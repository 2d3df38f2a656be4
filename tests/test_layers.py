"""A file imports only from files above it. This list is the architecture: a new file takes its place in it."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src" / "flashsae"

ORDER = """
errors precision settings.kinds settings.reading settings.training settings.run
schema files documents shapes backend neutral
ops.register ops.validate ops.index
ops.dense.kernels ops.dense.launch ops.dense.op
ops.latent_rows.reference ops.latent_rows.kernels ops.latent_rows.launch ops.latent_rows.op
ops.factors
ops.adam_rows.reference ops.adam_rows.kernels ops.adam_rows.launch ops.adam_rows.op
ops.factored ops.gradients
ops.decode_sparse.reference ops.decode_sparse.kernels ops.decode_sparse.launch ops.decode_sparse.operators
ops.decode_sparse.op
ops.encode_topk.reference ops.encode_topk.kernels ops.encode_topk.certify_kernels ops.encode_topk.launch
ops.encode_topk.operators ops.encode_topk.op
metrics
nn.losses nn.saved nn.sae
optim.groups optim.adam optim.schedule
data.acts data.fingerprint data.sources data.synthetic
data.batches data.row_shuffle data.buffer_shuffle data.shuffle data.prefetch
data.python_docs data.text_files data.text
data.models data.weights data.windows data.reading_order data.hooked data.language_model
data.cache_index data.cache data.cache_writer data.existing data.open
io.checkpoint
train.config train.plan train.dead train.graph train.records train.log_file train.callbacks train.sample train.state
train.loop
train.fit
evaluate.heldout
report.tokens report.evaluation_file report.snippet_file report.snippets report.summary report.drawing report.plots
report.cards report.render
bench.timing bench.problem bench.gather bench.ceilings bench.dense bench.peers bench.ours bench.stages bench.cost
bench.measure bench.step
start run pace arguments commands cli testing
""".split()  # noqa: SIM905 - reads as the layers that it lists


def imports(path: Path) -> set[str]:
    """Return the modules of flashsae that a file names, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            # `from package import file` names the file, not all of the package
            members = {f"{node.module}.{alias.name}" for alias in node.names}
            files = {name for name in members if name.removeprefix("flashsae.") in ORDER}
            found |= files or {node.module}
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


@pytest.mark.parametrize("path", [path for path in FILES if path.stem.endswith("kernels")], ids=module_of)
def test_kernels_import_triton_and_each_other_only(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            assert {alias.name for alias in node.names} <= {"triton", "triton.language"}
        elif isinstance(node, ast.ImportFrom):
            assert node.module == "__future__" or str(node.module).endswith("kernels")


def test_the_list_names_no_file_that_is_gone() -> None:
    assert set(ORDER) == {module_of(path) for path in FILES}


def test_the_order_can_be_broken() -> None:
    assert below("nn.sae", "ops.index")
    assert below("nn.sae", "ops")
    assert not below("ops.index", "nn.sae")
    assert not below("ops.index", "ops.encode_topk")
    assert not below("ops.latent_rows.kernels", "ops.latent_rows.op")


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


WITHOUT_KERNELS = """
import sys
from importlib.abc import MetaPathFinder

class Deleted(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton" or name.startswith("flashsae.") and name.endswith("kernels"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Deleted())
import torch
import flashsae
sae = flashsae.SAE(flashsae.SAEConfig(6, 20, 3))
x = torch.randn(9, 6)
code = sae.encode(x)
loss = flashsae.ops.decode_loss(code.top_acts, code.top_indices, sae.W_dec, sae.b_dec, x).loss
(loss + sae(x).square().sum()).backward()
assert all(parameter.grad.abs().sum() > 0 for parameter in (sae.W_enc_T, sae.W_dec, sae.b_dec))
try:
    import flashsae.ops.decode_sparse.kernels
except ModuleNotFoundError:
    print("works")
"""


def test_without_kernels_and_triton_the_library_works_on_the_cpu() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_KERNELS], check=False, capture_output=True, text=True)
    assert done.stdout == "works\n", done.stderr


def test_only_backend_reads_environment_variables() -> None:
    readers = {module_of(path) for path in FILES if "os.environ" in path.read_text() or "getenv" in path.read_text()}
    assert readers == {"backend"}
