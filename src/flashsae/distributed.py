"""Where devices that train one SAE together would meet. There is one for now: functions return what they are given.

What a step needs of the whole batch passes through here, so that nothing else has to know how many devices there are:
factors, the clipping norm, dead latents, the weight of a token, the variance, the largest of a batch.
What would be exchanged is small: factors of gradients, O(tokens · (k + d)), counts, and one number each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from torch import Tensor

Factor = TypeVar("Factor")


def joined(factors: Sequence[Factor]) -> Sequence[Factor]:
    """Return the factors of a gradient that all devices left, for the latents of this one."""
    return factors


def summed(tensor: Tensor) -> Tensor:
    """Return the sum over all devices: of squared norms, of counts of active tokens, of histograms of keys."""
    return tensor


def tokens_of(tokens: int) -> int:
    """Return how many tokens the batch has of which this device has so many."""
    return tokens


def averaged(number: float) -> float:
    """Return the mean over all devices, such as of the variance of a sample."""
    return number


def largest(keys: Tensor, wanted: int) -> Tensor:
    """Return which keys of this device are among the `wanted` largest of all, ascending; of equal ones the first.

    Args:
        keys: [n].
        wanted: of all devices together; on one, no more than n.
    """
    return keys.sort(descending=True, stable=True).indices[:wanted].sort().values
