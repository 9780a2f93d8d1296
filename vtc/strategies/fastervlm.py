"""`fastervlm`: keep what the vision encoder's [CLS] token attends to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from vtc.compressor import Scorer, register
from vtc.visual import Encoder, Visual


@register("fastervlm")
@dataclass(kw_only=True)
class FasterVLM(Scorer):
    """Keep the tokens that the vision encoder's [CLS] token attends to most, in the layer the features come from.

    The score of a token is the attention probability from [CLS] to it, averaged over heads; the best `keep` survive in
    raster order. The question is not looked at. Separators such as newlines are not patches: they score zero.

    FasterVLM (arXiv 2412.01818). Where the official code differs:

    - It counts per view (crop), with the same number kept in each, for which it has no default; here the views of an
      image share one budget and compete for it. The paper's 29 per view on five views has the size of `keep=145`.
    - Of images in crops it leaves out the newlines and keeps the padding; here the input keeps the model's own layout.
    - It asks the encoder for the attention maps of all layers; here the one row that is needed is computed. Scores are
      compared in float32 and ties go to the lowest index, where `topk` in half precision leaves them open.

    Positions are contiguous by default: the code shortens the sequence before the language model numbers it.

    Attributes:
        saliency: `"cls"` as published. `"received"` is the attention that a token gets from all tokens, on average: for
            encoders without a class token, as the authors' later VisPruner does.
        layer: encoder layer whose attention is read, from 0, or from the end with -1 as the last layer. `None` is the
            layer whose output goes to the projector, as published (-2 in LLaVA).
    """

    paper: ClassVar[str] = "2412.01818"
    code: ClassVar[str] = "Theia-4869/FasterVLM"

    positions: Literal["original", "contiguous"] = "contiguous"
    saliency: Literal["cls", "received"] = "cls"
    layer: int | None = None

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({self.saliency})

    def layers(self, encoder: Encoder) -> tuple[int, ...]:
        if self.layer is None:
            return (encoder.feature_layer,)
        return (encoder.layer(self.layer),)

    def score(self, visual: Visual) -> Tensor:
        return visual.saliency[:, 0]
