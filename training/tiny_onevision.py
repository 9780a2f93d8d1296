"""Train `tiny-onevision`: a LLaVA-OneVision of 3 million parameters that answers questions about `vtc.eval.clips`.

    python -m training.tiny_onevision --workers 1

It starts from the weights of `tiny-llava`, whose layers have the same shapes. Stages are functions of the step number
only, so that a run can stop and resume:

0. `tiles`: the vision tower alone on tiles of 64 x 64 pixels: kind, colour and place of what each patch shows, and the
   shade of its background. This also heals the loss of [CLS] and of the normalisation in front of the layers.
1. `short`: projector and language model on questions about clips of 6 to 12 frames, pictures and pairs of pictures.
2. `long`: the same with clips of 12 to 24 frames, while the tower goes on as in stage 0.
3. `settle`: clips of 16 to 32 frames; the tower stands still, and the learning rate falls to nothing.

Answers never train the tower, and equal frames of a clip are encoded once. While training, the states of the language
model at visual tokens also have to tell what has happened so far (`Chronicle`). No stage ever drops visual tokens.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional
from transformers import (
    LlavaForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    Qwen2Config,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from training import packing, text, tiny_llava  # noqa: F401  # the latter registers the attention "float32"
from training.common import FlatGradients, Group, Log, MuonAdamW, command, save, schedule
from training.packing import MEAN, STD, Pack
from vtc.eval import content
from vtc.eval.clips import (
    FRAMES,
    PATCH,
    PICTURES,
    PLACES,
    QUESTION_TYPES,
    SCENES,
    TILE,
    WAYS,
    Actor,
    Clip,
    Clips,
    Pair,
    Pairs,
    Pictures,
)
from vtc.eval.items import Question

TINY_LLAVA = Path(__file__).parents[1] / "vtc" / "zoo" / "tiny-llava"
SIDE = TILE // PATCH
TINTS = tuple(content.COLOURS)
KINDS = ("background", *content.SHAPES, *content.DIGITS, *content.WORDS)

VIDEO = "<video>"
PHRASES = (
    "what digit is ?", "what colour is did the turn ?", "where is the ?", "what word is written ?", "is there a an ?",
    "which shape digit is in the first second last scene image ?", "how many scenes are there ?", "color yes no .",
    "what digit came first last after the vanished ?", "which way did the move ?", "which image shows the ?",
)  # fmt: skip
LANGUAGE = text.Language(
    (*text.SPECIAL, VIDEO),
    text.words(PHRASES, content.COLOURS, content.SHAPES, content.DIGITS, content.WORDS, PLACES, WAYS),
)

QUESTIONS = 10  # per clip and step
STILL_QUESTIONS = 6  # per picture or pair
# How much more often a type is drawn than it occurs.
WEIGHTS = {
    "scenes": 1.0, "inside": 1.5, "order": 2.0, "after": 3.0, "turn": 2.0, "move": 4.0, "digit": 0.7, "colour": 0.5,
    "shape": 0.5, "exist": 1.0, "where": 2.0, "word": 2.0, "which": 1.0, "image": 1.0,
}  # fmt: skip


@dataclass(frozen=True)
class Stage:
    """What distinguishes one stage from the next. Numbers of samples are per step, over all workers."""

    name: str
    steps: int
    tiles: int  # for the losses of the tower
    clips: int
    stills: int  # pictures or pairs
    muon: float  # learning rates
    adamw: float
    floor: float  # the learning rate falls to this share of itself along a cosine
    warmup: int
    first_seed: int
    frames: tuple[int, int] = FRAMES  # of clips
    scenes: tuple[int, int] = SCENES
    tower: float = 1.0  # learning rate of the tower, relative; it always falls to almost nothing


STAGES = (
    Stage("tiles", 350, 96, 0, 0, 0.006, 1e-3, 0.02, 30, 0),
    Stage("short", 600, 0, 24, 12, 0.02, 1e-3, 1.0, 100, 10_000_000, (6, 12), (1, 2)),
    Stage("long", 300, 32, 16, 8, 0.015, 1e-3, 1.0, 1, 20_000_000, (12, 24), (1, 3), 0.5),
    Stage("settle", 1050, 0, 16, 6, 0.015, 1e-3, 0.01, 1, 30_000_000),
)
SAVE_EVERY = 50
REPORT_EVERY = 25


# --------------------------------------------------------------------------------------------------------------- model


def config() -> LlavaOnevisionConfig:
    """2.7 M parameters: 0.8 M vision, 1.9 M language."""
    ids = LANGUAGE.ids
    vision = SiglipVisionConfig(
        image_size=TILE, patch_size=PATCH, hidden_size=128, intermediate_size=512, num_hidden_layers=4,
        num_attention_heads=4, hidden_act="gelu", layer_norm_eps=1e-5, vision_use_head=False,
    )  # fmt: skip
    language = Qwen2Config(
        vocab_size=len(ids), hidden_size=192, intermediate_size=512, num_hidden_layers=4, num_attention_heads=6,
        num_key_value_heads=6, max_position_embeddings=2048, tie_word_embeddings=False,
        bos_token_id=ids[text.BOS], eos_token_id=ids[text.EOS], pad_token_id=ids[text.PAD],
    )  # fmt: skip
    return LlavaOnevisionConfig(
        vision_config=vision, text_config=language, image_token_index=ids[text.IMAGE], video_token_index=ids[VIDEO],
        projector_hidden_act="gelu", vision_feature_layer=-1, vision_feature_select_strategy="full",
        image_grid_pinpoints=[[TILE * down, TILE * across] for down, across in PICTURES],
        vision_aspect_ratio="anyres_max_9", tie_word_embeddings=False,
    )  # fmt: skip


def build() -> LlavaOnevisionForConditionalGeneration:
    """The model with the weights of `tiny-llava`."""
    model = LlavaOnevisionForConditionalGeneration(config())
    old = LlavaForConditionalGeneration.from_pretrained(TINY_LLAVA, dtype=torch.float32)
    _start_tower(model.model.vision_tower, old.model.vision_tower)
    model.model.multi_modal_projector.load_state_dict(old.model.multi_modal_projector.state_dict())
    missing, unexpected = model.model.language_model.load_state_dict(
        {k: v for k, v in old.model.language_model.state_dict().items() if "embed" not in k}, strict=False
    )
    if unexpected or not all(name.endswith("_proj.bias") or "embed" in name for name in missing):
        raise ValueError(f"tiny-llava does not fit: {missing} {unexpected}")
    with torch.no_grad():
        for name in missing:
            if name.endswith("bias"):
                model.model.language_model.get_parameter(name).zero_()
        known = text.LLAVA.ids
        for token, i in LANGUAGE.ids.items():
            if token in known:
                embedding = old.model.language_model.embed_tokens.weight
                model.model.language_model.embed_tokens.weight[i] = embedding[known[token]]
                model.lm_head.weight[i] = old.lm_head.weight[known[token]]
    return model


@torch.no_grad()
def _start_tower(tower: SiglipVisionModel, old: nn.Module) -> None:
    """The first four layers of the CLIP tower, whose output its language model read.

    CLIP normalises in front of the layers, SigLIP does not. That is a linear map but for the division by the standard
    deviation of each token, which is replaced by its mean.
    """
    for new, layer in zip(tower.encoder.layers, old.encoder.layers, strict=False):
        new.load_state_dict(layer.state_dict())
    norm, patches = old.pre_layrnorm, old.embeddings.patch_embedding.weight
    table = old.embeddings.position_embedding.weight[1:].unflatten(0, (16, 16))
    position = table[(16 - SIDE) // 2 :, (16 - SIDE) // 2 :][:SIDE, :SIDE].flatten(0, 1)  # the middle of the canvas
    tiles = torch.cat([_pixels(_tile(seed).image[None]) for seed in range(50)])
    seen = functional.conv2d(tiles, patches, stride=PATCH).flatten(2).transpose(1, 2) + position
    scale = norm.weight / (seen.var(-1, unbiased=False) + norm.eps).sqrt().mean()

    def centred(x: torch.Tensor) -> torch.Tensor:
        return (x - x.mean(-1, keepdim=True)) * scale

    tower.embeddings.patch_embedding.weight.copy_(centred(patches.flatten(1).T).T.reshape(patches.shape))
    tower.embeddings.patch_embedding.bias.copy_(norm.bias)
    tower.embeddings.position_embedding.weight.copy_(centred(position))


def look(tower: SiglipVisionModel, tiles: torch.Tensor) -> torch.Tensor:
    """What the projector reads of tiles (T, 3, 64, 64): the output of the last layer, not normalised, (T, 64, D)."""
    x = tower.embeddings(tiles)
    for layer in tower.encoder.layers:
        x = layer(x, attention_mask=None)
    return x


def _pixels(tiles: np.ndarray) -> torch.Tensor:
    """Pixel values (T, 3, 64, 64) of tiles (T, 64, 64, 3) uint8."""
    return ((torch.tensor(tiles).permute(0, 3, 1, 2).float() / 255 - MEAN) / STD).contiguous()


# --------------------------------------------------------------------------------------------------------------- tower


@dataclass(frozen=True)
class Tile:
    """What the tower looks at, and what each of its patches shows."""

    image: np.ndarray  # (64, 64, 3) uint8
    kind: np.ndarray  # (patches,): index into KINDS, IGNORE for what is too small to be told
    tint: np.ndarray  # (patches,): index into TINTS, -1 on background
    place: np.ndarray  # (patches, 2): row and column of the thing's centre, in patches, -1 on background


def _tile(seed: int) -> Tile:
    """A view such as the language model gets: a frame, a crop that cuts things in two, a picture made small."""
    rng = random.Random(f"tile-{seed}")
    source = rng.choice(["picture", "pair", "pair", "crop", "crop", "whole"])
    if source == "pair":
        picture = Pairs("train")[seed].pictures[0]  # every second thing is a digit
    else:
        picture = Pictures("train").make(seed, (1, 1) if source == "picture" else (2, 2))
    scale = 2 if source == "whole" else 1
    image, owner = picture.pictures[0][0], picture.owners(scale * PATCH)[0]
    top, left = (TILE * rng.randrange(2) if source == "crop" else 0 for _ in range(2))
    if source == "whole":
        image = _shrunk(image)
    image = image[top : top + TILE, left : left + TILE]
    owner = owner[top // PATCH :, left // PATCH :][:SIDE, :SIDE].ravel()
    kinds, tints, places = [0], [-1], [(-1, -1)]
    for actor in picture.actors:
        legible = scale == 1 or actor.kind == "shape"
        kinds.append(KINDS.index(actor.name) if legible else packing.IGNORE)
        tints.append(TINTS.index(actor.colour))
        (x, y), (height, width) = actor.place, actor.opacity.shape
        row, column = (int(at // PATCH) for at in ((y + height / 2) / scale - top, (x + width / 2) / scale - left))
        places.append((min(SIDE - 1, max(0, row)), min(SIDE - 1, max(0, column))))
    return Tile(image, *(np.array(values)[owner] for values in (kinds, tints, places)))


def _shrunk(image: np.ndarray) -> np.ndarray:
    """A picture of any size as one tile, as the processor scales it."""
    return np.asarray(Image.fromarray(image).resize((TILE, TILE), Image.Resampling.BICUBIC))


class Heads(nn.Module):
    """Training only: name and place what each patch shows; name the tile from what its patches attend to on average.

    Patches also keep their mean colour. Otherwise all backgrounds would look the same, and cuts could not be seen.

    The latter makes the attention that a patch receives in the last layer a saliency map, though there is no [CLS].
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.patch = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, len(KINDS) + len(TINTS)))
        self.place = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * SIDE))
        self.shade = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 3))
        deep, pairs = 2 * width, len(KINDS) * len(TINTS)
        self.scene = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, deep), nn.GELU(), nn.Linear(deep, pairs))

    def scene_loss(self, mixed: torch.Tensor, kind: torch.Tensor, tint: torch.Tensor) -> torch.Tensor:
        """`mixed` (B, patches, D): the values of the last layer as its attention mixes them; kind, tint as below."""
        # Background, and what cannot be told, goes to pair 0: what is said there does not count.
        known = kind.clamp(min=0) * len(TINTS) + tint.clamp(min=0)
        pairs = torch.zeros(len(kind), len(KINDS) * len(TINTS)).scatter(1, known, 1.0)
        logits, rare = self.scene(mixed.mean(1)).float(), torch.tensor(8.0)  # most pairs are absent
        start = len(TINTS)
        return functional.binary_cross_entropy_with_logits(logits[:, start:], pairs[:, start:], pos_weight=rare)

    def patch_loss(self, states: torch.Tensor, kind: torch.Tensor, tint: torch.Tensor) -> tuple[torch.Tensor, float]:
        """`states` (B, patches, D); kind and tint (B, patches), tint -1 on background. Also the kind's accuracy."""
        kinds, tints = self.patch(states).float().flatten(0, 1).split([len(KINDS), len(TINTS)], 1)
        weight = torch.ones(len(KINDS))
        weight[0] = 0.3  # most patches are background
        true = kind.flatten()
        loss = functional.cross_entropy(kinds, true, weight, ignore_index=packing.IGNORE)
        loss = loss + functional.cross_entropy(tints, tint.flatten(), ignore_index=-1)
        return loss, (kinds.argmax(1) == true)[true > 0].float().mean().item()

    def place_loss(self, states: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        """`states` (B, patches, D); `place` (B, patches, 2): row and column of the thing's centre, -1 on background."""
        logits = self.place(states).float().unflatten(-1, (2, SIDE)).flatten(0, 2)
        return functional.cross_entropy(logits, place.flatten(), ignore_index=-1)

    def shade_loss(self, states: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
        """`states` (B, patches, D) of `pixels` (B, 3, 64, 64)."""
        wanted = functional.avg_pool2d(pixels, PATCH).flatten(2).transpose(1, 2)  # (B, patches, 3)
        return functional.smooth_l1_loss(self.shade(states).float(), wanted)


# ---------------------------------------------------------------------------------------------------- what the LM sees


@dataclass(frozen=True)
class Shown:
    """B prompts of one layout: their tiles, once each, and how features become visual tokens."""

    tiles: torch.Tensor  # (T, 3, 64, 64)
    index: torch.Tensor  # (B, views): the tile of every view or frame
    layout: str | tuple[int, int]  # "clip", "pair", or tiles down and across
    asked: tuple[tuple[Question, ...], ...]
    told: torch.Tensor  # (B, N, 6): targets of `Chronicle` for the visual tokens

    def tokens(self, features: torch.Tensor, newline: torch.Tensor) -> torch.Tensor:
        """Projected features (T, 64, D) to visual tokens (B, N, D), as the model packs them."""
        views = features[self.index]  # (B, views, 64, D)
        line = newline.expand(len(views), 1, -1)
        if self.layout == "clip":
            cells = views.unflatten(2, (SIDE // 2, 2, SIDE // 2, 2)).mean((3, 5))  # what bilinear halving comes to
            return torch.cat([cells.flatten(1, 3), line], 1)
        if self.layout == "pair":
            return torch.cat([views[:, 0], line, views[:, 1], line], 1)
        down, across = self.layout
        rows = views[:, 1:].unflatten(2, (SIDE, SIDE)).unflatten(1, (down, across)).transpose(2, 3)
        rows = rows.reshape(len(views), down * SIDE, across * SIDE, -1)  # (B, rows, columns, D)
        rows = torch.cat([rows, newline.expand(len(views), down * SIDE, 1, -1)], 2)
        return torch.cat([views[:, 0], rows.flatten(1, 2)], 1)


def show_clips(clips: Sequence[Clip]) -> Shown:
    """Clips of equal length."""
    pictures = [clip.pictures[0] for clip in clips]
    starts = np.cumsum([0, *map(len, pictures)])
    index = np.stack([start + np.array(clip.states) for start, clip in zip(starts, clips, strict=False)])
    told = np.stack([np.concatenate([chronicle(clip), LINE]) for clip in clips])
    asked = tuple(clip.questions for clip in clips)
    return Shown(_pixels(np.concatenate(pictures)), torch.from_numpy(index), "clip", asked, torch.from_numpy(told))


def show_pictures(pictures: Sequence[Clip]) -> Shown:
    """Pictures of equal size: each as a whole, scaled to one tile, and its crops."""
    views, told = [], []
    for picture in pictures:
        image = picture.frames[0]
        down, across = (n // TILE for n in image.shape[:2])
        crops = image.reshape(down, TILE, across, TILE, 3).transpose(0, 2, 1, 3, 4).reshape(-1, TILE, TILE, 3)
        views.append(np.concatenate([_shrunk(image)[None], crops]))
        owner = picture.owners(PATCH)[0]  # (down * 8, across * 8)
        whole = owner.reshape(SIDE, down, SIDE, across).max((1, 3))
        rows = [part for row in owner for part in (_placed(picture, row, 0), LINE)]
        told.append(np.concatenate([_placed(picture, whole.ravel(), 0), *rows]))
    stacked = np.stack(views)
    index = torch.arange(stacked.shape[0] * stacked.shape[1]).view(stacked.shape[:2])
    asked = tuple(picture.questions for picture in pictures)
    tiles = _pixels(stacked.reshape(-1, TILE, TILE, 3))
    return Shown(tiles, index, (down, across), asked, torch.from_numpy(np.stack(told)))


def show_pairs(pairs: Sequence[Pair]) -> Shown:
    """Pairs of pictures of one tile."""
    tiles = np.concatenate([picture.frames for pair in pairs for picture in pair.pictures])
    told = []
    for pair in pairs:
        both = [_placed(picture, picture.owners(PATCH)[0].ravel(), i) for i, picture in enumerate(pair.pictures)]
        told.append(np.concatenate([both[0], LINE, both[1], LINE]))
    index = torch.arange(len(tiles)).view(-1, 2)
    asked = tuple(pair.questions for pair in pairs)
    return Shown(_pixels(tiles), index, "pair", asked, torch.from_numpy(np.stack(told)))


class Chronicle(nn.Module):
    """Training only: from the states of the language model at each visual token, what has happened so far.

    Of the thing in the token: where in the picture it is, whether it has turned another colour, which way it has moved;
    of a digit: how many digits came before it, and what shape vanished last before; of every token: the number of its
    scene, or of its picture in a pair.
    """

    SIZES = {"place": 9, "turned": 2, "moved": 5, "rank": 6, "gone": 9, "scene": 4}
    NOTHING = {"turned": 0.15, "moved": 0.15, "gone": 0.3}  # how much it counts that nothing has happened, as mostly

    def __init__(self, width: int) -> None:
        super().__init__()
        self.levels = nn.ModuleList(nn.Linear(width, sum(self.SIZES.values())) for _ in range(2))

    def loss(self, states: Sequence[torch.Tensor], targets: torch.Tensor) -> torch.Tensor:
        """`states`: (B, N, D) at two depths, normalised. `targets` (B, N, 6), -1 where nothing is asked."""
        total = torch.zeros(())
        for level, state in zip(self.levels, states, strict=True):
            parts = level(state).float().flatten(0, 1).split(list(self.SIZES.values()), 1)
            for name, part, wanted in zip(self.SIZES, parts, targets.flatten(0, 1).unbind(1), strict=True):
                weight = torch.ones(part.shape[1])
                weight[0] = self.NOTHING.get(name, 1.0)
                loss = functional.cross_entropy(part, wanted, weight, ignore_index=-1, reduction="sum")
                total = total + loss / (wanted >= 0).sum().clamp(min=1)
        return total / 2


def chronicle(clip: Clip) -> np.ndarray:
    """Targets of `Chronicle` for the tokens of one clip, (frames * 16, 6) int64."""
    table = np.full((clip.length, len(clip.actors) + 1, 6), -1)
    digits = [actor for actor in clip.actors if actor.kind == "digit"]
    shapes = [actor for actor in clip.actors if actor.kind == "shape"]
    ways = list(WAYS)
    for i, actor in enumerate(clip.actors):
        rank, gone = -1, -1
        if actor.kind == "digit":
            rank = min(5, sum(digit.start < actor.start for digit in digits))
            before = [shape for shape in shapes if shape.end <= actor.start]
            latest = [shape for shape in before if shape.end == max(other.end for other in before)]
            gone = 0 if not before else 1 + content.SHAPES.index(latest[0].name) if len(latest) == 1 else -1
        for frame in range(actor.start, actor.end):
            turned = int(actor.later is not None and frame >= actor.turning)
            moved = 1 + ways.index(actor.way) if actor.way and frame > actor.moving[0] else 0
            table[frame, i + 1] = (_ninth(actor, frame, TILE, TILE), turned, moved, rank, gone, 0)
    for frame in range(clip.length):
        table[frame, :, 5] = clip.scene_at(frame)
    owners = clip.owners(2 * PATCH).reshape(-1, (SIDE // 2) ** 2)[clip.states]  # (frames, 16)
    return np.take_along_axis(table, owners[..., None], 1).reshape(-1, 6)


LINE = np.full((1, 6), -1)  # of a newline nothing is told


def _ninth(actor: Actor, frame: int, height: int, width: int) -> int:
    """In which of 3 x 3 parts of the picture the middle of a thing is."""
    (left, top), (tall, wide) = actor.place_at(frame), actor.opacity.shape
    return 3 * int(3 * (top + tall / 2) / height) + int(3 * (left + wide / 2) / width)


def _placed(picture: Clip, owner: np.ndarray, number: int) -> np.ndarray:
    """Targets of `Chronicle` for patches with these owners (P,), in picture `number` of the prompt: (P, 6)."""
    height, width = picture.backgrounds[0].shape[:2]
    ninths = np.array([-1, *(_ninth(actor, 0, height, width) for actor in picture.actors)])
    table = np.full((len(owner), 6), -1)
    table[:, 0], table[:, 5] = ninths[owner], number
    return table


def pack(rows: Sequence[Sequence[Question]], slots: int) -> Pack:
    return packing.pack(rows, slots, LANGUAGE, QUESTION_TYPES)


# ------------------------------------------------------------------------------------------------------------ training


class Trainer:
    """Model, heads and random state of one worker."""

    def __init__(self, group: Group, folder: Path, log: Log) -> None:
        self.group, self.folder, self.log = group, folder, log
        torch.manual_seed(0)
        self.model = build()
        self.model.model.vision_tower.set_attn_implementation("float32")
        self.heads = Heads(self.model.config.vision_config.hidden_size)
        self.chronicle = Chronicle(self.model.config.text_config.hidden_size)
        self.carried: MuonAdamW | None = None
        self.held_out = list(held_out())
        self.seen: dict[int, torch.Tensor] = {}
        self.mixed: dict[int, torch.Tensor] = {}
        out = self.tower.encoder.layers[-1].self_attn.out_proj
        out.register_forward_pre_hook(lambda _, given: self.mixed.__setitem__(0, given[0]))
        for depth in (2, 3):
            norm = self.model.model.language_model.layers[depth].input_layernorm
            norm.register_forward_hook(lambda _, __, out, depth=depth: self.seen.__setitem__(depth, out))

    @property
    def tower(self) -> SiglipVisionModel:
        return self.model.model.vision_tower

    def hidden(self, shown: Shown, packed: Pack) -> torch.Tensor:
        """Final hidden states of the question slots, (B, K * SLOT, D)."""
        inner = self.model.model
        with torch.no_grad():
            features = look(self.tower, shown.tiles)
        tokens = shown.tokens(inner.multi_modal_projector(features), inner.image_newline)
        return read(self.model, tokens, packed)

    def tiles(self, seeds: Sequence[int]) -> dict[str, torch.Tensor | float]:
        made = [_tile(seed) for seed in seeds]
        kind, tint, place = (
            torch.from_numpy(np.stack(part)) for part in zip(*((t.kind, t.tint, t.place) for t in made), strict=True)
        )
        with torch.autocast("cpu", torch.bfloat16):
            pixels = _pixels(np.stack([tile.image for tile in made]))
            states = look(self.tower, pixels)
            patch, right = self.heads.patch_loss(states, kind, tint)
            where = self.heads.place_loss(states, place)
            scene = self.heads.scene_loss(self.mixed[0], kind, tint)
            shade = self.heads.shade_loss(states, pixels)
        told = {"patch": patch.item(), "place": where.item(), "scene": scene.item(), "shade": shade.item()}
        return {"loss": patch + 0.5 * where + 10 * scene + 2 * shade, "kind": right, **told}

    def losses(self, stage: Stage, step: int) -> Iterator[dict[str, torch.Tensor | float]]:
        """The losses of a step: tiles, clips of one length, and pictures of one size or pairs."""
        rng = random.Random(f"{stage.name}-{step}")
        if stage.tiles:
            yield self.tiles(self.group.share(stage.first_seed + step * stage.tiles, stage.tiles))
        if stage.clips:
            length = rng.randint(*stage.frames)
            seeds = self.group.share(stage.first_seed + step * stage.clips, stage.clips)
            data = Clips("train", stage.frames, stage.scenes)
            shown = show_clips([data.make(seed, length) for seed in seeds])
            yield self.loss(shown, QUESTIONS, random.Random(f"{stage.name}-{seeds[0]}"))
        if stage.stills:
            layout = rng.choice(["pair", "pair", *PICTURES])
            seeds = self.group.share(stage.first_seed + step * stage.stills, stage.stills)
            if layout == "pair":
                shown = show_pairs([Pairs("train")[seed] for seed in seeds])
            else:
                shown = show_pictures([Pictures("train").make(seed, layout) for seed in seeds])
            out = self.loss(shown, STILL_QUESTIONS, random.Random(f"{stage.name}-{seeds[0]}-still"))
            yield {"loss": 0.5 * out.pop("loss"), **{f"still_{name}": value for name, value in out.items()}}

    def loss(self, shown: Shown, slots: int, rng: random.Random) -> dict[str, torch.Tensor | float]:
        packed = pack([packing.draw(asked, slots, rng, WEIGHTS) for asked in shown.asked], slots)
        used = packed.types >= 0
        with torch.autocast("cpu", torch.bfloat16):
            answer, right = packing.answer(self.model, self.hidden(shown, packed), packed)
            count = shown.told.shape[1]
            states = [self.seen[depth][:, packing.PREFIX : packing.PREFIX + count] for depth in (2, 3)]
            told = self.chronicle.loss(states, shown.told)
        exact = right[used].float().mean().item()
        return {"loss": answer + 0.3 * told, "answer": answer.item(), "exact": exact, "told": told.item()}

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Held-out accuracy per type of question."""
        right, types = [], []
        for shown in self.held_out:
            packed = pack([asked[:20] for asked in shown.asked], 20)
            with torch.autocast("cpu", torch.bfloat16):
                right.append(packing.answer(self.model, self.hidden(shown, packed), packed)[1].flatten())
            types.append(packed.types.flatten())
        hits, kinds = torch.cat(right), torch.cat(types)
        scores = {name: hits[kinds == i].float().mean().item() for i, name in enumerate(QUESTION_TYPES)}
        return {"val": sum(scores.values()) / len(scores), **{f"val_{name}": score for name, score in scores.items()}}

    def optimizers(self, stage: Stage) -> tuple[dict[str, MuonAdamW], list[nn.Parameter]]:
        """For the tower with its heads and for the rest, as the stage trains them; the latter keeps its momentum."""
        found, trained = {}, []
        if stage.tiles:
            named = [(f"tower.{n}", p) for n, p in self.tower.named_parameters() if "post_layernorm" not in n]
            named += list(self.heads.named_parameters())
            found["tower"] = MuonAdamW(named, stage.muon, stage.adamw, stage.tower)
            trained += [p for _, p in named]
        if stage.clips:
            known = {id(p) for p in self.tower.parameters()}
            named = [(n, p) for n, p in self.model.named_parameters() if id(p) not in known]
            named += [(f"chronicle.{n}", p) for n, p in self.chronicle.named_parameters()]
            self.carried = found["language"] = self.carried or MuonAdamW(named, stage.muon, stage.adamw)
            self.carried.rates = (stage.muon, stage.adamw)
            trained += [p for _, p in named]
        return found, trained

    def run(self, stage: Stage) -> None:
        """Train one stage, or what is left of it."""
        optimizers, parameters = self.optimizers(stage)
        path = self.folder / f"{stage.name}.pt"
        begin = self.resume(path, optimizers) if path.exists() else 0
        gradients, sums = FlatGradients(parameters, self.group), {}
        for step in range(begin, stage.steps):
            gradients.zero()
            for out in self.losses(stage, step):
                out.pop("loss").backward()
                for name, value in out.items():
                    sums[name] = sums.get(name, 0.0) + value / REPORT_EVERY
            sums["norm"] = sums.get("norm", 0.0) + gradients.average() / REPORT_EVERY
            factor = schedule(step, stage.steps, stage.warmup, stage.floor)
            for name, optimizer in optimizers.items():
                optimizer.step(schedule(step, stage.steps, stage.warmup, 0.02) if name == "tower" else factor)
            done = step + 1
            if done % REPORT_EVERY == 0:
                if self.group.first:
                    scores = self.validate() if stage.clips and done % (4 * REPORT_EVERY) == 0 else {}
                    self.log.write(stage=stage.name, step=done, factor=factor, **sums, **scores)
                sums = {}
            if self.group.first and (done % SAVE_EVERY == 0 or done == stage.steps):
                save(path, self.state(done, optimizers))

    def state(self, step: int, optimizers: dict[str, MuonAdamW]) -> dict:
        return {
            "step": step,
            "model": self.model.state_dict(),
            "heads": self.heads.state_dict(),
            "chronicle": self.chronicle.state_dict(),
            "optimizers": {name: optimizer.state_dict() for name, optimizer in optimizers.items()},
        }

    def resume(self, path: Path, optimizers: dict[str, MuonAdamW]) -> int:
        """Load a checkpoint; the number of steps it has behind it."""
        state = torch.load(path, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.heads.load_state_dict(state["heads"])
        self.chronicle.load_state_dict(state["chronicle"])
        for name, saved in state["optimizers"].items():
            if name in optimizers:
                optimizers[name].load_state_dict(saved)
        return state["step"]


def read(model: LlavaOnevisionForConditionalGeneration, tokens: torch.Tensor, packed: Pack) -> torch.Tensor:
    """Final hidden states of the question slots, (B, K * SLOT, D), behind visual tokens (B, N, D)."""
    language = model.model.language_model
    start = torch.tensor([LANGUAGE.encode(text.BOS) + LANGUAGE.encode(text.USER)]).expand(len(tokens), -1)
    prefix = torch.cat([language.embed_tokens(start), tokens.to(language.embed_tokens.weight.dtype)], 1)
    count = prefix.shape[1]
    return packing.states(language, prefix, torch.arange(count)[None], packed, count)


def held_out() -> Iterator[Shown]:
    """What the accuracy in the log is measured on: 60 clips, 48 pictures, 20 pairs of the split `val`."""
    for i, length in enumerate((16, 20, 24, 28, 32)):
        yield show_clips([Clips("val").make(seed, length) for seed in range(12 * i, 12 * i + 12)])
    for i, layout in enumerate(PICTURES):
        yield show_pictures([Pictures("val").make(seed, layout) for seed in range(12 * i, 12 * i + 12)])
    yield show_pairs([Pairs("val")[seed] for seed in range(20)])


if __name__ == "__main__":
    command(__doc__, "tiny-onevision", Trainer, STAGES)
