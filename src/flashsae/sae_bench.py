"""An SAE as SAEBench takes its own: `flashsae.saebench`.

SAEBench asks an SAE for parameters W_enc [d_in, d_sae], W_dec [d_sae, d_in], b_enc and b_dec, for device, dtype and
`cfg`, and for encode, decode and forward, which give and take dense codes. Rows of W_dec are to have norm 1: those that
have another one, ‖row‖, are divided by it, and codes multiplied, which changes no selection and no reconstruction.

Source: sae-bench 0.6.0, custom_saes/base_sae.py and what its evaluations ask for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flashsae import ops
from flashsae.errors import ConfigError
from flashsae.formats.folds import are_one, norms
from flashsae.formats.hook_names import hook_name_of, layer_of, model_name_of
from flashsae.formats.selection import split
from flashsae.places.finding import find, only
from flashsae.sae.centring import recentered
from flashsae.sae.module import SAE
from flashsae.sae.saved import sae_of

_ARCHITECTURES = {
    "topk": "topk",
    "hierarchical_topk": "topk",
    "abs_topk": "abstopk",
    "batch_topk": "batch_topk",
    "jump_relu": "jumprelu",
    "relu": "standard",
    "gated": "gated",
}
"""What SAEBench calls ours; others keep their names."""


@dataclass
class BenchConfig:
    """What SAEBench reads of `sae.cfg`, by its names; it sets further attributes itself.

    Args:
        model_name: by which transformer-lens loads the model.
        d_in, d_sae: sizes.
        hook_layer: block that hook_name lies in.
        hook_name: of transformer-lens, such as blocks.6.hook_resid_post.
        context_size: tokens of a window; None: what an evaluation chooses.
        architecture: its name there.
        apply_b_dec_to_input: whether the encoder sees x − b_dec.
        prepend_bos: whether windows begin with the token that begins texts.
        dtype, device: of the parameters, as text.
        dataset_path: data set of the training.
    """

    model_name: str
    d_in: int
    d_sae: int
    hook_layer: int
    hook_name: str
    context_size: int | None = None
    hook_head_index: int | None = None
    architecture: str = ""
    apply_b_dec_to_input: bool = True
    finetuning_scaling_factor: bool = False
    activation_fn_str: str = "relu"
    activation_fn_kwargs: dict[str, Any] = field(default_factory=dict)
    prepend_bos: bool = True
    normalize_activations: str = "none"
    dtype: str = "float32"
    device: str = "cpu"
    model_from_pretrained_kwargs: dict[str, Any] = field(default_factory=dict)
    dataset_path: str = ""
    dataset_trust_remote_code: bool = False
    seqpos_slice: tuple[int | None, ...] = (None,)
    training_tokens: int = -1
    sae_lens_training_version: str | None = None
    neuronpedia_id: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields by name; not what SAEBench has set beside them."""
        return asdict(self)


