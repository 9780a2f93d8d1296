"""What one prompt costs, part by part: encoder, projector, selection, prefill, and each step of generation.

    from vtc.eval.estimate import estimate

    cost = estimate("llava-1.5-7b", 576, text=64, schedule="2:576,30:288", convention="fastv")
    cost.prefill.macs, cost.prefill.flops, cost.ratio

The language model is counted by the convention that is asked for, the other parts as in `exact`. Text counts as far as
it is given: many published tables leave it out. `vtc flops` prints the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vtc.errors import VtcError, did_you_mean
from vtc.eval import checkpoints
from vtc.eval.flops import (
    CONVENTION,
    CONVENTIONS,
    PACKED,
    Count,
    Decoder,
    decode,
    encoder,
    human,
    per_edge,
    prefill,
    projector,
)
from vtc.kernels.greedy.naive import WHOLE


@dataclass(frozen=True)
class Seen:
    """What an encoder looks at.

    Attributes:
        views: number of images or crops of one size.
        frames: number of frames of a clip.
        grid: frames, rows and columns of visual tokens, for Qwen.
    """

    views: int | None = None
    frames: int | None = None
    grid: tuple[int, int, int] | None = None

    def fill(self, config: Any, tokens: int) -> Seen | None:
        """What makes `tokens` visual tokens, if nothing was said and there is only one way; else `None`."""
        if (self.views, self.frames, self.grid) != (None, None, None):
            return self
        if config.vision_config.model_type in PACKED:
            side = math.isqrt(tokens)
            return Seen(grid=(1, side, side)) if side and side * side == tokens else None
        for frames, size in ((True, frame_tokens(config)), (False, view_tokens(config))):
            if size and tokens and tokens % size == 0:
                return Seen(frames=tokens // size) if frames else Seen(views=tokens // size)
        return None

    def work(self, config: Any, tokens: int) -> tuple[Count, Count]:
        """Encoder and projector."""
        vision, packed = config.vision_config, config.vision_config.model_type in PACKED
        if sum(said is not None for said in (self.views, self.frames, self.grid)) > 1:
            raise VtcError("views, frames and grid each say what the encoder looks at: give one of them")
        for what, count in (("views", self.views), ("frames", self.frames)):
            if count is not None and count < 1:
                raise VtcError(f"{what}: {count} is too few; give at least 1")
        if packed != (self.grid is not None):
            known = (
                "a grid: give frames, rows and columns of tokens" if packed else "views or frames: give their number"
            )
            raise VtcError(f"the encoder of a {config.model_type} looks at {known}")
        if self.grid is not None:
            if math.prod(self.grid) != tokens:
                size = " x ".join(map(str, self.grid))
                raise VtcError(f"a grid of {size} makes {math.prod(self.grid)} tokens, not {tokens}")
            return encoder(vision, grid=self.grid), projector(config, tokens)
        if self.frames is not None and not frame_tokens(config):
            raise VtcError(f"a {config.model_type} takes no clips; give the number of views")
        count = self.views if self.frames is None else self.frames
        pooled = config.model_type == "llava_next_video" and self.frames is not None  # before the projector
        rows = frame_tokens(config) if pooled else view_tokens(config)
        assert count is not None and rows is not None
        return encoder(vision, images=count), projector(config, count * rows)

    def pairs(self, config: Any) -> int:
        """Pairs of patches that look at each other in one layer of the encoder, without windows."""
        vision = config.vision_config
        if self.grid is not None:
            frames, rows, columns = self.grid
            return frames * (rows * columns * vision.spatial_merge_size**2) ** 2
        return (self.frames or self.views or 0) * per_edge(vision) ** 4

    @property
    def pictures(self) -> int:
        """Frames of the clip; 1 if it is none."""
        return self.frames or (self.grid[0] if self.grid is not None else 1)

    def __str__(self) -> str:
        if self.grid is not None:
            return "grid of {} x {} x {}".format(*self.grid)
        count, word = (self.views, "view") if self.frames is None else (self.frames, "frame")
        return f"{count} {word}{'' if count == 1 else 's'}"


def view_tokens(config: Any) -> int:
    """Rows of the projector per view of an encoder of fixed views."""
    patches = per_edge(config.vision_config)
    if hasattr(config, "downsample_ratio"):
        return int(patches * config.downsample_ratio) ** 2
    whole = config.vision_feature_select_strategy == "full" and "siglip" not in config.vision_config.model_type
    return patches**2 + int(whole)  # with the class token


def frame_tokens(config: Any) -> int | None:
    """Visual tokens per frame of a clip, or `None` for models that take no clips."""
    patches = per_edge(config.vision_config)
    if config.model_type == "llava_onevision":
        return math.ceil(patches / 2) ** 2
    if config.model_type == "llava_next_video":
        return (patches // config.spatial_pool_stride) ** 2
    return view_tokens(config) if config.model_type == "internvl" else None


# ---------------------------------------------------------------------------------------------------------- selection


@dataclass(frozen=True)
class Cut:
    """One place where visual tokens are dropped, and the sizes that its cost may depend on."""

    before: int  # visual tokens
    after: int
    text: int
    width: int  # of the language model's features
    attended: int  # width of all its query heads together
    keyed: int  # and of all its key heads
    encoder_width: int
    encoder_layers: int
    frames: int = 1  # of a clip
    patches: int = 0  # of all views; tokens may be fewer
    looks: int | None = None  # pairs of patches in one layer of the encoder; None if what it looks at is not known


def _row(cut: Cut) -> int:
    """The class token's query with all keys, in one encoder layer."""
    return cut.patches * cut.encoder_width


