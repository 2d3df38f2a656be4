"""What an entry of the registry is, and what the cases of one size share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.shapes import random_code, zipf_code
from flashsae.bench.ceilings import Ceilings, measure_ceilings
from flashsae.bench.measure import Subject
from flashsae.bench.peers import Peer
from flashsae.bench.problem import Problem, dense_code, make_problem
from flashsae.bench.setups import Shape
from flashsae.ops import SparseCode

DRAW = {"dense": dense_code, "random": random_code, "zipf": zipf_code}
"""Codes by kind: that of the problem itself, of latents equally likely, of latents by Zipf's law."""


class Size:
    """One size on one device, with what its cases share.

    Args:
        shape: the size.
        device: where.
        seconds: budget of one measurement, warm-up apart.
        memory_gbs: what the memory can do, by name: "copy" and "gather".
    """

    def __init__(self, shape: Shape, device: torch.device, seconds: float, memory_gbs: dict[str, float]) -> None:
        self.shape, self.device, self.seconds, self.memory_gbs = shape, device, seconds, memory_gbs
        self.medians: dict[str, float] = {}
        """Milliseconds of the cases measured so far, by name; of several precisions those of the first."""
        self._problem: Problem | None = None
        self._codes: dict[str, list[SparseCode]] = {}
        self._ceilings: dict[str, Ceilings] = {}

    def problem(self, dtype: torch.dtype) -> Problem:
        """Return the problem in a dtype; the last one is kept."""
        if self._problem is None or self._problem.W_dec.dtype != dtype:
            self.forget()
            self._problem = make_problem(self.shape, dtype, self.device)
        return self._problem

    def codes(self, dtype: torch.dtype, kind: str) -> list[SparseCode]:
        """Return one code of a kind for each input of the problem in a dtype."""
        problem = self.problem(dtype)
        if kind not in self._codes:
            self._codes[kind] = [DRAW[kind](problem, i) for i in range(len(problem.xs))]
        return self._codes[kind]

    def ceilings(self, precision: str) -> Ceilings:
        """Return what the device can do at this size, measured once for each precision."""
        if precision not in self._ceilings:
            self._ceilings[precision] = measure_ceilings(self.shape, precision, self.device, self.seconds)
        return self._ceilings[precision]

    def forget(self) -> None:
        """Let go of the problem and its codes, for cases that need the memory."""
        self._problem = None
        self._codes.clear()


@dataclass(frozen=True)
class Case:
    """An entry of the registry: one thing to measure at the sizes of its group.

    Args:
        name: as it stands in results.
        precision: likewise.
        build: makes it ready at a size.
        at: names of the sizes where it is measured; None: all of its group.
        ours: name of the case, measured before, whose time stands beside it as "ratio_to_ours".
        peer: whose it is, if it is a library's.
    """

    name: str
    precision: str
    build: Callable[[Size], Subject]
    at: tuple[str, ...] | None = None
    ours: str = ""
    peer: Peer | None = None


@dataclass(frozen=True)
class Group:
    """Cases that are measured together, and their sizes.

    Args:
        file: of results.
        sizes: small ones first.
        cases: in the order in which they are measured.
    """

    file: str
    sizes: tuple[Shape, ...]
    cases: tuple[Case, ...]
