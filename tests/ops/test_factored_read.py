"""Whoever reads a factored gradient, by whatever means PyTorch has, reads the numbers of the ordinary one."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from flashsae.ops import FactoredGradient
from flashsae.ops.factors import RowFactor
from helpers.twins import F64, D, N, Twins, numbers


@pytest.fixture
def twins() -> Iterator[Twins]:
    """Gradients as factors and as numbers, which are still the same when a test has read them."""
    twins = Twins()
    twins.backward()
    twins.assert_factored()
    yield twins
    twins.assert_same()


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
    values = numbers(ours) if isinstance(ours, FactoredGradient) else ours
    torch.testing.assert_close(values, theirs, rtol=1e-9, atol=1e-12)


def test_sum(twins: Twins) -> None:
    for factored, ordinary in twins.pairs():
        assert_close(torch.sum(factored), torch.sum(ordinary))


def test_norm(twins: Twins) -> None:
    for factored, ordinary in twins.pairs():
        assert_close(torch.norm(factored), torch.norm(ordinary))


def test_norm_of_rows(twins: Twins) -> None:
    for factored, ordinary in twins.pairs():
        assert_close(factored.norm(dim=1), ordinary.norm(dim=1))


def test_other_norms(twins: Twins) -> None:
    for factored, ordinary in twins.pairs():
        assert_close(torch.linalg.vector_norm(factored, 1), torch.linalg.vector_norm(ordinary, 1))


def test_norms_of_a_list(twins: Twins) -> None:
    for factored, ordinary in twins.pairs():
        assert_close(torch._foreach_norm([factored, factored])[1], torch._foreach_norm([ordinary])[0])


def test_largest_number(twins: Twins) -> None:
    for factored, ordinary in twins.pairs():
        assert_close(factored.abs().max(), ordinary.abs().max())


def test_whether_all_is_finite(twins: Twins) -> None:
    for factored, ordinary in twins.pairs():
        assert_close(torch.isfinite(factored).all(), torch.isfinite(ordinary).all())


def test_one_row(twins: Twins) -> None:
    for factored, ordinary in twins.pairs():
        assert_close(factored[3], ordinary[3])


def test_all_numbers_in_one_row(twins: Twins) -> None:
    for factored, ordinary in twins.pairs():
        assert_close(factored.view(-1), ordinary.view(-1))


def test_a_matrix_product(twins: Twins) -> None:
    for factored, ordinary in twins.pairs():
        assert_close(factored.T @ factored, ordinary.T @ ordinary)


def test_another_dtype(twins: Twins) -> None:
    for factored, ordinary in twins.pairs():
        assert_close(factored.double(), ordinary.double())


def test_its_negative(twins: Twins) -> None:
    for factored, ordinary in twins.pairs():
        assert_close(-factored, -ordinary)


def test_multiples(twins: Twins) -> None:
    for factored, ordinary in twins.pairs():
        assert_close(3 * factored, 3 * ordinary)
        assert_close(factored / 7, ordinary / 7)
        assert_close(factored * torch.tensor(0.5), ordinary * torch.tensor(0.5))


def test_sums_with_itself(twins: Twins) -> None:
    for factored, ordinary in twins.pairs():
        assert_close(factored + factored, ordinary + ordinary)
        assert_close(factored - 0.5 * factored, ordinary - 0.5 * ordinary)


def test_a_sum_with_numbers(twins: Twins) -> None:
    ones = torch.ones(N, D, dtype=F64)
    for factored, ordinary in twins.pairs():
        assert_close(factored + ones, ordinary + ones)


def test_a_stack(twins: Twins) -> None:
    for factored, ordinary in twins.pairs():
        assert_close(torch.stack([factored, factored]), torch.stack([ordinary, ordinary]))


def test_something_of_its_shape(twins: Twins) -> None:
    for factored, ordinary in twins.pairs():
        assert_close(torch.ones_like(factored), torch.ones_like(ordinary))


def test_an_array_of_numpy(twins: Twins) -> None:
    for factored, ordinary in twins.pairs():
        assert_close(torch.from_numpy(factored.numpy()), torch.from_numpy(ordinary.numpy()))


def test_lists_and_numbers_of_python(twins: Twins) -> None:
    for factored, ordinary in twins.pairs():
        assert_close(torch.tensor(factored.tolist(), dtype=F64), ordinary)
        assert factored.sum().item() == pytest.approx(ordinary.sum().item(), rel=1e-9, abs=1e-12)


def test_a_clone(twins: Twins) -> None:
    for factored, ordinary in twins.pairs():
        assert_close(torch.clone(factored), torch.clone(ordinary))


def test_a_deep_copy(twins: Twins) -> None:
    for factored, ordinary in twins.pairs():
        assert_close(copy.deepcopy(factored), copy.deepcopy(ordinary))


def test_a_pickle(twins: Twins) -> None:
    for factored, ordinary in twins.pairs():
        assert_close(pickle.loads(pickle.dumps(factored)), ordinary)


def test_what_torch_promotes_is_promoted() -> None:
    twins = Twins(torch.float32)
    twins.backward()
    for gradient in twins.gradients():
        assert (gradient + torch.ones(N, D, dtype=F64)).dtype == F64
        assert bool((gradient / 0).isinf().any())


def test_asking_for_the_address_of_a_gradient_gives_that_of_its_numbers(twins: Twins) -> None:
    encoder, decoder = twins.ours.W_enc_T.grad, twins.ours.W_dec.grad
    assert isinstance(decoder, FactoredGradient)
    address = decoder.data_ptr()
    assert address == decoder.materialize().data_ptr() != 0
    assert decoder.untyped_storage().nbytes() == N * D * 8
    with pytest.raises(RuntimeError, match="data pointer"):
        torch._C._to_dlpack(encoder)


def test_it_says_what_it_is() -> None:
    W = torch.zeros(4, 3)
    rows = RowFactor(torch.ones(4, 3), None)
    assert repr(FactoredGradient([rows, rows], W)) == "FactoredGradient([4, 3], torch.float32, cpu: RowFactor)"
    assert repr(FactoredGradient([], W)) == "FactoredGradient([4, 3], torch.float32, cpu: zeros)"
    assert torch.equal(FactoredGradient([], W) + 1, torch.ones(4, 3))
