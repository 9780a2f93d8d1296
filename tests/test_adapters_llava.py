"""LLaVA-NeXT, LLaVA-NeXT-Video and LLaVA-OneVision: scores go the way that features go, and layouts say where."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.nn.functional import pad
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape

import vtc
from vtc import adapters
from vtc.adapters.base import Adapter
from vtc.adapters.llava import anyres
from vtc.errors import UnsupportedModelError
from vtc.visual import Layout, View
from watch import Watch

IMAGE, CLIP, WIDTH = 5, 6, 16
FRAMES = 3

FEW = [[56, 112], [112, 56], [112, 112]]
MANY = [[56 * rows, 56 * columns] for rows in range(1, 5) for columns in range(1, 5)]
WIDE = [[56, 112], [56, 224], [112, 56]]

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "next": ("LlavaNext", {"image_grid_pinpoints": FEW}),
    "next-siglip": ("LlavaNext", {"image_grid_pinpoints": MANY, "tower": "siglip"}),
    "next-wide": ("LlavaNext", {"image_grid_pinpoints": WIDE}),
    "next-two-layers": ("LlavaNext", {"image_grid_pinpoints": FEW, "vision_feature_layer": [-2, -1]}),
    "next-video": ("LlavaNextVideo", {"image_grid_pinpoints": FEW}),
    "next-video-max": ("LlavaNextVideo", {"image_grid_pinpoints": FEW, "spatial_pool_mode": "max"}),
    "onevision": ("LlavaOnevision", {"image_grid_pinpoints": MANY, "tower": "siglip"}),  # anyres_max_9
    "onevision-odd": (
        "LlavaOnevision",
        {"image_grid_pinpoints": [[70 * h // 56, 70 * w // 56] for h, w in MANY], "tower": "siglip", "side": 5}
        | {"vision_aspect_ratio": "anyres_max_2"},
    ),
}
ANYRES = ("next", "next-siglip", "next-wide", "next-two-layers", "next-video", "onevision", "onevision-odd")
VIDEO = ("next-video", "next-video-max", "onevision", "onevision-odd")

# Square and odd, wide and tall, small and large; two thinner than a patch.
SIZES = ((56, 56), (40, 90), (90, 40), (300, 300), (33, 211), (200, 61), (57, 58), (220, 223), (1, 400), (400, 1))


@cache
def make(name: str) -> Any:
    kind, options = MODELS[name]
    options = dict(options)
    tower, side = options.pop("tower", "clip"), options.pop("side", 4)
    size = {"hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    pixels = {"image_size": side * 14, "patch_size": 14}
    made = transformers.CLIPVisionConfig if tower == "clip" else transformers.SiglipVisionConfig
    config = getattr(transformers, f"{kind}Config")(
        vision_config=made(**size, **pixels),
        text_config=transformers.LlamaConfig(**size, num_key_value_heads=2, vocab_size=64),
        vision_feature_select_strategy="default" if tower == "clip" else "full",
        image_token_index=IMAGE,
        **options,
        **({} if kind == "LlavaNext" else {"video_token_index": CLIP}),
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForConditionalGeneration")(config).eval()
    with torch.no_grad():  # the default initialisation is so small that all attention is uniform
        for name, weight in model.model.vision_tower.named_parameters():
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                weight.mul_(20)
    return model


def adapter(name: str) -> Any:
    """An adapter that remembers nothing yet."""
    return adapters.find(make(name))


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def crops_of(model: Any, size: tuple[int, int]) -> tuple[int, int]:
    config = model.config
    return get_anyres_image_grid_shape(list(size), config.image_grid_pinpoints, config.vision_config.image_size)


def images(model: Any, sizes: tuple[tuple[int, int], ...], alone: bool = True) -> dict[str, Tensor]:
    """Arguments of `get_image_features`; images with fewer crops than others are filled up with zeros."""
    edge = model.config.vision_config.image_size
    views = [1 + math.prod(crops_of(model, size)) if alone else 1 for size in sizes]
    pixels = [noise(count, 3, edge, edge, seed=number) for number, count in enumerate(views)]
    padded = [pad(views, (0, 0) * 3 + (0, max(map(len, pixels)) - len(views))) for views in pixels]
    arguments = {"pixel_values": torch.stack(padded), "image_sizes": torch.tensor(sizes)}
    return arguments if alone else {**arguments, "batch_num_images": torch.tensor([len(sizes)])}


def clips(model: Any) -> dict[str, Tensor]:
    """Two clips."""
    edge = model.config.vision_config.image_size
    return {"pixel_values_videos": noise(2, FRAMES, 3, edge, edge)}


@torch.no_grad()
def encode(model: Any, modality: str, arguments: dict[str, Tensor]) -> tuple[Any, Tensor]:
    """What the model's own code returns, and the projected patches of every view that it saw, `(P, side * side, D)`."""
    seen: list[Tensor] = []
    inner = model.model
    with inner.multi_modal_projector.register_forward_hook(lambda *call: seen.append(call[-1])):
        if modality == "image":
            output = inner.get_image_features(**arguments)
        else:
            output = inner.get_video_features(arguments["pixel_values_videos"])
    return output, seen[0]


