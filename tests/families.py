"""Tiny random models of every family, and prompts for them: no network, milliseconds per call."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn.functional import pad

IMAGE, CLIP, START, END = 5, 6, 7, 8  # ids of the placeholders, and of the tokens around them where a family has some

# Whether this release of transformers runs the encoder ahead of the prefill.
NEWEST = "mm_encoder_outputs" in inspect.signature(transformers.LlavaForConditionalGeneration.forward).parameters

GREEDY: dict[str, Any] = {
    "max_new_tokens": 5,
    "do_sample": False,
    "pad_token_id": 0,
    "eos_token_id": None,
    "suppress_tokens": [IMAGE, CLIP, START, END],
    "return_dict_in_generate": True,
    "output_logits": True,
}

# The prompts that the laws are tried on, one tuple of segments per row.
TEXT, ONE_IMAGE, TWO_IMAGES = ("text",), ("text", "image", "text"), ("text", "image", "image", "text")
ONE_CLIP, BOTH = ("text", "clip", "text"), ("text", "clip", "text", "image", "text")
SHAPES: dict[str, tuple[tuple[str, ...], ...]] = {
    "image": (ONE_IMAGE,),
    "two-images": (TWO_IMAGES,),
    "clip": (ONE_CLIP,),
    "image-and-clip": (BOTH,),
    "text": (TEXT,),
    "ragged": (ONE_IMAGE, TEXT, TWO_IMAGES, ONE_CLIP, BOTH),
}


@dataclass(frozen=True)
class Shown:
    """An image or a clip of a prompt, as a processor would hand it over, and the places of its tokens in the row."""

    clip: bool
    pixels: Tensor  # (crops, tiles or frames, 3, H, W), or (patches, D) for encoders of packed patches
    size: tuple[int, ...]  # (height, width) of the picture, or (frames, rows, columns) of patches
    places: tuple[int, ...] = ()

    @property
    def tokens(self) -> int:
        return len(self.places)


@dataclass(frozen=True)
class Row:
    """One prompt without padding."""

    ids: Tensor  # (S,)
    shown: tuple[Shown, ...]


@dataclass(frozen=True)
class Batch:
    """Inputs of one call, and how to get one of their rows alone, without its padding."""

    family: Family
    rows: tuple[Row, ...]

    def inputs(self) -> dict[str, Tensor]:
        """The whole batch, padded on the left."""
        longest = max(len(row.ids) for row in self.rows)
        ids = torch.stack([pad(row.ids, (longest - len(row.ids), 0)) for row in self.rows])
        mask = torch.stack([pad(torch.ones_like(row.ids), (longest - len(row.ids), 0)) for row in self.rows])
        return {"input_ids": ids, "attention_mask": mask, **self.family.arguments(ids, self.rows)}

    def alone(self, number: int) -> dict[str, Tensor]:
        return replace(self, rows=self.rows[number : number + 1]).inputs()

    def visuals(self) -> list[tuple[int, Shown]]:
        """Every visual input with the number of its row, in the order of reports: images, then clips, as prompted."""
        found = [(number, shown) for number, row in enumerate(self.rows) for shown in row.shown]
        return sorted(found, key=lambda item: item[1].clip)  # stable

    def padding(self, number: int) -> int:
        """Length of the padding in front of a row."""
        return max(len(row.ids) for row in self.rows) - len(self.rows[number].ids)


def extended(inputs: dict[str, Tensor], tokens: Tensor) -> dict[str, Tensor]:
    """The same prompts with more text, `(B, T)`, after them."""
    more = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "mm_token_type_ids": tokens * 0}
    longer = {name: torch.cat([inputs[name], more[name]], dim=1) for name in more if name in inputs}
    return {**inputs, **longer}


@dataclass(frozen=True)
class Family:
    """One family of models: how to make a tiny one, and what its processor would make of images and clips.

    Attributes:
        build: makes the model, with the default initialisation.
        side: edge of one view in pixels, for encoders of fixed views.
        sizes: what images have for a size, in turns: `(height, width)`, or tiles, or a grid of patches.
        frames: number of frames of a clip; none if the family takes no clips.
        class_token: whether the encoder has one.
        deep: behind how many decoder layers the model adds visual features.
    """

    name: str
    build: Callable[[], Any]
    side: int = 56
    sizes: tuple[Any, ...] = (None,)
    frames: int = 0
    class_token: bool = False
    deep: int = 0

    @property
    def shapes(self) -> dict[str, tuple[tuple[str, ...], ...]]:
        """The prompts of `SHAPES` that the family can take."""
        if self.frames:
            return SHAPES
        kept = {name: tuple(row for row in rows if "clip" not in row) for name, rows in SHAPES.items()}
        return {name: rows for name, rows in kept.items() if rows}

    def make(self, attention: str = "sdpa", dtype: torch.dtype = torch.float32) -> Any:
        """A random model of the test's own."""
        torch.manual_seed(0)
        model = self.build().eval()
        with torch.no_grad():  # the default initialisation is so small that all attention is uniform
            for name, weight in model.named_parameters():
                if weight.ndim > 1 and "embed" not in name:
                    weight.mul_(6)
        model.set_attn_implementation(attention)
        return model.to(dtype)

    def model(self, attention: str = "sdpa", dtype: torch.dtype = torch.float32) -> Any:
        """A random model, shared between tests, which must leave it as they found it."""
        return _shared(self.name, attention, dtype)

    def batch(self, rows: Sequence[Sequence[str]], seed: int = 0, dtype: torch.dtype = torch.float32) -> Batch:
        """Prompts made of segments `"text"`, `"image"` and `"clip"`; texts and images differ in size."""
        generator = torch.Generator().manual_seed(seed)
        made, images, clips = [], 0, 0
        for number, segments in enumerate(rows):
            ids: list[int] = []
            shown: list[Shown] = []
            for position, segment in enumerate(segments):
                if segment == "text":
                    ids += words(3 + 2 * number + position, generator)
                elif segment == "image":
                    size = self.sizes[images % len(self.sizes)]
                    image = self.image(size, segments.count("image"), generator, dtype)
                    shown.append(self.place(image, ids, generator))
                    images += 1
                else:
                    shown += [self.place(item, ids, generator) for item in self.clip(clips, generator, dtype)]
                    clips += 1
            made.append(Row(torch.tensor(ids), tuple(shown)))
        return Batch(self, tuple(made))

    # ------------------------------------------------------------------------- what the families do differently

    def image(self, size: Any, among: int, generator: torch.Generator, dtype: torch.dtype) -> Shown:
        """A random image, one of `among` in its prompt."""
        return Shown(False, noise((1, 3, self.side, self.side), generator, dtype), (self.side, self.side))

    def clip(self, number: int, generator: torch.Generator, dtype: torch.dtype) -> list[Shown]:
        """A random clip; where the family knows only images, one image per frame."""
        pixels = noise((self.frames, 3, self.side, self.side), generator, dtype)
        return [Shown(True, pixels, (self.side, self.side))]

    def place(self, shown: Shown, ids: list[int], generator: torch.Generator) -> Shown:
        """Append the placeholder tokens to `ids`."""
        tokens = self.count(shown)
        places = range(len(ids), len(ids) + tokens)
        ids += [CLIP if shown.clip else IMAGE] * tokens
        return replace(shown, places=tuple(places))

    def arguments(self, ids: Tensor, rows: Sequence[Row]) -> dict[str, Tensor]:
        """What the model takes besides text."""
        images, clips = self._shown(rows, clip=False), self._shown(rows, clip=True)
        made = {}
        if images:
            made["pixel_values"] = torch.cat([image.pixels for image in images])
        if clips:
            made["pixel_values_videos"] = torch.stack([clip.pixels for clip in clips])
        return made

    def count(self, shown: Shown) -> int:
        """How many tokens the model itself makes of it."""
        return self._count([Row(torch.tensor([0]), (shown,))])

    @torch.no_grad()
    def _count(self, rows: Sequence[Row]) -> int:
        given, model = self.arguments(torch.zeros(len(rows), 1, dtype=torch.long), rows), self.model().model
        images = "pixel_values" in given
        pixels = given["pixel_values" if images else "pixel_values_videos"].float()
        names = ("image_sizes", "image_grid_thw", "batch_num_images") if images else ("video_grid_thw",)
        encode = model.get_image_features if images else model.get_video_features
        out = encode(pixels, **{name: given[name] for name in names if name in given})
        return sum(feature.flatten(0, -2).shape[0] for feature in out.pooler_output)

    @staticmethod
    def _shown(rows: Sequence[Row], clip: bool) -> list[Shown]:
        return [shown for row in rows for shown in row.shown if shown.clip == clip]


