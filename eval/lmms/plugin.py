"""The models that lmms-eval calls: `vtc_hf` for chat tasks, and with `--force_simple` for simple ones.

This module needs lmms-eval. It only translates: requests into questions, rows into results.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object
from lmms_eval.api.instance import GenerationResult, TokenCounts
from lmms_eval.api.model import lmms
from PIL import Image
from tqdm import tqdm

from vtc.errors import VtcError
from vtc.eval.bench import Options
from vtc.eval.lmms.answering import Answerer, Prompt, Question, make_answerer
from vtc.eval.lmms.record import Failed, Failure, Record, begin, identity


class VtcHf(lmms):
    """A checkpoint with compressors, for tasks that give messages.

    Args:
        pretrained: a bundled model or the folder of a checkpoint.
        spec: compressors; `none` for the uncompressed model. On lmms-eval's command line a spec with commas goes into
            double quotes: `--model_args 'pretrained=PATH,spec="fastervlm:keep=64,positions=original"'`.
        device, dtype, attn_implementation, batch_size: as for `vtc eval`. With several processes each takes the device
            of its number.
        frames, reader: of clips; see `vtc.eval.lmms.clips.read`.
        out: folder for answers, from which a later run goes on; without it nothing is resumed.
        answerer: the loaded model, instead of all above but `out`.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str = "",
        spec: str = "none",
        device: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        dtype: str | None = None,
        attn_implementation: str | None = None,
        frames: int = 8,
        reader: str = "auto",
        out: str | Path = "",
        answerer: Answerer | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__()
        if unknown:
            raise VtcError(f"vtc_hf does not know the model arguments {', '.join(sorted(unknown))}")
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        if answerer is None:
            if not pretrained:
                raise VtcError("vtc_hf needs pretrained=PATH among the model arguments")
            if not str(batch_size).isdigit():
                raise VtcError(f"batch_size is '{batch_size}'; vtc_hf takes a whole number")
            options = Options(
                model=str(pretrained),
                device=place(device, self.accelerator),
                dtype=dtype,
                attention=attn_implementation,
                batch_size=int(batch_size),
            )
            answerer = make_answerer(options, str(spec).strip("\"'"), frames=int(frames), reader=reader)
            if out and self.accelerator.is_main_process:
                specs = [str(one) for one in answerer.compressors]
                more = {
                    "dtype": dtype,
                    "attention": attn_implementation,
                    "simple": self.is_simple,
                    "frames": int(frames),
                }
                begin(Path(out), identity(options.model, specs, **more))
            self.accelerator.wait_for_everyone()
        self.answerer = answerer
        self.out = Path(out) if out else None
        self.asked = False  # whether lmms-eval got as far as asking questions

    @property
    def device(self) -> Any:
        """Where lmms-eval puts what it gathers."""
        return self.answerer.model.device

    @property
    def batch_size(self) -> int:
        return self.answerer.batch_size

    def clean(self) -> None:
        """Keep the model; lmms-eval's own method deletes it, and a second evaluation would find none."""

    def generate_until(self, requests: Sequence[Any]) -> list[GenerationResult]:
        """Answer all requests of this process.

        Raises:
            Failed: on every process, if any question of any process has no answer.
        """
        filler = GenerationResult("")
        return [filler if row is None else result(row) for row in self._rows(requests)]

    def loglikelihood(self, requests: Sequence[Any]) -> list[GenerationResult]:
        """The loss of given answers, which is what tasks of type `multiple_choice` take the smallest of.

        Errors are those of `generate_until`.
        """
        # A pair by itself would be turned into text (lmms-eval 0.7.3); as the text of a result it is left alone.
        pairs = [(0.0, False) if row is None else (row["loss"], row["greedy"]) for row in self._rows(requests)]
        return [GenerationResult(pair) for pair in pairs]

    def generate_until_multi_round(self, requests: Sequence[Any]) -> Any:
        raise NotImplementedError("vtc_hf answers tasks of one round")

    def _rows(self, requests: Sequence[Any]) -> list[dict[str, Any] | None]:
        """One row per request; none for copies that keep processes in step."""
        self.asked = True
        seen: Counter[tuple[Any, ...]] = Counter()
        questions: list[Question | None] = []
        for request in requests:
            copy = bool((request.metadata or {}).get("__padding_only__"))
            questions.append(None if copy else self._question(request, seen))
        real = [question for question in questions if question is not None]
        failures: list[Failure] = []
        rows: dict[Any, Any] = {}
        with Record(self.out, self.rank) as record, tqdm(total=len(real), unit="answer", disable=self.rank > 0) as bar:
            try:
                answered = self.answerer.answer(real, record, bar.update)
                rows = {question.key: row for question, row in zip(real, answered, strict=True)}
            except Failed as error:
                failures = error.failures
        failures = gather_object(failures)
        if failures:
            raise Failed(failures)
        return [None if question is None else rows[question.key] for question in questions]

    def _question(self, request: Any, seen: Counter[tuple[Any, ...]]) -> Question:
        context, to_messages, asked, doc_id, task, split = request.args

        def load() -> Prompt:
            return from_messages(to_messages(self.task_dict[task][split][doc_id]))

        return self._keyed(task, split, doc_id, seen, load, asked, context)

    def _keyed(
        self,
        task: str,
        split: str,
        doc_id: int,
        seen: Counter[Any],
        load: Any,
        asked: Any,
        context: str,
        choice: str | None = None,
    ) -> Question:
        repeat = seen[task, split, doc_id]
        seen[task, split, doc_id] += 1
        return Question((task, split, int(doc_id), repeat), load, asked or {}, str(context), choice)


