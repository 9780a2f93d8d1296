"""`globalcom2`: let the thumbnail of an image decide what its crops may keep."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from vtc.compressor import Compressor, register
from vtc.errors import SpecError, UnsupportedModelError
from vtc.kernels import merge
from vtc.kernels.cosine import unit
from vtc.select import places, separators, thumbnail, top_k
from vtc.selection import Selection
from vtc.visual import Encoder, View, Visual


@register("globalcom2")
@dataclass(kw_only=True)
class GlobalCom2(Compressor):
    """Keep salient tokens of thumbnail and crops; crops on which the thumbnail is salient may keep more.

    The thumbnail and the canvas of the `n` crops get their share of the budget by size. The thumbnail keeps the tokens
    with the largest score. The richness `S_j` of a crop is the sum of the scores in its part of the thumbnail, and it
    keeps a share of its tokens proportional to `1 + softmax(S / tau)_j - 1 / n`, those where `alpha` times the
    thumbnail's score, resized to the canvas, plus `1 - alpha` times the crop's own is largest.

    GlobalCom2 (arXiv 2501.05179). The paper scores by attention probabilities from [CLS] in the encoder's last layer;
    its code by the scaled dot products before the softmax. Probabilities add up to one over all crops, so that with
    `tau=10` all crops keep about the same share; dot products do not, so that the code's shares differ, the more so the
    larger they are. `formula` chooses:

    - `"paper"`: as above.
    - `"code"`: dot products; shares of a crop are cut at one; a token's score is the sum of the two scores, each first
      divided by its Euclidean length over the crop, and `alpha` has no part in it.
    - `"zscore"`: as the paper, but `S` is standardised over the crops, which makes the shares the same for every scale
      of scores, and `tau` is 1 if it is not given.

    Where the official code differs, with any formula:

    - It rounds the number of each crop down, and what a crop is cut by is lost. Here exactly `keep` tokens survive:
      they are dealt one by one to the crop with the largest share per token it has, as seats to parties by Webster's
      method, which rounds to the nearest; a crop that is full gets no more.
    - It keeps all newlines on top of the budget. Here they count in it and are dropped, unless nothing else is.
    - It puts the survivors of the thumbnail in the order of their scores; here all are in raster order.
    - On a padded canvas it writes survivors to the wrong places, and looks for crops on the thumbnail as if there were
      no padding. Here the canvas and the thumbnail show the same part of the picture.
    - Several images in a call get the mask of the first; here each has its own.

    An image without crops keeps the tokens of the largest score, as its thumbnail would. The frames of a clip are
    treated as crops, and the clip on average as the thumbnail: the mean score of a place over all frames, or for
    `saliency="mean"` the likeness to the clip's mean feature. Several tiles without places on a canvas are refused.

    Positions are contiguous by default: the code shortens the sequence before the language model numbers it.

    Attributes:
        formula: see above.
        saliency: `"cls"` as published. For encoders without a class token, `"mean"`, as published: minus the cosine of
            a projected feature and the mean of its view; or `"received"`: the attention that a token gets from all
            tokens on average.
        alpha: weight of the thumbnail's score in that of a crop's token.
        tau: temperature of the crops' shares. `None` is 10 as published, or 1 with `formula="zscore"`.
    """

    paper: ClassVar[str] = "2501.05179"
    code: ClassVar[str] = "xuyang-liu16/GlobalCom2"

    positions: Literal["original", "contiguous"] = "contiguous"
    formula: Literal["paper", "code", "zscore"] = "paper"
    saliency: Literal["cls", "mean", "received"] = "cls"
    alpha: float = 0.5
    tau: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.alpha <= 1.0:
            raise SpecError(f"globalcom2: alpha={self.alpha} is no share: use 0 to 1")
        if self.tau is not None and not 0.0 < self.tau < float("inf"):
            raise SpecError(f"globalcom2: tau={self.tau} is no temperature: use a number above 0")

    @property
    def needs(self) -> frozenset[str]:
        if self.saliency == "cls":
            return frozenset({"logits" if self.formula == "code" else "cls"})
        return frozenset({"features" if self.saliency == "mean" else "received"})

    def layers(self, encoder: Encoder) -> tuple[int, ...]:
        return (encoder.depth - 1,)

    def select(self, visual: Visual) -> Selection:
        layout, device = visual.layout, visual.device
        budget, cells = self.budget(layout), places(layout.views, device)
        seen = min(budget, len(cells))
        parts = [cells[self._choose(visual, cells, seen)]]  # (B, seen)
        if budget > seen:
            parts.append(separators(layout, device)[: budget - seen].expand(visual.inputs, -1))
        return Selection.keep(torch.cat(parts, dim=1), layout.tokens)

    def _choose(self, visual: Visual, cells: Tensor, kept: int) -> Tensor:
        """`(B, kept)`: which of the tokens at `cells` survive, in any order."""
        views = visual.layout.views
        if visual.layout.clip:
            return self._frames(visual, cells, kept)
        if len(views) == 1:
            return top_k(self._score(visual, cells), kept)
        if thumbnail(visual.layout) is None:  # tiles, perhaps two of them
            raise UnsupportedModelError(
                f"globalcom2 needs a thumbnail and a canvas of crops, but this image has {len(views)} views whose "
                "places on a canvas are not known; 'fastervlm' and 'divprune' take any"
            )
        whole, canvas = views
        size = whole.rows * whole.columns
        first = (2 * kept * size + len(cells)) // (2 * len(cells))  # of the thumbnail, by size; halves round up
        score = self._score(visual, cells[:size])
        picture = score.view(-1, 1, whole.rows, whole.columns)
        resized = interpolate(picture, (canvas.rows, canvas.columns), mode="bilinear").flatten(1)
        part = crops(canvas, whole.rows, whole.columns, visual.device)  # where each crop is on the thumbnail
        crop = crops(canvas, canvas.rows, canvas.columns, visual.device)
        count = canvas.crops[0] * canvas.crops[1]
        own = self._score(visual, cells[size:], crop, count)
        rest = self._deal(_sums(score[..., None], part, count)[..., 0], resized, own, crop, kept - first)
        return torch.cat([top_k(score, first), size + rest], dim=1)

    def _frames(self, visual: Visual, cells: Tensor, kept: int) -> Tensor:
        frames = visual.layout.grid[0]
        if frames != len(visual.layout.views):
            raise UnsupportedModelError("globalcom2 averages over the frames of a clip: they must be of one size")
        frame = torch.arange(frames, device=visual.device).repeat_interleave(len(cells) // frames)
        own = self._score(visual, cells, frame, frames)
        if self.saliency == "mean":
            whole = self._score(visual, cells)
        else:
            whole = own.unflatten(1, (frames, -1)).mean(1).repeat(1, frames)
        return self._deal(_sums(whole[..., None], frame, frames)[..., 0], whole, own, frame, kept)

    def _score(self, visual: Visual, cells: Tensor, crop: Tensor | None = None, count: int = 1) -> Tensor:
        """`(B, V)`: the score of the tokens at `cells`, each in its own of `count` crops, `crop` `(V,)`."""
        if self.saliency != "mean":
            return visual.saliency[:, 0][:, cells]
        x = visual.features[:, cells].float()
        crop = torch.zeros_like(cells) if crop is None else crop
        mean = unit(_sums(x, crop, count))  # (B, count, D): its length does not matter
        return -(unit(x) * mean[:, crop]).sum(2)

    def _deal(self, richness: Tensor, scene: Tensor, own: Tensor, crop: Tensor, kept: int) -> Tensor:
        """`(B, kept)`: which of the crops' tokens survive.

        Args:
            richness: `(B, J)`, of each crop.
            scene: `(B, V)`, scores of the crops' tokens in the whole picture.
            own: `(B, V)`, their scores in their crop.
            crop: `(V,)`, which crop they are in.
            kept: how many survive, of all crops together.
        """
        crops = richness.shape[1]
        size = _sums(torch.ones_like(scene)[..., None], crop, crops)[..., 0]  # (B, J)
        share = size * self._ratio(richness, size > 0, kept / max(scene.shape[1], 1))
        if self.formula == "code":
            score = _normalised(scene, crop, crops) + _normalised(own, crop, crops)
        else:
            score = self.alpha * scene + (1 - self.alpha) * own

        best = score.sort(dim=1, descending=True, stable=True).indices
        best = best.gather(1, crop[best].sort(dim=1, stable=True).indices)  # crop by crop, the best of each first
        where = crop[best]
        rank = torch.arange(best.shape[1], device=best.device) - (size.cumsum(1) - size).gather(1, where)
        turn = (2 * rank + 1) / share.gather(1, where)  # when it is dealt, by Webster's divisors
        return best.gather(1, top_k(-turn, kept))

    def _ratio(self, richness: Tensor, some: Tensor, kept: float) -> Tensor:
        """`(B, J)`: what share of its tokens each crop keeps, up to a factor that is the same for all crops.

        Crops without tokens, `~some`, are left out; `kept` is the share of all tokens.
        """
        count = some.sum(1, keepdim=True)
        tau = self.tau or (1.0 if self.formula == "zscore" else 10.0)
        if self.formula == "zscore":
            richness = torch.where(some, richness, 0.0)
            noise = richness.abs().amax(1, keepdim=True) * 1e-6  # crops that differ by less than that are alike
            richness = torch.where(some, richness - richness.sum(1, keepdim=True) / count, 0.0)
            spread = (richness.square().sum(1, keepdim=True) / count).sqrt()
            richness = richness / spread.maximum(noise).clamp(min=1e-12)
        ratio = 1 + (richness / tau).masked_fill(~some, -torch.inf).softmax(1) - 1 / count
        return (kept * ratio).clamp(max=1.0) if self.formula == "code" else ratio


def crops(canvas: View, rows: int, columns: int, device: torch.device) -> Tensor:
    """`(rows * columns,)`: which crop the middle of each cell is in, if that many show what the canvas does."""
    top, left, bottom, right = canvas.box
    down = _bands(rows, top, bottom, canvas.crops[0], device)
    across = _bands(columns, left, right, canvas.crops[1], device)
    return (down[:, None] * canvas.crops[1] + across).flatten()


def _bands(cells: int, low: float, high: float, parts: int, device: torch.device) -> Tensor:
    """`(cells,)`: in which of equal `parts` of [0, 1] the middle of each cell is, if they divide [low, high]."""
    band = [int((low + (high - low) * (i + 0.5) / cells) * parts) for i in range(cells)]
    place = torch.arange(cells, device=device)
    return sum((place >= bisect_left(band, part) for part in range(1, parts)), torch.zeros_like(place))


def _sums(x: Tensor, crop: Tensor, crops: int) -> Tensor:
    """`(B, J, C)`: the sums over each crop of `x` `(B, V, C)`."""
    batch, tokens, _ = x.shape
    source = torch.arange(tokens, device=x.device).expand(batch, -1)
    return merge(x, crop.expand(batch, -1), source, x.new_ones(batch, tokens), crops)


def _normalised(score: Tensor, crop: Tensor, crops: int) -> Tensor:
    """`score` `(B, V)` over its Euclidean length in each crop."""
    length = _sums(score.square()[..., None], crop, crops)[..., 0].sqrt()  # (B, J)
    return score / length.clamp(min=1e-12)[:, crop]
