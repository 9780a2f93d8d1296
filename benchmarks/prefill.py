"""Time to first token of a LLaVA-1.5 of ordinary size, with random weights: what compression saves where it matters.

    python benchmarks/prefill.py --size 1b --out benchmarks/prefill.md

Selection looks at sizes and numbers, not at meaning, so random weights cost what trained ones cost. Every line is
measured in turns with the uncompressed model (see `vtc.eval.latency`); read the ratios, not the milliseconds.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import sys
from functools import partial
from pathlib import Path
from typing import Any

# A script's folder is where Python looks first, and there torch might take a file for a library it knows.
if Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    sys.path.pop(0)

import torch
import transformers
from tabulate import tabulate

import vtc
from vtc.eval import latency
from vtc.eval.conditions import device_name
from vtc.zoo import torchvision

IMAGE = 5
SIZES: dict[str, dict[str, int]] = {
    "1b": dict(
        hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32, num_key_value_heads=4
    ),
    "7b": dict(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=32
    ),
}  # fmt: skip


def build(size: str, dtype: torch.dtype, device: str) -> Any:
    """LLaVA-1.5 with the CLIP ViT-L/14-336 tower and a Llama of the given size."""
    torchvision.mend()  # before transformers looks for it
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336,
        patch_size=14, projection_dim=768,
    )  # fmt: skip
    text = LlamaConfig(**SIZES[size], vocab_size=32064, max_position_embeddings=4096)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE)
    with torch.device(device):
        default = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            model = LlavaForConditionalGeneration(config)
        finally:
            torch.set_default_dtype(default)
    return model.eval()


def inputs(model: Any, text: int) -> dict[str, torch.Tensor]:
    """One prompt with one picture and `text` other tokens."""
    visual = model.config.vision_config.image_size // model.config.vision_config.patch_size
    words = torch.randint(10, 1000, (1, text), device=model.device)
    picture = torch.full((1, visual * visual), IMAGE, device=model.device)
    ids = torch.cat([words[:, : text // 2], picture, words[:, text // 2 :]], dim=1)
    side = model.config.vision_config.image_size
    return {"input_ids": ids, "pixel_values": torch.randn(1, 3, side, side, dtype=model.dtype, device=model.device)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="1b")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--spec", action="append", help="a strategy; repeat it for more")
    parser.add_argument("--keep", default="144,64")
    parser.add_argument("--text", type=int, default=44, help="tokens of the prompt that are not visual")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()

    torch.manual_seed(0)
    model = build(options.size, getattr(torch, options.dtype), options.device)
    prompt = inputs(model, options.text)
    rows = []
    for spec in options.spec or ["random", "fastervlm", "divprune", "todre"]:
        for keep in options.keep.split(","):
            setting = partial(vtc.compress, model, f"{spec}:keep={keep}")
            found = latency.measure(model, prompt, setting, repeats=options.repeats, warmup=1, decode_tokens=2)
            short = found.ttft_ms - found.encoder_ms - found.projector_ms
            rows.append(
                {
                    "strategy": spec,
                    "keep": keep,
                    "TTFT ms": f"{found.ttft_ms:.0f}",
                    "all tokens ms": f"{found.baseline_ttft_ms:.0f}",
                    "speed-up": f"{found.ttft_speedup:.2f}x",
                    "of which encoder ms": f"{found.encoder_ms:.0f}",
                    "selection ms": f"{found.selection_ms:.1f}",
                    "selection / compressed prefill": f"{100 * found.selection_ms / short:.1f} %",
                    "TTFT / ideal": f"{found.ttft_ms / found.ideal_ttft_ms:.2f}",
                }
            )
            print(rows[-1], flush=True)
    length = prompt["input_ids"].shape[1]
    conditions = (
        f"LLaVA-1.5 with a {options.size.upper()} Llama, random weights, prompts of {length} tokens, {options.text} of "
        f"them text; {device_name(model.device)}, {torch.get_num_threads()} threads, {options.dtype}; "
        f"vtc {vtc.__version__}, torch {torch.__version__}, transformers {transformers.__version__}, "
        f"python {platform.python_version()}; {datetime.date.today().isoformat()}"
    )
    table = f"{conditions}\n\n{tabulate(rows, headers='keys', tablefmt='github')}\n"
    print(table)
    if options.out:
        options.out.write_text(table)


if __name__ == "__main__":
    main()
