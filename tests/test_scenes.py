"""What scenes look like; what all bundled evaluation sets share is tested in `test_tasks.py`."""

from __future__ import annotations

import numpy as np

from vtc.eval import scenes
from vtc.eval.content import apart


def test_pictures_have_one_size() -> None:
    assert {item.image.size for item in scenes.questions("test", 50)} == {(128, 128)}


def test_owner_map_points_at_the_things() -> None:
    share = []
    for seed in range(100):
        scene = scenes.Scenes("val")[seed]
        assert set(np.unique(scene.owner)) - {0} == set(range(1, len(scene.things) + 1))
        for i, thing in enumerate(scene.things):
            rows, columns = np.nonzero(scene.owner == i + 1)
            left, top, right, bottom = (edge / 8 for edge in thing.box)
            assert rows.min() >= int(top) and rows.max() < bottom
            assert columns.min() >= int(left) and columns.max() < right
        share.append((scene.owner > 0).mean())
    assert 0.1 < np.mean(share) < 0.2  # neither everything nor nothing: that is what makes pruning worth testing


def test_things_do_not_overlap_and_differ_from_the_background() -> None:
    for seed in range(100):
        scene = scenes.Scenes("test")[seed]
        for i, a in enumerate(scene.things):
            left, top, right, bottom = a.box
            assert 0 <= left < right <= 128 and 0 <= top < bottom <= 128
            assert all(apart(a.box, b.box, scenes.GAP) for b in scene.things[:i])
