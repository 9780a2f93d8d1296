"""Reading one attention row of a vision encoder, whatever attention implementation the encoder runs.

The row is recomputed from what the layer's own query and key projections return, so nothing is projected twice and no
attention map is ever asked for.
"""

from __future__ import annotations

import threading
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from vtc.adapters.base import Attention
from vtc.kernels import query_rows, received


def class_attention(query: Tensor, key: Tensor, heads: int, scale: float) -> Tensor:
    """Attention of the first token, `(B, S)` float32, averaged over heads.

    `query` and `key` are `(B, S, heads * head_dim)`; the softmax runs over all `S` keys, in float32.
    """
    return query_rows(_split(query[:, :1], heads), _split(key, heads), scale)[:, 0]


def received_attention(query: Tensor, key: Tensor, heads: int, scale: float) -> Tensor:
    """Attention each token receives, `(B, S)` float32, averaged over heads and over all `S` queries.

    The `S x S` map is never made as a whole.
    """
    return received(_split(query, heads), _split(key, heads), scale)


def _split(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1))  # (B, S, heads, head_dim)


class Tap:
    """Computes the saliency row of one encoder layer each time the layer runs. State is per thread."""

    def __init__(self, attention: Attention, kind: Literal["cls", "received"]) -> None:
        self._attention = attention
        self._row = class_attention if kind == "cls" else received_attention
        self._local = threading.local()

    def install(self) -> list[RemovableHandle]:
        return [
            self._attention.query.register_forward_hook(self._see_query),
            self._attention.key.register_forward_hook(self._see_key),
            self._attention.module.register_forward_hook(self._compute),
        ]

    def pop(self) -> Tensor | None:
        """The row `(I, S)` of the encoder call that just ended on this thread; forgotten once read."""
        row = getattr(self._local, "row", None)
        self._local.__dict__.clear()
        return row

    def _see_query(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self._local.query = output.detach()

    def _see_key(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self._local.key = output.detach()

    @torch.no_grad()
    def _compute(self, module: nn.Module, args: Any, output: Any) -> None:
        query, key = self._local.query, self._local.key
        del self._local.query, self._local.key
        self._local.row = self._row(query, key, self._attention.heads, self._attention.scale)
