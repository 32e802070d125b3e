"""A few tokens times codes and sparse entries in Triton; see quant_matmul.py.

A program takes some outputs and a slice of the inputs, or a piece of these outputs' entries; if there is more than one such part,
a second kernel adds their sums in a fixed order: no result depends on which program ends first. A code of b bits becomes a number
without a conversion: its bits laid into the mantissa of 1.0 give 1 + c / 2^b, and of the sums over a group

    Σ z_k s (c_k − zero) = s 2^b Σ z_k (1 + c_k / 2^b) − s (2^b + zero) Σ z_k.

One token is multiplied element by element. More go through the tensor cores, padded to 16: code j of all units (words; 3 bits:
three words) of a tile makes one product, for which inputs are laid out as (code in unit, unit, token) first.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qwha_cli.kernels.codes import Codes
from qwha_cli.kernels.places import Places
from qwha_cli.kernels.quant_matmul_cut import PADDED_TOKENS, Config, Unit, default_config

_REDUCED = 128
# the bits of 1.0; an argument of the kernel, because a second constant in `a & b | c` takes an instruction more, every code
_ONE = 0x3F800000


def quant_matmul(
    z: Tensor,
    u: Tensor,
    base: Codes,
    sparse: tuple[Places, Tensor] | None,
    *,
    scale: float,
    bias: Tensor | None,
    config: Config | None = None,
) -> Tensor:
    """As `quant_matmul.quant_matmul`, with F and its values, and how to cut the work where the rule shall not say it."""
    (tokens, in_features), out_features, unit = z.shape, base.shape[0], Unit.of(base)
    config = config or default_config(base, tokens=tokens, entries=0 if sparse is None else len(sparse[0]))
    units = -(-in_features // unit.size)
    # codes of one row lie side by side in nf4: there, inputs in this order are side by side too
    arranged = tokens > 1 or in_features % unit.size > 0 or base.layout == "nf4"
    dense_input = _arrange(z, unit.size) if arranged else z.contiguous()
    sparse_input = dense_input if u is z or sparse is None else _arrange(u, unit.size) if arranged else u.contiguous()
    pieces = 0 if sparse is None else config.pieces if config.slices == 1 else max(config.pieces, 1)
    parts = config.slices + pieces
    result = torch.empty(tokens, out_features, dtype=z.dtype, device=z.device)
    sums = torch.empty(parts, tokens, out_features, dtype=torch.float32, device=z.device) if parts > 1 else result
    starts, columns, values = (None, None, None) if sparse is None else (sparse[0].row_starts, sparse[0].columns, sparse[1])
    codes = base.codes.view(-1).view(torch.int32) if base.layout == "nf4" and unit.size == 8 else base.codes
    dependent = {"launch_pdl": True} if config.early else {}
    tiles = -(-units // config.units)
    per_slice = -(-tiles // config.slices) * config.units
    _multiply[(-(-out_features // config.outputs), parts)](
        dense_input, sparse_input, codes, base.scales, base.zeros,
        starts, columns, values, bias if parts == 1 else None, sums,
        out_features, tokens, units, per_slice, 0 if base.layout == "nf4" else base.codes.shape[0], base.zeros.shape[-1],
        in_features, config.slices, pieces, tokens if arranged else unit.size, units * tokens if arranged else 1,
        float(scale), _ONE,
        NF4=base.layout == "nf4", BITS=base.bits, ZERO_BITS=base.zero_bits, GROUP=base.group_size,
        UNIT=unit.size, WORDS=unit.words, PART=unit.part,
        BLOCK_N=config.outputs, BLOCK_W=config.units, BLOCK_E=config.entries, BLOCK_M=1 if tokens == 1 else PADDED_TOKENS,
        STAGES=config.stages, EARLY=config.early, num_warps=config.warps, **dependent,
    )  # fmt: skip
    if parts > 1:
        _add_up[(-(-tokens * out_features // _REDUCED),)](
            sums, bias, result, out_features, tokens * out_features, parts, PADDED=triton.next_power_of_2(parts),
            BLOCK=_REDUCED, EARLY=config.early, num_warps=4, **dependent,
        )  # fmt: skip
    return result


def _arrange(z: Tensor, unit: int) -> Tensor:
    """(tokens, in) as (unit, units, tokens), zeros behind the end: code j of unit w belongs to input w · unit + j."""
    padded = torch.nn.functional.pad(z, (0, -z.shape[1] % unit))
    return padded.view(z.shape[0], -1, unit).permute(2, 1, 0).contiguous()


@triton.jit
def _one_and_code(first, second, third, one, j: tl.constexpr, BITS: tl.constexpr):
    """1 + code / 2^BITS for code j of units: its bits become the upper ones of a float32's mantissa."""
    WORD: tl.constexpr = j * BITS // 32
    SHIFT: tl.constexpr = j * BITS % 32
    UP: tl.constexpr = 23 - BITS
    MASK: tl.constexpr = (1 << BITS) - 1
    word = first
    after = second
    if WORD == 1:
        word = second
        after = third
    if WORD == 2:
        word = third
    if SHIFT + BITS > 32:
        # the shift copies the sign
        low = (word >> SHIFT) & ((1 << (32 - SHIFT)) - 1)
        placed = ((low | (after << (32 - SHIFT))) & MASK) << UP
    elif SHIFT >= UP:
        placed = (word >> (SHIFT - UP)) & (MASK << UP)
    else:
        placed = (word << (UP - SHIFT)) & (MASK << UP)
    return (placed | one).to(tl.float32, bitcast=True)


