"""Reading one attention row of a vision encoder, whatever attention implementation the encoder runs.

The row is recomputed from what the layer's own projections return, so nothing is projected twice and no attention map
is ever asked for.
"""

from __future__ import annotations

import threading
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from vtc.adapters.base import Attention
from vtc.boundary import bind
from vtc.errors import WITHOUT_HOOKS, VtcError, refuse_copies
from vtc.kernels import query_rows, received, received_packed
from vtc.kernels.cosine import products

Kind = Literal["cls", "received", "logits"]


def class_attention(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """Attention of the first token, `(B, S)` float32, averaged over heads.

    `query` and `key` are `(B, S, heads, head_dim)`; the softmax runs over all `S` keys, in float32.
    """
    return query_rows(query[:, :1], key, scale)[:, 0]


def class_logits(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """Scaled dot products of the first token with all tokens, `(B, S)` float32, averaged over heads: no softmax."""
    heads = query.shape[2]
    return products(query[:, :1].flatten(2), key.flatten(2))[:, 0] * (scale / heads)


def received_attention(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """Attention each token receives, `(B, S)` float32, averaged over heads and over all `S` queries.

    The `S x S` map is never made as a whole.
    """
    return received(query, key, scale)


class Tap:
    """Computes the saliency row of one encoder layer when the layer runs. State is per thread.

    Args:
        attention: the layer.
        kind: what the row holds, averaged over heads: attention of the class token (`"cls"`), attention received from
            all tokens on average (`"received"`), or the class token's scaled dot products (`"logits"`).
    """

    def __init__(self, attention: Attention, kind: Kind) -> None:
        if kind not in get_args(Kind):
            raise VtcError(f"a saliency row is one of {', '.join(get_args(Kind))}, not '{kind}'")
        if attention.offsets is not None and kind != "received":
            raise VtcError(f"packed inputs have no class token to read '{kind}' from; 'received' can be read")
        self._attention = attention
        self._kind = kind
        self._local = threading.local()

    __reduce__ = refuse_copies

    def install(self) -> list[RemovableHandle]:
        """Hook the layer. It does nothing until `expect` is called."""
        return [
            *(
                projection.register_forward_hook(partial(self._see, number))
                for number, projection in enumerate(self._attention.projections)
            ),
            self._attention.module.register_forward_hook(self._compute, with_kwargs=True),
        ]

    def check(self, attention: Attention) -> None:
        """Raise if `attention`, the layer as it is now, has other projections than those that were hooked.

        Adapters such as LoRA's, added in between, hold the hooked ones inside, where queries and keys lack a part.
        """
        if attention.projections != self._attention.projections:
            raise VtcError(f"{self._name} {WITHOUT_HOOKS}")

    def expect(self, longest: int | None) -> None:
        """The encoder is about to run on this thread.

        Runs of the layer that were not announced, such as those that checkpointing repeats in a backward pass, leave
        no row.

        Args:
            longest: length of the longest packed sequence; `None` if inputs are not packed.
        """
        self._local.longest, self._local.outputs, self._local.row = longest, {}, None

    def pop(self) -> Tensor:
        """The row of the encoder call that just ended on this thread, forgotten once read.

        `(P, S)` float32, or `(S,)` of packed inputs.
        """
        row: Tensor | None = getattr(self._local, "row", None)
        self._local.row = self._local.outputs = None
        if row is None:
            raise VtcError(f"{self._name} {WITHOUT_HOOKS}")
        return row

    @property
    def _name(self) -> str:
        return f"the {type(self._attention.module).__name__} of the encoder"

    def _see(self, number: int, module: nn.Module, args: Any, output: Tensor) -> None:
        outputs = getattr(self._local, "outputs", None)
        if outputs is not None:
            outputs[number] = output.detach()

    @torch.no_grad()
    def _compute(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        outputs = getattr(self._local, "outputs", None)
        if outputs is None:
            return
        self._local.outputs = None
        attention, arguments = self._attention, bind(module, args, kwargs)
        if len(outputs) < len(attention.projections):
            raise VtcError(f"{self._name} {WITHOUT_HOOKS}")
        query, key = attention.split([outputs[number] for number in sorted(outputs)], arguments)
        if attention.offsets is not None:
            offsets = arguments[attention.offsets].to(query.device)
            self._local.row = received_packed(query, key, offsets, self._local.longest, attention.scale)
        else:
            row = {"cls": class_attention, "received": received_attention, "logits": class_logits}[self._kind]
            self._local.row = row(query, key, attention.scale)
