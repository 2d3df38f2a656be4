from __future__ import annotations

import pytest

from flashsae.places.hub import Place
from flashsae.publish.ways import LIBRARIES, ways


@pytest.mark.parametrize("revision", [None, "v1"])
@pytest.mark.parametrize("path", ["", "layers.3"])
def test_every_library_is_shown_with_code_that_is_python(path: str, revision: str | None) -> None:
    found = ways(Place("me/sae", revision, path), LIBRARIES)
    assert len(found) == 1 + len(LIBRARIES)
    for way in found:
        compile(way.code, way.title, "exec")
        assert "me/sae" in way.code
        assert (revision or "me") in way.code


def test_circuit_tracer_is_given_a_name_of_the_hub() -> None:
    for revision, behind in ((None, ""), ("v1", "@v1")):
        _, way = ways(Place("me/sae", revision), ["circuit_tracer"])
        assert f'load_transcoder_from_hub("me/sae/circuit_tracer{behind}")' in way.code
