"""Closed-form FLOPs against torch's own counter, and against sums done by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    OPTConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    SiglipVisionConfig,
)

from vtc.errors import UnsupportedModelError
from vtc.eval import flops

SIZES = dict(vocab_size=320, hidden_size=96, intermediate_size=256, num_hidden_layers=3, num_attention_heads=6)
DECODERS = {
    "llama": LlamaConfig(**SIZES),
    "llama-gqa": LlamaConfig(**SIZES, num_key_value_heads=2),
    "llama-wide-heads": LlamaConfig(**SIZES, num_key_value_heads=3, head_dim=32),
    "llama-mqa": LlamaConfig(**SIZES, num_key_value_heads=1, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**SIZES, num_key_value_heads=2),
    "mistral": MistralConfig(**SIZES, num_key_value_heads=3, sliding_window=None),
    "opt": OPTConfig(
        vocab_size=320, hidden_size=96, ffn_dim=256, num_hidden_layers=3, num_attention_heads=6, word_embed_proj_dim=96
    ),
}
TOWERS = {
    "clip": CLIPVisionConfig(
        hidden_size=64, intermediate_size=160, num_hidden_layers=3, num_attention_heads=4, image_size=64, patch_size=8
    ),
    "siglip": SiglipVisionConfig(
        hidden_size=64, intermediate_size=160, num_hidden_layers=3, num_attention_heads=4, image_size=64, patch_size=8
    ),
    "siglip-no-head": SiglipVisionConfig(
        hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=2, image_size=48, patch_size=16,
        vision_use_head=False,
    ),
}  # fmt: skip


def counted(module: torch.nn.Module, **inputs: Any) -> int:
    """What torch counts in one forward pass. Attention must be eager: the counter does not see CPU sdpa."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(**inputs)
    return counter.get_total_flops()


def decoder(config: Any) -> torch.nn.Module:
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


@pytest.mark.parametrize("name", DECODERS)
def test_prefill_agrees_with_torch(name: str) -> None:
    config = DECODERS[name]
    ids = torch.arange(90)[None]
    measured = counted(decoder(config), input_ids=ids, use_cache=False, logits_to_keep=1)
    assert flops.prefill_flops(config, 90) == pytest.approx(measured, rel=0.01)


@pytest.mark.parametrize("name", ["llama-gqa", "qwen2"])
def test_all_logits_agree_with_torch(name: str) -> None:
    config = DECODERS[name]
    measured = counted(decoder(config), input_ids=torch.arange(40)[None], use_cache=False)
    assert flops.prefill_flops(config, 40, lm_head_tokens=40) == pytest.approx(measured, rel=0.01)


@pytest.mark.parametrize("name", ["llama", "llama-gqa", "mistral"])
def test_decode_step_agrees_with_torch(name: str) -> None:
    config = DECODERS[name]
    model = decoder(config)
    with torch.no_grad():
        cache = model(input_ids=torch.arange(60)[None], use_cache=True).past_key_values
    measured = counted(model, input_ids=torch.tensor([[7]]), past_key_values=cache, use_cache=True)
    assert flops.decode_flops(config, 61) == pytest.approx(measured, rel=0.01)


@pytest.mark.parametrize("name", TOWERS)
def test_encoder_agrees_with_torch(name: str) -> None:
    config = TOWERS[name]
    tower = AutoModel.from_config(config, attn_implementation="eager").eval()
    pixels = torch.randn(2, 3, config.image_size, config.image_size)
    assert flops.encoder_flops(config, images=2) == pytest.approx(counted(tower, pixel_values=pixels), rel=0.01)


def test_fewer_encoder_layers_cost_less() -> None:
    config = TOWERS["clip"]
    whole, one, none = (flops.encoder_flops(config, layers=n) for n in (3, 1, 0))
    assert whole - one == 2 * (one - none) > 0
    assert whole == flops.encoder_flops(config)


def test_whole_llava_agrees_with_torch() -> None:
    text = LlamaConfig(**SIZES, num_key_value_heads=2)
    config = LlavaConfig(vision_config=TOWERS["clip"], text_config=text, image_token_id=319)
    model = LlavaForConditionalGeneration._from_config(config, attn_implementation="eager").eval()
    ids = torch.cat([torch.arange(5), torch.full((64,), 319), torch.arange(9)])[None]
    measured = counted(model, input_ids=ids, pixel_values=torch.randn(1, 3, 64, 64), logits_to_keep=1, use_cache=False)
    parts = flops.encoder_flops(config.vision_config) + flops.projector_flops(config, 64)
    assert parts + flops.prefill_flops(text, 78) == pytest.approx(measured, rel=0.01)


def test_projector_reads_several_levels() -> None:
    one = LlavaConfig(vision_config=TOWERS["clip"], text_config=DECODERS["llama"], vision_feature_layer=-2)
    two = LlavaConfig(vision_config=TOWERS["clip"], text_config=DECODERS["llama"], vision_feature_layer=[-2, -1])
    assert flops.projector_flops(one, 10) == 2 * 10 * (64 * 96 + 96 * 96)
    assert flops.projector_flops(two, 10) == 2 * 10 * (128 * 96 + 96 * 96)


def test_lengths_per_layer_are_summed() -> None:
    config = DECODERS["llama-gqa"]
    head = flops.prefill_flops(config, 0)
    layer = [(flops.prefill_flops(config, n) - head) // 3 for n in (50, 20, 7)]
    assert flops.prefill_flops(config, [50, 20, 7]) == sum(layer) + head
    assert flops.prefill_flops(config, [50, 50, 50]) == flops.prefill_flops(config, 50)
    with pytest.raises(ValueError, match="2 lengths for 3 layers"):
        flops.prefill_flops(config, [50, 20])


def test_causal_counts_the_lower_triangle() -> None:
    config = DECODERS["llama"]
    saved = flops.prefill_flops(config, 40) - flops.prefill_flops(config, 40, causal=True)
    assert saved == 3 * 4 * 96 * (40 * 40 - 40 * 41 // 2)


def test_llama_7b_by_hand() -> None:
    """The number behind 'LLaVA-1.5-7B, 576 tokens': 3.82 T multiply-adds, without the logits."""
    config = LlamaConfig(intermediate_size=11008)
    assert flops.prefill_flops(config, 576, lm_head_tokens=0) / 2 == pytest.approx(3.817e12, rel=1e-3)


def test_cache_bytes_by_hand() -> None:
    config = DECODERS["llama-gqa"]
    assert flops.kv_cache_bytes(config, 10, torch.float16) == 10 * 3 * 2 * 2 * 16 * 2
    assert flops.kv_cache_bytes(config, [10, 5, 0], torch.float32) == 15 * 2 * 2 * 16 * 4


def test_cache_bytes_agree_with_a_cache() -> None:
    config = DECODERS["llama-wide-heads"]
    with torch.no_grad():
        cache = decoder(config)(input_ids=torch.arange(11)[None], use_cache=True).past_key_values
    measured = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert flops.kv_cache_bytes(config, 11, torch.float32) == measured


def test_mixture_of_experts_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="mixture of experts"):
        flops.prefill_flops(Qwen2MoeConfig(num_hidden_layers=2), 10)


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0"), (950, "950"), (1234, "1.23 k"), (8.18e12, "8.18 T"), (2e16, "20 P")]
)
def test_human(count: float, text: str) -> None:
    assert flops.human(count) == text
