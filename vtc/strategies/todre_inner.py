"""`todre-inner`: late in the language model, drop every visual token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from vtc.compressor import LayerCompressor, register
from vtc.errors import SpecError
from vtc.selection import Selection
from vtc.visual import Layout, Visual


@register("todre-inner")
@dataclass(kw_only=True)
class ToDREInner(LayerCompressor):
    """Drop all visual tokens once seven eighths of the decoder layers have run.

    This is the second stage of ToDRE, which acts inside the language model. By then, the paper finds, text has mostly
    taken from the visual tokens what it needs. Separators such as newlines go with them.

    ToDRE (arXiv 2505.18757). No official code was found. What the paper does otherwise or leaves open, and what is done
    here:

    - It drops only if text pays visual tokens, and visual tokens pay text, less than a tenth of their attention each.
      Then the length depends on content and the device has to be waited for, so here that is an option, `tau`; by
      default the tokens go in any case.
    - Which text: what follows the first visual token of the prompt; the system prompt before it counts as neither. In a
      causal model the visual tokens of a prompt with one image see none of that text, so their mass is 0.
    - Which layer: the paper tests layer 28 of 32. Here 28 layers run, the attention of the last of them is tested, and
      the tokens are gone from the next on.
    - Positions of the text: they stay as they were.

    Attributes:
        keep: 0, all go. The only other value is 1.0, all stay.
        tau: the largest attention mass, exclusive, at which the visual tokens are dropped; 0.1 in the paper. `None`
            drops them in any case.
    """

    paper: ClassVar[str] = "2505.18757"

    keep: int | float = 0
    layer: int | float = 0.875
    tau: float | None = None

    def __post_init__(self) -> None:
        self._check_types()
        self._check_layer()
        if not (type(self.keep) is int and self.keep == 0) and not (type(self.keep) is float and self.keep == 1.0):
            raise SpecError(f"{self.name}: keep={self.keep} is neither: it drops all visual tokens (0) or none (1.0)")
        if self.tau is not None and not 0.0 < self.tau <= 1.0:
            raise SpecError(f"{self.name}: tau={self.tau} is no attention mass: use 0 < tau <= 1, or None")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset() if self.tau is None else frozenset({"exchange"})

    @property
    def adaptive(self) -> bool:
        return self.tau is not None

    def budget(self, layout: Layout) -> int:
        return layout.tokens if self.keep else 0

    def select(self, visual: Visual) -> Selection:
        kept = visual.budget
        if self.tau is not None and not bool((visual.exchange < self.tau).all()):  # of one visual input
            kept = visual.layout.tokens
        index = torch.arange(kept, device=visual.device).expand(visual.inputs, -1)
        return Selection(index, visual.layout.tokens)
