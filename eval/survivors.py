"""What a compressed call did to each of its prompts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from vtc.report import Report


def owners(report: Report, visual: Mapping[str, Sequence[int]]) -> list[list[int]]:
    """Per prompt of a call the numbers of its visual inputs, from the visual tokens of each prompt by modality.

    Visual inputs come in the order of their placeholders, so each prompt's are as many as fill its own.
    """
    prompts = len(next(iter(visual.values())))
    found: list[list[int]] = [[] for _ in range(prompts)]
    for kind, counts in visual.items():
        numbers = [number for number, one in enumerate(report.modalities) if one == kind]
        for prompt, count in enumerate(counts):
            while count > 0 and numbers:
                found[prompt].append(numbers[0])
                count -= report.layouts[numbers.pop(0)].tokens
            if count:
                raise RuntimeError(f"{report.spec}: the report of the {kind}s does not fit the prompts")
    return found


def survivors(report: Report, numbers: Sequence[int]) -> dict[str, Any]:
    """Tokens of some visual inputs, before and after; and what a drawing needs, if that is one picture of one grid."""
    layouts = [report.layouts[number] for number in numbers]
    counts: dict[str, Any] = {
        "tokens_in": sum(layout.tokens for layout in layouts),
        "tokens_out": sum(len(report.kept[number]) for number in numbers),
    }
    if len(layouts) != 1 or report.modalities[numbers[0]] != "image":
        return counts
    grid = layouts[0].grid
    if grid[0] != 1 or layouts[0].tokens != math.prod(grid):
        return counts
    sources = report.sources[numbers[0]]
    kept = list(report.kept[numbers[0]])
    return {**counts, "grid": list(grid[1:]), "kept": kept, "sources": sources and list(sources)}
