"""What `flashsae convert` does: SAEs of one format written in another."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from flashsae.formats.content import Content
from flashsae.formats.registry import format_named
from flashsae.places import finding
from flashsae.places.finding import Found, find
from flashsae.places.hub import SCHEME
from flashsae.run.exporting import set_names, with_density, write_several
from flashsae.run.parts import part_folders
from flashsae.sae.stored import check_written, config_from, values_from, write
from flashsae.settings.kinds import expand
from flashsae.train.failure import failure_in


@dataclass(frozen=True)
class Conversion:
    """What is asked for, as the options of the command are called."""

    src: str
    dst: Path
    to: str
    format: str | None = None
    lossy: bool = False
    overwrite: bool = False
    revision: str | None = None


def convert(asked: Conversion, console: Console) -> None:
    """Write one SAE, or all of a run or a folder, and say what was written and what was given up.

    Raises:
        FlashSAEError: the source holds no SAE, the other format cannot hold it, or there is something already.
    """
    form = format_named(asked.to, written=True)
    check_written(form)
    directory = expand(asked.dst, "dst")
    found = find(asked.src, format=asked.format, revision=asked.revision, several=True)
    left = left_out(asked.src, found)
    how = {"lossy": asked.lossy, "overwrite": asked.overwrite}
    lines, metadata = {}, {}
    if list(found) == [""]:
        content = read(found[""])
        lines[""] = described(content)
        told = write(content, directory, form, **how)
    else:
        for name, each in found.items():  # all are read before the first is written, and none is kept
            content = read(each)
            lines[name], metadata[name] = f"{name}: {described(content)}", content.metadata
        names = set_names(metadata) if form.write_set is not None else {name: name for name in found}
        told = write_several(
            _AsTheyAreRead({names[name]: each for name, each in found.items()}), directory, form, **how
        )
    for line in lines.values():
        _say(console, line)
    sources = ", ".join(dict.fromkeys(each.title for each, _ in found.values()))
    _say(console, f"{sources} -> {form.title}: {directory}")
    for mark, sentences in (("given up", told), ("note", left)):
        for sentence in sentences:
            console.print(f"[yellow]{mark}:[/] {escape(sentence)}", highlight=False, soft_wrap=True)


def left_out(src: str, found: Mapping[str, Found]) -> list[str]:
    """Return sentences on what is not among the SAEs of a run, or not as it was asked for, because its training failed.

    Args:
        src: the folder of the run, or any other place.
        found: the SAEs there, by name.
    Raises:
        CheckpointError: a file that says why one failed is damaged.
    """
    if src.startswith(SCHEME):
        return []
    told = []
    for folder in part_folders(expand(src, "src")):
        name, why = folder.name, failure_in(folder)
        if name not in found:
            told.append(
                f"{name} is left out: {'it has no SAE so far' if why is None else f'its training failed: {why}'}"
            )
        elif why is not None:
            told.append(f"{name} is of before its training went on and failed: {why}")
    return told


class _AsTheyAreRead(Mapping[str, Content]):
    """SAEs by name, each read when it is asked for: all of a model may be more than the memory holds."""

    def __init__(self, found: Mapping[str, Found]) -> None:
        self._found = found

    def __getitem__(self, name: str) -> Content:
        return read(self._found[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)


def read(found: Found) -> Content:
    """Return an SAE with all parameters that its architecture has, and what is known of its latents.

    Raises:
        CheckpointError: it is damaged, or there is no such architecture here.
    """
    path, content = found[1], finding.read(found)
    config = config_from(content, path)
    values = values_from(content, config, path)
    saved = {row.name: values[row.name] for row in config.architecture.parameters if row.saved}
    return with_density(replace(content, tensors=saved), path)


def described(content: Content) -> str:
    """Return what an SAE is, for people."""
    width = f"d_in {content.d_in:,}" + (f", d_out {content.d_out:,}" if content.d_out != content.d_in else "")
    beside = "" if content.apply_b_dec_to_input else ", b_dec not subtracted"
    norm = "" if content.normalize_activations == "none" else f", {content.normalize_activations}"
    return f"{content.architecture}, {width}, d_sae {content.d_sae:,}{beside}{norm}, {str(content.dtype)[6:]}"


def _say(console: Console, told: str) -> None:
    console.print(told, highlight=False, soft_wrap=True, markup=False)
