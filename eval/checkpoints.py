"""The architectures of usual checkpoints, by name and without a download: configs, and models with random weights.

    from vtc.eval import checkpoints

    config = checkpoints.config("llava-1.5-7b")  # for FLOPs
    model = checkpoints.random_weights("llava-onevision-0.5b", dtype=torch.bfloat16)  # for time and memory

The sizes are facts from the checkpoints' own `config.json` files; what is not named has the default of transformers.
`llava-video-7b` has no class of its own in transformers: it is written down as the LLaVA-OneVision that it was trained
from, which pools its frames to 14 x 14 tokens instead of 13 x 13.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vtc.errors import UnsupportedModelError, did_you_mean
from vtc.zoo import torchvision

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

Sizes = dict[str, Any]

# ---------------------------------------------------------------------------------------------------- vision encoders

CLIP_L_336: Sizes = dict(
    model_type="clip_vision_model", hidden_size=1024, intermediate_size=4096, num_hidden_layers=24,
    num_attention_heads=16, image_size=336, patch_size=14, projection_dim=768,
)  # fmt: skip
SIGLIP_SO400M_384: Sizes = dict(
    model_type="siglip_vision_model", hidden_size=1152, intermediate_size=4304, num_hidden_layers=26,
    num_attention_heads=16, image_size=384, patch_size=14, vision_use_head=False,
)  # fmt: skip
INTERNVIT_300M: Sizes = dict(
    model_type="internvl_vision", hidden_size=1024, intermediate_size=4096, num_hidden_layers=24,
    num_attention_heads=16, image_size=448, patch_size=14, attention_bias=True,
)  # fmt: skip
INTERNVIT_6B: Sizes = dict(
    model_type="internvl_vision", hidden_size=3200, intermediate_size=12800, num_hidden_layers=45,
    num_attention_heads=25, image_size=448, patch_size=14, norm_type="rms_norm", use_qk_norm=True,
)  # fmt: skip


def _qwen2_vit(out: int) -> Sizes:
    return dict(
        model_type="qwen2_vl_vision", depth=32, embed_dim=1280, num_heads=16, mlp_ratio=4, patch_size=14,
        hidden_size=out,
    )  # fmt: skip


def _qwen25_vit(out: int, inner: int = 3420) -> Sizes:
    return dict(
        model_type="qwen2_5_vl_vision", depth=32, hidden_size=1280, intermediate_size=inner, num_heads=16,
        patch_size=14, window_size=112, fullatt_block_indexes=[7, 15, 23, 31], tokens_per_second=2,
        out_hidden_size=out,
    )  # fmt: skip


def _qwen3_vit(
    out: int, depth: int = 24, width: int = 1024, inner: int = 4096, stack: tuple[int, ...] = (5, 11, 17)
) -> Sizes:
    return dict(
        model_type="qwen3_vl_vision", depth=depth, hidden_size=width, intermediate_size=inner, num_heads=16,
        patch_size=16, deepstack_visual_indexes=list(stack), out_hidden_size=out,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------- language models


def _text(
    kind: str, width: int, inner: int, layers: int, heads: int, key_heads: int, vocabulary: int, **others: Any
) -> Sizes:
    return dict(
        model_type=kind, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=key_heads, vocab_size=vocabulary, **others,
    )  # fmt: skip


def _vicuna(width: int, inner: int, layers: int) -> Sizes:
    heads = width // 128
    return _text(
        "llama", width, inner, layers, heads, heads, 32064, max_position_embeddings=4096, rms_norm_eps=1e-5
    )  # fmt: skip


VICUNA_7B, VICUNA_13B = _vicuna(4096, 11008, 32), _vicuna(5120, 13824, 40)
MISTRAL_7B = _text(
    "mistral", 4096, 14336, 32, 32, 8, 32064, max_position_embeddings=32768, rms_norm_eps=1e-5, sliding_window=None,
    rope_parameters=dict(rope_type="default", rope_theta=1e6),
)  # fmt: skip
# Width, feed-forward width, layers, heads, key heads of Qwen2 and Qwen2.5.
QWEN2 = {
    "0.5b": (896, 4864, 24, 14, 2),
    "1.5b": (1536, 8960, 28, 12, 2),
    "3b": (2048, 11008, 36, 16, 2),
    "7b": (3584, 18944, 28, 28, 4),
    "14b": (5120, 13824, 48, 40, 8),
    "32b": (5120, 27648, 64, 40, 8),
    "72b": (8192, 29568, 80, 64, 8),
}


def _qwen2(size: str, vocabulary: int, kind: str = "qwen2", **others: Any) -> Sizes:
    rope = dict(rope_type="default", rope_theta=1e6)
    if kind != "qwen2":
        rope["mrope_section"] = [16, 24, 24]
    return _text(
        kind, *QWEN2[size], vocabulary, max_position_embeddings=32768, rms_norm_eps=1e-6, rope_parameters=rope, **others
    )


def _qwen3(width: int, inner: int, layers: int, heads: int) -> Sizes:
    rope = dict(rope_type="default", rope_theta=5e6, mrope_section=[24, 20, 20], mrope_interleaved=True)
    return _text(
        "qwen3_vl_text", width, inner, layers, heads, 8, 151936, head_dim=128, max_position_embeddings=262144,
        rms_norm_eps=1e-6, rope_parameters=rope,
    )  # fmt: skip


# --------------------------------------------------------------------------------------------------------- checkpoints


def _model(kind: str, vision: Sizes, text: Sizes, tied: bool = False, **others: Any) -> Sizes:
    text = {**text, "tie_word_embeddings": tied}
    return dict(model_type=kind, vision_config=vision, text_config=text, tie_word_embeddings=tied, **others)


def _onevision(size: str, vocabulary: int, tied: bool = False) -> Sizes:
    return _model("llava_onevision", SIGLIP_SO400M_384, _qwen2(size, vocabulary), tied)


def _qwen2_vl(size: str, vocabulary: int, tied: bool = False) -> Sizes:
    return _model("qwen2_vl", _qwen2_vit(QWEN2[size][0]), _qwen2(size, vocabulary, "qwen2_vl_text"), tied)


def _qwen25_vl(size: str, vocabulary: int, inner: int = 3420, tied: bool = False) -> Sizes:
    vision = _qwen25_vit(QWEN2[size][0], inner)
    return _model("qwen2_5_vl", vision, _qwen2(size, vocabulary, "qwen2_5_vl_text"), tied)


def _internvl(size: str, vision: Sizes = INTERNVIT_300M) -> Sizes:
    return _model("internvl", vision, _qwen2(size, 151674), image_token_id=151667)


CHECKPOINTS: dict[str, Sizes] = {
    "llava-1.5-7b": _model("llava", CLIP_L_336, VICUNA_7B, image_token_index=32000),
    "llava-1.5-13b": _model("llava", CLIP_L_336, VICUNA_13B, image_token_index=32000),
    "llava-next-7b": _model("llava_next", CLIP_L_336, VICUNA_7B),
    "llava-next-mistral-7b": _model("llava_next", CLIP_L_336, MISTRAL_7B),
    "llava-next-13b": _model("llava_next", CLIP_L_336, VICUNA_13B),
    "llava-next-video-7b": _model("llava_next_video", CLIP_L_336, VICUNA_7B),
    "llava-onevision-0.5b": _onevision("0.5b", 152000, tied=True),
    "llava-onevision-7b": _onevision("7b", 152128),
    "llava-onevision-72b": _onevision("72b", 152128),
    "llava-video-7b": _onevision("7b", 152064),
    "qwen2-vl-2b": _qwen2_vl("1.5b", 151936, tied=True),
    "qwen2-vl-7b": _qwen2_vl("7b", 152064),
    "qwen2-vl-72b": _qwen2_vl("72b", 152064),
    "qwen2.5-vl-3b": _qwen25_vl("3b", 151936, tied=True),
    "qwen2.5-vl-7b": _qwen25_vl("7b", 152064),
    "qwen2.5-vl-32b": _qwen25_vl("32b", 152064, inner=3456),
    "qwen2.5-vl-72b": _qwen25_vl("72b", 152064, inner=3456),
    "qwen3-vl-2b": _model("qwen3_vl", _qwen3_vit(2048), _qwen3(2048, 6144, 28, 16), tied=True),
    "qwen3-vl-4b": _model("qwen3_vl", _qwen3_vit(2560), _qwen3(2560, 9728, 36, 32), tied=True),
    "qwen3-vl-8b": _model(
        "qwen3_vl", _qwen3_vit(4096, 27, 1152, 4304, (8, 16, 24)), _qwen3(4096, 12288, 36, 32)
    ),
    "internvl2.5-1b": _internvl("0.5b"),
    "internvl2.5-4b": _internvl("3b"),
    "internvl2.5-38b": _internvl("32b", INTERNVIT_6B),
    "internvl2.5-78b": _internvl("72b", INTERNVIT_6B),
    "internvl3-1b": _internvl("0.5b"),
    "internvl3-2b": _internvl("1.5b"),
    "internvl3-8b": _internvl("7b"),
    "internvl3-14b": _internvl("14b"),
    "internvl3-38b": _internvl("32b", INTERNVIT_6B),
    "internvl3-78b": _internvl("72b", INTERNVIT_6B),
}  # fmt: skip


def available() -> tuple[str, ...]:
    """Names of the bundled configs."""
    return tuple(CHECKPOINTS)


def config(name: str | Path) -> PreTrainedConfig:
    """The config of a bundled checkpoint, or of a folder with a `config.json`.

    Raises:
        UnsupportedModelError: there is neither.
    """
    torchvision.mend()  # before transformers looks for it
    from transformers import AutoConfig

    if str(name) in CHECKPOINTS:
        return AutoConfig.for_model(**CHECKPOINTS[str(name)])
    if (Path(name) / "config.json").is_file():
        return AutoConfig.from_pretrained(Path(name))
    raise UnsupportedModelError(
        f"no bundled config and no folder with a config.json: '{name}'{did_you_mean(str(name), CHECKPOINTS)}; "
        f"bundled: {', '.join(CHECKPOINTS)}"
    )


def random_weights(
    name: str | Path, *, dtype: torch.dtype = torch.bfloat16, device: str | torch.device = "cpu", **options: Any
) -> Any:
    """A model of that architecture with random weights, in evaluation mode: for time and memory, not for answers.

    Weights are drawn as for training from scratch, in `dtype` from the start, so that memory is taken once.

    Args:
        name: as for `config`.
        dtype: of all weights.
        device: where they are; `"meta"` for a model that takes no memory and cannot run.
        options: for the model's constructor, for example `attn_implementation="eager"`.
    """
    sizes = config(name)
    from transformers import AutoModelForImageTextToText

    with torch.device(device):
        return AutoModelForImageTextToText.from_config(sizes, dtype=dtype, **options).eval()
