"""What the benchmarks do without a GPU: which steps are measured; lines to CSV, tables and pictures. All lines are made up."""

from __future__ import annotations

import csv
import json
import math
import re
from argparse import ArgumentTypeError, Namespace
from pathlib import Path

import bench_decode
import bench_init
import bench_memory
import bench_step
import machine
import plot_speed
import published
import pytest
import results_csv
import speed_page
import sweeps
import timing
import torch
from shape_models import random_packed, random_rows
from torch import nn
from transformers import AutoModelForCausalLM

from qwha_cli.kernels.hadamard import base_matrix, plan
from qwha_cli.models import random
from qwha_cli.models.token_loss import causal_model, summed_loss
from qwha_cli.quant.embedding import QuantizedEmbedding
from support.triton import HAS_TRITON, run_interpreted

MAKEFILE = Path(__file__).resolve().parents[2] / "Makefile"
MACHINE = {"gpu": "Card", "driver": "580.1", "cpus": 16, "torch": "2.11.0", "triton": None, "qwha": "0.1.0", "commit": "abc"}


def step(row: str, case: str, ms: float, **changes: object) -> dict[str, object]:
    """A line of bench_step or bench_memory."""
    line = {"row": row, "shape": "llama-3.2-3b", "case": case, "length": 512, "rank": 64, "loss_kernels": "liger", "ms": ms}
    return {**line, "peak_gib": ms / 100, "commit": "def", "device": "Card", "torch": "2.11.0", **changes}


