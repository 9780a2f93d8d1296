"""The tokenizer of the bundled models: about a hundred whole words, lower-cased, punctuation apart."""

from __future__ import annotations

import functools
import random
import re

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

from vtc.eval import scenes

PAD, BOS, EOS, UNK, IMAGE, USER, ASSISTANT = SPECIAL = (
    "<pad>", "<s>", "</s>", "<unk>", "<image>", "USER:", "ASSISTANT:",
)  # fmt: skip
PHRASES = (
    "what digit is ?", "what colour is the digit word ?", "where is the ?", "what word is written ?",
    "how many are there ?", "is there a an ?", "which shape is left right of above below the ?", "color yes no .",
)  # fmt: skip
PLACES = tuple(f"{v}-{h}" for v in ("top", "bottom") for h in ("left", "right"))


def vocabulary() -> list[str]:
    """Every token; the place in the list is its id. Special tokens come first, in the order of SPECIAL."""
    words = {word for phrase in PHRASES for word in phrase.split()}
    words.update(scenes.COLOURS, scenes.SHAPES, scenes.PLURALS.values(), scenes.DIGITS, scenes.WORDS, PLACES)
    return [*SPECIAL, *sorted(words)]


@functools.cache
def tokenizer() -> Tokenizer:
    """A word-level tokenizer that starts every text with BOS, as the language model expects."""
    ids = {token: i for i, token in enumerate(vocabulary())}
    built = Tokenizer(models.WordLevel(ids, unk_token=UNK))
    built.normalizer = normalizers.Lowercase()
    # `top-left` is one token, a question mark is one token, white space is none.
    built.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\w-]+|[^\w\s]"), behavior="removed", invert=True)
    built.add_special_tokens(list(SPECIAL))
    built.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, ids[BOS])])
    return built


@functools.cache
def encode(text: str) -> tuple[int, ...]:
    """Token ids of a question or an answer, without BOS."""
    return tuple(tokenizer().encode(text, add_special_tokens=False).ids)


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
