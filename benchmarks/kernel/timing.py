"""Where kernels run and how long they take: on a GPU, or in a rehearsal on the CPU."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor

from vtc.eval.latency import Clock

Call = Callable[[], Any]

CACHE = 2**28  # bytes: more than any L2 holds
LEAST, MOST = 10, 200  # measurements of a time
WARM, LONG = 0.03, 0.15  # seconds: before the first of them, and of all together


class NotCaptured(Exception):
    """An operation cannot be part of a CUDA graph. Its message says why.

    Nothing can be captured in this process any more: torch ends a capture in steps and gives up at the first that
    fails, so that its allocator and its random numbers go on as if the capture did.
    """


class Bench:
    """The device, and the sizes that suit it: those of real models on a GPU, small ones in a rehearsal."""

    def __init__(self, small: bool) -> None:
        self.small = small
        self.device = torch.device("cpu" if small else "cuda")
        # The interpreter computes in bfloat16 wrongly, and in float16 as numpy does.
        self.dtype = torch.float16 if small else torch.bfloat16
        self.clock = Clock(self.device)
        self.flush = torch.empty(8 if small else CACHE, dtype=torch.uint8, device=self.device)
        self.fit = True  # for captures

    def size(self, n: int) -> int:
        return min(max(3, n // 48), 130) if self.small else n

    def few(self, n: int) -> int:
        """As many of a batch, or of heads."""
        return min(n, 2) if self.small else n

    def draw(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device=self.device).to(self.dtype)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(*shape, device=self.device)

    def compile(self, call: Call) -> Call:
        torch._dynamo.reset()  # or the sizes of the cases before would make those of this one variable
        return torch.compile(call, fullgraph=True, dynamic=False, backend="eager" if self.small else "inductor")

    def eager(self, call: Call) -> float:
        """Median microseconds from an idle device on: what launching costs is part of it."""
        return self._median(call, idle=True)

    def replayed(self, call: Call) -> float | None:
        """Median microseconds of a replayed CUDA graph, on a device that is still busy when the replay is launched.

        `None` where there are no graphs.
        """
        if self.small or not self.fit:
            return None
        graph = self._capture(call)
        try:
            return self._median(graph.replay, idle=False)
        finally:
            del graph
            torch.cuda.empty_cache()

    def _median(self, call: Call, idle: bool) -> float:
        if self.small:
            return 1e3 * self._once(call, idle)
        begin = time.perf_counter()
        while time.perf_counter() - begin < WARM:
            self._once(call, idle)
        begin, took = time.perf_counter(), [self._once(call, idle)]
        while len(took) < LEAST or (len(took) < MOST and time.perf_counter() - begin < LONG):
            took.append(self._once(call, idle))
        return 1e3 * median(took)

    def _once(self, call: Call, idle: bool) -> float:
        self.flush.zero_()
        if idle:
            self.clock.wait()
        start = self.clock.now()
        call()
        end = self.clock.now()
        self.clock.wait()
        return self.clock.between(start, end)

    def _capture(self, call: Call) -> torch.cuda.CUDAGraph:
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        with torch.cuda.stream(stream):
            call()  # libraries take their workspaces now, once per stream
        torch.cuda.synchronize()
        gc.collect()
        gc.disable()  # what it would throw away may be a kernel, and unloading one ends a capture
        try:
            with torch.cuda.stream(stream), torch.cuda.graph(graph, stream=stream):
                call()
        except Exception as error:
            self.fit = False
            cause = error.__context__ or error  # ending the capture fails as well, and says less
            raise NotCaptured(first_line(cause)) from error
        finally:
            gc.enable()
        torch.cuda.synchronize()
        return graph

    def alive(self) -> bool:
        """Whether the device still answers: after some errors it does nothing more for this process."""
        try:
            self.clock.wait()
            return bool(torch.ones(1, device=self.device).sum() == 1)
        except RuntimeError:
            return False


def first_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0].strip() if lines else ''}"[:300]
