"""Check the kernels on this GPU, then time them: Triton, torch, `torch.compile`, and loops as papers' code has them.

    python benchmarks/kernels.py --out benchmarks/kernels.md

Times are medians in microseconds: eager, with the L2 cache cleared in between, and replayed from a CUDA graph, with
what the cache still holds. Nothing is timed whose result is wrong.

Without a GPU it can be rehearsed, in Triton's interpreter on small shapes; the times then mean nothing:

    TRITON_INTERPRET=1 python benchmarks/kernels.py --small --out rehearsal.md
"""

from __future__ import annotations

import argparse
import datetime
import inspect
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

# A script's folder is where Python looks first, and there transformers would take this file for a library it knows.
if Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    sys.path.pop(0)

import torch
import transformers
import triton
import triton.testing
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize, one_hot

from vtc.kernels.assign import naive as naive_assign
from vtc.kernels.assign import triton as triton_assign
from vtc.kernels.frames import frame_similarity
from vtc.kernels.greedy import naive as naive_greedy
from vtc.kernels.greedy import triton as triton_greedy
from vtc.kernels.merge import naive as naive_merge
from vtc.kernels.merge import triton as triton_merge
from vtc.kernels.peaks import naive as naive_peaks
from vtc.kernels.peaks import triton as triton_peaks
from vtc.kernels.received import naive as naive_received
from vtc.kernels.received import triton as triton_received
from vtc.kernels.rows import naive as naive_rows
from vtc.kernels.rows import triton as triton_rows
from vtc.zoo import torchvision

Call = Callable[[], Tensor]
LARGEST_MAP = 24 * 2**30  # bytes: what a materialised attention map may take before its column stays empty

# Relative errors against float32. Half precision goes into the tensor cores as it is and is summed in float32, whose
# order, and whose exp2, differ; results in bfloat16 are rounded once more, by 2^-9.
CLOSE, CLOSE_HALF = 1e-3, 2**-8


@dataclass
class Case:
    """One operation at one shape. `work` is what cannot be avoided: bytes to move, operations of the tensor cores."""

    name: str
    check: Callable[[Tensor], bool]
    triton: Call | None
    torch: Call
    loop: Call | None
    work: tuple[float, float]
    compiled: bool = True  # not where the loop over the choices would be unrolled into thousands of operations


@dataclass
class Result:
    """Microseconds per implementation, eager and replayed."""

    name: str
    work: tuple[float, float]
    times: dict[str, tuple[float | None, float | None]]


