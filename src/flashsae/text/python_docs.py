"""The text that needs no download: the language reference and the docstrings of the Python that runs."""

from __future__ import annotations

import ast
import functools
import hashlib
import re
import sysconfig
import warnings
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

_MIN_PASSAGE = 80
"""Characters; a shorter docstring is rarely more than a few words."""
_PASSAGE_WORDS = (100, 250)
_NOT_PROSE = {"site-packages", "dist-packages", "test", "tests", "idlelib", "idle_test", "lib2to3"}


@functools.lru_cache(maxsize=1)
def python_docs() -> tuple[str, ...]:
    """Collect the language reference and the docstrings of the standard library in passages: a few seconds, once."""
    from pydoc_data.topics import topics

    folder = Path(sysconfig.get_paths()["stdlib"])
    passages = chain.from_iterable(map(_passages, chain(topics.values(), _docstrings(folder))))
    # Ordering by hash mixes topics and modules, and does not depend on the order in which they were found.
    long_enough = {text for text in passages if len(text) >= _MIN_PASSAGE}
    return tuple(sorted(long_enough, key=lambda text: hashlib.sha256(text.encode()).digest()))


def _docstrings(folder: Path) -> Iterator[str]:
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for path in folder.rglob("*.py"):
        if _NOT_PROSE.intersection(path.relative_to(folder).parts):
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # odd escapes in somebody's strings are not our business
                tree = ast.parse(path.read_text("utf-8"))
        except (OSError, SyntaxError, ValueError):
            continue  # deliberately broken files lie there too
        for node in ast.walk(tree):
            text = ast.get_docstring(node) if isinstance(node, documented) else None
            if text:
                yield text


def _passages(text: str) -> Iterator[str]:
    """Cut a long text at blank lines into passages that a person would read at a time."""
    low, high = _PASSAGE_WORDS
    passage: list[str] = []
    words = 0
    for paragraph in _paragraphs(text):
        n_words = len(paragraph.split())
        if passage and (words >= low or words + n_words > high):
            yield "\n\n".join(passage)
            passage, words = [], 0
        passage.append(paragraph)
        words += n_words
    if passage:
        yield "\n\n".join(passage)


def _paragraphs(text: str) -> list[str]:
    return [part.strip("\n") for part in re.split(r"\n[ \t\r]*\n", text) if part.strip()]
