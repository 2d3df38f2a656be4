"""Adam over factored gradients, the learning-rate schedule, and defaults."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from flashsae.errors import CheckpointError, ConfigError, DtypeError, FlashSAEError
from flashsae.ops.adam_rows import AdamRule, adam_rows, row_squares
from flashsae.ops.adam_rows.reference import merge_halves, split_halves
from flashsae.ops.latent_rows.factors import RowGradient, collect_factors, factors_of
from flashsae.settings.training import default_lr as default_lr

ADAM_BETAS = (0.9, 0.999)
_ROWS = 8192  # of a matrix that is split or merged, at once
ADAM_EPS = 6.25e-10
"""As in Gao et al. 2024. The loss is a fraction of variance, so gradients of rare latents are far below 1e-8."""


class FactoredAdam(torch.optim.Optimizer):
    """Adam that consumes gradients as factors: `loss.backward(); optimizer.step()`, and no [d_sae, d_in] gradient.

    The same numbers as `torch.optim.Adam` (rows without gradient move by their momentum too), in one reading and one
    writing of weights and moments. From its construction on, backward passes leave factors on the weight matrices
    given here (`flashsae.ops.collect_factors`); ordinary gradients in `.grad` are added to them.

    Args:
        params: parameters, or groups of them as dicts. A group may set every argument below.
        lr: learning rate. Kept as a float64 tensor on the device, which `torch.optim.lr_scheduler` changes in place,
            and a CUDA graph reads anew at each replay.
        betas, eps, weight_decay: as in `torch.optim.Adam`.
        unit_norm: keep rows of matrices at norm 1: project their gradients, and scale rows after each step.
        split_weights: turn float32 matrices into bfloat16 parameters, and keep the 16 bits that these lack here. Steps
            change the float32 numbers and lose nothing; products read bfloat16; 4 bytes a weight are 2 + 2.
            `float32_weights` gives the whole numbers.
        state_dtype: torch.bfloat16 keeps moments in half the memory, with stochastic rounding. Approximate: the only
            option here that changes results.
    Raises:
        ConfigError, DtypeError: an argument is out of range, or weights to split are not float32.
    Source: Kingma and Ba 2015; the pass over factors ours, docs/methodology.md#the-latent-pass.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float,
        *,
        betas: tuple[float, float] = ADAM_BETAS,
        eps: float = ADAM_EPS,
        weight_decay: float = 0.0,
        unit_norm: bool = False,
        split_weights: bool = False,
        state_dtype: torch.dtype = torch.float32,
    ) -> None:
        self._betas: list[Tensor] = []
        rule = {"betas": betas, "eps": eps, "weight_decay": weight_decay, "unit_norm": unit_norm}
        super().__init__(params, {"lr": lr, "split_weights": split_weights, "state_dtype": state_dtype, **rule})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, with settings of their own; raises as the constructor does."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            _check(group)
        except FlashSAEError:
            self.param_groups.pop()
            raise
        device = group["params"][0].device
        group["lr"] = torch.tensor(float(group["lr"]), dtype=torch.float64, device=device)
        group["step"] = torch.zeros((), dtype=torch.float64, device=device)
        self._betas.append(torch.tensor(group["betas"], dtype=torch.float64, device=device))
        for parameter in group["params"]:
            self._prepare(parameter, group)

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what `state_dict` returned, into the tensors that are there: a captured graph goes on with them.

        Raises:
            CheckpointError: it is of other parameters.
        """
        groups, loaded = self.param_groups, state_dict["param_groups"]
        ours = [self.state[p] for p in self._parameters()]
        theirs = [state_dict["state"].get(number, {}) for group in loaded for number in group["params"]]
        fits = [len(g["params"]) for g in groups] == [len(g["params"]) for g in loaded] and all(
            {name: (t.shape, t.dtype) for name, t in a.items()} == {name: (t.shape, t.dtype) for name, t in b.items()}
            for a, b in zip(ours, theirs)
        )
        if not fits:
            raise CheckpointError(
                "the state does not fit this optimiser: expected that of as many parameters of the same shapes, with "
                "the same split_weights and state_dtype. Build the optimiser as it was when the state was saved."
            )
        for mine, saved in zip(ours, theirs):
            for name, tensor in mine.items():
                tensor.copy_(saved[name])
        for number, (group, saved) in enumerate(zip(groups, loaded)):
            for name, value in saved.items():
                if name in ("lr", "step"):
                    group[name].copy_(torch.as_tensor(value))
                elif name != "params":
                    group[name] = value
            self._betas[number].copy_(torch.tensor(group["betas"], dtype=torch.float64))

    @torch.no_grad()
    def _prepare(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        dtype = torch.float64 if parameter.dtype == torch.float64 else torch.float32
        if parameter.dim() == 2:
            collect_factors(parameter)
            if group["split_weights"]:
                parameter.data, state["low"] = _split(parameter.data)
            if dtype == torch.float32:
                dtype = group["state_dtype"]
        for name in ("exp_avg", "exp_avg_sq"):
            state[name] = torch.zeros(parameter.shape, dtype=dtype, device=parameter.device)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Do one step with what backward passes left since `zero_grad`. No wait for the device.

        Args:
            closure: called first, with gradients on, to compute the loss again; its value is returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group, betas in zip(self.param_groups, self._betas):
            group["step"] += 1
            bias_correction = 1 - betas ** group["step"]
            for parameter in group["params"]:
                state, gradient = self.state[parameter], _gradient(parameter)
                if gradient.is_empty:  # passed over, as by torch.optim.Adam
                    continue
                adam_rows(
                    _matrix(parameter),
                    (_matrix(state["exp_avg"]), _matrix(state["exp_avg_sq"])),
                    gradient,
                    group["lr"],
                    group["step"],
                    bias_correction,
                    _rule(parameter, group),
                    low=state.get("low"),
                )
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget gradients and factors."""
        super().zero_grad(set_to_none)
        for parameter in self._parameters():
            (factors_of(parameter) or []).clear()

    @torch.no_grad()
    def clip_grad_norm(self, max_norm: float) -> Tensor:
        """Scale all gradients down to a global norm, as `torch.nn.utils.clip_grad_norm_` does; before `step`.

        Args:
            max_norm: largest norm allowed.
        Returns:
            scalar: the norm before, of gradients as `step` uses them (projected where `unit_norm`).
        """
        squares = [
            row_squares(_matrix(p), _gradient(p), _rule(p, group).unit_norm, low=self.state[p].get("low")).sum()
            for group in self.param_groups
            for p in group["params"]
        ]
        norm = torch.stack(squares).sum().sqrt()
        scale = (max_norm / (norm + 1e-6)).clamp_max(1.0)
        for parameter in self._parameters():
            factors = factors_of(parameter) or []
            factors[:] = [factor.scaled(scale) for factor in factors]
            if parameter.grad is not None:
                parameter.grad.mul_(scale)
        return norm

    def float32_weights(self, parameter: Tensor) -> Tensor:
        """Return a parameter with all its bits: a new float32 tensor on the CPU where it is split, else its values."""
        low = self.state[parameter].get("low")
        if low is None:
            return parameter.detach()
        whole = torch.empty(parameter.shape, dtype=torch.float32)
        for out, high_rows, low_rows in zip(*(torch.split(t, _ROWS) for t in (whole, parameter.detach(), low))):
            out.copy_(merge_halves(high_rows, low_rows))
        return whole

    def _parameters(self) -> list[Tensor]:
        return [parameter for group in self.param_groups for parameter in group["params"]]