class Bench:
    """Where and how to run: a GPU, or a rehearsal."""

    def __init__(self, small: bool) -> None:
        self.small = small
        self.device = torch.device("cpu" if small else "cuda")
        # The interpreter computes in bfloat16 wrongly, and in float16 as numpy does.
        self.dtype = torch.float16 if small else torch.bfloat16

    def size(self, n: int) -> int:
        return max(3, n // 48) if self.small else n

    def draw(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device=self.device, dtype=torch.float32).to(self.dtype)

    def compile(self, call: Call) -> Call:
        return torch.compile(call, fullgraph=True, backend="eager" if self.small else "inductor")

    def time(self, call: Call, graph: bool) -> float | None:
        """Median in microseconds."""
        measure = triton.testing.do_bench_cudagraph if graph else triton.testing.do_bench
        options = {"rep": 100, "return_mode": "median"}
        if not self.small:
            return 1e3 * measure(call, **options)
        inspect.signature(measure).bind(call, **options)
        if graph:
            return None
        took = []
        for _ in range(2):
            start = time.perf_counter()
            call()
            took.append(time.perf_counter() - start)
        return 1e6 * statistics.median(took)


# --- the algorithms as a loop over the choices, or with everything in memory


def loop_k_center(x: Tensor, k: int) -> Tensor:
    """Distances of all pairs, and per choice a row minimum over a gathered block that grows."""
    unit = x / x.norm(dim=1, keepdim=True)
    distance = 1.0 - unit @ unit.T  # (N, N)
    chosen = torch.empty(k, dtype=torch.long, device=x.device)
    for step in range(k):
        if step == 0:
            score = distance.topk(2, dim=0, largest=False).values[1]
        else:
            score = distance.index_select(0, chosen[:step]).amin(dim=0)
        chosen[step] = score.argmax()
    return chosen


def loop_dpp(x: Tensor, relevance: Tensor, k: int) -> Tensor:
    unit = normalize(x.float(), dim=1)
    kernel = relevance[:, None] * (unit @ unit.T) * relevance
    gain = kernel.diagonal().clone()
    factor = torch.zeros(k, len(x), device=x.device)
    chosen = torch.empty(k, dtype=torch.long, device=x.device)
    for step in range(k):
        pick = gain.argmax()
        chosen[step] = pick
        row = kernel[pick] - torch.einsum("t,tn->n", factor[:step, pick], factor[:step])
        factor[step] = row / gain[pick].sqrt()
        gain -= factor[step].square()
        gain[pick] = -torch.inf
    return chosen


def loop_over(call: Callable[..., Tensor], *inputs: Tensor, k: int) -> Tensor:
    """One visual input after the other."""
    return torch.stack([call(*row, k) for row in zip(*inputs, strict=True)])


def map_of(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """`(B, H, M, N)`: the attention map, as an encoder with eager attention returns it."""
    shared = query.shape[2] // key.shape[2]
    score = query.transpose(1, 2) @ key.repeat_interleave(shared, 2).permute(0, 2, 3, 1) * scale
    return score.softmax(-1, dtype=torch.float32).to(query.dtype)


def materialised_merge(x: Tensor, keep: Tensor) -> Tensor:
    unit = normalize(x, dim=2)
    near = unit @ unit.gather(1, keep[..., None].expand(-1, -1, x.shape[2])).mT
    share = one_hot(near.argmax(2), keep.shape[1]).to(x.dtype)  # (B, N, K)
    return share.mT @ x / share.sum(1).clamp_min(1)[..., None]


def materialised_peaks(x: Tensor, neighbours: int) -> Tensor:
    distance = torch.cdist(x.float(), x.float()) / x.shape[2] ** 0.5
    density = (-distance.topk(neighbours, dim=2, largest=False).values.square().mean(2)).exp()
    density = density + torch.rand_like(density) * 1e-6
    denser = density[:, None] > density[:, :, None]
    separation = torch.where(denser, distance, distance.flatten(1).amax(1)[:, None, None]).amin(2)
    return separation * density


# --- checks


def greedy_is_valid(x: Tensor, weight: Tensor | None, order: Tensor) -> bool:
    """In float64, every choice is the best of its step up to what float32 cannot tell apart.

    Indices are not compared: of thousands of rows some are equally good, and the first difference changes the rest.
    """
    unit = normalize(x.double(), dim=2)
    table = unit @ unit.mT
    alike = table.gather(1, order[:, :1, None].expand(-1, -1, table.shape[2]))[:, 0]
    taken = torch.zeros_like(alike, dtype=torch.bool).scatter(1, order[:, :1], True)
    for step in range(1, order.shape[1]):
        pick = order[:, step : step + 1]
        cost = (alike if weight is None else weight * (alike - 1)).masked_fill(taken, torch.inf)
        if not bool((cost.gather(1, pick)[:, 0] <= cost.amin(1) + 1e-5).all()):
            return False
        taken = taken.scatter(1, pick, True)
        alike = alike.maximum(table.gather(1, pick[..., None].expand(-1, -1, table.shape[2]))[:, 0])
    return True


def dpp_is_valid(x: Tensor, relevance: Tensor, order: Tensor) -> bool:
    scaled = normalize(x.double(), dim=2) * relevance.double()[..., None]
    for rows, row in zip(scaled, order, strict=True):
        gain, basis = rows.square().sum(1), []
        for pick in row.tolist():
            if gain[pick] < gain.amax() * (1 - 1e-4):
                return False
            left = rows[pick] - sum(((rows[pick] @ b) * b for b in basis), torch.zeros_like(rows[pick]))
            basis.append(left / left.norm())
            gain = gain - (rows @ basis[-1]).square()
            gain[pick] = -torch.inf
    return True


def close(expected: Tensor, tolerance: float) -> Callable[[Tensor], bool]:
    return lambda found: float((found.double() - expected.double()).norm() / expected.double().norm()) < tolerance


# --- the cases


def greedy_cases(bench: Bench) -> Iterator[Case]:
    shapes = [
        ("LLaVA-1.5", 1, 576, 4096, 64),
        ("LLaVA-1.5", 1, 576, 4096, 192),
        ("NeXT, per view", 5, 576, 4096, 64),
        ("NeXT, joint", 1, 2880, 4096, 320),
        ("OneVision video, per frame", 32, 196, 3584, 20),
        ("OneVision video, joint", 1, 6272, 3584, 627),
        ("Qwen2-VL", 1, 4096, 3584, 410),
    ]
    for model, batch, n, width, k in shapes:
        n, width, k, batch = (
            bench.size(n),
            bench.size(width),
            min(bench.size(k), bench.size(n)),
            min(batch, 2 if bench.small else batch),
        )
        x, weight = bench.draw(batch, n, width), torch.rand(batch, n, device=bench.device) + 0.1
        label = f"{model} {batch} x {n} -> {k}"
        # Products of all pairs, once through the tensor cores; the choices have to read k rows of them.
        work = (batch * (n * width * x.element_size() + n * n * 4.0), 2.0 * batch * n * n * width)
        yield Case(
            f"k-center {label}", lambda o, x=x: greedy_is_valid(x, None, o),
            lambda x=x, k=k: triton_greedy.greedy(x, k, None, None, False),
            lambda x=x, k=k: naive_greedy.greedy(x, k, None, None, False),
            lambda x=x, k=k: loop_over(loop_k_center, x, k=k), work, compiled=model == "LLaVA-1.5" and k <= 64,
        )  # fmt: skip
        if len(x) == 1 and k == bench.size(64):

            def whole(greedy: Callable[..., Tensor], x: Tensor = x, k: int = k) -> Tensor:
                index = greedy(x, k, None, None, False).sort(dim=1).values
                return x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))

            yield Case(
                f"whole selection {label}", lambda o, x=x, k=k: o.shape == (1, k, x.shape[2]),
                lambda whole=whole: whole(triton_greedy.greedy), lambda whole=whole: whole(naive_greedy.greedy),
                None, work, compiled=False,
            )  # fmt: skip
        if n <= 4096:
            yield Case(
                f"DPP {label}", lambda o, x=x, w=weight: dpp_is_valid(x, w, o),
                lambda x=x, w=weight, k=k: triton_greedy.dpp(x, w, k),
                lambda x=x, w=weight, k=k: naive_greedy.dpp(x, w, k),
                lambda x=x, w=weight, k=k: loop_over(loop_dpp, x, w, k=k), work, compiled=False,
            )  # fmt: skip


