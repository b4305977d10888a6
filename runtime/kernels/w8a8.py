"""The product of 8-bit activations and 8-bit weights, with scales, bias and GELU in its epilogue.

    acc[m,n] = sum_k q[m,k] * w[n,k]                             int8: int32, exact; e4m3: fp32
    y[m,n]   = round( g( acc * s_a[m] * s_w[n] + bias[n] ) )     fp32, one rounding; g identity or GELU

q (M, K), w (N, K), both row-major, of one 8-bit dtype; K and N multiples of 16; s_a (M, 1), s_w (N, 1) and
bias (N,) fp32 (the bias in any floating dtype); y (M, N) bf16, fp16 or fp32. M is anything: rows beyond the
last are read as the last one and never written.

Two kernels with one epilogue. `pointers` loads with plain copies and runs from sm_80 on. `descriptors`
loads with the bulk copy engine of sm_90 and newer and keeps its programs for several tiles, so that one
tile's epilogue overlaps the next tile's loads; it needs a Triton with `TensorDescriptor`. Tiles are visited
in groups of rows, so that what a group shares stays in L2.

Hopper's fp8 units keep about 14 bits between additions. `fast=False` moves their sums to fp32 registers
after every 128 products, as torch's `use_fast_accum=False` does. Which tiles are fastest differs by GPU,
shape and Triton: configs.py lists the candidates, `tune` times them.
"""

# mypy: allow-untyped-defs
# (Triton reads the signatures of its kernels itself: annotations there are its own.)

import torch
import torch.nn.functional as F
from torch import Tensor

from runtime.kernels.configs import Config, chosen
from runtime.kernels.gelu_quantize import gelu
from runtime.kernels.launch import INTERPRETED, TensorDescriptor, fused, jit, on, tl

_EXACT_TERMS = 1024  # 127 * 128 * 1024 < 2^24: so many int8 products sum exactly in fp32
_PROMOTED = 128  # products that Hopper's fp8 units sum before fast=False moves them on


def w8a8(
    q: Tensor,
    w: Tensor,
    s_a: Tensor,
    s_w: Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    gelu: bool = False,
    fast: bool = False,
    into: Tensor | None = None,
) -> Tensor:
    """q (M, K), w (N, K), s_a (M, 1), s_w (N, 1), bias (N,) -> y (M, N) of out_dtype.

    into: where the kernel writes y, (M, N) contiguous of out_dtype; new memory unless given. The tiles are
    those that `configs.use` set for this GPU, format, N and K, else a default. Raises ValueError for operands
    that do not fit together.
    """
    _check(q, w, s_a, s_w, bias)
    if not fused(q, q.dtype):
        return w8a8_torch(q, w, s_a, s_w, bias, out_dtype, gelu)
    config = chosen(q.device, q.dtype, w.shape[0], w.shape[1])
    return w8a8_triton(q, w, s_a, s_w, bias, out_dtype, gelu, fast, config, into)


def _check(q: Tensor, w: Tensor, s_a: Tensor, s_w: Tensor, bias: Tensor | None) -> None:
    rows, depth = q.shape
    columns = w.shape[0]
    if w.shape[1] != depth or q.dtype != w.dtype:
        raise ValueError(
            f"q is {tuple(q.shape)} {q.dtype} and w {tuple(w.shape)} {w.dtype}, "
            "expected (M, K) and (N, K) of one dtype"
        )
    if depth % 16 or columns % 16:
        raise ValueError(f"w is {tuple(w.shape)}, expected both sizes to be multiples of 16")
    if s_a.numel() != rows or s_w.numel() != columns or (bias is not None and bias.numel() != columns):
        raise ValueError(
            f"scales {tuple(s_a.shape)} and {tuple(s_w.shape)}, or the bias, do not fit a result of "
            f"{rows} x {columns}"
        )


def w8a8_torch(
    q: Tensor,
    w: Tensor,
    s_a: Tensor,
    s_w: Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    gelu: bool = False,
) -> Tensor:
    """The formula in plain torch: int8 exact, e4m3 summed in fp32."""
    if q.dtype == torch.int8:
        acc = torch.zeros((q.shape[0], w.shape[0]), dtype=torch.int32, device=q.device)
        for start in range(0, q.shape[1], _EXACT_TERMS):
            terms = slice(start, start + _EXACT_TERMS)
            acc += (q[:, terms].float() @ w[:, terms].float().t()).to(torch.int32)
    else:
        acc = q.float() @ w.float().t()
    y = acc.float().mul_(s_a.reshape(-1, 1)).mul_(s_w.reshape(1, -1))
    if bias is not None:
        y = y.add_(bias.reshape(1, -1))
    return (F.gelu(y, approximate="tanh") if gelu else y).to(out_dtype)


