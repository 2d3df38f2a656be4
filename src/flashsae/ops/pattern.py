"""Which latents of which token (the pattern), and the same by latent on request (its index)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flashsae.errors import ConfigError, ShapeError
from flashsae.ops.latent_index import LatentIndex as LatentIndex
from flashsae.ops.latent_index import check_index as check_index
from flashsae.ops.validate import (
    as_int,
    check_device,
    check_indices,
    check_shape,
    has_values,
)
from flashsae.profiling import part


@dataclass(frozen=True, eq=False)
class Pattern:
    """Which latents of which token. Two kinds: the same number k for every token, or a number that varies.

    A full pattern is of the first kind: every latent of every token. Operations take its codes as dense matrices.

    Args:
        latents: fixed k: [B, k], int32 | int64, each in [0, d_sae). Varying: [capacity], int32, by token, then
            ascending; places that are not used stand at the end and hold d_sae.
        d_sae: number of latents.
        starts: [B + 1], int32: token t owns latents[starts[t]:starts[t + 1]]. None for fixed k.
        count: scalar, int64, on the device: how many entries were wanted; more than the capacity if it overflowed, when
            the first of them are there. None where the capacity is exact by construction.
        is_full: whether it is that of `Pattern.full`, latents 0, 1, ... of each token in this order.
        ascends: fixed k: that the latents of each token ascend is known, and need not be looked at.

    `Pattern.topk` and `Pattern.rows` make one of somebody's own indices and check them, `Pattern.full` one of all
    latents; this constructor looks at shapes alone.
    """

    latents: Tensor
    d_sae: int
    starts: Tensor | None = None
    count: Tensor | None = None
    is_full: bool = False
    ascends: bool = field(default=False, kw_only=True)
    _built: list[tuple[LatentIndex, tuple[int | None, ...]]] = field(default_factory=list, init=False, repr=False)
    # the index once somebody has asked for it, and how often its memory had been written to by then
    _ordered: list[tuple[Pattern, Tensor, tuple[int | None, ...]]] = field(default_factory=list, init=False, repr=False)
    # what this is in another order, and that order
    _owners: list[tuple[Tensor, int]] = field(default_factory=list, init=False, repr=False)
    # the token of each place once somebody has asked for it on a GPU, and how often starts had been written to by then

    def __post_init__(self) -> None:
        check_shape("latents", self.latents, ("B", "k") if self.starts is None else ("capacity",))
        if self.starts is not None:
            check_shape("starts", self.starts, ("B + 1",))
        if not self.is_full and has_values(self.latents) and self.latents.numel() >= 2**31:
            raise ShapeError(f"latents: expected fewer than 2**31, got {self.latents.numel()}: use fewer tokens.")

    @classmethod
    def topk(cls, top_indices: Tensor, d_sae: int) -> Pattern:
        """Return the pattern of k latents for each token.

        Args:
            top_indices: [B, k], int32 | int64, each in [0, d_sae). Need not be sorted; repeats within a row add up.
            d_sae: number of latents.
        Raises:
            ShapeError, DtypeError, ConfigError: they are not that. The range is checked on the CPU only.
        """
        check_shape("top_indices", top_indices, ("B", "k"))
        d_sae = _as_d_sae(d_sae)
        check_indices("top_indices", top_indices, d_sae)
        return cls(top_indices, d_sae)

    @classmethod
    def rows(cls, latents: Tensor, starts: Tensor, d_sae: int) -> Pattern:
        """Return the pattern of tokens with any number of latents each.

        Args:
            latents: [capacity], int32 | int64: by token, ascending within it, each at most once; behind starts[B]
                places may be left over, which hold d_sae.
            starts: [B + 1], int32 | int64, ascending from 0: token t owns latents[starts[t]:starts[t + 1]].
            d_sae: number of latents.
        Raises:
            ShapeError, DtypeError, ConfigError: they are not that. Numbers are checked on the CPU only.
        """
        check_shape("latents", latents, ("capacity",))
        check_shape("starts", starts, ("B + 1",))
        check_device("starts", starts, latents, "latents")
        d_sae = _as_d_sae(d_sae)
        if len(starts) == 0:
            raise ShapeError("starts: expected at least one number, the 0 that the first token starts at, got none.")
        check_indices("latents", latents, d_sae + 1)
        check_indices("starts", starts, len(latents) + 1)
        pattern = cls(latents.to(torch.int32), d_sae, starts.to(torch.int32))
        if latents.device.type == "cpu" and has_values(latents):
            _check_rows(pattern)
        return pattern

    @classmethod
    def full(
        cls, B: int, d_sae: int, *, device: torch.device | str | None = None, count: Tensor | None = None
    ) -> Pattern:
        """Return the pattern of every latent of every token, whose codes have acts [B, d_sae]: no memory for latents.

        Args:
            B: number of tokens.
            d_sae: number of latents.
            device: of the acts; None is the default device.
            count: how many of the entries were wanted, for whoever goes by it: a scalar, int64, on the device.
        Raises:
            ConfigError, DtypeError: B or d_sae is no such number.
        """
        B, d_sae = as_int("B", B), _as_d_sae(d_sae)
        if B < 0:
            raise ConfigError(f"B: expected a number of tokens, got {B}.")
        latents = torch.arange(d_sae, dtype=torch.int64, device=device).expand(B, d_sae)
        return cls(latents, d_sae, None, count, is_full=True)

    @classmethod
    def of_tensors(cls, tensors: Sequence[Tensor], d_sae: int, rows: Tensor) -> Pattern:
        """Return the pattern whose `tensors` these are; `rows` has one for each token."""
        if not tensors:
            return cls.full(len(rows), d_sae, device=rows.device)
        return cls(tensors[0], d_sae, tensors[1] if len(tensors) > 1 else None)

    @property
    def B(self) -> int:
        """Number of tokens."""
        return self.latents.shape[0] if self.starts is None else self.starts.shape[0] - 1

    @property
    def k(self) -> int | None:
        """Latents of each token; None where they vary."""
        return self.latents.shape[1] if self.starts is None else None

    @property
    def capacity(self) -> int:
        """Number of places, used or not."""
        return self.latents.numel()

    @property
    def width(self) -> int:
        """Places a token, on average, rounded up."""
        return self.k if self.k is not None else -(-self.capacity // max(1, self.B))

    @property
    def tokens(self) -> Tensor:
        """Token of each place: [capacity]; B where it is not used."""
        device = self.latents.device
        if self.starts is None:
            tokens = torch.arange(self.B, dtype=torch.int64, device=device)
            return tokens.repeat_interleave(self.latents.shape[1])
        version = _version(self.starts)
        if device.type == "cpu" or version is None:  # somebody may write to starts, and nobody counts it
            return self._searched()
        if not self._owners or self._owners[0][1] != version:
            with _kept():
                self._owners[:] = [(self._searched(), version)]
        return self._owners[0][0]

    def _searched(self) -> Tensor:
        assert self.starts is not None
        places = torch.arange(self.capacity, dtype=torch.int32, device=self.starts.device)
        return torch.searchsorted(self.starts[1:].contiguous(), places, right=True, out_int32=True)

    @property
    def counts(self) -> Tensor:
        """Latents of each token: [B]."""
        if self.starts is None:
            return torch.full((self.B,), self.latents.shape[1], dtype=torch.int32, device=self.latents.device)
        return self.starts.diff()

    @property
    def overflowed(self) -> Tensor | None:
        """Whether more entries were wanted than there are places: a scalar on the device; None where they never are."""
        return None if self.count is None else self.count > self.capacity

    @property
    def left_out(self) -> Tensor | None:
        """How many of the entries that were wanted found no place: a scalar on the device; None where none ever is."""
        return None if self.count is None else (self.count - self.capacity).clamp_min(0)

    @property
    def tensors(self) -> list[Tensor]:
        """Latents, and starts where there are any, as operators take them; none of a full pattern."""
        if self.is_full:
            return []
        return [self.latents] if self.starts is None else [self.latents, self.starts]

    @property
    def index(self) -> LatentIndex:
        """The lists by latent: built once, for whoever asks first, and again after somebody has written to the memory.

        Cost: one stable sort of as many keys of 32 bits, or 16, as there are places, and a binary search for each
            latent. No wait for the device. Of a full pattern no sort, but B·d_sae numbers: nothing here asks for it.
        Source: compressed sparse columns; ours: the lists serve every latent-major pass of a step.
        """
        if not has_values(self.latents):  # writes are not counted while tracing, and what is traced is of one call
            return self._sorted()
        versions = tuple(_version(tensor) for tensor in self.tensors)
        for index, known in self._built:
            if known == versions and self._is_of(index, versions):
                return index
        with part("index"), _kept():
            index = self._moved_index() or self._sorted()
        self._built[:] = [(index, versions)]
        return index

    def in_order(self, order: Tensor) -> Pattern:
        """Return the same latents of each token in another order, which shares the sort that the index takes.

        Args:
            order: [B, k], int64: for each new place of a token its old one.
        """
        other = Pattern(self.latents.gather(1, order), self.d_sae)
        other._ordered.append((self, order, (_version(self.latents), _version(order), _version(other.latents))))
        return other

    def _moved_index(self) -> LatentIndex | None:
        """Return the index of the pattern that this one is in another order, with its entries where they went."""
        for other, order, known in self._ordered:
            if None not in known and known == tuple(map(_version, (other.latents, order, self.latents))):
                places = torch.arange(self.width, dtype=torch.int64, device=order.device).expand_as(order)
                new = self.tokens.view_as(order) * self.width + torch.empty_like(order).scatter_(1, order, places)
                index = other.index
                return index._replace(entries=new.flatten()[index.entries])
        return None

    def _sorted(self) -> LatentIndex:
        if not self.is_full:
            tokens = None if self.starts is None else self.tokens
            return LatentIndex.of_entries(self.latents.reshape(-1), self.d_sae, k=self.k, tokens=tokens)
        if self.capacity >= 2**31:
            raise ShapeError(f"index: expected fewer than 2**31 entries, got {self.capacity}: use fewer tokens.")
        device = self.latents.device
        entries = torch.arange(self.capacity, dtype=torch.int64, device=device).view(self.B, self.d_sae).T.reshape(-1)
        numbers = torch.arange(self.d_sae + 1, dtype=torch.int32, device=device)
        return LatentIndex(entries, numbers[:-1].repeat_interleave(self.B), numbers * self.B, self.d_sae)

    def _is_of(self, index: LatentIndex, versions: tuple[int | None, ...]) -> bool:
        """Tell whether an index is still that of this pattern.

        Writes through .data or NumPy are not counted, nor any in inference mode: on the CPU the numbers tell. A GPU
        would make the host wait: there an index is built again where nothing is counted.
        """
        if self.is_full:  # nobody can write to latents that stand for those of all tokens
            return True
        if self.latents.device.type != "cpu":
            return None not in versions
        is_same = torch.equal(index.by_entry, self.latents.reshape(-1).long())
        return is_same and (index.tokens is None or torch.equal(index.tokens, self.tokens[index.entries]))

    def check(self, name: str = "latents") -> None:
        """Raise ShapeError, on the CPU, if a latent is out of range: somebody may have written to them."""
        if not self.is_full:
            check_indices(name, self.latents, self.d_sae + (self.starts is not None))


def _as_d_sae(d_sae: int) -> int:
    d_sae = as_int("d_sae", d_sae)
    if d_sae < 1:
        raise ConfigError(f"d_sae: expected a positive int, got {d_sae}.")
    return d_sae


def _check_rows(pattern: Pattern) -> None:
    """Raise ShapeError unless rows are as `Pattern.rows` asks for them. Looks at numbers."""
    latents, starts = pattern.latents, pattern.starts
    assert starts is not None
    if int(starts[0]) != 0 or bool((starts.diff() < 0).any()):
        raise ShapeError(f"starts: expected numbers that ascend from 0, got {starts[:5].tolist()} and so on.")
    used = int(starts[-1])
    if bool((latents[:used] == pattern.d_sae).any()) or bool((latents[used:] != pattern.d_sae).any()):
        raise ShapeError(
            f"latents: expected latents below {pattern.d_sae} in the first {used} places, which starts says are used, "
            f"and {pattern.d_sae} in the others."
        )
    keys = pattern.tokens[:used].long() * pattern.d_sae + latents[:used]
    if bool((keys.diff() <= 0).any()):
        raise ShapeError(
            "latents: expected those of a token to ascend, each at most once: sort them within each token."
        )


def _kept() -> AbstractContextManager[None]:
    """Let tensors that are made within serve whoever asks next, who may want gradients: none is one of inference."""
    return torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext()


def _version(tensor: Tensor) -> int | None:
    """Return how often the memory of a tensor was written to; None where PyTorch does not count it, as in tracing."""
    return None if not has_values(tensor) or tensor.is_inference() else tensor._version