def attention_cases(bench: Bench) -> Iterator[Case]:
    shapes = [
        ("CLIP-L/336", 1, 577, 16, 64),
        ("CLIP-L/336, five views", 5, 577, 16, 64),
        ("SigLIP, 32 frames", 32, 729, 16, 72),
        ("Qwen2-VL encoder", 1, 4096, 16, 80),
        ("Qwen2-VL encoder", 1, 16384, 16, 80),
    ]
    for model, batch, n, heads, width in shapes:
        n, batch, heads = bench.size(n), min(batch, 2 if bench.small else batch), 2 if bench.small else heads
        query, key = bench.draw(batch, n, heads, width), bench.draw(batch, n, heads, width)
        flat, scale = (query.flatten(0, 1), key.flatten(0, 1)), width**-0.5
        bytes_once = 2.0 * query.numel() * query.element_size()
        fits = batch * heads * n * n * 4 <= LARGEST_MAP
        expected = naive_received.received(*flat, None, n, scale, False)
        yield Case(
            f"received {model} {batch} x {n}", close(expected, CLOSE),
            lambda f=flat, n=n, s=scale: triton_received.received(*f, None, n, s, False),
            lambda f=flat, n=n, s=scale: naive_received.received(*f, None, n, s, False),
            (lambda q=query, k=key, s=scale: map_of(q, k, s).mean(dim=(1, 2))) if fits else None,
            (2 * bytes_once, 4.0 * batch * heads * n * n * width),
        )  # fmt: skip
        one = query[:, :1]
        expected = naive_rows.query_rows(one, key, scale, None)
        yield Case(
            f"query row {model} {batch} x {n}", close(expected, CLOSE),
            lambda q=one, k=key, s=scale: triton_rows.query_rows(q, k, s, None),
            lambda q=one, k=key, s=scale: naive_rows.query_rows(q, k, s, None),
            (lambda q=query, k=key, s=scale: map_of(q, k, s)[:, :, 0].mean(1)) if fits else None,
            (bytes_once / 2, 0.0),
        )  # fmt: skip
    for name, rows in (("last token", 1), ("8 text rows", 8)):
        n, heads, groups = bench.size(6272), 2 if bench.small else 28, 1 if bench.small else 4
        query, key = bench.draw(1, rows, heads, 128), bench.draw(1, n, groups, 128)
        yield Case(
            f"{name} Qwen2-7B decoder {n}", close(naive_rows.query_rows(query, key, 0.1, None), CLOSE),
            lambda q=query, k=key: triton_rows.query_rows(q, k, 0.1, None),
            lambda q=query, k=key: naive_rows.query_rows(q, k, 0.1, None),
            lambda q=query, k=key: map_of(q, k, 0.1).mean(1), (key.numel() * key.element_size(), 0.0),
        )  # fmt: skip


