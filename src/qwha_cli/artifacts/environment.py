"""The machine and versions a number was made with, as recorded beside every artifact."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "bitsandbytes",
    "datasets",
    "lm-eval",
    "safetensors",
    "triton",
    "liger-kernel",
)


def package_version(name: str) -> str | None:
    """Return an installed distribution's version, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def processor() -> str:
    """Return the processor's name as the kernel gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def source_commit() -> str | None:
    """Return the git commit of the package's checkout, with `+` when files differ from it; None outside a checkout."""
    here = Path(__file__).resolve().parent
    try:
        command = ["git", "-C", str(here), "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"]
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip() or None


def describe_environment(*, device: str) -> dict[str, object]:
    """Return versions, processor, device and thread count; no user names, no paths, no tokens."""
    versions: dict[str, object] = {name: version for name in PACKAGES if (version := package_version(name))}
    environment: dict[str, object] = {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": processor(),
        "cpus": os.cpu_count() or 1,
        "qwha": package_version("qwha"),
        "commit": source_commit(),
        "device": device,
        "packages": versions,
    }
    return environment
