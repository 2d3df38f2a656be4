"""Documents in tables: .csv and .tsv, .parquet and .arrow, a batch of rows at a time.

A reader skips `start` documents, yields the others, and returns how many there are.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flashsae.errors import DataError, FlashSAEError, first_line, require
from flashsae.text.columns import Columns
from flashsae.text.content import Content
from flashsae.text.plain import Documents
from flashsae.text.streams import encoding_of, is_compressed, kind_of, open_bytes, unreadable, wrong_byte

_BATCH_ROWS = 1024
_CSV_BLOCK = 1 << 24
"""Bytes; what the longest row of a table of text may have."""
_ARROW_FILE = b"ARROW1"
_STREAM_BEGINS = 8
"""Bytes in front of the stream that an arrow file holds."""


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    """Turn the errors of what parses a file, which have no common base, into one sentence."""
    try:
        yield
    except FlashSAEError:
        raise
    except (EOFError, zlib.error) as error:
        raise unreadable(file, error) from error
    except Exception as error:
        if isinstance(error, OSError) and error.strerror and error.errno:
            raise unreadable(file, error) from error
        kind = kind_of(file)
        if kind in (".csv", ".tsv"):
            raise _wrong_csv(file, error) from error
        raise DataError(f"{file} is no {kind[1:]} file, or a damaged one: {first_line(error)}") from error


def _wrong_csv(file: Path, error: Exception) -> DataError:
    told = str(error)
    if "UTF8" in told or isinstance(error, UnicodeDecodeError):
        with open_bytes(file) as stream:
            return wrong_byte(file, encoding_of(stream))
    if "straddling" in told:
        return DataError(
            f"{file} has a row of more than {_CSV_BLOCK >> 20} MB, or a quotation mark that is never closed: repair "
            "it, or write it as .jsonl."
        )
    return DataError(f"{file} is no table of the rows that its first line names: {first_line(error)}")


def names_in_csv(file: Path) -> list[str]:
    """Return the names in the first line; none of an empty file."""
    with _reading(file), open_bytes(file) as stream:
        if not stream.peek(1):
            return []
    with _reading(file), _open_csv(file, None) as reader:
        return list(reader.schema.names)


def read_csv(file: Path, columns: Columns, start: int) -> Documents:
    """Read rows; the first one names the columns. Values are text, whatever they look like."""
    there = names_in_csv(file)
    if not there:
        return 0
    wanted = columns.to_read(there, str(file))
    doubled = next((name for name in wanted if there.count(name) > 1), None)
    if doubled is not None:
        raise DataError(f"{file}: it has the column {doubled!r} {there.count(doubled)} times. Give each its own name.")
    number = 0
    with _reading(file), _open_csv(file, wanted) as reader:
        for batch in reader:
            yield from _contents(batch, columns, file, number, start)
            number += batch.num_rows
    return number


@contextmanager
def _open_csv(file: Path, wanted: list[str] | None) -> Iterator[Any]:
    arrow, csv = require("pyarrow", "hf"), require("pyarrow.csv", "hf")
    with open_bytes(file) as stream:
        encoding = encoding_of(stream)
        head = stream.readline(_CSV_BLOCK).decode("latin-1")
    types = dict.fromkeys(wanted or (), arrow.string())
    with open_bytes(file) as stream, csv.open_csv(
        stream,
        # in one thread, which can tell the number of a row
        read_options=csv.ReadOptions(block_size=_CSV_BLOCK, use_threads=False, encoding=encoding.removesuffix("-sig")),
        parse_options=csv.ParseOptions(newlines_in_values=True, delimiter=_delimiter(file, head)),
        convert_options=csv.ConvertOptions(include_columns=wanted, column_types=types, strings_can_be_null=False),
    ) as reader:  # fmt: skip
        yield reader


def _delimiter(file: Path, head: str) -> str:
    """Return what stands between the names in the first line; spreadsheets of many countries write semicolons."""
    if kind_of(file) == ".tsv":
        return "\t"
    return next((mark for mark in ",;\t" if mark in head), ",")


def names_in_parquet(file: Path) -> list[str]:
    """Return the columns of a file."""
    parquet = require("pyarrow.parquet", "hf")
    with _reading(file), parquet.ParquetFile(file) as table:
        return list(table.schema_arrow.names)


def count_parquet(file: Path) -> int:
    """Return the number of rows, which stands at the end of a file."""
    parquet = require("pyarrow.parquet", "hf")
    with _reading(file), parquet.ParquetFile(file) as table:
        return int(table.metadata.num_rows)


def read_parquet(file: Path, columns: Columns, start: int) -> Documents:
    """Read rows from the group on in which the first one is."""
    parquet = require("pyarrow.parquet", "hf")
    with _reading(file), parquet.ParquetFile(file) as table:
        wanted = columns.to_read(table.schema_arrow.names, str(file))
        group = number = 0
        while group < table.num_row_groups and number + table.metadata.row_group(group).num_rows <= start:
            number += table.metadata.row_group(group).num_rows
            group += 1
        groups = list(range(group, table.num_row_groups))
        for batch in table.iter_batches(_BATCH_ROWS, row_groups=groups, columns=wanted) if groups else ():
            yield from _contents(batch, columns, file, number, start)
            number += batch.num_rows
        return int(table.metadata.num_rows)


def names_in_arrow(file: Path) -> list[str]:
    """Return the columns of a file or stream of arrow."""
    with _reading(file), _open_arrow(file) as reader:
        return list(reader.schema.names)


def read_arrow(file: Path, columns: Columns, start: int) -> Documents:
    """Read the record batches of a file or stream of arrow."""
    number = 0
    with _reading(file), _open_arrow(file) as reader:
        columns.to_read(reader.schema.names, str(file))
        for batch in reader:
            yield from _contents(batch, columns, file, number, start)
            number += batch.num_rows
    return number


@contextmanager
def _open_arrow(file: Path) -> Iterator[Any]:
    """Open the stream of record batches that both kinds of arrow files hold; one that is not compressed is mapped."""
    arrow = require("pyarrow", "hf")
    with open_bytes(file) as stream:
        is_file = stream.read(len(_ARROW_FILE)) == _ARROW_FILE
    with open_bytes(file) if is_compressed(file) else arrow.memory_map(str(file)) as stream:
        if is_file and not is_compressed(file):
            stream.seek(-len(_ARROW_FILE), 2)
            if stream.read() != _ARROW_FILE:
                raise DataError(f"{file} is cut short: it does not end as an arrow file does. Get it anew.")
            stream.seek(0)
        stream.read(_STREAM_BEGINS if is_file else 0)
        with arrow.ipc.open_stream(stream) as reader:
            yield reader


def _contents(batch: Any, columns: Columns, file: Path, number: int, start: int) -> Iterator[Content]:
    """Yield the documents of a batch whose first row has the number `number`."""
    skip = max(0, start - number)
    if skip >= batch.num_rows:
        return
    names = columns.to_read(batch.schema.names, str(file))
    read = batch.select(names)
    read.validate(full=True)  # offsets of a damaged file may point anywhere in memory
    values = [_values(column[skip:]) for column in read.columns]
    for place, row in enumerate(zip(*values), start=number + skip):
        yield columns.content(dict(zip(names, row)), f"{file}, row {place}")


def _values(column: Any) -> Any:
    """Return the values of a column: arrays of numbers where it holds lists of such, else what Python has for them."""
    arrow = require("pyarrow", "hf")
    kind, types = column.type, arrow.types
    is_list = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
    if is_list and types.is_integer(kind.value_type):
        return column.to_numpy(zero_copy_only=False)
    return column.to_pylist()
