"""`Report`: what one call did, as plain data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from vtc.errors import VtcError
from vtc.visual import Layout

if TYPE_CHECKING:
    from PIL.Image import Image

    from vtc.adapters.base import Adapter
    from vtc.call import Record
    from vtc.picture import Fit
    from vtc.selection import Selection


@dataclass(frozen=True)
class StageReport:
    """What one compressor did at one place.

    Attributes:
        spec: the compressor.
        layer: in front of which decoder layer; 0 is the language model's input.
        kept: per visual input, what was left afterwards, in the numbering of the uncompressed tokens.
        sources: per visual input, where the uncompressed tokens had gone by then, as in `Report`.
    """

    spec: str
    layer: int
    kept: tuple[tuple[int, ...], ...] = field(repr=False)
    sources: tuple[tuple[int, ...] | None, ...] = field(repr=False)


@dataclass(frozen=True, repr=False)
class Report:
    """What one compressed call did. `print` tells it in a few lines.

    Attributes:
        spec: the compressors, joined by `+`.
        kept: per visual input (images in the order of their placeholders, then clips), the ascending indices of the
            tokens that survived every compressor, in the numbering of the uncompressed tokens.
        sources: per visual input, for each uncompressed token the survivor (0..K-1) it went to, -1 if it was dropped;
            `None` where tokens were only dropped, not merged.
        layouts: per visual input, how the uncompressed tokens lie.
        modalities: per visual input, `"image"` or `"video"`.
        stages: what each compressor did, in the order in which they act.
        prompts: number of prompts in the batch.
        sequence_in: length of the (padded) prompt, text included, before compression.
        lengths: the same in each decoder layer.
        prefill_flops, prefill_flops_full: FLOPs of the language model's prefill at these lengths, for the whole batch;
            a multiply-add counts as two (see `vtc.eval.flops`).
    """

    spec: str
    kept: tuple[tuple[int, ...], ...]
    sources: tuple[tuple[int, ...] | None, ...]
    layouts: tuple[Layout, ...]
    modalities: tuple[str, ...]
    stages: tuple[StageReport, ...]
    prompts: int
    sequence_in: int
    lengths: tuple[int, ...]
    prefill_flops: int
    prefill_flops_full: int
    fit: Literal["crop", "resize"] = "crop"

    @property
    def tokens_in(self) -> int:
        """Visual tokens of the call before compression, all visual inputs together."""
        return sum(layout.tokens for layout in self.layouts)

    @property
    def tokens_out(self) -> int:
        """Visual tokens of the call after compression, all visual inputs together."""
        return sum(len(kept) for kept in self.kept)

    @property
    def sequence_out(self) -> int:
        """Length of the (padded) prompt in the last decoder layer."""
        return self.lengths[-1]

    def __repr__(self) -> str:
        return f"<vtc.Report {self._summary()}>"

    def __str__(self) -> str:
        lines = [self._summary()]
        for number, layout in enumerate(self.layouts):
            counts = [layout.tokens, *(len(stage.kept[number]) for stage in self.stages)]
            steps = " -> ".join(str(count) for count in counts)
            lines.append(f"  {self.modalities[number]} {number}: {_shape(layout)} = {steps}")
        if len(self.stages) > 1 or any(stage.layer for stage in self.stages):
            places = [f"layer {stage.layer}" if stage.layer else "input" for stage in self.stages]
            lines.append(f"  in front of: {', '.join(places)}")
        return "\n".join(lines)

    def _summary(self) -> str:
        ratio = self.prefill_flops / self.prefill_flops_full
        return f"{self.spec}: {self.tokens_in} -> {self.tokens_out} visual tokens, {ratio:.2f}x prefill FLOPs"

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON-ready data."""
        sizes = {"tokens_in": self.tokens_in, "tokens_out": self.tokens_out, "sequence_out": self.sequence_out}
        return {**asdict(self), **sizes}

    def show(
        self,
        image: Any,
        number: int = 0,
        fit: Fit | None = None,
        stage: int | None = None,
        scores: Sequence[float] | None = None,
        caption: str | None = None,
    ) -> Image:
        """A picture of what survived: dropped patches dimmed, merged groups outlined, budget and FLOPs below.

        Args:
            image: the picture that was given to the processor, or the frames of the clip; see `vtc.picture.views`. Of
                an image in several resolutions the thumbnail and the crops are drawn, of a clip all frames.
            number: which visual input of the call it is.
            fit: how the processor brought a picture to the encoder's shape: `"crop"` (its middle), `"resize"`
                (squashed) or `"pad"`. Only the processor knows; the default is what those of this family usually do.
            stage: what was left after this one of `stages`; the default is the last.
            scores: one per uncompressed token, drawn as a heat map; see `vtc.picture.views`.
            caption: the text below instead of `self.caption(number, stage)`; an empty one for none.
        """
        from vtc.picture import draw, side_by_side

        drawn = draw(image, *self._after(number, stage), fit or self.fit, scores)
        text = self.caption(number, stage) if caption is None else caption
        return side_by_side([drawn], [text]) if text else drawn

    def animate(
        self,
        frames: Any,
        path: str | Path,
        number: int = 0,
        fit: Fit | None = None,
        stage: int | None = None,
        seconds: float = 0.5,
    ) -> None:
        """Save what survived of a clip as a GIF, `seconds` per frame; the other arguments are those of `show`."""
        from vtc.picture import save_gif, side_by_side

        text = self.caption(number, stage)
        save_gif([side_by_side([view], [text]) for view in self.views(frames, number, fit, stage)], path, seconds)

    def views(
        self,
        image: Any,
        number: int = 0,
        fit: Fit | None = None,
        stage: int | None = None,
        scores: Sequence[float] | None = None,
    ) -> list[Image]:
        """The single pictures that `show` puts on one sheet: frames, or thumbnail and crops."""
        from vtc.picture import views

        return views(image, *self._after(number, stage), fit or self.fit, scores)

    def caption(self, number: int = 0, stage: int | None = None) -> str:
        """What a picture of visual input `number` shows: spec, tokens kept, FLOPs of the call."""
        layout, kept, _ = self._after(number, stage)
        shown = {place for view in layout.views for place in view.places()}
        text = f"{len(kept)} of {layout.tokens} tokens"
        if len(shown) < layout.tokens:
            separators = len(kept) - len(shown.intersection(kept))
            text += f" (separators: {separators} of {layout.tokens - len(shown)})"
        if stage is None:
            last = self.stages[-1].layer if self.stages else 0
            place = f" from decoder layer {last} on" if last else ""
            return f"{self.spec}\n{text}{place}, {self.prefill_flops / self.prefill_flops_full:.2f}x prefill FLOPs"
        done = self.stages[stage]
        place = f"from decoder layer {done.layer} on" if done.layer else "at the input"
        return f"{done.spec}\n{text} {place}"

    def _after(self, number: int, stage: int | None) -> tuple[Layout, tuple[int, ...], tuple[int, ...] | None]:
        """Layout of a visual input, and what was left of it and where the others went after a stage."""
        if not 0 <= number < len(self.kept):
            raise VtcError(f"the call had {len(self.kept)} visual inputs, from 0; there is no number {number}")
        if stage is not None and not -len(self.stages) <= stage < len(self.stages):
            raise VtcError(f"the call had {len(self.stages)} stages; there is no stage {stage}")
        at = self if stage is None else self.stages[stage]
        return self.layouts[number], at.kept[number], at.sources[number]


