"""What pictures of many sizes and clips look like; what all bundled sets share is tested in `test_tasks.py`."""

from __future__ import annotations

import numpy as np
import pytest

from vtc.eval import sizes
from vtc.eval.content import apart
from vtc.eval.scenes import GAP


def test_media_have_many_sizes() -> None:
    items = list(sizes.questions("test"))
    pictures = [item.image.size for item in items if item.images]
    assert {side % sizes.CELL for size in pictures for side in size} == {0}
    assert {min(side) for side in zip(*pictures, strict=True)} == {64} and max(map(max, pictures)) == 192
    assert max(map(max, pictures)) / min(map(min, pictures)) == 3 and len(set(pictures)) > 50
    clips = {clip.shape[:3] for item in items for clip in item.clips}
    assert clips == set(sizes.CLIPS)
    assert 0.2 < sum(bool(item.clips) for item in items) / len(items) < 0.5


def test_things_stay_inside_and_apart() -> None:
    for seed in range(100):
        scene = sizes.Scenes("test")[seed]
        length, height, width, _ = scene.frames.shape
        for i, thing in enumerate(scene.things):
            left, top, right, bottom = thing.swept
            assert 0 <= left < right <= width and 0 <= top < bottom <= height
            assert 0 <= thing.seen[0] < thing.seen[1] <= length
            for other in scene.things[:i]:
                together = thing.seen[0] < other.seen[1] and other.seen[0] < thing.seen[1]
                assert not together or apart(thing.swept, other.swept, GAP)


def test_frames_and_owners_show_the_things() -> None:
    share = []
    for seed in range(60):
        scene = sizes.Scenes("val")[seed]
        length, height, width, _ = scene.frames.shape
        assert scene.owner.shape == (max(1, length // 2), height // 8, width // 8)
        assert set(np.unique(scene.owner)) - {0} == set(range(1, len(scene.things) + 1))
        for i, thing in enumerate(scene.things):
            pairs, rows, columns = np.nonzero(scene.owner == i + 1)
            assert pairs.min() == thing.seen[0] // 2 and pairs.max() == (thing.seen[1] - 1) // 2
            left, top, right, bottom = (edge / 8 for edge in thing.swept)
            assert rows.min() >= int(top) and rows.max() < bottom
            assert columns.min() >= int(left) and columns.max() < right
        # Where nothing moves, a clip stands still.
        still = np.ones((height, width), bool)
        for thing in scene.things:
            left, top, right, bottom = thing.swept
            still[top:bottom, left:right] = False
        assert (scene.frames[:, still] == scene.frames[:1, still]).all()
        share.append((scene.owner > 0).mean())
    assert 0.08 < np.mean(share) < 0.2  # neither everything nor nothing: that is what makes pruning worth testing


def test_other_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="multiples of 16"):
        sizes.Scenes("val", (1, 100, 64))
