"""Files that are read again: JSON with the checksum of its content in it, safetensors; YAML and pickles of others.

The checksum is a CRC-32. It finds what disks and copies do to files, not what somebody does on purpose, and runs at
2 GB/s on a core where SHA-256 runs at 0.7, so that nothing need go unchecked.
"""

from __future__ import annotations

import json
import pickle
import re
import warnings
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from flashsae.errors import CheckpointError, require
from flashsae.files.atomic import write_atomic
from flashsae.files.reading import refusal
from flashsae.files.schema import Range, parse

T = TypeVar("T")
Checksum = Annotated[int, Range(0, 2**32 - 1)]
SEAL = "crc32"
"""Name of the checksum among the content that it is of."""
_LARGEST_YAML = 1 << 20
"""Bytes: what says how tensors are meant is short, and this reader takes a second for so much."""
_YAML_TAG = "tag:yaml.org,2002:"


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return content, as JSON will hold it, with its checksum in it."""
    plain = {name: value for name, value in content.items() if name != SEAL}
    canonical = json.dumps(json.loads(json.dumps(plain)), sort_keys=True, separators=(",", ":"))
    return {**plain, SEAL: zlib.crc32(canonical.encode())}


def write_document(path: Path, content: Mapping[str, Any], *, indent: int | None = 1) -> None:
    """Replace a JSON file by an object, with a checksum of its content in it.

    Raises:
        StorageError: the file system refused; `path` is as it was.
    """
    write_atomic(path, json.dumps(sealed(content), indent=indent) + "\n")


def load_json(path: Path, advice: str = "") -> Any:
    """Read a JSON file.

    Args:
        path: the file.
        advice: what to do, for messages.
    Raises:
        CheckpointError: the file is missing or damaged, repeats a name, or is nested too deeply.
    """
    try:
        check_file(path)
        return json.loads(path.read_text("utf-8"), object_pairs_hook=_without_repeats)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"cannot read {path}: {refusal(path, error)} {advice}".rstrip()) from error


def load_document(
    path: Path,
    kind: type[T],
    *,
    head: tuple[str, int] | None = None,
    must_be_sealed: bool = False,
    advice: str = "Write it again.",
) -> T:
    """Read a JSON object as a dataclass that declares it; if a checksum is in it, it must be that of the content.

    Args:
        path: the file.
        kind: what to expect, see `schema.parse`.
        head: what the file says that it is, {"format": head[0], "format_version": head[1], ...}; None: nothing.
        must_be_sealed: whether there must be a checksum; version 0.1 wrote none.
        advice: what to do, for messages.
    Raises:
        CheckpointError: the file is missing, damaged, of something else, or of another version.
    """
    content = load_json(path, advice)
    if head is not None:
        _check_head(path, content, *head, advice)
    parsed = parse(kind, content, str(path), advice)
    if (must_be_sealed or SEAL in content) and content.get(SEAL) != sealed(content)[SEAL]:
        raise CheckpointError(f"{path} is damaged or was changed by hand: its checksum does not fit. {advice}")
    return parsed


def _check_head(path: Path, content: Any, kind: str, version: int, advice: str) -> None:
    if not isinstance(content, dict) or content.get("format") != kind:
        raise CheckpointError(f"{path} is something else: expected the format {kind!r} of FlashSAE in it. {advice}")
    found = content.get("format_version")
    if found != version or isinstance(found, bool):
        raise CheckpointError(
            f"{path} has format version {str(found)[:20]}, this FlashSAE reads {version}. Use the FlashSAE that wrote "
            f"it ({str(content.get('flashsae_version', 'unknown'))[:20]}), or write it again."
        )


def check_file(path: Path) -> None:
    """Refuse a pipe or a device, which may give bytes without an end, or none ever.

    Raises:
        OSError: it is one.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        raise OSError("it is a pipe or a device")


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("a name stands there twice")
    return content


