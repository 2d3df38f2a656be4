"""A factored gradient is an ordinary gradient to everybody: PyTorch's own tools, used as people use them."""

from __future__ import annotations

import copy
import gc
import io
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flashsae import SAE, SAEConfig, backend
from flashsae.errors import DtypeError, GradientError, ShapeError
from flashsae.ops import FactoredGradient, collect_factors, decode_sparse, encode_topk, materialize
from flashsae.ops.factors import RowFactor
from flashsae.optim import FactoredAdam

D, N, K, B, LR = 16, 40, 3, 6, 1e-2  # so many latents that a factor takes less memory than numbers
F64 = torch.float64
MATRICES = ("W_enc_T", "W_dec")


@pytest.fixture(params=["reference", "triton"])
def precision(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    """Kernels compute in float32, so they are compared to fewer digits."""
    if request.param == "triton":
        pytest.importorskip("triton")
    monkeypatch.setenv("FLASHSAE_BACKEND", request.param)
    monkeypatch.setenv("FLASHSAE_DENSE_ABOVE", "1")  # so few latents would be multiplied as a whole
    return torch.float32 if request.param == "triton" else F64


def _sae(dtype: torch.dtype = F64) -> SAE:
    return SAE(SAEConfig(D, N, K), seed=1, dtype=dtype)


def _x(number: int = 0, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(B, D, generator=torch.Generator().manual_seed(number), dtype=F64).to(dtype)


def _loss(sae: SAE, x: Tensor) -> Tensor:
    return sae.decode_loss(sae.encode(x), x).loss / x.numel()


def _pair(dtype: torch.dtype = F64) -> tuple[SAE, SAE, FactoredAdam]:
    """Return an SAE whose gradients are factors, one whose gradients are ordinary, and the optimiser of the first."""
    ours, theirs = _sae(dtype), _sae(dtype)
    optimizer = FactoredAdam(ours.parameters(), LR)
    for sae in (ours, theirs):
        _loss(sae, _x(dtype=dtype)).backward()
    return ours, theirs, optimizer


def _assert_same(ours: SAE, theirs: SAE) -> None:
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters()):
        digits = {"rtol": 1e-9, "atol": 1e-12} if mine.dtype == F64 else {"rtol": 1e-4, "atol": 1e-6}
        torch.testing.assert_close(mine.detach(), other.detach(), **digits, msg=lambda m, n=name: f"{n}: {m}")
        if mine.grad is not None or other.grad is not None:
            torch.testing.assert_close(torch.as_tensor(mine.grad).clone() + 0, other.grad, **digits)


def _is_factored(sae: SAE) -> bool:
    grads = [sae.get_parameter(name).grad for name in MATRICES]
    return all(isinstance(grad, FactoredGradient) and grad.factors is not None for grad in grads)


def _numbers(gradient: Tensor | None) -> Tensor:
    assert gradient is not None
    return gradient + torch.zeros(gradient.shape, dtype=torch.float64)


READS: dict[str, Callable[[Tensor], Any]] = {
    "sum": torch.sum,
    "norm": torch.norm,
    "norm of rows": lambda g: g.norm(dim=1),
    "largest": lambda g: g.abs().max(),
    "L1 norm": lambda g: torch.linalg.vector_norm(g, 1),
    "isfinite": lambda g: torch.isfinite(g).all(),
    "row": lambda g: g[3],
    "product": lambda g: g.T @ g,
    "double": torch.Tensor.double,
    "clone": torch.clone,
    "negated": torch.neg,
    "times a number": lambda g: 3 * g,
    "over a number": lambda g: g / 7,
    "times a scalar": lambda g: g * torch.tensor(0.5),
    "plus itself": lambda g: g + g,
    "minus itself": lambda g: g - 0.5 * g,
    "plus numbers": lambda g: g + torch.ones(N, D, dtype=g.dtype),
    "stack": lambda g: torch.stack([g, g]),
    "foreach": lambda g: torch._foreach_norm([g, g])[1],
    "numpy": lambda g: torch.from_numpy(g.numpy()),
    "list": lambda g: torch.tensor(g.tolist(), dtype=g.dtype),
    "item": lambda g: torch.tensor(g.sum().item(), dtype=g.dtype),
    "pickle": lambda g: pickle.loads(pickle.dumps(g)),
    "deepcopy": copy.deepcopy,
    "flat": lambda g: g.view(-1),
    "like": torch.ones_like,
}


@pytest.mark.parametrize("read", READS)
def test_reading_a_gradient_gives_its_numbers(read: str) -> None:
    ours, theirs, _ = _pair()
    assert _is_factored(ours)
    for name in MATRICES:
        mine, other = (READS[read](sae.get_parameter(name).grad) for sae in (ours, theirs))  # type: ignore[arg-type]
        assert (mine.shape, mine.dtype) == (other.shape, other.dtype)
        torch.testing.assert_close(mine.clone() + 0 if mine.is_floating_point() else mine, other, rtol=1e-9, atol=1e-12)
    _assert_same(ours, theirs)


def _view(g: Tensor) -> None:
    flat = g.view(-1)
    g.mul_(2)
    flat[5:50] = 7.0


def _hold(g: Tensor) -> None:
    g.data.clamp_(-0.01, 0.01)
    g.detach().add_(1.0)


def _copy_rows(g: Tensor) -> None:
    g.copy_(torch.arange(N * D, dtype=g.dtype).view(N, D))
    g[2] += 1


WRITES: dict[str, Callable[[Tensor], Any]] = {
    "mul_": lambda g: g.mul_(0.3),
    "div_": lambda g: g.div_(torch.tensor(3.0)),
    "add_": lambda g: g.add_(torch.ones(N, D, dtype=g.dtype)),
    "add_ with alpha": lambda g: g.add_(torch.ones(N, D, dtype=g.dtype), alpha=0.5),
    "add_ of itself": lambda g: g.add_(g),
    "zero_": torch.Tensor.zero_,
    "clamp_": lambda g: g.clamp_(-0.01, 0.01),
    "fill_": lambda g: g.fill_(2.0),
    "through a view": _view,
    "through .data": _hold,
    "rows": lambda g: g[4].mul_(5.0),
    "masked": lambda g: g.masked_fill_(g > 0, 0.0),
    "foreach": lambda g: torch._foreach_mul_([g], 0.5),
    "foreach zero": lambda g: torch._foreach_zero_([g]),
    "out=": lambda g: torch.mul(g, 2.0, out=g),
    "copy_": _copy_rows,
    "clamp of values": lambda g: None,
}


@pytest.mark.parametrize("write", WRITES)
def test_writing_to_a_gradient_changes_what_the_optimiser_sees(write: str) -> None:
    ours, theirs, optimizer = _pair()
    adam = torch.optim.Adam(theirs.parameters(), LR, eps=6.25e-10)
    for sae in (ours, theirs):
        for name in MATRICES:
            WRITES[write](sae.get_parameter(name).grad)  # type: ignore[arg-type]
        if write == "clamp of values":
            nn.utils.clip_grad_value_(sae.parameters(), 1e-3)
    optimizer.step()
    adam.step()
    _assert_same(ours, theirs)


def _step(optimizer: torch.optim.Optimizer) -> Callable[[SAE], None]:
    return lambda sae: (optimizer.step(), optimizer.zero_grad())[0]


@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"foreach": False}, {"fused": True}], ids=str)
def test_another_optimiser_meets_ordinary_gradients(options: dict[str, bool]) -> None:
    """While ours still lives, and after it was dropped."""
    ours, theirs = _sae(), _sae()
    dropped = FactoredAdam(ours.parameters(), LR)
    adams = [torch.optim.Adam(sae.parameters(), LR, **options) for sae in (ours, theirs)]  # type: ignore[arg-type]
    for number in range(6):
        for sae, adam in zip((ours, theirs), adams):
            adam.zero_grad(set_to_none=number % 2 == 0)
            _loss(sae, _x(number)).backward()
            adam.step()
        if number == 3:
            assert isinstance(ours.W_dec.grad, FactoredGradient)
            ours.zero_grad()
            theirs.zero_grad()
            del dropped
            gc.collect()
    _assert_same(ours, theirs)
    assert type(ours.W_dec.grad) is type(theirs.W_dec.grad) is Tensor


