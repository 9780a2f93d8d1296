"""The HTML page of a report: one file that needs no network, with plots to look into."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable, Iterable, Sequence
from itertools import zip_longest
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

import jinja2
from markupsafe import Markup, escape
from PIL import Image

from vtc import picture
from vtc.eval import content, tasks
from vtc.eval.plot import BASELINES
from vtc.eval.report import Row, Run, Sample
from vtc.eval.survivors import layout_of
from vtc.eval.table import Table, conditions, groups, label, prefill_flops, remarks_of, visual_tokens

if TYPE_CHECKING:
    from vtc.eval.items import Item, Medium

TEMPLATE = Path(__file__).with_name("assets") / "report.html"
SIDE = 256  # of a drawing, in pixels
SHEET = 640  # of one of several views
ROLES = {"none": "none", "blind": "blind", **dict.fromkeys(BASELINES, "baseline")}  # of the others: ""
COSTS: dict[str, Callable[[Row], float | None]] = {
    "tokens": visual_tokens,
    "flops": prefill_flops,
    "ttft": lambda row: row["ttft_ms"],
}


def page(sections: Sequence[dict[str, Any]], comparison: Table | None, remarks: Sequence[str]) -> str:
    """The page of one run, or of two and what changed between them."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters.update(code=_code, breaks=_breaks)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    title = " → ".join(dict.fromkeys(one["model"] for one in sections))
    return template.render(title=title, runs=sections, comparison=comparison, remarks=remarks)


def section(run: Run, drawings: int) -> dict[str, Any]:
    """What the page tells of one run of `vtc bench`."""
    told = plain_section(run.name, run.rows[0]["model"], conditions(run.rows[0]), run.tables())
    told |= {"plot": {"points": points(run.rows), "kinds": kinds(run.rows)}, "remarks": remarks_of(run.rows)}
    return {**told, "plotted": bool(told["plot"]["points"]), "cards": cards(run, drawings)}


def plain_section(name: str, model: str, conditions: str, tables: Sequence[Table]) -> dict[str, Any]:
    """The same of a run that has tables only."""
    told = {"name": name, "model": model, "conditions": conditions, "tables": tables}
    return {**told, "plot": None, "plotted": False, "cards": [], "remarks": []}


# ---------------------------------------------------------------------------------------------------------- the plot


def kinds(rows: Sequence[Row]) -> list[str]:
    """The types of question, in order of first appearance."""
    return list(dict.fromkeys(kind for row in rows for kind in row["by_type"]))


