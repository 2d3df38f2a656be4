"""What every operation has in common: it does not depend on a program's settings, and is differentiable once."""

from __future__ import annotations

import ast
import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flashsae import ops
from flashsae.errors import GradientError
from helpers.codes import topk_of
from helpers.every_operation import D_SAE, OPERATIONS, K, inputs
from helpers.on_both import DEVICE
from helpers.steps import Tensors


@contextlib.contextmanager
def _setting(read: Callable[[], Any], write: Callable[[Any], Any], value: Any) -> Iterator[None]:
    before = read()
    write(value)
    try:
        yield
    finally:
        write(before)


def _default_dtype(dtype: torch.dtype) -> AbstractContextManager[None]:
    return _setting(torch.get_default_dtype, torch.set_default_dtype, dtype)


def _matmul(value: str) -> AbstractContextManager[None]:
    return _setting(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, value)


@contextlib.contextmanager
def _fp32_precision(backend: Any, value: str) -> Iterator[None]:
    backend.fp32_precision = value
    try:
        yield
    finally:
        backend.fp32_precision = "none"


@contextlib.contextmanager
def _default_device() -> Iterator[None]:
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextlib.contextmanager
def _anomaly() -> Iterator[None]:
    with pytest.warns(UserWarning, match="Anomaly Detection"), torch.autograd.detect_anomaly():
        yield


SETTINGS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "default float64": lambda: _default_dtype(torch.float64),
    "default float16": lambda: _default_dtype(torch.float16),
    "default bfloat16": lambda: _default_dtype(torch.bfloat16),
    "default device": _default_device,
    "device context": lambda: torch.device("meta"),
    "autocast bfloat16": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast float16": lambda: torch.autocast("cpu", torch.float16),
    "inference mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "set_grad_enabled": lambda: torch.set_grad_enabled(False),
    "deterministic": lambda: _setting(
        torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms, True
    ),
    "matmul medium": lambda: _matmul("medium"),
    "matmul high": lambda: _matmul("high"),
    "mkldnn matmul": lambda: _fp32_precision(torch.backends.mkldnn.matmul, "bf16"),  # type: ignore[attr-defined]
    "mkldnn": lambda: _fp32_precision(torch.backends.mkldnn, "bf16"),
    "all backends": lambda: _fp32_precision(torch.backends, "bf16"),
    "anomaly": _anomaly,
}


GRADIENTS_OFF = {"inference mode", "no_grad", "set_grad_enabled"}

RUN = {
    "reference": list(OPERATIONS),
    "triton": [
        name
        for name in OPERATIONS
        if name not in ("encode_topk", "encode_batch_topk", "encode_above", "SAE", "FactoredAdam")
    ],  # slow, and covered
}


def _inputs() -> Tensors:
    p = inputs(DEVICE)
    p["x"] += torch.randn(p["x"].shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)  # so that products round
    return p


@functools.cache
def _undisturbed(backend: str) -> dict[str, Tensors]:
    return {name: OPERATIONS[name](_inputs()) for name in RUN[backend]}


