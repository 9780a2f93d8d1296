"""Train `tiny-llava-next` from `tiny-llava`: an AnyRes model that answers questions about `vtc.eval.posters`.

    python -m training.tiny_llava_next --workers 1

Stages, each a function of the step number only, so that a run can stop and resume and two runs are alike:

1. `tiles`: the vision tower alone, on the crops and thumbnails that the processor cuts posters into. It learns smaller
   digits and words, things cut apart by the border of a crop, and shapes scaled down.
2. `answers` and `settle`: projector, newline and language model on questions and answers, while the tower stays as it
   is. In the end the learning rate falls to nothing.

A poster is encoded as the model does it: thumbnail, then the rows of the crops without their padding, a newline after
each. No stage drops visual tokens, for the reasons given in `tiny_llava.py`.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
)
from transformers.image_processing_utils import get_patch_output_size, select_best_resolution
from transformers.models.llava_next.modeling_llava_next import unpad_image

import vtc.zoo
from training import common, packing, text
from training.common import Group, Log, MuonAdamW, command
from training.tiny_llava import KINDS, MAX_OF_A_SHAPE, TINTS, Heads, Targets, look
from vtc.eval.content import SHAPES, WORDS
from vtc.eval.posters import QUESTION_TYPES, Poster, Posters

TILE, PATCH = 96, 8  # pixels
SIDE = TILE // PATCH  # patches
PINPOINTS = [[96, 192], [192, 96], [192, 192], [96, 288], [288, 96]]  # height, width
QUESTIONS = 10  # per poster and step
LEGIBLE = 0.4  # a thing of which less is on a tile has no name there
HEADS_FIRST = 60  # steps in which the fresh heads learn and the tower does not


@dataclass(frozen=True)
class Stage:
    """What distinguishes one stage from the next; everything else is common."""

    name: str
    steps: int
    batch: int  # posters per step, over all workers
    muon: float  # learning rates
    adamw: float
    floor: float  # the learning rate falls to this share of itself along a cosine
    warmup: int
    first_seed: int
    answers: bool = False  # train everything but the tower on questions, else the tower on tiles


STAGES = (
    Stage("tiles", 450, 24, 0.008, 1e-3, 0.01, 100, 0),
    Stage("answers", 300, 24, 0.015, 1e-3, 1.0, 60, 10_000_000, answers=True),
    Stage("settle", 450, 24, 0.015, 1e-3, 0.005, 1, 20_000_000, answers=True),
)


# --------------------------------------------------------------------------------------------------------------- model


def config() -> LlavaNextConfig:
    """2.9 M parameters, those of `tiny-llava` but for a smaller table of positions and the newline."""
    vision = CLIPVisionConfig(
        image_size=TILE, patch_size=PATCH, hidden_size=128, intermediate_size=512, num_hidden_layers=5,
        num_attention_heads=4, projection_dim=128, hidden_act="gelu",
    )  # fmt: skip
    ids = text.LLAVA.ids
    language = LlamaConfig(
        vocab_size=len(ids), hidden_size=192, intermediate_size=512, num_hidden_layers=4, num_attention_heads=6,
        max_position_embeddings=2048, pad_token_id=ids[text.PAD], bos_token_id=ids[text.BOS],
        eos_token_id=ids[text.EOS], tie_word_embeddings=False,
    )  # fmt: skip
    return LlavaNextConfig(
        vision_config=vision, text_config=language, image_token_id=ids[text.IMAGE], image_seq_length=SIDE**2,
        image_grid_pinpoints=PINPOINTS, projector_hidden_act="gelu", vision_feature_layer=-2,
        vision_feature_select_strategy="default", tie_word_embeddings=False,
    )  # fmt: skip


def build() -> LlavaNextForConditionalGeneration:
    """The weights of `tiny-llava`; of its table of positions the middle, so that the middle of a tile is its own."""
    start = LlavaForConditionalGeneration.from_pretrained(vtc.zoo.find("tiny-llava"), dtype=torch.float32)
    weights = start.state_dict()
    table = "model.vision_tower.embeddings.position_embedding.weight"
    side = start.config.vision_config.image_size // start.config.vision_config.patch_size
    cls, patches = weights[table].split([1, side**2])
    margin = (side - SIDE) // 2
    window = patches.unflatten(0, (side, side))[margin : margin + SIDE, margin : margin + SIDE]
    weights[table] = torch.cat([cls, window.flatten(0, 1)])
    weights.pop("model.vision_tower.embeddings.position_ids", None)
    model = LlavaNextForConditionalGeneration(config())
    missing, unexpected = model.load_state_dict(weights, strict=False)
    if unexpected or set(missing) - {"model.image_newline", "model.vision_tower.embeddings.position_ids"}:
        raise RuntimeError(f"tiny-llava does not fit: {missing} are missing, {unexpected} are unknown")
    model.model.vision_tower.set_attn_implementation("float32")
    return model


# --------------------------------------------------------------------------------------------------------------- tiles


@dataclass(frozen=True)
class Layout:
    """How a picture of some size is cut, and where its tokens go."""

    grid: tuple[int, int]  # crops in height and width
    resized: tuple[int, int]  # pixels in height and width, before padding
    order: torch.Tensor  # (N,): token of each place; tile after tile, the thumbnail first, then the newline

    @property
    def tiles(self) -> int:
        """The thumbnail and the crops."""
        return 1 + self.grid[0] * self.grid[1]


@functools.cache
def layout(height: int, width: int) -> Layout:
    """What `LlavaNextImageProcessor` and `LlavaNextModel.pack_image_features` do with a picture of this size."""
    whole = select_best_resolution((height, width), PINPOINTS)
    resized = get_patch_output_size(np.empty((3, height, width)), whole, input_data_format="channels_first")
    rows, columns = (length // TILE for length in whole)
    crops = torch.arange(rows * columns * SIDE**2).view(rows, columns, SIDE, SIDE) + SIDE**2
    crops = crops.transpose(1, 2).reshape(1, rows * SIDE, columns * SIDE)
    seen = unpad_image(crops, (height, width))[0]
    newline = torch.full((len(seen), 1), (1 + rows * columns) * SIDE**2)
    return Layout((rows, columns), resized, torch.cat([torch.arange(SIDE**2), torch.cat([seen, newline], 1).flatten()]))


def cut(picture: np.ndarray, resample: Image.Resampling = Image.Resampling.BICUBIC) -> np.ndarray:
    """Thumbnail and crops of a picture (H, W) or (H, W, 3), stacked: (tiles, TILE, TILE, ...)."""
    plan = layout(*picture.shape[:2])
    image = Image.fromarray(picture)
    thumbnail = np.asarray(image.resize((TILE, TILE), resample))
    height, width = plan.resized
    whole = np.asarray(image.resize((width, height), resample))
    rows, columns = plan.grid
    padding = [divmod(count * TILE - length, 2) for count, length in ((rows, height), (columns, width))]
    padding = [(half, half + odd) for half, odd in padding] + [(0, 0)] * (picture.ndim - 2)
    whole = np.pad(whole, padding)
    crops = whole.reshape(rows, TILE, columns, TILE, *whole.shape[2:]).swapaxes(1, 2)
    return np.concatenate([thumbnail[None], crops.reshape(-1, TILE, TILE, *whole.shape[2:])])


def pixels(posters: Sequence[Poster]) -> torch.Tensor:
    """Pixel values of all tiles, (tiles, 3, TILE, TILE), as the processor makes them."""
    stacked = torch.from_numpy(np.concatenate([cut(poster.image) for poster in posters])).permute(0, 3, 1, 2)
    return ((stacked.float() / 255 - packing.MEAN) / packing.STD).contiguous()


def owners(poster: Poster) -> tuple[np.ndarray, np.ndarray]:
    """The thing with most pixels in each patch, (tiles, SIDE**2), and the share of each thing, (tiles, 1 + things).

    As in `scenes.py` a patch belongs to nobody unless a thing covers more than a tenth of it.
    """
    parts = cut(poster.owner.astype(np.uint8), Image.Resampling.NEAREST)
    cells = parts.reshape(-1, SIDE, PATCH, SIDE, PATCH).transpose(0, 1, 3, 2, 4).reshape(len(parts), SIDE**2, -1)
    counted = np.stack(
        [(cells == i).sum(-1) for i in range(len(poster.things) + 1)], -1
    )  # (tiles, patches, 1 + things)
    covered = counted[..., 1:]
    owner = np.where(covered.max(-1) > int(0.1 * PATCH**2), covered.argmax(-1) + 1, 0)
    total = counted.sum(1)
    crops = total[1:]
    share = np.concatenate([np.ones_like(total[:1], float), crops / np.maximum(1, crops.sum(0))])
    return owner, share


def targets(posters: Sequence[Poster]) -> Targets:
    """What the tiles show, for the losses of `tiny_llava.Heads`.

    What cannot be named is not asked for: slivers of things, and the patches of digits and words on thumbnails. Places
    are those on the thumbnail.
    """
    ignore = -100
    tiles = sum(layout(*poster.image.shape[:2]).tiles for poster in posters)
    pairs, digits = torch.zeros(tiles, len(SHAPES), len(TINTS)), torch.zeros(tiles, 10, len(TINTS))
    counts, word = torch.zeros(tiles, len(SHAPES), dtype=torch.long), torch.zeros(tiles, dtype=torch.long)
    kind = torch.zeros(tiles, SIDE**2, dtype=torch.long)
    tint, place = torch.full_like(kind, -1), torch.full_like(kind, -1)
    start = 0
    for poster in posters:
        owner, share = owners(poster)
        for number in range(len(owner)):
            row, small = start + number, number == 0
            if small:
                word[row] = ignore
            for i, thing in enumerate(poster.things):
                mine = torch.from_numpy(owner[number] == i + 1)
                colour, whole = TINTS.index(thing.colour), share[number, i + 1] >= LEGIBLE
                named = whole and not (small and thing.kind != "shape")
                kind[row, mine] = KINDS.index(thing.name) if named else ignore
                tint[row, mine] = colour
                if small:
                    height, width, _ = poster.image.shape
                    x, y = thing.centre[0] / width - 0.5, thing.centre[1] / height - 0.5
                    if min(abs(x), abs(y)) > 0.05:
                        place[row, mine] = 2 * (y > 0) + (x > 0)
                if not whole:
                    continue
                if thing.kind == "shape":
                    pairs[row, SHAPES.index(thing.name), colour] = 1
                    counts[row, SHAPES.index(thing.name)] += 1
                elif thing.kind == "digit":
                    digits[row, int(thing.name), colour] = 1
                elif not small:
                    word[row] = 1 + WORDS.index(thing.name)
        start += len(owner)
    return Targets(pairs.flatten(1), counts.clamp(max=MAX_OF_A_SHAPE), digits.flatten(1), word, kind, tint, place)


# ----------------------------------------------------------------------------------------------------------- questions


def encode(model: LlavaNextForConditionalGeneration, posters: Sequence[Poster]) -> list[torch.Tensor]:
    """The visual tokens (N, D) of each poster, as `get_image_features` gives them; no gradient reaches the tower."""
    with torch.no_grad():
        patches = look(model.model.vision_tower, pixels(posters))[-2][:, 1:]  # (tiles, SIDE**2, C)
    features = model.model.multi_modal_projector(patches)
    plans = [layout(*poster.image.shape[:2]) for poster in posters]
    newline = model.model.image_newline[None].to(features.dtype)
    parts = features.split([plan.tiles for plan in plans])
    return [torch.cat([part.flatten(0, 1), newline])[plan.order] for part, plan in zip(parts, plans, strict=True)]


# ------------------------------------------------------------------------------------------------------------ training


class Trainer(common.Trainer):
    """Learns posters."""

    def __init__(self, group: Group, folder: Path, log: Log) -> None:
        torch.manual_seed(0)
        model = build()
        super().__init__(group, folder, log, model, Heads(model.config.vision_config.hidden_size))
        self.data = Posters("train")
        self.held_out = [Posters("val")[seed] for seed in range(100)]

    def tile_losses(self, step: int, posters: Sequence[Poster]) -> dict[str, torch.Tensor | float]:
        """The total loss under `loss`, its parts and accuracies under other names."""
        t = targets(posters)
        with torch.autocast("cpu", torch.bfloat16):
            with torch.set_grad_enabled(step >= HEADS_FIRST):
                states = look(self.model.model.vision_tower, pixels(posters))
            cls = sum(self.heads.scene_loss(level, states[level - 2][:, 0], t) for level in range(2))
            patch, kind = self.heads.patch_loss(states[-2][:, 1:], t)
        return {"cls": cls.item(), "patch": patch.item(), "kind": kind, "loss": 0.3 * cls + patch}

    def answer_losses(self, posters: Sequence[Poster], rngs: Sequence[random.Random]) -> dict[str, float]:
        """Back-propagates poster by poster, which needs no padding and little memory."""
        right, loss, tokens = [], 0.0, 0
        for poster, rng in zip(posters, rngs, strict=True):
            packed = packing.pack([packing.draw(poster.questions, QUESTIONS, rng)], QUESTIONS, types=QUESTION_TYPES)
            with torch.autocast("cpu", torch.bfloat16):
                (features,) = encode(self.model, [poster])
                answer, good = packing.answer(self.model, packing.hidden(self.model, features[None], packed), packed)
            (answer / len(posters)).backward()
            loss += answer.item() / len(posters)
            tokens += len(features)
            right.append(good[packed.types >= 0])
        return {"answer": loss, "exact": torch.cat(right).float().mean().item(), "tokens": tokens / len(posters)}

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Held-out accuracy per type of question, as a share of exact matches."""
        right, types = [], []
        for poster in self.held_out:
            packed = packing.pack([poster.questions], len(poster.questions), types=QUESTION_TYPES)
            with torch.autocast("cpu", torch.bfloat16):
                (features,) = encode(self.model, [poster])
                right.append(
                    packing.answer(self.model, packing.hidden(self.model, features[None], packed), packed)[1].flatten()
                )
            types.append(packed.types.flatten())
        right, types = torch.cat(right), torch.cat(types)
        scores = {name: right[types == i].float().mean().item() for i, name in enumerate(QUESTION_TYPES)}
        # The mean over types, because the evaluation set has all types equally often.
        return {"val": sum(scores.values()) / len(scores), **{f"val_{name}": v for name, v in scores.items()}}

    def optimizers(self, stage: Stage) -> tuple[list[MuonAdamW], list[nn.Parameter]]:
        tower = list(self.model.model.vision_tower.named_parameters())
        known = {id(p) for _, p in tower}
        rest = [(n, p) for n, p in self.model.named_parameters() if id(p) not in known]
        trained = rest if stage.answers else tower + list(self.heads.named_parameters())
        return [MuonAdamW(trained, stage.muon, stage.adamw)], [p for _, p in trained]

    def learn(self, stage: Stage, step: int) -> dict[str, float]:
        seeds = self.group.share(stage.first_seed + step * stage.batch, stage.batch)
        posters = [self.data[seed] for seed in seeds]
        if stage.answers:
            return self.answer_losses(posters, [random.Random(f"{stage.name}-{seed}") for seed in seeds])
        out = self.tile_losses(step, posters)
        out.pop("loss").backward()
        return out

    def report(self, stage: Stage, done: int) -> dict[str, float]:
        scores = self.validate() if stage.answers and done % (2 * self.report_every) == 0 else {}
        return {"posters": done * stage.batch, **scores}


if __name__ == "__main__":
    command(__doc__, "tiny-llava-next", Trainer, STAGES)
