"""Every operation reads every argument as what it is, however it lies in memory, or refuses it in one sentence."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from flashsae import SAE, SAEConfig, ops
from flashsae.errors import ConfigError, DtypeError, GradientError, ShapeError
from flashsae.ops.latent_rows.op import column_sums
from helpers.codes import index_of
from helpers.every_operation import D_IN, D_SAE, OPERATIONS, B, K, Recorder, inputs
from helpers.on_both import DEVICE
from helpers.steps import Tensors


def _apart(tensor: Tensor) -> Tensor:
    """Every second number of memory."""
    return torch.stack([tensor, torch.full_like(tensor, 77)], -1)[..., 0]


def _shifted(tensor: Tensor) -> Tensor:
    """Rows behind each other with a gap, at an address that is no multiple of 16 bytes."""
    wide = torch.full((*tensor.shape[:-1], tensor.shape[-1] + 3), 77, dtype=tensor.dtype, device=tensor.device)
    wide[..., 1:-2] = tensor
    return wide[..., 1:-2]


def _negated(tensor: Tensor) -> Tensor:
    """A view whose memory holds the negatives."""
    return torch._neg_view(-tensor) if tensor.is_floating_point() else tensor


INDICES = ("top_indices", "slots", "row_latents", "row_starts")
"""Whose repeats mean something else, or nothing."""

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "apart": _apart,
    "shifted": _shifted,
    "negated": _negated,
    "transposed": lambda tensor: tensor.mT.contiguous().mT if tensor.dim() == 2 else tensor,
    "one row": lambda tensor: tensor[:1].expand_as(tensor),
    "one column": lambda tensor: tensor[..., :1].expand_as(tensor),
}


def _assert_same(found: Tensors, expected: Tensors, what: object) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), (what, name)


def _one_at_a_time(name: str, device: str) -> None:
    plain = Recorder(inputs(device))
    OPERATIONS[name](plain)
    for argument in sorted(plain.used):
        for layout, arrange in LAYOUTS.items():
            if plain[argument].dim() and not (argument in INDICES and layout.startswith("one")):
                odd = arrange(plain[argument])
                found = OPERATIONS[name]({**plain, argument: odd})
                expected = OPERATIONS[name]({**plain, argument: odd.clone(memory_format=torch.contiguous_format)})
                _assert_same(found, expected, (argument, layout))


@pytest.mark.parametrize("name", [name for name in OPERATIONS if name not in ("SAE", "FactoredAdam")])
def test_the_reference_reads_any_layout(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHSAE_BACKEND", "reference")
    _one_at_a_time(name, "cpu")


@pytest.mark.parametrize("name", ["decode", "decode, rows", "decode_loss, rows", "latent_rows", "latent_rows, rows"])
def test_kernels_read_any_layout(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("FLASHSAE_BACKEND", "triton")
    plain = inputs(DEVICE)
    odd = {n: _apart(tensor) if tensor.dim() else tensor for n, tensor in plain.items()}
    _assert_same(OPERATIONS[name](odd), OPERATIONS[name](plain), name)


def _is_read_right(tensor: Tensor, others: tuple[Any, ...]) -> bool:
    """Tell whether a kernel that gets this pointer, and these other arguments, knows where its numbers are."""
    is_rows = (
        tensor.dim() == 2 and tensor.stride(1) == 1 and tensor.stride(0) in [n for n in others if isinstance(n, int)]
    )
    return not tensor.is_neg() and (tensor.is_contiguous() or is_rows)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Have kernels do nothing but look at what they are given; memory that they would write holds zeros."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    if torch.cuda.is_available():
        pytest.skip("kernels are compiled here")
    launched = []

    def look(kernel: Any, *args: Any, grid: Any, warmup: bool, **_options: Any) -> None:
        launched.append(kernel.fn.__name__)
        wrong = [n for n, a in zip(kernel.arg_names, args) if isinstance(a, Tensor) and not _is_read_right(a, args)]
        assert not wrong, f"{kernel.fn.__name__} would read {wrong} where they do not lie"

    monkeypatch.setattr(interpreter.InterpretedFunction, "run", look)
    monkeypatch.setenv("FLASHSAE_BACKEND", "triton")
    monkeypatch.setattr(torch, "empty", torch.zeros)
    monkeypatch.setattr(torch, "empty_like", torch.zeros_like)
    return launched


@pytest.mark.parametrize("dense_above", ["0", "1"])
@pytest.mark.parametrize(
    "name",
    [name for name in OPERATIONS if not name.startswith(("pattern", "take_rows", "by_value", "linear", "block_norms"))],
)
def test_kernels_are_given_what_they_can_read(
    name: str, dense_above: str, launches: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLASHSAE_DENSE_ABOVE", dense_above)
    plain = Recorder(inputs("cpu"))
    OPERATIONS[name](plain)
    assert launches
    for argument in sorted(plain.used):
        if plain[argument].dim():
            for layout, arrange in LAYOUTS.items():
                if argument.startswith("row_") and layout.startswith("one"):
                    continue
                OPERATIONS[name]({**plain, argument: arrange(plain[argument])})


def test_a_vector_with_strides_would_be_found(launches: list[str]) -> None:
    from flashsae.ops.latent_rows import kernels

    vector, rows = torch.ones(12)[::2], torch.ones(6, 4)
    with pytest.raises(AssertionError, match=r"latent_rows_column_kernel would read \['coeffs_ptr'\]"):
        kernels.latent_rows_column_kernel[(1, 1)](vector, rows, rows[0], 6, 4, 4, RUN=256, BLOCK_E=32, BLOCK_D=128)


def _call(operation: str, **changes: Any) -> None:
    """Call an operation with good arguments but for these."""
    p: dict[str, Any] = {**inputs("cpu"), "k": K, "workspace_bytes": 1 << 20, "capacity": 9, "d_sae": D_SAE, **changes}
    encode = p["x"], p["W_enc_T"], p["b_enc"], p["k"]
    options = {"b_dec": p["b_dec"], "key_scale": p["key_scale"], "workspace_bytes": p["workspace_bytes"]}

    def code() -> ops.SparseCode:
        return ops.SparseCode.topk(p["top_acts"], p["top_indices"], D_SAE)

    calls: dict[str, Callable[[], Any]] = {
        "encode_topk": lambda: ops.encode_topk(*encode, **options),
        "encode_batch_topk": lambda: ops.encode_batch_topk(*encode, **options),
        "encode_above": lambda: ops.encode_above(
            *encode[:3], p["thresholds"], b_dec=p["b_dec"], capacity=p["capacity"]
        ),
        "pre_acts": lambda: ops.pre_acts(p["x"], p["W_enc_T"], p["b_enc"], code().pattern, b_dec=p["b_dec"]),
        "per_latent": lambda: ops.per_latent(p["latent_values"], code().pattern),
        "latent_sums": lambda: ops.latent_sums(p["top_acts"], ops.Pattern.topk(inputs("cpu")["top_indices"], D_SAE)),
        "decode": lambda: ops.decode(code(), p["W_dec"], p["b_dec"]),
        "decode_loss": lambda: ops.decode_loss(
            code(), p["W_dec"], p["b_dec"], p["target"], token_weights=p["token_weights"]
        ),
        "Pattern.topk": lambda: ops.Pattern.topk(p["top_indices"], p["d_sae"]),
        "Pattern.rows": lambda: ops.Pattern.rows(p["row_latents"], p["row_starts"], p["d_sae"]),
        "latent_rows": lambda: ops.latent_rows(index_of(inputs("cpu")["top_indices"], D_SAE), p["coeffs"], p["rows"]),
        "take_rows": lambda: ops.take_rows(p["W_dec"], p["latents"], p["slots"]),
        "linear": lambda: ops.linear(p["x"], p["W_enc_T"]),
        "block_norms": lambda: ops.block_norms(p["W_dec"], (2, D_IN - 2)),
    }
    calls[operation]()


TENSORS = {
    "encode_topk": ("x", "W_enc_T", "b_enc", "b_dec", "key_scale"),
    "encode_batch_topk": ("x", "key_scale"),
    "encode_above": ("thresholds",),
    "pre_acts": ("x", "W_enc_T"),
    "per_latent": ("latent_values",),
    "latent_sums": ("top_acts",),
    "decode": ("top_acts", "top_indices", "W_dec", "b_dec"),
    "decode_loss": ("target", "token_weights"),
    "Pattern.topk": ("top_indices",),
    "Pattern.rows": ("row_latents", "row_starts"),
    "latent_rows": ("coeffs", "rows"),
    "take_rows": ("W_dec", "latents", "slots"),
    "linear": ("x", "W_enc_T"),
    "block_norms": ("W_dec",),
}
ALONE = ("Pattern.topk", "top_indices"), ("block_norms", "W_dec")
"""Operations of one tensor."""
ARGUMENTS = [(operation, name) for operation, names in TENSORS.items() for name in names]

STRANGE: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "sparse": (
        lambda tensor: tensor.to_sparse(),
        r"expected a dense tensor, got torch.sparse_coo. Convert it: \w+.to_den",
    ),
    "nested": (
        lambda tensor: torch.nested.nested_tensor(list(tensor)),
        r"expected a dense tensor, got a nested one. Join",
    ),
    "array": (lambda tensor: tensor.numpy(), "expected a tensor, got ndarray"),
    "complex": (lambda tensor: tensor.to(torch.complex64), "expected .*, got torch.complex64"),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("kind", STRANGE)
@pytest.mark.parametrize(("operation", "name"), ARGUMENTS)
def test_what_is_no_array_of_numbers_is_refused(operation: str, name: str, kind: str) -> None:
    make, message = STRANGE[kind]
    tensor = inputs("cpu")[name]
    with pytest.raises(DtypeError, match=rf"^\w+: {message}"):
        _call(operation, **{name: make(tensor)})


@pytest.mark.parametrize(("operation", "name"), [pair for pair in ARGUMENTS if pair not in ALONE])
def test_tensors_on_two_devices_are_refused(operation: str, name: str) -> None:
    with pytest.raises(DtypeError, match=r"^\w+: expected the device of .*, (cpu|meta), got (cpu|meta)"):
        _call(operation, **{name: inputs("cpu")[name].to("meta")})


def test_distributed_tensors_are_refused_in_one_sentence(tmp_path: Any) -> None:
    distributed = pytest.importorskip("torch.distributed.tensor")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        p = inputs("cpu")
        for operation, name in (("encode_topk", "W_enc_T"), ("encode_topk", "x"), ("decode", "W_dec")):
            with pytest.raises(DtypeError, match=rf"^{name}: got a DTensor, .* leave the SAE out of fully_shard"):
                _call(operation, **{name: distributed.distribute_tensor(p[name], mesh)})
        sae = torch.distributed.fsdp.fully_shard(SAE(SAEConfig(D_IN, D_SAE, K)), mesh=mesh)
        with pytest.raises(DtypeError, match="leave the SAE out of fully_shard"):
            sae.encode(p["x"])
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("operation", "name"),
    [("encode_topk", "key_scale"), ("decode_loss", "token_weights"), ("latent_rows", "coeffs")],
)
def test_what_receives_no_gradient_may_not_require_one(operation: str, name: str) -> None:
    tensor = inputs("cpu")[name].requires_grad_()
    with pytest.raises(GradientError, match=rf"^{name}: it receives no gradient .* Pass {name}.detach\(\)"):
        _call(operation, **{name: tensor})
    with torch.no_grad():
        _call(operation, **{name: tensor})


@pytest.mark.parametrize("wrong", [-1.0, -1e-30, torch.nan, torch.inf, -torch.inf])
def test_a_key_scale_that_turns_the_order_around_is_refused(wrong: float) -> None:
    scale = inputs("cpu")["key_scale"]
    scale[5] = wrong
    with pytest.raises(ConfigError, match="key_scale: expected finite numbers >= 0"):
        _call("encode_topk", key_scale=scale)


def test_where_nobody_may_look_a_wrong_key_scale_shows(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    op = importlib.import_module("flashsae.ops.encode.op")
    monkeypatch.setattr(op, "has_values", lambda _tensor: False)  # as on a GPU, where it would wait
    p = inputs(device)
    wrong = {5: -1.0, 8: torch.nan, 13: torch.inf}
    for latent, value in wrong.items():
        p["key_scale"][latent] = value
    code = ops.encode_topk(p["x"], p["W_enc_T"], p["b_enc"], K + 1, key_scale=p["key_scale"])
    acts, indices = code.acts, code.top_indices
    is_wrong = torch.isin(indices, torch.tensor(list(wrong), device=indices.device))
    assert (is_wrong.sum(1) == 3).all()
    assert acts[is_wrong].isnan().all()
    assert acts[~is_wrong].isfinite().all()


INTEGERS = [
    ("encode_topk", "k"),
    ("encode_batch_topk", "k"),
    ("encode_topk", "workspace_bytes"),
    ("Pattern.topk", "d_sae"),
    ("Pattern.rows", "d_sae"),
]


@pytest.mark.parametrize(("operation", "name"), INTEGERS)
def test_integers_of_any_kind_are_sizes_and_nothing_else_is(operation: str, name: str) -> None:
    for kind in (int, np.int64, np.int32, np.uint8, np.asarray):
        _call(operation, **{name: kind(20)})
    for wrong in (True, np.True_, 3.0, np.float32(3), "3", None, torch.tensor(3)):
        with pytest.raises(DtypeError, match=rf"^{name}: expected an int, got"):
            _call(operation, **{name: wrong})


def test_sizes_of_an_sae_are_plain_ints() -> None:
    config = SAEConfig(np.int64(5), np.int32(20), np.uint8(3))  # type: ignore[arg-type]
    assert config == SAEConfig(5, 20, 3)
    assert all(type(size) is int for size in (config.d_in, config.d_sae, config.k))
    for sizes in ((True, 20, 3), (5, 20.0, 3), (5, 20, True), ("5", 20, 3)):
        with pytest.raises(DtypeError, match="expected an int, got"):
            SAEConfig(*sizes)  # type: ignore[arg-type]


def test_slots_and_latents_out_of_range_are_refused() -> None:
    p = inputs("cpu")
    with pytest.raises(ShapeError, match=r"latents: expected every index in \[0, 20\)"):
        ops.take_rows(p["W_dec"], p["latents"] + D_SAE, p["slots"])
    with pytest.raises(ShapeError, match=r"slots: expected every index in \[-1, 4\)"):
        ops.take_rows(p["W_dec"], p["latents"], p["slots"] + 3)


def test_too_many_entries_for_an_index_are_refused() -> None:
    with pytest.raises(ShapeError, match=r"latents: expected fewer than 2\*\*31, got 2147483648"):
        ops.Pattern.topk(torch.zeros(1, dtype=torch.int64).expand(2**25, 64).to("meta"), 4)


@pytest.mark.parametrize(("backend", "rows"), [("reference", 0), ("reference", 1), ("triton", 0)])
def test_no_tokens_or_one(backend: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHSAE_BACKEND", backend)
    p = {n: t[:rows] if t.shape[:1] == (B,) else t for n, t in inputs(DEVICE).items()}
    for name in ("encode_topk", "decode", "decode_loss", "latent_rows"):
        found = OPERATIONS[name](p)
        assert all(tensor.isfinite().all() for tensor in found.values()), name


def test_column_sums_of_what_lies_apart(device: str) -> None:
    p = inputs(device)
    found = column_sums(_apart(p["token_weights"]), _apart(p["x"]), torch.float32)
    assert torch.equal(found, p["token_weights"] @ p["x"])


def test_an_encoder_the_wrong_way_round_is_told_how_it_lies() -> None:
    W_enc = inputs("cpu")["W_enc_T"].T
    with pytest.raises(ShapeError, match=r"W_enc_T: expected \[d_sae, d_in\], one row a latent.* W_enc_T\.T"):
        _call("encode_topk", W_enc_T=W_enc)