@torch.no_grad()
def received(model: Any, token: int, given: dict[str, Tensor], layouts: list[Layout]) -> list[Tensor]:
    """What the language model gets in the places of `layouts`; the model itself refuses a wrong number of places."""
    inputs: list[Tensor] = []

    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        inputs.append(kwargs["inputs_embeds"])

    counts = [layout.tokens for layout in layouts]
    with model.model.language_model.register_forward_pre_hook(note, with_kwargs=True):
        model(input_ids=torch.full((1, sum(counts)), token), **given)
    return list(inputs[0][0].split(counts))


def with_class_token(adapter: Adapter, patches: Tensor) -> Tensor:
    """Encoder rows `(P, S)` of patches `(P, side * side)`: a class token, if there is one, comes first."""
    return pad(patches, (1, 0), value=1e6) if adapter.encoder_info.class_token else patches


class Copies(TorchDispatchMode):
    """Counts copies from one device or type to another."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._to_copy.default
        return func(*args, **(kwargs or {}))


def places(layout: Layout) -> list[int]:
    return [place for view in layout.views for place in view.places()]


# --------------------------------------------------------------------------------------------------- images


@pytest.mark.parametrize("name", ANYRES)
def test_scores_of_images_go_the_way_of_features(name: str) -> None:
    """Every column of the projected patches, taken for scores, gives that column of the model's features."""
    model, adapted = make(name), adapter(name)
    arguments = images(model, SIZES)
    output, patches = encode(model, "image", arguments)
    layouts = adapted.layouts("image", arguments)
    columns = [
        adapted.token_rows("image", with_class_token(adapted, patches[..., column]), layouts) for column in range(WIDTH)
    ]
    assert [layout.tokens for layout in layouts] == [len(feature) for feature in output.pooler_output]
    newline = model.model.image_newline
    for number, (layout, feature) in enumerate(zip(layouts, output.pooler_output, strict=True)):
        rows = torch.stack([column[number] for column in columns], dim=1)  # (N, D)
        shows = torch.zeros(layout.tokens, dtype=torch.bool)
        shows[places(layout)] = True
        torch.testing.assert_close(rows[shows], feature[shows])
        assert torch.equal(feature[~shows], newline.expand_as(feature[~shows]))
        assert (rows[~shows] == 0).all()


@pytest.mark.parametrize("name", ANYRES)
def test_scores_of_images_equal_scores_packed_by_the_model(name: str) -> None:
    model, adapted = make(name), adapter(name)
    layouts = adapted.layouts("image", images(model, SIZES))
    views = [1 + math.prod(crops_of(model, size)) for size in SIZES]
    patches = noise(sum(views), adapted.side**2)
    options: dict[str, Any] = {"image_newline": torch.zeros(1)}
    if "onevision" in name:
        options["vision_aspect_ratio"] = model.config.vision_aspect_ratio
    else:
        options["vision_feature_select_strategy"] = model.config.vision_feature_select_strategy
    packed, _ = model.model.pack_image_features(patches[..., None].split(views), list(SIZES), **options)
    rows = adapted.token_rows("image", with_class_token(adapted, patches), layouts)
    for row, expected in zip(rows, packed, strict=True):
        torch.testing.assert_close(row, expected[:, 0])