def _assert_undisturbed(backend: str, settings: Sequence[str]) -> None:
    p, expected = _inputs(), _undisturbed(backend)
    for name, without in expected.items():
        with contextlib.ExitStack() as stack:
            for setting in settings:
                stack.enter_context(SETTINGS[setting]())
            found = OPERATIONS[name](p)
        assert set(found) == set(without) or GRADIENTS_OFF & set(settings), name
        for key, tensor in found.items():
            assert (tensor.dtype, tensor.device) == (without[key].dtype, without[key].device), (name, key)
            assert torch.equal(tensor, without[key]), (name, key)


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_reference_does_not_depend_on(setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHSAE_BACKEND", "reference")
    _assert_undisturbed("reference", [setting])


@pytest.mark.parametrize(
    "settings",
    [
        ("default float64", "default device", "autocast bfloat16", "deterministic", "matmul medium", "anomaly"),
        ("default bfloat16", "device context", "autocast float16", "all backends", "inference mode"),
    ],
    ids="+".join,
)
def test_kernels_do_not_depend_on(settings: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("FLASHSAE_BACKEND", "triton")
    _assert_undisturbed("triton", settings)


def test_every_public_operation_is_among_those_that_are_tested() -> None:
    others = {name for name in ops.__all__ if name[0].isupper()}
    others |= {"collect_factors", "inference_memory", "materialize"}
    assert set(ops.__all__) <= set(OPERATIONS) | others


def test_settings_are_put_back() -> None:
    p, matmul = inputs("cpu"), torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    with _matmul("medium"):
        OPERATIONS["decode_loss"](p)
        assert torch.get_float32_matmul_precision() == "medium"
    matmul.fp32_precision = "none"
    with _fp32_precision(torch.backends, "bf16"):
        OPERATIONS["decode_loss"](p)
        assert matmul.fp32_precision == "bf16"
    assert matmul.fp32_precision == "none"  # it went on to follow the wider setting
    with torch.autocast("cpu", torch.bfloat16):
        OPERATIONS["decode_loss"](p)
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16


ALLOCATIONS = {"empty", "zeros", "ones", "full", "arange", "tensor", "rand", "randn", "randint", "randperm", "eye"}
SRC = Path(ops.__file__).parents[1]


def _careless(path: Path) -> list[str]:
    """Return the calls of a file that allocate a tensor with a dtype or device that a program's defaults choose."""
    found = []
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        is_torch = isinstance(node.func.value, ast.Name) and node.func.value.id == "torch"
        named = {keyword.arg for keyword in node.keywords}
        if is_torch and node.func.attr in ALLOCATIONS and not {"dtype", "device"} <= named:
            found.append(f"{path.name}:{node.lineno}: torch.{node.func.attr}")
    return found


FILES = sorted(SRC.rglob("*.py"))


def test_every_allocation_names_its_dtype_and_device() -> None:
    assert [line for path in FILES for line in _careless(path)] == []


def test_a_careless_allocation_is_found(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("import torch\ntorch.zeros(3, dtype=torch.int64)\n")
    assert _careless(tmp_path / "a.py") == ["a.py:2: torch.zeros"]


def _functions(device: str) -> dict[str, tuple[Callable[[Tensor], Tensor], Tensor]]:
    """Return scalar functions of one tensor, one through each operator that has a backward pass."""
    p = inputs(device)

    def encode(x: Tensor) -> Tensor:
        return ops.encode_topk(x, p["W_enc_T"], p["b_enc"], K, b_dec=p["b_dec"]).acts.square().sum()

    def encode_batch(W: Tensor) -> Tensor:
        return ops.encode_batch_topk(p["x"], W, p["b_enc"], K).acts.square().sum()

    def encode_above(b_enc: Tensor) -> Tensor:
        return ops.encode_above(p["x"], p["W_enc_T"], b_enc, 0.5).acts.square().sum()

    def pre_acts(W: Tensor) -> Tensor:
        return ops.pre_acts(p["x"], W, p["b_enc"], ops.Pattern.topk(p["top_indices"], D_SAE)).square().sum()

    def per_latent(values: Tensor) -> Tensor:
        return ops.per_latent(values, ops.Pattern.topk(p["top_indices"], D_SAE)).square().sum()

    def latent_sums(values: Tensor) -> Tensor:
        return ops.latent_sums(values, ops.Pattern.topk(p["top_indices"], D_SAE)).square().sum()

    def code(acts: Tensor) -> ops.SparseCode:
        return topk_of(acts, p["top_indices"], p["W_dec"])

    def decode(acts: Tensor) -> Tensor:
        return ops.decode(code(acts), p["W_dec"], p["b_dec"]).square().sum()

    def loss(acts: Tensor) -> Tensor:
        return ops.decode_loss(code(acts), p["W_dec"], p["b_dec"], p["target"]).loss

    def take(W: Tensor) -> Tensor:
        return ops.take_rows(W, p["latents"], p["slots"]).square().sum()

    def linear(W: Tensor) -> Tensor:
        return ops.linear(p["x"], W).square().sum()

    def norms(W: Tensor) -> Tensor:
        return ops.block_norms(W, (2, 3)).square().sum()

    return {
        "encode_topk": (encode, p["x"]),
        "encode_batch_topk": (encode_batch, p["W_enc_T"]),
        "encode_above": (encode_above, p["b_enc"]),
        "pre_acts": (pre_acts, p["W_enc_T"]),
        "per_latent": (per_latent, p["latent_values"]),
        "latent_sums": (latent_sums, p["top_acts"]),
        "decode": (decode, p["top_acts"]),
        "decode_loss": (loss, p["top_acts"]),
        "take_rows": (take, p["W_dec"]),
        "linear": (linear, p["W_enc_T"]),
        "block_norms": (norms, p["W_dec"]),
    }


DIFFERENTIABLE = (
    "encode_topk",
    "encode_batch_topk",
    "encode_above",
    "pre_acts",
    "per_latent",
    "latent_sums",
    "decode",
    "decode_loss",
    "take_rows",
    "linear",
    "block_norms",
)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_a_second_derivative_is_refused_and_a_first_one_is_not(name: str) -> None:
    function, at = _functions("cpu")[name]
    leaf = at.detach().requires_grad_()
    (plain,) = torch.autograd.grad(function(leaf), leaf)
    (first,) = torch.autograd.grad(function(leaf), leaf, create_graph=True)
    assert torch.equal(first, plain)
    assert first.requires_grad  # else what depends on it would silently have no gradient
    other = leaf * 2
    (total,) = torch.autograd.grad((first.detach() * other).sum() + function(leaf), leaf)
    assert torch.equal(total, 3 * plain)
    with pytest.raises(GradientError, match="it can be differentiated once, not twice"):
        torch.autograd.grad(first.sum(), leaf)


def test_a_gradient_penalty_on_weights_is_refused() -> None:
    p = inputs("cpu")
    acts, W = p["top_acts"].requires_grad_(), p["W_dec"].requires_grad_()
    x_hat = ops.decode(topk_of(acts, p["top_indices"], W), W)  # linear in acts: its gradient depends on W alone
    (grad,) = torch.autograd.grad(x_hat.sum(), acts, create_graph=True)
    with pytest.raises(GradientError, match=r"differentiated once, .* \.detach\(\)"):
        grad.square().sum().backward()


TRANSFORMS: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Any]] = {
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (torch.ones_like(x),)),
    "jacfwd": lambda f, x: torch.func.jacfwd(f)(x),
    "grad": lambda f, x: torch.func.grad(f)(x),
    "vjp": torch.func.vjp,
    "jacrev": lambda f, x: torch.func.jacrev(f)(x),
    "hessian": lambda f, x: torch.func.hessian(f)(x),
    "vmap": lambda f, x: torch.func.vmap(f)(torch.stack([x, x])),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # PyTorch's own
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_transforms_are_refused(name: str, transform: str) -> None:
    function, at = _functions("cpu")[name]
    way = "forward-mode" if transform in ("jvp", "jacfwd") else "transforms of torch.func"
    with pytest.raises(GradientError, match=rf"{way} .* not supported: use"):
        TRANSFORMS[transform](function, at)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_forward_mode_is_refused(name: str) -> None:
    function, at = _functions("cpu")[name]
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(at, torch.ones_like(at))
        with pytest.raises(GradientError, match=r"forward-mode differentiation .* is not supported"):
            function(dual)
        function(at)  # a tensor without tangent is an ordinary one


def test_batches_of_gradients_are_refused() -> None:
    function, at = _functions("cpu")["decode"]
    leaf = at.detach().requires_grad_()
    with pytest.raises(GradientError, match=r"batches of gradients .* are not supported: use one at a time"):
        torch.autograd.grad(function(leaf), leaf, torch.ones(2, device="cpu"), is_grads_batched=True)


def test_functional_call_works() -> None:
    from flashsae import SAE, SAEConfig

    p = inputs("cpu")
    sae = SAE(SAEConfig(p["x"].shape[1], D_SAE, K))
    doubled = {name: (2 * parameter).detach() for name, parameter in sae.named_parameters()}
    assert torch.equal(torch.func.functional_call(sae, doubled, (p["x"],)), 4 * sae(p["x"]))
