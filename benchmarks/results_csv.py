"""The lines of JSON in results/ as one CSV file each, every row with its machine, versions and commit.

    python benchmarks/results_csv.py results

Columns are a line's own, in the order in which they first appear, then those of results/machine.json, which `machine.py` wrote
where the lines were measured. What a line says itself (torch, commit) stays. A number inside a number's name is `outer.inner`, a
shape is OUTxIN, and what a line does not have is empty.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from sweeps import Line

# what the benchmarks call the GPU in their lines
_GPU = ("device", "card")
# a line of nothing else is about the lines behind it
_HEADER = {*_GPU, "torch", "copy_gb_s"}


def read_lines(path: Path) -> list[dict[str, object]]:
    """All lines of a file, those that describe the lines behind them put into these; none if there is no file."""
    if not path.is_file():
        return []
    header: dict[str, object] = {}
    found: list[dict[str, object]] = []
    for text in path.read_text().splitlines():
        line: dict[str, object] = json.loads(text) if text.strip() else {}
        if set(line) <= _HEADER:
            header = line or header
        else:
            found.append({**header, **line})
    return found


def read_machine(folder: Path) -> dict[str, object]:
    """What machine.py wrote.

    Raises:
        SystemExit: It did not.
    """
    path = folder / "machine.json"
    if not path.is_file():
        raise SystemExit(f"{path} is missing: python benchmarks/machine.py --out {path}, on the machine that measured")
    return json.loads(path.read_text())


def rows(lines: Sequence[Line], machine: Line, *, where: str) -> list[dict[str, object]]:
    """The rows of a table, all with the same columns.

    Args:
        lines: Of one benchmark.
        machine: What is the same for all of them.
        where: Names the lines in an error.

    Raises:
        SystemExit: A line is from another GPU.
    """
    flat: list[dict[str, object]] = []
    for line in lines:
        for key in _GPU:
            if line.get(key, machine["gpu"]) != machine["gpu"]:
                raise SystemExit(f"{where}: a line is from {line[key]}, machine.json from {machine['gpu']}: keep them apart")
        flat.append(dict(_flat({key: value for key, value in line.items() if key not in _GPU})))
    own = [key for key in dict.fromkeys(key for line in flat for key in line) if key not in machine]
    return [{**{key: line.get(key) for key in own}, **{k: line.get(k, machine[k]) for k in machine}} for line in flat]


def _flat(line: Line, prefix: str = "") -> Iterator[tuple[str, object]]:
    for key, value in line.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, "x".join(str(part) for part in value) if isinstance(value, list) else value


def write_all(folder: Path) -> list[Path]:
    """Write a CSV file beside each JSONL file, and return them."""
    machine = read_machine(folder)
    written: list[Path] = []
    for source in sorted(folder.glob("*.jsonl")):
        table = rows(read_lines(source), machine, where=str(source))
        if not table:
            continue
        out = source.with_suffix(".csv")
        with out.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(table[0]))
            writer.writeheader()
            writer.writerows(table)
        written.append(out)
    return written


if __name__ == "__main__":
    for made in write_all(Path(sys.argv[1])):
        print(made)