@dataclass(frozen=True)
class AnyRes(Family):
    """Images as a thumbnail and crops on a canvas, of which the padding is cut off."""

    pinpoints: tuple[tuple[int, int], ...] = ()

    def image(self, size: Any, among: int, generator: torch.Generator, dtype: torch.dtype) -> Shown:
        from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

        crops = image_size_to_num_patches(list(size), [list(point) for point in self.pinpoints], self.side)
        return Shown(False, noise((crops, 3, self.side, self.side), generator, dtype), size)

    def arguments(self, ids: Tensor, rows: Sequence[Row]) -> dict[str, Tensor]:
        images = self._shown(rows, clip=False)
        made = super().arguments(ids, rows)
        if images:
            most = max(len(image.pixels) for image in images)
            padded = [pad(image.pixels, (0, 0) * 3 + (0, most - len(image.pixels))) for image in images]
            made["pixel_values"] = torch.stack(padded)
            made["image_sizes"] = torch.tensor([image.size for image in images])
        return made


@dataclass(frozen=True)
class OneVision(AnyRes):
    """AnyRes for the only image of a prompt; each of several is a single view."""

    def image(self, size: Any, among: int, generator: torch.Generator, dtype: torch.dtype) -> Shown:
        if among == 1:
            return super().image(size, among, generator, dtype)
        return Shown(False, noise((1, 3, self.side, self.side), generator, dtype), size)

    def arguments(self, ids: Tensor, rows: Sequence[Row]) -> dict[str, Tensor]:
        made = super().arguments(ids, rows)
        if "pixel_values" in made:
            made["batch_num_images"] = torch.tensor([len(self._shown([row], clip=False)) for row in rows])
        return made

    def count(self, shown: Shown) -> int:
        if shown.clip:
            frames = super().count(shown)
            return frames + (frames % len(shown.pixels) == 0)  # some releases append the newline only later
        several = 2 if len(shown.pixels) == 1 else 1
        return self._count([Row(torch.tensor([0]), (shown,) * several)]) // several


