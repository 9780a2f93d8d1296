"""What `vtc explore` does behind its page: it asks a model with all of its visual tokens, and with few."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from statistics import median
from threading import Lock
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
from PIL import Image

import vtc
from vtc import adapters, picture, zoo
from vtc.compressor import available, strategy
from vtc.errors import UnsupportedModelError, VtcError
from vtc.eval import accuracy, latency, show, tasks
from vtc.eval.bench import SPLIT, Options, Setting, budgets, load_model
from vtc.eval.explore_files import open_file
from vtc.eval.lmms.clips import Clip
from vtc.report import Report

Visual = Image.Image | Clip

ALL = "all tokens"
MAX_QUESTION = 500  # characters
MAX_SPECS = 2
TURNS, ENOUGH = 5, 2.0  # times are medians over so many turns, or over fewer that took so many seconds
DRAWN = 640  # pixels of the longer side of a frame


@dataclass(frozen=True)
class Example:
    """A bundled picture or clip, and a question with its right answer."""

    visual: Visual
    question: str
    answer: str


@dataclass(frozen=True)
class Times:
    """Milliseconds: the time to first token, and of it what depends on the strategy most."""

    ttft: float
    encoder: float
    selection: float  # choosing and removing tokens in front of the language model
    prefill: float  # the language model


@dataclass(frozen=True)
class Answer:
    """What came of one way to carry the visual tokens.

    Attributes:
        spec: the strategies, or `all tokens` for the model as it is.
        text: what the model said.
        pictures: what it still saw: one picture, or of a clip one per frame. Empty if a picture went to the model as
            tiles, of which nothing tells where on it they lie.
        tokens: visual tokens that were left in the end.
        layer: from which decoder layer on.
        flops: of the language model's prefill.
        times: medians.
    """

    spec: str
    text: str
    pictures: tuple[Image.Image, ...]
    labels: tuple[str, ...]
    tokens: int
    layer: int
    flops: int
    times: Times


class Explorer:
    """A loaded model to ask, by one caller at a time.

    Attributes:
        name: of the model.
        clips: whether it takes clips.
        offers: the strategies that it can do, as specs: with their default parameters, or with the first value of a
            parameter that makes it possible.
        missing: why it cannot do the others, by name.
        examples: to begin with.
    """

    def __init__(self, options: Options, frames: int = show.FRAMES, max_new_tokens: int = 32) -> None:
        for option, value in {"frames": frames, "max-new-tokens": max_new_tokens}.items():
            if value < 1:
                raise VtcError(f"--{option} is {value}; use at least 1")
        self.name, self.frames, self.max_new_tokens = options.model, frames, max_new_tokens
        self.model, self.processor = load_model(options)
        self.clips = hasattr(adapters.find(self.model).multimodal, "get_video_features")
        self.offers, self.missing = offers(self.model)
        able = (one for one in examples(options.asked) if self.clips or not isinstance(one.visual, Clip))
        self.examples = tuple(sorted(able, key=lambda one: one.answer in ("yes", "no")))  # these can be guessed
        self._lock = Lock()

    def open(self, path: Path) -> Visual:
        """The picture or the clip in a file.

        Raises:
            VtcError: it is neither, it is too large, or it is a clip and this model takes none.
        """
        visual = open_file(path, self.frames)
        if isinstance(visual, Clip) and not self.clips:
            raise VtcError(f"{self.name} takes pictures, not clips: give a picture, or choose another model")
        return visual

    def tokens(self, visual: Visual) -> int:
        """How many visual tokens the model makes of it."""
        masks = adapters.find(self.model).placeholders(self._inputs(visual, "")["input_ids"], None)
        return sum(int(mask.sum()) for mask in masks.values())

    def compare(self, visual: Visual, question: str, specs: Sequence[str], keep: int | float) -> list[Answer]:
        """The answer of the model as it is, then the one with what each spec leaves.

        Args:
            visual: the picture or the clip.
            question: what to ask about it.
            specs: one or two strategies; empty ones, and a second one that is the same, are left out.
            keep: the budget of those that do not name their own.

        Raises:
            VtcError: there is no question, or a spec is not understood, or this model cannot do it.
        """
        question = " ".join(question.split())
        if not question:
            raise VtcError("there is no question: type one, such as 'What is in the picture?'")
        if len(question) > MAX_QUESTION:
            raise VtcError(f"the question has {len(question)} characters; use at most {MAX_QUESTION}")
        settings = list({one.spec: one for one in (_setting(spec, keep) for spec in specs if spec.strip())}.values())
        if not 1 <= len(settings) <= MAX_SPECS:
            raise VtcError(f"choose one strategy or two, not {len(settings) or 'none'}")
        with self._lock:
            for one in settings:
                vtc.compress(self.model, one.compressors).remove()  # refuses what this model cannot do
            inputs = accuracy.to_device(self._inputs(visual, question), self.model)
            try:
                full, said = self._say(inputs), [self._say_with(one, inputs) for one in settings]
                first, *others = self._time([Setting("none"), *settings], inputs)
            except torch.OutOfMemoryError as error:
                raise VtcError("the device has too little memory for this: give a smaller picture") from error
        _, report = said[0]
        answers = [Answer(ALL, full, _plain(visual), (), report.tokens_in, 0, report.prefill_flops_full, first)]
        for one, (text, report), times in zip(settings, said, others, strict=True):
            pictures, labels = self._draw(visual, report)
            kept, layer, work = report.tokens_out, report.stages[-1].layer, report.prefill_flops
            answers.append(Answer(one.spec, text, pictures, labels, kept, layer, work, times))
        return answers

    def _inputs(self, visual: Visual, question: str) -> dict[str, Any]:
        try:
            return show.ask(self.processor, question, visual)
        except ValueError as error:  # a very narrow picture, a placeholder in the question: each processor has its own
            raise VtcError(f"the processor of {self.name} refuses this: {error}") from error

    def _say(self, inputs: dict[str, torch.Tensor]) -> str:
        output: Any = self.model.generate(**inputs, max_new_tokens=self.max_new_tokens, do_sample=False, num_beams=1)
        return self.processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()

    def _say_with(self, setting: Setting, inputs: dict[str, torch.Tensor]) -> tuple[str, Report]:
        with vtc.compress(self.model, setting.compressors) as session:
            text = self._say(inputs)
        if session.last is None:
            raise RuntimeError(f"{setting.spec}: the model was called, but no visual input was seen")
        return text, session.last

    def _time(self, settings: Sequence[Setting], inputs: dict[str, torch.Tensor]) -> list[Times]:
        """In turns, so that whatever slows the machine down slows all of them."""
        runs: list[list[latency.Run]] = [[] for _ in settings]
        start = time.perf_counter()
        for _ in range(TURNS):
            for setting, found in zip(settings, runs, strict=True):
                with setting.on(self.model):
                    latency.run(self.model, inputs)  # the first call of a session checks its selection
                    found.append(latency.run(self.model, inputs))
            if time.perf_counter() - start > ENOUGH:
                break
        return [_medians(found) for found in runs]

    def _draw(self, visual: Visual, report: Report) -> tuple[tuple[Image.Image, ...], tuple[str, ...]]:
        """What survived, and labels."""
        # The processor knows better than the model whether a picture is cropped or squashed.
        clip = isinstance(visual, Clip)
        part = self.processor.video_processor if clip else self.processor.image_processor
        fit: picture.Fit = "crop" if getattr(part, "do_center_crop", False) else "resize"
        if clip:
            return tuple(report.views(_plain(visual), 0, fit)), ()
        layout = report.layouts[0]
        if len(layout.views) == 1:
            return tuple(report.views(visual, 0, fit)), ()
        if adapters.find(self.model).joined:
            return (), ()
        return tuple(report.views(visual, 0, fit)), tuple(picture.labels(layout))


def _plain(visual: Visual) -> tuple[Image.Image, ...]:
    """What is asked about, in the size in which it is drawn."""
    if not isinstance(visual, Clip):
        return (picture.enlarge(visual),)
    return tuple(picture.enlarge(Image.fromarray(frame), DRAWN) for frame in visual.frames)


def name_of(spec: str) -> str:
    """The strategy that a spec names first."""
    return spec.partition(":")[0].strip()


def _setting(spec: str, keep: int | float) -> Setting:
    (compressors,) = budgets(spec, [keep])
    return Setting(spec, compressors)


def _medians(runs: Sequence[latency.Run]) -> Times:
    parts = {name: median(run.parts[name] for run in runs) for name in ("encoder", "selection", "prefill")}
    return Times(ttft=median(run.ttft for run in runs), **parts)


class Shelf:
    """Models by name, each loaded when it is first asked for: the one of `options`, then the bundled ones."""

    def __init__(self, options: Options, frames: int = show.FRAMES, max_new_tokens: int = 32) -> None:
        self._options, self._limits = options, (frames, max_new_tokens)
        self._loaded = {options.model: Explorer(options, frames, max_new_tokens)}
        self._lock = Lock()
        self.names = tuple(dict.fromkeys((options.model, *zoo.names())))

    def __getitem__(self, name: str) -> Explorer:
        if name not in self.names:
            raise VtcError(f"there is no model '{name}' here; choose one of {', '.join(self.names)}")
        with self._lock:
            if name not in self._loaded:
                self._loaded[name] = Explorer(replace(self._options, model=name), *self._limits)
            return self._loaded[name]


# ------------------------------------------------------------------------------------------------ what there is to try


def offers(model: Any) -> tuple[tuple[str, ...], dict[str, str]]:
    """The strategies that `model` can do, as specs, and why it cannot do the others."""
    can: list[str] = []
    cannot: dict[str, str] = {}
    for name in available():
        if name == "none":
            continue
        for spec in (name, *_variants(name)):
            try:
                vtc.compress(model, spec).remove()
            except UnsupportedModelError as error:
                cannot.setdefault(name, str(error))
            else:
                can.append(spec)
                cannot.pop(name, None)
                break
    return tuple(can), cannot


def _variants(name: str) -> Iterator[str]:
    """Specs with another value of one of the parameters that are chosen from a list."""
    hints = get_type_hints(strategy(name))
    for item in fields(strategy(name)):
        if get_origin(hints[item.name]) is Literal and item.name != "positions":
            yield from (f"{name}:{item.name}={value}" for value in get_args(hints[item.name]) if value != item.default)


def examples(task: str) -> Iterator[Example]:
    """Questions of a bundled task, each of another kind and about another picture or clip."""
    kinds, scenes = set(), set()
    for item in tasks.questions(task, SPLIT, 100):
        if item.type in kinds or item.index in scenes or len(item.media) > 1:
            continue
        kinds.add(item.type)
        scenes.add(item.index)
        (medium,) = item.media
        visual = medium if isinstance(medium, Image.Image) else Clip(medium, tuple(range(len(medium))), len(medium))
        yield Example(visual, item.question, item.answer)
