"""What compression itself costs: LLaVA-OneVision-0.5B with random weights, reading a clip on a CPU.

    python benchmarks/onevision.py --out benchmarks/onevision.md

In each repeat the uncompressed model reads the clip, then the model compressed by each strategy in turn, each followed
by the bare language model on random embeddings of the same short length. Two ratios per strategy:

- *overhead*: selection and hooks, as a share of the compressed prefill. The prefill is everything after the projector,
  and the hooks inside the encoder. The overhead is what this takes longer than the bare language model, beyond what the
  uncompressed model spends around its language model as well. The goal is below 5 %.
- *fall / ideal*: how far the time to first token falls, as a share of how far it would fall if the tokens had never
  been there. The encoder itself is the same in both, and dwarfs them on a CPU; it is left out, as its noise would hide
  them. The goal is 0.9 and more.

Selection looks at sizes and numbers, not at meaning, so random weights cost what trained ones cost. On four idle cores
this takes about ten minutes, nearly all of it in the encoder.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

# A script's folder is where Python looks first, and there torch might take a file for a library it knows.
if Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    sys.path.pop(0)

import torch
import transformers
from tabulate import tabulate
from torch import nn

import vtc
from vtc.adapters import find
from vtc.eval import latency
from vtc.eval.checkpoints import random_weights
from vtc.eval.conditions import device_name
from vtc.eval.estimate import frame_tokens

MODEL = "llava-onevision-0.5b"
SPECS = ("uniform", "fastervlm:saliency=received", "divprune", "holitom")


def inputs(model: Any, frames: int, text: int) -> dict[str, torch.Tensor]:
    """One prompt with one clip and `text` other tokens."""
    config = model.config
    tokens = frames * frame_tokens(config) + 1  # one newline after the clip
    words = torch.randint(10, 1000, (1, text), device=model.device)
    clip = torch.full((1, tokens), config.video_token_index, device=model.device)
    side = config.vision_config.image_size
    return {
        "input_ids": torch.cat([words[:, : text // 2], clip, words[:, text // 2 :]], dim=1),
        "pixel_values_videos": torch.randn(1, frames, 3, side, side, dtype=model.dtype, device=model.device),
    }


def after_projector(run: latency.Run) -> float:
    """Milliseconds of everything but encoder and projector."""
    return run.ttft - run.parts["encoder"] - run.parts["projector"]


@contextmanager
def hook_times(module: nn.Module) -> Iterator[list[float]]:
    """Milliseconds of each run of the forward hooks that parts of `module` have by now."""
    spent: list[float] = []
    begin: dict[nn.Module, float] = {}

    def start(part: nn.Module, *_: object) -> None:
        begin[part] = time.perf_counter()

    def stop(part: nn.Module, *_: object) -> None:
        spent.append(1000 * (time.perf_counter() - begin[part]))

    hooked = [part for part in module.modules() if part._forward_hooks]
    handles = [part.register_forward_hook(start, prepend=True) for part in hooked]
    handles += [part.register_forward_hook(stop) for part in hooked]
    try:
        yield spent
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class Round:
    """One measurement of one strategy; milliseconds."""

    full: latency.Run  # uncompressed
    ours: latency.Run
    tapped: float  # by hooks inside the encoder
    bare: float  # the language model alone, on a short sequence

    @property
    def before(self) -> float:
        return after_projector(self.full)

    @property
    def after(self) -> float:
        return after_projector(self.ours) + self.tapped

    @property
    def added(self) -> float:
        """Selection, and hooks inside the encoder, by the clock."""
        return self.ours.parts["selection"] + self.tapped

    @property
    def ideal(self) -> float:
        """The bare language model, and what the uncompressed model does around its own."""
        return self.before - self.full.parts["prefill"] + self.bare


def measure(model: Any, prompt: dict[str, torch.Tensor], specs: list[str], repeats: int) -> dict[str, list[Round]]:
    """The rounds of every strategy; all of one repeat share their uncompressed run."""
    rounds: dict[str, list[Round]] = {spec: [] for spec in specs}
    for repeat in range(repeats):
        full = latency.run(model, prompt)
        for spec in specs:
            with vtc.compress(model, spec), hook_times(find(model).encoder) as times:
                ours = latency.run(model, prompt)
            rounds[spec].append(Round(full, ours, sum(times), latency.bare_prefill(model, 1, ours.length)))
            print(f"repeat {repeat + 1} of {repeats}: {spec}, {ours.ttft / 1000:.1f} s", file=sys.stderr, flush=True)
    return rounds


def row(spec: str, rounds: list[Round]) -> dict[str, str]:
    """One row of the table."""
    return {
        "strategy": spec,
        "sequence": f"{rounds[0].full.length} → {rounds[0].ours.length}",
        "encoder, s": f"{median(one.ours.parts['encoder'] - one.tapped for one in rounds) / 1000:.2f}",
        "prefill, all tokens, s": f"{median(one.before for one in rounds) / 1000:.2f}",
        "compressed, s": f"{median(one.after for one in rounds) / 1000:.3f}",
        "ideal, s": f"{median(one.ideal for one in rounds) / 1000:.3f}",
        "selection, ms": f"{median(one.ours.parts['selection'] for one in rounds):.1f}",
        "hooks in the encoder, ms": f"{median(one.tapped for one in rounds):.1f}",
        "both / compressed": f"{100 * median(one.added / one.after for one in rounds):.1f} %",
        "overhead": f"{100 * median((one.after - one.ideal) / one.after for one in rounds):.1f} %",
        "fall / ideal": f"{median((one.before - one.after) / (one.before - one.ideal) for one in rounds):.3f}",
        "TTFT speed-up": f"{median(one.full.ttft / one.ours.ttft for one in rounds):.2f}x",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--spec", action="append", metavar="SPEC", help=f"repeat it for more (default: {SPECS})")
    parser.add_argument("--keep", default="0.15", help="budget of the default specs (default: %(default)s)")
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--text", type=int, default=44, help="tokens of the prompt that are not visual")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()

    torch.manual_seed(0)
    model = random_weights(MODEL, dtype=getattr(torch, options.dtype))
    prompt = inputs(model, options.frames, options.text)
    specs = options.spec or [f"{spec}{',' if ':' in spec else ':'}keep={options.keep}" for spec in SPECS]
    measure(model, inputs(model, 1, options.text), specs, 1)  # warms up
    found = measure(model, prompt, specs, options.repeats)
    rows = [row(spec, rounds) for spec, rounds in found.items()]
    conditions = (
        f"{MODEL} with random weights, a clip of {options.frames} frames and {options.text} tokens of text; medians of "
        f"{options.repeats} repeats; {device_name(model.device)}, {torch.get_num_threads()} threads, {options.dtype}; "
        f"vtc {vtc.__version__}, torch {torch.__version__}, transformers {transformers.__version__}, "
        f"python {platform.python_version()}; {datetime.date.today().isoformat()}"
    )
    table = f"{conditions}\n\n{tabulate(rows, headers='keys', tablefmt='github')}\n"
    print(table)
    if options.out:
        options.out.write_text(table, encoding="utf-8")


if __name__ == "__main__":
    main()
