"""What `vtc explore` shows, as HTML: every word that is not ours is escaped, and every picture comes with the page."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape
from typing import Any

from PIL import Image

from vtc.compressor import strategy
from vtc.eval.explore import Answer, Explorer, Visual, name_of
from vtc.eval.lmms.clips import Clip

SECONDS = 0.5  # per frame of a clip
NO_BUDGET = "<p>There is no picture yet.</p>"
NO_ANSWERS = '<p class="hint">The answers come here, side by side.</p>'
VERDICTS = {"first": "the model as it is", "same": "the same answer", "other": "another answer"}
SPECS = """
Both boxes also take a spec with parameters, such as `fastv:layer=1,keep=64`; its `keep` goes before the slider's. `vtc
list --json` names all parameters.
"""


def alert(text: str) -> str:
    """A message about what was wrong."""
    return f'<div role="alert">{escape(text)}</div>'


def preview(visual: Visual, name: str) -> str:
    """What is asked about, with its size."""
    if isinstance(visual, Clip):
        count, height, width, _ = visual.frames.shape
        size, frames = f"{count} frames of {width} x {height}", [Image.fromarray(frame) for frame in visual.frames]
    else:
        size, frames = f"{visual.width} x {visual.height}", [visual]
    caption = f"{name}, {size}"
    return f'<figure class="preview">{_picture(frames, caption)}<figcaption>{escape(caption)}</figcaption></figure>'


def budget(tokens: int, keep: float) -> str:
    """What `keep` per cent are of the visual tokens of a picture or a clip."""
    return f"<p>{keep:g} % of {tokens:,} visual tokens: <b>{max(1, int(tokens * keep / 100 + 0.5)):,}</b></p>"


def cards(answers: Sequence[Answer]) -> str:
    """The answers side by side, each with what the model saw and what it cost; the first one has all tokens."""
    return f'<div class="cards">{"".join(_card(one, answers[0]) for one in answers)}</div>'


def _card(one: Answer, full: Answer) -> str:
    verdict = "first" if one is full else "same" if one.text == full.text else "other"
    return f"""
<article class="card">
<h3>{escape(one.spec)}</h3>
<div>{_seen(one, full)}</div>
<p class="said">{escape(one.text) or "(nothing)"}</p>
<p class="{verdict}">{VERDICTS[verdict]}</p>
{_costs(one, full)}
</article>"""


def _seen(one: Answer, full: Answer) -> str:
    if not one.pictures:
        return "<p>No picture: this model looks at tiles and does not say where on the picture they lie.</p>"
    alt = f"What is left with {one.spec}: {one.tokens} of {full.tokens} tokens"
    if not one.labels:
        return _zoomable(one.pictures, alt)
    return "".join(
        f"<figure>{_zoomable([drawn], f'{alt}, {label}')}<figcaption>{escape(label)}</figcaption></figure>"
        for drawn, label in zip(one.pictures, one.labels, strict=True)
    )


def _zoomable(pictures: Sequence[Image.Image], alt: str) -> str:
    """A picture that fills the window when it is clicked on, and shrinks when it is clicked on again."""
    return f'<label><input type="checkbox" aria-label="enlarge">{_picture(pictures, alt)}</label>'


def _costs(one: Answer, full: Answer) -> str:
    """Tokens, FLOPs and times, and how much of those with all tokens they are."""
    where = f" from layer {one.layer} on" if one.layer else ""
    times, before = one.times, full.times
    rows: list[tuple[str, str, str, float | None]] = [
        ("", f"visual tokens{where}", f"{one.tokens:,}", one.tokens / full.tokens),
        ("", "prefill FLOPs", flops(one.flops), one.flops / full.flops),
        ("", "time to first token", _ms(times.ttft), times.ttft / before.ttft),
        ("part", "vision encoder", _ms(times.encoder), None),
        ("part", "selection", _ms(times.selection), None),
        ("part", "language model", _ms(times.prefill), times.prefill / before.prefill),
    ]
    lines = ['<tr class="head"><td colspan="3">of all tokens</td></tr>']
    for kind, name, value, share in rows:
        compared = "" if share is None else f"{share:.0%}"
        lines.append(f'<tr class="{kind}"><th scope="row">{name}</th><td>{value}</td><td>{compared}</td></tr>')
    return f"<table>{''.join(lines)}</table>"


def _ms(time: float) -> str:
    return f"{time:,.0f} ms" if time >= 100 else f"{time:.1f} ms"


def flops(count: int) -> str:
    """`1.15 G`"""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return str(count)


def strategies(explorer: Explorer) -> str:
    """A list, in Markdown, of what there is to choose, and why the rest is missing."""
    lines = []
    for spec in explorer.offers:
        cls = strategy(name_of(spec))
        paper = f" ([{cls.paper}](https://arxiv.org/abs/{cls.paper}))" if cls.paper else ""
        lines.append(f"- **{spec}**: {(cls.__doc__ or '').strip().partition(chr(10))[0]}{paper}")
    missing = [f"- **{name}**: {reason}" for name, reason in explorer.missing.items()]
    return "\n".join([*lines, SPECS, *(["Not with this model:\n", *missing] if missing else [])])


def _picture(pictures: Sequence[Image.Image], alt: str) -> str:
    """A picture, or several that take turns."""
    buffer = io.BytesIO()
    first, *others = pictures
    moving: dict[str, Any] = {"save_all": True, "append_images": others, "duration": round(1000 * SECONDS), "loop": 0}
    first.save(buffer, "WEBP", quality=90, **(moving if others else {}))
    return f'<img alt="{escape(alt)}" src="data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}">'
