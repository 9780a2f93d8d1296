"""The Qwen adapters: layouts, and scores of patches as scores of tokens, against plain references."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

import vtc
from vtc import adapters
from vtc.adapters.base import Adapter
from vtc.errors import UnsupportedModelError
from vtc.saliency import Tap
from vtc.visual import Layout, View
from watch import Watch

PATCH, HEADS = 4, 2
FAMILIES = ["qwen2vl", "qwen2_5vl", "qwen3vl"]
WINDOW = 2 * 2 * PATCH  # pixels: windows of 2 x 2 tokens
IMAGES = [[1, 4, 4], [1, 6, 10], [1, 2, 8]]  # frames, rows and columns, in patches; windows fit into the first alone
CLIPS = [[3, 4, 6], [1, 6, 6], [2, 10, 2]]
GRIDS = {"image": IMAGES, "video": CLIPS}

every_family = pytest.mark.parametrize("family", FAMILIES)
every_modality = pytest.mark.parametrize("modality", list(GRIDS))


@cache
def shared(family: str, attention: str = "sdpa") -> Any:
    """A random model. Shared between tests, which must leave it as they found it."""
    return make(family, attention)


def make(family: str, attention: str = "sdpa", whole: tuple[int, ...] = (1, 3)) -> Any:
    size: dict[str, Any] = {"depth": 4, "num_heads": HEADS, "patch_size": PATCH}
    text: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": 64,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0},
    }
    ids: dict[str, Any] = {
        "image_token_id": 5,
        "video_token_id": 6,
        "vision_start_token_id": 7,
        "vision_end_token_id": 8,
    }
    if family == "qwen2vl":
        vision = {**size, "embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2}
        model: Any = Qwen2VLForConditionalGeneration(Qwen2VLConfig(vision_config=vision, text_config=text, **ids))
    elif family == "qwen2_5vl":
        vision = {**size, "hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 64}
        vision |= {"window_size": WINDOW, "fullatt_block_indexes": list(whole)}
        model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(vision_config=vision, text_config=text, **ids))
    else:
        vision = {**size, "hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 64}
        vision |= {"deepstack_visual_indexes": [1], "num_position_embeddings": 64}
        text["head_dim"] = 16
        model = Qwen3VLForConditionalGeneration(Qwen3VLConfig(vision_config=vision, text_config=text, **ids))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # the default initialisation is so small that all attention is uniform
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 1.5 / weight[0].numel() ** 0.5)
    model.set_attn_implementation(attention)
    return model.eval()


def inputs(modality: str, grids: list[list[int]] | None = None, seed: int = 0) -> dict[str, Tensor]:
    """Arguments of `get_image_features` or `get_video_features`."""
    grid = torch.tensor(grids or GRIDS[modality])
    pixels = torch.randn(int(grid.prod(1).sum()), 3 * 2 * PATCH**2, generator=torch.Generator().manual_seed(seed))
    names = ("pixel_values", "image_grid_thw") if modality == "image" else ("pixel_values_videos", "video_grid_thw")
    return dict(zip(names, (pixels, grid), strict=True))


def encode(adapter: Adapter, modality: str, arguments: dict[str, Tensor]) -> Any:
    model = adapter.multimodal
    features = model.get_image_features if modality == "image" else model.get_video_features
    with torch.no_grad():
        return features(**arguments, return_dict=True)


@contextmanager
def tapped(adapter: Adapter, layer: int) -> Iterator[Tap]:
    tap = Tap(adapter.attention(layer), "received")
    handles = tap.install()
    yield tap
    for handle in handles:
        handle.remove()


def whole_layers(family: str) -> tuple[int, ...]:
    return (1, 3) if family == "qwen2_5vl" else (0, 1, 2, 3)


@every_family
def test_the_parts(family: str) -> None:
    model = shared(family)
    adapter = adapters.find(model)
    assert adapter.family == family
    assert adapter.multimodal is model.model and adapter.language_model is model.model.language_model
    assert adapter.encoder is model.model.visual and adapter.projector is model.model.visual.merger
    assert adapter.text_config is model.config.text_config
    assert adapter.encoder_info == vtc.Encoder(depth=4, feature_layer=3, class_token=False)
    assert adapter.coordinates and not adapter.joined and adapter.tokens_per_image is None


@every_modality
@every_family
def test_layouts_are_those_of_the_features(family: str, modality: str) -> None:
    adapter = adapters.find(shared(family))
    arguments = inputs(modality)
    layouts = adapter.layouts(modality, arguments)
    features = encode(adapter, modality, arguments).pooler_output
    assert [layout.tokens for layout in layouts] == [len(feature) for feature in features]
    assert [layout.grid for layout in layouts] == [(t, h // 2, w // 2) for t, h, w in GRIDS[modality]]
    assert all(layout.clip == (modality == "video") for layout in layouts)
    assert adapter.longest(layouts) == max(h * w for _, h, w in GRIDS[modality])


def test_a_layout_has_one_view_per_frame() -> None:
    layout = adapters.find(shared("qwen2vl")).layouts("video", {"video_grid_thw": torch.tensor([[2, 4, 6]])})[0]
    assert layout == Layout(12, (View(0, 2, 3), View(6, 2, 3)), clip=True)


@every_modality
@every_family
def test_scores_go_the_way_of_features(family: str, modality: str) -> None:
    """What the projector makes of a token inside the encoder, given as that token's score, comes out at its feature."""
    adapter = adapters.find(shared(family))
    arguments = inputs(modality)
    merged: list[Tensor] = []
    handle = adapter.projector.register_forward_hook(lambda module, args, output: merged.append(output))
    features = encode(adapter, modality, arguments).pooler_output
    handle.remove()
    scores = merged[0][:, 0].repeat_interleave(4)  # (S,)
    rows = adapter.token_rows(modality, scores, adapter.layouts(modality, arguments))
    for row, feature in zip(rows, features, strict=True):
        assert torch.equal(row, feature[:, 0])


