"""What was measured, kept line by line while it is measured, and the tables made of it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

IMPLEMENTATIONS = ("triton", "torch", "compile", "loop")
CASE = "case"  # in place of an implementation, where the case as a whole is meant

Times = tuple[float | None, float | None]  # microseconds: eager, and replayed from a CUDA graph


@dataclass
class Result:
    """One case. `work` is what any implementation has to do: bytes to move, operations of the tensor cores."""

    name: str
    work: tuple[float, float] = (0.0, 0.0)
    times: dict[str, Times] = field(default_factory=dict)
    verdicts: dict[str, str] = field(default_factory=dict)  # of what has no times: "wrong", "failed"
    notes: list[str] = field(default_factory=list)

    @property
    def failed(self) -> bool:
        return bool(self.verdicts)

    def time(self, implementation: str, graph: bool) -> float | None:
        return self.times.get(implementation, (None, None))[graph]


class Log:
    """Results in the order in which they came, in a file that outlives the process that measures."""

    def __init__(self, path: Path, fresh: bool) -> None:
        self.path = path
        self.results: dict[str, Result] = {}
        self.conditions: str | None = None
        self.begun: str | None = None  # and not ended
        path.parent.mkdir(parents=True, exist_ok=True)
        if fresh:
            path.write_text("")
        self.read()

    def read(self) -> None:
        self.begun = None
        for line in self.path.read_text().splitlines() if self.path.exists() else []:
            entry: dict[str, Any] = json.loads(line)
            if "begin" in entry:
                self.begun = entry["begin"]
            elif "conditions" in entry:
                self.conditions = entry["conditions"]
            else:
                result = Result(**entry["result"])
                self.results[result.name] = result
                self.begun = result.name if entry["more"] else None

    def begin(self, name: str) -> None:
        self._write({"begin": name})

    def describe(self, conditions: str) -> None:
        """Say on what and when; what was measured under other conditions, but for the date, is not gone on with."""
        if self.conditions is None:
            self.conditions = conditions
            self._write({"conditions": conditions})
        elif self.conditions.rpartition(";")[0] != conditions.rpartition(";")[0]:
            raise SystemExit(
                f"{self.path} was measured on {self.conditions}; this is {conditions}: choose another --out"
            )

    def add(self, result: Result, more: bool = False) -> None:
        """Keep a result, or with `more` what there is of it before the rest follows."""
        self.results[result.name] = result
        self._write({"result": asdict(result), "more": more})

    def _write(self, entry: dict[str, Any]) -> None:
        with self.path.open("a") as stream:
            stream.write(json.dumps(entry) + "\n")

    @property
    def failed(self) -> bool:
        return any(result.failed for result in self.results.values())


# --- the ceilings, and the prefill that selection is compared with, are cases too

COPY, PRODUCT, PREFILL = "ceiling: copy", "ceiling: matrix product", "prefill of a 7B model"
CENTER, WHOLE = "k-center LLaVA-1.5 1 x 576 -> 64", "whole selection LLaVA-1.5 1 x 576 -> 64"
FRAMES = "received SigLIP, 32 frames 32 x 729"


def ceilings(log: Log) -> tuple[float | None, float | None]:
    """Bytes and operations per microsecond; `None` for what was not measured."""
    found = []
    for name, kind in ((COPY, 0), (PRODUCT, 1)):
        result = log.results.get(name)
        took = result.time("torch", graph=True) or result.time("torch", graph=False) if result else None
        found.append(result.work[kind] / took if result and took else None)
    return found[0], found[1]


# --- tables


def table(log: Log, left: int) -> str:
    """All times; `left` cases have none yet."""
    copy, product = ceilings(log)
    rates = [f"copy {copy / 1e6:.2f} TB/s"] if copy else []
    rates += [f"matrix product {product / 1e6:.0f} TFLOP/s"] if product else []
    lines = [
        "# Kernels",
        "",
        f"{log.conditions}.",
        "",
        *([f"**Partial: {left} cases are not measured yet.**", ""] if left else []),
        f"Ceilings measured: {', '.join(rates) or 'none'}.",
        "",
        "Median microseconds; the L2 cache is cleared before each measurement. Eager (e): from an idle device on, so",
        "that launches count. Replayed (g): a CUDA graph, on a busy device, so that they do not. The last columns are",
        "the shares of the ceilings that the faster of Triton and torch reaches when replayed, counting what no",
        "implementation avoids: inputs read once, results written once, the product of two rows computed once.",
        "",
        "| | Triton e | g | torch e | g | compile e | g | loop e | g | % copy | % product |",
        "|---|" + "---:|" * 10,
        *(row(result, copy, product) for result in log.results.values()),
        "",
        "| target on an H200 | measured | met |",
        "|---|---|---|",
        *targets(log),
    ]
    return "\n".join([*lines, *_notes(log)]) + "\n"


def row(result: Result, copy: float | None, product: float | None) -> str:
    cells = [result.name + (": failed" if CASE in result.verdicts else "")]
    for name in IMPLEMENTATIONS:
        cells += [result.verdicts.get(name) or _number(result.time(name, False)), _number(result.time(name, True))]
    best = _best(result)
    for work, ceiling in zip(result.work, (copy, product), strict=True):
        share = best and ceiling and work and 100 * work / best / ceiling
        cells.append(f"{share:.1f}" if share else "")
    return "| " + " | ".join(cells) + " |"


def _best(result: Result) -> float | None:
    """Of our implementations: replayed if that was possible."""
    ours = ("triton", "torch")
    for graph in (True, False):
        if times := [t for name in ours if (t := result.time(name, graph)) is not None]:
            return min(times)
    return None


def targets(log: Log) -> list[str]:
    """Eager is compared with eager, and replayed with replayed; which of the two is judged, the line says."""

    def pair(case: str, name: str = "triton") -> Times:
        found = log.results.get(case, Result(case))
        return found.time(name, False), found.time(name, True)

    def ratio(above: Times, below: Times, scale: float = 1.0) -> Times:
        eager, graph = (scale * a / b if a and b else None for a, b in zip(above, below, strict=True))
        return eager, graph

    center, share = pair(CENTER), ratio(pair(WHOLE), pair(PREFILL, "torch"), 100)
    faster, less = ratio(pair(CENTER, "loop"), center), ratio(pair(FRAMES, "loop"), pair(FRAMES))
    lines = []
    for text, values, judged, met in [
        ("k-center 576 -> 64: microseconds, replayed at most 60", center, center[1:], lambda v: v <= 60),
        ("k-center 576 -> 64: times faster than the loop, eager at least 20", faster, faster[:1], lambda v: v >= 20),
        ("received 32 x 729: times faster than materialised, eager at least 3", less, less[:1], lambda v: v >= 3),
        ("whole selection: % of the compressed prefill, eager and replayed below 2", share, share, lambda v: v < 2),
    ]:
        told = [f"{name} {value:.2f}" for name, value in zip(("eager", "replayed"), values, strict=True) if value]
        verdict = "not measured" if None in judged else "yes" if all(map(met, judged)) else "no"
        lines.append(f"| {text} | {', '.join(told)} | {verdict} |")
    return lines


def tuning(log: Log, left: int) -> str:
    """What other launch parameters would give. In `times`, a key is a kernel and its parameters; the first is ours."""
    lines = [
        "# Launch parameters",
        "",
        f"{log.conditions}.",
        "",
        *([f"**Partial: {left} cases are not measured yet.**", ""] if left else []),
        "Each kernel alone, relaunched with the arguments it had and other parameters: median microseconds, replayed",
        "from a CUDA graph, L2 cleared. `present` is the library's choice; all others are named by what differs.",
        "",
        "| | present | best | gain | all |",
        "|---|---|---|---:|---|",
    ]
    for result in log.results.values():
        kernels: dict[str, list[tuple[str, float]]] = {}
        for key, (_, took) in result.times.items():
            kernel, _, parameters = key.partition(": ")
            if took is not None:
                kernels.setdefault(kernel, []).append((parameters, took))
        for kernel, variants in kernels.items():
            (present, now), (best, least) = variants[0], min(variants, key=lambda variant: variant[1])
            others = "; ".join(f"{name} {took:.1f}" for name, took in variants[1:])
            chosen = "" if best == present else f"{best}: {least:.1f}"
            lines.append(
                f"| {kernel}, {result.name} | {present}: {now:.1f} | {chosen} | {now / least:.2f}x | {others} |"
            )
    return "\n".join([*lines, *_notes(log)]) + "\n"


def _notes(log: Log) -> list[str]:
    notes = [f"- {result.name}: {note}" for result in log.results.values() for note in result.notes]
    return ["", "Notes:", "", *notes] if notes else []


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"
