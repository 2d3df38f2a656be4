"""What compresses the files of tests, by the suffix that it adds."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from functools import partial

import pyarrow


def zstd(data: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return bytes(sink.getvalue())


PACKERS: dict[str, Callable[[bytes], bytes]] = {"": bytes, ".gz": partial(gzip.compress, mtime=0), ".zst": zstd}
