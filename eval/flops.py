"""FLOPs in closed form, from a Hugging Face config alone: no weights, no forward pass.

A multiply-add is one MAC and two FLOPs; a `Count` gives both. The convention `exact` counts the matrix products that
the model runs, with the key and value projections of grouped-query attention at their true width, all three matrices of
a gated feed-forward layer, and the logits of one token. Attention counts all `n x n` pairs, as dense implementations
compute them; `causal=True` counts the lower triangle only. Norms, activations, softmax, rotary embeddings and embedding
look-ups are left out; they are below one per cent, and `torch.utils.flop_counter` agrees within that per cent.

Published tables count the language model by other conventions; `CONVENTIONS` has three of them, so that a table can be
compared with its own kind. Encoder and projector are always counted as in `exact`. `vtc.eval.estimate` puts the parts
of a whole prompt together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vtc.errors import UnsupportedModelError, VtcError, did_you_mean

CONVENTION = "exact"
# Decoders whose feed-forward layer has two matrices; all others have a third one for the gate.
UNGATED = frozenset({"opt", "phi", "starcoder2"})
# Names under which mixture-of-experts configs keep the number of experts.
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


@dataclass(frozen=True)
class Count:
    """An amount of work.

    Attributes:
        macs: multiply-adds of matrix products.
        other: element-wise operations; only the convention `llm_viewer` counts any.
    """

    macs: int = 0
    other: int = 0

    @property
    def flops(self) -> int:
        """Two for each multiply-add."""
        return 2 * self.macs + self.other

    def __add__(self, more: Count) -> Count:
        return Count(self.macs + more.macs, self.other + more.other)

    def __mul__(self, times: int) -> Count:
        return Count(self.macs * times, self.other * times)

    def to_dict(self) -> dict[str, int]:
        return {"macs": self.macs, "flops": self.flops}


@dataclass(frozen=True)
class Convention:
    """One way to count the work of a decoder."""

    summary: str
    prints: str  # what papers of this convention print under the name FLOPs
    logits: bool  # whether one row of logits counts


# n tokens, width d, feed-forward width m, H heads and G key heads.
CONVENTIONS = {
    "exact": Convention("the matrix products that the model runs", "flops", logits=True),
    "fastv": Convention(
        "4 n d^2 + 2 n^2 d + 2 n d m per layer: as if without grouped queries and gate, no logits", "macs", logits=False
    ),
    "three_matrix": Convention(
        "4 n d^2 + 2 n^2 d + 3 n d m per layer: as if without grouped queries, no logits", "macs", logits=False
    ),
    "llm_viewer": Convention(
        "2 n (2 d^2 + 2 d^2 G/H + 3 d m) + 4 n^2 d + 5 H n^2 + 18 n d per layer: with softmax, norms and sums",
        "flops",
        logits=True,
    ),
}


def convention_of(name: str) -> Convention:
    """Look a convention up."""
    if name not in CONVENTIONS:
        raise VtcError(
            f"unknown convention '{name}'{did_you_mean(name, CONVENTIONS)}; there are {', '.join(CONVENTIONS)}"
        )
    return CONVENTIONS[name]


# ------------------------------------------------------------------------------------------------------ language model


@dataclass(frozen=True)
class Decoder:
    """The sizes of a decoder that its FLOPs and its cache depend on."""

    layers: int
    width: int
    heads: int
    key_heads: int
    head_width: int
    inner: int  # width of the feed-forward layer
    matrices: int  # of the feed-forward layer
    vocabulary: int

    @classmethod
    def of(cls, config: Any) -> Decoder:
        """Read a text config (`LlamaConfig`, `Qwen2Config`, ...)."""
        experts = next((name for name in EXPERTS if getattr(config, name, None)), None)
        if experts:
            raise UnsupportedModelError(
                f"no closed form for the FLOPs of {config.model_type}: it is a mixture of experts ({experts})"
            )
        heads = config.num_attention_heads
        return cls(
            layers=config.num_hidden_layers,
            width=config.hidden_size,
            heads=heads,
            key_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_width=getattr(config, "head_dim", None) or config.hidden_size // heads,
            inner=getattr(config, "intermediate_size", None) or config.ffn_dim,  # OPT has its own name
            matrices=2 if config.model_type in UNGATED else 3,
            vocabulary=config.vocab_size,
        )

    def layer(self, queries: int, pairs: int, convention: str = CONVENTION) -> Count:
        """One layer on `queries` tokens that look at `pairs` keys in all."""
        width, inner, attended = self.width, self.inner, self.heads * self.head_width
        projections = 2 * width * self.head_width * (self.heads + self.key_heads)  # q and o, k and v
        # Two products per pair: query with key, probability with value.
        if convention == "fastv":
            return Count(queries * (4 * width**2 + 2 * width * inner) + 2 * pairs * width)
        if convention == "three_matrix":
            return Count(queries * (4 * width**2 + 3 * width * inner) + 2 * pairs * width)
        macs = queries * (projections + self.matrices * width * inner) + 2 * pairs * attended
        if convention == "llm_viewer":
            # Softmax; then per token two norms of 7 operations, two residual sums, and an activation of 2.
            return Count(macs, other=5 * self.heads * pairs + queries * width * (2 * 7 + 2 * 1 + 2))
        return Count(macs)

    def each(self, lengths: int | Sequence[int], what: str) -> list[int]:
        """One length per layer."""
        each = [lengths] * self.layers if isinstance(lengths, int) else list(lengths)
        if len(each) != self.layers:
            raise ValueError(f"{what} lists {len(each)} lengths for {self.layers} layers")
        return each


def prefill(
    text_config: Any,
    tokens: int | Sequence[int],
    *,
    convention: str = CONVENTION,
    causal: bool = False,
    lm_head_tokens: int | None = None,
) -> Count:
    """Work of a decoder that reads a prompt.

    Args:
        text_config: the config of the language model.
        tokens: length of the sequence, text included: one number, or one per layer if layers see different lengths.
        convention: one of `CONVENTIONS`.
        causal: count only the pairs a causal mask leaves, as implementations do that skip the others; `exact` only.
        lm_head_tokens: number of tokens whose logits are computed; generation needs one, which is the default of
            conventions that count logits. The others have none.
    """
    decoder, logits = Decoder.of(text_config), convention_of(convention).logits
    if causal and convention != CONVENTION:
        raise VtcError(f"convention {convention} counts all pairs of tokens; a causal count is only defined for exact")
    total = Count(int(logits if lm_head_tokens is None else lm_head_tokens) * decoder.width * decoder.vocabulary)
    for n in decoder.each(tokens, "tokens"):
        total += decoder.layer(n, n * (n + 1) // 2 if causal else n * n, convention)
    return total


def decode(text_config: Any, context: int | Sequence[int], *, convention: str = CONVENTION) -> Count:
    """Work of generating one token that looks at `context` keys, itself included: one number, or one per layer."""
    decoder, logits = Decoder.of(text_config), convention_of(convention).logits
    total = Count(int(logits) * decoder.width * decoder.vocabulary)
    for keys in decoder.each(context, "context"):
        total += decoder.layer(1, keys, convention)
    return total


def prefill_flops(
    text_config: Any,
    tokens: int | Sequence[int],
    *,
    lm_head_tokens: int | None = None,
    causal: bool = False,
    convention: str = CONVENTION,
) -> int:
    """FLOPs of a decoder that reads a prompt; arguments as for `prefill`."""
    count = prefill(text_config, tokens, convention=convention, causal=causal, lm_head_tokens=lm_head_tokens)
    return count.flops


def decode_flops(text_config: Any, context: int | Sequence[int], *, convention: str = CONVENTION) -> int:
    """FLOPs of generating one token; arguments as for `decode`."""
    return decode(text_config, context, convention=convention).flops


def kv_cache_bytes(text_config: Any, tokens: int | Sequence[int], dtype: torch.dtype) -> int:
    """Bytes of keys and values of one sequence; `tokens` as for `prefill`."""
    decoder = Decoder.of(text_config)
    entries = tokens * decoder.layers if isinstance(tokens, int) else sum(tokens)
    return entries * 2 * decoder.key_heads * decoder.head_width * dtype.itemsize


# --------------------------------------------------------------------------------------------- encoder and projector

PACKED = ("qwen2_vl_vision", "qwen2_5_vl_vision", "qwen3_vl_vision")


def encoder(
    vision_config: Any,
    *,
    images: int = 1,
    layers: int | None = None,
    grid: tuple[int, int, int] | None = None,
) -> Count:
    """Work of a vision tower, without its projector.

    Args:
        vision_config: of a CLIP, SigLIP or InternVL tower, which looks at views of one size, or of a Qwen2-VL, -2.5-VL
            or -3-VL tower, which looks at a grid of patches.
        images: number of images, crops or frames; for Qwen, of inputs with this grid.
        layers: number of layers that run; `None` for all, with SigLIP's pooling head if it has one.
        grid: for Qwen, frames, rows and columns of visual tokens; a token is a square of patches.
    """
    if vision_config.model_type in PACKED:
        if grid is None:
            raise VtcError(f"{vision_config.model_type} looks at a grid: give frames, rows and columns of tokens")
        return _packed_encoder(vision_config, grid, layers) * images
    width, inner = vision_config.hidden_size, vision_config.intermediate_size
    patches = per_edge(vision_config) ** 2
    siglip = "siglip" in vision_config.model_type
    tokens = patches + (0 if siglip else 1)  # the class token of CLIP and InternVL
    run = vision_config.num_hidden_layers if layers is None else layers
    total = patches * vision_config.num_channels * _edge(vision_config.patch_size) ** 2 * width
    total += run * (tokens * (4 * width**2 + 2 * width * inner) + 2 * tokens**2 * width)
    if siglip and layers is None and getattr(vision_config, "vision_use_head", True):
        # One learnt query looks at all tokens: q and o for one token, k and v for all, then an MLP on one token.
        total += 2 * width**2 + tokens * 2 * width**2 + 2 * tokens * width + 2 * width * inner
    return Count(total * images)


def _packed_encoder(config: Any, grid: tuple[int, int, int], layers: int | None) -> Count:
    """Work of a Qwen tower on one image or clip; patches look at the patches of their own frame, or window."""
    frames, rows, columns = grid[0], grid[1] * config.spatial_merge_size, grid[2] * config.spatial_merge_size
    width = getattr(config, "embed_dim", None) or config.hidden_size
    inner = int(width * config.mlp_ratio) if hasattr(config, "mlp_ratio") else config.intermediate_size
    matrices = 3 if config.model_type == "qwen2_5_vl_vision" else 2
    depth = config.depth if layers is None else layers
    patches, everything = frames * rows * columns, frames * (rows * columns) ** 2
    pairs = depth * everything
    if config.model_type == "qwen2_5_vl_vision":
        unit = config.spatial_merge_size * _edge(config.patch_size)
        side = config.window_size // unit * config.spatial_merge_size  # of a window, in patches
        within = frames * _squares(rows, side) * _squares(columns, side)
        full = sum(index < depth for index in config.fullatt_block_indexes)
        pairs = full * everything + (depth - full) * within
    embed = config.in_channels * config.temporal_patch_size * _edge(config.patch_size) ** 2 * width
    layer = 4 * width**2 + matrices * width * inner
    return Count(patches * (embed + depth * layer) + 2 * pairs * width)


def _squares(length: int, side: int) -> int:
    """Sum of squares of the lengths of windows of `side` that cover `length`; the last may be shorter."""
    return length // side * side**2 + (length % side) ** 2


def projector(config: Any, tokens: int) -> Count:
    """Work of the projector, from the config of the whole model.

    Args:
        config: of a LLaVA of any kind, an InternVL or a Qwen-VL.
        tokens: number of rows that it computes. LLaVA-OneVision pools a clip's tokens only after the projector.
    """
    vision = config.vision_config
    if vision.model_type in PACKED:
        width = (getattr(vision, "embed_dim", None) or vision.hidden_size) * vision.spatial_merge_size**2
        out = vision.hidden_size if vision.model_type == "qwen2_vl_vision" else vision.out_hidden_size
        mergers = 1 + len(getattr(vision, "deepstack_visual_indexes", ()))
        return Count(mergers * tokens * (width * width + width * out))
    levels = getattr(config, "vision_feature_layer", -1)
    width = vision.hidden_size * (1 if isinstance(levels, int) else len(levels))
    if hasattr(config, "downsample_ratio"):  # pixels of a square become one row
        width *= int(1 / config.downsample_ratio) ** 2
    out = config.text_config.hidden_size
    return Count(tokens * (width * out + out * out))


def encoder_flops(
    vision_config: Any, *, images: int = 1, layers: int | None = None, grid: tuple[int, int, int] | None = None
) -> int:
    """FLOPs of a vision tower; arguments as for `encoder`."""
    return encoder(vision_config, images=images, layers=layers, grid=grid).flops


def projector_flops(config: Any, tokens: int) -> int:
    """FLOPs of the projector; arguments as for `projector`."""
    return projector(config, tokens).flops


def _edge(size: int | Sequence[int]) -> int:
    return size if isinstance(size, int) else size[0]


def per_edge(vision_config: Any) -> int:
    """Patches along the edge of one view."""
    return _edge(vision_config.image_size) // _edge(vision_config.patch_size)


def human(count: float) -> str:
    """A count with its SI letter: `1.23 G`."""
    if not count:
        return "0"
    count = float(f"{count:.3g}")  # first of all, so that 999.9 k is 1 M
    power = min(5, max(0, int(math.log10(abs(count)) // 3)))
    return f"{count / 1000**power:g} {('', 'k', 'M', 'G', 'T', 'P')[power]}".rstrip()
