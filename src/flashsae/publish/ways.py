"""How an SAE of a repository is loaded, in each library: the code that its model card shows."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass

from flashsae.places.hub import Place


@dataclass(frozen=True)
class Way:
    """A way to load an SAE.

    Args:
        title: of the library.
        code: of Python.
    """

    title: str
    code: str


@dataclass(frozen=True)
class Library:
    """What is called where the folder of a format is here, with `{path}` for where."""

    title: str
    imports: str
    call: str
    from_hub: str = ""
    """What is called with the names of a repository and of a folder in it, where no revision is asked for."""
    from_ref: str = ""
    """What is called with all of it in one name, `{ref}`: OWNER/NAME/FOLDER@REVISION."""


LIBRARIES = {
    "saelens": Library(
        "SAELens",
        "from sae_lens import SAE",
        "sae = SAE.load_from_disk({path})",
        "sae = SAE.from_pretrained({repo}, {folder})",
    ),
    "sparsify": Library(
        "sparsify",
        "from sparsify import SparseCoder",
        "sae = SparseCoder.load_from_disk({path})",
        "sae = SparseCoder.load_from_hub({repo}, hookpoint={folder})",
    ),
    "dictionary_learning": Library(
        "dictionary_learning",
        "from dictionary_learning.utils import load_dictionary",
        'sae, config = load_dictionary({path}, device="cpu")',
    ),
    "llamascopium": Library(
        "llamascopium",
        "from llamascopium import SparseDictionary",
        "sae = SparseDictionary.from_pretrained({path})",
    ),
    "circuit_tracer": Library(
        "circuit-tracer",
        "from circuit_tracer.utils.hf_utils import load_transcoder_from_hub",
        "",
        from_ref="transcoders, config = load_transcoder_from_hub({ref})",
    ),
}


def ways(place: Place, formats: Iterable[str]) -> list[Way]:
    """Return how an SAE is loaded: by us, and by the libraries whose formats lie in folders of their own.

    Args:
        place: of the SAE on the hub.
        formats: names of these folders.
    """
    ours = f"import flashsae\n\nsae = flashsae.load({_string(str(place))})\ncode = sae.encode(x)  # x: [tokens, d_in]"
    found = [Way("FlashSAE", f"{ours}\nx_hat = sae.decode(code, like=x)")]
    return found + of_others(place, formats)


def of_others(place: Place, formats: Iterable[str]) -> list[Way]:
    """Return how other libraries load what lies in folders of their formats."""
    return [_way(place, name) for name in formats if name in LIBRARIES]


def _way(place: Place, name: str) -> Way:
    library = LIBRARIES[name]
    folder = f"{place.path}/{name}" if place.path else name
    repo = _string(place.repo)
    if library.from_ref:
        at = "" if place.revision is None else f"@{place.revision}"
        call = library.from_ref.format(ref=_string(f"{place.repo}/{folder}{at}"))
        return Way(library.title, f"{library.imports}\n\n{call}")
    if library.from_hub and place.revision is None:
        call = library.from_hub.format(repo=repo, folder=_string(folder))
        return Way(library.title, f"{library.imports}\n\n{call}")
    revision = "" if place.revision is None else f", revision={_string(place.revision)}"
    fetch = f"folder = snapshot_download({repo}{revision}, allow_patterns={_string(f'{folder}/*')})"
    imports = sorted(["from huggingface_hub import snapshot_download", library.imports])
    call = library.call.format(path=f"folder + {_string(f'/{folder}')}")
    return Way(library.title, "\n".join([*imports, "", fetch, call]))


def _string(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
