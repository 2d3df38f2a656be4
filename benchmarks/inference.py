"""What it costs to encode with a trained SAE, beside SAELens: `python -m benchmarks.inference`, with `--tiny` anywhere.

The same weights and tokens are given to `SAE.encode` and to the `encode` of SAELens's SAE of the same architecture, as
each library is called: ours returns a sparse code, SAELens a dense one, so "to dense" is ours with `code.to_dense()`.
First it is checked that they give the same code: the same latents but where a pre-activation lies within the rounding
of what decides, and the same values within the precision. Then all take turns in one process. Memory is the most that
is allocated while one encodes, beyond weights and tokens. Appends one JSON line for each architecture and batch.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import cyclopts
import torch
from rich.console import Console
from torch import Tensor, nn

from benchmarks.session import RESULTS, provenance
from flashsae import SAE
from flashsae.backend import resolve_device
from flashsae.bench.measure import OURS, TOLERANCE, Record
from flashsae.bench.peers import LIBRARIES
from flashsae.bench.problem import Problem, make_problem
from flashsae.bench.setups import Shape, threshold, tiny
from flashsae.bench.timing import float32_products, free, peak_bytes, time_runs
from flashsae.errors import require
from flashsae.precision import Precision, has_screen, is_rounded, operand_of

Encode = Callable[[Tensor], Tensor]
Arch = Literal["topk", "batch_topk", "jump_relu"]
ARCHS: tuple[Arch, ...] = ("topk", "batch_topk", "jump_relu")
SAELENS = next(peer for peer in LIBRARIES if peer.name == "SAELens")
ENCODED_IN: tuple[Precision, ...] = get_args(Precision)
CHECKED = 256  # tokens whose codes are compared, densely


@dataclass(frozen=True)
class Encoder:
    """One way to encode.

    Args:
        name: as it stands in results.
        precision: of its products.
        x: [B, d_in], as it takes tokens.
        encode: returns a code, sparse or dense.
        dense: returns [B, d_sae] of a few tokens, to compare.
    """

    name: str
    precision: Precision
    x: Tensor
    encode: Callable[[Tensor], Any]
    dense: Encode

    def run(self, i: int = 0) -> None:
        """Encode once."""
        with torch.inference_mode(), self.products():
            self.encode(self.x)

    def code(self) -> Tensor:
        """Return the dense code of the first tokens, float32."""
        with torch.inference_mode(), self.products():
            return self.dense(self.x[:CHECKED]).float()

    def products(self) -> Any:
        """Return the context in which a library's products have the precision that is asked for."""
        kind = {"float32": "ieee", "tf32": "tf32", "bf16": None}[operand_of(self.precision)]
        return float32_products(kind) if self.name.startswith(SAELENS.name) else nullcontext()


def our_sae(problem: Problem, dtype: torch.dtype, precision: Precision) -> SAE:
    """Return our SAE with the weights of a problem, in a dtype; those of float32 are shared."""
    sae = SAE(problem.sae_config, seed=None, device="meta")
    values = dict(problem.params)
    if problem.arch_name == "batch_topk":
        values["threshold"] = torch.full_like(values["threshold"], threshold(problem.shape))
    sae.load_state_dict(values, assign=True)
    sae = sae.to(dtype).eval().requires_grad_(False)
    sae.precision = precision
    return sae


def lens_sae(problem: Problem, sae: SAE) -> Any:
    """Return SAELens's SAE of the same weights; a threshold for all is that of each, as SAELens saves BatchTopK."""
    name, parts = ("topk", "TopKSAE") if problem.arch_name == "topk" else ("jumprelu", "JumpReLUSAE")
    require("sae_lens", "peers")
    module = require(f"sae_lens.saes.{name}_sae", "peers")
    own = {"k": problem.shape.k} if name == "topk" else {}
    config = getattr(module, f"{parts}Config")(
        d_in=problem.shape.d_in,
        d_sae=problem.shape.d_sae,
        dtype=str(sae.W_dec.dtype).removeprefix("torch."),
        device="meta",  # its parameters are replaced below
        apply_b_dec_to_input=sae.b_pre is not None,
        **own,
    )
    peer = getattr(module, parts)(config)
    weights = {"W_enc": sae.W_enc_T.T.contiguous(), "b_enc": sae.b_enc, "W_dec": sae.W_dec, "b_dec": sae.b_dec}
    if name == "jumprelu":
        weights["threshold"] = sae.threshold.expand(problem.shape.d_sae).clone()
    for each, tensor in weights.items():
        setattr(peer, each, nn.Parameter(tensor, requires_grad=False))
    peer.device = sae.W_dec.device
    return peer.eval()


