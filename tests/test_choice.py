"""Visual inputs of several layouts in one call: each group on its own, results in the order of the inputs."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from vtc.choice import choose
from vtc.compressor import parse
from vtc.visual import Layout

SMALL, LARGE, TINY = Layout.frames(1, 2, 3), Layout.frames(1, 3, 4), Layout.frames(1, 1, 2)


@pytest.mark.parametrize("spec", ["fastervlm:keep=3", "divprune:keep=3", "pool:keep=3", "random:keep=3"])
def test_groups_by_layout_change_nothing(spec: str) -> None:
    layouts = [SMALL, LARGE, SMALL, TINY, LARGE]
    features = [
        torch.randn(layout.tokens, 8, generator=torch.Generator().manual_seed(n)) for n, layout in enumerate(layouts)
    ]
    rows = [x.norm(dim=1)[None] for x in features]  # (1, N_i) each
    compressor = parse(spec)

    def saliency(members: Sequence[int]) -> Tensor:
        return torch.stack([rows[number] for number in members])

    together = choose(compressor, layouts, features, saliency, validate=True)
    kept_of_tiny = compressor.budget(TINY)
    assert [int(kept.sum()) for kept in together.kept] == [3, 3, 3, kept_of_tiny, 3]
    assert together.dropped == 3 + 9 + 3 + (2 - kept_of_tiny) + 9
    for number, layout in enumerate(layouts):
        alone = choose(compressor, [layout], [features[number]], lambda _, n=number: rows[n][None], validate=True)  # type: ignore[misc]
        assert torch.equal(alone.kept[0], together.kept[number])
        assert (alone.merged is None) == (together.merged is None) or layout is TINY
        if alone.merged is not None and together.merged is not None:
            assert torch.equal(alone.merged[0], together.merged[number])
