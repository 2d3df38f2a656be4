"""Tensors without data: what needs none works, what does says so; and tracers follow every architecture."""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from flashsae import SAE, ops
from flashsae.architecture import settings_of
from flashsae.errors import DtypeError
from flashsae.sae import SAEConfig

FIXED = ("topk", "hierarchical_topk", "abs_topk", "transcoder", "skip_transcoder")
VARYING = ("batch_topk", "matryoshka", "jump_relu", "relu", "gated", "transcoder:relu", "crosscoder")
OWN = {
    "matryoshka": {"k": 2, "prefixes": (8, 16)},
    "jump_relu": {"target_l0": 3},
    "relu": {},
    "gated": {},
    "transcoder:relu": {},
    "crosscoder": {"k": 2, "sites": ("a", "b"), "widths": (2, 4)},
}


def sae_of(arch: str, device: str = "cpu") -> SAE:
    d_out = 4 if "transcoder" in arch else None
    return SAE(SAEConfig(6, 16, arch=settings_of(arch, **OWN.get(arch, {"k": 2})), d_out=d_out), device=device).eval()


@pytest.mark.parametrize("fake", [False, True])
@pytest.mark.parametrize("arch", FIXED + VARYING)
def test_a_code_whose_length_depends_on_data_is_refused_where_there_is_none(arch: str, fake: bool) -> None:
    mode: AbstractContextManager[object] = FakeTensorMode() if fake else nullcontext()
    with mode:
        sae, x = sae_of(arch, "cpu" if fake else "meta"), torch.empty(5, 6, device="cpu" if fake else "meta")
        if arch in FIXED:
            assert sae(x).shape == (5, sae.config.d_out)
            return
        with pytest.raises(DtypeError, match="x: expected tokens with data, on which it depends how many latents"):
            sae(x)


def test_a_code_with_room_for_a_number_of_entries_needs_no_data() -> None:
    x, W, b = (torch.empty(*shape, device="meta") for shape in ((5, 6), (16, 6), (16,)))
    assert ops.encode_above(x, W, b, 0.5, capacity=7).acts.shape == (7,)
    assert ops.encode_above(x, W, b, 0.5, capacity="full").acts.shape == (5, 16)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # of PyTorch's own tracer
@pytest.mark.parametrize("arch", ["topk", "batch_topk", "jump_relu", "crosscoder"])
def test_a_compiled_sae_gives_the_same(arch: str, generator: torch.Generator) -> None:
    torch._dynamo.reset()
    sae, x = sae_of(arch), torch.randn(5, 6, generator=generator)
    compiled = torch.compile(sae, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), sae(x))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # the compiler hides it from others
@pytest.mark.parametrize("training", [False, True])
def test_a_graph_that_breaks_at_an_operator_leaves_it_as_it_is(training: bool, generator: torch.Generator) -> None:
    torch._dynamo.reset()
    sae, x = sae_of("jump_relu").train(training), torch.randn(5, 6, generator=generator)
    compiled = torch.compile(sae, backend="aot_eager")  # what it cannot trace it warns of
    torch.testing.assert_close(compiled(x), sae(x))
    compiled(x).square().sum().backward()
    (expected,) = torch.autograd.grad(sae(x).square().sum(), sae.W_enc_T)
    torch.testing.assert_close(sae.W_enc_T.grad, expected)


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@pytest.mark.parametrize("arch", ["topk", "batch_topk"])
def test_a_graph_of_operators_gives_the_same(arch: str, mode: str, generator: torch.Generator) -> None:
    sae, x = sae_of(arch), torch.randn(5, 6, generator=generator)
    graph = make_fx(lambda x: sae(x), tracing_mode=mode, _allow_non_fake_inputs=True)(x)  # noqa: PLW0108 - no module
    other: Tensor = torch.randn(5, 6, generator=generator)
    torch.testing.assert_close(graph(other), sae(other))


def test_nothing_stays_that_stood_in_for_numbers(generator: torch.Generator) -> None:
    sae, x = sae_of("crosscoder"), torch.randn(5, 6, generator=generator)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        sae.train()(mode.from_tensor(x))
    torch.export.export(sae.eval(), (x,))  # which warns of what stays
    kept = [value for value in vars(copy.deepcopy(sae)).values() if isinstance(value, Tensor)]
    assert not [value for value in kept if type(value) is not Tensor]
    assert sae.selection_scale is not None
    assert type(sae.selection_scale) is Tensor


@pytest.mark.parametrize("arch", ["abs_topk", "gated"])
def test_an_exported_sae_gives_the_same(arch: str, generator: torch.Generator) -> None:
    sae, x = sae_of(arch), torch.randn(5, 6, generator=generator)
    exported = torch.export.export(sae, (x,)).module()
    other: Tensor = torch.randn(5, 6, generator=generator)  # of which another number of latents is active
    torch.testing.assert_close(exported(other), sae(other))
