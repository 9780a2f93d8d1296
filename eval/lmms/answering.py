"""Questions in, answers out: batches of prompts with images and clips, and what each cost the language model.

Nothing here knows lmms-eval. Both ways to an accuracy, the bundled questions and the plug-in, answer through this file.

A question that raises is asked once more by itself. If it fails again it is a failure: it gets no answer, the others
do, and `Failed` is raised at the end. No exception ever becomes an empty answer.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

import vtc
from vtc import adapters
from vtc.compressor import Compressor, as_compressors
from vtc.errors import UnsupportedModelError, VtcError
from vtc.eval import accuracy, flops
from vtc.eval.bench import Options, load_model
from vtc.eval.lmms import clips
from vtc.eval.lmms.record import MAX_FAILURES, Failed, Failure, Key, Record, Row
from vtc.eval.survivors import owners
from vtc.session import Session

Shape = tuple[int, tuple[int, ...]]  # number of images, and frames of each clip; the same in all prompts of a batch

MAX_NEW_TOKENS = 1024  # for tasks that do not say
# What a task may ask of `generate`. Others, such as how a picture was to be padded for another model, are not for us.
GENERATION = ("max_new_tokens", "num_beams", "repetition_penalty", "length_penalty", "no_repeat_ngram_size")
SAMPLING = ("temperature", "top_p", "top_k")


@dataclass(frozen=True)
class Prompt:
    """One question, ready for a processor.

    Attributes:
        messages: a conversation; parts of its contents are `{"type": "text", "text": ...}`, `{"type": "image"}` and
            `{"type": "video"}`.
        images, videos: what the placeholders stand for, in order. A video is a path, or an array (T, H, W, 3).
    """

    messages: list[dict[str, Any]]
    images: list[Any] = field(default_factory=list)
    videos: list[Any] = field(default_factory=list)


@dataclass(frozen=True)
class Loaded:
    """A prompt whose clips are read.

    Attributes:
        question, prompt: where it comes from.
        videos: the frames of its clips.
    """

    question: Question
    prompt: Prompt
    videos: list[clips.Clip]

    @property
    def shape(self) -> Shape:
        return len(self.prompt.images), tuple(len(clip.frames) for clip in self.videos)


@dataclass(frozen=True)
class Question:
    """One question of a task.

    Attributes:
        key: task, split, document, repetition.
        load: makes the prompt. Called when its turn comes, so that pictures need not be in memory all at once.
        generation: what the task asks of `generate`: `max_new_tokens`, `temperature`, `until`, ...
        context: the text of the question, as far as it is known without loading; tells it from another of the same key.
        choice: an answer whose likelihood is asked for, instead of generating one.
    """

    key: Key
    load: Callable[[], Prompt]
    generation: Mapping[str, Any]
    context: str = ""
    choice: str | None = None

    @property
    def digest(self) -> str:
        asked = json.dumps([self.context, dict(self.generation), self.choice], sort_keys=True, default=str)
        return hashlib.sha256(asked.encode()).hexdigest()[:16]

    @property
    def row(self) -> Row:
        """What every row about it says."""
        return {**dict(zip(("task", "split", "doc_id", "repeat"), self.key, strict=True)), "digest": self.digest}


class Gate(StoppingCriteria):
    """Stops nothing, but is called after each token: notes when the first one was there."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.first: float | None = None

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        if self.first is None:
            self.first = now(self.device)
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def now(device: torch.device) -> float:
    """Seconds, after all work so far."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@dataclass
class Answerer:
    """A model that answers questions, compressed or not.

    Attributes:
        model, processor: as `vtc.zoo.load` gives them; the model is not compressed.
        compressors: none for the uncompressed model.
        batch_size: questions answered at once, if they have equally many images, clips and frames.
        frames: of a clip.
        reader: of video files; see `clips.READERS`.
    """

    model: Any
    processor: Any
    compressors: tuple[Compressor, ...] = ()
    batch_size: int = 1
    frames: int = 8
    reader: str = "auto"

    def __post_init__(self) -> None:
        self.adapter = adapters.find(self.model)
        with self._compressed():  # refuses what this model cannot do, before anything is loaded
            pass

    def answer(
        self, questions: Sequence[Question], record: Record, progress: Callable[[int], Any] = lambda count: None
    ) -> list[Row]:
        """One row per question, in their order. Those in `record` are not asked again; new ones are added to it.

        Raises:
            Failed: some have no answer. All others are in the record.
        """
        failures: list[Failure] = []
        open_: list[Question] = []
        for question in questions:
            if record.known(question.key, question.digest) is None:
                open_.append(question)
        progress(len(questions) - len(open_))
        with self._compressed() as session:
            for some in self._chunks(open_):
                rows, failed = self._ask(some, session)
                record.add(rows)
                failures += failed
                progress(len(some))
                if len(failures) >= MAX_FAILURES:
                    break
        if failures:
            raise Failed(failures)
        return [record.rows[question.key] for question in questions]

    # ------------------------------------------------------------------------------------------- batches

    def _compressed(self) -> Any:
        return vtc.compress(self.model, self.compressors) if self.compressors else Uncompressed()

    def _chunks(self, questions: Sequence[Question]) -> Iterator[list[Question]]:
        """At most `batch_size` questions of one task that ask the same of `generate`."""

        def alike(question: Question) -> tuple[str, str]:
            return question.key[0], json.dumps(dict(question.generation), sort_keys=True, default=str)

        for _, group in groupby(sorted(questions, key=alike), key=alike):  # stable
            same = list(group)
            size = self.batch_size if same[0].choice is None else 1
            for start in range(0, len(same), size):
                yield same[start : start + size]

    def _ask(self, questions: Sequence[Question], session: Session | None) -> tuple[list[Row], list[Failure]]:
        """Rows and failures of one chunk."""
        rows: list[Row] = []
        failures: list[Failure] = []
        batches: dict[Shape, list[Loaded]] = {}
        for question in questions:
            try:
                loaded = self.load(question)
            except (Exception, SystemExit) as error:  # some tasks leave Python when a file is missing
                failures.append(Failure(question.key, describe(error)))
            else:
                batches.setdefault(loaded.shape, []).append(loaded)
        for batch in batches.values():
            try:
                rows += self._generate(batch, session)
            except Exception as together:
                for one in batch:
                    if len(failures) >= MAX_FAILURES:
                        break
                    try:
                        if len(batch) == 1:
                            raise together
                        rows += self._generate([one], session)
                    except Exception as error:
                        failures.append(Failure(one.question.key, describe(error)))
        return rows, failures

    def load(self, question: Question) -> Loaded:
        """The question with its pictures and frames in memory."""
        prompt = question.load()
        return Loaded(question, prompt, [clips.read(video, self.frames, self.reader) for video in prompt.videos])

    @property
    def takes_clips(self) -> bool:
        """Whether the processor reads clips; one that does not would leave them out without a word."""
        return getattr(self.processor, "video_processor", None) is not None

    def inputs(self, batch: Sequence[Loaded]) -> dict[str, torch.Tensor]:
        """Model inputs for prompts of one shape, padded on the left."""
        texts = [render(self.processor, one.prompt.messages) for one in batch]
        images, frames = batch[0].shape
        media: dict[str, Any] = {}
        if images:  # a list per prompt: some families treat several images of one prompt otherwise than single ones
            media["images"] = [one.prompt.images for one in batch]
        if frames:
            if not self.takes_clips:
                raise VtcError("the question is about a clip, and the model takes pictures only")
            read = [clip for one in batch for clip in one.videos]
            media["videos"] = [clip.frames for clip in read]
            media["do_sample_frames"] = False
            if all(clip.fps for clip in read):
                media["video_metadata"] = [clip.metadata for clip in read]
        start = getattr(self.processor.tokenizer, "bos_token", None)
        if start and texts[0].startswith(start):  # the template wrote it; the tokenizer would write it again
            media["add_special_tokens"] = False
        inputs = self.processor(text=texts, **media, padding=True, padding_side="left", return_tensors="pt")
        return accuracy.to_device(dict(inputs), self.model)

    # ------------------------------------------------------------------------------------------- one batch

    @torch.no_grad()
    def _generate(self, batch: Sequence[Loaded], session: Session | None) -> list[Row]:
        asked = batch[0].question.generation
        start = time.perf_counter()
        inputs = self.inputs(batch)
        if batch[0].question.choice is not None:
            return [self._judge(batch[0].question, batch[0].question.choice, inputs, session, start)]
        options = generation(asked)
        gate = Gate(self.model.device)
        began = now(self.model.device)
        output = self.model.generate(**inputs, **options, stopping_criteria=StoppingCriteriaList([gate]))
        ended = now(self.model.device)
        new = output[:, inputs["input_ids"].shape[1] :]
        texts = self.processor.batch_decode(new, skip_special_tokens=True)
        costs = self._costs(inputs, session)
        until = asked.get("until") or []
        return [
            {
                **one.question.row,
                "answer": cut(text, [until] if isinstance(until, str) else until),
                "output_tokens": length,
                **cost,
                "batch": len(batch),
                "prepare_ms": 1000 * (began - start),
                "ttft_ms": 1000 * ((gate.first or ended) - began),
                "generate_ms": 1000 * (ended - began),
            }
            for one, text, length, cost in zip(batch, texts, self._lengths(new), costs, strict=True)
        ]

    def _judge(
        self, question: Question, choice: str, inputs: dict[str, torch.Tensor], session: Session | None, start: float
    ) -> Row:
        """How likely the model finds a given answer: its tokens' mean negative log-likelihood, and if it would say so.

        The prompt is read as for generating, and the answer on its cache: what a strategy keeps does not depend on it.
        """
        words = self.processor.tokenizer(choice, add_special_tokens=False, return_tensors="pt")["input_ids"]
        words = words.to(inputs["input_ids"].device)  # (1, n)
        if not words.numel():
            raise VtcError(f"the answer {choice!r} has no tokens")
        began = now(self.model.device)
        output = self.model(**inputs, use_cache=True, logits_to_keep=1)
        first = now(self.model.device)
        (cost,) = self._costs(inputs, session)
        logits = output.logits[:, -1:]  # (1, 1, V)
        if words.shape[1] > 1:
            more = self.model(input_ids=words[:, :-1], past_key_values=output.past_key_values, use_cache=True)
            logits = torch.cat([logits, more.logits], 1)  # (1, n, V)
        loss = torch.nn.functional.cross_entropy(logits[0].float(), words[0]).item()
        ended = now(self.model.device)
        return {
            **question.row,
            "answer": choice,
            "loss": loss,
            "greedy": bool((logits.argmax(-1) == words).all()),
            "output_tokens": words.shape[1],
            **cost,
            "batch": 1,
            "prepare_ms": 1000 * (began - start),
            "ttft_ms": 1000 * (first - began),
            "generate_ms": 1000 * (ended - began),
        }

    def _lengths(self, new: torch.Tensor) -> list[int]:
        """Generated tokens of each row, the end token included; rows that ended early are padded."""
        ends = self.model.generation_config.eos_token_id
        ends = torch.tensor([ends] if isinstance(ends, int) else ends or [], device=new.device, dtype=new.dtype)
        over = torch.isin(new, ends).cumsum(1)  # (B, T)
        return (((over == 0).sum(1)) + (over > 0).any(1)).tolist()

    def _costs(self, inputs: dict[str, torch.Tensor], session: Session | None) -> list[dict[str, Any]]:
        """Per row of the batch: lengths without padding, and FLOPs of the language model's prefill."""
        full = inputs["attention_mask"].sum(1).tolist()
        masks = self.adapter.placeholders(inputs["input_ids"], None)  # (B, S) each
        visual = {kind: mask.sum(1).tolist() for kind, mask in masks.items()}  # tokens, by row
        before = [sum(counts) for counts in zip(*visual.values(), strict=True)]
        depth = self.adapter.text_config.num_hidden_layers
        left = [[count] * depth for count in before]  # visual tokens, by row and layer
        if session is not None and any(before):
            left = self._left(session, visual, left)
        rows = []
        for length, count, layers in zip(full, before, left, strict=True):
            lengths = [length - count + some for some in layers]
            rows.append(
                {
                    "visual_tokens_in": count,
                    "visual_tokens_out": layers[-1],
                    "input_tokens_in": length,
                    "input_tokens": lengths[-1],
                    **self._work(lengths, length),
                }
            )
        return rows

    def _work(self, lengths: list[int], full: int) -> dict[str, int | None]:
        config = self.adapter.text_config
        try:
            return {
                "prefill_flops": flops.prefill_flops(config, lengths),
                "prefill_flops_in": flops.prefill_flops(config, full),
                "kv_cache_bytes": flops.kv_cache_bytes(config, lengths, self.model.dtype),
            }
        except UnsupportedModelError:  # a mixture of experts has no closed form
            return {"prefill_flops": None, "prefill_flops_in": None, "kv_cache_bytes": None}

    def _left(self, session: Session, visual: dict[str, list[int]], before: list[list[int]]) -> list[list[int]]:
        """Visual tokens that are left, by row and decoder layer, from the report of the prefill."""
        report = session.last
        if report is None or report.prompts != len(before):
            raise RuntimeError(f"{session.spec}: the model was called, but there is no report of it")
        left = []
        for layers, numbers in zip(before, owners(report, visual), strict=True):
            after = list(layers)
            for stage in report.stages:
                kept = sum(len(stage.kept[number]) for number in numbers)
                after[stage.layer :] = [kept] * (len(layers) - stage.layer)
            left.append(after)
        return left