def encoders(problem: Problem, peers: bool) -> list[Encoder]:
    """Return all ways to encode the first input of a problem, those of ours first."""
    found: list[Encoder] = []
    lens: dict[torch.dtype, Any] = {}
    for precision in ENCODED_IN:
        dtype = torch.bfloat16 if is_rounded(precision) else torch.float32
        sae, x = our_sae(problem, dtype, precision), problem.xs[0].to(dtype)

        def to_dense(tokens: Tensor, sae: SAE = sae) -> Tensor:
            return sae.encode(tokens).to_dense()

        found += [
            Encoder(f"{OURS}, {precision}", precision, x, sae.encode, to_dense),
            Encoder(f"{OURS} to dense, {precision}", precision, x, to_dense, to_dense),
        ]
        if peers and not has_screen(precision):
            lens[dtype] = lens[dtype] if dtype in lens else lens_sae(problem, sae)
            found.append(Encoder(f"{SAELENS.name}, {precision}", precision, x, lens[dtype].encode, lens[dtype].encode))
    return sorted(found, key=lambda encoder: encoder.name.startswith(SAELENS.name))


def compare_codes(ours: Tensor, theirs: Tensor, boundary: float | None, tolerance: float) -> tuple[str, float]:
    """Return what is wrong with a code beside another, "" if nothing, and the share of tokens with the same latents.

    Args:
        ours, theirs: [tokens, d_sae].
        boundary: what an active latent must exceed; None: the least active value of the token.
        tolerance: relative to the largest value, of values and of how near the boundary a latent must be that one of
            the codes leaves out.
    """
    allowed = tolerance * float(theirs.abs().max())
    both, either = (ours != 0) & (theirs != 0), (ours != 0) != (theirs != 0)
    off = float(((ours - theirs).abs() * both).max())
    wrong = "" if off <= allowed else f"values: off by {off:.3g}, allowed {allowed:.3g}. "
    largest = torch.maximum(ours, theirs)
    if boundary is None:
        active = torch.where(largest > 0, largest, torch.inf)
        least = active.amin(dim=1, keepdim=True)
    else:
        least = torch.full_like(largest[:, :1], boundary)
    far = float(((largest - least) * either).max())
    if far > allowed:
        wrong += f"latents: one {far:.3g} above what decides is missing, allowed {allowed:.3g}. "
    return wrong, float((~either.any(dim=1)).float().mean())


def check_codes(problem: Problem, found: list[Encoder]) -> dict[str, Any]:
    """Compare every code with the dense one in float64; raise if one is wrong. Return the share of same latents."""
    W_enc_T, b_enc, _, b_dec = problem.weights
    x = problem.xs[0][:CHECKED].double() - b_dec.double()
    pre_acts = torch.cat([x @ rows.double().T for rows in torch.split(W_enc_T, 8192)], dim=1) + b_enc.double()
    if problem.arch_name == "topk":
        boundary, top = None, pre_acts.topk(problem.shape.k, dim=1)
        exact = torch.zeros_like(pre_acts).scatter_(1, top.indices, top.values.relu())
    else:
        boundary = threshold(problem.shape)
        exact = torch.where(pre_acts > boundary, pre_acts, 0.0)
    same = {}
    for encoder in found:
        wrong, same[encoder.name] = compare_codes(
            encoder.code(), exact.float(), boundary, 2 * TOLERANCE[encoder.precision]
        )
        if wrong:
            raise SystemExit(f"{problem.arch_name}, {encoder.name}: wrong result, not timed. {wrong}")
    return same


