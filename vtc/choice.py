"""Running a compressor on the visual inputs of one call."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vtc.compressor import Compressor
from vtc.errors import VtcError
from vtc.selection import Selection
from vtc.visual import Layout, Visual


@dataclass(frozen=True)
class Choice:
    """What was decided about the visual inputs of one call, in the order of their placeholders.

    Attributes:
        layouts: one per visual input.
        groups: for every layout that had to shrink, the numbers of its inputs and their selection, row by row.
        kept: `(N_i,)` bool per visual input.
        merged: `(K_i, D)` per visual input, if the strategy changes features; else `None`.
        dropped: number of tokens dropped in all.
    """

    layouts: Sequence[Layout]
    groups: Mapping[Layout, tuple[list[int], Selection]]
    kept: list[Tensor]
    merged: list[Tensor] | None
    dropped: int


def choose(
    compressor: Compressor,
    layouts: Sequence[Layout],
    features: Sequence[Tensor],
    saliency: Callable[[Sequence[int]], Tensor],
    validate: bool,
) -> Choice:
    """Select among the visual inputs of a call, all of one layout at once.

    Args:
        compressor: the strategy.
        layouts: one per visual input.
        features: projected features, `(N_i, D)` per visual input.
        saliency: makes the rows of the visual inputs with these numbers, `(B, R, N)`.
        validate: also check that indices ascend and are in range, which reads from the device.
    """
    numbers: dict[Layout, list[int]] = {}
    for number, layout in enumerate(layouts):
        numbers.setdefault(layout, []).append(number)

    groups: dict[Layout, tuple[list[int], Selection]] = {}
    kept: list[Tensor] = [torch.ones(len(x), dtype=torch.bool, device=x.device) for x in features]
    dropped = 0
    for layout, members in numbers.items():
        budget = compressor.budget(layout)
        if budget >= layout.tokens:
            continue
        visual = _visual(compressor, layout, members, features, saliency)
        with torch.no_grad():
            selection = compressor.select(visual)
        _check(compressor, selection, layout, budget, len(members), validate)
        groups[layout] = (members, selection)
        dropped += (layout.tokens - budget) * len(members)
        flags = torch.zeros(len(members), layout.tokens, dtype=torch.bool, device=selection.index.device)
        for number, row in zip(members, flags.scatter_(1, selection.index, True), strict=True):
            kept[number] = row

    merged = None
    if any(selection.merges for _, selection in groups.values()):
        merged = list(features)
        for members, selection in groups.values():
            rows = selection.apply(torch.stack([features[number] for number in members]))
            for number, row in zip(members, rows, strict=True):
                merged[number] = row
    return Choice(layouts, groups, kept, merged, dropped)


def _visual(
    compressor: Compressor,
    layout: Layout,
    members: list[int],
    features: Sequence[Tensor],
    saliency: Callable[[Sequence[int]], Tensor],
) -> Visual:
    loaders: dict[str, Callable[[], Tensor]] = {}
    if "features" in compressor.needs:
        loaders["features"] = lambda: torch.stack([features[number] for number in members]).detach()
    if compressor.needs & {"cls", "received"}:
        loaders["saliency"] = lambda: saliency(members)
    return Visual(layout, len(members), features[members[0]].device, loaders)


def _check(
    compressor: Compressor, selection: Selection, layout: Layout, budget: int, inputs: int, validate: bool
) -> None:
    if selection.size != layout.tokens or tuple(selection.index.shape) != (inputs, budget):
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
