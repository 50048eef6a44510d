"""`trilith doctor`: the environment in one block, to read or to paste into an issue."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
from dataclasses import fields
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed

from trilith.kernels import library
from trilith.kernels.backends import Backends
from trilith.kernels.contest import attention_contest

PACKAGES = ("torch", "numpy", "pydantic", "safetensors", "tokenizers", "rich", "tensorboard", "matplotlib")
OPTIONAL = ("deepspeed", "transformers", "triton", "pyarrow", "ninja", "pybind11")


def examine() -> dict[str, Any]:
    """What this machine has: versions, processors, memory, devices, backends, compilers."""
    return {
        "trilith": _version("trilith"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in (*PACKAGES, *OPTIONAL)},
        "cores": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "shared_memory_bytes": shutil.disk_usage("/dev/shm").total if os.path.isdir("/dev/shm") else 0,
        "torch_cuda": torch.version.cuda,
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "backends": [name for name in ("gloo", "nccl", "mpi") if torch.distributed.is_backend_available(name)],
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "kernels": _kernels(),
        "compilers": {name: _compiler(name) for name in ("g++", "nvcc")},
        "environment": {
            k: v for k, v in sorted(os.environ.items()) if k.startswith(("OMP_", "NCCL_", "GLOO_", "CUDA_"))
        },
    }


def describe(report: dict[str, Any]) -> str:
    """The same as text, one line each."""
    lines = [f"trilith {report['trilith']}, Python {report['python']}, {report['platform']}"]
    lines += [f"  {name:<14}{version or 'not installed'}" for name, version in report["packages"].items()]
    gib = report["memory_bytes"] / 2**30
    lines.append(f"processors    {report['cores']} cores, {report['cpu_capability']}, {gib:.1f} GiB memory")
    devices = ", ".join(report["devices"]) or "none (ranks run on the CPU)"
    lines.append(f"CUDA          {report['torch_cuda'] or 'not in this torch'}; devices: {devices}")
    lines.append(f"backends      {', '.join(report['backends'])}")
    lines += _kernel_lines(report["kernels"])
    for name, version in report["compilers"].items():
        lines.append(f"{name:<14}{version or 'not found (not needed to train)'}")
    for name, value in report["environment"].items():
        lines.append(f"{name}={value}")
    return "\n".join(lines)


def _kernels() -> dict[str, Any]:
    """The native library, and by family of ops and device what runs under `auto`, with why nothing faster does."""
    found = library.LIBRARY
    refusal = library.cuda_refusal(0) if torch.cuda.is_available() else library.CUDA_MISSING or "there is no device"
    if not refusal and not library.CUDA_HAS_RUN:
        refusal = "the CUDA kernels have not run on a GPU yet: kernels.backend 'fused' takes them"
    cpu = {"runs": "fused", "why": ""} if found else {"runs": "torch", "why": library.MISSING}
    cuda = {"runs": "torch", "why": refusal} if refusal else {"runs": "fused", "why": ""}
    return {
        "built": found is not None,
        "instruction_sets": list(found.instruction_sets) if found else [],
        "openmp": bool(found and found.has_openmp),
        "openmp_runtimes": _openmp_runtimes(),
        "ops": {f.name: {"cpu": cpu, "cuda": cuda} for f in fields(Backends)},
        "attention_contest": attention_contest().table(),
    }


def _openmp_runtimes() -> list[str]:
    """The OpenMP runtimes in this process. With two, their teams of threads wait on each other's cores."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return []
    paths = {line.split()[-1] for line in maps.splitlines() if "/" in line}
    return sorted(path for path in paths if Path(path).name.startswith(("libgomp", "libomp", "libiomp")))


def _kernel_lines(kernels: dict[str, Any]) -> list[str]:
    sets = ", ".join(kernels["instruction_sets"])
    lines = [f"kernels       {f'built for {sets}' if kernels['built'] else 'not built'}"]
    if len(kernels["openmp_runtimes"]) > 1:
        lines.append(f"  two OpenMP runtimes are loaded, set run.threads to 1: {', '.join(kernels['openmp_runtimes'])}")
    for device in ("cpu", "cuda"):
        rows: dict[tuple[str, str], list[str]] = {}
        for op, by_device in kernels["ops"].items():
            rows.setdefault((by_device[device]["runs"], by_device[device]["why"]), []).append(op)
        for (runs, why), ops in rows.items():
            lines.append(f"  {device:<5}{runs:<10}{', '.join(ops)}{f' ({why})' if why else ''}")
    for shape_class, row in sorted(kernels["attention_contest"].items()):
        times = {name: "failed" if time is None else f"{time * 1e6:.0f} us" for name, time in row["seconds"].items()}
        lines.append(f"  {shape_class}: {', '.join(f'{name} {time}' for name, time in times.items())}: {row['winner']}")
    return lines


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _compiler(name: str) -> str | None:
    path = shutil.which(name)
    if path is None:
        return None
    try:
        said = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=10).stdout
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = [line for line in said.splitlines() if line.strip()]
    return next((line for line in lines if "release" in line), lines[0] if lines else None)
