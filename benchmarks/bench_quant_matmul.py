"""Codes and entries times a few tokens: microseconds a call, beside a dense bfloat16 product and the time to read the bytes.

    python benchmarks/bench_quant_matmul.py run --out quant_matmul.jsonl
    python benchmarks/bench_quant_matmul.py tune --shapes 3b --formats 2 --tokens 1,16 --out tune.jsonl
    python benchmarks/bench_quant_matmul.py run --device cpu --shapes tiny        (does it work? no numbers worth keeping)

Every call reads another copy of the weights, of as many as are larger than any cache. `graph_us` is a call inside a CUDA graph of
all copies one after the other (timing.py), as generation runs it; `eager_us` the same without a graph, where Python's launches
are the limit. `floor_us` is what reading codes, entries and inputs takes at the bandwidth of a large copy in the same run.
--check compares each case with a float64 product first.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from timing import copy_bandwidth, eager_us, graph_us, num_copies
from torch import Tensor

from qwha_cli.kernels.codes import Codes
from qwha_cli.kernels.dequantize import dequantize
from qwha_cli.kernels.places import Places
from qwha_cli.kernels.quant_matmul import quant_matmul
from qwha_cli.kernels.quant_matmul_cut import Config, default_config
from qwha_cli.kernels.sparse_matmul import SparseRows
from qwha_cli.kernels.unpack import num_words

SHAPES = {
    "tiny": [(80, 128), (128, 64)],
    "3b": [(3072, 3072), (1024, 3072), (8192, 3072), (3072, 8192)],
    "8b": [(4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336)],
}
# bits and bits of a zero point; None for nf4. A head in codes has 8: --shapes 128256x3072 --formats 8
FORMATS: dict[str, tuple[int, int] | None] = {"2": (2, 4), "3": (3, 4), "4": (4, 4), "nf4": None, "8": (8, 8)}
OF_LAYERS = ["2", "3", "4", "nf4"]
GROUP = 64
SHARE = 0.042
MOST_COPIES = 96


@dataclass(frozen=True)
class Layer:
    """One copy of what a call reads."""

    base: Codes
    sparse: tuple[Places, Tensor] | None

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        own = [self.base.codes, self.base.scales, self.base.zeros]
        if self.sparse is not None:
            own += [self.sparse[0].row_starts, self.sparse[0].columns, self.sparse[1]]
        return sum(tensor.numel() * tensor.element_size() for tensor in own)

    def copy(self) -> Layer:
        """The same numbers elsewhere."""
        base, sparse = self.base, self.sparse
        codes = Codes(base.codes.clone(), base.scales.clone(), base.zeros.clone(), *list(vars(base).values())[3:])
        if sparse is None:
            return Layer(codes, None)
        places = Places(sparse[0].row_starts.clone(), sparse[0].columns.clone(), sparse[0].shape)
        return Layer(codes, (places, sparse[1].clone()))


def random_layer(
    shape: tuple[int, int], form: tuple[int, int] | None, *, adapter: bool, device: str, group: int = GROUP
) -> Layer:
    """Random codes, and entries at random places."""
    out, size = shape
    generator = torch.Generator(device).manual_seed(0)

    def words(*sizes: int) -> Tensor:
        return torch.randint(-(2**31), 2**31, sizes, generator=generator, device=device, dtype=torch.int32)

    scales = torch.rand(size // group, out, generator=generator, device=device) * 0.01 + 0.01
    if form is None:
        table = torch.linspace(-1, 1, 16, device=device)
        base = Codes(words(out * size // 8).view(torch.uint8).view(-1, 1), scales.view(-1), table, "nf4", shape, 4, 4, group)
    else:
        bits, zero_bits = form
        zeros = words(size // group, num_words(out, bits=zero_bits))
        base = Codes(words(num_words(size, bits=bits), out), scales.half(), zeros, "gptq", shape, bits, zero_bits, group)
    if not adapter:
        return Layer(base, None)
    mask = torch.rand(shape, generator=generator, device=device) < SHARE
    rows = SparseRows.from_mask(torch.randn(shape, generator=generator, device=device) * 0.01, mask)
    return Layer(base, (Places.from_rows(rows), rows.values))


def copies(layer: Layer, device: str) -> list[Layer]:
    """As many as no cache holds."""
    number = 2 if device == "cpu" else num_copies(layer.nbytes, most=MOST_COPIES)
    return [layer, *(layer.copy() for _ in range(number - 1))]


def checked(layer: Layer, z: Tensor, found: Tensor) -> float:
    """The error's share of the largest output, beside the product in float64."""
    weight = dequantize(layer.base, torch.float64)
    if layer.sparse is not None:
        weight += layer.sparse[0].with_values(layer.sparse[1]).dense(torch.float64)
    wanted = z.double() @ weight.T
    return float((found.double() - wanted).abs().max() / wanted.abs().max())


