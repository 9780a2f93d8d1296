"""Running a compressor on the visual inputs of one call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from vtc.compressor import Compressor
from vtc.errors import VtcError
from vtc.selection import Selection
from vtc.visual import Layout, Visual


@dataclass(frozen=True)
class Group:
    """Visual inputs that shrank together: their numbers in the call, and their selection row by row."""

    members: list[int]
    selection: Selection

    @property
    def dropped(self) -> int:
        """Tokens that each of them lost."""
        return self.selection.size - self.selection.index.shape[1]


def choose(
    compressor: Compressor,
    layouts: Sequence[Layout],
    budgets: Sequence[int],
    look: Callable[[Layout, list[int], int], Visual],
    validate: bool,
) -> list[Group]:
    """Select among the visual inputs of a call, all of one layout at once. Inputs within their budget are left out.

    Args:
        compressor: the strategy.
        layouts: one per visual input.
        budgets: how many tokens of each may survive.
        look: makes what the strategy sees of the inputs with these numbers, which share a layout and a budget.
        validate: also check that indices ascend and are in range, which reads from the device.
    """
    alike: dict[tuple[Layout, int, int], list[int]] = {}
    for number, (layout, budget) in enumerate(zip(layouts, budgets, strict=True)):
        if budget < layout.tokens or (compressor.adaptive and layout.tokens):
            alike.setdefault((layout, budget, number if compressor.adaptive else -1), []).append(number)

    groups = []
    for (layout, budget, _), members in alike.items():
        with torch.no_grad():
            selection = compressor.select(look(layout, members, budget))
        _check(compressor, selection, layout, budget, len(members), validate)
        if selection.merges or selection.index.shape[1] < layout.tokens:
            groups.append(Group(members, selection))
    return groups


def _check(
    compressor: Compressor, selection: Selection, layout: Layout, budget: int, inputs: int, validate: bool
) -> None:
    if not isinstance(selection, Selection):
        raise VtcError(
            f"{compressor.name}: select() must return a vtc.Selection, for example vtc.Selection.keep(index, size), "
            f"not {type(selection).__name__}"
        )
    kept = selection.index.shape[1] if compressor.adaptive else budget
    if selection.size != layout.tokens or tuple(selection.index.shape) != (inputs, kept) or kept > layout.tokens:
        raise VtcError(
            f"{compressor.name} must keep {budget} of {layout.tokens} tokens of {inputs} visual inputs, but select() "
            f"returned an index of shape {tuple(selection.index.shape)} into {selection.size}"
        )
    if validate:
        index = selection.index
        if bool((index < 0).any() | (index >= layout.tokens).any() | (index[:, 1:] <= index[:, :-1]).any()):
            raise VtcError(
                f"{compressor.name}: the indices that select() returned are not ascending, unique and "
                f"within 0..{layout.tokens - 1}"
            )
