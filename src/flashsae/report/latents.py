"""Describe the latents of an SAE for its report: latents.safetensors and snippets.json."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch

from flashsae.data.acts import Batch
from flashsae.data.sources import Chunk
from flashsae.data.split import Split
from flashsae.documents import save_tensors_atomic
from flashsae.evaluate import inference, latent_geometry
from flashsae.metrics import LatentActivity
from flashsae.ops.code import SparseCode
from flashsae.report.snippets import collect_snippets, write_snippets
from flashsae.report.tokens import TokenText
from flashsae.sae.module import SAE
from flashsae.sae.step import join_sites


@torch.no_grad()
def describe_latents(
    folder: Path,
    sae: SAE,
    texts: Mapping[Split, Iterator[Chunk]],
    token_text: TokenText,
    *,
    is_dead: torch.Tensor | None,
    max_tokens: int,
    on_progress: Callable[[int], None],
) -> None:
    """Write how often each latent is active, where it points, and the texts that activate some of them most.

    Args:
        folder: of the run; older files in it are replaced.
        sae: on any device.
        texts: activations with their tokens, by split; those of "train" are read only where "held_out" ends early.
        token_text: ids of consecutive tokens -> the text of each.
        is_dead: [d_sae], bool, at the end of training; None where it is not known any more.
        max_tokens: to read.
        on_progress: called with the tokens read so far.
    """
    activity = LatentActivity(sae.config.d_sae, sae.W_dec.device)

    def encode(batch: Batch) -> SparseCode:
        code = sae.encode(join_sites(sae.architecture, batch)[0].to(sae.W_dec.device, sae.W_dec.dtype))
        activity.update(code)
        on_progress(activity.tokens)
        return code

    with inference(sae):
        snippets = collect_snippets(
            encode, texts["held_out"], token_text, training=texts["train"], max_tokens=max_tokens
        )
    known = {"latent_density": activity.latent_density().float().cpu()}
    if is_dead is not None:
        known["is_dead"] = is_dead.cpu()
    save_tensors_atomic(folder / "latents.safetensors", known | latent_geometry(sae))
    write_snippets(folder / "snippets.json", snippets)