def w8a8_triton(
    q: Tensor,
    w: Tensor,
    s_a: Tensor,
    s_w: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    gelu: bool,
    fast: bool,
    config: Config,
    into: Tensor | None = None,
) -> Tensor:
    """The kernel with the tiles of `config`. Raises what Triton raises where the GPU has no room for them."""
    q, w = q.contiguous(), w.contiguous()
    (rows, depth), columns = q.shape, w.shape[0]
    y = torch.empty((rows, columns), dtype=out_dtype, device=q.device) if into is None else into
    if not rows:
        return y
    tiles = -(-rows // config.rows) * -(-columns // config.columns)
    common = (
        y,
        s_a.reshape(-1).contiguous(),
        s_w.reshape(-1).contiguous(),
        s_w if bias is None else bias.reshape(-1).contiguous(),
        rows,
        columns,
        depth,
    )
    flags = {
        "ROWS": config.rows,
        "COLUMNS": config.columns,
        "DEPTH": config.depth,
        "GROUP": config.group,
        "BIAS": bias is not None,
        "GELU": gelu,
        "PROMOTED": 0 if fast or q.dtype == torch.int8 else min(_PROMOTED, config.depth),
        "INTEGER": q.dtype == torch.int8,
        "num_warps": config.warps,
        "num_stages": config.stages,
        "enable_fp_fusion": False,
    }
    with on(q):
        if not config.descriptors:
            _pointers_kernel[(tiles,)](q, w, *common, WHOLE=depth % config.depth == 0, **flags)
            return y
        programs = tiles if INTERPRETED else min(tiles, _processors(q.device) * config.programs)
        blocks = [[config.rows, config.depth], [config.columns, config.depth]]
        operands = (TensorDescriptor.from_tensor(x, block) for x, block in zip((q, w), blocks, strict=True))
        _descriptors_kernel[(programs,)](*operands, *common, PROGRAMS=programs, **flags)
    return y


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@jit
def _tile(index, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr):
    """Row and column of a tile: GROUP tiles down, then one to the right; a group's rows stay in L2."""
    down, across = tl.cdiv(rows, ROWS), tl.cdiv(columns, COLUMNS)
    group = index // (GROUP * across)
    height = tl.minimum(down - group * GROUP, GROUP)
    within = index % (GROUP * across)
    return group * GROUP + within % height, within // height


@jit
def _dot(a, b, acc, PROMOTED: tl.constexpr, INTEGER: tl.constexpr):
    if INTEGER:
        total = tl.dot(a, b, acc, out_dtype=tl.int32)
    elif PROMOTED > 0:
        total = tl.dot(a, b, acc, max_num_imprecise_acc=PROMOTED)
    else:
        total = tl.dot(a, b, acc)
    return total


@jit
def _finish(
    acc,
    y,
    s_a,
    s_w,
    bias,
    rows,
    columns,
    row,
    column,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BIAS: tl.constexpr,
    GELU: tl.constexpr,
):
    """Scales, bias, activation, rounding and the store of one tile."""
    m = row * ROWS + tl.arange(0, ROWS)
    n = column * COLUMNS + tl.arange(0, COLUMNS)
    value = acc.to(tl.float32) * tl.load(s_a + m, mask=m < rows, other=0.0)[:, None]
    value = value * tl.load(s_w + n, mask=n < columns, other=0.0)[None, :]
    if BIAS:
        value = value + tl.load(bias + n, mask=n < columns, other=0.0).to(tl.float32)[None, :]
    if GELU:
        value = gelu(value)
    places = y + m.to(tl.int64)[:, None] * columns + n[None, :]
    tl.store(places, value.to(y.dtype.element_ty), mask=(m < rows)[:, None] & (n < columns)[None, :])


@jit
def _pointers_kernel(
    q,
    w,
    y,
    s_a,
    s_w,
    bias,
    rows,
    columns,
    depth,
    WHOLE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    BIAS: tl.constexpr,
    GELU: tl.constexpr,
    PROMOTED: tl.constexpr,
    INTEGER: tl.constexpr,
):
    row, column = _tile(tl.program_id(0), rows, columns, ROWS, COLUMNS, GROUP)
    m = tl.minimum(row * ROWS + tl.arange(0, ROWS), rows - 1)
    n = tl.minimum(column * COLUMNS + tl.arange(0, COLUMNS), columns - 1)
    k = tl.arange(0, DEPTH)
    a_places = q + m.to(tl.int64)[:, None] * depth + k[None, :]
    b_places = w + n.to(tl.int64)[None, :] * depth + k[:, None]
    acc = tl.zeros((ROWS, COLUMNS), dtype=tl.int32 if INTEGER else tl.float32)
    for start in range(0, depth, DEPTH):
        if WHOLE:
            a = tl.load(a_places)
            b = tl.load(b_places)
        else:
            a = tl.load(a_places, mask=(k < depth - start)[None, :], other=0.0)
            b = tl.load(b_places, mask=(k < depth - start)[:, None], other=0.0)
        acc = _dot(a, b, acc, PROMOTED, INTEGER)
        a_places += DEPTH
        b_places += DEPTH
    _finish(acc, y, s_a, s_w, bias, rows, columns, row, column, ROWS, COLUMNS, BIAS, GELU)


@jit
def _descriptors_kernel(
    q,
    w,
    y,
    s_a,
    s_w,
    bias,
    rows,
    columns,
    depth,
    PROGRAMS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    BIAS: tl.constexpr,
    GELU: tl.constexpr,
    PROMOTED: tl.constexpr,
    INTEGER: tl.constexpr,
):
    tiles = tl.cdiv(rows, ROWS) * tl.cdiv(columns, COLUMNS)
    for index in tl.range(tl.program_id(0), tiles, PROGRAMS, flatten=True):
        row, column = _tile(index, rows, columns, ROWS, COLUMNS, GROUP)
        acc = tl.zeros((ROWS, COLUMNS), dtype=tl.int32 if INTEGER else tl.float32)
        for start in range(0, depth, DEPTH):  # what lies beyond the matrices arrives as zeros
            a = q.load([row * ROWS, start])
            b = w.load([column * COLUMNS, start])
            acc = _dot(a, b.T, acc, PROMOTED, INTEGER)
        _finish(acc, y, s_a, s_w, bias, rows, columns, row, column, ROWS, COLUMNS, BIAS, GELU)
