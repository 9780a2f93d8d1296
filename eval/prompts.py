"""Where the prompts of `vtc bench` come from: the questions of a task, or one made-up prompt.

Both know the prompt that is timed, as every setting wants it: with all visual tokens, with none, or scaled down.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod
from statistics import median_low
from typing import Any, Protocol

from torch import Tensor

from vtc import adapters
from vtc.errors import VtcError
from vtc.eval import accuracy, downsample
from vtc.eval.accuracy import Batch
from vtc.eval.items import Item, shape
from vtc.eval.made_up import MadeUp, count
from vtc.eval.plan import Setting


class Prompts(Protocol):
    """What a run is made of."""

    @property
    def items(self) -> Sequence[Item]:
        """The questions; there may be none."""
        ...

    @property
    def reach(self) -> tuple[int, int]:
        """Visual tokens of the prompt that is timed, at the smallest scale and at full size."""
        ...

    def one(self, setting: Setting) -> dict[str, Tensor]:
        """The prompt that is timed, where the model is."""
        ...

    def batches(self, setting: Setting) -> list[Batch]:
        """All questions, ready for the model."""
        ...


@dataclass
class Asked:
    """The questions of a task, by the model's processor."""

    model: Any
    processor: Any
    items: Sequence[Item]
    batch_size: int
    _counts: dict[Any, int] = field(default_factory=dict)  # of visual tokens, by the shapes of the media
    _scales: dict[Any, float] = field(default_factory=dict)  # by the shapes of the media, and the budget

    def __post_init__(self) -> None:
        if any(item.clips for item in self.items) and getattr(self.processor, "video_processor", None) is None:
            raise VtcError("the questions are about clips, and the model takes pictures only: choose another --task")

    @cached_property
    def _typical(self) -> Item:
        """The first question about media of the usual size: the median of their areas."""
        areas = [sum(prod(shape(medium)) for medium in item.media) for item in self.items]
        return self.items[areas.index(median_low(areas))]

    @property
    def reach(self) -> tuple[int, int]:
        return self.count(self._typical, downsample.LEAST), self.count(self._typical)

    def one(self, setting: Setting) -> dict[str, Tensor]:
        item = self._as(setting, self._typical)
        one = accuracy.process(self.processor, [item.question], [() if setting.blind else item.media])
        return accuracy.to_device(one, self.model)

    def batches(self, setting: Setting) -> list[Batch]:
        items = [self._as(setting, item) for item in self.items]
        return accuracy.batches(self.processor, items, self.batch_size, blind=setting.blind)

    def count(self, item: Item, scale: float = 1.0) -> int:
        """Visual tokens of a question whose media are at this scale, as the processor makes them."""
        media = [downsample.shrink(medium, scale) for medium in item.media]
        key = tuple(map(shape, media))
        if key not in self._counts:
            inputs = accuracy.process(self.processor, [item.question], [media])
            self._counts[key] = count(adapters.find(self.model), inputs)
        return self._counts[key]

    def _as(self, setting: Setting, item: Item) -> Item:
        """The question as a setting asks it: where that scales down, about smaller media."""
        if setting.scaled is None:
            return item
        most = downsample.budget(setting.scaled, self.count(item), len(item.media))
        key = (*map(shape, item.media), most)
        if key not in self._scales:
            self._scales[key] = downsample.search(lambda scale: self.count(item, scale), most)
        return replace(item, media=tuple(downsample.shrink(medium, self._scales[key]) for medium in item.media))


@dataclass
class Invented:
    """One made-up prompt, and no question."""

    model: Any
    made_up: MadeUp
    items: Sequence[Item] = ()

    @cached_property
    def reach(self) -> tuple[int, int]:
        return self.made_up.tokens(self.model, downsample.LEAST), self.made_up.tokens(self.model)

    def one(self, setting: Setting) -> dict[str, Tensor]:
        return self.made_up.inputs(self.model, scale=self._scale(setting), blind=setting.blind)

    def batches(self, setting: Setting) -> list[Batch]:
        return []

    def _scale(self, setting: Setting) -> float:
        if setting.scaled is None:
            return 1.0
        most = downsample.budget(setting.scaled, self.reach[1], 1)
        return downsample.search(lambda scale: self.made_up.tokens(self.model, scale), most)
