"""Visual inputs of several layouts in one call: each group on its own, results in the order of the inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch

from vtc.choice import choose
from vtc.compressor import Compressor, parse
from vtc.errors import VtcError
from vtc.visual import Layout, Visual

SMALL, LARGE, TINY = Layout.frames(1, 2, 3), Layout.frames(1, 3, 4), Layout.frames(1, 1, 2)


@pytest.mark.parametrize("spec", ["fastervlm:keep=3", "divprune:keep=3", "pool:keep=3", "random:keep=3"])
def test_groups_by_layout_change_nothing(spec: str) -> None:
    layouts = [SMALL, LARGE, SMALL, TINY, LARGE]
    features = [
        torch.randn(layout.tokens, 8, generator=torch.Generator().manual_seed(n)) for n, layout in enumerate(layouts)
    ]
    compressor = parse(spec)
    budgets = [compressor.budget(layout) for layout in layouts]

    def look(layout: Layout, members: list[int], budget: int) -> Visual:
        stacked = torch.stack([features[number] for number in members])
        loaders = {"features": lambda: stacked, "saliency": lambda: stacked.norm(dim=2)[:, None]}
        return Visual(layout, len(members), stacked.device, loaders, budget)

    together = choose(compressor, layouts, budgets, look, validate=True)
    wanted = [[0, 2], [1, 4]] + ([[3]] if budgets[3] < 2 else [])
    assert [group.members for group in together] == wanted
    for group in together:
        assert group.dropped == layouts[group.members[0]].tokens - budgets[group.members[0]]
        for row, number in enumerate(group.members):

            def alone_look(layout: Layout, _: list[int], budget: int, number: int = number) -> Visual:
                return look(layout, [number], budget)

            (alone,) = choose(compressor, [layouts[number]], [budgets[number]], alone_look, validate=True)
            assert torch.equal(alone.selection.index[0], group.selection.index[row])
            assert torch.equal(alone.selection.matrix()[0], group.selection.matrix()[row])


def test_what_is_no_selection_is_refused() -> None:
    @dataclass(kw_only=True)
    class First(Compressor):
        """Returns indices."""

        name: ClassVar[str] = "first"

        def select(self, visual: Visual) -> Any:
            return torch.arange(3)[None]

    def look(layout: Layout, members: list[int], budget: int) -> Visual:
        return Visual(layout, len(members), torch.device("cpu"), {}, budget)

    with pytest.raises(VtcError, match=r"first: select\(\) must return a vtc\.Selection, .* not Tensor"):
        choose(First(keep=3), [SMALL], [3], look, validate=False)
