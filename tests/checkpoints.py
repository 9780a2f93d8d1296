"""Checkpoint folders of tiny random models, with processors, for what starts from a folder on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    SiglipImageProcessor,
    SiglipVisionConfig,
)

from vtc.eval import scenes

SIDE = 4
TOKENS = SIDE * SIDE  # visual tokens of an image
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endfor %} :"
)


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per word of the bundled questions and answers."""
    split = Regex(r"[\w-]+|[^\w\s]")
    text = " ".join(f"{item.question} {item.answer}" for item in scenes.questions("test", 400)).lower()
    pieces = pre_tokenizers.Split(split, "removed", invert=True)
    words = sorted({word for word, _ in pieces.pre_tokenize_str(text)} | {":"})
    ids = {token: i for i, token in enumerate([*SPECIAL, *words])}
    built = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    built.normalizer = normalizers.Lowercase()
    built.pre_tokenizer = pieces
    built.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    names = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), SPECIAL, strict=False))
    return PreTrainedTokenizerFast(
        tokenizer_object=built, **names, padding_side="left", extra_special_tokens={"image_token": "<image>"}
    )


def save_llava(folder: Path, tower: str = "clip") -> Path:
    """A LLaVA that sees 4 x 4 tokens and answers at random, always the same."""
    torch.manual_seed(0)
    text = tokenizer()
    sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    pixels = {"image_size": 8 * SIDE, "patch_size": 8, "intermediate_size": 48}
    vision = CLIPVisionConfig(**sizes, **pixels) if tower == "clip" else SiglipVisionConfig(**sizes, **pixels)
    select = "default" if tower == "clip" else "full"
    config = LlavaConfig(
        vision_config=vision,
        text_config=LlamaConfig(**sizes, intermediate_size=64, vocab_size=len(text)),
        image_token_id=SPECIAL.index("<image>"),
        vision_feature_select_strategy=select,
    )
    model = LlavaForConditionalGeneration(config)
    # Larger than usual, so that answers depend on the prompt and on the picture.
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    model.generation_config.update(pad_token_id=0, bos_token_id=1, eos_token_id=2, suppress_tokens=[0, 3, 4])
    model.save_pretrained(folder)
    side = {"height": 8 * SIDE, "width": 8 * SIDE}
    images = (
        CLIPImageProcessor(size={"shortest_edge": 8 * SIDE}, crop_size=side)
        if tower == "clip"
        else SiglipImageProcessor(size=side)
    )
    LlavaProcessor(
        image_processor=images,
        tokenizer=text,
        patch_size=8,
        vision_feature_select_strategy=select,
        num_additional_image_tokens=1 if tower == "clip" else 0,
        image_token="<image>",
        chat_template=TEMPLATE,
    ).save_pretrained(folder)
    return folder


def save_text_only(folder: Path) -> Path:
    """A language model without eyes."""
    sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=64, vocab_size=40)).save_pretrained(folder)
    return folder