class VtcHfSimple(VtcHf):
    """The same for tasks that give a text and pictures."""

    is_simple = True

    def _question(self, request: Any, seen: Counter[tuple[Any, ...]]) -> Question:
        context, second, third, doc_id, task, split = request.args
        judged = request.request_type == "loglikelihood"  # its order is another
        asked, to_visuals = ({}, third) if judged else (second, third)
        choice = None
        if judged:
            choice = second if isinstance(second, str) else str(second(self.task_dict[task][split][doc_id]))

        def load() -> Prompt:
            visuals = to_visuals(self.task_dict[task][split][doc_id])
            content = [{"type": kind_of(visual), "url": visual} for visual in flat(visuals)]
            return from_messages([{"role": "user", "content": [*content, {"type": "text", "text": context}]}])

        return self._keyed(task, split, doc_id, seen, load, asked, context, choice)


def place(device: str | None, accelerator: Accelerator) -> str:
    """The device of this process."""
    if accelerator.num_processes > 1 and (device or "").partition(":")[0] == "cuda":
        return f"cuda:{accelerator.local_process_index}"
    return device or str(accelerator.device)


def result(row: dict[str, Any]) -> GenerationResult:
    """An answer as lmms-eval wants it. Its input tokens are those that were left."""
    counts = TokenCounts(input_tokens=row["input_tokens"], output_tokens=row["output_tokens"])
    return GenerationResult(text=row["answer"], token_counts=counts)


def flat(visuals: Any) -> list[Any]:
    """The pictures and clips of a document, in order."""
    if visuals is None:
        return []
    if not isinstance(visuals, list | tuple):
        return [visuals]
    return [one for visual in visuals for one in flat(visual)]


def kind_of(visual: Any) -> str:
    """lmms-eval's convention: a path is a video, a dictionary is sound, anything else a picture."""
    return "video" if isinstance(visual, str) else "audio" if isinstance(visual, dict) else "image"


def from_messages(messages: Sequence[dict[str, Any]]) -> Prompt:
    """lmms-eval's messages, whose parts hold their pictures and clips, as a prompt."""
    plain: list[dict[str, Any]] = []
    images: list[Any] = []
    videos: list[Any] = []
    for message in messages:
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        kept = []
        for part in parts:
            if part["type"] == "text":
                kept.append({"type": "text", "text": part["text"]})
            elif part["type"] == "image":
                images.append(Image.open(part["url"]) if isinstance(part["url"], str | Path) else part["url"])
                kept.append({"type": "image"})
            elif part["type"] == "video" and part.get("start_time") is None and part.get("end_time") is None:
                videos.append(part["url"])
                kept.append({"type": "video"})
            else:
                raise VtcError(f"vtc_hf shows images and whole videos, not '{part['type']}' of {sorted(part)}")
        plain.append({"role": message["role"], "content": kept})
    return Prompt(plain, [image.convert("RGB") for image in images], videos)
