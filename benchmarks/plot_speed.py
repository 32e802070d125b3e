"""The picture of docs/results/speed.md: where the GPU's time in a step goes.

python benchmarks/plot_speed.py docs/results/data/profile.json docs/results/profile.png
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

INK, FAINT, OURS, OTHERS = "#1d2330", "#626b7a", "#c8552b", "#1f5f8b"


def main(source: str, out: str) -> None:
    """Draw the cases of a profile side by side, parts in the order of the first case."""
    found = json.loads(Path(source).read_text())
    figure = Figure(figsize=(11, 3.8), dpi=160)
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(found["cases"]), sharey=True)
    names = list(next(iter(found["cases"].values())))
    for axis, (case, parts) in zip(axes, found["cases"].items(), strict=True):
        values = [parts[name] for name in names]
        axis.barh(names, values, color=[OURS if "(ours)" in name else OTHERS for name in names], height=0.7)
        for y, value in enumerate(values):
            axis.text(value + 0.01 * max(values), y, f"{value:.1f}", va="center", color=INK, fontsize=9)
        axis.set_title(f"{case}: {sum(values):.0f} ms on the GPU", loc="left", fontsize=10, color=INK)
        axis.set_xlabel("milliseconds a step", color=FAINT, fontsize=9)
        axis.set_xlim(0, 1.13 * max(values))
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(colors=FAINT, labelsize=9)
    axes[0].invert_yaxis()
    figure.suptitle(
        f"{found['row']}, {found['shape']}, {found['device']}, commit {found['commit']}",
        x=0.01,
        ha="left",
        fontsize=9,
        color=FAINT,
    )
    figure.tight_layout()
    figure.savefig(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
