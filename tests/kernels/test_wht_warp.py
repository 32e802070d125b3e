"""Products inside a warp: which layout the compiled kernels give them, and that S_256 is what the instructions compute."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from qwha_cli.kernels.hadamard import dense
from support.triton import HAS_TRITON

if HAS_TRITON:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from qwha_cli.kernels import fused_wht_triton, gate_wht_triton, wht_triton, wht_warp_triton
    from qwha_cli.kernels.wht_tiles import FusedOp, Tiles, fused_tiles_for, tiles_for

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")

WHOLE_ROWS = re.compile(r"sizePerThread = \[1, 8\], threadsPerWarp = \[1, 32\], warpsPerCTA = \[\d+, 1\]")
DTYPES = {"scale_ptr": "*fp32", "row_ptr": "*fp32", "eps": "fp32", "last": "fp32", "rows": "i32"}


def layouts(kernel: object, tiles: Tiles, *, fp8: bool, **constants: object) -> list[str]:
    """The layouts of the tiles that the instructions of a kernel, compiled for a Hopper card, take."""
    names: list[str] = kernel.arg_names  # pyright: ignore[reportAttributeAccessIssue]
    eight = {"z_ptr"} if "z_ptr" in names else {"out_ptr"}
    pointers = {n: "*fp8e4nv" if fp8 and n in eight else "*bf16" for n in names if n.endswith("_ptr")}
    known = {"OUTER": tiles.outer, "TILES": tiles.tiles, "INNER": tiles.inner, "CHUNK": tiles.chunk, "ROWS": tiles.rows}
    known |= {"WAY": tiles.way, "FP8": fp8, "ADD": False, "MIDDLE": 1.0, "MORE": True, "PARTS": 3} | constants
    signature = {name: (pointers | DTYPES).get(name, "constexpr") for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name.endswith("_ptr")}
    source = ASTSource(kernel, signature, {n: v for n, v in known.items() if n in names}, aligned)  # pyright: ignore
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": tiles.warps})
    text = compiled.asm["ttgir"]
    named = dict(re.findall(r"^(#\w+) = (#ttg\S+<.*>)$", text, re.MULTILINE))
    found = re.findall(r"elementwise_inline_asm.*mma.*-> tensor<\d+x256xf32, ([^>]+?)>", text)
    return [named.get(name, name) for name in found]


def cases() -> list[tuple[str, int, bool]]:
    ops = ("norm", "norm of a sum", "norm, backward")
    norms = [(op, size, fp8) for op in ops for size in (2048, 3072) for fp8 in (False, True)]
    gates = [("gate", 8192, False), ("gate", 8192, True), ("gate, backward", 8192, False), ("gate", 14336, True)]
    return [*norms, *gates, ("transform", 14336, False), ("transform", 3072, True), ("transform", 1024, False)]


@pytest.mark.parametrize(("op", "size", "fp8"), cases() if HAS_TRITON else [])
def test_a_warp_holds_whole_rows_eight_numbers_a_lane(op: FusedOp, size: int, fp8: bool) -> None:
    kernel = {
        "transform": wht_triton._transform,
        "gate": gate_wht_triton._gate_forward,
        "gate, backward": gate_wht_triton._gate_backward,
        "norm, backward": fused_wht_triton._norm_backward,
    }.get(op, fused_wht_triton._norm_forward)
    tiles = tiles_for(size) if op == "transform" and not fp8 else fused_tiles_for(op, size, fp8=fp8)
    assert tiles.way == "warp"
    found = layouts(kernel, tiles, fp8=fp8, ADD=op == "norm of a sum")
    assert found
    assert all(WHOLE_ROWS.search(layout) for layout in found), found


class Warp:
    """32 lanes that run the few instructions of PTX that the text has: each register a tensor of 32 numbers."""

    def __init__(self, pairs: list[Tensor], dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.registers: dict[str, Tensor] = {f"${8 + i}": pair for i, pair in enumerate(pairs)}
        self.registers["%laneid"] = torch.arange(32, dtype=torch.int64)

    def value(self, name: str) -> Tensor:
        if name in self.registers:
            return self.registers[name]
        return torch.full((32,), int(name, 0), dtype=torch.int64)

    def run(self, text: str) -> None:
        for line in text.strip()[1:-1].split(";"):
            name, _, rest = line.strip().partition(" ")
            if not name or name == ".reg":
                continue
            groups = [part.strip() for part in re.findall(r"\{[^}]*\}|[^,{}]+", rest) if part.strip(", ")]
            self.step(name.split("."), groups)

    def step(self, name: list[str], to: list[str]) -> None:
        mask = 0xFFFFFFFF
        match name[0]:
            case "mov" if to[1].startswith("0f"):
                self.registers[to[0]] = torch.zeros(32, dtype=torch.float64)
            case "mov":
                self.registers[to[0]] = self.value(to[1])
            case "cvt":
                # the first source goes to the upper half
                upper, lower = (self.registers[n].to(self.dtype).view(torch.int16).long() & 0xFFFF for n in to[1:])
                self.registers[to[0]] = upper << 16 | lower
            case "mma":
                assert name[3] == "m16n8k16"
                self.mma(*([n.strip() for n in group[1:-1].split(",")] for group in to))
            case _:
                a, b = self.value(to[1]), self.value(to[2])
                done = {"shr": a >> b, "shl": a << b, "and": a & b, "or": a | b, "xor": a ^ b}[name[0]]
                self.registers[to[0]] = done & mask

    def pair(self, name: str) -> Tensor:
        """The two numbers of each lane's register (32, 2), the lower half first."""
        both = torch.stack([self.registers[name] & 0xFFFF, self.registers[name] >> 16], dim=1)
        return both.to(torch.int32).to(torch.int16).view(self.dtype).double()

    def mma(self, d: list[str], a: list[str], b: list[str], c: list[str]) -> None:
        """PTX ISA, Matrix Fragments for mma.m16n8k16 with floating point type."""
        lane = torch.arange(32)
        row, column = lane // 4, 2 * (lane % 4)
        left, right, result = torch.zeros(16, 16).double(), torch.zeros(16, 8).double(), torch.zeros(16, 8).double()
        for i, name in enumerate(a):
            for j in range(2):
                left[row + 8 * (i % 2), column + 8 * (i // 2) + j] = self.pair(name)[:, j]
        for i, name in enumerate(b):
            for j in range(2):
                right[column + 8 * i + j, row] = self.pair(name)[:, j]
        for i, name in enumerate(c):
            result[row + 8 * (i // 2), column + i % 2] = self.registers[name].double()
        result += left @ right
        for i, name in enumerate(d):
            self.registers[name] = result[row + 8 * (i // 2), column + i % 2].float()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pieces", [1, 2, 4])
def test_the_instructions_multiply_a_row_by_s_256(dtype: torch.dtype, pieces: int) -> None:
    # small whole numbers, whose sums need no rounding
    x = torch.randint(-2, 3, (256,), generator=torch.Generator().manual_seed(0)).double()
    # a lane's eight numbers are neighbours, or lie in several pieces of neighbours
    each = 8 // pieces
    index = torch.arange(256).view(pieces, 32, each).permute(1, 0, 2).reshape(32, 8)
    held = x[index].to(dtype).view(torch.int16).long() & 0xFFFF
    warp = Warp([held[:, 2 * i] | held[:, 2 * i + 1] << 16 for i in range(4)], dtype)
    text = wht_warp_triton._BF16 if dtype == torch.bfloat16 else wht_warp_triton._F16
    warp.run(text.value)
    found = torch.empty(256).double()
    for i in range(8):
        found[index[:, i]] = warp.registers[f"${i}"].double()
    assert torch.equal(found, x @ dense(256) * (16 * wht_warp_triton.SHRUNK))
