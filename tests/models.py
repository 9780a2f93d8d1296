"""LLaVA-1.5 among the families, and prompts with images only, for tests that one family is enough for."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import torch

from families import FAMILIES, GREEDY, IMAGE, Batch, Family, clip_tower, llama, qwen2, siglip_tower
from families import llava as build

__all__ = ["GREEDY", "IMAGE", "TOKENS", "batch", "llava", "make_llava"]

TOKENS = 16  # visual tokens of an image
TOWERS, TEXTS = {"clip": clip_tower, "siglip": siglip_tower}, {"llama": llama, "qwen2": qwen2}


@cache
def llava(tower: str = "clip", text: str = "llama", attention: str = "sdpa", dtype: torch.dtype = torch.float32) -> Any:
    """A random LLaVA. Shared between tests, which must leave it as they found it."""
    return make_llava(tower, text, attention, dtype)


def make_llava(tower: str = "clip", text: str = "llama", attention: str = "sdpa", dtype: Any = torch.float32) -> Any:
    """A random LLaVA of the test's own."""
    return Family("llava", partial(build, TOWERS[tower], TEXTS[text])).make(attention, dtype)


def batch(*images_per_row: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Batch:
    """A batch with that many images in each row, and texts of different lengths around them."""
    rows = [("text", *["image"] * images, "text") for images in images_per_row]
    return FAMILIES["llava"].batch(rows, seed, dtype)
