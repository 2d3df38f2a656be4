"""What FactoredAdam refuses: settings out of range, of the constructor and of groups, and parameters it cannot take."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from flashsae.errors import ConfigError, DtypeError, ShapeError
from flashsae.optim import FactoredAdam

LR = 1e-2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": -1.0}, r"lr, eps, weight_decay: expected numbers that are not negative, .* got -1\.0"),
        ({"lr": float("nan")}, "lr, eps, weight_decay: .* got nan"),
        ({"eps": -1e-8}, r"lr, eps, weight_decay: .* got 0\.01, -1e-08"),
        ({"weight_decay": -0.1}, "lr, eps, weight_decay"),
        ({"betas": (1.0, 0.999)}, r"betas in \[0, 1\), got .* \(1\.0, 0\.999\)"),
        ({"betas": (0.9, -0.1)}, r"betas in \[0, 1\)"),
        (
            {"state_dtype": torch.float16},
            r"state_dtype: expected torch\.float32 or torch\.bfloat16, got torch\.float16",
        ),
    ],
)
def test_settings_out_of_range_are_named_of_the_optimiser_and_of_a_group(changes: dict[str, Any], message: str) -> None:
    parameter = nn.Parameter(torch.zeros(3, 2))
    with pytest.raises(ConfigError, match=message):
        FactoredAdam([parameter], **{"lr": LR, **changes})
    with pytest.raises(ConfigError, match=message):
        FactoredAdam([{"params": [parameter], **changes}], LR)


def test_a_group_of_settings_out_of_range_leaves_the_optimiser_as_it_was() -> None:
    first, second = nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.ones(3, 2))
    optimizer = FactoredAdam([first], LR)
    with pytest.raises(ConfigError, match="lr, eps, weight_decay"):
        optimizer.add_param_group({"params": [second], "lr": -1.0})
    first.grad, second.grad = torch.ones(3, 2), torch.ones(3, 2)
    optimizer.step()
    assert [group["params"] for group in optimizer.param_groups] == [[first]]
    assert bool((first < 1).all())
    assert torch.equal(second, torch.ones(3, 2))


def test_a_group_that_cannot_be_split_leaves_nothing_behind() -> None:
    optimizer = FactoredAdam([nn.Parameter(torch.ones(2, 3))], LR)
    with pytest.raises(DtypeError, match="split_weights: expected float32"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2, 3).double())], "split_weights": True})
    assert len(optimizer.param_groups) == 1
    optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_weights_that_cannot_be_split_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(DtypeError, match=f"split_weights: expected float32 parameters, got {dtype}"):
        FactoredAdam([nn.Parameter(torch.zeros(3, 2, dtype=dtype))], LR, split_weights=True)


@pytest.mark.parametrize("values", [torch.zeros(3, 2).T, torch.zeros(6)[::2]], ids=["transposed", "strided"])
def test_parameters_that_are_not_contiguous_are_refused(values: torch.Tensor) -> None:
    with pytest.raises(ShapeError, match="params: expected contiguous parameters, got one of shape"):
        FactoredAdam([nn.Parameter(values)], LR)
