"""Write a checkpoint of `tiny_llava_next.py` as an ordinary Hugging Face folder.

    python -m training.export_next runs/tiny-llava-next/answers.pt vtc/zoo/tiny-llava-next

The model card is written by `training/evaluate_next.py`, which measures what it says.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import (
    GenerationConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
)

from training import export, text
from training.tiny_llava_next import PATCH, PINPOINTS, TILE, config


def processor() -> LlavaNextProcessor:
    """The tokenizer and the chat template of `tiny-llava`; pictures are cut into tiles of 96 x 96 pixels."""
    images = LlavaNextImageProcessor(
        size={"shortest_edge": TILE}, crop_size={"height": TILE, "width": TILE}, image_grid_pinpoints=PINPOINTS
    )
    return LlavaNextProcessor(
        image_processor=images,
        tokenizer=export.processor().tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # [CLS]
        image_token=text.IMAGE,
        chat_template=export.CHAT_TEMPLATE,
    )


def write(checkpoint: Path, folder: Path) -> None:
    """Weights in bfloat16, configuration, tokenizer, image processor and chat template."""
    settings = config()
    model = LlavaNextForConditionalGeneration(settings)
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
    write(arguments.checkpoint, arguments.folder)
    size = sum(path.stat().st_size for path in arguments.folder.iterdir())
    print(f"{arguments.folder}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