@pytest.mark.parametrize("name", ["SGD", "AdamW", "RMSprop", "Adagrad", "LBFGS", "Adadelta", "RAdam"])
def test_every_optimiser_does_what_it_does_with_ordinary_gradients(name: str) -> None:
    ours, theirs, _ = _pair()
    for sae in (ours, theirs):
        optimizer = getattr(torch.optim, name)(sae.parameters(), lr=LR)

        def closure(sae: SAE = sae, optimizer: torch.optim.Optimizer = optimizer) -> float:
            optimizer.zero_grad()
            loss = _loss(sae, _x())
            loss.backward()
            return loss.item()

        optimizer.step(closure)
    _assert_same(ours, theirs)


def test_an_optimiser_that_is_dropped_leaves_nothing_behind() -> None:
    sae = _sae()
    FactoredAdam(sae.parameters(), LR)
    optimizer = FactoredAdam(sae.parameters(), LR)
    torch.optim.lr_scheduler.StepLR(optimizer, 2)
    del optimizer
    gc.collect()
    _loss(sae, _x()).backward()
    assert type(sae.W_dec.grad) is Tensor


def test_a_handle_stops_collecting() -> None:
    sae = _sae()

    def kind() -> type:
        sae.zero_grad()
        _loss(sae, _x()).backward()
        return type(sae.W_dec.grad)

    first, second = collect_factors(sae.W_dec), collect_factors(sae.W_dec, sae.W_enc_T)
    assert kind() is FactoredGradient
    first.stop()
    first.stop()
    assert kind() is FactoredGradient
    second.stop()
    assert kind() is Tensor
    with collect_factors(sae.W_dec):
        assert kind() is FactoredGradient
    assert kind() is Tensor


