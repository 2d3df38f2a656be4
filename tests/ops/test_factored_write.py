"""Whoever writes to a factored gradient, by whatever means PyTorch has, changes what the optimiser sees."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from flashsae.errors import GradientError
from flashsae.ops import FactoredGradient, collect_factors, decode, encode_topk, materialize
from flashsae.ops.factors import RowFactor
from flashsae.optim import FactoredAdam
from helpers.twins import F64, LR, B, D, K, N, Twins, make_sae, make_x


@pytest.fixture
def twins() -> Iterator[Twins]:
    """Gradients to write to; after the test each twin does a step with its own, and they must be the same again."""
    twins = Twins()
    twins.backward()
    twins.assert_factored()
    yield twins
    twins.step()
    twins.assert_same()


def test_multiplied_by_a_number(twins: Twins) -> None:
    for gradient in twins.gradients():
        gradient.mul_(0.3)


def test_divided_by_a_scalar(twins: Twins) -> None:
    for gradient in twins.gradients():
        gradient.div_(torch.tensor(3.0))


def test_numbers_are_added(twins: Twins) -> None:
    for gradient in twins.gradients():
        gradient.add_(torch.ones(N, D, dtype=F64))


def test_a_multiple_of_numbers_is_added(twins: Twins) -> None:
    for gradient in twins.gradients():
        gradient.add_(torch.ones(N, D, dtype=F64), alpha=0.5)


def test_added_to_itself(twins: Twins) -> None:
    for gradient in twins.gradients():
        gradient.add_(gradient)


def test_zeroed(twins: Twins) -> None:
    for gradient in twins.gradients():
        gradient.zero_()


def test_clamped(twins: Twins) -> None:
    for gradient in twins.gradients():
        gradient.clamp_(-0.01, 0.01)


def test_filled(twins: Twins) -> None:
    for gradient in twins.gradients():
        gradient.fill_(2.0)


def test_masked(twins: Twins) -> None:
    for gradient in twins.gradients():
        gradient.masked_fill_(gradient > 0, 0.0)


def test_written_through_a_view(twins: Twins) -> None:
    for gradient in twins.gradients():
        flat = gradient.view(-1)
        gradient.mul_(2)
        flat[5:50] = 7.0


def test_written_through_data_and_detached(twins: Twins) -> None:
    for gradient in twins.gradients():
        gradient.data.clamp_(-0.01, 0.01)
        gradient.detach().add_(1.0)


def test_one_row_is_written(twins: Twins) -> None:
    for gradient in twins.gradients():
        gradient[4].mul_(5.0)


def test_copied_into_and_then_changed(twins: Twins) -> None:
    for gradient in twins.gradients():
        gradient.copy_(torch.arange(N * D, dtype=F64).view(N, D))
        gradient[2] += 1


def test_written_as_the_output_of_an_operation(twins: Twins) -> None:
    for gradient in twins.gradients():
        torch.mul(gradient, 2.0, out=gradient)


def test_a_list_is_multiplied(twins: Twins) -> None:
    for gradient in twins.gradients():
        torch._foreach_mul_([gradient], 0.5)


def test_a_list_is_zeroed(twins: Twins) -> None:
    for gradient in twins.gradients():
        torch._foreach_zero_([gradient])


def test_clipped_value_by_value(twins: Twins) -> None:
    for sae in twins:
        nn.utils.clip_grad_value_(sae.parameters(), 1e-3)


def assert_memory_was_handed_out(twins: Twins) -> None:
    gradient = twins.ours.W_dec.grad
    assert isinstance(gradient, FactoredGradient)
    assert gradient.factors is None


@pytest.fixture
def alone_in_a_group(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/meeting", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("alone_in_a_group")
def test_reduced_over_ranks(twins: Twins) -> None:
    for gradient in twins.gradients():
        torch.distributed.all_reduce(gradient)
    assert_memory_was_handed_out(twins)


def test_written_as_an_array_of_numpy(twins: Twins) -> None:
    for gradient in twins.gradients():
        array = gradient.numpy()
        array *= -1
    assert_memory_was_handed_out(twins)


def test_written_by_another_library(twins: Twins) -> None:
    for gradient in twins.gradients():
        torch.from_dlpack(gradient).mul_(-1)
    assert_memory_was_handed_out(twins)


def test_other_data_is_assigned(twins: Twins) -> None:
    for gradient in twins.gradients():
        gradient.data = -gradient.data
    assert_memory_was_handed_out(twins)


def test_moved_to_memory_that_processes_share(twins: Twins) -> None:
    for gradient in twins.gradients():
        gradient.share_memory_()
    assert_memory_was_handed_out(twins)


def test_moved_there_by_the_method_of_ordinary_tensors(twins: Twins) -> None:
    for gradient in twins.gradients():
        Tensor.share_memory_(gradient)
    assert_memory_was_handed_out(twins)


def test_a_module_moves_its_gradients_to_memory_that_processes_share(twins: Twins) -> None:
    twins.ours.share_memory()
    assert twins.ours.W_dec.grad is not None
    assert twins.ours.W_dec.grad.is_shared()
    twins.assert_same()


def test_the_projection_of_a_decoder_gradient_reaches_it(twins: Twins) -> None:
    for sae in twins:
        sae.project_decoder_grad()
        assert sae.W_dec.grad is not None
        along = (sae.W_dec.grad * sae.W_dec).sum(1)
        torch.testing.assert_close(along, torch.zeros_like(along), rtol=0.0, atol=1e-12)
    twins.assert_same()


def test_numbers_that_are_rows_of_a_factor_are_copied_before_they_are_written_to() -> None:
    W, rows = torch.zeros(4, 3), torch.ones(4, 3)
    gradient = FactoredGradient([RowFactor(rows, None)], W)
    gradient.clamp_(0.0, 0.5)
    assert torch.equal(rows, torch.ones(4, 3))
    assert torch.equal(gradient.materialize(), torch.full((4, 3), 0.5))


def assert_noticed(W: nn.Parameter, written: Tensor, *, read_before: bool) -> None:
    """Write to a tensor of a backward pass. An ordinary gradient is done with it, a factor is that tensor.

    So the gradient can no longer be told and says so, unless its numbers were read before: these stay what they were.
    """
    assert isinstance(W.grad, FactoredGradient)
    optimizer = FactoredAdam([W], LR)
    if read_before:
        before = W.grad.materialize().clone()
        written.zero_()
        assert torch.equal(W.grad.materialize(), before)
        optimizer.step()
        return
    written.zero_()
    with pytest.raises(GradientError, match="modified in place since: step first"):
        optimizer.step()
    with pytest.raises(GradientError, match="modified in place since: step first"):
        W.grad.norm()
    with pytest.raises(GradientError, match="modified in place since: step first"):
        materialize(W)


@pytest.mark.parametrize("read_before", [False, True])
def test_writing_to_the_residual_behind_a_backward_pass_is_noticed(read_before: bool) -> None:
    sae, x = make_sae(), make_x()
    with collect_factors(sae.W_dec, sae.W_enc_T):
        result = sae.decode_loss(sae.encode(x), x)
        result.loss.backward()
    assert_noticed(sae.W_dec, result.residual, read_before=read_before)


@pytest.mark.parametrize("read_before", [False, True])
def test_writing_to_the_batch_behind_a_backward_pass_is_noticed(read_before: bool) -> None:
    sae, x = make_sae(), make_x()
    with collect_factors(sae.W_enc_T):
        encode_topk(x, sae.W_enc_T, sae.b_enc, K).acts.sum().backward()
    assert_noticed(sae.W_enc_T, x, read_before=read_before)


@pytest.mark.parametrize("read_before", [False, True])
@pytest.mark.parametrize("number", [0, 1], ids=["activations", "upstream"])
def test_writing_to_what_was_decoded_or_came_from_upstream_is_noticed(number: int, read_before: bool) -> None:
    sae = make_sae()
    acts, upstream = torch.rand(B, K, dtype=F64), torch.randn(B, D, dtype=F64)
    with collect_factors(sae.W_dec):
        decode(sae.encode(make_x()).replace(acts), sae.W_dec).backward(upstream)
    assert_noticed(sae.W_dec, (acts, upstream)[number], read_before=read_before)
