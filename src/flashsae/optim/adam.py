"""Adam over factored gradients."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from flashsae import distributed
from flashsae.errors import CheckpointError, DtypeError, FlashSAEError
from flashsae.ops.adam_rows import adam_rows, row_squares
from flashsae.ops.adam_rows.reference import split_halves
from flashsae.ops.gradients import Collection
from flashsae.optim.groups import check_group, check_state
from flashsae.optim.operands import gradient_of, matrix_of, merged_rows, rule_of, split, version_of
from flashsae.profiling import part
from flashsae.settings.training import ADAM_BETAS, ADAM_EPS

_OF_TORCH = ("params", "foreach", "fused", "capturable", "differentiable", "amsgrad", "maximize")
"""Keys of a group of torch.optim.Adam that say how it computes, or that must be off."""


class FactoredAdam(torch.optim.Optimizer):
    """Adam that consumes gradients as factors: `loss.backward(); optimizer.step()`, and no [d_sae, d_in] gradient.

    The same numbers as `torch.optim.Adam` with the same eps (rows without gradient move by their momentum too), in one
    reading and one writing of weights and moments. While it lives, backward passes leave a
    `flashsae.ops.FactoredGradient` on the weight matrices given here; ordinary gradients are consumed as well.

    Args:
        params: parameters, or groups of them as dicts. A group may set every argument below.
        lr: learning rate. Kept as a float64 tensor on the device, which `torch.optim.lr_scheduler` changes in place,
            and a CUDA graph reads anew at each replay. A number put in its place is used too.
        betas, eps, weight_decay, decoupled_weight_decay: as in `torch.optim.Adam`, whose default eps is 1e-8. Read at
            every step; a CUDA graph keeps those it was captured with.
        unit_norm: keep rows of matrices at norm 1: project their gradients, and scale rows after each step.
        split_weights: turn float32 matrices into bfloat16 parameters, and keep the 16 bits that these lack here. Steps
            change the float32 numbers and lose nothing; products read bfloat16; 4 bytes a weight are 2 + 2.
            `float32_weights` gives the whole numbers. Weights that somebody else writes into the parameter count as
            they stand there; those that are loaded together with a state of this optimiser, with the bits in it.
        state_dtype: torch.bfloat16 keeps moments in half the memory, with stochastic rounding. The only option
            here that is approximate.
    Raises:
        ConfigError, DtypeError, ShapeError: an argument is out of range, a parameter is not contiguous or not float, or
            weights to split are not float32.
    Source: Kingma and Ba 2015; Loshchilov and Hutter 2019 for decoupled weight decay; the pass over factors ours,
        docs/methodology.md#the-latent-pass.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float | Tensor,
        *,
        betas: tuple[float, float] = ADAM_BETAS,
        eps: float = ADAM_EPS,
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = False,
        unit_norm: bool = False,
        split_weights: bool = False,
        state_dtype: torch.dtype = torch.float32,
    ) -> None:
        self._begin()
        self._is_new = True  # a group that is refused must not find the weights of another one split
        rule = {"betas": betas, "eps": eps, "weight_decay": weight_decay, "unit_norm": unit_norm}
        storage = {"split_weights": split_weights, "state_dtype": state_dtype}
        super().__init__(params, {"lr": lr, "decoupled_weight_decay": decoupled_weight_decay, **storage, **rule})
        self._is_new = False
        for group in self.param_groups:
            self._prepare_group(group)

    def _begin(self) -> None:
        """Make what is not part of the state: it is the same again after a copy or a pickle."""
        self._collection = Collection()
        weakref.finalize(self, self._collection.stop).atexit = False
        self._versions: WeakIdKeyDictionary = WeakIdKeyDictionary()  # of split weights that the low halves belong to
        self._betas: tuple[object, Tensor] | None = None
        self._rates: dict[int, Tensor] = {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._begin()
        super().__setstate__(state)
        for parameter in self._parameters():
            self._watch(parameter)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, with settings of their own; raises as the constructor does."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            check_group(group)
        except FlashSAEError:
            self.param_groups.pop()
            raise
        if not self._is_new:
            self._prepare_group(group)

    def _prepare_group(self, group: dict[str, Any]) -> None:
        if not isinstance(group["lr"], Tensor):  # one that comes as a tensor stays its owner's
            device = group["params"][0].device if group["params"] else torch.device("cpu")
            with torch.inference_mode(False):
                group["lr"] = torch.tensor(float(group["lr"]), dtype=torch.float64, device=device)
        for parameter in group["params"]:
            self._prepare(parameter, group)

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what `state_dict` returned, into the tensors that are there: a captured graph keeps using them.

        A state of `torch.optim.Adam` fits too, unless weights are split here or moments are narrow.

        Raises:
            CheckpointError: it is of other parameters.
        """
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = before(self, state_dict) or state_dict
        if not {"state", "param_groups"} <= state_dict.keys():
            raise CheckpointError("the state does not fit this optimiser: expected what state_dict returned.")
        groups, loaded = self.param_groups, state_dict["param_groups"]
        ours = [self.state[p] for p in self._parameters()]
        theirs = [state_dict["state"].get(number, {}) for group in loaded for number in group["params"]]
        check_state(groups, loaded, ours, theirs)
        for group, saved in zip(groups, loaded):
            check_group({**group, **saved, "params": group["params"]}, new=False)
        for mine, saved in zip(ours, theirs):
            for name, tensor in mine.items():
                tensor.copy_(torch.as_tensor(saved[name])) if saved else tensor.zero_()
        for group, saved in zip(groups, loaded):
            for name, value in saved.items():
                if name == "lr" and isinstance(group["lr"], Tensor):
                    group["lr"].copy_(torch.as_tensor(value, dtype=torch.float64))
                elif name not in _OF_TORCH:
                    group[name] = value
        self._versions.clear()  # the weights of this state may come before or after it
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def state_dict(self) -> dict[str, Any]:
        """Return the state, as every optimiser does; low halves fit the weights as they are now."""
        self._refresh_all()
        return super().state_dict()

    def __getstate__(self) -> dict[str, Any]:
        self._refresh_all()
        return super().__getstate__()

    def _refresh_all(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                self._refresh(parameter, group)

    @torch.no_grad()
    @torch.inference_mode(False)
    def _prepare(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        dtype = torch.float64 if parameter.dtype == torch.float64 else torch.float32
        if parameter.dim() == 2:
            if group["split_weights"] and parameter.dtype == torch.float32:
                parameter.data, state["low"] = split(parameter.data)
            elif group["split_weights"]:  # split before; the state was taken away
                state["low"] = torch.zeros(parameter.shape, dtype=torch.int16, device=parameter.device)
            if dtype == torch.float32:
                dtype = group["state_dtype"]
        state["step"] = torch.zeros((), dtype=torch.float64, device=parameter.device)
        for name in ("exp_avg", "exp_avg_sq"):
            state[name] = torch.zeros(parameter.shape, dtype=dtype, device=parameter.device)
        self._watch(parameter)

    def _watch(self, parameter: Tensor) -> None:
        if parameter.dim() == 2:
            self._collection.add(parameter)
        if "low" in self.state[parameter]:
            self._versions[parameter] = version_of(parameter)

    @torch.no_grad()
    def _refresh(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        """Return the state of a parameter, after whatever was done to either of them since the last step."""
        state: dict[str, Any] = self.state.setdefault(parameter, {})
        if "exp_avg" not in state:
            self._prepare(parameter, group)
            state = self.state[parameter]
        if state["exp_avg"].device != parameter.device:
            state |= {name: value.to(parameter.device) for name, value in state.items()}
        if (state["exp_avg"].dtype == torch.float64) != (parameter.dtype == torch.float64):
            wide = torch.float64 if parameter.dtype == torch.float64 else torch.float32
            state |= {name: state[name].to(wide) for name in ("exp_avg", "exp_avg_sq")}
        if "low" in state:
            if parameter.dtype != torch.bfloat16:
                raise DtypeError(
                    f"split weights: expected torch.bfloat16 parameters, got {parameter.dtype}. Convert the module "
                    "before this optimiser is built, or take its float32_weights."
                )
            if parameter in self._versions and self._versions[parameter] != version_of(parameter):
                state["low"].zero_()
            self._versions[parameter] = version_of(parameter)
        return state

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
        # parameters without a gradient are passed over, as by torch.optim.Adam
        active = [(p, n, group) for n, group in enumerate(self.param_groups) for p in group["params"]]
        active = [(p, n, group) for p, n, group in active if p.grad is not None]
        gradients = [gradient_of(parameter) for parameter, _, _ in active]
        states = [self._refresh(parameter, group) for parameter, _, group in active]
        corrections = self._count_step(active, states)
        places = {id(parameter): place for place, parameter in enumerate(self._parameters())}
        for (parameter, number, group), gradient, state, correction in zip(active, gradients, states, corrections):
            with part(f"adam_rows {places[id(parameter)]}"):
                adam_rows(
                    matrix_of(parameter),
                    (matrix_of(state["exp_avg"]), matrix_of(state["exp_avg_sq"])),
                    gradient,
                    self._rate(number, group, parameter.device),
                    state["step"],
                    correction,
                    rule_of(parameter, group),
                    low=state.get("low"),
                )
            if "low" in state:
                self._versions[parameter] = version_of(parameter)
        return loss

    def _count_step(self, active: list[tuple[Tensor, int, dict[str, Any]]], states: list[dict[str, Any]]) -> list[Any]:
        """Count a step of each parameter; return 1 - beta1^step and 1 - beta2^step, [2] float64 each."""
        if len({parameter.device for parameter, _, _ in active}) > 1:
            return [self._count_step([one], [state])[0] for one, state in zip(active, states)]
        if not active:
            return []
        torch._foreach_add_([state["step"] for state in states], 1)
        key = active[0][0].device, tuple(tuple(map(float, group["betas"])) for _, _, group in active)
        if self._betas is None or self._betas[0] != key:
            self._betas = key, torch.tensor(key[1], dtype=torch.float64, device=key[0])
        steps = torch.stack([state["step"] for state in states])
        return list((1 - self._betas[1] ** steps[:, None]).unbind(0))

    def _rate(self, number: int, group: dict[str, Any], device: torch.device) -> Tensor:
        """Return the learning rate of a group as a tensor on the device, whatever was put in its place."""
        lr = group["lr"]
        if isinstance(lr, Tensor):
            return lr.to(device, torch.float64).reshape(())
        rate = self._rates.get(number)
        if rate is None or rate.device != device:
            with torch.inference_mode(False):
                rate = self._rates[number] = torch.zeros((), dtype=torch.float64, device=device)
        return rate.fill_(lr)

    @torch.no_grad()
    def clip_grad_norm(self, max_norm: float) -> Tensor:
        """Scale all gradients down to a global norm, as `torch.nn.utils.clip_grad_norm_` does; before `step`.

        Args:
            max_norm: largest norm allowed.
        Returns:
            scalar: the norm before, of gradients as `step` uses them (projected where `unit_norm`).
        """
        gradients = [(p, group) for group in self.param_groups for p in group["params"] if p.grad is not None]
        if not gradients:
            return torch.zeros((), dtype=torch.float32, device="cpu")
        with part("clip_grad_norm"):
            squares = [
                row_squares(
                    matrix_of(p), gradient_of(p), rule_of(p, group).unit_norm, low=self._refresh(p, group).get("low")
                ).sum()
                for p, group in gradients
            ]
            norm = distributed.summed(torch.stack(squares).sum()).sqrt()
            scale = (max_norm / (norm + 1e-6)).clamp_max(1.0)
            for parameter, _ in gradients:
                parameter.grad.mul_(scale)
        return norm

    @torch.no_grad()
    def restart_rows(self, parameter: Tensor, rows: Tensor, values: Tensor) -> None:
        """Write rows of a parameter, with all their bits where it is split, and forget their moments. No wait.

        Args:
            parameter: of this optimiser, [n, ...].
            rows: [m], int64, each once.
            values: [m, ...], float.
        """
        state = next(self._refresh(p, g) for g in self.param_groups for p in g["params"] if p is parameter)
        if "low" in state:
            values, low = split_halves(values.float())
            state["low"].index_copy_(0, rows, low)
        parameter.index_copy_(0, rows, values.to(parameter.dtype))
        for name in ("exp_avg", "exp_avg_sq"):
            state[name].index_fill_(0, rows, 0)
        if "low" in state:
            self._versions[parameter] = version_of(parameter)

    @torch.no_grad()
    def float32_weights(self, parameter: Tensor) -> Tensor:
        """Return a parameter with all its bits: a new float32 tensor on the CPU where it is split, else its values."""
        if not self.is_split(parameter):
            return parameter.detach()
        whole, start = torch.empty(parameter.shape, dtype=torch.float32, device="cpu"), 0
        for rows in self.whole_rows(parameter):
            whole[start : start + len(rows)] = rows
            start += len(rows)
        return whole

    @torch.no_grad()
    def whole_rows(self, parameter: Tensor) -> Iterator[Tensor]:
        """Yield a parameter with all its bits, some rows at a time, on its device; as it is where it is not split."""
        low = next((self._refresh(p, g) for g in self.param_groups for p in g["params"] if p is parameter), {}).get(
            "low"
        )
        if low is None:
            yield parameter.detach()
            return
        yield from merged_rows(parameter.detach(), low)

    def is_split(self, parameter: Tensor) -> bool:
        """Tell whether a parameter is kept in two halves of 16 bits, of which it holds the upper ones."""
        return "low" in self.state.get(parameter, {})

    def _parameters(self) -> list[Tensor]:
        return [parameter for group in self.param_groups for parameter in group["params"]]