def make_report(spec: str, record: Record, adapter: Adapter) -> Report:
    """Read a record from the device."""
    from vtc.eval.flops import prefill_flops

    inputs = range(len(record.layouts))
    so_far: list[Selection | None] = [None for _ in inputs]
    stages = []
    for stage in record.stages:
        for group in stage.groups:
            for row, number in enumerate(group.members):
                step, before = group.selection.row(row), so_far[number]
                so_far[number] = step if before is None else before.then(step)
        kept = tuple(_kept(so_far[number], record.layouts[number]) for number in inputs)
        stages.append(StageReport(stage.spec, stage.layer, kept, tuple(map(_sources, so_far))))
    depth = adapter.text_config.num_hidden_layers
    lengths = [[length for first, length in record.stretches if first <= layer][-1] for layer in range(depth)]
    return Report(
        spec=spec,
        kept=tuple(_kept(so_far[number], record.layouts[number]) for number in inputs),
        sources=tuple(map(_sources, so_far)),
        layouts=tuple(record.layouts),
        modalities=tuple(record.modalities),
        stages=tuple(stages),
        prompts=record.prompts,
        sequence_in=record.sequence,
        lengths=tuple(lengths),
        prefill_flops=record.prompts * prefill_flops(adapter.text_config, lengths),
        prefill_flops_full=record.prompts * prefill_flops(adapter.text_config, record.sequence),
        fit=adapter.fit,
    )


def _kept(selection: Selection | None, layout: Layout) -> tuple[int, ...]:
    return tuple(range(layout.tokens)) if selection is None else tuple(selection.index[0].tolist())


def _sources(selection: Selection | None) -> tuple[int, ...] | None:
    return None if selection is None or not selection.merges else tuple(selection.sources()[0].tolist())


def _shape(layout: Layout) -> str:
    """`4x6`, `3x4x6` for three frames or tiles, `4x4 + 8x6` for a thumbnail and its crops."""
    frames = layout.grid[0]
    if len({(view.rows, view.columns) for view in layout.views}) == 1:
        return "x".join(str(side) for side in layout.grid if side > 1 or frames > 1) or "1"
    return " + ".join(f"{view.rows}x{view.columns}" for view in layout.views)
