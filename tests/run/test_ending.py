from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from flashsae.run.ending import begins_with_bos
from flashsae.settings.reading import ReadingConfig
from helpers import tiny_models as tiny


def asked(tokenizer: Any, **settings: Any) -> bool | None:
    config = ReadingConfig(hookpoint="h.1", **settings).filled()
    part: Any = SimpleNamespace(
        activations=SimpleNamespace(tokenizer=lambda: tokenizer), config=SimpleNamespace(activations=config)
    )
    return begins_with_bos(part)


def test_whether_inputs_begin_with_bos_is_what_the_tokenizer_does() -> None:
    assert asked(tiny.word_tokenizer(bos=True), model="tiny") is True
    assert asked(tiny.word_tokenizer(), model="tiny") is False
    assert asked(tiny.word_tokenizer(bos=True), model="tiny", prepend_bos=False) is False
    assert asked(object(), model="tiny") is None
