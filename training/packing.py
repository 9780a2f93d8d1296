"""Many questions behind one image: what makes training the bundled models affordable.

A row is `[BOS, USER:, image tokens, question 1, ..., question K]`. A block mask lets every question see the image and
itself only, and every question starts at the same position, so each gets the logits it would get in a row of its own
(`tests/test_packing.py`). Ten questions cost 358 tokens instead of 2700.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional
from torch.nn.functional import scaled_dot_product_attention as attend
from transformers import LlavaForConditionalGeneration
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from training import text
from vtc.eval.items import Question
from vtc.eval.scenes import QUESTION_TYPES, Scene

SLOT = 10  # tokens of the longest question, `ASSISTANT:` and the answer; EOS is predicted but never read
PREFIX = 2  # BOS and `USER:`
IGNORE = -100
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)  # of CLIPImageProcessor
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
# How much more often a type is drawn than it occurs, where a scene has more questions than there are slots.
WEIGHTS = {
    "digit": 1.5, "colour": 0.5, "shape": 0.5, "where": 1.5, "word": 1.5, "count": 1.5, "exist": 1.5, "relation": 2.0,
}  # fmt: skip


@dataclass(frozen=True)
class Pack:
    """Questions of B scenes in K slots each; unused slots hold padding."""

    ids: torch.Tensor  # (B, K * SLOT)
    labels: torch.Tensor  # (B, K * SLOT): the token to predict at that place, IGNORE elsewhere
    types: torch.Tensor  # (B, K): index into the types of questions, -1 for an unused slot


def draw(
    questions: Sequence[Question], slots: int, rng: random.Random, weights: Mapping[str, float] = WEIGHTS
) -> list[Question]:
    """At most `slots` questions, by the weight of their type and without replacement, re-phrased now and then."""
    keys = {question: rng.random() ** (1 / weights[question.type]) for question in questions}
    drawn = sorted(keys, key=keys.__getitem__, reverse=True)[:slots]
    return [Question(q.type, text.rephrase(q.text, rng), q.answer) for q in drawn]


def pack(
    rows: Sequence[Sequence[Question]],
    slots: int,
    language: text.Language = text.LLAVA,
    types: Sequence[str] = QUESTION_TYPES,
) -> Pack:
    """Encode the questions of each scene; a scene has at most `slots`, and they are of `types`."""
    ids = torch.zeros(len(rows), slots, SLOT, dtype=torch.long)
    labels = torch.full_like(ids, IGNORE)
    kinds = torch.full((len(rows), slots), -1)
    (assistant,), (eos,) = language.encode(text.ASSISTANT), language.encode(text.EOS)
    for b, questions in enumerate(rows):
        for k, question in enumerate(questions):
            prompt, (answer,) = language.encode(question.text), language.encode(question.answer)
            n = len(prompt)
            ids[b, k, : n + 2] = torch.tensor([*prompt, assistant, answer])
            labels[b, k, n : n + 2] = torch.tensor([answer, eos])
            kinds[b, k] = types.index(question.type)
    return Pack(ids.flatten(1), labels.flatten(1), kinds)


def pixels(scenes: Sequence[Scene]) -> torch.Tensor:
    """Pixel values (B, 3, canvas, canvas), as CLIPImageProcessor makes them of pictures of the right size."""
    stacked = torch.from_numpy(np.stack([scene.image for scene in scenes])).permute(0, 3, 1, 2)
    return ((stacked.float() / 255 - MEAN) / STD).contiguous()


@functools.lru_cache(maxsize=64)
def _mask(prefix: int, slots: int) -> torch.Tensor:
    """(1, 1, length, length), True where a row may look at a column."""
    slot = torch.cat([torch.full((prefix,), -1), torch.arange(slots).repeat_interleave(SLOT)])
    seen = (slot[None] == -1) | (slot[None] == slot[:, None])
    return (seen & torch.ones_like(seen).tril())[None, None]


def hidden(model: LlavaForConditionalGeneration, features: torch.Tensor, packed: Pack) -> torch.Tensor:
    """Final hidden states of the question slots, (B, K * SLOT, D); `features` (B, N, D) are projected image tokens."""
    language = model.model.language_model
    start = torch.tensor([text.LLAVA.encode(text.BOS) + text.LLAVA.encode(text.USER)]).expand(len(features), -1)
    embed = language.embed_tokens
    prefix = torch.cat([embed(start), features.to(embed.weight.dtype)], 1)  # (B, P, D)
    return states(language, prefix, torch.arange(prefix.shape[1])[None], packed, prefix.shape[1])


Rotate = Callable[..., tuple[torch.Tensor, torch.Tensor]]


def states(
    language: torch.nn.Module,
    prefix: torch.Tensor,
    positions: torch.Tensor,
    packed: Pack,
    first: int | torch.Tensor,
    rotate: Rotate = apply_rotary_pos_emb,
) -> torch.Tensor:
    """Final hidden states of the question slots, (B, K * SLOT, D), behind any prefix that all questions share.

    Args:
        language: a decoder of transformers, such as `LlamaModel` or `Qwen2Model`.
        prefix: embeddings of all that comes before the questions, (B, P, D).
        positions: of the prefix, as the decoder takes them: (B or 1, P), or (3, B, P) for M-RoPE.
        packed: the questions.
        first: position of the first token of every question; a tensor is added to the (SLOT) steps of a question and
            broadcast, so it ends in a dimension of 1.
        rotate: applies `(cos, sin)` to queries and keys.
    """
    slots = packed.types.shape[1]
    x = torch.cat([prefix, language.embed_tokens(packed.ids)], 1)  # (B, L, D)
    after = torch.arange(SLOT).repeat(slots) + first
    positions = torch.cat([positions, after.expand(*positions.shape[:-1], -1)], -1)
    mask = _mask(prefix.shape[1], slots)
    rotary = language.rotary_emb(x, position_ids=positions)
    for layer in language.layers:
        x = _layer(layer, x, rotary, mask, prefix.shape[1], layer is language.layers[-1], rotate)
    return language.norm(x)


def _layer(
    layer: torch.nn.Module,
    x: torch.Tensor,
    rotary: tuple[torch.Tensor, torch.Tensor],
    mask: torch.Tensor,
    prefix: int,
    last: bool,
    rotate: Rotate,
) -> torch.Tensor:
    """One decoder layer on (B, L, D). The last one returns the rows after `prefix` only: nobody reads the others.

    The prefix sees itself and the questions see everything, in two calls: no time goes into the masked-out quarter.
    """
    attention = layer.self_attn
    normed = layer.input_layernorm(x)

    def heads(projection: torch.nn.Module) -> torch.Tensor:
        # Single precision, because on CPUs the attention and mixed products are faster so.
        return projection(normed).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2).float()  # (B, H, L, D / H)

    query, key, value = heads(attention.q_proj), heads(attention.k_proj), heads(attention.v_proj)
    query, key = rotate(query, key, *rotary)
    with torch.autocast("cpu", enabled=False):
        image, asked = query.split([prefix, query.shape[2] - prefix], 2)
        mixed = attend(asked, key, value, attn_mask=mask[..., prefix:, :], scale=attention.scaling)
        if not last:
            before = attend(image, key[:, :, :prefix], value[:, :, :prefix], is_causal=True, scale=attention.scaling)
            mixed = torch.cat([before, mixed], 2)
    x = x[:, -mixed.shape[2] :] + attention.o_proj(mixed.transpose(1, 2).flatten(2))
    return x + layer.mlp(layer.post_attention_layernorm(x))


def answer(
    model: LlavaForConditionalGeneration, states: torch.Tensor, packed: Pack
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean cross-entropy of the answers, and which questions (B, K) are answered right, EOS included.

    An argmax with the right answer fed back equals greedy decoding as far as being right is concerned.
    """
    wanted = packed.labels != IGNORE
    logits = model.lm_head(states[wanted]).float()  # (answer tokens, vocabulary)
    target = packed.labels[wanted]
    right = torch.ones_like(wanted)
    right[wanted] = logits.argmax(-1) == target
    return functional.cross_entropy(logits, target), right.unflatten(1, (-1, SLOT)).all(-1)
