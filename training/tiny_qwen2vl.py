"""Train `tiny-qwen2vl`: a Qwen2-VL of 3 million parameters that answers questions about `vtc.eval.sizes`.

    python -m training.tiny_qwen2vl --workers 1

It starts from `tiny-llava`: the language model as it is, words by word, and of the vision tower what does not depend on
its table of positions. Stages, each a function of the step number only, so that a run can stop and resume:

0. `crops`: the vision tower alone on 64 x 64 pictures with one or two things and on clips of four frames.
1. `media`: the same losses on pictures and clips of all sizes.
2. `joint` and `settle`: tower and language model together on questions and answers, with the vision losses kept; in the
   end the learning rate falls to nothing.

The media of a group have one size, so that a batch needs no padding; every step has several groups. No stage ever
drops visual tokens, and the answers' gradient reaches the tower only through tokens that show a thing: see
`training/README.md`.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb_vision

import vtc.zoo
from training import common, packing, text
from training.common import Group, Log, MuonAdamW, command
from training.text import Language
from vtc.eval.content import COLOURS, DIGITS, PLURALS, SHAPES, WORDS
from vtc.eval.items import Question
from vtc.eval.sizes import CLIPS, PATCH, QUESTION_TYPES, WAYS, Scene, Scenes, layout

START, END, IMAGE, VIDEO = "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"
LANGUAGE = Language(
    (text.PAD, text.BOS, text.EOS, text.UNK, text.USER, text.ASSISTANT, START, END, IMAGE, VIDEO),
    text.words(
        (*text.PHRASES, "which shape appears first last ?", "which way does the move ?", "up down"),
        *(COLOURS, SHAPES, PLURALS.values(), DIGITS, WORDS, text.PLACES),
    ),
)
TINTS = tuple(COLOURS)
KINDS = ("background", *SHAPES, *DIGITS, *WORDS)
MOTIONS = ("", *WAYS)
MERGE = 2
QUESTIONS = 7  # per medium and step
BEFORE = 3  # tokens in front of the visual ones: BOS, `USER:`, START
# How much more often a type is drawn than it occurs, where a medium has more questions than there are slots.
WEIGHTS = {
    "digit": 2.0, "colour": 0.4, "shape": 0.4, "where": 2.5, "word": 2.0, "count": 2.5, "exist": 0.8, "relation": 2.5,
    "order": 1.5, "motion": 2.5,
}  # fmt: skip


@dataclass(frozen=True)
class Stage:
    """What distinguishes one stage from the next; everything else is common."""

    name: str
    steps: int
    pictures: tuple[int, ...]  # media per step of each group of pictures, over all workers
    clips: int  # media per step of the group of clips
    muon: float  # learning rates
    adamw: float
    floor: float  # the learning rate falls to this share of itself along a cosine
    warmup: int
    first_seed: int
    crops: bool = False
    answers: bool = False  # train the language model too
    tower: float = 1.0  # learning rate of the vision tower, relative


STAGES = (
    Stage("crops", 150, (96,), 16, 0.02, 2e-3, 0.3, 20, 0, crops=True),
    Stage("media", 100, (24, 24), 12, 0.02, 2e-3, 0.3, 20, 10_000_000),
    Stage("joint", 800, (14, 14), 8, 0.02, 1e-3, 1.0, 50, 20_000_000, answers=True, tower=0.5),
    Stage("settle", 1250, (14, 14), 8, 0.02, 1e-3, 0.01, 1, 40_000_000, answers=True, tower=0.5),
)
VALIDATE_EVERY = 100


# --------------------------------------------------------------------------------------------------------------- model


def config() -> Qwen2VLConfig:
    """3 M parameters: 1.2 M vision, 1.8 M language.

    The rotary base is small, because the sections of M-RoPE share its frequencies: with the usual one, the third
    section, columns, could not tell neighbours apart.
    """
    ids = LANGUAGE.ids
    vision = {
        "depth": 4, "embed_dim": 128, "num_heads": 4, "hidden_size": 192, "mlp_ratio": 4, "patch_size": PATCH,
        "temporal_patch_size": 2, "spatial_merge_size": MERGE, "hidden_act": "gelu",
        "rope_parameters": {"rope_type": "axial", "rope_theta": 100.0},
    }  # fmt: skip
    language = {
        "vocab_size": len(ids), "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4,
        "num_attention_heads": 6, "num_key_value_heads": 6, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6,
        "bos_token_id": ids[text.BOS], "eos_token_id": ids[text.EOS], "pad_token_id": ids[text.PAD],
        "rope_parameters": {"rope_type": "default", "rope_theta": 40.0, "mrope_section": [4, 6, 6]},
    }  # fmt: skip
    return Qwen2VLConfig(
        vision_config=vision, text_config=language, image_token_id=ids[IMAGE], video_token_id=ids[VIDEO],
        vision_start_token_id=ids[START], vision_end_token_id=ids[END], tie_word_embeddings=False,
    )  # fmt: skip


@torch.no_grad()
def build() -> Qwen2VLForConditionalGeneration:
    """A model that starts where `tiny-llava` ended, as far as the architectures agree.

    Queries and keys of the tower do not agree: they were learned with a table of positions. They start equal to each
    other, which under rotary positions prefers neighbours and similar patches.
    """
    model = Qwen2VLForConditionalGeneration(config())
    llava, _ = vtc.zoo.load("tiny-llava")
    ours, theirs = model.model.language_model, llava.model.language_model
    ours.load_state_dict({k: v for k, v in theirs.state_dict().items() if "embed" not in k}, strict=False)
    for name, bias in ours.named_parameters():
        if name.endswith("proj.bias"):
            bias.zero_()
    for mine, old in ((ours.embed_tokens, theirs.embed_tokens), (model.lm_head, llava.lm_head)):
        nn.init.normal_(mine.weight, std=old.weight.std().item())
        for word, number in LANGUAGE.ids.items():
            if word in text.LLAVA.ids:
                mine.weight[number] = old.weight[text.LLAVA.ids[word]]

    tower, clip = model.model.visual, llava.model.vision_tower
    width = tower.config.embed_dim
    first = clip.embeddings.patch_embedding.weight  # (D, 3, P, P)
    position = clip.embeddings.position_embedding.weight[1:].std().item()
    # A still picture shows each frame twice. CLIP normalises what it embeds together with positions.
    scale = (first.square().sum((1, 2, 3)).mean() + position**2).rsqrt()
    # What moves shows in what one frame has more than the other: nothing where the two are equal.
    change = first[torch.randperm(width)]
    tower.patch_embed.proj.weight.copy_(torch.stack([first + change, first - change], 2) * scale / 2)
    head = width // tower.config.num_heads
    for block, layer in zip(tower.blocks, clip.encoder.layers, strict=False):
        old = layer.self_attn
        mixing = block.attn.qkv
        mixing.weight[2 * width :], mixing.bias[2 * width :] = old.v_proj.weight, old.v_proj.bias
        mixing.bias[: 2 * width] = 1.5  # equal in queries and keys: a preference for what is near
        for rows in torch.arange(width).split(head):
            start = torch.linalg.qr(torch.randn(width, head))[0].T * 1.2  # (head, width), orthogonal rows
            mixing.weight[rows] = start
            mixing.weight[rows + width] = start
        block.attn.proj.load_state_dict(old.out_proj.state_dict())
        block.mlp.load_state_dict(layer.mlp.state_dict())
        block.norm1.load_state_dict(layer.layer_norm1.state_dict())
        block.norm2.load_state_dict(layer.layer_norm2.state_dict())
    return model


def patches(scenes: Sequence[Scene]) -> torch.Tensor:
    """Pixel values (B, T, N, 3 * 2 * P * P) of media of one size, as the Qwen2-VL processors make them.

    T pairs of frames, a picture being one frame twice; N patches, those of a token next to each other.
    """
    frames = torch.from_numpy(np.stack([scene.frames for scene in scenes])).float() / 255  # (B, F, H, W, 3)
    frames = (frames - packing.MEAN.view(3)) / packing.STD.view(3)
    if frames.shape[1] == 1:
        frames = frames.expand(-1, 2, -1, -1, -1)
    side = MERGE * PATCH
    batch, _, height, width, _ = frames.shape
    cut = frames.reshape(batch, -1, 2, height // side, MERGE, PATCH, width // side, MERGE, PATCH, 3)
    #            b  t  row  column  patch row, column  channel  frame  pixel row, column
    return cut.permute(0, 1, 3, 6, 4, 7, 9, 2, 5, 8).reshape(batch, cut.shape[1], -1, 6 * PATCH**2)


def blocks(grid: torch.Tensor) -> torch.Tensor:
    """A value per patch, (..., rows, columns), in the order of the patches: (..., N)."""
    return grid.unflatten(-2, (-1, MERGE)).unflatten(-1, (-1, MERGE)).transpose(-3, -2).flatten(-4)


@functools.lru_cache(maxsize=256)
def coordinates(rows: int, columns: int) -> torch.Tensor:
    """(N, 2): row and column of every patch, in the order of the patches."""
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return torch.stack([blocks(y), blocks(x)], -1)


def look(tower: nn.Module, pixels: torch.Tensor, rows: int, columns: int) -> list[torch.Tensor]:
    """Hidden states of the embedding and of all blocks, each (B, N, D), of `pixels` (B, N, 3 * 2 * P * P).

    What the tower itself does, but for a batch of frames of one size at once.
    """
    x = functional.linear(pixels, tower.patch_embed.proj.weight.flatten(1))
    cos, sin = tower.rotary_pos_emb(x, coordinates(rows, columns))
    states = [x]
    for block in tower.blocks:
        attention = block.attn
        mixing = attention.qkv(block.norm1(x)).unflatten(-1, (3, attention.num_heads, -1))  # (B, N, 3, H, D / H)
        query, key, value = mixing.float().unbind(2)
        query, key = apply_rotary_pos_emb_vision(query, key, cos, sin)
        # Single precision, because on CPUs the attention is faster so.
        with torch.autocast("cpu", enabled=False):
            mixed = functional.scaled_dot_product_attention(*(part.transpose(1, 2) for part in (query, key, value)))
        x = x + attention.proj(mixed.transpose(1, 2).flatten(2))
        x = x + block.mlp(block.norm2(x))
        states.append(x)
    return states


def positions(pairs: int, rows: int, columns: int) -> tuple[torch.Tensor, int]:
    """M-RoPE positions (3, P) of everything in front of the questions, and that of a question's first token.

    `rows` and `columns` count tokens.
    """
    before = torch.arange(BEFORE).expand(3, -1)
    grid = torch.meshgrid(torch.arange(pairs), torch.arange(rows), torch.arange(columns), indexing="ij")
    visual = BEFORE + torch.stack(grid).flatten(1)
    after = BEFORE + max(rows, columns)
    return torch.cat([before, visual, torch.full((3, 1), after)], 1), after + 1


def answers(
    model: Qwen2VLForConditionalGeneration,
    tokens: torch.Tensor,
    grid: tuple[int, int, int],
    packed: packing.Pack,
) -> torch.Tensor:
    """Final hidden states of the question slots, (B, K * SLOT, D).

    `tokens` (B, T * rows * columns, D) are what the merger makes; `grid` is (T, rows, columns).
    """
    batch = len(tokens)
    place, first = positions(*grid)
    place = place[:, None].expand(-1, batch, -1)  # (3, B, P)
    language = model.model.language_model
    embed = language.embed_tokens
    ids = [*LANGUAGE.encode(text.BOS), *LANGUAGE.encode(text.USER), *LANGUAGE.encode(START)]
    start, end = (embed(torch.tensor([part])).expand(batch, -1, -1) for part in (ids, LANGUAGE.encode(END)))
    prefix = torch.cat([start, tokens.to(start.dtype), end], 1)
    return packing.states(language, prefix, place, packed, first)


# --------------------------------------------------------------------------------------------------------- vision loss


@dataclass(frozen=True)
class Targets:
    """What the patches of B media of one size show, (B, T * N) each."""

    kind: torch.Tensor  # index into KINDS
    tint: torch.Tensor  # index into TINTS, -1 on background
    motion: torch.Tensor  # index into MOTIONS; -1 on background and in pictures


def targets(scenes: Sequence[Scene]) -> Targets:
    # One more row than things, the first for background.
    most = 1 + max(len(scene.things) for scene in scenes)
    table = torch.zeros(len(scenes), most, 3, dtype=torch.long)
    table[:, :, 1:] = -1
    for b, scene in enumerate(scenes):
        clip = len(scene.frames) > 1
        for i, thing in enumerate(scene.things):
            motion = MOTIONS.index(thing.way) if clip else -1
            table[b, i + 1] = torch.tensor([KINDS.index(thing.name), TINTS.index(thing.colour), motion])
    owner = blocks(torch.from_numpy(np.stack([scene.owner for scene in scenes]))).flatten(1)  # (B, T * N)
    return Targets(*table.gather(1, owner[..., None].expand(-1, -1, 3)).unbind(-1))


class Heads(nn.Module):
    """Training only: name what every patch shows, after the last two blocks, and what every token shows.

    The tower compares positions but does not know them, so where something is, is up to the language model: its first
    two layers have to tell the coordinates of the visual tokens and, from the token behind them, the size of the grid.
    Its third layer has to tell where the shape is that a question names.
    """

    def __init__(self, width: int, deep: int) -> None:
        super().__init__()
        self.sizes = [len(KINDS), len(TINTS), len(MOTIONS)]
        self.levels = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(size), nn.Linear(size, sum(self.sizes))) for size in (width, width, deep)
        )
        self.axes = nn.ModuleList(nn.Sequential(nn.LayerNorm(deep), nn.Linear(deep, 3)) for _ in range(2))
        self.spot = nn.Sequential(nn.LayerNorm(deep), nn.Linear(deep, 2))

    def loss(self, level: int, states: torch.Tensor, t: Targets) -> tuple[torch.Tensor, float]:
        """`states` (B, N, D). Also returns the accuracy of the kind on what is not background."""
        kind, tint, motion = self.levels[level](states).float().flatten(0, 1).split(self.sizes, 1)
        weight = torch.ones(len(KINDS))
        weight[0] = 0.15  # most patches are background
        true = t.kind.flatten()
        loss = functional.cross_entropy(kind, true, weight)
        for logits, wanted, share in ((tint, t.tint, 1.0), (motion, t.motion, 2.0)):
            # The sum is divided by hand: a group may have none.
            total = functional.cross_entropy(logits, wanted.flatten(), ignore_index=-1, reduction="sum")
            loss = loss + share * total / (wanted >= 0).sum().clamp(min=1)
        return loss, (kind.argmax(1) == true)[true > 0].float().mean().item()

    def grid_loss(self, states: Sequence[torch.Tensor], grid: tuple[int, int, int]) -> torch.Tensor:
        """`states` are what the second and the third layer of the language model get, (B, L, D) each."""
        place, _ = positions(*grid)
        end = place.shape[1] - 1
        cells, size = self.axes[0](states[0][:, BEFORE:end]).float(), self.axes[1](states[1][:, end]).float()
        true = (place[:, BEFORE:end] - BEFORE).T / 4
        return functional.mse_loss(cells, true.expand_as(cells)) + functional.mse_loss(
            size, torch.tensor(grid).expand_as(size) / 4
        )


def spots(
    scenes: Sequence[Scene], asked: Sequence[Sequence[Question]], packed: packing.Pack
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of questions that name the only shape of its kind in a picture: row, place among the question slots of the last
    token in front of the answer, and (x, y) of the shape, from -2 to 2.
    """
    ends = (packed.labels.unflatten(1, (-1, packing.SLOT)) != packing.IGNORE).int().argmax(-1)  # (B, K)
    found: list[tuple[int, int, float, float]] = []
    for b, (scene, questions) in enumerate(zip(scenes, asked, strict=True)):
        frames, height, width, _ = scene.frames.shape
        for k, question in enumerate(questions):
            named = [t for t in scene.things if t.kind == "shape" and t.name == question.text.rstrip("?").split()[-1]]
            if frames == 1 and len(named) == 1 and question.type in ("where", "colour"):
                x, y = named[0].centre
                found.append((b, k * packing.SLOT + int(ends[b, k]), 4 * x / width - 2, 4 * y / height - 2))
    table = torch.tensor(found).view(-1, 4)
    return table[:, 0].long(), table[:, 1].long(), table[:, 2:]


