"""Checkpoint folders of tiny random models that take images and clips. Their processors need torchvision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVisionConfig,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionProcessor,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2Config,
    SiglipVisionConfig,
)

from checkpoints import tokenizer

SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
TEXT: dict[str, Any] = {**SIZES, "num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 4096}


def template(image: str, video: str) -> str:
    return (
        "{% for message in messages %}{% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}" + image + " {% elif part['type'] == 'video' %}" + video + " "
        "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %} :"
    )


def save_onevision(folder: Path) -> Path:
    """A LLaVA-OneVision: 3 x 3 tokens per view, 2 x 2 per frame after pooling, and newlines."""
    from transformers import LlavaOnevisionImageProcessor, LlavaOnevisionVideoProcessor

    text = tokenizer()
    text.add_special_tokens({"additional_special_tokens": ["<video>"]})
    side, patch = 42, 14
    pinpoints = [[side, side], [side, 2 * side], [2 * side, side], [2 * side, 2 * side]]
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(
            **SIZES, intermediate_size=48, image_size=side, patch_size=patch, vision_use_head=False
        ),
        text_config=Qwen2Config(**TEXT, vocab_size=len(text)),
        image_token_id=text.convert_tokens_to_ids("<image>"),
        video_token_id=text.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=pinpoints,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
    )
    size = {"height": side, "width": side}
    processor = LlavaOnevisionProcessor(
        image_processor=LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=pinpoints),
        video_processor=LlavaOnevisionVideoProcessor(size=size),
        tokenizer=text,
        num_image_tokens=(side // patch) ** 2,
        vision_feature_select_strategy="full",
        chat_template=template("<image>", "<video>"),
    )
    return _save(folder, LlavaOnevisionForConditionalGeneration(config), processor)


def save_qwen(folder: Path) -> Path:
    """A Qwen2.5-VL."""
    from transformers import Qwen2VLImageProcessor, Qwen2VLVideoProcessor

    text = tokenizer()
    names = ["<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
    text.add_special_tokens({"additional_special_tokens": names})
    image, video, start, end = (int(text.convert_tokens_to_ids(name)) for name in ("<image>", *names))
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    config = Qwen2_5_VLConfig(
        vision_config={
            **{"depth": 3, "hidden_size": 32, "num_heads": 4, "intermediate_size": 48, "out_hidden_size": 32},
            **{"patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2},
            **{"window_size": 56, "fullatt_block_indexes": [1]},
        },
        text_config={
            **{**TEXT, "vocab_size": len(text), "rope_parameters": rope},
            **{"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
        },
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
    )
    pixels = {"shortest_edge": 28 * 28, "longest_edge": 84 * 84}
    processor = Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=pixels),
        video_processor=Qwen2VLVideoProcessor(size=pixels),
        tokenizer=text,
        chat_template=template("<|vision_start|><image><|vision_end|>", "<|vision_start|><|video_pad|><|vision_end|>"),
    )
    return _save(folder, Qwen2_5_VLForConditionalGeneration(config), processor)


def save_internvl(folder: Path) -> Path:
    """An InternVL: 2 x 2 tokens per tile; frames of a clip are images to it."""
    from transformers import GotOcr2ImageProcessor, InternVLVideoProcessor

    text = tokenizer()
    names = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<patch>"}
    names["video_token"] = "<video>"
    text = type(text)(
        tokenizer_object=text.backend_tokenizer, **SPECIAL, padding_side="left", extra_special_tokens=names
    )
    side, patch = 28, 7
    config = InternVLConfig(
        vision_config=InternVLVisionConfig(
            **SIZES, intermediate_size=48, image_size=(side, side), patch_size=(patch, patch), norm_type="layer_norm"
        ),
        text_config=Qwen2Config(**TEXT, vocab_size=len(text)),
        image_token_id=text.convert_tokens_to_ids("<patch>"),
        downsample_ratio=0.5,
    )
    size = {"height": side, "width": side}
    tiles = {"crop_to_patches": True, "min_patches": 1, "max_patches": 4}
    processor = InternVLProcessor(
        image_processor=GotOcr2ImageProcessor(size=size, **tiles),
        video_processor=InternVLVideoProcessor(size=size),
        tokenizer=text,
        image_seq_length=4,
        chat_template=template("<patch>", "<video>"),
    )
    return _save(folder, InternVLForConditionalGeneration(config), processor)


def _save(folder: Path, model: Any, processor: Any) -> Path:
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.generation_config.update(pad_token_id=0, bos_token_id=1, eos_token_id=2)
    special = sorted({0, 3, 4, *range(len(processor.tokenizer) - 4, len(processor.tokenizer))})
    model.generation_config.update(suppress_tokens=special)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
