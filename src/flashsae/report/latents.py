"""Describe the latents of an SAE for its report: latents.safetensors and snippets.json."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from flashsae.data.acts import Batch
from flashsae.data.images import Pictures
from flashsae.data.sources import Chunk
from flashsae.data.split import Split
from flashsae.evaluate import inference, latent_geometry
from flashsae.files.documents import save_tensors_atomic
from flashsae.metrics import LatentActivity
from flashsae.ops.code import SparseCode
from flashsae.report.snippets import Encode, collect_for_all, write_snippets
from flashsae.report.tokens import TokenText
from flashsae.sae.module import SAE
from flashsae.sae.step import join_sites


@dataclass(frozen=True)
class Described:
    """An SAE that is described.

    Args:
        folder: of its run; older files in it are replaced.
        sae: on any device.
        sites: those of its activations, in its order.
        is_dead: [d_sae], bool, at the end of training; None where it is not known any more.
    """

    folder: Path
    sae: SAE
    sites: Sequence[str]
    is_dead: Tensor | None


@torch.no_grad()
def describe_latents(
    saes: Sequence[Described],
    texts: Mapping[Split, Iterator[Chunk]],
    token_text: TokenText | Pictures,
    *,
    max_tokens: int,
    on_progress: Callable[[int], None],
) -> None:
    """Write how often each latent is active, where it points, and the texts that activate some of them most.

    Args:
        saes: described in one reading.
        texts: activations of all SAEs with their tokens, by split; those of "train" are read only where "held_out" ends
            early.
        token_text: ids of consecutive tokens -> the text of each; or the images that were read.
        max_tokens: to read.
        on_progress: called with the tokens read so far.
    """
    activities = [LatentActivity(each.sae.config.d_sae, each.sae.W_dec.device) for each in saes]

    def encoder(one: Described, activity: LatentActivity) -> Encode:
        sae = one.sae

        def encode(batch: Batch) -> SparseCode:
            own = {site: batch[site] for site in one.sites}
            code = sae.encode(join_sites(sae.architecture, own)[0].to(sae.W_dec.device, sae.W_dec.dtype))
            activity.update(code)
            on_progress(activity.tokens)
            return code

        return encode

    with ExitStack() as stack:
        for each in saes:
            stack.enter_context(inference(each.sae))
        found = collect_for_all(
            [encoder(each, activity) for each, activity in zip(saes, activities)],
            texts["held_out"],
            token_text,
            training=texts["train"],
            max_tokens=max_tokens,
        )
        for each, activity, snippets in zip(saes, activities, found):
            known = {"latent_density": activity.latent_density().float().cpu()}
            if each.is_dead is not None:
                known["is_dead"] = each.is_dead.cpu()
            save_tensors_atomic(each.folder / "latents.safetensors", known | latent_geometry(each.sae))
            write_snippets(each.folder / "snippets.json", snippets)