def _reloaded(sae: SAE) -> SAE:
    file = io.BytesIO()
    torch.save(sae, file)
    file.seek(0)
    return torch.load(file, weights_only=False)  # type: ignore[no-any-return]


@pytest.mark.parametrize("copied", [copy.deepcopy, _reloaded, lambda sae: pickle.loads(pickle.dumps(sae))])
def test_copies_of_a_module_collect_nothing(copied: Callable[[SAE], SAE]) -> None:
    ours, theirs, _ = _pair()
    twin = copied(ours)
    twin.zero_grad()
    _loss(twin, _x()).backward()
    assert type(twin.W_dec.grad) is type(twin.W_enc_T.grad) is Tensor
    _assert_same(twin, theirs)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_of_a_module_forgets_factors(set_to_none: bool) -> None:
    ours, theirs, optimizer = _pair()
    adam = torch.optim.Adam(theirs.parameters(), LR, eps=6.25e-10)
    for number in range(4):
        for sae, either in ((ours, optimizer), (theirs, adam)):
            sae.zero_grad(set_to_none=set_to_none)
            _loss(sae, _x(number)).backward()
            either.step()
    _assert_same(ours, theirs)


def test_only_what_was_asked_for_gets_a_gradient() -> None:
    sae = _sae()
    collection = collect_factors(sae.W_dec, sae.W_enc_T)
    x = _x().requires_grad_()
    torch.autograd.grad(_loss(sae, x), x)
    assert sae.W_dec.grad is sae.W_enc_T.grad is None
    _loss(sae, x).backward(inputs=[sae.b_dec, sae.W_enc_T])
    assert isinstance(sae.W_enc_T.grad, FactoredGradient)
    assert sae.W_dec.grad is sae.b_enc.grad is None
    (gradient,) = torch.autograd.grad(_loss(sae, x), sae.W_dec)
    assert isinstance(gradient, FactoredGradient)
    assert sae.W_dec.grad is None
    collection.stop()
    (ordinary,) = torch.autograd.grad(_loss(sae, x), sae.W_dec)
    assert torch.equal(gradient.materialize(), ordinary)
    sae.W_dec.requires_grad_(False)
    with collect_factors(sae.W_dec):
        _loss(sae, x).backward()
    assert sae.W_dec.grad is None


def test_hooks_see_the_gradient_and_may_change_it() -> None:
    ours, theirs = _sae(), _sae()
    optimizer, seen = FactoredAdam(ours.parameters(), LR), []
    adam = torch.optim.Adam(theirs.parameters(), LR, eps=6.25e-10)
    for sae in (ours, theirs):
        sae.W_dec.register_hook(lambda g: seen.append(g.norm().item()))
        sae.W_enc_T.register_hook(lambda g: g.clamp(-1e-3, 1e-3))
        sae.W_dec.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.norm().item()))
    for number in range(3):
        for sae, either in ((ours, optimizer), (theirs, adam)):
            either.zero_grad()
            _loss(sae, _x(number)).backward()
            either.step()
    _assert_same(ours, theirs)
    assert seen[0] > 0
    by_step = torch.tensor(seen, dtype=F64).view(3, 2, 2)
    torch.testing.assert_close(by_step[:, 0], by_step[:, 1], rtol=1e-9, atol=0.0)


