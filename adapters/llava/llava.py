"""LLaVA-1.5: one square view per image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from vtc.adapters.llava.tower import TowerAdapter
from vtc.visual import Layout


class LlavaAdapter(TowerAdapter):
    """`LlavaModel` of transformers, as in `LlavaForConditionalGeneration`."""

    family: ClassVar[str] = "llava"

    def __init__(self, multimodal: Any) -> None:
        super().__init__(multimodal)
        self.tokens_per_image = self.side**2

    def layouts(self, modality: str, arguments: Mapping[str, Any]) -> list[Layout]:
        return [Layout.frames(1, self.side, self.side)] * len(arguments["pixel_values"])

    def token_rows(self, modality: str, rows: Tensor, layouts: Sequence[Layout]) -> list[Tensor]:
        return list(self.patches(rows))