def points(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """One point per setting, seeds together, as the script of the page reads it.

    `scores` has [accuracy, low, high] in per cent for `all` questions and for each type; of several seeds, the mean and
    one standard deviation to either side.
    """
    found = []
    for group in groups([row for row in rows if row["accuracy"] is not None]):
        first = group[0]
        costs = {name: _mean([of(row) for row in group]) for name, of in COSTS.items()}
        scores = {"all": _score([(row["accuracy"], row["accuracy_ci"]) for row in group])}
        for kind in kinds(rows):
            some = [row["by_type"][kind] for row in group if kind in row["by_type"]]
            if some:
                scores[kind] = _score([(score["accuracy"], score["ci"]) for score in some])
        found.append(
            {
                "name": label(first["spec"]),
                "role": ROLES.get(first["strategy"], ""),
                "keep": str(first["keep"]),
                "seeds": len(group),
                "tokens_in": visual_tokens(first, "in"),
                "ratio": first["prefill_flops_ratio"],
                "costs": costs,
                "scores": scores,
            }
        )
    return found


def _mean(values: Sequence[float | None]) -> float | None:
    """The mean, or `None` where something was not measured."""
    known = [value for value in values if value is not None]
    return mean(known) if len(known) == len(values) else None


def _score(values: Sequence[tuple[float, Sequence[float]]]) -> list[float]:
    if len(values) == 1:
        value, (low, high) = values[0]
    else:
        value, spread = mean(one for one, _ in values), stdev(one for one, _ in values)
        low, high = value - spread, value + spread
    return [round(100 * one, 3) for one in (value, low, high)]


# ------------------------------------------------------------------------------------------------- disagreements


def cards(run: Run, limit: int) -> list[dict[str, Any]]:
    """Questions on which a compressed model and the full one are not both right or both wrong, at most `limit`.

    Setting after setting in turns, so that each has its share, and if possible no question twice; of a setting, what
    compression lost and what it gained in turns too. Pictures are there for the bundled questions only.
    """
    full = run.samples.get("none", {})
    # Of several seeds, the first.
    specs = [group[0]["spec"] for group in groups(run.rows) if group[0]["strategy"] not in ("none", "blind")]
    queues = [_disagreements(full, run.samples.get(spec, {})) for spec in specs]
    chosen: list[Sample] = []
    shown: set[str] = set()
    while any(queues) and len(chosen) < limit:
        for queue in queues:
            if queue and len(chosen) < limit:
                sample = next((one for one in queue if one["id"] not in shown), queue[0])
                queue.remove(sample)
                shown.add(sample["id"])
                chosen.append(sample)
    chosen.sort(key=lambda sample: specs.index(sample["spec"]))
    items = _items(run.rows[0].get("task") or tasks.DEFAULT, {sample["id"] for sample in chosen})
    found = []
    for sample in chosen:
        item = items.get(sample["id"])
        known = item is not None and item.question == sample["question"] and len(item.media) == 1
        before, after = _drawings(item.media[0], sample) if known and item else (None, None)
        found.append({"sample": sample, "full": full[sample["id"]], "before": before, "after": after})
    return found


def _disagreements(full: dict[str, Sample], mine: dict[str, Sample]) -> list[Sample]:
    pairs = [(full[key], sample) for key, sample in mine.items() if key in full]
    lost = [sample for reference, sample in pairs if reference["right"] and not sample["right"]]
    gained = [sample for reference, sample in pairs if sample["right"] and not reference["right"]]
    return [sample for turn in zip_longest(lost, gained) for sample in turn if sample is not None]


def _items(task: str, wanted: Iterable[str]) -> dict[str, Item]:
    """The questions of a bundled task with these ids, which are `split/scene/type`."""
    missing = set(wanted)
    found = {}
    for split in sorted({key.partition("/")[0] for key in missing} & set(content.SPLITS)):
        last = max(_number(key) for key in missing if key.startswith(f"{split}/"))
        for item in tasks.questions(task, split):
            if item.index > last:
                break
            key = f"{split}/{item.index}/{item.type}"
            if key in missing:
                found[key] = item
    return found


def _number(key: str) -> int:
    match = re.fullmatch(r"\w+/(\d+)/\w+", key)
    return int(match[1]) if match else -1


def _drawings(medium: Medium, sample: Sample) -> tuple[str | None, str | None]:
    """A picture, and what survived of it, as `vtc show` draws it; of a clip, sheets of all frames.

    What survived is `None` where the sample does not say, and so is a clip.
    """
    before = _data(medium) if isinstance(medium, Image.Image) else None
    layout = layout_of(sample)
    if layout is None:
        return before, None
    drawn = picture.draw(medium, layout, sample["kept"], sample.get("sources"), fit="resize")
    side = SIDE if len(layout.views) == 1 else SHEET
    return before or _data(_fit(picture.draw(medium, layout, None), side)), _data(_fit(drawn, side))


def _fit(image: Image.Image, side: int) -> Image.Image:
    """A picture whose longer edge is `side`."""
    scale = side / max(image.size)
    width, height = (max(1, round(edge * scale)) for edge in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS)


def _data(image: Image.Image) -> str:
    """A picture as a `data:` address; 128 colours are enough for a drawing this small."""
    out = io.BytesIO()
    image.convert("RGB").quantize(128).save(out, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()


def _code(text: str) -> Markup:
    """`text` with what is in backticks as code."""
    return Markup(re.sub(r"`([^`]*)`", r"<code>\1</code>", str(escape(text.strip()))))


def _breaks(text: str) -> Markup:
    """`text`, which may be a spec, with places where a line may end."""
    return Markup(re.sub(r"([:,+])", r"\1<wbr>", str(escape(text))))
