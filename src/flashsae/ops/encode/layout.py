"""How the latents of a row are cut up for a selection, and how much of them a program looks at."""

from __future__ import annotations

from dataclasses import dataclass

import triton


@dataclass(frozen=True)
class Layout:
    """How the latents of a row are cut into groups for one selection.

    At least k groups, else the k-th largest group maximum says nothing; large groups, so that maxima are few. Groups
    are again cut into supers by the same rule, so that a program looks at few numbers at a time.
    """

    k: int
    group: int
    groups: int
    super: int
    supers: int

    @classmethod
    def of(cls, n: int, k: int) -> Layout:
        """Return the layout for k of n latents."""
        group = 32
        while group > 1 and n < 2 * k * group:
            group //= 2
        groups = triton.cdiv(n, group)
        over = 16
        while over > 1 and (groups < 4 * k * over or groups < 64 * over):
            over //= 2
        return cls(k, group, groups, over, triton.cdiv(groups, over))

    @property
    def block_g(self) -> int:
        """Maxima that a program of the certified selection holds at once."""
        return int(min(4096, triton.next_power_of_2(self.groups)))

    @property
    def block_s(self) -> int:
        """Maxima of supers that a program holds at once."""
        return int(min(2048, triton.next_power_of_2(self.supers)))

    @property
    def capacity(self) -> int:
        """Candidates kept for each token in certified float32."""
        return int(max(512, 4 * triton.next_power_of_2(self.k)))


def tile_and_warps(k: int) -> tuple[int, int]:
    """Return how many keys a program of the selection looks at once, and its warps, as measured (LOG.md)."""
    if k <= 128:
        return 256, 1 if k <= 64 else 2
    return 1024 if k < 512 else 2048, 4
