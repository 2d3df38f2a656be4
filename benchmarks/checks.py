"""Compare a sample of each operation's result with float64. Each check returns what is wrong, or ""."""

from __future__ import annotations

import torch
from torch import Tensor

from flashsae.bench.measure import TOLERANCE
from flashsae.bench.problem import Problem
from flashsae.ops import LatentIndex, SparseCode

ROWS, LATENTS = 16, 24


def far(name: str, ours: Tensor, ref: Tensor, tolerance: float) -> str:
    """Say by how much ours is off, if by more than `tolerance` of the largest reference."""
    if not bool(ours.isfinite().all()):
        return f"{name}: not finite. "
    error = float((ours.double() - ref).abs().max()) if ref.numel() else 0.0
    bound = tolerance * max(float(ref.abs().max()) if ref.numel() else 0.0, 1e-30)
    return "" if error <= bound else f"{name}: off by {error:.3g}, allowed {bound:.3g}. "


def sample(size: int, count: int, device: torch.device) -> Tensor:
    """Return `count` positions spread over range(size), the last one included."""
    positions: Tensor = torch.unique(torch.linspace(0, size - 1, min(size, count), device=device).long())
    return positions


def check_encode(problem: Problem, code: SparseCode, precision: str) -> str:
    """Compare the pre-activations selected, and every choice with the k-th largest of its row."""
    x = problem.xs[0]
    picked = sample(len(x), ROWS, x.device)
    rows = x[picked].double() - problem.b_dec.double()
    pre = torch.cat([rows @ W.double().T for W in torch.split(problem.W_enc_T, 32768)], dim=1) + problem.b_enc.double()
    kth = pre.topk(problem.shape.k, dim=1).values[:, -1]
    indices = code.top_indices[picked].long()
    chosen = pre.gather(1, indices)
    tolerance = TOLERANCE[precision]
    wrong = far("top_acts", code.acts[picked].detach(), chosen, tolerance)
    missed = float((kth[:, None] - chosen).max())
    if missed > tolerance * float(kth.abs().max()):
        wrong += f"top_indices: a latent {missed:.3g} below the k-th largest was chosen. "
    if bool((indices.sort(dim=1).values.diff(dim=1) == 0).any()):
        wrong += "top_indices: a latent chosen twice. "
    return wrong


def check_batch(problem: Problem, code: SparseCode, precision: str) -> str:
    """Compare values with float64 on sampled tokens, and what they left out with the smallest that the batch has."""
    x, starts = problem.xs[0], code.pattern.starts
    assert starts is not None
    smallest, tolerance = float(code.acts.min()), TOLERANCE[precision]
    wrong = "" if int(starts[-1]) == len(x) * problem.shape.k else "starts: another number than B · k. "
    for token in sample(len(x), ROWS, x.device).tolist():
        row = x[token].double() - problem.b_dec.double()
        pre = torch.cat([W.double() @ row for W in torch.split(problem.W_enc_T, 32768)]) + problem.b_enc.double()
        own = slice(int(starts[token]), int(starts[token + 1]))
        latents = code.pattern.latents[own].long()
        wrong += far(f"acts of token {token}", code.acts[own].detach(), pre[latents], tolerance)
        left_out = pre.index_fill(0, latents, -torch.inf).max()
        if float(left_out) - smallest > tolerance * float(pre.abs().max()):
            wrong += f"latents of token {token}: one of {float(left_out):.4g} is left out, {smallest:.4g} is not. "
    return wrong


def check_index(index: LatentIndex, code: SparseCode, d_sae: int) -> str:
    """Compare the whole index with one made by counting and sorting."""
    latents = code.top_indices.flatten()
    entries = torch.argsort(latents, stable=True)
    counts = torch.bincount(latents, minlength=d_sae)
    wrong = "" if torch.equal(index.entries.long(), entries) else "entries: not by latent, then by token. "
    return wrong + ("" if torch.equal(index.offsets.long().diff(), counts) else "offsets: wrong counts. ")


def check_decode_loss(
    problem: Problem, code: SparseCode, result: tuple[Tensor, Tensor, Tensor], grad_acts: Tensor, precision: str
) -> str:
    """Compare reconstruction, residual and gradient of the activations on sampled tokens, the loss as a whole."""
    loss, x_hat, residual = result
    x, tolerance = problem.xs[0], 2 * TOLERANCE[precision]
    picked = sample(len(x), ROWS, x.device)
    gathered = problem.W_dec[code.top_indices[picked]].double()
    x_hat64 = torch.einsum("bk,bkd->bd", code.top_acts[picked].double(), gathered) + problem.b_dec.double()
    residual64 = x[picked].double() - x_hat64
    grad64 = -2 * torch.einsum("bkd,bd->bk", gathered, residual64)
    total = residual.double().square().sum()
    return (
        far("x_hat", x_hat[picked], x_hat64, tolerance)
        + far("residual", residual[picked], residual64, tolerance)
        + far("gradient of top_acts", grad_acts[picked], grad64, tolerance)
        + far("loss", loss.detach(), total, tolerance)
    )


def check_rows(result: Tensor, code: SparseCode, coeffs: Tensor, rows: Tensor, tolerance: float) -> str:
    """Compare the rows of the most active latent and of sampled ones."""
    latents = code.top_indices.flatten()
    busiest = torch.bincount(latents, minlength=len(result)).argmax()
    wrong = ""
    for latent in torch.cat([busiest[None], sample(len(result), LATENTS, result.device)]).tolist():
        tokens, places = (code.top_indices == latent).nonzero(as_tuple=True)
        ref = coeffs[tokens, places].double() @ rows[tokens].double()
        scale = coeffs[tokens, places].double().abs() @ rows[tokens].double().abs()
        error = (result[latent].double() - ref).abs()
        if not bool((error <= tolerance * scale).all()):
            wrong = f"row of latent {latent}, active {len(tokens)} times: off by {float(error.max()):.3g}. "
    return wrong


def check_gradients(
    problem: Problem, code: SparseCode, residual: Tensor, grads: tuple[Tensor, Tensor], tolerance: float
) -> str:
    """Compare both weight gradients of the squared error, grads of W_enc_T and W_dec, on sampled latents."""
    grad_x_hat = -2 * residual.double()
    x = problem.xs[0].double() - problem.b_dec.double()
    wrong = ""
    for latent in sample(problem.shape.d_sae, LATENTS, x.device).tolist():
        tokens, places = ((code.top_indices == latent) & (code.top_acts != 0)).nonzero(as_tuple=True)
        grad_pre = grad_x_hat[tokens] @ problem.W_dec[latent].double()
        wrong += far(f"W_enc_T.grad[{latent}]", grads[0][latent], grad_pre @ x[tokens], tolerance)
        ref = code.top_acts[tokens, places].double() @ grad_x_hat[tokens]
        wrong += far(f"W_dec.grad[{latent}]", grads[1][latent], ref, tolerance)
    return wrong
