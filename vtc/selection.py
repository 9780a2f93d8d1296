"""`Selection`: which tokens survive and where the others went. The only currency between the parts of the library."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vtc.kernels import merge


@dataclass(frozen=True)
class Selection:
    """A sparse token map `Y = W X` from `size` tokens to `K` survivors, for a batch of visual inputs of one layout.

    Pruning keeps rows as they are (`W` is one-hot); merging lists the entries of `W` as triples, so that a token may go
    to no survivor, to one, or to several.

    Attributes:
        index: `(B, K)` int64, ascending and unique per row: the place, among the `size` tokens, where each survivor
            stands. A merged token stands where its anchor stood; this is what positions and pictures use. `K` is 0
            where all tokens are dropped.
        size: number of tokens before, `N`.
        slot: `(B, E)` int64 in `[0, K)`: the survivor that entry `e` contributes to. `None` for pruning.
        source: `(B, E)` int64 in `[0, N)`: the token that entry `e` takes from. `None` for pruning.
        weight: `(B, E)` float: how much of it. `None` for pruning.
    """

    index: Tensor
    size: int
    slot: Tensor | None = None
    source: Tensor | None = None
    weight: Tensor | None = None

    def __post_init__(self) -> None:
        if self.index.ndim != 2 or self.index.dtype != torch.long:
            raise ValueError(f"index must be int64 of shape (B, K), got {self.index.dtype} {tuple(self.index.shape)}")
        entries = (self.slot, self.source, self.weight)
        if any(entry is None for entry in entries) and any(entry is not None for entry in entries):
            raise ValueError("slot, source and weight go together: give all three (merging) or none (pruning)")
        if self.slot is not None and not (self.slot.shape == self.source.shape == self.weight.shape):  # type: ignore[union-attr]
            raise ValueError("slot, source and weight must have the same shape (B, E)")

    @classmethod
    def keep(cls, index: Tensor, size: int) -> Selection:
        """Pruning: keep the tokens at `index` `(B, K)`, in any order; they are put into raster order."""
        return cls(index.sort(dim=1).values, size)

    @property
    def merges(self) -> bool:
        """Whether survivors are weighted sums of tokens rather than tokens."""
        return self.slot is not None

    def row(self, number: int) -> Selection:
        """The selection of one visual input of the batch."""
        parts = (self.slot, self.source, self.weight)
        return Selection(
            self.index[number : number + 1], self.size, *(x if x is None else x[number : number + 1] for x in parts)
        )

    def take(self, x: Tensor, dim: int = 1) -> Tensor:
        """Gather the survivors' rows along `dim`: for positions, masks and ids, which must never be averaged.

        `x` is `(B, N, ...)` for `dim=1`; the result has `K` in place of `N`.
        """
        dim %= x.ndim
        shape = [1] * x.ndim
        shape[0], shape[dim] = self.index.shape
        index = self.index.view(shape).expand(*x.shape[:dim], self.index.shape[1], *x.shape[dim + 1 :])
        return x.gather(dim, index)

    def apply(self, x: Tensor) -> Tensor:
        """Map features `(B, N, C)` to `(B, K, C)`: a gather when pruning, weighted sums (in float32) when merging."""
        if self.slot is None or self.source is None or self.weight is None:
            return self.take(x)
        return merge(x, self.slot, self.source, self.weight, self.index.shape[1])

    def matrix(self) -> Tensor:
        """`W` written out, `(B, K, N)` float32."""
        batch, kept = self.index.shape
        dense = torch.zeros(batch, kept * self.size, dtype=torch.float32, device=self.index.device)
        slot, source, weight = self._entries()
        return dense.scatter_add_(1, slot * self.size + source, weight).view(batch, kept, self.size)

    def then(self, other: Selection) -> Selection:
        """The selection that does `self` first and `other` on what is left."""
        if other.size != self.index.shape[1]:
            raise ValueError(
                f"cannot compose: the first keeps {self.index.shape[1]} tokens, the second expects {other.size}"
            )
        index = self.index.gather(1, other.index)
        if not index.shape[1]:  # nothing survives for an entry to go to
            return Selection(index, self.size)
        if not self.merges:
            source = None if other.source is None else self.index.gather(1, other.source)
            return Selection(index, self.size, other.slot, source, other.weight)
        if not other.merges:  # entries keep their weight if their survivor survives
            slot = torch.full_like(self.index, -1).scatter_(1, other.index, _counting(other.index))
            slot = slot.gather(1, self.slot)  # type: ignore[arg-type]
            return Selection(index, self.size, slot.clamp(min=0), self.source, self.weight * (slot >= 0))  # type: ignore[operator]
        weight = other.matrix() @ self.matrix()  # (B, K2, N)
        batch, kept, size = weight.shape
        cell = torch.arange(kept * size, device=weight.device).expand(batch, -1)
        return Selection(index, self.size, cell // size, cell % size, weight.flatten(1))

    def sources(self) -> Tensor:
        """`(B, N)` int64: the survivor each token contributed most to, -1 for tokens that were dropped."""
        if not self.index.shape[1]:
            return torch.full((self.index.shape[0], self.size), -1, device=self.index.device)
        weight, slot = self.matrix().max(dim=1)
        return torch.where(weight > 0, slot, -1)

    def _entries(self) -> tuple[Tensor, Tensor, Tensor]:
        if self.slot is not None and self.source is not None and self.weight is not None:
            return self.slot, self.source, self.weight.float()
        return _counting(self.index), self.index, torch.ones_like(self.index, dtype=torch.float32)


def _counting(index: Tensor) -> Tensor:
    """`(B, K)`: 0 to K - 1 in every row."""
    return torch.arange(index.shape[1], device=index.device).expand_as(index)
