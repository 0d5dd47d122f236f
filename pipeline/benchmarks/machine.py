"""What a figure was measured on: processor, memory, GPU and the versions of what decides the speed."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as package_version
from pathlib import Path
from typing import Any

import torch

from pipeline.errors import UserError
from pipeline.model_store import package_versions

MATRIX_UNITS = ("amx_bf16", "avx512_bf16")
"""Processor flags that say what multiplies bfloat16 matrices."""
RIVALS = ("scikit-learn", "adeval", "opencv-python", "simplejpeg", "imagecodecs", "pyvips")


def machine() -> dict[str, Any]:
    """The machine; memory in GiB."""
    cpu = _cpu_fields()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": cpu.get("model name", platform.processor()),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "matrix_units": [flag for flag in MATRIX_UNITS if flag in cpu.get("flags", "").split()],
        "torch_threads": torch.get_num_threads(),
        "waiting": {name: os.environ[name] for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT") if name in os.environ},
        "memory_gib": round(memory / 2**30, 1),
        "gpu": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "system": platform.platform(),
    }


def chosen_device(name: str) -> torch.device:
    """The device of that name, or the best one. Raises UserError when it is not there."""
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device {name}: PyTorch sees no GPU here; use cpu")
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def versions() -> dict[str, str]:
    """Python, CUDA as PyTorch was built for it, and packages; those that we compare with where they are installed."""
    found = {"python": platform.python_version(), "cuda": str(torch.version.cuda), **package_versions()}
    for name in RIVALS:
        try:
            found[name] = package_version(name)
        except PackageNotFoundError:
            continue
    return found


def _cpu_fields() -> dict[str, str]:
    """Linux' fields of the first processor."""
    file = Path("/proc/cpuinfo")
    if not file.exists():
        return {}
    first = file.read_text().split("\n\n")[0]
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}
