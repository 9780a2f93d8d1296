"""`vtc-cls`: keep what the [CLS] token attends to over many layers of the vision encoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from vtc.compressor import Scorer, register
from vtc.errors import SpecError
from vtc.visual import Encoder, Visual


@register("vtc-cls")
@dataclass(kw_only=True)
class VtcCls(Scorer):
    """Keep the tokens that [CLS] attends to most, summed over the deeper layers of the vision encoder.

    The score of a token is the head-averaged attention probability from [CLS] to it, summed over the layers from
    `start` to the last but one; the best `keep` survive in raster order. The question is not looked at. Separators such
    as newlines are not patches: they score zero.

    VTC-CLS (arXiv 2412.05819). Where the official code differs:

    - It selects before the projector, and only survivors are projected; here everything is projected first. The
      projector treats tokens one by one, so the same tokens arrive with the same features.
    - It takes one square image, of whose 576 tokens it keeps 36 by default; here any grid, and a quarter. The views of
      a multi-crop image share one budget.
    - Ties go to the lowest index, where `topk` leaves them open.

    Positions are contiguous by default, as in the code.

    Attributes:
        start: first encoder layer of the sum, from 0, or from the end with -1 as the last layer. `None` is two thirds
            of the depth, which is the published 16 of 24.
        renorm: make the rows of all layers weigh the same. The rows are softmax rows without their [CLS] column, so a
            layer in which [CLS] attends to itself weighs less in the published sum.
        saliency: `"cls"` as published. `"received"` is the attention that a token gets from all tokens, on average: for
            encoders without a class token.
    """

    paper: ClassVar[str] = "2412.05819"
    code: ClassVar[str] = "THU-MIG/VTC-CLS"

    positions: Literal["original", "contiguous"] = "contiguous"
    start: int | None = None
    renorm: bool = False
    saliency: Literal["cls", "received"] = "cls"

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({self.saliency})

    def layers(self, encoder: Encoder) -> tuple[int, ...]:
        end = max(encoder.depth - 1, 1)  # the last layer is left out, as in the code, unless it is the only one
        if self.start is None:
            return tuple(range(min(2 * encoder.depth // 3, end - 1), end))
        start = self.start + encoder.depth if self.start < 0 else self.start
        if not 0 <= start < end:
            raise SpecError(
                f"vtc-cls: start={self.start} leaves no layer to sum over: this vision encoder has {encoder.depth} "
                f"layers, and the last one is left out: use 0 to {end - 1}"
            )
        return tuple(range(start, end))

    def score(self, visual: Visual) -> Tensor:
        rows = visual.saliency  # (B, R, N)
        if self.renorm:
            rows = rows / rows.sum(dim=2, keepdim=True).clamp_min(1e-12)
        return rows.sum(dim=1)
