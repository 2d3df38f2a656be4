"""What is stored is read again: whole, in eight bits with a bounded error, and from compressed blocks at any row."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from flashsae.data.stored import Compression, Layout, StoredDtype, StoredRows
from flashsae.errors import CheckpointError
from flashsae.metrics import FVU

DTYPES: tuple[StoredDtype, ...] = ("bfloat16", "float32", "int8")


def write(path: Path, layout: Layout, x: Tensor) -> StoredRows:
    path.write_bytes(safetensors.torch.save(layout.compress(layout.store(x))))
    return StoredRows(path, layout, len(x))


def normal(n: int, d: int) -> Tensor:
    generator = torch.Generator().manual_seed(n * 1000 + d)
    scale = torch.randn(d, generator=generator).exp()
    return torch.randn(n, d, generator=generator) * scale + torch.randn(d, generator=generator)


@pytest.mark.parametrize("compression", ["none", "zstd"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_rows_are_read_again(dtype: StoredDtype, compression: Compression, tmp_path: Path) -> None:
    for n, d in itertools.product((1, 63, 64, 65, 200), (1, 5, 64, 100)):
        x, layout = normal(n, d), Layout(d, dtype, compression)
        shard = write(tmp_path / "shard", layout, x)
        whole = layout.restore(layout.store(x))
        index = torch.randint(n, (20,), generator=torch.Generator().manual_seed(0)).sort().values
        assert torch.equal(shard.read(torch.arange(n)), whole)
        assert torch.equal(shard.read(index), whole[index])
        assert shard.read(index[:0]).shape == (0, d)
        assert shard.read(index).dtype == whole.dtype == layout.read_dtype
        if dtype != "int8":
            assert torch.equal(whole, x.to(layout.read_dtype))
        if compression == "none":
            head = 8 + int.from_bytes((tmp_path / "shard").read_bytes()[:8], "little")
            assert shard.file.size - head == n * layout.row_bytes + layout.shard_bytes


def fvu(x: Tensor, x_hat: Tensor) -> float:
    measure = FVU()
    measure.update(x, x_hat)
    return measure.compute()


def test_int8_is_as_exact_whatever_a_few_dimensions_or_tokens_are() -> None:
    x = normal(2000, 128)
    large, shifted, sinks = x.clone(), x.clone(), x.clone()
    large[:, [3, 77]] *= 100
    shifted[:, [3, 77]] += 1000 * x.std()
    sinks[::256, 3] = 3000 * x.std()
    normed = x * torch.randn(len(x), 1, generator=torch.Generator().manual_seed(1)).exp()
    layout = Layout(128, "int8")
    for case in (x, large, shifted, sinks, normed, x.bfloat16()):
        x_hat = layout.restore(layout.store(case))
        assert fvu(case.float(), x_hat) < 5e-5
        each = (case.float() - x_hat).double().square().sum(0) / case.double().var(0, correction=0) / len(case)
        assert each.max() < 1e-4, "one dimension pays for another"


def test_int8_keeps_what_does_not_vary_and_numbers_of_any_size() -> None:
    layout = Layout(70, "int8")
    constant = torch.full((50, 70), 0.1)
    assert torch.equal(layout.restore(layout.store(constant)), constant)
    assert torch.equal(layout.restore(layout.store(normal(1, 70))), normal(1, 70))
    assert not layout.restore(layout.store(torch.zeros(3, 70))).any()
    for size in (1e-30, 1e-44, 1e30):
        x = normal(50, 70) * size
        x_hat = layout.restore(layout.store(x))
        assert x_hat.isfinite().all()
        assert (x_hat - x).abs().max() <= (x - x.mean(0)).abs().max() / 100 + 1e-40
    one = torch.zeros(5000, 70)
    one[7, 3] = 1e20
    assert fvu(one, layout.restore(layout.store(one))) < 1e-4


DAMAGES: list[tuple[str, Any]] = [
    ("a bomb", lambda t, z: [z.compress(bytes(10**8)), *t[1:]]),
    ("of unknown size", lambda t, z: [stream(z), *t[1:]]),
    ("of another size", lambda t, z: [z.compress(bytes(7)), *t[1:]]),
    ("no frame", lambda t, z: [b"\0" * len(t[0]), *t[1:]]),
    ("cut", lambda t, z: [t[0][:-3], *t[1:]]),
    ("a block too few", lambda t, z: t[:-1]),
    ("an empty block", lambda t, z: [b"", *t[1:]]),
]


def stream(compressor: Any) -> bytes:
    worker = compressor.compressobj()
    data: bytes = worker.compress(bytes(10**7)) + worker.flush()
    return data


@pytest.mark.parametrize(("damage", "change"), DAMAGES, ids=[name for name, _ in DAMAGES])
def test_damaged_blocks_are_one_sentence_and_take_no_memory(damage: str, change: Any, tmp_path: Path) -> None:
    import resource

    import zstandard

    layout = Layout(16, "bfloat16", "zstd")
    good = layout.compress(layout.store(normal(100, 16)))
    data, ends = good["activations"].numpy().tobytes(), [0, *good["ends"].tolist()]
    frames = change([data[a:b] for a, b in itertools.pairwise(ends)], zstandard.ZstdCompressor())
    ends = torch.tensor([len(frame) for frame in frames]).cumsum(0)
    activations = torch.frombuffer(bytearray(b"".join(frames)), dtype=torch.uint8)
    path = tmp_path / "shard"
    path.write_bytes(safetensors.torch.save({"activations": activations, "ends": ends}))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError, match=r"shard"):
        StoredRows(path, layout, 100).read(torch.arange(100))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000, damage


@pytest.mark.parametrize(
    "change",
    [
        {"scale": torch.ones(100, 2)},
        {"scale": torch.ones(100, 1, dtype=torch.float16)},
        {"mean": torch.full((70,), torch.nan)},
        {"spread": torch.full((70,), torch.inf)},
        {"mean": torch.ones(69)},
        {"activations": torch.ones(100, 70)},
        {"activations": torch.ones(99, 70, dtype=torch.int8)},
        {"more": torch.ones(1)},
    ],
    ids="".join,
)
def test_a_shard_in_eight_bits_with_other_tensors_is_refused(change: dict[str, Tensor], tmp_path: Path) -> None:
    layout = Layout(70, "int8")
    path = tmp_path / "shard"
    path.write_bytes(safetensors.torch.save(layout.store(normal(100, 70)) | change))
    with pytest.raises(CheckpointError, match=r"shard"):
        StoredRows(path, layout, 100)


def test_a_file_that_is_replaced_or_removed_stays_what_it_was(tmp_path: Path) -> None:
    layout, path = Layout(8, "float32"), tmp_path / "shard"
    x = normal(100, 8)
    shard = write(path, layout, x)
    aside = tmp_path / "aside"
    write(aside, layout, normal(50, 8))
    aside.replace(path)
    path.unlink()
    assert torch.equal(shard.read(torch.arange(100)), x)
