"""The pictures: real PNG files, drawn from what is there, without touching matplotlib's global state."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from qwha_cli.errors import DataError
from qwha_cli.report.entries import rows_by_entries, total_rows_by_entries
from qwha_cli.report.plots import entries_histogram, layer_heatmap, loss_curve, running_mean
from support.run_folder import layer_records


def pixels(stream: io.BytesIO) -> np.ndarray:
    stream.seek(0)
    return matplotlib.image.imread(stream, format="png")[..., :3]


def heat_map(records: list[dict[str, object]], **options: object) -> np.ndarray:
    stream = io.BytesIO()
    layer_heatmap(records, "error_after", stream, **options)  # type: ignore[arg-type]
    return pixels(stream)


def test_loss_curve_reads_the_metrics_file_and_writes_a_png(tmp_path: Path) -> None:
    lines = [{"step": i, "loss": 1 / i} for i in range(1, 20)] + [{"step": 10, "validation_loss": 0.4}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    loss_curve(tmp_path / "metrics.jsonl", tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_a_single_step_and_a_loss_that_is_not_finite_can_be_drawn(tmp_path: Path) -> None:
    loss_curve([{"step": 1, "loss": 2.0}], tmp_path / "one.png")
    loss_curve([{"step": 1, "loss": 2.0}, {"step": 2, "loss": float("nan")}], tmp_path / "nan.png")
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "nan.png").read_bytes()


def test_nothing_to_draw_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no loss to draw"):
        loss_curve([{"step": 1, "loss": None}], tmp_path / "x.png")
    with pytest.raises(DataError, match="no layer has a error_after"):
        layer_heatmap([{"block": 0}], "error_after", tmp_path / "x.png")
    with pytest.raises(DataError, match="no entries to draw"):
        entries_histogram(None, tmp_path / "x.png")
    with pytest.raises(DataError, match="no entries to draw"):
        entries_histogram(rows_by_entries([]), tmp_path / "x.png")
    assert list(tmp_path.iterdir()) == []


def test_running_mean_is_centred_and_keeps_a_constant() -> None:
    assert running_mean([2.0] * 50) == pytest.approx([2.0] * 50)
    line = [float(i) for i in range(100)]
    assert running_mean(line, share=0.1)[10:-10] == pytest.approx(line[10:-10])
    assert running_mean([5.0]) == [5.0]
    assert running_mean([]) == []


def test_heat_map_grows_with_the_number_of_blocks_and_of_projections() -> None:
    small, wide = heat_map(layer_records(12)), heat_map(layer_records(30))
    assert wide.shape[1] > small.shape[1]
    one = heat_map([r for r in layer_records(12) if r["projection"] == "q_proj"])
    assert one.shape[0] < small.shape[0]


def test_one_bad_layer_is_seen() -> None:
    records = layer_records(8)
    limits = (0.005, 1.0)
    before = heat_map(records, limits=limits)
    after = heat_map([{**r, "error_after": 0.9} if i == 20 else r for i, r in enumerate(records)], limits=limits)
    changed = np.abs(before - after).max(axis=-1) > 0.2
    # one cell of 56, not the whole map
    assert 0.002 < changed.mean() < 0.03


def test_a_layer_without_error_and_a_layer_that_is_absent_do_not_stop_the_map() -> None:
    records = [{**r, "error_after": 0.0} if i == 0 else r for i, r in enumerate(layer_records(3)) if i != 5]
    assert heat_map(records).size


def test_equal_errors_everywhere_can_be_drawn() -> None:
    assert heat_map([{**r, "error_after": 0.01} for r in layer_records(2)]).size


def bars(entries: list[int]) -> np.ndarray:
    stream = io.BytesIO()
    entries_histogram(rows_by_entries(entries), stream)
    return pixels(stream)


def test_entries_that_are_all_equal_can_be_drawn() -> None:
    assert bars([4] * 50).size


def test_a_histogram_from_no_entry_to_thousands_can_be_drawn() -> None:
    assert bars([0, 3, 70, 2000, 14336]).shape == bars([4]).shape


def test_a_fuller_bin_has_a_higher_bar() -> None:
    def blue(picture: np.ndarray) -> float:
        return float((picture[..., 2] - picture[..., 0] > 0.2).mean())

    assert blue(bars([2] * 9 + [3] * 9)) > 1.5 * blue(bars([2] * 9 + [3]))


def test_dark_pictures_are_dark_and_light_ones_light() -> None:
    light, dark = heat_map(layer_records(4), theme="light"), heat_map(layer_records(4), theme="dark")
    assert light[0, 0].mean() > 0.95
    assert dark[0, 0].mean() < 0.15


def test_equal_inputs_give_equal_files(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        entries_histogram(total_rows_by_entries(layer_records(3)), tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_drawing_leaves_pyplot_alone() -> None:
    code = (
        "import sys, io; from qwha_cli.report.plots import loss_curve; loss_curve([{'step': 1, 'loss': 1.0}], io.BytesIO()); "
        "print('matplotlib.pyplot' in sys.modules, 'torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["False", "False"]
