"""On what was measured: the GPU, its driver, the CPUs, the versions of the packages that matter, the commit.

    python benchmarks/machine.py --out results/machine.json

Written once, on the machine that measures, before anything is measured; `results_csv.py` puts it into every row. A folder that
another machine or commit has filled is refused: its rows would get the wrong names.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path

PACKAGES = ("torch", "triton", "transformers", "peft", "liger-kernel", "bitsandbytes")


def describe(*, commit: str) -> dict[str, object]:
    """Everything by name; None for what this machine does not have or does not tell."""
    import torch

    from qwha_cli import __version__

    cuda = torch.cuda.is_available()
    found: dict[str, object] = {
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "driver": _driver() if cuda else None,
        # those that this process may use
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
    }
    # as torch calls itself, with the build, because the benchmarks' lines have it so
    versions = {name: torch.__version__ if name == "torch" else _version(name) for name in PACKAGES}
    return {**found, **versions, "qwha": __version__, "commit": commit}


def current_commit() -> str:
    """The short name of the commit of this working tree."""
    folder = Path(__file__).resolve().parent
    try:
        done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=folder, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return "not known"
    return done.stdout.strip() or "not known"


def write(found: dict[str, object], out: Path) -> None:
    """Write the file, or leave it when it says the same.

    Raises:
        SystemExit: It says something else.
    """
    if out.is_file():
        before = json.loads(out.read_text())
        changed = [f"{key} {before.get(key)} → {value}" for key, value in found.items() if before.get(key) != value]
        if changed:
            raise SystemExit(f"{out} is from another run ({'; '.join(changed)}): move {out.parent}/ away, or name another folder")
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(found, indent=1) + "\n")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    # a line a GPU, all the same
    lines = done.stdout.split("\n")
    return (lines[0].strip() or None) if done.returncode == 0 else None


def main() -> None:
    """Read the command line, write the file, show it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--commit", default=current_commit())
    arguments = parser.parse_args()
    found = describe(commit=arguments.commit)
    write(found, arguments.out)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
