"""The tokenizers of the bundled models: about a hundred whole words each, lower-cased, punctuation apart."""

from __future__ import annotations

import functools
import random
import re
from collections.abc import Iterable
from dataclasses import dataclass

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

from vtc.eval import content

PAD, BOS, EOS, UNK, IMAGE, USER, ASSISTANT = SPECIAL = (
    "<pad>", "<s>", "</s>", "<unk>", "<image>", "USER:", "ASSISTANT:",
)  # fmt: skip
PHRASES = (
    "what digit is ?", "what colour is the digit word ?", "where is the ?", "what word is written ?",
    "how many are there ?", "is there a an ?", "which shape is left right of above below the ?", "color yes no .",
)  # fmt: skip
PLACES = tuple(f"{v}-{h}" for v in ("top", "bottom") for h in ("left", "right"))


def words(phrases: Iterable[str], *groups: Iterable[str]) -> tuple[str, ...]:
    """The words of `phrases` and `groups`, each once, sorted."""
    return tuple(sorted({word for phrase in phrases for word in phrase.split()}.union(*groups)))


@dataclass(frozen=True, eq=False)
class Language:
    """A word-level vocabulary; the place of a token among `special`, then `words`, is its id."""

    special: tuple[str, ...]  # never split and never lower-cased
    words: tuple[str, ...]
    start: str | None = BOS  # put in front of every text

    @functools.cached_property
    def ids(self) -> dict[str, int]:
        """Token to id."""
        return {token: i for i, token in enumerate([*self.special, *self.words])}

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer, as the processor gets it."""
        built = Tokenizer(models.WordLevel(self.ids, unk_token=UNK))
        built.normalizer = normalizers.Lowercase()
        # `top-left` is one token, a question mark is one token, white space is none.
        built.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\w-]+|[^\w\s]"), behavior="removed", invert=True)
        built.add_special_tokens(list(self.special))
        if self.start is not None:
            start = [(self.start, self.ids[self.start])]
            built.post_processor = processors.TemplateProcessing(single=f"{self.start} $A", special_tokens=start)
        return built

    @functools.lru_cache(maxsize=10_000)  # noqa: B019  # languages live as long as the process
    def encode(self, text: str) -> tuple[int, ...]:
        """Token ids of a question or an answer, without the start."""
        return tuple(self.tokenizer.encode(text, add_special_tokens=False).ids)


LLAVA = Language(
    SPECIAL,
    words(PHRASES, content.COLOURS, content.SHAPES, content.PLURALS.values(), content.DIGITS, content.WORDS, PLACES),
)


def rephrase(text: str, rng: random.Random) -> str:
    """What people also type: no question mark, American spelling, `what` for `which`, no `are there`."""
    if rng.random() < 0.2:
        text = text.replace("colour", "color")
    if rng.random() < 0.2:
        text = re.sub("^(What|Which)", lambda m: "Which" if m[0] == "What" else "What", text)
    if rng.random() < 0.1:
        text = text.replace(" are there", "")
    if rng.random() < 0.2:
        text = text.rstrip("?")
    return text
