from __future__ import annotations

import pytest
import torch

from flashsae.metrics import LatentActivity, active_entries, direction_recovery, is_dead
from flashsae.ops.code import SparseCode
from flashsae.ops.pattern import Pattern


def test_dead_is_not_active_for_so_many_tokens() -> None:
    assert is_dead(torch.tensor([0, 9, 10, 11]), 10).tolist() == [False, False, True, True]


def code(acts: list[list[float]], indices: list[list[int]]) -> SparseCode:
    return SparseCode.topk(torch.tensor(acts), torch.tensor(indices), 4)


def test_activity_counts_values_other_than_zero_only() -> None:
    activity = LatentActivity(4)
    activity.update(code([[1.0, 0.0], [-2.0, 3.0]], [[0, 1], [0, 2]]))
    activity.update(code([[5.0, -0.0]], [[2, 3]]))
    assert activity.latent_density().tolist() == [2 / 3, 0.0, 2 / 3, 0.0]
    assert activity.l0() == pytest.approx(4 / 3)
    assert activity.tokens == 3


def test_active_entries_are_those_that_are_counted() -> None:
    tokens, latents, acts = active_entries(code([[1.0, 0.0], [-2.0, 3.0], [0.0, 0.0]], [[0, 1], [0, 2], [2, 3]]))
    assert (tokens.tolist(), latents.tolist(), acts.tolist()) == ([0, 1, 1], [0, 0, 2], [1.0, -2.0, 3.0])


@pytest.mark.parametrize("unused", [0.0, 7.0])
def test_in_a_code_of_varying_length_places_that_are_not_used_count_nowhere(unused: float) -> None:
    """Three tokens with 2, 0 and 1 latents, in a code with room for 5; a function of values may not keep 0."""
    pattern = Pattern.rows(torch.tensor([0, 3, 3, 4, 4]), torch.tensor([0, 2, 2, 3]), 4)
    varying = SparseCode(pattern, torch.tensor([1.0, 0.0, -2.0, unused, unused]))
    activity = LatentActivity(4)
    activity.update(varying)
    assert activity.latent_density().tolist() == [1 / 3, 0.0, 0.0, 1 / 3]
    assert (activity.l0(), activity.tokens) == (2 / 3, 3)
    tokens, latents, acts = active_entries(varying)
    assert (tokens.tolist(), latents.tolist(), acts.tolist()) == ([0, 2], [0, 3], [1.0, -2.0])


def test_direction_recovery_ignores_length_and_counts_each_direction() -> None:
    directions = torch.eye(4)
    W_dec = torch.cat([directions[:3] * 7, -directions[3:]])
    assert direction_recovery(W_dec, directions) == 0.75
    assert direction_recovery(torch.ones(2, 4), directions, cosine=0.5) == 0.0
    assert direction_recovery(torch.ones(2, 4), directions, cosine=0.49) == 1.0
