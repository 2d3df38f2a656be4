"""The weights of a model: what tells them from others, and whether those that a hookpoint needs were loaded."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from flashsae.errors import ConfigError
from flashsae.files.fingerprint import files_digest, tensors_digest, text_digest
from flashsae.lm.adapters import base_and_adapter, revision_of
from flashsae.lm.loading import Loading
from flashsae.lm.options import PLAIN, LoadOptions
from flashsae.lm.place import commit_of, model_place, not_loaded, quiet_transformers

_BUFFERS = {"position_ids", "inv_freq", "masked_bias", "num_batches_tracked"}
"""What old checkpoints hold beside parameters, and models work out anew."""

_READ_WITH_A_MODEL = re.compile(r".*\.(safetensors|bin|json|txt|model|tiktoken|py)")
_NOT_READ = re.compile(
    r"(generation_config|trainer_state|modules|data_config|all_results)\.json|training_args\.bin|README.*"
)


def model_fingerprint(name: str, options: LoadOptions = PLAIN, *, of_chats: bool = False) -> str:
    """Return digits that stand for the weights and the tokenizer of a model, without loading it.

    The same wherever a folder lies. A model of the hub is known by its revision.

    Args:
        name: as for `load_language_model`.
        options: as there; of them subfolder and adapter are told of, and the revision by what it stands for now.
        of_chats: tell of the chat template too where that is a file of its own.
    Raises:
        ConfigError: there is no such model.
        MissingExtraError: transformers, or the packaged weights of ``"minilm"``, are not installed.
    Cost: reads every byte of a folder's weights, about a second a GB.
    """
    base, adapter, of_base = base_and_adapter(name, options)
    if adapter is not None:
        own = _fingerprint(base, of_base, of_chats)
        return text_digest([own, revision_of(adapter) or _fingerprint(adapter, PLAIN)])
    return _fingerprint(name, options, of_chats)


def _fingerprint(name: str, options: LoadOptions, of_chats: bool = False) -> str:
    place = model_place(name)
    if Path(place).is_dir():
        folder = Path(place) / (options.subfolder or "")
        files = [file for file in sorted(folder.iterdir()) if file.is_file() and _is_read(file.name)]
        if any(file.suffix == ".safetensors" for file in files):
            files = [file for file in files if file.suffix != ".bin"]  # transformers does not read them then
        if of_chats:
            files += sorted(Path(place).rglob("*.jinja"))
        if options.subfolder is not None:  # the tokenizer may stand above
            files += [file for file in sorted(Path(place).iterdir()) if file.is_file() and _is_of_text(file.name)]
        return files_digest(files, names=True)
    with quiet_transformers() as transformers:
        try:
            config = transformers.AutoConfig.from_pretrained(place, **options.of_place)
        except Exception as error:
            raise not_loaded(name, error) from error
        commit = getattr(config, "_commit_hash", None)
        if options.revision is not None:  # not always told by the config, and what a branch stands for may change
            commit = commit or commit_of(place, options) or options.revision
    return text_digest([name, str(commit), *([] if options.subfolder is None else [options.subfolder])])


def _is_of_text(name: str) -> bool:
    return _is_read(name) and not name.endswith((".safetensors", ".bin", ".py"))


def _is_read(name: str) -> bool:
    return not name.startswith(".") and bool(_READ_WITH_A_MODEL.fullmatch(name)) and not _NOT_READ.fullmatch(name)


def loaded_fingerprint(model: nn.Module, tokenizer: Any, *, of_chats: bool = False) -> str:
    """Return digits that stand for the values of a model and for its tokenizer; of chats, for their template too."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    template = [repr(getattr(tokenizer, "chat_template", None))] if of_chats else []
    weights = tensors_digest(model.state_dict().items())
    return text_digest([weights, vocabulary, repr(tokenizer.special_tokens_map), *template])


@dataclass(frozen=True)
class Trace:
    """How far a model ran until its last hookpoint had been seen.

    Args:
        model: the whole of it.
        hooked: the modules at the hookpoints.
        entered: the modules that began to run.
        completed: those of them that ended.
    """

    model: nn.Module
    hooked: frozenset[nn.Module]
    entered: frozenset[nn.Module]
    completed: frozenset[nn.Module]

    def uses(self, parameter: str) -> bool:
        """Tell whether a parameter of the model can have had a part in what was seen."""
        path, rest = self._path(parameter)
        called = [module for module in path if module in self.entered]
        if not called:
            return False
        return called[-1] in self.completed or (called[-1] is path[-1] and len(rest) == 1)

    def lacks(self, key: str) -> bool:
        """Tell whether what a checkpoint holds, and the model has no place for, belongs before what was seen."""
        path, rest = self._path(key)
        owner = path[-1]
        if rest[-1] in _BUFFERS or (len(rest) == 1 and not list(owner.parameters(recurse=False))):
            return False
        if isinstance(owner, nn.ModuleList):  # more layers than the model has: they belong behind the last one
            layers = list(owner)
            is_inside = any(module in self.hooked for module in owner.modules())
            return bool(layers) and all(layer in self.completed for layer in layers) and not is_inside
        return owner in self.completed

    def _path(self, key: str) -> tuple[list[nn.Module], list[str]]:
        """Return the modules on the way to a key, as far as there are any, and the names behind them."""
        path, rest = [self.model], key.split(".")
        while len(rest) > 1 and (child := dict(path[-1].named_children()).get(rest[0])) is not None:
            path.append(child)
            rest = rest[1:]
        return path, rest


def check_loaded(name: str, loading: Loading, trace: Trace, hookpoints: Sequence[str]) -> None:
    """Raise ConfigError if weights that the hookpoints need are not those of the checkpoint.

    What lies behind the last hookpoint, such as a head or a pooler, may be missing or left over.
    """
    wrong = {
        "it lacks": sorted(filter(trace.uses, loading.missing)),
        "of another shape are": sorted(filter(trace.uses, loading.mismatched)),
        "the model has no place for": sorted(filter(trace.lacks, loading.unexpected)),
    }
    told = [f"{what} {_some(keys)}" for what, keys in wrong.items() if keys]
    if told:
        raise ConfigError(
            f"model: the checkpoint of {name} does not fit its architecture, so {', '.join(hookpoints)} would give "
            f"activations of random or unused weights: {'; '.join(told)}. Save the model again with the names of "
            "transformers, correct its config.json, or name another one."
        )


def _some(keys: list[str]) -> str:
    return ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
