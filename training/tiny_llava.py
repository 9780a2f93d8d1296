"""Train `tiny-llava` from nothing: a LLaVA of 3 million parameters that answers questions about `vtc.eval.scenes`.

    python -m training.tiny_llava --workers 3

Stages, each a function of the step number only, so that a run can stop and resume and two runs are alike:

0. `crops`: the vision tower alone on 64 x 64 scenes with one or two things, which have four times the labels per
   pixel. The crop takes a random window of the position table, so the weights carry over to the full canvas.
1. `scenes`: the same losses on 128 x 128 scenes.
2. `answers`, `joint` and `settle`: tower, projector and language model together on questions and answers, with the
   vision losses kept. After a start with large batches they are smaller; in the end the learning rate falls to nothing.

The [CLS] token has to name everything in the picture, which is what makes its attention a saliency map. No stage ever
drops image tokens: a model trained to cope with missing tokens writes a summary of the scene into the background, and
then cannot tell good token selection from bad. For the same reason the answers' gradient reaches the tower only through
patches that show a thing.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from transformers import (
    AttentionInterface,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from training import common, packing, text
from training.common import Group, Log, MuonAdamW, command
from vtc.eval.content import COLOURS, DIGITS, SHAPES, WORDS
from vtc.eval.scenes import QUESTION_TYPES, Scene, Scenes

TINTS = tuple(COLOURS)
KINDS = ("background", *SHAPES, *DIGITS, *WORDS)
MAX_OF_A_SHAPE = 5
QUESTIONS = 10  # per scene and step


@dataclass(frozen=True)
class Stage:
    """What distinguishes one stage from the next; everything else is common."""

    name: str
    steps: int
    batch: int  # scenes per step, over all workers
    canvas: int
    things: tuple[int, int]
    muon: float  # learning rates
    adamw: float
    floor: float  # the learning rate falls to this share of itself along a cosine
    warmup: int
    first_seed: int
    answers: bool = False  # train the language model too
    tower: float = 1.0  # learning rate of the vision tower, relative


STAGES = (
    Stage("crops", 1000, 144, 64, (1, 2), 0.02, 2e-3, 0.2, 100, 0),
    Stage("scenes", 500, 96, 128, (3, 6), 0.02, 2e-3, 0.2, 100, 10_000_000),
    Stage("answers", 200, 72, 128, (3, 6), 0.02, 1e-3, 1.0, 100, 20_000_000, answers=True, tower=0.5),
    Stage("joint", 800, 36, 128, (3, 6), 0.02, 1e-3, 1.0, 1, 30_000_000, answers=True, tower=0.5),
    Stage("settle", 1050, 36, 128, (3, 6), 0.02, 1e-3, 0.01, 1, 40_000_000, answers=True, tower=0.5),
)


# --------------------------------------------------------------------------------------------------------------- model


def attend_in_float32(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """Attention of the tower while training, (B, H, N, D / H) -> (B, N, H, D / H): on CPUs faster than in bfloat16."""
    with torch.autocast("cpu", enabled=False):
        parts = (part.float() for part in (query, key, value))
        mixed = functional.scaled_dot_product_attention(*parts, attn_mask=attention_mask, scale=scaling)
    return mixed.transpose(1, 2), None


AttentionInterface.register("float32", attend_in_float32)


def config() -> LlavaConfig:
    """2.9 M parameters: 1.05 M vision, 1.8 M language."""
    ids = text.LLAVA.ids
    vision = CLIPVisionConfig(
        image_size=128, patch_size=8, hidden_size=128, intermediate_size=512, num_hidden_layers=5,
        num_attention_heads=4, projection_dim=128, hidden_act="gelu",
    )  # fmt: skip
    language = LlamaConfig(
        vocab_size=len(ids), hidden_size=192, intermediate_size=512, num_hidden_layers=4, num_attention_heads=6,
        num_key_value_heads=6, max_position_embeddings=2048, tie_word_embeddings=False,
        bos_token_id=ids[text.BOS], eos_token_id=ids[text.EOS], pad_token_id=ids[text.PAD],
    )  # fmt: skip
    return LlavaConfig(
        vision_config=vision, text_config=language, image_token_id=ids[text.IMAGE], image_seq_length=256,
        projector_hidden_act="gelu", vision_feature_layer=-2, vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )  # fmt: skip


def build() -> LlavaForConditionalGeneration:
    """A fresh model whose tower starts with sine positions and with queries equal to keys.

    Both make the first layers look at neighbours and at similar patches from the first step.
    """
    model = LlavaForConditionalGeneration(config())
    model.model.vision_tower.set_attn_implementation("float32")
    tower = model.model.vision_tower
    vision = tower.config
    side, width = vision.image_size // vision.patch_size, vision.hidden_size
    frequencies = torch.exp(-math.log(40.0) * torch.arange(width // 4) / (width // 4)) * math.pi / 2
    y, x = torch.meshgrid(torch.arange(side).float(), torch.arange(side).float(), indexing="ij")
    waves = [f(axis.reshape(-1, 1) * frequencies) for axis in (y, x) for f in (torch.sin, torch.cos)]
    with torch.no_grad():
        nn.init.normal_(tower.embeddings.patch_embedding.weight, std=(3 * vision.patch_size**2) ** -0.5)
        tower.embeddings.position_embedding.weight[0] = 0
        tower.embeddings.position_embedding.weight[1:] = torch.cat(waves, 1)
        head = width // vision.num_attention_heads
        for layer in tower.encoder.layers:
            for rows in torch.arange(width).split(head):
                start = torch.linalg.qr(torch.randn(width, head))[0].T * 1.5  # (head, width), orthogonal rows
                layer.self_attn.q_proj.weight[rows] = start
                layer.self_attn.k_proj.weight[rows] = start
    return model


def look(tower: CLIPVisionModel, pixels: torch.Tensor, corner: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
    """Hidden states of all layers, each (B, 1 + patches, D). `corner` (B, 2): window of the position table, in patches.

    Without `corner` this is `tower(pixels, output_hidden_states=True).hidden_states`.
    """
    embeddings = tower.embeddings
    patches = embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2)  # (B, patches, D)
    side, table = pixels.shape[-1] // tower.config.patch_size, tower.config.image_size // tower.config.patch_size
    if corner is None:
        corner = torch.zeros(len(pixels), 2, dtype=torch.long)
    rows = torch.arange(side).repeat_interleave(side) + corner[:, :1]  # (B, patches)
    columns = torch.arange(side).repeat(side) + corner[:, 1:]
    position = embeddings.position_embedding.weight
    cls = (embeddings.class_embedding + position[0]).expand(len(pixels), 1, -1)
    x = tower.pre_layrnorm(torch.cat([cls, patches + position[1 + rows * table + columns]], 1))
    states = [x]
    for layer in tower.encoder.layers:
        x = layer(x, attention_mask=None)
        states.append(x)
    return tuple(states)


# --------------------------------------------------------------------------------------------------------- vision loss


@dataclass(frozen=True)
class Targets:
    """What a batch of B scenes shows, for the vision losses."""

    pairs: torch.Tensor  # (B, shapes * colours): is there such a shape in such a colour
    counts: torch.Tensor  # (B, shapes): how many, at most MAX_OF_A_SHAPE
    digits: torch.Tensor  # (B, 10 * colours)
    word: torch.Tensor  # (B,): 0 is none
    kind: torch.Tensor  # (B, patches): index into KINDS
    tint: torch.Tensor  # (B, patches): index into TINTS, -1 on background
    place: torch.Tensor  # (B, patches): quadrant of the thing's centre, -1 on background and near the middle lines


def targets(scenes: Sequence[Scene]) -> Targets:
    batch = len(scenes)
    pairs, digits = torch.zeros(batch, len(SHAPES), len(TINTS)), torch.zeros(batch, 10, len(TINTS))
    counts, word = torch.zeros(batch, len(SHAPES), dtype=torch.long), torch.zeros(batch, dtype=torch.long)
    patches = torch.from_numpy(np.stack([scene.owner.ravel() for scene in scenes]))  # (B, patches)
    kind, tint, place = (torch.full_like(patches, fill) for fill in (0, -1, -1))
    for b, scene in enumerate(scenes):
        for i, thing in enumerate(scene.things):
            colour, mine = TINTS.index(thing.colour), patches[b] == i + 1
            if thing.kind == "shape":
                pairs[b, SHAPES.index(thing.name), colour] = 1
                counts[b, SHAPES.index(thing.name)] += 1
            elif thing.kind == "digit":
                digits[b, int(thing.name), colour] = 1
            else:
                word[b] = 1 + WORDS.index(thing.name)
            kind[b, mine] = KINDS.index(thing.name)
            tint[b, mine] = colour
            x, y = (c / len(scene.image) - 0.5 for c in thing.centre)
            if min(abs(x), abs(y)) > 0.05:
                place[b, mine] = 2 * (y > 0) + (x > 0)
    return Targets(pairs.flatten(1), counts.clamp(max=MAX_OF_A_SHAPE), digits.flatten(1), word, kind, tint, place)


class Heads(nn.Module):
    """Training only: name everything in the picture from [CLS] at the last two layers, and each patch at layer -2.

    The heads at layer -2 make the [CLS] attention of that layer, which `vision_feature_layer=-2` reads, a saliency map.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.sizes = [len(SHAPES) * len(TINTS), len(SHAPES) * (MAX_OF_A_SHAPE + 1), 10 * len(TINTS), 1 + len(WORDS)]
        deep, out = 2 * width, sum(self.sizes)
        self.scene = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, deep), nn.GELU(), nn.Linear(deep, out))
            for _ in range(2)
        )
        self.patch = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, len(KINDS) + len(TINTS) + 4))

    def scene_loss(self, level: int, cls: torch.Tensor, t: Targets) -> torch.Tensor:
        """`cls` (B, D) of layer -2 (level 0) or -1 (level 1)."""
        pairs, counts, digits, word = self.scene[level](cls).float().split(self.sizes, 1)
        rare = torch.tensor(4.0)  # most pairs are absent
        loss = 8 * functional.binary_cross_entropy_with_logits(pairs, t.pairs, pos_weight=rare)
        loss = loss + 8 * functional.binary_cross_entropy_with_logits(digits, t.digits, pos_weight=rare)
        loss = loss + 1.5 * functional.cross_entropy(counts.unflatten(1, (len(SHAPES), -1)).transpose(1, 2), t.counts)
        return loss + functional.cross_entropy(word, t.word)

    def patch_loss(self, patches: torch.Tensor, t: Targets) -> tuple[torch.Tensor, float]:
        """`patches` (B, patches, D) of layer -2. Also returns the accuracy of the kind on foreground patches."""
        kind, tint, place = self.patch(patches).float().flatten(0, 1).split([len(KINDS), len(TINTS), 4], 1)
        weight = torch.ones(len(KINDS))
        weight[0] = 0.15  # most patches are background
        true = t.kind.flatten()
        loss = functional.cross_entropy(kind, true, weight)
        loss = loss + functional.cross_entropy(tint, t.tint.flatten(), ignore_index=-1)
        # The sum is divided by hand: in a batch of crops no patch may have a place.
        where = functional.cross_entropy(place, t.place.flatten(), ignore_index=-1, reduction="sum")
        loss = loss + 0.3 * where / (t.place >= 0).sum().clamp(min=1)
        return loss, (kind.argmax(1) == true)[true > 0].float().mean().item()


