"""All tables of docs/results/speed.md as Markdown, from the lines of JSON that `make bench-gpu` leaves in results/.

    python benchmarks/speed_page.py results

The page itself is written by hand: numbers without words do not say what was missed. What a table shows is said above it; a
benchmark without lines is named as not measured. Of two lines for the same case the later one counts.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import cast

from results_csv import read_lines, read_machine
from sweeps import SHAPE, SIZES, Line, Sweep, series

KINDS = ("2", "3", "4", "nf4")
_NAMES = {"nf4": "NF4", "dense": "dense base", **{bits: f"{bits} bits" for bits in ("2", "3", "4")}}


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose first column is words and whose other columns are numbers."""
    lines = [f"| {' | '.join(head)} |", "|---|" + "---:|" * (len(head) - 1), *(f"| {' | '.join(row)} |" for row in rows)]
    return "\n".join(lines)


def number(value: object, form: str = ".1f") -> str:
    """A number in a form, a dash for none."""
    return "–" if value is None else format(cast(float, value), form)


def about(machine: Line) -> str:
    """The sentence about machine and versions; what the machine lacks is left out."""
    packages = ("torch", "triton", "transformers", "peft", "liger-kernel", "bitsandbytes", "qwha")
    versions = [f"{name} {machine[name]}" for name in packages if machine.get(name)]
    parts = [
        f"{machine['gpu']}",
        f"driver {machine['driver']}",
        f"{machine['cpus']} CPUs",
        *versions,
        f"commit `{machine['commit']}`",
    ]
    return ", ".join(parts) + "."


def sweep(lines: Sequence[Line], name: Sweep) -> str:
    """Milliseconds and peak memory of every row along a sweep."""
    found = series(lines, name)
    places = sorted({place for row in found.values() for place in row})
    shapes = {size: shape for shape, size in SIZES.items()}
    head = [shapes[place] if name == "model" else f"{place:,.0f}" for place in places]

    def cell(line: Line | None) -> str:
        return "–" if line is None else f"{number(line['ms'], '.0f')} ms, {number(line['peak_gib'])} GiB"

    return markdown(["", *head], [[row, *(cell(mine.get(place)) for place in places)] for row, mine in found.items()])


def transform(lines: Sequence[Line]) -> str:
    """The transform in bfloat16: share of the copy by rows, and how much faster than torch with most rows."""
    cases = {
        (cast(int, x["n"]), cast(int, x["rows"])): x for x in lines if x.get("dtype") == "bf16" and not x["add"] and "ms" in x
    }
    counts = sorted({rows for _, rows in cases})
    table: list[list[str]] = []
    for size in dict.fromkeys(n for n, _ in cases):
        shares = [number(cases.get((size, rows), {}).get("share"), ".2f") for rows in counts]
        most = cases.get((size, counts[-1]), {})
        faster = cast(float, most["torch_ms"]) / cast(float, most["ms"]) if "torch_ms" in most else None
        table.append([str(size), *shares, number(faster)])
    return markdown(["n", *(f"{rows:,} rows" for rows in counts), "torch's time by ours"], table)


def fused(lines: Sequence[Line]) -> str:
    """Norms and gates in the transform's pass: share of the copy, and the time of the steps one by one by ours."""
    rows: list[list[str]] = []
    for x in lines:
        if "us" in x:
            faster = cast(float, x["apart_us"]) / cast(float, x["us"]) if x.get("apart_us") else None
            rows.append([f"{x['op']}, {x['size']}", number(x["us"]), number(x["share"], ".2f"), number(faster, ".2f")])
    return markdown(["", "µs", "share", "apart by this"], rows)


def weight(lines: Sequence[Line]) -> str:
    """A layer's weight from codes and entries: share of a large copy's bandwidth, and of a like one's."""
    cases = {(shape_of(x), str(x["kind"])): x for x in lines if x.get("op") == "effective_weight"}
    kinds = [kind for kind in (*KINDS, "dense") if any(kind == known for _, known in cases)]
    shapes = dict.fromkeys(shape for shape, _ in cases)
    rows = [[shape, *(_shares(cases.get((shape, kind))) for kind in kinds)] for shape in shapes]
    return markdown(["out × in", *(_NAMES[kind] for kind in kinds)], rows)


