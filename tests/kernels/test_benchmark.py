"""The benchmark of the kernels loses nothing when a case goes wrong, and compares like with like."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import kernels
from benchmarks.kernel.log import CENTER, FRAMES, PREFILL, WHOLE, Log, Result, row, table, targets

WORKER = """
import os, sys, time
sys.path.insert(0, {root!r})
from pathlib import Path
from benchmarks.kernel.log import Log, Result

log = Log(Path({path!r}), fresh=False)
for name in ("fine", "crash", "again", "hang", "last"):
    if name in log.results:
        continue
    log.begin(name)
    if name == "crash":
        log.add(Result(name, times=dict(triton=(7.0, 5.0))), more=True)
        os.abort()
    if name == "hang":
        time.sleep(60)
    log.add(Result(name))
    if name == "again":
        sys.exit(75)
sys.exit(1 if log.failed else 0)
"""


def test_another_process_goes_on_where_one_ended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script, out = tmp_path / "worker.py", tmp_path / "table.md"
    root = str(Path(kernels.__file__).parents[1])
    script.write_text(WORKER.format(root=root, path=str(out.with_suffix(".jsonl"))))
    monkeypatch.setattr(kernels, "__file__", str(script))
    monkeypatch.setattr(kernels, "SILENCE", 2)
    monkeypatch.setattr(sys, "argv", ["kernels.py"])
    assert kernels.supervise(argparse.Namespace(out=out, resume=False, minutes=1.0)) == 1
    results = Log(out.with_suffix(".jsonl"), fresh=False).results
    assert list(results) == ["fine", "crash", "again", "hang", "last"]
    assert [name for name, result in results.items() if result.failed] == ["crash", "hang"]
    assert results["crash"].time("triton", graph=True) == 5.0 and "exit code -6" in results["crash"].notes[0]
    assert "fell silent" in results["hang"].notes[0]
    log = out.with_suffix(".jsonl").read_text()
    assert kernels.supervise(argparse.Namespace(out=out, resume=True, minutes=1.0)) == 1
    assert out.with_suffix(".jsonl").read_text() == log  # nothing is measured twice


def test_eager_is_compared_with_eager(tmp_path: Path) -> None:
    log = Log(tmp_path / "log.jsonl", fresh=True)
    log.describe("somewhere; today")
    log.add(Result(CENTER, times={"triton": (100.0, 50.0), "loop": (1900.0, 1000.0)}))
    log.add(Result(WHOLE, times={"triton": (300.0, 60.0)}))
    log.add(Result(PREFILL, times={"torch": (20000.0, 4000.0)}))
    time, faster, less, share = (line.split(" | ")[1:] for line in targets(log))
    assert time == ["eager 100.00, replayed 50.00", "yes |"]  # replayed
    assert faster == ["eager 19.00, replayed 20.00", "no |"]  # eager
    assert less == ["", "not measured |"]
    assert share == ["eager 1.50, replayed 1.50", "yes |"]  # both
    log.add(Result(WHOLE, times={"triton": (300.0, 90.0)}))
    assert targets(log)[3].endswith("eager 1.50, replayed 2.25 | no |")
    assert "Partial: 3 cases" in table(log, 3) and "Partial" not in table(log, 0)


def test_shares_of_the_ceilings() -> None:
    """Of what was replayed, if anything was; in a row whose Triton kernel is wrong, of torch."""
    result = Result("a case", (2e6, 3e6), {"triton": (9.0, 4.0), "torch": (7.0, 5.0), "loop": (1.0, 1.0)})
    assert row(result, 1e6, 3e6).endswith("| 1.0 | 1.0 | 50.0 | 25.0 |")
    result = Result("a case", (2e6, 0.0), {"torch": (8.0, None)}, {"triton": "wrong"})
    assert row(result, 1e6, None) == "| a case | wrong |  | 8.0 |  |  |  |  |  | 25.0 |  |"


@pytest.mark.skipif(sys.platform != "linux", reason="Triton exists for Linux only")
class TestCases:
    def test_rehearsal_of_other_parameters(self, tmp_path: Path) -> None:
        """A case with two kernels, each with its own parameters and with two others."""
        command = [sys.executable, kernels.__file__, "--small", "--tune", "--only", "received CLIP-L/336 1"]
        command += ["--out", str(tmp_path / "tuning.md")]
        environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        rows = [line for line in (tmp_path / "tuning.md").read_text().splitlines() if "_kernel" in line]
        assert [line.split(",")[0] for line in rows] == ["| normaliser_kernel", "| received_kernel"]
        assert all(line.count(";") == 1 for line in rows)  # between two others

    def test_targets_are_among_the_cases(self) -> None:
        from benchmarks.kernel.cases import plans

        real: Any = SimpleNamespace(small=False, size=lambda n: n, few=lambda n: n)
        names = [plan.name for plan in plans(real)]
        assert len(names) == len(set(names)) and {CENTER, FRAMES, PREFILL, WHOLE} <= set(names[:6])

    def test_checks_tell_right_from_wrong(self) -> None:
        import torch

        from benchmarks.kernel import cases
        from vtc.kernels import assign, dpp, k_center

        random = torch.Generator().manual_seed(0)
        x, relevance = torch.randn(2, 40, 24, generator=random), torch.rand(2, 40, generator=random) + 0.1
        order, last = k_center(x, 9), torch.arange(9).expand(2, -1)
        assert cases.greedy_regret(x, order) < 1 < cases.greedy_regret(x, order.roll(1, 1))
        swapped = torch.cat([order[:, :1], last + 20], dim=1)
        assert cases.greedy_regret(x, swapped) > 1
        order = dpp(x, relevance, 9)
        assert cases.dpp_regret(x, relevance, order) < 1 < cases.dpp_regret(x, relevance, last)
        slot = assign(x, last)
        means = torch.stack([torch.stack([a[b == s].mean(0) for s in range(9)]) for a, b in zip(x, slot, strict=True)])
        assert cases.merge_error(x, last, (slot, means)) < 1 < cases.merge_error(x, last, (slot, means * 1.01))
        other = torch.where(torch.arange(40) == 30, (slot + 1) % 9, slot)
        assert cases.merge_error(x, last, (other, means)) > 1
        assert cases.close(x, x * (1 + 1e-4)) < 1 < cases.close(x, x * (1 + 1e-2))
        assert cases.differs((x, order), (x, order)) < 1 < cases.differs((x, order), (x, order + 1))

    @pytest.mark.parametrize("rows", [1, 2, 8, 16])
    def test_relaunched_kernels_cover_everything(self, rows: int) -> None:
        from benchmarks.kernel.tune import Launch

        grids = []
        kernel_class = type("Kernel", (), {"__getitem__": lambda self, grid: lambda *a, **o: grids.append((grid, o))})
        kernel = kernel_class()
        for n in (1, 15, 577):
            Launch("assign_kernel", kernel, (-(-n // 8), 3), (), {"ROWS": 8, "SLOTS": 128}).run(ROWS=rows)
            (first, batch), options = grids.pop()
            assert first * rows >= n and batch == 3 and options["ROWS"] == rows