# ------------------------------------------------------------------------------------------------------------ training


class Trainer(common.Trainer):
    """Learns scenes."""

    report_every = 50

    def __init__(self, group: Group, folder: Path, log: Log) -> None:
        torch.manual_seed(0)
        model = build()
        super().__init__(group, folder, log, model, Heads(model.config.vision_config.hidden_size))
        self.carried: list[MuonAdamW] = []
        self.held_out = [Scenes("val")[seed] for seed in range(100)]

    @property
    def tower(self) -> CLIPVisionModel:
        return self.model.model.vision_tower

    def losses(self, stage: Stage, scenes: list[Scene], seeds: Sequence[int]) -> dict[str, torch.Tensor | float]:
        """The total loss under `loss`, its parts and accuracies under other names."""
        t = targets(scenes)
        rngs = [random.Random(f"{stage.name}-{seed}") for seed in seeds]
        room = (self.tower.config.image_size - stage.canvas) // self.tower.config.patch_size
        # Crops have no place on the full canvas, so they train no quadrants.
        if room:
            t = replace(t, place=torch.full_like(t.place, -1))
        corner = torch.tensor([[rng.randint(0, room), rng.randint(0, room)] for rng in rngs])
        with torch.autocast("cpu", torch.bfloat16):
            states = look(self.tower, packing.pixels(scenes), corner)
            cls = sum(self.heads.scene_loss(level, states[level - 2][:, 0], t) for level in range(2))
            patches = states[-2][:, 1:]
            patch, kind = self.heads.patch_loss(patches, t)
            out = {"cls": cls.item(), "patch": patch.item(), "kind": kind}
            if not stage.answers:
                return out | {"loss": 0.3 * cls + patch}
            asked = [packing.draw(scene.questions, QUESTIONS, rng) for scene, rng in zip(scenes, rngs, strict=True)]
            packed = packing.pack(asked, QUESTIONS)
            shown = torch.where((t.kind > 0)[..., None], patches, patches.detach())
            hidden = packing.hidden(self.model, self.model.model.multi_modal_projector(shown), packed)
            answer, right = packing.answer(self.model, hidden, packed)
            used = packed.types >= 0
            out |= {"answer": answer.item(), "exact": right[used].float().mean().item()}
            return out | {"loss": answer + 0.1 * cls + 0.3 * patch}

    @torch.no_grad()
    def validate(self, stage: Stage) -> dict[str, float]:
        """Held-out accuracy per type of question, in per cent of exact matches."""
        right, types = [], []
        for start in range(0, len(self.held_out), 50):
            scenes = self.held_out[start : start + 50]
            packed = packing.pack([scene.questions[:20] for scene in scenes], 20)
            with torch.autocast("cpu", torch.bfloat16):
                patches = look(self.tower, packing.pixels(scenes))[-2][:, 1:]
                hidden = packing.hidden(self.model, self.model.model.multi_modal_projector(patches), packed)
                right.append(packing.answer(self.model, hidden, packed)[1])
            types.append(packed.types)
        right, types = torch.cat(right), torch.cat(types)
        scores = {name: right[types == i].float().mean().item() for i, name in enumerate(QUESTION_TYPES)}
        return {"val": right[types >= 0].float().mean().item(), **{f"val_{name}": v for name, v in scores.items()}}

    def optimizers(self, stage: Stage) -> tuple[list[MuonAdamW], list[nn.Parameter]]:
        """For tower and heads, and in stages with answers for the rest too; those share one set with its momentum."""
        tower = [(f"tower.{n}", p) for n, p in self.tower.named_parameters()]
        vision = tower + list(self.heads.named_parameters())
        known = {id(p) for _, p in tower}
        language = [(n, p) for n, p in self.model.named_parameters() if id(p) not in known] if stage.answers else []
        if self.carried and stage.answers:
            return self.carried, [p for _, p in vision + language]
        optimizers = [MuonAdamW(vision, stage.muon, stage.adamw, stage.tower)]
        if stage.answers:
            optimizers.append(MuonAdamW(language, stage.muon, stage.adamw))
            self.carried = optimizers
        return optimizers, [p for _, p in vision + language]

    def learn(self, stage: Stage, step: int) -> dict[str, float]:
        data = Scenes("train", stage.canvas, things=stage.things)
        seeds = self.group.share(stage.first_seed + step * stage.batch, stage.batch)
        out = self.losses(stage, [data[seed] for seed in seeds], seeds)
        out.pop("loss").backward()
        return out

    def report(self, stage: Stage, done: int) -> dict[str, float]:
        scores = self.validate(stage) if stage.answers and done % (2 * self.report_every) == 0 else {}
        return {"scenes": done * stage.batch, **scores}


if __name__ == "__main__":
    command(__doc__, "tiny-llava", Trainer, STAGES, workers=3)
