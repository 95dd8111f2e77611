"""Where a record comes from: code, versions, machine, time. Nothing here names the person or the host."""

from __future__ import annotations

import os
import platform
import resource
import subprocess
import sys
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import repro

PACKAGES = ("torch", "numpy", "scipy")
ROOT = Path(repro.__file__).resolve().parent.parent


def available_cores() -> int:
    """Cores this process may use (its affinity where the system knows one)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@cache
def cpu_model() -> str:
    """The processor's name as the system gives it, else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(iter(names), platform.processor() or platform.machine())


def machine_fingerprint() -> dict[str, Any]:
    """What a duration depends on and a key therefore hashes: processor and number of cores."""
    return {"cpu": cpu_model(), "cores": available_cores()}


@cache
def code_state() -> dict[str, Any]:
    """`commit`: of the checkout the package runs from; `dirty`: whether `repro/` or `data/` differ from it (records and
    figures do not count). Both None outside a git checkout. Cached: a process goes on running the code it has loaded.
    """
    try:
        if Path(_git("rev-parse", "--show-toplevel")).resolve() != ROOT:
            return {"commit": None, "dirty": None}
        return {"commit": _git("rev-parse", "HEAD"), "dirty": bool(_git("status", "--porcelain", "--", "repro", "data"))}
    except (OSError, subprocess.SubprocessError):
        return {"commit": None, "dirty": None}


@cache
def versions() -> dict[str, str | None]:
    """Versions of Python, this package and what computes, read from their metadata: nothing is imported."""
    found: dict[str, str | None] = {"python": platform.python_version(), "repro": repro.__version__}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def gpu_name() -> str | None:
    """The GPU's name when this process has loaded torch and torch sees one."""
    torch = sys.modules.get("torch")
    return torch.cuda.get_device_name(0) if torch is not None and torch.cuda.is_available() else None


def measured(*, started: datetime, seconds: float, threads: int, executor: str) -> dict[str, Any]:
    """The provenance of a trial that has just ended in this process.

    `started`: UTC; `seconds`: wall time; `peak_memory_mb`: of the process since its start (it may have run other trials
    before); `load`: the machine's one-minute load average at the end, which tells a disturbed timing from an
    undisturbed one.
    """
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    return {
        **code_state(),
        "versions": versions(),
        "platform": platform.platform(),
        "cpu": cpu_model(),
        "cores": available_cores(),
        "gpu": gpu_name(),
        "threads": threads,
        "executor": executor,
        "started": started.astimezone(UTC).isoformat(timespec="seconds"),
        "seconds": round(seconds, 3),
        "peak_memory_mb": round(peak, 1),
        "load": round(os.getloadavg()[0], 2),
    }


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
