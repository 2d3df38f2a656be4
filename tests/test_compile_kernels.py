from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
pytestmark = pytest.mark.slow

SRC = Path(__file__).parents[1] / "src" / "flashsae"
NAMES = sorted(
    name
    for path in SRC.rglob("*kernels.py")
    for name in re.findall(r"^def (\w+_kernel)\(", path.read_text("utf-8"), re.MULTILINE)
)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("target", [("cuda", "80", "32"), ("cuda", "90", "32"), ("hip", "gfx942", "64")], ids=" ".join)
def test_every_kernel_compiles_for(target: tuple[str, str, str], tmp_path: Path) -> None:
    assert compiled(tmp_path, *target) == NAMES


@pytest.mark.timeout(600)
def test_the_screen_compiles_for_consumer_cards(tmp_path: Path) -> None:
    """Of sm_89, which has what sm_80 has, and less shared memory: a tile of int8 must fit."""
    assert compiled(tmp_path, "cuda", "89", "32", "screen_") == [name for name in NAMES if name.startswith("screen_")]


def compiled(tmp_path: Path, *target: str) -> list[str]:
    """Return the names of the kernels that were compiled."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)  # else nothing is compiled the second time
    command = [sys.executable, "-m", "helpers.compile_kernels", *target]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, cwd=Path(__file__).parent
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip().split(": ")[1].split()