def make_answerer(options: Options, spec: str, *, frames: int = 8, reader: str = "auto") -> Answerer:
    """Load a model and check that it can be compressed like this. The spec is read first: that is quick."""
    if frames < 1:
        raise VtcError(f"--frames is {frames}; use at least 1")
    compressors = parse(spec)
    if reader != "auto":
        clips.choose(reader)
    return Answerer(*load_model(options), compressors, options.batch_size, frames, reader)


def parse(spec: str) -> tuple[Compressor, ...]:
    """The compressors of a spec, none for `none`."""
    return tuple(one for one in as_compressors(spec) if one.name != "none")


class Uncompressed:
    """The context of a model as it is."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, *args: object) -> None:
        return None


def render(processor: Any, messages: Sequence[dict[str, Any]]) -> str:
    """The prompt's text with its placeholders, by the processor's chat template if it has one."""
    if getattr(processor, "chat_template", None):
        return processor.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
    signs = {"image": getattr(processor, "image_token", None), "video": getattr(processor, "video_token", None)}
    lines = []
    for message in messages:
        for part in message["content"]:
            sign = part["text"] if part["type"] == "text" else signs[part["type"]]
            if sign is None:
                raise VtcError(f"{type(processor).__name__} has no placeholder for {part['type']}s")
            lines.append(sign)
    return "\n".join(lines) + "\n"


def generation(asked: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `generate` from what a task asks: greedy unless it names a temperature."""
    options = {name: asked[name] for name in GENERATION if asked.get(name) is not None}
    options.setdefault("max_new_tokens", asked.get("max_gen_toks") or MAX_NEW_TOKENS)
    options.setdefault("num_beams", 1)
    sample = bool(asked.get("do_sample", True)) and float(asked.get("temperature") or 0) > 0
    if sample:
        options |= {name: asked[name] for name in SAMPLING if asked.get(name) is not None}
    return {**options, "do_sample": sample}


def cut(text: str, until: Sequence[str]) -> str:
    """The text up to the first of the stop words."""
    for word in filter(None, until):
        text = text.partition(word)[0]
    return text


def describe(error: BaseException) -> str:
    """An error on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def summary(rows: Sequence[Row]) -> dict[str, float | None]:
    """Means over the questions of a task; medians of times would hide what they are for, the total."""

    def mean(name: str) -> float | None:
        values = [row[name] for row in rows if row[name] is not None]
        return sum(values) / len(values) if values else None

    names = ("visual_tokens_in", "visual_tokens_out", "input_tokens_in", "input_tokens", "output_tokens")
    more = ("prefill_flops", "prefill_flops_in", "kv_cache_bytes", "ttft_ms", "generate_ms")
    return {name: mean(name) for name in (*names, *more)}
