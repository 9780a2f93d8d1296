"""`holitom`: merge what stands still in a clip, then keep what is salient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vtc.compressor import Compressor, register
from vtc.errors import SpecError, UnsupportedModelError
from vtc.kernels import frame_similarity
from vtc.kernels.cosine import lengths, products
from vtc.select import full_precision, places, rank, separators, top_k
from vtc.selection import Selection
from vtc.visual import Layout, Visual

NEIGHBOURS = 7  # of the density, as published


@register("holitom")
@dataclass(kw_only=True)
class HoliTom(Compressor):
    """Merge places of a clip that do not change over a segment of frames, and keep the salient ones of the rest.

    This is the stage of HoliTom that acts before the language model; `holitom-inner` is the other.

    1. A place is static over neighbouring frames if the cosine of each of its features with the next is above `tau`.
       The clip is cut into the segments for which static places, had they one token per segment, save the most tokens
       (dynamic programming over all segmentations; of equal ones those with the shorter last segment win).
    2. In each segment, a static place becomes the mean of its frames, which stands in the first of them. All else is
       dynamic. If `R` of `N` tokens are saved, a share `r' = K / (N - R)` of either kind can stay.
    3. Dynamic tokens stay if they have the largest saliency of their frame: the attention they get on average in the
       encoder layer that the features come from. Static ones are clustered by density peaks (7 neighbours, or as many
       as clusters if those are fewer); a centre becomes `beta` of itself and `1 - beta` of the mean of the others.

    Exactly `keep` tokens survive, which is not as published: the static places of each segment and the dynamic tokens
    of each frame get their share of the budget by largest remainder, static ones first among equals, then earlier ones.
    Where merging alone leaves fewer than the budget, static tokens that are least like the frame before stay out of
    their mean and survive on their own. With `fill=False` the number depends on content as published: the share of
    dynamic tokens is rounded up, that of static ones to the nearest (halves to even), and a clip that merges to less
    than the budget stays short; one token survives at least.

    Of an image, or any input that is no clip, the tokens of largest saliency are kept. Separators after the last frame,
    such as the newline that ends a clip, survive if the budget has room for more than them, and count in it; with
    `fill=False` they come on top, as published. Separators between rows are dropped, unless nothing else is.

    HoliTom (arXiv 2505.21334). Where the official code differs:

    - Per segment it puts the static tokens first and the dynamic ones after them; here a merged token stands in place
      of its first frame, as all survivors are in raster order.
    - It breaks ties of density with random noise; here the lowest index wins.
    - It asks for the last layer's attention map, and reads the device about `T^2 / 2` times for the segmentation of `T`
      frames; here only the mean of the columns is computed, and nothing is read.
    - Several clips in one call overwrite each other's share; here each is on its own.
    - It can also merge dynamic tokens (`D > 0`), but that branch does not run; results are for `D = 0`, as here.
    - Where a clip is laid out with a newline after every row, it keeps those of rows that still have a token. How many
      those are depends on content.

    Positions are contiguous by default: the code shortens the sequence before the language model numbers it.

    Attributes:
        tau: cosine above which a place is static. Published: 0.8, and 0.65 with `keep=0.1`.
        beta: weight of a centre in its cluster.
        window: the most frames in a segment.
        fill: whether exactly the budget survives; `False` is as published, and waits for the device.
    """

    paper: ClassVar[str] = "2505.21334"
    code: ClassVar[str] = "cokeshao/HoliTom"

    keep: int | float = 0.15
    positions: Literal["original", "contiguous"] = "contiguous"
    tau: float = 0.8
    beta: float = 0.6
    window: int = 1024
    fill: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not -1.0 <= self.tau <= 1.0:
            raise SpecError(f"holitom: tau={self.tau} is no cosine: use -1 to 1")
        if not 0.0 <= self.beta <= 1.0:
            raise SpecError(f"holitom: beta={self.beta} is no share: use 0 to 1")
        if self.window < 1:
            raise SpecError(f"holitom: window={self.window} has no frames: use 1 or more")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"features", "received"})

    @property
    def adaptive(self) -> bool:
        return not self.fill

    def select(self, visual: Visual) -> Selection:
        layout, device = visual.layout, visual.device
        budget = self.budget(layout)
        if budget == layout.tokens:  # left alone also where the count depends on content
            return Selection.keep(torch.arange(budget, device=device).expand(visual.inputs, -1), budget)
        if not layout.clip:
            return Selection.keep(top_k(visual.saliency[:, 0], budget), layout.tokens)
        frames = layout.grid[0]
        if frames != len(layout.views):
            raise UnsupportedModelError(
                "holitom compares places of one frame with the next: frames must be of one size"
            )

        cells = places(layout.views, device)  # (T * P,): numbers of the tokens in the input
        ending = layout.tokens - layout.views[-1].stop  # separators after the last frame
        if self.fill:
            extra = max(ending if budget > ending else 0, budget - len(cells))
            spare = separators(layout, device).flip(0)[:extra]  # the ending first
        else:
            spare = torch.arange(layout.tokens - ending, layout.tokens, device=device)
        x = visual.features[:, cells].unflatten(1, (frames, -1))  # (B, T, P, D)
        saliency = visual.saliency[:, 0, cells].unflatten(1, (frames, -1))  # (B, T, P)
        return self._clip(layout, x, saliency, cells, spare, budget - len(spare))

    def _clip(
        self, layout: Layout, x: Tensor, saliency: Tensor, cells: Tensor, spare: Tensor, budget: int
    ) -> Selection:
        batch, frames, width = saliency.shape
        alike = torch.stack([frame_similarity(clip) for clip in x])  # (B, T - 1, P)
        start, end, static = segments(alike > self.tau, self.window)  # (B, T), (B, T), (B, T, P)
        clock = torch.arange(frames, device=x.device)
        first = start == clock  # (B, T)

        # The parts that share the budget: static places of the segment that starts at a frame, dynamic ones of a frame.
        parts = torch.cat([(static & first[..., None]).sum(2), (~static).sum(2)], dim=1)  # (B, 2 T)
        left = parts.sum(1, keepdim=True)  # (B, 1): tokens once static places are merged
        if self.fill:
            quota = shares(parts, left.clamp(max=budget), left)
        else:
            wanted = self.keep * (frames * width) if isinstance(self.keep, float) else self.keep
            share = (torch.full_like(left, wanted, dtype=torch.float64) / left).clamp(max=1.0)
            quota = torch.cat([(parts[:, :frames] * share).round(), (parts[:, frames:] * share).ceil()], dim=1).long()
            quota[:, :1] |= quota.sum(1, keepdim=True) == 0  # all is static, and all shares are rounded down to none
        clusters, salient = quota.split(frames, dim=1)  # (B, T) each

        # What merging saves beyond the budget is given back: to tokens least like the one before, never to the first.
        later = static & ~first[..., None]
        before = torch.cat([alike.new_zeros(batch, 1, width), alike], dim=1)  # (B, T, P)
        single = rank(torch.where(later, -before, -torch.inf).flatten(1)) < (budget - left if self.fill else 0)
        single = single.view_as(later) & later
        merged = static & ~single

        # Segments of several frames, of which there are at most T / 2, numbered. Others have no static places.
        several = end > start
        number = ((first & several).cumsum(1) - 1).clamp(min=0)  # (B, T)
        row = torch.arange(max(1, frames // 2), device=x.device)
        member = ((number[:, None] == row[:, None]) & several[:, None]).float()  # (B, S, T)
        with full_precision(x.device):
            length = member @ merged.float()  # (B, S, P): frames in each mean
            mean = (member @ torch.where(merged[..., None], x.float(), 0.0).flatten(2)).unflatten(2, (width, -1))
            mean = mean / length.clamp(min=1)[..., None]  # (B, S, P, D)
            count = (member @ (clusters * first)[..., None].float()).long()  # (B, S, 1)
        owner, weight = cluster(mean.flatten(0, 1), (length > 0).flatten(0, 1), count.flatten(0, 1), self.beta)
        owner, weight = owner.view_as(length), weight.view_as(length) / length.clamp(min=1)

        # Back to tokens: which one each of them goes to, and how much of it.
        pick = number[..., None].expand(-1, -1, width)
        owner, weight = owner.gather(1, pick), weight.gather(1, pick)  # (B, T, P)
        place = torch.arange(width, device=x.device)
        alone = single | (~static & (rank(saliency.masked_fill(static, -torch.inf)) < salient[..., None]))
        survives = alone | (merged & first[..., None] & (owner == place))
        target = torch.where(merged & (owner >= 0), start[..., None] * width + owner, clock[:, None] * width + place)
        weight = torch.where(merged, weight, alone.float())

        # Over all tokens of the input, with the separators that survive.
        alive = torch.zeros(batch, layout.tokens, dtype=torch.uint8, device=x.device)
        alive = alive.index_copy(1, cells, survives.flatten(1).to(alive.dtype)).index_fill(1, spare, 1)
        kept = budget + len(spare) if self.fill else int(alive.sum())
        index = alive.sort(dim=1, descending=True, stable=True).indices[:, :kept]
        source = torch.cat([cells, spare]).expand(batch, -1)
        goal = torch.cat([cells[target.flatten(1)], spare.expand(batch, -1)], dim=1)
        slot = (alive.cumsum(1) - 1).clamp(min=0).gather(1, goal)
        weight = torch.cat([weight.flatten(1), weight.new_ones(batch, len(spare))], dim=1)
        return Selection(index, layout.tokens, slot, source, weight)


def segments(same: Tensor, window: int) -> tuple[Tensor, Tensor, Tensor]:
    """The segmentation of `T` frames that saves the most tokens.

    A segment of `w + 1 <= window` frames saves `w` tokens for each place that is the same in all of them. Best totals
    are built up frame by frame; of equal ones that with the shorter last segment is taken.

    Args:
        same: `(B, T - 1, P)` bool: whether a place is the same in a frame and the next.
        window: the most frames in a segment.

    Returns:
        The first and the last frame of the segment that each frame is in, `(B, T)` int64 each, and whether each place
        is the same in all of it, `(B, T, P)` bool; false in segments of one frame.
    """
    batch, frames, width = same.shape[0], same.shape[1] + 1, same.shape[2]
    step = torch.arange(frames, device=same.device)
    run = torch.zeros(batch, width, dtype=torch.long, device=same.device)
    runs, backs = [run], [run.new_zeros(batch)]  # for how many frames each place has been the same; the best w
    total = run.new_zeros(batch, frames + 1)  # of the first i frames
    for i in range(1, frames):
        run = (run + 1) * same[:, i - 1]
        reach = min(i, window - 1)
        saved = (run[:, None] >= step[: reach + 1, None]).sum(2) * step[: reach + 1]  # (B, reach + 1), by w
        best = (total[:, i - reach : i + 1].flip(1) + saved).max(dim=1)
        total[:, i + 1] = best.values
        runs.append(run)
        backs.append(best.indices)  # the first, so the shortest

    last = torch.full_like(backs[0], frames - 1)
    first = last - backs[-1]
    starts, ends = [first], [last]
    for i in range(frames - 2, -1, -1):
        new = first > i
        last, first = torch.where(new, i, last), torch.where(new, i - backs[i], first)
        starts.append(first)
        ends.append(last)
    start, end = torch.stack(starts[::-1], dim=1), torch.stack(ends[::-1], dim=1)  # (B, T)
    long = torch.stack(runs, dim=1).gather(1, end[..., None].expand(-1, -1, width))  # (B, T, P)
    return start, end, (long >= (end - start)[..., None]) & (end > start)[..., None]


def shares(parts: Tensor, kept: Tensor, whole: Tensor) -> Tensor:
    """`(B, M)`: `kept` `(B, 1)` tokens shared among parts of sizes `(B, M)`, `whole` in all, by largest remainder."""
    down, rest = parts * kept // whole, parts * kept % whole
    return down + (rank(rest) < kept - down.sum(1, keepdim=True))


def cluster(rows: Tensor, valid: Tensor, count: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Clusters of the valid ones among the rows `(S, P, D)`: `count` `(S, 1)` of them, around density peaks.

    As `vtc.kernels.density_peaks`, but with sets of different sizes side by side, and with no more neighbours than
    clusters.

    Returns:
        The centre of each row, `(S, P)` int64, -1 for rows without one; and the weight with which the row goes into it,
        `(S, P)` float32: `beta` for a centre, or 1 if it has no other members, which share the rest.
    """
    place = torch.arange(rows.shape[1], device=rows.device)
    square = lengths(rows).square()
    distance = square[:, :, None] + square[:, None] - 2 * products(rows, rows)  # (S, P, P), squared
    distance = distance.minimum(distance.mT)  # rounded alike in both directions: two nearest neighbours are as dense
    distance.diagonal(dim1=1, dim2=2).zero_()
    distance = (distance.clamp(min=0) / rows.shape[2]).masked_fill(~valid[:, None], torch.inf)

    nearest = distance.topk(min(NEIGHBOURS, rows.shape[1]), dim=2, largest=False).values  # ascending
    few = count.clamp(1, NEIGHBOURS)[..., None]  # (S, 1, 1)
    spread = torch.where(place[: nearest.shape[2]] < few, nearest / few, 0.0).sum(2)  # (S, P): minus the log of density
    denser = spread[:, None] < spread[:, :, None]  # (S, P, P): column denser than row
    denser |= (spread[:, None] == spread[:, :, None]) & (place < place[:, None])
    gap = distance.masked_fill(~denser, torch.inf).amin(2)
    gap = torch.where(gap.isinf(), distance.masked_fill(~valid[:, None], 0.0).amax(2), gap)
    score = (gap.log() / 2 - spread).nan_to_num(torch.finfo(torch.float32).min, neginf=torch.finfo(torch.float32).min)
    centre = valid & (rank(score.masked_fill(~valid, -torch.inf)) < count)

    near = distance.masked_fill(~centre[:, None], torch.inf).argmin(2)
    owner = torch.where(centre, place, near).masked_fill(~valid | (count == 0), -1)
    others = ((owner[:, :, None] == place) & ~centre[:, :, None]).sum(1)  # (S, P): members of each centre but itself
    share = (1.0 - beta) / others.gather(1, owner.clamp(min=0)).clamp(min=1)
    weight = torch.where(centre, torch.where(others > 0, beta, 1.0), share)
    return owner, weight.masked_fill(owner < 0, 0.0)