def few_tokens(lines: Sequence[Line]) -> str:
    """Tokens times codes with entries: microseconds of a call in a graph, in brackets the share of the time to read the bytes."""
    cases = {(shape_of(x), str(x["format"]), cast(int, x["tokens"])): x for x in lines if x.get("adapter") and x.get("floor_us")}
    table: list[list[str]] = []
    for tokens in sorted({tokens for _, _, tokens in cases}):
        for shape in dict.fromkeys(shape for shape, _, _ in cases):
            mine = [cases.get((shape, kind, tokens)) for kind in KINDS]
            dense = next((x["dense_graph_us"] for x in mine if x), None)
            table.append([f"{shape}, {tokens} token{'s' * (tokens > 1)}", *(_with_share(x) for x in mine), number(dense)])
    return markdown(["out × in", *(_NAMES[kind] for kind in KINDS), "dense bf16"], table)


def _shares(line: Line | None) -> str:
    if line is None:
        return "–"
    alike = line.get("share_alike")
    return number(line["share"], ".2f") + ("" if alike is None else f" ({number(alike, '.2f')})")


def _with_share(line: Line | None) -> str:
    if line is None or line.get("graph_us") is None:
        return "–"
    taken, floor = cast(float, line["graph_us"]), cast(float, line["floor_us"])
    return f"{taken:.1f} ({floor / taken:.2f})"


def decoding(lines: Sequence[Line]) -> str:
    """Generation with one sequence, launched from Python and replayed as a graph."""
    cases = {
        (str(x["shape"]), str(x["weights"]), bool(x["adapter"]), x.get("embedding_bits", 16) == 8, bool(x["graph"])): x
        for x in lines
    }
    rows = [
        [
            f"{shape}, {_NAMES.get(weights, weights)}{' with entries' * adapter}{', 8-bit embeddings' * words}, "
            f"{'graph' if graph else 'launched'}",
            number(x["tokens_s"]), number(x["ms"], ".2f"), number(x["gib"]),
        ]
        for (shape, weights, adapter, words, graph), x in cases.items()
    ]  # fmt: skip
    return markdown(["", "tokens a second", "ms a token", "GiB"], rows)


def shape_of(line: Line) -> str:
    """Out × in, as the page writes it."""
    return " × ".join(str(size) for size in cast(Sequence[int], line["shape"]))


def _step(path: Path) -> str:
    # here, because it imports torch, transformers and peft for its rows
    from bench_step import table

    return table([str(path)])


# file, what the table shows, the table
_Tables = Sequence[tuple[str, str, Callable[[Sequence[Line]], str]]]
TABLES: _Tables = (
    ("sweeps", f"**By batch** (sequences of 512 tokens, {SHAPE}, checkpointing on)", lambda lines: sweep(lines, "batch")),
    ("sweeps", f"**By sequence length** (one sequence, {SHAPE}, checkpointing on)", lambda lines: sweep(lines, "length")),
    ("sweeps", "**By model size** (one sequence of 512 tokens, checkpointing on)", lambda lines: sweep(lines, "model")),
    ("wht", "**Transform** (bfloat16; share of a copy's bandwidth)", transform),
    ("fused-wht", "**Norms and gates in the transform's pass** (bfloat16, 8,192 rows; share of a copy's bandwidth)", fused),
    (
        "effective-weight",
        "**Weight from codes and entries** (share of a large copy; in brackets, of a copy of as many bytes)",
        weight,
    ),
    (
        "quant-matmul",
        "**Tokens times codes** (with entries; µs in a graph, and the share that reading the bytes takes)",
        few_tokens,
    ),
    ("decode", "**Decoding** (one sequence)", decoding),
)


def page(folder: Path) -> str:
    """All tables, each under a line that says what it shows."""
    parts = [about(read_machine(folder))]
    lines: Mapping[str, list[dict[str, object]]] = {name: read_lines(folder / f"{name}.jsonl") for name, _, _ in TABLES}
    step = folder / "step.jsonl"
    parts.append(f"**A step** ({SHAPE}, sequences of 512 tokens)\n\n" + (_step(step) if step.is_file() else _missing("step")))
    parts += [f"{title}\n\n{table(lines[name]) if lines[name] else _missing(name)}" for name, title, table in TABLES]
    return "\n\n".join(parts)


def _missing(name: str) -> str:
    return f"Not measured: no {name}.jsonl."


if __name__ == "__main__":
    print(page(Path(sys.argv[1])))
