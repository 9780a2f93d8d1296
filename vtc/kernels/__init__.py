"""Operations that are worth a kernel: fused in Triton on an NVIDIA GPU, in torch everywhere else.

Each operation is a folder: `naive.py` is the readable reference and runs on any device; `triton.py` gives the same
result in a few launches, and is imported the first time it runs. What runs is decided by the tensors alone
(`vtc.kernels.dispatch`): no environment variable, no tuning at run time. Nothing waits for the device, and results are
the same in every run.

Not here: gathering the features, positions and masks of the survivors. Those are `torch.gather`s, bound by memory like
any kernel; that one launch instead of three pays has not been shown. `benchmarks/kernels.py` compares.
"""

from __future__ import annotations

from vtc.kernels.assign import assign
from vtc.kernels.frames import frame_similarity
from vtc.kernels.greedy import dpp, k_center, max_sum, most_isolated
from vtc.kernels.merge import merge
from vtc.kernels.peaks import density_peaks
from vtc.kernels.received import received, received_packed
from vtc.kernels.rows import query_rows

__all__ = [
    "assign",
    "density_peaks",
    "dpp",
    "frame_similarity",
    "k_center",
    "max_sum",
    "merge",
    "most_isolated",
    "query_rows",
    "received",
    "received_packed",
]