class BenchSAE(nn.Module):
    """An SAE as SAEBench takes its own: see `flashsae.saebench`, which makes it.

    Args:
        sae: in inference; its parameters are shared until this module is moved or converted.
        cfg: what is told of it.
    """

    W_enc: nn.Parameter
    """[d_in, d_sae], a view of what encodes where decoder rows have norm 1."""
    W_dec: nn.Parameter
    """[d_sae, d_in], rows of norm 1."""
    b_enc: nn.Parameter
    b_dec: nn.Parameter
    hook_z_reshaping_mode = False
    """What SAEBench asks for where a hook is named hook_z, whose heads it puts beside each other itself."""

    def __init__(self, sae: SAE, cfg: BenchConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self._encoder = (sae,)  # in a tuple, else its parameters would be those of this module a second time
        self._scale: Tensor | None = None
        self._share()

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.W_dec.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters, and of codes."""
        return self.W_dec.dtype

    def encode(self, x: Tensor) -> Tensor:
        """Return the dense code of tokens.

        Args:
            x: [..., d_in], float.
        Returns:
            [..., d_sae], dtype of the parameters: d_sae numbers for each token, most of them 0.
        Cost: memory of the result, and of a code of the active latents; pre-activations are never whole.
        """
        (sae,) = self._encoder
        code = sae.encode(x.to(self.device))
        if self._scale is not None:
            code = code.replace(code.acts * ops.per_latent(self._scale, code.pattern))
        return code.replace(code.acts.to(self.dtype)).to_dense()

    def decode(self, feature_acts: Tensor) -> Tensor:
        """Return the reconstruction of a dense code: [..., d_sae] -> [..., d_in], as a dense product."""
        return feature_acts.to(self.dtype) @ self.W_dec + self.b_dec

    def forward(self, x: Tensor) -> Tensor:
        """Return the reconstruction of tokens, without a dense code: [..., d_in] -> [..., d_in]."""
        (sae,) = self._encoder
        x_hat: Tensor = sae(x.to(self.device))
        return x_hat.to(self.dtype)

    def turn_off_forward_pass_hook_z_reshaping(self) -> None:
        """Do nothing: heads are never put beside each other here."""

    def turn_on_forward_pass_hook_z_reshaping(self) -> None:
        """Do nothing: heads are never put beside each other here."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> BenchSAE:
        """Move or convert what encodes, as any module does, and share it again."""
        self._encoder[0]._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._share()
        return self

    @torch.no_grad()
    def _share(self) -> None:
        """Set the parameters by those of what encodes; copies only what decoder rows of another norm change."""
        (sae,) = self._encoder
        of_latent = {"b_enc": sae.b_enc, **({"b_mag": sae.b_mag} if hasattr(sae, "b_mag") else {})}
        W_enc_T, W_dec, self._scale = sae.W_enc_T, sae.W_dec, None
        scale = norms(W_dec)
        if not are_one(scale, W_dec.dtype):
            scale = scale.to(torch.promote_types(W_dec.dtype, torch.float32))
            some = torch.where(scale > 0, scale, 1.0)[:, None]
            first = torch.zeros_like(W_dec[:1])
            first[0, 0] = 1
            W_enc_T, W_dec = (W_enc_T * some).to(W_enc_T.dtype), (W_dec / some).to(W_dec.dtype)
            W_dec = torch.where(scale[:, None] > 0, W_dec, first)  # never active: its code is multiplied by 0
            of_latent = {name: (each * some[:, 0]).to(each.dtype) for name, each in of_latent.items()}
            self._scale = scale
        for name, tensor in {"W_enc": W_enc_T.T, "W_dec": W_dec, "b_dec": sae.b_dec, **of_latent}.items():
            setattr(self, name, nn.Parameter(tensor, requires_grad=False))
        self.cfg.dtype, self.cfg.device = str(W_dec.dtype).removeprefix("torch."), str(W_dec.device)


def saebench(
    sae: SAE | str | Path,
    *,
    model_name: str | None = None,
    hook_name: str | None = None,
    hook_layer: int | None = None,
    context_size: int | None = None,
    device: torch.device | str | None = None,
) -> BenchSAE:
    """Return an SAE as SAEBench takes its own: `run_evals(..., selected_saes=[(name, flashsae.saebench(place))])`.

    It shares the parameters of an SAE that is given, which stays as it is. Codes are dense there, [..., d_sae].

    Args:
        sae: an SAE, or a place as of `flashsae.load`, which knows of its model and hookpoint.
        model_name: by which transformer-lens loads the model. None: that of the training.
        hook_name: of transformer-lens. None: that of the hookpoint of the training.
        hook_layer: block it lies in. None: the number in hook_name.
        context_size: tokens of a window. None: that of the training, if it is known.
        device: of the SAE. None: where it is; of a place, the CPU.
    Raises:
        ConfigError: it reconstructs something else than what it reads, or normalises tokens; or its model or hook is
            not known, or has no name in transformer-lens.
        CheckpointError: as of `flashsae.load`.
    """
    own, metadata = _own(sae)
    outer, base = split(own.config.architecture.name)
    if outer:
        raise ConfigError(
            f"SAEBench puts a reconstruction in the place of what was read, and {own.architecture.title} reconstructs "
            "something else: give it an autoencoder."
        )
    if own.config.normalize_activations != "none":
        raise ConfigError(
            "SAEBench decodes codes without the tokens, whose scale this SAE has taken away: "
            f"normalize_activations={own.config.normalize_activations!r} cannot be undone. Train one without it."
        )
    model, hook, layer = _place(metadata, model_name, hook_name, hook_layer)
    known = metadata.get("context_length") if context_size is None else context_size
    cfg = BenchConfig(
        model, own.config.d_in, own.config.d_sae, layer, hook,
        context_size=known if isinstance(known, int) else None,
        architecture=_name(own.config.architecture.name, base),
        apply_b_dec_to_input=own.b_pre is not None,
        prepend_bos=metadata.get("prepend_bos") is not False,
        dataset_path=str(metadata.get("dataset") or ""),
    )  # fmt: skip
    if base in ("topk", "hierarchical_topk"):
        cfg.activation_fn_str, cfg.activation_fn_kwargs = "topk", {"k": own.config.k}
    bench = BenchSAE(own, cfg).eval()
    return bench if device is None else bench.to(device)


def _own(sae: object) -> tuple[SAE, Mapping[str, Any]]:
    """Return an SAE in inference that may be moved without the one that was given, and what is known of it."""
    if isinstance(sae, SAE):
        own = recentered(sae, None) if sae.centres else sae.normalizing(sae.config.normalize_activations)
        return own.eval().requires_grad_(False), {}
    if not isinstance(sae, str | Path):
        raise ConfigError(f"sae: expected an SAE or the place of one, got {type(sae).__name__}.")
    content, where = only(find(sae), sae)
    return sae_of(content, where).requires_grad_(False), content.metadata


def _place(
    metadata: Mapping[str, Any], model_name: str | None, hook_name: str | None, hook_layer: int | None
) -> tuple[str, str, int]:
    """Return the model, the hook and the layer by the names of transformer-lens."""
    model = model_name or metadata.get("model")
    if not isinstance(model, str):
        raise ConfigError("model_name: nothing tells which model this SAE is of: give its name in transformer-lens.")
    hookpoint = metadata.get("hookpoint")
    if hook_name is None and not isinstance(hookpoint, str):
        raise ConfigError(
            "hook_name: nothing tells what this SAE reads: give its name in transformer-lens, such as "
            "blocks.6.hook_resid_post."
        )
    hook = hook_name or hook_name_of(str(hookpoint), model)
    if hook is None:
        raise ConfigError(
            f"hook_name: transformer-lens has no name for {hookpoint} of {model} that is known here: give it, such as "
            "blocks.6.hook_resid_post."
        )
    layer = layer_of(hook) if hook_layer is None else hook_layer
    if layer is None:
        raise ConfigError(f"hook_layer: {hook} tells no layer: give the number of the block that it lies in.")
    return model_name_of(model), hook, layer


def _name(architecture: str, base: str) -> str:
    name = _ARCHITECTURES.get(base, base)
    return f"matryoshka_{name}" if architecture.partition(":")[0] == "matryoshka" else name
