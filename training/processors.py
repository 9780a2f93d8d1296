"""The processors of the bundled models: tokenizer, chat template, and what pictures and clips become.

Those of clips need torchvision; where only its build for CUDA can be had, `vtc.zoo.torchvision` makes that do.
"""

from __future__ import annotations

from typing import Any

from transformers import (
    CLIPImageProcessor,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaOnevisionProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2VLProcessor,
)

from training import text, tiny_llava, tiny_llava_next, tiny_onevision, tiny_qwen2vl
from vtc.eval import clips, sizes


def tokenizer(language: text.Language, **tokens: str) -> PreTrainedTokenizerFast:
    """The tokenizer of a model; `tokens` are what its processor calls its placeholders."""
    return PreTrainedTokenizerFast(
        tokenizer_object=language.tokenizer,
        bos_token=text.BOS,
        eos_token=text.EOS,
        unk_token=text.UNK,
        pad_token=text.PAD,
        padding_side="left",
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
        extra_special_tokens=tokens,
    )


def template(media: str) -> str:
    """The chat template; `media` writes the placeholders of a message."""
    return (
        "{% for message in messages %}"
        "{{ 'USER:' if message['role'] == 'user' else 'ASSISTANT:' }}"
        "{% if message['content'] is string %} {{ message['content'] }}{% else %}"
        + media
        + "{% for part in message['content'] if part['type'] == 'text' %} {{ part['text'] }}{% endfor %}"
        "{% endif %}"
        "{{ ' ' if message['role'] == 'user' else '</s>' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
    )


PICTURES = "{% for part in message['content'] if part['type'] == 'image' %} <image>{% endfor %}"
ANY = (
    "{% for part in message['content'] if part['type'] != 'text' %}"
    "{{ ' <video>' if part['type'] == 'video' else ' <image>' }}{% endfor %}"
)
ANY_QWEN = (
    "{% for part in message['content'] if part['type'] != 'text' %}"
    " <|vision_start|>{{ '<|video_pad|>' if part['type'] == 'video' else '<|image_pad|>' }}<|vision_end|>"
    "{% endfor %}"
)


def _pictures() -> dict[str, Any]:
    """Tokenizer, template and tokens of the models that see pictures through CLIP."""
    return {
        "tokenizer": tokenizer(text.LLAVA, image_token=text.IMAGE),
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,  # [CLS]
        "image_token": text.IMAGE,
        "chat_template": template(PICTURES),
    }


def llava() -> LlavaProcessor:
    """Resizes any picture to 128 x 128 pixels as a whole, so that nothing is cropped away."""
    vision = tiny_llava.config().vision_config
    whole = {"height": vision.image_size, "width": vision.image_size}
    return LlavaProcessor(
        image_processor=CLIPImageProcessor(size=whole, crop_size=whole, do_center_crop=False),
        patch_size=vision.patch_size,
        **_pictures(),
    )


def llava_next() -> LlavaNextProcessor:
    """Pictures are cut into tiles of 96 x 96 pixels; tokenizer and template are those of `tiny-llava`."""
    tile = tiny_llava_next.TILE
    images = LlavaNextImageProcessor(
        size={"shortest_edge": tile},
        crop_size={"height": tile, "width": tile},
        image_grid_pinpoints=tiny_llava_next.PINPOINTS,
    )
    return LlavaNextProcessor(
        image_processor=images,
        patch_size=tiny_llava_next.PATCH,
        **_pictures(),
    )


def onevision() -> LlavaOnevisionProcessor:
    """Tiles and frames of 64 x 64 pixels; every frame that is given counts, none is left out."""
    from transformers import LlavaOnevisionVideoProcessor
    from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

    size = {"height": clips.TILE, "width": clips.TILE}
    pinpoints = tiny_onevision.config().image_grid_pinpoints
    video = tiny_onevision.VIDEO
    return LlavaOnevisionProcessor(
        image_processor=LlavaOnevisionImageProcessorPil(size=size, image_grid_pinpoints=pinpoints),
        video_processor=LlavaOnevisionVideoProcessor(size=size, do_sample_frames=False),
        tokenizer=tokenizer(tiny_onevision.LANGUAGE, image_token=text.IMAGE, video_token=video),
        num_image_tokens=tiny_onevision.SIDE**2,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_9",
        image_token=text.IMAGE,
        video_token=video,
        chat_template=template(ANY),
    )


def qwen2vl() -> Qwen2VLProcessor:
    """Media whose sides are multiples of 16 pixels stay as they are; every frame of a clip counts."""
    from transformers import Qwen2VLVideoProcessor
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    names = {
        "image_token": tiny_qwen2vl.IMAGE,
        "video_token": tiny_qwen2vl.VIDEO,
        "vision_bos_token": tiny_qwen2vl.START,
        "vision_eos_token": tiny_qwen2vl.END,
    }
    cut: dict[str, Any] = {
        "size": {"shortest_edge": 32 * 32, "longest_edge": 192 * 192},  # area: within it, media keep their size
        "patch_size": sizes.PATCH,
        "temporal_patch_size": 2,
        "merge_size": tiny_qwen2vl.MERGE,
    }
    return Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessorPil(**cut),
        video_processor=Qwen2VLVideoProcessor(**cut, do_sample_frames=False, cap_pixels_per_frame=False),
        tokenizer=tokenizer(tiny_qwen2vl.LANGUAGE, **names),
        chat_template=template(ANY_QWEN),
    )