def calls_of(layers: Iterable[Layer], z: Tensor) -> list[Callable[[], Tensor]]:
    """The op on each copy."""

    def call(layer: Layer) -> Callable[[], Tensor]:
        places, values = layer.sparse or (None, None)
        return lambda: quant_matmul(z, layer.base, places=places, values=values)

    return [call(layer) for layer in layers]


def times(calls: Sequence[Callable[[], Tensor]], *, cuda: bool) -> dict[str, float | None]:
    """In a graph, where there are graphs, and launched one by one."""
    return {"graph_us": graph_us(calls) if cuda else None, "eager_us": eager_us(calls, cuda=cuda)}


def dense_times(shape: tuple[int, int], z: Tensor) -> dict[str, float | None]:
    """A bfloat16 matrix of the same shape: what a merged 16-bit layer costs."""
    number = 2 if z.device.type == "cpu" else num_copies(2 * shape[0] * shape[1])
    weights = [torch.randn(shape, device=z.device).to(z.dtype) for _ in range(number)]
    calls: list[Callable[[], Tensor]] = [lambda w=w: torch.nn.functional.linear(z, w) for w in weights]
    return {f"dense_{name}": found for name, found in times(calls, cuda=z.is_cuda).items()}


def run(a: argparse.Namespace) -> Iterator[dict[str, object]]:
    """A line for every shape, format, number of tokens, with and without an adapter."""
    cuda = a.device == "cuda"
    rate = copy_bandwidth(a.device) / 1e6
    yield {"copy_gb_s": rate / 1e3, "device": torch.cuda.get_device_name() if cuda else "cpu", "torch": torch.__version__}
    for shape in shapes_of(a):
        inputs = {tokens: torch.randn(tokens, shape[1], device=a.device).bfloat16() for tokens in a.tokens}
        beside = {tokens: dense_times(shape, z) for tokens, z in inputs.items()}
        for name in a.formats:
            for adapter in (False, True):
                layers = copies(random_layer(shape, FORMATS[name], adapter=adapter, device=a.device), a.device)
                for tokens, z in inputs.items():
                    calls = calls_of(layers, z)
                    line: dict[str, object] = {"shape": shape, "format": name, "adapter": adapter, "tokens": tokens}
                    if a.check:
                        line["error"] = checked(layers[0], z, calls[0]())
                        # bfloat16 rounds to 0.004 of a number
                        assert checked(layers[0], z, calls[0]()) < 0.01, line
                    line |= {
                        "mb": layers[0].nbytes / 1e6,
                        "copies": len(layers),
                        "floor_us": (layers[0].nbytes + z.nbytes) / rate,
                    }
                    yield line | times(calls, cuda=cuda) | beside[tokens]


