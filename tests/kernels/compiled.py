"""Every kernel compiled for sm_80 and sm_90, at the shapes of real models; `test_proofs.py` runs this alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from chip import SHARED_MEMORY, Chip
from torch import Tensor

from benchmarks.kernel import candidates
from vtc.kernels.assign import triton as assign
from vtc.kernels.greedy import triton as greedy
from vtc.kernels.merge import triton as merge
from vtc.kernels.peaks import triton as peaks
from vtc.kernels.received import triton as received
from vtc.kernels.rows import triton as rows

HALF = torch.bfloat16


def empty(*shape: int, dtype: torch.dtype = HALF) -> Tensor:
    return torch.empty(*shape, dtype=dtype)


def long(*shape: int) -> Tensor:
    return torch.zeros(*shape, dtype=torch.long)


def real(*shape: int) -> Tensor:
    return torch.empty(*shape)


def attend(
    batch: int, n: int, heads: int, groups: int, width: int, dtype: torch.dtype = HALF, causal: bool = False
) -> None:
    query, key = empty(batch * n, heads, width, dtype=dtype), empty(batch * n, groups, width, dtype=dtype)
    received.received(query, key, None, n, 0.1, causal)


def gather(n: int, kept: int, channels: int, dtype: torch.dtype) -> None:
    x = empty(1, n, channels, dtype=dtype)
    merge.merge(x, long(1, n), long(1, kept + 1), long(1, n), real(1, n))


# CLIP-L/336 and LLaVA-1.5, five views of LLaVA-NeXT, SigLIP and OneVision, Qwen2-VL; one row, and odd numbers of rows.
CASES: dict[str, Callable[[], object]] = {
    **{
        f"{name}-{n}": lambda n=n, call=call: call(empty(5, n, 16))  # type: ignore[misc]
        for n in (1, 196, 576, 729, 2880, 6272, 8192)
        for name, call in {
            "k-center": lambda x: greedy.greedy(x, 64, long(5), None, False),
            "isolated": lambda x: greedy.greedy(x, 64, None, None, False),
            "max-sum": lambda x: greedy.greedy(x, 64, long(5), None, True),
            "weighted": lambda x: greedy.greedy(x, 64, long(5), real(5, x.shape[1]), False),
        }.items()
    },
    **{f"dpp-{n}": lambda n=n: greedy.dpp(empty(5, n, 16), real(5, n), 64) for n in (1, 196, 576, 729, 2880, 4096)},
    "rows-clip": lambda: rows.query_rows(empty(5, 1, 16, 64), empty(5, 577, 16, 64), 0.1, None),
    "rows-siglip": lambda: rows.query_rows(empty(5, 1, 16, 72), empty(5, 729, 16, 72), 0.1, None),
    "rows-one-key": lambda: rows.query_rows(empty(1, 1, 1, 64), empty(1, 1, 1, 64), 0.1, None),
    "rows-text": lambda: rows.query_rows(empty(1, 9, 28, 128), empty(1, 6272, 4, 128), 0.1, long(1, 6272).bool()),
    "rows-long": lambda: rows.query_rows(empty(1, 1, 32, 128), empty(1, 65536, 8, 128), 0.1, None),
    "rows-wide": lambda: rows.query_rows(empty(1, 1, 8, 256), empty(1, 4096, 4, 256), 0.1, None),
    "rows-float32": lambda: rows.query_rows(
        empty(1, 1, 16, 80, dtype=torch.float32), empty(1, 4096, 16, 80, dtype=torch.float32), 0.1, None
    ),
    **{f"received-{width}": lambda width=width: attend(2, 729, 16, 16, width) for width in (64, 72, 80, 96, 128)},
    **{
        f"received-float32-{width}": lambda width=width: attend(2, 729, 16, 16, width, torch.float32)
        for width in (64, 72, 80, 96, 128)
    },
    "received-float16": lambda: attend(5, 577, 16, 16, 64, torch.float16),
    "received-causal": lambda: attend(1, 2048, 28, 4, 128, causal=True),
    "received-one": lambda: attend(1, 1, 1, 1, 64),
    "received-packed": lambda: received.received(
        empty(16384, 16, 80), empty(16384, 16, 80), torch.zeros(3, dtype=torch.int32), 8192, 0.1, False
    ),
    "assign-llava": lambda: assign.assign(empty(1, 576, 16), long(1, 64), False),
    "assign-video": lambda: assign.assign(empty(1, 6272, 16), long(1, 627), False),
    "assign-euclidean": lambda: assign.assign(empty(32, 196, 16), long(32, 21), True),
    "assign-one": lambda: assign.assign(empty(1, 1, 16), long(1, 1), False),
    "merge-llava": lambda: gather(576, 64, 4096, HALF),
    "merge-video": lambda: gather(6272, 627, 3584, torch.float16),
    "merge-float32": lambda: gather(576, 64, 1152, torch.float32),
    "merge-one": lambda: gather(1, 1, 1, HALF),
    # Not of the library: candidates that the benchmark times.
    "compact-llava": lambda: candidates.compact(
        empty(8, 616, 4096), long(1, 8, 616), long(8, 616).bool(), long(8, 104)
    ),
    "compact-mrope": lambda: candidates.compact(empty(1, 99, 3584), long(3, 1, 99), long(1, 99).bool(), long(1, 9)),
    "frames-video": lambda: candidates.frame_similarity(empty(32, 196, 3584)),
    **{f"peaks-{n}": lambda n=n: peaks.density_peaks(empty(2, n, 16), 7) for n in (1, 196, 729, 2880, 4096)},
}
TENSOR_CORES = {"normaliser_kernel", "received_kernel"}


@pytest.fixture(autouse=True)
def no_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling needs the shapes of matrix products, not the products."""

    def gram(x: Tensor) -> tuple[Tensor, Tensor]:
        pitch = -(-x.shape[1] // 16) * 16
        return real(x.shape[0], pitch, pitch), real(x.shape[0], pitch)

    monkeypatch.setattr(greedy, "gram", gram)
    monkeypatch.setattr(peaks, "gram", gram)
    monkeypatch.setattr(assign, "products", lambda a, b: real(a.shape[0], a.shape[1], b.shape[1]))


@pytest.mark.parametrize("arch", SHARED_MEMORY, ids="sm_{}".format)
@pytest.mark.parametrize("name", CASES)
def test_no_spills_and_fits(name: str, arch: int) -> None:
    chip = Chip(arch)
    chip.install()
    CASES[name]()
    for binary in chip.binaries:
        print(arch, binary)
        assert binary.stack == binary.spills == 0, binary
        assert binary.shared <= SHARED_MEMORY[arch], binary
        assert (binary.tensor_cores > 0) == (binary.name in TENSOR_CORES), binary
        # Rows of heads are read 16 bytes at a time; 72 channels are where Triton loses track of that by itself.
        assert binary.name not in TENSOR_CORES or 2 * binary.wide_loads > binary.loads, binary
