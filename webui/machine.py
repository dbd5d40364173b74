"""What this machine can train, found without a model library."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from functools import lru_cache

import psutil

GB = 10**9
QUERY = ("--query-gpu=name,memory.total", "--format=csv,noheader,nounits")


@lru_cache(maxsize=1)
def gpu() -> tuple[str, float] | None:
    """The name and the memory in GB of the first GPU; None if there is none."""
    if platform.system() == "Darwin" and platform.machine() == "arm64":
        return "Apple GPU", psutil.virtual_memory().total / GB
    command = shutil.which("nvidia-smi")
    if command is None:
        return None
    try:
        answer = subprocess.run([command, *QUERY], capture_output=True, text=True, timeout=10, check=True).stdout
        name, mebibytes = answer.splitlines()[0].rsplit(",", 1)
        return name.strip(), float(mebibytes) * 2**20 / GB
    except (OSError, subprocess.SubprocessError, IndexError, ValueError):
        # A driver without a device answers with a sentence or an error code.
        return None


def summary() -> str:
    """The processor, memory and GPU, in one sentence."""
    device = gpu()
    cores, memory = os.cpu_count(), psutil.virtual_memory().total / GB
    return f"This machine: {cores} CPU cores, {memory:.0f} GB of memory, " + (
        "no GPU." if device is None else f"{device[0]} with {device[1]:.0f} GB."
    )


def advice(is_demo: bool) -> str:
    """What to expect of the demo model, or of a model of SDXL's size. The figures are those of docs/performance.md."""
    if is_demo:
        return "The demo model generates 64 x 64 pixels and trains in about three minutes on two CPU cores."
    if gpu() is None:
        return (
            "Without a GPU, a model of SDXL's size is not practical: the adapter alone takes 7 minutes to start, and training "
            "hours to days. SDXL is a download of about 7 GB."
        )
    return "SDXL is a download of about 7 GB. Check measures three steps, which tells how long training takes on this GPU."
