"""How long quantize and init take on a model of a real size, and how much memory: random weights, the product's own stages.

    python benchmarks/bench_init_time.py make  --shape llama-3.2-3b --folder /tmp/llama-3b
    python benchmarks/bench_init_time.py run   --folder /tmp/llama-3b --text valid.txt --samples 128 --length 2048
    python benchmarks/bench_init_time.py steps

`make` writes a checkpoint in shards, a block at a time, so that its size need not fit into memory. `run` prints seconds and peak
memory of both stages; --cap-gib puts the process into a control group with so much host memory, where it may (cgroup v2, root).
`steps` times the steps of the published initialisation beside ours on the same matrices.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import time
from collections.abc import Callable
from pathlib import Path

import torch
import yaml
from safetensors.torch import save_file

from qwha_cli.initializers import adaalloc, pursuit
from qwha_cli.initializers.budget import InitOptions
from qwha_cli.kernels.hadamard import dense
from qwha_cli.kernels.wht import wht
from qwha_cli.models.random import byte_tokenizer, random_config
from qwha_cli.models.stream import make_skeleton
from qwha_cli.quant.gram import Gram
from qwha_cli.recipe.load import load_recipe
from qwha_cli.stages.runner import run_stages

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def make(shape: str, folder: Path) -> None:
    """Write a random checkpoint in bfloat16, a shard a block."""
    config = random_config(shape)
    config.dtype = torch.bfloat16
    skeleton = make_skeleton(config, shape)
    folder.mkdir(parents=True, exist_ok=True)
    config.architectures = [type(skeleton).__name__]
    config.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    shards: dict[str, dict[str, torch.Tensor]] = {}
    index: dict[str, str] = {}
    generator = torch.Generator(DEVICE).manual_seed(0)
    names = [n for n, p in skeleton.named_parameters() if p.is_meta]
    for shard in sorted({_shard(name) for name in names}):
        shards[shard] = {}
        for name in (n for n in names if _shard(n) == shard):
            parameter = skeleton.get_parameter(name)
            noise = torch.randn(parameter.shape, generator=generator, device=DEVICE)
            # norms near one, the rest as models are initialised; one input in a hundred is ten times as loud, as in real models
            value = 1 + 0.1 * noise if parameter.dim() == 1 else 0.02 * noise
            if parameter.dim() == 1:
                value[::100] *= 10
            shards[shard][name] = value.to(device="cpu", dtype=torch.bfloat16)
            index[name] = shard
        save_file(shards.pop(shard), folder / shard, metadata={"format": "pt"})
    total = sum((folder / shard).stat().st_size for shard in set(index.values()))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": index}))
    print(f"{shape}: {total / 1e9:.2f} GB in {len(set(index.values()))} files")


def _shard(name: str) -> str:
    parts = name.split(".")
    return f"model-{int(parts[2]):03d}.safetensors" if parts[:2] == ["model", "layers"] else "model-outside.safetensors"


class _Watch:
    """A watcher of stages that prints notes, and how a stage gets on."""

    def note(self, stage: str, text: str) -> None:
        """Print it."""
        print(f"  {stage}: {text}", flush=True)

    def progress(self, stage: str, done: int, total: int, text: str) -> None:
        """Print every eighth."""
        if total > 1 and done and done % max(1, total // 8) == 0:
            print(f"  {stage} {done}/{total} {time.monotonic():.0f} s, {_peak_host():.2f} GiB", flush=True)

    def __getattr__(self, name: str) -> object:
        return lambda *args, **kwargs: None


def _peak_host() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _anonymous_peak() -> str:
    """What of the memory is the process's own and not a page of a mapped file, as the kernel counts it now."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    anonymous, mapped = (int(fields[name].split()[0]) / 2**20 for name in ("RssAnon", "RssFile"))
    return f"anonymous {anonymous:.2f} GiB, mapped files {mapped:.2f} GiB"


def cap(gib: float) -> str:
    """Put this process under a limit of host memory, mapped files and page cache included; say what became of it."""
    group = Path("/sys/fs/cgroup/qwha-bench")
    try:
        (group.parent / "cgroup.subtree_control").write_text("+memory")
        group.mkdir(exist_ok=True)
        (group / "memory.max").write_text(str(int(gib * 2**30)))
        (group / "memory.swap.max").write_text("0")
        (group / "cgroup.procs").write_text(str(os.getpid()))
    except OSError as error:
        return f"no control group here ({error}); peak resident memory is measured instead"
    return f"host memory capped at {gib} GiB by a control group"


