from __future__ import annotations

import torch

from flashsae.train.dead import DeadLatents


def test_dead_counts_tokens_and_selected_zeros_do_not_count() -> None:
    dead = DeadLatents(3, after_tokens=4)
    dead.update(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[0, 1], [1, 0]]))
    assert dead.tokens_since_fired.tolist() == [0, 2, 2]
    assert dead.mask().tolist() == [False, False, False]
    dead.update(torch.tensor([[0.5], [0.5]]), torch.tensor([[1], [1]]))
    assert dead.tokens_since_fired.tolist() == [2, 0, 4]
    assert dead.mask().tolist() == [False, False, True]
    dead.update(torch.tensor([[0.5]]), torch.tensor([[2]]))
    assert dead.mask().tolist() == [False, False, False]