def tune(a: argparse.Namespace) -> Iterator[dict[str, object]]:
    """A line for every way to cut the work, and one for the rule's; CUDA only."""
    from qwha_cli.kernels.quant_matmul_triton import quant_matmul as cut_matmul

    for shape in shapes_of(a):
        for name in a.formats:
            layers = copies(random_layer(shape, FORMATS[name], adapter=a.adapter, device=a.device), a.device)
            for tokens in a.tokens:
                z = torch.randn(tokens, shape[1], device=a.device).bfloat16()
                places = layers[0].sparse[0] if layers[0].sparse else ()
                rule = default_config(layers[0].base, tokens=tokens, entries=len(places))
                tried = candidates(name, tokens, adapter=a.adapter)
                for config in [rule, replace(rule, early=True), *(replace(c, early=a.early) for c in tried)]:

                    def call(layer: Layer, config: Config = config, z: Tensor = z) -> Tensor:
                        return cut_matmul(z, z, layer.base, layer.sparse, scale=1.0, bias=None, config=config)

                    line: dict[str, object] = {"shape": shape, "format": name, "tokens": tokens, "adapter": a.adapter}
                    line |= {"rule": config == rule, **asdict(config)}
                    try:
                        calls: list[Callable[[], Tensor]] = [lambda x=x, call=call: call(x) for x in layers]
                        yield line | {"graph_us": graph_us(calls, replays=5)}
                    except Exception as error:  # too much shared memory is an answer too
                        yield line | {"failed": f"{type(error).__name__}: {str(error)[:200]}"}


def candidates(form: str, tokens: int, *, adapter: bool) -> Iterator[Config]:
    """Cuts worth a try; slices and pieces cost no compilation."""
    if form == "nf4":
        blocks = [(16, 64, 4), (16, 128, 4), (32, 32, 4)] + ([(8, 128, 4), (4, 128, 2)] if tokens == 1 else [(32, 64, 4)])
    elif tokens == 1:
        blocks = [
            (16, 64, 4),
            (16, 128, 8),
            (32, 32, 2),
            (32, 64, 4),
            (32, 128, 8),
            (64, 16, 2),
            (64, 32, 4),
            (128, 16, 4),
            (128, 8, 4),
            (64, 64, 8),
        ]
    else:
        blocks = [(32, 32, 4), (64, 16, 4), (64, 32, 4), (64, 32, 8), (64, 64, 8), (128, 16, 4), (128, 32, 8)]
    entries = ((16, 32) if tokens == 1 else (4, 8)) if adapter else (32,)
    for outputs, units, warps in blocks:
        for per_row in entries:
            for slices in (1, 2, 4, 8, 16):
                for pieces in ((0, 2, 4) if slices == 1 else (1, 2, 4)) if adapter else (0,):
                    yield Config(outputs, units, slices, pieces, per_row, warps)


def shapes_of(a: argparse.Namespace) -> list[tuple[int, int]]:
    """The shapes of all models named; AxB stands for itself."""
    found: list[tuple[int, int]] = []
    for name in a.shapes:
        out, by, size = name.partition("x")
        found += [(int(out), int(size))] if by else SHAPES[name]
    return found


def main() -> None:
    """Parse, run, write a JSON line a case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "tune"))
    parser.add_argument("--shapes", default="3b,8b", type=lambda text: text.split(","), help="tiny, 3b, 8b, or OUTxIN")
    parser.add_argument("--formats", default=OF_LAYERS, type=lambda text: text.split(","))
    parser.add_argument("--tokens", default=[1, 4, 16], type=lambda text: [int(x) for x in text.split(",")])
    parser.add_argument("--adapter", action="store_true", help="tune with entries")
    parser.add_argument("--early", action="store_true", help="tune with dependent launches")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path)
    a = parser.parse_args()
    began = time.monotonic()
    with torch.inference_mode():
        for line in {"run": run, "tune": tune}[a.what](a):
            text = json.dumps({key: round(value, 4) if isinstance(value, float) else value for key, value in line.items()})
            print(text, flush=True)
            if a.out is not None:
                with a.out.open("a") as file:
                    file.write(text + "\n")
    print(f"{time.monotonic() - began:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
