from __future__ import annotations

import pytest
import torch

from flashsae.errors import DataError
from flashsae.logs.records import Records

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
def test_a_line_holds_what_the_device_had_when_it_began(device: str) -> None:
    records, value = Records(), torch.zeros((), device=device)
    records.add({"step": -1}, {"loss": value})  # allocates page-locked memory, for which the device is waited for
    assert len(list(records.ready(wait=True))) == 1
    for step in range(3):
        if device == "cuda":
            torch.cuda._sleep(1_000_000_000)  # half a second
        records.add({"step": step}, {"loss": value})
        value += 1
    if device == "cuda":
        assert list(records.ready(wait=False)) == []  # nobody waits for the device, which is far behind
    assert list(records.ready(wait=device == "cuda")) == [{"step": step, "loss": step} for step in range(3)]
    assert list(records.ready(wait=True)) == []


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_loss_that_is_not_finite_names_its_step(device: str, value: float) -> None:
    records = Records()
    records.add({"step": 7}, {"loss": torch.tensor(value, device=device), "fvu": torch.tensor(0.5, device=device)})
    with pytest.raises(DataError, match=f"step 7: the loss is {value}"):
        list(records.ready(wait=True))
