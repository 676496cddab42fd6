"""Where the figures were measured: device, driver, versions of packages, commit."""

import hashlib
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "triton", "numpy", "fastapi", "uvicorn", "aiohttp", "hydra-core")


def environment(root: Path) -> dict[str, Any]:
    """Everything about this machine and the checkout `root` that a report states."""
    gpus = gpu_list()
    return {
        "commit": commit(root),
        "device": gpus[0]["name"] if gpus else _cpu_name(),
        "gpus": gpus,
        "busy": gpu_users(),
        "cores": len(os.sched_getaffinity(0)),
        "system": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: release for name in PACKAGES if (release := _version(name))},
    }


def gpu_list() -> list[dict[str, Any]]:
    """Name, memory in bytes and driver of each GPU.

    From nvidia-smi, because a CUDA context in this process would take memory from the server.
    """
    output = _run("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader,nounits")
    rows = [[cell.strip() for cell in line.split(",")] for line in (output or "").splitlines()]
    return [{"name": name, "memory": int(mib) * 2**20, "driver": driver} for name, mib, driver in rows]


def gpu_users() -> list[str]:
    """What uses the GPUs before the sweep does, such as a server that was left over: process, name, memory."""
    output = _run("nvidia-smi", "--query-compute-apps=pid,process_name,used_memory", "--format=csv,noheader")
    return [line.strip() for line in (output or "").splitlines() if line.strip()]


def commit(root: Path) -> str | None:
    """The commit, with a digest of changed and new files if there are any; None outside a git checkout."""
    head = _run("git", "-C", str(root), "rev-parse", "--short=12", "HEAD")
    if head is None:
        return None
    changes = _run("git", "-C", str(root), "diff", "HEAD") or ""
    new = _run("git", "-C", str(root), "ls-files", "--others", "--exclude-standard", "-z") or ""
    digest = hashlib.sha256(changes.encode())
    for name in filter(None, new.split("\0")):
        digest.update(name.encode() + _content(root / name))
    return head + (f"+{digest.hexdigest()[:6]}" if changes or new else "")


def _content(path: Path) -> bytes:
    """What git would record of a new file: of a link where it points, of a nested repository nothing."""
    if path.is_symlink():
        return os.fsencode(path.readlink())
    return path.read_bytes() if path.is_file() else b""


def _cpu_name() -> str:
    with open("/proc/cpuinfo") as file:
        return next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), "CPU")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _run(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