@dataclass(frozen=True)
class Qwen(Family):
    """Patches of any number of grids, packed one after the other; tokens of the same modality are never neighbours."""

    patch: int = 4
    clips: tuple[tuple[int, int, int], ...] = ((3, 4, 6), (4, 4, 4))
    stamped: bool = False  # frames of a clip have their time written in front of them
    timed: bool = False  # how long a frame lasts is an argument

    def image(self, size: Any, among: int, generator: torch.Generator, dtype: torch.dtype) -> Shown:
        return self._packed(False, size, generator, dtype)

    def clip(self, number: int, generator: torch.Generator, dtype: torch.dtype) -> list[Shown]:
        return [self._packed(True, self.clips[number % len(self.clips)], generator, dtype)]

    def _packed(self, clip: bool, grid: tuple[int, int, int], generator: torch.Generator, dtype: torch.dtype) -> Shown:
        patches, values = grid[0] * grid[1] * grid[2], 3 * 2 * self.patch**2  # two pictures make a frame
        return Shown(clip, noise((patches, values), generator, dtype), grid)

    def place(self, shown: Shown, ids: list[int], generator: torch.Generator) -> Shown:
        frames = shown.size[0] if self.stamped and shown.clip else 1
        tokens, places = self.count(shown) // frames, []
        for _ in range(frames):
            ids += words(2, generator) if frames > 1 else []
            places += range(len(ids) + 1, len(ids) + 1 + tokens)
            ids += [START, *[CLIP if shown.clip else IMAGE] * tokens, END]
        return replace(shown, places=tuple(places))

    def arguments(self, ids: Tensor, rows: Sequence[Row]) -> dict[str, Tensor]:
        images, clips = self._shown(rows, clip=False), self._shown(rows, clip=True)
        made = {"mm_token_type_ids": (ids == IMAGE).long() + 2 * (ids == CLIP).long()}
        if images:
            made["pixel_values"] = torch.cat([image.pixels for image in images])
            made["image_grid_thw"] = torch.tensor([image.size for image in images])
        if clips:
            made["pixel_values_videos"] = torch.cat([clip.pixels for clip in clips])
            made["video_grid_thw"] = torch.tensor([clip.size for clip in clips])
            if self.timed:
                made["second_per_grid_ts"] = torch.tensor([2.0 / clip.size[0] for clip in clips])  # of two seconds
        return made