def _check(group: dict[str, Any]) -> None:
    names = ("lr", "eps", "weight_decay")
    lr, eps, weight_decay = (float(group[name]) for name in names)
    if not (lr >= 0 and eps >= 0 and weight_decay >= 0 and all(0 <= beta < 1 for beta in group["betas"])):
        raise ConfigError(
            "lr, eps, weight_decay: expected numbers that are not negative, and betas in [0, 1), got "
            f"{lr}, {eps}, {weight_decay} and {group['betas']}."
        )
    wrong = [p.dtype for p in group["params"] if group["split_weights"] and p.dim() == 2 and p.dtype != torch.float32]
    if wrong:
        raise DtypeError(f"split_weights: expected float32 parameters, got {wrong[0]}.")
    if group["state_dtype"] not in (torch.float32, torch.bfloat16):
        raise ConfigError(f"state_dtype: expected torch.float32 or torch.bfloat16, got {group['state_dtype']}.")


def _split(whole: Tensor) -> tuple[Tensor, Tensor]:
    """Split a matrix a few rows at a time: beside it and its halves there may be no room."""
    high, low = torch.empty_like(whole, dtype=torch.bfloat16), torch.empty_like(whole, dtype=torch.int16)
    for rows, *halves in zip(*(torch.split(t, _ROWS) for t in (whole, high, low))):
        for half, value in zip(halves, split_halves(rows)):
            half.copy_(value)
    return high, low


def _matrix(tensor: Tensor) -> Tensor:
    """Return a bias as a matrix of one row, so that there is one implementation of Adam."""
    return tensor.detach() if tensor.dim() == 2 else tensor.detach().view(1, -1)


def _gradient(parameter: Tensor) -> RowGradient:
    if parameter.dim() == 2:
        return RowGradient.of(parameter)
    return RowGradient() if parameter.grad is None else RowGradient(dense=parameter.grad.reshape(1, -1))


def _rule(parameter: Tensor, group: dict[str, Any]) -> AdamRule:
    beta1, beta2 = group["betas"]
    unit_norm = group["unit_norm"] and parameter.dim() == 2
    return AdamRule(beta1, beta2, group["eps"], group["weight_decay"], unit_norm)


def lr_factor(step: int, steps: int, warmup_steps: int, decay_steps: int) -> float:
    """Return the factor of the learning rate at a step: linear up, constant, linear down to almost 0.

    Args:
        step: from 0.
        steps: of the whole training.
        warmup_steps: steps of the rise; the first step has 1 / warmup_steps.
        decay_steps: steps of the fall; the last step has 1 / decay_steps.
    """
    warmup = (step + 1) / warmup_steps if warmup_steps else 1.0
    decay = (steps - step) / decay_steps if decay_steps else 1.0
    return min(1.0, warmup, decay)
