"""What `vtc show` does: answers with and without compression, and a picture of what survived."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

import vtc
from vtc import adapters, picture
from vtc.compressor import Compressor, Scorer
from vtc.errors import VtcError
from vtc.eval import accuracy
from vtc.eval.bench import Options, budgets, check_folder, load_model
from vtc.eval.lmms.clips import Clip
from vtc.eval.pictures import open_visual
from vtc.report import Report
from vtc.selection import Selection
from vtc.visual import Visual

FRAMES = 8  # of a video
ACROSS, WIDEST = 6, 3200  # a row: panels and pixels, at most


@dataclass(frozen=True)
class Panel:
    """One of the pictures: what survived a stage, or all of them; perhaps as a heat map, perhaps with an answer."""

    report: Report
    stage: int | None = None
    scores: Sequence[float] | None = None
    answer: str | None = None

    @property
    def caption(self) -> str:
        heat = "lighter: higher score" if self.scores else None
        answer = None if self.answer is None else f"answer: {self.answer}"
        return "\n".join(filter(None, (self.report.caption(0, self.stage), heat, answer)))


def show(
    paths: Path | Sequence[Path],
    question: str,
    specs: Sequence[str],
    options: Options,
    out: Path,
    *,
    frames: int = FRAMES,
    scores: bool = False,
    max_new_tokens: int = 32,
) -> dict[str, str]:
    """Save a picture of what each spec keeps of an image or a clip; the answers to `question`, by spec.

    `paths` and `frames` are those of `open_visual`. A spec that acts at several places has a panel for each. If `out`
    ends in .gif a clip moves; otherwise its frames are on a contact sheet. With `scores` panels are heat maps of the
    scores or the attention that a strategy reads, if any. `options.keeps` are the budgets of specs that do not
    name their own; empty for each strategy's default.
    """
    plan = {"+".join(map(str, one)): one for spec in specs for one in budgets(spec, options.keeps)}
    visual = open_visual([paths] if isinstance(paths, Path) else paths, frames)
    if max_new_tokens < 1:
        raise VtcError(f"--max-new-tokens is {max_new_tokens}; use at least 1")
    if out.suffix.lower() not in Image.registered_extensions():
        raise VtcError(f"--out {out} does not end like a picture; use for example {out.with_suffix('.png')}")
    check_folder(out.parent, overwrite=True)
    model, processor = load_model(options)
    for compressors in plan.values():
        vtc.compress(model, compressors).remove()  # refuses what this model cannot do, before anything is generated
    if isinstance(visual, Clip) and not hasattr(adapters.find(model).multimodal, "get_video_features"):
        raise VtcError(f"{options.model} takes pictures, not clips: give one picture, such as a frame")
    inputs = accuracy.to_device(ask(processor, question, visual), model)

    def answer() -> str:
        output: Any = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1)
        return processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()

    answers, panels = {"all tokens": answer()}, []
    for spec, compressors in plan.items():
        seen: dict[str, list[Tensor | None]] = {}
        with vtc.compress(model, [watched(one, seen) for one in compressors] if scores else compressors) as session:
            answers[spec] = answer()
        if session.last is None:
            raise RuntimeError(f"{spec}: the model was called, but no visual input was seen")
        panels += panels_of(session.last, seen, answers[spec])
    out.parent.mkdir(parents=True, exist_ok=True)
    # The processor knows better than the model whether a picture is cropped or squashed.
    part = processor.video_processor if isinstance(visual, Clip) else processor.image_processor
    fit: picture.Fit = "crop" if getattr(part, "do_center_crop", False) else "resize"
    save(visual, f"{question}\nall tokens: {answers['all tokens']}", panels, fit, out)
    return answers


def ask(processor: Any, question: str, visual: Image.Image | Clip) -> dict[str, Any]:
    """Model inputs for one question about a picture or a clip.

    Raises:
        VtcError: the question holds the processor's placeholder of a picture or clip.
    """
    for mark in (getattr(processor, name, None) for name in ("image_token", "video_token")):
        if mark and mark in question:  # in transformers 5.17 the processor stops without a word
            raise VtcError(f"'{mark}' in the question stands for one more picture or clip: leave it out")
    if not isinstance(visual, Clip):
        return accuracy.process(processor, [question], [[visual]])
    text = accuracy.prompt(processor, question, ["video"])
    times = {"video_metadata": [visual.metadata]} if visual.fps else {}
    return dict(processor(text=[text], videos=[visual.frames], do_sample_frames=False, **times, return_tensors="pt"))


def watched(compressor: Compressor, seen: dict[str, list[Tensor | None]]) -> Compressor:
    """A compressor that does the same, and notes by its spec the scores or the attention `(N,)` that it reads.

    Once per choice of the first visual input; `None` if it reads neither.
    """

    class Watched(type(compressor)):  # type: ignore[misc]
        def select(self, visual: Visual) -> Selection:
            selection = super().select(visual)
            found = None
            if isinstance(self, Scorer):
                found = self.score(visual)
            elif self.needs & {"cls", "received", "logits"}:
                found = visual.saliency.mean(1)
            elif self.needs & {"attention", "ahead"}:
                found = visual.attention
            seen.setdefault(str(self), []).append(None if found is None else found[0])
            return selection

    return Watched(**{item.name: getattr(compressor, item.name) for item in fields(compressor)})


def panels_of(report: Report, seen: dict[str, list[Tensor | None]], answer: str) -> list[Panel]:
    """A panel for each stage; the last one has the answer."""
    tokens = report.layouts[0].tokens
    found: list[Panel] = []
    before: Sequence[int] = range(tokens)
    for number, stage in enumerate(report.stages):
        after: Sequence[int] = stage.kept[0]
        scores: list[float] | None = None
        noted = seen.get(stage.spec)
        values = noted.pop(0) if noted and len(after) < len(before) else None
        if values is not None:
            scores = [math.nan] * tokens
            for place, value in zip(before, values.tolist(), strict=True):
                scores[place] = value
        found.append(Panel(report, number, scores))
        before = after
    return [*found[:-1], Panel(report, None, found[-1].scores if found else None, answer)]


def save(visual: Image.Image | Clip, question: str, panels: Sequence[Panel], fit: picture.Fit, out: Path) -> None:
    """Draw `visual` as it is above `question`, and beside it what survived."""
    captions = [question, *(panel.caption for panel in panels)]
    layout = panels[0].report.layouts[0]
    images: Any = visual.frames if isinstance(visual, Clip) else visual
    if isinstance(visual, Clip) and out.suffix.lower() == ".gif":
        views = [panel.report.views(images, 0, fit, panel.stage, panel.scores) for panel in panels]
        moments = zip(picture.views(images, layout, None), *views, strict=True)
        columns = in_a_row(len(captions), views[0][0].width)
        picture.save_gif([picture.side_by_side(moment, captions, columns) for moment in moments], out)
        return
    before = picture.draw(images, layout, None) if isinstance(visual, Clip) else picture.enlarge(visual)
    after = [panel.report.show(images, 0, fit, panel.stage, panel.scores, caption="") for panel in panels]
    picture.side_by_side([before, *after], captions, in_a_row(len(captions), after[0].width)).save(out)


def in_a_row(panels: int, width: int) -> int:
    """How many of the panels, each `width` pixels wide, go into a row, for rows that are about equally full."""
    across = max(1, min(ACROSS, WIDEST // width))
    return math.ceil(panels / math.ceil(panels / across))
