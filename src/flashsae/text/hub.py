"""Data sets of the Hugging Face hub, streamed or downloaded; never with code that comes with them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from flashsae.errors import DataError, FlashSAEError, first_line, require
from flashsae.files.fingerprint import text_digest
from flashsae.text.asked import OF_TOKENS, AskedText
from flashsae.text.columns import Columns
from flashsae.text.dataset import Rows, TextDataset
from flashsae.text.objects import of_table
from flashsae.text.text_files import near_path


def open_hub(dataset: str, asked: AskedText) -> TextDataset:
    """Open a data set of the hub.

    Args:
        dataset: its name.
        asked: its split, columns, subset and revision, and whether it is downloaded.
    Raises:
        DataError: the hub does not give it, at once or at some row.
    """
    asked.refuse("a data set of the hub", *OF_TOKENS)
    datasets = require("datasets", "hf")
    readers = getattr(getattr(datasets, "packaged_modules", None), "_PACKAGED_DATASETS_MODULES", ())
    if dataset in readers:  # of the library: of this name alone it would read whatever lies in the working folder
        raise DataError(
            f"text {dataset!r}: no such file or folder, and on the hub a name has its owner before it; expected a "
            f"path, or OWNER/{dataset}.{near_path(dataset)}"
        )
    split = asked.split or "train"
    how: dict[str, Any] = {} if asked.revision is None else {"revision": asked.revision}
    if str(getattr(datasets, "__version__", "")).startswith("3."):
        how["trust_remote_code"] = False  # which this version asks a person at the keyboard otherwise
    told = f"{dataset}{f'/{asked.subset}' if asked.subset else ''} (split {split!r}"
    with _refusals(dataset, told + ")", lambda: 0):
        loaded = datasets.load_dataset(dataset, asked.subset, split=split, streaming=not asked.download, **how)
        columns = Columns.of(asked.column, _names(loaded, asked.column))
    name = f"{told}, {columns}{f', revision {asked.revision!r}' if asked.revision else ''})"

    def rows(start: int) -> Rows:
        number = start
        with _refusals(dataset, name, lambda: number):
            for row in loaded.skip(start):
                yield number, columns.content(row, f"{name}, row {number}")
                number += 1

    def identify() -> str:
        """Return digits of the revision of a data set; of its name alone where the hub tells no revision."""
        try:
            revision = str(datasets.load_dataset_builder(dataset, asked.subset, **how).hash)
        except Exception:  # the library's own, the network's; reading raises them with a sentence
            revision = ""
        return text_digest([name, revision])

    if asked.download:
        return of_table(loaded, columns, name, identify)
    return TextDataset(name, rows, identify)


@contextmanager
def _refusals(dataset: str, name: str, number: Callable[[], int]) -> Iterator[None]:
    """Turn what the library, the network and the parsers of files raise into one sentence."""
    try:
        yield
    except FlashSAEError:
        raise
    except Exception as error:
        raise DataError(
            f"{dataset!r} is no file here, and the Hugging Face hub does not give {name} at row {number()}: "
            f"{first_line(error)} Check the name, the subset, the split and the connection.{near_path(dataset)}"
        ) from error


def _names(rows: Any, asked: str | None) -> Iterable[str]:
    """Return the columns of a data set, where they are not plain from what is asked; perhaps from its first row."""
    if asked is not None and "," not in asked:
        return ()
    known = getattr(rows, "column_names", None)
    return known if known else next(iter(rows.skip(0)), {})
