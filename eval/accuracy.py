"""Accuracy on questions with one right answer, by greedy generation through the ordinary `generate`.

Right is an exact match after `normalise`: containing the right word somewhere in a sentence does not count. An
exception is a failure and stops the run; it is never scored as an empty answer.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from vtc.encoding import take
from vtc.errors import VtcError
from vtc.eval.items import shape

if TYPE_CHECKING:
    from vtc.eval.items import Item, Medium


@dataclass(frozen=True)
class Batch:
    """Processed questions whose prompts are equally long, so that no row is padded."""

    rows: tuple[int, ...]  # places in the list of items
    pictures: tuple[int, ...]  # what each row is about: equal numbers, equal media
    inputs: dict[str, torch.Tensor]


@dataclass(frozen=True)
class Score:
    """How one setting did on one list of questions."""

    right: int
    n: int

    @property
    def accuracy(self) -> float:
        return self.right / self.n

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of the accuracy."""
        return wilson(self.right, self.n)

    def to_dict(self) -> dict[str, Any]:
        return {"accuracy": self.accuracy, "ci": list(self.interval), "n": self.n}


def wilson(right: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval of a proportion, 95 % by default. It treats the questions as independent draws."""
    if n == 0:
        return 0.0, 1.0
    share, weight = right / n, z * z / n
    centre = (share + weight / 2) / (1 + weight)
    half = z * math.sqrt(share * (1 - share) / n + weight / (4 * n)) / (1 + weight)
    # At 0 and n the bound is exact; rounding may leave it at -1e-17.
    return (0.0 if right == 0 else centre - half), (1.0 if right == n else centre + half)


def normalise(text: str) -> str:
    """Lower case, single spaces, no full stop or other punctuation around it."""
    return re.sub(r"\s+", " ", text).strip(" .,;:!?\"'`").lower()


def kind_of(medium: Medium) -> str:
    """`image` or `video`."""
    return "image" if isinstance(medium, Image.Image) else "video"


def prompt(processor: Any, question: str, kinds: Sequence[str] = ("image",)) -> str:
    """The text of a prompt: media of these kinds, then the question; by the processor's chat template if it has one.

    Without media the placeholder is left out and the rest stays: the language model then sees no visual token at all.
    """
    if getattr(processor, "chat_template", None):
        content = [*({"type": kind} for kind in kinds), {"type": "text", "text": question}]
        return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return "".join(f"{getattr(processor, f'{kind}_token')}\n" for kind in kinds) + f"{question}\n"


def process(processor: Any, questions: Sequence[str], media: Sequence[Sequence[Medium]]) -> dict[str, torch.Tensor]:
    """Model inputs for a batch of questions, each with its pictures and clips, or with none.

    Rows have equally many media of each kind; the rows are padded on the left if lengths differ.
    """
    kinds = [[kind_of(medium) for medium in some] for some in media]
    text = [prompt(processor, question, some) for question, some in zip(questions, kinds, strict=True)]
    given: dict[str, Any] = {}
    # A list per prompt: some families treat several pictures of one prompt otherwise than single ones.
    if any("image" in some for some in kinds):
        given["images"] = [[one for one in some if kind_of(one) == "image"] for some in media]
    if any("video" in some for some in kinds):
        given["videos"] = [one for some in media for one in some if kind_of(one) == "video"]
        given["do_sample_frames"] = False
    return dict(processor(text=text, **given, padding=True, padding_side="left", return_tensors="pt"))


def batches(processor: Any, items: Sequence[Item], batch_size: int, *, blind: bool = False) -> list[Batch]:
    """All questions, grouped by length and processed once, to be used with every setting.

    With `blind` the media are left out. That is the blind floor: what the model answers from the question alone.
    """

    def length(row: int) -> tuple[Any, ...]:
        # Media of one shape have equally many tokens, so shapes and text decide the length of the whole prompt.
        tokens = len(processor.tokenizer(prompt(processor, items[row].question, ()))["input_ids"])
        return (tokens,) if blind else (tuple(map(shape, items[row].media)), tokens)

    found = []
    lengths = [length(row) for row in range(len(items))]
    # The sort is stable: within a length, questions about one picture stay together.
    for _, group in groupby(sorted(range(len(items)), key=lengths.__getitem__), key=lengths.__getitem__):
        rows = list(group)
        for start in range(0, len(rows), batch_size):
            chosen = tuple(rows[start : start + batch_size])
            asked = [items[row] for row in chosen]
            media = [() if blind else item.media for item in asked]
            inputs = process(processor, [item.question for item in asked], media)
            found.append(Batch(chosen, tuple(item.index for item in asked), inputs))
    return found


def longest_answer(processor: Any, items: Iterable[Item]) -> int:
    """How many tokens to generate: enough for the longest right answer and the end token."""
    answers = sorted({item.answer for item in items})
    return 1 + max(len(ids) for ids in processor.tokenizer(answers, add_special_tokens=False)["input_ids"])


def to_device(inputs: dict[str, torch.Tensor], model: Any) -> dict[str, torch.Tensor]:
    """`inputs` where the model is; pixels in its dtype."""
    return {
        name: value.to(model.device, model.dtype if value.is_floating_point() else value.dtype)
        for name, value in inputs.items()
    }


def encode_once(model: Any, inputs: dict[str, Any], pictures: Sequence[int]) -> dict[str, Any]:
    """`inputs` of `generate` with all media encoded once, however many of the questions are about them.

    Rows have media of the same shapes, so every tensor that the encoder takes has an equal part for each. Transformers
    lets the caller encode media ahead of `generate` from 5.18 on; before, the inputs are returned as they are: same
    answers, more work.
    """
    numbers = {picture: number for number, picture in enumerate(dict.fromkeys(pictures))}
    if len(numbers) == len(pictures) or "mm_encoder_outputs" not in inspect.signature(model.forward).parameters:
        return inputs
    rows = [pictures.index(picture) for picture in numbers]
    left, encoded = dict(inputs), {}
    for modality, pixels in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        if pixels not in left:
            continue
        encode = getattr(model.base_model, f"get_{modality}_features")
        given = {
            name: inputs[name].unflatten(0, (len(pictures), -1))[rows].flatten(0, 1)
            for name in inspect.signature(encode).parameters
            if name in inputs
        }
        output = encode(**given, return_dict=True)
        each = len(output.pooler_output) // len(rows)
        wanted = [numbers[picture] * each + k for picture in pictures for k in range(each)]
        encoded[modality] = take(output, wanted)
        del left[pixels]
    return {**left, "mm_encoder_outputs": encoded} if encoded else inputs


@torch.no_grad()
def answer(
    model: Any,
    processor: Any,
    prepared: Iterable[Batch],
    max_new_tokens: int,
    done: Callable[[Batch], None] = lambda batch: None,
) -> list[str]:
    """The model's greedy answers, normalised, in the order of the items. `done` is called after each batch.

    Raises:
        RuntimeError: a batch could not be answered; the cause is chained.
    """
    answers: dict[int, str] = {}
    for batch in prepared:
        inputs = to_device(batch.inputs, model)
        try:
            ready = encode_once(model, inputs, batch.pictures)
            output = model.generate(**ready, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1)
        except VtcError:
            raise
        except Exception as error:
            raise RuntimeError(f"no answer to questions {batch.rows[0]} and others: {error}") from error
        texts = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        answers.update(zip(batch.rows, map(normalise, texts), strict=True))
        done(batch)
    return [answers[row] for row in range(len(answers))]


def right(answer: str, item: Item) -> bool:
    """Whether the answer is the expected one, but for case, space and punctuation around it."""
    return normalise(answer) == normalise(item.answer)


def score(answers: Sequence[str], items: Sequence[Item]) -> tuple[Score, dict[str, Score]]:
    """The score over all questions, and per type of question in order of first appearance."""
    good = [right(answer, item) for answer, item in zip(answers, items, strict=True)]
    types: dict[str, list[bool]] = {}
    for item, one in zip(items, good, strict=True):
        types.setdefault(item.type, []).append(one)
    return Score(sum(good), len(good)), {name: Score(sum(some), len(some)) for name, some in types.items()}


def agreement(answers: Sequence[str], reference: Sequence[str]) -> float:
    """Share of the answers that are the same as the reference's, right or wrong."""
    return sum(a == b for a, b in zip(answers, reference, strict=True)) / len(reference)
