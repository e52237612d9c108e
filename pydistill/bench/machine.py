# SPDX-License-Identifier: Apache-2.0
"""The line that says where a number was measured."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

import torch

import pydistill
from pydistill import _dispatch
from pydistill.bench import gpu


def describe(device: str = "cpu") -> dict[str, str]:
    """GPU, CPU, cores, versions, commit, page and instruction-set settings, as short strings in a fixed order."""
    return {
        **(gpu.describe() if device == "cuda" else {}),
        "cpu": cpu_model(),
        "cores": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
        "isa": _dispatch.native.isa() if _dispatch.native is not None else "none",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "pydistill": pydistill.__version__,
        "commit": commit(Path(pydistill.__file__).resolve().parent),
        "thp": transparent_huge_pages(),
        "thp_alloc": os.environ.get("THP_MEM_ALLOC_ENABLE", "0"),
    }


def line(fields: dict[str, str]) -> str:
    return " | ".join(f"{key} {value}" for key, value in fields.items())


def cpu_model() -> str:
    """Marketing name plus family and model, because virtual machines shorten the name."""
    fields: dict[str, str] = {}
    try:
        for entry in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = entry.partition(":")
            fields.setdefault(key.strip(), value.strip())
    except OSError:
        pass
    name = fields.get("model name") or platform.processor() or platform.machine()
    if "cpu family" in fields and "model" in fields:
        name += f" (family {fields['cpu family']} model {fields['model']})"
    return name


def commit(folder: Path) -> str:
    """Short commit of the checkout that `folder` lies in, with `+` when it has changes; `none` outside
    git."""
    git = ["git", "-C", str(folder)]
    try:
        short = subprocess.run([*git, "rev-parse", "--short=10", "HEAD"], capture_output=True, text=True, timeout=10)
        if short.returncode != 0:
            return "none"
        status = ["status", "--porcelain", "--untracked-files=no"]
        dirty = subprocess.run([*git, *status], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return "none"
    return short.stdout.strip() + ("+" if dirty.stdout.strip() else "")


def transparent_huge_pages() -> str:
    """The kernel's setting: always, madvise, never, or `unknown`."""
    try:
        text = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
    except OSError:
        return "unknown"
    return text.partition("[")[2].partition("]")[0] or "unknown"
