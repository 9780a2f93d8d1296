"""What `vtc show` does: answers with and without compression, and a picture of what survived."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

import vtc
from vtc import picture
from vtc.errors import VtcError
from vtc.eval import accuracy
from vtc.eval.bench import Options, budgets, load_model


def open_image(path: Path) -> Image.Image:
    """The picture, upright and in RGB."""
    try:
        with Image.open(path) as file:
            return ImageOps.exif_transpose(file).convert("RGB")
    except FileNotFoundError:
        raise VtcError(f"there is no file {path}") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # Pillow's ways to say no
        raise VtcError(f"cannot read {path} as a picture; give a PNG or JPEG file") from error


def show(
    image: Path, question: str, specs: Sequence[str], options: Options, out: Path, *, max_new_tokens: int = 32
) -> dict[str, str]:
    """Save a picture of what each spec keeps of `image`; the answers to `question`, by spec.

    `options.keeps` are the budgets of specs that do not name their own; empty for each strategy's default.
    """
    plan = {"+".join(map(str, one)): one for spec in specs for one in budgets(spec, options.keeps)}
    original = open_image(image)
    if max_new_tokens < 1:
        raise VtcError(f"--max-new-tokens is {max_new_tokens}; use at least 1")
    if out.suffix.lower() not in Image.registered_extensions():
        raise VtcError(f"--out {out} does not end like a picture; use for example {out.with_suffix('.png')}")
    model, processor = load_model(options)
    for compressors in plan.values():
        vtc.compress(model, compressors).remove()  # refuses what this model cannot do, before anything is generated

    inputs = accuracy.to_device(accuracy.process(processor, [question], [original]), model)

    def answer() -> str:
        output: Any = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1)
        return processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()

    # The processor knows better than the model whether a picture is cropped or squashed.
    fit: picture.Fit = "crop" if getattr(processor.image_processor, "do_center_crop", False) else "resize"
    answers = {"all tokens": answer()}
    panels, captions = [picture.enlarge(original)], [f"{question}\nall tokens: {answers['all tokens']}"]
    for spec, compressors in plan.items():
        with vtc.compress(model, compressors) as session:
            answers[spec] = answer()
        report = session.last
        if report is None:
            raise RuntimeError(f"{spec}: the model was called, but no visual input was seen")
        ratio = report.prefill_flops / report.prefill_flops_full
        panels.append(report.show(original, fit=fit))
        kept = f"{report.tokens_out} of {report.tokens_in} tokens, {ratio:.2f}x prefill FLOPs"
        captions.append(f"{spec}\n{kept}\n{answers[spec]}")
    out.parent.mkdir(parents=True, exist_ok=True)
    picture.side_by_side(panels, captions).save(out)
    return answers