@dataclass(frozen=True)
class Tiles(Family):
    """An image is one or several tiles next to each other; a clip is one image per frame."""

    def image(self, size: Any, among: int, generator: torch.Generator, dtype: torch.dtype) -> Shown:
        return Shown(False, noise((size, 3, self.side, self.side), generator, dtype), (self.side, self.side))

    def clip(self, number: int, generator: torch.Generator, dtype: torch.dtype) -> list[Shown]:
        return [self.image(1, self.frames, generator, dtype) for _ in range(self.frames)]

    def place(self, shown: Shown, ids: list[int], generator: torch.Generator) -> Shown:
        ids += [*words(1, generator), START]
        placed = super().place(shown, ids, generator)
        ids.append(END)
        return placed


def words(count: int, generator: torch.Generator) -> list[int]:
    return torch.randint(10, 100, (count,), generator=generator).tolist()


def noise(shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=generator).to(dtype)


@cache
def _shared(name: str, attention: str, dtype: torch.dtype) -> Any:
    return FAMILIES[name].make(attention, dtype)


# ------------------------------------------------------------------------------------------------- configurations

LAYERS = 4
WIDTH: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 4096,
}
TOWER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "patch_size": 14,
}
QWEN_TOWER: dict[str, Any] = {
    "depth": 3,
    "hidden_size": 32,
    "out_hidden_size": 64,
    "num_heads": 2,
    "intermediate_size": 64,
    "patch_size": 4,
}
SPECIAL = {"image_token_id": IMAGE, "video_token_id": CLIP, "vision_start_token_id": START, "vision_end_token_id": END}


def clip_tower(side: int) -> Any:
    return transformers.CLIPVisionConfig(**TOWER, image_size=side)


def siglip_tower(side: int) -> Any:
    return transformers.SiglipVisionConfig(**TOWER, image_size=side)


def llama() -> Any:
    return transformers.LlamaConfig(**WIDTH)


def qwen2() -> Any:
    return transformers.Qwen2Config(**WIDTH)


def mrope(section: list[int], **more: Any) -> dict[str, Any]:
    """A text config with M-RoPE."""
    rope = {"rope_type": "default", "mrope_section": section, "rope_theta": 10000.0}
    return {**WIDTH, "rope_parameters": {**rope, **more}}


def pinpoints(side: int) -> tuple[tuple[int, int], ...]:
    """One row of two crops, one column of two, and a square of four."""
    return ((side, 2 * side), (2 * side, side), (2 * side, 2 * side))


def llava(tower: Any = clip_tower, text: Any = llama) -> Any:
    config = transformers.LlavaConfig(
        vision_config=tower(56),
        text_config=text(),
        image_token_id=IMAGE,
        vision_feature_select_strategy="default" if tower is clip_tower else "full",
    )
    return transformers.LlavaForConditionalGeneration(config)


