"""Load an SAE that somebody trained, with any library, look at it in its model, and write it for another library.

    python examples/loading.py hf://jbloom/GPT2-Small-SAEs-Reformatted/blocks.8.hook_resid_pre --hookpoint h.8:in

Prints what the SAE makes of a text: how well it reconstructs, what that costs the model, and the strongest latents of
each token. With --save FOLDER it is written so that SAELens loads it (sae_lens.SAE.load_from_disk), or --format NAME.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import flashsae

TEXT = "The quick brown fox jumps over the lazy dog, and the dog does not mind at all."


class Figures(NamedTuple):
    """What an SAE does to a model on a text."""

    l0: float
    """Active latents of a token."""
    loss: float
    """Cross-entropy of the next token, nats, of the model as it is."""
    loss_reconstructed: float
    """The same with the reconstruction in the place of the activations, but for the first token."""
    loss_ablated: float
    """The same with all latents at 0 and the error still there, but for the first token."""


@torch.no_grad()
def figures(
    model: Any, tokenizer: Any, saes: dict[str, flashsae.SAE], text: str
) -> tuple[Figures, flashsae.SparseCode]:
    """Return what an SAE does to a model on a text, and the code of the text."""
    inputs = tokenizer(text, return_tensors="pt").to(model.device)

    def loss() -> float:
        return float(model(**inputs, labels=inputs.input_ids).loss)

    with flashsae.hook(model, saes) as codes:
        plain = loss()
    (code,) = codes.values()
    with flashsae.hook(model, saes, error=0):  # the error is kept at the first token, which SAEs are seldom trained on
        reconstructed = loss()
    with flashsae.hook(model, saes, flashsae.ablate(range(code.d_sae), at=slice(1, None))):
        ablated = loss()
    active = (code.to_dense()[0, 1:] != 0).sum(-1).float().mean()
    return Figures(float(active), plain, reconstructed, ablated), code


def main(arguments: Sequence[str] | None = None) -> Figures:
    """Run the example; return the figures that it prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sae", help="a run, a folder or file of any format, or hf://OWNER/NAME/FOLDER")
    parser.add_argument("--model", default="gpt2", help="that the SAE was trained on")
    parser.add_argument("--hookpoint", required=True, help="where in it: a module path, such as h.6, h.6:in, h.6.mlp")
    parser.add_argument("--text", default=TEXT)
    parser.add_argument("--save", metavar="FOLDER", help="write the SAE here, for another library")
    parser.add_argument("--format", default="saelens", help="of which library: docs/interop.md")
    given = parser.parse_args(arguments)

    sae = flashsae.load(given.sae)
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    model = AutoModelForCausalLM.from_pretrained(given.model).eval()
    print(sae)
    found, code = figures(model, tokenizer, {given.hookpoint: sae}, given.text)
    print(f"L0 {found.l0:.1f}")
    print(f"loss {found.loss:.3f}, reconstructed {found.loss_reconstructed:.3f}, ablated {found.loss_ablated:.3f}")

    acts, latents = code.to_dense()[0].topk(3)
    for token, values, which in zip(tokenizer(given.text).input_ids, acts.tolist(), latents.tolist()):
        active = (f"{latent}: {value:.2f}" for latent, value in zip(which, values) if value)
        print(f"{tokenizer.decode([token])!r:>14}  {',  '.join(active)}")

    if given.save:
        sae.save(given.save, format=given.format, metadata={"model": given.model, "hookpoint": given.hookpoint})
        print(f"written to {given.save}")
    return found


if __name__ == "__main__":
    main()