def save(path: Path, *lines: dict[str, object]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """A folder as `make bench-gpu` leaves it, but for what came of decoding."""
    shape = [3072, 1024]
    wht = {"n": 3072, "rows": 8192, "dtype": "bf16", "add": False, "tiles": {"outer": 48}, "card": "Card"}
    few = {"shape": shape, "format": "2", "adapter": True, "tokens": 1, "floor_us": 4.0, "graph_us": 8.0, "dense_graph_us": 9.5}
    save(tmp_path / "machine.json", MACHINE)
    save(tmp_path / "step.jsonl", step("QLoRA", "16 on", 552.0), step("QLoRA", "16 off", 394.0))
    curve = [step("ours, hadamard", f"{batch} on", 100.0 + batch) for batch in sweeps.BATCHES]
    save(tmp_path / "sweeps.jsonl", *curve, step("QLoRA", "1 on", 405.0), step("QLoRA", "1 on", 777.0, shape="mistral-7b"))
    save(tmp_path / "wht.jsonl", wht | {"failed": "no"}, wht | {"ms": 0.2, "share": 0.83, "torch_ms": 1.2})
    save(
        tmp_path / "fused-wht.jsonl",
        {"op": "norm", "size": 3072, "us": 30.0, "share": 0.84, "apart_us": 60.0, "tiles": {"outer": 48}},
    )
    save(tmp_path / "effective-weight.jsonl", {"op": "effective_weight", "shape": shape, "kind": "nf4", "us": 9.0, "share": 0.58})
    save(tmp_path / "quant-matmul.jsonl", {"copy_gb_s": 2400.0, "device": "Card", "torch": "2.11.0"}, few)
    return tmp_path


def test_the_sweep_over_models_has_every_random_shape_at_its_size() -> None:
    assert set(sweeps.SIZES) == {*random.CONFIGS} - {"tiny-llama"}
    for name, size in sweeps.SIZES.items():
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(random.random_config(name))
        assert model.num_parameters() / 1e9 == pytest.approx(size, abs=5e-4), name


def test_steps_of_several_sweeps_are_measured_once() -> None:
    found = sweeps.by_shape(sweeps.SWEEPS)
    assert list(found) == list(sweeps.SIZES)
    every = [point for points in found.values() for point in points]
    assert len(every) == len(set(every)) == 5 + 4 + 4
    assert set(every) == {point for sweep in sweeps.SWEEPS for point in sweeps.points(sweep)}


def test_a_line_belongs_to_the_sweeps_that_have_its_step() -> None:
    lines = [
        step("a", "4 on", 1.0), step("a", "1 on", 2.0), step("a", "1 on", 3.0), step("a", "1 on", 4.0, length=2048),
        step("a", "1 off", 5.0), step("a", "2 on", 6.0, loss_kernels="plain"), step("b", "1 on", 7.0, shape="llama-3.1-8b"),
        step("a", "3 on", 8.0),
    ]  # fmt: skip
    found = {sweep: sweeps.series(lines, sweep) for sweep in sweeps.SWEEPS}
    times = {
        sweep: {row: [(place, line["ms"]) for place, line in mine.items()] for row, mine in rows.items()}
        for sweep, rows in found.items()
    }
    assert times == {
        "batch": {"a": [(1.0, 3.0), (4.0, 1.0)]},
        "length": {"a": [(512.0, 3.0), (2048.0, 4.0)]},
        "model": {"a": [(3.213, 3.0)], "b": [(8.03, 7.0)]},
    }


def test_a_model_is_built_once_and_what_fails_does_not_end_the_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    built: list[tuple[str, str]] = []
    eight: list[bool] = []

    def build(a: Namespace) -> nn.Module:
        built.append(("good", a.shape))
        return nn.Linear(2, 2)

    def lack(a: Namespace) -> nn.Module:
        built.append(("lacking", a.shape))
        raise ImportError("no such package")

    def take(model: nn.Module, point: sweeps.Point, a: Namespace, *, fp8: bool) -> dict[str, float]:
        eight.append(fp8)
        assert all(parameter.grad is None for parameter in model.parameters())
        model(torch.ones(1, 2)).sum().backward()
        if point.length == 1024:
            raise torch.OutOfMemoryError("CUDA out of\nmemory")
        return {"ms": 1.0, "peak_gib": 2.0, "loss": 3.0}

    fp8 = f"{bench_step.FP8}, keep speed"
    monkeypatch.setattr(bench_memory, "ROWS", {"good": build, "lacking": lack, fp8: build})
    monkeypatch.setattr(bench_memory, "take", take)
    monkeypatch.setattr(bench_memory, "release", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Card")
    out = tmp_path / "new" / "sweeps.jsonl"
    a = Namespace(
        rows="lacking;good", sweep=["batch", "length"], shape=sweeps.SHAPE, rank=64, loss="liger", commit="abc", out=out
    )
    bench_memory.run(a)
    assert built == [("lacking", sweeps.SHAPE), ("good", sweeps.SHAPE)]
    lines = results_csv.read_lines(out)
    assert [sweeps.point_of(line) for line in lines] == [
        point for point in sweeps.by_shape(a.sweep)[sweeps.SHAPE] if point.length != 1024
    ]
    assert {line["row"] for line in lines} == {"good"}
    assert set(step("a", "1 on", 1.0)) < set(lines[0])
    assert eight
    assert not any(eight)
    told = capsys.readouterr().out
    assert "lacking, llama-3.2-3b: ImportError: no such package" in told
    assert "good, llama-3.2-3b, 1 x 1024: OutOfMemoryError: CUDA out of memory" in told
    eight.clear()
    bench_memory.run(Namespace(**{**vars(a), "rows": fp8}))
    assert all(eight)


def test_every_row_of_a_csv_file_has_its_machine_and_commit(results: Path) -> None:
    written = {path.name: list(csv.DictReader(path.open())) for path in results_csv.write_all(results)}
    assert set(written) == {f"{name}.csv" for name in ("step", "sweeps", "wht", "fused-wht", "effective-weight", "quant-matmul")}
    for rows in written.values():
        for row in rows:
            assert (row["gpu"], row["driver"], row["cpus"], row["torch"], row["triton"]) == ("Card", "580.1", "16", "2.11.0", "")
            assert not {"device", "card"} & set(row)
    # a line's own commit stays, other lines get the machine's
    assert written["step.csv"][0]["commit"] == "def"
    assert written["wht.csv"][0]["commit"] == "abc"
    assert [row["ms"] for row in written["wht.csv"]] == ["", "0.2"]
    assert written["wht.csv"][0]["tiles.outer"] == "48"
    (few,) = written["quant-matmul.csv"]
    assert (few["shape"], few["copy_gb_s"]) == ("3072x1024", "2400.0")


def test_lines_of_another_machine_are_refused(results: Path) -> None:
    save(results / "step.jsonl", step("QLoRA", "16 on", 1.0, device="Other"))
    with pytest.raises(SystemExit, match=r"step\.jsonl: a line is from Other, machine\.json from Card"):
        results_csv.write_all(results)
    machine.write(MACHINE, results / "machine.json")
    with pytest.raises(SystemExit, match="commit abc → xyz"):
        machine.write({**MACHINE, "commit": "xyz"}, results / "machine.json")
    (results / "machine.json").unlink()
    with pytest.raises(SystemExit, match=r"machine\.json is missing"):
        results_csv.write_all(results)


def test_the_machine_says_its_versions_and_can_be_written(tmp_path: Path) -> None:
    found = machine.describe(commit="abc")
    assert {*MACHINE, "transformers", "liger-kernel", "bitsandbytes"} <= set(found)
    assert found["torch"] == torch.__version__
    machine.write(found, tmp_path / "new" / "machine.json")
    assert results_csv.read_machine(tmp_path / "new") == found


def test_the_page_has_a_table_for_each_benchmark_and_names_what_was_not_measured(results: Path) -> None:
    page = speed_page.page(results)
    assert page.startswith("Card, driver 580.1, 16 CPUs, torch 2.11.0, qwha 0.1.0, commit `abc`.")
    for row in (
        "| QLoRA | 552 | 5.5 | 394 | 3.9 |",
        "| ours, hadamard | 101 ms, 1.0 GiB | 102 ms, 1.0 GiB | 104 ms, 1.0 GiB | 108 ms, 1.1 GiB | 116 ms, 1.2 GiB |",
        "| QLoRA | 405 ms, 4.0 GiB | – | – | – | – |",
        "| QLoRA | 405 ms, 4.0 GiB | 777 ms, 7.8 GiB |",
        "| 3072 | 0.83 | 6.0 |",
        "| norm, 3072 | 30.0 | 0.84 | 2.00 |",
        "| 3072 × 1024 | 0.58 |",
        "| 3072 × 1024, 1 token | 8.0 (0.50) | – | – | – | 9.5 |",
    ):
        assert row in page.splitlines(), row
    assert page.count("Not measured") == 1
    assert "Not measured: no decode.jsonl." in page
    decode = {"shape": "llama-3.2-3b", "weights": "2", "adapter": True, "graph": True, "tokens_s": 250.0, "ms": 4.0, "gib": 2.25}
    save(results / "decode.jsonl", decode)
    assert "| llama-3.2-3b, 2 bits with entries, graph | 250.0 | 4.00 | 2.2 |" in speed_page.page(results)


def test_make_writes_what_the_page_reads() -> None:
    recipe = MAKEFILE.read_text().partition("\nbench-gpu:")[2]
    for name in ("step", *(name for name, _, _ in speed_page.TABLES)):
        assert f"/{name}.jsonl" in recipe
    scripts = set(re.findall(r"benchmarks/(\w+)\.py", recipe))
    assert len(scripts) >= 9
    for script in scripts:
        assert (MAKEFILE.parent / "benchmarks" / f"{script}.py").is_file()


def test_every_kernel_of_a_profile_has_its_part() -> None:
    kernels = {
        "nvjet_sm90_tst_320x128_64x3_1x2_h_bz_coopB_TNT": "matrix products",
        "cudnn_generated_fort_native_sdpa_sm90_flash_bprop": "attention",
        "void cudnn::fusion::fmha_reduce_head<true>(void const*)": "attention",
        "_rms_norm_backward_kernel": "Liger's kernels",
        "_norm_backward": "norms and gates with transforms (ours)",
        "_gate_forward": "norms and gates with transforms (ours)",
        "_transform": "transforms (ours)",
        "_write": "weights from codes (ours)",
        "_gather": "gather at F's places (ours)",
        "void at::native::vectorized_elementwise_kernel<8, at::native::CUDAFunctor_add<c10::BFloat16>>": "additions",
        "Memset (Unknown)": "other",
    }
    for name, part in kernels.items():
        found = plot_speed.grouped([{"name": name, "cuda_ms": 1.0}, {"name": "aten::mm", "cuda_ms": 5.0}])
        assert {name: ms for name, ms in found.items() if ms} == {part: 1.0}


def test_sweeps_are_drawn_also_where_some_are_missing(results: Path) -> None:
    plot_speed.sweeps(str(results / "sweeps.jsonl"), str(results / "all.png"))
    save(results / "one.jsonl", step("QLoRA", "16 on", 552.0))
    plot_speed.sweeps(str(results / "one.jsonl"), str(results / "one.png"))
    drawn = [(results / name).read_bytes() for name in ("all.png", "one.png")]
    assert all(png.startswith(b"\x89PNG") for png in drawn)
    assert drawn[0] != drawn[1]
    save(results / "none.jsonl", step("QLoRA", "16 off", 552.0))
    with pytest.raises(SystemExit, match="no step of a sweep"):
        plot_speed.sweeps(str(results / "none.jsonl"), str(results / "none.png"))


def test_labels_keep_their_distance_and_their_order() -> None:
    assert plot_speed.spread([0.2, 0.8, 0.5], 0.1) == pytest.approx([0.2, 0.8, 0.5])
    found = plot_speed.spread([0.5, 0.5, 0.51, 0.9], 0.1)
    assert found == pytest.approx([0.4033, 0.5033, 0.6033, 0.9], abs=1e-4)
    assert plot_speed.spread([], 0.1) == []


def test_our_rows_have_colours_of_their_own() -> None:
    rows = list(bench_memory.ROWS)
    found = plot_speed.colours(rows)
    assert {row for row in rows if found[row] in plot_speed.OURS_FAMILY} == {row for row in rows if row.startswith("ours")}
    assert len(set(found.values())) == len(rows) >= 8


WORDS = "ours, hadamard, 8-bit embeddings"


def test_a_tiny_model_with_8_bit_embeddings_takes_a_step_of_training() -> None:
    losses: dict[str, float] = {}
    for name in ("ours, hadamard", WORDS):
        torch.manual_seed(0)
        model = bench_step.ROWS[name](Namespace(shape="tiny-llama", rank=2, device="cpu")).float()
        embedding = causal_model(model).get_input_embeddings()
        assert isinstance(embedding, QuantizedEmbedding) is (name == WORDS)
        step = bench_step.Step(model, length=8, liger=False, device="cpu", launch="eager")
        ids = torch.randint(0, 260, (2, 8))
        loss = summed_loss(step.model, {"input_ids": ids, "labels": ids}, head=None) / ids.numel()
        loss.backward()
        assert all(parameter.grad is not None for parameter in step.trained)
        losses[name] = float(loss.detach())
    assert losses["ours, hadamard"] != losses[WORDS]
    assert all(0 < loss < 20 for loss in losses.values())
    assert WORDS in bench_memory.DEFAULT_ROWS.split(";")


@pytest.mark.parametrize("shape", ["tiny-llama", "tied"])
def test_generation_with_8_bit_embeddings_runs_without_a_gpu(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tied = {**random.CONFIGS["tiny-llama"], "tie_word_embeddings": True}
    monkeypatch.setitem(random.CONFIGS, "tied", tied)
    a = Namespace(
        shape=shape, device="cpu", formats=["2"], embedding_bits=bench_decode.vocabulary_bits("16,8"), rank=2, group=16,
        no_adapter=False, prompt=4, new=3, repeats=1,
    )  # fmt: skip
    with torch.inference_mode():
        lines = list(bench_decode.rows(a))
    assert [(line["weights"], line["embedding_bits"]) for line in lines] == [("bf16", 16), ("2", 16), ("2", 8)]
    model = bench_decode.build("2", 8, a)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in model.parameters())
    assert not any("embed" in name or "lm_head" in name for name, _ in model.named_parameters())
    with pytest.raises(ArgumentTypeError, match="16 or 8 bits, not 4"):
        bench_decode.vocabulary_bits("4")


def test_a_line_says_whose_embeddings_have_8_bits() -> None:
    line = {"shape": "s", "weights": "2", "adapter": True, "graph": True, "tokens_s": 250.0, "ms": 4.0, "gib": 2.25}
    page = speed_page.decoding([line, line | {"embedding_bits": 8, "gib": 1.5}])
    assert "| s, 2 bits with entries, graph | 250.0 | 4.00 | 2.2 |" in page
    assert "| s, 2 bits with entries, 8-bit embeddings, graph | 250.0 | 4.00 | 1.5 |" in page


def test_starts_are_measured_with_8_bit_embeddings_too() -> None:
    rows = {row.name: row for row in bench_init.ROWS}
    for name in ("RTN", "ours", "ours + pursuit"):
        base, plus, start = name.partition(" + ")
        other = rows[f"{base}, 8-bit embeddings{plus}{start}"]
        assert bench_init.BASES[other.base] == {**bench_init.BASES[base], "embedding_bits": 8}
        assert other.init == rows[name].init


def test_copies_are_larger_than_a_cache() -> None:
    assert timing.num_copies(timing.COLD_BYTES // 3 - 1) == 4
    assert timing.num_copies(2 * timing.COLD_BYTES) == 2
    assert timing.num_copies(10, most=96) == 96


def test_time_launched_from_python_is_of_one_call() -> None:
    calls = [lambda: torch.ones(10)] * 5
    assert 0 < timing.eager_us(calls, cuda=False) < 1e6
    assert timing.copy_bandwidth("cpu") > 0


@pytest.mark.parametrize("size", [(32, 48), (32, 64), (16, 96)])
def test_published_layers_compute_what_their_formulas_say(size: tuple[int, int]) -> None:
    out, count = size
    packed = random_packed(size, bits=2, group=16, basis="weight", device="cpu", zero_bits=2)
    rows = random_rows(size, rank=2, device="cpu")
    x = torch.randn(5, count, dtype=torch.float32)
    order = plan(count).base
    table = torch.kron(base_matrix(order), base_matrix(count // order)).double()
    layer = published.PublishedLinear(packed, rows, scaling=3.0)
    base = layer.base().T.double()
    sparse = rows.dense().double()
    weight = base + sparse @ table / count * 3.0 / math.sqrt(out)
    torch.testing.assert_close(layer(x).double(), x.double() @ weight.T, rtol=0, atol=2e-5)
    later = published.PublishedTransformedLinear(packed, rows, scaling=3.0)
    weight = base @ table.T + sparse * 3.0 / math.sqrt(out)
    expected = (x.double() @ table.T) @ weight.T / count
    # the transformed base is rounded to bfloat16, as theirs is
    torch.testing.assert_close(later(x).double(), expected, rtol=0, atol=1e-2 * float(expected.abs().max()))
    for module in (layer, later):
        module(x).square().sum().backward()
        assert module.values.grad is not None
        assert torch.isfinite(module.values.grad).all()


def test_the_published_base_is_gptqs() -> None:
    packed = random_packed((32, 64), bits=2, group=16, basis="weight", device="cpu", zero_bits=2)
    found = published.PublishedLinear(packed, random_rows((32, 64), rank=2, device="cpu")).base().T
    # scales are rounded to bfloat16 there, the rest is exact
    torch.testing.assert_close(found, packed.dequantize(torch.bfloat16), rtol=1e-2, atol=0)


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
def test_the_published_transforms_kernel_is_sylvesters() -> None:
    code = """
import sys
sys.path.insert(0, "benchmarks")
import torch, published, published_triton
torch.manual_seed(0)
for size in (256, 8192):
    x = torch.randn(37, size)
    found = published_triton.sylvester_rows(x, 0.5, inner=1 << (size.bit_length() // 2))
    torch.testing.assert_close(found, published.sylvester(x, 0.5, backend="torch"), rtol=1e-5, atol=1e-4)
"""
    run_interpreted(code)