def llava_next() -> Any:
    config = transformers.LlavaNextConfig(
        vision_config=clip_tower(56),
        text_config=llama(),
        image_token_id=IMAGE,
        image_grid_pinpoints=[list(point) for point in pinpoints(56)],
    )
    return transformers.LlavaNextForConditionalGeneration(config)


def llava_next_video() -> Any:
    config = transformers.LlavaNextVideoConfig(
        vision_config=clip_tower(56),
        text_config=llama(),
        image_token_index=IMAGE,
        video_token_index=CLIP,
        image_grid_pinpoints=[list(point) for point in pinpoints(56)],
    )
    return transformers.LlavaNextVideoForConditionalGeneration(config)


def llava_onevision() -> Any:
    config = transformers.LlavaOnevisionConfig(
        vision_config=siglip_tower(70),  # 5 x 5 patches: an odd number, which pooling rounds up
        text_config=qwen2(),
        image_token_id=IMAGE,
        video_token_id=CLIP,
        image_grid_pinpoints=[list(point) for point in pinpoints(70)],
        vision_aspect_ratio="anyres_max_2",  # so that four crops are scaled down
    )
    return transformers.LlavaOnevisionForConditionalGeneration(config)


def qwen2_vl() -> Any:
    vision = {"depth": 3, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4}
    config = transformers.Qwen2VLConfig(vision_config=vision, text_config=mrope([2, 3, 3]), **SPECIAL)
    return transformers.Qwen2VLForConditionalGeneration(config)


def qwen2_5_vl() -> Any:
    vision = {
        **QWEN_TOWER,
        "window_size": 16,  # two by two tokens
        "fullatt_block_indexes": [2],  # as in the checkpoints, the last layer is one of them
    }
    config = transformers.Qwen2_5_VLConfig(vision_config=vision, text_config=mrope([2, 3, 3]), **SPECIAL)
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def qwen3_vl() -> Any:
    vision = {**QWEN_TOWER, "deepstack_visual_indexes": [0, 1], "num_position_embeddings": 64}
    text = {**mrope([4, 2, 2], mrope_interleaved=True), "head_dim": 16}
    config = transformers.Qwen3VLConfig(vision_config=vision, text_config=text, **SPECIAL)
    return transformers.Qwen3VLForConditionalGeneration(config)


def internvl() -> Any:
    vision = {**TOWER, "image_size": [112, 112], "patch_size": [14, 14]}
    config = transformers.InternVLConfig(
        vision_config=vision, text_config=qwen2(), image_token_id=IMAGE, downsample_ratio=0.5
    )
    return transformers.InternVLForConditionalGeneration(config)


GRIDS = ((1, 8, 8), (1, 6, 10), (1, 10, 4))  # patches, of which two by two make a token
FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family("llava", llava, class_token=True),
        Family("llava-siglip", partial(llava, siglip_tower, qwen2)),
        AnyRes(
            "llava-next",
            llava_next,
            sizes=((40, 90), (90, 100), (100, 30)),
            pinpoints=pinpoints(56),
            class_token=True,
        ),
        AnyRes(
            "llava-next-video",
            llava_next_video,
            sizes=((40, 90), (90, 100)),
            pinpoints=pinpoints(56),
            frames=4,
            class_token=True,
        ),
        OneVision(
            "llava-onevision",
            llava_onevision,
            side=70,
            sizes=((90, 100), (40, 120), (130, 50)),
            pinpoints=pinpoints(70),
            frames=3,
        ),
        Qwen("qwen2vl", qwen2_vl, sizes=GRIDS, frames=3),
        Qwen("qwen25vl", qwen2_5_vl, sizes=GRIDS, frames=3, timed=True),
        Qwen("qwen3vl", qwen3_vl, sizes=GRIDS, frames=3, stamped=True, deep=2),
        Tiles("internvl", internvl, side=112, sizes=(1, 3, 2), frames=3, class_token=True),
    )
}
