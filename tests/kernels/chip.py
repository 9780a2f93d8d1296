"""A GPU that is not there: Triton compiles for it, and launches do nothing.

Kernels are reached through the wrappers that the library calls, so what is compiled is what would run: the same
specialisation of arguments, options and tile sizes. Must not share a process with Triton's interpreter.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}  # bytes that one block can have
REGISTERS = 65536  # of a multiprocessor


@dataclass(frozen=True)
class Binary:
    """What the assembler made of one kernel: bytes, and numbers of instructions."""

    name: str
    shared: int
    registers: int
    stack: int
    spills: int  # loads from and stores to local memory, which is where registers go when there are too few
    tensor_cores: int
    loads: int
    wide_loads: int  # of 16 bytes


def read(name: str, cubin: bytes, shared: int) -> Binary:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _run("cuobjdump", "-res-usage", file.name)
        code = re.findall(
            r"^\s+(?:/\*[0-9a-f]+\*/\s+)?(?:@!?U?P\d+\s+)?([A-Z][A-Z0-9_.]+)", _run("nvdisasm", "-c", file.name), re.M
        )
    registers, stack, local = (int(re.search(rf"\b{key}:(\d+)", usage)[1]) for key in ("REG", "STACK", "LOCAL"))  # type: ignore[index]
    loads = [op for op in code if op.startswith(("LDG", "LDGSTS"))]
    return Binary(
        name, shared, registers, stack + local, sum(op.startswith(("LDL", "STL")) for op in code),
        sum(op.startswith(("HMMA", "HGMMA")) for op in code), len(loads), sum(".128" in op for op in loads),
    )  # fmt: skip


class Chip:
    """Pretends, to Triton, to be the driver of a GPU of compute capability `arch` / 10, and keeps what it is sent."""

    def __init__(self, arch: int) -> None:
        self.arch, self.utils, self.binaries = arch, self, []

    binaries: list[Binary]

    def install(self) -> None:
        driver.set_active(self)

    def load_binary(self, name: str, cubin: bytes, shared: int, device: int) -> tuple[object, str, int, int, int]:
        binary = read(name, cubin, shared)
        self.binaries.append(binary)
        return object(), name, binary.registers, binary.stack, min(1024, REGISTERS // (-(-binary.registers // 8) * 8))

    def unload_module(self, module: object) -> None: ...

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": SHARED_MEMORY[self.arch], "multiprocessor_count": 108, "max_num_regs": REGISTERS,
                "warpSize": 32}  # fmt: skip

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        return lambda *args: None

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch  # compiled kernels are kept per device, and must not be mistaken for those of another chip

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / tool, *arguments], capture_output=True, text=True, check=True).stdout
