"""Write a trained checkpoint as an ordinary Hugging Face folder.

    python -m training.export runs/tiny-llava/settle.pt vtc/zoo/tiny-llava

The folder loads with `AutoProcessor.from_pretrained` and `LlavaForConditionalGeneration.from_pretrained`, offline and
without remote code. The model card is written by `training/evaluate.py`, which measures what it says.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import (
    CLIPImageProcessor,
    GenerationConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from training import text
from training.tiny_llava import config

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ 'USER:' if message['role'] == 'user' else 'ASSISTANT:' }}"
    "{% if message['content'] is string %} {{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %} <image>{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %} {{ part['text'] }}{% endfor %}"
    "{% endif %}"
    "{{ ' ' if message['role'] == 'user' else '</s>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def processor() -> LlavaProcessor:
    """Resizes any picture to 128 x 128 pixels as a whole, so that nothing is cropped away."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=text.LLAVA.tokenizer,
        bos_token=text.BOS,
        eos_token=text.EOS,
        unk_token=text.UNK,
        pad_token=text.PAD,
        padding_side="left",
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
        extra_special_tokens={"image_token": text.IMAGE},
    )
    side = config().vision_config.image_size
    whole = {"height": side, "width": side}
    images = CLIPImageProcessor(size=whole, crop_size=whole, do_center_crop=False)
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=config().vision_config.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # [CLS]
        image_token=text.IMAGE,
        chat_template=CHAT_TEMPLATE,
    )


def export(checkpoint: Path, folder: Path) -> None:
    """Weights in bfloat16, configuration, tokenizer, image processor and chat template."""
    settings = config()
    model = LlavaForConditionalGeneration(settings)
    model.load_state_dict(torch.load(checkpoint, weights_only=True)["model"])
    language = settings.text_config
    model.generation_config = GenerationConfig(
        bos_token_id=language.bos_token_id,
        eos_token_id=language.eos_token_id,
        pad_token_id=language.pad_token_id,
        max_new_tokens=8,
        do_sample=False,
    )
    model.to(torch.bfloat16).save_pretrained(folder)
    processor().save_pretrained(folder)
    for path in folder.iterdir():
        path.chmod(0o644)  # safetensors are written for the owner only


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    export(arguments.checkpoint, arguments.folder)
    size = sum(path.stat().st_size for path in arguments.folder.iterdir())
    print(f"{arguments.folder}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
