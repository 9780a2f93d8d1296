"""Write a checkpoint of `tiny-onevision` as an ordinary Hugging Face folder.

    python -m training.export_onevision runs/tiny-onevision/settle.pt vtc/zoo/tiny-onevision

Needs torchvision, without which transformers has no processor of clips. Where only its build for CUDA can be had,
`vtc.zoo.torchvision` makes that do.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from vtc.zoo import torchvision

if TYPE_CHECKING:
    from transformers import LlavaOnevisionProcessor

TEMPLATE = (
    "{% for message in messages %}"
    "{{ 'USER:' if message['role'] == 'user' else 'ASSISTANT:' }}"
    "{% if message['content'] is string %} {{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] != 'text' %}"
    "{{ ' <video>' if part['type'] == 'video' else ' <image>' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %} {{ part['text'] }}{% endfor %}"
    "{% endif %}"
    "{{ ' ' if message['role'] == 'user' else '</s>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def processor() -> LlavaOnevisionProcessor:
    """Tiles and frames of 64 x 64 pixels; every frame that is given counts, none is left out."""
    torchvision.mend()  # before transformers looks for it
    from transformers import LlavaOnevisionProcessor, LlavaOnevisionVideoProcessor, PreTrainedTokenizerFast
    from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
        LlavaOnevisionImageProcessorPil,
    )

    from training import text
    from training.tiny_onevision import LANGUAGE, SIDE, VIDEO, config
    from vtc.eval.clips import TILE

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=LANGUAGE.tokenizer,
        bos_token=text.BOS,
        eos_token=text.EOS,
        unk_token=text.UNK,
        pad_token=text.PAD,
        padding_side="left",
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
        extra_special_tokens={"image_token": text.IMAGE, "video_token": VIDEO},
    )
    size = {"height": TILE, "width": TILE}
    return LlavaOnevisionProcessor(
        image_processor=LlavaOnevisionImageProcessorPil(size=size, image_grid_pinpoints=config().image_grid_pinpoints),
        video_processor=LlavaOnevisionVideoProcessor(size=size, do_sample_frames=False),
        tokenizer=tokenizer,
        num_image_tokens=SIDE**2,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_9",
        image_token=text.IMAGE,
        video_token=VIDEO,
        chat_template=TEMPLATE,
    )


def export(checkpoint: Path, folder: Path) -> None:
    """Weights in bfloat16, configuration, tokenizer, processors of images and clips, chat template."""
    files = processor()  # first: it makes torchvision importable
    from transformers import GenerationConfig, LlavaOnevisionForConditionalGeneration

    from training.tiny_onevision import config

    settings = config()
    model = LlavaOnevisionForConditionalGeneration(settings)
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
    files.save_pretrained(folder)
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