def measured_encoders(problem: Problem, seconds: float, peers: bool) -> Record:
    """Compare, take the memory of each, then time all of them in turn; what does not fit is told and left out."""
    device, found = problem.device, encoders(problem, peers)
    same = check_codes(problem, found)
    free(device)
    runs: dict[str, Record] = {}
    fitting = []
    for encoder in found:
        try:
            encoder.run()  # compiles and tunes
            runs[encoder.name] = {"precision": encoder.precision, "peak_bytes": peak_bytes(encoder.run, device, ())}
            fitting.append(encoder)
        except torch.OutOfMemoryError:
            runs[encoder.name] = {"precision": encoder.precision, "status": "out of memory"}
        free(device)
    for encoder, timing in zip(fitting, time_runs([encoder.run for encoder in fitting], device, seconds)):
        runs[encoder.name] |= {"status": "ok", **asdict(timing), "same_latents": same[encoder.name]}
    return {
        "group": "inference",
        "name": problem.arch_name,
        "shape": asdict(problem.shape),
        "runs": runs,
        **ratios(runs),
    }


def ratios(runs: Mapping[str, Record]) -> Record:
    """Return by precision how many times as long and as much memory as ours SAELens takes, where both were measured."""
    result: Record = {"times_as_long": {}, "share_of_memory": {}}
    for precision in ENCODED_IN:
        ours, theirs = (runs.get(f"{name}, {precision}", {}) for name in (OURS, SAELENS.name))
        if "median_ms" in ours and "median_ms" in theirs:
            result["times_as_long"][precision] = theirs["median_ms"] / ours["median_ms"]
            if theirs["peak_bytes"]:
                result["share_of_memory"][precision] = ours["peak_bytes"] / theirs["peak_bytes"]
    return result


def lines_of(record: Record) -> str:
    """Return a line for each way to encode."""
    lines, B = [], record["shape"]["batch_tokens"]
    for name, run in record["runs"].items():
        peak = f", {run['peak_bytes'] / 1e9:.3f} GB" if run.get("peak_bytes") else ""
        lines.append(f"{record['name']}, {B} tokens, {name}: {run.get('median_ms', run['status'])} ms{peak}")
    of_ours = ", ".join(f"{key}: {record[key]}" for key in ratios(record["runs"]))
    return "\n".join([*lines, of_ours])


def main(
    *archs: Arch,
    d_in: int = 4096,
    d_sae: int = 131072,
    k: int = 64,
    batches: tuple[int, ...] = (4096, 16384),
    peers: bool = True,
    seconds: float = 1.0,
    device: str = "auto",
    small: Annotated[bool, cyclopts.Parameter(name="--tiny")] = False,
    out: Path = RESULTS / "inference.jsonl",
) -> None:
    """Time `encode` beside SAELens's.

    Args:
        archs: topk, batch_topk (by its threshold, as in inference), jump_relu. None: all.
        d_in, d_sae, k: of the SAE.
        batches: tokens of a batch.
        peers: measure SAELens, if it is installed.
        seconds: budget of each, warm-up apart.
        device: auto, cpu, cuda ...
        small: toy sizes, to try it on any device.
        out: file to append JSON lines to.
    """
    place = resolve_device(device)
    if place.type == "cpu" and not small:
        raise SystemExit("inference: expected a CUDA device, found none. Nothing is timed on a CPU.")
    if peers and not SAELENS.is_installed:
        print(f"{SAELENS.name} is not installed and left out: {SAELENS.install}")
    out.parent.mkdir(parents=True, exist_ok=True)
    for arch in archs or ARCHS:
        for tokens in batches:
            shape = Shape(f"B={tokens}", tokens, d_in, d_sae, k)
            shape = replace(tiny(shape), batch_tokens=32 + tokens // 4096) if small else shape
            problem = make_problem(shape, torch.float32, place, tied=True, arch=arch)
            record = measured_encoders(problem, seconds, peers and SAELENS.is_installed)
            with out.open("a") as file:
                file.write(json.dumps(record | provenance(place)) + "\n")
            Console().print(lines_of(record), markup=False, soft_wrap=True)
            del problem
            free(place)


app = cyclopts.App(name="benchmarks.inference", help=__doc__, version_flags=[])
app.default(main)


if __name__ == "__main__":
    app()
