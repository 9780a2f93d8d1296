"""Measures cases one after the other, in a process that may be replaced by another that goes on."""

from __future__ import annotations

import datetime
import platform
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
import triton

import vtc
from benchmarks.kernel import tune
from benchmarks.kernel.cases import Case, Plan, plans
from benchmarks.kernel.log import CASE, Log, Result
from benchmarks.kernel.timing import Bench, Call, NotCaptured, first_line
from vtc.eval.conditions import device_name
from vtc.zoo import torchvision

REPEATS = 10  # of a result that has to be the same every time


def chosen(bench: Bench, only: Sequence[str]) -> list[Plan]:
    """The cases whose names contain one of `only`; all if nothing is asked for."""
    return [plan for plan in plans(bench) if not only or any(part in plan.name for part in only)]


def work(
    log: Log, mode: str, small: bool, only: Sequence[str], until: float, written: Callable[[int], None]
) -> tuple[int, bool]:
    """Measure what the log lacks. Returns how many cases are left, and whether another process should measure them.

    Args:
        log: of this and earlier processes.
        mode: `time`, `check` or `tune`.
        small: whether this is a rehearsal.
        only: see `chosen`.
        until: when no case is begun any more, in seconds since the epoch.
        written: called after each case, with the number of those that are left.
    """
    torch.manual_seed(0)
    bench = Bench(small)
    log.describe(conditions(bench))
    todo = [plan for plan in chosen(bench, only) if plan.name not in log.results]
    with torch.no_grad():
        for number, plan in enumerate(todo):
            if time.time() > until:
                return len(todo) - number, False
            log.begin(plan.name)
            log.add(measured(bench, plan, mode, partial(log.add, more=True)))
            written(left := len(todo) - number - 1)
            if not bench.fit or not bench.alive():
                return left, left > 0
            if not small:
                torch.cuda.empty_cache()
    return 0, False


def measured(bench: Bench, plan: Plan, mode: str, keep: Callable[[Result], None]) -> Result:
    """Whatever goes wrong is part of the result. `keep` gets what is sure before `torch.compile` takes its time."""
    result = Result(plan.name)
    try:
        case = plan.make()
    except Exception as error:
        return fail(result, CASE, error)
    result.work = case.work
    if mode == "tune":
        if case.triton is not None:
            tune.tune(bench, case.triton, result)
        return result
    right = {}
    if case.triton is not None and is_right(result, "triton", case.triton, case, 0 if bench.small else REPEATS):
        right["triton"] = case.triton
    if mode == "check":
        return result
    if is_right(result, "torch", case.torch, case):
        right["torch"] = case.torch
    if case.loop is not None:
        right["loop"] = case.loop
    time_all(bench, result, right)
    if case.compiled and "torch" in right:
        keep(result)
        compiled = bench.compile(case.torch)
        if is_right(result, "compile", compiled, case):
            time_all(bench, result, {"compile": compiled})
    return result


def is_right(result: Result, name: str, call: Call, case: Case, repeats: int = 0) -> bool:
    """Whether an implementation gives the right result, and the same one again; if not, why is noted."""
    try:
        found = call()
        error = case.error(found)
        if not error <= 1:
            problem = f"is wrong: {error:.3g} times the error that is allowed"
        elif not all(same(call(), found) for _ in range(repeats)):
            problem = "is not the same in every run"
        else:
            return True
    except Exception as error:
        fail(result, name, error)
        return False
    result.verdicts[name] = "wrong"
    result.notes.append(f"{name} {problem}")
    return False


def same(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return torch.equal(a, b)
    return all(map(same, a, b))  # type: ignore[call-overload]


def time_all(bench: Bench, result: Result, calls: dict[str, Call]) -> None:
    """Everything eager comes first: once a capture has failed there can be no other."""
    for name, call in calls.items():
        try:
            result.times[name] = bench.eager(call), None
        except Exception as error:
            fail(result, name, error)
    for name in [name for name in calls if name in result.times]:
        try:
            result.times[name] = result.times[name][0], bench.replayed(calls[name])
        except NotCaptured as error:
            result.notes.append(f"{name} cannot be captured: {error}")
        except Exception as error:
            fail(result, name, error)


def fail(result: Result, name: str, error: Exception) -> Result:
    """Note an error. That the compiler or the loops fail is not our failure: they have no times then."""
    if name not in ("compile", "loop"):
        result.verdicts[name] = "failed"
    result.notes.append(f"{name} failed: {first_line(error)}")
    return result


def conditions(bench: Bench) -> str:
    torchvision.mend()  # before transformers looks for it
    import transformers

    device = "CPU, interpreted: times mean nothing" if bench.small else device_name(bench.device)
    versions = {
        "vtc": vtc.__version__,
        "torch": torch.__version__,
        "Triton": triton.__version__,
        "transformers": transformers.__version__,
        "Python": platform.python_version(),
    }
    told = ", ".join(f"{name} {version}" for name, version in versions.items())
    return f"{device}; {told}; {bench.dtype}; {datetime.date.today().isoformat()}"
