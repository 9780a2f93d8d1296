"""Write a checkpoint of `tiny-qwen2vl` as an ordinary Hugging Face folder.

    python -m training.export_qwen2vl runs/tiny-qwen2vl/settle.pt vtc/zoo/tiny-qwen2vl

Needs torchvision, without which transformers has no processor of clips. Where only its build for CUDA can be had,
`vtc.zoo.torchvision` makes that do. The model card is written by `training/evaluate_qwen2vl.py`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from vtc.zoo import torchvision

if TYPE_CHECKING:
    from transformers import Qwen2VLProcessor

TEMPLATE = (
    "{% for message in messages %}"
    "{{ 'USER:' if message['role'] == 'user' else 'ASSISTANT:' }}"
    "{% if message['content'] is string %} {{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] != 'text' %}"
    " <|vision_start|>{{ '<|video_pad|>' if part['type'] == 'video' else '<|image_pad|>' }}<|vision_end|>"
    "{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %} {{ part['text'] }}{% endfor %}"
    "{% endif %}"
    "{{ ' ' if message['role'] == 'user' else '</s>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
PIXELS = {"shortest_edge": 32 * 32, "longest_edge": 192 * 192}  # area: within it, media keep their size


def processor() -> Qwen2VLProcessor:
    """Media whose sides are multiples of 16 pixels stay as they are; every frame of a clip counts."""
    torchvision.mend()  # before transformers looks for it
    from transformers import PreTrainedTokenizerFast, Qwen2VLProcessor, Qwen2VLVideoProcessor
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    from training import text
    from training.tiny_qwen2vl import END, IMAGE, LANGUAGE, MERGE, START, VIDEO
    from vtc.eval.sizes import PATCH

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=LANGUAGE.tokenizer,
        bos_token=text.BOS,
        eos_token=text.EOS,
        unk_token=text.UNK,
        pad_token=text.PAD,
        padding_side="left",
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
        extra_special_tokens={
            "image_token": IMAGE,
            "video_token": VIDEO,
            "vision_bos_token": START,
            "vision_eos_token": END,
        },
    )
    cut = {"size": PIXELS, "patch_size": PATCH, "temporal_patch_size": 2, "merge_size": MERGE}
    return Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessorPil(**cut),
        video_processor=Qwen2VLVideoProcessor(**cut, do_sample_frames=False, cap_pixels_per_frame=False),
        tokenizer=tokenizer,
        chat_template=TEMPLATE,
    )


def export(checkpoint: Path, folder: Path) -> None:
    """Weights in bfloat16, configuration, tokenizer, processors of images and clips, chat template."""
    files = processor()  # first: it makes torchvision importable
    from transformers import GenerationConfig, Qwen2VLForConditionalGeneration

    from training.tiny_qwen2vl import config

    settings = config()
    model = Qwen2VLForConditionalGeneration(settings)
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
