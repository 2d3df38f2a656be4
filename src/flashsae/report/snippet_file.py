"""The file of the texts that activate latents: snippets.json, its content and how it is written and read."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from flashsae.data.split import Split
from flashsae.errors import CheckpointError
from flashsae.files.documents import load_document, write_document
from flashsae.files.schema import Count, Finite, Fraction, Pattern, Size

FORMAT = 1
Base64 = Annotated[str, Pattern(r"[A-Za-z0-9+/]*={0,2}", "base64")]


@dataclass(frozen=True)
class Snippet:
    """A stretch of one text around a token on which a latent is active.

    Args:
        tokens: text of each token; joined with nothing between, they read as text. Empty for a token with the first
            bytes of a character that the next one completes.
        acts: value of the latent at each token, 0 where it is not active.
        peak: index of the token that the stretch was chosen for.
        split: of its document; None where that was not written down.
    """

    tokens: list[str]
    acts: list[Finite]
    peak: Count
    split: Split | None = None


@dataclass(frozen=True)
class Picture:
    """An image that activates latents.

    Args:
        name: of its file.
        rows, columns: of its patches; 0 where it has none.
        width, height: in pixels, as the model sees it.
        jpeg: smaller, in base64; empty where the file was gone.
    """

    name: str
    rows: Count
    columns: Count
    width: Size
    height: Size
    jpeg: Base64


@dataclass(frozen=True)
class Shaded:
    """How strongly a latent is active in an image.

    Args:
        picture: place of the image among the pictures.
        acts: value of the latent at each patch, row by row, 0 where it is not active; one value where there are none.
        peak: index of the patch with the highest.
        split: of the image.
    """

    picture: Count
    acts: list[Finite]
    peak: Count
    split: Split


@dataclass(frozen=True)
class LatentSnippets:
    """What a reader needs to guess the meaning of a latent.

    Args:
        index: number of the latent, in [0, d_sae).
        density: fraction of the tokens read on which it was active.
        max_act: largest value, by its size where values have signs.
        mean_act: mean over the tokens on which it was active.
        top_tokens: texts of the tokens with the largest total activation, largest first.
        histogram: numbers of tokens in equal bins of the value, between 0, or the least value below 0, and the largest.
        snippets: by descending peak, at most one a document.
        images: those that activate it most, where the model reads images, by descending peak.
        least_act: where values have both signs, the other end of the histogram, opposite to max_act; else 0.
    """

    index: Count
    density: Fraction
    max_act: Finite
    mean_act: Finite
    top_tokens: list[str]
    histogram: list[Count]
    snippets: list[Snippet]
    least_act: Finite = 0.0
    images: list[Shaded] = field(default_factory=list)


@dataclass(frozen=True)
class Snippets:
    """The latents that the report shows and what they were found in.

    Args:
        tokens: how many were read.
        latents: by ascending index.
        held_out_tokens: how many of the tokens are of held-out documents; None where that was not written down.
        pictures: the images, where the model reads images; a token is a patch of one, then.
    """

    tokens: Count
    latents: list[LatentSnippets]
    held_out_tokens: Count | None = None
    pictures: list[Picture] = field(default_factory=list)

    @property
    def unit(self) -> str:
        """What a token is: a token of a text, a patch of an image, or a whole image."""
        if not self.pictures:
            return "tokens"
        return "patches" if any(picture.rows for picture in self.pictures) else "images"


@dataclass(frozen=True)
class _File(Snippets):
    """As it stands in the file."""

    format: Literal[1] = field(kw_only=True)


def write_snippets(path: Path, snippets: Snippets) -> None:
    """Write snippets.json atomically.

    Raises:
        StorageError: the file system refused.
    """
    content = {"format": FORMAT, **asdict(snippets)}
    if not snippets.pictures:  # of text
        del content["pictures"]
        for latent in content["latents"]:
            del latent["images"]
    write_document(path, content, indent=None)


def read_snippets(path: Path) -> Snippets:
    """Read snippets.json.

    Raises:
        CheckpointError: the file is missing, damaged, or of another format version.
    """
    advice = "Evaluate the run again to rewrite it."
    stored = load_document(path, _File, advice=advice)
    for latent in stored.latents:
        for snippet in latent.snippets:
            tokens, acts = len(snippet.tokens), len(snippet.acts)
            if tokens != acts or snippet.peak >= tokens:
                raise CheckpointError(
                    f"{path} is damaged: a snippet has {tokens} tokens, {acts} activations and its peak at "
                    f"{snippet.peak}. {advice}"
                )
        for shaded in latent.images:
            if shaded.picture >= len(stored.pictures):
                raise CheckpointError(f"{path} is damaged: it has no picture {shaded.picture}. {advice}")
            picture = stored.pictures[shaded.picture]
            patches = picture.rows * picture.columns or 1
            if len(shaded.acts) != patches or shaded.peak >= patches:
                raise CheckpointError(
                    f"{path} is damaged: an image has {patches} patches, {len(shaded.acts)} activations and its peak "
                    f"at {shaded.peak}. {advice}"
                )
    return Snippets(stored.tokens, stored.latents, stored.held_out_tokens, stored.pictures)
