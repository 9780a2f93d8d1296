"""What `vtc show` does: answers with and without compression, and a picture of what survived."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

import vtc
from vtc import adapters, picture
from vtc.errors import VtcError
from vtc.eval import accuracy
from vtc.eval.bench import Options, budgets, load_model
from vtc.eval.lmms.clips import Clip
from vtc.eval.pictures import open_visual
from vtc.report import Report

FRAMES = 8  # of a video
ACROSS = 6  # panels in a row, at most


def show(
    paths: Path | Sequence[Path],
    question: str,
    specs: Sequence[str],
    options: Options,
    out: Path,
    *,
    frames: int = FRAMES,
    max_new_tokens: int = 32,
) -> dict[str, str]:
    """Save a picture of what each spec keeps of an image or a clip; the answers to `question`, by spec.

    `paths` and `frames` are those of `open_visual`. A spec that acts at several places has a panel for each. If `out`
    ends in .gif a clip moves; otherwise its frames are on a contact sheet. `options.keeps` are the budgets of specs
    that do not name their own; empty for each strategy's default.
    """
    plan = {"+".join(map(str, one)): one for spec in specs for one in budgets(spec, options.keeps)}
    visual = open_visual([paths] if isinstance(paths, Path) else paths, frames)
    if max_new_tokens < 1:
        raise VtcError(f"--max-new-tokens is {max_new_tokens}; use at least 1")
    if out.suffix.lower() not in Image.registered_extensions():
        raise VtcError(f"--out {out} does not end like a picture; use for example {out.with_suffix('.png')}")
    model, processor = load_model(options)
    for compressors in plan.values():
        vtc.compress(model, compressors).remove()  # refuses what this model cannot do, before anything is generated
    if isinstance(visual, Clip) and not hasattr(adapters.find(model).multimodal, "get_video_features"):
        raise VtcError(f"{options.model} takes pictures, not clips: give one picture, such as a frame")
    inputs = accuracy.to_device(ask(processor, question, visual), model)

    def answer() -> str:
        output: Any = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1)
        return processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()

    answers, reports = {"all tokens": answer()}, {}
    for spec, compressors in plan.items():
        with vtc.compress(model, compressors) as session:
            answers[spec] = answer()
        if session.last is None:
            raise RuntimeError(f"{spec}: the model was called, but no visual input was seen")
        reports[spec] = session.last
    out.parent.mkdir(parents=True, exist_ok=True)
    # The processor knows better than the model whether a picture is cropped or squashed.
    part = processor.video_processor if isinstance(visual, Clip) else processor.image_processor
    fit: picture.Fit = "crop" if getattr(part, "do_center_crop", False) else "resize"
    save(visual, question, answers, reports, fit, out)
    return answers


def ask(processor: Any, question: str, visual: Image.Image | Clip) -> dict[str, Any]:
    """Model inputs for one question about a picture or a clip."""
    if not isinstance(visual, Clip):
        return accuracy.process(processor, [question], [visual])
    if getattr(processor, "chat_template", None):
        content = [{"type": "video"}, {"type": "text", "text": question}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    else:
        text = f"{processor.video_token}\n{question}\n"
    times = {"video_metadata": [visual.metadata]} if visual.fps else {}
    return dict(processor(text=[text], videos=[visual.frames], do_sample_frames=False, **times, return_tensors="pt"))


def save(
    visual: Image.Image | Clip,
    question: str,
    answers: dict[str, str],
    reports: dict[str, Report],
    fit: picture.Fit,
    out: Path,
) -> None:
    """Draw `visual` as it is, then what each report says is left after each of its stages, side by side."""
    captions = [f"{question}\nall tokens: {answers['all tokens']}"]
    panels: list[tuple[Report, int | None]] = []
    for spec, report in reports.items():
        stages = [*range(len(report.stages) - 1), None]
        panels += [(report, stage) for stage in stages]
        captions += [report.caption(0, stage) for stage in stages]
        captions[-1] += f"\n{answers[spec]}"
    columns = math.ceil(len(captions) / math.ceil(len(captions) / ACROSS))
    layout = panels[0][0].layouts[0]
    if not isinstance(visual, Clip):
        before = picture.enlarge(visual)
        after = [report.show(visual, fit=fit, stage=stage, caption="") for report, stage in panels]
    elif out.suffix.lower() != ".gif":
        before = picture.draw(visual.frames, layout, None)
        after = [report.show(visual.frames, fit=fit, stage=stage, caption="") for report, stage in panels]
    else:
        views = [report.views(visual.frames, fit=fit, stage=stage) for report, stage in panels]
        moments = zip(picture.views(visual.frames, layout, None), *views, strict=True)
        picture.save_gif([picture.side_by_side(moment, captions, columns) for moment in moments], out)
        return
    picture.side_by_side([before, *after], captions, columns).save(out)
