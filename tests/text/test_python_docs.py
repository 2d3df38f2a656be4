"""The text that comes with Python: prose, enough of it, in an order that stays."""

from __future__ import annotations

import hashlib
from itertools import islice

from flashsae.text.open import open_text


def test_python_docs_is_prose_in_a_fixed_order() -> None:
    text = open_text("python-docs")
    documents = list(text.documents())
    assert len(documents) > 2000
    assert sum(map(len, documents)) > 1_000_000
    assert len(set(documents)) == len(documents)
    assert min(map(len, documents)) >= 80
    words = sorted(len(document.split()) for document in documents)
    assert words[int(0.99 * len(words))] <= 300
    assert list(islice(text.documents(1000), 5)) == documents[1000:1005]
    assert documents == sorted(documents, key=lambda document: hashlib.sha256(document.encode()).digest())
    assert open_text("python-docs").name == text.name


def test_python_docs_mixes_topics_and_docstrings() -> None:
    from pydoc_data.topics import topics

    first = list(islice(open_text("python-docs").documents(), 1000))
    whole = "\n".join(topics.values())
    of_topics = sum(document.splitlines()[0] in whole for document in first)
    assert 20 < of_topics < 980