def merge_cases(bench: Bench) -> Iterator[Case]:
    shapes = [
        ("LLaVA-1.5", 1, 576, 4096, 64),
        ("OneVision video", 1, 6272, 3584, 627),
        ("Qwen2-VL", 1, 4096, 3584, 1024),
    ]
    for model, batch, n, width, k in shapes:
        n, width, k = bench.size(n), bench.size(width), min(bench.size(k), bench.size(n))
        x = bench.draw(batch, n, width)
        keep = torch.rand(batch, n, device=bench.device).argsort(1)[:, :k]
        source = torch.arange(n, device=bench.device).expand(batch, -1).contiguous()

        def run(
            assign: Callable[..., Tensor],
            merge: Callable[..., Tensor],
            x: Tensor = x,
            keep: Tensor = keep,
            source: Tensor = source,
        ) -> Tensor:
            slot = assign(x, keep, False)
            order = slot.sort(dim=1, stable=True)
            places = torch.arange(keep.shape[1] + 1, device=x.device).expand(x.shape[0], -1).contiguous()
            ends = torch.searchsorted(order.values, places)
            weight = (1 / ends.diff().float()).gather(1, slot)
            return merge(x, order.indices, ends, source, weight)

        yield Case(
            f"assign and merge {model} {batch} x {n} -> {k}",
            close(run(naive_assign.assign, naive_merge.merge), CLOSE_HALF),
            lambda run=run: run(triton_assign.assign, triton_merge.merge),
            lambda run=run: run(naive_assign.assign, naive_merge.merge),
            lambda x=x, keep=keep: materialised_merge(x, keep),
            (2.0 * x.numel() * x.element_size(), 2.0 * batch * n * k * width), compiled=False,
        )  # fmt: skip


def cluster_cases(bench: Bench) -> Iterator[Case]:
    for model, batch, n, width in [("OneVision video, per frame", 32, 196, 3584), ("LLaVA-1.5", 1, 576, 4096)]:
        n, width, batch = bench.size(n), bench.size(width), min(batch, 2 if bench.small else batch)
        x = bench.draw(batch, n, width)
        yield Case(
            f"density peaks {model} {batch} x {n}", close(naive_peaks.density_peaks(x, 3), CLOSE),
            lambda x=x: triton_peaks.density_peaks(x, 3), lambda x=x: naive_peaks.density_peaks(x, 3),
            lambda x=x: materialised_peaks(x, 3),
            (batch * (n * width * x.element_size() + n * n * 4.0), 2.0 * batch * n * n * width),
        )  # fmt: skip
    x = bench.draw(bench.size(32), bench.size(196), bench.size(3584))
    yield Case(
        f"frame similarity OneVision video {x.shape[0]} x {x.shape[1]}", close(frame_similarity(x), CLOSE),
        None, lambda: frame_similarity(x), lambda: cosine_similarity(x[1:], x[:-1], dim=2),
        (float(x.numel() * x.element_size()), 0.0),
    )  # fmt: skip


# --- measuring and writing


def ceilings(bench: Bench) -> tuple[float, float]:
    """Bytes per second of a copy, counting both ways, and operations per second of a large matrix product."""
    n = 64 if bench.small else 8192
    a, b = bench.draw(n, n), bench.draw(n, n)
    source = torch.empty(2**12 if bench.small else 2**31, dtype=torch.uint8, device=bench.device)
    copy = bench.time(source.clone, graph=False)
    product = bench.time(lambda: a @ b, graph=False)
    assert copy and product
    return 2 * source.numel() / copy * 1e6, 2 * n**3 / product * 1e6


def prefill(bench: Bench, tokens: int = 64 + 40) -> float:
    """Microseconds of a 7B language model, with random weights, reading 64 visual tokens and a question."""
    torchvision.mend()  # before transformers looks for it
    from transformers import LlamaConfig, LlamaModel

    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(**size) if bench.small else LlamaConfig()
    with bench.device:
        model = LlamaModel(config).to(bench.dtype).eval()
    embeds = bench.draw(1, tokens, config.hidden_size)
    took = bench.time(lambda: model(inputs_embeds=embeds, use_cache=False).last_hidden_state, graph=False)
    assert took
    return took


