"""Received attention in two passes over queries and keys; the probabilities live in registers only.

The first pass finds the normaliser of each query's softmax. The second holds a tile of keys, walks over all queries and
adds up the probabilities. No atomics: the sums are the same in every run.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from vtc.kernels.parts import OPTIONS, aligned


@triton.jit
def _sequence(offsets, longest, H, PACKED: tl.constexpr):
    """Start and length of the sequence of this program, and its head."""
    b = tl.program_id(1) // H
    if PACKED:
        start = tl.load(offsets + b).to(tl.int64)
        length = (tl.load(offsets + b + 1).to(tl.int64) - start).to(tl.int32)
    else:
        start = b.to(tl.int64) * longest
        length = longest
    return start, length, (tl.program_id(1) % H).to(tl.int64)


@triton.jit
def normaliser_kernel(
    query, key, offsets, out, T, longest, scale, sqt, sqh, skt, skh,
    H: tl.constexpr, SHARED: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, REST: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, CAUSAL: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of queries, B * H): log2 of the softmax' denominator, `(H, T)`. Strides count 8 elements.

    The head dimension is `D1 + REST`: a power of two, and a rest that is padded to `D2`.
    """
    start, length, h = _sequence(offsets, longest, H, PACKED)
    first = tl.program_id(0) * QUERIES
    if first < length:
        query += (start * sqt + h * sqh) * 8
        key += (start * skt + h // SHARED * skh) * 8
        m = first + tl.arange(0, QUERIES)
        d1 = tl.arange(0, D1)
        rows = query + m[:, None].to(tl.int64) * (sqt * 8)
        q1 = tl.load(rows + d1[None, :], mask=(m < length)[:, None], other=0.0)
        if D2 > 0:
            d2 = tl.arange(0, D2)
            q2 = tl.load(rows + D1 + d2[None, :], mask=(m < length)[:, None] & (d2 < REST)[None, :], other=0.0)
        highest = tl.full((QUERIES,), float("-inf"), tl.float32)
        total = tl.zeros((QUERIES,), tl.float32)
        end = length
        if CAUSAL:
            end = tl.minimum(length, first + QUERIES)
        for past in range(0, end, KEYS):
            n = past + tl.arange(0, KEYS)
            columns = key + n[None, :].to(tl.int64) * (skt * 8)
            k1 = tl.load(columns + d1[:, None], mask=(n < length)[None, :], other=0.0)
            s = tl.dot(q1, k1, input_precision=PRECISION)
            if D2 > 0:
                k2 = tl.load(columns + D1 + d2[:, None], mask=(n < length)[None, :] & (d2 < REST)[:, None], other=0.0)
                s = tl.dot(q2, k2, s, input_precision=PRECISION)
            seen = (n < length)[None, :]
            if CAUSAL:
                seen = seen & (n[None, :] <= m[:, None])
            s = tl.where(seen, s * scale, float("-inf"))
            higher = tl.maximum(highest, tl.max(s, 1))
            total = total * tl.exp2(highest - higher) + tl.sum(tl.exp2(s - higher[:, None]), 1)
            highest = higher
        tl.store(out + h * T + start + m, highest + tl.log2(total), mask=m < length)


@triton.jit
def received_kernel(
    query, key, offsets, normaliser, out, T, longest, scale, sqt, sqh, skt, skh,
    H: tl.constexpr, SHARED: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, REST: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, CAUSAL: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of keys, B * H): what each key receives in one head, over `H` and the number of queries, `(H, T)`."""
    start, length, h = _sequence(offsets, longest, H, PACKED)
    first = tl.program_id(0) * KEYS
    if first < length:
        query += (start * sqt + h * sqh) * 8
        key += (start * skt + h // SHARED * skh) * 8
        normaliser += h * T + start
        n = first + tl.arange(0, KEYS)
        d1 = tl.arange(0, D1)
        rows = key + n[:, None].to(tl.int64) * (skt * 8)
        k1 = tl.load(rows + d1[None, :], mask=(n < length)[:, None], other=0.0)
        if D2 > 0:
            d2 = tl.arange(0, D2)
            k2 = tl.load(rows + D1 + d2[None, :], mask=(n < length)[:, None] & (d2 < REST)[None, :], other=0.0)
        total = tl.zeros((KEYS,), tl.float32)
        begin = 0
        if CAUSAL:
            begin = first // QUERIES * QUERIES
        for past in range(begin, length, QUERIES):
            m = past + tl.arange(0, QUERIES)
            columns = query + m[None, :].to(tl.int64) * (sqt * 8)
            q1 = tl.load(columns + d1[:, None], mask=(m < length)[None, :], other=0.0)
            s = tl.dot(k1, q1, input_precision=PRECISION)
            if D2 > 0:
                q2 = tl.load(columns + D1 + d2[:, None], mask=(m < length)[None, :] & (d2 < REST)[:, None], other=0.0)
                s = tl.dot(k2, q2, s, input_precision=PRECISION)
            # Queries that do not exist have an infinite denominator, and so probabilities of 0.
            share = tl.exp2(s * scale - tl.load(normaliser + m, mask=m < length, other=float("inf"))[None, :])
            if CAUSAL:
                share = tl.where(n[:, None] <= m[None, :], share, 0.0)
            total += tl.sum(share, 1)
        tl.store(out + h * T + start + n, total / (H * length), mask=n < length)


def received(query: Tensor, key: Tensor, offsets: Tensor | None, longest: int, scale: float, causal: bool) -> Tensor:
    """See `vtc.kernels.received.naive.received`."""
    query, key = aligned(query), aligned(key)
    tokens, heads, width = query.shape
    batch = tokens // longest if offsets is None else offsets.shape[0] - 1
    d1 = 1 << (width.bit_length() - 1)
    rest = width - d1
    held, passing = _tile(width, query.dtype)
    normaliser, out = (torch.empty(heads, tokens, dtype=torch.float32, device=query.device) for _ in range(2))
    where = normaliser if offsets is None else offsets
    sizes = (tokens, longest, scale * math.log2(math.e), *(s // 8 for s in (*query.stride()[:2], *key.stride()[:2])))
    options = {
        "H": heads, "SHARED": heads // key.shape[1],
        "D1": d1, "D2": max(16, triton.next_power_of_2(rest)) if rest else 0, "REST": rest,
        "CAUSAL": causal, "PACKED": offsets is not None,
        "PRECISION": "tf32x3" if query.dtype == torch.float32 else "tf32", "num_warps": 4, **OPTIONS,
    }  # fmt: skip
    grid = (triton.cdiv(longest, held), batch * heads)
    normaliser_kernel[grid](query, key, where, normaliser, *sizes, QUERIES=held, KEYS=passing, **options)
    received_kernel[grid](query, key, where, normaliser, out, *sizes, KEYS=held, QUERIES=passing, **options)
    return out.sum(0)


def _tile(width: int, dtype: torch.dtype) -> tuple[int, int]:
    """Rows that a program holds, and rows that pass by at a time: as many as the registers have room for.

    `tests/kernels/compiled.py` makes sure of that.
    """
    if dtype == torch.float32:
        return 32, 64
    return 64, 128 if width <= 96 else 64
