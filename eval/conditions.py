"""Where and with what something was measured: part of every row of results."""

from __future__ import annotations

import platform
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import transformers

import vtc
from vtc import adapters
from vtc.eval import flops


def environment(model: Any) -> dict[str, Any]:
    """Device, dtype, attention implementation, versions and date."""
    config = model.config.get_text_config()
    return {
        "family": adapters.find(model).family,
        "device": device_name(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "attention": getattr(config, "_attn_implementation", None),
        "threads": torch.get_num_threads(),
        "flops_convention": flops.CONVENTION,
        "versions": {
            "vtc": vtc.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def device_name(device: torch.device) -> str:
    """What the hardware calls itself."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
