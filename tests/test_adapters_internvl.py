"""The InternVL adapter: tiles, and scores of patches as scores of tokens, against plain references."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import InternVLConfig, InternVLForConditionalGeneration, Qwen2Config

import vtc
from vtc import adapters
from vtc.adapters.base import Adapter
from vtc.errors import UnsupportedModelError
from vtc.saliency import Tap
from vtc.visual import Layout, View
from watch import Watch

PATCH, SIDE, HEADS, DEPTH = 7, 6, 4, 3  # a tile has 6 x 6 patches and 3 x 3 tokens
KINDS = ["cls", "received", "logits"]


@cache
def shared(attention: str = "sdpa", norm: bool = False) -> Any:
    """A random model. Shared between tests, which must leave it as they found it."""
    model = make(use_qk_norm=norm)
    model.set_attn_implementation(attention)
    return model


def make(feature_layer: int | list[int] = -1, strategy: str = "default", **vision: Any) -> Any:
    text: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 64}
    size: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": DEPTH,
        "num_attention_heads": HEADS,
    }
    config = InternVLConfig(
        vision_config={**size, "image_size": [PATCH * SIDE] * 2, "patch_size": [PATCH] * 2, **vision},
        text_config=Qwen2Config(**text, num_attention_heads=2, num_key_value_heads=1).to_dict(),
        image_token_id=5,
        vision_feature_layer=feature_layer,
        vision_feature_select_strategy=strategy,
    )
    model = InternVLForConditionalGeneration(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # the default initialisation is so small that all attention is uniform
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 1.5 / weight[0].numel() ** 0.5)
    return model


def tiles(count: int, side: int = SIDE) -> dict[str, Tensor]:
    """Arguments of `get_image_features`."""
    size = (count, 3, PATCH * side, PATCH * side)
    return {"pixel_values": torch.randn(size, generator=torch.Generator().manual_seed(count))}


@torch.no_grad()
def encode(adapter: Adapter, arguments: dict[str, Tensor]) -> Tensor:
    """`(P, N, D)`."""
    return adapter.multimodal.get_image_features(**arguments, return_dict=True).pooler_output


def row(adapter: Adapter, layer: int, kind: Any, arguments: dict[str, Tensor]) -> Tensor:
    tap = Tap(adapter.attention(layer), kind)
    handles = tap.install()
    tap.expect(adapter.longest(adapter.layouts("image", arguments)))
    encode(adapter, arguments)
    for handle in handles:
        handle.remove()
    return tap.pop()


def test_the_parts() -> None:
    model = shared()
    adapter = adapters.find(model)
    assert adapter.family == "internvl"
    assert adapter.multimodal is model.model and adapter.language_model is model.model.language_model
    assert adapter.encoder is model.model.vision_tower and adapter.projector is model.model.multi_modal_projector
    assert adapter.text_config is model.config.text_config
    assert adapter.joined and not adapter.coordinates and adapter.tokens_per_image is None


@pytest.mark.parametrize("side", [SIDE, SIDE + 2])
def test_layouts_are_those_of_the_features(side: int) -> None:
    """Also of tiles in another resolution, for which the encoder interpolates its positions."""
    adapter = adapters.find(shared())
    for count in (1, 3):
        layouts = adapter.layouts("image", tiles(count, side))
        assert layouts == [Layout((side // 2) ** 2, (View(0, side // 2, side // 2),))] * count
        assert encode(adapter, tiles(count, side)).shape[:2] == (count, layouts[0].tokens)
        assert adapter.longest(layouts) is None


def test_tokens_stand_where_their_patches_stand() -> None:
    """Without attention a token is its own four patches: the feature that a patch changes is that of its score."""
    model = make()
    adapter = adapters.find(model)
    with torch.no_grad():
        for layer in model.model.vision_tower.encoder.layer:
            layer.attention.projection_layer.weight.zero_()
            layer.attention.projection_layer.bias.zero_()
    arguments = tiles(2)
    layouts = adapter.layouts("image", arguments)
    features = encode(adapter, arguments)
    for top, left in ((0, 0), (1, 4), (5, 2), (3, 3)):
        changed = arguments["pixel_values"].clone()
        changed[1, :, top * PATCH : (top + 1) * PATCH, left * PATCH : (left + 1) * PATCH] += 1.0
        differs = (encode(adapter, {"pixel_values": changed}) != features).any(-1)  # (P, N)
        scores = torch.zeros(2, 1 + SIDE**2)
        scores[1, 1 + top * SIDE + left] = 1.0
        rows = torch.stack(adapter.token_rows("image", scores, layouts))
        assert torch.equal(rows, differs * 0.25)
        assert differs.sum() == 1 and differs[1, top // 2 * SIDE // 2 + left // 2]


def test_the_class_token_scores_nowhere() -> None:
    scores = torch.zeros(2, 1 + SIDE**2)
    scores[:, 0] = 1.0
    adapter = adapters.find(shared())
    assert not torch.stack(adapter.token_rows("image", scores, adapter.layouts("image", tiles(2)))).any()


def reference(layer: int, kind: str, norm: bool, arguments: dict[str, Tensor]) -> Tensor:
    """`(P, S)` in float64, from the hidden states that enter a layer; attention maps are made as a whole."""
    adapter = adapters.find(shared("eager", norm))
    attention = adapter.multimodal.vision_tower.encoder.layer[layer].attention
    taken: list[Tensor] = []
    handle = attention.register_forward_pre_hook(lambda module, args: taken.append(args[0]))
    encode(adapter, arguments)
    handle.remove()

    def heads(projection: Any, scale: Any) -> Tensor:
        x = taken[0].double() @ projection.weight.double().T
        x = x if projection.bias is None else x + projection.bias.double()
        if norm:
            x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * scale.weight.double()
        return x.view(*x.shape[:2], HEADS, -1).transpose(1, 2)  # (P, heads, S, head_dim)

    query, key = heads(attention.q_proj, attention.q_norm), heads(attention.k_proj, attention.k_norm)
    logits = query @ key.mT * query.shape[-1] ** -0.5
    maps = logits.softmax(-1).mean(1)  # (P, S, S)
    return {"cls": maps[:, 0], "received": maps.mean(1), "logits": logits.mean(1)[:, 0]}[kind]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_the_encoders_own_attention(kind: str, norm: bool, attention: str) -> None:
    adapter = adapters.find(shared(attention, norm))
    arguments = tiles(3)
    for layer in range(DEPTH):
        scores = row(adapter, layer, kind, arguments)
        expected = reference(layer, kind, norm, arguments)
        assert (scores - expected).abs().max() < 1e-5 * expected.abs().max()
        squares = expected[:, 1:].view(3, SIDE // 2, 2, SIDE // 2, 2).mean((2, 4)).flatten(1)
        rows = torch.stack(adapter.token_rows("image", scores, adapter.layouts("image", arguments)))
        assert (rows - squares).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize(("number", "layer"), [(-1, 2), (-2, 1), (2, 1), (3, 2), (1, 0)])
def test_the_feature_layer_is_the_one_that_features_come_from(number: int, layer: int) -> None:
    model = make(number)
    adapter = adapters.find(model)
    assert adapter.encoder_info == vtc.Encoder(depth=DEPTH, feature_layer=layer, class_token=True)
    expected = encode(adapter, tiles(1))
    with torch.no_grad():
        for later in model.model.vision_tower.encoder.layer[layer + 1 :]:
            later.lambda_1.zero_()
    assert torch.equal(encode(adapter, tiles(1)), expected)
    with torch.no_grad():
        model.model.vision_tower.encoder.layer[layer].lambda_1.zero_()
    assert not torch.equal(encode(adapter, tiles(1)), expected)


def test_what_does_not_fit_is_refused() -> None:
    for number in (0, -4, 4, [-1]):
        with pytest.raises(UnsupportedModelError, match="vision_feature_layer"):
            adapters.find(make(number))
    with pytest.raises(UnsupportedModelError, match="'full' .* 'default' does"):
        adapters.find(make(strategy="full"))
    model = make()
    model.model.vision_tower = nn.Identity()
    with pytest.raises(UnsupportedModelError, match="Identity tower"):
        adapters.find(model)


def test_nothing_waits_for_the_device() -> None:
    adapter = adapters.find(shared())
    arguments = tiles(2)
    with Watch() as watch:
        layouts = adapter.layouts("image", arguments)
        for kind in KINDS:
            adapter.token_rows("image", row(adapter, 2, kind, arguments), layouts)
    assert watch.waits == []
