"""The description that llamascopium writes beside weights, and where it looks for these."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from flashsae.errors import CheckpointError
from flashsae.files.documents import load_json
from flashsae.files.schema import Count, Finite, Positive, Size, Text, parse
from flashsae.formats.hook_names import hookpoints_of

NAME = "llamascopium"
CONFIG, WEIGHTS = "config.json", "sae_weights.safetensors"
FETCH = "Fetch it again."
_PLACES = ("sae_weights", "checkpoints/pruned", "checkpoints/final")
_KEPT = ("act_fn", "norm_activation", "jumprelu_threshold_window", "hook_point_in", "hook_point_out", "hook_points")
"""What has no name of ours."""


@dataclass(frozen=True)
class Description:
    """What is read of config.json."""

    sae_type: Literal["sae", "crosscoder"]
    d_model: Size
    expansion_factor: Positive
    use_decoder_bias: bool = True
    act_fn: Literal["relu", "jumprelu", "topk", "batchtopk"] = "relu"
    norm_activation: Literal["token-wise", "batch-wise", "dataset-wise", "inference"] = "dataset-wise"
    sparsity_include_decoder_norm: bool = True
    top_k: Count = 50
    jumprelu_threshold_window: Finite = 2.0
    hook_point_in: Text | None = None
    hook_point_out: Text | None = None
    hook_points: list[Text] | None = None
    use_glu_encoder: bool = False
    metadata: dict[str, Any] = field(default_factory=dict)
    """Ours, in what was written here."""

    @property
    def hooks(self) -> list[str]:
        """The hook points that are read; of a transcoder the one that is written behind it."""
        if self.sae_type == "crosscoder":
            return list(self.hook_points or ())
        places = [str(self.hook_point_in), str(self.hook_point_out)]
        return places[:1] if places[0] == places[1] else places

    @property
    def is_crosscoder(self) -> bool:
        """Whether it has several hook points that are read together; one alone makes an autoencoder."""
        return self.sae_type == "crosscoder" and len(self.hooks) > 1

    @property
    def d_sae(self) -> int:
        """Number of latents, as it is worked out there; 0 where that is none."""
        product = self.d_model * self.expansion_factor
        return int(product) if product < 2**63 else 0


def described(path: Path) -> Description:
    """Return what config.json says of an SAE that can be had here.

    Raises:
        CheckpointError: it is missing, damaged or foreign, or describes what no SAE here does.
    """
    content = load_json(path, FETCH)
    kind = content.get("sae_type") if isinstance(content, dict) else None
    if kind in ("clt", "lorsa", "molt"):
        raise CheckpointError(
            f"{path} describes a {kind}, which FlashSAE has no architecture for: use llamascopium, or load an sae or a "
            "crosscoder."
        )
    if isinstance(content, dict) and isinstance(content.get("act_fn"), str):
        content["act_fn"] = content["act_fn"].lower()  # as it is there
    config = parse(Description, content, str(path), FETCH)
    hooks = config.hook_points if kind == "crosscoder" else [config.hook_point_in, config.hook_point_out]
    if not hooks or None in hooks or (kind == "crosscoder" and len(set(hooks)) < len(hooks)):
        raise CheckpointError(f"{path} is damaged: expected the names of its hook points, each once. {FETCH}")
    is_odd = kind == "crosscoder" and not (config.sparsity_include_decoder_norm and config.use_decoder_bias)
    refused = {
        "use_glu_encoder: an encoder with gates of its own": config.use_glu_encoder,
        "norm_activation: batch-wise, which makes codes depend on the batch": config.norm_activation == "batch-wise",
        "a crosscoder without decoder norms or biases, which llamascopium does not build either": is_odd,
        "norm_activation: token-wise of a transcoder, whose output has a norm that its input does not tell": (
            config.norm_activation == "token-wise" and kind == "sae" and hooks[0] != hooks[1]
        ),
    }
    for what, is_there in refused.items():
        if is_there:
            raise CheckpointError(f"{path} asks for what FlashSAE does not do ({what}): use llamascopium for it.")
    if config.d_sae < 1 or ("topk" in config.act_fn and not 1 <= config.top_k <= config.d_sae):
        raise CheckpointError(
            f"{path} is damaged: {config.d_sae} latents, from d_model and expansion_factor, and top_k {config.top_k} "
            f"do not fit each other. {FETCH}"
        )
    return config


def weights_file(folder: Path) -> Path:
    """Return the file of the weights, where llamascopium looks for it first.

    Raises:
        CheckpointError: there is none, or a distributed checkpoint.
    """
    for place in _PLACES:
        for kind in (".safetensors", ".pt"):
            if (file := folder / f"{place}{kind}").exists():
                return file
        if (folder / f"{place}.dcp").exists():
            raise CheckpointError(
                f"{folder / place}.dcp is a distributed checkpoint, which only llamascopium reads: load it there "
                "without a device mesh, and save_pretrained writes a file of safetensors."
            )
    raise CheckpointError(f"{folder} has no {WEIGHTS}. {FETCH}")


def metadata_of(config: Description) -> dict[str, Any]:
    """Return what is known of a training, by our names where there are such."""
    own = dict(config.metadata)
    told, names = asdict(config), named_hooks(config)
    if "hookpoint" not in own and names is not None:
        own["hookpoint"] = names
    return {**own, NAME: {name: told[name] for name in _KEPT if told[name] is not None}}


def named_hooks(config: Description) -> str | None:
    """Return hook points as hookpoints of ours, with commas between; None where one has no such name."""
    model = config.metadata.get("model")
    return hookpoints_of(config.hooks, model if isinstance(model, str) else None)
