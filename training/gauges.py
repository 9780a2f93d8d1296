"""Settings that are no strategies: what the numbers of the strategies are held against on a model's card.

Some know what each token shows. That is told by `shown`, per medium: the number of a thing, or 0 for background.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

import vtc
from vtc.eval.items import Item
from vtc.eval.plan import Setting
from vtc.select import separators, thumbnail

Shown = Callable[[Item], Tensor]  # (N,)


@dataclass(kw_only=True)
class LeastAttended(vtc.Scorer):
    """Keep what [CLS] attends to least: what can be answered from that has leaked into the background."""

    name = "least attended"
    needs = frozenset({"cls"})

    def score(self, visual: vtc.Visual) -> Tensor:
        saliency = visual.saliency[:, 0].clone()  # (B, N)
        saliency[:, separators(visual.layout)] = torch.inf  # newlines are no patches and get no attention
        return -saliency


@dataclass(kw_only=True)
class Foreground(vtc.Scorer):
    """Keep tokens that show a thing, at random, and then others: what a perfect saliency map would keep."""

    name = "foreground"

    def shows(self, owners: Tensor) -> None:
        """Tell what the media of the next batch show, (B, N)."""
        self._owners = owners

    def score(self, visual: vtc.Visual) -> Tensor:
        noise = torch.rand(visual.layout.tokens, generator=torch.Generator().manual_seed(0))
        return (self._owners > 0) + 0.5 * noise


@dataclass(kw_only=True)
class Part(vtc.Compressor):
    """Keep a part of a picture that is seen in several resolutions: its thumbnail, or its crops and their newlines."""

    part: Literal["thumbnail", "crops"]

    def __str__(self) -> str:
        return self.part

    def budget(self, layout: vtc.Layout) -> int:
        return len(self._tokens(layout))

    def select(self, visual: vtc.Visual) -> vtc.Selection:
        index = torch.tensor(self._tokens(visual.layout))
        return vtc.Selection.keep(index.expand(visual.inputs, -1), visual.layout.tokens)

    def _tokens(self, layout: vtc.Layout) -> list[int]:
        view = thumbnail(layout)
        if view is None:
            raise ValueError(f"{self.part}: the picture is seen in one resolution only")
        small = range(view.start, view.stop)
        return [token for token in range(layout.tokens) if (token in small) == (self.part == "thumbnail")]


@dataclass(frozen=True)
class InLine(Setting):
    """Visual tokens and text are numbered one after the other, as without M-RoPE: no rows, columns and frames."""

    name: str = "in a line"

    def on(self, model: Any) -> AbstractContextManager[Any]:
        return model.model.language_model.register_forward_pre_hook(_number, with_kwargs=True)


def _number(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    batch, length, _ = kwargs["inputs_embeds"].shape
    past = kwargs["past_key_values"].get_seq_length()
    return args, {**kwargs, "position_ids": torch.arange(past, past + length).expand(3, batch, -1)}