@pytest.mark.parametrize("family", ["qwen2vl", "qwen2_5vl"])
def test_tokens_stand_where_their_patches_stand(family: str) -> None:
    """Without attention a token is its own four patches: another patch changes that token's row and no other."""
    model = make(family)
    adapter = adapters.find(model)
    with torch.no_grad():
        for block in model.model.visual.blocks:
            block.attn.proj.weight.zero_()
    arguments = inputs("image")
    layouts = adapter.layouts("image", arguments)
    seen: list[Tensor] = []
    last = model.model.visual.blocks[-1]
    handle = last.register_forward_hook(lambda module, args, output: seen.append(output[:, 0]))
    sizes = [layout.tokens for layout in layouts]
    number, token = 1, 9  # of the second image
    patch = 4 * (sizes[0] + token) + 2
    encode(adapter, "image", arguments)
    changed = arguments["pixel_values"].clone()
    changed[patch] += 1.0
    encode(adapter, "image", {**arguments, "pixel_values": changed})
    handle.remove()
    rows = adapter.token_rows("image", (seen[0] != seen[1]).float(), layouts)
    hit = [(image, int(place)) for image, row in enumerate(rows) for place in row.nonzero()]
    assert hit == [(number, token)]


def test_views_are_grids_of_the_picture() -> None:
    """One bright square in a picture, cut into patches by the processor, is the token at its row and column."""
    image = pytest.importorskip("PIL.Image")
    processor = Qwen2VLImageProcessorPil(patch_size=PATCH)
    adapter = adapters.find(shared("qwen2vl"))
    rows, columns, edge = 4, 6, 2 * PATCH
    for row, column in ((2, 5), (0, 3), (3, 0)):
        picture = torch.zeros(rows * edge, columns * edge, 3, dtype=torch.uint8)
        picture[row * edge : (row + 1) * edge, column * edge : (column + 1) * edge] = 255
        made = processor(image.fromarray(picture.numpy()), return_tensors="pt", do_resize=False)
        layouts = adapter.layouts("image", made)
        scores = adapter.token_rows("image", made["pixel_values"].mean(1), layouts)[0]
        assert layouts[0].views[0].places()[row * columns + column] == int(scores.argmax())
        assert layouts[0].grid == (1, rows, columns)


