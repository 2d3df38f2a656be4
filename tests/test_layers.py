"""A file imports only from layers above its own, and within a layer nothing imports in a circle."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src" / "flashsae"

ORDER = """
errors natural precision architecture settings presets
files shapes backend neutral profiling distributed
ops
metrics
formats sae architectures optim testing
places sae_bench
text lm
hooks
data
logs
train
evaluate report neuronpedia bench
run publish
cli __main__
""".split()  # noqa: SIM905 - reads as the layers that it lists


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(SRC).with_suffix("").parts)


FILES = sorted(path for path in SRC.rglob("*.py") if path.name != "__init__.py")
MODULES = {module_of(path) for path in FILES}


def imports(path: Path) -> set[str]:
    """Return the modules of flashsae that a file imports, wherever in the file, except for annotations alone."""
    found = set()
    tree = ast.parse(path.read_text("utf-8"))
    for node in tree.body:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = [ast.Pass()]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            # `from package import file` names the file, not all of the package
            members = {f"{node.module}.{alias.name}" for alias in node.names}
            files = {name for name in members if name.removeprefix("flashsae.") in MODULES}
            found |= files or {node.module}
    return {name.removeprefix("flashsae.") for name in found if name.startswith("flashsae.")}


def layer(module: str) -> str:
    """Return what a module is listed as: its package, or itself beside the packages."""
    return module.partition(".")[0]


def below(importer: str, imported: str) -> bool:
    """Tell whether `imported` may be imported: of a layer above, or of the same package, where no circle is allowed."""
    return ORDER.index(layer(imported)) <= ORDER.index(layer(importer))


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Return modules that import each other in a circle; none if there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_a_file_imports_only_from_above(path: Path) -> None:
    name = module_of(path)
    assert layer(name) in ORDER, f"give {layer(name)} its place in the list"
    wrong = [other for other in sorted(imports(path)) if not below(name, other)]
    assert not wrong, f"{name} imports {wrong}, which stand below it"


def test_no_files_import_each_other_in_a_circle() -> None:
    graph = {}
    for path in FILES:
        name = module_of(path)
        # a package that is named stands for all of its files, except to these themselves
        graph[name] = {
            module
            for other in imports(path)
            for module in MODULES
            if module == other or (module.startswith(other + ".") and not name.startswith(other + "."))
        } - {name}
    assert not circle(graph)
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}})


@pytest.mark.parametrize("path", [path for path in FILES if path.stem.endswith("kernels")], ids=module_of)
def test_kernels_import_triton_and_each_other_only(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            assert {alias.name for alias in node.names} <= {"triton", "triton.language"}
        elif isinstance(node, ast.ImportFrom):
            assert node.module == "__future__" or str(node.module).endswith("kernels")


def test_the_list_names_no_layer_that_is_gone() -> None:
    assert set(ORDER) == {layer(module) for module in MODULES}


def test_the_order_can_be_broken() -> None:
    assert below("sae.module", "ops.code")
    assert below("sae.module", "ops")
    assert not below("ops.code", "sae.module")


HEAVY = (
    "transformers",
    "huggingface_hub",
    "datasets",
    "triton",
    "matplotlib",
    "jinja2",
    "wandb",
    "tensorboard",
    "pandas",
)


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
loss = flashsae.ops.decode_loss(code, sae.W_dec, sae.b_dec, x).loss
(loss + sae(x).square().sum()).backward()
assert all(parameter.grad.abs().sum() > 0 for parameter in (sae.W_enc_T, sae.W_dec, sae.b_dec))
try:
    import flashsae.ops.decode.kernels
except ModuleNotFoundError:
    print("works")
"""


def test_without_kernels_and_triton_the_library_works_on_the_cpu() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_KERNELS], check=False, capture_output=True, text=True)
    assert done.stdout == "works\n", done.stderr


def test_only_backend_reads_environment_variables() -> None:
    readers = {module_of(path) for path in FILES if "os.environ" in path.read_text() or "getenv" in path.read_text()}
    assert readers == {"backend"}