def run(arguments: argparse.Namespace) -> None:
    """Time both stages."""
    if arguments.cap_gib:
        print(cap(arguments.cap_gib))
    tree = {
        "name": "time", "output": arguments.work, "model": {"id": arguments.folder, "device": DEVICE, "dtype": arguments.dtype},
        "quantize": {
            "method": "gptq", "bits": 2, "group_size": 64, "reconstruct": arguments.reconstruct,
            "calibration": {
                "data": "wikitext2", "path": arguments.text, "samples": arguments.samples, "length": arguments.length,
                "batch_size": arguments.batch_size,
            },
        },
        "adapter": {"rank": 64}, "init": {"gate": False, "reconstruct": arguments.reconstruct_values},
        "train": {"data": {"format": "synthetic"}, "steps": 1, "lr": 1e-4},
    }  # fmt: skip
    path = Path(arguments.work) / "recipe.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(tree))
    recipe = load_recipe(path)
    for stage in arguments.stages.split(","):
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        started = time.monotonic()
        result = run_stages(recipe, until=stage, events=_Watch())
        device = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else math.nan
        seconds = time.monotonic() - started
        results = result.stages[stage].results
        memory = f"device {device:.2f} GiB, host peak {_peak_host():.2f} GiB ({_anonymous_peak()})"
        quality = f"mean layer error {results['layer_error_mean']:.5f}, bits {results['bits_per_weight']:.3f}"
        print(f"{stage}: {seconds:.1f} s, {memory}, {quality}", flush=True)


def _timed(label: str, work: Callable[[], object], *, times: int = 1) -> None:
    """Print the seconds of some work, on the device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started = time.monotonic()
    for _ in range(times):
        work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    print(f"  {label}: {(time.monotonic() - started) / times:.3f} s", flush=True)


def steps(shapes: list[tuple[int, int]]) -> None:
    """Time the published steps and ours on one layer of each shape, (out, in)."""
    for out_features, in_features in shapes:
        generator = torch.Generator(DEVICE).manual_seed(0)
        inputs = torch.randn(4 * in_features, in_features, device=DEVICE, generator=generator)
        inputs *= torch.logspace(0, 1.5, in_features, device=DEVICE)
        error = 0.01 * torch.randn(out_features, in_features, device=DEVICE, generator=generator)
        gram = inputs.T @ inputs
        budget = 64 * (in_features + out_features)
        per_row = budget // out_features
        print(f"({out_features}, {in_features}), {budget} entries")
        h = dense(in_features, dtype=torch.float32, device=DEVICE)
        root: list[torch.Tensor] = []

        def decompose(gram: torch.Tensor = gram, root: list[torch.Tensor] = root) -> None:
            values, vectors = torch.linalg.eigh(gram.double())
            root.append(((vectors * values.clamp(min=0).sqrt()) @ vectors.T).float())

        _timed("published: eigh in float64, of every projection", decompose)
        bases = h @ root[0]
        _timed("published: solve(bases, R dW)", lambda b=bases, r=root[0], e=error: torch.linalg.solve(b, r @ e.T))
        domain = wht(error)
        rows = min(256, out_features)

        def loop(
            domain: torch.Tensor = domain, gram_h: torch.Tensor = bases @ bases.T, rows: int = rows, k: int = per_row
        ) -> None:
            found: list[tuple[int, int, float]] = []
            right = domain @ gram_h
            for row in range(rows):
                chosen = domain[row].abs().cpu().topk(k).indices.tolist()
                at = torch.tensor(chosen, device=DEVICE)
                values = torch.linalg.solve(gram_h[at][:, at], right[row, at]).cpu().numpy()
                found += [(row, c, float(v)) for c, v in zip(chosen, values, strict=True)]

        started = time.monotonic()
        loop()
        share = (time.monotonic() - started) * out_features / rows
        print(f"  published: selection and refinement, a Python loop over rows: {share:.3f} s ({rows} rows measured)", flush=True)
        options = InitOptions(damping=0.1)
        gram_h = Gram(gram).in_hadamard_basis().matrix
        for _ in range(2):  # the first call warms up
            _timed("ours: Gram matrix in the Hadamard basis", lambda g=gram: Gram(g).in_hadamard_basis())
            _timed("ours: error in the Hadamard basis", lambda e=error: wht(e))
            adaalloc_options = InitOptions()
            _timed(
                "ours: adaalloc",
                lambda d=domain, g=gram_h, b=budget, o=adaalloc_options: adaalloc.initialize(d, g, budget=b, options=o),
            )
            _timed("ours: pursuit", lambda d=domain, g=gram_h, b=budget, o=options: pursuit.initialize(d, g, budget=b, options=o))


def main() -> None:
    """Parse the command line and do what it says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    made = commands.add_parser("make")
    made.add_argument("--shape", default="llama-3.2-3b")
    made.add_argument("--folder", required=True)
    timed = commands.add_parser("run")
    timed.add_argument("--folder", required=True)
    timed.add_argument("--text", required=True)
    timed.add_argument("--samples", type=int, default=128)
    timed.add_argument("--length", type=int, default=2048)
    timed.add_argument("--batch-size", type=int, default=4)
    timed.add_argument("--dtype", default="auto")
    timed.add_argument("--reconstruct", default="none")
    timed.add_argument("--reconstruct-values", default="none")
    timed.add_argument("--stages", default="quantize,init")
    timed.add_argument("--cap-gib", type=float)
    timed.add_argument("--work", default="/tmp/qwha-bench-time")
    stepped = commands.add_parser("steps")
    stepped.add_argument("--shapes", default="3072x3072,8192x3072,3072x8192")
    arguments = parser.parse_args()
    if arguments.command == "make":
        make(arguments.shape, Path(arguments.folder))
    elif arguments.command == "run":
        run(arguments)
    else:
        steps([tuple(int(n) for n in shape.split("x")) for shape in arguments.shapes.split(",")])


if __name__ == "__main__":
    main()
