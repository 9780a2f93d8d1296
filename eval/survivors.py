"""What a compressed call did to each of its prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from vtc.report import Report
from vtc.visual import Layout, View


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
    """Tokens of some visual inputs, before and after; and what a drawing needs, if it is one input.

    That is `kept` and `sources`, as in `Report`, and `grid` (rows, columns) or, of what is not a single grid, `layout`.
    """
    layouts = [report.layouts[number] for number in numbers]
    counts: dict[str, Any] = {
        "tokens_in": sum(layout.tokens for layout in layouts),
        "tokens_out": sum(len(report.kept[number]) for number in numbers),
    }
    if len(layouts) != 1:
        return counts
    sources = report.sources[numbers[0]]
    drawn = {"kept": list(report.kept[numbers[0]]), "sources": sources and list(sources)}
    return {**counts, **_shape(layouts[0]), **drawn}


def _shape(layout: Layout) -> dict[str, Any]:
    (*others, view) = layout.views
    if not others and not layout.clip and view.rows * view.columns == layout.tokens:
        return {"grid": [view.rows, view.columns]}
    return {"layout": {"tokens": layout.tokens, "clip": layout.clip, "views": [asdict(one) for one in layout.views]}}


def layout_of(sample: Mapping[str, Any]) -> Layout | None:
    """The layout that a sample tells, if it does."""
    if "grid" in sample:
        return Layout.frames(1, *sample["grid"])
    if "layout" not in sample:
        return None
    told = sample["layout"]
    views = (View(**{**one, "crops": tuple(one["crops"]), "box": tuple(one["box"])}) for one in told["views"])
    return Layout(told["tokens"], tuple(views), told["clip"])
