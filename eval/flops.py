"""FLOPs in closed form, from a Hugging Face config alone: no weights, no forward pass.

The convention is `exact`: a multiply-add counts as two FLOPs, and exactly the matrix products that the model runs are
counted, with the key and value projections of grouped-query attention at their true width and all three matrices of a
gated feed-forward layer. Attention counts all `n x n` pairs, as dense implementations compute them; `causal=True`
counts the lower triangle only. Norms, activations, softmax, rotary embeddings and embedding look-ups are left out; they
are below one per cent, and `torch.utils.flop_counter` agrees within that per cent.

Published tables often use other conventions (multiply-adds instead of FLOPs, two feed-forward matrices, visual tokens
without the text), so compare ratios with them, not values.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vtc.errors import UnsupportedModelError

CONVENTION = "exact"
# Decoders whose feed-forward layer has two matrices; all others have a third one for the gate.
UNGATED = frozenset({"opt", "phi", "starcoder2"})
# Names under which mixture-of-experts configs keep the number of experts.
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


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

    @property
    def weights_per_layer(self) -> int:
        """Entries of the matrices that each token is multiplied with in one layer."""
        projections = 2 * self.width * self.head_width * (self.heads + self.key_heads)  # q and o, k and v
        return projections + self.matrices * self.width * self.inner

    def layer(self, queries: int, pairs: int) -> int:
        """FLOPs of one layer on `queries` tokens that look at `pairs` keys in all."""
        # Two products per pair: query with key, probability with value.
        return 2 * queries * self.weights_per_layer + 2 * 2 * pairs * self.heads * self.head_width


def prefill_flops(
    text_config: Any, tokens: int | Sequence[int], *, lm_head_tokens: int = 1, causal: bool = False
) -> int:
    """FLOPs of a decoder that reads a prompt.

    Args:
        text_config: the config of the language model.
        tokens: length of the sequence, text included: one number, or one per layer if layers see different lengths.
        lm_head_tokens: number of tokens whose logits are computed; generation needs one.
        causal: count only the pairs a causal mask leaves, as implementations do that skip the others.
    """
    decoder = Decoder.of(text_config)
    lengths = [tokens] * decoder.layers if isinstance(tokens, int) else list(tokens)
    if len(lengths) != decoder.layers:
        raise ValueError(f"tokens lists {len(lengths)} lengths for {decoder.layers} layers")
    layers = sum(decoder.layer(n, n * (n + 1) // 2 if causal else n * n) for n in lengths)
    return layers + 2 * lm_head_tokens * decoder.width * decoder.vocabulary


def decode_flops(text_config: Any, context: int | Sequence[int]) -> int:
    """FLOPs of generating one token that looks at `context` keys, itself included: one number, or one per layer."""
    decoder = Decoder.of(text_config)
    contexts = [context] * decoder.layers if isinstance(context, int) else list(context)
    if len(contexts) != decoder.layers:
        raise ValueError(f"context lists {len(contexts)} lengths for {decoder.layers} layers")
    return sum(decoder.layer(1, keys) for keys in contexts) + 2 * decoder.width * decoder.vocabulary


def kv_cache_bytes(text_config: Any, tokens: int | Sequence[int], dtype: torch.dtype) -> int:
    """Bytes of keys and values of one sequence; `tokens` as for `prefill_flops`."""
    decoder = Decoder.of(text_config)
    entries = tokens * decoder.layers if isinstance(tokens, int) else sum(tokens)
    return entries * 2 * decoder.key_heads * decoder.head_width * dtype.itemsize


def encoder_flops(vision_config: Any, *, images: int = 1, layers: int | None = None) -> int:
    """FLOPs of a CLIP or SigLIP tower.

    Args:
        vision_config: `CLIPVisionConfig` or `SiglipVisionConfig`.
        images: number of images, or of crops.
        layers: number of layers that run; `None` for all, with SigLIP's pooling head if it has one.
    """
    width, inner = vision_config.hidden_size, vision_config.intermediate_size
    patches = (vision_config.image_size // vision_config.patch_size) ** 2
    siglip = "siglip" in vision_config.model_type
    tokens = patches + (0 if siglip else 1)  # CLIP's class token
    depth = vision_config.num_hidden_layers
    run = depth if layers is None else layers
    embed = 2 * patches * vision_config.num_channels * vision_config.patch_size**2 * width
    layer = 2 * tokens * (4 * width**2 + 2 * width * inner) + 2 * 2 * tokens**2 * width
    total = embed + run * layer
    if siglip and layers is None and getattr(vision_config, "vision_use_head", True):
        # One learnt query looks at all tokens: q and o for one token, k and v for all, then an MLP on one token.
        total += 2 * (2 * width**2 + tokens * 2 * width**2) + 2 * 2 * tokens * width + 2 * 2 * width * inner
    return images * total


def projector_flops(config: Any, tokens: int) -> int:
    """FLOPs of the two-layer projector of a LLaVA, from the config of the whole model; `tokens` visual tokens."""
    levels = config.vision_feature_layer
    width = config.vision_config.hidden_size * (1 if isinstance(levels, int) else len(levels))
    out = config.text_config.hidden_size
    return 2 * tokens * (width * out + out * out)


def human(count: float) -> str:
    """A count with its SI letter: `1.23 G`."""
    if not count:
        return "0"
    power = min(5, max(0, int(math.log10(abs(count)) // 3)))
    return f"{count / 1000**power:.3g} {('', 'k', 'M', 'G', 'T', 'P')[power]}".rstrip()