def load_yaml(path: Path, advice: str = "") -> dict[str, Any]:
    """Read a YAML mapping that holds no more than JSON can: a date is text, and nothing stands for something else.

    Args:
        path: the file, of a MiB at most.
        advice: what to do, for messages.
    Raises:
        CheckpointError: the file is missing or damaged, no mapping, repeats a name, has aliases, tags or several
            documents, or is nested too deeply.
        MissingExtraError: PyYAML is not installed.
    """
    yaml = require("yaml", "hf")
    try:
        check_file(path)
        with open(path, "rb") as file:
            data = file.read(_LARGEST_YAML + 1)
        if len(data) > _LARGEST_YAML:
            raise ValueError("it is larger than a MiB")
        loader = yaml.SafeLoader(data.decode("utf-8-sig"))
        content = _plain_yaml(loader, loader.get_single_node(), set())
        if not isinstance(content, dict):
            raise ValueError("it is no mapping of names to values")
    except (OSError, ValueError, LookupError, RecursionError, yaml.YAMLError) as error:
        told = ValueError(" ".join(str(error).split())) if isinstance(error, yaml.YAMLError) else error
        raise CheckpointError(f"cannot read {path}: {refusal(path, told)} {advice}".rstrip()) from error
    return content


def _plain_yaml(loader: Any, node: Any, seen: set[int]) -> Any:
    """Return the value of a node; ValueError where it stands there twice, which is how a few bytes become gigabytes."""
    if node is None:
        return None
    if id(node) in seen:
        raise ValueError("an alias in it stands for another value")
    seen.add(id(node))
    kind = node.tag.removeprefix(_YAML_TAG)
    if kind == "map" and node.id == "mapping":
        pairs = [(_plain_yaml(loader, name, seen), _plain_yaml(loader, value, seen)) for name, value in node.value]
        if not all(isinstance(name, str) for name, _ in pairs):
            raise ValueError("a name in it is no text")
        return _without_repeats(pairs)
    if kind == "seq" and node.id == "sequence":
        return [_plain_yaml(loader, each, seen) for each in node.value]
    if kind in ("str", "timestamp") and node.id == "scalar":
        return node.value
    if kind in ("null", "bool", "int", "float") and node.id == "scalar":
        return loader.construct_object(node)
    raise ValueError(f"a value in it has the tag {node.tag[:40]!r}")


def write_yaml(path: Path, content: Mapping[str, Any]) -> None:
    """Write a YAML mapping of what JSON can hold, names in their order; not atomically.

    Raises:
        MissingExtraError: PyYAML is not installed.
    """
    plain = json.loads(json.dumps(dict(content)))  # no object is in it twice, which would become an alias
    text: str = require("yaml", "hf").safe_dump(plain, sort_keys=False, allow_unicode=True)
    path.write_bytes(text.encode())


def crc32(path: Path) -> int:
    """Return the CRC-32 of a file."""
    total = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            total = zlib.crc32(block, total)
    return total


