"""What is particular to a model family: where its parts are and how its visual tokens are laid out.

An adapter knows no strategy and a strategy knows no family. `find` returns the adapter of a model.
"""

from __future__ import annotations

import importlib

from torch import nn

from vtc.adapters.base import Adapter
from vtc.errors import UnsupportedModelError

# Class of the module that holds encoder, projector and language model -> the adapter, imported only when needed.
FAMILIES = {
    "LlavaModel": "vtc.adapters.llava.llava:LlavaAdapter",
    "LlavaNextModel": "vtc.adapters.llava.llava_next:LlavaNextAdapter",
    "LlavaNextVideoModel": "vtc.adapters.llava.llava_next_video:LlavaNextVideoAdapter",
    "LlavaOnevisionModel": "vtc.adapters.llava.llava_onevision:LlavaOnevisionAdapter",
    "Qwen2VLModel": "vtc.adapters.qwen2vl.qwen2vl:Qwen2VLAdapter",
    "Qwen2_5_VLModel": "vtc.adapters.qwen2vl.qwen2_5vl:Qwen2_5VLAdapter",
    "Qwen3VLModel": "vtc.adapters.qwen2vl.qwen2vl:Qwen3VLAdapter",
    "InternVLModel": "vtc.adapters.internvl.internvl:InternVLAdapter",
}


def find(model: nn.Module) -> Adapter:
    """The adapter of `model`, which may be wrapped (PEFT, a head, a container) at any depth.

    Raises:
        UnsupportedModelError: no supported vision-language model inside, or several, or one whose parts are not as
            expected.
    """
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(f"expected a torch.nn.Module, got {type(model).__name__}")
    found: list[tuple[nn.Module, str]] = []
    for module in model.modules():
        names = [cls.__name__ for cls in type(module).__mro__ if cls.__name__ in FAMILIES]
        found += [(module, FAMILIES[names[0]])] if names else []
    if not found:
        raise UnsupportedModelError(
            f"{type(model).__name__} is not a vision-language model that vtc supports; supported: "
            f"{', '.join(FAMILIES)} and whatever wraps one of them (for example LlavaForConditionalGeneration)"
        )
    if len(found) > 1:
        raise UnsupportedModelError(
            f"{type(model).__name__} holds {len(found)} vision-language models; compress each of them on its own"
        )
    path, _, name = found[0][1].partition(":")
    return getattr(importlib.import_module(path), name)(found[0][0])
