"""Check the kernels on this GPU, then time them: Triton, torch, `torch.compile`, and loops as papers' code has them.

    python benchmarks/kernels.py --out benchmarks/kernels.md
    python benchmarks/kernels.py --only k-center --only received   # some of the cases
    python benchmarks/kernels.py --resume                          # what an earlier run did not get to
    python benchmarks/kernels.py --tune --out tuning.md            # other launch parameters
    python benchmarks/kernels.py --check                           # results only, at once

The table is written after every case. Nothing is timed whose result is wrong; that, or an error, is in the table, the
other cases follow, and the exit code is 1. A process that a case has broken is replaced by another that goes on.

Without a GPU it can be rehearsed, in Triton's interpreter on small shapes; the times then mean nothing:

    TRITON_INTERPRET=1 python benchmarks/kernels.py --small --out rehearsal.md
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import time
from pathlib import Path

# A script's folder is where Python looks first, and there transformers would take this file for a library it knows.
if Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    sys.path.pop(0)
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.kernel.log import CASE, Log, Result, table, tuning

AGAIN = 75  # exit code of a worker after which another one has to go on
SILENCE = 180  # seconds without a line in the log after which a worker is taken for dead


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="small shapes on the CPU, in Triton's interpreter")
    parser.add_argument("--out", type=Path, default=Path("kernels.md"), help="where the table goes (kernels.md)")
    parser.add_argument("--only", action="append", default=[], metavar="TEXT", help="cases whose names contain this")
    parser.add_argument("--minutes", type=float, default=7, help="begin no case after that (default: %(default)s)")
    parser.add_argument("--resume", action="store_true", help="keep what the log beside the table has")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--check", dest="mode", action="store_const", const="check", help="check our kernels alone")
    mode.add_argument("--tune", dest="mode", action="store_const", const="tune", help="vary launch parameters")
    parser.add_argument("--worker", type=float, metavar="UNTIL", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.mode = options.mode or "time"
    if options.worker is not None:
        return work(options)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # and take the worker along
    return supervise(options)


def supervise(options: argparse.Namespace) -> int:
    """Have a worker measure; if it breaks or falls silent, note that, and have the next one go on."""
    path = options.out.with_suffix(".jsonl")
    Log(path, fresh=not options.resume)
    until = time.time() + 60 * options.minutes
    while True:
        worker = subprocess.Popen([sys.executable, __file__, *sys.argv[1:], "--worker", str(until)])
        try:
            code = watch(worker, path)
        finally:
            worker.kill()
        log = Log(path, fresh=False)
        if log.begun is not None:
            reason = "fell silent" if code == -9 else f"exit code {code}"
            result = log.results.get(log.begun) or Result(log.begun)
            result.verdicts[CASE] = "failed"
            result.notes.append(f"the process ended: {reason}")
            log.add(result)
        elif code != AGAIN:
            return code
        print("another process goes on", file=sys.stderr, flush=True)


def watch(worker: subprocess.Popen[bytes], path: Path) -> int:
    began = time.time()
    while True:
        try:
            return worker.wait(timeout=1)
        except subprocess.TimeoutExpired:
            if time.time() - max(began, path.stat().st_mtime) > SILENCE:
                worker.kill()


def work(options: argparse.Namespace) -> int:
    """What the worker does."""
    from benchmarks.kernel import worker

    log = Log(options.out.with_suffix(".jsonl"), fresh=False)
    render = tuning if options.mode == "tune" else table
    began = time.time()

    def written(left: int) -> None:
        result = list(log.results.values())[-1]
        told = ", ".join(f"{name} {'/'.join(f'{t:.1f}' for t in pair if t)}" for name, pair in result.times.items())
        told = told or ("right" if options.mode == "check" and not result.failed else "")
        problems = "".join(f"\n    {note}" for note in result.notes)
        print(f"{time.time() - began:6.1f} s  {result.name}: {told}{problems}", file=sys.stderr, flush=True)
        options.out.write_text(render(log, left))

    left, again = worker.work(log, options.mode, options.small, options.only, options.worker, written)
    options.out.write_text(render(log, left))
    if again:
        return AGAIN
    print(options.out)
    return 1 if log.failed or left else 0


if __name__ == "__main__":
    sys.exit(main())
