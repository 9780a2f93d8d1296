"""Write a trained checkpoint as an ordinary Hugging Face folder.

    python -m training.export tiny-llava      # runs/tiny-llava/settle.pt to vtc/zoo/tiny-llava

The folder loads with `AutoProcessor.from_pretrained` and the model's own class, offline and without remote code. The
model card is written by `python -m training.evaluate`, which measures what it says.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, GenerationConfig

from training import processors, tiny_llava, tiny_llava_next, tiny_onevision, tiny_qwen2vl

MODELS = {
    "tiny-llava": (tiny_llava.config, processors.llava),
    "tiny-llava-next": (tiny_llava_next.config, processors.llava_next),
    "tiny-onevision": (tiny_onevision.config, processors.onevision),
    "tiny-qwen2vl": (tiny_qwen2vl.config, processors.qwen2vl),
}


def export(config: Any, processor: Any, checkpoint: Path, folder: Path) -> None:
    """Weights in bfloat16, configuration, tokenizer, processors and chat template."""
    model = AutoModelForImageTextToText.from_config(config)
    model.load_state_dict(torch.load(checkpoint, weights_only=True)["model"])
    language = config.text_config
    model.generation_config = GenerationConfig(
        bos_token_id=language.bos_token_id,
        eos_token_id=language.eos_token_id,
        pad_token_id=language.pad_token_id,
        max_new_tokens=8,
        do_sample=False,
    )
    model.to(torch.bfloat16).save_pretrained(folder)
    processor.save_pretrained(folder)
    for path in folder.iterdir():
        path.chmod(0o644)  # safetensors are written for the owner only


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=MODELS)
    parser.add_argument("--checkpoint", type=Path, help="default: runs/NAME/settle.pt")
    parser.add_argument("--folder", type=Path, help="default: vtc/zoo/NAME")
    arguments = parser.parse_args()
    config, processor = MODELS[arguments.name]
    checkpoint = arguments.checkpoint or Path("runs", arguments.name, "settle.pt")
    folder = arguments.folder or Path("vtc/zoo", arguments.name)
    export(config(), processor(), checkpoint, folder)
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(f"{folder}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