def _rows(cut: Cut) -> int:
    """The same in each layer from two thirds of the depth to the last but one."""
    return _row(cut) * max(1, cut.encoder_layers - 1 - 2 * cut.encoder_layers // 3)


def _chosen(cut: Cut) -> int:
    """Each survivor with all tokens."""
    return cut.after * cut.before * cut.width


def _pairs(cut: Cut) -> int:
    """All tokens with all tokens; of so many that this is not kept, each survivor with all of them once more."""
    return cut.before**2 * cut.width + (_chosen(cut) if cut.before**2 > WHOLE else 0)


def _merged(cut: Cut) -> int:
    """Each token added up once."""
    return cut.before * cut.width


def _prompt(cut: Cut) -> int:
    """The last token's query, computed once more, and its products with all keys, in one decoder layer."""
    return (cut.width + cut.before + cut.text) * cut.attended


def _keys(cut: Cut) -> int:
    """All keys, computed for a layer that has not run yet."""
    return cut.width * (cut.before + cut.text) * cut.keyed


def _received(cut: Cut) -> int:
    """All patches' queries with the keys of their own view, in one encoder layer."""
    if cut.looks is None:
        raise VtcError("the selection reads a whole encoder layer: say what it looks at (views, frames or a grid)")
    return cut.looks * cut.encoder_width


def _static(cut: Cut) -> int:
    """Of a clip: each frame with itself and the next, means of frames, and distances of the means within each segment.

    Which places are static depends on the clip, but not how much is computed: segments of at least two frames are
    worked on side by side, as many as there can be, and all places of each.
    """
    if cut.frames < 2:
        return 0
    places, segments = cut.before // cut.frames, cut.frames // 2
    return ((2 * cut.frames - 1) * places + segments * cut.frames * places + segments * places**2) * cut.width


def _merged_frames(cut: Cut) -> int:
    """Each token of a clip added up once; of a picture, none is."""
    return _merged(cut) if cut.frames > 1 else 0


# Multiply-adds per cut, by strategy with its default options. Sorting and indexing are not counted; a symmetric product
# counts in full, of which torch computes one half where it can.
SELECTION: dict[str, tuple[Callable[[Cut], int], ...]] = {
    "none": (),
    "random": (),
    "uniform": (),
    "pool": (_merged,),
    "fastervlm": (_row,),
    "vtc-cls": (_rows,),
    "globalcom2": (_row,),
    "divprune": (_pairs,),
    "todre": (_row, _chosen),
    "todre-inner": (),
    "fastv": (_prompt,),
    "pyramiddrop": (_prompt, _keys),
    "holitom": (_received, _static, _merged_frames),
    "holitom-inner": (_prompt, _chosen, _merged),
}


def selection(strategy: str, cuts: Sequence[Cut]) -> Count:
    """Work of choosing survivors, at each of several cuts."""
    if strategy not in SELECTION:
        raise VtcError(
            f"no closed form for the selection of '{strategy}'{did_you_mean(strategy, SELECTION)}; "
            f"there is one for {', '.join(SELECTION)}"
        )
    return Count(sum(form(cut) for form in SELECTION[strategy] for cut in cuts))


# ----------------------------------------------------------------------------------------------------------- estimate

Schedule = tuple[tuple[int, int], ...]


def parse_schedule(text: str) -> Schedule:
    """`2:576,30:288` as pairs of a number of layers and the visual tokens that they see.

    Raises:
        VtcError: it is written otherwise.
    """
    pairs = []
    for part in text.split(","):
        layers, colon, tokens = part.strip().partition(":")
        if not (colon and layers.isdecimal() and tokens.isdecimal() and int(layers)):
            raise VtcError(f"schedule: '{part.strip()}' is not layers:tokens, for example 2:576,30:288")
        pairs.append((int(layers), int(tokens)))
    return tuple(pairs)


def parse_grid(text: str) -> tuple[int, int, int]:
    """`1x24x24` as frames, rows and columns.

    Raises:
        VtcError: it is written otherwise.
    """
    numbers = text.lower().split("x")
    if len(numbers) != 3 or not all(number.isdecimal() and int(number) for number in numbers):
        raise VtcError(f"grid: '{text}' is not frames x rows x columns of visual tokens, for example 1x24x24")
    frames, rows, columns = map(int, numbers)
    return frames, rows, columns


@dataclass(frozen=True)
class Estimate:
    """What one prompt costs.

    Attributes:
        name: of the model.
        convention: in which `prefill`, `full` and `decode` are counted; the other parts are always `exact`.
        visual, text: tokens of each kind that the language model is given.
        schedule: pairs of a number of layers and the visual tokens that they see.
        causal: whether masked pairs are left out.
        seen: what the encoder looks at; `None` if that was not said and does not follow.
        encoder, projector: `None` likewise.
        selection: `None` if no strategy was named.
        prefill: the language model on this schedule.
        full: the language model on all visual tokens in every layer.
        decode: each step of generation, one after the other.
    """

    name: str
    convention: str
    visual: int
    text: int
    schedule: Schedule
    causal: bool
    seen: Seen | None
    encoder: Count | None
    projector: Count | None
    selection: Count | None
    prefill: Count
    full: Count
    decode: tuple[Count, ...]

    @property
    def ratio(self) -> float:
        """FLOPs of the prefill, relative to all visual tokens."""
        return self.prefill.flops / self.full.flops if self.full.flops else 1.0

    @property
    def first_token(self) -> Count | None:
        """All parts up to the first token; only where one convention covers them."""
        if self.convention != CONVENTION or self.encoder is None or self.projector is None:
            return None
        return self.encoder + self.projector + (self.selection or Count()) + self.prefill

    def to_dict(self) -> dict[str, Any]:
        """Plain data; every part names its MACs and its FLOPs."""

        def plain(count: Count | None) -> dict[str, int] | None:
            return None if count is None else count.to_dict()

        return {
            "config": self.name,
            "convention": self.convention,
            "published_as": CONVENTIONS[self.convention].prints,
            "visual_tokens": self.visual,
            "text_tokens": self.text,
            "schedule": [list(pair) for pair in self.schedule],
            "causal": self.causal,
            "views": self.seen.views if self.seen else None,
            "frames": self.seen.frames if self.seen else None,
            "grid": list(self.seen.grid) if self.seen and self.seen.grid else None,
            "encoder": plain(self.encoder),
            "projector": plain(self.projector),
            "selection": plain(self.selection),
            "prefill": plain(self.prefill),
            "prefill_full": plain(self.full),
            "prefill_ratio": self.ratio,
            "first_token": plain(self.first_token),
            "decode": [plain(step) for step in self.decode],
            "decode_total": plain(sum(self.decode, Count())),
        }


def estimate(
    config: Any,
    tokens: int,
    *,
    text: int = 0,
    schedule: str | Sequence[tuple[int, int]] | None = None,
    convention: str = CONVENTION,
    causal: bool = False,
    lm_head_tokens: int | None = None,
    decode_steps: int = 1,
    strategy: str | None = None,
    views: int | None = None,
    frames: int | None = None,
    grid: tuple[int, int, int] | None = None,
) -> Estimate:
    """What one prompt costs, part by part.

    Args:
        config: name of a bundled config, a folder with a `config.json`, or the config of a model.
        tokens: visual tokens that encoder and projector make.
        text: other tokens of the prompt. They count in every convention; for tables that leave them out, give 0.
        schedule: pairs of a number of layers and the visual tokens that they see, for all layers, or the same as text:
            `"2:576,30:288"`. By default every layer sees all of them.
        convention: one of `CONVENTIONS`.
        causal: leave masked pairs out; `exact` only.
        lm_head_tokens: rows of logits of the prefill; by default what the convention counts.
        decode_steps: number of steps of generation to count.
        strategy: counts the selection of this strategy at every place where the schedule drops tokens.
        views, frames, grid: what the encoder looks at, one of the three: a number of images or crops, a number of
            frames, or for Qwen frames, rows and columns of visual tokens. By default what makes exactly `tokens`.

    Raises:
        VtcError: an unknown config, convention or strategy, or a schedule that does not fit.
    """
    name = str(config) if isinstance(config, (str, Path)) else config.model_type
    config = checkpoints.config(config) if isinstance(config, (str, Path)) else config
    text_config = getattr(config, "text_config", config)
    decoder = Decoder.of(text_config)
    for what, number in (
        ("tokens", tokens),
        ("text", text),
        ("decode steps", decode_steps),
        ("rows of logits", lm_head_tokens or 0),
    ):
        if number < 0:
            raise VtcError(f"{what}: {number} is negative")
    pairs = _schedule(schedule, decoder.layers, tokens, name)
    visual = [seen for layers, seen in pairs for _ in range(layers)]
    lengths = [seen + text for seen in visual]
    seen = Seen(views, frames, grid).fill(config, tokens) if hasattr(config, "vision_config") else None
    nothing = None if tokens else Count()  # without visual tokens, encoder and projector do not run
    work = (nothing, nothing) if seen is None else seen.work(config, tokens)
    options: dict[str, Any] = dict(convention=convention, causal=causal, lm_head_tokens=lm_head_tokens)
    return Estimate(
        name=name,
        convention=convention,
        visual=tokens,
        text=text,
        schedule=pairs,
        causal=causal,
        seen=seen,
        encoder=work[0],
        projector=work[1],
        selection=None if strategy is None else selection(strategy, _cuts(config, tokens, visual, text, seen)),
        prefill=prefill(text_config, lengths, **options),
        full=prefill(text_config, tokens + text, **options),
        decode=tuple(
            decode(text_config, [length + step for length in lengths], convention=convention)
            for step in range(1, decode_steps + 1)
        ),
    )


def _schedule(schedule: str | Sequence[tuple[int, int]] | None, depth: int, tokens: int, name: str) -> Schedule:
    if schedule is None:
        return ((depth, tokens),)
    pairs = parse_schedule(schedule) if isinstance(schedule, str) else tuple((n, seen) for n, seen in schedule)
    covered = sum(layers for layers, _ in pairs)
    if covered != depth:
        raise VtcError(f"the schedule is for {covered} layers, but {name} has {depth}")
    most = max(seen for _, seen in pairs)
    if most > tokens:
        raise VtcError(f"the schedule has layers with {most} visual tokens, but there are only {tokens}")
    return pairs


def _cuts(config: Any, tokens: int, visual: Sequence[int], text: int, seen: Seen | None) -> list[Cut]:
    """Every place where tokens are dropped: in front of the first layer, or between two."""
    frames, looks = (1, None) if seen is None else (seen.pictures, seen.pairs(config))
    steps = zip([tokens, *visual], visual, strict=False)
    return [cut(config, before, after, text, frames, looks) for before, after in steps if after < before]


def cut(config: Any, before: int, after: int, text: int, frames: int = 1, looks: int | None = None) -> Cut:
    """One place where tokens are dropped, with the sizes of a model."""
    vision: Any = getattr(config, "vision_config", None)
    decoder = Decoder.of(getattr(config, "text_config", config))
    square = vision is not None and vision.model_type not in PACKED
    return Cut(
        before=before,
        after=after,
        text=text,
        width=decoder.width,
        attended=decoder.heads * decoder.head_width,
        keyed=decoder.key_heads * decoder.head_width,
        encoder_width=getattr(vision, "embed_dim", 0) or getattr(vision, "hidden_size", 0),
        encoder_layers=getattr(vision, "num_hidden_layers", 0),
        frames=frames,
        patches=before if looks is None or not square else looks // per_edge(vision) ** 2,
        looks=looks,
    )


# -------------------------------------------------------------------------------------------------------------- table


def table(cost: Estimate) -> str:
    """The parts of an estimate for a terminal."""
    layers = ", ".join(f"{layers} with {seen}" for layers, seen in cost.schedule)
    convention = CONVENTIONS[cost.convention]
    printed = "MACs" if convention.prints == "macs" else "FLOPs"
    unseen = "does not run" if cost.encoder is not None else "unknown: give --views, --frames or --grid"
    step, steps = "decode, step 1", f"decode, steps 1-{len(cost.decode)}"
    parts: list[tuple[str, Count | None, str]] = [
        ("encoder", cost.encoder, str(cost.seen or unseen)),
        ("projector", cost.projector, ""),
        ("selection", cost.selection, "" if cost.selection is not None else "no strategy named"),
        ("prefill", cost.prefill, f"{cost.ratio:.3f} of the FLOPs with all tokens"),
        ("prefill, all tokens", cost.full, ""),
    ]
    if cost.first_token is not None:
        parts.append(("first token", cost.first_token, "encoder, projector, selection and prefill"))
    if cost.decode:
        parts.append((step, cost.decode[0], ""))
    if len(cost.decode) > 1:
        parts.append((steps, sum(cost.decode, Count()), ""))
    rows = [("part", "MACs", "FLOPs", "")]
    for name, count, note in parts:
        both = ("-", "-") if count is None else (human(count.macs), human(count.flops))
        rows.append((name, *both, note))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = [
        f"{cost.name}: {cost.visual} visual and {cost.text} text tokens; layers: {layers} visual tokens",
        f"convention {cost.convention}{', causal' if cost.causal else ''}: {convention.summary}",
        f"  tables of this kind print {printed}; encoder, projector and selection are counted as in {CONVENTION}",
        "",
    ]
    for name, macs, doubled, note in rows:
        line = f"{name.ljust(widths[0])}  {macs.rjust(widths[1])}  {doubled.rjust(widths[2])}  {note}"
        lines.append(line.rstrip())
    return "\n".join(lines)
