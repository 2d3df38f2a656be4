"""Log lines whose numbers are still on their way from the device."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import torch
from torch import Tensor

from flashsae.errors import DivergedError


class Records:
    """Keeps log lines until the device has their numbers, so that the host need not wait for it."""

    def __init__(self) -> None:
        self._pending: deque[tuple[dict[str, float], list[str], Tensor, torch.cuda.Event | None]] = deque()

    def add(self, known: dict[str, float], metrics: dict[str, Tensor]) -> None:
        """Begin a line.

        Args:
            known: what the host knows of the step.
            metrics: scalars on the device, copied before anything that is queued behind.
        """
        values, event = torch.stack([value.double() for value in metrics.values()]), None
        if values.is_cuda:
            values = torch.empty(values.shape, dtype=values.dtype, device="cpu", pin_memory=True).copy_(
                values, non_blocking=True
            )
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
        self._pending.append((known, list(metrics), values, event))

    def ready(self, *, wait: bool) -> Iterator[dict[str, float]]:
        """Yield the lines that are complete, oldest first; with `wait` all of them.

        Raises:
            DivergedError: a number is not finite.
        """
        while self._pending:
            known, names, values, event = self._pending[0]
            if event is not None:
                if wait:
                    event.synchronize()
                elif not event.query():  # type: ignore[no-untyped-call]
                    return
            self._pending.popleft()
            record = known | dict(zip(names, values.tolist()))
            if not bool(torch.isfinite(values).all()):
                raise DivergedError(
                    f"step {known['step']:.0f}: the loss is {record['loss']}, although the activations are finite: "
                    "training diverged. Lower lr, raise warmup_steps, or set clip_norm."
                )
            yield record
