"""Other launch parameters for the kernels of the library, on the arguments that they have in the benchmark.

A case runs once, with kernels that note how they are launched; then each launch is repeated with other parameters.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.kernel import candidates
from benchmarks.kernel.log import Result
from benchmarks.kernel.timing import Bench, Call, NotCaptured, first_line
from vtc.kernels.assign import triton as assign
from vtc.kernels.greedy import triton as greedy
from vtc.kernels.merge import triton as merge
from vtc.kernels.peaks import triton as peaks
from vtc.kernels.received import triton as received
from vtc.kernels.rows import triton as rows

MODULES = (assign, greedy, merge, peaks, received, rows, candidates)
PER_THREAD = 32  # elements of a row in registers; with more, variants spill, and compile for long
CLOSE = 1e-3  # relative error of sums in another order

# Per kernel: parameters that are varied together, in all combinations, while the others stay.
VARIANTS: dict[str, list[dict[str, tuple[int, ...]]]] = {
    "nearest_kernel": [{"ROWS": (1, 2, 4, 8)}, {"COLUMNS": (128, 256, 512)}, {"num_warps": (2, 4, 8)}],
    "greedy_kernel": [{"num_warps": (1, 2, 4, 8, 16, 32)}],
    "dpp_kernel": [{"num_warps": (1, 2, 4, 8, 16, 32)}, {"PAST": (4, 8, 16)}],
    "score_kernel": [{"num_warps": (2, 4, 8)}],
    "average_kernel": [{"PARTS": (8, 16, 32)}, {"num_warps": (2, 4, 8)}],
    "normaliser_kernel": [{"QUERIES": (64, 128), "KEYS": (64, 128), "num_warps": (4, 8)}, {"num_stages": (2, 3, 4)}],
    "received_kernel": [{"KEYS": (64, 128), "QUERIES": (64, 128), "num_warps": (4, 8)}, {"num_stages": (2, 3, 4)}],
    "assign_kernel": [{"ROWS": (4, 8, 16), "SLOTS": (64, 128)}, {"num_warps": (2, 4, 8)}],
    "merge_kernel": [{"CHANNELS": (128, 256, 512, 1024)}, {"ENTRIES": (4, 8, 16)}, {"num_warps": (1, 2, 4)}],
    "spread_kernel": [{"ROWS": (1, 2, 4)}, {"num_warps": (2, 4, 8)}],
    "peak_kernel": [{"ROWS": (1, 2, 4)}, {"num_warps": (2, 4, 8)}],
    "compact_kernel": [{"BLOCK": (1024, 2048, 4096), "num_warps": (2, 4, 8)}],
    "frames_kernel": [{"num_warps": (2, 4, 8)}],
}
# The parameter that says how much one program of the first axis of the grid does.
SHARE = {
    "nearest_kernel": "ROWS", "assign_kernel": "ROWS", "merge_kernel": "CHANNELS", "spread_kernel": "ROWS",
    "peak_kernel": "ROWS", "normaliser_kernel": "QUERIES", "received_kernel": "KEYS",
}  # fmt: skip
USUAL = {"num_stages": 3}  # of Triton, where a launch does not say


@dataclass
class Launch:
    name: str
    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    options: dict[str, Any]

    def run(self, **changes: int) -> None:
        first, *others = self.grid
        if share := SHARE.get(self.name):
            old, new = self.options[share], changes.get(share, self.options[share])
            first = -(-first * old // new)
        grid = (first, *others)
        self.kernel[grid](*self.args, **{**self.options, **changes})

    def parameters(self) -> dict[str, int]:
        """The present ones, of those that are varied."""
        names = {name for grid in VARIANTS[self.name] for name in grid}
        return {name: self.options.get(name, USUAL.get(name, 0)) for name in sorted(names)}

    def variants(self, small: bool) -> list[dict[str, int]]:
        """What differs from the present parameters, in each variant."""
        now, found = self.parameters(), []
        for grid in VARIANTS[self.name]:
            for values in product(*grid.values()):
                changes = {name: value for name, value in zip(grid, values, strict=True) if value != now[name]}
                if changes and self._holds({**self.options, **changes}):
                    found.append(changes)
        return found[:2] if small else found

    def _holds(self, options: dict[str, Any]) -> bool:
        wide = options.get("BLOCK", 0) if self.name in ("greedy_kernel", "dpp_kernel") else 0
        return wide <= PER_THREAD * 32 * options["num_warps"]


class Noting:
    """A kernel that remembers its launches."""

    def __init__(self, name: str, kernel: Any, launches: list[Launch]) -> None:
        self.name, self.kernel, self.launches = name, kernel, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*args: Any, **options: Any) -> None:
            self.launches.append(Launch(self.name, self.kernel, grid, args, options))
            self.kernel[grid](*args, **options)

        return launch


def launches(call: Call) -> list[Launch]:
    """What a call launches of our kernels."""
    found: list[Launch] = []
    with ExitStack() as stack:
        for module in MODULES:
            for name in VARIANTS.keys() & vars(module).keys():
                stack.enter_context(mock.patch.object(module, name, Noting(name, getattr(module, name), found)))
        call()
    return found


def tune(bench: Bench, call: Call, result: Result) -> None:
    """Time each launch of `call` with its own parameters, then with others."""
    try:
        found = launches(call)
    except Exception as error:
        result.verdicts["triton"] = "failed"
        result.notes.append(first_line(error))
        return
    for launch in found:
        before = [x.clone() if isinstance(x, Tensor) else x for x in launch.args]
        for changes in [{}, *launch.variants(bench.small)]:
            parameters = ", ".join(f"{name}={value}" for name, value in (changes or launch.parameters()).items())
            key = f"{launch.name}: {parameters}"
            try:
                run = partial(launch.run, **changes)
                run()
                if all(map(alike, before, launch.args)):
                    result.times[key] = None, bench.eager(run) if bench.small else bench.replayed(run)
                else:
                    result.notes.append(f"{key}: another result")
            except NotCaptured as error:
                result.notes.append(f"{key}: {error}")
                return
            except Exception as error:  # most of all parameters that need more shared memory than there is
                result.notes.append(f"{key}: {first_line(error)}")
                if not bench.alive():
                    return


def alike(before: Any, after: Any) -> bool:
    if not isinstance(after, Tensor):
        return True
    if not after.is_floating_point():
        return torch.equal(before, after)
    return bool((before - after).norm() <= CLOSE * before.norm())
