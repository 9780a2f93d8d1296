"""Rows and samples as `vtc bench` writes them, without running anything."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vtc.eval import accuracy, bench

NASTY = "a|b_c & 100% <i>{x}</i> \\ ~^#$"
KINDS = ("digit", "</script><b>")  # the second one would end the script with the data if it were not written out


def row(spec: str, tokens: int, right: int, n: int = 40, ttft: float | None = None, **other: Any) -> bench.Row:
    """A row as `vtc bench` writes it, of which `right` of `n` questions of the first kind are right."""
    first, *_ = spec.split("+")
    parameters = dict(part.split("=") for part in first.partition(":")[2].split(",") if part)
    keep = json.loads(parameters.get("keep", "0.0" if spec == "blind" else "1.0"))
    scores = {kind: accuracy.Score(count, n).to_dict() for kind, count in zip(KINDS, (right, n // 2), strict=True)}
    total = accuracy.Score(right + n // 2, 2 * n)
    return {
        "model": NASTY,
        "task": "scenes",
        "spec": spec,
        "strategy": "+".join(part.partition(":")[0] for part in spec.split("+")),
        "keep": keep,
        "seed": int(parameters.get("seed", 0)),
        "n": total.n,
        "accuracy": total.accuracy,
        "accuracy_ci": list(total.interval),
        "by_type": scores,
        "agreement": 0.5,
        "tokens_in": 0 if spec == "blind" else 64,
        "tokens_out": tokens,
        "prefill_flops": 1000 * (tokens + 8),
        "prefill_flops_ratio": (tokens + 8) / 72,
        "kv_cache_bytes": 64 * tokens,
        **dict.fromkeys(("ttft_ms", "ttft_speedup", "decode_tokens_per_s"), ttft),
        **dict.fromkeys(("encoder_ms", "projector_ms", "selection_ms", "prefill_ms", "other_ms"), ttft),
        **dict.fromkeys(("ttft_iqr_ms", "ideal_ttft_ms"), ttft),
        "device": "AMD & Co",
        "dtype": "float32",
        "attention": "sdpa",
        "threads": 1,
        "versions": {"vtc": "0.1.0", "torch": "2.13.0"},
        "date": "2026-11-22T10:00:00+00:00",
        **other,
    }


def sample(spec: str, name: str, right: bool, **other: Any) -> bench.Sample:
    """One line of samples.jsonl."""
    return {
        "spec": spec,
        "id": name,
        "type": "digit",
        "question": "What digit is red?",
        "expected": "7",
        "answer": "7" if right else "1",
        "right": right,
        "tokens_in": 64,
        "tokens_out": 16,
        **other,
    }


def save(folder: Path, rows: list[bench.Row], samples: list[bench.Sample] | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, objects in (("rows.jsonl", rows), ("samples.jsonl", samples)):
        if objects is not None:
            (folder / name).write_text("".join(json.dumps(one) + "\n" for one in objects))
    return folder


ROW = row("none", 64, 39)
