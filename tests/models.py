"""Tiny random models and inputs for them, built from configurations: no network, milliseconds per call."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2Config,
    SiglipVisionConfig,
)

IMAGE = 5  # id of the image token
SIDE = 4
TOKENS = SIDE * SIDE  # visual tokens of an image

GREEDY: dict[str, Any] = {
    "max_new_tokens": 5,
    "do_sample": False,
    "pad_token_id": 0,
    "eos_token_id": None,
    "suppress_tokens": [IMAGE],
    "return_dict_in_generate": True,
    "output_logits": True,
}


@cache
def llava(tower: str = "clip", text: str = "llama", attention: str = "sdpa", dtype: torch.dtype = torch.float32) -> Any:
    """A random LLaVA. Shared between tests, which must leave it as they found it."""
    return make_llava(tower, text, attention, dtype)


def make_llava(tower: str = "clip", text: str = "llama", attention: str = "sdpa", dtype: Any = torch.float32) -> Any:
    """A random LLaVA of the test's own."""
    size: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
    }
    pixels = {"image_size": SIDE * 14, "patch_size": 14}
    vision = CLIPVisionConfig(**size, **pixels) if tower == "clip" else SiglipVisionConfig(**size, **pixels)
    width: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 128,
    }
    config = LlavaConfig(
        vision_config=vision,
        text_config=LlamaConfig(**width) if text == "llama" else Qwen2Config(**width),
        image_token_id=IMAGE,
        vision_feature_select_strategy="default" if tower == "clip" else "full",
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():  # the default initialisation is so small that all attention is uniform
        for name, weight in model.named_parameters():
            if weight.ndim > 1 and "embed" not in name:
                weight.mul_(6)
    model.set_attn_implementation(attention)
    return model.to(dtype)


@dataclass(frozen=True)
class Batch:
    """Inputs of one call, and how to get one of their rows alone, without its padding."""

    images_per_row: tuple[int, ...]
    rows: tuple[Tensor, ...]  # (S_b,) ids without padding
    pixels: Tensor  # (I, 3, side, side)

    def inputs(self) -> dict[str, Tensor]:
        """The whole batch, padded on the left."""
        longest = max(len(row) for row in self.rows)
        ids = torch.stack([torch.nn.functional.pad(row, (longest - len(row), 0)) for row in self.rows])
        mask = torch.stack([torch.nn.functional.pad(torch.ones_like(r), (longest - len(r), 0)) for r in self.rows])
        return self._with_pixels({"input_ids": ids, "attention_mask": mask}, self.pixels)

    def alone(self, number: int) -> dict[str, Tensor]:
        first = sum(self.images_per_row[:number])
        ids = self.rows[number][None]
        pixels = self.pixels[first : first + self.images_per_row[number]]
        return self._with_pixels({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, pixels)

    @staticmethod
    def _with_pixels(inputs: dict[str, Tensor], pixels: Tensor) -> dict[str, Tensor]:
        return {**inputs, "pixel_values": pixels} if len(pixels) else inputs


def batch(*images_per_row: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Batch:
    """A batch with that many images in each row, and texts of different lengths around them."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for number, images in enumerate(images_per_row):
        row = [torch.randint(10, 100, (3 + number,), generator=generator)]
        for image in range(images):
            row += [torch.full((TOKENS,), IMAGE)]
            if image % 2 == 0:  # some images follow each other without a word between
                row += [torch.randint(10, 100, (2,), generator=generator)]
        row += [torch.randint(10, 100, (4 + 2 * number,), generator=generator)]
        rows.append(torch.cat(row))
    pixels = torch.randn(sum(images_per_row), 3, SIDE * 14, SIDE * 14, generator=generator).to(dtype)
    return Batch(images_per_row, tuple(rows), pixels)


# The prompts that the laws are tried on: one image, two images in a prompt, none, and a ragged batch of all three.
BATCHES = {"one-image": (1,), "two-images": (2,), "no-image": (0,), "ragged": (1, 0, 2)}