def measure(bench: Bench, case: Case) -> Result:
    times: dict[str, tuple[float | None, float | None]] = {}
    for name, call in {"triton": case.triton, "torch": case.torch}.items():
        if call is not None:
            _require(case, name, call)
            times[name] = bench.time(call, graph=False), _graphed(bench, call)
    if case.compiled:
        compiled = bench.compile(case.torch)
        try:
            compiled()
        except Exception as error:  # the compiler's failure is not ours: the table says so by an empty column
            print(f"  does not compile: {error}", file=sys.stderr)
        else:
            _require(case, "torch.compile", compiled)
            times["compile"] = bench.time(compiled, graph=False), _graphed(bench, compiled)
    if case.loop is not None:
        times["loop"] = bench.time(case.loop, graph=False), None  # nobody runs it from a graph
    return Result(case.name, case.work, times)


def _require(case: Case, name: str, call: Call) -> None:
    if not case.check(call()):
        raise SystemExit(f"{case.name}: the result of {name} is wrong; nothing is timed")


def _graphed(bench: Bench, call: Call) -> float | None:
    try:
        return bench.time(call, graph=True)
    except RuntimeError as error:  # an operation that cannot be captured
        print(f"  not captured: {str(error).splitlines()[0]}", file=sys.stderr)
        return None


def row(case: Result, copy: float, product: float) -> str:
    cells = [case.name]
    for name in ("triton", "torch", "compile", "loop"):
        cells += [_number(value) for value in case.times.get(name, (None, None))[: 1 if name == "loop" else 2]]
    best = min((t for t in case.times.get("triton", case.times["torch"]) if t is not None), default=None)
    moved, computed = case.work
    if best is not None:
        cells += [f"{100 * moved / (best / 1e6) / copy:.1f}", f"{100 * computed / (best / 1e6) / product:.1f}"]
    return "| " + " | ".join(cells) + " |"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def targets(results: list[Result], prefill_us: float) -> list[str]:
    """What the kernels are meant to reach on an H200."""

    def microseconds(kind: str, name: str = "triton") -> float:
        times = next(result.times[name] for result in results if result.name.startswith(kind))
        return min(t for t in times if t is not None)

    center, frames = microseconds("k-center"), microseconds("received SigLIP")
    selection = 100 * microseconds("whole selection") / prefill_us
    faster, less = microseconds("k-center", "loop") / center, microseconds("received SigLIP", "loop") / frames
    return [
        f"| {text} | {value:.2f} | {'yes' if met else 'no'} |"
        for text, value, met in [
            ("k-center 576 -> 64, microseconds (at most 60)", center, center <= 60),
            ("the same, times faster than the loop (at least 20)", faster, faster >= 20),
            ("received attention 32 x 729, times faster than materialised (at least 3)", less, less >= 3),
            ("whole selection, % of the compressed prefill (below 2)", selection, selection < 2),
        ]
    ]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--small", action="store_true", help="small shapes on the CPU, in Triton's interpreter")
    parser.add_argument("--out", type=Path, default=Path("kernels.md"), help="where the table goes")
    options = parser.parse_args(arguments)
    bench = Bench(options.small)
    torch.manual_seed(0)

    copy, product = ceilings(bench)
    results: list[Result] = []
    with torch.no_grad():
        for make in (greedy_cases, attention_cases, merge_cases, cluster_cases):
            for case in make(bench):
                print(case.name, file=sys.stderr, flush=True)
                results.append(measure(bench, case))
        prefill_us = prefill(bench)

    device = "CPU, interpreted: times mean nothing" if bench.small else torch.cuda.get_device_name()
    versions = ", ".join(
        f"{name} {version}"
        for name, version in [
            ("torch", torch.__version__),
            ("Triton", triton.__version__),
            ("transformers", transformers.__version__),
            ("Python", platform.python_version()),
        ]
    )
    lines = [
        "# Kernels",
        "",
        f"{device}; {datetime.date.today().isoformat()}; {versions}; {bench.dtype}.",
        "",
        f"Ceilings measured: copy {copy / 1e12:.2f} TB/s, matrix product {product / 1e12:.0f} TFLOP/s. "
        f"Compressed prefill of a 7B model: {prefill_us / 1e3:.2f} ms.",
        "",
        "Median microseconds, eager (e) and replayed from a CUDA graph (g). The last columns are the achieved shares",
        "of the ceilings, counting only what cannot be avoided.",
        "",
        "| | Triton e | g | torch e | g | compile e | g | loop e | % copy | % product |",
        "|---|" + "---:|" * 9,
        *(row(case, copy, product) for case in results),
        "",
        "| target | measured | met |",
        "|---|---:|---|",
        *targets(results, prefill_us),
    ]
    options.out.write_text("\n".join(lines) + "\n")
    print(options.out)


if __name__ == "__main__":
    main()
