"""Attention scores inside the language model, whatever attention implementation it runs.

Only the rows that are needed are computed, from the queries of a few tokens and the keys already in the cache. No layer
is asked for its attention map, and masks are written down here rather than taken from the model: with sdpa a causal
mask is often `None`.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vtc.errors import UnsupportedModelError, VtcError
from vtc.kernels import query_rows
from vtc.kernels.cosine import full_precision

BLOCK = 256  # rows of the attention map alive at a time


@dataclass(frozen=True)
class Probe:
    """What one decoder layer sees, as far as its attention scores are concerned.

    Attributes:
        layer: the decoder layer.
        hidden: `(B, K, D)`, its input.
        rotation: cosine and sine for the `K` tokens, as the model passes them to its layers.
        real: `(B, P + K)` bool, which of the earlier and current tokens are not padding; `None` if all are.
        past: number of earlier tokens in its cache, `P`.
        cache: the cache, if there is one.
        ran: whether the layer has run, so that the cache has its keys.
    """

    layer: Any
    hidden: Tensor
    rotation: tuple[Tensor, Tensor]
    real: Tensor | None
    past: int
    cache: Any
    ran: bool


def check_layer(layer: Any) -> None:
    """Raise if the attention of this decoder layer cannot be read."""
    attention: Any = getattr(layer, "self_attn", None)
    wanted = (getattr(layer, "input_layernorm", None), *(getattr(attention, n, None) for n in ("q_proj", "k_proj")))
    if (
        any(part is None for part in wanted)
        or not all(_is_per_head(getattr(attention, name, None), attention.head_dim) for name in ("q_norm", "k_norm"))
        or any(getattr(attention, name, None) is not None for name in ("q_layernorm", "k_layernorm"))
        or not hasattr(_home(attention), "apply_rotary_pos_emb")
    ):
        raise UnsupportedModelError(
            f"the attention of a {type(layer).__name__} cannot be read: it needs input_layernorm, self_attn.q_proj, "
            "self_attn.k_proj, q_norm and k_norm per head if any, and rotary positions; strategies that act before the "
            "language model do not need it"
        )


def _is_per_head(norm: Any, head_dim: int) -> bool:
    weight = getattr(norm, "weight", None)
    return weight is None or weight.shape[-1] == head_dim


def last_token_attention(probe: Probe) -> Tensor:
    """`(B, P + K)` float32: attention of each prompt's last real token to every token, averaged over heads."""
    keys = _keys(probe)  # (B, P + K, G, head_dim)
    batch, size = probe.hidden.shape[:2]
    if probe.real is None:
        last = torch.full((batch, 1), size - 1, device=keys.device)
    else:
        place = torch.arange(size, device=keys.device)
        last = (probe.real[:, probe.past :] * place).amax(1, keepdim=True)  # (B, 1)
    query = _queries(probe, last)  # (B, 1, H, head_dim)
    mask = torch.arange(keys.shape[1], device=keys.device) <= last + probe.past
    if probe.real is not None:
        mask = mask & probe.real
    return query_rows(query, keys, probe.layer.self_attn.scaling, mask)[:, 0]


def exchanged_attention(probe: Probe, visual: Tensor) -> Tensor:
    """`(B, 2)` float32: mean attention mass from text to visual tokens, and from visual tokens to text.

    Text is what follows a prompt's first visual token; `visual` `(B, K)` bool says which tokens are visual. The map is
    made in blocks of rows, as a causal softmax over all tokens, averaged over heads.
    """
    keys = _keys(probe)  # (B, P + K, G, head_dim)
    real = torch.ones_like(visual) if probe.real is None else probe.real[:, probe.past :]
    text = (visual.cumsum(1) > 0) & ~visual & real  # (B, K)
    flags = torch.stack([text, visual], dim=1).float()  # (B, 2, K)
    size, place = visual.shape[1], torch.arange(keys.shape[1], device=keys.device)
    total = flags.new_zeros(len(visual), 2, 2)  # from, to
    for start in range(0, size, BLOCK):
        rows = torch.arange(start, min(start + BLOCK, size), device=keys.device)
        share = _causal_rows(probe, keys, rows, place)[:, :, probe.past :]  # (B, R, K)
        total += flags[:, :, rows] @ share @ flags.mT
    mean = total / flags.sum(2).clamp_min(1)[..., None]
    return torch.stack([mean[:, 0, 1], mean[:, 1, 0]], dim=1)


