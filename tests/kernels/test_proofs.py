"""Triton's interpreter and Triton's compiler on the kernels, and rehearsals of what runs on a GPU, without one.

Each needs a process of its own: whether kernels are interpreted is decided when they are imported. The processes start
together, as compiling waits for the assembler much of the time.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PROOFS = {
    "interpreted": ["test_kernels.py", "-p", "interpreter"],
    "compiled for sm_80": ["compiled.py", "-k", "sm_80"],
    "compiled for sm_90": ["compiled.py", "-k", "sm_90"],
    "on a GPU that is pretended": ["../gpu.py", "--every", "8", "-k", "not vtc_bench"],  # that takes a minute
    "kernels on it": ["test_kernels.py", "-p", "on_gpu", "-k", "not bfloat16 and (merge or ties or query_rows)"],
    "benchmark": [],
}

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" and importlib.util.find_spec("triton") is None, reason="Triton exists for Linux only"
)


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tuple[subprocess.Popen[bytes], Path]]]:
    folder, started = tmp_path_factory.mktemp("proofs"), {}
    for number, (name, options) in enumerate(PROOFS.items()):
        compiles = name.startswith("compiled")
        environment = dict(os.environ, TRITON_INTERPRET="0" if compiles else "1", OMP_NUM_THREADS="1")
        if name == "benchmark":
            command = [sys.executable, ROOT / "benchmarks/kernels.py", "--small", "--out", folder / "table.md"]
        else:
            command = [sys.executable, "-m", "pytest", HERE / options[0], *options[1:], "-q", "-p", "no:cacheprovider"]
        output = folder / f"{number}.txt"
        with output.open("wb") as stream:
            started[name] = (
                subprocess.Popen(command, cwd=ROOT, env=environment, stdout=stream, stderr=subprocess.STDOUT),
                output,
            )
    yield started
    for process, _ in started.values():
        process.kill()
        process.wait()


@pytest.mark.parametrize("name", PROOFS)
def test_proof(name: str, processes: dict[str, tuple[subprocess.Popen[bytes], Path]]) -> None:
    process, output = processes[name]
    status = process.wait()
    text = output.read_text()
    assert status == 0, text
    if name == "benchmark":
        table = output.with_name("table.md").read_text().splitlines()
        assert (
            sum(line.startswith("| received") for line in table) >= 5
            and "| target on an H200 | measured | met |" in table
        )
        assert not any("wrong" in line or "failed" in line for line in table)
    else:
        assert " passed" in text and "skipped" not in text, text