def test_a_hook_that_keeps_the_gradient_costs_no_numbers() -> None:
    sae, kept = _sae(), []
    FactoredAdam(sae.parameters(), LR)
    with collect_factors(sae.W_dec):
        sae.W_dec.register_hook(kept.append)
        _loss(sae, _x()).backward()
    assert isinstance(sae.W_dec.grad, FactoredGradient)
    assert sae.W_dec.grad.factors
    sae.W_dec.grad.mul_(3)
    torch.testing.assert_close(3 * kept[0], sae.W_dec.grad.materialize())


@pytest.mark.parametrize("max_norm", [1e-3, 1e3])
@pytest.mark.parametrize("foreach", [None, False])
def test_clip_grad_norm_of_torch_sees_all_gradients(
    max_norm: float, foreach: bool | None, precision: torch.dtype
) -> None:
    ours, theirs, optimizer = _pair(precision)
    norms = [nn.utils.clip_grad_norm_(sae.parameters(), max_norm, foreach=foreach) for sae in (ours, theirs)]
    assert norms[0].item() == pytest.approx(norms[1].item(), rel=1e-5 if precision == torch.float32 else 1e-12)
    assert _is_factored(ours)
    optimizer.step()
    torch.optim.Adam(theirs.parameters(), LR, eps=6.25e-10).step()
    _assert_same(ours, theirs)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of numpy, as which the interpreter multiplies
@pytest.mark.filterwarnings("ignore:invalid value")  # NumPy's, in the interpreter
@pytest.mark.parametrize("bad", [None, torch.inf, torch.nan])
def test_grad_scaler_unscales_and_sees_what_is_not_finite(bad: float | None, precision: torch.dtype) -> None:
    if precision == F64:
        precision = torch.float32
    ours, theirs = _sae(precision), _sae(precision)
    before = ours.W_dec.detach().clone()
    optimizers = [FactoredAdam(ours.parameters(), LR), torch.optim.Adam(theirs.parameters(), LR, eps=6.25e-10)]
    for sae, optimizer in zip((ours, theirs), optimizers):
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        scaler.scale(_loss(sae, _x(dtype=precision))).backward()
        if bad is not None and isinstance(sae.W_dec.grad, FactoredGradient):
            (factor,) = sae.W_dec.grad.factors or ()
            factor.coeffs[2, 1] = bad  # type: ignore[union-attr]
        elif bad is not None:
            sae.W_dec.grad[0, 0] = bad  # type: ignore[index]
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == (1024.0 if bad is None else 512.0)
    assert torch.equal(ours.W_dec, before) == (bad is not None)
    if bad is None:
        _assert_same(ours, theirs)


def test_the_projection_of_a_decoder_gradient_reaches_it() -> None:
    ours, theirs, _ = _pair()
    for sae in (ours, theirs):
        sae.project_decoder_grad()
        along = (_numbers(sae.W_dec.grad) * sae.W_dec).sum(1)
        torch.testing.assert_close(along, torch.zeros_like(along), rtol=0.0, atol=1e-12)
    _assert_same(ours, theirs)


def test_accumulation_takes_no_more_memory_than_numbers(precision: torch.dtype) -> None:
    ours, theirs = _sae(precision), _sae(precision)
    FactoredAdam(ours.parameters(), LR)
    with collect_factors(ours.W_dec, ours.W_enc_T):
        for number in range(16 if precision == F64 else 5):  # kernels are slow in the interpreter
            for sae in (ours, theirs):
                _loss(sae, _x(number, precision)).backward()
            for name in MATRICES:
                gradient = ours.get_parameter(name).grad
                assert isinstance(gradient, FactoredGradient)
                assert sum(f.nbytes for f in gradient.factors or ()) <= N * D * precision.itemsize
    _assert_same(ours, theirs)