def _causal_rows(probe: Probe, keys: Tensor, rows: Tensor, place: Tensor) -> Tensor:
    """`(B, R, P + K)`: attention of the tokens `rows` `(R,)` of the call, averaged over heads."""
    query = _queries(probe, rows.expand(len(keys), -1))
    grouped = query.float().unflatten(2, (keys.shape[2], -1)).permute(0, 2, 3, 1, 4)  # (B, G, H / G, R, head_dim)
    with full_precision(keys.device):
        score = grouped @ keys.float().permute(0, 2, 3, 1)[:, :, None] * probe.layer.self_attn.scaling
    seen = (place <= rows[:, None] + probe.past).expand(len(keys), -1, -1)  # (B, R, P + K)
    if probe.real is not None:
        seen = seen & probe.real[:, None]
    score = score.masked_fill(~seen[:, None, None], torch.finfo(score.dtype).min)
    return score.softmax(-1).flatten(1, 2).mean(1)


def _queries(probe: Probe, columns: Tensor) -> Tensor:
    """`(B, R, H, head_dim)`: rotated queries of the tokens in `columns` `(B, R)`."""
    attention = probe.layer.self_attn
    hidden = _pick(probe.hidden, columns)
    query = _heads(attention, "q", probe.layer.input_layernorm(hidden))
    return _rotate(attention, query, *(_pick(x.expand(len(hidden), -1, -1), columns) for x in probe.rotation))


def _keys(probe: Probe) -> Tensor:
    """`(B, P + K, G, head_dim)`: rotated keys of the layer, from the cache as far as it has them."""
    attention, size = probe.layer.self_attn, probe.past + probe.hidden.shape[1]
    layers = [] if probe.cache is None else probe.cache.layers
    layer = layers[attention.layer_idx] if len(layers) > attention.layer_idx else None
    held = layer.keys if layer is not None and layer.is_initialized else None  # (B, G, L, head_dim)
    quantised = getattr(layer, "_quantized_keys", None) is not None  # then these are only those not yet quantised
    if held is not None and probe.ran and not quantised:
        return held[:, :, :size].to(probe.hidden.device).transpose(1, 2)
    key = _heads(attention, "k", probe.layer.input_layernorm(probe.hidden))
    key = _rotate(attention, key, *probe.rotation)
    if held is None or not probe.past:
        return key
    if quantised:
        raise VtcError(
            f"attention to earlier tokens cannot be read from a {type(probe.cache).__name__} of quantised keys: use "
            "another cache, start a new one, or use a strategy that acts before the language model"
        )
    return torch.cat([held[:, :, : probe.past].to(key.device).transpose(1, 2), key], dim=1)


def _heads(attention: Any, kind: str, hidden: Tensor) -> Tensor:
    """`(B, R, heads, head_dim)`: queries or keys before rotation."""
    x = getattr(attention, f"{kind}_proj")(hidden).unflatten(-1, (-1, attention.head_dim))
    norm = getattr(attention, f"{kind}_norm", None)
    return x if norm is None else norm(x)


def _rotate(attention: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate `(B, R, heads, head_dim)` with the model's own function; some models turn the first channels only."""
    turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    return torch.cat([_home(attention).apply_rotary_pos_emb(turned, turned, cos, sin, unsqueeze_dim=2)[0], rest], -1)


def _home(module: nn.Module | None) -> Any:
    return sys.modules[type(module).__module__]


def _pick(x: Tensor, columns: Tensor) -> Tensor:
    """Rows of `(B, K, C)` at `columns` `(B, R)`."""
    return x.gather(1, columns[..., None].expand(-1, -1, x.shape[-1]))
