"""Steer a language model by a latent of an SAE, and see it in what the model writes.

    python examples/steering.py runs/gpt2-h.6 --hookpoint h.6 --about "Dogs and puppies" --prompt "I have always liked"

The latent is found by a text that it should be about. Then the model goes on from a prompt while that latent is made
larger and larger on every token, and while it is held at 0. Any SAE that flashsae.load reads will do.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import flashsae


class Row(NamedTuple):
    """What an edit makes of the model."""

    edit: str
    about: float
    """Probability of the next token being one of the text that the latent is about."""
    text: str


def strongest_latent(
    model: Any, tokenizer: Any, saes: dict[str, flashsae.SAE], about: str, unlike: str
) -> tuple[int, float]:
    """Return the latent that is larger on a text than on another one by most, and its maximum on the first."""
    means = []
    for text in (about, unlike):
        with flashsae.hook(model, saes) as codes, torch.no_grad():
            model(**tokenizer(text, return_tensors="pt").to(model.device))
        (code,) = codes.values()
        acts = code.to_dense()[0, 1:]  # the first token is unlike all others in most models
        means.append(acts.mean(0))
        if text is about:
            maxima = acts.amax(0)
    latent = int((means[0] - means[1]).argmax())
    return latent, float(maxima[latent])


@torch.no_grad()
def what_becomes_of(
    model: Any,
    tokenizer: Any,
    saes: dict[str, flashsae.SAE],
    edit: Any,
    prompt: str,
    about: Sequence[int],
    new_tokens: int,
) -> tuple[float, str]:
    """Return the probability of some tokens behind a prompt, and how the model goes on, under an edit."""
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    with flashsae.hook(model, saes, edit):
        probability = model(**inputs).logits[0, -1].softmax(-1)[list(about)].sum()
        ids = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    return float(probability), tokenizer.decode(ids[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    """Run the example; return what it prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sae", help="a run, a folder of any format, or hf://OWNER/NAME/FOLDER")
    parser.add_argument("--model", default="gpt2", help="that the SAE was trained on")
    parser.add_argument("--hookpoint", required=True, help="where in it: a module path, such as h.6")
    parser.add_argument("--about", required=True, help="a text; the latent that is largest on it is steered")
    parser.add_argument("--unlike", help="a text on which it is not; by default the prompt")
    parser.add_argument("--prompt", required=True, help="where the model goes on from")
    parser.add_argument("--strengths", type=float, nargs="+", default=[0.5, 1.0, 2.0, 4.0], help="times its maximum")
    parser.add_argument("--new-tokens", type=int, default=24)
    given = parser.parse_args(arguments)

    saes = {given.hookpoint: flashsae.load(given.sae)}
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    model = AutoModelForCausalLM.from_pretrained(given.model).eval()
    unlike = given.unlike or given.prompt
    latent, maximum = strongest_latent(model, tokenizer, saes, given.about, unlike)
    print(f"latent {latent}, {maximum:.3g} at most on {given.about!r}")

    edits: list[tuple[str, Any]] = [("as it is", []), ("ablated", flashsae.ablate(latent))]
    edits += [(f"+ {strength:g} x maximum", flashsae.steer(latent, strength * maximum)) for strength in given.strengths]
    about = sorted(set(tokenizer(given.about).input_ids) - set(tokenizer(unlike).input_ids))
    rows = []
    for name, edit in edits:
        row = Row(name, *what_becomes_of(model, tokenizer, saes, edit, given.prompt, about, given.new_tokens))
        print(f"{row.edit:>16}  {row.about:7.2%}  {given.prompt}|{row.text!r}")
        rows.append(row)
    return rows


if __name__ == "__main__":
    main()