def test_graphs_that_are_made_to_be_differentiated_give_the_same_gradient() -> None:
    sae = _sae()
    (ordinary,) = torch.autograd.grad(_loss(sae, _x()), sae.W_dec)
    with collect_factors(sae.W_dec, sae.W_enc_T):
        (gradient,) = torch.autograd.grad(_loss(sae, _x()), sae.W_dec, create_graph=True)
    torch.testing.assert_close(_numbers(gradient), ordinary, rtol=1e-12, atol=0.0)


def test_a_gradient_keeps_no_graph_alive() -> None:
    sae = _sae()
    with collect_factors(sae.W_dec, sae.W_enc_T):
        _loss(sae, _x()).backward()
        sae.decode(sae.encode(_x())).square().sum().backward()
    for name in MATRICES:
        gradient = sae.get_parameter(name).grad
        assert isinstance(gradient, FactoredGradient)
        for factor in gradient.factors or ():
            assert not any(value.requires_grad for value in vars(factor).values() if isinstance(value, Tensor))


def test_checkpointed_activations_give_the_same_gradients() -> None:
    from torch.utils.checkpoint import checkpoint

    ours, theirs, _ = _pair()
    ours.zero_grad()
    checkpoint(_loss, ours, _x(), use_reentrant=False).backward()  # type: ignore[no-untyped-call]
    assert _is_factored(ours)
    _assert_same(ours, theirs)


def test_parametrizations_and_functional_calls_get_ordinary_gradients() -> None:
    ours, theirs, _ = _pair()
    parameters = {name: p.detach().clone().requires_grad_() for name, p in ours.named_parameters()}
    x_hat = torch.func.functional_call(ours, parameters, (_x(),))
    x_hat.square().sum().backward()
    theirs.zero_grad()
    theirs(_x()).square().sum().backward()
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(parameters[name].grad, parameter.grad, rtol=1e-9, atol=1e-12)


def test_a_module_that_is_converted_takes_its_gradient_along() -> None:
    ours, theirs, _ = _pair(torch.float32)
    for sae in (ours, theirs):
        sae.double()
    assert ours.W_dec.grad is not None
    assert ours.W_dec.grad.dtype == F64
    torch.testing.assert_close(_numbers(ours.W_dec.grad), _numbers(theirs.W_dec.grad))


def test_it_says_what_it_is() -> None:
    W = torch.zeros(4, 3)
    rows = RowFactor(torch.ones(4, 3), None)
    assert repr(FactoredGradient([rows, rows], W)) == "FactoredGradient([4, 3], torch.float32, cpu: RowFactor)"
    assert repr(FactoredGradient([], W)) == "FactoredGradient([4, 3], torch.float32, cpu: zeros)"
    assert torch.equal(FactoredGradient([], W) + 1, torch.ones(4, 3))


def test_numbers_that_are_rows_of_a_factor_are_copied_before_they_are_written_to() -> None:
    W, rows = torch.zeros(4, 3), torch.ones(4, 3)
    gradient = FactoredGradient([RowFactor(rows, None)], W)
    gradient.clamp_(0.0, 0.5)
    assert torch.equal(rows, torch.ones(4, 3))
    assert torch.equal(gradient.materialize(), torch.full((4, 3), 0.5))


def test_what_torch_compile_traces_leaves_ordinary_gradients_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    ours, theirs, _ = _pair()
    backend.log_once.cache_clear()
    compiled = torch.compile(_loss, backend="aot_eager", fullgraph=True)
    with caplog.at_level("WARNING", "flashsae"):
        for sae in (ours, theirs):
            sae.zero_grad()
        with collect_factors(ours.W_dec, ours.W_enc_T):
            compiled(ours, _x()).backward()
            compiled(ours, _x(1)).backward()
    _loss(theirs, _x()).backward()
    _loss(theirs, _x(1)).backward()
    assert type(ours.W_dec.grad) is Tensor
    _assert_same(ours, theirs)
    assert [record.message for record in caplog.records if "torch.compile traces leave" in record.message]
    assert len(caplog.records) == 1