@triton.jit
def _nf4_code(word, j: tl.constexpr):
    """Code j of units of bytes that each hold two, the first in the high half."""
    SHIFT: tl.constexpr = 8 * (j // 2) + 4 * (1 - j % 2)
    return (word >> SHIFT) & 15


@triton.jit
def _zeros(zeros_ptr, n, g, inside, stride, ZERO_BITS: tl.constexpr):
    """Stored zero points of outputs n and groups g, float32 (n, g)."""
    shift = ((n * ZERO_BITS) % 32).to(tl.uint32)[:, None]
    at = zeros_ptr + g[None, :] * stride + (n * ZERO_BITS // 32)[:, None]
    found = tl.load(at, mask=inside, other=0).to(tl.uint32, bitcast=True) >> shift
    if ZERO_BITS == 3:
        straddles = shift > 29
        more = tl.load(at + 1, mask=inside & straddles, other=0).to(tl.uint32, bitcast=True)
        found = tl.where(straddles, found | (more << ((32 - shift) & 31)), found)
    return (found & ((1 << ZERO_BITS) - 1)).to(tl.float32)


@triton.jit
def _grid(
    scales_ptr, zeros_ptr, n, k, inside, out_features, in_features, zero_stride,
    NF4: tl.constexpr, BITS: tl.constexpr, ZERO_BITS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """(factor, shift) of outputs n and inputs k, float32 (n, k): value = factor · (1 + code / 2^BITS) − shift."""
    if NF4:
        factor = tl.load(scales_ptr + (n[:, None] * in_features + k[None, :]) // GROUP, mask=inside, other=0.0)
        shift = factor  # of the table's numbers nothing is taken off
    else:
        g = k // GROUP
        scale = tl.load(scales_ptr + g[None, :] * out_features + n[:, None], mask=inside, other=0.0).to(tl.float32)
        zero = _zeros(zeros_ptr, n, g, inside, zero_stride, ZERO_BITS) * (1.0 / (1 << (ZERO_BITS - BITS)))
        factor = scale * (1 << BITS)
        shift = scale * ((1 << BITS) + zero)
    return factor, shift


@triton.jit
def _units(
    codes_ptr, n, w, inside, out_features, in_features, num_words, NF4: tl.constexpr, UNIT: tl.constexpr, WORDS: tl.constexpr
):
    """Units w of outputs n as three int32 (n, w); where a unit is one word, all three are."""
    if NF4:
        first = tl.load(codes_ptr + n[:, None] * (in_features // UNIT) + w[None, :], mask=inside, other=0).to(tl.int32)
        second = first
        third = first
    else:
        at = codes_ptr + w[None, :] * (WORDS * out_features) + n[:, None]
        first = tl.load(at, mask=inside & (w * WORDS < num_words)[None, :], other=0)
        second = first
        third = first
        if WORDS == 3:
            second = tl.load(at + out_features, mask=inside & (w * WORDS + 1 < num_words)[None, :], other=0)
            third = tl.load(at + 2 * out_features, mask=inside & (w * WORDS + 2 < num_words)[None, :], other=0)
    return first, second, third


@triton.jit
def _dense_part(
    z_ptr, codes_ptr, scales_ptr, zeros_ptr, n, kept, out_features, tokens, begin, end, num_words, zero_stride, in_features,
    unit_stride, code_stride, one, NF4: tl.constexpr, BITS: tl.constexpr, ZERO_BITS: tl.constexpr, GROUP: tl.constexpr,
    UNIT: tl.constexpr, WORDS: tl.constexpr, PART: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr, BLOCK_M: tl.constexpr, STAGES: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Sums (n,), or (n, tokens), over the units begin to end."""
    m = tl.arange(0, BLOCK_M)
    if BLOCK_M == 1:
        acc = tl.zeros((BLOCK_N, BLOCK_W), tl.float32)
    elif NF4:
        acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    else:
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in tl.range(begin, end, BLOCK_W, num_stages=STAGES):
        w = start + tl.arange(0, BLOCK_W)
        inside = kept[:, None] & (w < end)[None, :]
        first, second, third = _units(codes_ptr, n, w, inside, out_features, in_features, num_words, NF4, UNIT, WORDS)
        for part in tl.static_range(UNIT // PART):
            # a part lies in one group; behind the last input there is none
            k = w * UNIT + part * PART
            grouped = inside & (k < in_features)[None, :]
            factor, shift = _grid(
                scales_ptr, zeros_ptr, n, k, grouped, out_features, in_features, zero_stride, NF4, BITS, ZERO_BITS, GROUP
            )
            if EARLY:
                tl.extra.cuda.gdc_wait()
            partial = tl.zeros((BLOCK_N, BLOCK_W), tl.float32)
            total = tl.zeros((BLOCK_W,), tl.float32)
            for i in tl.static_range(PART):
                # written out each time, because a constexpr in a loop cannot be given a name
                if NF4:
                    value = tl.load(zeros_ptr + _nf4_code(first, part * PART + i))
                else:
                    value = _one_and_code(first, second, third, one, part * PART + i, BITS)
                at_z = z_ptr + w * unit_stride + (part * PART + i) * code_stride
                if BLOCK_M == 1:
                    known = tl.load(at_z, mask=w < end, other=0.0).to(tl.float32)
                    partial += value * known[None, :]
                    total += known
                else:
                    masked = (w < end)[:, None] & (m < tokens)[None, :]
                    known = tl.load(at_z[:, None] + m[None, :], mask=masked, other=0.0)
                    # on its way to the tensor cores a tile is stored as it was read: codes of nf4 row by row, others by column
                    if NF4:
                        acc = tl.dot((value * factor).to(known.dtype), known, acc, input_precision="ieee")
                    else:
                        weight = (value * factor - shift).to(known.dtype)
                        acc = tl.dot(tl.trans(known), tl.trans(weight), acc, input_precision="ieee")
            if BLOCK_M == 1:
                acc += factor * partial
                if not NF4:
                    acc -= shift * total[None, :]
    if BLOCK_M == 1:
        return tl.sum(acc, axis=1)
    elif NF4:
        return acc
    else:
        return tl.trans(acc)


@triton.jit
def _sparse_part(
    u_ptr, columns_ptr, values_ptr, start, stop, tokens, piece, pieces, unit_stride, code_stride, scale,
    UNIT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """Sums (n,), or (n, tokens), over a piece of the entries."""
    m = tl.arange(0, BLOCK_M)
    longest = tl.max(stop - start)
    if BLOCK_M == 1:
        acc = tl.zeros((BLOCK_N, BLOCK_E), tl.float32)
    else:
        acc = tl.zeros((BLOCK_N, BLOCK_E, BLOCK_M), tl.float32)
    for offset in range(piece * BLOCK_E, longest, pieces * BLOCK_E):
        at = (start + offset)[:, None] + tl.arange(0, BLOCK_E)[None, :]
        inside = at < stop[:, None]
        column = tl.load(columns_ptr + at, mask=inside, other=0).to(tl.int32)
        value = tl.load(values_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if EARLY:
            tl.extra.cuda.gdc_wait()
        at_u = u_ptr + (column // UNIT) * unit_stride + (column % UNIT) * code_stride
        if BLOCK_M == 1:
            acc += value * tl.load(at_u, mask=inside, other=0.0).to(tl.float32)
        else:
            masked = inside[:, :, None] & (m < tokens)[None, None, :]
            acc += value[:, :, None] * tl.load(at_u[:, :, None] + m[None, None, :], mask=masked, other=0.0).to(tl.float32)
    return tl.sum(acc, axis=1) * scale


# numbers that only say how often a loop runs are worth no compilation of their own
@triton.jit(do_not_specialize=["units", "per_slice", "num_words", "slices", "pieces"])
def _multiply(
    z_ptr, u_ptr, codes_ptr, scales_ptr, zeros_ptr, starts_ptr, columns_ptr, values_ptr, bias_ptr, sums_ptr,
    out_features, tokens, units, per_slice, num_words, zero_stride, in_features, slices, pieces, unit_stride, code_stride,
    scale, one, NF4: tl.constexpr, BITS: tl.constexpr, ZERO_BITS: tl.constexpr, GROUP: tl.constexpr,
    UNIT: tl.constexpr, WORDS: tl.constexpr, PART: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr, STAGES: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    part = tl.program_id(1)
    kept = n < out_features
    if starts_ptr is not None:
        # before the codes are: everything of F waits for these
        has_entries = (part >= slices) | (pieces == 0)
        own = n < tl.where(has_entries, out_features, 0)
        start = tl.load(starts_ptr + n, mask=own, other=0)
        stop = tl.load(starts_ptr + n + 1, mask=own, other=0)
    sums = tl.zeros((BLOCK_N,) if BLOCK_M == 1 else (BLOCK_N, BLOCK_M), tl.float32)
    if part < slices:
        begin = part * per_slice
        sums += _dense_part(
            z_ptr, codes_ptr, scales_ptr, zeros_ptr, n, kept, out_features, tokens, begin,
            tl.minimum(begin + per_slice, units), num_words, zero_stride, in_features, unit_stride, code_stride, one,
            NF4, BITS, ZERO_BITS, GROUP, UNIT, WORDS, PART, BLOCK_N, BLOCK_W, BLOCK_M, STAGES, EARLY,
        )  # fmt: skip
    if starts_ptr is not None:
        piece = tl.maximum(part - slices, 0)
        if has_entries:
            sums += _sparse_part(
                u_ptr, columns_ptr, values_ptr, start, stop, tokens, piece, tl.maximum(pieces, 1),
                unit_stride, code_stride, scale, UNIT, BLOCK_N, BLOCK_E, BLOCK_M, EARLY,
            )  # fmt: skip
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + n, mask=kept, other=0.0).to(tl.float32)
        sums += bias if BLOCK_M == 1 else bias[:, None]
    if EARLY:
        # a program without units or entries has not waited yet, and the last call's sums may lie here
        tl.extra.cuda.gdc_wait()
    first = part * tokens
    if BLOCK_M == 1:
        tl.store(sums_ptr + first * out_features + n, sums.to(sums_ptr.dtype.element_ty), mask=kept)
    else:
        m = tl.arange(0, BLOCK_M)
        at = sums_ptr + (first + m)[None, :] * out_features + n[:, None]
        tl.store(at, sums.to(sums_ptr.dtype.element_ty), mask=kept[:, None] & (m < tokens)[None, :])


@triton.jit(do_not_specialize=["parts"])
def _add_up(
    sums_ptr,
    bias_ptr,
    result_ptr,
    out_features,
    size,
    parts,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    """The sum over the first dimension of sums (parts, tokens, out), and the bias."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    part = tl.arange(0, PADDED)
    inside = (part < parts)[:, None] & (at < size)[None, :]
    total = tl.sum(tl.load(sums_ptr + part[:, None] * size + at[None, :], mask=inside, other=0.0), axis=0)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + at % out_features, mask=at < size, other=0.0).to(tl.float32)
    tl.store(result_ptr + at, total.to(result_ptr.dtype.element_ty), mask=at < size)