def save_tensors_atomic(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Replace a safetensors file, with a checksum of its tensors in its header; put together in memory.

    Raises:
        StorageError: the file system refused; `path` is as it was.
    """
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_atomic(path, safetensors.torch.save(contiguous, {SEAL: str(_tensor_checksum(contiguous))}))


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file into memory; if a checksum is in its header, it must be that of the tensors.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    try:
        check_file(path)
        tensors = safetensors.torch.load_file(path)
        with safe_open(path, framework="pt") as file:
            told = (file.metadata() or {}).get(SEAL)
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}: {refusal(path, error)}") from error
    if told is not None and told != str(_tensor_checksum(tensors)):
        raise CheckpointError(f"{path} is damaged: its checksum does not fit. Write it again.")
    return tensors


def load_pickle(path: Path, inside: str | None = None) -> dict[str, Tensor | float]:
    """Read a dict of tensors and numbers that torch.save wrote, now or before version 1.6; nothing in it is run.

    What torch does not look at is: that no record is compressed, or more than the file has room for, and their
    checksums where they were written.

    Args:
        path: the file.
        inside: the name of the dict that is read, where the file holds one in another dict; None: the file is one.
    Returns:
        by name: tensors on the CPU, contiguous, none sharing memory with another; bool, int and float as they are.
    Raises:
        CheckpointError: the file is missing or damaged, would run something when read by pickle, or holds anything
            else: an object, a list, another dict, tensors that are sparse, quantised or larger than what is stored.
    """
    try:
        with warnings.catch_warnings(action="ignore"):  # of old ways to write one, which change nothing
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=_check_zip(path))
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path} is not read: {_not_run(str(error))}. {_PICKLE_ADVICE}") from error
    except Exception as error:  # torch raises whatever damaged bytes lead it to
        is_plain = isinstance(error, OSError | zipfile.BadZipFile)
        reason = error if is_plain else ValueError(type(error).__name__)
        raise CheckpointError(f"cannot read {path}: {refusal(path, reason)} {_PICKLE_ADVICE}") from error
    if inside is not None and type(content) in (dict, OrderedDict):
        content = dict.get(content, inside)
        if type(content) not in (dict, OrderedDict):
            raise CheckpointError(f"{path} holds no dict of tensors called {inside!r}. {_PICKLE_ADVICE}")
    if type(content) not in (dict, OrderedDict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a dict of tensors. {_PICKLE_ADVICE}")
    return {_checked_name(path, name): _plain(path, name, each) for name, each in dict.items(content)}


_PICKLE_ADVICE = "Save it again, as torch.save(state_dict, path) of tensors alone, from whoever made it."


def _not_run(told: str) -> str:
    """Say why torch does not read a pickle with tensors alone in it."""
    named = re.search(r"GLOBAL ([\w.]{1,80})", told)
    more = f"calls {named[1]}, where a file of tensors calls nothing" if named else "does more than hold tensors"
    return f"it is damaged, or {more}"


def _check_zip(path: Path) -> bool:
    """Tell whether a file is a zip archive, as torch.save writes it; raise CheckpointError where it is no sound one."""
    check_file(path)
    with open(path, "rb") as file:
        if file.read(4) != b"PK\x03\x04":
            return False
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
        is_plain = all(record.compress_type == zipfile.ZIP_STORED for record in records)
        if not is_plain or sum(record.file_size for record in records) > path.stat().st_size:
            raise CheckpointError(f"{path} is not read: torch.save writes no such archive. {_PICKLE_ADVICE}")
        for record in records:
            if record.CRC:  # torch can be told to write none
                with archive.open(record) as stream:
                    while stream.read(1 << 20):
                        pass
    return True


def _checked_name(path: Path, name: object) -> str:
    if type(name) is not str:
        raise CheckpointError(f"{path} has a {type(name).__name__} in the place of a name. {_PICKLE_ADVICE}")
    return name


def _plain(path: Path, name: object, value: object) -> Tensor | float:
    """Return a value of a pickle without what may hang on it, if it is one that a file of tensors may hold."""
    what = f"{path} is not read: {ascii(name)[:60]} in it is"
    if type(value) in (bool, int, float):
        return value  # type: ignore[return-value]
    if type(value) not in (Tensor, torch.nn.Parameter):
        raise CheckpointError(
            f"{what} a {type(value).__name__}, where tensors and numbers are expected. {_PICKLE_ADVICE}"
        )
    tensor = Tensor.detach(value)  # type: ignore[arg-type]
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
        kind = "quantised" if tensor.is_quantized else str(tensor.layout).removeprefix("torch.")
        kind = kind if tensor.device.type == "cpu" else tensor.device.type
        raise CheckpointError(f"{what} a {kind} tensor, where dense ones are expected. {_PICKLE_ADVICE}")
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise CheckpointError(f"{what} {list(tensor.shape)}, more values than are stored. {_PICKLE_ADVICE}")
    return tensor.resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)


def _tensor_checksum(tensors: Mapping[str, Tensor]) -> int:
    total = 0
    for name, tensor in sorted(tensors.items()):
        total = zlib.crc32(f"{name} {tensor.dtype} {list(tensor.shape)}".encode(), total)
        total = zlib.crc32(safetensors.torch.save({"": tensor}), total)
    return total
