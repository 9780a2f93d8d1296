"""What is checked and timed: operations at the shapes of LLaVA-1.5, LLaVA-NeXT, OneVision video and Qwen2-VL."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import inf
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from benchmarks.kernel import candidates, loops
from benchmarks.kernel.log import CENTER, COPY, FRAMES, PREFILL, PRODUCT, WHOLE
from benchmarks.kernel.timing import Bench, Call
from vtc.boundary import Places, Shrink, Stretch
from vtc.choice import Group
from vtc.eval import checkpoints
from vtc.kernels import frame_similarity
from vtc.kernels.assign import naive as naive_assign
from vtc.kernels.assign import triton as triton_assign
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
from vtc.selection import Selection

LARGEST_MAP = 24 * 2**30  # bytes: what a materialised attention map may take before its column stays empty
TEXT = 40  # tokens of a prompt that are not visual

# Relative errors against float32. Half precision goes into the tensor cores as it is and is summed in float32, whose
# order, and whose exp2, differ; results in bfloat16 are rounded once more, by 2^-9.
CLOSE, CLOSE_HALF = 1e-3, 2**-8
# Of two cosines, what float32 cannot tell apart; and of a gain, its share.
ALIKE, ALIKE_GAIN = 1e-5, 1e-4


@dataclass
class Case:
    """One operation at one shape.

    `work` is what any implementation has to do: bytes to move, operations of the tensor cores. `error` says how far a
    result is from right, in parts of what is allowed.
    """

    error: Callable[[Any], float]
    torch: Call
    triton: Call | None = None
    loop: Call | None = None
    work: tuple[float, float] = (0.0, 0.0)
    compiled: bool = True  # not where the loop over the choices would be unrolled into thousands of operations


@dataclass
class Plan:
    """A case that takes no memory yet."""

    name: str
    make: Callable[[], Case]


def plans(bench: Bench) -> list[Plan]:
    """All cases; those that the targets speak of come first."""
    found = [
        *reference_plans(bench),
        *greedy_plans(bench),
        *attention_plans(bench),
        *merge_plans(bench),
        *cluster_plans(bench),
        *candidate_plans(bench),
    ]
    return sorted(found, key=lambda plan: plan.name not in (COPY, PRODUCT, PREFILL, CENTER, WHOLE, FRAMES))


# --- how far from right


def greedy_regret(x: Tensor, order: Tensor) -> float:
    """In float64: how much worse than the best of its step a choice is at worst; the first is the most isolated row.

    Indices are not compared: of thousands of rows some are equally good, and the first difference changes the rest.
    """
    unit = normalize(x.double(), dim=2)
    table = unit @ unit.mT
    table.diagonal(dim1=1, dim2=2).fill_(-inf)
    nearest = table.amax(2)
    worst = (nearest.gather(1, order[:, :1])[:, 0] - nearest.amin(1)).amax()
    alike = table.gather(1, order[:, :1, None].expand(-1, -1, table.shape[2]))[:, 0]
    taken = torch.zeros_like(alike, dtype=torch.bool).scatter(1, order[:, :1], True)
    for step in range(1, order.shape[1]):
        pick = order[:, step : step + 1]
        cost = alike.masked_fill(taken, inf)
        worst = worst.maximum((cost.gather(1, pick)[:, 0] - cost.amin(1)).amax())
        taken = taken.scatter(1, pick, True)
        alike = alike.maximum(table.gather(1, pick[..., None].expand(-1, -1, table.shape[2]))[:, 0])
    return float(worst) / ALIKE


def dpp_regret(x: Tensor, relevance: Tensor, order: Tensor) -> float:
    """The same for the gains of a determinantal point process, relative to the largest of each step."""
    scaled = normalize(x.double(), dim=2) * relevance.double()[..., None]
    worst = scaled.new_zeros(())
    for rows, picks in zip(scaled, order, strict=True):
        gain, basis = rows.square().sum(1), rows.new_zeros(len(picks), rows.shape[1])
        for step, pick in enumerate(picks.tolist()):
            worst = worst.maximum(1 - gain[pick] / gain.amax())
            left = rows[pick] - basis[:step].T @ (basis[:step] @ rows[pick])
            basis[step] = left / left.norm()
            gain = gain - (rows @ basis[step]).square()
            gain[pick] = -inf
    return float(worst) / ALIKE_GAIN


def merge_error(x: Tensor, keep: Tensor, found: tuple[Tensor, Tensor]) -> float:
    """Of an assignment to survivors, which need not be ours among equals, and of the means that it asks for."""
    slot, merged = found
    unit = normalize(x.double(), dim=2)
    near = unit @ unit.gather(1, keep[..., None].expand(-1, -1, x.shape[2])).mT  # (B, N, K)
    near.scatter_(1, keep[:, None], inf)  # survivors belong to themselves
    regret = (near.amax(2) - near.gather(2, slot[..., None])[..., 0]).nan_to_num(0.0).amax()
    means = torch.zeros_like(merged, dtype=torch.float64)
    means.scatter_add_(1, slot[..., None].expand_as(x), x.double())
    means /= torch.zeros_like(near[:, 0]).scatter_add_(1, slot, torch.ones_like(slot, dtype=torch.float64))[..., None]
    return max(float(regret) / ALIKE, distance(means, merged) / CLOSE_HALF)


def distance(expected: Tensor, found: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def close(expected: Tensor, found: Tensor) -> float:
    return distance(expected, found) / CLOSE


def differs(expected: tuple[Tensor, ...], found: tuple[Tensor, ...]) -> float:
    return 0.0 if all(map(torch.equal, expected, found)) else inf


def unchecked(found: object) -> float:
    return 0.0


# --- the cases


def reference_plans(bench: Bench) -> list[Plan]:
    """What the device and torch can do, and what selection is compared with."""

    def copy() -> Case:
        source = torch.empty(2**12 if bench.small else 2**31, dtype=torch.uint8, device=bench.device)
        return Case(unchecked, source.clone, work=(2.0 * source.numel(), 0.0), compiled=False)

    def product() -> Case:
        n = 64 if bench.small else 8192
        a, b = bench.draw(n, n), bench.draw(n, n)
        return Case(unchecked, lambda: a @ b, work=(0.0, 2.0 * n**3), compiled=False)

    def prefill() -> Case:
        """A language model with random weights reads 64 visual tokens and some text."""
        config = checkpoints.config("llava-1.5-7b").get_text_config()
        if bench.small:
            config.update({"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "head_dim": 8})
            config.update({"num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 64, "pad_token_id": 0})
        from transformers import AutoModel

        with bench.device:
            model = AutoModel.from_config(config, dtype=bench.dtype).eval()
        embeds = bench.draw(1, 64 + TEXT, config.hidden_size)
        return Case(unchecked, lambda: model(inputs_embeds=embeds, use_cache=True).last_hidden_state, compiled=False)

    return [Plan(COPY, copy), Plan(PRODUCT, product), Plan(PREFILL, prefill)]


def greedy_plans(bench: Bench) -> list[Plan]:
    def k_center(batch: int, n: int, width: int, k: int, compiled: bool) -> Case:
        x = bench.draw(batch, n, width)
        return Case(
            partial(greedy_regret, x),
            lambda: naive_greedy.greedy(x, k, None, None, False),
            lambda: triton_greedy.greedy(x, k, None, None, False),
            lambda: loops.over(loops.k_center, x, k=k),
            # The first choice needs all pairs.
            (x.numel() * x.element_size() + 8.0 * batch * k, 1.0 * batch * n * n * width), compiled,
        )  # fmt: skip

    def dpp(batch: int, n: int, width: int, k: int) -> Case:
        x, relevance = bench.draw(batch, n, width), bench.uniform(batch, n) + 0.1
        return Case(
            partial(dpp_regret, x, relevance),
            lambda: naive_greedy.dpp(x, relevance, k),
            lambda: triton_greedy.dpp(x, relevance, k),
            lambda: loops.over(loops.dpp, x, relevance, k=k),
            # Each choice needs its products with all rows.
            (x.numel() * x.element_size() + batch * (4.0 * n + 8.0 * k), 2.0 * batch * k * n * width), compiled=False,
        )  # fmt: skip

    def whole(n: int, width: int, k: int) -> Case:
        """All that happens in front of the language model: choosing, and cutting embeddings, mask and positions."""
        size = n + TEXT
        x, spots = bench.draw(1, size, width), torch.arange(TEXT // 2, TEXT // 2 + n, device=bench.device)
        numbers = torch.arange(size, device=bench.device)[None]

        def select(greedy: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
            features = x[:, TEXT // 2 : TEXT // 2 + n]
            group = Group([0], Selection.keep(greedy(features, k, None, None, False), n))
            left, kept, shrink = Places([spots], [0], [size]).drop(x, None, [group])
            return left, Stretch(0, 0, None, None, numbers, None, 0).cut(shrink, kept, "contiguous").positions

        def error(found: tuple[Tensor, Tensor]) -> float:
            left, positions = found
            right = left.shape == (1, k + TEXT, width) and torch.equal(positions[0], numbers[0, : k + TEXT])
            return 0.0 if right and torch.equal(left[:, -1], x[:, -1]) else inf

        return Case(
            error, lambda: select(naive_greedy.greedy), lambda: select(triton_greedy.greedy), compiled=False,
            work=((x.numel() + (k + TEXT) * width) * x.element_size(), 1.0 * n * n * width),
        )  # fmt: skip

    found = []
    for model, batch, n, width, k in [
        ("LLaVA-1.5", 1, 576, 4096, 64),
        ("LLaVA-1.5", 1, 576, 4096, 192),
        ("NeXT, per view", 5, 576, 4096, 64),
        ("NeXT, joint", 1, 2880, 4096, 320),
        ("OneVision video, per frame", 32, 196, 3584, 20),
        ("OneVision video, joint", 1, 6272, 3584, 627),
        ("Qwen2-VL", 1, 4096, 3584, 410),
    ]:
        few = model == "LLaVA-1.5" and k == 64
        batch, n, width, k = bench.few(batch), bench.size(n), bench.size(width), bench.size(k)
        label = f"{model} {batch} x {n} -> {k}"
        found.append(Plan(f"k-center {label}", partial(k_center, batch, n, width, k, few)))
        if few:
            found.append(Plan(f"whole selection {label}", partial(whole, n, width, k)))
        if n <= 4096:
            found.append(Plan(f"DPP {label}", partial(dpp, batch, n, width, k)))
    return found


def attention_plans(bench: Bench) -> list[Plan]:
    def received(batch: int, n: int, heads: int, width: int) -> Case:
        query, key = bench.draw(batch, n, heads, width), bench.draw(batch, n, heads, width)
        flat, scale = (query.flatten(0, 1), key.flatten(0, 1)), width**-0.5
        fits = batch * heads * n * n * 4 <= LARGEST_MAP
        return Case(
            partial(close, naive_received.received(*flat, None, n, scale, False)),
            lambda: naive_received.received(*flat, None, n, scale, False),
            lambda: triton_received.received(*flat, None, n, scale, False),
            (lambda: loops.attention(query, key, scale).mean(dim=(1, 2))) if fits else None,
            # The kernel computes the products twice, so it reaches half of the ceiling at most.
            (2.0 * key.numel() * key.element_size() + 4.0 * batch * n, 2.0 * batch * heads * n * n * width),
        )  # fmt: skip

    def first_row(batch: int, n: int, heads: int, width: int) -> Case:
        query, key = bench.draw(batch, n, heads, width), bench.draw(batch, n, heads, width)
        one, scale = query[:, :1], width**-0.5
        fits = batch * heads * n * n * 4 <= LARGEST_MAP
        case = rows(one, key, scale)
        case.loop = (lambda: loops.attention(query, key, scale)[:, :, 0].mean(1)) if fits else None
        return case

    def last_rows(count: int, n: int, heads: int, groups: int, width: int) -> Case:
        return rows(bench.draw(1, count, heads, width), bench.draw(1, n, groups, width), width**-0.5)

    def rows(query: Tensor, key: Tensor, scale: float) -> Case:
        (batch, count, heads, width), n = query.shape, key.shape[1]
        return Case(
            partial(close, naive_rows.query_rows(query, key, scale, None)),
            lambda: naive_rows.query_rows(query, key, scale, None),
            lambda: triton_rows.query_rows(query, key, scale, None),
            lambda: loops.attention(query, key, scale).mean(1),
            (key.numel() * key.element_size() + 4.0 * batch * count * n, 2.0 * batch * count * heads * n * width),
        )  # fmt: skip

    found = []
    for model, batch, n, width in [
        ("CLIP-L/336", 1, 577, 64),
        ("CLIP-L/336, five views", 5, 577, 64),
        ("SigLIP, 32 frames", 32, 729, 72),
        ("Qwen2-VL encoder", 1, 4096, 80),
        ("Qwen2-VL encoder", 1, 16384, 80),
    ]:
        sizes = bench.few(batch), bench.size(n), bench.few(16), width
        label = f"{model} {sizes[0]} x {sizes[1]}"
        found.append(Plan(f"received {label}", partial(received, *sizes)))
        found.append(Plan(f"query row {label}", partial(first_row, *sizes)))
    for name, count in (("last token", 1), ("8 text rows", 8)):
        n, heads, groups = bench.size(6272), bench.few(28), 1 if bench.small else 4
        found.append(Plan(f"{name} Qwen2-7B decoder {n}", partial(last_rows, count, n, heads, groups, 128)))
    return found


def merge_plans(bench: Bench) -> list[Plan]:
    def merge(batch: int, n: int, width: int, k: int) -> Case:
        x = bench.draw(batch, n, width)
        keep = bench.uniform(batch, n).argsort(1)[:, :k]
        source = torch.arange(n, device=bench.device).expand(batch, -1).contiguous()

        def run(assign: Callable[..., Tensor], average: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
            slot = assign(x, keep, False)
            order = slot.sort(dim=1, stable=True)
            places = torch.arange(k + 1, device=x.device).expand(batch, -1).contiguous()
            ends = torch.searchsorted(order.values, places)
            weight = (1 / ends.diff().float()).gather(1, slot)
            return slot, average(x, order.indices, ends, source, weight)

        return Case(
            partial(merge_error, x, keep),
            lambda: run(naive_assign.assign, naive_merge.merge),
            lambda: run(triton_assign.assign, triton_merge.merge),
            lambda: loops.merge(x, keep),
            ((x.numel() + batch * k * width) * x.element_size(), 2.0 * batch * n * k * width), compiled=False,
        )  # fmt: skip

    found = []
    for model, batch, n, width, k in [
        ("LLaVA-1.5", 1, 576, 4096, 64),
        ("OneVision video", 1, 6272, 3584, 627),
        ("Qwen2-VL", 1, 4096, 3584, 1024),
    ]:
        sizes = batch, bench.size(n), bench.size(width), bench.size(k)
        label = f"{model} {sizes[0]} x {sizes[1]} -> {sizes[3]}"
        found.append(Plan(f"assign and merge {label}", partial(merge, *sizes)))
    return found


def cluster_plans(bench: Bench) -> list[Plan]:
    def peaks(batch: int, n: int, width: int, neighbours: int = 3) -> Case:
        x = bench.draw(batch, n, width)
        return Case(
            partial(close, naive_peaks.density_peaks(x, neighbours)),
            lambda: naive_peaks.density_peaks(x, neighbours),
            lambda: triton_peaks.density_peaks(x, neighbours),
            lambda: loops.peaks(x, neighbours),
            (x.numel() * x.element_size() + 4.0 * batch * n, 1.0 * batch * n * n * width),
        )  # fmt: skip

    found = []
    for model, batch, n, width in [("OneVision video, per frame", 32, 196, 3584), ("LLaVA-1.5", 1, 576, 4096)]:
        sizes = bench.few(batch), bench.size(n), bench.size(width)
        found.append(Plan(f"density peaks {model} {sizes[0]} x {sizes[1]}", partial(peaks, *sizes)))
    return found


def candidate_plans(bench: Bench) -> list[Plan]:
    """Kernels that the library does not have, against what it does in torch."""

    def frames(count: int, n: int, width: int) -> Case:
        x = bench.draw(count, n, width)
        return Case(
            partial(close, cosine_similarity(x[1:].double(), x[:-1].double(), dim=2)),
            lambda: frame_similarity(x), lambda: candidates.frame_similarity(x),
            lambda: cosine_similarity(x[1:], x[:-1], dim=2),
            (x.numel() * x.element_size() + 4.0 * (count - 1) * n, 0.0),
        )  # fmt: skip

    def compact(batch: int, size: int, width: int, k: int, rows: int) -> Case:
        x, mask = bench.draw(batch, size, width), bench.uniform(batch, size) < 0.9
        numbers = torch.arange(size, device=bench.device).expand(rows, batch, -1).contiguous()
        index = bench.uniform(batch, size).argsort(1)[:, :k].sort(1).values
        shrink = Shrink(index, mask.gather(1, index), index)  # its way back is not needed here

        def gathers() -> tuple[Tensor, Tensor, Tensor]:
            return shrink.take(x), shrink.take_last(numbers), shrink.take_last(mask)

        moved = batch * k * (2 * (width * x.element_size() + 8 * rows + 1) + 8)
        return Case(
            partial(differs, (x.gather(1, index[..., None].expand(-1, -1, width)), *gathers()[1:])), gathers,
            lambda: candidates.compact(x, numbers, mask, index), lambda: loops.compact(x, numbers, mask, index),
            (float(moved), 0.0),
        )  # fmt: skip

    sizes = bench.few(32), bench.size(196), bench.size(3584)
    found = [Plan(f"frame similarity OneVision video {sizes[0]} x {sizes[1]}", partial(frames, *sizes))]
    for model, batch, size, width, k, rows in [
        ("LLaVA-1.5", 1, 616, 4096, 104, 1),
        ("LLaVA-1.5", 8, 616, 4096, 104, 1),
        ("OneVision video", 1, 6312, 3584, 667, 1),
        ("Qwen2-VL", 4, 4136, 3584, 450, 3),
    ]:
        small = bench.few(batch), bench.size(size), bench.size(width), bench.size(k), rows
        found.append(
            Plan(f"gather and compact {model} {small[0]} x {small[1]} -> {small[3]}", partial(compact, *small))
        )
    return found
