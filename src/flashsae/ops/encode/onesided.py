"""The exact k of each token from bounds of all keys, of which a miss by the upper ones alone would show.

Keys are ordered by value, and of equal ones the lowest latent comes first; NaN is the largest key. Let e_j be the key
of latent j and u_j >= e_j its upper bound. *Any* k latents F are rescored, those of the largest centres. Let τ be the
smallest key in F, and i the last latent of F that has it.

*Which others may be selected.* All k of F come before a latent j outside of F if e_j < τ, or if e_j = τ and j > i: then
j is not selected. So if j is, either e_j > τ, whence u_j > τ; or e_j = τ and j < i, whence u_j > τ, or u_j = τ and
j < i. Those of which this holds of u_j, the extras, are rescored too: F and the extras hold the selection.

*What is listed before τ is known.* Bounds are there for some tokens at a time, while rescoring pays for many at once.
So extras are listed by a guess τ° at τ, some way below the smallest centre in F, and i° the last latent of F that may
have it: those with u_j > τ°, or u_j = τ° and j < i°. If they are too many, the largest bounds are listed, of equal ones
the lowest latents. Either way no latent that is left out has a bound above some r, and none below some q has the bound
r: τ° and i°, or what the first that does not fit has. Let τ' be the k-th largest key of all that was rescored, and i'
the last latent that is chosen with it. By the argument above, with the k chosen for F, no latent left out is selected
unless r > τ', or r = τ' and q < i'. Rows of which this holds are done as a whole. So nothing depends on the guess, and
latents without a bound are left out of it.

*What takes no list.* However many latents have one and the same bound that holds exactly, as all of a token of zeros
have where biases are equal, or all that a key of minus infinity masks: the first of them are in F, and all others stand
behind. The keys of a token of zeros are those of its biases: these are read in place of bounds. A bound of infinity
holds for NaN too, and counts as the largest key.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
from torch import Tensor

from flashsae.ops.decode.launch import launch_dots
from flashsae.ops.encode import onesided_kernels
from flashsae.ops.encode.keys import Keys
from flashsae.ops.encode.layout import Layout, tile_and_warps
from flashsae.ops.encode.product import Part
from flashsae.ops.encode.redo import no_rows, redo_rows

SHARE = 0.5
"""Of the error, by which the smallest key of the first k is guessed to lie below its centre: some six of its standard
deviations. Of more, lists were longer."""

ROUND = 8192
"""Tokens whose lists are kept and finished at once, at most: about 8 KB each."""


@dataclass(frozen=True)
class _Lists:
    """What is open of some tokens, as `encode_topk_open_kernel` writes it."""

    first: Tensor
    items: Tensor
    keys: Tensor
    rest: Tensor

    @classmethod
    def of(cls, tokens: int, layout: Layout, device: torch.device) -> _Lists:
        widths = layout.k, layout.capacity, layout.capacity, 2
        return cls(*(torch.empty(tokens, width, dtype=torch.int32, device=device) for width in widths))

    def part(self, start: int, stop: int) -> _Lists:
        return _Lists(*(x[start:stop] for x in (self.first, self.items, self.keys, self.rest)))


class OneSided:
    """A selection by upper bounds of keys, of some tokens after others.

    Args:
        x: [B, d], bfloat16 or float32.
        W: [d_sae, d], of the dtype of x. Values are float32 dot products of both, plus the bias.
        keys: what latents are selected by, packed.
        layout: k, and how latents are grouped: by 32.
        out: values [B, k], float32, and latents [B, k], int64, ascending: written to.
        counts: [B], int32: receives how many latents of each token were rescored, d_sae where it was done as a whole.
    """

    def __init__(
        self, x: Tensor, W: Tensor, keys: Keys, layout: Layout, out: tuple[Tensor, Tensor], counts: Tensor
    ) -> None:
        self.x, self.W, self.keys, self.layout, self.out, self.counts = x, W, keys, layout, out, counts
        self._lists: _Lists | None = None
        self._start = self._stop = 0

    def add(self, part: Part) -> None:
        """List what is open of the tokens of a part, which come behind those of the last one."""
        screened, tokens = part.screened, part.tokens
        assert screened is not None
        for start in range(tokens.start, tokens.stop, ROUND):
            stop = min(start + ROUND, tokens.stop)
            rows = slice(start - tokens.start, stop - tokens.start)
            some = replace(screened, maxima=screened.maxima[rows], of_tokens=screened.of_tokens[:, rows])
            self._add(Part(slice(start, stop), part.products[rows], None, some))

    def _add(self, part: Part) -> None:
        rows = part.tokens.stop - part.tokens.start
        if self._lists is None:
            self._lists = _Lists.of(min(len(self.x), ROUND), self.layout, self.x.device)
        elif self._stop + rows - self._start > len(self._lists.first):
            self.finish()
        first = self._stop - self._start
        self._list(part, self._lists.part(first, first + rows))
        self._stop += rows

    def _list(self, part: Part, lists: _Lists) -> None:
        screened, layout, keys, n = part.screened, self.layout, self.keys, len(self.W)
        assert screened is not None
        rows, k, device = len(lists.first), layout.k, self.x.device
        short, (tile, warps) = max(64, 2 * triton.next_power_of_2(k)), tile_and_warps(k)
        scratch = torch.empty(rows, 2, short, dtype=torch.int32, device=device)
        maxima, largest = screened.maxima, self.out[0][part.tokens]
        supers = maxima
        if layout.super > 1:
            supers, block = torch.empty(rows, layout.supers, dtype=torch.int32, device=device), 4096 // layout.super
            onesided_kernels.encode_topk_supers_kernel[(rows, triton.cdiv(layout.supers, block))](
                maxima, supers, layout.groups, layout.supers, maxima.stride(0),
                SUPER=layout.super, BLOCK=block, num_warps=4,
            )  # fmt: skip
        onesided_kernels.encode_topk_first_kernel[(rows,)](
            part.products, maxima, supers, scratch, largest, lists.first,
            n, k, layout.groups, layout.supers, part.products.stride(0), maxima.stride(0), supers.stride(0),
            GROUP=layout.group, SUPER=layout.super, BLOCK_S=layout.block_s, SHORT=short, TILE=tile, num_warps=warps,
        )  # fmt: skip
        onesided_kernels.encode_topk_open_kernel[(rows,)](
            part.products, maxima, screened.of_tokens, screened.of_latents, screened.of_groups,
            keys.b_enc, keys.scale, largest, lists.first, lists.items, lists.keys, self.counts[part.tokens], lists.rest,
            n, k, lists.items.shape[1] - k, layout.groups,
            part.products.stride(0), maxima.stride(0), screened.of_tokens.stride(0),
            GROUP=layout.group, BLOCK_K=triton.next_power_of_2(k), BLOCK_G=1024, PIECE=512 // layout.group,
            MAGNITUDE=keys.magnitude, SHARE=SHARE, num_warps=2,
        )  # fmt: skip

    def finish(self) -> None:
        """Rescore what is open of the tokens that were added, and select."""
        rows, lists = self._stop - self._start, self._lists
        if not rows or lists is None:
            return
        tokens = slice(self._start, self._stop)
        lists, x, counts, k = lists.part(0, rows), self.x[tokens], self.counts[tokens], self.layout.k
        out = self.out[0][tokens], self.out[1][tokens]
        W, keys, n, most = self.W, self.keys, len(self.W), lists.items.shape[1] - k
        dots, todo = launch_dots(x, lists.first, W), no_rows(rows, x.device)
        block = triton.next_power_of_2(k + most)
        extras = torch.empty_like(lists.items)
        extra_counts = torch.empty_like(counts)
        onesided_kernels.encode_topk_extras_kernel[(rows,)](
            lists.first, dots, lists.items, lists.keys, counts, keys.b_enc, keys.scale, extras, extra_counts, k, most,
            BLOCK_K=triton.next_power_of_2(k), BLOCK=block, MAGNITUDE=keys.magnitude, num_warps=max(1, block // 256),
        )  # fmt: skip
        extra_dots = launch_dots(x, extras, W, counts=extra_counts)
        onesided_kernels.encode_topk_merge_kernel[(rows,)](
            dots, extra_dots, lists.items, lists.rest, counts, todo, keys.b_enc, keys.scale, *out,
            n, k, most, BLOCK=block, MAGNITUDE=keys.magnitude, num_warps=max(1, block // 256),
        )  # fmt: skip
        redo_rows(x, W, keys, k, todo, out)
        self._start = self._stop
