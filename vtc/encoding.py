"""Watching the vision encoder: what is known about its inputs travels on its output.

`generate` runs the encoder before it calls the model, and then neither pixels nor sizes reach any module's forward. The
two methods that run it are therefore shadowed on the one model object, and put what they learn on the object they
return. So it can never be read together with another image's features, and needs no bookkeeping with beams or threads.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from vtc.adapters.base import Adapter
from vtc.errors import VtcError
from vtc.saliency import Tap
from vtc.visual import Layout

MODALITIES = ("image", "video")
_KEY = "vtc_encoding"


@dataclass(frozen=True)
class Encoding:
    """One run of the encoder.

    Attributes:
        features: what the encoder returned, per visual input.
        layouts: one per visual input.
        rows: saliency per encoder layer that was read, `(N_i,)` per visual input.
    """

    features: Sequence[Tensor]
    layouts: Sequence[Layout]
    rows: Mapping[int, Sequence[Tensor]]


def encoding_of(output: Any) -> Encoding:
    """What is known about this output of the encoder."""
    encoding = getattr(output, _KEY, None)
    if encoding is None:
        raise VtcError(
            "these image features cannot be compressed: they were computed before vtc.compress(model, ...), or split "
            "afterwards (prefill_chunk_size); compute them again, in one piece"
        )
    return encoding


def take(output: Any, numbers: Sequence[int]) -> Any:
    """`output` of the encoder, changed to hold the visual inputs with these numbers, in this order and as often.

    What is known about them goes along. For callers who encode once what several prompts show.
    """
    features = output.pooler_output
    output.pooler_output = features[list(numbers)] if isinstance(features, Tensor) else [features[n] for n in numbers]
    deep = getattr(output, "deepstack_features", None)  # per decoder layer that they are added to, per visual input
    if deep is not None:
        output.deepstack_features = [[layer[n] for n in numbers] for layer in deep]
    known = getattr(output, _KEY, None)
    if known is not None:
        output[_KEY] = Encoding(
            list(output.pooler_output),
            [known.layouts[n] for n in numbers],
            {layer: [rows[n] for n in numbers] for layer, rows in known.rows.items()},
        )
    return output


class EncoderWatch:
    """Shadows `get_image_features` and `get_video_features` of one multimodal module.

    Args:
        adapter: of the model.
        taps: by encoder layer.
        notice: called with the modality and the output after each run.
    """

    def __init__(self, adapter: Adapter, taps: Mapping[int, Tap], notice: Callable[[str, Any], None]) -> None:
        self._adapter, self._taps, self._notice = adapter, taps, notice
        self._local = threading.local()
        self._shadows: dict[str, Any] = {}
        self._found: dict[str, Any] = {}

    def install(self) -> None:
        module = self._adapter.multimodal
        for modality in MODALITIES:
            name = f"get_{modality}_features"
            if hasattr(module, name):
                if name in vars(module):
                    self._found[name] = vars(module)[name]
                vars(module)[name] = self._shadows[name] = self._watched(modality, getattr(module, name))

    def remove(self) -> None:
        attributes = vars(self._adapter.multimodal)
        for name, shadow in self._shadows.items():
            if attributes.get(name) is shadow:
                del attributes[name]
                attributes.update({name: self._found[name]} if name in self._found else {})
        self._shadows.clear()
        self._found.clear()

    def _watched(self, modality: str, encode: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(encode)

        @functools.wraps(encode)
        def watched(*args: Any, **kwargs: Any) -> Any:
            if getattr(self._local, "inside", False):  # some models encode clips with their method for images
                return encode(*args, **kwargs)
            self._local.inside = True
            try:
                bound = signature.bind(*args, **kwargs).arguments
                layouts = self._adapter.layouts(modality, {**bound, **bound.get("kwargs", {})})
                for layer, tap in self._taps.items():
                    tap.check(self._adapter.attention(layer))
                    tap.expect(self._adapter.longest(layouts))
                output = encode(*args, **kwargs)
                rows = {
                    layer: self._adapter.token_rows(modality, tap.pop(), layouts) for layer, tap in self._taps.items()
                }
            finally:
                self._local.inside = False
            if hasattr(output, "pooler_output"):  # a tuple that a caller asked for is not used by the model
                # An item, not just an attribute: accelerate takes outputs apart into their items and builds them anew.
                output[_KEY] = Encoding(list(output.pooler_output), layouts, rows)
                self._notice(modality, output)
            return output

        return watched