@pytest.mark.parametrize("name", ["next", "next-siglip", "next-wide", "next-video"])
def test_every_token_of_a_view_shows_the_patch_at_its_place(name: str) -> None:
    """Numbers of patches for scores: a token at its place in the box on the canvas is that patch of that crop."""
    model, adapted = make(name), adapter(name)
    side = adapted.side
    for size in SIZES:
        (layout,) = adapted.layouts("image", images(model, (size,)))
        down, across = crops_of(model, size)
        numbers = torch.arange((1 + down * across) * side**2).float().view(-1, side**2)
        (row,) = adapted.token_rows("image", with_class_token(adapted, numbers), [layout])
        thumbnail, *canvas = layout.views
        assert thumbnail == View(0, side, side)
        assert row[thumbnail.places()].tolist() == list(range(side**2))
        for view in canvas:
            assert view.crops == (down, across)
            top, left, bottom, right = (
                edge * side * count for edge, count in zip(view.box, (down, across) * 2, strict=True)
            )
            assert (bottom - top, right - left) == pytest.approx((view.rows, view.columns))
            expected = [
                (1 + y // side * across + x // side) * side**2 + y % side * side + x % side
                for y in range(round(top), round(bottom))
                for x in range(round(left), round(right))
            ]
            assert row[view.places()].tolist() == expected


@pytest.mark.parametrize("name", ["onevision", "onevision-odd"])
def test_a_canvas_that_is_scaled_down_keeps_its_box(name: str) -> None:
    """Places of patches for scores: tokens stand where an even grid over the box has the middles of its cells."""
    model, adapted = make(name), adapter(name)
    side, scaled = adapted.side, 0
    for size in SIZES:
        (layout,) = adapted.layouts("image", images(model, (size,)))
        down, across = crops_of(model, size)
        if len(layout.views) == 1:
            continue  # thinner than a patch
        view = layout.views[1]
        for axis, count, cells in ((0, view.rows, down * side), (1, view.columns, across * side)):
            place = torch.arange(side).float()
            place = place[:, None].expand(-1, side) if axis == 0 else place.expand(side, -1)
            numbers = torch.arange(down * across)
            crop = (numbers // across if axis == 0 else numbers % across) * side
            patches = torch.cat([torch.zeros(1, side**2), crop[:, None] + place.reshape(-1)])
            (row,) = adapted.token_rows("image", with_class_token(adapted, patches), [layout])
            first, last = view.box[axis] * cells, view.box[axis + 2] * cells
            middles = first + (torch.arange(count) + 0.5) * (last - first) / count - 0.5
            grid = row[view.places()].view(view.rows, view.columns)
            found = grid if axis == 1 else grid.T
            torch.testing.assert_close(found, middles.clamp(first, last - 1).expand_as(found), atol=1e-4, rtol=0)
            scaled += round(last - first) != count
    assert scaled > 0


def test_padding_is_cut_from_rows_or_from_columns() -> None:
    model = make("next")
    wide, tall = adapter("next").layouts("image", images(model, ((40, 90), (90, 40))))
    # 90 x 40 fits 112 x 56: of 8 x 4 patches the picture covers int(40 * 112 / 90 / 14) = 3, in the middle of 4; the
    # model cuts (4 - 3) // 2 = 0 from either side
    assert wide.views[1] == View(16, 4, 8, 1, (1, 2))
    assert tall.views[1] == View(16, 8, 4, 1, (2, 1))
    (strip,) = adapter("next").layouts("image", images(model, ((20, 112),)))
    assert strip.views[1] == View(16, 2, 8, 1, (1, 2), (0.25, 0.0, 0.75, 1.0))  # 20 / 14 = 1 row; 3 // 2 = 1 cut


def test_sizes_of_one_layout_are_grouped_and_others_are_not_confused() -> None:
    model, adapted = make("next-siglip"), adapter("next-siglip")
    same = adapted.layouts("image", images(model, ((50, 100), (51, 101), (50, 102))))
    assert len(set(same)) == 1

    found: dict[int, dict[Layout, tuple[int, int]]] = {}
    for height in range(20, 240, 14):
        for width in range(20, 240, 14):
            (layout,) = adapted.layouts("image", {"image_sizes": torch.tensor([[height, width]])})
            found.setdefault(layout.tokens, {}).setdefault(layout, (height, width))
    confusable = [tuple(group.values()) for group in found.values() if len(group) > 1]
    assert confusable
    for sizes in confusable:
        arguments = images(model, sizes)
        output, patches = encode(model, "image", arguments)
        layouts = adapted.layouts("image", arguments)
        rows = adapted.token_rows("image", patches[..., 0], layouts)
        for row, layout, feature in zip(rows, layouts, output.pooler_output, strict=True):
            torch.testing.assert_close(row[places(layout)], feature[places(layout), 0])


def test_images_thinner_than_a_patch_have_crops_without_tokens() -> None:
    model, adapted = make("next-wide"), adapter("next-wide")
    sizes = ((1, 100), (1, 220), (40, 90))
    arguments = images(model, sizes)
    output, patches = encode(model, "image", arguments)
    layouts = adapted.layouts("image", arguments)
    assert [len(layout.views) for layout in layouts] == [1, 1, 2]
    assert crops_of(model, sizes[0]) != crops_of(model, sizes[1])
    assert layouts[0] != layouts[1], "equal tokens, but of different numbers of crops"
    rows = adapted.token_rows("image", with_class_token(adapted, patches[..., 3]), layouts)
    for row, layout, feature in zip(rows, layouts, output.pooler_output, strict=True):
        assert len(row) == len(feature)
        assert torch.equal(row[places(layout)], feature[places(layout), 3])


def test_the_full_length_of_llava_next_is_not_five_times_576() -> None:
    """Newlines count and padding does not, so a square has more than 2880 tokens and most images have fewer."""
    tiny = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 1}
    config = transformers.LlavaNextConfig(
        vision_config=transformers.CLIPVisionConfig(**tiny, image_size=336, patch_size=14),
        text_config=transformers.LlamaConfig(**tiny, vocab_size=16),
        image_token_index=IMAGE,
    )
    adapted = adapters.find(transformers.LlavaNextModel(config))
    square, photo = adapted.layouts("image", {"image_sizes": torch.tensor([[672, 672], [480, 640]])})
    assert square.tokens == 576 + 48 * (48 + 1) > 2880
    assert photo.tokens == 576 + 36 * (48 + 1) < 2880


# ------------------------------------------------------------------------------- several images, and options


@pytest.mark.parametrize("name", ["onevision", "onevision-odd"])
def test_images_of_a_prompt_with_several_are_one_view_and_a_newline(name: str) -> None:
    model, adapted = make(name), adapter(name)
    sizes = SIZES[:3]
    arguments = images(model, sizes, alone=False)
    output, patches = encode(model, "image", arguments)
    layouts = adapted.layouts("image", arguments)
    assert len(set(layouts)) == 1
    assert layouts[0].views == (View(0, adapted.side, adapted.side),)
    assert [layout.tokens for layout in layouts] == [adapted.side**2 + 1] * 3
    assert [layout.tokens for layout in layouts] == [len(feature) for feature in output.pooler_output]
    rows = adapted.token_rows("image", with_class_token(adapted, patches[..., 5]), layouts)
    for row, feature in zip(rows, output.pooler_output, strict=True):
        assert torch.equal(row[:-1], feature[:-1, 5])
        assert row[-1] == 0


def test_a_batch_of_one_image_and_of_several() -> None:
    """Only the prompt with one image has crops: the views of each are counted by its prompt, none counts as none."""
    model, adapted = make("onevision"), adapter("onevision")
    sizes = ((90, 40), (40, 90), (100, 100))
    arguments = {**images(model, sizes), "batch_num_images": torch.tensor([1, 0, 2])}
    output, patches = encode(model, "image", arguments)
    layouts = adapted.layouts("image", arguments)
    assert [layout.tokens for layout in layouts] == [len(feature) for feature in output.pooler_output]
    assert [len(layout.views) for layout in layouts] == [2, 1, 1]
    rows = adapted.token_rows("image", patches[..., 0], layouts)
    for row, layout, feature in zip(rows, layouts, output.pooler_output, strict=True):
        torch.testing.assert_close(row[places(layout)], feature[places(layout), 0])


def test_the_aspect_that_was_asked_for_counts() -> None:
    model, adapted = make("onevision"), adapter("onevision")
    arguments = images(model, ((220, 223),))
    lengths = []
    for aspect in ("anyres_max_9", "anyres_max_4", None):
        options = {**arguments, "vision_aspect_ratio": aspect}
        output, patches = encode(model, "image", options)
        (layout,) = adapted.layouts("image", options)
        (row,) = adapted.token_rows("image", patches[..., 0], [layout])
        torch.testing.assert_close(row[places(layout)], output.pooler_output[0][places(layout), 0])
        lengths.append(layout.tokens)
    assert lengths[0] == lengths[2] > lengths[1]


@pytest.mark.parametrize("name", ["next", "onevision-odd"])
def test_arguments_stay_as_they_were(name: str) -> None:
    model, adapted = make(name), adapter(name)
    arguments = images(model, SIZES[:3])
    before = {key: value.clone() for key, value in arguments.items()}
    layouts = adapted.layouts("image", arguments)
    rows = noise(sum(1 + math.prod(crops_of(model, size)) for size in SIZES[:3]), adapted.side**2)
    rows = with_class_token(adapted, rows)
    kept = rows.clone()
    adapted.token_rows("image", rows, layouts)
    assert torch.equal(rows, kept)
    assert all(torch.equal(arguments[key], value) for key, value in before.items())


def test_more_sizes_than_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(anyres, "SIZES", 2)
    model, adapted = make("next"), adapter("next")
    arguments = images(model, SIZES)
    output, patches = encode(model, "image", arguments)
    layouts = adapted.layouts("image", arguments)
    assert len(set(layouts)) > 4
    for _ in range(2):
        rows = adapted.token_rows("image", with_class_token(adapted, patches[..., 2]), layouts)
        for row, layout, feature in zip(rows, layouts, output.pooler_output, strict=True):
            assert torch.equal(row[places(layout)], feature[places(layout), 2])


# ---------------------------------------------------------------------------------------------------- clips


@pytest.mark.parametrize("name", VIDEO)
def test_scores_of_clips_equal_scores_pooled_by_the_model(name: str) -> None:
    model, adapted = make(name), adapter(name)
    side = adapted.side
    (layout, again) = adapted.layouts("video", clips(model))
    assert layout == again
    patches = noise(2 * FRAMES, side**2)
    inner = model.model
    pooled = (inner.apply_pooling if "onevision" in name else inner.vision_resampler)(patches[..., None])[..., 0]
    separators = 1 if "onevision" in name else 0
    edge = (side + 1) // 2 if "onevision" in name else side // 2
    assert layout == Layout.frames(FRAMES, edge, edge, separators, clip=True)
    assert layout.clip
    rows = adapted.token_rows("video", with_class_token(adapted, patches), [layout, again])
    for row, expected in zip(rows, pooled.view(2, -1), strict=True):
        assert torch.equal(row[places(layout)], expected)
        assert len(row) == layout.tokens == len(expected) + separators
        assert (row[len(expected) :] == 0).all()


@pytest.mark.parametrize("name", ["next-video", "next-video-max", "onevision", "onevision-odd"])
def test_scores_of_clips_go_the_way_of_features(name: str) -> None:
    """Every column of what the model pools, taken for scores, gives that column of the outcome."""
    model, adapted = make(name), adapter(name)
    given = clips(model)
    layouts = adapted.layouts("video", given)
    seen: list[tuple[Tensor, Tensor]] = []
    if "onevision" in name:
        _, patches = encode(model, "video", given)
        pooled = torch.stack(received(model, CLIP, given, layouts))[:, :-1]
    else:
        with model.model.vision_resampler.register_forward_hook(lambda _, args, out: seen.append((args[0], out))):
            encode(model, "video", given)
        patches, pooled = seen[0]
        pooled = pooled.reshape(2, -1, WIDTH)
    for column in range(WIDTH):
        rows = adapted.token_rows("video", with_class_token(adapted, patches[..., column]), layouts)
        torch.testing.assert_close(torch.stack(rows)[:, : pooled.shape[1]], pooled[..., column])


def test_frames_pooled_to_another_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows and columns come out of the model's own pooling, whatever it is."""
    model, adapted = make("onevision"), adapter("onevision")
    monkeypatch.setattr(model.model, "apply_pooling", lambda x: x.unflatten(1, (4, 2, 2)).mean(3).flatten(1, 2))
    assert adapted.layouts("video", clips(model))[0] == Layout.frames(FRAMES, 4, 2, 1, clip=True)


def test_a_clip_of_one_frame_is_a_clip() -> None:
    (layout,) = adapter("onevision").layouts("video", {"pixel_values_videos": noise(1, 1, 3, 56, 56)})
    assert layout == Layout(5, (View(0, 2, 2),), clip=True)


# ------------------------------------------------------------------------------------ the whole model, and waiting


@pytest.mark.parametrize("name", ["next", "next-video", "onevision", "onevision-odd"])
def test_layouts_of_images_are_what_the_language_model_receives(name: str) -> None:
    model, adapted = make(name), adapter(name)
    given = images(model, SIZES[:2])
    layouts = adapted.layouts("image", given)
    features = adapted.features("image", encode(model, "image", given)[0])
    for feature, embeds in zip(features, received(model, IMAGE, given, layouts), strict=True):
        assert torch.equal(feature, embeds)


@pytest.mark.parametrize("name", VIDEO)
def test_layouts_of_clips_are_what_the_language_model_receives(name: str) -> None:
    """The separators stand where newlines do, which some releases append only after `get_video_features`."""
    model, adapted = make(name), adapter(name)
    given = clips(model)
    layouts = adapted.layouts("video", given)
    newline = model.model.image_newline
    features = adapted.features("video", encode(model, "video", given)[0])
    for layout, feature, embeds in zip(layouts, features, received(model, CLIP, given, layouts), strict=True):
        assert torch.equal(feature, embeds)
        shows = set(places(layout))
        found = {place for place in range(layout.tokens) if torch.equal(embeds[place], newline)}
        assert found == set(range(layout.tokens)) - shows


@pytest.mark.parametrize("name", ["next-video", "onevision"])
def test_features_of_a_release_that_returns_frames_apart(name: str) -> None:
    """As transformers 5.17 does: `(frames, n, D)` per clip in one family, clips without their newline in the other."""
    model, adapted = make(name), adapter(name)
    frames = noise(2, FRAMES, 4, WIDTH)
    ends = [] if name == "next-video" else [model.model.image_newline[None]]
    output = SimpleNamespace(pooler_output=tuple(frames) if name == "next-video" else frames.flatten(1, 2))
    for feature, clip in zip(adapted.features("video", output), frames, strict=True):
        assert torch.equal(feature, torch.cat([clip.flatten(0, 1), *ends]))


@torch.no_grad()
def attention(model: Any, pixels: Tensor) -> Tensor:
    """Attention to each patch in the layer that features come from, `(P, side * side)`, by the encoder's own maps."""
    tower = copy.deepcopy(model.model.vision_tower)
    tower.set_attn_implementation("eager")
    maps = tower(pixels, output_attentions=True).attentions
    layer = adapters.find(model).encoder_info.feature_layer
    mean = maps[layer].mean(1)  # (P, S, S)
    return mean[:, 0, 1:] if adapters.find(model).encoder_info.class_token else mean.mean(1)


@pytest.mark.parametrize("name", ["next", "next-siglip", "next-video", "onevision", "onevision-odd"])
def test_fastervlm_keeps_the_best_of_a_packed_image(name: str) -> None:
    model = make(name)
    sizes = SIZES[1:4]
    given = images(model, sizes)
    views = [1 + math.prod(crops_of(model, size)) for size in sizes]
    seen = torch.cat([pixels[:count] for pixels, count in zip(given["pixel_values"], views, strict=True)])
    scores = attention(model, seen)[..., None].split(views)
    options = [model.config.vision_aspect_ratio] if "onevision" in name else []
    select = [] if options else ["default"]
    packed, _ = model.model.pack_image_features(scores, list(sizes), *select, torch.zeros(1), *options)
    check_kept(model, name, IMAGE, given, [score[:, 0] for score in packed])


@pytest.mark.parametrize("name", VIDEO)
def test_fastervlm_keeps_the_best_of_a_pooled_clip(name: str) -> None:
    model = make(name)
    given = clips(model)
    scores = attention(model, given["pixel_values_videos"].flatten(0, 1))[..., None]
    inner = model.model
    pooled = (inner.apply_pooling if "onevision" in name else inner.vision_resampler)(scores).view(2, -1)
    check_kept(model, name, CLIP, given, list(pad(pooled, (0, 1 if "onevision" in name else 0))))


def check_kept(model: Any, name: str, token: int, given: dict[str, Tensor], scores: list[Tensor]) -> None:
    """The prompts, one visual input each, keep the best 30 % by `scores`, whatever they are padded with."""
    longest = max(map(len, scores)) + 2
    ids = torch.stack([pad(torch.full((len(score),), token), (longest - len(score), 2), value=9) for score in scores])
    mask = torch.stack([pad(torch.ones(len(score) + 2), (longest - len(score), 0)) for score in scores]).long()
    kind = "cls" if adapters.find(model).encoder_info.class_token else "received"
    with torch.no_grad(), vtc.compress(model, f"fastervlm:keep=0.3,saliency={kind}") as run:
        model(input_ids=ids, attention_mask=mask, **given)
    assert run.last is not None
    for kept, score in zip(run.last.kept, scores, strict=True):
        best = score.sort(descending=True, stable=True).indices[: int(len(score) * 0.3 + 0.5)]
        assert list(kept) == sorted(best.tolist())


@pytest.mark.parametrize("name", ANYRES)
def test_scores_of_images_are_mapped_without_waiting(name: str) -> None:
    model, adapted = make(name), adapter(name)
    sizes = SIZES[1:6]
    layouts = adapted.layouts("image", images(model, sizes))
    rows = noise(sum(1 + math.prod(crops_of(model, size)) for size in sizes), adapted.side**2)
    rows = with_class_token(adapted, rows)
    first = adapted.token_rows("image", rows, layouts)
    with Watch() as watch:
        second = adapted.token_rows("image", rows, layouts)
    assert watch.waits == []
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("name", ["next", "onevision"])
def test_the_way_of_patches_moves_to_the_device_once(name: str) -> None:
    """On the meta device, which takes copies like any other."""
    model, adapted = make(name), adapter(name)
    layouts = adapted.layouts("image", images(model, SIZES[3:5]))
    rows = noise(sum(1 + math.prod(crops_of(model, size)) for size in SIZES[3:5]), adapted.side**2)
    rows = with_class_token(adapted, rows).to("meta")
    copies = []
    for _ in range(2):
        with Copies() as watch:
            adapted.token_rows("image", rows, layouts)
        copies.append(watch.count)
    assert copies[0] > 0
    assert copies[1] == 0


@pytest.mark.parametrize("name", VIDEO)
def test_scores_of_clips_are_mapped_without_waiting(name: str) -> None:
    model, adapted = make(name), adapter(name)
    layouts = adapted.layouts("video", clips(model))
    rows = with_class_token(adapted, noise(2 * FRAMES, adapted.side**2))
    with Watch() as watch:
        adapted.token_rows("video", rows, layouts)
    assert watch.waits == []


# ------------------------------------------------------------------------------------------------- refusals


def test_a_convolution_over_frames_is_refused() -> None:
    tiny = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 1}
    config = transformers.LlavaNextVideoConfig(
        vision_config=transformers.CLIPVisionConfig(**tiny, image_size=56, patch_size=14),
        text_config=transformers.LlamaConfig(**tiny, vocab_size=16),
        image_token_index=IMAGE,
        video_token_index=CLIP,
        spatial_pool_mode="conv",
    )
    with pytest.raises(UnsupportedModelError, match="spatial_pool_mode"):
        adapters.find(transformers.LlavaNextVideoModel(config))


CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "no-newlines": lambda tokens: torch.cat([tokens[:16], tokens[16:].unflatten(0, (-1, 9))[:, :-1].flatten(0, 1)]),
    "newlines-first": lambda tokens: torch.cat([tokens[:16], tokens[16:].roll(1, 0)]),
    "thumbnail-last": lambda tokens: tokens.roll(-16, 0),
    "thumbnail-flipped": lambda tokens: torch.cat([tokens[:16].flip(0), tokens[16:]]),
    "thumbnail-twice": lambda tokens: torch.cat([tokens[:17], tokens[:1], tokens[18:]]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_packing_is_refused(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, adapted = make("next"), adapter("next")
    real = model.model.pack_image_features

    def pack(*args: Any, **kwargs: Any) -> Any:
        packed, lengths = real(*args, **kwargs)
        return [CHANGES[change](tokens) for tokens in packed], lengths

    monkeypatch.setattr(model.model, "pack_image_features", pack)
    with pytest.raises(UnsupportedModelError, match="does not pack an image"):
        adapted.layouts("image", images(model, ((40, 90),)))