def merged(t: Targets) -> Targets:
    """The targets of tokens: those of the first of its patches that shows a thing."""
    kind = t.kind.unflatten(1, (-1, MERGE**2))
    chosen = (kind > 0).int().argmax(-1, keepdim=True)
    return Targets(
        *(part.unflatten(1, (-1, MERGE**2)).gather(2, chosen)[..., 0] for part in (t.kind, t.tint, t.motion))
    )


# ------------------------------------------------------------------------------------------------------------ training


class Trainer(common.Trainer):
    """Learns media of many sizes."""

    def __init__(self, group: Group, folder: Path, log: Log) -> None:
        torch.manual_seed(0)
        model = build()
        vision = model.config.vision_config
        super().__init__(group, folder, log, model, Heads(vision.embed_dim, vision.hidden_size))
        self.carried: list[MuonAdamW] = []
        rng = random.Random(0)
        sizes = [layout(rng, False) for _ in range(9)] + [CLIPS[i] for i in (0, 2, 3, 4, 7)]
        self.held_out = [[Scenes("val", size)[100 * i + k] for k in range(8)] for i, size in enumerate(sizes)]

    @property
    def tower(self) -> nn.Module:
        return self.model.model.visual

    def see(self, scenes: Sequence[Scene]) -> tuple[list[torch.Tensor], torch.Tensor, tuple[int, int, int]]:
        """Patch states after the last two blocks and tokens, (B, T * N, D) each, and the grid of the tokens."""
        pixels = patches(scenes)
        batch, pairs = pixels.shape[:2]
        rows, columns = (side // PATCH for side in scenes[0].frames.shape[1:3])
        states = look(self.tower, pixels.flatten(0, 1), rows, columns)[-2:]
        tokens = self.tower.merger(states[-1].flatten(0, 1)).view(batch, -1, self.tower.config.hidden_size)
        states = [state.reshape(batch, pairs * rows * columns, -1) for state in states]
        return states, tokens, (pairs, rows // MERGE, columns // MERGE)

    @contextmanager
    def inner(self) -> Iterator[list[torch.Tensor]]:
        """Collects what all layers of the language model but the first get."""
        found: list[torch.Tensor] = []
        handles = [
            layer.input_layernorm.register_forward_pre_hook(lambda _, args: found.append(args[0]))
            for layer in self.model.model.language_model.layers[1:]
        ]
        yield found
        for handle in handles:
            handle.remove()

    def losses(self, stage: Stage, scenes: list[Scene], seeds: Sequence[int]) -> dict[str, torch.Tensor | float]:
        """The total loss of a group under `loss`, its parts and accuracies under other names."""
        t = targets(scenes)
        with torch.autocast("cpu", torch.bfloat16):
            states, tokens, grid = self.see(scenes)
            (early, _), (late, kind) = (self.heads.loss(level, state, t) for level, state in enumerate(states))
            cells = merged(t)
            token, cell = self.heads.loss(2, tokens, cells)
            out = {"patch": late.item(), "kind": kind, "cell": cell}
            if not stage.answers:
                return out | {"loss": 0.5 * early + late + 0.5 * token}
            rngs = [random.Random(f"{stage.name}-{seed}") for seed in seeds]
            asked = [
                packing.draw(scene.questions, QUESTIONS, rng, WEIGHTS) for scene, rng in zip(scenes, rngs, strict=True)
            ]
            packed = packing.pack(asked, max(map(len, asked)), LANGUAGE, QUESTION_TYPES)
            shown = torch.where((cells.kind > 0)[..., None], tokens, tokens.detach())
            with self.inner() as inner:
                hidden = answers(self.model, shown, grid, packed)
            answer, right = packing.answer(self.model, hidden, packed)
            axes = self.heads.grid_loss(inner, grid)
            rows, places, true = spots(scenes, asked, packed)
            told = self.heads.spot(inner[2][:, -packed.ids.shape[1] :][rows, places]).float()
            spot = functional.mse_loss(told, true, reduction="sum") / max(1, true.numel())
            exact = right[packed.types >= 0].float().mean().item()
            out |= {"answer": answer.item(), "exact": exact, "axes": axes.item(), "spot": spot.item()}
            return out | {"loss": answer + 0.5 * axes + 0.5 * spot + 0.1 * early + 0.2 * late + 0.05 * token}

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Held-out accuracy per type of question, in shares of exact matches."""
        right: list[torch.Tensor] = []
        types: list[torch.Tensor] = []
        for scenes in self.held_out:
            packed = packing.pack([scene.questions[:16] for scene in scenes], 16, LANGUAGE, QUESTION_TYPES)
            with torch.autocast("cpu", torch.bfloat16):
                _, tokens, grid = self.see(scenes)
                good = packing.answer(self.model, answers(self.model, tokens, grid, packed), packed)[1]
            right.append(good.flatten())
            types.append(packed.types.flatten())
        good, kinds = torch.cat(right), torch.cat(types)
        scores = {name: good[kinds == i].float().mean().item() for i, name in enumerate(QUESTION_TYPES)}
        return {"val": good[kinds >= 0].float().mean().item(), **{f"val_{name}": v for name, v in scores.items()}}

    def groups(self, stage: Stage, step: int) -> Iterator[tuple[list[Scene], list[int], int]]:
        """The scenes of a step, group by group, with their seeds and their number over all workers."""
        rng = random.Random(f"{stage.name}-{step}")
        seed = stage.first_seed + step * (sum(stage.pictures) + stage.clips)
        for i, count in enumerate((*stage.pictures, stage.clips)):
            clip = i == len(stage.pictures)
            size = ((4 if clip else 1), 64, 64) if stage.crops else layout(rng, clip)
            data = Scenes("train", size, (1, 2) if stage.crops else None)
            seeds = list(self.group.share(seed, count))
            yield [data[one] for one in seeds], seeds, count
            seed += count

    def optimizers(self, stage: Stage) -> tuple[list[MuonAdamW], list[nn.Parameter]]:
        """For tower and heads, and in stages with answers for the rest too; those share one set with its momentum."""
        # The optimiser knows matrices for Muon by these names.
        names = {"blocks.": "layers.", "merger.mlp": "projector"}
        tower = list(self.tower.named_parameters())
        for old, new in names.items():
            tower = [(name.replace(old, new), p) for name, p in tower]
        vision = tower + list(self.heads.named_parameters(prefix="heads"))
        known = {id(p) for _, p in tower}
        language = [(n, p) for n, p in self.model.named_parameters() if id(p) not in known] if stage.answers else []
        parameters = [p for _, p in vision + language]
        if self.carried and stage.answers:
            return self.carried, parameters
        vision = [(name.replace("heads.levels", "heads"), p) for name, p in vision]
        optimizers = [MuonAdamW(vision, stage.muon, stage.adamw, stage.tower)]
        if stage.answers:
            optimizers.append(MuonAdamW(language, stage.muon, stage.adamw))
            self.carried = optimizers
        return optimizers, parameters

    def learn(self, stage: Stage, step: int) -> dict[str, float]:
        media = sum(stage.pictures) + stage.clips
        sums: dict[str, float] = {}
        for scenes, seeds, count in self.groups(stage, step):
            out = self.losses(stage, scenes, seeds)
            (out.pop("loss") * (count / media)).backward()
            for name, value in out.items():
                sums[name] = sums.get(name, 0.0) + value * count / media
        return sums

    def report(self, stage: Stage, done: int) -> dict[str, float]:
        scores = self.validate() if stage.answers and done % VALIDATE_EVERY == 0 else {}
        return {"media": done * (sum(stage.pictures) + stage.clips), **scores}


if __name__ == "__main__":
    command(__doc__, "tiny-qwen2vl", Trainer, STAGES)
