"""What posters look like; what all bundled evaluation sets share is tested in `test_tasks.py`."""

from __future__ import annotations

from collections import Counter

import numpy as np

from vtc.eval import posters
from vtc.eval.content import apart
from vtc.eval.scenes import GAP


def test_sizes_are_odd_and_of_every_form() -> None:
    sizes = {item.image.size for item in posters.questions("test")}
    assert len(sizes) > 200
    shares = Counter("wide" if w > 1.6 * h else "tall" if h > 1.6 * w else "square" for w, h in sizes)
    assert all(shares[form] >= 0.15 * len(sizes) for form in ("wide", "tall", "square"))
    assert max(max(size) for size in sizes) <= posters.TEXTURE_SIDE


def test_things_do_not_overlap_and_are_where_the_owner_map_says() -> None:
    share = []
    for seed in range(100):
        poster = posters.Posters("val")[seed]
        height, width, _ = poster.image.shape
        assert poster.owner.shape == (height, width)
        for i, a in enumerate(poster.things):
            left, top, right, bottom = a.box
            assert 0 <= left < right <= width and 0 <= top < bottom <= height
            assert all(apart(a.box, b.box, GAP) for b in poster.things[:i])
            rows, columns = np.nonzero(poster.owner == i + 1)
            assert top <= rows.min() <= rows.max() < bottom and left <= columns.min() <= columns.max() < right
        share.append((poster.owner > 0).mean())
    assert 0.03 < np.mean(share) < 0.12