def reference(family: str, modality: str, layer: int, arguments: dict[str, Tensor]) -> list[Tensor]:
    """Scores of tokens in float64, from the hidden states that enter a layer; attention maps are made as a whole."""
    visual = shared(family, "eager").model.visual
    attention = visual.blocks[layer].attn
    taken: dict[str, Any] = {}
    handles = [
        attention.register_forward_pre_hook(
            lambda module, args, kwargs: taken.update(kwargs, hidden=args[0]), with_kwargs=True
        ),
        visual.patch_embed.register_forward_hook(lambda module, args, output: taken.update(embedded=output)),
        visual.blocks[0].register_forward_pre_hook(
            lambda module, args, kwargs: taken.update(first=args[0]), with_kwargs=True
        ),
    ]
    encode(adapters.find(shared(family, "eager")), modality, arguments)
    for handle in handles:
        handle.remove()

    hidden = taken["hidden"].double()
    projected = hidden @ attention.qkv.weight.double().T + attention.qkv.bias.double()
    query, key, _ = projected.view(len(hidden), 3, HEADS, -1).permute(1, 2, 0, 3)  # (heads, S, head_dim)
    cos, sin = (angle.double() for angle in taken["position_embeddings"])
    half = query.shape[-1] // 2
    query, key = (x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin for x in (query, key))
    scores = hidden.new_empty(len(hidden))
    start = 0
    for frames, height, width in GRIDS[modality]:
        for _ in range(frames):
            part = slice(start, start + height * width)
            maps = (query[:, part] @ key[:, part].mT * query.shape[-1] ** -0.5).softmax(-1)  # (heads, P, P)
            scores[part] = maps.mean((0, 1))
            start += height * width
    if family == "qwen2_5vl":  # patches are told by their embeddings, which differ
        place = torch.cdist(taken["embedded"].double(), taken["first"].double()).argmin(1)
        assert torch.equal(taken["first"][place], taken["embedded"])
        scores = scores[place]
    return list(scores.view(-1, 4).mean(1).split([t * h * w // 4 for t, h, w in GRIDS[modality]]))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@every_modality
@every_family
def test_rows_are_the_encoders_own_attention(family: str, modality: str, attention: str) -> None:
    adapter = adapters.find(shared(family, attention))
    arguments = inputs(modality)
    layouts = adapter.layouts(modality, arguments)
    for layer in whole_layers(family):
        with tapped(adapter, layer) as tap:
            tap.expect(adapter.longest(layouts))
            encode(adapter, modality, arguments)
            rows = adapter.token_rows(modality, tap.pop(), layouts)
        for row, expected in zip(rows, reference(family, modality, layer, arguments), strict=True):
            assert (row - expected).abs().max() < 1e-5 * expected.max()
            assert row.std() > 0.05 * row.mean()  # not the same for all


def test_windows_really_sort_the_tokens() -> None:
    """The grids of these tests are such that forgetting the order, or sorting the wrong way, would be seen."""
    adapter: Any = adapters.find(shared("qwen2_5vl"))
    for modality in GRIDS:
        layouts = adapter.layouts(modality, inputs(modality))
        places = torch.arange(float(sum(layout.tokens for layout in layouts)))
        order = adapter.in_order(places, layouts).long()
        assert not torch.equal(order, places.long()) and not torch.equal(order, order.argsort())
        assert torch.equal(order.sort().values, places.long())


def test_layers_with_windows_are_refused() -> None:
    adapter = adapters.find(shared("qwen2_5vl"))
    with pytest.raises(UnsupportedModelError, match="layer 2 .* whole frame: 1, 3"):
        adapter.attention(2)
    early: Any = adapters.find(make("qwen2_5vl", whole=(0, 2)))
    assert early.encoder_info == vtc.Encoder(depth=4, feature_layer=2, class_token=False)
    assert early.attention(2).module is early.encoder.blocks[2].attn


@every_family
def test_there_is_no_class_token_to_read(family: str) -> None:
    attention = adapters.find(shared(family)).attention(3)
    for kind in ("cls", "logits"):
        with pytest.raises(vtc.VtcError, match="no class token"):
            Tap(attention, kind)


@every_family
def test_threads_do_not_meet(family: str) -> None:
    adapter = adapters.find(shared(family))
    batches = [inputs("image", [[1, 4 + 2 * number, 6]], seed=number) for number in range(3)]
    rows: dict[int, list[Tensor]] = {}
    together = threading.Barrier(len(batches))

    def run(number: int) -> None:
        layouts = adapter.layouts("image", batches[number])
        for _ in range(5):
            together.wait(timeout=60)
            tap.expect(adapter.longest(layouts))
            encode(adapter, "image", batches[number])
            rows.setdefault(number, []).append(tap.pop())

    with tapped(adapter, 3) as tap:
        threads = [threading.Thread(target=run, args=(number,)) for number in range(len(batches))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for number, batch in enumerate(batches):
            tap.expect(adapter.longest(adapter.layouts("image", batch)))
            encode(adapter, "image", batch)
            alone = tap.pop()
            assert len(rows[number]) == 5 and all(torch.equal(row, alone) for row in rows[number])


def test_runs_that_were_not_announced_leave_no_row() -> None:
    adapter = adapters.find(shared("qwen2vl"))
    with tapped(adapter, 3) as tap:
        encode(adapter, "image", inputs("image"))
        with pytest.raises(vtc.VtcError, match="without the hooks"):
            tap.pop()
        tap.expect(60)
        encode(adapter, "image", inputs("image"))
        tap.pop()
        with pytest.raises(vtc.VtcError, match="without the hooks"):
            tap.pop()


@every_modality
@every_family
def test_nothing_waits_for_the_device(family: str, modality: str) -> None:
    """The encoder itself reads its grids; reading saliency adds nothing to that, nor does bringing it to tokens."""
    adapter = adapters.find(shared(family))
    arguments = inputs(modality)
    layouts = adapter.layouts(modality, arguments)
    with Watch() as plain:
        encode(adapter, modality, arguments)
    with tapped(adapter, 3) as tap, Watch() as watch:
        tap.expect(adapter.longest(layouts))
        encode(adapter, modality, arguments)
        row = tap.pop()
    assert watch.waits == plain.waits
    with Watch() as watch:
        adapter.token_rows(modality, row, layouts)
    assert watch.waits == []