@pytest.mark.parametrize("write", ["residual", "x", "activations", "upstream"])
def test_tensors_that_are_written_to_behind_a_backward_pass_are_noticed(write: str) -> None:
    """An ordinary gradient is done with them; numbers that were read before stay what they were."""
    for read_before in (False, True):
        sae, x = _sae(), _x()
        with collect_factors(sae.W_dec, sae.W_enc_T):
            if write == "residual":
                result = sae.decode_loss(sae.encode(x), x)
                result.loss.backward()
                W, written = sae.W_dec, result.residual
            elif write == "x":
                encode_topk(x, sae.W_enc_T, sae.b_enc, K)[0].sum().backward()
                W, written = sae.W_enc_T, x
            else:
                acts, upstream = torch.rand(B, K, dtype=F64), torch.randn(B, D, dtype=F64)
                decode_sparse(acts, sae.encode(x).top_indices, sae.W_dec).backward(upstream)
                W, written = sae.W_dec, acts if write == "activations" else upstream
        assert isinstance(W.grad, FactoredGradient)
        before = W.grad.materialize().clone() if read_before else None
        optimizer = FactoredAdam([W], LR)
        written.zero_()
        if before is not None:
            assert torch.equal(W.grad.materialize(), before)
            optimizer.step()
            continue
        for use in (optimizer.step, W.grad.norm, lambda W=W: materialize(W)):
            with pytest.raises(GradientError, match="modified in place since: step first"):
                use()


def _all_reduced(g: Tensor) -> None:
    torch.distributed.all_reduce(g)


def _negated(g: Tensor) -> None:
    array = g.numpy()
    array *= -1


def _exported(g: Tensor) -> None:
    torch.from_dlpack(g).mul_(-1)


def _assigned(g: Tensor) -> None:
    g.data = -g.data


@pytest.fixture
def alone_in_a_group(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/meeting", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("write", [_all_reduced, _negated, _exported, _assigned, Tensor.share_memory_])
@pytest.mark.usefixtures("alone_in_a_group")
def test_memory_that_was_handed_out_is_the_gradient(write: Callable[[Tensor], Any]) -> None:
    ours, theirs, optimizer = _pair()
    for sae in (ours, theirs):
        for name in MATRICES:
            write(sae.get_parameter(name).grad)  # type: ignore[arg-type]
    gradient = ours.W_dec.grad
    assert isinstance(gradient, FactoredGradient)
    assert gradient.factors is None
    optimizer.step()
    torch.optim.Adam(theirs.parameters(), LR, eps=6.25e-10).step()
    _assert_same(ours, theirs)


def test_modules_with_factored_gradients_are_shared_and_sent() -> None:
    ours, theirs, _ = _pair()
    ours.share_memory()
    assert ours.W_dec.grad is not None
    assert ours.W_dec.grad.is_shared()
    _assert_same(ours, theirs)


def test_asking_for_the_address_of_a_gradient_gives_that_of_its_numbers() -> None:
    ours, _, _ = _pair()
    gradient = ours.W_dec.grad
    assert isinstance(gradient, FactoredGradient)
    address = gradient.data_ptr()
    assert address == gradient.materialize().data_ptr() != 0
    assert gradient.untyped_storage().nbytes() == N * D * 8
    with pytest.raises(RuntimeError, match="data pointer"):
        torch._C._to_dlpack(ours.W_enc_T.grad)


def test_only_matrices_that_want_a_gradient_collect() -> None:
    sae = _sae()
    wrong: list[tuple[Any, type[Exception], str]] = [
        (sae, DtypeError, "parameters: expected a tensor, got SAE"),
        (list(sae.parameters()), DtypeError, "parameters: expected a tensor, got list"),
        (sae.b_enc, ShapeError, r"parameters: expected the shape \[d_sae, d\]"),
        (sae.W_dec.data, GradientError, "parameters: expected leaves"),
        (sae.W_dec * 2, GradientError, "parameters: expected leaves"),
    ]
    for argument, kind, message in wrong:
        with pytest.raises(kind, match=message):
            collect_factors(sae.W_enc_T, argument)
    _loss(sae, _x()).backward()
    assert type(sae.W_enc_T.grad) is Tensor


def test_what_torch_promotes_is_promoted() -> None:
    ours, theirs, _ = _pair(torch.float32)
    for sae in (ours, theirs):
        assert (sae.W_dec.grad + torch.ones(N, D, dtype=F64)).dtype == F64  # type: ignore[operator]
        assert bool((sae.W_dec.grad / 0).isinf().any())  # type: ignore[operator]
